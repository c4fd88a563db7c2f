"""Pruning of attention: what is measured is what the model does, and what stays is what was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.patterns import (
    AdaptiveWindow,
    AllOf,
    AttentionPattern,
    BlockList,
    ByLayer,
    Causal,
    PrefixSyntax,
    SlidingWindow,
    entropy_windows,
)
from blues.model.attention.pruning import (
    block_list,
    blocks_to_keep,
    cost_of_pruning,
    measure_attention,
    prune_attention,
    with_pattern,
)
from tests.model.examples import lively, small, tokens


def model_of(pattern=None, **changes):
    config = small(num_layers=2, **changes)
    config = config.replace(attention=config.attention.replace(pattern=pattern or Causal.Config()))
    return lively(config.build()).double().eval()


def test_a_model_measured_computes_what_it_always_does():
    model = model_of(attention__num_kv_heads=2)
    ids = tokens(model, length=30)
    before = model(ids).logits_BTV
    outputs = []
    handle = model.register_forward_hook(lambda *args: outputs.append(args[-1]))
    hidden = []
    hook = model.norm.register_forward_hook(lambda *args: hidden.append(args[-1]))
    mass = measure_attention(model, [ids], block=8)
    handle.remove()
    hook.remove()
    torch.testing.assert_close(torch.nn.functional.linear(hidden[0], model.embedding.weight), before)
    torch.testing.assert_close(model(ids).logits_BTV, before, atol=0, rtol=0)
    assert mass.tokens == 60 and mass.mass_LHNN.shape == (2, 4, 4, 4) and mass.entropy_LH.shape == (2, 4)


def test_mass_adds_up_and_lies_where_the_pattern_allows():
    model = model_of(SlidingWindow.Config(window=9))
    ids = [tokens(model, length=30, seed=seed) for seed in range(3)]
    mass = measure_attention(model, ids, block=8)
    torch.testing.assert_close(mass.mass_LHNN.sum(dim=-1), torch.ones(2, 4, 4, dtype=torch.float64))
    band = torch.ones(4, 4, dtype=torch.bool).tril().triu(-1)
    assert torch.equal(mass.visible_LHNN, band.expand(2, 4, 4, 4))
    assert not mass.mass_LHNN[~mass.visible_LHNN].any()
    separate = [measure_attention(model, [each], block=8).mass_LHNN for each in ids]
    torch.testing.assert_close(mass.mass_LHNN, torch.stack(separate).mean(dim=0))


def test_uniform_attention_has_the_mass_and_entropy_of_counting():
    model = model_of(attention__qk_norm=False)
    with torch.no_grad():
        for layer in model.attentions:
            layer.qkv.weight.zero_()
    mass = measure_attention(model, [tokens(model, length=16)], block=4)
    counted = torch.ones(16, 16, dtype=torch.float64).tril() / torch.arange(1, 17)[:, None]
    blocks = counted.unflatten(0, (4, 4)).unflatten(2, (4, 4)).sum(dim=3).mean(dim=1)
    torch.testing.assert_close(mass.mass_LHNN, blocks.expand(2, 4, 4, 4))
    expected = torch.arange(1, 17).double().log().mean()
    torch.testing.assert_close(mass.entropy_LH, expected.expand(2, 4))
    assert len(set(entropy_windows(mass.entropy_LH, multiple=4, most=16).windows)) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.floats(0.05, 1.0), st.integers(0, 999))
def test_what_stays_is_enough_and_no_more(blocks, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, 3, blocks, blocks, generator=generator, dtype=torch.float64).pow(4).tril()
    mass = mass / mass.sum(dim=-1, keepdim=True)
    kept = blocks_to_keep(mass, keep)
    assert kept.diagonal(dim1=-2, dim2=-1).all() and not kept.triu(diagonal=1).any()
    assert ((mass * kept).sum(dim=-1) >= keep - 1e-12).all()
    own = torch.eye(blocks, dtype=torch.bool)
    least = torch.where(kept & ~own, mass, torch.inf).amin(dim=-1, keepdim=True)
    chosen = (mass * (kept & ((mass >= least) | ~own))).sum(dim=-1)  # without the own block, if it came in as an extra
    assert (chosen - least[..., 0].nan_to_num(posinf=0) < keep).all()
    pattern = block_list(kept[0], 2).build()
    assert torch.equal(pattern.table(torch.device("cpu")).expand(3, -1, -1), kept[0])


def test_everything_kept_is_the_model_as_it_was():
    model = model_of()
    ids = tokens(model, length=33)
    pruned = prune_attention(model, measure_attention(model, [ids[:, :-1]], block=8), keep=1.0)
    assert pruned.blocks_saved == 0 and float(pruned.mass_LH.min()) == pytest.approx(1)
    cost = cost_of_pruning(model, pruned, [(ids[:, :-1], ids[:, 1:])])
    assert cost.after == pytest.approx(cost.before, abs=1e-12)
    assert str(cost).endswith("(+0.0000)") or str(cost).endswith("(-0.0000)")


@pytest.mark.parametrize("pattern", [Causal.Config(), SlidingWindow.Config(window=20)])
def test_a_pruned_model_keeps_most_of_its_attention_and_changes_little(pattern):
    model = peaked(model_of(pattern))
    batches = [tokens(model, length=49, seed=seed) for seed in range(4)]
    inputs = torch.cat(batches)[:, :-1]
    mass = measure_attention(model, [ids[:, :-1] for ids in batches], block=4)
    fine, rough = (prune_attention(model, mass, keep=keep) for keep in (0.95, 0.3))
    assert float(fine.mass_LH.min()) >= 0.95 and 0 < fine.blocks_saved < rough.blocks_saved
    assert "blocks of attention stay" in str(fine)
    whole, little, much = (
        with_pattern(model, each)(inputs).logits_BTV for each in (pattern, fine.pattern, rough.pattern)
    )
    assert (little - whole).square().mean() < 0.3 * (much - whole).square().mean()
    cost = cost_of_pruning(model, fine, [(ids[:, :-1], ids[:, 1:]) for ids in batches])
    targets = torch.cat(batches)[:, 1:]
    assert cost.before == pytest.approx(float(model(inputs, targets).losses.cross_entropy))
    assert cost.after == pytest.approx(float(with_pattern(model, fine.pattern)(inputs, targets).losses.cross_entropy))
    assert cfg.from_yaml(AttentionPattern.Config, cfg.to_yaml(fine.pattern)) == fine.pattern
    again = measure_attention(with_pattern(model, fine.pattern), [inputs], block=4)
    assert int(again.visible_LHNN.sum()) == int(fine.kept_LH.sum())


def peaked(model):
    """Larger scores, so that attention has favourites."""
    with torch.no_grad():
        for layer in model.attentions:
            layer.query_norm.weight.mul_(4)
    return model


def test_the_old_pattern_stays_in_force_within_blocks():
    model = model_of(SlidingWindow.Config(window=3))
    mass = measure_attention(model, [tokens(model, length=16)], block=8)
    pruned = prune_attention(model, mass, keep=1.0).pattern
    assert pruned == AllOf.Config(patterns=(SlidingWindow.Config(window=3), BlockList.Config(block=8, heads=("1.3",))))


def test_a_pruned_pattern_can_be_trained_on():
    model = peaked(model_of())
    ids = tokens(model, length=33)
    mass = measure_attention(model, [ids[:, :-1]], block=8)
    pruned = with_pattern(model, prune_attention(model, mass, keep=0.5).pattern).train()
    assert isinstance(pruned.config.attention.pattern, ByLayer.Config)
    pruned(ids[:, :-1], ids[:, 1:]).losses.total.backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_what_cannot_be_pruned_is_refused():
    model = model_of()
    mass = measure_attention(model, [tokens(model)], block=8)
    with pytest.raises(ConfigError, match="keep: must be above 0 and at most 1, got 0"):
        prune_attention(model, mass, keep=0)
    with pytest.raises(ConfigError, match="calibration: no tokens"):
        measure_attention(model, [])
    with pytest.raises(ConfigError, match="rows have 16 and 9 tokens"):
        measure_attention(model, [tokens(model), tokens(model, length=9)])
    with pytest.raises(ConfigError, match="prefix_syntax depends on the text"):
        measure_attention(model_of(PrefixSyntax.Config()), [tokens(model)])
    soft = model_of(AdaptiveWindow.Config(window=8, ramp=2))
    assert float(measure_attention(soft, [tokens(soft)], block=8).mass_LHNN.sum()) == pytest.approx(2 * 4 * 2)
    with pytest.raises(ConfigError, match="adaptive_window weighs keys"):
        prune_attention(soft, mass)
    with pytest.raises(ConfigError, match="validation: no batches"):
        cost_of_pruning(model, prune_attention(model, mass), [])
