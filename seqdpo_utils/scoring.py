"""Exact sums of log-probabilities over completion tokens, each prompt computed once.

A row of the batch holds one prompt and all its completions:

    [prompt without its last token | last + completion 1 | last + completion 2 | ...]

Every branch starts with its own copy of the prompt's last token, which predicts the branch's first token, and drops its
own last token, which predicts nothing that is scored. Positions restart after the prompt, and a mask hides the branches from
each other, so each branch sees exactly what it would see alone. Logits are computed where a completion token is
predicted and nowhere else.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from seqdpo_utils.encoding import EncodedPair
from seqdpo_utils.paths import StudyError

HEAD_ROWS = 1024
"""Positions whose logits exist at one time: HEAD_ROWS x vocabulary numbers."""


@dataclass(frozen=True)
class PromptRow:
    """Token ids of one prompt and of the completions to score after it."""

    prompt: list[int]
    completions: list[list[int]]

    @property
    def tokens(self) -> int:
        """Length of the row: what the model has to compute for it."""
        return len(self.prompt) - 1 + sum(map(len, self.completions))


@dataclass(frozen=True)
class PackedRows:
    """Tensors for one forward pass over B rows of at most L tokens, with N scored tokens in all.

    `ids` and `positions` are (B, L); `mask` is (B, 1, L, L), true where a query may look; `source` (N) are the flat
    positions whose logits predict `target` (N); `branch` (N) numbers the completion that a target belongs to.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    source: Tensor
    target: Tensor
    branch: Tensor

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def pack_rows(rows: Sequence[PromptRow]) -> PackedRows:
    """Lay prompts and completions out as the module's text says.

    Completions are numbered through all rows, in order. Pads are ordinary tokens that see the prompt and
    themselves, so that no query is left without a key; nothing reads them.
    """
    length = max(row.tokens for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, segment = torch.zeros_like(ids), torch.full_like(ids, -1)
    source, target, branch = [], [], []
    number = 0
    for i, row in enumerate(rows):
        shared = len(row.prompt) - 1
        flat, where, part = row.prompt[:-1], list(range(shared)), [0] * shared
        for k, completion in enumerate(row.completions, start=1):
            source.extend(range(i * length + len(flat), i * length + len(flat) + len(completion)))
            target.extend(completion)
            branch.extend([number] * len(completion))
            number += 1
            flat = [*flat, row.prompt[-1], *completion[:-1]]
            where.extend(range(shared, shared + len(completion)))
            part.extend([k] * len(completion))
        ids[i, : len(flat)] = torch.tensor(flat)
        positions[i, : len(flat)] = torch.tensor(where)
        segment[i, : len(flat)] = torch.tensor(part)
    key, query = segment[:, None, None, :], segment[:, None, :, None]
    mask = ((key == 0) | (key == query)) & torch.ones(length, length, dtype=torch.bool).tril()
    return PackedRows(ids, positions, mask, torch.tensor(source), torch.tensor(target), torch.tensor(branch))


def completion_logps(model: PreTrainedModel, packed: PackedRows) -> Tensor:
    """Log-probability of every scored token, shape (N), differentiable.

    Args:
        model: a causal language model of transformers (not its PEFT wrapper) that takes a 4-D mask and position ids.
        packed: on the model's device.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    hidden = backbone(input_ids=packed.ids, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])[packed.source]
    pieces = zip(hidden.split(HEAD_ROWS), packed.target.split(HEAD_ROWS), strict=True)
    if len(hidden) > HEAD_ROWS and torch.is_grad_enabled():
        return torch.cat([checkpoint(_head_logps, head, h, t, use_reentrant=False) for h, t in pieces])
    return torch.cat([_head_logps(head, h, t) for h, t in pieces])


def _head_logps(head: torch.nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    # gather minus logsumexp: log_softmax over a large vocabulary loses digits on a CPU
    logits = head(hidden).float()
    return logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, dim=1)


def sequence_logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    """The plain way: one unpadded sequence, all logits, one sum in nats. Slow; what everything else is checked against."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *completion]], device=device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    target = ids[0, len(prompt) :]
    return float((logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, dim=1)).sum())


