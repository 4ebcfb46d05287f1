"""What a study can decide: formulas against simulated studies that the rule itself judges."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqdpo_utils import metrics, paths, power

SPREAD = {"prompt_sd": 0.4, "rest_sd": 0.3, "run_sd": 0.1}


def drawn(spread, *, prompts: int, seeds: int, studies: int, rng) -> np.ndarray:
    """Margins without an effect, of the three parts: (prompts, seeds, studies)."""
    shapes = {"prompt_sd": (prompts, 1), "rest_sd": (prompts, seeds), "run_sd": (1, seeds)}
    return sum(rng.normal(0, spread[name], (*shape, studies)) for name, shape in shapes.items())


def test_components_by_hand():
    """Row means .5 and 3.5, column means 1 and 3, what is left +-.5."""
    found = power.components(pd.DataFrame([[0.0, 1.0], [2.0, 5.0]]))
    assert found == pytest.approx({"prompt_sd": 4**0.5, "rest_sd": 1.0, "run_sd": 1.5**0.5})
    alone = power.components(pd.DataFrame([[0.0], [2.0]]))
    assert alone["prompt_sd"] == pytest.approx(2**0.5) and np.isnan(alone["run_sd"])


def test_components_find_what_was_planted():
    values = drawn(SPREAD, prompts=60, seeds=8, studies=300, rng=np.random.default_rng(0))
    found = pd.DataFrame([power.components(pd.DataFrame(values[..., k])) for k in range(300)])
    for name, sd in SPREAD.items():
        assert (found[name] ** 2).mean() ** 0.5 == pytest.approx(sd, rel=0.04), name


@pytest.mark.parametrize("effect", [-0.2, 0.0, 0.1, 0.3])
def test_with_one_seed_the_chance_is_that_of_students_t_test(effect):
    """`rest_sd` and `run_sd` do not count: of one run they are in `prompt_sd`, or cannot be seen."""
    theirs = stats.nct.sf(stats.t.ppf(0.975, 15), 15, effect / 0.4 * 4)
    assert power.chance(effect, SPREAD, prompts=16) == pytest.approx(theirs, abs=0.003)


@pytest.mark.parametrize(
    ("spread", "prompts", "seeds"),
    [
        (SPREAD, 16, 1),
        (SPREAD, 32, 3),
        (SPREAD, 64, 5),
        (SPREAD | {"rest_sd": 0.0}, 32, 5),
        (SPREAD | {"run_sd": 0.3}, 32, 4),
    ],
)
def test_the_smallest_effect_is_found_in_four_of_five_simulated_studies(spread, prompts, seeds):
    """600 studies, judged by the interval that every page has."""
    rng = np.random.default_rng(0)
    known = spread if seeds > 1 else spread | {"rest_sd": 0.0, "run_sd": 0.0}
    values = drawn(known, prompts=prompts, seeds=seeds, studies=600, rng=rng)
    values += power.smallest(spread, prompts=prompts, seeds=seeds)
    asked, runs = np.indices((prompts, seeds)).reshape(2, -1)
    clusters = {"seeds": runs} if seeds > 1 else {}
    draws = metrics.resampled_means(
        values.reshape(prompts * seeds, -1), asked, **clusters, resamples=500, rng=rng
    )
    found = float((np.quantile(draws, 0.025, axis=0) > 0).mean())
    assert found == pytest.approx(power.POWER, abs=0.06)


@pytest.mark.parametrize("spread", [(0.1, 0.8, 0.02), (0.1, 0.02, 0.3), (0.5, 0.1, 0.02)])
def test_the_chance_is_that_of_the_interval_with_several_seeds(spread):
    """20,000 studies of three seeds, by the t parts of the interval: whichever part is the large one."""
    spread, (prompts, seeds) = dict(zip(SPREAD, spread, strict=True)), (12, 3)
    values = drawn(spread, prompts=prompts, seeds=seeds, studies=20_000, rng=np.random.default_rng(0))
    reach = np.zeros(20_000)
    for axis, units in ((1, prompts), (0, seeds)):
        reach += stats.t.ppf(0.975, units - 1) ** 2 * values.mean(axis=axis).var(axis=0, ddof=1) / units
    for effect in power.smallest(spread, prompts=prompts, seeds=seeds) * np.array([0.5, 1.0]):
        found = (values.mean(axis=(0, 1)) + effect > reach**0.5).mean()
        assert power.chance(effect, spread, prompts=prompts, seeds=seeds) == pytest.approx(found, abs=0.012)


def test_the_smallest_effect_falls_with_prompts_and_with_seeds_and_is_unknown_without_their_spread():
    size = {"prompts": 32, "seeds": 3}
    base = power.smallest(SPREAD, **size)
    assert power.chance(base, SPREAD, **size) == pytest.approx(0.8)
    assert power.smallest(SPREAD, prompts=64, seeds=3) < base > power.smallest(SPREAD, prompts=32, seeds=5)
    assert power.smallest({name: 3 * sd for name, sd in SPREAD.items()}, **size) == pytest.approx(3 * base)
    assert np.isnan(power.smallest(SPREAD | {"run_sd": np.nan}, **size))
    assert power.smallest(dict.fromkeys(SPREAD, 0.0), **size) == 0


def table(*, run_sd: float = np.nan, gain: float = 0.5, within: float = 0.1) -> pd.DataFrame:
    margins = {"prompt_sd": 0.4, "rest_sd": 0.0, "run_sd": run_sd, "mean": gain}
    margins |= {"seeds": 1.0 if np.isnan(run_sd) else 3.0}
    rows = {name: margins for name in ("learned", "backward", "over_lower", "order")}
    rows["over_upper"] = margins | {"prompt_sd": 0.5}
    cosines = {"prompt_sd": 0.05, "half": 2.0, "mean": within, "seeds": 1.0}
    return pd.DataFrame(rows | {"within": cosines, "matched": cosines | {"mean": 0.0}}).T


def test_retention_is_the_smallest_effect_in_shares_of_the_gain():
    size = {"prompts": 32, "seeds": 1}
    effect = power.smallest(table().loc["over_lower"], **size)
    found = power.retention(table(), [0.5, 5.0], **size)
    assert found["lost_below"].tolist() == pytest.approx([0.9 - effect / 0.5, 0.9 - effect / 5])
    assert found["not_lost_above"].tolist() == pytest.approx([0.9 + effect / 0.5, 0.9 + effect / 5])
    lower, upper = (power.chance(0.5, {"prompt_sd": sd}, prompts=32) for sd in (0.4, 0.5))
    assert found["stable"].tolist() == pytest.approx([0, lower + upper - 1])


def test_the_chance_of_stable_is_reached_by_the_rule():
    """D(.9) and D(1.1) share their prompts; everything is kept. 400 studies."""
    gain, rng = 3.0, np.random.default_rng(0)
    first, change = (rng.normal(mean, sd, (64, 400)) for mean, sd in ((gain, 1.0), (0, 0.6)))
    edges = [change + c * first for c in (0.1, -0.1)]
    spread = table()
    spread.loc[["over_lower", "over_upper"], "prompt_sd"] = (0.36 + 0.01) ** 0.5
    draws = [
        metrics.resampled_means(each, np.arange(64), resamples=400, rng=np.random.default_rng(1))
        for each in edges
    ]
    stable = (np.quantile(draws[0], 0.025, axis=0) > 0) & (np.quantile(draws[1], 0.975, axis=0) < 0)
    claimed = power.retention(spread, [gain], prompts=64, seeds=1)["stable"].iloc[0]
    assert 0.7 < claimed <= stable.mean() + 0.05 and stable.mean() < claimed + 0.1


def test_ways_to_decide_more_by_hand():
    found = power.ways(table(), prompts=32, seeds=1, scoring=0.25).set_index("way")
    assert found["cost"].tolist() == [1, 1.25, 3, 1.75]
    spread = table().loc["over_lower"]
    now, double = (power.smallest(spread, prompts=count) for count in (32, 64))
    assert found["loss"].iloc[[0, 1]].tolist() == pytest.approx([0.1 + now / 0.5, 0.1 + double / 0.5])
    assert found["loss"].iloc[3] == pytest.approx(0.1 + now)
    assert found["loss_at_worst"].iloc[3] == pytest.approx(found["loss"].iloc[0])
    assert np.isnan(found["loss"].iloc[2]), "seeds whose spread is not known"
    assert found["return"].iloc[1] == pytest.approx(
        np.log(found["loss"].iloc[0] / found["loss"].iloc[1]) / np.log(1.25)
    )
    assert found["return"].iloc[3] == pytest.approx(0) and found["return"].iloc[[0, 2]].isna().all()


def test_more_seeds_than_one_decide_something_else_and_are_not_compared():
    found = power.ways(table(run_sd=0.001), prompts=32, seeds=1, scoring=0.25)
    assert found["loss"].notna().all() and np.isnan(found["return"].iloc[2])
    assert power.ways(table(run_sd=0.001), prompts=32, seeds=2, scoring=0.25)["return"].iloc[2] > 0


def test_the_cheapest_way_depends_on_what_limits_the_study():
    """Where runs differ little held-out pairs pay, where they differ much seeds do, or a larger gain."""
    size = {"prompts": 32, "scoring": 0.5}
    assert power.cheapest_in_words(table(), **size, seeds=1).endswith("cost: twice the held-out pairs.")
    assert power.cheapest_in_words(table(run_sd=0.01), **size, seeds=5).endswith("held-out pairs.")
    runs = table(run_sd=0.5)
    assert power.cheapest_in_words(runs, **size | {"scoring": 0.1}, seeds=3).endswith("cost: 6 seeds.")
    runs["prompt_sd"] /= 10
    last = power.cheapest_in_words(runs, **size | {"scoring": 0.9}, seeds=20)
    assert "cost: twice the steps" in last
    assert "nothing was learned" in power.cheapest_in_words(table(gain=-0.1), **size, seeds=1)


def test_enough_measurements_show_a_cosine_of_a_fifth_and_a_third_of_them_do_not():
    """Cosines of halves of 16 pairs, normal; judged by 99 % t intervals as `conflict_verdict` does."""
    rng, signal = np.random.default_rng(0), 0.1 / 0.9 / 2
    within, count = 16 * signal / (1 + 16 * signal), power.measurements(table(), half=16)
    found = []
    for size in (count, count // 3):
        means = np.array([within, within, 0.2 * within])[:, None, None]
        cosines = means + rng.normal(0, 0.05, (3, 2000, size))
        reach = stats.t.ppf(0.995, size - 1) * cosines.std(axis=2, ddof=1) / size**0.5
        found.append((cosines.mean(axis=2) > reach).all(axis=0).mean())
    assert power.POWER <= found[0] <= 0.95 and found[1] < 0.6


def test_fewer_measurements_are_needed_of_larger_halves_and_none_suffice_where_halves_do_not_agree():
    counts = [power.measurements(table(), half=half) for half in (2, 8, 32)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 5 * counts[2] > 0
    assert np.isinf(power.measurements(table(within=-0.01), half=32))
    assert "did not agree" in power.gradients_in_words(table(within=-0.01), half=2, count=4)
    assert f"{counts[0]:,} of 2, {counts[1]:,} of 8" in power.gradients_in_words(table(), half=2, count=4)


def test_pages_say_whether_run_to_run_spread_is_in_the_interval_and_how_large_it_was():
    said = power.run_spread_in_words(table(), "a study", seeds=1)
    assert "is not in these intervals" in said and "did not measure it" in said
    said = power.run_spread_in_words(table(run_sd=0.12), "a study", seeds=1)
    assert "is not in these intervals" in said and "a study (3 seeds)" in said and "SD of 0.12" in said
    assert "is in these intervals" in power.run_spread_in_words(table(run_sd=0.12), "a study", seeds=3)
    size = {"prompts": 32, "seeds": 3}
    assert "at best, were all runs alike" in power.decidable_in_words(table(), **size)[0]
    assert "at best" not in "".join(power.decidable_in_words(table(run_sd=0.1), **size))
    retained = power.decidable_in_words(table(), prompts=32, seeds=1)[1]
    needed = float(re.search(r"stable, from a gain of ([\d.]+)", retained)[1])
    assert power.retention(table(), [needed + 0.05], prompts=32, seeds=1)["stable"].iloc[0] >= power.POWER
    assert len(power.decidable_in_words(table(gain=0.0), **size)) == 1, "no gain, no word on retention"


PLANTED = {"a": (1.0, 0.7, 0.6), "b": (0.5, 0.8, 0.9)}
"""Mean margins of an objective after its own stage, at the end, and at the end of the other order."""


def planted(root) -> list[paths.RunPaths]:
    """Two orders, two seeds, twenty prompts of two pairs: margins as planted, and a part of each run."""
    rng, pairs = np.random.default_rng(0), 40
    asked = rng.normal(0, 0.2, 20).repeat(2)
    asked -= asked.mean()

    def records(checkpoint: str, means: dict[str, float], run: float = 0.0) -> pd.DataFrame:
        parts = []
        for split, extra in (("eval", 0.0), ("train", 50.0)):
            for objective, mean in means.items():
                margin = extra + mean + run + asked if checkpoint != "base" else np.zeros(pairs)
                part = {"pair_id": [f"{split}-{objective}-{i}" for i in range(pairs)]}
                part |= {"prompt_id": [f"{split}-{objective}-{i // 2}" for i in range(pairs)]}
                part |= {"objective": objective, "split": split, "checkpoint": checkpoint}
                part |= {"chosen_logp": margin, "rejected_logp": 0.0}
                parts.append(pd.DataFrame(part | {"chosen_tokens": 1, "rejected_tokens": 1}))
        return pd.concat(parts)

    both = []
    for seed, run in ((0, 0.1), (1, -0.1)):
        for first, other in (("a", "b"), ("b", "a")):
            later = paths.RunPaths(root, "smoke", "s", f"{first}-then-{other}", seed)
            own, end, _ = PLANTED[first]
            paths.write_table(later.base_scores, records("base", dict.fromkeys("ab", 0.0)))
            paths.write_table(later.at(first).scores, records(first, {first: own, other: 0.0}))
            last = records(later.chain, {first: end, other: PLANTED[other][2]}, run=run)
            paths.write_table(later.scores, last)
            empty = {"previous_objective": [], "split": [], "matched_cosine": []}
            empty = pd.DataFrame(empty | {"within_cosine": [], "within_new_cosine": []})
            paths.write_table(later.at(first).conflict, empty)
            filled = {"previous_objective": first, "split": ["train", "probe", "probe"]}
            filled |= {"matched_cosine": [9, 0.1, 0.3], "within_cosine": [9, 0.2, 0.4]}
            paths.write_table(later.conflict, pd.DataFrame(filled | {"within_new_cosine": [9.0, 0.4, 0.6]}))
            for node, seconds in ((later.at(first), 10.0), (later, 20.0)):
                told = {"parameters": {"conflict_pairs": 8}, "seconds_per_step": seconds}
                paths.write_json(node.run_json, told | {"scoring": {node.chain: {"seconds": 15.0}}})
                paths.write_table(node.history, pd.DataFrame({"step": [1, 2]}))
            both.append(later)
    return both


def test_spreads_of_planted_runs(tmp_path):
    """Held-out pairs alone; a run moves both ends by +-.1: so change and D(c), not gain and order."""
    found = power.spreads(planted(tmp_path / "runs"), beta=1.0).set_index(["objective", "quantity"])
    own, end, mirrored = PLANTED["a"]
    means = {"learned": own, "backward": end - own, "over_lower": end - 0.9 * own}
    means |= {"over_upper": end - 1.1 * own, "order": mirrored - end}
    for quantity, mean in means.items():
        row = found.loc[("a", quantity)]
        assert row["mean"] == pytest.approx(mean), quantity
        assert row["seeds"] == 2
    of_runs = found["run_sd"].loc["a"]
    assert of_runs[["learned", "order"]].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert of_runs[["backward", "over_lower"]].tolist() == pytest.approx([0.2 / 2**0.5] * 2)
    assert found["rest_sd"].loc["a"].dropna().max() < 1e-9
    gain, change = (found.loc[("a", name), "prompt_sd"] for name in ("learned", "over_lower"))
    assert (
        gain > 0.1
        and change == pytest.approx(0.1 * gain)
        and found.loc[("a", "backward"), "prompt_sd"] < 1e-9
    )
    within, matched = (found.loc[("b", name)] for name in ("within", "matched"))
    assert (within["mean"], within["half"], within["prompts"]) == (pytest.approx(0.4), 4, 2)
    assert matched["mean"] == pytest.approx(0.2) and matched["prompt_sd"] == pytest.approx(0.02**0.5)
    assert within["prompt_sd"] == pytest.approx(0.02**0.5)


def test_a_plan_prefers_the_spreads_that_were_measured_here(tmp_path):
    runs = planted(tmp_path / "runs")
    typical, measured = power.known(tmp_path, "smoke")
    assert measured == power.shipped()[1] and typical.equals(power.shipped()[0])
    paths.write_table(runs[0].summary("spreads"), power.spreads(runs, beta=1.0))
    typical, measured = power.known(tmp_path, "smoke")
    assert "run here" in measured
    gains = [own for own, _, _ in PLANTED.values()]
    assert typical.loc["learned", "mean"] == pytest.approx(np.mean(gains))
    paths.write_table(runs[0].summary("spreads"), power.spreads([runs[0].at("a")], beta=1.0))
    assert power.known(tmp_path, "smoke")[1] == power.shipped()[1], "a study of single stages measured none"


def test_scoring_share_counts_every_stage_once(tmp_path):
    runs = planted(tmp_path / "runs")
    assert power.scoring_share(runs) == pytest.approx(8 * 15 / (8 * 15 + 4 * 2 * 10 + 4 * 2 * 20))
    assert power.scoring_share([*runs, runs[0].at("a")]) == power.scoring_share(runs)


def test_the_shipped_spreads_have_every_quantity():
    typical, measured = power.shipped()
    wanted = {"learned", "backward", "over_lower", "over_upper", "order", "within", "matched"}
    assert set(typical.index) == wanted and "classroom" in measured
    assert (typical[["prompt_sd", "rest_sd"]].sum(axis=1) > 0).all() and typical.loc["learned", "mean"] > 0


def test_one_seed_has_the_spread_of_one_run_also_where_several_were_measured():
    """What one run does to a prompt is then in the spread over prompts: 3-4-5."""
    several = pd.DataFrame({"prompt_sd": [3.0, 0.5], "rest_sd": [4.0, np.nan], "run_sd": [9.0, np.nan]})
    one, told = power._at_best(several, 1)
    assert one["prompt_sd"].tolist() == [5.0, 0.5] and one["rest_sd"].eq(0).all() and told == ""
    assert power._at_best(several, 3)[0]["prompt_sd"].tolist() == [3.0, 0.5]
