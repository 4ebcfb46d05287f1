"""TRL's DPO trainer with what this study adds: its own tokens and sums, one row a pair, and a look back.

The mathematics of a step is TRL's. `MeasuringDPOTrainer` looks at gradients between the backward pass and the
optimiser, `share_prompts` lets a pair's prompt be computed once, `LengthGrouped` puts pairs of like length
into one forward pass.
"""

import types
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOTrainer

from seqdpo_utils.conflict import CONFLICT_COLUMNS, conflict_row, dot
from seqdpo_utils.errors import StudyError
from seqdpo_utils.ledger import LEDGER_COLUMNS, LEDGER_PAIR_COLUMNS, ProbePoint, segment_rows
from seqdpo_utils.scoring import PromptRow, completion_logps, pack_rows

_LOGGED = (
    "loss_old", "norm_old", "cosine", "matched_cosine", "within_cosine", "within_new_cosine",
    "corrected_cosine",
)  # fmt: skip
_NOT_COMPUTED = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
# a key that no number of an earlier objective takes, so that draws have streams of their own
_PROJECTION = 1 << 20


@dataclass(frozen=True)
class LookBack:
    """What a stage measures of earlier objectives, and whether its steps are projected.

    Attributes:
        earlier: (earlier objective, split) to its pairs, with the columns of `stages.training_rows`,
            `pair_id` and `prompt_id`; split "train" or "probe".
        conflict_every: measure the conflict at step 1, 1 + n, 1 + 2n, ...; 0 never does.
        conflict_pairs: pairs of an earlier objective and split in one measurement, an even number.
        ledger_every: a point of the ledger before the first step, every n steps and after the last.
        ledger_pairs: fixed pairs of each earlier objective and split behind the ledger; 0 keeps none.
        projection: "earlier" takes from each step what would raise the loss of earlier pairs; "placebo" does
            so with earlier pairs whose labels are at random; None leaves the steps alone.
        stage: number of the stage, from 1.
    """

    earlier: dict[tuple[str, str], Dataset] = field(default_factory=dict)
    conflict_every: int = 0
    conflict_pairs: int = 2
    ledger_every: int = 1
    ledger_pairs: int = 0
    projection: str | None = None
    stage: int = 1

    def check_sizes(self) -> None:
        """Raise StudyError when an earlier objective has fewer pairs than are asked for."""
        drawn_now = self.conflict_pairs if self.conflict_every or self.projection else 0
        for parameter, pairs in (("conflict_pairs", drawn_now), ("ledger_pairs", self.ledger_pairs)):
            for (name, split), rows in self.earlier.items():
                if pairs > len(rows):
                    raise StudyError(
                        f"{parameter} = {pairs} exceeds the {len(rows)} {split} pairs of {name}: "
                        f"lower it or raise {split}_pairs."
                    )


