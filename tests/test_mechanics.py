import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy import linalg

from seqdpo_utils import mechanics
from seqdpo_utils.paths import StudyError


def test_halves_by_hand():
    """New halves along the axes, both old halves along the diagonal between them: each of the four cosines is the root of one half."""
    new, old = (vector(2.0, 0.0), vector(0.0, 2.0)), (vector(1.0, 1.0), vector(3.0, 3.0))
    row = mechanics.conflict_row(new=vector(2.0, 2.0), new_halves=new, old_halves=old)
    assert row["cosine"] == pytest.approx(1.0)
    assert row["matched_cosine"] == pytest.approx(0.5**0.5)
    assert (row["within_cosine"], row["within_new_cosine"]) == (pytest.approx(1.0), 0.0)
    assert (row["cross_product"], row["within_new"], row["within_old"]) == (4.0, 0.0, 6.0)


def vector(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(values[:1]), torch.tensor(values[1:])]


def test_cosine_by_hand_and_of_nothing():
    new, old = vector(3.0, 4.0), vector(4.0, -3.0)
    assert mechanics.dot(new, old) == 0
    assert mechanics.cosine(-25.0, 25.0, 25.0) == -1
    assert mechanics.cosine(0.0, 0.0, 25.0) is None


def test_all_products_at_once_equal_one_by_one():
    rng = np.random.default_rng(6)
    vectors = [[torch.tensor(rng.normal(size=size), dtype=torch.float32) for size in ((3, 4), (5,), (2, 2))] for _ in range(4)]
    assert np.allclose(mechanics.gram(vectors), [[mechanics.dot(a, b) for b in vectors] for a in vectors], rtol=1e-12)


@pytest.mark.parametrize("truth", [-0.3, 0.0, 0.6])
def test_the_correction_recovers_a_planted_cosine_that_noise_hides(truth):
    rng = np.random.default_rng(0)
    size, noise = 20_000, 3.0
    one = rng.normal(size=size)
    two = truth * one + (1 - truth**2) ** 0.5 * rng.normal(size=size)
    rows = []
    for _ in range(40):
        a, b, c, d = ([torch.tensor(v + noise * rng.normal(size=size))] for v in (one, one, two, two))
        rows.append(mechanics.conflict_row(new=[a[0] + b[0]], new_halves=(a, b), old_halves=(c, d)))
    table = pd.DataFrame(rows)
    assert table["corrected_cosine"].mean() == pytest.approx(truth, abs=0.03)
    assert mechanics.pooled_corrected_cosine(table) == pytest.approx(truth, abs=0.03)
    assert abs(table["cosine"].mean()) < 0.5 * abs(truth) + 0.02
    assert abs(table["matched_cosine"].mean()) < abs(table["cosine"].mean()) + 0.01


def test_what_cannot_be_estimated_is_none():
    new, against_itself = (vector(1.0, 0.0), vector(1.0, 0.0)), (vector(1.0, 0.0), vector(-1.0, 0.0))
    row = mechanics.conflict_row(new=vector(2.0, 0.0), new_halves=new, old_halves=against_itself)
    assert row["corrected_cosine"] is None
    assert row["cosine"] is None
    assert (row["within_cosine"], row["within_new_cosine"], row["matched_cosine"]) == (-1.0, 1.0, 0.0)
    alone = mechanics.conflict_row(new=vector(2.0, 0.0), new_halves=None, old_halves=new)
    assert set(alone) == set(row)
    assert [name for name, value in alone.items() if value is None] == [
        "matched_cosine",
        "within_new_cosine",
        "cross_product",
        "within_new",
        "corrected_cosine",
    ]
    beyond = pd.DataFrame({"cross_product": [5.0], "within_new": [1.0], "within_old": [1.0]})
    assert mechanics.pooled_corrected_cosine(beyond) is None


def lora(rng, *, modules=("layers.0.q_proj", "layers.1.q_proj", "layers.1.up_proj"), rank=3):
    return {f"model.{name}": (torch.tensor(rng.normal(size=(rank, 7))), torch.tensor(rng.normal(size=(5, rank)))) for name in modules}


def test_movement_equals_dense_matrices():
    rng = np.random.default_rng(0)
    points = {name: lora(rng) for name in ("stage0", "stage1", "stage2")}
    table = mechanics.movement_table(points, scaling=2.0)
    whole = table[table["layer"].isna() & table["module"].isna()].set_index("space")
    dense = {name: torch.cat([(2.0 * b @ a).flatten() for a, b in point.values()]) for name, point in points.items()}
    u, v = dense["stage1"] - dense["stage0"], dense["stage2"] - dense["stage1"]
    assert whole.loc["weight", ["norm", "other_norm", "cosine"]].tolist() == pytest.approx(
        [float(u.norm()), float(v.norm()), float(u @ v / u.norm() / v.norm())], rel=1e-9
    )
    layer = table[(table["space"] == "weight") & (table["layer"] == 1) & table["module"].isna()].iloc[0]
    part = torch.cat(
        [
            (2.0 * (points["stage1"][p][1] @ points["stage1"][p][0] - points["stage0"][p][1] @ points["stage0"][p][0])).flatten()
            for p in points["stage0"]
            if "layers.1" in p
        ]
    )
    assert layer["norm"] == pytest.approx(float(part.norm()), rel=1e-9)


