"""One notebook: what it is handed, what its results depend on, how it runs, which GPU it holds."""

import ast
import getpass
import itertools
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import project_root

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
BY_HAND = "by-hand"
"""Tag of cells that wait for a person: stubs of exercises, and solutions that train."""
_DIED = """the kernel died, most often for want of memory (close other programs, lower token_budget or \
pairs_per_device), else stopped from outside"""
_BAR = re.compile(r"\d+%\|.*\[.+<.+\]")
_IMPORT = re.compile(r"^\s*from seqdpo_utils(?:\.([\w.]+))? import (\([^)]*\)|.*)", re.MULTILINE)


@cache
def _code_cells(notebook: Path) -> list[tuple[str, list[str]]]:
    """Source and tags of each code cell, as plain JSON: nbformat alone takes a second to import."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]


def notebook_parameters(notebook: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The part of `values` that a notebook's parameters cell declares.

    Raises:
        StudyError: when no cell has the tag `parameters`, or a name is no parameter of the study.
    """
    sources = [source for source, tags in _code_cells(notebook) if "parameters" in tags]
    if not sources:
        raise StudyError(f"{notebook.name} has no cell tagged 'parameters': nothing could be handed to it.")
    lines = [line for line in ast.parse(sources[0]).body if isinstance(line, ast.Assign)]
    names = [target.id for line in lines for target in line.targets if isinstance(target, ast.Name)]
    unknown, known = [name for name in names if name not in values], ", ".join(sorted(values))
    if unknown:
        declares = f"{notebook.name} declares {unknown[0]!r}"
        raise StudyError(f"{declares}, which no parameter file sets; known: {known}.")
    return {name: values[name] for name in names}


def helper_files(root: Path, notebook: Path) -> list[str]:
    """Modules of `seqdpo_utils` that a notebook imports, directly or through others.

    Its results depend on these; what runs the notebooks (`seqdpo_utils/batch`) is left out.
    """
    waiting, found = [name for source, _ in _code_cells(notebook) for name in _imported(source)], set()
    while waiting:
        file = root / "seqdpo_utils" / f"{waiting.pop()}.py"
        if file.is_file() and file not in found:
            found.add(file)
            waiting += _imported(file.read_text(encoding="utf-8"))
    return sorted(str(file.relative_to(root)) for file in found)


@cache
def _imported(source: str) -> list[str]:
    imports = _IMPORT.findall(source)
    return [name for module, names in imports for name in ([module] if module else re.findall(r"\w+", names))]


def visible_gpus() -> list[str]:
    """Names of the GPUs at hand: those of CUDA_VISIBLE_DEVICES, else every NVIDIA device by its number."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return sorted((file.name.removeprefix("nvidia") for file in Path("/dev").glob("nvidia[0-9]*")), key=int)


def lock_folder() -> Path:
    """Where this user's GPU locks lie: on the host itself, as each node of a cluster has a GPU 0 of its own.

    Two jobs that a scheduler puts on one node may each see their GPU as 0, so every job has its own folder.
    """
    user, job = getattr(os, "getuid", getpass.getuser)(), os.environ.get("SLURM_JOB_ID", "alone")
    return Path(tempfile.gettempdir()) / f"seqdpo-{user}-{job}"


@contextmanager
def one_gpu(gpus: list[str], *, folder: Path) -> Iterator[str | None]:
    """Hold one of `gpus` for a notebook, so that several chains run side by side, each on a GPU of its own.

    A lock file in `folder` stands for a GPU; it is free again when the process ends, however it ends. Waits
    while all are taken.

    Yields:
        The GPU's name for CUDA_VISIBLE_DEVICES; None when there is none.
    """
    from filelock import FileLock, Timeout

    for gpu in itertools.cycle(gpus):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"gpu-{gpu.replace('/', '-')}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            continue
        try:
            yield gpu
        finally:
            lock.release()
        return
    yield None


class _Progress(logging.Handler):
    """Passes a notebook's progress bars on to the terminal, with the notebook's name before them."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in record.getMessage().replace("\r", "\n").splitlines():
            if _BAR.search(line):
                _say(self.name, line.strip())


def _say(label: str, text: str) -> None:
    print(f"  {label} | {text}", file=sys.stderr, flush=True)


def run_notebook(source: Path, target: Path, parameters: dict[str, Any], *, label: str) -> None:
    """Execute a notebook but for cells tagged `BY_HAND`; `target` appears only when every other cell ran.

    While it runs, and after a failure, the notebook lies beside it as `<name>.partial.ipynb`; a failure also
    leaves `<name>.error.txt`, whose first line names the cause.

    Raises:
        StudyError: when a cell failed or the kernel died, with the path of what was kept.
    """
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    partial, failure = target.with_suffix(".partial.ipynb"), target.with_suffix(".error.txt")
    target.parent.mkdir(parents=True, exist_ok=True)
    failure.unlink(missing_ok=True)
    logger, progress = logging.getLogger("papermill"), _Progress()
    progress.set_name(label)
    logger.handlers, logger.propagate = [progress], False
    logger.setLevel(logging.INFO)
    os.environ.update(QUIET)
    _say(label, "started")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nb") as private:
        # kernels that start side by side race for TCP ports, so each talks through files of its own
        transport = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{private}/k"}
        config = Config(KernelManager=transport)
        how = {"log_output": True, "coalesce_streams": True, "autosave_cell_every": 30, "progress_bar": False}
        how |= {"cwd": str(project_root()), "kernel_name": "python3", "config": config}
        how["skip_cells_with_tag"] = BY_HAND
        try:
            papermill.execute_notebook(str(source), str(partial), parameters=parameters, **how)
        except (PapermillExecutionError, DeadKernelError, NoSuchKernel, OSError) as error:
            kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
            cause = _DIED if isinstance(error, DeadKernelError) else f"{kind}: {text}"
            failure.write_text(f"{cause}\n{error}\n", encoding="utf-8")
            raise StudyError(f"{label} failed: {cause}\nThe notebook is kept as {partial}") from error
    os.replace(partial, target)
    _say(label, f"done in {time.monotonic() - began:.0f} s")
