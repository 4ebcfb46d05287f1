"""Cosines of gradients by hand, planted under noise, and what may be said of them."""

import numpy as np
import pandas as pd
import pytest
import torch

from seqdpo_utils import conflict

NEEDS_NEW_HALVES = ["matched_cosine", "within_new_cosine", "cross_product", "within_new", "corrected_cosine"]


def vector(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(values[:1]), torch.tensor(values[1:])]


def test_halves_by_hand():
    """New halves along the axes, old halves along the diagonal: each of the four cosines is sqrt(1/2)."""
    new, old = (vector(2.0, 0.0), vector(0.0, 2.0)), (vector(1.0, 1.0), vector(3.0, 3.0))
    row = conflict.conflict_row(new=vector(2.0, 2.0), new_halves=new, old_halves=old)
    assert (row["dot"], row["cosine"]) == (8.0, pytest.approx(1.0))
    assert (row["norm_new"], row["norm_old"]) == (pytest.approx(8**0.5), pytest.approx(8**0.5))
    assert row["matched_cosine"] == pytest.approx(0.5**0.5)
    assert (row["within_cosine"], row["within_new_cosine"]) == (pytest.approx(1.0), 0.0)
    assert (row["cross_product"], row["within_new"], row["within_old"]) == (4.0, 0.0, 6.0)
    assert set(row) < set(conflict.CONFLICT_COLUMNS)


def test_each_half_is_matched_with_its_own_norm():
    """Four cosines of unlike halves: 1, 3/5, 0 and 4/5."""
    new, old = (vector(2.0, 0.0), vector(0.0, 3.0)), (vector(5.0, 0.0), vector(3.0, 4.0))
    row = conflict.conflict_row(new=vector(2.0, 3.0), new_halves=new, old_halves=old)
    assert row["matched_cosine"] == pytest.approx((1 + 0.6 + 0 + 0.8) / 4)
    assert row["cross_product"] == pytest.approx((10 + 6 + 0 + 12) / 4)


def test_cosine_by_hand_and_of_nothing():
    new, old = vector(3.0, 4.0), vector(4.0, -3.0)
    assert conflict.dot(new, old) == 0
    assert conflict.cosine(-25.0, 25.0, 25.0) == -1
    assert conflict.cosine(0.0, 0.0, 25.0) is None


def test_all_products_at_once_equal_one_by_one():
    rng = np.random.default_rng(6)
    sizes = ((3, 4), (5,), (2, 2))
    vectors = [[torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in sizes] for _ in range(4)]
    one_by_one = [[conflict.dot(a, b) for b in vectors] for a in vectors]
    assert np.allclose(conflict.gram(vectors), one_by_one, rtol=1e-12)


@pytest.mark.parametrize("truth", [-0.3, 0.0, 0.6])
def test_the_correction_recovers_a_planted_cosine_that_noise_hides(truth):
    rng = np.random.default_rng(0)
    size, noise = 20_000, 3.0
    one = rng.normal(size=size)
    two = truth * one + (1 - truth**2) ** 0.5 * rng.normal(size=size)
    rows = []
    for _ in range(40):
        a, b, c, d = ([torch.tensor(v + noise * rng.normal(size=size))] for v in (one, one, two, two))
        rows.append(conflict.conflict_row(new=[a[0] + b[0]], new_halves=(a, b), old_halves=(c, d)))
    table = pd.DataFrame(rows)
    assert table["corrected_cosine"].mean() == pytest.approx(truth, abs=0.03)
    assert conflict.pooled_corrected_cosine(table) == pytest.approx(truth, abs=0.03)
    assert abs(table["cosine"].mean()) < 0.5 * abs(truth) + 0.02
    assert abs(table["matched_cosine"].mean()) < abs(table["cosine"].mean()) + 0.01


def test_what_cannot_be_estimated_is_none():
    new, against_itself = (vector(1.0, 0.0), vector(1.0, 0.0)), (vector(1.0, 0.0), vector(-1.0, 0.0))
    row = conflict.conflict_row(new=vector(2.0, 0.0), new_halves=new, old_halves=against_itself)
    assert row["corrected_cosine"] is None
    assert row["cosine"] is None
    assert (row["within_cosine"], row["within_new_cosine"], row["matched_cosine"]) == (-1.0, 1.0, 0.0)
    alone = conflict.conflict_row(new=vector(2.0, 0.0), new_halves=None, old_halves=new)
    assert set(alone) == set(row)
    assert [name for name, value in alone.items() if value is None] == NEEDS_NEW_HALVES


