"""The command line: run one notebook through papermill, run the study through Snakemake, record a chain, render pages."""

import argparse
import ast
import itertools
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
from filelock import FileLock, Timeout
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from seqdpo_utils import access, params
from seqdpo_utils.paths import RunPaths, StudyError, check_trained, process_number, project_root, read_json, read_report, read_table, write_json, write_whole

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "papermill", "pandas", "altair", "snakemake")
QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    # keep freed memory in the process: on Linux the logits' page faults otherwise cost a tenth of the time
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
_BAR = re.compile(r"\d+%\|.*\[.+<.+\]")


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """Names that a notebook's parameters cell declares, with papermill's view of each.

    Raises:
        StudyError: when no cell has the tag `parameters`.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    if not any("parameters" in cell.metadata.get("tags", []) for cell in cells):
        raise StudyError(f"{notebook.name} has no cell tagged 'parameters': nothing could be handed to it.")
    return papermill.inspect_notebook(str(notebook))


def notebook_parameters(notebook: Path, flat: dict[str, Any]) -> dict[str, Any]:
    """The part of the flat parameters that a notebook declares.

    Raises:
        StudyError: when it declares a name that is not a parameter of the study.
    """
    declared = declared_parameters(notebook)
    unknown = [name for name in declared if name not in flat]
    if unknown:
        raise StudyError(f"{notebook.name} declares {unknown[0]!r}, which no parameter file sets; known: {', '.join(sorted(flat))}.")
    return {name: flat[name] for name in declared}


def helper_files(root: Path, notebook: Path) -> list[str]:
    """Files of `seqdpo_utils` that a notebook imports, directly or through others: what its results depend on."""
    package = root / "seqdpo_utils"
    sources = ["".join(cell.source) for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    waiting, found = [name for source in sources for name in _imported(source)], set()
    while waiting:
        file = package / f"{waiting.pop()}.py"
        if file.is_file() and file not in found:
            found.add(file)
            waiting += _imported(file.read_text(encoding="utf-8"))
    return sorted(str(file.relative_to(root)) for file in found)


def _imported(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqdpo_utils"):
            _, _, module = node.module.partition(".")
            names += [module] if module else [alias.name for alias in node.names]
    return names


class _Progress(logging.Handler):
    """Passes a notebook's progress bars on to the terminal, with the notebook's name before them."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.INFO)
        self.name_shown = name

    def emit(self, record: logging.LogRecord) -> None:
        for line in record.getMessage().replace("\r", "\n").splitlines():
            if _BAR.search(line):
                print(f"  {self.name_shown} | {line.strip()}", file=sys.stderr, flush=True)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else every NVIDIA device by its number."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return sorted((file.name.removeprefix("nvidia") for file in Path("/dev").glob("nvidia[0-9]*")), key=int)


