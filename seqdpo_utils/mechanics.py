"""How gradients meet and how the adapter moved: cosines, noise-corrected cosines, movement in two coordinate systems.

Lists of tensors stand for one long vector, cut as the adapter's parameters are.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from seqdpo_utils.paths import StudyError

CONFLICT_COLUMNS = (
    "step", "stage", "previous_objective", "loss_new", "loss_old", "norm_new", "norm_old", "dot", "cosine", "matched_cosine",
    "within_cosine", "within_new_cosine", "corrected_cosine", "cross_product", "within_new", "within_old", "ledger",
)  # fmt: skip
_LORA_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Inner product of two vectors cut into like pieces, in double precision."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def gram(vectors: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """All inner products of vectors cut into like pieces, in double precision and one pass over the pieces."""
    stacked = (torch.stack([piece.flatten() for piece in pieces]).double() for pieces in zip(*vectors, strict=True))
    return sum(rows @ rows.T for rows in stacked).tolist()


def cosine(product: float, square_left: float, square_right: float) -> float | None:
    """Cosine from an inner product and two squared norms; None when a vector is zero."""
    if square_left <= 0 or square_right <= 0:
        return None
    return product / (square_left * square_right) ** 0.5


def conflict_row(
    *,
    new: Sequence[Tensor],
    new_halves: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    old_halves: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> dict[str, float | None]:
    """What one measurement says of two gradients at the same weights.

    Noise shrinks a cosine, and the more so the fewer pairs are behind a gradient. So halves are compared with halves, across the objectives and within
    each: with as many pairs in a half on both sides the three numbers are shrunk alike.

    Args:
        new: gradient of the current objective on the whole batch.
        new_halves: its two halves (any common scale), or None when the batch was not accumulated in an even number of parts.
        old_halves: gradients of the earlier objective on two disjoint halves of its batch; their mean is the whole.

    Returns:
        `norm_new`, `norm_old`, `dot`, `cosine` (whole against whole); `matched_cosine` (mean of the four cosines of a new half with an old half),
        `within_cosine` (the two old halves), `within_new_cosine` (the two new halves); `cross_product`, `within_new`, `within_old` (the same three as
        products) and from them `corrected_cosine`. None where undefined or not estimable; without new halves all that needs them.
    """
    (nn, na, nb, *_), (_, aa, ab, *_), (_, _, bb, *_), *_ = products = gram([new, *old_halves, *(new_halves or ())])
    square_old, product = (aa + 2 * ab + bb) / 4, (na + nb) / 2
    row = {
        "norm_new": nn**0.5,
        "norm_old": max(square_old, 0.0) ** 0.5,
        "dot": product,
        "cosine": cosine(product, nn, square_old),
        "within_cosine": cosine(ab, aa, bb),
        "within_old": ab,
    }
    if new_halves is None:
        return row | dict.fromkeys(("matched_cosine", "within_new_cosine", "cross_product", "within_new", "corrected_cosine"))
    # rows and columns of the products: 0 new, 1 and 2 old halves, 3 and 4 new halves
    crossed = [(products[n][o], products[n][n], products[o][o]) for n in (3, 4) for o in (1, 2)]
    matched, within_new = [cosine(*each) for each in crossed], products[3][4]
    cross = sum(each[0] for each in crossed) / 4
    return row | {
        "matched_cosine": None if None in matched else sum(matched) / 4,
        "within_new_cosine": cosine(within_new, products[3][3], products[4][4]),
        "cross_product": cross,
        "within_new": within_new,
        "corrected_cosine": cosine(cross, within_new, ab),
    }


def pooled_corrected_cosine(conflict: pd.DataFrame) -> float | None:
    """Cosine of the noise-free gradients, from sums over all measured steps.

    The noise of different halves is independent, so it drops out of the products between them on average: the sum of the cross
    products over the root of the two sums of within products. None ("not estimable") when a sum of within products is not
    positive or the estimate is no cosine (beyond 1).
    """
    sums = conflict[["cross_product", "within_new", "within_old"]].dropna().astype(float).sum()
    estimate = cosine(*sums)
    return None if estimate is None or abs(estimate) > 1 else estimate


def load_lora(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs (A of shape (r, in), B of shape (out, r)) of a saved adapter, by module path, in double precision.

    Raises:
        StudyError: when the file is missing or a module lacks one of its two matrices.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise StudyError(f"{file} is missing: run the training notebooks first.")
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        if match := _LORA_KEY.match(key):
            sides.setdefault(match["path"], {})[match["side"]] = value.double()
    incomplete = [path for path, pair in sides.items() if set(pair) != {"A", "B"}]
    if incomplete or not sides:
        raise StudyError(f"{file} is not a LoRA adapter: {incomplete[:1] or 'no lora_A and lora_B'} incomplete.")
    return {path: (pair["A"], pair["B"]) for path, pair in sides.items()}


def raw_inner(left: tuple[Tensor, Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """<u, v> of two moves (A, B) -> (A', B') in the raw coordinates, which are not unique: (RA, B/R) is the same weights."""
    (a1, b1, a2, b2), (c1, d1, c2, d2) = left, right
    return float(((a2 - a1) * (c2 - c1)).sum() + ((b2 - b1) * (d2 - d1)).sum())


def weight_inner(left: tuple[Tensor, Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """<B'A' - BA, D'C' - DC> through r-by-r products; no (out, in) matrix is formed.

    The difference is written [(B' - B), B] [A'; A' - A], which does not cancel digits when the move is small.
    Multiply by (alpha / r) squared for weight space.
    """

    def factors(move: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a1, b1, a2, b2 = move
        return torch.cat([b2 - b1, b1], dim=1), torch.cat([a2, a2 - a1], dim=0)

    (p, q), (s, t) = factors(left), factors(right)
    return float(((p.T @ s) * (q @ t.T)).sum())


def movement_table(checkpoints: dict[str, dict[str, tuple[Tensor, Tensor]]], *, scaling: float) -> pd.DataFrame:
    """Norms and cosines of consecutive moves of the adapter, whole, by layer, by module and by both.

    Args:
        checkpoints: name to `load_lora`, in the order of training, the start included; two moves need three.
        scaling: alpha / r.

    Returns:
        One row a part of the adapter: `from_checkpoint`, `to_checkpoint` (the move), `other_from`, `other_to` (what it is compared with),
        `space` ("lora", "weight"), `layer`, `module` (null for all), `norm`, `other_norm`, `cosine` (null when a move is zero).
    """
    names = list(checkpoints)
    moves = {(x, y): {path: (*checkpoints[x][path], *checkpoints[y][path]) for path in checkpoints[x]} for x, y in itertools.pairwise(names)}
    rows = []
    for (move, parts), (other, other_parts) in ((u, v) for i, u in enumerate(moves.items()) for v in list(moves.items())[i + 1 :]):
        for space, inner, factor in (("lora", raw_inner, 1.0), ("weight", weight_inner, scaling**2)):
            products = {
                path: [factor * inner(a, b) for a, b in ((parts[path], parts[path]), (other_parts[path], other_parts[path]), (parts[path], other_parts[path]))]
                for path in parts
            }
            for (layer, module), paths in _groups(parts):
                uu, vv, uv = (sum(products[path][k] for path in paths) for k in range(3))
                rows.append(
                    {"from_checkpoint": move[0], "to_checkpoint": move[1], "other_from": other[0], "other_to": other[1], "space": space,
                     "layer": layer, "module": module, "norm": max(uu, 0.0) ** 0.5, "other_norm": max(vv, 0.0) ** 0.5, "cosine": cosine(uv, uu, vv)}
                )  # fmt: skip
    return pd.DataFrame(rows).astype({"layer": "Int64", "cosine": "Float64"})


def update_subspaces(move: tuple[Tensor, Tensor, Tensor, Tensor], *, leading: int) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors of B'A' - BA, by QR of the thin factors and the SVD of a core of at most 2r by 2r; no (out, in) matrix is formed.

    Args:
        move: (A, B, A', B').
        leading: how many vectors at most; directions that the move does not have (singular values at rounding) are left out.

    Returns:
        Left (output side) of shape (out, k) and right (input side) of shape (in, k), orthonormal columns, k at most `leading`.
    """
    a1, b1, a2, b2 = move
    left, upper = torch.linalg.qr(torch.cat([b2 - b1, b1], dim=1))
    right, lower = torch.linalg.qr(torch.cat([a2, a2 - a1], dim=0).T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    kept = min(leading, int((sizes > 1e-10 * sizes[0]).sum()))
    return left @ u[:, :kept], right @ v[:kept].T


def subspace_table(checkpoints: dict[str, dict[str, tuple[Tensor, Tensor]]], *, rank: int) -> pd.DataFrame:
    """How far the updates of two stages live in the same directions: principal angles between their leading singular subspaces, matrix by matrix.

    Args:
        checkpoints: name to `load_lora`, in the order of training, the start included.
        rank: of the adapter; so many leading directions of each update are compared.

    Returns:
        One row a matrix, side ("left": what the layer writes, "right": what it reads) and two moves: `from_checkpoint`, `to_checkpoint`, `other_from`, `other_to`,
        `layer`, `module`, `side`, `directions` (k), `dimension` (d), `overlap` (mean squared cosine of the k principal angles: 1 the same subspace, 0
        orthogonal), `random` (its expectation k / d for random subspaces); `overlap` is null when a move is zero.
    """
    moves = list(itertools.pairwise(checkpoints))
    rows = []
    for path in next(iter(checkpoints.values())):
        layer, module = place_of(path)
        spaces = [update_subspaces((*checkpoints[x][path], *checkpoints[y][path]), leading=rank) for x, y in moves]
        for i, j in itertools.combinations(range(len(moves)), 2):
            for side, one, other in zip(("left", "right"), spaces[i], spaces[j], strict=True):
                k, d = min(one.shape[1], other.shape[1]), len(one)
                overlap = float((one[:, :k].T @ other[:, :k]).square().sum()) / k if k else None
                rows.append(
                    {"from_checkpoint": moves[i][0], "to_checkpoint": moves[i][1], "other_from": moves[j][0], "other_to": moves[j][1], "layer": layer,
                     "module": module, "side": side, "directions": k, "dimension": d, "overlap": overlap, "random": k / d}
                )  # fmt: skip
    return pd.DataFrame(rows).astype({"layer": "Int64", "overlap": "Float64"})


def conflict_verdict(conflict: pd.DataFrame) -> dict[str, Any]:
    """What the measured cosines allow one to say, from t intervals over the measured steps.

    The steps are those of one run and not independent, so the intervals are a guide. "opposed" and "aligned" need the interval of the matched cosine on
    one side of zero; "near-orthogonal" needs it to cover zero while each of the two objectives agrees with itself clearly more than with the other: an
    objective whose own batches do not agree cannot tell a foreign gradient from noise.

    Returns:
        `cross` (the matched cosine), `within` (mean of the two below), `within_old`, `within_new`: mean, low, high each, None where missing; `corrected`:
        the pooled estimate or None; `steps`: measurements, `compared`: those with halves on both sides; and `verdict`: "opposed", "aligned",
        "near-orthogonal", "cannot be decided at this size", "no halves to compare" (no batch was accumulated in an even number of parts) or "not measured".
    """
    columns = conflict[["matched_cosine", "within_cosine", "within_new_cosine"]].astype(float).dropna()
    columns = columns.set_axis(["cross", "within_old", "within_new"], axis=1)
    columns["within"] = columns[["within_old", "within_new"]].mean(axis=1)
    found: dict[str, Any] = {name: _t_interval(columns[name]) for name in columns}
    margins = [_t_interval(columns[name] - columns["cross"])[1] for name in ("within_old", "within_new")]
    found |= {"corrected": pooled_corrected_cosine(conflict) if len(conflict) else None, "steps": len(conflict), "compared": len(columns)}
    return found | {"verdict": _verdict_in_words(found, margins)}


def _verdict_in_words(found: dict[str, Any], margins: Sequence[float | None]) -> str:
    _, low, high = found["cross"]
    if not found["compared"]:
        return "no halves to compare" if found["steps"] else "not measured"
    if low is None or high is None:
        return "cannot be decided at this size"
    if low > 0 or high < 0:
        return "aligned" if low > 0 else "opposed"
    return "near-orthogonal" if all(margin is not None and margin > 0 for margin in margins) else "cannot be decided at this size"


def _t_interval(values: pd.Series) -> tuple[float | None, float | None, float | None]:
    """Mean and 95 % t interval, which is cut at the bounds that a cosine has."""
    if len(values) < 3:
        return (float(values.mean()) if len(values) else None), None, None
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return float(values.mean()), max(float(low), -1.0), min(float(high), 1.0)


def shuffled_cosines(
    checkpoints: dict[str, dict[str, tuple[Tensor, Tensor]]], *, names: tuple[str, str, str], scaling: float, repeats: int, generator: torch.Generator
) -> list[float]:
    """Cosines in weight space when the second move keeps its sizes but not its direction.

    The changes of every A and every B are shuffled within their matrix, so that norms stay and directions are random: what "orthogonal" looks like here.

    Args:
        checkpoints: as for `movement_table`.
        names: start, end of the first move, end of the second move.
        scaling: alpha / r.
        repeats: how many shuffles.
        generator: the only source of chance.
    """
    start, middle, end = (checkpoints[name] for name in names)

    def shuffled(before: Tensor, after: Tensor) -> Tensor:
        change = (after - before).flatten()
        return before + change[torch.randperm(len(change), generator=generator)].reshape(before.shape)

    cosines = []
    for _ in range(repeats):
        turned = {path: tuple(shuffled(x, y) for x, y in zip(middle[path], end[path], strict=True)) for path in middle}
        table = movement_table({names[0]: start, names[1]: middle, names[2]: turned}, scaling=scaling)
        cosines.append(float(whole_adapter(table).loc["weight", "cosine"]))
    return cosines


def whole_adapter(movement: pd.DataFrame, *, last: str | None = None) -> pd.DataFrame:
    """Rows of `movement_table` for the adapter as a whole, by `space`: the first move against the one that ends at `last` (default: the last)."""
    whole = movement[movement["layer"].isna() & movement["module"].isna()]
    whole = whole[(whole["from_checkpoint"] == whole["from_checkpoint"].iloc[0]) & (whole["other_to"] == (last or whole["other_to"].iloc[-1]))]
    return whole.set_index("space")


def place_of(name: str) -> tuple[int | None, str]:
    """Layer (None outside the layers) and module of a parameter or module path: "...layers.3.mlp.up_proj.lora_A.default.weight" is (3, "up_proj")."""
    path = match["path"] if (match := _LORA_KEY.match(name)) else name
    found = _LAYER.search(path)
    return (int(found[1]) if found else None), path.rpartition(".")[2]


def _groups(paths: Iterable[str]) -> list[tuple[tuple[int | None, str | None], list[str]]]:
    groups: dict[tuple[Any, Any], list[str]] = {}
    for path in paths:
        layer, module = place_of(path)
        for key in dict.fromkeys([(None, None), (layer, None), (None, module), (layer, module)]):
            groups.setdefault(key, []).append(path)
    return list(groups.items())
