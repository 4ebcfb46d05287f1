"""The trainer of a listwise stage: several aspects at once, weighted by lambda.

Optimiser, schedule, logging and what is measured of earlier objectives are those of every other stage; only
the loss is another one. It is corrected against the public code of its source (arXiv 2506.19780): sums of
log-probabilities and not means, a true base reference, ratings that are missing stay missing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor

from seqdpo_utils import schedule
from seqdpo_utils.encoding import encode_prompt
from seqdpo_utils.lists import Told, listwise_loss, pairs_of_rows, targets
from seqdpo_utils.measuring import MeasuringDPOTrainer
from seqdpo_utils.scoring import PromptRow, completion_logps, pack_rows


@dataclass(frozen=True)
class Aspects:
    """What a listwise stage weighs, and how.

    Attributes:
        names: of the m aspects, in the order of the ratings in a row.
        kind: "fixed", "uniform", "grid", "dirichlet" or "learned".
        weights: the lambda of kind "fixed", of sum one; equal shares in all that is asked of every kind.
        temperature: tau of the targets.
        in_prompt: whether the policy reads its lambda.
        probe: (aspect, held-out row of a pair) on which kind "learned" measures what a step did.
    """

    names: tuple[str, ...]
    kind: str
    weights: tuple[float, ...]
    temperature: float
    in_prompt: bool = False
    probe: tuple[tuple[str, dict[str, Any]], ...] = field(default_factory=tuple)


class ListwiseTrainer(MeasuringDPOTrainer):
    """A stage on rated lists; every list is computed in one row of prompt and answers.

    The reference sums are the base model's on the prompt without a word about lambda, also where the policy
    reads one, so that margins of all chains have one zero. `lambda_records` keeps the lambda of every list,
    `schedule_records` what the steps of kind "learned" did: both go into checkpoints, so that a resumed stage
    draws what an undisturbed one would.

    Args:
        aspects: what is weighed.
        tokenizer: with the chat template, for prompts that name lambda.
        options: as for `MeasuringDPOTrainer`, with rows of `lists.list_rows`.
    """

    MEASURED: ClassVar = (*MeasuringDPOTrainer.MEASURED, "lambda_records", "schedule_records")

    def __init__(self, model: Any, *, aspects: Aspects, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.aspects, self.tokenizer = aspects, tokenizer
        self.lambda_records: list[dict[str, Any]] = []
        self.schedule_records: list[dict[str, Any]] = []
        self.data_collator = _keeping_lists(self.data_collator)
        self.scorer: Any = None  # set by `stages.stage_trainer`, which proves it on this model
        self._margins: dict[str, np.ndarray] = {}
        self._rate = 0.0  # of the step under way, as a share of its height

    def rows_in(self, batch: dict[str, Any]) -> int:
        return len(batch["lists"]) if "lists" in batch else super().rows_in(batch)

    def reference_rows(self) -> Dataset:
        return pairs_of_rows(self.train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.train_dataset.column_names)

    def lambda_of(self, number: int) -> np.ndarray:
        """Lambda of a list in the step that is under way, (m)."""
        kind, count, step = self.aspects.kind, len(self.aspects.names), self.state.global_step
        if kind == "fixed":
            return np.array(self.aspects.weights)
        if kind not in schedule.PER_STEP:
            return schedule.draw(kind, count, key=(self.args.seed, step, number))
        points = schedule.lattice(count)
        rng = np.random.default_rng([self.args.seed, step])
        means, _ = schedule.believed(points, pd.DataFrame(self.schedule_records), self.aspects.names)
        return points[rng.choice(len(points), p=schedule.chances(means))]

    def prompt_ids(self, row: dict[str, Any], weights: Sequence[float]) -> list[int]:
        """The prompt of a row as the policy sees it under some lambda."""
        if not self.aspects.in_prompt:
            return row["prompt_ids"]
        asked = Told(self.tokenizer, dict(zip(self.aspects.names, weights, strict=True)))
        return encode_prompt(asked, json.loads(row["prompt"]))

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        self._rate = self._get_learning_rate() / self.args.learning_rate
        return super().training_step(*args, **options)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "lists" not in inputs:  # pairs of an earlier objective, which are looked back at
            return super()._compute_loss(model, inputs, return_outputs)
        rows, device = inputs["lists"], self.accelerator.device
        weights = [self.lambda_of(row["number"]) for row in rows]
        prompts = list(map(self.prompt_ids, rows, weights))
        asked = [PromptRow(ids, row["completions"]) for ids, row in zip(prompts, rows, strict=True)]
        packed = pack_rows(asked).to(device)
        logps = completion_logps(self.accelerator.unwrap_model(model).get_base_model(), packed)
        reference = torch.tensor([x for row in rows for x in row["ref_logps"]], device=device)
        sums = torch.zeros_like(reference).index_add_(0, packed.branch, logps)
        rewards = (self.beta * (sums - reference)).split([len(row["completions"]) for row in rows])
        losses = []
        for row, weight, reward in zip(rows, weights, rewards, strict=True):
            ratings, share = torch.tensor(row["ratings"], device=device), torch.tensor(weight, device=device)
            share = share.to(reward.dtype)
            losses.append(listwise_loss(reward, ratings, share, temperature=self.aspects.temperature))
            self._note_list(row, weight, reward.detach(), share @ targets(ratings, temperature=1.0))
        loss = torch.stack(losses).mean()
        return (loss, {}) if return_outputs else loss

    def _note_list(self, row: dict[str, Any], weight: np.ndarray, reward: Tensor, wanted: Tensor) -> None:
        """Log the answers that the weighted ratings put first and last, as of a pair, and keep lambda."""
        best, worst = reward[wanted.argmax()].item(), reward[wanted.argmin()].item()
        logged = {"rewards/chosen": best, "rewards/rejected": worst, "rewards/margins": best - worst}
        for key, value in logged.items():
            self._metrics["train"][key].append(value)
        shares = zip(self.aspects.names, weight.tolist(), strict=True)
        place = {"step": self.state.global_step + 1, "number": row["number"]}
        self.lambda_records.append(place | {f"lambda_{name}": share for name, share in shares})

    def loss_at_reference(self) -> float:
        """Loss of the first step if policy and reference were the same, in nats."""
        lost = []
        for entry in self.lambda_records:
            if entry["step"] == 1:
                ratings = torch.tensor(self.train_dataset[entry["number"]]["ratings"])
                weights = torch.tensor([entry[f"lambda_{name}"] for name in self.aspects.names])
                equal = torch.zeros(ratings.shape[1])
                lost.append(listwise_loss(equal, ratings, weights, temperature=self.aspects.temperature))
        return float(torch.stack(lost).mean())

    def begin_ledger(self) -> None:
        super().begin_ledger()
        self._margins = self._probe_margins()

    def finish_step(self, *, last: bool) -> None:
        super().finish_step(last=last)
        if self.aspects.probe:
            self._measure_step()

    def _probe_margins(self) -> dict[str, np.ndarray]:
        """Held-out margins now, of each aspect, in the order of the probe."""
        if not self.aspects.probe:
            return {}
        equal = np.full(len(self.aspects.names), 1 / len(self.aspects.names))
        rows = [
            PromptRow(self.prompt_ids(row, equal), [row["chosen_ids"], row["rejected_ids"]])
            for _, row in self.aspects.probe
        ]
        training = self.model.training
        self.model.eval()
        sums = np.array(self.scorer.sums(rows, label="held-out margins"))
        self.model.train(training)
        reference = [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for _, row in self.aspects.probe]
        margins = self.beta * ((sums - np.array(reference)) @ [1.0, -1.0])
        of = np.array([name for name, _ in self.aspects.probe])
        return {name: margins[of == name] for name in self.aspects.names}

    def _measure_step(self) -> None:
        """Enter what the step did: its gain in held-out margin, every aspect alike, by learning rate.

        The rate falls along the stage, so that a late step does little whatever its lambda; dividing by the
        rate's share of its height makes steps comparable, and late ones uncertain.
        """
        before, self._margins = self._margins, self._probe_margins()
        step = self.state.global_step
        if not self._rate:  # the first step of a warm-up moves nothing
            return
        moves = [self._margins[name] - before[name] for name in self.aspects.names]
        gain = float(np.mean([move.mean() for move in moves]))
        error = float(np.sqrt(sum(move.var(ddof=1) / len(move) for move in moves))) / len(moves)
        lambda_now = {key: x for key, x in self.lambda_records[-1].items() if key.startswith("lambda_")}
        margins = {f"margin_{name}": float(self._margins[name].mean()) for name in self.aspects.names}
        entry = {"step": step, "gain": gain / self._rate, "error": max(error, 1e-6) / self._rate}
        self.schedule_records.append(entry | lambda_now | margins)


def _keeping_lists(collator: Callable) -> Callable:
    """The collator for batches of lists, which stay as they are, and of pairs, which go to `collator`."""
    return lambda rows: {"lists": rows} if "completions" in rows[0] else collator(rows)