@contextmanager
def one_gpu(folder: Path, gpus: list[str]) -> Iterator[str | None]:
    """Hold one of `gpus` for a notebook, so that several chains run side by side, each on a GPU of its own.

    A lock file in `folder` stands for a GPU; it is free again when the process ends, however it ends. Waits while all are taken.

    Yields:
        The GPU's name, which CUDA_VISIBLE_DEVICES holds meanwhile; None when there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in itertools.cycle(gpus):
        lock = FileLock(folder / f".gpu-{gpu.replace('/', '-')}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            continue
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        try:
            yield gpu
        finally:
            lock.release()
            os.environ.pop("CUDA_VISIBLE_DEVICES") if before is None else os.environ.update(CUDA_VISIBLE_DEVICES=before)
        return
    yield None


def run_notebook(source: Path, target: Path, parameters: dict[str, Any], *, label: str) -> None:
    """Execute a notebook; `target` appears only when every cell ran.

    While it runs, and after a failure, the notebook lies beside it as `<name>.partial.ipynb`; a failure also leaves
    `<name>.error.txt`, whose first line names the cause.

    Raises:
        StudyError: when a cell failed or the kernel died, with the path of what was kept.
    """
    if process_number():  # of several processes on one stage, all but the first run the notebook for the training alone
        target = Path(tempfile.mkdtemp(prefix="seqdpo")) / target.name
    partial, failure = target.with_suffix(".partial.ipynb"), target.with_suffix(".error.txt")
    target.parent.mkdir(parents=True, exist_ok=True)
    failure.unlink(missing_ok=True)
    logger = logging.getLogger("papermill")
    logger.handlers, logger.propagate = [_Progress(label)], False
    logger.setLevel(logging.INFO)
    os.environ.update(QUIET)
    print(f"  {label} | started", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nb") as private:
        transport = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{private}/k"}
        try:
            papermill.execute_notebook(
                str(source), str(partial), parameters=parameters, cwd=str(project_root()), kernel_name="python3", log_output=True,
                coalesce_streams=True, autosave_cell_every=30, progress_bar=False, config=Config(KernelManager=transport),
            )  # fmt: skip
        except (PapermillExecutionError, DeadKernelError, NoSuchKernel, OSError) as error:
            cause = _cause(error)
            failure.write_text(f"{cause}\n{error}\n", encoding="utf-8")
            raise StudyError(f"{label} failed: {cause}\nThe notebook is kept as {partial}") from error
    os.replace(partial, target)
    if process_number():
        shutil.rmtree(target.parent)
    print(f"  {label} | done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _cause(error: Exception) -> str:
    if isinstance(error, PapermillExecutionError):
        return f"{error.ename}: {error.evalue}"
    if isinstance(error, DeadKernelError):
        return "the kernel died, most often for want of memory (close other programs, lower token_budget or pairs_per_device), else stopped from outside"
    return f"{type(error).__name__}: {error}"


def record_chain(paths: RunPaths, flat: dict[str, Any], *, root: Path) -> None:
    """Write `run.json`: parameters, versions, commit, fingerprints, counts, seconds per step, device and dtype."""
    stages = {k: read_json(paths.checkpoint(k) / "manifest.json") for k in range(1, len(flat["objectives"]) + 1)}
    preparation = read_json(paths.preparation)
    check_trained(paths, stages=len(stages), parameters=flat)
    write_json(
        paths.run_json,
        {
            "parameters": flat,
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            **_commit(root),
            "fingerprints": preparation["fingerprints"],
            "counts": preparation["counts"],
            "seconds_per_step": {f"stage{k}": float(read_table(paths.history(k))["seconds"].median()) for k in stages},
            "scoring": {"base": read_report(paths.base_scores)} | {f"stage{k}": read_report(paths.scores(k)) for k in stages},
            "device": stages[1]["device"],
            "dtype": stages[1]["dtype"],
            "adapters": {f"stage{k}": manifest["adapter_sha256"] for k, manifest in stages.items()},
        },
    )


def _commit(root: Path) -> dict[str, Any]:
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    head = subprocess.run([git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    changes = subprocess.run([git, "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    return {"commit": head.stdout.strip() or None, "dirty": bool(changes.stdout.strip())}


def _chosen(root: Path, *, scale: str, settings: list[str], seeds: list[int] | None, words: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """The checked parameters of every setting, and the seeds: the scale's own when None are given."""
    overrides = params.parse_overrides(words)
    chosen = [params.resolve(root, scale=scale, setting=setting, overrides=overrides) for setting in settings]
    seeds = seeds or chosen[0]["seeds"]
    for seed in seeds:
        params.resolve(root, scale=scale, setting=settings[0], seed=seed, overrides=overrides)
    return chosen, seeds


def study(root: Path, chosen: list[dict[str, Any]], *, seeds: list[int], overrides: dict[str, Any], cores: int, launch: str = "") -> int:
    """Run everything that is missing or out of date; return the exit status.

    `launch` is a launcher's command line ("accelerate launch --num_processes 2") that starts every training notebook in several processes.
    Whether models, sources and room on the disk can be had is checked first. A lock refuses a second start on the same scale; the marks of a killed run are
    cleared and its unfinished notebooks run again. What failed is listed last.
    """
    _check_access(root, chosen)
    scale, settings = chosen[0]["scale"], [flat["setting"] for flat in chosen]
    results = root / "runs" / scale
    results.mkdir(parents=True, exist_ok=True)
    gpus = len(visible_gpus())
    config = {"scale": scale, "settings": settings, "seeds": seeds, "overrides": overrides, "gpus": gpus, "launch": launch}
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--directory", str(root), "--cores", str(cores),
        "--resources", f"gpu={gpus}", "--rerun-triggers", "mtime", "input", "params", "--rerun-incomplete", "--max-checksum-file-size", "1GB",
        "--keep-going", "--quiet", "rules", "host", "--configfile", str(write_json(results / ".study.json", config)),
    ]  # fmt: skip
    began, clock = time.time(), time.monotonic()
    try:
        with FileLock(results / ".lock").acquire(timeout=0):
            subprocess.run([*command, "--unlock"], cwd=root, env=os.environ | QUIET, capture_output=True, check=False)
            status = _wait(subprocess.Popen(command, cwd=root, env=os.environ | QUIET))
    except Timeout:
        raise StudyError(f"a study at scale {scale!r} is already running in this folder. Wait for it or stop it.") from None
    minutes, seconds = divmod(round(time.monotonic() - clock), 60)
    if status == 0:
        print(f"\nThe study is complete after {minutes} min {seconds} s.\nOpen {results / 'appendix' / 'index.html'} in a browser.")
        return 0
    print(f"\nThe study stopped after {minutes} min {seconds} s. The same command goes on from here.")
    for failure in sorted(file for file in results.rglob("*.error.txt") if file.stat().st_mtime >= began):
        notebook = failure.with_name(failure.name.replace(".error.txt", ".partial.ipynb"))
        print(f"FAILED {notebook.relative_to(root)}\n       {failure.read_text(encoding='utf-8').partition(chr(10))[0]}")
    return status


def _check_access(root: Path, chosen: list[dict[str, Any]]) -> None:
    """Refuse to start what could not be finished: every missing model, source or package, and a full disk, once each."""
    found = [*(fault for flat in chosen for fault in access.faults(root, flat)), access.disk_fault(root)]
    if any(found):
        raise StudyError("nothing was started.\n" + "\n".join(dict.fromkeys(fault for fault in found if fault)))


