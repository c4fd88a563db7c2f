"""Groups of duplicates: against all pairs of sets of tuples, whatever the work is divided into."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import sparse

from blues.data.dedup import corpus as corpus_module
from blues.data.dedup import dedup, minhash, sketches
from blues.data.dedup.corpus import Corpus, Shelf
from blues.data.dedup.dedup import Groups, Removal, find_duplicates
from blues.data.dedup.minhash import Settings
from blues.data.dedup.sketches import Sketches
from blues.data.storage.store import Store
from blues.data.tokenizer import Tokenizer
from tests.data.datasets import make_store
from tests.data.dedup.test_minhash import naive_jaccard

END = 299


def shelf(documents: Sequence[Sequence[int]], dataset: int = 0, split: str = "train") -> Shelf:
    ended = [np.array([*document, END], dtype=np.uint32) for document in documents]
    flat = np.concatenate([np.empty(0, np.uint32), *ended])
    digests = np.array([xxhash.xxh3_64_intdigest(document.data) for document in ended], dtype=np.uint64)
    ends = np.cumsum([len(document) for document in ended], dtype=np.int64)
    return Shelf(dataset, split, ends, digests, lambda start, stop: flat[start:stop].copy())


def search(corpus: Corpus, wanted: Settings, tokens: int = 1 << 20) -> Removal:
    """As it is used, the sketches made of ranges of about this many tokens."""
    with Sketches.room_for(len(corpus), wanted) as made:
        reads = {(shelf.dataset, shelf.split): shelf.read for shelf in corpus.shelves}
        for run in corpus.runs(tokens):
            made.put(run.number, *run.sketch(reads[run.dataset, run.split], wanted))
        return find_duplicates(corpus, wanted, made)


def search_all_pairs(corpus: Corpus, wanted: Settings) -> Removal:
    """With sketches that leave nothing to chance: every pair is a candidate."""
    with Sketches.room_for(len(corpus), wanted) as equal:
        return find_duplicates(corpus, wanted, equal)


def naive_removal(
    documents: Sequence[Sequence[int]], ngram: int, threshold: float, datasets: Sequence[int] | None = None
) -> dict[int, list[int]]:
    """Every document that goes, with all it could go for: all pairs compared, in order."""
    goes: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        stay = [n for n in range(number) if n not in goes and (datasets is None or datasets[n] != datasets[number])]
        similar = [n for n in stay if naive_jaccard(list(documents[n]), list(document), ngram) >= threshold]
        if similar:
            goes[number] = similar
    return goes


def near_copies(similarity: float, pairs: int, length: int = 300, seed: int = 0) -> list[list[int]]:
    """Pairs of documents with about this similarity: the end of the second one is rewritten."""
    rng, documents = np.random.default_rng(seed), []
    for _ in range(pairs):
        original = rng.integers(0, 50_000, length)
        copy = original.copy()
        changed = length - round(2 * length * similarity / (1 + similarity))
        copy[length - changed :] = rng.integers(50_000, 100_000, changed)
        documents += [original.tolist(), copy.tolist()]
    return documents


def as_rows(removal: Removal) -> list[tuple[int, int, bool, float]]:
    columns = (removal.numbers, removal.kept, removal.exact, removal.similarity)
    return list(zip(*(column.tolist() for column in columns), strict=True))


few_tokens = some.lists(some.lists(some.integers(0, 3), max_size=8), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(few_tokens, some.integers(1, 4), some.sampled_from([0.2, 0.5, 0.7, 1.0]), some.booleans())
def test_who_goes_is_who_repeats_an_earlier_one_that_stays(documents, ngram, threshold, across):
    parts = [documents[:2], documents[2:4], documents[4:8], documents[8:]]
    places = [(0, "validation"), (1, "validation"), (0, "train"), (1, "train")]
    corpus = Corpus([shelf(part, *place) for part, place in zip(parts, places, strict=True)])
    wanted = Settings(threshold=threshold, ngram=ngram)
    with Sketches.room_for(len(corpus), wanted) as equal:  # nothing is left to chance: every pair is a candidate
        removal = find_duplicates(corpus, wanted, equal, across_only=across)
    datasets = [dataset for part, (dataset, _) in zip(parts, places, strict=True) for _ in part]
    expected = naive_removal(documents, ngram, threshold, datasets if across else None)
    assert removal.numbers.tolist() == list(expected)
    for number, kept, exact, similarity in as_rows(removal):
        assert kept in expected[number]
        assert exact == (documents[kept] == documents[number])
        assert exact or documents[number] not in [documents[other] for other in expected[number]]
        assert similarity == pytest.approx(naive_jaccard(documents[kept], documents[number], ngram))
        assert similarity >= threshold


@settings(max_examples=60, deadline=None)
@given(few_tokens, some.booleans())
def test_exact_copies_are_those_with_equal_tokens_even_if_all_digests_are_equal(documents, confused):
    made = shelf(documents)
    if confused:
        made = Shelf(0, "train", made.ends_D, np.zeros_like(made.digests_D), made.read)
    removal = find_duplicates(Corpus([made]), Settings(), None)
    expected = [(n, documents.index(document), True, 1.0) for n, document in enumerate(documents)]
    assert as_rows(removal) == [row for row in expected if row[0] != row[1]]


@settings(max_examples=40, deadline=None)
@given(few_tokens, some.integers(1, 40), some.sampled_from([1, 7, 1 << 18]))
def test_the_result_does_not_depend_on_how_the_work_is_divided(documents, tokens, block):
    corpus, wanted = Corpus([shelf(documents[:5]), shelf(documents[5:], dataset=1)]), Settings(threshold=0.5, ngram=2)
    runs = corpus.runs(tokens)
    assert [run.number + n for run in runs for n in range(len(run.ends_D))] == list(range(len(documents)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK_TOKENS", block)
        divided = search(corpus, wanted, tokens)
    assert as_rows(divided) == as_rows(search(Corpus([shelf(documents)]), wanted))


@pytest.mark.parametrize(("similarity", "least"), [(0.72, 0.95), (0.8, 0.99), (0.9, 1.0), (0.97, 1.0)])
def test_near_copies_are_found(similarity, least):
    documents = near_copies(similarity, pairs=300)
    found = {number: kept for number, kept, *_ in as_rows(search(Corpus([shelf(documents)]), Settings()))}
    assert all(number % 2 and kept == number - 1 for number, kept in found.items())
    similar = [n for n in range(1, 600, 2) if naive_jaccard(documents[n - 1], documents[n], 5) >= 0.7]
    assert len(similar) == 300 and len(found) >= least * len(similar)


def similar_pairs(documents: Sequence[np.ndarray], ngram: int, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Brute force: the intersections of all pairs are one product of the matrix documents x shingles."""
    sets = [minhash.shingle_set(document, ngram) for document in documents]
    sizes = np.array([len(shingles) for shingles in sets])
    _, columns = np.unique(np.concatenate(sets), return_inverse=True)
    rows = np.concatenate(([0], np.cumsum(sizes)))
    common = sparse.csr_array((np.ones(len(columns), dtype=np.int32), columns, rows))
    common = sparse.triu(common @ common.T, k=1).tocoo()
    similar = common.data / (sizes[common.row] + sizes[common.col] - common.data) >= similarity
    return common.row[similar], common.col[similar]


