"""The forgetting ledger: what a stage's steps did to the loss of an earlier objective, entry by entry.

Along the weights theta_0, theta_1, ... the change of the earlier objective's loss L on fixed pairs is the path integral of its gradient g. Between two
measured points it is entered as the trapezoid

    L(theta_b) - L(theta_a)  ~  (g(theta_a) + g(theta_b)) / 2 . (theta_b - theta_a)

with the displacement that the optimiser really made. The product is a sum over the adapter's parameters, so entries add up over steps, layers and modules;
their sum stands beside the measured change, and what is left between the two is the rest. It shrinks with the square of the displacement
relative to the change, so that measuring more often closes the ledger.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from seqdpo_utils.mechanics import place_of

LEDGER_COLUMNS = ("stage", "previous_objective", "from_step", "step", "layer", "module", "term", "left", "loss_before", "loss_after")
LOSS_ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2}
"""Change of a mean DPO loss, in nats, that the rounding of log-probability sums may make by itself (float32 sums agree to 6e-5 nat, bfloat16 sums to half a nat)."""
CANCELLED = 0.1
"""Below this share of all the ups and downs a net change is no denominator."""
_SEGMENT = ["stage", "previous_objective", "from_step", "step"]


class ProbePoint(NamedTuple):
    """Loss of the probe pairs (nats, mean over pairs) and its gradient, one tensor a parameter, after `step` optimiser steps."""

    step: int
    loss: float
    gradient: Sequence[Tensor]


def segment_rows(names: Sequence[str], start: ProbePoint, end: ProbePoint, moved: Sequence[Tensor]) -> list[dict[str, int | float | str | None]]:
    """Entries of one segment, one a layer and module.

    Args:
        names: parameter names, in the order of the gradients.
        start, end: the two ends, at weights that differ by `moved`.
        moved: weights at the end minus weights at the start.

    Returns:
        `from_step`, `step`, `layer`, `module`, `term` (trapezoid), `left` (gradient of the start alone), `loss_before`, `loss_after`; the two losses are
        those of the whole segment and stand in each of its rows.
    """
    pieces = zip(start.gradient, end.gradient, moved, strict=True)
    products = torch.stack([torch.stack([(a.double() * m.double()).sum(), (b.double() * m.double()).sum()]) for a, b, m in pieces]).tolist()
    entries: dict[tuple[int | None, str], list[float]] = {}
    for name, (left, right) in zip(names, products, strict=True):
        entry = entries.setdefault(place_of(name), [0.0, 0.0])
        entry[0] += (left + right) / 2
        entry[1] += left
    segment = {"from_step": start.step, "step": end.step, "loss_before": start.loss, "loss_after": end.loss}
    return [segment | {"layer": layer, "module": module, "term": term, "left": left} for (layer, module), (term, left) in entries.items()]


def segments(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger by segment: what its entries add up to, beside the measured change.

    Args:
        ledger: rows of `LEDGER_COLUMNS`.

    Returns:
        `stage`, `previous_objective`, `from_step`, `step`, `term`, `left`, `loss_before`, `loss_after`, `measured` (after minus before), `rest` (measured minus term).
    """
    found = ledger.groupby(_SEGMENT, sort=False, as_index=False).agg(
        term=("term", "sum"), left=("left", "sum"), loss_before=("loss_before", "first"), loss_after=("loss_after", "first")
    )
    measured = found["loss_after"] - found["loss_before"]
    return found.assign(measured=measured, rest=measured - found["term"])


def totals(ledger: pd.DataFrame, *, dtype: str) -> pd.DataFrame:
    """The ledger's bottom line for each stage and earlier objective.

    The share is left out where it would be a ratio of errors: where the measured change is within rounding, or under a tenth (`CANCELLED`) of the path,
    that is where ups and downs cancel.

    Args:
        ledger: rows of `LEDGER_COLUMNS`.
        dtype: of the run, a key of `LOSS_ROUNDING`.

    Returns:
        `stage`, `previous_objective`, `segments`, `explained` (sum of the trapezoids), `left` (sum of the left ends), `measured`, `rest`, `path` (sum of the
        absolute changes of the segments), all in nats, and `share` (explained / measured; null where not defined).
    """
    table = segments(ledger).assign(path=lambda t: t["measured"].abs())
    found = table.groupby(["stage", "previous_objective"], sort=False, as_index=False).agg(
        segments=("term", "size"), explained=("term", "sum"), left=("left", "sum"), measured=("measured", "sum"), rest=("rest", "sum"), path=("path", "sum")
    )
    size = found["measured"].abs()
    defined = (size > LOSS_ROUNDING[dtype]) & (size >= CANCELLED * found["path"])
    return found.assign(share=(found["explained"] / found["measured"]).where(defined).astype("Float64"))


def waterfall(ledger: pd.DataFrame, *, by: str) -> pd.DataFrame:
    """Bars that lead from zero to the measured change: one a part, then the rest, then the measured change itself.

    Args:
        ledger: rows of `LEDGER_COLUMNS` for one earlier objective; several stages follow one another.
        by: "step", "layer" or "module".

    Returns:
        `part` (label), `start`, `end` (nats), `kind` ("entry", "rest", "measured"), in the order of drawing.
    """
    keys = ["stage", "from_step", "step"] if by == "step" else [by]
    terms = ledger.groupby(keys, sort=by != "module", dropna=False)["term"].sum()
    several = ledger["stage"].nunique() > 1
    labels = [_segment_label(*key, several=several) if by == "step" else str(key) for key in terms.index]
    measured = float(segments(ledger)["measured"].sum())
    ends = terms.cumsum().tolist()
    starts = [0.0, *ends]
    return pd.DataFrame(
        {
            "part": [*labels, "rest", "measured"],
            "start": [*starts, 0.0],
            "end": [*ends, measured, measured],
            "kind": ["entry"] * len(labels) + ["rest", "measured"],
        }
    )


def _segment_label(stage: int, start: int, end: int, *, several: bool) -> str:
    steps = str(end) if end == start + 1 else f"{start + 1} to {end}"
    return f"stage {stage}: {steps}" if several else steps


def closing_words(total: pd.Series) -> str:
    """One row of `totals` as a sentence: explained, measured, rest and share, or why there is no share."""
    numbers = f"explained {total['explained']:+.4f}, measured {total['measured']:+.4f}, rest {total['rest']:+.4f} nats"
    if pd.isna(total["share"]):
        return f"{numbers}; the share explained is not defined: the measured change is lost in rounding or in ups and downs of {total['path']:.4f} nats"
    return f"{numbers}: {total['share']:.0%} explained"
