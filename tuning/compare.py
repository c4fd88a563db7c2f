"""Compare finished runs: a table, a figure, and what may honestly be said about them.

In: run folders (experiment.yaml, metrics.jsonl). Out: a `Comparison`: runs that differ in their seeds alone form one
variant; per variant the mean and spread over seeds of the final and best validation loss, of the speed and of the
expert balance; written as comparison.json, .csv and .png. Variants are named by the settings in which they differ.

The verdict compares the best variant with each other one by the differences of runs with equal seeds (same data order,
same initial draw), with Student's t interval. One seed gives no spread, and the verdict says so.

Shapes: S seeds.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blues import config as cfg
from blues.config import write_atomic
from blues.errors import DataError
from blues.experiment import Experiment
from blues.table import align
from blues.tracking.spool import read_history

SEEDS = ("training.seed", "data.seed")
IRRELEVANT = ("name", "tracking", *SEEDS)
"""Settings that name a run or say where it is followed, not what is learned."""


History = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: its folder, settings and metrics."""

    folder: Path
    experiment: Experiment
    history: History

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Raises DataError for a folder without metrics, ConfigError for one without a readable experiment.yaml."""
        folder = Path(folder)
        experiment = cfg.read(Experiment, folder / "experiment.yaml")
        if not (folder / "metrics.jsonl").exists():
            raise DataError(f"run {str(folder)!r} has no metrics.jsonl yet; train it first")
        return cls(folder=folder, experiment=experiment, history=read_history(folder / "metrics.jsonl"))

    @property
    def seed(self) -> tuple[int, int]:
        return self.experiment.training.seed, self.experiment.data.seed

    @property
    def steps(self) -> int:
        """The last step with a metric."""
        return max((points[-1][0] for points in self.history.values() if points), default=0)

    @property
    def losses(self) -> Sequence[tuple[int, float]]:
        """(step, validation loss); the training cross-entropy of a run without validation."""
        return self.history.get("validation/loss") or self.history.get("train/cross_entropy", ())

    def measures(self) -> dict[str, float]:
        """The figures of the table; NaN for what was not measured."""
        losses = [loss for _, loss in self.losses]
        speeds = [value for _, value in self.history.get("throughput/tokens_per_second", ())]
        balance = [value for _, value in self.history.get("experts/balance", ())]
        return {
            "final_loss": losses[-1] if losses else math.nan,
            "best_loss": min(losses) if losses else math.nan,
            "tokens_per_second": statistics.median(speeds) if speeds else math.nan,
            # the end of training, over more than one noisy batch
            "balance": statistics.fmean(balance[-max(1, len(balance) // 5) :]) if balance else math.nan,
        }


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Runs that differ in their seeds alone. settings: those in which this variant differs from others."""

    settings: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return label(self.settings) or self.runs[0].experiment.name

    @cached_property
    def by_seed(self) -> dict[tuple[int, int], dict[str, float]]:
        return {run.seed: run.measures() for run in self.runs}

    def mean(self, measure: str) -> float:
        return statistics.fmean(values[measure] for values in self.by_seed.values())

    def spread(self, measure: str) -> float:
        """Standard deviation over seeds; NaN for one seed."""
        values = [values[measure] for values in self.by_seed.values()]
        return statistics.stdev(values) if len(values) > 1 else math.nan


