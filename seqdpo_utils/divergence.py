"""How far the policy has drifted from the base: the exact KL divergence over the whole vocabulary."""

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from seqdpo_utils import scoring
from seqdpo_utils.encoding import EncodedPair
from seqdpo_utils.scoring import PackedRows, PromptRow, Scorer

KL_ROWS = 128
"""Positions whose two distributions exist at one time: about five times KL_ROWS x vocabulary numbers."""
_NAMES = ["pair_id", "prompt_id", "objective"]


def base_divergence(
    scorer: Scorer, pairs: pd.DataFrame, encoded: Sequence[EncodedPair], *, checkpoint: str
) -> pd.DataFrame:
    """KL(policy || base) over the whole vocabulary, averaged over the positions that predict a completion.

    It is taken along the data's answers, not along samples of the policy: how far the two models differ on
    these texts. Policy and base are the same model, adapter on and off.

    Args:
        scorer: over a model under PEFT, in evaluation mode.
        pairs: `pair_id`, `prompt_id`, `objective`, one row a pair.
        encoded: the token ids of the same pairs, in the same order.
        checkpoint: name of the policy.

    Returns:
        One row a completion: `pair_id`, `prompt_id`, `objective`, `checkpoint`, `side` ("chosen" or
        "rejected"), `tokens`, `kl` (nats a token).
    """
    texts = scoring.prompt_rows(encoded)  # pairs of two objectives are often the same two answers
    way = _alone if scorer.fault(texts) else _together
    means = {(tuple(row.prompt), tuple(row.completions[0])): mean for row, mean in way(scorer, texts)}
    rows = [
        (*names, checkpoint, side, len(answer), means[tuple(ids.prompt), tuple(answer)])
        for names, ids in zip(pairs[_NAMES].itertuples(index=False), encoded, strict=True)
        for side, answer in (("chosen", ids.chosen), ("rejected", ids.rejected))
    ]
    return pd.DataFrame(rows, columns=[*_NAMES, "checkpoint", "side", "tokens", "kl"])


@torch.inference_mode()
def _alone(scorer: Scorer, texts: list[PromptRow]) -> Iterator[tuple[PromptRow, float]]:
    """Completions with their mean KL, the way that suits every causal model: one at a time, all logits."""
    for row in scoring.one_a_row(texts):
        policy = scoring.padded_logits(scorer.model, [row])[0]
        with scorer.model.disable_adapter():
            yield row, _kl(policy, scoring.padded_logits(scorer.model, [row])[0]).mean().item()


@torch.inference_mode()
def _together(scorer: Scorer, texts: list[PromptRow]) -> Iterator[tuple[PromptRow, float]]:
    """Completions with their mean KL, each prompt computed once for policy and base."""
    # All batches with the adapter in the weights, then all without it: what is kept, hidden states, is small.
    with scoring.adapter_merged(scorer.model):
        policy_states = list(_states(scorer, texts))
    with scorer.model.disable_adapter():
        base_states = list(_states(scorer, texts))
    head = scoring.bare_model(scorer.model).get_output_embeddings()
    base_head = getattr(head, "base_layer", head)  # the head too may carry an adapter
    for (rows, packed, policy), (_, _, base) in zip(policy_states, base_states, strict=True):
        pieces = zip(policy.split(KL_ROWS), base.split(KL_ROWS), strict=True)
        kl = torch.cat([_kl(head(above), base_head(below)) for above, below in pieces])
        sums = torch.zeros(len(rows), dtype=kl.dtype, device=kl.device).index_add_(0, packed.branch, kl)
        yield from zip(rows, (sums / packed.branch.bincount()).tolist(), strict=True)


def _states(scorer: Scorer, texts: list[PromptRow]) -> Iterator[tuple[list[PromptRow], PackedRows, Tensor]]:
    """Completions of a batch, their tokens, and the hidden states that predict them."""
    bare = scoring.bare_model(scorer.model)
    prefix = scoring.prefix_cache(bare, texts)
    cached = prefix.get_seq_length()
    for batch in scoring.batches(texts, scorer.token_budget, cached=cached):
        rows = [texts[i] for i in batch]
        packed = scoring.pack_rows(rows, cached=cached).to(bare.device)
        yield scoring.one_a_row(rows), packed, scoring.hidden_states(bare, packed, prefix=prefix)


def _kl(policy: Tensor, base: Tensor) -> Tensor:
    """KL(policy || base) of logits (N, vocabulary), shape (N), in nats (float64).

    With p the policy and d the difference of the logits, KL = sum p d - log Z_policy + log Z_base. The
    vocabulary's numbers are float32, counted from each side's peak so that they are small where p is not;
    its sums are float64, because their digits cancel. Equal logits give exactly zero.
    """
    policy, base = policy.float(), base.float()
    policy, base = policy - policy.amax(1, keepdim=True), base - base.amax(1, keepdim=True)
    gap = policy - base
    weight, base_weight = policy.exp_(), base.exp_()
    total, base_total = (each.sum(1, dtype=torch.float64) for each in (weight, base_weight))
    return gap.mul_(weight).sum(1, dtype=torch.float64) / total - total.log() + base_total.log()
