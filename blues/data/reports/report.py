"""What checking datasets found: for a person as a table, for a program as JSON, for `blues.data.reports.page` as it is.

In: issues, statistics and descriptions of sources. Out: text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blues.data.reports.statistics import Lengths, Overlap, Statistics
from blues.data.reports.visible import visible
from blues.data.storage.store import Issue
from blues.table import align

REMEDY = "restore the files, or prepare the dataset again with --overwrite (and then merge again)"


@dataclass(frozen=True)
class Version:
    """One version of a dataset: what made it, from which number (None for the first), what it holds."""

    number: int
    parent: int | None
    operation: dict[str, Any]
    documents: int
    tokens: int
    chunks: int


@dataclass(frozen=True)
class Source:
    """A prepared dataset that was checked, on its own or as part of a merged one.

    dataset: the path that was named. path: where it lies. version: the one that is described, of `versions`. origins:
    what it was prepared from. rejected: rows by reason. tokenizer: its configuration.
    """

    name: str
    dataset: Path
    path: Path
    weight: float
    version: int
    versions: tuple[Version, ...]
    origins: tuple[dict[str, Any], ...]
    rejected: dict[str, int]
    tokenizer: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What `verify` found. retokenized: documents that were decoded and tokenized again. overlap: None where no source
    is whole; as `statistics` and `sources`, it is of the whole ones only."""

    paths: tuple[Path, ...]
    issues: tuple[Issue, ...]
    warnings: tuple[Issue, ...] = ()
    sources: tuple[Source, ...] = ()
    statistics: tuple[Statistics, ...] = ()
    overlap: Overlap | None = None
    retokenized: int = 0

    @property
    def good(self) -> bool:
        """Nothing is wrong (there may be warnings)."""
        return not self.issues

    @property
    def rejected(self) -> int:
        """Rows that could not be used, of all sources."""
        return sum(sum(source.rejected.values()) for source in self.sources)

    def json(self) -> str:
        """All of it."""
        tree = asdict(self) | {"good": self.good, "rejected": self.rejected}
        return json.dumps(tree if self.good else tree | {"remedy": REMEDY}, indent=2, default=str)

    def table(self) -> str:
        """For a person."""
        lines = [f"dataset {path}" for path in self.paths]
        if self.statistics:
            lines += ["", *align([_HEADER, *(_row(line) for line in self.statistics)]), ""]
            tokens, documents = (sum(getattr(s, name) for s in self.statistics) for name in ("tokens", "documents"))
            lines.append(f"{documents:,} documents, {tokens:,} tokens; {self.rejected:,} rejected rows in quarantine")
        lines += [line for source in self.sources for line in _version_lines(source)]
        lines += self._copies()
        lines += [f"warning: {issue}" for issue in self.warnings]
        if self.good:
            again = f", {self.retokenized:,} documents tokenize to what is stored"
            lines.append(
                f"good: all checksums hold{again if self.retokenized else '; no document was tokenized again'}"
            )
        else:
            lines.append(f"{len(self.issues):,} issue{'s' if len(self.issues) != 1 else ''}:")
            lines += [f"  {issue}" for issue in self.issues]
            lines.append(REMEDY)
        return "\n".join(map(visible, lines))

    def _copies(self) -> list[str]:
        """Documents that are there more than once, and where."""
        total = sum(self.overlap.duplicates) if self.overlap is not None else 0
        if self.overlap is None or not total:
            return []
        lines = [
            f"exact copies of another document: {total:,}; rows: documents of that split, columns: how many of "
            "them are also in this one (in the same one: copies of an earlier one)"
        ]
        names = [f"{place} {source} {split}" for place, (source, split) in enumerate(self.overlap.names, start=1)]
        header = ("", *map(str, range(1, len(names) + 1)))
        rows = [(name, *(f"{n:,}" for n in row)) for name, row in zip(names, self.overlap.shared, strict=True)]
        return [*lines, *(f"  {line}" for line in align([header, *rows]))]


_HEADER = (
    *("source", "split", "weight", "documents", "tokens", "MB of text", "bytes/token"),
    *("mean", "median", "95%", "longest", "ids used", "bits", "copies"),
)


def _row(line: Statistics) -> tuple[str, ...]:
    return (
        *(line.source, line.split, f"{line.weight:.3f}", f"{line.documents:,}", f"{line.tokens:,}"),
        *(f"{line.text_bytes / 1e6:.2f}", f"{line.bytes_per_token:.2f}"),
        *length_cells(line.lengths),
        *(f"{100 * line.used_ids / line.vocabulary:.1f}%", f"{line.entropy:.2f}", f"{line.duplicates:,}"),
    )


def length_cells(lengths: Lengths) -> tuple[str, str, str, str]:
    """Mean, median, 95% and longest."""
    return f"{lengths.mean:,.0f}", f"{lengths.median:,.0f}", f"{lengths.p95:,.0f}", f"{lengths.longest:,}"


def facts(tree: Mapping[str, Any]) -> str:
    """`name notes.csv, files 3, 35.4 kB`: what a manifest tells, in words; what is empty is left out."""
    return ", ".join(_fact(key, value) for key, value in tree.items() if value not in (None, "", {}, []))


def _fact(key: str, value: Any) -> str:
    words = key.replace("_", " ")
    if type(value) is int and words.split()[-1] == "bytes":
        return f"{words.removesuffix('bytes')}{size(value)}"
    return f"{words} {_in_words(value)}"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({facts(value)})"
    if isinstance(value, list):
        return " and ".join(map(_in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def size(number: int) -> str:
    """Bytes for a person: 950 bytes, 12.3 kB, 4.56 MB."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:,.3g} {name}" if number < 1000 * unit else f"{number / unit:,.0f} {name}"
    return f"{number} byte{'' if number == 1 else 's'}"


def _version_lines(source: Source) -> list[str]:
    if len(source.versions) < 2:
        return []
    rows: list[tuple[str, ...]] = [("version", "operation", "documents", "tokens", "chunks", "made from")]
    for each in source.versions:
        number = f"{each.number}{' *' if each.number == source.version else ''}"
        counts = (f"{each.documents:,}", f"{each.tokens:,}", f"{each.chunks:,}")
        parent = "" if each.parent is None else str(each.parent)
        rows.append((number, str(each.operation["kind"]), *counts, parent))
    return [f"versions of {source.name} (* is described here):", *(f"  {line}" for line in align(rows))]
