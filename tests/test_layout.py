"""The shape of the project: layers, one list of packages, clean notebooks, nothing fetched from elsewhere."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

PACKAGE = ROOT / "seqdpo_utils"
MAP = re.findall(r"^    ([\w.]+) {2,}\S", (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
"""The modules in the order in which the package's own map lists them: from the bottom up."""
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WIDTH = 110


def imported(file) -> set[str]:
    """Modules of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqdpo_utils"):
            inside = node.module.removeprefix("seqdpo_utils").lstrip(".")
            names = [f"{inside}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {name if name in FILES else inside for name in names}
    return found


def test_the_map_of_the_package_is_the_true_map():
    assert sorted(MAP) == sorted(name for name in FILES if not name.rpartition(".")[2].startswith("__"))


@pytest.mark.parametrize("name", MAP)
def test_a_module_imports_only_from_those_above_it_on_the_map(name):
    below = [other for other in imported(FILES[name]) if MAP.index(other) >= MAP.index(name)]
    assert not below, f"{name} imports {below}"


@pytest.mark.parametrize("name", MAP)
def test_public_functions_say_what_they_do_and_with_what(name):
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            hinted = node.returns is not None and all(a.annotation is not None for a in arguments)
            assert hinted, f"{name}.{node.name} lacks annotations"


def test_no_line_is_wider_than_110_columns():
    """`make lint` says so too; here also markdown cells, the pages' templates, README and Snakefile."""
    files = [*FILES.values(), *(ROOT / "tests").glob("*.py"), ROOT / "README.md", ROOT / "Snakefile"]
    files += [path for path in (PACKAGE / "batch" / "templates").iterdir() if path.is_file()]
    lines = [
        (f"{file.name}:{n}", line)
        for file in files
        for n, line in enumerate(file.read_text().splitlines(), 1)
    ]
    for file in NOTEBOOKS:
        for cell in json.loads(file.read_text())["cells"]:
            lines += [(f"{file.name} {cell['id']}", line) for line in "".join(cell["source"]).splitlines()]
    assert [place for place, line in lines if len(line) > WIDTH] == []


def test_make_lint_is_red_on_a_line_of_111_columns(tmp_path):
    """The same settings on a file with one such line, and without it."""
    for length, status in ((110, 0), (111, 1)):
        (tmp_path / "x.py").write_text("x = 1\n" + "y = " + "1" * (length - 4) + "\n")
        config, file = str(ROOT / "pyproject.toml"), str(tmp_path / "x.py")
        command = [sys.executable, "-m", "ruff", "check", "--config", config, "--select", "E501", file]
        assert subprocess.run(command, capture_output=True, check=False).returncode == status


def test_the_commands_of_the_readme_are_targets_with_known_words():
    """Each `make` line of the README, dry: make knows the target, and its words are in the Makefile."""
    text = (ROOT / "README.md").read_text().replace("\\\n", "")  # a command may go on in the next line
    commands = {line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("make ")}
    assert {"make study", "make test"} <= commands
    words = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        assert set(re.findall(r"\b([A-Z]+)=", command)) <= words, command
        done = subprocess.run(
            ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, command + done.stderr


def test_environment_yml_takes_its_packages_from_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[test]"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert python == "python=" + project["requires-python"].removeprefix(">=")
    declared = {
        re.split(r"[<>=\[; ]", line)[0].lower()
        for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]
    }
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert declared <= {name.lower().replace("_", "-") for name in pinned}
    assert {
        "jupyterlab",
        "papermill",
        "torch",
        "transformers",
        "peft",
        "trl",
        "datasets",
        "pandas",
        "altair",
    } <= declared
    assert "+cpu" not in (ROOT / "constraints.txt").read_text()


def test_the_top_level_is_the_design_card():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {name.partition("/")[0] for name in tracked}
    card = {"notebooks", "seqdpo_utils", "params", "environment.yml", "tests", "README.md"}
    assert (
        card
        <= top
        <= card
        | {"pyproject.toml", "constraints.txt", "Makefile", "Snakefile", "LICENSE", ".ci", ".gitignore"}
    )


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
    assert (
        prose.startswith("# ") and "\n> " in prose and "Exercises" in prose and "| reads | writes |" in prose
    )
    assert "assert " in "".join(code[-1]["source"])


def test_remote_code_and_unsafe_loading_stay_out():
    for path in [*PACKAGE.rglob("*.py"), *NOTEBOOKS, ROOT / "Snakefile"]:
        text = path.read_text()
        assert (
            "trust_remote_code=True" not in text
            and "yaml.load(" not in text
            and "torch.load(" not in text
            and "pickle" not in text
        ), path.name


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_no_formula_is_broken_over_two_lines(file):
    """The pages read `$...$` within a line; one that is broken stands there raw."""
    for cell in json.loads(file.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            inline = re.sub(r"\$\$.*?\$\$", "", "".join(cell["source"]), flags=re.DOTALL)
            assert all(line.count("$") % 2 == 0 for line in inline.splitlines()), cell["id"]
