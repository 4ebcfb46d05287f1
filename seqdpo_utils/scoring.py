"""Exact sums of log-probabilities over completion tokens, each prompt computed once.

A row of the batch holds one prompt and all its completions:

    [prompt without its last token | last + completion 1 | last + completion 2 | ...]

Every branch starts with its own copy of the prompt's last token, which predicts the branch's first token,
and drops its own last token, which predicts nothing that is scored. Positions restart after the prompt, and
a mask hides the branches from each other, so each branch sees exactly what it would see alone. Logits are
computed where a completion token is predicted and nowhere else. `pack_rows` shows a row in full.

The mask and the positions are arguments that causal models of transformers take, so nothing inside a model
is touched. A cache of the prompt's keys and values would do as well, but costs a second pass for every
prompt. The beginning that all prompts of a scoring share (the template's system message) is the one thing
kept in such a cache. A model that does not honour the mask is found out before the first sum is believed
(`Scorer.fault`).
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
"""Prompts that are also scored the plain way before the shared pass is believed."""
PADS = 32
"""A batch ends before more than one part in PADS of the token budget is pads."""


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

    `ids` and `positions` are (B, L); `mask` is (B, 1, L, P + L), true where a query may look, P tokens of
    every prompt being in a cache; `source` (N) are the flat positions whose logits predict `target` (N);
    `branch` (N) numbers the completion that a target belongs to.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    source: Tensor
    target: Tensor
    branch: Tensor

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(*(tensor.to(device) for tensor in vars(self).values()))


def pack_rows(rows: Sequence[PromptRow], *, cached: int = 0) -> PackedRows:
    """Lay prompts and completions out in rows whose branches do not see each other.

    The prompt p q r with the completions a b and u v w, of which b and w are predicted but never read:

                  prompt   branch 1   branch 2
        ids       p  q     r  a       r  u  v
        position  0  1     2  3       2  3  4      each branch goes on where the prompt stopped
        segment   0  0     1  1       2  2  2
        predicts  .  .     a  b       u  v  w      `source` lists these five places, `target` their tokens
        mask p    1  0     0  0       0  0  0      one line a query: it sees the keys that are not
             q    1  1     0  0       0  0  0      behind it and are of the prompt or of its own segment
             r    1  1     1  0       0  0  0
             a    1  1     1  1       0  0  0
             r    1  1     0  0       1  0  0
             u    1  1     0  0       1  1  0
             v    1  1     0  0       1  1  1

    Completions are numbered through all rows, in order.

    Args:
        rows: prompts with their completions.
        cached: so many first tokens of every prompt are left out of the row; a cache holds them, and every
            query sees them.
    """
    length = max(row.tokens for row in rows) - cached
    # What no row fills stays a pad: an ordinary token of segment -1, which sees the prompt and pads before it
    # (a query without any key would give NaN) and which nothing reads.
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, segment = torch.zeros_like(ids), torch.full_like(ids, -1)
    source, target, branch = [], [], []
    number = itertools.count()
    for i, row in enumerate(rows):
        shared = len(row.prompt) - 1  # the prompt's last token predicts, so each branch has a copy of its own
        flat, where = row.prompt[cached:shared], list(range(cached, shared))
        part = [0] * len(flat)
        for k, completion in enumerate(row.completions, start=1):
            first = i * length + len(flat)  # place, over all rows, of the copy that begins this branch
            source.extend(range(first, first + len(completion)))
            target.extend(completion)
            branch.extend([next(number)] * len(completion))
            flat = [*flat, row.prompt[-1], *completion[:-1]]
            where.extend(range(shared, shared + len(completion)))
            part.extend([k] * len(completion))
        ids[i, : len(flat)] = torch.tensor(flat)
        positions[i, : len(flat)] = torch.tensor(where)
        segment[i, : len(flat)] = torch.tensor(part)
    key, query = segment[:, None, None, :], segment[:, None, :, None]
    # Order within the row is order in time for every pair of tokens that the segments let see each other.
    mask = ((key == 0) | (key == query)) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.cat([torch.ones(len(rows), 1, length, cached, dtype=torch.bool), mask], dim=3)
    return PackedRows(ids, positions, mask, *map(torch.tensor, (source, target, branch)))


def hidden_states(model: Any, packed: PackedRows, *, prefix: DynamicCache | None = None) -> Tensor:
    """Last hidden states at the positions that predict a scored token, shape (N, width).

    Args:
        model: a causal language model of transformers (not its PEFT wrapper) that takes a 4-D mask and
            position ids.
        packed: on the model's device.
        prefix: keys and values of the tokens that `packed` leaves out, the same for every row.
    """
    cache = copy.deepcopy(prefix)  # a pass adds its own keys to the cache that it is given
    if cache is not None:
        cache.batch_repeat_interleave(len(packed.ids))
    inputs = {"input_ids": packed.ids, "attention_mask": packed.mask, "position_ids": packed.positions}
    output = model.base_model(**inputs, past_key_values=cache, use_cache=cache is not None)
    return output.last_hidden_state.flatten(0, 1)[packed.source]


def completion_logps(model: Any, packed: PackedRows, *, prefix: DynamicCache | None = None) -> Tensor:
    """Log-probability of every scored token, shape (N); the gradient does not reach the output head.

    Args: as for `hidden_states`.
    """
    hidden = hidden_states(model, packed, prefix=prefix)
    return _HeadLogps.apply(hidden, model.get_output_embeddings(), packed.target)


class _HeadLogps(torch.autograd.Function):
    """log softmax(head(h))[target] by pieces of HEAD_ROWS rows; no more logits than that exist at a time.

    The gradient of row i is g_i (W[t_i] - p_i W), p_i being the softmax: all but the factor g_i is known in
    the forward pass, so it is computed there and the logits are gone before the backward pass begins. The
    head is frozen, as LoRA leaves it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: torch.nn.Module, target: Tensor) -> Tensor:
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        directions = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = head(hidden[rows]).float()
            # Gather minus logsumexp, because log_softmax over a large vocabulary loses digits on a CPU.
            # In place, because fresh memory of this size can cost more than what is computed in it.
            peak = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target[rows, None]) - peak
            exponentials = logits.sub_(peak).exp_()
            total = exponentials.sum(1, keepdim=True)
            logps[rows] = (chosen - total.log())[:, 0]
            if directions is not None:
                softmax = exponentials.div_(total).to(head.weight.dtype)
                directions[rows] = (head.weight[target[rows]] - softmax @ head.weight).to(hidden.dtype)
        ctx.save_for_backward(directions)
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (directions,) = ctx.saved_tensors
        return gradient[:, None].to(directions.dtype) * directions, None, None


