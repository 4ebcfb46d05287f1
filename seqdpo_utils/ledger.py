"""The forgetting ledger: what each step of a stage did to the loss of an earlier objective.

Along the weights theta_0, theta_1, ... the change of the earlier objective's loss L on fixed pairs is the
path integral of its gradient g. Between two measured points it is entered as the trapezoid

    L(theta_b) - L(theta_a)  ~  (g(theta_a) + g(theta_b)) / 2 . (theta_b - theta_a)

with the displacement that the optimiser really made. The product is a sum over the adapter's parameters, so
entries add up over steps, layers and modules. What is left between their sum and the measured change is the
rest. It falls with the square of the distance between two points: measuring more often closes the ledger.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from seqdpo_utils.movement import place_of

KEY = ["stage", "previous_objective", "split"]
"""What tells one ledger from another; `split`: "train" (pairs that were trained on) or "probe" (held out)."""
_SEGMENT = [*KEY, "from_step", "step"]
PARTS = ("left", "curvature", "measured")
"""Of a change: what the gradient at the start foretells, what its change on the way adds, and the whole."""
_VALUES = ("term", "left", "loss_before", "loss_after")
LEDGER_COLUMNS = (*_SEGMENT, "layer", "module", *_VALUES)
LEDGER_PAIR_COLUMNS = (*_SEGMENT, "pair_id", "prompt_id", *_VALUES)
LOSS_ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2}
"""Change of a mean DPO loss, in nats, that rounding alone may make.

