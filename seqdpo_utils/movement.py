"""Adapter movement: how far a stage moved the LoRA adapter, and in which direction.

A module's weight change is (alpha / r) B A. A move leads from (A, B) to (A', B'). Norms and cosines are taken
in two coordinate systems: the raw entries of A and B, and weight space, the one to trust.
"""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from seqdpo_utils.conflict import cosine
from seqdpo_utils.errors import StudyError

_LORA_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
_MOVES = ["from_checkpoint", "to_checkpoint", "other_from", "other_to"]
MOVEMENT_COLUMNS = (*_MOVES, "space", "layer", "module", "norm", "other_norm", "cosine")
SUBSPACE_COLUMNS = (*_MOVES, "layer", "module", "side", "directions", "dimension", "overlap", "random")

Adapter = dict[str, tuple[Tensor, Tensor]]
"""Module path to its A of shape (r, in) and B of shape (out, r)."""
Move = tuple[Tensor, Tensor, Tensor, Tensor]
"""(A, B, A', B') of one module."""


def load_lora(folder: Path) -> Adapter:
    """Read a saved adapter, in double precision.

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
        fault = f"{incomplete[0]} is incomplete" if incomplete else "it holds no lora_A and lora_B"
        raise StudyError(f"{file} is not a LoRA adapter: {fault}. Delete its folder and train again.")
    return {path: (pair["A"], pair["B"]) for path, pair in sides.items()}


def place_of(name: str) -> tuple[int | None, str]:
    """Layer (None outside the layers) and module of a parameter or of a module path.

    "model.layers.3.mlp.up_proj.lora_A.default.weight" gives (3, "up_proj").
    """
    path = match["path"] if (match := _LORA_KEY.match(name)) else name
    found = _LAYER.search(path)
    return (int(found[1]) if found else None), path.rpartition(".")[2]


def raw_inner(left: Move, right: Move) -> float:
    """<u, v> of two moves in raw coordinates, which are not unique: (RA, B R^-1) is the same weights."""
    (a1, b1, a2, b2), (c1, d1, c2, d2) = left, right
    return float(((a2 - a1) * (c2 - c1)).sum() + ((b2 - b1) * (d2 - d1)).sum())


def weight_inner(left: Move, right: Move) -> float:
    """<B'A' - BA, D'C' - DC> through 2r-by-2r products; no (out, in) matrix is formed.

    Multiply by (alpha / r) squared for weight space.
    """
    (p, q), (s, t) = _factors(left), _factors(right)
    return float(((p.T @ s) * (q @ t.T)).sum())


def _factors(move: Move) -> tuple[Tensor, Tensor]:
    """B'A' - BA as a product of (out, 2r) and (2r, in).

    Written [B' - B, B] [A'; A' - A], it loses no digits when the move is small.
    """
    a1, b1, a2, b2 = move
    return torch.cat([b2 - b1, b1], dim=1), torch.cat([a2, a2 - a1], dim=0)


def _moves_of(checkpoints: dict[str, Adapter], path: str) -> list[Move]:
    points = [adapter[path] for adapter in checkpoints.values()]
    return [(*before, *after) for before, after in itertools.pairwise(points)]


def movement_table(checkpoints: dict[str, Adapter], *, scaling: float) -> pd.DataFrame:
    """Norms of the adapter's moves and cosines between them: whole, by layer, by module and by both.

    Args:
        checkpoints: name to adapter, in the order of training, from the start adapter on; two at least.
        scaling: alpha / r.

    Returns:
        `MOVEMENT_COLUMNS`, a row for each coordinate system, part of the adapter and two moves:
        `from_checkpoint` and `to_checkpoint` (the move), `other_from` and `other_to` (a later move), `space`
        ("lora", "weight"), `layer`, `module` (null for all), `norm`, `other_norm`, `cosine` (null when a move
        is zero). A single move stands alone: its `other_from`, `other_to`, `other_norm`, `cosine` are null.
    """
    ends = list(itertools.pairwise(checkpoints))
    compared = list(itertools.combinations(range(len(ends)), 2)) or [(0, None)]
    rows = []
    for space, inner, factor in (("lora", raw_inner, 1.0), ("weight", weight_inner, scaling**2)):
        products = {}
        for path in next(iter(checkpoints.values())):
            moves = _moves_of(checkpoints, path)
            inners = [[inner(u, v) for v in moves] for u in moves]
            products[path] = factor * torch.tensor(inners, dtype=torch.float64)
        for place, paths in _groups(products):
            total = sum(products[path] for path in paths).tolist()
            norms = [max(total[i][i], 0.0) ** 0.5 for i in range(len(ends))]
            for i, j in compared:
                if j is None:
                    rows.append((*ends[i], None, None, space, *place, norms[i], None, None))
                    continue
                angle = cosine(total[i][j], total[i][i], total[j][j])
                rows.append((*ends[i], *ends[j], space, *place, norms[i], norms[j], angle))
    types = {"other_from": "string", "other_to": "string", "layer": "Int64"}
    types |= {"other_norm": "Float64", "cosine": "Float64"}
    return pd.DataFrame(rows, columns=list(MOVEMENT_COLUMNS)).astype(types)


def _groups(paths: Iterable[str]) -> list[tuple[tuple[int | None, str | None], list[str]]]:
    """Module paths of the whole adapter, of each layer, of each kind of module and of each of both."""
    groups: dict[tuple[int | None, str | None], list[str]] = {}
    for path in paths:
        layer, module = place_of(path)
        for key in dict.fromkeys([(None, None), (layer, None), (None, module), (layer, module)]):
            groups.setdefault(key, []).append(path)
    return list(groups.items())


def whole_adapter(movement: pd.DataFrame, *, last: str | None = None) -> pd.DataFrame:
    """Rows of `movement_table` for the adapter as a whole, by `space`.

    Args:
        movement: from `movement_table`.
        last: the first move is compared with the move that ends at this checkpoint; default: the last move.

    Returns:
        One row a space; the single move when there is no other to compare with.
    """
    whole = movement[movement["layer"].isna() & movement["module"].isna()]
    whole = whole[whole["from_checkpoint"] == whole["from_checkpoint"].iloc[0]]
    if last is not None:
        whole = whole[whole["other_to"] == last]
    return whole.drop_duplicates("space", keep="last").set_index("space")


def update_subspaces(move: Move, *, leading: int) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors of B'A' - BA.

    By QR of the thin factors and the SVD of a 2r-by-2r core; no (out, in) matrix is formed.

    Args:
        move: (A, B, A', B').
        leading: how many vectors at most; singular values at rounding are left out.

    Returns:
        Left (output side) of shape (out, k), right (input side) of shape (in, k), with orthonormal columns.
    """
    thin_left, thin_right = _factors(move)
    left, upper = torch.linalg.qr(thin_left)
    right, lower = torch.linalg.qr(thin_right.T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    kept = min(leading, int((sizes > 1e-10 * sizes[0]).sum()))
    return left @ u[:, :kept], right @ v[:kept].T


def subspace_table(checkpoints: dict[str, Adapter], *, rank: int) -> pd.DataFrame:
    """Do two moves share directions? Principal angles of their leading singular subspaces, by matrix.

    Args:
        checkpoints: as for `movement_table`.
        rank: of the adapter; so many leading directions of each move are compared.

    Returns:
        `SUBSPACE_COLUMNS`, a row for each matrix, side and two moves, so none for a single move: `side`
        ("left": what the matrix writes, "right": what it reads), `directions` (k), `dimension` (d), `overlap`
        (mean squared cosine of the k principal angles: 1 the same subspace, 0 orthogonal; null when a move is
        zero), `random` (its expectation k / d for random subspaces).
    """
    ends = list(itertools.pairwise(checkpoints))
    rows = []
    for path in next(iter(checkpoints.values())):
        spaces = [update_subspaces(move, leading=rank) for move in _moves_of(checkpoints, path)]
        for i, j in itertools.combinations(range(len(ends)), 2):
            for side, one, other in zip(("left", "right"), spaces[i], spaces[j], strict=True):
                k, d = min(one.shape[1], other.shape[1]), len(one)
                overlap = float((one[:, :k].T @ other[:, :k]).square().sum()) / k if k else None
                rows.append((*ends[i], *ends[j], *place_of(path), side, k, d, overlap, k / d))
    return pd.DataFrame(rows, columns=list(SUBSPACE_COLUMNS)).astype({"layer": "Int64", "overlap": "Float64"})