def label(settings: Mapping[str, Any]) -> str:
    """A short name: `softmax_top_k, top_k=1`."""
    words = []
    for path, value in settings.items():
        parts = path.split(".")
        if parts[-1] == cfg.VARIANT_KEY or isinstance(value, str):
            words.append(str(value))
        else:
            words.append(f"{parts[-1]}={value:g}" if isinstance(value, float) else f"{parts[-1]}={value}")
    return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants, the best final loss first."""

    variants: tuple[Variant, ...]

    @property
    def measure(self) -> str:
        """What the loss is: of held-out data if any run was validated."""
        validated = any(run.history.get("validation/loss") for variant in self.variants for run in variant.runs)
        return "validation loss" if validated else "training loss (no run was validated)"

    def rows(self) -> list[dict[str, Any]]:
        """One row for each variant: settings, then mean and spread (standard deviation over seeds) of each figure."""
        rows = []
        for variant in self.variants:
            row: dict[str, Any] = {"variant": variant.name, **variant.settings, "seeds": len(variant.by_seed)}
            for measure in ("final_loss", "best_loss", "tokens_per_second", "balance"):
                row[measure] = variant.mean(measure)
                row[f"{measure}_spread"] = variant.spread(measure)
            rows.append(row | {"steps": min(run.steps for run in variant.runs)})
        return rows

    def table(self) -> str:
        """For a terminal."""
        head = ["variant", "seeds", "steps", "final loss", "best loss", "tokens/s", "fullest expert"]
        body = [
            [
                row["variant"],
                str(row["seeds"]),
                str(row["steps"]),
                _with_spread(row["final_loss"], row["final_loss_spread"], ".4f"),
                _with_spread(row["best_loss"], row["best_loss_spread"], ".4f"),
                _with_spread(row["tokens_per_second"], row["tokens_per_second_spread"], ",.0f"),
                _with_spread(row["balance"], row["balance_spread"], "+.0%"),
            ]
            for row in self.rows()
        ]
        return "\n".join([f"{self.measure}, mean ± standard deviation over seeds", *_ruled(head, body)])

    def verdict(self) -> str:
        """What the figures allow to say."""
        if len(self.variants) < 2:
            return "There is one variant: nothing to compare."
        pairs = math.comb(len(self.variants), 2)
        sentences = [_against(self.variants[0], other, pairs) for other in self.variants[1:]]
        if pairs > 1 and any(len(variant.runs) > 1 for variant in self.variants):
            sentences.append(
                f"The best of {len(self.variants)} was chosen by the same figures, so the intervals are widened for "
                f"all {pairs} pairs (Bonferroni): of sweeps over equal variants at most 5% see a difference."
            )
        if any(path.startswith("data.") for variant in self.variants for path in variant.settings):
            sentences.append(
                "The variants read different data or tokens, so their losses are not measured on the same thing: "
                "compare bits per byte on one text with `blues evaluate`."
            )
        return "\n".join(sentences)

    def save(self, folder: str | Path) -> list[Path]:
        """Write comparison.json and comparison.csv into `folder` (the figure is drawn by `tuning.figures`)."""
        folder, rows = Path(folder), self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows({key: "" if _is_nan(value) else value for key, value in row.items()} for row in rows)
        write_atomic(folder / "comparison.csv", text.getvalue().encode())
        tree = {"measure": self.measure, "verdict": self.verdict(), "variants": [self._tree(v) for v in self.variants]}
        write_atomic(folder / "comparison.json", json.dumps(tree, indent=2, allow_nan=False).encode())
        return [folder / f"comparison.{kind}" for kind in ("json", "csv")]

    def _tree(self, variant: Variant) -> dict[str, Any]:
        runs = [
            {"folder": run.folder.name, "training.seed": run.seed[0], "data.seed": run.seed[1], "steps": run.steps}
            | {key: None if _is_nan(value) else value for key, value in run.measures().items()}
            for run in variant.runs
        ]
        return {"name": variant.name, "settings": dict(variant.settings), "runs": runs}


def compare(runs: Iterable[Run]) -> Comparison:
    """Group runs into variants and order them by their mean final loss.

    Raises:
        DataError: no runs, or two with the same settings and seeds.
    """
    groups: dict[str, list[Run]] = {}
    flat: dict[str, dict[str, Any]] = {}
    for run in runs:
        settings = {path: value for path, value in cfg.flatten(run.experiment).items() if _matters(path)}
        key = json.dumps(settings, sort_keys=True)
        flat[key] = settings
        if any(other.seed == run.seed for other in groups.setdefault(key, [])):
            raise DataError(f"two runs have the same settings and seeds: {run.folder} and {groups[key][0].folder}")
        groups[key].append(run)
    if not groups:
        raise DataError("there is no run to compare; train one first")
    differing = _differing(list(flat.values()))
    variants = [
        Variant(
            settings=_chosen(flat[key], differing),
            runs=tuple(sorted(group, key=lambda run: run.seed)),
        )
        for key, group in groups.items()
    ]
    return Comparison(variants=tuple(sorted(variants, key=lambda variant: _worst_last(variant.mean("final_loss")))))


def _chosen(settings: Mapping[str, Any], differing: Sequence[str]) -> dict[str, Any]:
    """One variant's values of the differing settings; True for a group that is off (None) in another variant."""
    groups = {path for path in differing if any(other.startswith(f"{path}.") for other in settings)}
    return {path: settings.get(path, True) for path in differing if path in settings or path in groups}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths in which these differ, without those that only come along with another member of a family."""

    def differs(path: str) -> bool:
        return len({repr(each.get(path, "absent")) for each in settings}) > 1

    def comes_along(path: str) -> bool:
        parts = path.split(".")
        above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        if any(parent in each for parent in above for each in settings):  # a whole group is off in another variant
            return True
        present = {repr(each[path]) for each in settings if path in each}
        families = (f"{parent}.{cfg.VARIANT_KEY}" for parent in above)
        return len(present) == 1 and any(family != path and differs(family) for family in families)

    paths = dict.fromkeys(path for each in settings for path in each)
    return [path for path in paths if differs(path) and not comes_along(path)]


def _against(best: Variant, other: Variant, pairs: int) -> str:
    """One sentence about the difference between two variants, of which there are so many pairs."""
    shared = sorted(set(best.by_seed) & set(other.by_seed))
    differences = [other.by_seed[seed]["final_loss"] - best.by_seed[seed]["final_loss"] for seed in shared]
    if not differences or any(math.isnan(difference) for difference in differences):
        return f"{best.name} and {other.name} cannot be compared: a loss is missing, or they share no seed."
    mean = statistics.fmean(differences)
    apart = f"{best.name} ended {abs(mean):.4f} {'below' if mean >= 0 else 'above'} {other.name}"
    if len(differences) == 1:
        return f"{apart} with one seed. One seed cannot tell whether that is more than chance: --seeds 3 can."
    half = t_quantile(len(differences) - 1, pairs) * statistics.stdev(differences) / math.sqrt(len(differences))
    interval = f"95% interval {mean - half:+.4f} to {mean + half:+.4f} over {len(differences)} paired seeds"
    if mean - half > 0:
        return f"{apart}: more than chance ({interval})."
    return f"{apart}: not told apart from chance ({interval})."


def t_quantile(degrees: int, pairs: int = 1) -> float:
    """Student's two-sided 95% quantile, for an interval that is one of so many (Bonferroni)."""
    from scipy import stats  # half a second that most commands need not wait for

    return float(stats.t.ppf(1 - 0.025 / pairs, degrees))


def _matters(path: str) -> bool:
    return not any(path == other or path.startswith(f"{other}.") for other in IRRELEVANT)


def _worst_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _with_spread(mean: float, spread: float, form: str) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:{form}}" if math.isnan(spread) else f"{mean:{form}} ± {spread:{form.lstrip('+')}}"


def _ruled(head: list[str], body: list[list[str]]) -> list[str]:
    """Aligned lines with a rule under the head."""
    first, *rest = align([head, *body])
    return [first, "-" * max(map(len, [first, *rest])), *rest]
