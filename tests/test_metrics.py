import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqdpo_utils import metrics
from seqdpo_utils.chains import Chain
from seqdpo_utils.errors import StudyError

RNG = np.random.default_rng


def records(
    *logps: tuple[float, float],
    checkpoint: str = "base",
    objective: str = "a",
    tokens: tuple[int, int] = (2, 4),
    prompts: list[str] | None = None,
) -> pd.DataFrame:
    names = [f"p{i}" for i in range(len(logps))]
    place = {"objective": objective, "split": "eval", "checkpoint": checkpoint}
    sums = {"chosen_logp": [w for w, _ in logps], "rejected_logp": [rejected for _, rejected in logps]}
    counts = {"chosen_tokens": tokens[0], "rejected_tokens": tokens[1]}
    return pd.DataFrame({"pair_id": names, "prompt_id": prompts or names} | place | sums | counts)


BASE = records((-10.0, -10.0), (-20.0, -12.0), (-5.0, -5.0))
AFTER = records((-8.0, -11.0), (-21.0, -12.0), (-4.0, -4.0), checkpoint="a")


def test_margin_loss_and_wins_by_hand():
    margin = metrics.dpo_margin(AFTER, BASE, beta=0.3)
    assert margin.tolist() == pytest.approx([0.9, -0.3, 0.0])
    losses = [np.log(1 + np.exp(-0.9)), np.log(1 + np.exp(0.3)), np.log(2)]
    assert metrics.dpo_loss(margin).tolist() == pytest.approx(losses)
    assert metrics.relative_wins(margin).tolist() == [1.0, 0.0, 0.5]


def test_policy_margin_by_hand():
    by_hand = [-8 / 2 + 11 / 4, -21 / 2 + 12 / 4, -4 / 2 + 4 / 4]
    assert metrics.policy_margin(AFTER).tolist() == pytest.approx(by_hand)


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
    measures = metrics.pair_measures(pd.concat([BASE, AFTER]), beta=0.3)
    matrix = metrics.stage_matrix(measures, resamples=200, rng=RNG(0)).set_index("checkpoint")
    assert pd.isna(matrix.loc["base", "relative_accuracy"]) and matrix.loc["a", "relative_accuracy"] == 0.5
    assert matrix.loc["base", ["margin", "margin_low", "margin_high"]].tolist() == [0, 0, 0]
    assert matrix.loc["a", "margin"] == pytest.approx(0.2)
    assert matrix.loc["a", "policy_accuracy"] == 0 and matrix.loc["base", "policy_accuracy"] == 0
    assert matrix.loc["a", ["n_pairs", "n_prompts"]].tolist() == [3, 3]


def test_training_pairs_stay_out_of_the_matrix_and_prompts_are_counted_once():
    seen = pd.concat([BASE, AFTER]).assign(split=["eval", "eval", "train"] * 2, prompt_id="q")
    measures = metrics.pair_measures(seen, beta=0.3)
    row = metrics.stage_matrix(measures, resamples=100, rng=RNG(0)).set_index("checkpoint").loc["a"]
    assert row["margin"] == pytest.approx(0.3) and row[["n_pairs", "n_prompts"]].tolist() == [2, 1]
    assert list(metrics.wide_margins(measures, "a").index) == ["p0", "p1"]


def test_the_bootstrap_agrees_with_scipys_when_every_prompt_has_one_pair():
    values = RNG(1).lognormal(size=(60, 1))
    draws = metrics.resampled_means(values, [str(i) for i in range(60)], resamples=20000, rng=RNG(0))
    options = {"method": "percentile", "n_resamples": 20000, "rng": RNG(0)}
    theirs = stats.bootstrap((values[:, 0],), np.mean, **options).confidence_interval
    mean, wider = values.mean(), stats.t.ppf(0.975, 59) / 1.959964 * np.sqrt(60 / 59)
    ours = [mean + wider * (bound - mean) for bound in theirs]
    assert metrics.interval(draws[:, 0]) == pytest.approx(ours, abs=0.02)
    assert wider > 1.02


