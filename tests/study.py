"""A copy of the project in a folder of its own, and studies run in it as a user would run them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

from seqdpo_utils import models
from seqdpo_utils.paths import REPORT_KEY

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def copy_project(folder: Path) -> Path:
    """The tracked parts of the project, with links to the models that were built already."""
    models.prepare_model(ROOT, models.TINY)
    for name in ("notebooks", "params", "seqdpo_utils"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "models").mkdir()
    for name in (models.TINY, models.SMOLLM2, models.GGUF_FOLDER):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | ENVIRONMENT | {"PYTHONPATH": str(folder), "PATH": path}


def study_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "seqdpo_utils", "study", "--scale", "smoke", *words]


def _run(folder: Path, command: list[str]) -> subprocess.CompletedProcess:
    around = {"cwd": folder, "env": environment(folder)}
    return subprocess.run(command, **around, capture_output=True, text=True, check=False)


def run_study(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return _run(folder, study_command(*words))


def snakemake(folder: Path, *words: str, **config: object) -> subprocess.CompletedProcess:
    """Snakemake alone, with the configuration that `study` would write."""
    file = folder / "config.json"
    file.write_text(json.dumps({"scale": "smoke", "seeds": [0], "overrides": {}} | config))
    # the configuration last: snakemake takes every word after --configfile for a file
    command = [sys.executable, "-m", "snakemake", *words, "--cores", "2", "--configfile", str(file)]
    return _run(folder, command)


STUB = """
import json, shutil
from pathlib import Path
out = Path("runs") / scale / setting
node = out / chain / f"seed-{seed}"
for source, targets in json.loads(Path("canned/outputs.json").read_text())[NUMBER].items():
    for target in targets:
        place = (out if target.startswith(("scores/base", "data/")) else node) / target
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path("canned") / source, place)
"""
OUTPUTS = {
    "00": {},
    "01": {"records.parquet": ["scores/base.parquet"], "preparation.json": ["data/preparation.json"]},
    "02": {"records.parquet": ["scores.parquet"], "manifest.json": ["adapter/manifest.json"],
           "table.parquet": [f"{name}.parquet" for name in (
               "history", "kl", "conflict", "ledger", "ledger_pairs", "within")]},
    "04": {"table.parquet": ["tables/stage_matrix.parquet", "tables/transfer.parquet"]},
    "05": {"table.parquet": ["tables/pair_change.parquet", "tables/quartiles.parquet"]},
    "06": {"table.parquet": ["movement.parquet", *(f"tables/{name}.parquet" for name in (
           "subspace", "ledger", "displacement", "log_probabilities", "kl", "length"))]},
    "07": {}, "08": {}, "09": {}, "10": {}, "11": {}, "12": {},
}  # fmt: skip


def stub_project(folder: Path) -> Path:
    """The project with notebooks that copy finished files into place: only the graph is at work."""
    copy_project(folder)
    (folder / "models" / "tiny-random-llama").unlink()
    for name in ("manifest.json", "config.json"):
        (folder / models.TINY).mkdir(exist_ok=True)
        (folder / models.TINY / name).write_text("{}")
    canned = folder / "canned"
    canned.mkdir()
    manifest = {"adapter_sha256": "0", "parameters": {}, "varied": [], "device": "cpu", "dtype": "float32"}
    (canned / "manifest.json").write_text(json.dumps(manifest))
    (canned / "preparation.json").write_text(json.dumps({"counts": {}, "fingerprints": {}, "parameters": {}}))
    (canned / "outputs.json").write_text(json.dumps(OUTPUTS | {"03": OUTPUTS["02"]}))
    pd.DataFrame({"seconds": [1.0]}).to_parquet(canned / "table.parquet")
    import pyarrow as pa
    import pyarrow.parquet

    with pa.parquet.ParquetWriter(canned / "records.parquet", pa.schema([("x", pa.int64())])) as writer:
        writer.add_key_value_metadata({REPORT_KEY: "{}"})
    for file in (folder / "notebooks").glob("*.ipynb"):
        number = file.name[:2]
        cells = nbformat.read(file, as_version=4).cells
        declared = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
        code = 'chain, seed = "", 0' if number == "01" else "pass"
        source = "pass" if not (OUTPUTS | {"03": 1})[number] else STUB.replace("NUMBER", repr(number))
        made = new_notebook(cells=[declared, new_code_cell(code), new_code_cell(source)])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "p", "language": "python"}
        nbformat.write(made, file)
    # the start adapter needs a real model; here any file will do
    cli = folder / "seqdpo_utils" / "batch" / "cli.py"
    words = "    from seqdpo_utils.models import start_adapter\n"
    assert words in cli.read_text()
    stub = (
        "    from seqdpo_utils.paths import write_json\n\n    def start_adapter(root, parameters, folder):\n"
    )
    stub += "        write_json(folder / 'manifest.json', {})\n\n"
    cli.write_text(cli.read_text().replace(words, stub))
    return folder
