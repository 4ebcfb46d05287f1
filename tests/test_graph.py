"""The Snakefile alone, on notebooks that only put finished files into place: what runs, what does not, what
is kept."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import nbformat
import pytest
from study import environment, run_study, snakemake, stub_project, study_command

PKU = "safety_signal"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return stub_project(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def finished(project) -> Path:
    """One setting in both orders."""
    done = run_study(project, "--settings", PKU)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "The study is complete after" in done.stdout and "index.html" in done.stdout
    return project / "runs" / "smoke"


def stamps(folder: Path) -> dict[Path, int]:
    visible = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in visible}


def changed(before: dict[Path, int]) -> set[str]:
    return {path.name for path, stamp in before.items() if path.exists() and path.stat().st_mtime_ns != stamp}


def jobs(project: Path, chains: dict[str, list[str]]) -> dict[str, int]:
    """How often each rule would run, by Snakemake's own dry run."""
    said = snakemake(project, "-n", "--forceall", "--quiet", "rules", chains=chains)
    assert said.returncode == 0, said.stderr[-3000:]
    counts = re.findall(r"^(\w+)\s+(\d+)$", said.stdout + said.stderr, flags=re.MULTILINE)
    return {rule: int(count) for rule, count in counts}


def test_every_common_beginning_is_trained_once(project):
    """Both orders, controls, joint and singles of one setting: 9 chains, which would be 16 trainings
    apart."""
    chains = [
        "helpful-then-safe",
        "safe-then-helpful",
        "helpful-then-safe.shuffled",
        "safe-then-helpful.shuffled",
    ]
    chains += ["helpful-then-helpful", "safe-then-safe", "helpful+safe", "helpful", "safe"]
    counts = jobs(project, {PKU: chains})
    assert (counts["first_stage"], counts["later_stage"]) == (3, 6) and sum(
        map(len, (c.split("-then-") for c in chains))
    ) == 15
    assert counts["start"] == counts["data_preparation"] == counts["across_settings"] == 1
    assert counts["evaluation"] == counts["pair_diagnostics"] == counts["mechanistic_diagnostics"] == 9
    assert counts["record"] == 9


def test_a_design_brings_its_notebook_and_chains_know_their_controls(project):
    chains = ["helpful-then-safe", "helpful-then-safe.shuffled", "helpful-then-helpful"]
    said = snakemake(
        project, "-n", "--forceall", "--printshellcmds", chains={PKU: chains}, notebooks=["09_controls"]
    )
    assert said.returncode == 0, said.stderr[-3000:]
    lines = (said.stdout + said.stderr).splitlines()
    words = [shlex.split(line.partition("command: ")[2]) for line in lines if "seqdpo_utils notebook" in line]
    given = {line[5]: json.loads(line[line.index("--parameters") + 1]) for line in words}
    assert given["runs/smoke/summary/notebooks/09_controls.ipynb"]["chains"] == {PKU: chains}
    for name in ("04_evaluation", "06_mechanistic_diagnostics"):
        page = f"runs/smoke/{PKU}/{{}}/seed-0/notebooks/{name}.ipynb"
        assert given[page.format(chains[0])]["controls"] == sorted(chains[1:])
        assert given[page.format(chains[2])]["controls"] == []
    assert "experiment" not in jobs(project, {PKU: chains})


def test_six_orders_of_three_objectives_are_fifteen_trainings(project):
    letters = ("helpfulness", "verbosity", "correctness")
    orders = [
        f"{a}-then-{b}-then-{c}" for a in letters for b in letters for c in letters if len({a, b, c}) == 3
    ]
    overrides = {"objectives": list(letters)}
    said = snakemake(
        project,
        "-n",
        "--forceall",
        "--quiet",
        "rules",
        chains={"attribute_interaction": orders},
        overrides=overrides,
    )
    counts = dict(
        re.findall(
            r"^(first_stage|later_stage|evaluation)\s+(\d+)$", said.stdout + said.stderr, flags=re.MULTILINE
        )
    )
    assert counts == {"first_stage": "3", "later_stage": "12", "evaluation": "6"}


def test_a_second_start_has_nothing_to_do(project, finished):
    before = stamps(finished)
    done = run_study(project, "--settings", PKU)
    assert done.returncode == 0 and changed(before) == set() and "started" not in done.stderr


