"""Where every file of the study lies, and how a file is written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqdpo_utils.chains import Chain
from seqdpo_utils.errors import StudyError

if TYPE_CHECKING:
    import pandas as pd  # half a second that the command line can do without

REPORT_KEY = "seqdpo.scoring"
"""Under this name a file of per-pair records carries, in its metadata, the report of how they were scored."""
_REMEDY = "Run the notebooks before this one, or all of them with `make study`."


def project_root() -> Path:
    """The folder that holds `params/` and `notebooks/`, found from the working directory upward.

    Raises:
        StudyError: when neither the working directory nor a parent of it is a copy of the project.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "params" / "scales").is_dir() and (folder / "notebooks").is_dir():
            return folder
    raise StudyError(
        f"{here} is not inside the project: no folder above it holds params/scales and notebooks."
    )


@dataclass(frozen=True)
class RunPaths:
    """Files of one setting, and of one chain and seed of it, under `root` (the folder `runs`).

    What the LAST stage of the chain made lies in `node`; what earlier stages made lies in the nodes of the
    chain's beginnings. The names come from checked parameters, so that none can leave `root`; in the
    Snakefile they are wildcards.
    """

    root: Path
    scale: str
    setting: str
    chain: str = ""
    seed: int | str = 0

    @property
    def folder(self) -> Path:
        return self.root / self.scale / self.setting

    @property
    def base_scores(self) -> Path:
        return self.folder / "scores" / "base.parquet"

    @property
    def preparation(self) -> Path:
        """Counts of dropped and shortened rows, and the fingerprints that the stages check."""
        return self.folder / "data" / "preparation.json"

    def data(self, objective: str) -> Path:
        return self.folder / "data" / f"{objective}.parquet"

    @property
    def lists(self) -> Path:
        """Rated lists on the training prompts, where the layout has ratings of several answers."""
        return self.folder / "lists" / "answers.parquet"

    @property
    def list_pairs(self) -> Path:
        """The same lists cut into pairs, the form in which they are scored."""
        return self.folder / "lists" / "by_twos.parquet"

    @property
    def list_scores(self) -> Path:
        """The base model's records of the lists, cut into pairs."""
        return self.folder / "lists" / "base.parquet"

    @property
    def lambdas(self) -> Path:
        """Lambda of every list of a listwise stage, with its `step`."""
        return self.node / "lambdas.parquet"

    @property
    def schedule(self) -> Path:
        """What the steps of a learned schedule did to held-out margins; empty for the other kinds."""
        return self.node / "schedule.parquet"

    @property
    def start(self) -> Path:
        """The adapter before training, which every chain of this seed begins with."""
        return self.root / self.scale / "start" / f"seed-{self.seed}" / "adapter"

    @property
    def node(self) -> Path:
        return self.folder / self.chain / f"seed-{self.seed}"

    @property
    def adapter(self) -> Path:
        return self.node / "adapter"

    @property
    def manifest(self) -> Path:
        """Written with the adapter: hash of its weights and the parameters that shaped them."""
        return self.adapter / "manifest.json"

    @property
    def history(self) -> Path:
        return self.node / "history.parquet"

    @property
    def scores(self) -> Path:
        return self.node / "scores.parquet"

    @property
    def kl(self) -> Path:
        return self.node / "kl.parquet"

    @property
    def conflict(self) -> Path:
        return self.node / "conflict.parquet"

    @property
    def ledger(self) -> Path:
        return self.node / "ledger.parquet"

    @property
    def ledger_pairs(self) -> Path:
        """The ledger pair by pair, so that it has intervals."""
        return self.node / "ledger_pairs.parquet"

    @property
    def within(self) -> Path:
        """Per-pair records at adapters kept within the stage, with their `step`."""
        return self.node / "within.parquet"

    def kept(self, step: int | str) -> Path:
        """The adapter kept after so many optimiser steps of the stage."""
        return self.node / "kept" / f"step-{step}"

    @property
    def movement(self) -> Path:
        return self.node / "movement.parquet"

    @property
    def run_json(self) -> Path:
        return self.node / "run.json"

    def table(self, name: str) -> Path:
        return self.node / "tables" / f"{name}.parquet"

    def page(self, name: str) -> Path:
        """An executed notebook of the chain, or of the setting where there is no chain."""
        return (self.node if self.chain else self.folder) / "notebooks" / f"{name}.ipynb"

    def summary(self, name: str) -> Path:
        return self.root / self.scale / "summary" / f"{name}.parquet"

    def at(self, chain: str | Chain) -> RunPaths:
        """The same setting and seed, another chain."""
        return replace(self, chain=str(chain))

    @property
    def lineage(self) -> list[RunPaths]:
        """The nodes of the chain's beginnings, the shortest first, its own last."""
        return [self.at(beginning) for beginning in Chain.parse(self.chain).lineage]

    @property
    def previous(self) -> Path:
        """The adapter that the last stage began with: of the stage before, or the start."""
        parent = Chain.parse(self.chain).parent
        return self.at(parent).adapter if parent else self.start


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Call `write` with a temporary neighbour of `path`, then rename it into place.

    A process killed half-way leaves `path` as it was.

    Args:
        path: the file to appear.
        write: gets the temporary path and must create that file.

    Raises:
        OSError: what `write` or the disk raised; the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()
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
    import pandas as pd

    if not path.is_file():
        raise StudyError(f"{path} is missing. {_REMEDY}")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path} cannot be read as Parquet ({error}). Delete it and run `make study` again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that an earlier notebook wrote.

    Raises:
        StudyError: when the file is missing or damaged, with the remedy.
    """
    if not path.is_file():
        raise StudyError(f"{path} is missing. {_REMEDY}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StudyError(f"{path} is not JSON ({error}). Delete it and run `make study` again.") from error


def read_chain(run: RunPaths, name: str) -> pd.DataFrame:
    """One table (named as the attribute: "scores", "ledger", ...) of every stage, in order of training."""
    import pandas as pd

    tables = [read_table(getattr(node, name)) for node in run.lineage]
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else tables[-1]


def read_scores(run: RunPaths) -> pd.DataFrame:
    """Per-pair records of the base and of every stage of a chain, one below the other."""
    import pandas as pd

    return pd.concat([read_table(run.base_scores), read_chain(run, "scores")], ignore_index=True)


def read_report(records: Path) -> dict[str, Any]:
    """What was noted when a file of records was written: pairs, seconds, which pass, rounding.

    Raises:
        StudyError: when the file was not written by the study's scorer.
    """
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(records).metadata or {}
    if REPORT_KEY.encode() not in metadata:
        raise StudyError(f"{records} carries no report of its scoring. Delete it and run `make study` again.")
    return json.loads(metadata[REPORT_KEY.encode()])


def check_trained(run: RunPaths, given: dict[str, Any], *, varied: Collection[str] = ()) -> None:
    """Refuse adapters that were trained with other parameters than those at hand.

    Compared is what both know, except for what a stage's own variants changed.

    Args:
        run: the chain; every stage of it is checked.
        given: parameters by name, perhaps of a notebook that declares only some.
        varied: parameters that the variants of the stage at hand change.

    Raises:
        StudyError: naming stage, parameter and both values.
    """
    for node in run.lineage:
        manifest = read_json(node.manifest)
        for key, trained in sorted(manifest["parameters"].items()):
            own = key in varied or key in manifest["varied"]
            if key in given and not own and trained != given[key]:
                raise StudyError(
                    f"{node.adapter} was trained with {key} = {trained!r}, here it is {given[key]!r}. "
                    f"Delete {node.node} and run `make study` again, or give the trial a seed of its own."
                )
