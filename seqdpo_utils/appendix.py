"""The executed notebooks as pages that read offline: charts inline, formulas as MathML, nothing loaded from elsewhere."""

import html
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from seqdpo_utils.paths import StudyError, read_table, write_whole

_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])", re.DOTALL)
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
_ID = re.compile(r'(?<=\sid=")([^"]+)(?=")')

STYLE = """
:root{--ink:#1c2529;--soft:#5b6b73;--line:#dde3e6;--page:#fff;--card:#f5f7f8;--accent:#1565c0}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebee;--soft:#9fb0b8;--line:#37444b;--page:#151b1e;--card:#1e272b;--accent:#82b1ff}}
*{box-sizing:border-box}body{margin:0 auto;max-width:66rem;padding:1.5rem;color:var(--ink);background:var(--page);font:16px/1.6 system-ui,"DejaVu Sans",sans-serif}
a{color:var(--accent)}nav{font-size:.9rem;color:var(--soft);border-bottom:1px solid var(--line);padding-bottom:.6rem;margin-bottom:1.2rem}
h1{line-height:1.2;margin:.5rem 0 1rem}h2{margin-top:2.4rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
blockquote{margin:1rem 0;padding:.3rem 1rem;border-left:4px solid var(--accent);background:var(--card);font-size:1.05rem}
table{border-collapse:collapse;font-size:.82rem;margin:1rem 0;display:block;overflow-x:auto;max-width:100%}
th,td{padding:.25rem .45rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}th:first-child,td:first-child{text-align:left}
.markdown table td,.markdown table th,.wide td,.wide th{text-align:left}
pre,code{font:13px/1.5 ui-monospace,"DejaVu Sans Mono",monospace}code{background:var(--card);padding:.1em .3em;border-radius:3px}
pre{background:var(--card);padding:.8rem;border-radius:6px;overflow-x:auto;white-space:pre-wrap}pre code{padding:0}
details.code{margin:.6rem 0}details.code>summary,details>summary{cursor:pointer;color:var(--soft);font-size:.85rem}
.chart{background:#fff;border-radius:8px;padding:.6rem;margin:1rem 0;overflow-x:auto}.chart svg{max-width:100%;height:auto}
.log{color:var(--soft);font-size:.8rem;max-height:12rem;overflow:auto}.error{border-left:4px solid #c62828}
.anchor-link{display:none}.markdown{max-width:50rem}table,th,td,tr{border-left:0;border-right:0;border-top:0}
.label{background:#fff3e0;color:#5d3a00;padding:.5rem .9rem;border-radius:6px;display:inline-block}
"""


def mathml(text: str) -> str:
    """Markdown with `$...$` and `$$...$$` replaced by MathML, code left alone."""

    def formula(match: re.Match[str]) -> str:
        display, inline = match.groups()
        return convert(display or inline, display="block" if display else "inline").replace("\n", " ")

    return "".join(part if part.startswith("`") else _FORMULA.sub(formula, part) for part in _CODE.split(text))


def inline_svg(svg: str, *, description: str, number: int) -> str:
    """An SVG with a text for those who cannot see it, and with ids that no other chart of the page has."""
    for name in set(_ID.findall(svg)):
        svg = svg.replace(f'id="{name}"', f'id="c{number}-{name}"').replace(f"#{name}", f"#c{number}-{name}")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description, quote=True)}" ', 1)


class _Pages:
    """Renders Markdown through nbconvert's own filter, so that pages look as they do in Jupyter."""

    def __init__(self) -> None:
        self.filter = HTMLExporter().environment.filters["markdown2html"]

    def markdown(self, text: str) -> str:
        return f'<div class="markdown">{self.filter({}, mathml(text)) if self._needs_context() else self.filter(mathml(text))}</div>'

    def _needs_context(self) -> bool:
        return hasattr(self.filter, "jinja_pass_arg")

    def output(self, output: Any, number: int) -> str:
        if output.output_type == "stream":
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n") if line.strip()]
            return f'<pre class="log">{html.escape(chr(10).join(lines))}</pre>'
        if output.output_type == "error":
            return f'<pre class="error">{html.escape(f"{output.ename}: {output.evalue}")}</pre>'
        data = output.data
        if "image/svg+xml" in data:
            picture = inline_svg(data["image/svg+xml"], description=output.metadata.get("image/svg+xml", {}).get("alt", ""), number=number)
            return f'<figure class="chart">{picture}</figure>'
        if "text/markdown" in data:
            return self.markdown(data["text/markdown"])
        if "text/html" in data:
            return data["text/html"]
        return f"<pre>{html.escape(data.get('text/plain', ''))}</pre>"

    def cell(self, cell: Any, number: int) -> str:
        if cell.cell_type == "markdown":
            return self.markdown(cell.source)
        tags = cell.metadata.get("tags", [])
        shown = "Show the solution" if "solution" in tags else "parameters" if {"parameters", "injected-parameters"} & set(tags) else "code"
        code = f'<details class="code"><summary>{shown}</summary><pre><code>{html.escape(cell.source)}</code></pre>'
        outputs = "".join(self.output(output, 1000 * number + k) for k, output in enumerate(cell.outputs))
        return f"{code}{outputs}</details>" if "solution" in tags else f"{code}</details>{outputs}"

    def page(self, title: str, body: str, *, up: str = "") -> str:
        home = f'<nav><a href="{up}index.html">Appendix</a> › {html.escape(title)}</nav>' if up is not None else ""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{home}<main>{body}</main></body></html>'


