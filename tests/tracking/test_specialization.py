"""Specialization of experts against counts of one token at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blues.tracking import specialization
from blues.tracking.metrics import stack_ids
from blues.tracking.specialization import (
    MIN_COUNT,
    Labels,
    Specialization,
    SpecializationCounts,
    affinity,
    coactivation,
    describe,
    information_bias,
    lower_bound,
    mean_specialization,
    mutual_information,
    overlap,
    saturation_curve,
    strongest_partner,
)


class Routed(NamedTuple):
    ids_TK: Tensor
    probs_TE: Tensor


def random_routing(random: np.random.Generator, tokens: int, experts: int, k: int) -> Routed:
    """Distinct experts; some slots are empty (id `experts`)."""
    ids_TK = np.stack([random.permutation(experts)[:k] for _ in range(tokens)])
    ids_TK[random.random(ids_TK.shape) < 0.2] = experts
    return Routed(torch.from_numpy(ids_TK), torch.rand(tokens, experts))


def experts_of(routed: Routed, experts: int) -> list[set[int]]:
    return [{expert for expert in row if expert < experts} for row in routed.ids_TK.tolist()]


Pair = tuple[int, set[int]]
"""The label of a token, and its experts."""


def naive_information(pairs: Sequence[Pair]) -> float:
    joint = Counter((label, expert) for label, experts in pairs for expert in experts)
    total = sum(joint.values())
    labels, chosen = Counter(), Counter()
    for (label, expert), count in joint.items():
        labels[label] += count
        chosen[expert] += count
    return sum(
        count / total * math.log(count * total / (labels[label] * chosen[expert]))
        for (label, expert), count in joint.items()
    )


def naive_specialization(pairs: Sequence[Pair], experts: int, min_count: int) -> float:
    tokens = Counter(label for label, _ in pairs)
    largest = [
        max(sum(expert in chosen for own, chosen in pairs if own == label) / count for expert in range(experts))
        for label, count in tokens.items()
        if count >= min_count
    ]
    return sum(largest) / len(largest) if largest else math.nan


def table(pairs: Sequence[Pair], labels: int, experts: int) -> tuple[Tensor, Tensor]:
    counts_GE, tokens_G = torch.zeros(labels, experts, dtype=torch.float64), torch.zeros(labels, dtype=torch.float64)
    for label, chosen in pairs:
        tokens_G[label] += 1
        for expert in chosen:
            counts_GE[label, expert] += 1
    return counts_GE, tokens_G


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    batches=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    padding=st.booleans(),
)
def test_counts_equal_one_token_at_a_time(seed: int, sizes: list[int], batches: list[int], padding: bool) -> None:
    """Layers with different numbers of experts and slots, empty slots, padding, and several forward passes."""
    random = np.random.default_rng(seed)
    kinds = [Labels("input_token", 7), Labels("domain", 3, ("a", "b", "c"))]
    counts = SpecializationCounts(range(len(sizes)), sizes, kinds)
    seen: list[dict[str, list[Pair]]] = [{"input_token": [], "domain": []} for _ in sizes]
    for tokens in batches:
        routing = [
            random_routing(random, tokens, experts, min(experts, 1 + layer)) for layer, experts in enumerate(sizes)
        ]
        labels = {kind.name: torch.from_numpy(random.integers(kind.size, size=tokens)) for kind in kinds}
        counted_T = torch.from_numpy(random.random(tokens) < 0.7) if padding else None
        counts.update(routing, labels, counted_T)
        for layer, experts in enumerate(sizes):
            chosen = experts_of(routing[layer], experts)
            for name, own in seen[layer].items():
                rows = zip(labels[name].tolist(), chosen, strict=True)
                own += [pair for at, pair in enumerate(rows) if counted_T is None or counted_T[at]]
    total = len(seen[0]["domain"])
    if not total:
        with pytest.raises(ValueError, match="no tokens"):
            counts.read()
        return
    figures = counts.read()
    assert figures.tokens == total
    assert figures.tokens_G == {"domain": [sum(label == d for label, _ in seen[0]["domain"]) for d in range(3)]}
    for layer, own in zip(figures.layers, seen, strict=True):
        check_layer(layer, own, sizes[layer.layer])


def check_layer(layer: specialization.LayerFigures, own: dict[str, list[Pair]], experts: int) -> None:
    chosen = [chosen for _, chosen in own["domain"]]
    number = [sum(expert in some for some in chosen) for expert in range(experts)]
    np.testing.assert_allclose(layer.load_E, np.array(number) / len(chosen))
    assert layer.experts_per_token == pytest.approx(sum(number) / len(chosen))
    for i in range(experts):
        for j in range(experts):
            both = sum({i, j} <= some for some in chosen)
            assert layer.coactivation_EE[i][j] == pytest.approx(both / number[i] if number[i] else 0)
    for name, pairs in own.items():
        found = layer.kinds[name]
        expected = naive_specialization(pairs, experts, MIN_COUNT)
        assert found.specialization == pytest.approx(expected, nan_ok=True)
        if any(some for _, some in pairs):
            plain = found.information + found.information_bias
            assert plain == pytest.approx(max(naive_information(pairs), found.information_bias), abs=1e-9)
        for label, row in enumerate(found.share_GE):
            tokens = sum(own_label == label for own_label, _ in pairs)
            for expert, share in enumerate(row):
                hits = sum(own_label == label and expert in some for own_label, some in pairs)
                assert share == pytest.approx(hits / tokens if tokens else 0)
        for expert, row in enumerate(found.specific_EN):
            assert [entry.label for entry in row] == naive_ranking(pairs, expert, [entry.label for entry in row])
            for entry in row:
                assert entry.tokens == sum(label == entry.label for label, _ in pairs)
                assert entry.share * entry.tokens == pytest.approx(
                    sum(label == entry.label and expert in some for label, some in pairs)
                )


def naive_ranking(pairs: Sequence[Pair], expert: int, listed: list[int]) -> list[int]:
    """Labels that the expert has, by Wilson's bound; those of equal bounds as they are listed."""
    tokens = Counter(label for label, _ in pairs)
    hits = Counter(label for label, some in pairs if expert in some)

    def bound(label: int) -> float:
        n, p, z = tokens[label], hits[label] / tokens[label], 1.96
        return (p + z * z / 2 / n - z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)) / (1 + z * z / n)

    return sorted(hits, key=lambda label: (-round(bound(label), 12), listed.index(label)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), experts=st.integers(1, 6), labels=st.integers(1, 5), tokens=st.integers(1, 60))