Sums of log-probabilities agree to 6e-5 nats in float32 and to half a nat in bfloat16.
"""
CANCELLED = 0.1
"""Report no share when the net change is under 10 % of the summed absolute segment changes."""


class ProbePoint(NamedTuple):
    """State after `step` optimiser steps: of each pair its loss (nats) and its gradient by parameter."""

    step: int
    losses: Sequence[float]
    gradients: Sequence[Sequence[Tensor]]


Rows = list[dict[str, int | float | str | None]]


def segment_rows(
    names: Sequence[str], start: ProbePoint, end: ProbePoint, moved: Sequence[Tensor]
) -> tuple[Rows, Rows]:
    """Entries of one segment: of the mean loss by layer and module, and of each pair's loss.

    Args:
        names: parameter names, in the order of the gradients.
        start, end: the two ends, at weights that differ by `moved`.
        moved: weights at the end minus weights at the start.

    Returns:
        Rows with `from_step`, `step`, `term` (trapezoid), `left` (gradient of the start alone),
        `loss_before`, `loss_after`: one a `layer` and `module`, which repeats the two mean losses of the
        whole segment, and one a pair, in the order of the points.
    """
    # for each pair its products with the move, (2 ends, parameters); the gradients may lie on another device
    products = torch.stack([
        torch.stack([_products(point.gradients[pair], moved) for point in (start, end)])
        for pair in range(len(start.losses))
    ])  # fmt: skip
    left, term = products[:, 0], products.mean(dim=1)
    steps = {"from_step": start.step, "step": end.step}
    means = {"loss_before": sum(start.losses) / len(start.losses)}
    means |= {"loss_after": sum(end.losses) / len(end.losses)}
    entries: dict[tuple[int | None, str], list[float]] = {}
    for name, both in zip(names, torch.stack([term.mean(0), left.mean(0)], dim=1).tolist(), strict=True):
        entry = entries.setdefault(place_of(name), [0.0, 0.0])
        entry[:] = entry[0] + both[0], entry[1] + both[1]
    by_place = [
        {**steps, "layer": layer, "module": module, "term": entry[0], "left": entry[1], **means}
        for (layer, module), entry in entries.items()
    ]
    whole = zip(term.sum(1).tolist(), left.sum(1).tolist(), start.losses, end.losses, strict=True)
    return by_place, [steps | dict(zip(_VALUES, values, strict=True)) for values in whole]


def _products(gradient: Sequence[Tensor], moved: Sequence[Tensor]) -> Tensor:
    """Inner products parameter by parameter, (parameters,), in double precision."""
    pieces = zip(gradient, moved, strict=True)
    return torch.stack([g.double().flatten() @ m.to(g.device).double().flatten() for g, m in pieces])


def segments(ledger: pd.DataFrame) -> pd.DataFrame:
    """Sum of the entries of each segment, beside the measured change.

    Args:
        ledger: rows of `LEDGER_COLUMNS`.

    Returns:
        The columns of `KEY`, `from_step`, `step`, `term`, `left`, `loss_before`, `loss_after`, `measured`
        (after minus before), `rest` (measured minus term); losses in nats.
    """
    how = {"term": "sum", "left": "sum", "loss_before": "first", "loss_after": "first"}
    found = ledger.groupby(_SEGMENT, sort=False, as_index=False).agg(how)
    measured = found["loss_after"] - found["loss_before"]
    return found.assign(measured=measured, rest=measured - found["term"])


def totals(ledger: pd.DataFrame, *, dtype: str) -> pd.DataFrame:
    """The ledger's bottom line for each stage, earlier objective and split.

    The share is left out where it would be a ratio of errors: where the measured change is within rounding
    (`LOSS_ROUNDING`) or what is left of ups and downs that cancel (`CANCELLED`).

    Args:
        ledger: rows of `LEDGER_COLUMNS`; none is allowed.
        dtype: of the run, a key of `LOSS_ROUNDING`.

    Returns:
        The columns of `KEY`, `segments`, `explained` (sum of the trapezoids), `left` (sum of the left ends),
        `measured`, `rest`, `path` (sum of the absolute changes of the segments), all in nats, and `share`
        (explained / measured; null where not defined).
    """
    table = segments(ledger).rename(columns={"term": "explained"})
    table = table.assign(segments=1, path=table["measured"].abs())
    summed = ["segments", "explained", "left", "measured", "rest", "path"]
    found = table.groupby(KEY, sort=False, as_index=False)[summed].sum()
    size = found["measured"].abs()
    defined = (size > LOSS_ROUNDING[dtype]) & (size >= CANCELLED * found["path"])
    return found.assign(share=(found["explained"] / found["measured"]).where(defined).astype("Float64"))


def by_pair(pairs: pd.DataFrame) -> pd.DataFrame:
    """What a stage did to the loss of each pair, in nats.

    Two of these, of stages that differ in one thing, may be subtracted: both look back at the same pairs.

    Args:
        pairs: rows of `LEDGER_PAIR_COLUMNS`.

    Returns:
        `left` (direction), `curvature` (what the trapezoid adds), `measured`, indexed by `KEY`, `prompt_id`
        and `pair_id`.
    """
    change = {
        "curvature": pairs["term"] - pairs["left"],
        "measured": pairs["loss_after"] - pairs["loss_before"],
    }
    grouped = pairs.assign(**change).groupby([*KEY, "prompt_id", "pair_id"], sort=False)
    return grouped[list(PARTS)].sum()


def with_intervals(changes: pd.DataFrame) -> pd.DataFrame:
    """Means of `by_pair` over prompts with 95 % t intervals, which cover where prompts are few.

    Returns:
        The columns of `KEY`, `n_pairs`, `n_prompts`, and each of `PARTS` with `_low` and `_high`: null for a
        single prompt.
    """
    rows = []
    for key, group in changes.groupby(KEY, sort=False):
        prompts = group.groupby("prompt_id").mean()
        n = len(prompts)
        reach = prompts.sem() * stats.t.ppf(0.975, n - 1) if n > 1 else prompts.iloc[0] * float("nan")
        row = dict(zip(KEY, key, strict=True)) | {"n_pairs": len(group), "n_prompts": n}
        for part, mean in prompts.mean().items():
            row |= {part: mean, f"{part}_low": mean - reach[part], f"{part}_high": mean + reach[part]}
        rows.append(row)
    bounds = [f"{part}{end}" for part in PARTS for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*KEY, "n_pairs", "n_prompts", *bounds])


def waterfall(ledger: pd.DataFrame, *, by: str) -> pd.DataFrame:
    """Bars from zero to the measured change: one a part, then the rest, then the measured change itself.

    Args:
        ledger: rows of `LEDGER_COLUMNS` of one earlier objective and split; stages follow one another.
        by: "step", "layer" or "module".

    Returns:
        `part` (label), `start`, `end` (nats), `kind` ("entry", "rest", "measured"), in the order of drawing;
        no bars from an empty ledger.
    """
    keys = ["stage", "from_step", "step"] if by == "step" else [by]
    terms = ledger.groupby(keys, sort=by != "module", dropna=False)["term"].sum()
    several = ledger["stage"].nunique() > 1
    labels = [_segment_label(*key, several=several) if by == "step" else str(key) for key in terms.index]
    measured, ends = segments(ledger)["measured"].sum(), terms.cumsum().tolist()
    kinds = ["entry"] * len(labels) + ["rest", "measured"]
    bars = {
        "part": [*labels, "rest", "measured"],
        "start": [0.0, *ends, 0.0],
        "end": [*ends, measured, measured],
    }
    return pd.DataFrame(bars | {"kind": kinds}).head(len(kinds) if labels else 0)


def _segment_label(stage: int, start: int, end: int, *, several: bool) -> str:
    steps = str(end) if end == start + 1 else f"{start + 1} to {end}"
    return f"stage {stage}: {steps}" if several else steps


def closing_words(total: pd.Series) -> str:
    """One row of `totals` as a sentence: explained, measured, rest and share, or why there is no share."""
    explained, measured, rest = (f"{total[name]:+.4f}" for name in ("explained", "measured", "rest"))
    numbers = f"explained {explained}, measured {measured}, rest {rest} nats"
    if pd.notna(total["share"]):
        return f"{numbers}: {total['share']:.0%} explained"
    lost = f"lost in rounding or in ups and downs of {total['path']:.4f} nats"
    return f"{numbers}; the share explained is not defined: the measured change is {lost}"
