"""One stage of a chain: its pairs, its trainer, the proof of its reference, and what it leaves behind.

Loss, optimiser, schedule and logging are TRL's `DPOTrainer`, by way of `measuring.MeasuringDPOTrainer`. Every
stage trains the adapter of the stage before (the first one the start adapter), and its reference is the base
model unless a variant says otherwise.
"""

import copy
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from seqdpo_utils.chains import THEN, Chain
from seqdpo_utils.divergence import base_divergence
from seqdpo_utils.errors import StudyError
from seqdpo_utils.lists import Told
from seqdpo_utils.listwise import ListwiseTrainer
from seqdpo_utils.measuring import LookBack, MeasuringDPOTrainer, share_prompts
from seqdpo_utils.models import (
    compute_device,
    hash_files,
    load_adapter,
    load_base,
    lora_config,
    save_adapter,
    start_adapter,
)
from seqdpo_utils.pairs import encode_table
from seqdpo_utils.params import SHAPING, Parameters, varied
from seqdpo_utils.paths import RunPaths, read_json, read_table, write_table, write_whole
from seqdpo_utils.records import score_files
from seqdpo_utils.scoring import CHECKED_ROWS, PromptRow, Scorer, rounding, sequence_logp
from seqdpo_utils.stage_data import SUMS, StageData, stage_seed

logging.getLogger("trl").setLevel(logging.ERROR)

REFERENCE_CHECKS = 4
"""Pairs, of the stage and of each earlier objective, whose reference is recomputed before the first step."""
MARGIN_ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 0.4}
"""Nats by which rounding may move the difference of a pair's two sums, a square root of their tokens.

Errors of single tokens add up at random: two ways to compute the same sums with SmolLM2-135M, over 52 to 600
tokens a pair, differed by at most 8e-6 and 0.19 a square root."""
CHECKPOINT_SECONDS = 60.0
"""Least time between two checkpoints of an unfinished stage."""
_MEASURED = "measured.json"  # written last, so a checkpoint that has it is whole
_STOPPED = "Training stopped before its first step."


def optimiser_steps(parameters: Parameters, *, pairs: int) -> int:
    """Steps of a stage of `pairs` pairs; a last step may have fewer pairs than `pairs_per_step`."""
    return math.ceil(pairs / parameters.pairs_per_step) * parameters.epochs


def dpo_config(parameters: Parameters, *, pairs: int, output_dir: Path) -> DPOConfig:
    """TRL's configuration for a stage of `pairs` pairs; each stage has a fresh optimiser and schedule.

    Warm-up steps are rounded down, to none where `warmup_ratio` gives less than one: the first of them has
    learning rate zero, which a stage of few steps cannot spare.
    """
    on_cpu = compute_device().type == "cpu"
    steps = optimiser_steps(parameters, pairs=pairs)
    return DPOConfig(
        output_dir=str(output_dir),
        beta=parameters.beta * parameters.beta_factor,
        loss_type=parameters.loss_type,
        loss_weights=parameters.loss_weights,
        label_smoothing=parameters.label_smoothing,
        learning_rate=parameters.learning_rate,
        num_train_epochs=parameters.epochs,
        per_device_train_batch_size=parameters.pairs_per_device,
        gradient_accumulation_steps=parameters.pairs_per_step // parameters.pairs_per_device,
        lr_scheduler_type="cosine",
        warmup_steps=int(parameters.warmup_ratio * steps),
        max_grad_norm=parameters.max_grad_norm,
        max_length=None,  # rows that do not fit were dropped and counted when the data was prepared
        activation_checkpointing=parameters.activation_checkpointing,
        precompute_ref_log_probs=True,
        disable_dropout=parameters.lora_dropout == 0,  # TRL's default would undo lora_dropout without a word
        seed=stage_seed(parameters.chain, parameters.seed),
        use_cpu=on_cpu,
        bf16=not on_cpu and parameters.dtype == "bfloat16",
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        save_strategy="no",  # `_Checkpoints` says when
        save_total_limit=2,  # the older one goes when the newer is whole
        report_to="none",
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
        start = {"total": state.max_steps, "initial": state.global_step}
        self.bar = tqdm(desc=self.label, unit="step", mininterval=5, **start)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs and self.bar is not None:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.monotonic() - self.began)
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class _Keeper(TrainerCallback):
    """Keeps the adapter every few steps, except after the last, which is the stage's own."""

    def __init__(self, model: Any, run: RunPaths, *, every: int) -> None:
        self.model, self.run, self.every = model, run, every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            folder = self.run.kept(state.global_step)
            save_adapter(self.model, folder, manifest={"step": state.global_step})


