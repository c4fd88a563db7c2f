"""The report of `blues verify` as a page that a person can look at, and send to another: one HTML file.

In: a `Report`. Out: HTML with everything in it, no script, nothing from the network; light or dark as the reader's
system is. It lies beside the report and not with the figures of runs (`blues.tracking.plots`), because it needs
nothing of a run and belongs to the data's part of the journey.

Names, paths and tokens come from datasets and may be hostile: `charts.escape` takes every one of them, and the page
forbids its reader's browser to run or load anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from blues.config import write_atomic
from blues.data.reports import charts
from blues.data.reports.charts import escape, prose
from blues.data.reports.report import REMEDY, Report, Source, facts, length_cells
from blues.data.reports.statistics import Statistics
from blues.data.storage.manifest import check_target
from blues.data.storage.store import SPLITS, Issue

PAGE_SUFFIXES = (".html", ".htm")
MOST_ISSUES = 200
MOST_REASONS = 8
SHOWN_TOKENS = 14
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_page(report: Report, path: str | Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        ConfigError: it is no place for a page; see `check_target`.
    """
    check_target(path, "--page", PAGE_SUFFIXES)
    write_atomic(path, render(report).encode("utf-8"))
    return Path(path)


def render(report: Report) -> str:
    """The whole page."""
    names = ", ".join(path.absolute().name for path in report.paths)
    sections = "".join(
        f"<section><h2>{title}</h2>{content}</section>" for title, content in _sections(report) if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)} - blues verify</title><style>{charts.STYLE}</style></head><body><main>"
        f"{_head(report, names)}{sections}</main></body></html>\n"
    )


def _sections(report: Report) -> Iterator[tuple[str, str]]:
    """Title and content of each section; what a person has to act on comes first."""
    rest = " What follows is of the sources without issues." if report.sources else ""
    yield "Issues", _issues(report.issues, "", f"<p>{prose(REMEDY)}.{rest}</p>")
    yield "Warnings", _issues(report.warnings, "warn")
    yield "Splits", _splits(report.statistics)
    yield "Lengths of documents", _lengths(report)
    yield "Shares of the mixture", _mixture(report)
    yield "Vocabulary", _vocabulary(report)
    yield "Documents that are there more than once", _overlap(report)
    yield "Rejected rows", _rejected(report.sources)
    yield "Where it came from", _origins(report.sources)


def _head(report: Report, names: str) -> str:
    errors, warnings = len(report.issues), len(report.warnings)
    badge = f'<span class="badge bad">{_plural(errors, "issue")}</span>'
    if not errors:
        badge = '<span class="badge good">good: all checksums hold</span>'
    if warnings:
        badge += f'<span class="badge warn">{_plural(warnings, "warning")}</span>'
    lines = report.statistics
    counts = [
        ("documents", sum(line.documents for line in lines)),
        ("tokens", sum(line.tokens for line in lines)),
        ("bytes of text", sum(line.text_bytes for line in lines)),
        ("exact copies", sum(line.duplicates for line in lines)),
        ("rejected rows", report.rejected),
        ("documents tokenized again", report.retokenized),
    ]
    tiles = "".join(
        f'<div title="{number:,}"><b>{_round(number)}</b><span>{name}</span></div>' for name, number in counts
    )
    paths = " ".join(str(path) for path in report.paths)
    return f'<header><h1>{escape(names)}</h1>{badge}</header><p class="muted">{escape(paths)}</p>' + (
        f'<div class="tiles">{tiles}</div>' if lines else ""
    )


def _issues(issues: Sequence[Issue], kind: str, ending: str = "") -> str:
    if not issues:
        return ""
    items = "".join(
        f'<li class="{kind}"><code>{escape(issue.where)}</code>{prose(issue.what)}</li>'
        for issue in issues[:MOST_ISSUES]
    )
    more = len(issues) - MOST_ISSUES
    rest = f"<p>{_plural(more, 'more issue')}; <code>blues verify</code> lists all of them.</p>" if more > 0 else ""
    return f'<ul class="issues">{items}</ul>{rest}{ending}'


def _splits(lines: Sequence[Statistics]) -> str:
    if not lines:
        return ""
    head = (
        *("source", "split", "weight", "documents", "tokens", "MB of text", "bytes/token", "mean", "median", "95%"),
        *("longest", "ids used", "bits/token", "copies"),
    )
    rows: list[tuple[object, ...]] = [
        (
            *(line.source, line.split, f"{line.weight:.3f}", f"{line.documents:,}", f"{line.tokens:,}"),
            *(f"{line.text_bytes / 1e6:,.2f}", f"{line.bytes_per_token:.2f}", *length_cells(line.lengths)),
            *(f"{line.used_ids / line.vocabulary:.1%}", f"{line.entropy:.2f}", f"{line.duplicates:,}"),
        )
        for line in lines
    ]
    return charts.table([head, *rows], texts=2)


