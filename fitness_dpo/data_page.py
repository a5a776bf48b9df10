"""The report of inspect_data as one HTML page: self-contained, for a phone or a desk, light or dark. Imports no torch."""

from html import escape
from typing import Any

import numpy as np

STYLE = """
:root { color-scheme: light dark; --good: #0a7d5a; --bad: #b3401f; --faint: #8884; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc79d; --bad: #f08a65; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--faint); }
h1, td, th, p, pre { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; vertical-align: top; border-bottom: 1px solid var(--faint); }
td.number, th.number { text-align: right; white-space: nowrap; }
.wide { overflow-x: auto; }
pre { white-space: pre-wrap; font: 14px/1.45 ui-monospace, monospace; margin: .25rem 0 .75rem; padding-inline-start: .6rem;
  border-inline-start: 3px solid var(--faint); }
pre.chosen { border-color: var(--good); } pre.rejected { border-color: var(--bad); }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; } figcaption b { font-weight: 600; }
text { font: 15px system-ui, sans-serif; fill: currentColor; }
"""
WIDTH, HEIGHT, BASE, BINS = 640, 204, 180, 40
COLOURS = ("var(--good)", "var(--bad)")


def page(report: dict[str, Any]) -> str:
    """The whole page. Every text out of the data is escaped."""
    lengths, limit = report["lengths"], report["max_length_tokens"]
    bias, long = report["length_bias"], report["too_long"]
    sections = [
        f"<p>{report['read']:,} rows read, {report['kept']:,} pairs kept. "
        f"Tokens are those of <b>{escape(report['model'])}</b>.</p>",
        section("Splits", table(("split", "pairs"), list(report["splits"].items()))),
        section(
            "Formats",
            table(
                ("file", "format", "rows"),
                [(file, name, rows) for file, formats in report["formats"].items() for name, rows in formats.items()],
            ),
        ),
        section(
            "Dropped",
            table(
                ("reason", "first", "rows"),
                [(reason, ", ".join(each["places"]), each["rows"]) for reason, each in report["dropped"].items()],
            )
            if report["dropped"] else "<p>Nothing.</p>",
        ),
        section(
            "Lengths in tokens",
            table(
                ("", *next(iter(report["tokens"].values()))),
                [(name, *values.values()) for name, values in report["tokens"].items()],
            )
            + histogram({name: lengths[name] for name in ("chosen", "rejected")})
            + f"<p>The chosen answer is the longer one in <b>{bias['chosen_longer']:.0%}</b> of the pairs, "
            f"and <b>{bias['mean_ratio']:.2f}</b> times as long on average.</p>"
            + histogram({"question and longer answer": lengths["question and longer answer"]}, limit)
            + f"<p><b>{long['rows']:,}</b> rows are longer than {limit:,} tokens; training leaves them out rather than cut "
            f"an answer. {escape(', '.join(long['places']))}</p>",
        ),
        *(
            section(name.capitalize(), table((name[:-1], "pairs"), list(report[name].items())))
            for name in ("topics", "flaws") if report[name]
        ),
        section("As the model will see them", "".join(map(example, report["examples"]))),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Preference data</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(str(report['path']))}</h1>{''.join(sections)}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns of numbers stand to the right."""
    numeric = [bool(rows) and isinstance(cell, int) for cell in (rows[0] if rows else head)]

    def line(cells: tuple[Any, ...], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if right else ''}>{cell:,}</{tag}>" if isinstance(cell, int)
            else f"<{tag}{' class=number' if right else ''} dir=auto>{escape(cell)}</{tag}>"
            for cell, right in zip(cells, numeric, strict=True)
        )  # fmt: skip

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{line(head, 'th')}</tr>{body}</table></div>"


def histogram(series: dict[str, list[int]], limit: int | None = None) -> str:
    """An inline SVG of how many rows have which length; `limit` is marked where it is in sight."""
    most = max(max(values) for values in series.values())
    edges = np.linspace(0, most + 1, BINS + 1)
    counts = {name: np.histogram(values, edges)[0] for name, values in series.items()}
    highest = max(int(each.max()) for each in counts.values())
    step = WIDTH / BINS
    bars = "".join(
        f'<rect x="{place * step + 1:.1f}" y="{BASE - BASE * count / highest:.1f}" width="{step - 2:.1f}" '
        f'height="{BASE * count / highest:.1f}" fill="{colour}" opacity=".55"/>'
        for colour, each in zip(COLOURS, counts.values(), strict=False)
        for place, count in enumerate(each.tolist()) if count
    )  # fmt: skip
    ticks = "".join(
        f'<text x="{WIDTH * part / 4:.0f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{most * part / 4:,.0f}</text>'
        for part, anchor in enumerate(("start", "middle", "middle", "middle", "end"))
    )
    mark = ""
    if limit is not None and limit <= most:
        place = WIDTH * limit / (most + 1)
        mark = (
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{BASE}" stroke="currentColor" stroke-dasharray="4"/>'
            f'<text x="{place - 4:.1f}" y="12" text-anchor="end">max_length_tokens</text>'
        )
    names = " and ".join(
        f'<b style="color:{colour}">{escape(name)}</b>' for colour, name in zip(COLOURS, series, strict=False)
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="histogram of lengths in tokens">'
        f"{bars}{mark}{ticks}</svg><figcaption>Tokens of {names}; the highest bar is {highest:,} rows.</figcaption></figure>"
    )


def example(each: dict[str, str]) -> str:
    texts = "".join(
        f"<pre class={name} dir=auto>{escape(each[name])}</pre>" for name in ("prompt", "chosen", "rejected")
    )
    return f"<h3 dir=auto>{escape(each['place'])}</h3>{texts}"
