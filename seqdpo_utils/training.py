"""One DPO stage after another on the same adapter, with the base model as the reference of each.

Loss, optimiser, schedule and logging are TRL's `DPOTrainer`, by way of `trainer.ConflictAwareDPOTrainer`. Here a stage is put together from the run's
files, its reference is proven before the first step, and its adapter is saved.
"""

import copy
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from seqdpo_utils.data import data_fingerprint, encode_table
from seqdpo_utils.encoding import EncodedPair, tokenizer_fingerprint
from seqdpo_utils.models import base_fingerprint, compute_device, hash_files, lora_config
from seqdpo_utils.paths import RunPaths, StudyError, process_number, read_json, read_table, wait_for_all, write_whole
from seqdpo_utils.recording import records_of
from seqdpo_utils.scoring import CHECKED_ROWS, PromptRow, distrust, rounding, sequence_logp
from seqdpo_utils.trainer import ConflictAwareDPOTrainer, share_prompts

logging.getLogger("trl").setLevel(logging.ERROR)

REFERENCE_CHECKS = 4
"""Pairs whose reference is recomputed before the first step."""
CHECKPOINT_SECONDS = 60.0
"""Least time between two checkpoints of an unfinished stage."""
_MEASURED = "measured.json"  # written last, so a checkpoint that has it is whole
_SHAPING = (
    "order", "seed", "base_model", "base_model_revision", "dtype", "quantization", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "learning_rate", "beta", "epochs",
    "pairs_per_step", "pairs_per_device", "warmup_ratio", "max_grad_norm",
)  # fmt: skip


def fingerprints(root: Path, tables: dict[str, pd.DataFrame], tokenizer: Any, *, parameters: dict[str, Any]) -> dict[str, str]:
    """What cached base sums depend on: data, weights, tokens and dtype (with the quantization, where there is one)."""
    return {
        "data": data_fingerprint(tables),
        "base_model": base_fingerprint(root, parameters["base_model"], revision=parameters["base_model_revision"]),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dtype": " over ".join(name for name in (parameters["dtype"], parameters["quantization"]) if name),
    }


def check_fingerprints(paths: RunPaths, now: dict[str, str]) -> None:
    """Refuse base sums that were computed for other data, weights, tokens or dtype.

    Raises:
        StudyError: naming what differs.
    """
    then = read_json(paths.preparation)["fingerprints"]
    differing = [name for name in now if then.get(name) != now[name]]
    if differing:
        name = differing[0]
        raise StudyError(f"{paths.base_scores} is stale: {name} was {then.get(name)}, now {now[name]}. Run 01_data_preparation again.")


def stage_rows(paths: RunPaths, tokenizer: Any, *, objective: str) -> tuple[Dataset, pd.DataFrame]:
    """Training pairs of one objective with the base model's sums, ready for a trainer, and these sums as a table."""
    pairs = read_table(paths.data(objective)).query("split == 'train'")
    base_scores = records_of(read_table(paths.base_scores), pairs)
    return training_rows(encode_table(tokenizer, pairs), base_scores), base_scores


def training_rows(encoded: Sequence[EncodedPair], base_scores: pd.DataFrame) -> Dataset:
    """The data set of a stage: token ids, and the base model's sums as the reference.

    Args:
        encoded: pairs in the order of `base_scores`.
        base_scores: `chosen_logp` and `rejected_logp` of the base model for the same pairs.

    Raises:
        StudyError: when there is no pair, or pairs and sums are not equally many, or token counts differ.
    """
    if not encoded:
        raise StudyError("the training split is empty: lower eval_pairs or give a larger source.")
    counts = list(zip(base_scores["chosen_tokens"], base_scores["rejected_tokens"], strict=True))
    if counts != [(len(pair.chosen), len(pair.rejected)) for pair in encoded]:
        raise StudyError("the cached base scores belong to other tokens than these pairs: delete scores/base.parquet and run again.")
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt for pair in encoded],
            "chosen_ids": [pair.chosen for pair in encoded],
            "rejected_ids": [pair.rejected for pair in encoded],
            "ref_chosen_logps": base_scores["chosen_logp"].tolist(),
            "ref_rejected_logps": base_scores["rejected_logp"].tolist(),
        }
    )