def test_prompts_are_resampled_whole():
    """Ten copies of a pair are one prompt, not ten witnesses."""
    values = RNG(2).normal(size=(20, 1))
    tenfold, owners = np.repeat(values, 10, axis=0), np.repeat(range(20), 10)
    once, copies, naive = (
        metrics.resampled_means(table, prompts, resamples=4000, rng=RNG(0)).std()
        for table, prompts in ((values, range(20)), (tenfold, owners), (tenfold, range(200)))
    )
    assert copies == pytest.approx(once, rel=1e-6) and naive < 0.5 * once


def test_columns_of_one_draw_share_their_prompts_and_the_generator_rules():
    values = np.stack([np.arange(10.0), np.arange(10.0) + 3], axis=1)
    draws, again, other = (
        metrics.resampled_means(values, range(10), resamples=50, rng=RNG(seed)) for seed in (0, 0, 1)
    )
    assert np.allclose(draws[:, 1] - draws[:, 0], 3)
    assert np.array_equal(draws, again) and not np.array_equal(draws, other)


def test_the_mean_of_a_draw_is_of_pairs_where_prompts_have_unequally_many():
    values, prompts = np.array([[0.0], [0.0], [0.0], [8.0]]), ["a", "a", "a", "b"]
    draws = metrics.resampled_means(values, prompts, resamples=500, rng=RNG(0))
    # residuals add up to -6 and 6: one prompt twice and the other never is 12 / 4, widened as for two prompts
    steps = 3 * stats.t.ppf(0.975, 1) / 1.959964 * np.sqrt(2)
    assert sorted(set(draws[:, 0].round(6))) == pytest.approx([2 - steps, 2, 2 + steps], abs=1e-4)


def test_shares_stay_between_zero_and_one_and_margins_need_not():
    values = np.array([[1.0, 3.0]] * 3 + [[0.5, -1.0]])
    draws = metrics.resampled_means(values, range(4), resamples=500, rng=RNG(0))
    assert draws[:, 0].max() == 1.0 and draws[:, 1].max() > 3.0


def test_seeds_are_drawn_beside_prompts_and_one_seed_adds_nothing():
    """Runs differ by 2 and prompts by nothing, or the other way round: each way of drawing sees its own."""
    asked, runs = np.tile(range(6), 4), np.repeat(range(4), 6)
    values = np.array([-1.0, 1.0, -1.0, 1.0])[runs][:, None]
    by_prompt = metrics.resampled_means(values, asked, resamples=2000, rng=RNG(0))
    crossed = metrics.resampled_means(values, asked, seeds=runs, resamples=2000, rng=RNG(0))
    assert np.ptp(by_prompt) < 1e-12
    # the SD over four seeds is sqrt(4 / 3), of their mean half of it; an interval spans t times that
    deviation = stats.t.ppf(0.975, 3) / 1.959964 * np.sqrt(4 / 3) / 2
    assert crossed.std() == pytest.approx(deviation, rel=0.05)
    one = {"resamples": 50, "rng": RNG(1)}
    alone = metrics.resampled_means(RNG(5).normal(size=(24, 2)), asked, seeds=np.zeros(24), **one)
    assert np.array_equal(
        alone, metrics.resampled_means(RNG(5).normal(size=(24, 2)), asked, resamples=50, rng=RNG(1))
    )


def planted(
    chain: str, means: dict[str, list[float]], *, spread: float = 0.1, pairs: int = 48
) -> pd.DataFrame:
    """Measures of a chain with given mean margins, one number a checkpoint; beta 1, three pairs a prompt."""
    noise = RNG(0).normal(0, spread, pairs)
    noise -= noise.mean()
    prompts = [f"q{i // 3}" for i in range(pairs)]
    parts = []
    for objective, margins in means.items():
        for name, mean in zip(Chain.parse(chain).checkpoints, margins, strict=True):
            logps = [(mean + (0.0 if name == "base" else n), 0.0) for n in noise]
            parts.append(records(*logps, checkpoint=name, objective=objective, prompts=prompts))
    return metrics.pair_measures(pd.concat(parts, ignore_index=True), beta=1.0)


