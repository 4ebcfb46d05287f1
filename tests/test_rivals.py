"""Displacement, drift and length: by hand, against brute force, and in their limits."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqdpo_utils import metrics, redistribution, rivals

ONE, TWO = "a", "a-then-b"


def records(**logps: tuple[list[float], list[float]]) -> pd.DataFrame:
    """Four pairs on three prompts; for each checkpoint the chosen and the rejected sums."""
    pairs = pd.DataFrame(
        {"pair_id": list("wxyz"), "prompt_id": list("ppqr"), "objective": "a", "split": "eval"}
    )
    pairs = pairs.assign(chosen_tokens=[4, 2, 6, 3], rejected_tokens=[2, 4, 3, 3])
    at = [pairs.assign(checkpoint=name, chosen_logp=c, rejected_logp=r) for name, (c, r) in logps.items()]
    return pd.concat(at, ignore_index=True)


BEFORE = [-4.0] * 4, [-4.0] * 4
AFTER_ONE = [-5.0, -5, -5, -3], [-6.0, -3, -8, -9]
AFTER_TWO = [-4.0] * 4, [-6.0, -3, -8, -9]


def moves(table: pd.DataFrame) -> pd.DataFrame:
    found = rivals.displacement(table, resamples=500, rng=np.random.default_rng(0))
    return found.set_index(["from_checkpoint", "to_checkpoint"])


def test_displacement_by_hand():
    found = moves(records(base=BEFORE, **{ONE: AFTER_ONE, TWO: AFTER_TWO}))
    assert list(found.index) == [("base", ONE), ("base", TWO), (ONE, TWO)]
    assert found.loc[("base", ONE), ["chosen", "rejected", "both_fell"]].tolist() == [-0.5, -2.5, 0.5]
    assert found.loc[("base", TWO), ["chosen", "both_fell"]].tolist() == [0.0, 0.0]
    assert found.loc[(ONE, TWO), ["chosen", "rejected", "both_fell"]].tolist() == [0.5, 0.0, 0.0]
    assert found[["n_pairs", "n_prompts"]].drop_duplicates().to_numpy().tolist() == [[4, 3]]
    assert (found["rejected_low"] <= found["rejected"]).all()
    assert (found["rejected"] <= found["rejected_high"]).all()
    assert found.loc[("base", ONE), "chosen_low"] < found.loc[("base", ONE), "chosen_high"]


def test_displacement_of_one_stage_and_of_three():
    """Every stage against the base, then each stage against the one before."""
    assert list(moves(records(base=BEFORE, **{ONE: AFTER_ONE})).index) == [("base", ONE)]
    again = f"{TWO}-then-a"
    found = moves(records(base=BEFORE, **{ONE: AFTER_ONE, TWO: AFTER_TWO, again: AFTER_ONE}))
    assert list(found.index) == [("base", ONE), ("base", TWO), ("base", again), (ONE, TWO), (TWO, again)]
    assert found.loc[(TWO, again), "chosen"] == -0.5


OF_TWO = stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975) * 2**0.5
"""So much wider than its draws is the interval of a mean over two prompts, if it is to cover."""


def test_prompts_are_resampled_with_all_their_pairs():
    """Two prompts of two pairs each: a draw holds a prompt's pairs together, so only three means occur."""
    table = records(base=BEFORE, **{ONE: ([-3.0, -5.0, 2.0, 4.0], [-4.0] * 4)}).assign(
        prompt_id=list("ppqq") * 2
    )
    row = moves(table).loc[("base", ONE)]
    found = [row["chosen_low"], row["chosen"], row["chosen_high"]]
    assert found == pytest.approx([3.5 - 3.5 * OF_TWO, 3.5, 3.5 + 3.5 * OF_TWO])