def dpo_config(parameters: dict[str, Any], *, pairs: int, output_dir: Path) -> DPOConfig:
    """TRL's configuration for a stage of `pairs` pairs; each stage has a fresh optimiser and schedule.

    Warm-up steps are rounded down: the first of them has learning rate zero, which a stage of few steps cannot spare.
    Several processes share the pairs of a step.

    Raises:
        StudyError: when the processes cannot share them evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if parameters["pairs_per_step"] % (parameters["pairs_per_device"] * processes):
        raise StudyError(
            f"pairs_per_step = {parameters['pairs_per_step']} is no multiple of pairs_per_device = {parameters['pairs_per_device']} "
            f"times {processes} processes: change one of them, or launch another number of processes."
        )
    on_cpu = compute_device().type == "cpu"
    steps = math.ceil(pairs / parameters["pairs_per_step"]) * parameters["epochs"]
    return DPOConfig(
        output_dir=str(output_dir),
        beta=parameters["beta"],
        learning_rate=parameters["learning_rate"],
        num_train_epochs=parameters["epochs"],
        per_device_train_batch_size=parameters["pairs_per_device"],
        gradient_accumulation_steps=parameters["pairs_per_step"] // (parameters["pairs_per_device"] * processes),
        lr_scheduler_type="cosine",
        warmup_steps=int(parameters["warmup_ratio"] * steps),
        max_grad_norm=parameters["max_grad_norm"],
        max_length=None,  # rows that do not fit were dropped and counted when the data was prepared
        activation_checkpointing=parameters["activation_checkpointing"],
        precompute_ref_log_probs=True,
        disable_dropout=parameters["lora_dropout"] == 0,  # TRL's own default would undo lora_dropout without a word
        ddp_find_unused_parameters=False,  # every adapter weight is used in every pass
        seed=parameters["seed"],
        use_cpu=on_cpu,
        bf16=not on_cpu and parameters["dtype"] == "bfloat16",
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        save_strategy="no",  # `_Checkpoints` says when
        save_total_limit=2,  # the older one goes when the newer is whole
        report_to="none",
        ddp_timeout=24 * 3600,  # of several processes the first scores while the others wait
        disable_tqdm=True,
    )


class _Progress(TrainerCallback):
    """One line with step, loss and time left, at most every five seconds; keeps the seconds of every step."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, unit="step", mininterval=5)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and self.bar is not None:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.monotonic() - self.began)
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class _Checkpoints(TrainerCallback):
    """Has TRL save a checkpoint after the last step, and before it at points of the ledger, not too often; adds what was measured so far."""

    def __init__(self, trainer: ConflictAwareDPOTrainer, progress: _Progress) -> None:
        self.trainer, self.progress = trainer, progress
        self.saved = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = self.trainer.at_ledger_point and time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        due = self.trainer.accelerator.reduce(torch.tensor(float(due), device=self.trainer.accelerator.device)).item() > 0  # clocks differ between processes
        control.should_save = due or control.should_training_stop

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tokens = self.trainer._total_train_tokens  # which TRL itself would count anew
        measured = {"conflict": self.trainer.conflict_records, "ledger": self.trainer.ledger_records, "seconds": self.progress.seconds, "tokens": tokens}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_whole(folder / _MEASURED, lambda beside: beside.write_text(json.dumps(measured), encoding="utf-8"))
        self.saved = time.monotonic()

    def restore(self, folder: Path) -> None:
        """Take up what was measured before the checkpoint in `folder`."""
        measured = read_json(folder / _MEASURED)
        self.trainer.conflict_records, self.trainer.ledger_records = measured["conflict"], measured["ledger"]
        self.progress.seconds, self.trainer._total_train_tokens = measured["seconds"], measured["tokens"]


