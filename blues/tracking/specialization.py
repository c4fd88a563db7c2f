"""What each expert learned: which tokens, domains and languages it takes, with which experts, and how settled that is.

In: the `Routing` of each mixture-of-experts layer, with labels of its tokens (ids, domains, languages).
Out: counts on the device (`SpecializationCounts`), and from them a `Specialization` of plain numbers.

The figures are those of OLMoE (arXiv 2409.02060, section 5), with `N` for counts of tokens:

- saturation: |experts now and then| / k, the mean over tokens of a fixed probe; 1 when routing no longer changes.
- co-activation: N(i, j) / N(i), the share of expert i's tokens that also go to j.
- specialization of a label (a token id, a domain, a language) on an expert: N(label, e) / N(label). A layer's value is
  the mean over labels of the largest one. An expert that does not care has k / E everywhere.
- mutual information I(expert; label) over routed pairs, in nats: what the label tells about the expert.

Counting waits for nothing and takes one scatter for all layers together; reading copies to the host once.

Shapes: L mixture-of-experts layers, T tokens, E experts (of the widest layer in tables of all layers), K slots per
token, G labels of a kind, N most specific labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blues.tracking.metrics import RoutingLike, stack_ids, sum_dtype

MIN_COUNT = 8
"""Labels with fewer tokens are left out of mean specializations: one seen once always has an expert for itself."""
NUM_LISTED = 20
"""Most specific labels that are kept of each expert."""
CONFIDENCE_Z = 1.96
"""Of the lower bound that ranks them: 97.5 % one-sided."""


def membership(ids_TLK: Tensor, width: int) -> Tensor:
    """`member_TLE` (float32): 1 where the token has the expert in one of its slots. Ids of `width` are no expert."""
    T, L, _ = ids_TLK.shape
    member_TLE = torch.zeros(T, L, width + 1, device=ids_TLK.device)
    return member_TLE.scatter_(2, ids_TLK, 1.0)[..., :width]


def overlap(ids_TLK: Tensor, then_TLK: Tensor, width: int) -> Tensor:
    """`share_TL`: |experts now and then| / k, the saturation of every token (OLMoE, eq. 5).

    Where tokens may have any number of experts, k is the larger of both numbers; two empty sets are the same (1).
    """
    now_TLE, then_TLE = membership(ids_TLK, width), membership(then_TLK, width)
    most_TL = torch.maximum(now_TLE.sum(-1), then_TLE.sum(-1))
    return torch.where(most_TL > 0, (now_TLE * then_TLE).sum(-1) / most_TL.clamp(min=1), 1.0)


def saturation_curve(ids_by_step: Mapping[int, Tensor], width: int) -> tuple[list[int], list[list[float]]]:
    """Router saturation of each checkpoint against the last: steps, and for each the mean overlap of every layer.

    Args:
        ids_by_step: `ids_TLK` of the same tokens at each step.
    """
    steps = sorted(ids_by_step)
    final_TLK = ids_by_step[steps[-1]]
    return steps, [overlap(ids_by_step[step], final_TLK, width).mean(0).tolist() for step in steps]


def coactivation(pairs_EE: Tensor) -> Tensor:
    """`share_EE`: N(i, j) / N(i) of the counts of tokens that have both; rows of unused experts are 0."""
    return pairs_EE / pairs_EE.diagonal()[:, None].clamp(min=1)


def strongest_partner(pairs_EE: Tensor) -> Tensor:
    """Mean over used experts of the largest N(i, j) / N(i), j not i; (k - 1) / (E - 1) when pairs are drawn evenly."""
    share_EE = coactivation(pairs_EE)
    others_E = (share_EE - torch.diag_embed(share_EE.diagonal())).amax(-1)
    used_E = pairs_EE.diagonal() > 0
    return (others_E * used_E).sum() / used_E.sum()


def affinity(counts_GE: Tensor, tokens_G: Tensor) -> Tensor:
    """`share_GE`: P(e | label) = N(label, e) / N(label); rows sum to k, rows of labels without tokens are 0."""
    return counts_GE / tokens_G[:, None].clamp(min=1)


def mean_specialization(counts_GE: Tensor, tokens_G: Tensor, min_count: int = 1) -> Tensor:
    """Mean over labels with at least `min_count` tokens of their largest P(e | label); NaN if there are none."""
    counted_G = tokens_G >= min_count
    return (affinity(counts_GE, tokens_G).amax(-1) * counted_G).sum() / counted_G.sum()


def mutual_information(counts_GE: Tensor) -> Tensor:
    """I(expert; label) in nats over the routed pairs, as counted: 0 to log E; 0 when nothing was routed."""
    total = counts_GE.sum().clamp(min=1)
    joint, label, expert = counts_GE / total, counts_GE.sum(1) / total, counts_GE.sum(0) / total
    entropy = torch.special.entr
    return entropy(label).sum() + entropy(expert).sum() - entropy(joint).sum()


def information_bias(counts_GE: Tensor) -> Tensor:
    """What `mutual_information` says too much, in expectation, because counts are finite (Miller 1955).

    (cells - labels - experts + 1) / (2 n), each the number that has a count. It is not small for a vocabulary: 200,000
    ids times 8 experts need many millions of tokens.
    """
    cells = (counts_GE > 0).sum() - (counts_GE.sum(1) > 0).sum() - (counts_GE.sum(0) > 0).sum() + 1
    return cells / (2 * counts_GE.sum().clamp(min=1))


def lower_bound(counts_GE: Tensor, tokens_G: Tensor) -> Tensor:
    """Lower end of Wilson's interval of P(e | label) (1927): a share that few tokens vouch for counts less."""
    tokens_G1, z2 = tokens_G[:, None].clamp(min=1), CONFIDENCE_Z**2
    share_GE = counts_GE / tokens_G1
    center, spread = share_GE + z2 / (2 * tokens_G1), share_GE * (1 - share_GE) / tokens_G1 + z2 / (4 * tokens_G1**2)
    return ((center - CONFIDENCE_Z * spread.sqrt()) / (1 + z2 / tokens_G1)).clamp(min=0)


