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
    mean, low, high = conflict.pooled_corrected_cosine(table, rng=rng)
    assert mean == pytest.approx(truth, abs=0.03) and low < truth < high < low + 0.3
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
    table = pd.DataFrame([row] * 4)
    assert conflict.pooled_corrected_cosine(table, rng=np.random.default_rng(0)) == (None, None, None)


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
        (-0.3, 0.4, "opposed"),
        (0.3, 0.4, "aligned"),
        (0.0, 0.4, "near-orthogonal"),
        (0.02, 0.4, "near-orthogonal"),
        (-0.02, 0.4, "near-orthogonal"),
        (0.0, 0.05, "cannot be decided at this size"),
        (0.0, 0.0, "cannot be decided at this size"),
        (0.0, -0.3, "cannot be decided at this size"),
        (0.3, 0.0, "cannot be decided at this size"),
        (-0.3, -0.3, "cannot be decided at this size"),
    ],
)
def test_a_verdict_needs_objectives_that_agree_with_themselves(cross, within, verdict):
    """Cosines of +-0.02 are clear of zero and yet negligible; 0 within 0.05 is too wide to be called so."""
    assert conflict.conflict_verdict(planted(cross, within))["verdict"] == verdict


@pytest.mark.parametrize("cross", [-0.3, 0.0, 0.3])
def test_one_objective_of_noise_shuts_the_gate(cross):
    """A gradient of pure noise is orthogonal to everything, itself included."""
    for sides in ({"within": 0.6, "within_new": 0.0}, {"within": 0.0, "within_new": 0.6}):
        found = conflict.conflict_verdict(planted(cross, **sides))
        assert found["verdict"] == conflict.UNDECIDED and found["corrected"] == (None, None, None)
        noisy = "new" if sides["within"] else "old"
        assert f"halves of the {noisy} objective do not" in conflict.verdict_in_words(found)
    both = conflict.conflict_verdict(planted(0.0, 0.6, within_new=0.2))
    assert both["verdict"] == "near-orthogonal"
    means = [both[name][0] for name in ("within_old", "within_new", "within")]
    assert means == pytest.approx([0.6, 0.2, 0.4])


def test_orthogonal_is_a_statement_about_the_corrected_cosine():
    """The same matched cosine of -0.06 is -0.1 freed of little noise and -0.6 of much."""
    clean, noisy = (conflict.conflict_verdict(planted(-0.06, within, width=0.01)) for within in (0.6, 0.1))
    assert clean["corrected"][0] == pytest.approx(-0.1) and clean["verdict"] == "near-orthogonal"
    assert noisy["corrected"][0] == pytest.approx(-0.6) and noisy["verdict"] == "opposed"
    assert all(found["cross"][2] < 0 for found in (clean, noisy))
    inside, across = (conflict.conflict_verdict(planted(c, 0.9, width=0.001)) for c in (0.178, 0.182))
    assert (inside["verdict"], across["verdict"]) == ("near-orthogonal", "aligned")


def test_norms_that_change_do_not_attenuate_the_pooled_cosine():
    """Halves without noise at a cosine of -0.9; one norm falls from 4 to 1, the other rises from 1 to 4."""
    rows = []
    for large, small in zip((4.0, 3.0, 2.0, 1.0), (1.0, 2.0, 3.0, 4.0), strict=True):
        old, new = vector(large, 0.0), vector(-0.9 * small, (1 - 0.81) ** 0.5 * small)
        rows.append(conflict.conflict_row(new=new, new_halves=(new, new), old_halves=(old, old)))
    table = pd.DataFrame(rows)
    assert table["corrected_cosine"].tolist() == pytest.approx([-0.9] * 4)
    summed = table[["cross_product", "within_new", "within_old"]].sum()
    assert conflict.corrected_cosine(*summed) == pytest.approx(-0.6), "what sums of products would give"
    found = conflict.conflict_verdict(table)
    assert found["corrected"] == pytest.approx((-0.9, -0.9, -0.9), abs=1e-6)
    assert found["verdict"] == "opposed"


def test_the_generator_rules_the_interval_and_the_pages_agree():
    table = planted(0.1, 0.5, width=0.1)
    bounds = [conflict.pooled_corrected_cosine(table, rng=np.random.default_rng(k)) for k in (0, 0, 1)]
    assert bounds[0] == bounds[1] != bounds[2] and bounds[0] == pytest.approx(bounds[2], abs=0.05)
    assert conflict.conflict_verdict(table)["corrected"] == bounds[0]
    assert conflict.conflict_verdict(table, rng=np.random.default_rng(1))["corrected"] == bounds[2]


def test_intervals_by_hand():
    """Three cosines, 0.01 apart: the 99.5 % point of t with two degrees of freedom is 9.925."""
    cosines = {"matched_cosine": [0.01, 0.02, 0.03], "within_cosine": [0.79, 0.8, 0.81]}
    found = conflict.conflict_verdict(pd.DataFrame(cosines | {"within_new_cosine": [0.79, 0.8, 0.81]}))
    half = 9.925 * 0.01 / 3**0.5
    assert found["cross"] == pytest.approx((0.02, 0.02 - half, 0.02 + half), abs=1e-4)
    assert found["within_old"] == found["within"] == pytest.approx((0.8, 0.8 - half, 0.8 + half), abs=1e-4)


