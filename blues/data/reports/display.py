"""How a look into a dataset is shown on a terminal: tables, histograms of bars, documents with their tokens.

In: what `inspection` found. Out: lines of text. Nothing of a document reaches the terminal as it is: a document may
hold escape sequences, and a terminal obeys them (see `visible`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blues.data.reports.inspection import Look, Overview, SourceOverview, SplitOverview, Window
from blues.data.reports.report import facts, length_cells
from blues.data.reports.visible import visible
from blues.data.tokenizer import Tokenizer
from blues.table import align

BAR_WIDTH = 44
EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"
FULL = "\u2588"
BACKGROUNDS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;223m")
"""Of one token and the next: black on light blue and light orange, which dark and light terminals both show."""
DIM, BOLD, RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"
SEPARATOR = "\u2502"
"""Between tokens where there are no colours; one that stands in a text is shown as its number."""
LEGEND = f"({SEPARATOR} stands between tokens, \u21b5 for the end of a line)"
RULE_WIDTH = 100
LONGEST_FACT = 300


def overview_lines(found: Overview) -> list[str]:
    """The table of splits, what each source came from, and histograms of lengths."""
    header = (
        *("source", "split", "weight", "documents", "tokens", "bytes/token", "chunks", "MB on disk", "compression"),
        *("mean", "median", "95%", "longest"),
    )
    rows = [_row(source, split) for source in found.sources for split in source.splits]
    kind = "prepared" if found.strategy == "single" else f"merged, {found.strategy}"
    lines = [f"dataset {visible(str(found.path))} ({kind}), fingerprint {found.fingerprint}", ""]
    lines += align([header, *rows])
    for source in found.sources:
        lines += ["", *_facts(source)]
    for source in found.sources:
        for split in source.splits:
            if split.documents:
                lines += ["", f"lengths of {visible(source.name)} {split.split}, documents by tokens"]
                lines += histogram_lines(split.lengths.bins)
    return lines


def histogram_lines(bins: Sequence[int]) -> list[str]:
    """Bars of the documents in each bin [2**k, 2**(k + 1)), from the first bin that has any."""
    first = next((k for k, count in enumerate(bins) if count), len(bins))
    most, total = max(bins, default=0), sum(bins)
    rows = [
        (f"{2**k:,}-{2 ** (k + 1) - 1:,}" if k else "1", f"{bins[k]:,}", f"{bins[k] / total:.1%}", bins[k])
        for k in range(first, len(bins))
    ]
    cells = [("tokens", "documents", "share"), *((name, count, share) for name, count, share, _ in rows)]
    bars = ["", *(bar(count / most) for *_, count in rows)]
    return [f"  {line}  {shown}".rstrip() for line, shown in zip(align(cells), bars, strict=True)]


def bar(share: float) -> str:
    """A bar of up to BAR_WIDTH characters, to an eighth of one; something is never shown as nothing."""
    eighths = max(round(8 * BAR_WIDTH * share), 1 if share > 0 else 0)
    return FULL * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def document_lines(look: Look, tokenizer: Tokenizer, most: int, *, color: bool) -> list[str]:
    """A document with where it comes from, and its text cut at the borders of tokens."""
    document = look.document
    where = f"{visible(look.dataset)} {look.split} {look.number:,}"
    size = f"{len(document.tokens):,} tokens, {document.text_bytes:,} bytes"
    lines = [_rule(f"{where}: {visible(document.id)}, from {visible(document.source)}, {size}", color)]
    if document.metadata:
        lines.append(_dim(f"metadata {_shortened(document.metadata)}", color))
    if not color:
        lines.append(LEGEND)
    return [*lines, *_text(document.tokens[:-1], tokenizer, most, color), _end(color), ""]


def window_lines(window: Window, tokenizer: Tokenizer, most: int, *, color: bool) -> list[str]:
    """A training sample, piece by piece."""
    before = visible(tokenizer.decode([window.first_input]))
    targets, pieces = sum(len(piece.tokens) for piece in window.pieces), len(window.pieces)
    what = f"{targets:,} targets in {pieces:,} piece{'' if pieces == 1 else 's'}, {window.padding:,} of padding"
    lines = [
        f"sample {window.index:,} of {window.split}, packing {window.packing}, from {visible(window.dataset)}: {what}",
        f"before the first target stands {before}",
        *([] if color else [LEGEND]),
        "",
    ]
    for piece in window.pieces:
        part = "whole" if piece.stop - piece.start == piece.length else f"tokens {piece.start:,} to {piece.stop:,}"
        where = f"{visible(piece.id)}, from {visible(piece.source)}, {part} of {piece.length:,}"
        whole = piece.stop == piece.length
        lines += [_rule(where, color), *_text(piece.tokens[: -1 if whole else None], tokenizer, most, color)]
        lines += [_end(color)] if whole else [_dim("(goes on beyond the window)", color)]
    return lines + ([_dim(f"({window.padding:,} inputs of padding)", color)] if window.padding else [])


def cells(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token; of several at once where a character begins in one and ends in another."""
    waiting = b""
    for token in tokens.tolist():
        waiting += tokenizer.decode_bytes([token])
        try:
            text = waiting.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                continue
            text = waiting.decode("utf-8", "replace")
        yield text
        waiting = b""
    if waiting:
        yield waiting.decode("utf-8", "replace")