def test_divergences_are_averaged_with_a_t_interval_over_prompts():
    table = pd.DataFrame({"pair_id": list("wwxx"), "prompt_id": list("ppqq"), "kl": [0.1, 0.3, 0.4, 0.8]})
    table = table.assign(objective="a", checkpoint=ONE)
    (row,) = rivals.divergence_table(table).to_dict("records")
    assert row["n_pairs"] == 2
    expected = [*stats.t.interval(0.95, 1, loc=0.4, scale=stats.sem([0.2, 0.6])), 0.4]
    assert [row["kl_low"], row["kl_high"], row["kl"]] == pytest.approx(expected)
    single = rivals.divergence_table(table.head(2)).iloc[0]
    assert single["kl"] == pytest.approx(0.2) and pd.isna(single["kl_low"])
    nothing = rivals.divergence_table(table.head(0))
    assert nothing.empty and list(nothing.columns) == list(row)


@pytest.mark.parametrize(
    ("means", "reach", "told"),
    [
        ([0.1, 0.9, 0.1], 0.1, "largest on **b**"),
        ([0.1, 0.9, 0.8], 0.1, "the intervals overlap"),
        ([0.1, 0.9, 0.9], 0.0, "the intervals overlap"),  # an exact tie has no first
        ([0.4, 0.4, 0.4], 0.0, "equal, since the objectives share these answers"),
        ([0.4], 0.1, "no other objective to compare with"),
    ],
)
def test_the_largest_drift_is_named_only_where_it_stands_apart(means, reach, told):
    table = pd.DataFrame({"objective": list("abc")[: len(means)], "kl": means})
    assert rivals.largest_drift(table.assign(kl_low=table["kl"] - reach, kl_high=table["kl"] + reach)) == told


def planted(effect: float, *, pairs: int = 120) -> pd.DataFrame:
    """Measures whose policy margin moves with the length difference by `effect`, and noise."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(2, 40, (2, pairs))
    names = [f"i{k}" for k in range(pairs)]
    table = pd.DataFrame(
        {"pair_id": names, "prompt_id": names, "chosen_tokens": chosen, "rejected_tokens": rejected}
    )
    table = table.assign(objective="a", split="eval", rejected_logp=-10.0)
    margins = {"base": 0.0, ONE: 0.0, TWO: effect * (chosen - rejected) + rng.normal(size=pairs)}
    at = [table.assign(checkpoint=name, chosen_logp=-10.0 + move * chosen) for name, move in margins.items()]
    return metrics.pair_measures(pd.concat(at, ignore_index=True), beta=0.3)


def by_length(measures: pd.DataFrame, *, before: str = ONE, after: str = TWO, resamples: int = 300) -> dict:
    rng = np.random.default_rng(1)
    (row,) = rivals.length_as_predictor(
        measures, before=before, after=after, resamples=resamples, rng=rng
    ).to_dict("records")
    return row


@pytest.mark.parametrize(("effect", "sign"), [(0.5, 1), (-0.5, -1), (0.0, 0)])
def test_length_foretells_what_was_planted(effect, sign):
    measures = planted(effect)
    row = by_length(measures)
    wide = redistribution.pair_change(measures, "a", before=ONE, after=TWO).set_index("pair_id")
    lengths = measures[measures["checkpoint"] == "base"].set_index("pair_id").reindex(wide.index)
    longer = lengths["chosen_tokens"] - lengths["rejected_tokens"]
    assert row["spearman"] == pytest.approx(stats.spearmanr(longer, wide["change"]).statistic)
    assert np.sign(row["spearman_low"]) + np.sign(row["spearman_high"]) == 2 * sign
    assert row["longer_chosen"] == pytest.approx(((longer > 0) + 0.5 * (longer == 0)).mean())
    assert row["policy_accuracy"] == pytest.approx((wide["after"] > 0).mean())
    assert row["longer_chosen_low"] < row["longer_chosen"] < row["longer_chosen_high"]
    assert row["n_pairs"] == 120


def test_the_change_runs_between_the_checkpoints_that_are_named():
    """Nothing happened between the base and the first stage, all of it after."""
    measures = planted(0.5)
    assert pd.isna(by_length(measures, before="base", after=ONE, resamples=100)["spearman"])
    assert by_length(measures, before="base")["spearman"] == by_length(measures)["spearman"]


def test_equal_lengths_foretell_nothing():
    row = by_length(planted(0.5).assign(chosen_tokens=5, rejected_tokens=5), resamples=100)
    assert pd.isna(row["spearman"]) and pd.isna(row["spearman_low"])
    assert row["longer_chosen"] == 0.5
