"""HTML pieces: one self-contained page with pictures inside, tables that can be sorted, no network."""

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 0 24px 48px;
  max-width: 1340px; }
h1 { font-size: 24px; margin: 20px 0 4px; } h2 { font-size: 19px; margin: 32px 0 6px; scroll-margin-top: 44px; }
h3 { font-size: 15px; margin: 18px 0 4px; } p { margin: 6px 0; max-width: 95ch; }
nav { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: 8px 0; z-index: 1; }
nav a { margin-right: 18px; white-space: nowrap; } a { color: #0b57a4; text-decoration: none; }
figure { margin: 10px 0 18px; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: 13px; max-width: 110ch; }
.note { background: #fff6dd; border-left: 4px solid #e0a800; padding: 4px 10px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: 6px 0 12px; }
th, td { padding: 2px 10px 2px 4px; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; background: #f5f5f5; } th.sort { cursor: pointer; }
th:first-child, td:first-child, td.text, th.text { text-align: left; } td.text { white-space: normal; max-width: 60ch; }
dt { font-weight: 600; margin-top: 6px; } dd { margin: 0 0 0 18px; max-width: 100ch; }
summary { cursor: pointer; margin: 6px 0; }
@media print { nav { position: static; } figure, tr { break-inside: avoid; } body { max-width: none; padding: 0; } }
"""
_SORT = """
for (const head of document.querySelectorAll("th.sort")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const value = (row) => { const cell = row.cells[head.cellIndex]; return cell.dataset.v ?? cell.textContent; };
  const order = (a, b) => {
    const x = value(a), y = value(b), d = x - y;
    return isNaN(d) ? (x < y ? -1 : +(x > y)) : d;
  };
  body.append(...[...body.rows].sort((a, b) => up === "1" ? order(a, b) : order(b, a)));
};
"""


@dataclass(frozen=True)
class Section:
    """A heading with an anchor and what stands below it."""

    anchor: str
    title: str
    html: str


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    bodies = "".join(f'<h2 id="{one.anchor}">{escape(one.title)}</h2>\n{one.html}\n' for one in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{paragraph(subtitle)}"
        f"<nav>{links}</nav>\n{bodies}<script>{_SORT}</script>\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n'


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>\n"


def picture(data: bytes, width: int, caption: str) -> str:
    """A PNG, ``width`` pixels of the page wide where there is room, with its caption."""
    source = base64.b64encode(data).decode()
    caption = escape(caption)
    image = f'<img alt="{caption}" width="{width}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{html}</details>\n"


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>\n" for word, text in pairs) + "</dl>\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str | float]], sortable: bool = False) -> str:
    """Numbers with three decimals, NaN as a dash, text as it is. A click on a head sorts when ``sortable``."""
    sort = ' class="sort" title="click to sort"' if sortable else ""
    head = "".join(f"<th{sort}>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return f'<td class="text">{escape(value)}</td>'
    if math.isnan(value):
        return '<td data-v="-1">-</td>'
    if isinstance(value, int):
        return f'<td data-v="{value}">{value:,}</td>'
    return f"<td>{value:.3f}</td>"
