"""The shape of the project: layers, one list of packages, clean notebooks, nothing fetched from elsewhere."""

import ast
import json
import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import ROOT

LAYERS = [
    "paths",
    "params",
    "encoding",
    "sources",
    "data",
    "access",
    "models",
    "scoring",
    "recording",
    "divergence",
    "mechanics",
    "ledger",
    "trainer",
    "training",
    "metrics",
    "rivals",
    "charts",
    "summary",
    "appendix",
    "bench",
    "plan",
    "run",
    "__main__",
]
MODULES = sorted(path.stem for path in (ROOT / "seqdpo_utils").glob("*.py") if path.stem != "__init__")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_every_module_has_its_layer():
    assert sorted(LAYERS) == MODULES


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_imports_only_downward(name):
    tree = ast.parse((ROOT / "seqdpo_utils" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqdpo_utils"):
            _, _, module = node.module.partition(".")
            for other in [module] if module else [alias.name for alias in node.names]:
                assert LAYERS.index(other) < LAYERS.index(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_say_what_they_do_and_with_what(name):
    for node in ast.parse((ROOT / "seqdpo_utils" / f"{name}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert node.returns is not None and all(a.annotation is not None for a in arguments), f"{name}.{node.name} lacks annotations"


def test_environment_yml_takes_its_packages_from_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[test]"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert python == "python=" + project["requires-python"].removeprefix(">=")
    declared = {re.split(r"[<>=\[; ]", line)[0].lower() for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert declared <= {name.lower().replace("_", "-") for name in pinned}
    assert {"jupyterlab", "papermill", "torch", "transformers", "peft", "trl", "datasets", "pandas", "altair"} <= declared
    assert "+cpu" not in (ROOT / "constraints.txt").read_text()


def test_the_top_level_is_the_design_card():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.partition("/")[0] for name in tracked}
    card = {"notebooks", "seqdpo_utils", "params", "environment.yml", "tests", "README.md"}
    assert card <= top <= card | {"pyproject.toml", "constraints.txt", "Makefile", "Snakefile", "LICENSE", ".ci", ".gitignore"}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_stored_without_outputs_and_in_small_cells(file):
    cells = json.loads(file.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert len({cell["id"] for cell in cells}) == len(cells)
    limit = 20
    for cell in code:
        lines = [line for line in "".join(cell["source"]).split("\n") if line.strip()]
        if "parameters" not in cell["metadata"].get("tags", []):
            assert len(lines) <= limit, f"{file.name}: a cell of {len(lines)} lines"
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert prose.startswith("# ") and "\n> " in prose and "Exercises" in prose and "| reads | writes |" in prose
    assert "assert " in "".join(code[-1]["source"])


def test_remote_code_and_unsafe_loading_stay_out():
    for path in [*(ROOT / "seqdpo_utils").rglob("*.py"), *NOTEBOOKS, ROOT / "Snakefile"]:
        text = path.read_text()
        assert "trust_remote_code=True" not in text and "yaml.load(" not in text and "torch.load(" not in text and "pickle" not in text, path.name