class _Checkpoints(TrainerCallback):
    """Saves a checkpoint after the last step, and before it at points of the ledger, at most one a minute.

    TRL keeps weights, optimiser and random state; what was measured so far is added here.
    """

    def __init__(self, trainer: MeasuringDPOTrainer, progress: _Progress) -> None:
        self.trainer, self.progress = trainer, progress
        self.saved = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = self.trainer.at_ledger_point and time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        control.should_save = due or control.should_training_stop

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        measured = {name: getattr(self.trainer, name) for name in self.trainer.MEASURED}
        # TRL would count the tokens anew
        measured |= {"seconds": self.progress.seconds, "tokens": self.trainer._total_train_tokens}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_whole(
            folder / _MEASURED, lambda beside: beside.write_text(json.dumps(measured), encoding="utf-8")
        )
        self.saved = time.monotonic()

    def restore(self, folder: Path) -> None:
        """Take up what was measured before the checkpoint in `folder`."""
        measured = read_json(folder / _MEASURED)
        for name in self.trainer.MEASURED:
            setattr(self.trainer, name, measured[name])
        self.progress.seconds, self.trainer._total_train_tokens = measured["seconds"], measured["tokens"]


def unfinished_folder(run: RunPaths, *, parameters: Parameters, fingerprints: dict[str, str]) -> Path:
    """Folder for the checkpoints of a stage that is under way.

    Its name is a hash of all that shapes the stage: parameters, fingerprints, adapter of the stage before,
    and this package's code. So a run that was killed finds its checkpoints, and one that differs in anything
    does not; what it finds of others it deletes.
    """
    code = hash_files(sorted(Path(__file__).parent.glob("*.py")))
    previous = read_json(run.previous / "manifest.json")["adapter_sha256"]
    shaping = json.dumps([dict(parameters), fingerprints, previous, code], sort_keys=True)
    folder = run.node / ".unfinished" / hashlib.sha256(shaping.encode()).hexdigest()[:16]
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def train(trainer: MeasuringDPOTrainer) -> None:
    """Train the stage, resuming from its latest whole checkpoint if there is one.

    Weights, log and tables are then those of an undisturbed run.
    """
    whole = Path(trainer.args.output_dir).glob(f"checkpoint-*/{_MEASURED}")
    latest = max(
        (file.parent for file in whole), key=lambda folder: int(folder.name.rpartition("-")[2]), default=None
    )
    if latest:
        _callback(trainer, _Checkpoints).restore(latest)
    trainer.train(resume_from_checkpoint=str(latest) if latest else None)


def _callback(trainer: DPOTrainer, kind: type) -> Any:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind))


