import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_charts import OUTSIDE

from seqdpo_utils import appendix
from seqdpo_utils.paths import StudyError

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><defs><clipPath id="clip1"><path d="M0"/></clipPath></defs><g clip-path="url(#clip1)"/></svg>'


def notebook(*cells):
    return new_notebook(cells=[new_markdown_cell("# 04 · Title\n\nA cost of 5$ and 6$."), *cells])


def chart():
    return new_output("display_data", data={"image/svg+xml": SVG, "image/png": "AAAA"}, metadata={"image/svg+xml": {"alt": 'Says "it"'}})


@pytest.fixture
def results(tmp_path):
    def write(name, content):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(content, file)

    code = new_code_cell("x < 1", outputs=[chart(), chart(), new_output("stream", name="stderr", text="0%\r50%\r100%\n")])
    solution = new_code_cell("secret()", metadata={"tags": ["solution"]}, outputs=[new_output("stream", name="stdout", text="revealed")])
    write("setting/a-then-b/seed-0/notebooks/04_evaluation.ipynb", notebook(code, solution))
    write("summary/notebooks/07_across_settings.ipynb", notebook())
    write("summary/notebooks/07_across_settings.partial.ipynb", notebook())
    return tmp_path


def test_pages_read_offline_and_index_leads_to_each(results):
    index = appendix.render_appendix(results)
    pages = sorted(path.name for path in index.parent.glob("*.html"))
    assert pages == ["index.html", "setting--a-then-b--seed-0--04_evaluation.html", "summary--07_across_settings.html"]
    for path in index.parent.glob("*.html"):
        text = path.read_text()
        assert not OUTSIDE.search(text) and "<script" not in text
        assert path.name == "index.html" or f'href="{path.name}"' in index.read_text()


def test_charts_are_inline_with_their_text_and_ids_of_their_own(results):
    text = (appendix.render_appendix(results).parent / "setting--a-then-b--seed-0--04_evaluation.html").read_text()
    assert text.count('aria-label="Says &quot;it&quot;"') == 2 and "AAAA" not in text
    ids = [part.partition('"')[0] for part in text.split('<clipPath id="')[1:]]
    assert len(set(ids)) == 2 and all(f"url(#{name})" in text for name in ids)


def test_code_is_escaped_progress_is_its_last_state_and_solutions_are_folded(results):
    text = (appendix.render_appendix(results).parent / "setting--a-then-b--seed-0--04_evaluation.html").read_text()
    assert "x &lt; 1" in text and "50%" not in text and "100%" in text
    assert text.index("Show the solution") < text.index("revealed") < text.index("</details>", text.index("revealed"))


def test_formulas_become_mathml_and_money_and_code_stay():
    assert "<math" in appendix.mathml(r"so $M_k = \beta\,x$ holds") and "$" not in appendix.mathml(r"so $M_k = \beta\,x$ holds")
    assert 'display="block"' in appendix.mathml("$$\n\\frac{a}{b}\n$$")
    assert appendix.mathml("`$HOME` and 5$ and 6$") == "`$HOME` and 5$ and 6$"


def test_every_formula_of_the_notebooks_can_be_rendered(root):
    for file in (root / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(file, as_version=4).cells:
            if cell.cell_type == "markdown":
                assert "$" not in appendix._CODE.sub("", appendix.mathml(cell.source)), f"{file.name}: {cell.source[:80]}"


def test_nothing_to_render_is_an_error(tmp_path):
    with pytest.raises(StudyError, match="run `make study` first"):
        appendix.render_appendix(tmp_path)