def unfinished_stage(paths: RunPaths, stage: int, *, parameters: dict[str, Any], fingerprints: dict[str, str]) -> Path:
    """Folder for the checkpoints of a stage that is under way.

    Its name is a hash of all that shapes the stage: parameters, data, base model, adapter of the stage before, and this package's code. So a run
    that was killed finds its checkpoints, and one that differs in anything does not; what it finds of others it deletes.

    Args:
        paths: the chain.
        stage: number of the stage, from 1.
        parameters: those of the notebook.
        fingerprints: from `fingerprints`.
    """
    code = hash_files(sorted(Path(__file__).parent.glob("*.py")))
    previous = read_json(paths.checkpoint(stage - 1) / "manifest.json")["adapter_sha256"] if stage > 1 else None
    shaping = json.dumps([stage, parameters, fingerprints, previous, code], sort_keys=True)
    folder = paths.checkpoint(stage).with_name(f".stage{stage}-unfinished") / hashlib.sha256(shaping.encode()).hexdigest()[:16]
    if not process_number():
        for other in folder.parent.glob("*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    return folder


def stage_done(folder: Path) -> None:
    """Delete the folder from `unfinished_stage` once all that the stage writes lies in its place."""
    wait_for_all()
    if not process_number():
        shutil.rmtree(folder.parent, ignore_errors=True)


def train(trainer: ConflictAwareDPOTrainer) -> None:
    """Train to the end of the stage, from the newest whole checkpoint where a killed run of the same stage left one.

    Weights, log and tables are then those of an undisturbed run.
    """
    whole = sorted(Path(trainer.args.output_dir).glob(f"checkpoint-*/{_MEASURED}"), key=lambda file: int(file.parent.name.removeprefix("checkpoint-")))
    if whole:
        next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, _Checkpoints)).restore(whole[-1].parent)
    trainer.train(resume_from_checkpoint=str(whole[-1].parent) if whole else None)


