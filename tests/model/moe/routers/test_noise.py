import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.routers import NoisyTopK, SoftmaxTopK
from blues.model.moe.routers.noise import ConstantNoise, LinearNoise
from tests.model.moe.routers.examples import context, make, tokens


def test_noise_stays_or_falls_in_a_straight_line():
    assert [ConstantNoise.Config().build().at(progress, 0.7) for progress in (0.0, 0.5, 1.0)] == [0.7, 0.7, 0.7]
    line = LinearNoise.Config(final=0.2, over=0.5).build()
    assert [line.at(progress, 1.0) for progress in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert LinearNoise.Config(final=1.0).build().at(0.5, 0.0) == 0.5, "noise may also rise"


@pytest.mark.parametrize(("field", "values"), [("final", {"final": -1.0}), ("over", {"over": 0.0})])
def test_bad_schedules_are_refused_by_name(field, values):
    with pytest.raises(ConfigError, match=f"^{field}"):
        LinearNoise.Config(**values)


def test_noisy_routers_settle_with_the_progress_of_the_training():
    router = make(NoisyTopK.Config(noise=3.0, schedule=LinearNoise.Config(over=0.5)))
    clean = make(SoftmaxTopK.Config())(tokens(), context()).ids_TK
    agreement = []
    for progress in (0.0, 0.4, 0.6):
        torch.manual_seed(0)
        ids = router(tokens(), context(progress=progress)).ids_TK
        agreement.append((ids == clean).float().mean().item())
    assert agreement[0] < agreement[1] < agreement[2] == 1.0


def test_jitter_multiplies_what_the_router_sees_in_training_alone():
    router = make(SoftmaxTopK.Config(jitter=0.3, schedule=LinearNoise.Config()))
    x, given = tokens(), context(progress=0.5)  # half of the jitter is left: 0.15
    torch.manual_seed(4)
    routing = router(x, given)
    torch.manual_seed(4)
    seen = (x * (1 + 0.15 * (2 * torch.rand_like(x) - 1))) @ router.weight.T
    assert torch.equal(routing.ids_TK, seen.topk(2).indices)
    assert not torch.equal(routing.ids_TK, router(x, given).ids_TK)
    torch.testing.assert_close(routing.logits_TE, x @ router.weight.T, msg="the clean logits are reported")
    router.eval()
    assert torch.equal(router(x, given).ids_TK, (x @ router.weight.T).topk(2).indices)
    with pytest.raises(ConfigError, match="^jitter"):
        SoftmaxTopK.Config(jitter=1.0)


def test_weights_that_are_not_renormalized_are_the_probabilities():
    routing = make(SoftmaxTopK.Config(renormalize=False))(tokens(), context())
    torch.testing.assert_close(routing.weights_TK, routing.probs_TE.topk(2).values)
