"""Exact sums of log-probabilities over completion tokens, each prompt computed once.

A row of the batch holds one prompt and all its completions:

    [prompt without its last token | last + completion 1 | last + completion 2 | ...]

Every branch starts with its own copy of the prompt's last token, which predicts the branch's first token, and drops its
own last token, which predicts nothing that is scored. Positions restart after the prompt, and a mask hides the branches from
each other, so each branch sees exactly what it would see alone. Logits are computed where a completion token is
predicted and nowhere else.

The mask and the positions are arguments that causal models of transformers take, so nothing inside a model is touched. A cache of
the prompt's keys and values would do as well, but costs a second pass for every prompt. The beginning that all prompts of a
scoring share (the template's system message) is the one thing kept in such a cache. A model that does not honour the mask is
found out before the first sum is believed (`distrust`).
"""

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from seqdpo_utils.encoding import EncodedPair

logger = logging.getLogger(__name__)

HEAD_ROWS = 1024
"""Positions whose logits exist at one time: HEAD_ROWS x vocabulary numbers."""
CHECKED_ROWS = 2
"""Prompts that are also scored the plain way before the fast pass is believed."""


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

    `ids` and `positions` are (B, L); `mask` is (B, 1, L, P + L), true where a query may look, P tokens of every prompt being
    in a cache; `source` (N) are the flat positions whose logits predict `target` (N); `branch` (N) numbers the
    completion that a target belongs to.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    source: Tensor
    target: Tensor
    branch: Tensor

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def pack_rows(rows: Sequence[PromptRow], *, cached: int = 0) -> PackedRows:
    """Lay prompts and completions out as the module's text says.

    Completions are numbered through all rows, in order. Pads are ordinary tokens that see the prompt and
    themselves, so that no query is left without a key; nothing reads them.

    Args:
        rows: prompts with their completions.
        cached: so many first tokens of every prompt are left out; a cache holds them.
    """
    length = max(row.tokens for row in rows) - cached
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, segment = torch.zeros_like(ids), torch.full_like(ids, -1)
    source, target, branch = [], [], []
    number = 0
    for i, row in enumerate(rows):
        shared = len(row.prompt) - 1
        flat, where, part = row.prompt[cached:-1], list(range(cached, shared)), [0] * (shared - cached)
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
    mask = torch.cat([torch.ones(len(rows), 1, length, cached, dtype=torch.bool), mask], dim=3)
    return PackedRows(ids, positions, mask, torch.tensor(source), torch.tensor(target), torch.tensor(branch))


def completion_logps(model: PreTrainedModel, packed: PackedRows, *, cache: DynamicCache | None = None) -> Tensor:
    """Log-probability of every scored token, shape (N), differentiable with respect to everything but the output head.

    Args:
        model: a causal language model of transformers (not its PEFT wrapper) that takes a 4-D mask and position ids.
        packed: on the model's device.
        cache: keys and values of the tokens that `packed` leaves out; it grows by this pass.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    inputs = {"input_ids": packed.ids, "attention_mask": packed.mask, "position_ids": packed.positions}
    hidden = backbone(**inputs, past_key_values=cache, use_cache=cache is not None).last_hidden_state
    return _HeadLogps.apply(hidden.reshape(-1, hidden.shape[-1])[packed.source], head, packed.target)


class _HeadLogps(torch.autograd.Function):
    """log softmax(head(h))[target] by pieces of HEAD_ROWS rows; no more logits than that exist, in either direction.

    The gradient of row i is g_i (W[t_i] - p_i W), p_i being the softmax: all but the factor g_i is known in the forward pass, so it is computed there
    and the logits are gone before the backward pass begins. The head is frozen, as LoRA leaves it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: torch.nn.Module, target: Tensor) -> Tensor:
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        directions = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = head(hidden[rows]).float()
            # gather minus logsumexp: log_softmax over a large vocabulary loses digits on a CPU
            normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
            logps[rows] = (logits.gather(1, target[rows, None]) - normaliser)[:, 0]
            if directions is not None:
                softmax = logits.sub_(normaliser).exp_().to(head.weight.dtype)
                directions[rows] = (head.weight[target[rows]] - softmax @ head.weight).to(hidden.dtype)
        ctx.save_for_backward(directions)
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (directions,) = ctx.saved_tensors
        return gradient[:, None].to(directions.dtype) * directions, None, None


def sequence_logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    """The plain way: one unpadded sequence, all logits, one sum in nats. Slow; what everything else is checked against."""
    return padded_sums(model, [PromptRow(prompt, [completion])])[0].item()


