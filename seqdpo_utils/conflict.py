"""Gradient conflict: the gradients of a new and of an earlier objective at the same weights.

A list of tensors stands for one long vector, cut into pieces as the adapter's parameters are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

CONFLICT_COLUMNS = (
    *("step", "stage", "previous_objective", "split", "loss_new", "loss_old", "norm_new", "norm_old", "dot"),
    *("cosine",),
    *("matched_cosine", "within_cosine", "within_new_cosine", "corrected_cosine"),
    *("cross_product", "within_new", "within_old", "ledger"),
)
_NEEDS_NEW_HALVES = ("matched_cosine", "within_new_cosine", "cross_product", "within_new", "corrected_cosine")
UNDECIDED = "cannot be decided at this size"
MEANING = {
    "opposed": "below zero: the objectives pull against each other at these weights",
    "aligned": "above zero: the objectives pull the same way at these weights",
    "near-orthogonal": "freed of noise, the cosine is negligible: within 0.2 of zero",
    UNDECIDED: "each objective agrees with itself, but the interval is too wide",
}
FIRST_ORDER = "first-order change"
"""What pages call the column `ledger` of a conflict table; the forgetting ledger is another thing."""
LEVEL = 0.99
"""Of every interval here. A study asks of about eight chains: were all its gradients orthogonal, 95 % would
name a side in one study of three, 99 % does so in fewer than one of ten."""
NEGLIGIBLE = 0.2
RESAMPLES = 2000
Halves = tuple[Sequence[Tensor], Sequence[Tensor]]
Interval = tuple[float | None, float | None, float | None]


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Inner product of two vectors cut into like pieces, in double precision."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def gram(vectors: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """Inner products of all vectors with each other, in double precision and one pass over the pieces."""
    rows = (torch.stack([piece.flatten() for piece in pieces]) for pieces in zip(*vectors, strict=True))
    return sum(part @ part.T for part in map(torch.Tensor.double, rows)).tolist()


def cosine(product: float, square_left: float, square_right: float) -> float | None:
    """Cosine from an inner product and two squared norms; None when a vector is zero."""
    defined = square_left > 0 and square_right > 0
    return product / (square_left * square_right) ** 0.5 if defined else None


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
    *, new: Sequence[Tensor], new_halves: Halves | None, old_halves: Halves
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
    oo, product = max((aa + 2 * ab + bb) / 4, 0.0), (na + nb) / 2
    row = dict.fromkeys(_NEEDS_NEW_HALVES) | {"norm_new": nn**0.5, "norm_old": oo**0.5, "dot": product}
    row |= {"cosine": cosine(product, nn, oo), "within_cosine": cosine(ab, aa, bb), "within_old": ab}
    if new_halves is None:
        return row
    (_, ca, cb, cc, cd), (_, da, db, _, dd) = products[3:]
    matched = [cosine(ca, cc, aa), cosine(cb, cc, bb), cosine(da, dd, aa), cosine(db, dd, bb)]
    cross = (ca + cb + da + db) / 4
    row |= {"within_new_cosine": cosine(cd, cc, dd), "cross_product": cross, "within_new": cd}
    row["matched_cosine"] = None if None in matched else sum(matched) / 4
    return row | {"corrected_cosine": corrected_cosine(cross, cd, ab)}


def pooled_corrected_cosine(conflict: pd.DataFrame, *, rng: np.random.Generator) -> Interval:
    """Noise-corrected cosine of all measured steps, with its interval.

    Every half counts by its direction alone: mean matched cosine over the root of the two mean within cosines
    (Spearman 1904, correction for attenuation). Norms that change along the stage therefore do not shrink it.
    Steps are resampled with replacement for the standard error; as few as these need the t quantile on it.

    Args:
        conflict: rows of `CONFLICT_COLUMNS`.
        rng: draws the resamples.

    Returns:
        Estimate, low, high (within [-1, 1]); three times None where it cannot be had: from fewer than three
        steps, where an objective does not clearly agree with itself, or where the estimate is no cosine.
    """
    halves = _halves(conflict)
    count, intervals = len(halves), [_t_interval(halves[name]) for name in ("within_old", "within_new")]
    if not _agree(*intervals) or (estimate := corrected_cosine(*halves.mean())) is None:
        return None, None, None
    drawn = halves.to_numpy()[rng.integers(count, size=(RESAMPLES, count))].mean(axis=1)
    cross, old, new = drawn[(drawn[:, 1:] > 0).all(axis=1)].T
    error = np.clip(cross / np.sqrt(old * new), -1, 1).std() * (count / (count - 1)) ** 0.5
    return _around(estimate, error, count)


def conflict_verdict(conflict: pd.DataFrame, *, rng: np.random.Generator | None = None) -> dict[str, Any]:
    """What the measured cosines allow one to say, from intervals of their means over the measured steps.

    The steps are those of one run and not independent, so the intervals are a guide. A name needs both
    objectives to agree with themselves: the intervals of `within_old` and of `within_new` above zero. Else a
    foreign gradient cannot be told from noise. "near-orthogonal" then states equivalence: the interval of the
    corrected cosine lies inside (-NEGLIGIBLE, NEGLIGIBLE). Otherwise "opposed" and "aligned" need the
    interval of the matched cosine on one side of zero.

    Args:
        conflict: rows of `CONFLICT_COLUMNS`; none is allowed.
        rng: for `pooled_corrected_cosine`; None: seeded with 0, so that all pages give the same verdict.

    Returns:
        `cross` (the matched cosine), `within_old`, `within_new`, `within` (mean of these two), `corrected`:
        (mean, low, high) each, None where missing; `steps`: number of measurements; `compared`: those with
        halves on both sides; `verdict`: "opposed", "aligned", "near-orthogonal", "cannot be decided at this
        size", "no halves to compare" (no new batch could be halved) or "not measured".
    """
    halves = _halves(conflict).eval("within = (within_old + within_new) / 2")
    found: dict[str, Any] = {name: _t_interval(halves[name]) for name in halves}
    found["corrected"] = pooled_corrected_cosine(conflict, rng=rng or np.random.default_rng(0))
    found |= {"steps": len(conflict), "compared": len(halves)}
    return found | {"verdict": _verdict(found)}


def verdicts(conflict: pd.DataFrame) -> dict[tuple[int, str, str], dict[str, Any]]:
    """`conflict_verdict` by stage, earlier objective and split of its pairs; none of an empty table."""
    measured = conflict.groupby(["stage", "previous_objective", "split"], sort=False)
    return {key: conflict_verdict(rows) for key, rows in measured}


def measured_in_words(found: dict[str, Any]) -> str:
    """How much is behind a verdict ("only": fewer than eight), and the corrected cosine, for a caption."""
    known = found["corrected"][0] is not None
    shown = "{:+z.2f} ({:+z.2f} to {:+z.2f})".format(*found["corrected"]) if known else "not estimable"
    counted = f"{'only ' if found['compared'] < 8 else ''}{found['steps']} measurements"
    return f"{counted}, {found['compared']} with halves on both sides, corrected cosine {shown}"


def verdict_in_words(found: dict[str, Any]) -> str:
    """Why a verdict is what it is, for a sentence."""
    unclear = [name for name in ("old", "new") if not _agree(found[f"within_{name}"])]
    if found["verdict"] == UNDECIDED and unclear:
        return f"halves of the {' and of the '.join(unclear)} objective do not clearly agree, as in noise"
    return MEANING.get(found["verdict"], "there is nothing to compare")


def _verdict(found: dict[str, Any]) -> str:
    if not found["compared"]:
        return "no halves to compare" if found["steps"] else "not measured"
    if not _agree(found["within_old"], found["within_new"]):
        return UNDECIDED
    _, low, high = found["corrected"]
    if low is not None and max(-low, high) < NEGLIGIBLE:
        return "near-orthogonal"
    _, low, high = found["cross"]
    return "aligned" if low > 0 else "opposed" if high < 0 else UNDECIDED


def _agree(*within: Interval) -> bool:
    """The gate of every verdict: these intervals of cosines within an objective lie above zero."""
    return all(low is not None and low > 0 for _, low, _ in within)


def _halves(conflict: pd.DataFrame) -> pd.DataFrame:
    """The three cosines of halves, from the steps that have all of them."""
    halves = conflict[["matched_cosine", "within_cosine", "within_new_cosine"]].astype(float).dropna()
    return halves.set_axis(["cross", "within_old", "within_new"], axis=1)


def _t_interval(values: pd.Series) -> Interval:
    """Mean and t interval; no interval from fewer than three values."""
    if len(values) < 3:
        return (float(values.mean()) if len(values) else None), None, None
    return _around(float(values.mean()), values.sem(), len(values))


def _around(mean: float, error: float, count: int) -> Interval:
    """Mean and interval from its standard error, cut at the bounds of a cosine."""
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * error)
    return mean, max(mean - reach, -1.0), min(mean + reach, 1.0)
