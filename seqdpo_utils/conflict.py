"""Gradient conflict: the gradients of a new and of an earlier objective at the same weights.

A list of tensors stands for one long vector, cut into pieces as the adapter's parameters are.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

CONFLICT_COLUMNS = (
    *("step", "stage", "previous_objective", "loss_new", "loss_old", "norm_new", "norm_old", "dot", "cosine"),
    *("matched_cosine", "within_cosine", "within_new_cosine", "corrected_cosine"),
    *("cross_product", "within_new", "within_old", "ledger"),
)
_NEEDS_NEW_HALVES = ("matched_cosine", "within_new_cosine", "cross_product", "within_new", "corrected_cosine")
UNDECIDED = "cannot be decided at this size"


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Inner product of two vectors cut into like pieces, in double precision."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def gram(vectors: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """Inner products of all vectors with each other, in double precision and one pass over the pieces."""
    rows = (torch.stack([piece.flatten() for piece in pieces]) for pieces in zip(*vectors, strict=True))
    return sum(part @ part.T for part in map(torch.Tensor.double, rows)).tolist()


def cosine(product: float, square_left: float, square_right: float) -> float | None:
    """Cosine from an inner product and two squared norms; None when a vector is zero."""
    if square_left <= 0 or square_right <= 0:
        return None
    return product / (square_left * square_right) ** 0.5


def corrected_cosine(cross: float, within_new: float, within_old: float) -> float | None:
    """Cosine of the noise-free gradients, from inner products of gradients of different pairs.

    Their noise is independent and drops out of such products on average (it stays in a squared norm).

    Args:
        cross: new times old, mean over the halves.
        within_new: one half of the new batch times the other.
        within_old: the same for the old batch.

    Returns:
        None ("not estimable") when a within product is not positive or the estimate lies outside [-1, 1].
    """
    estimate = cosine(cross, within_new, within_old)
    return None if estimate is None or abs(estimate) > 1 else estimate


def conflict_row(
    *,
    new: Sequence[Tensor],
    new_halves: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    old_halves: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> dict[str, float | None]:
    """Compare two gradients at the same weights.

    Noise shrinks a cosine, more so the fewer pairs are behind a gradient. So halves are compared with
    halves, across the objectives and within each: with as many pairs in a half on both sides, the three
    cosines are shrunk alike.

    Args:
        new: gradient of the current objective on the whole batch.
        new_halves: its two halves (any common scale), or None when the batch cannot be halved.
        old_halves: gradients of the earlier objective on two halves of its batch; their mean is the whole.

    Returns:
        `norm_new`, `norm_old`, `dot`, `cosine` (whole against whole); `matched_cosine` (mean of the four
        cosines of a new half with an old half), `within_cosine` (the two old halves), `within_new_cosine`
        (the two new halves); `cross_product`, `within_old`, `within_new` (the same three as inner products)
        and `corrected_cosine` from them. None where undefined or not estimable, and, without new halves,
        where these are needed.
    """
    # a and b are the old halves, c and d the new ones; "ab" is their inner product, "aa" a squared norm
    products = gram([new, *old_halves, *(new_halves or ())])
    (nn, na, nb), (_, aa, ab), (_, _, bb) = (row[:3] for row in products[:3])
    square_old, product = max((aa + 2 * ab + bb) / 4, 0.0), (na + nb) / 2
    row = dict.fromkeys(_NEEDS_NEW_HALVES) | {
        "norm_new": nn**0.5,
        "norm_old": square_old**0.5,
        "dot": product,
    }
    row |= {"cosine": cosine(product, nn, square_old), "within_cosine": cosine(ab, aa, bb), "within_old": ab}
    if new_halves is None:
        return row
    (_, ca, cb, cc, cd), (_, da, db, _, dd) = products[3:]
    matched = [cosine(ca, cc, aa), cosine(cb, cc, bb), cosine(da, dd, aa), cosine(db, dd, bb)]
    cross = (ca + cb + da + db) / 4
    row |= {"within_new_cosine": cosine(cd, cc, dd), "cross_product": cross, "within_new": cd}
    row["matched_cosine"] = None if None in matched else sum(matched) / 4
    return row | {"corrected_cosine": corrected_cosine(cross, cd, ab)}


def pooled_corrected_cosine(conflict: pd.DataFrame) -> float | None:
    """`corrected_cosine` of products summed over all measured steps, which needs less luck than one step."""
    products = conflict[["cross_product", "within_new", "within_old"]].astype(float).dropna()
    return corrected_cosine(*products.sum())


def conflict_verdict(conflict: pd.DataFrame) -> dict[str, Any]:
    """What the measured cosines allow one to say, from t intervals over the measured steps.

    The steps are those of one run and not independent, so the intervals are a guide. "opposed" and "aligned"
    need the interval of the matched cosine on one side of zero. "near-orthogonal" needs it to cover zero
    while each objective agrees with itself clearly more than with the other: an objective whose own batches
    do not agree cannot tell a foreign gradient from noise.

    Args:
        conflict: rows of `CONFLICT_COLUMNS`; none is allowed.

    Returns:
        `cross` (the matched cosine), `within_old`, `within_new`, `within` (mean of these two): (mean, low,
        high) each, None where missing; `corrected`: the pooled estimate or None; `steps`: number of
        measurements; `compared`: those with halves on both sides; `verdict`: "opposed", "aligned",
        "near-orthogonal", "cannot be decided at this size", "no halves to compare" (no new batch could be
        halved) or "not measured".
    """
    cosines = conflict[["matched_cosine", "within_cosine", "within_new_cosine"]].astype(float).dropna()
    cosines.columns = ["cross", "within_old", "within_new"]
    cosines["within"] = cosines[["within_old", "within_new"]].mean(axis=1)
    found: dict[str, Any] = {name: _t_interval(cosines[name]) for name in cosines}
    excess = [_t_interval(cosines[name] - cosines["cross"])[1] for name in ("within_old", "within_new")]
    found |= {
        "corrected": pooled_corrected_cosine(conflict),
        "steps": len(conflict),
        "compared": len(cosines),
    }
    return found | {"verdict": _verdict(found, excess)}


def verdicts(conflict: pd.DataFrame) -> dict[tuple[int, str], dict[str, Any]]:
    """`conflict_verdict` by stage and earlier objective, in the order of training; none of an empty table."""
    measured = conflict.groupby(["stage", "previous_objective"], sort=False)
    return {key: conflict_verdict(rows) for key, rows in measured}


def measured_in_words(found: dict[str, Any]) -> str:
    """How much is behind a verdict, and the pooled corrected cosine, for a caption."""
    corrected = "not estimable" if found["corrected"] is None else f"{found['corrected']:+.2f}"
    halved = f"{found['steps']} measurements, {found['compared']} with halves on both sides"
    return f"{halved}, corrected cosine {corrected}"


def _verdict(found: dict[str, Any], excess: Sequence[float | None]) -> str:
    _, low, high = found["cross"]
    if not found["compared"]:
        return "no halves to compare" if found["steps"] else "not measured"
    if low is None or high is None:
        return UNDECIDED
    if low > 0 or high < 0:
        return "aligned" if low > 0 else "opposed"
    return "near-orthogonal" if all(bound is not None and bound > 0 for bound in excess) else UNDECIDED


def _t_interval(values: pd.Series) -> tuple[float | None, float | None, float | None]:
    """Mean and 95 % t interval, cut at the bounds of a cosine; no interval from fewer than three values."""
    if len(values) < 3:
        return (float(values.mean()) if len(values) else None), None, None
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return float(values.mean()), max(float(low), -1.0), min(float(high), 1.0)