def transfer(chain: str, means: dict[str, list[float]], **options: float) -> pd.DataFrame:
    """The transfer table of a planted chain, by objective, checkpoint and quantity."""
    measures = planted(chain, means, **options)
    table = metrics.transfer(measures, Chain.parse(chain), list(means), resamples=300, rng=RNG(0))
    return table.set_index(["objective", "checkpoint", "quantity"])


def values(table: pd.DataFrame) -> dict[tuple[str, str, str], float]:
    """Without D(c), which has a test of its own."""
    return {key: round(value, 9) for key, value in table["value"].items() if key[2][:2] != "D("}


def test_transfer_by_hand():
    table = transfer("a-then-b", {"a": [0, 2.0, 1.0], "b": [0, 0.5, 3.0]})
    assert values(table) == {
        ("a", "a", "learned"): 2.0,
        ("a", "a", "backward transfer"): -1.0,
        ("a", "a", "forgetting"): 1.0,
        ("a", "a", "retention"): 0.5,
        ("b", "a-then-b", "learned"): 2.5,
        ("b", "a-then-b", "forward transfer"): 0.5,
    }
    assert table["stage"].to_dict() == {key: key[0] for key in table.index}
    assert (table["low"] <= table["value"] + 1e-9).all() and (table["value"] <= table["high"] + 1e-9).all()


def test_transfer_through_three_stages_by_hand():
    means = {"a": [0, 2.0, 3.0, 0.5], "b": [0, -0.5, 1.5, 1.0], "c": [0, 0.25, 0.75, 4.0]}
    table = transfer("a-then-b.half-then-c", means)
    end = "a-then-b.half-then-c"
    assert values(table) == {
        ("a", "a", "learned"): 2.0,
        ("a", "a", "backward transfer"): -1.5,
        ("a", "a", "forgetting"): 2.5,
        ("a", "a", "retention"): 0.25,
        ("b", "a-then-b.half", "learned"): 2.0,
        ("b", "a-then-b.half", "forward transfer"): -0.5,
        ("b", "a-then-b.half", "backward transfer"): -0.5,
        ("b", "a-then-b.half", "forgetting"): 0.5,
        ("b", "a-then-b.half", "retention"): pytest.approx(2 / 3, abs=1e-8),
        ("c", end, "learned"): 3.25,
        ("c", end, "forward transfer"): 0.75,
    }
    assert set(table.loc["b", "stage"]) == {"b.half"}


def test_an_objective_trained_twice_has_rows_for_both_trainings_but_is_new_once():
    table = transfer("a-then-b-then-a", {"a": [0, 2.0, 0.5, 3.0], "b": [0, 0.1, 1.0, 0.4]})
    assert values(table.loc[["a"]]) == {
        ("a", "a", "learned"): 2.0,
        ("a", "a", "backward transfer"): 1.0,
        ("a", "a", "forgetting"): -1.0,
        ("a", "a", "retention"): 1.5,
        ("a", "a-then-b-then-a", "learned"): 2.5,
    }
    assert set(table.loc["a", "stage"]) == {"a"}


def test_a_joint_stage_trains_each_of_its_objectives():
    table = transfer("a+b-then-c", {"a": [0, 2.0, 1.0], "b": [0, 1.0, 3.0], "c": [0, 0.5, 0.7]})
    found = values(table)
    assert found["a", "a+b", "learned"] == 2.0 and found["b", "a+b", "learned"] == 1.0
    assert found["a", "a+b", "retention"] == 0.5 and found["b", "a+b", "retention"] == 3.0
    assert found["c", "a+b-then-c", "forward transfer"] == 0.5
    assert table.loc[("b", "a+b", "learned"), "stage"] == "a+b"
    assert not any(name == "forward transfer" for _, checkpoint, name in found if checkpoint == "a+b")