def test_a_corrected_cosine_beyond_one_is_no_cosine():
    """Halves that agree with the other objective more than with themselves: 5 / sqrt(1 * 1)."""
    assert conflict.corrected_cosine(5.0, 1.0, 1.0) is conflict.corrected_cosine(-5.0, 1.0, 1.0) is None
    assert conflict.corrected_cosine(-0.5, 1.0, 1.0) == -0.5
    assert conflict.corrected_cosine(0.5, -1.0, -1.0) is None
    halves = vector(1.0, 0.1), vector(0.1, 1.0)
    row = conflict.conflict_row(new=vector(1.1, 1.1), new_halves=halves, old_halves=halves)
    assert row["cross_product"] > (row["within_new"] * row["within_old"]) ** 0.5 > 0
    assert row["corrected_cosine"] is None
    assert conflict.pooled_corrected_cosine(pd.DataFrame([row])) is None


def planted(
    cross: float, within: float, *, within_new: float | None = None, steps: int = 12, width: float = 0.02
) -> pd.DataFrame:
    """Cosines with exactly the given means."""
    noise = np.random.default_rng(0).normal(0, width, (3, steps))
    noise -= noise.mean(axis=1, keepdims=True)
    means = {"matched_cosine": cross, "within_cosine": within}
    means["within_new_cosine"] = within if within_new is None else within_new
    table = pd.DataFrame({name: mean + row for (name, mean), row in zip(means.items(), noise, strict=True)})
    return table.assign(cross_product=None, within_new=None, within_old=None)


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
    assert conflict.conflict_verdict(planted(cross, within))["verdict"] == verdict


def test_both_objectives_must_agree_with_themselves():
    """A new gradient of pure noise is orthogonal to everything, itself included."""
    alone = conflict.conflict_verdict(planted(0.0, 0.6, within_new=0.0))
    assert alone["verdict"] == "cannot be decided at this size"
    both = conflict.conflict_verdict(planted(0.0, 0.6, within_new=0.2))
    assert both["verdict"] == "near-orthogonal"
    means = [both[name][0] for name in ("within_old", "within_new", "within")]
    assert means == pytest.approx([0.6, 0.2, 0.4])


def test_without_halves_nothing_is_compared():
    table = planted(-0.9, 0.9).assign(matched_cosine=None, within_new_cosine=None)
    found = conflict.conflict_verdict(table)
    assert (found["verdict"], found["steps"], found["compared"]) == ("no halves to compare", 12, 0)


def test_two_measurements_decide_nothing():
    found = conflict.conflict_verdict(planted(-0.9, 0.9, steps=2))
    assert found["verdict"] == "cannot be decided at this size"
    assert found["cross"] == (pytest.approx(-0.9), None, None)


@pytest.mark.parametrize(
    "nothing", [planted(0, 0).head(0), pd.DataFrame(columns=list(conflict.CONFLICT_COLUMNS))]
)
def test_an_empty_table_was_not_measured(nothing):
    """A chain of one stage has no earlier objective: its table has columns and no rows."""
    found = conflict.conflict_verdict(nothing)
    assert found["cross"] == found["within"] == (None, None, None)
    assert (found["verdict"], found["corrected"]) == ("not measured", None)
    assert (found["steps"], found["compared"]) == (0, 0)


def test_an_interval_of_cosines_stays_within_what_a_cosine_can_be():
    low, high = conflict.conflict_verdict(planted(0.1, 0.0, steps=3, width=0.8))["cross"][1:]
    assert low >= -1
    assert high <= 1


def test_each_stage_and_earlier_objective_has_a_verdict_of_its_own():
    parts = {(2, "a"): planted(0.3, 0.5), (3, "a"): planted(-0.3, 0.5), (3, "b"): planted(0.0, 0.5)}
    tables = [table.assign(stage=key[0], previous_objective=key[1]) for key, table in parts.items()]
    found = conflict.verdicts(pd.concat(tables, ignore_index=True))
    words = {(2, "a"): "aligned", (3, "a"): "opposed", (3, "b"): "near-orthogonal"}
    assert {key: verdict["verdict"] for key, verdict in found.items()} == words
    assert conflict.verdicts(pd.DataFrame(columns=list(conflict.CONFLICT_COLUMNS))) == {}


def test_a_caption_tells_how_much_was_measured():
    found = {"steps": 8, "compared": 6, "corrected": None}
    words = "8 measurements, 6 with halves on both sides, corrected cosine "
    assert conflict.measured_in_words(found) == words + "not estimable"
    assert conflict.measured_in_words(found | {"corrected": -0.256}) == words + "-0.26"