def test_only_raw_coordinates_depend_on_how_the_product_is_split():
    rng = np.random.default_rng(1)
    points = {name: lora(rng) for name in ("stage0", "stage1", "stage2")}
    mix = torch.tensor(rng.normal(size=(3, 3)) + 3 * np.eye(3))
    turned = {name: {path: (mix @ a, b @ torch.linalg.inv(mix)) for path, (a, b) in point.items()} for name, point in points.items()}
    one, two = (mechanics.movement_table(p, scaling=1.0).set_index("space")[["norm", "other_norm", "cosine"]].astype(float) for p in (points, turned))
    assert np.allclose(one.loc["weight"], two.loc["weight"], rtol=1e-8)
    assert not np.allclose(one.loc["lora"], two.loc["lora"], rtol=1e-2)


def test_an_edit_planted_in_one_matrix_is_found_there():
    rng = np.random.default_rng(2)
    start = lora(rng)
    moved = {path: (a, b + torch.outer(torch.ones(5), torch.ones(3)) if path == "model.layers.1.up_proj" else b) for path, (a, b) in start.items()}
    table = mechanics.movement_table({"stage0": start, "stage1": moved, "stage2": start}, scaling=1.0)
    cells = table[(table["space"] == "weight") & table["layer"].notna() & table["module"].notna()]
    found = cells[cells["norm"] > 1e-9]
    assert found[["layer", "module"]].to_numpy().tolist() == [[1, "up_proj"]]
    assert found["cosine"].iloc[0] == pytest.approx(-1.0)


def conflict(cross: float, within: float, *, within_new: float | None = None, steps: int = 12, width: float = 0.02) -> pd.DataFrame:
    noise = np.random.default_rng(0).normal(0, width, (3, steps))
    noise -= noise.mean(axis=1, keepdims=True)
    nothing = dict.fromkeys(("cross_product", "within_new", "within_old"), [None] * steps)
    new = within if within_new is None else within_new
    return pd.DataFrame({"matched_cosine": cross + noise[0], "within_cosine": within + noise[1], "within_new_cosine": new + noise[2]} | nothing)


@pytest.mark.parametrize(
    ("cross", "within", "verdict"),
    [
        (-0.3, 0.3, "opposed"),
        (0.3, 0.3, "aligned"),
        (0.0, 0.3, "near-orthogonal"),
        (0.0, 0.0, "cannot be decided at this size"),
        (0.0, -0.3, "cannot be decided at this size"),
    ],
)
def test_near_orthogonal_needs_an_objective_that_agrees_with_itself(cross, within, verdict):
    assert mechanics.conflict_verdict(conflict(cross, within))["verdict"] == verdict


def test_both_objectives_must_agree_with_themselves():
    """A new gradient of pure noise is orthogonal to everything, itself included."""
    assert mechanics.conflict_verdict(conflict(0.0, 0.6, within_new=0.0))["verdict"] == "cannot be decided at this size"
    both = mechanics.conflict_verdict(conflict(0.0, 0.6, within_new=0.2))
    assert both["verdict"] == "near-orthogonal"
    assert [both[name][0] for name in ("within_old", "within_new", "within")] == pytest.approx([0.6, 0.2, 0.4])


def test_without_halves_nothing_is_compared():
    table = conflict(-0.9, 0.9).assign(matched_cosine=None, within_new_cosine=None)
    found = mechanics.conflict_verdict(table)
    assert (found["verdict"], found["steps"], found["compared"]) == ("no halves to compare", 12, 0)


def test_two_measurements_decide_nothing():
    assert mechanics.conflict_verdict(conflict(-0.9, 0.9, steps=2))["verdict"] == "cannot be decided at this size"
    nothing = mechanics.conflict_verdict(conflict(0, 0).head(0))
    assert nothing["cross"] == (None, None, None)
    assert nothing["verdict"] == "not measured"


def test_an_interval_of_cosines_stays_within_what_a_cosine_can_be():
    low, high = mechanics.conflict_verdict(conflict(0.1, 0.0, steps=3, width=0.8))["cross"][1:]
    assert low >= -1
    assert high <= 1