def test_one_stage_learns_and_what_it_does_not_train_has_one_row():
    table = transfer("a", {"a": [0, 2.0], "b": [0, -0.25]})
    assert values(table) == {("a", "a", "learned"): 2.0, ("b", "a", "forward transfer"): -0.25}
    row = table.loc[("b", "a", "forward transfer")]
    assert (row["stage"], row["note"]) == ("", "never trained") and row["low"] <= -0.25 <= row["high"]
    later = transfer("a-then-a", {"a": [0, 2.0, 2.5], "b": [0, 0.25, 0.75]})
    assert values(later.loc[["b"]]) == {("b", "a-then-a", "forward transfer"): 0.75}


def test_what_was_never_gained_is_not_forgotten():
    """The base, at zero, is no best that training lost."""
    table = transfer("a-then-b", {"a": [0, -2.0, -1.0], "b": [0, 0, 1]})
    assert table.loc[("a", "a", "learned"), "value"] == pytest.approx(-2.0)
    assert table.loc[("a", "a", "forgetting"), "value"] == pytest.approx(-1.0)


def test_the_intervals_of_transfer_resample_prompts_and_pair_their_checkpoints():
    """All pairs lose exactly 1, whatever their level: the loss has no width, the gain that of 16 prompts."""
    measures = planted("a-then-b", {"a": [0, 2.0, 1.0], "b": [0, 0, 1]}, spread=0.5)
    both = (Chain.parse("a-then-b"), ["a", "b"])
    table = metrics.transfer(measures, *both, resamples=2000, rng=RNG(0)).set_index(["objective", "quantity"])
    assert table.loc[("a", "backward transfer"), ["low", "high"]].tolist() == pytest.approx([-1.0, -1.0])
    wide = metrics.wide_margins(measures, "a")
    of_prompts = wide.groupby("prompt_id")["a"].mean().std() / np.sqrt(wide["prompt_id"].nunique())
    gain = table.loc[("a", "learned")]
    t = stats.t.ppf(0.975, wide["prompt_id"].nunique() - 1)
    assert (gain["high"] - gain["low"]) / (2 * t) == pytest.approx(of_prompts, rel=0.06)


def test_retention_of_what_was_not_learned_is_undefined_with_a_reason():
    table = transfer("a-then-b", {"a": [0, 0.01, 1.0], "b": [0, 0, 1]}, spread=1.0)
    row = table.loc[("a", "a", "retention")]
    assert pd.isna(row["value"]) and "stage 1 did not learn" in row["note"]
    fate = metrics.fate(table.reset_index(), Chain.parse("a-then-b"), "a")
    assert metrics.outcome(fate) == metrics.NOT_LEARNED and pd.isna(fate["retention_low"])
    third = transfer("c-then-a-then-b", {"a": [0, 0, 0.01, 1.0]}, spread=1.0)
    assert "stage 2 did not learn" in third.loc[("a", "c-then-a", "retention"), "note"]


def test_the_contrasts_by_hand_and_what_stands_beside_a_fate():
    """With gain 2 and end 1: D(0.9) = -0.8, D(1.1) = -1.2; of two last objectives that which gained less."""
    found = transfer("a-then-b+c", {"a": [0, 2.0, 1.0], "b": [0, 0.5, 3.0], "c": [0, 0.25, 0.5]})
    contrasts = {name: found.loc[("a", "a", name), "value"] for name in ("D(0)", "D(0.9)", "D(1.1)")}
    assert contrasts == pytest.approx({"D(0)": 1.0, "D(0.9)": -0.8, "D(1.1)": -1.2})
    fate = metrics.fate(found.reset_index(), Chain.parse("a-then-b+c"), "a")
    means = {name: fate[name] for name in ("learned", "backward", "retention", "later")}
    assert means == pytest.approx({"learned": 2.0, "backward": -1.0, "retention": 0.5, "later": 0.25})
    assert [fate[name] for name in metrics.DECIDING] == pytest.approx([2.0, 1.0, -0.8, -1.2])
    assert fate["later_objective"] == "c" and fate["later_low"] == pytest.approx(0.25)
    for name, quantity in metrics.FATE.items():
        row = found.loc[("a", "a", quantity)]
        assert (fate[f"{name}_low"], fate[f"{name}_high"]) == (row["low"], row["high"])