def _by_source(report: Report) -> list[tuple[Source, dict[str, Statistics]]]:
    lines = {(line.source, line.split): line for line in report.statistics}
    return [(source, {split: lines[source.name, split] for split in SPLITS}) for source in report.sources]


def _lengths(report: Report) -> str:
    if not report.sources:
        return ""
    panels = [
        f"<div><h3>{escape(source.name)}</h3>"
        + charts.histogram(
            lines["train"].lengths.bins,
            lines["validation"].lengths.bins,
            number,
            f"lengths of documents of {source.name}",
        )
        + "</div>"
        for number, (source, lines) in enumerate(_by_source(report))
    ]
    note = "Share of the documents by length, in bins that double. Bars: training; dashes: validation."
    return f'<p class="muted">{note}</p><div class="grid2">{"".join(panels)}</div>'


def _mixture(report: Report) -> str:
    if len(report.sources) < 2:
        return ""
    trained = [(source, lines["train"]) for source, lines in _by_source(report)]
    total = max(1, sum(line.tokens for _, line in trained))
    # How often a source is read while as many samples are drawn as all sources hold.
    rows = [
        (
            source.name,
            (
                ("weight in training", source.weight, f"{source.weight:.2%}"),
                ("share of the tokens", line.tokens / total, f"{line.tokens / total:.2%}"),
                (
                    "times read in one pass",
                    min(1.0, source.weight * total / max(1, line.tokens) / 4),
                    f"{source.weight * total / max(1, line.tokens):.2f} x",
                ),
            ),
        )
        for source, line in trained
    ]
    note = "One pass: as many training tokens as all sources have together. The bar of `times read` is full at 4."
    return f'<p class="muted">{prose(note)}</p>{charts.bars(rows, range(len(rows)), fade=0.6)}'


def _vocabulary(report: Report) -> str:
    if not report.sources:
        return ""
    trained = [(source, lines["train"]) for source, lines in _by_source(report)]
    chart = charts.curves([line.coverage for _, line in trained], "most frequent ids", "vocabulary coverage")
    tokens = "".join(
        f'<h4>{escape(source.name)}</h4><ul class="tokens">'
        + "".join(
            f"<li><code>{escape(token.text.replace(' ', '·'))}</code><small>{_share(token.count, line)}</small></li>"
            for token in line.top_tokens[:SHOWN_TOKENS]
        )
        + "</ul>"
        for source, line in trained
    )
    note = "Share of all training tokens that the n most frequent ids make up, and which ids those are."
    names = charts.legend([source.name for source, _ in trained])
    return f'<p class="muted">{note}</p><div class="grid2"><div>{chart}{names}</div><div>{tokens}</div></div>'


def _share(count: int, line: Statistics) -> str:
    return f"{count / max(1, line.tokens):.2%}"


def _overlap(report: Report) -> str:
    shared = report.overlap
    if shared is None or not any(map(any, shared.shared)):
        return ""
    names = [f"{source} {split}" for source, split in shared.names]
    wholes = [line.documents for line in report.statistics]
    note = (
        "Documents of the row whose tokens are those of one of the column. On the diagonal: copies of an earlier "
        "one in the same split. `blues dedup` removes them."
    )
    return f'<p class="muted">{prose(note)}</p>{charts.heat_map(names, shared.shared, wholes, "of ... also in")}'


def _rejected(sources: Sequence[Source]) -> str:
    rows, numbers = [], []
    for number, source in enumerate(sources):
        if not source.rejected:
            continue
        most, total = max(source.rejected.values()), sum(source.rejected.values())
        ranked = sorted(source.rejected.items(), key=lambda item: -item[1])
        entries = [(reason, count / most, f"{count:,}") for reason, count in ranked[:MOST_REASONS]]
        if len(ranked) > MOST_REASONS:
            rest = sum(count for _, count in ranked[MOST_REASONS:])
            entries.append((_plural(len(ranked) - MOST_REASONS, "other reason"), rest / most, f"{rest:,}"))
        rows.append((f"{source.name}: {_plural(total, 'row')}", entries))
        numbers.append(number)
    return charts.bars(rows, numbers)


def _origins(sources: Sequence[Source]) -> str:
    parts = []
    for source in sources:
        rows: list[tuple[object, ...]] = [("version", "operation", "documents", "tokens", "chunks", "made from")]
        for each in source.versions:
            mark = " (shown here)" if each.number == source.version and len(source.versions) > 1 else ""
            counts = (f"{each.documents:,}", f"{each.tokens:,}", f"{each.chunks:,}")
            rows.append((f"{each.number}{mark}", each.operation["kind"], *counts, each.parent or ""))
        origins = "".join(f'<p class="facts">from {escape(facts(origin))}</p>' for origin in source.origins)
        path = f'<p class="muted">{escape(source.path)}</p>'
        parts.append(f"<h3>{escape(source.name)}</h3>{path}{charts.table(rows, texts=2)}{origins}")
    return "".join(parts)


def _plural(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _round(number: float) -> str:
    """950, 12.3k, 4.56M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:,}"
