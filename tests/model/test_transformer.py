import math

import pytest
import torch

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy_naive
from blues.model.moe.layer import mixtures
from blues.model.transformer import Transformer, is_mixture
from tests.model.examples import gradients, lively, small, tokens


def step(model, ids, seed=7):
    """Losses and gradients of one training step with the router noise of `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(ids[:, :-1], ids[:, 1:])
    output.losses.total.backward()
    return output, gradients(model)


def test_the_configuration_survives_yaml_and_overrides():
    config = small(moe__router="softmax_top_k", attention__rope__theta=500.0)
    assert cfg.from_yaml(Transformer.Config, cfg.to_yaml(config)) == config
    assert small(moe__router__noise=0.5).moe.router.noise == 0.5
    with pytest.raises(ConfigError, match="model.*router|router.*noisy_top_k"):
        small(moe__router="noisy_top")


@pytest.mark.parametrize("sizes", [{}, {"dim": 768, "ffn_dim": 2048, "moe__ffn_dim": 2048, "attention__head_dim": 64}])
def test_the_first_cross_entropy_is_that_of_a_uniform_guess(sizes):
    model = small(vocab_size=1024, **sizes).build(seed=0)
    ids = tokens(model, batch=4, length=33)
    assert model(ids[:, :-1], ids[:, 1:]).losses.cross_entropy.item() == pytest.approx(math.log(1024), abs=0.2)


def test_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (small().build(seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_projections_into_the_residual_stream_start_smaller():
    model = small(dim=128).build(seed=0)
    scaled = 0.02 / math.sqrt(2 * 4)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all())
        elif name.endswith("noise_weight"):
            assert not parameter.any()
        else:
            residual = name.endswith(("attention.output.weight", "down.weight", "down_EDF"))
            assert parameter.std().item() == pytest.approx(scaled if residual else 0.02, rel=0.1), name


def test_mixtures_alternate_with_dense_layers():
    assert [is_mixture(small(), layer) for layer in range(4)] == [False, True, False, True]
    assert [is_mixture(small(moe__every=1), layer) for layer in range(4)] == [True] * 4
    assert len(small().build()(torch.zeros(1, 3, dtype=torch.int64)).routing) == 2
    dense = small(moe=None).build()
    assert dense(torch.zeros(1, 3, dtype=torch.int64)).routing == ()
    assert not any("router" in name for name in dense.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_losses_equal_those_of_the_full_logits(tied):
    model = lively(small(tie_embeddings=tied).build()).double().eval()
    ids = tokens(model)
    targets = ids[:, 1:].clone()
    targets[0, :5] = IGNORED
    logits = model(ids[:, :-1]).logits_BTV
    output = model(ids[:, :-1], targets)
    assert output.logits_BTV is None
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(output.losses.cross_entropy, expected)


def test_last_logits_alone_equal_the_last_of_all():
    model = lively(small().build()).double().eval()
    ids = tokens(model)
    torch.testing.assert_close(model(ids, num_logits=3).logits_BTV, model(ids).logits_BTV[:, -3:])


def test_fast_paths_equal_the_naive_model_forward_and_gradient():
    naive = {"attention__backend": "naive", "moe__dispatch": "naive", "cross_entropy": "naive"}
    ids = tokens(small().build())
    (fast, fast_grads), (slow, slow_grads) = (
        step(lively(small(**changes).build()).double(), ids) for changes in ({}, naive)
    )
    torch.testing.assert_close(fast.losses.total, slow.losses.total, atol=1e-12, rtol=1e-10)
    for name in slow_grads:
        torch.testing.assert_close(fast_grads[name], slow_grads[name], atol=1e-12, rtol=1e-8)


def test_no_token_sees_a_later_one():
    model = lively(small().build()).double().eval()
    ids = tokens(model, batch=1)
    embedded = []
    model.embedding.register_forward_hook(lambda *args: embedded.append(args[-1]))
    logits = model(ids).logits_BTV
    for t in (0, 7, 15):
        (grad,) = torch.autograd.grad(logits[0, t].sum(), embedded[0], retain_graph=True)
        assert not grad[0, t + 1 :].any() and grad[0, : t + 1].any(dim=-1).all()


def test_rows_of_a_batch_do_not_see_each_other():
    model = lively(small().build()).double().eval()
    ids = tokens(model, batch=3)
    alone = torch.cat([model(row[None]).logits_BTV for row in ids])
    torch.testing.assert_close(model(ids).logits_BTV, alone, atol=1e-11, rtol=0)


def test_logits_depend_on_distances_alone():
    model = lively(small().build()).double().eval()
    ids = tokens(model)
    shifted = model(ids, positions=torch.arange(16).expand(2, 16) + 40).logits_BTV
    torch.testing.assert_close(shifted, model(ids).logits_BTV, atol=1e-4, rtol=0)


class GrowingCache:
    """The least that satisfies KVCache: concatenation."""

    def __init__(self):
        self.layers = {}

    @property
    def length(self):
        return 0 if 3 not in self.layers else self.layers[3][0].shape[1]  # complete after the last layer

    def update(self, layer, k, v):
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = (k, v)
        return k, v


@pytest.mark.parametrize("pieces", [[1] * 16, [9, 1, 1, 5], [16]])
def test_decoding_with_a_cache_equals_one_full_forward(pieces):
    model = lively(small().build()).double().eval()
    ids, cache, parts = tokens(model), GrowingCache(), []
    for piece in ids.split(pieces, dim=1):
        parts.append(model(piece, cache=cache).logits_BTV)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits_BTV, atol=1e-11, rtol=0)


def test_a_cache_holds_unrotated_keys():
    """Two equal tokens have equal keys in the first layer whatever their positions."""
    model, cache = lively(small().build()).eval(), GrowingCache()
    model(torch.tensor([[5, 9, 5]]), cache=cache)
    keys = cache.layers[0][0]
    torch.testing.assert_close(keys[0, 0], keys[0, 2])


def test_gradient_checkpointing_changes_no_bit_and_draws_the_same_noise():
    ids = tokens(small().build())
    (plain, plain_grads), (saved, saved_grads) = (
        step(lively(small(gradient_checkpointing=on).build()), ids) for on in (False, True)
    )
    assert torch.equal(plain.losses.total, saved.losses.total)
    assert len(saved.routing) == 2, "one routing per mixture, not one per computation"
    for a, b in zip(plain.routing, saved.routing, strict=True):
        assert torch.equal(a.ids_TK, b.ids_TK)
    assert all(torch.equal(plain_grads[name], saved_grads[name]) for name in plain_grads)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_routing_and_losses_stay_float32(autocast):
    model = lively(small().build(), std=0.05)
    ids = tokens(model)
    exact, _ = step(model, ids)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, grads = step(model, ids)
    assert all(loss.dtype == torch.float32 for loss in output.losses)
    assert all(tensor.dtype == torch.float32 for r in output.routing for tensor in (r.weights_TK, r.logits_TE))
    assert all(grad.dtype == (torch.float32 if autocast else torch.bfloat16) for grad in grads.values())
    assert output.losses.cross_entropy.item() == pytest.approx(exact.losses.cross_entropy.item(), rel=0.02)


@pytest.mark.parametrize("dispatch", ["naive", "sorted", "grouped_mm"])
def test_every_parameter_has_a_gradient_even_from_a_single_token(dispatch):
    model = small(moe__dispatch=dispatch).build()
    model(torch.tensor([[1]]), torch.tensor([[2]])).losses.total.backward()
    grads = gradients(model)
    assert not grads["blocks.1.feed_forward.experts.down_EDF"].flatten(1).any(dim=1).all(), "two experts were idle"


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_whole_step_compiles_without_a_graph_break(gradient_checkpointing):
    config = small(moe__dispatch="grouped_mm", gradient_checkpointing=gradient_checkpointing)
    model = lively(config.build()).bfloat16()  # compiled, grouped_mm is for bfloat16 alone
    ids = tokens(model)
    plain, plain_grads = step(model, ids)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    losses = compiled(ids[:, :-1], ids[:, 1:]).losses
    losses.total.backward()
    # The same operations in the same order: any difference is at most one rounding to bfloat16.
    torch.testing.assert_close(losses.total, plain.losses.total, atol=0, rtol=2**-8)
    for name, grad in gradients(model).items():
        assert (grad - plain_grads[name]).norm() <= 2**-6 * plain_grads[name].norm(), name


def test_a_few_steps_learn_a_sequence_by_heart():
    model = small().build(seed=0)
    ids = tokens(model, batch=4, length=17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        losses = model(ids[:, :-1], ids[:, 1:]).losses
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.cross_entropy.item() < 0.5


def test_parameters_and_flops_are_counted():
    model = small().build()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert model.num_parameters() == sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if "experts" in name)
    assert model.num_active_parameters() == model.num_parameters() - experts // 2
    assert model.flops_per_token(16) == 6 * model.num_active_parameters() + 6 * 4 * 32 * 16
    untied = small(tie_embeddings=False).build()
    assert untied.num_parameters() == model.num_parameters() + 97 * 32
    assert untied.flops_per_token(16) == model.flops_per_token(16), "looking up an embedding is no product"


def test_the_implementations_that_run_are_named():
    cpu = torch.device("cpu")
    chosen = {"attention": "sdpa", "cross_entropy": "chunked", "experts": "sorted"}
    assert small().build().backends(cpu, torch.float32) == chosen
    assert "experts" not in small(moe=None).build().backends(cpu, torch.float32)
    assert small(cross_entropy="naive").build().backends(cpu, torch.float32)["cross_entropy"] == "naive"


@pytest.mark.parametrize("field", ["vocab_size", "dim", "num_layers", "init_std"])
def test_bad_settings_are_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"^{field}"):
        small(**{field: 0})


def test_ignored_targets_teach_nothing():
    model = small().build().double()
    ids = tokens(model)
    losses = model(ids, torch.full_like(ids, IGNORED)).losses
    assert losses.cross_entropy.item() == 0.0
    x, _ = model.hidden(ids)
    assert linear_cross_entropy_naive(x.flatten(0, 1), model.embedding.weight, ids.flatten() * 0 + IGNORED) == 0


LENGTHS = (5, 1, 7, 3)


def packed_documents():
    """Four documents of LENGTHS side by side in one row: `documents_BT`."""
    return torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_document_beside_others_has_the_logits_it_has_alone(dtype, tolerance):
    """Its positions go on from the documents before it: rotary scores depend on distances alone."""
    model = lively(small().build(), std=0.1).to(dtype).eval()
    ids = tokens(model, batch=1)
    together = model(ids, documents=packed_documents()).logits_BTV
    alone = torch.cat([model(document).logits_BTV for document in ids.split(LENGTHS, dim=1)], dim=1)
    # Sines and cosines are float32 also for a float64 model, so those of other positions differ by their rounding.
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    same_positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    anew = model(ids, documents=packed_documents(), positions=same_positions).logits_BTV
    torch.testing.assert_close(anew, alone, atol=tolerance, rtol=0)


@pytest.mark.gpu
def test_documents_on_a_gpu_have_the_gradients_of_the_cpu():
    config = small(moe__router="softmax_top_k")
    results = []
    for device in ("cpu", "cuda"):
        model = lively(config.build(), std=0.05).to(device)
        ids, documents = tokens(model).to(device), packed_documents().expand(2, -1).to(device)
        model(ids, ids, documents=documents).losses.total.backward()
        results.append({name: grad.cpu() for name, grad in gradients(model).items()})
    for name, grad in results[0].items():
        assert (results[1][name] - grad).norm() <= 1e-3 * grad.norm(), name


@pytest.mark.gpu
def test_a_document_beside_others_has_the_logits_it_has_alone_on_a_gpu_in_bfloat16():
    model = lively(small(moe=None).build(), std=0.1).to("cuda", torch.bfloat16).eval()
    ids = tokens(model, batch=1).cuda()
    together = model(ids, documents=packed_documents().cuda()).logits_BTV
    alone = torch.cat([model(document).logits_BTV for document in ids.split(LENGTHS, dim=1)], dim=1)
    assert (together - alone).norm() <= 2e-2 * alone.norm()
    assert (model(ids).logits_BTV - alone).norm() > 0.2 * alone.norm(), "without numbers it is something else"


def test_the_gradients_of_packed_documents_are_those_of_each_alone():
    model = lively(small(moe__router="softmax_top_k", moe__load_balancing_weight=0.0, moe__router_z_weight=0.0).build())
    model = model.double()
    ids, targets = tokens(model, batch=1), tokens(model, batch=1, seed=1)
    model(ids, targets, documents=packed_documents()).losses.total.backward()
    together = gradients(model)
    model.zero_grad()
    for document, target in zip(ids.split(LENGTHS, dim=1), targets.split(LENGTHS, dim=1), strict=True):
        model(document, target, num_targets=16).losses.total.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(together[name], grad, atol=1e-6, rtol=1e-4)


def test_nothing_of_an_earlier_document_reaches_a_later_one():
    model = lively(small().build()).double().eval()
    ids = tokens(model, batch=1)
    embedded = []
    model.embedding.register_forward_hook(lambda *args: embedded.append(args[-1]))
    logits = model(ids, documents=packed_documents()).logits_BTV
    (grad,) = torch.autograd.grad(logits[0, 13:].square().sum(), embedded[0])
    assert not grad[0, :13].any() and grad[0, 13:].any(dim=-1).all()
    changed = ids.clone()
    changed[0, :13] = (changed[0, :13] + 1) % 97
    others = model(changed, documents=packed_documents()).logits_BTV
    torch.testing.assert_close(others[0, 13:], logits[0, 13:], atol=1e-12, rtol=0)
    assert (others[0, :13] != logits[0, :13]).any(dim=-1).all()


def test_gradient_checkpointing_keeps_documents_apart():
    ids, documents = tokens(small().build()), packed_documents().expand(2, -1)
    results = []
    for on in (False, True):
        model = lively(small(gradient_checkpointing=on).build())
        torch.manual_seed(7)
        model(ids, ids, documents=documents).losses.total.backward()
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_documents_and_a_cache_are_refused():
    model = small().build().eval()
    with pytest.raises(ValueError, match="documents cannot be told apart in a KV cache"):
        model(tokens(model), cache=GrowingCache(), documents=packed_documents().expand(2, -1))


@pytest.mark.parametrize("moe", [None, "softmax_top_k"])
def test_micro_batches_of_few_and_many_targets_make_up_one_large_batch(moe):
    """With the mean number of targets, the mean of their losses and gradients is that of all rows at once."""
    changes = {"moe": None} if moe is None else {"moe__router": moe, "moe__load_balancing_weight": 0.0}
    model = lively(small(**changes).build(), std=0.1).double()
    ids, targets = tokens(model, batch=4), tokens(model, batch=4, seed=1)
    targets[0, 2:], targets[2, 9:], targets[3] = IGNORED, IGNORED, IGNORED
    whole = model(ids, targets).losses
    whole.total.backward()
    expected = gradients(model)
    model.zero_grad()
    mean = (targets != IGNORED).sum().item() / 4
    losses = []
    for row in range(4):
        part = model(ids[row : row + 1], targets[row : row + 1], num_targets=mean).losses
        (part.total / 4).backward()
        losses.append(part.cross_entropy.item())
    assert sum(losses) / 4 == pytest.approx(whole.cross_entropy.item(), abs=1e-12) and losses[3] == 0
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-12, rtol=1e-9)


def test_mixtures_may_have_different_numbers_of_experts():
    config = small(experts_per_layer=[5, 1])
    model = lively(config.build())
    assert [(layer, moe.experts.num_experts, moe.router.num_experts) for layer, moe in mixtures(model)] == [
        (1, 5, 5),
        (3, 1, 1),
    ]
    assert cfg.load(Transformer.Config, cfg.dump(config)) == config
    ids = tokens(model)
    output, _ = step(model, ids)
    assert [routing.ids_TK.shape[1] for routing in output.routing] == [2, 1], "no more choices than experts"
    idle = 3 * 32 * 24 * 3
    assert model.num_active_parameters() == model.num_parameters() - idle
    same = small(experts_per_layer=[4, 4]).build(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), small().build(seed=1).parameters(), strict=True))


def test_one_number_of_experts_for_each_mixture_layer():
    with pytest.raises(ConfigError, match="^experts_per_layer: must have one number for each of the 2 mixture layers"):
        small(experts_per_layer=[4])
    with pytest.raises(ConfigError, match="^num_experts: must be at least 1"):
        small(experts_per_layer=[4, 0]).build()


def test_blocks_and_routers_share_one_context():
    model, seen = small().build(), []
    for _, moe in mixtures(model):
        moe.router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    ids, languages, documents = tokens(model), torch.ones(2, 16, dtype=torch.int64), torch.zeros(2, 16)
    model(ids, documents=documents, languages=languages, progress=0.25)
    assert seen[0] is seen[1] and seen[0].tokens_BT is ids and seen[0].documents_BT is documents
    assert seen[0].languages_BT is languages and seen[0].progress == 0.25 and seen[0].past is None
    model(ids)
    assert seen[2].progress == 1.0 and seen[2].languages_BT is None