class Labels(NamedTuple):
    """A kind of label that tokens have, numbered from 0."""

    name: str
    """Of the metrics, as in experts/specialization/NAME."""
    size: int
    names: tuple[str, ...] | None = None
    """Of each label: its row of P(e | label) is reported. None (a vocabulary): the most specific labels are."""


@dataclass(frozen=True, kw_only=True)
class Specific:
    """A label that an expert takes: P(e | label) `share`, of `tokens` tokens. text: what to show of it."""

    label: int
    share: float
    tokens: int
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class LabelFigures:
    """One layer and one kind of label."""

    specialization: float
    """`mean_specialization`, of `labels` labels that have at least MIN_COUNT tokens."""
    labels: int
    information: float
    """`mutual_information` less its bias, at least 0."""
    information_bias: float
    share_GE: list[list[float]] = field(default_factory=list)
    """P(e | label), for kinds with names."""
    specific_EN: list[list[Specific]] = field(default_factory=list)
    """Of each expert, by the lower bound of their share, for kinds without names."""


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """One mixture-of-experts layer. layer: its index within the transformer."""

    layer: int
    num_experts: int
    experts_per_token: float
    load_E: list[float]
    """Share of the tokens that go to each expert; sums to `experts_per_token`."""
    coactivation_EE: list[list[float]]
    strongest_partner: float
    kinds: dict[str, LabelFigures]


@dataclass(frozen=True, kw_only=True)
class Specialization:
    """What was counted over `tokens` tokens. `names` and `tokens_G` are those of the kinds of labels with names."""

    tokens: int
    layers: list[LayerFigures]
    names: dict[str, list[str]]
    tokens_G: dict[str, list[int]]

    def metrics(self) -> dict[str, float]:
        """experts/specialization/KIND, experts/information/KIND and experts/coactivation as means over the layers, and
        the same of every layer as experts/layer_01/specialization/KIND."""
        named: dict[str, dict[int, float]] = {"coactivation": {e.layer: e.strongest_partner for e in self.layers}}
        for entry in self.layers:
            for kind, figures in entry.kinds.items():
                named.setdefault(f"specialization/{kind}", {})[entry.layer] = figures.specialization
                named.setdefault(f"information/{kind}", {})[entry.layer] = figures.information
        return layer_metrics(named)

    def tree(self) -> dict[str, Any]:
        """For JSON: plain lists and dicts; values that are not there are None."""
        return _plain(asdict(self))


def describe(figures: Specialization, text: Callable[[int], str]) -> Specialization:
    """The same, with a text for each of the most specific labels."""
    layers = []
    for layer in figures.layers:
        kinds = {}
        for name, kind in layer.kinds.items():
            rows = [[replace(entry, text=text(entry.label)) for entry in row] for row in kind.specific_EN]
            kinds[name] = replace(kind, specific_EN=rows)
        layers.append(replace(layer, kinds=kinds))
    return replace(figures, layers=layers)


