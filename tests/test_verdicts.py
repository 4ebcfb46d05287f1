"""Simulations with a known answer: how often intervals cover, how often the rule errs, what Holm leaves."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqdpo_utils import metrics, verdicts


def covered(values: np.ndarray, truth: float, **clusters: np.ndarray) -> float:
    """Share of columns whose interval covers the true mean."""
    draws = metrics.resampled_means(values, resamples=500, rng=np.random.default_rng(1), **clusters)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("prompts", [8, 16, 32])
def test_intervals_cover_with_few_prompts(prompts):
    """1,500 studies, three pairs a prompt: 93 to 97 % for normal data; lognormal data are covered less."""
    rng, owners = np.random.default_rng(0), np.repeat(range(prompts), 3)
    noise = 0.3 * rng.normal(size=(3 * prompts, 1500))
    normal = rng.normal(size=(prompts, 1500))[owners] + noise
    assert 0.93 <= covered(normal, 0.0, prompts=owners) <= 0.97
    skewed = rng.lognormal(size=(prompts, 1500))[owners] + noise
    share = covered(skewed, np.exp(0.5), prompts=owners)
    assert {8: 0.80, 16: 0.84, 32: 0.87}[prompts] <= share <= 0.94
    assert covered(normal, 0.0, prompts=np.arange(3 * prompts)) < 0.85  # pairs are no prompts


@pytest.mark.parametrize(("seeds", "run_sd"), [(3, 0.0), (3, 0.3), (5, 0.3)])
def test_intervals_over_seeds_cover_and_those_over_prompts_alone_do_not(seeds, run_sd):
    """Never below 93 %; above 97 % where runs hardly differ, since what both ways share counts twice."""
    rng, prompts, cases = np.random.default_rng(0), 16, 1000
    runs, asked = np.indices((seeds, prompts)).reshape(2, -1)
    values = run_sd * rng.normal(size=(seeds, cases))[runs] + rng.normal(size=(prompts, cases))[asked]
    values += 0.3 * rng.normal(size=values.shape)
    share = covered(values, 0.0, prompts=asked, seeds=runs)
    assert 0.93 <= share <= 0.995
    if run_sd:
        assert covered(values, 0.0, prompts=asked) < share - 0.02


def test_a_p_value_is_a_twentieth_where_the_interval_touches_zero():
    assert verdicts.p_value(1.0, 0.0, 3.0, df=7) == pytest.approx(0.05)
    assert verdicts.p_value(-1.0, -3.0, 0.0, df=7) == pytest.approx(0.05)
    assert verdicts.p_value(0.0, 0.0, 0.0, df=7) == 1.0 and verdicts.p_value(2.0, 2.0, 2.0, df=7) < 1e-9
    data = np.random.default_rng(0).normal(0.4, 1, 12)
    theirs = stats.ttest_1samp(data, 0)
    p = verdicts.p_value(data.mean(), *theirs.confidence_interval(), df=11)
    assert p == pytest.approx(theirs.pvalue)


def test_holm_by_hand():
    p = np.array([0.04, 0.01, 0.03, 0.5])
    assert verdicts.holm(p).tolist() == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert verdicts.holm(np.stack([p, p[::-1]]))[1].tolist() == pytest.approx([0.5, 0.09, 0.04, 0.09])
    assert verdicts.holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]
    assert verdicts.holm(np.array([])).size == 0


def study(edges: list[tuple[float, float, float]], outcome: str = "lost: partial") -> pd.DataFrame:
    """Means of D(1 - delta) and D(1 + delta) with the same p."""
    rows = [
        {"over_lower": low, "over_upper": up, "over_lower_p": p, "over_upper_p": p} for low, up, p in edges
    ]
    return pd.DataFrame(rows).assign(outcome_holm=outcome)


def test_several_fates_need_an_edge_with_chains_clearly_on_both_sides():
    lost, stable, gained = (-0.4, -0.6, 0.01), (0.1, -0.1, 0.01), (0.5, 0.3, 0.01)
    assert verdicts.several_fates(study([lost, stable])) and verdicts.several_fates(study([stable, gained]))
    assert not verdicts.several_fates(study([lost, lost])) and not verdicts.several_fates(study([stable]))
    assert not verdicts.several_fates(study([lost, (0.1, -0.1, 0.06)]))
    assert not verdicts.several_fates(study([lost, gained], outcome=metrics.NOT_LEARNED))
    outcomes = pd.Series(["stable", "undecided", metrics.NOT_LEARNED, "lost: reversal", "stable"])
    assert verdicts.decided(outcomes) == ["stable", "lost: reversal"]


def fates(*, seeds: int, gain: float = 0.4, reach: float = 0.1, chains: int = 8) -> pd.DataFrame:
    seed = np.repeat(range(seeds), chains)
    numbers = {"learned": gain, "learned_low": gain - reach, "learned_high": gain + reach}
    numbers |= {"backward": 0.0, "backward_low": -reach, "backward_high": reach}
    return pd.DataFrame({"seed": seed, "n_prompts": 32} | numbers)


def test_the_rule_rarely_errs_without_luck_of_a_run_and_often_with_it_unless_seeds_are_several():
    null = verdicts.null_rates(fates(seeds=1), rng=np.random.default_rng(0)).set_index(["truth", "run_sd"])
    assert (null.xs(0.0, level="run_sd")["false_verdict"] <= 0.05).all()
    assert 0.01 <= null.loc[("nothing learned", 0.0), "false_verdict"] <= 0.04  # one side of 95 %
    lucky = null.loc[("nothing happens", 0.2)]
    assert lucky["false_verdict"] > 0.3 and lucky["more_than_one"] > 0.5
    assert (null["after_holm"] < null["false_verdict"]).all()
    several = verdicts.null_rates(fates(seeds=5), rng=np.random.default_rng(0))
    assert (several["false_verdict"] <= 0.05).all() and (several["more_than_one"] <= 0.05).all()
    again = verdicts.null_rates(fates(seeds=5), rng=np.random.default_rng(0))
    pd.testing.assert_frame_equal(several, again)


def test_p_values_are_adjusted_over_the_rows_of_a_family_that_have_a_number():
    row = {"n_prompts": 30, "seeds": 1, "kept": 0.1, "kept_low": 0.005, "kept_high": 0.195}
    table = pd.DataFrame([row, row, row | {"kept": np.nan}], index=[4, 5, 6]).assign(family=["x", "y", "y"])
    (one,), two = (verdicts.adjusted(part, "kept") for part in (table.head(1), table))
    assert one < 0.05 < two[4] == two[5] == 2 * one and np.isnan(two[6])
    assert verdicts.adjusted(table, "kept", over=["family"]).tolist()[:2] == [one, one]
    assert verdicts.adjusted(table.head(0), "kept").empty


def test_several_seeds_count_as_few_as_they_are():
    row = {"n_prompts": 30, "seeds": 3, "kept": 0.1, "kept_low": 0.005, "kept_high": 0.195}
    p = verdicts.adjusted(
        pd.DataFrame([row, row | {"seeds": 1}]).assign(family=[0, 1]), "kept", over=["family"]
    )
    assert p[0] == verdicts.p_value(0.1, 0.005, 0.195, df=2) != p[1]
    assert p[1] == verdicts.p_value(0.1, 0.005, 0.195, df=29)
    assert [verdicts.units(*sizes) for sizes in ((1, 30), (3, 30), (30, 3), (3, 1), (1, 1))] == [
        30,
        3,
        3,
        3,
        1,
    ]