def test_seeds_widen_the_intervals_of_transfer_where_runs_differ():
    """Two runs gain 1 and 3: 2 on average, and two runs say next to nothing of it."""
    runs = [
        planted("a-then-b", {"a": [0, gain, 1.0]}).assign(seed=seed) for seed, gain in ((0, 1.0), (1, 3.0))
    ]
    both = (pd.concat(runs, ignore_index=True), Chain.parse("a-then-b"), ["a"])
    table = metrics.transfer(*both, resamples=500, rng=RNG(0)).set_index("quantity")
    assert table.loc["learned", "value"] == pytest.approx(2.0) and table.loc["learned", "low"] < 0
    alone = metrics.transfer(runs[0], *both[1:], resamples=500, rng=RNG(0))
    without = metrics.transfer(runs[0].drop(columns="seed"), *both[1:], resamples=500, rng=RNG(0))
    pd.testing.assert_frame_equal(alone, without)


def evidence(learned: float, end: float, *, reach: float = 0.05) -> dict[str, float]:
    """Contrasts of planted means, each with an interval of the same half-width."""
    means = {
        "learned": learned,
        "end": end,
        "over_lower": end - 0.9 * learned,
        "over_upper": end - 1.1 * learned,
    }
    bounds = {f"{name}_low": mean - reach for name, mean in means.items()}
    return bounds | {f"{name}_high": mean + reach for name, mean in means.items()}


@pytest.mark.parametrize(
    ("learned", "end", "reach", "name"),
    [
        (1.0, 1.2, 0.05, "gained"),
        (1.0, 1.12, 0.05, "not lost"),
        (1.0, 1.0, 0.05, "stable"),
        (1.0, 1.04, 0.05, "stable"),
        (1.0, 0.96, 0.05, "stable"),
        (1.0, 1.08, 0.05, "not lost"),
        (1.0, 0.92, 0.05, "not gained"),
        (1.0, 1.0, 0.15, "undecided"),
        (1.0, 0.84, 0.05, "lost: partial"),
        (1.0, 0.04, 0.05, "lost, extent open"),
        (1.0, -0.04, 0.05, "lost, extent open"),
        (1.0, -0.06, 0.05, "lost: reversal"),
        (0.04, 1.0, 0.05, metrics.NOT_LEARNED),
        (-1.0, -1.0, 0.05, metrics.NOT_LEARNED),
        (0.05, 0.5, 0.05, metrics.NOT_LEARNED),
        (0.41, 0.016, 0.2, "lost, extent open"),
    ],
)
def test_the_outcome_rule(learned, end, reach, name):
    """The last but one touches zero; the last is what a rule of ratios called undecided."""
    assert metrics.outcome(evidence(learned, end, reach=reach)) == name


def test_stable_is_redistribution_when_more_pairs_changed_sides_than_two_seeds_explain():
    stable = evidence(1.0, 1.0)
    assert metrics.outcome(stable, excess_churn_low=0.02) == "redistribution"
    assert metrics.outcome(stable, excess_churn_low=-0.02) == "stable"
    assert metrics.outcome(stable, excess_churn_low=0.0) == "stable"
    assert metrics.outcome(stable, excess_churn_low=pd.NA) == "stable"
    assert metrics.outcome(evidence(1.0, 0.5), excess_churn_low=0.5) == "lost: partial"


def test_a_gain_has_three_readings():
    assert metrics.gain_in_words(0.1, 0.2) == "was learned"
    assert "fell" in metrics.gain_in_words(-0.2, -0.1)
    assert "not shown" in metrics.gain_in_words(-0.1, 0.1)
