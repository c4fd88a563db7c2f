"""Charts as SVG and HTML for a page that stands alone: no script, no network, colours that follow light and dark.

In: numbers and names. Out: markup, with everything that is not a number escaped, for a page that has `STYLE`.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

from blues.data.reports.visible import visible

COLORS = 8
STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--muted:#5f6b78;--grid:#e2e7ec;--card:#fff;--page:#f5f7f9;--hot:#c2410c;
--good:#18794e;--goodbg:#e3f4ea;--bad:#b42318;--badbg:#fdeceb;--warn:#8a5a00;--warnbg:#fdf3dc;
--c0:#2f6db3;--c1:#c2571a;--c2:#1b8a63;--c3:#8e5bb5;--c4:#b0428a;--c5:#a08416;--c6:#3f8796;--c7:#7a6a53}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ef;--muted:#97a3b0;--grid:#2b343e;--card:#171c22;--page:#0f1317;
--hot:#f0803c;--good:#5fd39a;--goodbg:#12301f;--bad:#ff8f85;--badbg:#3a1715;--warn:#f0c25e;--warnbg:#342809;
--c0:#6aa5e8;--c1:#f08a4b;--c2:#4fc495;--c3:#bb8fe0;--c4:#e07bba;--c5:#d6b945;--c6:#74bccb;--c7:#b5a285}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1200px;margin:0 auto;padding:32px 20px 64px}h1{font-size:25px;margin:0 12px 0 0;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 14px}h3{font-size:14px;margin:18px 0 6px}h4{font-size:13px;margin:12px 0 4px}
header{display:flex;flex-wrap:wrap;align-items:center;row-gap:6px}p{margin:0 0 10px}.muted,small{color:var(--muted)}
section{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:20px 22px;margin-top:18px}
.badge{border-radius:999px;padding:3px 12px;font-size:13px;font-weight:600;margin-right:8px}
.badge.good{color:var(--good);background:var(--goodbg)}.badge.bad{color:var(--bad);background:var(--badbg)}
.badge.warn{color:var(--warn);background:var(--warnbg)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin-top:18px}
.tiles div{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px 16px}
.tiles b{display:block;font-size:21px;font-variant-numeric:tabular-nums}.tiles span{color:var(--muted);font-size:13px}
.issues{list-style:none;margin:0;padding:0}.issues li{border-left:4px solid var(--bad);background:var(--badbg);
padding:8px 12px;margin:0 0 8px;border-radius:0 6px 6px 0}.issues li.warn{border-color:var(--warn);
background:var(--warnbg)}.issues code{font-size:13px;overflow-wrap:anywhere}.issues code:first-child{display:block}
.facts{margin:8px 0 0;font-size:13px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13px}th,td{padding:6px 8px;
text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap}th{color:var(--muted);font-weight:600}
.n{text-align:right;font-variant-numeric:tabular-nums}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:8px 26px}
svg{width:100%;max-width:560px;height:auto;display:block}svg text{fill:var(--muted);font-size:11.5px}
.x{text-anchor:middle}.y{text-anchor:end}.grid{stroke:var(--grid);stroke-width:1}.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.mark{stroke:var(--ink);stroke-width:2.5;fill:none}.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;
margin:8px 0 0;padding:0;font-size:13px}.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;
margin-right:6px}.bar{display:grid;grid-template-columns:minmax(90px,190px) 1fr minmax(60px,auto);gap:10px;
align-items:center;font-size:13px;margin:3px 0}.bar span{overflow-wrap:anywhere}
.bar b{background:color-mix(in srgb,var(--grid) 55%,transparent);border-radius:4px;height:13px;overflow:hidden}
.bar i{display:block;height:100%;border-radius:4px;min-width:1px}.bar em{font-style:normal;color:var(--muted);
text-align:right;font-variant-numeric:tabular-nums}.heat{background:color-mix(in srgb,var(--hot) var(--heat),
transparent)}.heat small{display:block;color:inherit;opacity:.75}.diagonal{outline:1px dashed var(--muted);
outline-offset:-3px}.tokens{display:flex;flex-wrap:wrap;gap:6px}.tokens li{list-style:none;border:1px solid var(--grid);
border-radius:6px;padding:2px 8px;font-size:13px}.tokens{margin:0;padding:0}.tokens code{white-space:pre}
.tokens small{margin-left:6px}code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
"""
"""Of every page with these charts."""
TOPS = (0.02, 0.04, 0.08, 0.12, 0.2, 0.32, 0.4, 0.6, 0.8, 1.0)
"""Where the axis of a histogram may end: four steps of it are round numbers."""
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 520, 46, 14, 12, 40


def escape(text: object) -> str:
    """Any text as HTML: neither markup nor control characters of it are left."""
    return html.escape(visible(str(text)))