def stage_trainer(
    base: PreTrainedModel,
    tokenizer: Any,
    data: StageData,
    *,
    parameters: Parameters,
    output_dir: Path,
    previous: Path | None = None,
) -> MeasuringDPOTrainer:
    """A trainer for one stage, with a `scorer` of the policy that it trains.

    The adapter is made on the bare base model and the weights of the stage before are loaded into it AFTER
    the trainer exists: handed a trained adapter, TRL 1.16 would silently take a copy of it as the reference.

    Args:
        base: the base model, bare; it is wrapped in place, so load it anew for another stage.
        tokenizer: for padding.
        data: from `prepare_stage`.
        parameters: of the stage.
        output_dir: where TRL may write, and where `train` looks for checkpoints.
        previous: adapter folder that the stage begins with; None for a fresh adapter.

    Raises:
        StudyError: when `previous` does not hold exactly this adapter, or an earlier objective has too few
            pairs.
    """
    look_back = LookBack()
    if data.earlier:
        keys = ("conflict_every", "conflict_pairs", "ledger_every", "ledger_pairs", "projection")
        number = parameters.chain.count(THEN) + 1
        look_back = LookBack(data.earlier, stage=number, **{key: getattr(parameters, key) for key in keys})
    kind, more = MeasuringDPOTrainer, {}
    if data.aspects:
        kind, more = ListwiseTrainer, {"aspects": data.aspects, "tokenizer": tokenizer}
    trainer = kind(
        base,
        args=dpo_config(parameters, pairs=len(data.rows), output_dir=output_dir),
        train_dataset=data.rows,
        processing_class=copy.deepcopy(
            tokenizer
        ),  # TRL gives one without a pad token an existing token as one
        peft_config=lora_config(parameters),
        look_back=look_back,
        **more,
    )
    progress = _Progress(f"stage {look_back.stage}")
    trainer.add_callback(progress)  # after the measuring callback, whose time belongs to the step
    trainer.add_callback(_Checkpoints(trainer, progress))
    trainer.remove_callback(PrinterCallback)
    if previous is not None:
        load_adapter(trainer.model, previous)
    trainer.scorer = Scorer(trainer.model, token_budget=parameters.token_budget)
    pairs = trainer.reference_rows()
    rows = [PromptRow(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in pairs]
    if (reason := trainer.scorer.fault(rows[:CHECKED_ROWS])) is None:
        share_prompts(trainer.model.get_base_model())
    elif data.aspects:
        raise StudyError(f"a listwise stage computes a prompt once for all its answers, but {reason}.")
    if data.earlier and parameters.reference:
        trainer.model.eval()  # a reference has no dropout; every training step turns it back
        sums = trainer.scorer.sums(rows, label="reference of the stage before")
        trainer.train_dataset = mixed_reference(data.rows, sums, share=parameters.reference)
    return trainer


def begin_stage(
    root: Path, run: RunPaths, tokenizer: Any, data: StageData, *, parameters: Parameters
) -> MeasuringDPOTrainer:
    """A trainer for the last stage of a chain, from the run's files: base model, adapter before, checkpoints.

    Raises:
        StudyError: as `stage_trainer`, and when the base model cannot be loaded.
    """
    base = load_base(
        root, parameters.base_model, dtype=parameters.dtype, revision=parameters.base_model_revision,
        attention=parameters.attention, quantization=parameters.quantization,
    )  # fmt: skip
    if run.previous == run.start:
        start_adapter(root, parameters, run.start)  # a study made it; a notebook run by hand makes it now
    folder = unfinished_folder(run, parameters=parameters, fingerprints=data.fingerprints)
    if not folder.exists():  # a stage that begins anew; one that goes on keeps what it kept
        shutil.rmtree(run.kept(0).parent, ignore_errors=True)
    options = {"parameters": parameters, "output_dir": folder, "previous": run.previous}
    trainer = stage_trainer(base, tokenizer, data, **options)
    if parameters.keep_every:
        trainer.add_callback(_Keeper(trainer.model, run, every=parameters.keep_every))
    return trainer


def mixed_reference(rows: Dataset, before: Sequence[Sequence[float]], *, share: float) -> Dataset:
    """The rows with the reference (1 - share) base + share stage before, in log-probabilities.

    At 0 it is the base, at 1 the policy that the stage began with; above 1 it lies beyond.

    Args:
        rows: from `training_rows`, with the base model's sums.
        before: sums of chosen and rejected answer under the stage before, row by row, in nats.
        share: l of the mixture.
    """
    for k, side in enumerate(("chosen", "rejected")):
        name = f"ref_{side}_logps"
        mixed = [(1 - share) * base + share * sums[k] for base, sums in zip(rows[name], before, strict=True)]
        rows = rows.remove_columns(name).add_column(name, mixed)
    return rows


def prove_reference(trainer: DPOTrainer, data: StageData, *, share: float = 0.0) -> pd.DataFrame:
    """Prove before the first step, on a few pairs, that every reference is what it should be.

    The reference that the trainer will use (its columns, or what TRL computes on the fly) is compared with
    (1 - share) times the model with its adapter off plus share times the model as it is, both computed here
    one sequence at a time; and the cached sums of the base model with the former. With share 0 the reference
    is the base. The reference of every earlier objective is the base, whatever the share. Each comparison is
    made for the sums, which sees a shift of both answers, and for the margins, which is much sharper.

    Args:
        trainer: ready to train; its data set holds `prompt_ids`, `chosen_ids`, `rejected_ids`.
        data: of the stage, with the base model's cached sums.
        share: `reference` of the stage.

    Returns:
        One row a completion, of the stage and then of each earlier objective, in nats: `completion`,
        `tokens`, `trainer_reference`, `adapter_off`; for the stage `cached_base`, and where its reference is
        a mixture `adapter_on` and `mixture`.

    Raises:
        StudyError: when two of them differ by more than the rounding of the dtype, naming both.
    """
    trainer.model.eval()  # every training step turns it back
    own = isinstance(trainer, MeasuringDPOTrainer)
    few = _first(trainer.reference_rows() if own else trainer.train_dataset)
    table = _completions(trainer.model, few, _references_in_use(trainer, few), share=share)
    table["cached_base"] = data.reference[SUMS[:2]].head(len(few)).to_numpy(float).ravel()
    stale = "the cached base scores are stale, or a merged adapter changed the weights under the adapter"
    wrong = "the reference is not the base model, for example a copy of the previous stage's adapter"
    if share:
        wrong = f"the reference is not {1 - share:g} times the base plus {share:g} times the stage before"
    live, slack = "mixture" if share else "adapter_off", abs(1 - share) + abs(share)
    _compare(trainer, table, "cached_base", "adapter_off", meaning=stale)
    _compare(trainer, table, "trainer_reference", live, slack=slack, meaning=wrong)
    tables = [table]
    for (objective, split), rows in data.earlier.items():
        few, of = _first(rows), f" of earlier {objective} ({split})"
        table = _completions(trainer.model, few, _stored_references(few), of=of)
        wrong = f"the reference of the earlier objective {objective} is not the base model"
        _compare(trainer, table, "trainer_reference", "adapter_off", meaning=wrong)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _first(rows: Dataset) -> Dataset:
    return rows.select(range(min(REFERENCE_CHECKS, len(rows))))


def _completions(
    model: Any, rows: Dataset, used: Sequence[Sequence[float]], *, share: float = 0.0, of: str = ""
) -> pd.DataFrame:
    """Two rows a pair, chosen first: the reference in use, and what the model gives now."""
    checks = []
    for i, row in enumerate(rows):
        for k, side in enumerate(("chosen", "rejected")):
            ids = row["prompt_ids"], row[f"{side}_ids"]
            with model.disable_adapter():
                off = sequence_logp(model, *ids)
            check = {"completion": f"{side} {i}{of}", "tokens": len(ids[1])}
            check |= {"trainer_reference": used[i][k], "adapter_off": off}
            if share:
                on = sequence_logp(model, *ids)
                check |= {"adapter_on": on, "mixture": (1 - share) * off + share * on}
            checks.append(check)
    return pd.DataFrame(checks)


def _compare(
    trainer: DPOTrainer, table: pd.DataFrame, name: str, live: str, *, meaning: str, slack: float = 1.0
) -> None:
    """Raise StudyError where two columns of `_completions` differ by more than rounding.

    Every sum, relative to sums above one nat; then every margin beta * (chosen - rejected), of which rounding
    explains beta * `slack` * MARGIN_ROUNDING * sqrt(tokens of both answers).
    """
    dtype, beta = trainer.model.dtype, trainer.args.beta
    gap = (table[name] - table[live]).fillna(math.inf)  # a NaN differs
    relative = gap.abs() / table[live].abs().clip(lower=1.0)
    worst = table.loc[relative.idxmax()]
    if not relative.max() <= rounding(dtype):
        said = f"for {worst['completion']} {name} is {worst[name]:.4f} nats, {live} computed now gives "
        raise StudyError(f"wrong reference: {said}{worst[live]:.4f}: {meaning}. {_STOPPED}")
    off = beta * np.abs(gap.to_numpy()[::2] - gap.to_numpy()[1::2])
    tokens = table["tokens"].to_numpy()[::2] + table["tokens"].to_numpy()[1::2]
    explained = beta * slack * MARGIN_ROUNDING[dtype] * np.sqrt(tokens)
    k = int(np.argmax(off / explained))
    if not off[k] <= explained[k]:
        said = f"for the pair of {table['completion'][2 * k]} {name} moves the margin by {off[k]:.4f} against"
        limit = f"{live} computed now, and rounding explains {explained[k]:.4f}"
        raise StudyError(f"wrong reference: {said} {limit}: {meaning}. {_STOPPED}")


def _references_in_use(trainer: DPOTrainer, rows: Dataset) -> list[tuple[float, float]]:
    if trainer.precompute_ref_logps:
        return _stored_references(rows)
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    return list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def _stored_references(rows: Dataset) -> list[tuple[float, float]]:
    return list(zip(rows["ref_chosen_logps"], rows["ref_rejected_logps"], strict=True))


def asking(tokenizer: Any, parameters: Parameters) -> Any:
    """The tokenizer that prompts for the policy; one that reads its lambda is asked for equal shares."""
    if not parameters.lambda_in_prompt:
        return tokenizer
    names = Chain.parse(parameters.chain).last.objectives
    return Told(tokenizer, dict.fromkeys(names, 1 / len(names)))


def score_stage(
    trainer: MeasuringDPOTrainer, run: RunPaths, tokenizer: Any, *, parameters: Parameters
) -> pd.DataFrame:
    """Score every objective of the setting with the trained policy and write the stage's per-pair records.

    Returns:
        The held-out records of the base model and of this stage, one below the other: what margins are
        computed from.
    """
    trainer.model.eval()
    files = [run.data(name) for name in parameters.objectives]
    options = {"splits": parameters.scored_splits, "checkpoint": run.chain}
    score_files(trainer.scorer, asking(tokenizer, parameters), files, run.scores, **options)
    records = pd.concat([read_table(run.base_scores), read_table(run.scores)], ignore_index=True)
    return records.query("split == 'eval'").reset_index(drop=True)


def score_within(
    trainer: MeasuringDPOTrainer, run: RunPaths, tokenizer: Any, *, parameters: Parameters
) -> pd.DataFrame:
    """Score the adapters that were kept within the stage; also written to `run.within`.

    Forgetting can then be compared where two stages have gained equally much. The trained weights are put
    back.

    Returns:
        The held-out records, with the `step` of the adapter; none where `keep_every` is 0.
    """
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    final, files = [p.detach().clone() for p in adapter], [run.data(name) for name in parameters.objectives]
    folders = sorted(run.kept(0).parent.glob("step-*"), key=lambda folder: int(folder.name[5:]))
    tables = []
    for folder in folders:
        load_adapter(trainer.model, folder)
        beside = folder / "scores.parquet"
        options = {"splits": ["eval"], "checkpoint": run.chain}
        score_files(trainer.scorer, asking(tokenizer, parameters), files, beside, **options)
        tables.append(read_table(beside).assign(step=int(folder.name[5:])))
    with torch.no_grad():
        for weight, kept in zip(adapter, final, strict=True):
            weight.copy_(kept)
    none = read_table(run.scores).head(0).assign(step=0)
    within = pd.concat(tables, ignore_index=True) if tables else none
    write_table(run.within, within)
    return within


def measure_drift(
    trainer: MeasuringDPOTrainer, run: RunPaths, tokenizer: Any, *, parameters: Parameters
) -> pd.DataFrame:
    """KL from the base on the first held-out pairs of every objective; also written to `run.kl`.

    Returns:
        As `divergence.base_divergence`: one row a completion.
    """
    tables = [read_table(run.data(name)).query("split == 'eval'") for name in parameters.objectives]
    few = pd.concat([table.head(parameters.kl_pairs) for table in tables], ignore_index=True)
    encoded = encode_table(asking(tokenizer, parameters), few)
    drift = base_divergence(trainer.scorer, few, encoded, checkpoint=run.chain)
    write_table(run.kl, drift)
    return drift


def history_table(trainer: DPOTrainer) -> pd.DataFrame:
    """TRL's log, one row an optimiser step: loss, learning rate, margins and the like, and `seconds`.

    What was measured of earlier objectives stands in tables of its own and is left out.
    """
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = [
        {key: x for key, x in entry.items() if not key.startswith(("conflict/", "ledger/"))}
        for entry in steps
    ]
    return pd.DataFrame(kept).assign(seconds=_callback(trainer, _Progress).seconds)


def save_stage(
    root: Path, trainer: MeasuringDPOTrainer, run: RunPaths, *, parameters: Parameters
) -> dict[str, Any]:
    """Write what the stage made: log, conflict, ledger, and last the adapter; then drop its checkpoints.

    Returns:
        The adapter's manifest: hash of its weights, device and dtype, the parameters that shaped it, and
        which of them the variants of this stage changed (`varied`).
    """
    write_table(run.history, history_table(trainer))
    write_table(run.conflict, trainer.conflict_table())
    write_table(run.ledger, trainer.ledger_table())
    write_table(run.ledger_pairs, trainer.ledger_pairs_table())
    if isinstance(trainer, ListwiseTrainer):
        write_table(run.lambdas, pd.DataFrame(trainer.lambda_records))
        write_table(run.schedule, pd.DataFrame(trainer.schedule_records))
    manifest = {
        "device": str(trainer.accelerator.device),
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "parameters": {key: value for key, value in parameters if key in SHAPING},
        "varied": sorted(varied(root, Chain.parse(run.chain).last)),
    }
    written = save_adapter(trainer.model, run.adapter, manifest=manifest)
    shutil.rmtree(run.node / ".unfinished", ignore_errors=True)
    return written
