"""Movement of the adapter against dense matrices, planted edits and limits."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import linalg

from seqdpo_utils import movement
from seqdpo_utils.errors import StudyError

BASE, ONE, TWO, THREE = CHECKPOINTS = ("base", "a", "a-then-b", "a-then-b-then-a")
MODULES = ("layers.0.q_proj", "layers.1.q_proj", "layers.1.up_proj")
PATH = "model.layers.0.q_proj"


def normal(rng, *size: int) -> torch.Tensor:
    return torch.tensor(rng.normal(size=size))


def lora(rng, *, modules=MODULES, rank=3) -> movement.Adapter:
    return {f"model.{name}": (normal(rng, rank, 7), normal(rng, 5, rank)) for name in modules}


def dense(point: movement.Adapter, *, scaling: float) -> torch.Tensor:
    return torch.cat([(scaling * b @ a).flatten() for a, b in point.values()])


def test_movement_equals_dense_matrices():
    rng = np.random.default_rng(0)
    points = {name: lora(rng) for name in (BASE, ONE, TWO)}
    table = movement.movement_table(points, scaling=2.0)
    assert tuple(table.columns) == movement.MOVEMENT_COLUMNS
    whole = table[table["layer"].isna() & table["module"].isna()].set_index("space")
    at = [dense(point, scaling=2.0) for point in points.values()]
    u, v = at[1] - at[0], at[2] - at[1]
    expected = [float(u.norm()), float(v.norm()), float(u @ v / u.norm() / v.norm())]
    assert whole.loc["weight", ["norm", "other_norm", "cosine"]].tolist() == pytest.approx(expected, rel=1e-9)
    layer = table[(table["space"] == "weight") & (table["layer"] == 1) & table["module"].isna()].iloc[0]
    one, two = (
        {path: point[path] for path in point if "layers.1" in path} for point in (points[BASE], points[ONE])
    )
    part = dense(two, scaling=2.0) - dense(one, scaling=2.0)
    assert layer["norm"] == pytest.approx(float(part.norm()), rel=1e-9)


def test_a_single_move_has_a_size_and_nothing_to_compare_it_with():
    rng = np.random.default_rng(7)
    points = {name: lora(rng) for name in (BASE, ONE)}
    table = movement.movement_table(points, scaling=2.0)
    places = len({(None, None), (0, None), (1, None), (None, "q_proj"), (None, "up_proj")}) + len(MODULES)
    assert len(table) == 2 * places, "one row a part in each of the two coordinate systems"
    assert table[["from_checkpoint", "to_checkpoint"]].drop_duplicates().to_numpy().tolist() == [[BASE, ONE]]
    assert table[["other_from", "other_to", "other_norm", "cosine"]].isna().all(axis=None)
    whole = movement.whole_adapter(table)
    moved = dense(points[ONE], scaling=2.0) - dense(points[BASE], scaling=2.0)
    assert list(whole.index) == ["lora", "weight"]
    assert whole.loc["weight", "norm"] == pytest.approx(float(moved.norm()), rel=1e-9)
    subspaces = movement.subspace_table(points, rank=3)
    assert subspaces.empty and tuple(subspaces.columns) == movement.SUBSPACE_COLUMNS


def test_three_moves_are_compared_in_every_pair():
    rng = np.random.default_rng(8)
    points = {name: lora(rng) for name in CHECKPOINTS}
    table = movement.movement_table(points, scaling=0.5)
    at = [dense(point, scaling=0.5) for point in points.values()]
    moves = dict(
        zip(itertools.pairwise(CHECKPOINTS), (b - a for a, b in itertools.pairwise(at)), strict=True)
    )
    whole = table[(table["space"] == "weight") & table["layer"].isna() & table["module"].isna()]
    assert len(whole) == 3
    for row, ((x, u), (y, v)) in zip(
        whole.itertuples(), itertools.combinations(moves.items(), 2), strict=True
    ):
        assert (row.from_checkpoint, row.to_checkpoint, row.other_from, row.other_to) == (*x, *y)
        expected = [float(u.norm()), float(v.norm()), float(u @ v / u.norm() / v.norm())]
        assert [row.norm, row.other_norm, row.cosine] == pytest.approx(expected, rel=1e-9)
    assert set(movement.subspace_table(points, rank=2).groupby(["to_checkpoint", "other_to"]).groups) == {
        (ONE, TWO),
        (ONE, THREE),
        (TWO, THREE),
    }
    last, middle = movement.whole_adapter(table), movement.whole_adapter(table, last=TWO)
    assert last["other_to"].tolist() == [THREE] * 2 and middle["other_to"].tolist() == [TWO] * 2
    assert set(last["to_checkpoint"]) == set(middle["to_checkpoint"]) == {ONE}
    assert last.loc["weight", "cosine"] == whole["cosine"].iloc[1]


def test_only_raw_coordinates_depend_on_how_the_product_is_split():
    rng = np.random.default_rng(1)
    points = {name: lora(rng) for name in (BASE, ONE, TWO)}
    mix = torch.tensor(rng.normal(size=(3, 3)) + 3 * np.eye(3))
    back = torch.linalg.inv(mix)
    turned = {
        name: {path: (mix @ a, b @ back) for path, (a, b) in point.items()} for name, point in points.items()
    }
    numbers = ["norm", "other_norm", "cosine"]
    tables = [movement.movement_table(given, scaling=1.0).set_index("space") for given in (points, turned)]
    one, two = (table[numbers].astype(float) for table in tables)
    assert np.allclose(one.loc["weight"], two.loc["weight"], rtol=1e-8)
    assert not np.allclose(one.loc["lora"], two.loc["lora"], rtol=1e-2)


def test_an_edit_planted_in_one_matrix_is_found_there():
    rng = np.random.default_rng(2)
    start, edited = lora(rng), "model.layers.1.up_proj"
    a, b = start[edited]
    moved = start | {edited: (a, b + torch.outer(torch.ones(5), torch.ones(3)))}
    table = movement.movement_table({BASE: start, ONE: moved, TWO: start}, scaling=1.0)
    cells = table[(table["space"] == "weight") & table["layer"].notna() & table["module"].notna()]
    found = cells[cells["norm"] > 1e-9]
    assert found[["layer", "module"]].to_numpy().tolist() == [[1, "up_proj"]]
    assert found["cosine"].iloc[0] == pytest.approx(-1.0)


def dense_subspaces(move: movement.Move, *, leading: int) -> tuple[np.ndarray, np.ndarray]:
    a1, b1, a2, b2 = move
    u, _, vt = np.linalg.svd((b2 @ a2 - b1 @ a1).numpy())
    return u[:, :leading], vt[:leading].T


def test_subspaces_equal_dense_svd_and_scipys_angles():
    rng = np.random.default_rng(4)
    points = {name: lora(rng, modules=("layers.0.q_proj",)) for name in (BASE, ONE, TWO)}
    points[BASE][PATH] = (
        points[BASE][PATH][0],
        torch.zeros(5, 3, dtype=torch.float64),
    )  # as an adapter starts
    moves = [(*points[x][PATH], *points[y][PATH]) for x, y in ((BASE, ONE), (ONE, TWO))]
    ours, theirs = ([f(m, leading=2) for m in moves] for f in (movement.update_subspaces, dense_subspaces))
    table = movement.subspace_table(points, rank=2).set_index("side")
    for k, side in enumerate(("left", "right")):
        for mine, full in zip(ours, theirs, strict=True):
            assert np.allclose(mine[k] @ mine[k].T, full[k] @ full[k].T, atol=1e-9), "the same projector"
        angles = linalg.subspace_angles(theirs[0][k], theirs[1][k])
        assert table.loc[side, "overlap"] == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-9)
        assert table.loc[side, "random"] == pytest.approx(2 / len(theirs[0][k]))


def test_subspace_overlap_at_its_limits():
    rng = np.random.default_rng(5)
    a, b, turned = normal(rng, 4, 300), normal(rng, 200, 4), normal(rng, 200, 4)

    def table(*last: torch.Tensor):
        """From zero to B, then to the given end."""
        points = zip((BASE, ONE, TWO), (torch.zeros_like(b), b, *last), strict=True)
        return movement.subspace_table(
            {name: {"model.layers.3.up_proj": (a, at)} for name, at in points}, rank=4
        )

    on = table(3 * b)
    assert on["overlap"].tolist() == pytest.approx([1.0, 1.0])
    assert on[["layer", "module", "directions"]].drop_duplicates().to_numpy().tolist() == [[3, "up_proj", 4]]
    left, right = table(b + turned).set_index("side")["overlap"]
    assert right == pytest.approx(1.0), "an A that did not move reads the same directions, whatever B does"
    assert left < 0.1
    still = table(b)
    assert still["overlap"].isna().all() and (still["directions"] == 0).all()
    draws = [movement.subspace_table(random_moves(rng), rank=4)["overlap"].mean() for _ in range(40)]
    assert np.mean(draws) == pytest.approx(4 / 40, rel=0.15), "k / d for random subspaces"


def random_moves(rng) -> dict[str, movement.Adapter]:
    """Two moves of rank 4 with nothing in common: each fills one half of the columns of a wider B."""
    a, b, c = normal(rng, 8, 40), normal(rng, 40, 4), normal(rng, 40, 4)
    still = torch.zeros_like(b)
    halves = {BASE: (still, still), ONE: (b, still), TWO: (b, c)}
    return {name: {"layers.0.m": (a, torch.cat(parts, dim=1))} for name, parts in halves.items()}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.lora_A.default.weight", (3, "up_proj")),
        ("transformer.h.11.attn.c_attn.lora_B.weight", (11, "c_attn")),
        ("model.layers.0.self_attn.q_proj", (0, "q_proj")),
        ("base_model.model.lm_head", (None, "lm_head")),
    ],
)
def test_the_place_of_a_parameter(name, place):
    assert movement.place_of(name) == place


def test_files_that_are_no_adapter_are_refused(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    with pytest.raises(StudyError, match="run the training notebooks"):
        movement.load_lora(tmp_path)
    save_file({"model.q_proj.lora_A.weight": torch.ones(2, 2)}, file)
    with pytest.raises(StudyError, match=r"not a LoRA adapter: model\.q_proj is incomplete"):
        movement.load_lora(tmp_path)
    save_file({"model.q_proj.weight": torch.ones(2, 2)}, file)
    with pytest.raises(StudyError, match="not a LoRA adapter: it holds no lora_A"):
        movement.load_lora(tmp_path)


def test_a_saved_adapter_is_read_in_double_precision(tmp_path):
    sides = {f"{PATH}.lora_A.weight": torch.ones(2, 7), f"{PATH}.lora_B.weight": torch.zeros(5, 2)}
    save_file(sides, tmp_path / "adapter_model.safetensors")
    ((path, (a, b)),) = movement.load_lora(tmp_path).items()
    assert (path, tuple(a.shape), tuple(b.shape)) == (PATH, (2, 7), (5, 2))
    assert a.dtype == b.dtype == torch.float64