@pytest.mark.slow
def test_of_real_code_no_similar_pair_is_left_and_nothing_else_goes():
    """2,500 files of a library that is known to repeat itself."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    files = sorted(Path(package.origin).parent.rglob("*.py"))[:2500]
    tokenizer = Tokenizer.Config().build()
    documents = [tokenizer.encode_array(file.read_text(encoding="utf-8")) for file in files]
    removal = search(Corpus([shelf(documents)]), Settings())
    goes = np.isin(np.arange(len(documents)), removal.numbers)
    for similarity, least in ((0.7, 0.99), (0.8, 0.999)):
        one, other = similar_pairs(documents, 5, similarity)
        assert len(one) > 1000 and np.mean(goes[one] | goes[other]) >= least
        if similarity == 0.7:
            known = set(zip(one.tolist(), other.tolist(), strict=True))
            assert {(kept, number) for number, kept, *_ in as_rows(removal)} <= known


def test_what_is_less_similar_stays():
    assert len(search(Corpus([shelf(near_copies(0.6, pairs=200))]), Settings())) == 0
    assert len(search(Corpus([shelf(near_copies(0.72, pairs=200))]), Settings(threshold=0.8))) == 0


def test_the_far_end_of_a_chain_of_small_changes_stays():
    words = list(range(1000, 1160))
    chain = [words[step : 100 + step] for step in range(0, 60, 10)]
    rows = as_rows(search(Corpus([shelf(chain)]), Settings(threshold=0.75)))
    assert [row[:3] for row in rows] == [(1, 0, False), (3, 2, False), (5, 4, False)]
    assert [row[3] for row in rows] == [pytest.approx(naive_jaccard(chain[0], chain[1], 5))] * 3
    assert naive_jaccard(chain[0], chain[2], 5) < 0.75


def test_a_copy_of_a_near_copy_is_near():
    document, near = near_copies(0.9, pairs=1)
    rows = as_rows(search(Corpus([shelf([document, near, near, document])]), Settings()))
    assert [row[:3] for row in rows] == [(1, 0, False), (2, 0, False), (3, 0, True)]
    assert rows[0][3] == rows[1][3] < 1.0 == rows[2][3]


def counted(monkeypatch, function: str) -> list[int]:
    calls, original = [0], getattr(minhash, function)

    def count(*arguments):
        calls[0] += 1
        return original(*arguments)

    monkeypatch.setattr(minhash, function, count)
    return calls


def test_many_variants_of_one_document_are_each_read_a_few_times(monkeypatch):
    """A licence with the year changed, 3,000 times over: all pairs would be 4.5 million."""
    rng = np.random.default_rng(0)
    licence = rng.integers(0, 50_000, 300).tolist()
    documents = [[*licence[:10], 60_000 + year, *licence[11:]] for year in range(3000)]
    calls = counted(monkeypatch, "jaccard")
    removal = search(Corpus([shelf(documents)]), Settings())
    assert removal.numbers.tolist() == list(range(1, 3000)) and set(removal.kept.tolist()) == {0}
    assert calls[0] < 2 * 3000


def test_many_documents_just_below_the_threshold_are_not_compared_all_with_all(monkeypatch):
    rng = np.random.default_rng(0)
    common = rng.integers(0, 50_000, 150).tolist()
    documents = [[*common, *rng.integers(50_000, 100_000, 40).tolist()] for _ in range(400)]
    calls = counted(monkeypatch, "jaccard")
    assert len(search_all_pairs(Corpus([shelf(documents)]), Settings())) == 0
    assert 400 < calls[0] <= 400 * (1 + dedup.MOST_FAILURES)


def test_two_groups_in_one_bucket_stay_two():
    one, other = near_copies(0.0, pairs=1)
    documents = [[*(one, other)[n % 2][:-1], 200_000 + n] for n in range(60)]
    removal = search_all_pairs(Corpus([shelf(documents)]), Settings())
    assert removal.kept.tolist() == [n % 2 for n in range(2, 60)]


def test_the_sketches_may_lie_in_a_file(monkeypatch):
    documents = near_copies(0.85, pairs=40)
    within = as_rows(search(Corpus([shelf(documents)]), Settings()))
    monkeypatch.setattr(sketches, "IN_MEMORY_BYTES", 0)
    assert as_rows(search(Corpus([shelf(documents)]), Settings())) == within and len(within) == 40


def test_a_set_is_forgotten_when_there_are_too_many(monkeypatch):
    documents = near_copies(0.85, pairs=40)
    within = as_rows(search(Corpus([shelf(documents)]), Settings()))
    monkeypatch.setattr(dedup, "SET_CACHE_BYTES", 1)
    assert as_rows(search(Corpus([shelf(documents)]), Settings())) == within


def test_the_corpus_of_datasets_puts_all_validation_documents_first(tmp_path):
    texts = [f"document number {number} says {number * number}" for number in range(8)]
    one = make_store(tmp_path / "one", train=[texts[:2], texts[2:3]], validation=[texts[3:4]])
    other = make_store(tmp_path / "other", train=[texts[4:5]], validation=[texts[5:7], texts[7:]])
    stores = [Store.open(one), Store.open(other)]
    corpus = Corpus.of(stores)
    assert [(shelf.dataset, shelf.split, len(shelf.ends_D)) for shelf in corpus.shelves] == [
        (0, "validation", 1),
        (1, "validation", 3),
        (0, "train", 3),
        (1, "train", 1),
    ]
    decoder = stores[0].tokenizer.build()
    found = [decoder.decode(corpus.tokens(number)) for number in range(len(corpus))]
    assert found == [texts[number] for number in (3, 5, 6, 7, 0, 1, 2, 4)]
    assert corpus.dataset_of(np.arange(8)).tolist() == [0, 1, 1, 1, 0, 0, 0, 1]
    assert len(np.unique(corpus.digests_N)) == 8


def test_a_training_document_that_repeats_a_validation_document_goes(tmp_path):
    held = near_copies(0.9, pairs=1, length=200)
    held = [[token % 250 for token in document] for document in held]
    one = make_store(tmp_path / "one", train=[[held[0], [1, 2, 3]]], validation=[[[4, 5, 6]]])
    other = make_store(tmp_path / "other", train=[[[4, 5, 6]]], validation=[[held[1]]])
    corpus = Corpus.of([Store.open(one), Store.open(other)])
    rows = as_rows(search(corpus, Settings()))
    assert [row[:3] for row in rows] == [(2, 1, False), (4, 0, True)]
    assert [corpus.shelves[place].split for place in corpus.shelf_of(np.array([2, 4]))] == ["train", "train"]


def test_nothing_and_one_document_have_no_duplicates():
    assert len(search(Corpus([]), Settings())) == 0
    assert len(search(Corpus([shelf([]), shelf([[1, 2, 3]], dataset=1)]), Settings())) == 0
    assert as_rows(search(Corpus([shelf([[], [1], []])]), Settings())) == [(2, 0, True, 1.0)]


@settings(max_examples=50, deadline=None)
@given(some.lists(some.tuples(some.integers(0, 19), some.integers(0, 19)), max_size=30))
def test_a_group_is_named_by_its_first_document(pairs):
    groups, naive = Groups(20), list(range(20))
    for left, right in pairs:
        groups.join(left, right)
        first, second = sorted((naive[left], naive[right]))
        naive = [first if root == second else root for root in naive]
    assert groups.roots(np.arange(20)).tolist() == naive == [groups.root(number) for number in range(20)]