def prose(text: object) -> str:
    """A sentence as HTML, with what stands in backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def color(number: int) -> str:
    """The colour of source `number`."""
    return f"var(--c{number % COLORS})"


def table(rows: Sequence[Sequence[object]], *, texts: int = 1) -> str:
    """The first row is the head; the first `texts` columns are names, the others numbers."""

    def line(row: Sequence[object], tag: str) -> str:
        cells = ((' class="n"' if place >= texts else "", escape(cell)) for place, cell in enumerate(row))
        return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table><thead>{line(rows[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def legend(names: Sequence[str]) -> str:
    """The colour of each name."""
    items = (f'<li><i style="background:{color(n)}"></i>{escape(name)}</li>' for n, name in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


def histogram(bars: Sequence[int], marks: Sequence[int], number: int, label: str, height: int = 190) -> str:
    """Shares of bins [2**k, 2**(k + 1)): bars for one group of documents, marks for another, each of its own total."""
    shares, others = _shares(bars), _shares(marks)
    low = next((k for k, share in enumerate(_longest(shares, others)) if share), 0)
    high = max(len(shares), len(others), low + 1)
    highest = max([*shares, *others, 0.0])
    top = next(nice for nice in TOPS if nice >= highest)
    step, plot = (WIDTH - LEFT - RIGHT) / (high - low), height - TOP - BOTTOM
    parts = _y_axis(top, height)
    for k in range(low, high):
        x = LEFT + (k - low) * step
        for share, kind in ((_at(shares, k), "bar"), (_at(others, k), "mark")):
            if not share:
                continue
            tall = max(1.0, plot * share / top)
            hint = f"<title>{2**k:,} to {2 ** (k + 1) - 1:,} tokens: {share:.1%}</title>"
            y = TOP + plot - tall
            if kind == "bar":
                style = f'style="fill:{color(number)}"'
                parts.append(
                    f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" rx="1.5" {style}>'
                    f"{hint}</rect>"
                )
            else:
                parts.append(f'<path class="mark" d="M{x + 3:.1f} {y:.1f}H{x + step - 3:.1f}">{hint}</path>')
        if (k - low) % max(1, math.ceil((high - low) / 9)) == 0:
            parts.append(f'<text class="x" x="{x:.1f}" y="{height - BOTTOM + 16}">{_short(2**k)}</text>')
    parts.append(f'<text class="x" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 6}">tokens of a document</text>')
    return _svg(parts, height, label)


def curves(series: Sequence[Sequence[tuple[int, float]]], x_label: str, label: str, height: int = 300) -> str:
    """Lines of shares over a logarithmic axis from 1 on."""
    last = max((points[-1][0] for points in series if points), default=1)
    decades = max(1, math.ceil(math.log10(max(2, last))))
    plot, parts = height - TOP - BOTTOM, _y_axis(1.0, height)

    def place(n: int, share: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * math.log10(n) / decades
        return f"{x:.1f} {TOP + plot * (1 - share):.1f}"

    for power in range(decades + 1):
        x = LEFT + (WIDTH - LEFT - RIGHT) * power / decades
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{TOP + plot}"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{height - BOTTOM + 16}">{_short(10**power)}</text>')
    for number, points in enumerate(series):
        if points:
            line = "L".join(place(n, share) for n, share in points)
            parts.append(f'<path class="line" style="stroke:{color(number)}" d="M{line}"/>')
    parts.append(f'<text class="x" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 6}">{escape(x_label)}</text>')
    return _svg(parts, height, label)


def bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], number_of: Sequence[int], fade: float = 1.0
) -> str:
    """Groups of horizontal bars: (name, ((what, share of the whole width, value in words), ...)); one colour a group,
    fainter from bar to bar by the factor `fade`."""
    groups = []
    for (name, entries), number in zip(rows, number_of, strict=True):
        lines = "".join(
            f'<div class="bar"><span>{escape(what)}</span><b><i style="width:{100 * min(1.0, share):.2f}%;'
            f'background:{color(number)};opacity:{fade**place:.2f}"></i></b><em>{escape(value)}</em></div>'
            for place, (what, share, value) in enumerate(entries)
        )
        groups.append(f'<div class="bars"><h4>{escape(name)}</h4>{lines}</div>')
    return "".join(groups)


def heat_map(names: Sequence[str], values: Sequence[Sequence[int]], wholes: Sequence[int], corner: str) -> str:
    """A table whose cells are coloured by their share of the whole of their row."""
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in names)
    lines = []
    for row, (name, whole) in enumerate(zip(names, wholes, strict=True)):
        cells = []
        for column, value in enumerate(values[row]):
            share = value / whole if whole else 0.0
            heat = 70 * math.sqrt(share)  # so that a few of a thousand are seen
            hint = f"{value:,} of {whole:,} ({share:.2%}) of {name}"
            kind = " diagonal" if row == column else ""
            cells.append(
                f'<td class="n heat{kind}" style="--heat:{heat:.1f}%" title="{escape(hint)}">'
                f"{f'{value:,}' if value else '·'}{f'<small>{share:.1%}</small>' if value else ''}</td>"
            )
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="heatmap"><thead><tr><th>{escape(corner)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _svg(parts: Sequence[str], height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _y_axis(top: float, height: int) -> list[str]:
    plot, parts = height - TOP - BOTTOM, []
    for quarter in range(5):
        y = TOP + plot * (1 - quarter / 4)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        share = top * quarter / 4
        words = f"{share:.1%}" if top < 0.04 else f"{share:.0%}"
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{words}</text>')
    return parts


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts] if total else []


def _longest(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [_at(first, k) + _at(second, k) for k in range(max(len(first), len(second)))]


def _at(values: Sequence[float], place: int) -> float:
    return values[place] if place < len(values) else 0.0


def _short(number: int) -> str:
    """1, 512, 2k, 1M: a power of two or of ten on an axis."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k"), (10**6, "M"), (10**3, "k")):
        if number >= size and number % size == 0:
            return f"{number // size}{letter}"
    return str(number)
