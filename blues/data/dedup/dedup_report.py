"""What removing duplicates took away and why: a table of every removed document, and summaries for a person.

In: the datasets and the `Removal`. Out: the removed documents as an Arrow table (REMOVED_SCHEMA), the counts of every
split and pair of datasets, as text for a terminal or as a page that shows examples beside what they repeat.
"""

from __future__ import annotations

import difflib
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blues.data.dedup.corpus import Corpus
from blues.data.dedup.dedup import Removal
from blues.data.storage.store import SPLITS, Store
from blues.table import align

REMOVED_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("document", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("tokens", pa.int64()),
        ("text_bytes", pa.int64()),
        ("kind", pa.string()),
        ("similarity", pa.float64()),
        ("kept_dataset", pa.string()),
        ("kept_split", pa.string()),
        ("kept_document", pa.int64()),
        ("kept_id", pa.string()),
        ("kept_source", pa.string()),
    ]
)
"""`document` and `kept_document` count within the split of the version before the removal, from 0."""
_DESCRIBED = ("id", "source", "text_bytes")
EXAMPLES = 5
PAGE_EXAMPLES = 12
SHOWN_TOKENS = 4000
"""Tokens of a document that the page compares; the rest of a long one is left out."""
STEPS = 10
"""Bars of the histogram of similarities."""


@dataclass(frozen=True)
class Line:
    """One split of one dataset: what it held, and what of that goes."""

    dataset: str
    split: str
    documents: int
    tokens: int
    exact: int
    near: int
    removed_tokens: int


def removed_table(corpus: Corpus, stores: Sequence[Store], names: Sequence[str], removal: Removal) -> pa.Table:
    """Every removed document and the one that stays for it: REMOVED_SCHEMA, in the order of the corpus."""
    removed, kept = _described(corpus, stores, removal.numbers), _described(corpus, stores, removal.kept)
    own, other = corpus.shelf_of(removal.numbers), corpus.shelf_of(removal.kept)
    name_of = np.array([names[shelf.dataset] for shelf in corpus.shelves], dtype=object)
    split_of = np.array([shelf.split for shelf in corpus.shelves], dtype=object)
    columns = {
        "dataset": name_of[own],
        "split": split_of[own],
        "document": removal.numbers - corpus.starts[own],
        "id": removed["id"],
        "source": removed["source"],
        "tokens": corpus.lengths_N[removal.numbers],
        "text_bytes": removed["text_bytes"].cast(pa.int64()),
        "kind": np.where(removal.exact, "exact", "near").astype(object),
        "similarity": removal.similarity,
        "kept_dataset": name_of[other],
        "kept_split": split_of[other],
        "kept_document": removal.kept - corpus.starts[other],
        "kept_id": kept["id"],
        "kept_source": kept["source"],
    }
    return pa.table(columns, schema=REMOVED_SCHEMA)


def _described(corpus: Corpus, stores: Sequence[Store], numbers: np.ndarray) -> pa.Table:
    """id, source and text_bytes of these documents; reads the indexes segment by segment and keeps only theirs."""
    wanted, places = np.unique(numbers, return_inverse=True)
    found = []
    for place, shelf in enumerate(corpus.shelves):
        first = int(corpus.starts[place])
        for table in stores[shelf.dataset].tables(shelf.split, _DESCRIBED):
            begin, end = np.searchsorted(wanted, (first, first + len(table)))
            found.append(table.take(pa.array(wanted[begin:end] - first)))
            first += len(table)
    if not len(wanted):
        return REMOVED_SCHEMA.empty_table().select(_DESCRIBED)
    return pa.concat_tables(found).take(pa.array(places))