def render_appendix(results: Path) -> Path:
    """Render every executed notebook under `results` (`runs/<scale>`) and an index that says what to read first.

    Returns:
        The index. The folder appears whole or not at all.

    Raises:
        StudyError: when nothing was executed there.
    """
    notebooks = [path for path in sorted(results.rglob("notebooks/*.ipynb")) if not path.name.endswith(".partial.ipynb")]
    if not notebooks:
        raise StudyError(f"no executed notebook under {results}: run `make study` first.")
    pages, beside = _Pages(), results / ".appendix.partial"
    shutil.rmtree(beside, ignore_errors=True)
    links: dict[str, list[tuple[str, str]]] = {}
    for path in notebooks:
        chain = path.parent.parent.relative_to(results).as_posix()
        notebook = nbformat.read(path, as_version=4)
        title = _title(notebook, path)
        name = f"{'--'.join([*chain.split('/'), path.stem])}.html"
        body = "\n".join(pages.cell(cell, number) for number, cell in enumerate(notebook.cells))
        write_whole(beside / name, lambda file, t=f"{title} ({chain})", b=body: file.write_text(pages.page(t, b), encoding="utf-8"))
        links.setdefault(chain, []).append((name, title))
    write_whole(beside / "index.html", lambda file: file.write_text(pages.page("Sequential DPO", _index(pages, results, links), up=None), encoding="utf-8"))
    shutil.rmtree(results / "appendix", ignore_errors=True)
    beside.rename(results / "appendix")
    return results / "appendix" / "index.html"


def _title(notebook: Any, path: Path) -> str:
    first = notebook.cells[0].source.partition("\n")[0] if notebook.cells else ""
    return first.lstrip("# ").strip() or path.stem


def _index(pages: _Pages, results: Path, links: dict[str, list[tuple[str, str]]]) -> str:
    parts = ["<h1>What becomes of a first preference when a second one is learned?</h1>"]
    parts += [f"<p>Scale <code>{html.escape(results.name)}</code>. Every page is one executed notebook; code is folded away and can be opened.</p>"]
    summary = dict.fromkeys(links.pop("summary", []))
    parts += [_headline(pages, results)]
    claims = results / "summary" / "claims.parquet"
    if summary:
        parts += ["<h2>Read first</h2><ul>"] + [f'<li><a href="{name}">{html.escape(title)}</a></li>' for name, title in summary] + ["</ul>"]
    if claims.is_file():
        rows = "".join(
            f"<tr><td>{html.escape(c.claim)}</td><td>{html.escape(c.figure)}</td><td>{html.escape(c.verdict)}</td></tr>"
            for c in read_table(claims).itertuples()
        )
        parts += [
            f'<h2>The claims, with this run\'s figures</h2><table class="wide"><tr><th>claim of the source study</th><th>our figure</th><th>what it allows to say</th></tr>{rows}</table>'
        ]
    for setting in dict.fromkeys(chain.partition("/")[0] for chain in links):
        parts.append(f"<h2>{html.escape(setting)}</h2>")
        for chain, pages_of in sorted(links.items(), key=lambda item: item[0].count("/")):
            if chain.partition("/")[0] == setting:
                name = chain.partition("/")[2].replace("-then-", ", then ").replace("/seed-", ", seed ") or "both orders"
                items = " · ".join(f'<a href="{file}">{html.escape(title)}</a>' for file, title in pages_of)
                parts.append(f"<p><strong>{html.escape(name)}</strong><br>{items}</p>")
    return "\n".join(parts)


def _headline(pages: _Pages, results: Path) -> str:
    """The first sentence and the first figure of notebook 07, the figure also as a file of its own."""
    path = results / "summary" / "notebooks" / "07_across_settings.ipynb"
    if not path.is_file():
        return ""
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", []) if "data" in output]
    sentence = next((output for output in outputs if "text/markdown" in output.data), None)
    figure = next((output for output in outputs if "image/svg+xml" in output.data), None)
    if figure is not None:
        write_whole(results / "summary" / "first_objective.svg", lambda file: file.write_text(figure.data["image/svg+xml"], encoding="utf-8"))
    return "".join(pages.output(output, 0) for output in (sentence, figure) if output is not None)