def _text(tokens: np.ndarray, tokenizer: Tokenizer, most: int, color: bool) -> list[str]:
    """The lines of a document. The end of a line is shown, and ends a line."""
    parts = []
    for number, cell in enumerate(cells(tokens[:most], tokenizer)):
        lines = map(visible, (cell if color else cell.replace(SEPARATOR, "\\u2502")).split("\n"))
        if color:  # the colour ends before the line does, or the terminal would paint the rest of it
            background = BACKGROUNDS[number % 2]
            parts.append(background + f"\u21b5{RESET}\n{background}".join(lines) + RESET)
        else:
            parts.append("\u21b5\n".join(lines))
    shown = ("" if color else SEPARATOR).join(parts).split("\n")
    if len(tokens) > most:
        shown.append(_dim(f"({len(tokens) - most:,} of {len(tokens):,} tokens are not shown)", color))
    return shown


def _row(source: SourceOverview, split: SplitOverview) -> tuple[str, ...]:
    ratio = split.text_bytes / max(1, split.tokens - split.documents)
    return (
        *(visible(source.name), split.split, f"{source.weight:.3f}", f"{split.documents:,}", f"{split.tokens:,}"),
        *(f"{ratio:.2f}", f"{split.chunks:,}", f"{split.bytes / 1e6:,.2f}", " and ".join(split.compression) or "-"),
        *length_cells(split.lengths),
    )


def _facts(source: SourceOverview) -> Iterator[str]:
    """What there is to know of a source, a fact a line."""
    others = [str(number) for number in source.versions if number != source.version]
    details = {key: value for key, value in source.operation.items() if key != "kind"}
    version = f"version {source.version}, made by {source.operation['kind']}"
    version += f" ({_shortened(details)})" if details else ""
    known = {
        "at": str(source.path),
        "is": version + (f"; {_kept(others)}" if others else ""),
        "tokenizer": source.tokenizer,
        "settings": _shortened(_settings(source.settings)),
    }
    yield f"{visible(source.name)}"
    for name, fact in known.items():
        if fact:
            yield f"  {name:<10}{visible(fact)}"
    for origin in source.origins:
        first, rest = f"  {'from':<10}", " " * 12
        yield from textwrap.wrap(_shortened(origin), RULE_WIDTH, initial_indent=first, subsequent_indent=rest)
    if source.rejected:
        yield f"  {'rejected':<10}{sum(source.rejected.values()):,} rows: {_shortened(source.rejected)}"


def _kept(versions: Sequence[str]) -> str:
    """Which other versions there are: `versions 1, 2 and 3 are kept`."""
    if len(versions) == 1:
        return f"version {versions[0]} is kept"
    return f"versions {', '.join(versions[:-1])} and {versions[-1]} are kept"


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How it was prepared, with the bound below which the hash of a document that is held out lies as its share."""
    bound = settings.get("threshold")
    if not isinstance(bound, str):
        return dict(settings)
    return {key: value for key, value in settings.items() if key != "threshold"} | {
        "held out": f"{int(bound, 16) / 2**64:.3g} of the documents"
    }


def _shortened(tree: Mapping[str, Any]) -> str:
    """The facts of a manifest or a document, cut where they are long."""
    text = visible(facts(tree))
    return text if len(text) <= LONGEST_FACT else text[:LONGEST_FACT] + " ..."


def _rule(text: str, color: bool) -> str:
    line = f"\u2500\u2500 {text} ".ljust(RULE_WIDTH, "\u2500")
    return f"{BOLD}{line}{RESET}" if color else line


def _end(color: bool) -> str:
    return _dim("<|endoftext|>", color)


def _dim(text: str, color: bool) -> str:
    return f"{DIM}{text}{RESET}" if color else text
