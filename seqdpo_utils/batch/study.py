"""The whole study through Snakemake and the record of a trained chain."""

import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from seqdpo_utils.batch import access
from seqdpo_utils.batch.notebooks import QUIET, visible_gpus
from seqdpo_utils.chains import BASE, Chain
from seqdpo_utils.errors import StudyError
from seqdpo_utils.params import Parameters, varied
from seqdpo_utils.paths import RunPaths, check_trained, read_json, read_report, write_json

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "papermill", "pandas", "altair", "snakemake")
_SNAKEMAKE = """-m snakemake --rerun-triggers mtime input params --rerun-incomplete --keep-going
--quiet rules host --max-checksum-file-size 1GB"""


def study(
    root: Path, settings: list[Parameters], config: dict[str, Any], *, cores: int, target: str = "all"
) -> int:
    """Run everything that is missing or out of date; return the exit status.

    Whether models, sources and room on the disk can be had is checked first. A lock refuses a second start on
    the same scale; the marks of a killed run are cleared and its unfinished notebooks run again. What failed
    is listed last.

    Args:
        root: the project's folder.
        settings: parameters of each setting that has chains.
        config: for the Snakefile: scale, seeds, chains by setting, overrides of the command line.
        cores: for Snakemake.
        target: a rule of the Snakefile; what came of it is told where it is all or fails.

    Raises:
        StudyError: when something cannot be had, or the study is running already.
    """
    from filelock import FileLock, Timeout

    faults = [*(fault for each in settings for fault in access.faults(root, each)), access.disk_fault(root)]
    missing = dict.fromkeys(fault for fault in faults if fault)
    if missing:
        raise StudyError("\n".join(["nothing was started.", *missing]))
    results, gpus = root / "runs" / config["scale"], len(visible_gpus())
    command = [sys.executable, *_SNAKEMAKE.split(), target, "--cores", str(cores)]
    command += ["--resources", f"gpu={gpus}", "--configfile", str(results / ".study.json")]
    began, clock = time.time(), time.monotonic()
    try:
        with FileLock(results / ".lock").acquire(timeout=0):
            write_json(results / ".study.json", config | {"gpus": gpus})
            if any((root / ".snakemake" / "locks").glob("*")):  # of a killed run: no other one is alive
                subprocess.run([*command, "--unlock"], cwd=root, capture_output=True, check=False)
            status = _wait(subprocess.Popen(command, cwd=root, env=os.environ | QUIET))
    except Timeout:
        scale = config["scale"]
        raise StudyError(f"a study at scale {scale!r} is running already. Wait for it or stop it.") from None
    if status or target == "all":
        print(_outcome(results, status, seconds=round(time.monotonic() - clock), began=began))
    return status


def _outcome(results: Path, status: int, *, seconds: int, began: float) -> str:
    """Where to look, or what failed since `began` and why."""
    took = f"{seconds // 60} min {seconds % 60} s"
    if status == 0:
        index = results / "appendix" / "index.html"
        return f"\nThe study is complete after {took}.\nOpen {index} in a browser."
    lines = [f"\nThe study stopped after {took}. The same command goes on from here."]
    for failure in sorted(results.rglob("*.error.txt")):
        if failure.stat().st_mtime >= began:
            notebook = str(failure.relative_to(results.parents[1])).replace(".error.txt", ".partial.ipynb")
            cause = failure.read_text(encoding="utf-8").partition("\n")[0]
            lines += [f"FAILED {notebook}", f"       {cause}"]
    return "\n".join(lines)


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


def record_chain(run: RunPaths, parameters: Parameters, *, root: Path) -> None:
    """Write `run.json` of one trained chain: what its last stage was run with, and on what.

    Raises:
        StudyError: when an adapter of the chain was trained with other parameters.
    """
    chain, given = Chain.parse(run.chain), parameters.model_dump()
    check_trained(run, given, varied=varied(root, chain.last))
    preparation, manifest = read_json(run.preparation), read_json(run.manifest)
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    content = {"parameters": given, "versions": versions, **_commit(root)}
    content |= {key: preparation[key] for key in ("fingerprints", "counts")}
    content |= {key: manifest[key] for key in ("device", "dtype", "adapter_sha256")}
    content |= {"began_with": str(chain.parent or BASE), "stages": [str(stage) for stage in chain.stages]}
    content["scoring"] = {BASE: read_report(run.base_scores), run.chain: read_report(run.scores)}
    write_json(run.run_json, content | {"seconds_per_step": _seconds_per_step(run.history)})


def _seconds_per_step(history: Path) -> float:
    import pyarrow.parquet  # takes part of a second, pandas takes more than one

    return statistics.median(pyarrow.parquet.read_table(history)["seconds"].to_pylist())


def _commit(root: Path) -> dict[str, Any]:
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    words = (["rev-parse", "HEAD"], ["status", "--porcelain"])
    asked = [subprocess.run([git, *each], cwd=root, capture_output=True, text=True) for each in words]
    commit, changes = (each.stdout.strip() for each in asked)
    return {"commit": commit or None, "dirty": bool(changes)}
