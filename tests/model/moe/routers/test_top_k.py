import pytest
import torch

from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routers import NoisyTopK, SoftmaxTopK
from blues.model.moe.routing import Router, choose


def make(config, num_experts=6, top_k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return config.build(dim=16, num_experts=num_experts, top_k=top_k, std=0.5, generator=generator)


def tokens(n=64, dtype=torch.float32):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(3)).to(dtype)


def context(n=64):
    return Context(torch.arange(n)[None])


def test_the_family_knows_its_members():
    assert {"noisy_top_k", "softmax_top_k", "sigmoid_bias", "relu", "threshold", "hash"} <= set(Router.variants)


@pytest.mark.parametrize("config", [NoisyTopK.Config(), SoftmaxTopK.Config()])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_a_routing_is_distinct_experts_with_weights_of_the_best(config, top_k):
    router = make(config, top_k=top_k).eval()
    weights, ids, probs, logits, *_ = router(tokens(), context())
    assert ids.shape == weights.shape == (64, top_k) and probs.shape == logits.shape == (64, 6)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    best = probs.topk(top_k)
    assert torch.equal(ids, best.indices)
    expected = best.values if top_k == 1 else best.values / best.values.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_everything_is_float32_whatever_the_model_is(dtype, autocast):
    router = make(NoisyTopK.Config()).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = router(tokens(dtype=dtype), context())
    assert routing.weights_TK.dtype == routing.probs_TE.dtype == routing.logits_TE.dtype == torch.float32
    exact = tokens(dtype=dtype).float() @ router.weight.float().T
    torch.testing.assert_close(routing.logits_TE, exact, atol=1e-5, rtol=1e-5)


def test_noise_is_drawn_in_training_only():
    router = make(NoisyTopK.Config(noise=2.0))
    torch.manual_seed(0)
    first, second = router(tokens(), context()), router(tokens(), context())
    assert torch.equal(first.logits_TE, second.logits_TE), "the clean logits are reported"
    assert not torch.equal(first.ids_TK, second.ids_TK)
    torch.manual_seed(0)
    assert torch.equal(router(tokens(), context()).ids_TK, first.ids_TK), "noise follows torch's seed"
    router.eval()
    clean = make(SoftmaxTopK.Config())(tokens(), context())
    assert all(torch.equal(a, b) for a, b in zip(router(tokens(), context())[:4], clean[:4], strict=True))


def test_noise_has_the_scale_of_the_paper():
    """Shazeer 2017, eq. 4: standard deviation softplus(x W_noise); W_noise = 0 gives ln 2."""
    router = make(NoisyTopK.Config(noise=1.0), num_experts=2, top_k=1)
    with torch.no_grad():
        router.weight.zero_()
    x = torch.zeros(20_000, 16)
    torch.manual_seed(0)
    weights = router(x, context(20_000)).weights_TK[:, 0]
    gap = (weights / (1 - weights)).log()  # |difference of two noises|, each normal(0, ln 2)
    assert gap.square().mean().sqrt().item() == pytest.approx(2**0.5 * torch.log(torch.tensor(2.0)).item(), rel=0.03)


def test_the_noise_scale_learns_from_the_weights():
    router = make(NoisyTopK.Config())
    routing = router(tokens(), context())
    (routing.weights_TK * torch.tensor([1.0, -1.0])).sum().backward()
    assert router.noise_weight.grad.abs().sum() > 0 and router.weight.grad.abs().sum() > 0


def test_one_expert_per_token_still_teaches_the_router():
    logits = torch.randn(10, 4, requires_grad=True)
    choose(logits, logits, 1).weights_TK.sum().backward()
    assert (logits.grad.abs().sum(-1) > 0).all()


def test_noise_zero_is_softmax_top_k_and_negative_noise_is_refused():
    quiet, clean = make(NoisyTopK.Config(noise=0.0)), make(SoftmaxTopK.Config())
    assert torch.equal(quiet(tokens(), context()).ids_TK, clean(tokens(), context()).ids_TK)
    with pytest.raises(ConfigError, match="^noise"):
        NoisyTopK.Config(noise=-1.0)