def padded_logits(model: Any, rows: Sequence[PromptRow]) -> list[Tensor]:
    """Logits that predict the completion of each row, (tokens, vocabulary), one completion a row.

    The way that suits every causal model: padded on the right, no mask. A token does not see what stands
    after it, so the pads change nothing.
    """
    inputs = [torch.tensor([*row.prompt, *row.completions[0][:-1]]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    parts = zip(rows, inputs, logits, strict=True)
    return [part[len(row.prompt) - 1 : len(tokens)] for row, tokens, part in parts]


def padded_sums(model: Any, rows: Sequence[PromptRow]) -> Tensor:
    """Sums of rows with one completion each, from `padded_logits`, in nats (float64)."""
    sums = []
    for row, logits in zip(rows, padded_logits(model, rows), strict=True):
        target, logits = torch.tensor(row.completions[0], device=logits.device), logits.double()
        sums.append((logits.gather(1, target[:, None])[:, 0] - torch.logsumexp(logits, dim=1)).sum())
    return torch.stack(sums)


def sequence_logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    """The plain way: one unpadded sequence, all logits, one sum in nats. Everything is checked against it."""
    return padded_sums(model, [PromptRow(prompt, [completion])])[0].item()


def shared_sums(model: PreTrainedModel, rows: Sequence[PromptRow], *, prefix: DynamicCache) -> Tensor:
    """Sums of all completions of all rows, in order (float64), each prompt computed once.

    Args:
        model: bare, not its PEFT wrapper.
        rows: prompts with their completions.
        prefix: keys and values of the tokens with which every prompt begins, from `prefix_cache`.
    """
    packed = pack_rows(rows, cached=prefix.get_seq_length()).to(model.device)
    with torch.inference_mode():
        logps = completion_logps(model, packed, prefix=prefix).double()
    return logps.new_zeros(sum(len(row.completions) for row in rows)).index_add_(0, packed.branch, logps)


def prefix_cache(model: PreTrainedModel, rows: Sequence[PromptRow]) -> DynamicCache:
    """Keys and values of the tokens with which every prompt begins; empty where they begin differently.

    A prompt's last token stays out, since every branch needs its own. A single row has nothing to share.
    """
    prompts = [row.prompt[:-1] for row in rows]
    # the prompts' first tokens, second tokens, and so on
    columns = zip(*prompts, strict=False) if len(rows) > 1 else ()
    common = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    cache = DynamicCache(config=model.config)
    if common:
        ids = torch.tensor([common], device=model.device)
        with torch.inference_mode():
            model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def shared_pass_fault(model: Any, rows: Sequence[PromptRow]) -> str | None:
    """Reason to avoid shared-prompt scoring, or None if it matches plain scoring of these rows.

    The rows are packed together, so that pads, branches, the cached beginning and the merged adapter are all
    put to the test. The last completion of each row is compared: a model that is deaf to mask or positions
    goes wrong in later branches. The tolerance is the rounding of the model's dtype. A reason is also logged.
    """
    bare, training = bare_model(model), model.training
    if "flash" in bare.config._attn_implementation:
        return _logged("flash attention takes no 4-D mask, so no shared prompts")
    name, ends = type(bare).__name__, list(itertools.accumulate(len(row.completions) for row in rows))
    model.eval()
    try:
        with adapter_merged(model):
            sums = shared_sums(bare, rows, prefix=prefix_cache(bare, rows)).tolist()
        plain = [sequence_logp(model, row.prompt, row.completions[-1]) for row in rows]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return _logged(f"the shared-prompt pass fails for {name} ({error})")
    finally:
        model.train(training)
    for end, right in zip(ends, plain, strict=True):
        if not abs(sums[end - 1] - right) <= rounding(bare.dtype) * max(1.0, abs(right)):
            gap = f"{sums[end - 1]:.3f} nats for {name} where plain scoring gives {right:.3f}"
            return _logged(f"the shared-prompt pass gives {gap}")
    return None


def _logged(reason: str) -> str:
    logger.warning("%s: padded rows, one a completion, are used instead", reason)
    return reason


def rounding(dtype: torch.dtype) -> float:
    """Relative difference of two sums of log-probabilities that rounding alone explains."""
    return 2e-2 if dtype == torch.bfloat16 else 1e-4


class Scorer:
    """Scores completions with one model, and finds out once whether their prompts may be shared.

    The first rows are also scored the plain way (`shared_pass_fault`). That proves how the model treats mask,
    positions and cache, which does not change while it lives. It proves the merging of the adapter only if
    the merge added something: a fresh adapter, B = 0, adds nothing, nor does one that is off. So there are
    two things to prove, each proven once: the first call proves the shared pass on CHECKED_ROWS rows; the
    first call in which the merge adds something, if it is a later one, proves the merge on one completion.
    When either fails, every completion is a padded row of its own from then on.

    Args:
        model: a causal language model, bare or under PEFT; a call scores it in the state that it is then in.
        token_budget: positions in one forward pass, pads included.
    """

    def __init__(self, model: Any, *, token_budget: int) -> None:
        self.model, self.token_budget = model, token_budget
        self._fault: str | None = None
        self._proven: set[str] = set()

    def fault(self, rows: Sequence[PromptRow]) -> str | None:
        """Reason to score on padded rows, one a completion; None where prompts may be shared."""
        needed = {"pass", "merge"} if _merge_adds(self.model) else {"pass"}
        if rows and self._fault is None and not needed <= self._proven:
            few = one_a_row(rows[:1])[:1] if self._proven else rows[:CHECKED_ROWS]
            self._fault, self._proven = shared_pass_fault(self.model, few), needed
        return self._fault

    def sums(self, rows: Sequence[PromptRow], *, label: str = "scoring") -> list[list[float]]:
        """Sums of log-probabilities of every completion, in nats, in the order of `rows`.

        Rows of like length share a batch of at most `token_budget` tokens.

        Args:
            rows: prompts with their completions.
            label: what the progress bar says.
        """
        shared = bool(rows) and self.fault(rows) is None
        parts = rows if shared else one_a_row(rows)
        sums: dict[int, list[float]] = {}
        total = sum(row.tokens for row in parts)
        ready = adapter_merged(self.model) if shared else contextlib.nullcontext(self.model)
        with ready as model, tqdm(total=total, desc=label, unit="token", mininterval=5) as bar:
            prefix = prefix_cache(model, parts) if shared else DynamicCache()
            for batch in batches(parts, self.token_budget, cached=prefix.get_seq_length()):
                here = [parts[i] for i in batch]
                found = shared_sums(model, here, prefix=prefix) if shared else padded_sums(model, here)
                each = found.split([len(row.completions) for row in here])
                sums |= {i: part.tolist() for i, part in zip(batch, each, strict=True)}
                bar.update(sum(row.tokens for row in here))
        flat = itertools.chain.from_iterable(sums[i] for i in range(len(parts)))
        return [list(itertools.islice(flat, len(row.completions))) for row in rows]

    def records(self, pairs: pd.DataFrame, encoded: list[EncodedPair], *, checkpoint: str) -> pd.DataFrame:
        """Per-pair records of one checkpoint.

        A prompt is computed once for all its distinct responses, whichever pairs and objectives they serve.

        Args:
            pairs: `pair_id`, `prompt_id`, `objective`, `split`, one row a pair.
            encoded: the token ids of the same pairs, in the same order.
            checkpoint: "base", or the chain after whose last stage the model is scored.

        Returns:
            The columns of `records.RECORDS`, in the order of `pairs`.
        """
        rows = prompt_rows(encoded)
        logp = {
            (tuple(row.prompt), tuple(completion)): total
            for row, totals in zip(rows, self.sums(rows, label=f"scoring {checkpoint}"), strict=True)
            for completion, total in zip(row.completions, totals, strict=True)
        }
        records = pairs[["pair_id", "prompt_id", "objective", "split"]].reset_index(drop=True)
        return records.assign(
            checkpoint=checkpoint,
            chosen_logp=[logp[tuple(pair.prompt), tuple(pair.chosen)] for pair in encoded],
            rejected_logp=[logp[tuple(pair.prompt), tuple(pair.rejected)] for pair in encoded],
            chosen_tokens=[len(pair.chosen) for pair in encoded],
            rejected_tokens=[len(pair.rejected) for pair in encoded],
        )


def prompt_rows(encoded: Iterable[EncodedPair]) -> list[PromptRow]:
    """One row for every distinct prompt, with its distinct completions in the order of first appearance."""
    trees: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for pair in encoded:
        completions = trees.setdefault(tuple(pair.prompt), {})
        completions |= {tuple(pair.chosen): None, tuple(pair.rejected): None}
    return [PromptRow(list(prompt), [list(c) for c in completions]) for prompt, completions in trees.items()]


def one_a_row(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The same completions in the same order, each in a row of its own."""
    return [PromptRow(row.prompt, [completion]) for row in rows for completion in row.completions]


def batches(rows: Sequence[PromptRow], token_budget: int, *, cached: int) -> Iterator[list[int]]:
    """Indices of rows of like length, the longest first, at most `token_budget` tokens with pads a batch.

    A batch also ends before its pads exceed one part in PADS of the budget: a pad costs as much as a token,
    another pass costs little.

    Args:
        rows: in any order; one row alone may exceed the budget.
        token_budget: rows of a batch times the tokens of its longest.
        cached: so many tokens of every row lie in a cache and are not computed.
    """
    batch, useful = [], 0
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].tokens):
        tokens = rows[i].tokens - cached
        computed = (rows[batch[0]].tokens - cached) * (len(batch) + 1) if batch else tokens
        if batch and (computed > token_budget or computed - useful - tokens > token_budget / PADS):
            yield batch
            batch, useful = [], 0
        batch.append(i)
        useful += tokens
    if batch:
        yield batch


@contextlib.contextmanager
def adapter_merged(model: Any) -> Iterator[PreTrainedModel]:
    """The bare model with its adapter's update in its weights: W + s B A in place of W and two thin products.

    Afterwards every weight is what it was, bit by bit. Only float32 weights are merged: in bfloat16 the sum
    would be rounded, which changes the policy, and quantised weights cannot take it. Such models keep their
    adapter beside the weights, as does one whose adapter is off. Costs a second copy of the adapted weights
    while it lasts.
    """
    layers = _mergeable(model)
    bases = [layer.get_base_layer() for layer in layers]
    kept = [(base, *item) for base in bases for item in base.named_parameters(recurse=False)]
    for base, name, weight in kept:
        # a parameter of its own: an output head may be tied to the embeddings, which stay as they are
        setattr(base, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
    try:
        for layer in layers:
            layer.merge()
        yield bare_model(model)
    finally:
        for layer in layers:
            layer.merged_adapters.clear()  # not `unmerge`: the merged copies are thrown away as they are
        for base, name, weight in kept:
            setattr(base, name, weight)


def _mergeable(model: Any) -> list[BaseTunerLayer]:
    """The adapter's layers where their update can be added to the weights exactly, else none."""
    bare = bare_model(model)
    layers = [module for module in bare.modules() if isinstance(module, BaseTunerLayer)]
    exact = bare.dtype == torch.float32 and not getattr(bare, "is_quantized", False)
    busy = any(layer.merged or layer.disable_adapters for layer in layers)
    return layers if exact and not busy else []


def _merge_adds(model: Any) -> bool:
    """Whether merging the adapter changes a weight: not if it is off, nor while each B is zero."""
    parameters = (item for layer in _mergeable(model) for item in layer.named_parameters())
    return any("lora_B" in name and bool(weight.any()) for name, weight in parameters)


def bare_model(model: Any) -> PreTrainedModel:
    """The model under PEFT's wrapper, adapter layers included; a bare model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
