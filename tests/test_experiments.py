"""Notebooks 08 to 12 on chains trained at the smoke scale: every cell runs, and tables say what was there."""

import json

import nbformat
import pandas as pd
import pytest
from study import _run, copy_project, snakemake

from seqdpo_utils import params, steering
from seqdpo_utils.batch.notebooks import notebook_parameters
from seqdpo_utils.chains import Chain, tree
from seqdpo_utils.paths import RunPaths, read_json

UF = "compatible_quality"
A, B = "instruction_following", "truthfulness"
BOTH = f"{A}+{B}"
LISTWISE = [f"{BOTH}.{word}" for word in ("listwise", "listwise_uniform", "listwise_learned")]
LISTWISE += [f"{BOTH}.listwise_dirichlet.steered"]
CHAINS = [A, B, BOTH, *LISTWISE, f"{A}-then-{B}", f"{A}-then-{B}.shuffled", f"{A}-then-{A}"]
CHAINS += [f"{A}-then-{A}.disjoint", f"{A}-then-{A}.disjoint.flip100"]
CHAINS += [f"{A}-then-{B}.projected", f"{A}-then-{B}.placebo", f"{A}-then-{BOTH}.listwise"]
WRITTEN = {
    "08": ["control", "control_curves", "schedules", "aspects"],
    "09": ["controls"],
    "10": ["dial"],
    "11": ["why"],
    "12": ["ways", "rivals", "standing"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The chains, trained and recorded; what notebooks 04 to 07 make of them is left out."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    node = RunPaths(folder.relative_to(folder) / "runs", "smoke", UF)
    targets = [str(node.at(chain).run_json) for chain in tree(map(Chain.parse, CHAINS))]
    done = snakemake(folder, *targets, chains={UF: CHAINS}, overrides={"keep_every": 2})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("number", WRITTEN)
def test_a_notebook_that_compares_chains_runs_and_writes_its_tables(project, number):
    (source,) = (project / "notebooks").glob(f"{number}_*.ipynb")
    flat = params.resolve(project, scale="smoke", setting=UF).model_dump()
    given = notebook_parameters(source, flat | {"chains": {UF: CHAINS}, "seeds": [0]})
    target = project / "runs" / "smoke" / "summary" / "notebooks" / source.name
    words = ["notebook", str(source), str(target), "--label", number, "--parameters", json.dumps(given)]
    done = _run(project, ["python", "-m", "seqdpo_utils", *words])
    assert done.returncode == 0, done.stderr[-4000:]
    for name in WRITTEN[number]:
        assert len(pd.read_parquet(project / "runs" / "smoke" / "summary" / f"{name}.parquet"))
    cells = nbformat.read(target, as_version=4).cells
    said = "".join(str(out) for cell in cells if cell.cell_type == "code" for out in cell.outputs)
    assert "Traceback" not in said and "shows the method" not in said


def test_a_listwise_stage_leaves_its_lambdas_and_what_shaped_it(project):
    node = RunPaths(project / "runs", "smoke", UF)
    kinds = {"listwise": 1, "listwise_uniform": 4, "listwise_dirichlet.steered": 16}
    for words, most in kinds.items():
        run = node.at(f"{BOTH}.{words}")
        table = pd.read_parquet(run.lambdas)
        assert table.groupby("step")[f"lambda_{A}"].nunique().max() == (4 if most == 16 else 1)
        assert 1 <= table[f"lambda_{A}"].nunique() <= most and len(table) == 16
    learned = pd.read_parquet(node.at(LISTWISE[2]).schedule)
    assert len(learned) == 4 and learned["error"].gt(0).all()
    shaped = read_json(node.at(LISTWISE[3]).manifest)["parameters"]
    assert (shaped["lambdas"], shaped["lambda_in_prompt"]) == ("dirichlet", True)
    assert read_json(node.at(LISTWISE[0]).run_json)["parameters"]["rating_temperature"] == 1.0


def test_a_listwise_stage_may_come_later_and_looks_back_at_pairs(project):
    run = RunPaths(project / "runs", "smoke", UF, f"{A}-then-{BOTH}.listwise")
    assert set(pd.read_parquet(run.conflict)["previous_objective"]) == {A}
    assert pd.read_parquet(run.ledger)["term"].abs().sum() > 0
    assert set(pd.read_parquet(run.scores)["objective"]) == {A, B}


def test_the_tables_of_control_hold_every_way(project):
    control = pd.read_parquet(project / "runs" / "smoke" / "summary" / "control.parquet")
    ways = {steering.MIXED, steering.TOLD, steering.UNHEARD, steering.BASE}
    assert set(control["way"]) == ways and set(control["aspect"]) == {A, B}