def _wait(process: subprocess.Popen) -> int:
    """Wait for Snakemake; an interrupt reaches it too, so give it the time to stop its notebooks.

    A request to end, as batch systems send it at the time limit, is handed on as an interrupt.
    """
    former = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        return 130
    finally:
        signal.signal(signal.SIGTERM, former)


def student_copies(root: Path) -> Path:
    """Write the notebooks without their solution cells to `runs/students`; opened there, they run as they stand."""
    folder = root / "runs" / "students"
    for source in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(source, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
        write_whole(folder / source.name, lambda file, content=notebook: nbformat.write(content, file))
    return folder


def main(argv: list[str] | None = None) -> int:
    """`python -m seqdpo_utils <command>`; faults that a message explains end with status 2 and that message alone."""
    parser = argparse.ArgumentParser(prog="python -m seqdpo_utils", description="Sequential DPO as a notebook study.")
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("study", help="run every notebook that is missing or out of date, then render the appendix")
    whole.add_argument("--launch", default="", help="a launcher's command line for the training notebooks, to share each stage among several processes")
    whole.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    ahead = commands.add_parser("plan", help="say what a study would run and need, and what is missing; nothing is downloaded or computed")
    ahead.add_argument("--gpu", default="H100 80GB")
    ahead.add_argument("--tokens", type=int, default=None, help="typical tokens of a pair, its prompt counted once")
    for each in (whole, ahead):
        each.add_argument("--scale", default="classroom")
        each.add_argument("--settings", nargs="+", default=None)
        each.add_argument("--seeds", nargs="+", type=int, default=None, help="in place of the scale's own")
        each.add_argument("--set", nargs="*", default=[], dest="words", metavar="KEY=VALUE", help="parameters that win over the files")
    one = commands.add_parser("notebook", help="run one notebook through papermill")
    one.add_argument("source", type=Path)
    one.add_argument("target", type=Path)
    one.add_argument("--parameters", type=json.loads, required=True, help="the notebook's parameters as a JSON object")
    one.add_argument("--label", default="notebook")
    one.add_argument("--gpu", action="store_true", help="hold a GPU of its own while it runs, where there is one")
    record = commands.add_parser("record", help="write run.json of a finished chain")
    record.add_argument("--parameters", type=json.loads, required=True, help="all parameters of the chain as a JSON object")
    model = commands.add_parser("model", help="build an embedded base model once")
    model.add_argument("name")
    pages = commands.add_parser("appendix", help="render executed notebooks")
    pages.add_argument("--scale", default="classroom")
    speed = commands.add_parser("bench", help="measure scoring and training against TRL and a plain loop")
    speed.add_argument("--rows", default="embedded", help="embedded, or a folder with a copy of Anthropic/hh-rlhf")
    speed.add_argument("--model", default=params.EMBEDDED_MODELS[0])
    speed.add_argument("--pairs", type=int, default=48)
    speed.add_argument("--repeats", type=int, default=2)
    commands.add_parser("classroom", help="write copies of the notebooks without the solutions")
    options = parser.parse_args(argv)
    try:
        return _dispatch(options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _dispatch(options: argparse.Namespace) -> int:
    root = project_root()
    if options.command in ("study", "plan"):
        settings = options.settings or sorted(file.stem for file in (root / "params" / "settings").glob("*.yaml"))
        chosen, seeds = _chosen(root, scale=options.scale, settings=settings, seeds=options.seeds, words=options.words)
    if options.command == "study":
        return study(root, chosen, seeds=seeds, overrides=params.parse_overrides(options.words), cores=options.cores, launch=options.launch)
    if options.command == "plan":
        from seqdpo_utils import plan

        print("\n".join(plan.lines(root, chosen, seeds=seeds, gpu=options.gpu, tokens=options.tokens or plan.TYPICAL_TOKENS)))
    elif options.command == "notebook":
        with one_gpu(root / "runs", visible_gpus() if options.gpu else []):
            run_notebook(options.source, options.target, options.parameters, label=options.label)
    elif options.command == "record":
        flat = options.parameters
        record_chain(RunPaths(root / "runs", flat["scale"], flat["setting"], flat["order"], flat["seed"]), flat, root=root)
    elif options.command == "model":
        from seqdpo_utils.models import prepare_model

        print(f"base model ready: {prepare_model(root, options.name) or options.name}")
    elif options.command == "bench":
        os.environ.update(QUIET)
        from seqdpo_utils.bench import bench, write_bench

        print(
            write_bench(root, bench(root, rows=options.rows, base_model=options.model, pairs=options.pairs, repeats=options.repeats)).read_text(
                encoding="utf-8"
            )
        )
    elif options.command == "classroom":
        print(f"student copies: {student_copies(root)}")
    else:
        from seqdpo_utils.appendix import render_appendix

        print(f"appendix: {render_appendix(root / 'runs' / params.check_word(options.scale, 'scale'))}")
    return 0