def test_turning_the_new_labels_turns_the_verdict():
    for cross in (0.3, 0.02, 0.2):
        table = planted(cross, 0.5, width=0.15)
        one, other = (
            conflict.conflict_verdict(t)
            for t in (table, table.assign(matched_cosine=-table["matched_cosine"]))
        )
        turned = {"aligned": "opposed", "opposed": "aligned"}
        assert other["verdict"] == turned.get(one["verdict"], one["verdict"])
        for name in ("cross", "corrected"):
            mean, low, high = one[name]
            assert other[name] == pytest.approx((-mean, -high, -low))


def chain_of(rng, *, signal: float, truth: float = 0.0, steps: int = 4, size: int = 60) -> pd.DataFrame:
    """Measurements of two gradients of length `signal` at a cosine under noise of length 1."""
    true = np.zeros((2, size))
    true[0, 0], true[1, :2] = signal, (signal * truth, signal * (1 - truth**2) ** 0.5)
    halves = true[[0, 0, 1, 1]] + rng.normal(size=(steps, 4, size)) / size**0.5
    halves /= np.linalg.norm(halves, axis=2, keepdims=True)
    products = halves @ halves.transpose(0, 2, 1)
    cosines = {"matched_cosine": products[:, 2:, :2].mean(axis=(1, 2))}
    cosines |= {"within_cosine": products[:, 0, 1], "within_new_cosine": products[:, 2, 3]}
    return pd.DataFrame(cosines)


@pytest.mark.parametrize(
    ("signal", "size", "true"),
    [(0.0, 60, {conflict.UNDECIDED}), (0.5, 500, {conflict.UNDECIDED, "near-orthogonal"})],
    ids=["noise alone", "objectives that are orthogonal"],
)
def test_eight_chains_without_conflict_seldom_name_one(signal, size, true):
    rng = np.random.default_rng(1)
    tables = [[chain_of(rng, signal=signal, size=size) for _ in range(8)] for _ in range(60)]
    studies = [[conflict.conflict_verdict(table)["verdict"] for table in study] for study in tables]
    false = np.mean([bool(set(study) - true) for study in studies])
    assert false < 0.10


def test_a_real_conflict_is_not_called_orthogonal_and_is_seen_with_enough_measurements():
    rng = np.random.default_rng(2)
    tables = [chain_of(rng, signal=1.0, truth=-0.5, steps=n) for n in (4, 24) for _ in range(40)]
    found = [conflict.conflict_verdict(table) for table in tables]
    assert not [each for each in found if each["verdict"] == "near-orthogonal"]
    enough = found[40:]
    assert np.mean([each["verdict"] == "opposed" for each in enough]) > 0.9
    covered = [each["corrected"][1] < -0.5 < each["corrected"][2] for each in enough if each["corrected"][0]]
    assert len(covered) > 35 and np.mean(covered) > 0.9


def test_without_halves_nothing_is_compared():
    table = planted(-0.9, 0.9).assign(matched_cosine=None, within_new_cosine=None)
    found = conflict.conflict_verdict(table)
    assert (found["verdict"], found["steps"], found["compared"]) == ("no halves to compare", 12, 0)


def test_words_say_how_much_is_behind_a_verdict():
    few, many = (conflict.conflict_verdict(planted(-0.3, 0.4, steps=n, width=0.005)) for n in (4, 12))
    assert conflict.measured_in_words(few).startswith("only 4 measurements, 4 with halves on both sides")
    words = conflict.measured_in_words(many)
    assert words.startswith("12 measurements, 12 with") and "corrected cosine -0.75 (-0.7" in words
    assert "below zero" in conflict.verdict_in_words(many)
    wide = conflict.conflict_verdict(planted(0.0, 0.05))
    assert conflict.verdict_in_words(wide) == conflict.MEANING[conflict.UNDECIDED]
    none = conflict.conflict_verdict(planted(0.0, 0.0))
    assert conflict.measured_in_words(none).endswith("corrected cosine not estimable")
    assert "of the old and of the new objective do not" in conflict.verdict_in_words(none)


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
    assert (found["verdict"], found["corrected"]) == ("not measured", (None, None, None))
    assert (found["steps"], found["compared"]) == (0, 0)


def test_an_interval_of_cosines_stays_within_what_a_cosine_can_be():
    low, high = conflict.conflict_verdict(planted(0.1, 0.0, steps=3, width=0.8))["cross"][1:]
    assert low >= -1
    assert high <= 1


def test_each_stage_and_earlier_objective_has_a_verdict_of_its_own():
    parts = {(2, "a", "train"): planted(0.3, 0.5), (3, "a", "train"): planted(-0.3, 0.5)}
    parts |= {(3, "a", "probe"): planted(0.0, 0.5)}
    names = ["stage", "previous_objective", "split"]
    tables = [table.assign(**dict(zip(names, key, strict=True))) for key, table in parts.items()]
    found = conflict.verdicts(pd.concat(tables, ignore_index=True))
    words = dict(zip(parts, ("aligned", "opposed", "near-orthogonal"), strict=True))
    assert {key: verdict["verdict"] for key, verdict in found.items()} == words
    assert conflict.verdicts(pd.DataFrame(columns=list(conflict.CONFLICT_COLUMNS))) == {}


def test_a_caption_tells_how_much_was_measured():
    found = {"steps": 9, "compared": 8, "corrected": (None, None, None)}
    words = "9 measurements, 8 with halves on both sides, corrected cosine "
    assert conflict.measured_in_words(found) == words + "not estimable"
    found["corrected"] = (-0.256, -0.3, -0.001)
    assert conflict.measured_in_words(found) == words + "-0.26 (-0.30 to +0.00)"
    assert conflict.measured_in_words(found | {"compared": 7}).startswith("only 9 measurements, 7 with")
