"""How far the policy has drifted from the base: the exact KL divergence over the whole vocabulary, position by position."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from seqdpo_utils.encoding import EncodedPair
from seqdpo_utils.scoring import CHECKED_ROWS, PackedRows, PromptRow, distrust, pack_rows, prompt_rows

KL_ROWS = 128
"""Positions whose two full distributions exist at one time: twice KL_ROWS x vocabulary numbers of eight bytes."""


def base_divergence(model: Any, pairs: pd.DataFrame, encoded: Sequence[EncodedPair], *, checkpoint: str) -> pd.DataFrame:
    """KL(policy || base) over the whole vocabulary, averaged over the positions that predict a completion's tokens.

    It is taken along the data's answers, not along samples of the policy: how far the two models differ on these texts. Policy and base are
    the same model, adapter on and off.

    Args:
        model: under PEFT, in evaluation mode.
        pairs: `pair_id`, `prompt_id`, `objective`, one row a pair.
        encoded: the token ids of the same pairs, in the same order.
        checkpoint: name of the policy.

    Returns:
        One row a completion: `pair_id`, `prompt_id`, `objective`, `checkpoint`, `side` ("chosen", "rejected"), `tokens`, `kl` (nats a token).
    """
    texts = prompt_rows(encoded)  # pairs of two objectives are often the same two answers: each is computed once
    together = bool(texts) and distrust(model, texts[:CHECKED_ROWS]) is None
    means = {}
    for text in texts:
        # a model that ignores the mask gets one answer at a time, where the mask is the usual one
        packed = [text] if together else [PromptRow(text.prompt, [answer]) for answer in text.completions]
        kl = torch.cat([_divergences(model, pack_rows([row])) for row in packed])
        for answer, part in zip(text.completions, kl.split([len(answer) for answer in text.completions]), strict=True):
            means[tuple(text.prompt), tuple(answer)] = float(part.mean())
    rows = [
        pair | {"checkpoint": checkpoint, "side": side, "tokens": len(answer), "kl": means[tuple(ids.prompt), tuple(answer)]}
        for pair, ids in zip(pairs[["pair_id", "prompt_id", "objective"]].to_dict("records"), encoded, strict=True)
        for side, answer in (("chosen", ids.chosen), ("rejected", ids.rejected))
    ]
    return pd.DataFrame(rows, columns=["pair_id", "prompt_id", "objective", "checkpoint", "side", "tokens", "kl"])


def _divergences(model: Any, packed: PackedRows) -> Tensor:
    """KL(policy || base) at each scored position, shape (N), double precision."""
    bare = model.get_base_model()
    head, packed = bare.get_output_embeddings(), packed.to(next(bare.parameters()).device)

    def states() -> Tensor:
        hidden = bare.base_model(input_ids=packed.ids, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])[packed.source]

    pieces = []
    with torch.inference_mode():
        on = states()
        with model.disable_adapter():
            off = states()
        for policy_state, base_state in zip(on.split(KL_ROWS), off.split(KL_ROWS), strict=True):
            policy = head(policy_state).double()
            with model.disable_adapter():  # the head too may carry an adapter
                base = head(base_state).double()
            pieces.append((torch.softmax(policy, 1) * (policy - base)).sum(1) - policy.logsumexp(1) + base.logsumexp(1))
    return torch.cat(pieces)