def score_rows(model: Any, rows: Sequence[PromptRow], *, token_budget: int, label: str = "scoring") -> list[list[float]]:
    """Sums of log-probabilities of every completion, in nats, in the order of `rows`.

    Rows of like length share a batch of at most `token_budget` tokens, pads included. The first row is also
    scored the plain way; where the two disagree (a model that does not honour the mask), all rows are, with a warning.

    Args:
        model: a causal language model, bare or under PEFT with the adapter in the state to be scored.
        rows: prompts with their completions.
        token_budget: positions in one forward pass.
        label: what the progress bar says.
    """
    bare = _bare(model)
    device = next(bare.parameters()).device
    sums: list[list[float]] = [[] for _ in rows]
    if rows and not agrees_with_plain_path(model, rows[0]):
        warnings.warn("the shared-prompt pass disagrees with plain scoring for this model; scoring one sequence at a time", stacklevel=2)
        return [[sequence_logp(model, row.prompt, c) for c in row.completions] for row in tqdm(rows, desc=label, mininterval=5)]
    with torch.inference_mode(), tqdm(total=sum(row.tokens for row in rows), desc=label, unit="token", mininterval=5) as bar:
        for batch in _batches(rows, token_budget):
            packed = pack_rows([rows[i] for i in batch]).to(device)
            logps = completion_logps(bare, packed).double()
            branches = sum(len(rows[i].completions) for i in batch)
            totals = iter(logps.new_zeros(branches).index_add_(0, packed.branch, logps).tolist())
            for i in batch:
                sums[i] = [next(totals) for _ in rows[i].completions]
                bar.update(rows[i].tokens)
    return sums


def agrees_with_plain_path(model: Any, row: PromptRow) -> bool:
    """Whether the shared-prompt pass gives the plain sums for one row, within the rounding of the model's dtype."""
    bare = _bare(model)
    if "flash" in bare.config._attn_implementation:
        return False  # takes no 4-D mask at all
    device = next(bare.parameters()).device
    with torch.inference_mode():
        packed = pack_rows([row]).to(device)
        logps = completion_logps(bare, packed)
    tolerance = rounding(bare.dtype)
    for number, completion in enumerate(row.completions):
        plain = sequence_logp(model, row.prompt, completion)
        if abs(float(logps[packed.branch == number].double().sum()) - plain) > tolerance * max(1.0, abs(plain)):
            return False
    return True


def rounding(dtype: torch.dtype) -> float:
    """Relative difference of two sums of log-probabilities that rounding alone explains."""
    return 2e-2 if dtype == torch.bfloat16 else 1e-4


def _bare(model: Any) -> PreTrainedModel:
    """The model under PEFT's wrapper, adapter layers included; a bare model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _batches(rows: Sequence[PromptRow], token_budget: int) -> Iterable[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: -rows[i].tokens)
    batch: list[int] = []
    for i in order:
        if batch and rows[batch[0]].tokens * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score_pairs(model: Any, pairs: pd.DataFrame, encoded: Sequence[EncodedPair], *, checkpoint: str, token_budget: int) -> pd.DataFrame:
    """Per-pair records of one checkpoint.

    A prompt is computed once for all its distinct responses, whichever pairs and objectives they serve.

    Args:
        model: the policy (adapter on) or the base (adapter off, or no adapter).
        pairs: `pair_id`, `prompt_id`, `objective`, `split`, one row a pair.
        encoded: the token ids of the same pairs, in the same order.
        checkpoint: "base", "stage1", ...
        token_budget: positions in one forward pass.

    Returns:
        The columns above and `checkpoint`, `chosen_logp`, `rejected_logp` (nats, float64), `chosen_tokens`, `rejected_tokens`.
    """
    trees: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for pair in encoded:
        branches = trees.setdefault(tuple(pair.prompt), {})
        branches |= {tuple(pair.chosen): None, tuple(pair.rejected): None}
    rows = [PromptRow(list(prompt), [list(c) for c in completions]) for prompt, completions in trees.items()]
    sums = score_rows(model, rows, token_budget=token_budget, label=f"scoring {checkpoint}")
    logp = {
        (prompt, completion): total
        for (prompt, completions), totals in zip(trees.items(), sums, strict=True)
        for completion, total in zip(completions, totals, strict=True)
    }
    records = pairs[["pair_id", "prompt_id", "objective", "split"]].reset_index(drop=True)
    return records.assign(
        checkpoint=checkpoint,
        chosen_logp=[logp[tuple(p.prompt), tuple(p.chosen)] for p in encoded],
        rejected_logp=[logp[tuple(p.prompt), tuple(p.rejected)] for p in encoded],
        chosen_tokens=[len(p.chosen) for p in encoded],
        rejected_tokens=[len(p.rejected) for p in encoded],
    )


def records_of(scores: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """The records of `pairs` in their order, from the records of many.

    Raises:
        StudyError: when a pair has no record.
    """
    keys = ["pair_id", "objective"]
    found = pairs[keys].merge(scores, on=keys, how="left", validate="one_to_one")
    if found["chosen_logp"].isna().any():
        raise StudyError(f"{int(found['chosen_logp'].isna().sum())} of {len(pairs)} pairs have no record: run 01_data_preparation again.")
    return found.astype({"chosen_tokens": int, "rejected_tokens": int})
