import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqdpo_utils import metrics
from seqdpo_utils.paths import StudyError

RNG = np.random.default_rng


def records(*logps: tuple[float, float], checkpoint: str = "base", objective: str = "a", tokens: tuple[int, int] = (2, 4)) -> pd.DataFrame:
    names = [f"p{i}" for i in range(len(logps))]
    return pd.DataFrame({
        "pair_id": names, "prompt_id": names, "objective": objective, "split": "eval", "checkpoint": checkpoint, "chosen_logp": [w for w, _ in logps],
        "rejected_logp": [rejected for _, rejected in logps], "chosen_tokens": tokens[0], "rejected_tokens": tokens[1],
    })  # fmt: skip


BASE = records((-10.0, -10.0), (-20.0, -12.0), (-5.0, -5.0))
AFTER = records((-8.0, -11.0), (-21.0, -12.0), (-4.0, -4.0), checkpoint="stage1")


def test_margin_loss_and_wins_by_hand():
    margin = metrics.dpo_margin(AFTER, BASE, beta=0.3)
    assert margin.tolist() == pytest.approx([0.9, -0.3, 0.0])
    assert metrics.dpo_loss(margin).tolist() == pytest.approx([np.log(1 + np.exp(-0.9)), np.log(1 + np.exp(0.3)), np.log(2)])
    assert metrics.relative_wins(margin).tolist() == [1.0, 0.0, 0.5]


def test_policy_margin_by_hand():
    assert metrics.policy_margin(AFTER).tolist() == pytest.approx([-8 / 2 + 11 / 4, -21 / 2 + 12 / 4, -4 / 2 + 4 / 4])


def test_margin_is_exactly_zero_at_the_base_and_flips_with_the_labels():
    assert (metrics.dpo_margin(BASE, BASE, beta=0.3) == 0).all()
    names = {"chosen_logp": "rejected_logp", "rejected_logp": "chosen_logp"}
    flipped = metrics.dpo_margin(AFTER.rename(columns=names), BASE.rename(columns=names), beta=0.3)
    assert (flipped == -metrics.dpo_margin(AFTER, BASE, beta=0.3)).all()


def test_margin_finds_its_reference_by_pair_not_by_place():
    assert metrics.dpo_margin(AFTER, BASE.iloc[::-1], beta=0.3).tolist() == pytest.approx([0.9, -0.3, 0.0])
    with pytest.raises(StudyError, match="1 pairs have no base record"):
        metrics.dpo_margin(AFTER, BASE.head(2), beta=0.3)


def test_relative_accuracy_is_undefined_at_the_base():
    matrix = metrics.stage_matrix(metrics.pair_measures(pd.concat([BASE, AFTER]), beta=0.3), resamples=200, rng=RNG(0)).set_index("checkpoint")
    assert pd.isna(matrix.loc["base", "relative_accuracy"]) and matrix.loc["stage1", "relative_accuracy"] == 0.5
    assert matrix.loc["base", ["margin", "margin_low", "margin_high"]].tolist() == [0, 0, 0]
    assert matrix.loc["stage1", "margin"] == pytest.approx(0.2)
    assert matrix.loc["stage1", ["n_pairs", "n_prompts"]].tolist() == [3, 3]


def test_the_bootstrap_agrees_with_scipys_when_every_prompt_has_one_pair():
    values = RNG(1).normal(size=(60, 1))
    ours = metrics.interval(metrics.resampled_means(values, [str(i) for i in range(60)], resamples=20000, rng=RNG(0))[:, 0])
    theirs = stats.bootstrap((values[:, 0],), np.mean, method="percentile", n_resamples=20000, rng=RNG(0)).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_prompts_are_resampled_whole():
    """Ten copies of a pair are one prompt, not ten witnesses."""
    values = RNG(2).normal(size=(20, 1))
    once = metrics.resampled_means(values, list(range(20)), resamples=4000, rng=RNG(0)).std()
    copies = metrics.resampled_means(np.repeat(values, 10, axis=0), np.repeat(range(20), 10), resamples=4000, rng=RNG(0)).std()
    naive = metrics.resampled_means(np.repeat(values, 10, axis=0), range(200), resamples=4000, rng=RNG(0)).std()
    assert copies == pytest.approx(once, rel=1e-6) and naive < 0.5 * once


def test_columns_of_one_draw_share_their_prompts_and_the_generator_rules():
    values = np.stack([np.arange(10.0), np.arange(10.0) + 3], axis=1)
    draws = metrics.resampled_means(values, range(10), resamples=50, rng=RNG(0))
    assert np.allclose(draws[:, 1] - draws[:, 0], 3)
    again, other = (metrics.resampled_means(values, range(10), resamples=50, rng=RNG(s)) for s in (0, 1))
    assert np.array_equal(draws, again) and not np.array_equal(draws, other)