def test_functions_of_counts_and_their_laws(seed: int, experts: int, labels: int, tokens: int) -> None:
    random = np.random.default_rng(seed)
    routed = random_routing(random, tokens, experts, int(random.integers(1, experts + 1)))
    chosen = random.integers(labels, size=tokens).tolist()
    pairs = list(zip(chosen, experts_of(routed, experts), strict=True))
    counts_GE, tokens_G = table(pairs, labels, experts)
    for min_count in (1, 3):
        assert float(mean_specialization(counts_GE, tokens_G, min_count)) == pytest.approx(
            naive_specialization(pairs, experts, min_count), nan_ok=True
        )
    information = float(mutual_information(counts_GE))
    assert information == pytest.approx(naive_information(pairs) if counts_GE.sum() else 0, abs=1e-9)
    assert -1e-9 <= information <= min(math.log(max(1, experts)), math.log(max(1, labels))) + 1e-9
    share_GE = affinity(counts_GE, tokens_G)
    assert bool((share_GE <= 1).all())
    assert bool((lower_bound(counts_GE, tokens_G) <= share_GE + 1e-12).all())


def test_information_of_independent_of_decided_and_of_few() -> None:
    independent_GE = torch.tensor([[10.0, 20], [30, 60]], dtype=torch.float64)
    assert float(mutual_information(independent_GE)) == pytest.approx(0, abs=1e-12)
    assert float(mutual_information(torch.eye(4, dtype=torch.float64))) == pytest.approx(math.log(4))
    assert float(information_bias(independent_GE)) == pytest.approx(1 / 240)  # (2 - 1)(2 - 1) / 2n
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(50 * 4, (2_000,), generator=generator)  # labels and experts that know nothing of each other
    noise_GE = torch.bincount(cells, minlength=200).double().view(50, 4)
    left = float(mutual_information(noise_GE) - information_bias(noise_GE))
    assert float(mutual_information(noise_GE)) > 0.03
    assert abs(left) < 0.008


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), experts=st.integers(1, 6), tokens=st.integers(1, 20))
def test_overlap_is_the_share_of_common_experts(seed: int, experts: int, tokens: int) -> None:
    random = np.random.default_rng(seed)
    now, then = (random_routing(random, tokens, experts, int(random.integers(1, experts + 1))) for _ in range(2))
    share_TL = overlap(stack_ids([now], experts), stack_ids([then], experts), experts)
    for share, ours, theirs in zip(
        share_TL[:, 0].tolist(), experts_of(now, experts), experts_of(then, experts), strict=True
    ):
        most = max(len(ours), len(theirs))
        assert share == pytest.approx(len(ours & theirs) / most if most else 1)
    assert bool((overlap(stack_ids([now], experts), stack_ids([now], experts), experts) == 1).all())


def test_the_saturation_curve_ends_at_one() -> None:
    final_TLK = torch.tensor([[[0, 1]], [[2, 3]]])
    half_TLK = torch.tensor([[[0, 2]], [[3, 0]]])
    steps, share_SL = saturation_curve({20: final_TLK, 10: half_TLK, 0: torch.tensor([[[2, 3]], [[3, 2]]])}, 4)
    assert (steps, share_SL) == ([0, 10, 20], [[0.5], [0.5], [1.0]])