def test_one_changed_notebook_reruns_only_what_depends_on_it(project, finished):
    before = stamps(finished)
    file = project / "notebooks" / "05_pair_diagnostics.ipynb"
    notebook = nbformat.read(file, as_version=4)
    notebook.cells[1].source += "\n'changed'"
    nbformat.write(notebook, file)
    assert run_study(project, "--settings", PKU).returncode == 0
    notebooks = {name for name in changed(before) if name.endswith(".ipynb")}
    assert "05_pair_diagnostics.ipynb" in notebooks
    assert notebooks <= {"05_pair_diagnostics.ipynb", "07_across_settings.ipynb"}


def test_a_second_design_trains_only_what_is_new(project, finished):
    """Three stages, a joint one and a variant: the two first stages are there already."""
    chains = ["helpful-then-safe.shuffled", "helpful-then-safe-then-helpful", "helpful+safe-then-safe.half"]
    done = run_study(project, "--settings", PKU, "--design", "both_orders", "--chains", *chains)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    trained = set(re.findall(r"  0[23] \w+ (\S+) seed 0 \| started", done.stderr))
    assert trained == {
        "helpful-then-safe.shuffled",
        "helpful-then-safe-then-helpful",
        "helpful+safe",
        "helpful+safe-then-safe.half",
    }
    nodes = {path.parent.parent.name for path in (finished / PKU).glob("*/seed-0/run.json")}
    assert nodes == {"helpful", "safe", "helpful-then-safe", "safe-then-helpful", *trained}
    record = json.loads((finished / PKU / "helpful+safe-then-safe.half" / "seed-0" / "run.json").read_text())
    assert record["began_with"] == "helpful+safe" and record["parameters"]["train_share"] == 0.5
    assert record["stages"] == ["helpful+safe", "safe.half"]
    again = run_study(project, "--settings", PKU, "--design", "both_orders", "--chains", *chains)
    assert again.returncode == 0 and "started" not in again.stderr


def test_one_failing_chain_does_not_stop_another_and_is_named_last(project, finished):
    file = project / "notebooks" / "02_first_stage.ipynb"
    whole = file.read_text()
    notebook = nbformat.read(file, as_version=4)
    notebook.cells[1].source = "assert chain != 'safe', 'no safe today'"
    nbformat.write(notebook, file)
    done = run_study(project, "--settings", PKU, "--seeds", "1", "--set", "resamples=150")
    file.write_text(whole)
    assert done.returncode != 0
    record = json.loads((finished / PKU / "helpful-then-safe" / "seed-1" / "run.json").read_text())
    assert record["parameters"]["resamples"] == 150
    last = done.stdout[done.stdout.index("The study stopped") :]
    kept = f"runs/smoke/{PKU}/safe/seed-1/notebooks/02_first_stage.partial.ipynb"
    assert f"FAILED {kept}\n       AssertionError: no safe today" in last and "helpful-then-safe" not in last
    assert (project / kept).is_file()


def test_a_killed_study_goes_on_where_it_was(project, finished):
    """Killed by the hardest signal in a training notebook; the next start clears the marks and finishes."""
    words = ("--settings", PKU, "--seeds", "2")
    options = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    process = subprocess.Popen(study_command(*words), cwd=project, env=environment(project), **options)
    for line in process.stderr:
        if "started" in line and " 02 " in line:
            break
    again = run_study(project, *words)
    assert again.returncode == 2 and "running already" in again.stderr
    os.killpg(process.pid, 9)
    process.wait()
    done = run_study(project, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f" 01 {PKU} | started" not in done.stderr
    assert (finished / PKU / "safe-then-helpful" / "seed-2" / "run.json").is_file()


def test_changed_rows_are_prepared_again(project, finished):
    rows = project / "seqdpo_utils" / "embedded" / "rows" / "pku_saferlhf"
    file = next(path for path in rows.rglob("*") if path.is_file())
    file.write_text(file.read_text() + "\n")
    done = run_study(project, "--settings", PKU)
    assert done.returncode == 0 and f" 01 {PKU} | started" in done.stderr


def test_more_stages_than_nine_are_planned(project):
    """Nothing in the graph counts digits."""
    chain = "-then-".join(["helpful", "safe"] * 6)
    counts = jobs(project, {PKU: [chain]})
    assert (counts["first_stage"], counts["later_stage"], counts["evaluation"]) == (1, 11, 1)