def chain(first: tuple[float, float, float], second: tuple[float, float, float], *, spread: float = 0.1, pairs: int = 50) -> pd.DataFrame:
    """Measures of a two-stage chain with given mean margins of two objectives at base, stage 1 and stage 2 (beta 1)."""
    noise = RNG(0).normal(0, spread, pairs)
    noise -= noise.mean()
    parts = [
        records(*[(m + (n if k else 0.0), 0.0) for n in noise], checkpoint=name, objective=objective)
        for objective, means in (("a", first), ("b", second)) for k, (name, m) in enumerate(zip(("base", "stage1", "stage2"), means, strict=True))
    ]  # fmt: skip
    return metrics.pair_measures(pd.concat(parts, ignore_index=True), beta=1.0)


def test_transfer_by_hand():
    table = metrics.transfer(chain((0, 2.0, 1.0), (0, 0.5, 3.0)), ["a", "b"], resamples=500, rng=RNG(0)).set_index(["objective", "quantity"])["value"]
    assert table["a", "learned"] == pytest.approx(2.0)
    assert table["a", "backward transfer"] == pytest.approx(-1.0)
    assert table["a", "forgetting"] == pytest.approx(1.0)
    assert table["a", "retention"] == pytest.approx(0.5)
    assert table["b", "learned"] == pytest.approx(2.5)
    assert table["b", "forward transfer"] == pytest.approx(0.5)
    assert ("b", "retention") not in table.index and ("a", "forward transfer") not in table.index


def test_retention_of_what_was_not_learned_is_undefined_with_a_reason():
    table = metrics.transfer(chain((0, 0.01, 1.0), (0, 0, 1), spread=1.0), ["a", "b"], resamples=500, rng=RNG(0))
    row = table[table["quantity"] == "retention"].iloc[0]
    assert pd.isna(row["value"]) and "stage 1 did not learn" in row["note"]
    assert metrics.outcome(row["low"], row["high"]) == metrics.UNDEFINED


@pytest.mark.parametrize(
    ("low", "high", "name"),
    [(1.2, 1.5, "positive transfer"), (0.95, 1.05, "stable"), (0.2, 0.7, "partial degradation"), (-0.5, -0.1, "reversal"), (0.5, 1.2, "undecided"),
     (-0.1, 0.4, "undecided"), (1.05, 1.3, "undecided"), (None, None, metrics.UNDEFINED)],
)  # fmt: skip
def test_the_outcome_rule(low, high, name):
    assert metrics.outcome(low, high) == name


def test_pair_change_by_hand():
    stage2 = records((-8.0, -11.0), (-5.0, -12.0), (-9.0, -4.0), checkpoint="stage2")
    changes = metrics.pair_change(metrics.pair_measures(pd.concat([BASE, AFTER, stage2]), beta=0.3), "a", before="stage1", after="stage2")
    assert changes["change"].tolist() == pytest.approx([0.0, 8.0, -2.5])
    assert changes["effect"].tolist() == ["unchanged", "helped", "harmed"]
    assert changes["reordered"].tolist() == ["same", "gained", "same"]
    assert metrics.churn(changes["before"], changes["after"]) == pytest.approx(1 / 3)


def test_quartiles_are_equal_groups_in_the_order_of_the_key():
    changes = pd.DataFrame({"prompt_id": range(10), "change": np.arange(10.0)})
    table = metrics.quartiles(changes, -changes["change"], resamples=200, rng=RNG(0))
    assert table["n_pairs"].tolist() == [3, 3, 2, 2]
    assert table["change"].tolist() == pytest.approx([8.0, 5.0, 2.5, 0.5])
    assert ((table["change_low"] <= table["change"]) & (table["change"] <= table["change_high"])).all()
    with pytest.raises(StudyError, match="3 held-out pairs"):
        metrics.quartiles(changes.head(3), changes["change"].head(3), resamples=200, rng=RNG(0))


def test_highest_minus_lowest_by_hand_and_regression_to_the_mean_without_any_training():
    changes = pd.DataFrame({"prompt_id": range(8), "change": np.arange(8.0)})
    row = metrics.highest_minus_lowest(changes, changes["change"], resamples=300, rng=RNG(0))
    assert (row["lowest"], row["highest"], row["difference"]) == (0.5, 6.5, 6.0)
    assert row["difference_low"] <= 6.0 <= row["difference_high"]
    truth, noise = RNG(0).normal(size=4000), RNG(1).normal(size=(3, 4000))
    own, after, other = (pd.Series(truth + n) for n in noise)
    drift = pd.DataFrame({"prompt_id": range(4000), "change": after - own})
    assert metrics.highest_minus_lowest(drift, own, resamples=200, rng=RNG(0))["difference_high"] < -0.5
    crossed = metrics.highest_minus_lowest(drift, other, resamples=200, rng=RNG(0))
    assert crossed["difference_low"] < 0 < crossed["difference_high"]


def test_stable_is_redistribution_when_more_pairs_changed_sides_than_two_seeds_explain():
    assert metrics.outcome(0.95, 1.05, excess_churn_low=0.02) == "redistribution"
    assert metrics.outcome(0.95, 1.05, excess_churn_low=-0.02) == "stable"
    assert metrics.outcome(0.2, 0.7, excess_churn_low=0.5) == "partial degradation"


def test_a_gain_has_three_readings():
    assert metrics.gain_in_words(0.1, 0.2) == "was learned"
    assert "fell" in metrics.gain_in_words(-0.2, -0.1)
    assert "not shown" in metrics.gain_in_words(-0.1, 0.1)