def layer_metrics(named: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """{name: {layer: value}} as experts/NAME (mean over layers) and experts/layer_01/NAME; no value, no metric."""
    metrics = {}
    for name, by_layer in named.items():
        known = {layer: value for layer, value in by_layer.items() if not math.isnan(value)}
        if known:
            metrics[f"experts/{name}"] = sum(known.values()) / len(known)
        metrics |= {f"experts/layer_{layer:02d}/{name}": value for layer, value in known.items()}
    return metrics


class SpecializationCounts:
    """Adds up `Routing`s and the labels of their tokens until they are read.

    Args:
        layers: index of each mixture-of-experts layer within the transformer, in the order of the routings.
        num_experts: E of every layer.
        kinds: the labels that tokens have.
        device: where the counts live; the device of the routings.

    `counts` is one flat int32 tensor, so that ranks combine their counts by summing it. A vocabulary of 200,064 ids
    takes 7 MB for each layer of 8 experts. No count may pass 2**31: some billions of tokens between two resets.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: Sequence[int],
        kinds: Sequence[Labels],
        device: torch.device | str = "cpu",
    ) -> None:
        if not layers or len(layers) != len(num_experts) or min(num_experts) < 1:
            raise ValueError(f"need experts of every layer, got {list(num_experts)} for layers {list(layers)}")
        self.layers, self.num_experts, self.kinds = tuple(layers), tuple(num_experts), tuple(kinds)
        self.width = max(num_experts)
        L, W = len(self.layers), self.width
        shapes = {"tokens": (1,), "pairs": (L, W, W)}
        for kind in kinds:
            shapes |= {f"{kind.name}/tokens": (kind.size,), f"{kind.name}/experts": (kind.size, L, W + 1)}
        self.counts = torch.zeros(sum(map(math.prod, shapes.values())), dtype=torch.int32, device=device)
        pieces = self.counts.split([math.prod(shape) for shape in shapes.values()])
        self._tables = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        self._columns_L1 = torch.arange(L, device=device)[:, None] * (W + 1)

    @torch.no_grad()
    def update(
        self, routing: Sequence[RoutingLike], labels: Mapping[str, Tensor], counted_T: Tensor | None = None
    ) -> None:
        """Add one forward pass. Does not wait for the device.

        Args:
            routing: one per layer.
            labels: `label_T` (int64) of every kind, by name.
            counted_T: False for tokens to leave out (padding).

        Raises:
            ValueError: routings or labels are missing, or are not of the same tokens.
        """
        self._check(routing, labels)
        ids_TLK = stack_ids(routing, self.width)
        if counted_T is None:
            counted_T = torch.ones(len(ids_TLK), dtype=torch.bool, device=ids_TLK.device)
        one_T = counted_T.to(torch.int32)
        self._tables["tokens"] += one_T.sum()
        member_LTE = membership(ids_TLK, self.width).mul_(counted_T[:, None, None]).transpose(0, 1)
        # 0 and 1 are exact in TF32, too, and their sums in float32 up to 2**24 tokens.
        self._tables["pairs"] += torch.bmm(member_LTE.transpose(1, 2), member_LTE).to(torch.int32)
        columns_TN = (self._columns_L1 + ids_TLK).flatten(1)
        one_N = one_T[:, None].expand_as(columns_TN).flatten()
        for kind in self.kinds:
            label_T = labels[kind.name]
            self._tables[f"{kind.name}/tokens"].scatter_add_(0, label_T, one_T)
            table_GLE = self._tables[f"{kind.name}/experts"]
            index_TN = label_T[:, None] * table_GLE[0].numel() + columns_TN
            table_GLE.view(-1).scatter_add_(0, index_TN.flatten(), one_N)

    def results(self) -> dict[str, Tensor]:
        """Everything that `figures` needs, small, still on the device; to be brought to the host by `copy_together`,
        which can bring other things in the same copy."""
        found = {"tokens": self._tables["tokens"]}
        for kind in self.kinds:
            if kind.names is not None:
                found[f"{kind.name}/tokens"] = self._tables[f"{kind.name}/tokens"]
        for number, experts in enumerate(self.num_experts):
            found |= {f"{number}/{name}": value for name, value in self._layer(number, experts).items()}
        return found

    def figures(self, host: Mapping[str, Tensor]) -> Specialization:
        """The figures of `results` on the host.

        Raises:
            ValueError: nothing was counted.
        """
        if not host["tokens"]:
            raise ValueError("no tokens were counted since the last reset, so there is no specialization to report")
        named = [kind for kind in self.kinds if kind.names is not None]
        return Specialization(
            tokens=int(host["tokens"]),
            layers=[self._figures(number, host) for number in range(len(self.layers))],
            names={kind.name: list(kind.names or ()) for kind in named},
            tokens_G={kind.name: host[f"{kind.name}/tokens"].long().tolist() for kind in named},
        )

    def read(self) -> Specialization:
        """The figures since the last reset, with one copy from the device."""
        return self.figures(copy_together(self.results()))

    def reset(self) -> None:
        """Start a new span."""
        self.counts.zero_()

    def _check(self, routing: Sequence[RoutingLike], labels: Mapping[str, Tensor]) -> None:
        if len(routing) != len(self.layers):
            raise ValueError(f"expected the routing of {len(self.layers)} layers, got {len(routing)}")
        lengths = {"routing": len(routing[0].ids_TK)}
        for kind in self.kinds:
            if kind.name not in labels:
                raise ValueError(f"the labels {kind.name!r} of these tokens are missing")
            lengths[kind.name] = len(labels[kind.name])
        if len(set(lengths.values())) > 1:
            raise ValueError(f"routing and labels are not of the same tokens: {lengths}")

    def _layer(self, number: int, experts: int) -> dict[str, Tensor]:
        """Figures of one layer, on the device."""
        dtype = sum_dtype(self.counts.device)
        pairs_EE = self._tables["pairs"][number, :experts, :experts].to(dtype)
        found = {
            "load": pairs_EE.diagonal() / self._tables["tokens"].clamp(min=1),
            "coactivation": coactivation(pairs_EE),
            "partner": strongest_partner(pairs_EE),
        }
        for kind in self.kinds:
            counts_GE = self._tables[f"{kind.name}/experts"][:, number, :experts].to(dtype)
            tokens_G = self._tables[f"{kind.name}/tokens"].to(dtype)
            found |= {
                f"{kind.name}/specialization": mean_specialization(counts_GE, tokens_G, MIN_COUNT),
                f"{kind.name}/labels": (tokens_G >= MIN_COUNT).sum(),
                f"{kind.name}/information": mutual_information(counts_GE),
                f"{kind.name}/bias": information_bias(counts_GE),
            }
            if kind.names is not None:
                found[f"{kind.name}/share"] = affinity(counts_GE, tokens_G)
            else:
                best_NE = lower_bound(counts_GE, tokens_G).topk(min(NUM_LISTED, kind.size), dim=0).indices
                found[f"{kind.name}/best"] = best_NE.T
                found[f"{kind.name}/best_share"] = affinity(counts_GE, tokens_G).gather(0, best_NE).T
                found[f"{kind.name}/best_tokens"] = tokens_G[best_NE].T
        return found

    def _figures(self, number: int, host: Mapping[str, Tensor]) -> LayerFigures:
        """Figures of one layer, from the host's copy."""
        kinds = {}
        for kind in self.kinds:
            place = f"{number}/{kind.name}"
            information, bias = float(host[f"{place}/information"]), float(host[f"{place}/bias"])
            kinds[kind.name] = LabelFigures(
                specialization=float(host[f"{place}/specialization"]),
                labels=int(host[f"{place}/labels"]),
                information=max(0.0, information - bias),
                information_bias=bias,
                share_GE=host[f"{place}/share"].tolist() if kind.names is not None else [],
                specific_EN=_specific(host, place) if kind.names is None else [],
            )
        load_E = host[f"{number}/load"]
        return LayerFigures(
            layer=self.layers[number],
            num_experts=self.num_experts[number],
            experts_per_token=float(load_E.sum()),
            load_E=load_E.tolist(),
            coactivation_EE=host[f"{number}/coactivation"].tolist(),
            strongest_partner=float(host[f"{number}/partner"]),
            kinds=kinds,
        )


def copy_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one device on the host as float64 of the same shapes, with one copy; whole numbers are exact to 2**53
    (on MPS, in float32, to 2**24)."""
    flat = torch.cat([tensor.reshape(-1).to(sum_dtype(tensor.device)) for tensor in tensors.values()]).cpu().double()
    pieces = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: piece.view(tensors[name].shape) for name, piece in zip(tensors, pieces, strict=True)}


def _specific(host: Mapping[str, Tensor], place: str) -> list[list[Specific]]:
    rows = zip(*(host[f"{place}/{name}"].tolist() for name in ("best", "best_share", "best_tokens")), strict=True)
    return [
        [
            Specific(label=int(label), share=share, tokens=int(tokens))
            for label, share, tokens in zip(*row, strict=True)
            if share > 0
        ]
        for row in rows
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
