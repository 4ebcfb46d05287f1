import re

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_charts import OUTSIDE

from seqdpo_utils.batch import pages
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import write_table

CLIP = '<defs><clipPath id="clip1"><path d="M0"/></clipPath></defs><g clip-path="url(#clip1)"/>'
SVG = f'<svg xmlns="http://www.w3.org/2000/svg">{CLIP}</svg>'
EVALUATION = "setting--a-then-b--seed-0--04_evaluation.html"


def notebook(*cells):
    return new_notebook(cells=[new_markdown_cell("# 04 · Title of `it`\n\nA cost of 5$ and 6$."), *cells])


def chart():
    data = {"image/svg+xml": SVG, "image/png": "AAAA"}
    return new_output("display_data", data=data, metadata={"image/svg+xml": {"alt": 'Says "it"'}})


def sentence(text):
    return new_output("display_data", data={"text/markdown": text, "text/plain": "plain"})


@pytest.fixture
def results(tmp_path):
    def write(name, content):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(content, file)

    bars = new_output("stream", name="stderr", text="0%\r50%\r100%\n")
    code = new_code_cell("x < 1", outputs=[chart(), chart(), bars])
    shown = new_output("stream", name="stdout", text="revealed & <b>")
    solution = new_code_cell("secret()", metadata={"tags": ["solution"]}, outputs=[shown])
    given = new_code_cell("beta = 1", metadata={"tags": ["injected-parameters"]})
    failed = new_code_cell("1 / 0", outputs=[new_output("error", ename="E", evalue="<why>", traceback=[])])
    first = new_code_cell(
        "say()", outputs=[sentence("**Kept** in `a`, $M_1$."), sentence("Not this."), chart()]
    )
    write("setting/notebooks/01_data_preparation.ipynb", notebook())
    write("setting/a-then-b/seed-0/notebooks/04_evaluation.ipynb", notebook(given, code, solution, failed))
    write("setting/a+b-then-c.half/seed-1/notebooks/02_first_stage.ipynb", notebook())
    write("summary/notebooks/07_across_settings.ipynb", notebook(first))
    write("summary/notebooks/07_across_settings.partial.ipynb", notebook())
    return tmp_path


def test_pages_read_offline_and_index_leads_to_each(results):
    index = pages.render_appendix(results)
    names = sorted(path.name for path in index.parent.glob("*.html"))
    assert names == [
        "index.html",
        "setting--01_data_preparation.html",
        "setting--a+b-then-c.half--seed-1--02_first_stage.html",
        EVALUATION,
        "summary--07_across_settings.html",
    ]
    for path in index.parent.iterdir():
        text = path.read_text()
        assert not OUTSIDE.search(text) and "<script" not in text and "<link" not in text
        assert path.name == "index.html" or f'href="{path.name}"' in index.read_text()
        assert path.name == "index.html" or '<a href="index.html">' in text
        assert "<style>:root {" in text and "{%" not in text and "{{" not in text
        assert "&#34;" not in text.partition("</style>")[0], "the style is no text to escape"


def test_index_names_chains_as_they_are_read(results):
    text = pages.render_appendix(results).read_text()
    for name in ("a, then b, seed 0", "a + b, then c.half, seed 1", "every chain"):
        assert f"<strong>{name}</strong>" in text
    assert text.index("every chain") < text.index("a, then b")


def test_index_opens_with_the_first_sentence_and_figure_of_the_summary(results):
    text = pages.render_appendix(results).read_text()
    assert "<strong>Kept</strong>" in text and "Not this." not in text and "<math" in text
    assert text.count("<svg ") == 1 and text.index("Kept") < text.index("<svg ")
    assert (results / "summary" / "first_objective.svg").read_text() == SVG


def test_claims_are_markdown_and_no_backtick_is_left(results):
    row = {"claim": "`A` forgets", "figure": "$r$ = 1 < 2", "verdict": "**undecided** & open"}
    write_table(results / "summary" / "claims.parquet", pd.DataFrame([row]))
    text = pages.render_appendix(results).read_text()
    cells = re.findall(r"<td>(.*?)</td>", text, re.DOTALL)
    assert "<code>A</code> forgets" in cells[0] and "<math" in cells[1] and "1 &lt; 2" in cells[1]
    assert "<strong>undecided</strong> &amp; open" in cells[2]
    assert "`" not in text


def test_tables_are_whole_on_paper():
    style = (pages.files("seqdpo_utils.batch") / "templates" / "style.css").read_text()
    printed = style.partition("@media print")[2]
    assert re.search(r"table \{[^}]*overflow: visible[^}]*font-size: 7pt", printed)


def test_charts_are_inline_with_their_text_and_ids_of_their_own(results):
    text = (pages.render_appendix(results).parent / EVALUATION).read_text()
    assert text.count('aria-label="Says &quot;it&quot;"') == 2 and "AAAA" not in text
    ids = [part.partition('"')[0] for part in text.split('<clipPath id="')[1:]]
    assert len(set(ids)) == 2 and all(f"url(#{name})" in text for name in ids)


def test_code_is_escaped_progress_is_its_last_state_and_solutions_are_folded(results):
    text = (pages.render_appendix(results).parent / EVALUATION).read_text()
    assert "x &lt; 1" in text and "50%" not in text.partition("</style>")[2] and "100%" in text
    assert "revealed &amp; &lt;b&gt;" in text and "E: &lt;why&gt;" in text
    assert (
        text.index("Show the solution")
        < text.index("revealed")
        < text.index("</details>", text.index("revealed"))
    )
    assert text.count("<details") == text.count("</details>") == 4
    assert text.count("<summary>parameters</summary>") == 1
    closed = text.index("</details>", text.index("x &lt; 1"))
    assert closed < text.index("<svg "), "what code shows is not folded away with it"


def test_formulas_become_mathml_and_money_and_code_stay():
    inline = pages.mathml(r"so $M_k = \beta\,x$ holds")
    assert "<math" in inline and "$" not in inline
    assert 'display="block"' in pages.mathml("$$\n\\frac{a}{b}\n$$")
    assert pages.mathml("`$HOME` and 5$ and 6$") == "`$HOME` and 5$ and 6$"


def test_every_formula_of_the_notebooks_can_be_rendered(root):
    for file in (root / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(file, as_version=4).cells:
            if cell.cell_type == "markdown":
                rest = pages._CODE.sub("", pages.mathml(cell.source))
                assert "$" not in rest, f"{file.name}: {cell.source[:80]}"


def test_an_older_appendix_is_replaced_whole(results):
    pages.render_appendix(results)
    (results / "appendix" / "stale.html").write_text("old")
    (results / ".appendix.partial").mkdir()
    (results / ".appendix.partial" / "torn.html").write_text("torn")
    index = pages.render_appendix(results)
    assert {"stale.html", "torn.html"}.isdisjoint(path.name for path in index.parent.iterdir())
    assert not (results / ".appendix.partial").exists()


def test_nothing_to_render_is_an_error(tmp_path):
    with pytest.raises(StudyError, match="run `make study` first"):
        pages.render_appendix(tmp_path)
