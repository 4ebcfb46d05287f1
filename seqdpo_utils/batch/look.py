"""What a person wants to know of a setting's pairs before paying for training."""

import textwrap
from pathlib import Path
from typing import Any

import nbformat

from seqdpo_utils.batch import plan
from seqdpo_utils.params import Parameters
from seqdpo_utils.paths import RunPaths, read_table

TAG = "look"
"""Cells of notebook 01 whose sentences are repeated here."""


def text(root: Path, parameters: Parameters, config: dict[str, Any]) -> str:
    """What notebook 01 found of a setting, and what a study of the pairs that there are would decide.

    Args:
        root: the project's folder.
        parameters: of the setting, whose notebook 01 has run.
        config: as `study` takes it: scale, chains by setting, seeds.
    """
    run = RunPaths(root / "runs", config["scale"], parameters.setting)
    page = run.page("01_data_preparation")
    told = [cell for cell in nbformat.read(page, as_version=4).cells if TAG in cell.metadata.get("tags", [])]
    said = [output.data["text/markdown"].replace("**", "") for cell in told for output in cell.outputs]
    tables = [read_table(run.data(name)) for name in parameters.objectives]
    parts = {split: [table[table["split"] == split] for table in tables] for split in ("train", "eval")}
    there = {"train_pairs": min(map(len, parts["train"]))}
    there["eval_pairs"] = min(part["prompt_id"].nunique() for part in parts["eval"])
    found = parameters.model_copy(update=there)
    stages = plan.stages_of(root, found, config["chains"][parameters.setting])
    seeds = len(config["seeds"])
    measured, decided = plan.decides(root, [found], stages, seeds=seeds, scale=config["scale"])
    size = f"{there['train_pairs']} training pairs, {there['eval_pairs']} held-out prompts, {seeds} seed(s)"
    lines = [f"{parameters.setting}: {parameters.relationship}", *"\n".join(said).splitlines()]
    lines += [f"What {size} of an objective decide, by the spreads of {measured}:", *decided]
    lines += [f"More in {page.relative_to(root)}; `make plan` says what training would take."]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines)