def test_shuffled_moves_are_orthogonal_and_keep_their_size():
    rng = np.random.default_rng(3)
    wide = {f"model.layers.{k}.q_proj": (torch.tensor(rng.normal(size=(4, 200))), torch.tensor(rng.normal(size=(100, 4)))) for k in range(6)}
    points = {"stage0": wide, "stage1": {p: (a, 1.5 * b) for p, (a, b) in wide.items()}, "stage2": {p: (a, 2.0 * b) for p, (a, b) in wide.items()}}
    assert float(mechanics.whole_adapter(mechanics.movement_table(points, scaling=2.0)).loc["weight", "cosine"]) == pytest.approx(1.0)
    options = {"names": ("stage0", "stage1", "stage2"), "scaling": 2.0, "repeats": 4}
    one, same, other = (mechanics.shuffled_cosines(points, generator=torch.Generator().manual_seed(s), **options) for s in (0, 0, 1))
    assert one == same != other
    assert max(map(abs, one)) < 0.2


def dense_subspaces(move, *, leading):
    a1, b1, a2, b2 = move
    u, _, vt = np.linalg.svd((b2 @ a2 - b1 @ a1).numpy())
    return u[:, :leading], vt[:leading].T


def test_subspaces_equal_dense_svd_and_scipys_angles():
    rng = np.random.default_rng(4)
    points = {name: lora(rng, modules=("layers.0.q_proj",)) for name in ("stage0", "stage1", "stage2")}
    path = "model.layers.0.q_proj"
    points["stage0"][path] = (points["stage0"][path][0], torch.zeros(5, 3, dtype=torch.float64))  # as an adapter starts
    moves = [(*points[x][path], *points[y][path]) for x, y in (("stage0", "stage1"), ("stage1", "stage2"))]
    ours, dense = ([f(move, leading=2) for move in moves] for f in (mechanics.update_subspaces, dense_subspaces))
    table = mechanics.subspace_table(points, rank=2).set_index("side")
    for k, side in enumerate(("left", "right")):
        for mine, theirs in zip(ours, dense, strict=True):
            assert np.allclose(mine[k] @ mine[k].T, theirs[k] @ theirs[k].T, atol=1e-9), "the same projector"
        angles = linalg.subspace_angles(dense[0][k], dense[1][k])
        assert table.loc[side, "overlap"] == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-9)
        assert table.loc[side, "random"] == pytest.approx(2 / len(dense[0][k]))


def test_subspace_overlap_at_its_limits():
    rng = np.random.default_rng(5)
    a, b = (torch.tensor(rng.normal(size=size)) for size in ((4, 300), (200, 4)))
    zero = torch.zeros_like(b)
    path = "model.layers.3.up_proj"
    on = mechanics.subspace_table({"stage0": {path: (a, zero)}, "stage1": {path: (a, b)}, "stage2": {path: (a, 3 * b)}}, rank=4)
    assert on["overlap"].tolist() == pytest.approx([1.0, 1.0])
    assert on[["layer", "module", "directions"]].drop_duplicates().to_numpy().tolist() == [[3, "up_proj", 4]]
    turned = torch.tensor(rng.normal(size=(200, 4)))
    table = mechanics.subspace_table({"stage0": {path: (a, zero)}, "stage1": {path: (a, b)}, "stage2": {path: (a, b + turned)}}, rank=4)
    left, right = table.set_index("side")["overlap"]
    assert right == pytest.approx(1.0), "an A that did not move reads the same directions, whatever B does"
    assert left < 0.1
    still = mechanics.subspace_table({"stage0": {path: (a, zero)}, "stage1": {path: (a, b)}, "stage2": {path: (a, b)}}, rank=4)
    assert still["overlap"].isna().all() and (still["directions"] == 0).all()
    draws = [mechanics.subspace_table(random_moves(rng), rank=4)["overlap"].mean() for _ in range(40)]
    assert np.mean(draws) == pytest.approx(4 / 40, rel=0.15), "k / d for random subspaces"


def random_moves(rng):
    """Two moves of rank 4 with nothing in common: each fills one half of the columns of a wider B."""
    a, b, c = (torch.tensor(rng.normal(size=size)) for size in ((8, 40), (40, 4), (40, 4)))
    still = torch.zeros_like(b)
    return {name: {"layers.0.m": (a, torch.cat(parts, dim=1))} for name, parts in {"0": (still, still), "1": (b, still), "2": (b, c)}.items()}


def test_files_that_are_no_adapter_are_refused(tmp_path):
    with pytest.raises(StudyError, match="run the training notebooks"):
        mechanics.load_lora(tmp_path)
    save_file({"model.q_proj.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(StudyError, match="not a LoRA adapter"):
        mechanics.load_lora(tmp_path)
