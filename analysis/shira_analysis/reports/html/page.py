"""The HTML of a report: head, style for light and dark, and the escaping of text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# No selector needs a name from a file. Colours: text on its ground has a contrast of 7 and more in both schemes.
_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--card:#f6f7f9;--ink:#1c1f24;--soft:#4d545e;--line:#d5d9df;--blue:0 114 178;
--warn:#7a3d00;--warn-ground:#fff4e2;--warn-line:#e69f00}
@media (prefers-color-scheme:dark){:root{--ground:#14161a;--card:#1c1f25;--ink:#e8eaee;--soft:#b3b9c3;--line:#363c46;
--blue:86 180 233;--warn:#ffd79a;--warn-ground:#2e2414;--warn-line:#b87f00}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1000px;margin:0 auto;padding:20px 16px 40px}
h1{font-size:1.6rem;line-height:1.25;margin:.2em 0 .6em}
h2{font-size:1.3rem;line-height:1.3;margin:2em 0 .4em;padding-top:.8em;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.6em 0 .4em}
p{margin:.5em 0;max-width:75ch}
.soft,figcaption{color:var(--soft);font-size:.875rem}
.name{unicode-bidi:isolate}
code.name{font:.9em ui-monospace,SFMono-Regular,Consolas,monospace}
ul.warnings{list-style:none;margin:1em 0;padding:0}
ul.warnings li{background:var(--warn-ground);color:var(--warn);border-left:4px solid var(--warn-line);padding:.5em .8em;
margin:.4em 0;border-radius:4px}
dl{display:grid;grid-template-columns:minmax(8em,max-content) minmax(0,1fr);gap:.3em 1.2em;background:var(--card);padding:.8em 1em;
border-radius:6px;margin:1em 0}
dt{color:var(--soft)}dd{margin:0}
@media (max-width:520px){dl{grid-template-columns:minmax(0,1fr);gap:0}dd{margin-bottom:.5em}}
a{color:inherit;text-decoration-color:rgb(var(--blue));text-decoration-thickness:2px;text-underline-offset:3px}
.scroll{overflow-x:auto;max-width:100%;background:linear-gradient(90deg,var(--ground) 40%,transparent) left/2.5em 100% no-repeat local,
linear-gradient(270deg,var(--ground) 40%,transparent) right/2.5em 100% no-repeat local,
linear-gradient(90deg,var(--line),transparent) left/.9em 100% no-repeat scroll,
linear-gradient(270deg,var(--line),transparent) right/.9em 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.3em .6em;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}
table.stacked td:first-child{white-space:normal;min-width:16em}
table.bars{width:100%;max-width:700px}
table.bars td.bar{width:50%;padding-right:0}
table.bars th:last-child{white-space:normal;text-align:left}
@media (max-width:520px){table.bars td.bar{width:28%}table.bars th,table.bars td{padding:.3em .4em}}
.track{display:block;height:.8em;background:var(--card);border-radius:2px}
.track span{display:block;height:100%;background:rgb(var(--blue));border-radius:2px}
table.heat th,table.heat td{border:1px solid var(--ground);min-width:3em;text-align:center}
table.heat th:first-child{text-align:left;position:sticky;left:0;background:var(--ground)}
table.heat td{background:var(--card)}
@media (max-width:520px){table.heat th,table.heat td{min-width:2.6em;padding:.3em .15em}
table.stacked,.stacked tbody,.stacked tr,.stacked td{display:block}.stacked thead{display:none}.stacked tr{margin:.6em 0 1.2em}
.stacked td{padding:.3em 0;white-space:normal}.stacked td+td{display:flex;justify-content:space-between}
.stacked td+td::before{content:attr(data-title);color:var(--soft)}}
figure{margin:1em 0}
figure img{display:block;max-width:100%;height:auto;image-rendering:pixelated;border:1px solid var(--line)}
summary{cursor:pointer;margin:1em 0 .5em}
footer{margin-top:3em;padding-top:1em;border-top:1px solid var(--line)}
@media print{details{display:block}}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def text(value: object) -> str:
    """Any text as HTML: escaped, without invisible characters, bidirectional controls or line breaks; no-break spaces stay."""
    plain = str(value)
    if not plain.isprintable():
        plain = "".join(
            c if c.isprintable() or c == "\u00a0" else c.encode("unicode_escape").decode() for c in plain
        )
    return html.escape(plain, quote=True)


def name(value: object) -> str:
    """A name from a file, in a monospace font and isolated from the writing direction around it."""
    return f'<code class="name">{text(value)}</code>'


def share(value: float) -> str:
    """A share of 1 in per cent."""
    return f"{100 * value:.3g} %"


def paragraph(sentences: Iterable[str]) -> str:
    """Plain sentences as a paragraph."""
    return f"<p>{text(' '.join(sentences))}</p>"


def warnings(found: Iterable[str]) -> str:
    """Plain sentences as a highlighted list; an empty string if there are none."""
    items = "".join(f"<li>{text(one)}</li>" for one in found)
    return f'<ul class="warnings" aria-label="warnings">{items}</ul>' if items else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A definition list of plain text."""
    return f"<dl>{''.join(f'<dt>{text(key)}</dt><dd>{text(value)}</dd>' for key, value in pairs)}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, stacked: bool = False) -> str:
    """A table that scrolls if it is too wide; the first cell of a row is HTML, the others are plain text.

    Args:
        head: titles of the columns.
        rows: their cells.
        stacked: on a phone, show the cells of a row below each other with their titles; for tables with few rows.
    """
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    titles = [f' data-title="{text(cell)}"' if stacked else "" for cell in head[1:]]
    kind = "stacked" if stacked else ""
    body = "".join(
        f"<tr><td>{first}</td>"
        f"{''.join(f'<td{title}>{text(cell)}</td>' for title, cell in zip(titles, rest, strict=True))}</tr>"
        for first, *rest in rows
    )
    # A box that scrolls can be reached by keyboard.
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def page(title: str, body: Iterable[str]) -> str:
    """The whole document, from plain title and HTML parts."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{chr(10).join(part for part in body if part)}\n</main></body></html>\n"
    )
