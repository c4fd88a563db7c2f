import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.routers import LanguageAware, SoftmaxTopK
from tests.model.examples import small
from tests.model.moe.routers.examples import context, make, tokens


def biased():
    router = make(LanguageAware.Config(num_languages=3))
    with torch.no_grad():
        router.bias_LE.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * 3)
    return router


def test_a_language_adds_its_bias_to_the_logits():
    router, languages = biased(), torch.arange(64)[None] % 4
    routing = router(tokens(), context(languages_BT=languages))
    for t in range(64):
        number = int(languages[0, t])
        logits = tokens()[t] @ router.weight.T + (router.bias_LE[number - 1] if number else 0)
        torch.testing.assert_close(routing.logits_TE[t], logits)
        assert torch.equal(routing.ids_TK[t], logits.topk(2).indices)


@pytest.mark.parametrize("languages", [None, torch.zeros(1, 64, dtype=torch.int64), torch.full((1, 64), 4)])
def test_unknown_languages_are_neutral(languages):
    plain = make(SoftmaxTopK.Config())(tokens(), context())
    routing = biased()(tokens(), context(languages_BT=languages))
    assert torch.equal(routing.ids_TK, plain.ids_TK) and torch.equal(routing.weights_TK, plain.weights_TK)


def test_only_the_languages_that_are_there_learn():
    router = biased()
    routing = router(tokens(), context(languages_BT=torch.full((1, 64), 2)))
    (routing.weights_TK * torch.tensor([1.0, -1.0])).sum().backward()
    assert router.bias_LE.grad[1].any() and not router.bias_LE.grad[[0, 2]].any()


def test_the_model_hands_languages_to_its_routers():
    model = small(moe__router="language_aware").build().eval()
    with torch.no_grad():
        model.blocks[1].feed_forward.router.bias_LE[0, 3] = 50.0
    ids = torch.tensor([[1, 2, 3, 4]])
    routed = model(ids, languages=torch.tensor([[0, 1, 1, 0]])).routing[0].ids_TK
    plain = model(ids).routing[0].ids_TK
    assert routed[1, 0] == routed[2, 0] == 3 and torch.equal(routed[[0, 3]], plain[[0, 3]])


def test_no_languages_at_all_are_refused():
    with pytest.raises(ConfigError, match="^num_languages"):
        LanguageAware.Config(num_languages=0)