def parquet(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue().to_pybytes()


@dataclass(frozen=True)
class Summary:
    """names: of the datasets, in their order. lines: one for each split of each. removed: REMOVED_SCHEMA."""

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    removed: pa.Table

    @classmethod
    def of(cls, stores: Sequence[Store], names: Sequence[str], removed: pa.Table) -> Summary:
        """Count what was removed."""
        lines = []
        for name, store in zip(names, stores, strict=True):
            for split in SPLITS:
                own = removed.filter((pc.field("dataset") == name) & (pc.field("split") == split))
                exact = pc.sum(pc.equal(own["kind"], "exact")).as_py() or 0
                tokens = pc.sum(own["tokens"]).as_py() or 0
                counts = (store.num_documents(split), store.num_tokens(split), exact, len(own) - exact, tokens)
                lines.append(Line(name, split, *counts))
        return cls(tuple(names), tuple(lines), removed)

    @property
    def leaked(self) -> int:
        """Training documents that go because they repeat a validation document."""
        return len(self.removed.filter((pc.field("split") == "train") & (pc.field("kept_split") == "validation")))

    def matrix(self) -> list[list[int]]:
        """Documents removed from each dataset (row) because of one that stays in each dataset (column)."""
        pairs = self.removed.group_by(["dataset", "kept_dataset"]).aggregate([([], "count_all")]).to_pylist()
        counts = {(pair["dataset"], pair["kept_dataset"]): pair["count_all"] for pair in pairs}
        return [[counts.get((row, column), 0) for column in self.names] for row in self.names]

    def rows(self) -> list[list[str]]:
        """The counts, with a heading and a total."""
        heading = ["dataset", "split", "documents", "exact copies", "near copies", "tokens", "removed tokens"]
        total = Line("all", "", *(sum(getattr(line, name) for line in self.lines) for name in _COUNTS))
        lines = [line for line in self.lines if line.documents] + [total]
        return [heading, *(_cells(line) for line in lines)]

    def matrix_rows(self) -> list[list[str]]:
        """The matrix, with names."""
        body = [[name, *(f"{count:,}" for count in row)] for name, row in zip(self.names, self.matrix(), strict=True)]
        return [["removed from, for one in", *self.names], *body]

    def notes(self) -> list[str]:
        """What a person should know besides the counts."""
        notes = []
        if self.leaked:
            notes.append(
                f"{self.leaked:,} training documents repeat a validation document, which stays; training loses them"
            )
        for line in self.lines:
            if line.documents and line.exact + line.near == line.documents:
                notes.append(f"no {line.split} document of {line.dataset} is left; leave it out of a merge")
        return notes

    def text(self) -> str:
        """For a terminal."""
        lines = align(self.rows())
        if len(self.names) > 1 and len(self.removed):
            lines += ["", *align(self.matrix_rows())]
        if len(self.removed):
            lines += ["", "for example"]
            lines += [f"  {_sentence(row)}" for row in examples(self.removed, EXAMPLES)]
        return "\n".join([*lines, *(["", *self.notes()] if self.notes() else [])])


_COUNTS = ("documents", "tokens", "exact", "near", "removed_tokens")


def _cells(line: Line) -> list[str]:
    share = 100 * line.removed_tokens / line.tokens if line.tokens else 0.0
    counts = (line.documents, line.exact, line.near, line.tokens)
    return [line.dataset, line.split, *(f"{count:,}" for count in counts), f"{line.removed_tokens:,} ({share:.1f}%)"]


def _sentence(row: dict) -> str:
    kind = "equal" if row["kind"] == "exact" else f"{row['similarity']:.3f}"
    names = (row["dataset"], row["split"], row["id"], row["kept_dataset"], row["kept_split"], row["kept_id"])
    return "{}  {} {} {}  repeats  {} {} {}".format(kind.rjust(5), *names)


def examples(removed: pa.Table, count: int) -> list[dict]:
    """Near copies from the least to the most similar, in even steps; exact ones where there are no others."""
    near = removed.filter(pc.field("kind") == "near").sort_by("similarity")
    chosen = near if len(near) else removed
    places = np.unique(np.linspace(0, len(chosen) - 1, min(count, len(chosen))).astype(np.int64))
    return chosen.take(pa.array(places)).to_pylist() if len(chosen) else []


def page(summary: Summary, stores: Sequence[Store], title: str) -> str:
    """A page on its own (HTML): the counts, the similarities, and examples with what differs marked."""
    body = [f"<h1>{html.escape(title)}</h1>", _html_table(summary.rows())]
    body += [f"<p>{html.escape(note)}</p>" for note in summary.notes()]
    if len(summary.names) > 1:
        body += ["<h2>Within and across datasets</h2>", _html_table(summary.matrix_rows())]
    near = summary.removed.filter(pc.field("kind") == "near")["similarity"].to_numpy()
    if len(near):
        body += ["<h2>Similarity of the near copies with what stays</h2>", _histogram(near)]
    by_name = dict(zip(summary.names, stores, strict=True))
    shown = examples(summary.removed, PAGE_EXAMPLES)
    if shown:
        body.append("<h2>Examples</h2>")
    for row in shown:
        left = _text(by_name[row["kept_dataset"]], row["kept_split"], row["kept_document"])
        right = _text(by_name[row["dataset"]], row["split"], row["document"])
        body.append(f"<details><summary>{html.escape(_sentence(row))}</summary>{_differences(left, right)}</details>")
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid }}
td:first-child, th:first-child {{ text-align: left }}
.bar {{ background: #4a78b5; height: .9rem }}
pre {{ background: #f6f6f6; padding: .6rem; overflow-x: auto; white-space: pre-wrap; font-size: 12px }}
ins {{ background: #d6f0d6; text-decoration: none }} del {{ background: #f6d6d6; text-decoration: none }}
summary {{ cursor: pointer; font-family: monospace }}
</style>
{body}
</html>
"""


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _histogram(similarity: np.ndarray) -> str:
    lowest = min(0.95, math.floor(20 * float(similarity.min())) / 20)  # so that the borders of bars are short numbers
    counts, edges = np.histogram(similarity, bins=STEPS, range=(lowest, 1.0))
    widths = 100 * counts / max(1, counts.max())
    rows = [
        f"<tr><td>{low:.3f} to {high:.3f}</td><td>{count:,}</td>"
        f'<td style="width: 30rem"><div class="bar" style="width: {width:.1f}%"></div></td></tr>'
        for low, high, count, width in zip(edges[:-1], edges[1:], counts, widths, strict=True)
    ]
    return f"<table>{''.join(rows)}</table>"


def _text(store: Store, split: str, number: int) -> str:
    tokens = store.document(split, number).tokens[:-1]
    rest = f"\n[{len(tokens) - SHOWN_TOKENS:,} more tokens]" if len(tokens) > SHOWN_TOKENS else ""
    return store.tokenizer.build().decode(tokens[:SHOWN_TOKENS]) + rest


def _differences(kept: str, removed: str) -> str:
    """Line by line: what only the removed document has is marked as inserted, what only the other has as deleted."""
    lines = []
    for line in difflib.unified_diff(kept.splitlines(), removed.splitlines(), lineterm="", n=3):
        if line.startswith(("---", "+++")):
            continue
        text = html.escape(line)
        tag = {"+": "ins", "-": "del"}.get(line[:1])
        lines.append(f"<{tag}>{text}</{tag}>" if tag else text)
    return f"<pre>{chr(10).join(lines) or 'the text is equal'}</pre>"
