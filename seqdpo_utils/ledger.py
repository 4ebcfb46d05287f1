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
from torch import Tensor

from seqdpo_utils.movement import place_of

_SEGMENT = ["stage", "previous_objective", "from_step", "step"]
LEDGER_COLUMNS = (*_SEGMENT, "layer", "module", "term", "left", "loss_before", "loss_after")
LOSS_ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2}
"""Change of a mean DPO loss, in nats, that rounding alone may make.

Sums of log-probabilities agree to 6e-5 nats in float32 and to half a nat in bfloat16.
"""
CANCELLED = 0.1
"""Report no share when the net change is under 10 % of the summed absolute segment changes."""


class ProbePoint(NamedTuple):
    """State after `step` optimiser steps: mean loss of the probe pairs (nats), its gradient by parameter."""

    step: int
    loss: float
    gradient: Sequence[Tensor]


def segment_rows(
    names: Sequence[str], start: ProbePoint, end: ProbePoint, moved: Sequence[Tensor]
) -> list[dict[str, int | float | str | None]]:
    """Entries of one segment, one a layer and module.

    Args:
        names: parameter names, in the order of the gradients.
        start, end: the two ends, at weights that differ by `moved`.
        moved: weights at the end minus weights at the start.

    Returns:
        `from_step`, `step`, `layer`, `module`, `term` (trapezoid), `left` (gradient of the start alone),
        `loss_before`, `loss_after`; each row repeats the two losses of the whole segment.
    """
    pieces = zip(start.gradient, end.gradient, moved, strict=True)
    # (2, n) @ (n) for each parameter; one transfer from the device for all of them
    products = [torch.stack([a, b]).double().flatten(1) @ m.double().flatten() for a, b, m in pieces]
    entries: dict[tuple[int | None, str], list[float]] = {}
    for name, (left, right) in zip(names, torch.stack(products).tolist(), strict=True):
        entry = entries.setdefault(place_of(name), [0.0, 0.0])
        entry[0] += (left + right) / 2
        entry[1] += left
    ends = {"from_step": start.step, "step": end.step, "loss_before": start.loss, "loss_after": end.loss}
    return [
        ends | {"layer": layer, "module": module, "term": term, "left": left}
        for (layer, module), (term, left) in entries.items()
    ]


def segments(ledger: pd.DataFrame) -> pd.DataFrame:
    """Sum of the entries of each segment, beside the measured change.

    Args:
        ledger: rows of `LEDGER_COLUMNS`.

    Returns:
        `stage`, `previous_objective`, `from_step`, `step`, `term`, `left`, `loss_before`, `loss_after`,
        `measured` (after minus before), `rest` (measured minus term); losses in nats.
    """
    how = {"term": "sum", "left": "sum", "loss_before": "first", "loss_after": "first"}
    found = ledger.groupby(_SEGMENT, sort=False, as_index=False).agg(how)
    measured = found["loss_after"] - found["loss_before"]
    return found.assign(measured=measured, rest=measured - found["term"])


def totals(ledger: pd.DataFrame, *, dtype: str) -> pd.DataFrame:
    """The ledger's bottom line for each stage and earlier objective.

    The share is left out where it would be a ratio of errors: where the measured change is within rounding
    (`LOSS_ROUNDING`) or what is left of ups and downs that cancel (`CANCELLED`).

    Args:
        ledger: rows of `LEDGER_COLUMNS`; none is allowed.
        dtype: of the run, a key of `LOSS_ROUNDING`.

    Returns:
        `stage`, `previous_objective`, `segments`, `explained` (sum of the trapezoids), `left` (sum of the
        left ends), `measured`, `rest`, `path` (sum of the absolute changes of the segments), all in nats, and
        `share` (explained / measured; null where not defined).
    """
    table = segments(ledger).rename(columns={"term": "explained"})
    table = table.assign(segments=1, path=table["measured"].abs())
    summed = ["segments", "explained", "left", "measured", "rest", "path"]
    found = table.groupby(["stage", "previous_objective"], sort=False, as_index=False)[summed].sum()
    size = found["measured"].abs()
    defined = (size > LOSS_ROUNDING[dtype]) & (size >= CANCELLED * found["path"])
    return found.assign(share=(found["explained"] / found["measured"]).where(defined).astype("Float64"))


def waterfall(ledger: pd.DataFrame, *, by: str) -> pd.DataFrame:
    """Bars from zero to the measured change: one a part, then the rest, then the measured change itself.

    Args:
        ledger: rows of `LEDGER_COLUMNS` for one earlier objective; several stages follow one another.
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