def test_partners() -> None:
    pairs_EE = torch.tensor([[4.0, 4, 0, 0], [4, 8, 2, 0], [0, 2, 2, 0], [0, 0, 0, 0]])
    assert coactivation(pairs_EE)[1].tolist() == [0.5, 1, 0.25, 0]
    assert coactivation(pairs_EE)[3].tolist() == [0, 0, 0, 0]
    assert float(strongest_partner(pairs_EE)) == pytest.approx((1 + 0.5 + 1) / 3)


def test_a_token_seen_once_is_not_the_most_specific() -> None:
    counts_GE, tokens_G = torch.tensor([[1.0], [99]]), torch.tensor([1.0, 100])
    assert lower_bound(counts_GE, tokens_G).flatten().argmax() == 1


def example(**names: tuple[str, ...]) -> tuple[SpecializationCounts, list[Routed], dict[str, Tensor]]:
    kinds = [Labels("input_token", 11), *(Labels(name, len(own), own) for name, own in names.items())]
    random = np.random.default_rng(0)
    counts = SpecializationCounts((1, 3), (4, 3), kinds)
    routing = [random_routing(random, 300, 4, 2), random_routing(random, 300, 3, 1)]
    labels = {kind.name: torch.from_numpy(random.integers(kind.size, size=300)) for kind in kinds}
    return counts, routing, labels


def test_counting_waits_for_nothing_and_reading_copies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, routing, labels = example(domain=("a", "b"))
    copies = []
    plain = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.numel()) or plain(self))
    for name in ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, lambda self, name=name: pytest.fail(f"{name} waits for the device"))
    counts.update(routing, labels, torch.ones(300, dtype=torch.bool))
    counts.results()
    assert copies == []
    monkeypatch.undo()
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.numel()) or plain(self))
    counts.read()
    assert len(copies) == 1
    assert copies[0] < 1_000, "the table of the vocabulary stays on the device"


def test_workers_add_their_counts_and_a_reset_starts_anew() -> None:
    ours, routing, labels = example(domain=("a", "b"))
    theirs, both = (example(domain=("a", "b"))[0] for _ in range(2))
    ours.update(routing, labels)
    theirs.update(routing[:1] + routing[1:], labels)
    both.update(routing, labels)
    both.update(routing, labels)
    ours.counts += theirs.counts  # what all_reduce does
    assert ours.read() == both.read()
    both.reset()
    with pytest.raises(ValueError, match="no tokens"):
        both.read()
    both.update(routing, labels)
    assert both.read() == theirs.read()


def test_metrics_tree_and_texts() -> None:
    counts, routing, labels = example(domain=("a", "b"), language=("unknown", "python"))
    counts.update(routing, labels)
    figures = counts.read()
    metrics = figures.metrics()
    for name in ("specialization/domain", "information/language", "coactivation"):
        layers = [metrics[f"experts/layer_{layer:02d}/{name}"] for layer in (1, 3)]
        assert metrics[f"experts/{name}"] == pytest.approx(sum(layers) / 2)
    assert all(math.isfinite(value) for value in metrics.values())
    tree = json.loads(json.dumps(describe(figures, "<{}>".format).tree(), allow_nan=False))
    assert tree["names"] == {"domain": ["a", "b"], "language": ["unknown", "python"]}
    assert [layer["num_experts"] for layer in tree["layers"]] == [4, 3]
    listed = tree["layers"][0]["kinds"]["input_token"]["specific_EN"][0][0]
    assert listed["text"] == f"<{listed['label']}>"


def test_what_has_no_value_is_no_metric_and_null_in_json() -> None:
    counts = SpecializationCounts((0,), (2,), [Labels("domain", 1, ("a",))])
    counts.update([Routed(torch.tensor([[2], [2]]), torch.rand(2, 2))], {"domain": torch.tensor([0, 0])})
    figures = counts.read()
    assert isinstance(figures, Specialization)
    assert "experts/coactivation" not in figures.metrics()
    assert "experts/specialization/domain" not in figures.metrics()  # fewer tokens than MIN_COUNT
    assert figures.tree()["layers"][0]["strongest_partner"] is None


def test_wrong_input_is_named() -> None:
    counts, routing, labels = example()
    with pytest.raises(ValueError, match="2 layers, got 1"):
        counts.update(routing[:1], labels)
    with pytest.raises(ValueError, match="'input_token' of these tokens are missing"):
        counts.update(routing, {})
    with pytest.raises(ValueError, match=r"not of the same tokens: \{'routing': 300, 'input_token': 5\}"):
        counts.update(routing, {"input_token": labels["input_token"][:5]})
    with pytest.raises(ValueError, match="experts of every layer"):
        SpecializationCounts((0, 1), (4,), [])
