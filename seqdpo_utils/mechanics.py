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
    "step", "stage", "previous_objective", "loss_new", "loss_old", "norm_new", "norm_old", "dot", "cosine",
    "within_cosine", "corrected_cosine", "ledger",
)  # fmt: skip
_LORA_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Inner product of two vectors cut into like pieces, in double precision."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def cosine(product: float, square_left: float, square_right: float) -> float | None:
    """Cosine from an inner product and two squared norms; None when a vector is zero."""
    if square_left <= 0 or square_right <= 0:
        return None
    return product / (square_left * square_right) ** 0.5


def corrected_cosine(new_halves: tuple[Sequence[Tensor], Sequence[Tensor]] | None, old_halves: tuple[Sequence[Tensor], Sequence[Tensor]]) -> float | None:
    """Cosine of the noise-free gradients, estimated from two independent halves of each batch.

    The mean of the four cross products over the root of the two within products: the noise of different halves is
    independent, so it drops out on average. None ("not estimable") without halves, or when a within product is not positive.
    Not bounded by 1 in a finite sample.
    """
    if new_halves is None:
        return None
    (new_a, new_b), (old_a, old_b) = new_halves, old_halves
    within_new, within_old = dot(new_a, new_b), dot(old_a, old_b)
    cross = (dot(new_a, old_a) + dot(new_a, old_b) + dot(new_b, old_a) + dot(new_b, old_b)) / 4
    return cosine(cross, within_new, within_old)


def conflict_row(
    *,
    new: Sequence[Tensor],
    new_halves: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    old_halves: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> dict[str, float | None]:
    """What one measurement says of two gradients at the same weights.

    Args:
        new: gradient of the current objective on the whole batch.
        new_halves: its two halves (any common scale), or None when the batch was not accumulated in an even number of parts.
        old_halves: gradients of the earlier objective on two disjoint halves of its batch; their mean is the whole.

    Returns:
        `norm_new`, `norm_old`, `dot`, `cosine`, `within_cosine` (the halves of the earlier objective), `corrected_cosine`.
    """
    old_a, old_b = old_halves
    old = [(a + b) / 2 for a, b in zip(old_a, old_b, strict=True)]
    square_new, square_old, product = dot(new, new), dot(old, old), dot(new, old)
    return {
        "norm_new": square_new**0.5,
        "norm_old": square_old**0.5,
        "dot": product,
        "cosine": cosine(product, square_new, square_old),
        "within_cosine": cosine(dot(old_a, old_b), dot(old_a, old_a), dot(old_b, old_b)),
        "corrected_cosine": corrected_cosine(new_halves, old_halves),
    }


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
        Rows of the contract: `from_checkpoint`, `to_checkpoint` (the move), `other_from`, `other_to` (what it is compared with),
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


def conflict_verdict(conflict: pd.DataFrame) -> dict[str, Any]:
    """What the measured cosines allow one to say, from t intervals over the measured steps.

    Returns:
        `cross` and `within` (mean, low, high each), `steps`, and `verdict`: "opposed", "aligned", "near-orthogonal", or "cannot be
        decided at this size" where the old objective does not even agree with itself.
    """
    cross, within = (_t_interval(conflict[name].dropna().astype(float)) for name in ("cosine", "within_cosine"))
    if cross[1] is None or within[1] is None:
        verdict = "cannot be decided at this size"
    elif cross[2] < 0:
        verdict = "opposed"
    elif cross[1] > 0:
        verdict = "aligned"
    else:
        verdict = "near-orthogonal" if within[1] > 0 else "cannot be decided at this size"
    return {"cross": cross, "within": within, "steps": len(conflict), "verdict": verdict}


def _t_interval(values: pd.Series) -> tuple[float | None, float | None, float | None]:
    if len(values) < 3:
        return (float(values.mean()) if len(values) else None), None, None
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return float(values.mean()), float(low), float(high)


def _groups(paths: Iterable[str]) -> list[tuple[tuple[int | None, str | None], list[str]]]:
    groups: dict[tuple[Any, Any], list[str]] = {}
    for path in paths:
        found = _LAYER.search(path)
        layer, module = (int(found[1]) if found else None), path.rpartition(".")[2]
        for key in dict.fromkeys([(None, None), (layer, None), (None, module), (layer, module)]):
            groups.setdefault(key, []).append(path)
    return list(groups.items())
