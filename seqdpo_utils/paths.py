"""Where every file of the study lies, and how a file is written whole or not at all."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet

REPORT_KEY = "seqdpo.scoring"
"""Under this name a file of per-pair records carries, in its metadata, the report of how they were scored."""


class StudyError(ValueError):
    """A fault that its message explains: what was wrong, where it came from, what to do."""


def project_root() -> Path:
    """The folder that holds `params/` and `notebooks/`, found from the working directory upward.

    Raises:
        StudyError: when neither the working directory nor a parent of it is a copy of the project.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "params" / "scales").is_dir() and (folder / "notebooks").is_dir():
            return folder
    raise StudyError(f"{here} is not inside the project: no folder above it holds params/scales and notebooks.")


@dataclass(frozen=True)
class RunPaths:
    """Files of one chain (scale, setting, order, seed) under `root`.

    The names come from validated parameters (lower-case words), so that none can leave `root`.
    """

    root: Path
    scale: str
    setting: str
    order: str = ""
    seed: int = 0

    @property
    def setting_dir(self) -> Path:
        return self.root / self.scale / self.setting

    @property
    def chain_dir(self) -> Path:
        return self.setting_dir / self.order / f"seed-{self.seed}"

    @property
    def run_json(self) -> Path:
        return self.chain_dir / "run.json"

    @property
    def movement(self) -> Path:
        return self.chain_dir / "movement.parquet"

    @property
    def base_scores(self) -> Path:
        return self.setting_dir / "scores" / "base.parquet"

    @property
    def preparation(self) -> Path:
        """Counts of dropped and truncated rows, and the fingerprints that the chains check."""
        return self.setting_dir / "data" / "preparation.json"

    def data(self, objective: str) -> Path:
        return self.setting_dir / "data" / f"{objective}.parquet"

    def checkpoint(self, stage: int) -> Path:
        return self.chain_dir / "checkpoints" / f"stage{stage}"

    def history(self, stage: int) -> Path:
        return self.chain_dir / "history" / f"stage{stage}.parquet"

    def scores(self, stage: int) -> Path:
        return self.chain_dir / "scores" / f"stage{stage}.parquet"

    def conflict(self, stage: int) -> Path:
        return self.chain_dir / "conflict" / f"stage{stage}.parquet"

    def ledger(self, stage: int) -> Path:
        return self.chain_dir / "ledger" / f"stage{stage}.parquet"

    def table(self, name: str) -> Path:
        return self.chain_dir / "tables" / f"{name}.parquet"


def process_number() -> int:
    """Which of the processes that train one stage together this is, as the launcher says; 0 writes the files, and stands alone without a launcher."""
    return int(os.environ.get("RANK", "0"))


def wait_for_all() -> None:
    """Let every process of a stage come to this point, so that what one wrote lies there for all."""
    torch = sys.modules.get("torch")  # not imported for this: without it there is nobody to wait for
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Call `write` with a temporary neighbour of `path`, then rename it into place.

    A process killed half-way leaves `path` as it was. Of several processes the first writes and the others wait.

    Args:
        path: the file to appear.
        write: gets the temporary path and must create that file.

    Raises:
        OSError: what `write` or the disk raised; the temporary file is removed.
    """
    if process_number():
        wait_for_all()
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()
    wait_for_all()
    return path


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write `table` to Parquet, whole or not at all."""
    return write_whole(path, lambda beside: table.to_parquet(beside, index=False))


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write `content` as indented JSON with sorted keys, whole or not at all; NaN is refused."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    return write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_table(path: Path) -> pd.DataFrame:
    """Read a Parquet table that an earlier notebook wrote.

    Raises:
        StudyError: when the file is missing or cannot be read, with the remedy.
    """
    if not path.is_file():
        raise StudyError(f"{path} is missing. Run the notebooks before this one, or all of them with `make study`.")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read as Parquet ({error}). Delete it and run `make study` again.") from error


def read_scores(paths: RunPaths, *, stages: int) -> pd.DataFrame:
    """Per-pair records of the base and of every stage of a chain, one below the other."""
    files = [paths.base_scores, *(paths.scores(k) for k in range(1, stages + 1))]
    return pd.concat([read_table(file) for file in files], ignore_index=True)


def read_report(records: Path) -> dict[str, Any]:
    """What was noted when a file of records was written: pairs, seconds, which pass, rounding.

    Raises:
        StudyError: when the file was not written by the study's scorer.
    """
    metadata = pyarrow.parquet.read_metadata(records).metadata or {}
    if REPORT_KEY.encode() not in metadata:
        raise StudyError(f"{records} carries no report of its scoring. Delete it and run `make study` again.")
    return json.loads(metadata[REPORT_KEY.encode()])


def check_trained(paths: RunPaths, *, stages: int, parameters: dict[str, Any]) -> None:
    """Refuse adapters that were trained with other parameters than those at hand.

    Args:
        paths: the chain.
        stages: how many stages to check, from the first.
        parameters: those that the manifest also names are compared.

    Raises:
        StudyError: naming stage, parameter and both values.
    """
    for stage in range(1, stages + 1):
        folder = paths.checkpoint(stage)
        trained = read_json(folder / "manifest.json")["parameters"]
        for key in sorted(trained.keys() & parameters.keys()):
            if trained[key] != parameters[key]:
                raise StudyError(
                    f"{folder} was trained with {key} = {trained[key]!r}, here it is {parameters[key]!r}. "
                    f"Delete {paths.chain_dir} and run `make study` again, or give the trial a seed of its own."
                )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that an earlier notebook wrote.

    Raises:
        StudyError: when the file is missing or damaged, with the remedy.
    """
    if not path.is_file():
        raise StudyError(f"{path} is missing. Run the notebooks before this one, or all of them with `make study`.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StudyError(f"{path} is not JSON ({error}). Delete it and run `make study` again.") from error
