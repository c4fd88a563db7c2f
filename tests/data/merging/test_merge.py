"""Merging: each strategy gives the documented weights, nothing is copied, and what cannot be merged is told."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hyp

from blues.data.merging.merge import combine, merge, mixture_table, open_dataset, read_ingredients
from blues.data.mixture.schedule import MAX_PERIOD
from blues.data.storage import store as st
from blues.data.storage.manifest import MIXTURE
from blues.data.storage.versions import drop_documents
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError, DataError
from tests.data.datasets import make_numbered, make_store, snapshot


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Three datasets of 120, 40 and 240 (+1 each) training tokens."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        make_numbered(folder / name, windows=windows, length=4)
        for name, windows in zip("abc", (30, 10, 60), strict=True)
    ]


def test_weighted_shares_are_exact_and_scale_free(sources, tmp_path):
    for number, weights in enumerate(([0.7, 0.3], [7, 3], [70.0, 30.0], [1.4, 0.6])):
        dataset = merge(sources[:2], tmp_path / str(number), weights=weights)
        assert dataset.weights == (Fraction(7, 10), Fraction(3, 10))
        assert (dataset.names, dataset.strategy, dataset.merged) == (("a", "b"), "weighted", True)


def test_equal_and_proportional_shares(sources, tmp_path):
    equal = merge(sources, tmp_path / "equal", strategy="equal")
    assert equal.weights == (Fraction(1, 3),) * 3
    proportional = merge(sources, tmp_path / "proportional", strategy="proportional")
    assert proportional.weights == (Fraction(121, 403), Fraction(41, 403), Fraction(241, 403))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=hyp.lists(hyp.floats(0, 1e6), min_size=3, max_size=3).filter(lambda weights: sum(weights) > 0))
def test_any_weights_sum_to_one_and_are_rounded_at_most_once_and_loudly(sources, tmp_path, weights):
    told: list[str] = []
    dataset = merge(sources, tmp_path / "any", weights=weights, overwrite=True, report=told.append)
    asked = [Fraction(repr(weight)) for weight in weights]
    exact = [weight / sum(asked) for weight in asked]
    period = math.lcm(*(weight.denominator for weight in exact))
    assert sum(dataset.weights) == 1 and math.lcm(*(w.denominator for w in dataset.weights)) <= MAX_PERIOD
    roundings = [abs(share - weight) for share, weight in zip(dataset.weights, exact, strict=True)]
    assert max(roundings) < Fraction(3, MAX_PERIOD) if period > MAX_PERIOD else max(roundings) == 0
    assert len(told) == (max(roundings) > 0)
    assert json.loads((tmp_path / "any" / MIXTURE).read_bytes())["rounding"] == float(max(roundings))
    assert open_dataset(tmp_path / "any") == dataset


def test_the_largest_rounding_is_reported(sources, tmp_path):
    told: list[str] = []
    dataset = merge(sources[:2], tmp_path / "mix", weights=[0.1234567, 0.8765433], report=told.append)
    assert dataset.weights == (Fraction(8_091, 65_536), Fraction(57_445, 65_536))
    assert told == ["weights rounded to parts of 65,536; the largest change of a share is 2.2e-06"]


def test_no_token_is_copied_and_no_source_is_touched(sources, tmp_path):
    before = [snapshot(path) for path in sources]
    merge(sources, tmp_path / "mix", strategy="equal")
    assert [path.name for path in (tmp_path / "mix").iterdir()] == [MIXTURE]
    assert [snapshot(path) for path in sources] == before


def test_a_source_may_have_no_share(sources, tmp_path):
    assert merge(sources[:2], tmp_path / "mix", weights=[1, 0]).weights == (1, 0)


def test_one_dataset_alone_opens_as_a_mixture_of_one(sources):
    dataset = open_dataset(sources[0])
    assert (dataset.names, dataset.weights, dataset.merged) == (("a",), (1,), False)


def test_sources_of_one_name_are_told_apart(tmp_path):
    paths = [make_numbered(tmp_path / parent / "data", windows=3 + i, length=4) for i, parent in enumerate("xyz")]
    assert merge(paths, tmp_path / "mix", strategy="equal").names == ("data", "data-2", "data-3")


def test_the_folder_of_sources_and_mixture_can_move(tmp_path, monkeypatch):
    make_numbered(tmp_path / "old" / "a", windows=3, length=4)
    make_numbered(tmp_path / "old" / "b", windows=4, length=4)
    monkeypatch.chdir(tmp_path / "old")
    dataset = merge(["a", "b"], "mix", strategy="equal")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = open_dataset("new/mix")
    assert moved.fingerprint == dataset.fingerprint and moved.names == ("a", "b")
    assert str(tmp_path) not in (tmp_path / "new" / "mix" / MIXTURE).read_text()


def test_the_fingerprint_changes_with_weights_order_and_content_only(sources, tmp_path):
    a, b, c = sources
    first = merge([a, b], tmp_path / "1", weights=[7, 3]).fingerprint
    shutil.copytree(a, tmp_path / "copy")
    assert merge([tmp_path / "copy", b], tmp_path / "2", weights=[0.7, 0.3]).fingerprint == first
    others = [
        merge([a, b], tmp_path / "3", weights=[6, 4]),
        merge([b, a], tmp_path / "4", weights=[3, 7]),
        merge([a, c], tmp_path / "5", weights=[7, 3]),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 4


def test_the_same_merge_again_changes_nothing_and_another_needs_overwrite(sources, tmp_path):
    merge(sources[:2], tmp_path / "mix", weights=[7, 3])
    before = snapshot(tmp_path / "mix")
    merge(sources[:2], tmp_path / "mix", weights=[0.7, 0.3])
    with pytest.raises(DataError, match=r"mix' already holds another merged dataset; .*--overwrite"):
        merge(sources[:2], tmp_path / "mix", weights=[6, 4])
    assert snapshot(tmp_path / "mix") == before
    assert merge(sources[:2], tmp_path / "mix", weights=[6, 4], overwrite=True).weights[0] == Fraction(6, 10)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [1.0]}, "1 weights for 2 datasets; give one weight for each dataset"),
        ({"weights": [1, 2, 3]}, "3 weights for 2 datasets"),
        ({"weights": [0, 0]}, "the weights sum to zero; at least one must be positive"),
        ({"weights": [0.5, -0.1]}, "weight -0.1 is not a share"),
        ({"weights": [NAN, 1]}, "weight nan is not a share"),
        ({"weights": [INF, 1]}, "weight inf is not a share"),
        ({}, "the strategy 'weighted' needs weights, one for each dataset; or use 'equal' or 'proportional'"),
        ({"weights": [1, 1], "strategy": "equal"}, "weights mean nothing to the strategy 'equal'"),
        ({"strategy": "propotional"}, "unknown merge strategy 'propotional'. Did you mean 'proportional'?"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence_and_nothing_is_written(sources, tmp_path, arguments, words):
    with pytest.raises(DataError) as caught:
        merge(sources[:2], tmp_path / "mix", **arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "mix").exists()


def test_datasets_that_cannot_be_merged_are_named(sources, tmp_path):
    def refused(paths: list[Path]) -> str:
        with pytest.raises(DataError) as caught:
            merge(paths, tmp_path / "out", strategy="equal")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    a, b = sources[:2]
    assert "name at least one prepared dataset" in refused([])
    assert "absent' does not exist" in refused([a, tmp_path / "absent"])
    assert "is named twice" in refused([a, b, a.parent / "b" / ".." / "a"])
    merge([a, b], tmp_path / "mix", strategy="equal")
    assert "mix' is named twice" in refused([tmp_path / "mix", sources[2], tmp_path / "mix"])
    assert "mix' is a merged dataset and has no versions; name it without @1" in refused([f"{tmp_path}/mix@1", a])
    other = make_store(tmp_path / "other", train=[["x"]], tokenizer=Tokenizer.Config(vocab_size=400))
    assert "other' has vocab_size 400 and" in refused([a, other]) and "has 300" in refused([a, other])
    empty = make_store(tmp_path / "empty", validation=[["x"]])
    assert "empty' has no training tokens; leave it out" in refused([a, empty])


def test_an_output_that_holds_something_else_is_left_alone(sources, tmp_path):
    shutil.copytree(sources[0], tmp_path / "prepared")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    for name, words in (
        ("prepared", "already holds something else"),
        ("notes", "already holds something else"),
        ("file", "is a file"),
    ):
        with pytest.raises(DataError, match=rf"{name}' {words}; choose .*directory"):
            merge(sources[:2], tmp_path / name, strategy="equal", overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_source_that_is_gone_changed_or_damaged_is_named(tmp_path):
    a, b = (make_numbered(tmp_path / name, windows=9, length=4, first=i * 9) for i, name in enumerate("ab"))
    merge([a, b], tmp_path / "mix", strategy="equal")
    b.rename(tmp_path / "kept")
    with pytest.raises(DataError, match=r"source 'b' of the merged dataset .*mix' is not at .*; put it back or merge"):
        open_dataset(tmp_path / "mix")
    make_numbered(b, windows=10, length=4)
    with pytest.raises(DataError, match=r"source 'b' of .*mix' was prepared again after the merge .*; merge again"):
        open_dataset(tmp_path / "mix")
    shutil.rmtree(b)
    (tmp_path / "kept").rename(b)
    assert open_dataset(tmp_path / "mix").names == ("a", "b")
    (a / "chunks" / "train-00001-00000.tokens").write_bytes(b"")
    with pytest.raises(DataError, match=r"a' is damaged: chunks/train-00001-00000.tokens: holds 0 bytes"):
        open_dataset(tmp_path / "mix")


def test_an_edited_mixture_is_refused(sources, tmp_path):
    merge(sources[:2], tmp_path / "mix", weights=[7, 3])
    file = tmp_path / "mix" / MIXTURE
    tree = json.loads(file.read_bytes())
    tree["sources"][0]["weight"] = "1/2"
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"mixture.json' was changed after it was written"):
        open_dataset(tmp_path / "mix")
    merge(sources[:2], tmp_path / "mix", weights=[7, 3], overwrite=True)
    assert open_dataset(tmp_path / "mix").weights[0] == Fraction(7, 10)


def test_where_one_prepared_dataset_is_needed_a_merged_one_is_told(sources, tmp_path):
    merge(sources[:2], tmp_path / "mix", strategy="equal")
    with pytest.raises(DataError, match="is a merged dataset, and a single prepared one is needed here"):
        st.Store.open(tmp_path / "mix")


# Versions.


@pytest.fixture
def versioned(tmp_path) -> tuple[Path, Path]:
    """Two datasets of three documents; tests make further versions of the first."""
    return tuple(make_store(tmp_path / name, train=[["one", "two", "three"]]) for name in "ab")  # type: ignore[return-value]


def forget_first(path: Path) -> st.Store:
    return drop_documents(st.Store.open(path), {"train": [0]}, {"kind": "deduplicate"})


def test_the_version_that_was_merged_stays_until_merged_again(versioned, tmp_path):
    a, b = versioned
    before = merge([a, b], tmp_path / "mix", strategy="equal")
    assert before.newer_versions() == {} and "newest" not in mixture_table(before)
    second = forget_first(a)
    opened = open_dataset(tmp_path / "mix")
    assert [store.version for store in opened.stores] == [1, 1] and opened.fingerprint == before.fingerprint
    assert opened.newer_versions() == {"a": (1, 2)}
    assert mixture_table(opened).endswith("a is of version 1, and its newest is 2; merge again to take that one")
    with pytest.raises(DataError, match=r"another merged dataset \(of other versions of a\); .* pass --overwrite"):
        merge([a, b], tmp_path / "mix", strategy="equal")
    merge([f"{a}@1", b], tmp_path / "mix", strategy="equal")  # what is there already
    after = merge([a, b], tmp_path / "mix", strategy="equal", overwrite=True)
    assert [store.checksum for store in after.stores] == [second.checksum, opened.stores[1].checksum]
    assert after.newer_versions() == {} and after.names == ("a", "b")


def test_a_version_is_named_by_its_number(versioned, tmp_path):
    a, b = versioned
    forget_first(a)
    older, newer = (merge([f"{a}@{n}", b], tmp_path / str(n), strategy="equal") for n in (1, 2))
    assert older.names == newer.names == ("a", "b")
    assert [store.num_documents("train") for store in (older.stores[0], newer.stores[0])] == [3, 2]
    assert older.newer_versions() == {"a": (1, 2)} and newer.newer_versions() == {}
    assert open_dataset(f"{a}@1").names == ("a",)
    with pytest.raises(DataError, match="has no version 3; it has 1, 2"):
        merge([f"{a}@3", b], tmp_path / "3", strategy="equal")
    with pytest.raises(DataError, match="is named twice"):
        merge([f"{a}@2", a], tmp_path / "3", strategy="equal")


def test_two_versions_of_one_dataset_have_names_of_their_own_and_it_is_said(versioned, tmp_path):
    a, b = versioned
    forget_first(a)
    told: list[str] = []
    dataset = merge([f"{a}@1", b, a], tmp_path / "mix", strategy="equal", report=told.append)
    assert dataset.names == ("a@1", "b", "a@2")
    assert told == ["a@1 and a@2 are versions of one dataset: the documents that they share come in each"]


# Mixtures of mixtures.


def test_a_mixture_among_the_datasets_is_its_sources_with_the_product_of_the_weights(sources, tmp_path):
    a, b, c = sources
    merge([a, b], tmp_path / "inner", weights=[7, 3])
    told: list[str] = []
    dataset = merge([tmp_path / "inner", c], tmp_path / "mix", weights=[1, 3], report=told.append)
    assert dataset.names == ("a", "b", "c")
    assert dataset.weights == (Fraction(7, 40), Fraction(3, 40), Fraction(3, 4))
    assert told == ["the sources of 'inner' take part with their weights times its share; they stay exact"]
    direct = merge([a, b, c], tmp_path / "direct", weights=[0.175, 0.075, 0.75])
    assert dataset.fingerprint == direct.fingerprint
    shutil.rmtree(tmp_path / "inner")  # nothing depends on it
    assert open_dataset(tmp_path / "mix") == dataset


def test_a_source_that_comes_in_several_ways_is_one_source_with_the_sum(sources, tmp_path):
    a, b, c = sources
    merge([a, b], tmp_path / "ab", strategy="equal")
    merge([a, c], tmp_path / "ac", strategy="equal")
    dataset = merge([tmp_path / "ab", tmp_path / "ac", b], tmp_path / "mix", weights=[2, 1, 1])
    assert dataset.names == ("a", "b", "c")
    assert dataset.weights == (Fraction(3, 8), Fraction(1, 2), Fraction(1, 8))
    assert merge([tmp_path / "ab"], tmp_path / "alone").weights == (Fraction(1, 2), Fraction(1, 2))


def test_the_strategies_take_a_mixture_as_one_dataset(sources, tmp_path):
    a, b, c = sources  # 121, 41 and 241 tokens
    merge([a, b], tmp_path / "inner", weights=[3, 1])
    equal = merge([tmp_path / "inner", c], tmp_path / "equal", strategy="equal")
    assert equal.weights == (Fraction(3, 8), Fraction(1, 8), Fraction(1, 2))
    proportional = merge([tmp_path / "inner", c], tmp_path / "proportional", strategy="proportional")
    inner = Fraction(121 + 41, 121 + 41 + 241)
    assert proportional.weights == (inner * Fraction(3, 4), inner * Fraction(1, 4), 1 - inner)


def test_products_that_are_too_fine_are_rounded_and_it_is_said(sources, tmp_path):
    a, b, c = sources
    merge([a, b], tmp_path / "inner", weights=[1, 65_535])
    told: list[str] = []
    dataset = merge([tmp_path / "inner", c], tmp_path / "mix", weights=[1, 6], report=told.append)
    assert sum(dataset.weights) == 1 and min(dataset.weights) > 0
    assert told[0] == "the sources of 'inner' take part with their weights times its share"
    assert told[1].startswith("weights rounded to parts of 65,536; the largest change")


def test_equal_names_of_other_mixtures_are_told_apart_by_the_mixture(tmp_path):
    x, y, z = (make_numbered(tmp_path / parent / "code", windows=3 + i, length=4) for i, parent in enumerate("xyz"))
    other = make_numbered(tmp_path / "other", windows=9, length=4)
    merge([x, other], tmp_path / "first", strategy="equal")
    merge([y], tmp_path / "second")
    dataset = merge([tmp_path / "first", tmp_path / "second", z], tmp_path / "mix", strategy="equal")
    assert dataset.names == ("first.code", "other", "second.code", "code")


# From a file.


def test_a_file_names_datasets_relative_to_its_own_folder(sources, tmp_path, monkeypatch):
    folder = tmp_path / "settings"
    folder.mkdir()
    for source in sources[:2]:
        shutil.copytree(source, tmp_path / "data" / source.name)
    block = {"datasets": {"paths": ["../data/a", "../data/b@1"], "weights": [0.7, 0.3], "merge_strategy": "weighted"}}
    (folder / "mix.json").write_text(json.dumps(block, indent="\t"))
    (folder / "mix.yaml").write_text(
        "datasets:\n  paths:\n    - ../data/a\n    - ../data/b@1\n  weights: [7, 3]\nmodel: {n_layers: 4}\n"
    )
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    for number, name in enumerate(("mix.json", "mix.yaml")):
        found = read_ingredients(f"settings/{name}", report=told.append)
        made = merge(found.paths, f"out{number}", weights=found.weights, strategy=found.merge_strategy)
        assert made.weights == (Fraction(7, 10), Fraction(3, 10)) and made.names == ("a", "b")
    assert told == ["of settings/mix.yaml only 'datasets' is read, not model"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("datasets: {paths: [a], wieghts: [1]}", "unknown key 'datasets.wieghts'. Did you mean 'weights'?"),
        ("datasets: {weights: [1]}", "missing value for 'datasets.paths'"),
        ("datasets: {paths: a}", "datasets.paths: expected a list, got 'a'"),
        ("datasets: {paths: [a], weights: [many]}", "datasets.weights[0]: expected a number, got 'many'"),
        ("datasets: {paths: [a], merge_strategy: equl}", "unknown strategy 'equl'. Did you mean 'equal'?"),
        ("datasets: [a, b]", "datasets: expected a mapping of fields"),
        ("dataset: {paths: [a]}", "needs the key 'datasets' with paths, weights and merge_strategy (it has 'dataset')"),
        ("- a", "needs the key 'datasets'"),
        ("", "needs the key 'datasets'"),
        ("datasets: {paths: [a]}\nmerge_strategy: equal", "'merge_strategy' belongs under 'datasets'"),
        ("datasets: {paths: [a", "cannot be read: "),
        (b"datasets: {paths: [\xff]}", "cannot be read: "),
        (None, "cannot read configuration"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "mix.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_ingredients(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_would_be_merged_is_known_without_writing(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    combined = combine(sources, strategy="equal")
    assert [source.name for source in combined.sources] == ["a", "b", "c"] and combined.remarks() == []
    assert list(tmp_path.iterdir()) == []