def padded_sums(model: Any, rows: Sequence[PromptRow]) -> Tensor:
    """Sums of rows with one completion each, the way that suits every causal model: padded on the right, all logits, no mask.

    A causal model's token does not see what stands after it, so the pads change nothing.
    """
    sequences = [torch.tensor([*row.prompt, *row.completions[0]]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    sums = []
    for i, row in enumerate(rows):
        first, last = len(row.prompt), len(sequences[i])
        here = logits[i, first - 1 : last - 1].double()
        sums.append((here.gather(1, ids[i, first:last, None])[:, 0] - torch.logsumexp(here, dim=1)).sum())
    return torch.stack(sums)


def shared_sums(model: PreTrainedModel, rows: Sequence[PromptRow], *, prefix: DynamicCache | None = None) -> Tensor:
    """Sums of all completions of all rows, in order (float64), each prompt computed once.

    Args:
        model: bare, not its PEFT wrapper.
        rows: prompts with their completions.
        prefix: keys and values of the tokens with which every prompt begins, from `prefix_cache`.
    """
    cached = prefix.get_seq_length() if prefix is not None else 0
    packed = pack_rows(rows, cached=cached).to(next(model.parameters()).device)
    cache = copy.deepcopy(prefix)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    with torch.inference_mode():
        logps = completion_logps(model, packed, cache=cache).double()
    return logps.new_zeros(sum(len(row.completions) for row in rows)).index_add_(0, packed.branch, logps)


def prefix_cache(model: PreTrainedModel, rows: Sequence[PromptRow]) -> DynamicCache | None:
    """Keys and values of the tokens with which every prompt begins, a prompt's last token left out; None when there are none."""
    shortest, longest = min(row.prompt[:-1] for row in rows), max(row.prompt[:-1] for row in rows)  # first and last in lexical order
    common = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shortest, longest, strict=False))]
    if not common:
        return None
    ids = torch.tensor([common], device=next(model.parameters()).device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def distrust(model: Any, rows: Sequence[PromptRow]) -> str | None:
    """Why the shared pass may not be used for this model; None when it gives the plain sums for a few rows.

    The rows are packed together, so that pads, branches, the cached beginning and the merged adapter are all put to the test. The tolerance is
    the rounding of the model's dtype.
    """
    rows, bare, training = rows[:CHECKED_ROWS], bare_model(model), model.training
    if "flash" in bare.config._attn_implementation:
        return _logged("flash attention takes no 4-D mask, so no shared prompts")
    model.eval()
    try:
        with adapter_merged(model):
            sums = shared_sums(bare, rows, prefix=prefix_cache(bare, rows)).tolist()
        plain = [sequence_logp(model, row.prompt, completion) for row in rows for completion in row.completions]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        return _logged(f"the shared-prompt pass fails for {type(bare).__name__} ({error})")
    finally:
        model.train(training)
    for ours, theirs in zip(sums, plain, strict=True):
        if not abs(ours - theirs) <= rounding(bare.dtype) * max(1.0, abs(theirs)):
            return _logged(f"the shared-prompt pass gives {ours:.3f} nats for {type(bare).__name__} where plain scoring gives {theirs:.3f}")
    return None


def _logged(reason: str) -> str:
    logger.warning("%s: padded rows, one a completion, are used instead", reason)
    return reason


def rounding(dtype: torch.dtype) -> float:
    """Relative difference of two sums of log-probabilities that rounding alone explains."""
    return 2e-2 if dtype == torch.bfloat16 else 1e-4


def score_rows(model: Any, rows: Sequence[PromptRow], *, token_budget: int, label: str = "scoring", trusted: bool | None = None) -> list[list[float]]:
    """Sums of log-probabilities of every completion, in nats, in the order of `rows`.

    Rows of like length share a batch of at most `token_budget` tokens, pads included. Where the shared pass is not
    trusted, every completion is a padded row of its own: slower, right for every causal model, and the log says why.

    Args:
        model: a causal language model, bare or under PEFT with the adapter in the state to be scored.
        rows: prompts with their completions.
        token_budget: positions in one forward pass.
        label: what the progress bar says.
        trusted: what an earlier check of this model found; None checks now.
    """
    if trusted is None:
        trusted = not rows or distrust(model, rows) is None
    counts = [len(row.completions) for row in rows]
    if not trusted:
        rows = [PromptRow(row.prompt, [completion]) for row in rows for completion in row.completions]
    begins = list(itertools.accumulate((len(row.completions) for row in rows), initial=0))
    sums = [0.0] * begins[-1]
    with contextlib.ExitStack() as stack:
        prefix = None
        if trusted:
            model = stack.enter_context(adapter_merged(model))
            prefix = prefix_cache(model, rows) if len(rows) > 1 else None
        bar = stack.enter_context(tqdm(total=sum(row.tokens for row in rows), desc=label, unit="token", mininterval=5))
        for batch in _batches(rows, token_budget, cached=prefix.get_seq_length() if prefix is not None else 0):
            here = [rows[i] for i in batch]
            totals = iter((shared_sums(model, here, prefix=prefix) if trusted else padded_sums(model, here)).tolist())
            for i in batch:
                sums[begins[i] : begins[i + 1]] = itertools.islice(totals, len(rows[i].completions))
                bar.update(rows[i].tokens)
    flat = iter(sums)
    return [list(itertools.islice(flat, count)) for count in counts]


@contextlib.contextmanager
def adapter_merged(model: Any) -> Iterator[PreTrainedModel]:
    """The bare model with its adapter's update W + s B A in place of W and the two thin products; afterwards every weight is what it was, bit by bit.

    Only float32 weights are merged. In bfloat16 the sum would be rounded, which changes the policy, and quantised weights cannot take it: such models
    keep their adapter beside the weights, as does one whose adapter is off. Costs a second copy of the adapted weights while it lasts.
    """
    bare = bare_model(model)
    layers = [module for module in bare.modules() if isinstance(module, BaseTunerLayer)]
    exact = bare.dtype == torch.float32 and not getattr(bare, "is_quantized", False)
    if not exact or any(layer.merged or layer.disable_adapters for layer in layers):
        yield bare
        return
    kept = [(layer.get_base_layer(), dict(layer.get_base_layer().named_parameters(recurse=False))) for layer in layers]
    for base, parameters in kept:
        for name, parameter in parameters.items():  # a parameter of its own: an output head may be tied to embeddings, which stay as they are
            setattr(base, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
    try:
        for layer in layers:
            layer.merge()
        yield bare
    finally:
        for layer in layers:
            layer.unmerge()
        for base, parameters in kept:
            for name, parameter in parameters.items():
                setattr(base, name, parameter)


def bare_model(model: Any) -> PreTrainedModel:
    """The model under PEFT's wrapper, adapter layers included; a bare model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _batches(rows: Sequence[PromptRow], token_budget: int, *, cached: int) -> Iterable[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: -rows[i].tokens)
    batch: list[int] = []
    for i in order:
        if batch and (rows[batch[0]].tokens - cached) * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score_pairs(
    model: Any, pairs: pd.DataFrame, encoded: Sequence[EncodedPair], *, checkpoint: str, token_budget: int, trusted: bool | None = None
) -> pd.DataFrame:
    """Per-pair records of one checkpoint.

    A prompt is computed once for all its distinct responses, whichever pairs and objectives they serve.

    Args:
        model: the policy (adapter on) or the base (adapter off, or no adapter).
        pairs: `pair_id`, `prompt_id`, `objective`, `split`, one row a pair.
        encoded: the token ids of the same pairs, in the same order.
        checkpoint: "base", "stage1", ...
        token_budget: positions in one forward pass.
        trusted: as for `score_rows`.

    Returns:
        The columns of `recording.RECORDS`, in the order of `pairs`.
    """
    rows = prompt_rows(encoded)
    sums = score_rows(model, rows, token_budget=token_budget, label=f"scoring {checkpoint}", trusted=trusted)
    logp = {
        (tuple(row.prompt), tuple(completion)): total
        for row, totals in zip(rows, sums, strict=True)
        for completion, total in zip(row.completions, totals, strict=True)
    }
    records = pairs[["pair_id", "prompt_id", "objective", "split"]].reset_index(drop=True)
    return records.assign(
        checkpoint=checkpoint,
        chosen_logp=[logp[tuple(p.prompt), tuple(p.chosen)] for p in encoded],
        rejected_logp=[logp[tuple(p.prompt), tuple(p.rejected)] for p in encoded],
        chosen_tokens=[len(p.chosen) for p in encoded],
        rejected_tokens=[len(p.rejected) for p in encoded],
    )


def prompt_rows(encoded: Iterable[EncodedPair]) -> list[PromptRow]:
    """One row for every distinct prompt, with its distinct completions in the order of their first appearance."""
    trees: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for pair in encoded:
        trees.setdefault(tuple(pair.prompt), {}).update({tuple(pair.chosen): None, tuple(pair.rejected): None})
    return [PromptRow(list(prompt), [list(c) for c in completions]) for prompt, completions in trees.items()]
