import pytest
import torch

from blues.errors import ConfigError
from blues.inference.cache import Cache
from blues.model.context import Context, Past
from blues.model.moe.routers import DocumentPools, SoftmaxTopK
from tests.model.examples import lively, small
from tests.model.moe.routers.examples import context, make, tokens

DOCUMENTS = torch.tensor([[0] * 5 + [7] * 11, [3] * 16])


def given(**rest):
    return Context(torch.zeros(2, 16, dtype=torch.int64), **rest)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize(("pool", "size"), [(0.5, 3), (0.1, 2), (0.7, 4)])
def test_a_token_keeps_to_the_pool_of_its_document_so_far(documents, pool, size):
    router = make(DocumentPools.Config(pool=pool)).double()
    x = tokens(32, torch.float64)
    routing = router(x, given(documents_BT=documents))
    logits = (x @ router.weight.T).view(2, 16, 6)
    numbers = torch.zeros(2, 16) if documents is None else documents
    for row in range(2):
        for t in range(16):
            seen = [s for s in range(t + 1) if numbers[row, s] == numbers[row, t]]
            pool_experts = logits[row, seen].softmax(-1).mean(0).topk(size).indices.tolist()
            best = sorted(pool_experts, key=lambda e: -logits[row, t, e].item())[:2]
            assert routing.ids_TK[row * 16 + t].tolist() == best
            expected = logits[row, t, best].softmax(-1)
            torch.testing.assert_close(routing.weights_TK[row * 16 + t], expected)


def test_a_pool_of_all_experts_is_softmax_top_k():
    configs = (SoftmaxTopK.Config(), DocumentPools.Config(pool=1.0))
    free, pooled = (make(config)(tokens(), context()) for config in configs)
    assert torch.equal(free.ids_TK, pooled.ids_TK) and torch.equal(free.weights_TK, pooled.weights_TK)


def test_long_documents_use_few_experts():
    router = make(DocumentPools.Config(pool=0.34))
    ids = router(tokens(2048), Context(torch.zeros(1, 2048, dtype=torch.int64))).ids_TK
    assert len(ids[1024:].unique()) <= 3 < len(ids[:8].unique()) + 1


def test_a_document_beside_others_has_the_logits_it_has_alone():
    model = lively(small(moe__router="document_pools").build(), std=0.1).double().eval()
    ids = torch.randint(97, (1, 16), generator=torch.Generator().manual_seed(0))
    together = model(ids, documents=DOCUMENTS[:1]).logits_BTV
    alone = torch.cat([model(part).logits_BTV for part in ids.split([5, 11], dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_rows_of_different_lengths_remember_their_own_tokens():
    """Shorter prompts are padded on the right; a row that ends leaves the batch."""
    model = lively(small(moe__router="document_pools").build()).double().eval()
    ids = torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(1))
    lengths = [9, 4, 6]
    cache = Cache(num_layers=4, rows=3, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float64)
    padded = torch.stack([row[:9].where(torch.arange(9) < length, 0) for row, length in zip(ids, lengths, strict=True)])
    model(padded, cache=cache)
    cache.advance(lengths)
    cache.select([2, 1])
    for step in range(3):
        new = torch.stack([ids[2, 6 + step], ids[1, 4 + step]])[:, None]
        logits = model(new, cache=cache, positions=cache.positions(1)).logits_BTV
        cache.advance([1, 1])
    for place, (row, length) in enumerate([(2, 9), (1, 7)]):
        alone = model(ids[row : row + 1, :length]).logits_BTV[0, -1]
        torch.testing.assert_close(logits[place, 0], alone, atol=1e-9, rtol=0)


def test_a_cache_without_a_history_and_bad_pools_are_refused():
    past = Past(torch.arange(16).expand(2, 16), None)
    with pytest.raises(ValueError, match="needs a cache with a history"):
        make(DocumentPools.Config())(tokens(32), given(past=past))
    with pytest.raises(ConfigError, match="^pool"):
        DocumentPools.Config(pool=0.0)
