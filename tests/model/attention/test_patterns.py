"""Patterns: each is what it says, sees itself and no future, and all its forms agree with the dense rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from blues import config as cfg
from blues.config import FAMILIES
from blues.errors import ConfigError
from blues.model.attention.blocks import build_block_mask
from blues.model.attention.layer import make_view, make_views
from blues.model.attention.masks import BlockMasks, positions_within_documents
from blues.model.attention.patterns import (
    AdaptiveWindow,
    AllOf,
    AnyOf,
    AttentionPattern,
    BlockList,
    BlockSparse,
    ByHead,
    ByLayer,
    Causal,
    Dilated,
    EntropyWindow,
    Fixed,
    GlobalTokens,
    LocalGlobal,
    PrefixSyntax,
    SlidingWindow,
    Strided,
    TokenTree,
    entropy_windows,
    pairs_of,
)
from blues.model.rope import PlainRotary
from tests.model.attention.patterns import ALL, PATTERNS, name_of, random_tree
from tests.model.examples import small

CPU = torch.device("cpu")
HEADS = 4
ROPE = PlainRotary.Config().build(head_dim=8)
SETTINGS = settings(max_examples=25, deadline=None)
everyone = pytest.mark.parametrize("config", ALL, ids=name_of)

sizes = st.integers(1, 12)
plain = st.one_of(
    st.just(Causal.Config()),
    st.builds(SlidingWindow.Config, window=sizes, sinks=st.integers(0, 5)),
    st.builds(GlobalTokens.Config, window=sizes, tokens=st.integers(1, 3), every=st.sampled_from([0, 4, 9])),
    st.integers(1, 3).flatmap(
        lambda n: st.builds(
            Dilated.Config,
            segments=st.tuples(*[sizes] * n),
            dilations=st.tuples(*[sizes] * n),
        )
    ),
    st.builds(Strided.Config, stride=sizes),
    st.builds(lambda block, summary: Fixed.Config(block=block, summary=min(block, summary)), sizes, sizes),
    st.builds(
        BlockSparse.Config, block=sizes, near=st.integers(0, 2), random=st.integers(0, 3), seed=st.integers(0, 9)
    ),
)
composed = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.builds(AllOf.Config, patterns=st.tuples(inner, inner)),
        st.builds(AnyOf.Config, patterns=st.tuples(inner, inner)),
        st.builds(ByHead.Config, patterns=st.tuples(inner, inner)),
    ),
    max_leaves=4,
)


def dense(pattern: AttentionPattern, length: int, tree: TokenTree | None = None) -> torch.Tensor:
    """`mask_HTS` by the definition; 4 heads."""
    positions = torch.arange(length)[None]
    mask_BHTS = pattern.element(pairs_of(positions, positions, HEADS, tree=tree))
    return mask_BHTS[0].expand(HEADS, length, length)


def layers_of(config: AttentionPattern.Config) -> list[AttentionPattern]:
    pattern = config.build()
    return [pattern.for_layer(layer) for layer in range(2)]


def seen_by(config: AttentionPattern.Config, query: int, head: int = 0) -> list[int]:
    return dense(config.build(), query + 1)[head, query].nonzero().flatten().tolist()


def test_every_registered_pattern_is_tested_and_says_where_it_is_from():
    variants = FAMILIES["attention_pattern"].variants
    assert set(PATTERNS) == set(variants)
    for name, pattern in variants.items():
        first = (pattern.__doc__ or "").partition("\n")[0]
        assert "arXiv" in first or "Blues' own" in first, f"{name}: the first line of its docstring names no source"


@everyone
def test_a_query_sees_itself_and_no_future(config):
    for pattern in layers_of(config):
        mask = dense(pattern, 40, random_tree(1, 40) if pattern.needs_tree else None)
        assert mask.diagonal(dim1=1, dim2=2).all()
        assert not mask.triu(diagonal=1).any()


@SETTINGS
@given(composed, st.integers(1, 70))
def test_all_forms_of_a_pattern_agree_with_the_dense_rule(config, length):
    pattern = config.build()
    pattern.check(HEADS, 2)
    mask = dense(pattern, length)
    assert mask.diagonal(dim1=1, dim2=2).all() and not mask.triu(diagonal=1).any()
    block_mask = pattern.block_mask(length, CPU, HEADS)
    heads = HEADS if pattern.differs_by_head else 1
    assert torch.equal(create_mask(block_mask.mask_mod, 1, heads, length, length, CPU)[0].expand_as(mask), mask)
    assert blocks_shown(block_mask).expand(HEADS, -1, -1).equal(blocks_of(mask))
    if (window := pattern.window()) is not None:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        left, right = window
        assert right == 0
        assert torch.equal(((distance >= 0) & ((distance <= left) | (left < 0))).expand_as(mask), mask)


def blocks_shown(block_mask) -> torch.Tensor:
    """bool, heads x blocks of queries x blocks of keys: the blocks that FlexAttention computes."""
    return block_mask.to_dense()[0].bool()


def blocks_of(mask_HTS: torch.Tensor, block: int = 128) -> torch.Tensor:
    pad = -mask_HTS.shape[-1] % block
    padded = torch.nn.functional.pad(mask_HTS, (0, pad, 0, pad))
    return padded.unflatten(1, (-1, block)).unflatten(3, (-1, block)).any(dim=4).any(dim=2)


@SETTINGS
@given(composed, st.integers(1, 500), st.sampled_from([1, 2**17, 2**25]))
def test_block_masks_are_those_that_torch_makes(config, length, entries):
    pattern = config.build()
    heads, positions = HEADS if pattern.differs_by_head else 1, torch.arange(length)[None]
    mask_mod = pattern.block_mask(length, CPU, HEADS).mask_mod
    ours = build_block_mask(
        lambda start, end: pattern.mask(positions[:, start:end], positions, HEADS),
        mask_mod,
        length,
        length,
        entries=entries,
    )
    theirs = create_block_mask(mask_mod, None, heads, length, length, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for count, index in (("kv_num_blocks", "kv_indices"), ("full_q_num_blocks", "full_q_indices")):
        real = torch.arange(getattr(ours, index).shape[-1]) < getattr(ours, count)[..., None]
        assert torch.equal(getattr(ours, index)[real], getattr(theirs, index)[real]), index


@everyone
def test_block_masks_of_long_sequences_skip_just_the_empty_blocks(config):
    pattern = layers_of(config)[0]
    if pattern.needs_tree:
        pytest.skip("has a block mask per forward: tested in test_layer")
    mask = dense(pattern, 300)
    assert torch.equal(blocks_shown(pattern.block_mask(300, CPU, HEADS)).expand(HEADS, 3, 3), blocks_of(mask))


@pytest.mark.parametrize(
    ("config", "query", "keys"),
    [
        (SlidingWindow.Config(window=3), 9, [7, 8, 9]),
        (SlidingWindow.Config(window=1), 9, [9]),
        (SlidingWindow.Config(window=2, sinks=3), 9, [0, 1, 2, 8, 9]),
        (GlobalTokens.Config(window=2, tokens=1), 9, [0, 8, 9]),
        (GlobalTokens.Config(window=2, tokens=1, every=4), 9, [0, 4, 8, 9]),
        (GlobalTokens.Config(window=2, tokens=1, every=4), 8, list(range(9))),
        (Dilated.Config(segments=(2, 8), dilations=(1, 3)), 7, [1, 4, 6, 7]),
        (Dilated.Config(segments=(2, 8), dilations=(1, 3)), 8, [8]),
        (Strided.Config(stride=4), 11, [3, 7, 8, 9, 10, 11]),
        (Fixed.Config(block=4, summary=1), 10, [3, 7, 8, 9, 10]),
        (BlockSparse.Config(block=2, near=1, first=1, random=0), 9, [0, 1, 6, 7, 8, 9]),
        (BlockList.Config(block=2, heads=("1.3.5",)), 5, [0, 1, 4, 5]),
        (BlockList.Config(block=2, heads=("1.3.5",)), 6, list(range(7))),
        (AllOf.Config(patterns=(SlidingWindow.Config(window=5), Strided.Config(stride=2))), 8, [4, 6, 7, 8]),
        (AnyOf.Config(patterns=(SlidingWindow.Config(window=2), Fixed.Config(block=4, summary=1))), 8, [3, 7, 8]),
        (AdaptiveWindow.Config(window=3, ramp=2), 9, [5, 6, 7, 8, 9]),
    ],
    ids=repr,
)
def test_a_pattern_shows_what_its_paper_says(config, query, keys):
    assert seen_by(config, query) == keys


def test_random_blocks_are_drawn_once_for_every_length():
    pattern = BlockSparse.Config(block=2, near=0, first=0, random=2, seed=1).build()
    long = dense(pattern, 200)[0]
    assert torch.equal(long[:50, :50], dense(pattern, 50)[0])
    far = long[100:].float().mean(dim=1) * 200
    assert far.min() >= 1 and far.max() <= 6 and far.mean() > 3
    drawn = [frozenset(row.nonzero().flatten().div(2, rounding_mode="floor").tolist()) for row in long[100::2]]
    assert len(set(drawn)) == len(drawn)
    assert not torch.equal(long, dense(pattern.config.replace(seed=2).build(), 200)[0])


def test_heads_take_turns():
    config = ByHead.Config(patterns=(SlidingWindow.Config(window=2), Causal.Config()))
    assert seen_by(config, 5, head=0) == seen_by(config, 5, head=2) == [4, 5]
    assert seen_by(config, 5, head=1) == seen_by(config, 5, head=3) == list(range(6))


def test_layers_take_turns_also_inside_other_patterns():
    local = SlidingWindow.Config(window=2)
    mixed = ByLayer.Config(patterns=(local, local, Causal.Config()))
    assert [mixed.build().for_layer(layer).config for layer in range(4)] == [local, local, Causal.Config(), local]
    short = LocalGlobal.Config(local_layers=2, window=2).build()
    assert [short.for_layer(layer) for layer in range(7)] == [mixed.build().for_layer(layer) for layer in range(7)]
    inner = AnyOf.Config(patterns=(mixed, Strided.Config(stride=3))).build()
    assert inner.for_layer(2).config == AnyOf.Config(patterns=(Causal.Config(), Strided.Config(stride=3)))
    assert EntropyWindow.Config(windows=(3, 9)).build().for_layer(1).config == SlidingWindow.Config(window=9)


def test_windows_compose():
    five, nine = SlidingWindow.Config(window=5), SlidingWindow.Config(window=9)
    assert AllOf.Config(patterns=(five, nine, Causal.Config())).build().window() == (4, 0)
    assert AnyOf.Config(patterns=(five, nine)).build().window() == (8, 0)
    assert AnyOf.Config(patterns=(five, Causal.Config())).build().plain_causal
    assert ByHead.Config(patterns=(five, five)).build().window() == (4, 0)
    assert ByHead.Config(patterns=(five, nine)).build().window() is None
    assert AllOf.Config(patterns=(five, Strided.Config())).build().window() is None


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 30), st.integers(0, 99))
def test_ancestors_are_seen_from_anywhere(rows, length, seed):
    tree = random_tree(rows, length, seed)
    positions = torch.arange(length)[None]
    mask = PrefixSyntax.Config(window=2).build().element(pairs_of(positions, positions, tree=tree))[:, 0]
    for row in range(rows):
        for q in range(length):
            closed = [k for k in range(q) if tree.tout_BS[row, k] <= q]
            expected = [k <= q and (k > q - 2 or k not in closed) for k in range(length)]
            assert mask[row, q].tolist() == expected


@everyone
def test_a_pattern_survives_yaml_and_is_a_value(config):
    assert cfg.from_yaml(AttentionPattern.Config, cfg.to_yaml(config)) == config
    assert config.build() == config.build() and len({config.build(), config.build()}) == 1


def test_patterns_are_written_on_a_command_line():
    listed = [{"variant": "sliding_window", "window": 4}, "causal"]
    config = small().override({"attention.pattern": "by_layer", "attention.pattern.patterns": listed})
    assert config.attention.pattern == ByLayer.Config(patterns=(SlidingWindow.Config(window=4), Causal.Config()))


@SETTINGS
@given(st.lists(st.lists(st.integers(-1, 4), min_size=9, max_size=9), min_size=1, max_size=3), st.integers(0, 7))
def test_positions_count_from_the_first_token_of_a_document(rows, start):
    documents, positions = torch.tensor(rows), torch.arange(start, start + 9)[None]
    within = positions_within_documents(positions, documents)
    assert within.tolist() == [[t - row.index(number) for t, number in enumerate(row)] for row in rows]


def test_sinks_are_the_first_tokens_of_each_document():
    pattern = SlidingWindow.Config(window=1, sinks=1).build()
    documents = torch.tensor([[7, 7, 7, 2, 2, 2]])
    view = make_view(ROPE, pattern, length=6, device=CPU, documents_BT=documents)
    assert view.mask_BTS[0, 5].nonzero().flatten().tolist() == [3, 5]


def test_layers_of_the_same_pattern_share_one_view():
    patterns = ByLayer.Config(patterns=(SlidingWindow.Config(window=4), Causal.Config())).build()
    layers = [(ROPE, patterns.for_layer(layer)) for layer in range(6)]
    views = make_views([*layers, (None, layers[0][1])], length=9, device=CPU)
    assert views[0] is views[2] is views[4] and views[1] is views[3] is views[5] and views[0] is not views[1]
    assert views[6] is not views[0] and views[6].mask_BTS is views[0].mask_BTS and views[6].query_rotation is None
    assert views[0].query_rotation is views[1].query_rotation


def test_the_cache_of_block_masks_counts_and_stays_within_its_bounds():
    masks, window = BlockMasks(entries=2), SlidingWindow.Config(window=4).build()
    assert masks.metrics() == {}
    first = masks.get(window, 200, CPU, HEADS)
    assert masks.get(SlidingWindow.Config(window=4).build(), 200, CPU, HEADS) is first
    assert masks.counts()[:4] == (1, 1, 0, 1) and masks.counts().num_bytes > 0
    masks.get(window, 300, CPU, HEADS)
    masks.get(window, 200, CPU, HEADS)
    masks.get(Causal.Config().build(), 200, CPU, HEADS)  # drops the least recently used, of length 300
    assert masks.counts()[:4] == (2, 3, 1, 2)
    assert masks.get(window, 200, CPU, HEADS) is first
    assert masks.metrics() == {"attention/block_mask_hits": 3.0, "attention/block_mask_misses": 3.0}
    assert str(masks.counts()).startswith("3 block masks found, 3 made, 1 dropped; holds 2")
    tight = BlockMasks(num_bytes=1)
    tight.get(window, 200, CPU, HEADS)
    assert tight.counts()[2:] == (1, 0, 0)


def test_entropy_becomes_windows():
    uniform = torch.tensor([[8.0, 100.0], [1.0, 1.0], [64.0, 65.0]]).log()
    assert entropy_windows(uniform, slack=1, multiple=16, most=96).windows == (96, 16, 80)
    with pytest.raises(ConfigError, match="slack, multiple and most must be at least 1, got 0.5"):
        entropy_windows(uniform, slack=0.5, most=96)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"variant": "sliding_window", "window": 0}, "window: must be at least 1, got 0"),
        ({"variant": "sliding_window", "sinks": -1}, "sinks: must be at least 0, got -1"),
        ({"variant": "global_tokens", "tokens": 4, "every": 4}, r"every: must be 0 or more than tokens \(4\)"),
        ({"variant": "dilated", "segments": [4]}, "dilations: must have one number for each of the 1 segments"),
        ({"variant": "fixed", "block": 4, "summary": 5}, r"summary: must be at most block \(4\), got 5"),
        ({"variant": "block_sparse", "block": 0}, "block: must be at least 1"),
        ({"variant": "block_list", "heads": ["1.1"]}, "block 1 hides its tokens from themselves"),
        ({"variant": "block_list", "heads": ["3"]}, "block 0 sees a later block"),
        ({"variant": "block_list", "heads": ["1.x"]}, "'x' is not a hexadecimal number"),
        ({"variant": "block_list", "heads": ["1", "1.3"]}, "one string per head, all of equally many blocks"),
        ({"variant": "block_list", "heads": ["1", "1"]}, "lists for 2 heads, and the layer has 4"),
        ({"variant": "all_of", "patterns": []}, "patterns: must hold at least one pattern"),
        ({"variant": "all_of", "patterns": ["adaptive_window"]}, "all_of cannot hold adaptive_window"),
        (
            {"variant": "by_head", "patterns": ["causal"] * 3},
            "cycle of 3 patterns, which does not divide the layer's 4",
        ),
        (
            {"variant": "by_head", "patterns": ["causal"] * 8},
            "cycle of 8 patterns, which does not divide the layer's 4",
        ),
        (
            {"variant": "by_layer", "patterns": ["causal"] * 5},
            "5 patterns for 4 layers, so its last would never be used",
        ),
        (
            {"variant": "local_global", "local_layers": 4},
            "leaves none of 4 layers global; set local_layers to at most 3",
        ),
        ({"variant": "entropy_window", "windows": [4, 4]}, "2 windows for 4 layers; give one per layer"),
        ({"variant": "adaptive_window", "initial": 1.0}, "initial: must be a share of the window"),
        ({"variant": "slidng_window"}, "unknown attention_pattern 'slidng_window'.*Did you mean 'sliding_window'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(pattern, message):
    with pytest.raises(ConfigError, match=message):
        cfg.load(type(small()), {**cfg.dump(small()), "attention": {**cfg.dump(small().attention), "pattern": pattern}})


@pytest.mark.parametrize("backend", ["flex", "flash2", "flash4", "sdpa_cudnn"])
def test_learned_spans_are_refused_on_backends_without_a_gradient_to_them(backend):
    mixed = ByLayer.Config(patterns=(Causal.Config(), AdaptiveWindow.Config()))
    with pytest.raises(ConfigError, match=f"backend: {backend} has no gradient to the learned spans"):
        small(attention__backend=backend).attention.replace(pattern=mixed)


def test_a_pattern_that_hides_the_self_is_refused():
    class Blind(AttentionPattern):
        def rule(self, pairs):
            return pairs.key < pairs.query

    with pytest.raises(ConfigError, match="hides the token at position 0 from itself in head 0"):
        Blind(AttentionPattern.Config()).check(4, 2)