def stage_trainer(
    base: PreTrainedModel,
    tokenizer: Any,
    rows: Dataset,
    *,
    parameters: dict[str, Any],
    output_dir: Path,
    stage: int = 1,
    previous: Path | None = None,
    earlier: dict[str, Dataset] | None = None,
) -> ConflictAwareDPOTrainer:
    """A trainer for one stage whose reference is the base model.

    The adapter is made on the bare base model and the weights of the stage before are loaded into it AFTER the trainer exists:
    handed a trained adapter, TRL 1.16 would silently take a copy of it as the reference.

    Args:
        base: the base model, bare; it is wrapped in place, so load it anew for another stage.
        tokenizer: for padding.
        rows: the stage's pairs, from `training_rows`.
        parameters: the flat parameters of the chain.
        output_dir: where TRL may write, and where `train` looks for checkpoints.
        stage: number of the stage, from 1.
        previous: adapter folder of the stage before; None for the first stage.
        earlier: data sets of earlier objectives for conflict and ledger, in the order of training.

    Raises:
        StudyError: when `previous` does not hold exactly this adapter, or an earlier objective has too few pairs to measure.
    """
    trainer = ConflictAwareDPOTrainer(
        base,
        args=dpo_config(parameters, pairs=len(rows), output_dir=output_dir),
        train_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),  # TRL gives a tokenizer without a pad token an existing token as one
        peft_config=lora_config(parameters),
        earlier=earlier,
        conflict_every=parameters["conflict_every"] if earlier else 0,
        conflict_pairs=parameters["conflict_pairs"] if earlier else 2,
        ledger_every=parameters["ledger_every"] if earlier else 1,
        probe_pairs=parameters["probe_pairs"] if earlier else 0,
        stage=stage,
    )
    progress = _Progress(f"stage {stage}")
    trainer.add_callback(progress)  # after the measuring callback, whose time belongs to the step
    trainer.add_callback(_Checkpoints(trainer, progress))
    trainer.remove_callback(PrinterCallback)
    if previous is not None:
        load_adapter(trainer.model, previous)
    first = [PromptRow(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in itertools.islice(rows, CHECKED_ROWS)]
    if distrust(trainer.model, first) is None:
        share_prompts(trainer.model.get_base_model())
    return trainer


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load a saved adapter's weights into the adapter of `model`.

    Raises:
        StudyError: when the file is missing or its weights are not exactly those of the adapter.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise StudyError(f"{file} is missing: run the stage before this one.")
    result = set_peft_model_state_dict(model, load_file(file))
    lacking = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or lacking:
        raise StudyError(f"{file} does not fit the adapter (for example {[*result.unexpected_keys, *lacking][0]}): check lora_rank and lora_targets.")


def prove_reference(trainer: DPOTrainer, base_scores: pd.DataFrame) -> pd.DataFrame:
    """Prove before the first step that the reference is the base model, on a few pairs of the training data.

    Three sums are compared for each completion: the reference that the trainer will use (its columns, or what
    TRL computes on the fly), the model under the trainer with its adapter off, computed here one sequence at a time, and the cached
    sum of the base model.

    Args:
        trainer: ready to train; its data set holds `prompt_ids`, `chosen_ids`, `rejected_ids`.
        base_scores: `chosen_logp`, `rejected_logp` of the base model, in the order of the data set.

    Returns:
        One row a completion: `completion`, `trainer_reference`, `adapter_off`, `cached_base`, in nats.

    Raises:
        StudyError: when two of them differ by more than the rounding of the dtype, naming both.
    """
    rows = trainer.train_dataset.select(range(min(REFERENCE_CHECKS, len(trainer.train_dataset))))
    trainer.model.eval()  # every training step turns it back
    used = _references_in_use(trainer, rows)
    checks = []
    with trainer.model.disable_adapter():
        for i, row in enumerate(rows):
            for k, side in enumerate(("chosen", "rejected")):
                live = sequence_logp(trainer.model, row["prompt_ids"], row[f"{side}_ids"])
                cached = float(base_scores[f"{side}_logp"].iloc[i])
                checks.append({"completion": f"{side} {i}", "trainer_reference": used[i][k], "adapter_off": live, "cached_base": cached})
    table = pd.DataFrame(checks)
    tolerance = rounding(trainer.model.dtype)
    for name, meaning in (
        ("cached_base", "the cached base scores are stale, or a merged adapter changed the weights under the adapter"),
        ("trainer_reference", "the reference is not the base model, for example a copy of the previous stage's adapter"),
    ):
        gap = (table[name] - table["adapter_off"]).abs().fillna(math.inf)  # a NaN is a difference
        worst = table.loc[(gap / table["adapter_off"].abs().clip(lower=1.0)).idxmax()]
        if not gap.loc[worst.name] <= tolerance * max(1.0, abs(worst["adapter_off"])):
            raise StudyError(
                f"wrong reference: for {worst['completion']} {name} is {worst[name]:.4f} nats, the model with its adapter off gives "
                f"{worst['adapter_off']:.4f}: {meaning}. Training stopped before its first step."
            )
    return table


def _references_in_use(trainer: DPOTrainer, rows: Dataset) -> list[tuple[float, float]]:
    if trainer.precompute_ref_logps:
        return list(zip(rows["ref_chosen_logps"], rows["ref_rejected_logps"], strict=True))
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    return list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def history_table(trainer: DPOTrainer) -> pd.DataFrame:
    """TRL's log, one row an optimiser step: `step`, `loss`, `learning_rate`, `grad_norm`, `rewards/*`, `logps/*`, and `seconds`.

    What was measured of earlier objectives stands in tables of its own and is left out.
    """
    measured = ("conflict/", "ledger/")
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    table = pd.DataFrame([{key: value for key, value in entry.items() if not key.startswith(measured)} for entry in steps])
    progress = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, _Progress))
    return table.assign(seconds=progress.seconds)


def save_adapter(trainer: DPOTrainer, folder: Path, *, parameters: dict[str, Any]) -> dict[str, Any]:
    """Save the adapter as safetensors with a manifest; the folder appears whole or not at all.

    Returns:
        The manifest: hash of the weights, device and dtype, and those of the `parameters` that shaped the weights.
    """
    if process_number():
        wait_for_all()
        return read_json(folder / "manifest.json")
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    trainer.model.save_pretrained(beside, safe_serialization=True)
    manifest = {
        "adapter_sha256": hash_files([beside / "adapter_model.safetensors"]),
        "device": str(trainer.accelerator.device),
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "parameters": {key: parameters[key] for key in _SHAPING if key in parameters},
    }
    (beside / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    wait_for_all()
    return manifest
