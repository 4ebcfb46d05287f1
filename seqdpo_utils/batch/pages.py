"""The executed notebooks as pages that read offline: charts inline, formulas as MathML, nothing fetched."""

import html
import itertools
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert.filters import markdown2html

from seqdpo_utils.chains import THEN
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import read_table, write_whole

_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])", re.DOTALL)
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
_ID = re.compile(r'(?<=\sid=")([^"]+)(?=")')


def mathml(text: str) -> str:
    """Markdown with `$...$` and `$$...$$` replaced by MathML, code left alone."""

    def formula(match: re.Match[str]) -> str:
        display, inline = match.groups()
        return convert(display or inline, display="block" if display else "inline").replace("\n", " ")

    parts = _CODE.split(text)
    return "".join(part if part.startswith("`") else _FORMULA.sub(formula, part) for part in parts)


def inline_svg(svg: str, *, description: str, number: int) -> str:
    """An SVG with a text for those who cannot see it, and with ids that no other chart of the page has."""
    for name in set(_ID.findall(svg)):
        svg = svg.replace(f'id="{name}"', f'id="c{number}-{name}"').replace(f"#{name}", f"#c{number}-{name}")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def _markdown(text: str) -> Markup:
    linked = text.replace("](00_read_me_first.ipynb", "](summary--00_read_me_first.html")
    return Markup(markdown2html(mathml(linked)))


def _shown(output: Any, number: int) -> Markup:
    """One output of a cell; of progress bars only the last state."""
    if output.output_type == "stream":
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n") if line.strip()]
        return Markup('<pre class="log">{}</pre>').format("\n".join(lines))
    if output.output_type == "error":
        return Markup('<pre class="error">{}: {}</pre>').format(output.ename, output.evalue)
    if "image/svg+xml" in output.data:
        alt = output.metadata.get("image/svg+xml", {}).get("alt", "")
        picture = inline_svg(output.data["image/svg+xml"], description=alt, number=number)
        return Markup(f'<figure class="chart">{picture}</figure>')
    if "text/markdown" in output.data:
        return Markup('<div class="markdown">{}</div>').format(_markdown(output.data["text/markdown"]))
    if "text/html" in output.data:
        return Markup(output.data["text/html"])
    return Markup("<pre>{}</pre>").format(output.data.get("text/plain", ""))


def _environment() -> jinja2.Environment:
    """Templates of this package; whatever they are handed is escaped."""
    folder, numbers = files("seqdpo_utils.batch") / "templates", itertools.count()
    loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters |= {"markdown": _markdown, "shown": lambda output: _shown(output, next(numbers))}
    return environment


def render_appendix(results: Path) -> Path:
    """Render every executed notebook under `results` (`runs/<scale>`) and an index to them.

    Returns:
        The index. The folder appears whole or not at all.

    Raises:
        StudyError: when nothing was executed there.
    """
    found = sorted(results.rglob("notebooks/*.ipynb"), key=lambda path: (len(path.parts), path))
    executed = [path for path in found if not path.name.endswith(".partial.ipynb")]
    if not executed:
        raise StudyError(f"no executed notebook under {results}: run `make study` first.")
    environment, beside, links = _environment(), results / ".appendix.partial", {}
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for path in executed:
        place = path.parent.parent.relative_to(results).as_posix()
        cells = nbformat.read(path, as_version=4).cells
        heading = cells[0].source.partition("\n")[0].replace("`", "").strip("# ") if cells else ""
        name = f"{'--'.join([*place.split('/'), path.stem])}.html"
        page = environment.get_template("page.html").render(title=f"{heading} ({place})", cells=cells)
        (beside / name).write_text(page, encoding="utf-8")
        links.setdefault(place, []).append((name, heading))
    index = environment.get_template("index.html").render(_index(results, links))
    (beside / "index.html").write_text(index, encoding="utf-8")
    shutil.rmtree(results / "appendix", ignore_errors=True)
    beside.rename(results / "appendix")
    return results / "appendix" / "index.html"


def _index(results: Path, links: dict[str, list[tuple[str, str]]]) -> dict[str, Any]:
    """What the index shows: pages by setting and chain, and of the summary the headline and the claims."""
    first, claims = links.pop("summary", []), results / "summary" / "claims.parquet"
    settings: dict[str, dict[str, Any]] = {}
    for place, pages in links.items():
        setting, _, chain = place.partition("/")
        name = chain.replace(THEN, ", then ").replace("+", " + ").replace("/seed-", ", seed ")
        settings.setdefault(setting, {})[name or "every chain"] = pages
    rows = read_table(claims).to_dict("records") if claims.is_file() else []
    shown = {"first": first, "claims": rows, "settings": settings, "headline": _headline(results)}
    return {"title": "Sequential DPO", "scale": results.name} | shown


def _headline(results: Path) -> list[Any]:
    """The first sentence and the first figure of notebook 07, the figure also as a file of its own."""
    path = results / "summary" / "notebooks" / "07_across_settings.ipynb"
    cells = nbformat.read(path, as_version=4).cells if path.is_file() else []
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "data" in output]
    found = []
    for kind in ("text/markdown", "image/svg+xml"):
        found += [output for output in outputs if kind in output.data][:1]
    for figure in (output.data.get("image/svg+xml") for output in found):
        if figure is not None:
            target = results / "summary" / "first_objective.svg"
            write_whole(target, lambda file, svg=figure: file.write_text(svg, encoding="utf-8"))
    return found