class MeasuringDPOTrainer(DPOTrainer):
    """A DPO stage that also measures the gradients of the earlier objectives at the current weights.

    Two measurements, each on pairs of its own. The conflict: `g_new`, the accumulated gradient of an
    optimiser step before clipping, against `g_old`, the gradient of the same loss, with the base reference,
    on earlier pairs drawn anew. The ledger: loss and full gradient of a fixed set of earlier pairs at points
    along the stage, and the displacement between them (`seqdpo_utils.ledger`). `.grad`, the random state, the
    optimiser and TRL's own metrics are left as they were, so the trained weights are the same with and
    without measuring; dropout is off in what is measured. The numbers go into the trainer's log and into two
    tables.

    With a projection the weights after each step lose the part of the step d that would raise the earlier
    loss: theta <- theta - max(0, g_old . d) g_old / |g_old|^2, with g_old on earlier pairs drawn anew at the
    weights before the step (A-GEM, Chaudhry et al. 2019, arXiv 1812.00420, there on the gradient, here on the
    optimiser's actual step).

    Raises:
        StudyError: when an earlier objective has fewer pairs than are asked for, or the loss is no finite
            number.
    """

    MEASURED: ClassVar = ("conflict_records", "ledger_records", "ledger_pair_records")
    """What a checkpoint keeps of the measurements, so that a resumed stage has them all."""

    def __init__(self, model: Any, *, look_back: LookBack, **options: Any) -> None:
        super().__init__(model, **options)
        look_back.check_sizes()
        self.look_back = look_back
        self.conflict_records: list[dict[str, Any]] = []
        self.ledger_records: list[dict[str, Any]] = []
        self.ledger_pair_records: list[dict[str, Any]] = []
        self._pending: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._before: list[Tensor] = []
        self._held_back: list[Tensor] | None = None
        self._points: dict[tuple[str, str], ProbePoint] = {}
        self._probed_at: list[Tensor] = []
        self._first_half: list[Tensor] | None = None
        self._micro_batches = self._pairs_in_step = 0
        self._loss_new = 0.0
        self._probes = {}
        for number, (name, rows) in enumerate(look_back.earlier.items() if look_back.ledger_pairs else ()):
            self._probes[name] = pick(rows, look_back.ledger_pairs, key=(self.args.seed, number))
        self.add_callback(_Measuring(self))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        pairs = self.args.per_device_train_batch_size
        if pairs == 1:
            # nothing is padded, so there is nothing to group
            return super()._get_train_sampler(train_dataset)
        lengths = [row_tokens(row) for row in train_dataset or self.train_dataset]
        window = pairs * self.args.gradient_accumulation_steps
        return LengthGrouped(lengths, window=window, batch=pairs, seed=self.args.seed)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # already token ids: the same ones that the scorer uses

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # already carries the reference sums; `stages.prove_reference` checks them

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        loss = super()._compute_loss(model, inputs, return_outputs)
        for name in _NOT_COMPUTED:
            self._metrics["train" if self.model.training else "eval"].pop(name, None)
        return loss

    def rows_in(self, batch: dict[str, Any]) -> int:
        """How many rows of the training set a collated batch holds."""
        return len(batch["ref_chosen_logps"])

    def reference_rows(self) -> Dataset:
        """The training set as pairs, with the sums that serve it as reference."""
        return self.train_dataset

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Tensor]], Any]:
        batches, items = super().get_batch_samples(*args)
        self._pairs_in_step = sum(map(self.rows_in, batches))
        return batches, items

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        # transformers divides each micro-batch's mean by the number of micro-batches, so that the pairs of a
        # short one would count more; where all are full this is that number
        self.current_gradient_accumulation_steps = self._pairs_in_step / self.rows_in(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step + 1
        if not torch.isfinite(loss):
            raise StudyError(
                f"the loss of stage {self.look_back.stage} became {float(loss)} at step {step}. Nothing of "
                f"it was saved. Lower learning_rate (now {self.args.learning_rate}) or use float32."
            )
        every = self.look_back.conflict_every if self.look_back.earlier else 0
        if every and self.state.global_step % every == 0:
            self._micro_batches += 1
            self._loss_new += loss.item()
            if 2 * self._micro_batches == self.args.gradient_accumulation_steps:
                self._first_half = [p.grad.detach().clone() for p in self._adapter()]
            if self.accelerator.sync_gradients:
                self._measure_conflict(step)
        if self.accelerator.sync_gradients and (self._pending or self.look_back.projection):
            self._before = [p.detach().clone() for p in self._adapter()]
            self._held_back = self._gradient_to_hold_back(step) if self.look_back.projection else None
        return loss

    def _adapter(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _measure_conflict(self, step: int) -> None:
        """Cosines of the accumulated gradient with that of each earlier objective, at the same weights."""
        whole = [p.grad.detach() for p in self._adapter()]
        # two halves of the new batch: the snapshot taken half-way through accumulation, and what came after
        # it; a short last batch has none
        halves, full = None, self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        if self._first_half is not None and self._pairs_in_step == full:
            halves = (self._first_half, [w - a for w, a in zip(whole, self._first_half, strict=True)])
        known = {"step": step, "stage": self.look_back.stage, "loss_new": self._loss_new}
        self._first_half, self._micro_batches, self._loss_new = None, 0, 0.0
        half = self.look_back.conflict_pairs // 2
        for number, ((name, split), rows) in enumerate(self.look_back.earlier.items()):
            # a function of seed, stage and step, not of the draws before: a resumed stage draws the same
            key = (self.args.seed, number, self.look_back.stage, step)
            chosen = pick(rows, 2 * half, key=key)
            (loss_a, old_a), (loss_b, old_b) = (
                self._gradient_of(chosen[:half]),
                self._gradient_of(chosen[half:]),
            )
            row = conflict_row(new=whole, new_halves=halves, old_halves=(old_a, old_b))
            row |= known | {"previous_objective": name, "split": split, "loss_old": (loss_a + loss_b) / 2}
            self._note(f"conflict/{name}/{split}", {column: row[column] for column in _LOGGED})
            # the mean of the halves is kept for the ledger column, until the step was taken
            self._pending.append((row, [a.add_(b).div_(2) for a, b in zip(old_a, old_b, strict=True)]))

    def _gradient_to_hold_back(self, step: int) -> list[Tensor]:
        """Gradient of the earlier loss that this step may not raise; the placebo's labels are coins."""
        trained_on = [rows for (_, split), rows in self.look_back.earlier.items() if split == "train"]
        pool = [row for rows in trained_on for row in rows]
        key = (self.args.seed, _PROJECTION, self.look_back.stage)
        chosen = drawn(len(pool), self.look_back.conflict_pairs, key=(*key, step))
        rows = [pool[i] for i in chosen]
        if self.look_back.projection == "placebo":
            # a pair keeps its label through the stage
            coins = np.random.default_rng(key).random(len(pool)) < 0.5
            rows = [turned(row) if coins[i] else row for i, row in zip(chosen, rows, strict=True)]
        return self._gradient_of(rows)[1]

    def _gradient_of(self, rows: Sequence[dict[str, Any]]) -> tuple[float, list[Tensor]]:
        """Mean loss over `rows` and its gradient, in training's micro-batches; log and chance unchanged."""
        adapter = self._adapter()
        kept = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        size = self.args.per_device_train_batch_size
        mean, gradient = 0.0, [torch.zeros_like(p) for p in adapter]
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad(), _dropout_off(self.model):
                for start in range(0, len(rows), size):
                    part = list(rows[start : start + size])
                    batch = self._prepare_inputs(self.data_collator(part))
                    loss = self.compute_loss(self.accelerator.unwrap_model(self.model_wrapped), batch)
                    mean += loss.item() * len(part) / len(rows)
                    for total, piece in zip(gradient, torch.autograd.grad(loss, adapter), strict=True):
                        total.add_(piece, alpha=len(part) / len(rows))
        finally:
            self._metrics, self._total_train_tokens = kept
        return mean, gradient

    def _note(self, prefix: str, values: dict[str, float | None]) -> None:
        for key, value in values.items():
            if value is not None:  # a NaN would poison the mean that TRL logs
                self._metrics["train"][f"{prefix}/{key}"].append(value)

    def begin_ledger(self) -> None:
        """Open the ledger here: before the first step, or where a resumed run goes on."""
        self._points, self._probed_at = {}, []
        self.model.train()  # as every training step does; activation checkpointing needs it
        self._probe()

    def finish_step(self, *, last: bool) -> None:
        """After the optimiser's step: project it, complete the records, enter the ledger."""
        if self._held_back is not None:
            project(self._adapter(), before=self._before, against=self._held_back)
        for row, old in self._pending:
            moved = [p.detach() - b for p, b in zip(self._adapter(), self._before, strict=True)]
            row["ledger"] = dot(old, moved)
            self._note(f"conflict/{row['previous_objective']}/{row['split']}", {"ledger": row["ledger"]})
            self.conflict_records.append(row)
        self._pending, self._before, self._held_back = [], [], None
        if last or self.at_ledger_point:
            self._probe()

    @property
    def at_ledger_point(self) -> bool:
        """Whether a ledger begun here continues the one before; without a ledger, always."""
        return not self._probes or self.state.global_step % self.look_back.ledger_every == 0

    def _probe(self) -> None:
        """Loss and gradient of every probe set; a point ends one segment and begins the next."""
        if not self._probes:
            return
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        # pair by pair and in main memory: the move that a gradient is held against is known a point later
        now, before = [p.detach().clone() for p in self._adapter()], self._probed_at
        moved = [p - b for p, b in zip(now, before, strict=True)] if self._points else []
        for (name, split), rows in self._probes.items():
            each = [self._gradient_of([row]) for row in rows]
            gradients = [[piece.cpu() for piece in gradient] for _, gradient in each]
            point = ProbePoint(self.state.global_step, [loss for loss, _ in each], gradients)
            if moved:
                entries, by_pair = segment_rows(names, self._points[name, split], point, moved)
                place = {"stage": self.look_back.stage, "previous_objective": name, "split": split}
                self.ledger_records += [place | entry for entry in entries]
                ids = [{key: row[key] for key in ("pair_id", "prompt_id")} for row in rows]
                pairs = zip(ids, by_pair, strict=True)
                self.ledger_pair_records += [place | known | entry for known, entry in pairs]
                ended = {"loss": entries[0]["loss_after"], "term": sum(entry["term"] for entry in entries)}
                self._note(f"ledger/{name}/{split}", ended)
            self._points[name, split] = point
        self._probed_at = now

    def ledger_pairs_table(self) -> pd.DataFrame:
        """One row a segment, earlier objective and pair; empty, with its columns, without ledger."""
        return pd.DataFrame(self.ledger_pair_records, columns=list(LEDGER_PAIR_COLUMNS))

    def conflict_table(self) -> pd.DataFrame:
        """One row a measured step and earlier objective; empty, with its columns, where none was."""
        return pd.DataFrame(self.conflict_records, columns=list(CONFLICT_COLUMNS))

    def ledger_table(self) -> pd.DataFrame:
        """One row a segment, earlier objective, layer and module; empty, with its columns, without ledger."""
        return pd.DataFrame(self.ledger_records, columns=list(LEDGER_COLUMNS)).astype({"layer": "Int64"})


def project(weights: Sequence[Tensor], *, before: Sequence[Tensor], against: Sequence[Tensor]) -> float:
    """Take out of a step, in place, its part along a gradient where it would raise that gradient's loss.

    With d = weights - before and g = against: weights <- weights - max(0, g . d) g / |g|^2.

    Returns:
        g . d before, in nats: what the step would have added to the loss, to first order.
    """
    rise = dot(against, [w.detach() - b for w, b in zip(weights, before, strict=True)])
    square = dot(against, against)
    if rise > 0 and square > 0:
        with torch.no_grad():
            for weight, gradient in zip(weights, against, strict=True):
                weight.sub_(gradient, alpha=rise / square)
    return rise


def turned(row: dict[str, Any]) -> dict[str, Any]:
    """A training row with its label turned: chosen and rejected change places, reference sums too."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    new = {f"{side}_ids": row[f"{other}_ids"] for side, other in sides.items()}
    new |= {f"ref_{side}_logps": row[f"ref_{other}_logps"] for side, other in sides.items()}
    return row | new


def row_tokens(row: dict[str, Any]) -> int:
    """Length of the row `[prompt, chosen, rejected]`, or of a list's `[prompt, answers]`, in tokens."""
    answers = row["completions"] if "completions" in row else (row["chosen_ids"], row["rejected_ids"])
    return len(row["prompt_ids"]) + sum(map(len, answers))


class LengthGrouped(torch.utils.data.Sampler):
    """A random order in which the pairs of one forward pass have like lengths.

    The pairs are shuffled and cut into windows, one an optimiser step. Within a window they are sorted into
    batches, and the batches shuffled: every step sees the same pairs as without grouping, in batches of equal
    size, so its gradient is the same up to rounding.

    Args:
        lengths: tokens of every pair.
        window: pairs behind one optimiser step.
        batch: pairs in one forward pass.
        seed: with the epoch, the only source of chance.
    """

    def __init__(self, lengths: Sequence[int], *, window: int, batch: int, seed: int) -> None:
        self.lengths, self.window, self.batch, self.seed, self.epoch = lengths, window, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch: every epoch has an order of its own, also in a run that was resumed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.window):
            pairs = sorted(order[start : start + self.window], key=lambda i: -self.lengths[i])
            batches = [pairs[k : k + self.batch] for k in range(0, len(pairs), self.batch)]
            # a short last batch stays last: batches are cut anew downstream
            full = len(batches) - (len(batches[-1]) < self.batch)
            for k in [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]:
                yield from batches[k]


def drawn(count: int, wanted: int, *, key: Sequence[int]) -> list[int]:
    """`wanted` distinct indices from range(count), determined by `key`."""
    return np.random.default_rng(list(key)).permutation(count)[:wanted].tolist()


def pick(rows: Dataset, wanted: int, *, key: Sequence[int]) -> list[dict[str, Any]]:
    """`wanted` distinct rows of a data set, determined by `key`."""
    return [rows[i] for i in drawn(len(rows), wanted, key=key)]


@contextmanager
def _dropout_off(model: torch.nn.Module) -> Iterator[None]:
    # dropout modules alone: activation checkpointing works in training mode only
    active = [
        module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.training
    ]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


class _Measuring(TrainerCallback):
    def __init__(self, trainer: MeasuringDPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin_ledger()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.finish_step(last=control.should_training_stop)


def share_prompts(model: PreTrainedModel) -> None:
    """Replace the fused head that TRL put on `model` by one that computes a pair's prompt once.

    TRL asks the model for `(2B, L - 1)` log-probabilities of B chosen rows over B rejected ones
    (`fused_lm_head=True`). The new forward answers with the same numbers from B rows `[prompt, chosen,
    rejected]` and from logits at completion positions only. Calls without `fused_lm_head` go to the forward
    that was there. Entropy, mean logits and top-1 hits, which TRL would only log, are zero and left out of
    the log.
    """
    original = model.forward

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **options: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **options)
        ids, labels = options["input_ids"], options["labels"]
        scored = labels[:, 1:] != -100
        rows = _pair_rows(ids.tolist(), scored.tolist())
        packed = pack_rows(rows).to(ids.device)
        half = len(rows)
        # branches run chosen, rejected, chosen, ... over the pairs; TRL's rows run all chosen, then all
        # rejected
        row = packed.branch // 2 + half * (packed.branch % 2)
        first = scored.int().argmax(dim=1)
        position = torch.cat(
            [torch.arange(n, device=ids.device) for n in torch.bincount(packed.branch).tolist()]
        )
        logps = completion_logps(self, packed)
        out = logps.new_zeros(scored.shape).index_put((row, first[row] + position), logps)
        zeros = torch.zeros_like(out)
        return SimpleNamespace(
            log_probs=out, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
        )

    model.forward = types.MethodType(forward, model)


def _pair_rows(ids: list[list[int]], scored: list[list[bool]]) -> list[PromptRow]:
    half = len(ids) // 2
    starts = [flags.index(True) + 1 for flags in scored]
    completions = [row[s : s + sum(flags)] for row, s, flags in zip(ids, starts, scored, strict=True)]
    return [PromptRow(ids[b][: starts[b]], [completions[b], completions[b + half]]) for b in range(half)]
