"""Pair changes by hand, and worlds whose answer is known: every estimator tells them apart as it claims."""

import numpy as np
import pandas as pd
import pytest
from test_metrics import AFTER, BASE, records

from seqdpo_utils import metrics, redistribution

RNG = np.random.default_rng
OWN, CROSS = "stage1_margin", redistribution.CROSS


def test_pair_change_by_hand():
    end = records((-8.0, -11.0), (-5.0, -12.0), (-9.0, -4.0), checkpoint="a-then-b")
    shuffled = pd.concat([BASE, AFTER, end.iloc[::-1]], ignore_index=True)
    measures = metrics.pair_measures(shuffled, beta=0.3)
    changes = redistribution.pair_change(measures, "a", before="a", after="a-then-b")
    assert changes["pair_id"].tolist() == ["p0", "p1", "p2"] and set(changes["objective"]) == {"a"}
    assert changes["change"].tolist() == pytest.approx([0.0, 8.0, -2.5])
    assert changes["base"].tolist() == pytest.approx([-2.5, -7.0, -1.25])
    assert changes["effect"].tolist() == ["unchanged", "helped", "harmed"]
    assert changes["reordered"].tolist() == ["same", "gained", "same"]
    assert changes["margin_before"].tolist() == pytest.approx([0.9, -0.3, 0.0])
    assert changes["margin_after"].tolist() == pytest.approx([0.9, 4.5, -1.5])
    assert changes["margin_change"].tolist() == pytest.approx([0.0, 4.8, -1.5])
    assert redistribution.crossed_zero(changes).tolist() == ["neither", "both", "neither"]
    assert redistribution.churn(changes["before"], changes["after"]) == pytest.approx(1 / 3)
    back = redistribution.pair_change(measures, "a", before="a-then-b", after="a")
    assert back["reordered"].tolist() == ["same", "lost", "same"]


def test_pair_change_from_the_base():
    measures = metrics.pair_measures(pd.concat([BASE, AFTER]), beta=0.3)
    changes = redistribution.pair_change(measures, "a", before="base", after="a")
    assert (changes["before"] == changes["base"]).all() and (changes["margin_before"] == 0).all()
    assert changes["change"].tolist() == pytest.approx([1.25, -0.5, 0.25])
    assert set(redistribution.crossed_zero(changes)) == {"neither"}


def test_the_two_margins_change_sign_apart():
    ends = {"before": [1, -1, 1, 1], "after": [1, 1, -1, 2]}
    ends |= {"margin_before": [1, 1, -1, 0], "margin_after": [-1, 2, 1, 5]}
    found = redistribution.crossed_zero(pd.DataFrame(ends))
    assert found.tolist() == ["DPO margin", "policy margin", "both", "neither"]


def scored(changes: np.ndarray, *, tokens: np.ndarray | int = 1) -> pd.DataFrame:
    """Records at the base, after `a` and after `a-then-b`; `changes`: (3, pairs), of the chosen sums."""
    names = [f"p{i:05}" for i in range(changes.shape[1])]
    place = {"pair_id": names, "prompt_id": names, "objective": "a", "split": "eval"}
    place |= {"rejected_logp": -1.0, "chosen_tokens": tokens, "rejected_tokens": tokens}
    steps = zip(("base", "a", "a-then-b"), changes, strict=True)
    parts = [pd.DataFrame(place | {"checkpoint": name, "chosen_logp": -1 + each}) for name, each in steps]
    return pd.concat(parts, ignore_index=True)


def test_a_small_margin_is_right_and_a_change_beyond_a_hundredth_counts():
    """One token an answer, so that sums are margins: 0.02 above zero is right; 0.008 more is no change."""
    before, after = [0.02, 0.02, 0.02, -0.02], [0.028, 0.035, 0.005, -0.02]
    measures = metrics.pair_measures(scored(np.array([before, before, after])), beta=1.0)
    assert measures["policy_accuracy"].tolist() == [1, 1, 1, 0] * 2 + [1, 1, 1, 0]
    found = redistribution.pair_change(measures, "a", before="a", after="a-then-b")
    assert found["effect"].tolist() == ["unchanged", "helped", "harmed", "unchanged"]
    assert set(found["within"]) == {redistribution.UNCHANGED}


def test_rounding_helps_and_harms_next_to_no_pair_that_did_not_change():
    """Random errors of 0.05 nats a token in each sum at each checkpoint, their size known from 16 sums."""
    rng, sd = RNG(0), 0.05
    tokens = rng.integers(20, 200, 2000)
    still = scored(np.zeros((3, 2000)), tokens=tokens)
    shares, naive = [], []
    for _ in range(20):
        rounded = still.copy()
        for side in ("chosen", "rejected"):
            rounded[f"{side}_logp"] += rng.normal(0, sd * np.sqrt(rounded[f"{side}_tokens"]))
        measures = metrics.pair_measures(rounded, beta=1.0)
        seen = rng.normal(0, sd * np.sqrt(rng.choice(tokens, 16)))
        ends = {"before": "a", "after": "a-then-b"}
        for found, noise in ((shares, {"rms": np.sqrt((seen**2).mean())}), (naive, None)):
            table = redistribution.pair_change(measures, "a", **ends, noise=noise)
            found.append((table["effect"] != "unchanged").mean())
    assert np.mean(naive) > 0.1 and np.mean(shares) < 0.012


def test_the_threshold_by_hand():
    """Sums of 100 tokens off by 1 nat: 0.1 a root token, so 0.1 sqrt(2 (1 / 50 + 1 / 150)), three times."""
    counts = pd.DataFrame({"chosen_tokens": [50], "rejected_tokens": [150]})
    within = redistribution.unchanged_within(counts, {"rms": 1.0}).tolist()
    assert within == pytest.approx([3 * 0.1 * np.sqrt(2 / 50 + 2 / 150)])
    for noise in (None, {"rms": None}, {"rms": 1e-4}):
        assert redistribution.unchanged_within(counts, noise).tolist() == [0.01]


def pairs(learned: np.ndarray, kept: np.ndarray, **more: np.ndarray) -> pd.DataFrame:
    """A table of pair changes with given DPO margins, a pair a prompt."""
    margins = {"margin_before": learned, "margin_after": kept, "margin_change": kept - learned}
    return pd.DataFrame({"prompt_id": np.arange(len(learned))} | margins | more)


SHARED = 0.4
"""Standard deviation of luck in stage 1."""


def world(name: str, n: int, rng: np.random.Generator, *, seeds: int = 1, shared: bool = False) -> list:
    """Runs in which stage 1 learns 0.6 on average, what differs by 0.6 over pairs, and luck on top."""
    truth, common = rng.normal(0.6, 0.6, n), rng.normal(0, SHARED, n)
    runs = []
    for _ in range(seeds):
        learned = truth + (common if shared else rng.normal(0, SHARED, n))
        kept = {
            "drift only": lambda m: m,
            "uniform shift": lambda m: m - 0.4,
            "redrawn luck": lambda m: truth + rng.normal(0, SHARED, n),
            "loss in proportion": lambda m: 0.5 * m,
            "top quartile": lambda m: np.where(m > 1.1, 0.2 * m, m),
        }[name](learned)
        runs.append(pairs(learned, kept + rng.normal(0, 0.1, n)))
    return runs


def gap(tables: list, key: str = OWN, **options: bool) -> dict:
    return redistribution.highest_minus_lowest(tables, key, resamples=300, rng=RNG(0), **options)


def pattern(tables: list, *, crossed: bool = False) -> dict:
    line = redistribution.kept_line(tables, crossed=crossed, resamples=300, rng=RNG(0))
    return redistribution.loss_pattern(line, learned=float(tables[0]["margin_before"].mean()))


@pytest.mark.parametrize(
    ("name", "reading", "kind"),
    [
        ("drift only", "no contrast shown", "kept as learned"),
        ("uniform shift", "no contrast shown", "uniform shift"),
        ("redrawn luck", "regression to the mean not excluded", "neither"),
        ("loss in proportion", "regression to the mean not excluded", "in proportion"),
        ("top quartile", "regression to the mean not excluded", "neither"),
    ],
)
def test_five_worlds_are_told_apart(name, reading, kind):
    """One run cannot tell regression to the mean by contrasts; the line still tells all but the last two."""
    tables = world(name, 400, RNG(5))
    assert (gap(tables)["reading"], pattern(tables)["pattern"]) == (reading, kind)


def test_of_few_pairs_the_rule_seldom_says_what_is_false():
    """An interval of 95 % errs in one of twenty; drift only is neither a share nor a sum."""
    false = {"drift only": 0, "redrawn luck": 0}
    for name, seed in ((name, seed) for name in false for seed in range(60)):
        false[name] += pattern(world(name, 32, RNG(seed)))["pattern"] in ("in proportion", "uniform shift")
    assert max(false.values()) <= 5


def test_quartiles_by_hand():
    """Eight pairs a quarter; sorted backwards, lowest key first, and each value stands in four pairs."""
    change = np.repeat(np.arange(8.0), 4)
    tables = [pairs(-change, np.zeros(32))]  # all that was learned is gone: the change is its negative
    table = redistribution.quartiles(tables, OWN, resamples=300, rng=RNG(0))
    assert table["quartile"].tolist() == [1, 2, 3, 4] and table["n_pairs"].tolist() == [8] * 4
    assert table["change"].tolist() == pytest.approx([6.5, 4.5, 2.5, 0.5])
    assert table["regression"].tolist() == pytest.approx([3.0, 1.0, -1.0, -3.0])  # less the mean of 3.5
    assert (table["change_low"] < table["change"]).all() and (table["change"] < table["change_high"]).all()
    assert set(table["key"]) == {OWN} and set(table["measure"]) == {"margin"}
    row = gap(tables)
    assert (row["lowest"], row["highest"], row["difference"]) == pytest.approx((6.5, 0.5, -6.0))
    assert row["regression"] == pytest.approx(-6.0)


def test_a_pair_on_a_cut_counts_in_part():
    """Thirty-four pairs: a quarter is eight and a half of them."""
    change = np.arange(34.0)
    table = redistribution.quartiles([pairs(np.zeros(34), change, base=change, before=change, change=change)],
                                     "base", resamples=50, rng=RNG(0))  # fmt: skip
    halves = [(sum(range(8)) + 4) / 8.5, (4 + sum(range(9, 17))) / 8.5]
    assert table["change"].tolist()[:2] == pytest.approx(halves)
    assert table["n_pairs"].tolist() == [9, 9, 8, 8] and set(table["measure"]) == {"policy_margin"}


def test_below_a_stated_size_nothing_is_shown():
    few = [pairs(np.arange(31.0), np.zeros(31))]
    table = redistribution.quartiles(few, OWN, resamples=50, rng=RNG(0))
    assert table.empty and "regression" in table and gap(few) is None
    enough = [pairs(np.arange(32.0), np.zeros(32))]
    assert len(redistribution.quartiles(enough, OWN, resamples=50, rng=RNG(0))) == 4
    assert redistribution.quartiles(enough, CROSS, resamples=50, rng=RNG(0)).empty  # one run has no other


def test_quartiles_resample_prompts_whole():
    """Four copies of a pair are one prompt: as wide as the pairs alone, and not half of it."""
    once = world("drift only", 64, RNG(1))[0]
    copies = [once.loc[once.index.repeat(4)].reset_index(drop=True)]
    naive = [copies[0].assign(prompt_id=range(256))]
    widths = [
        gap(tables)["difference_high"] - gap(tables)["difference_low"] for tables in ([once], copies, naive)
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.05) and widths[2] < 0.6 * widths[0]


@pytest.mark.parametrize(
    ("name", "n", "least"),
    [
        ("redrawn luck", 32, 0.94),
        ("redrawn luck", 200, 0.94),
        ("loss in proportion", 32, 0.87),
        ("loss in proportion", 200, 0.88),
    ],
)
def test_intervals_cover_with_their_cuts_moving(name, n, least):
    """What 800 studies (300 and 600 of 200 pairs) reach: 97, 97, 91 and 94 %.

    Least where the change is next to a function of the key: all the spread is then that of the cuts.
    """
    rng = RNG(3)
    slope = -0.5 if name == "loss in proportion" else -(SHARED**2) / (0.6**2 + SHARED**2)
    normal = 1.2711 * 2 * np.hypot(0.6, SHARED)  # distance of the outer quarters' means of a normal
    covered = 0
    for _ in range(120):
        found = redistribution.highest_minus_lowest(world(name, n, rng), OWN, resamples=200, rng=rng)
        covered += found["difference_low"] <= slope * normal <= found["difference_high"]
    assert covered / 120 >= least


def test_what_another_seed_learned_is_free_of_luck_unless_it_was_shared():
    """Luck is drawn anew and nothing is lost: only crossed seeds with training pairs of their own say so."""
    apart, together = (world("redrawn luck", 200, RNG(2), seeds=3, shared=each) for each in (False, True))
    assert gap(apart, OWN)["difference_high"] < 0 and gap(apart, OWN)["reading"].startswith("regression")
    crossed = gap(apart, CROSS, shared=False)
    assert crossed["difference_low"] < 0 < crossed["difference_high"] and crossed["regression"] == 0
    tempted = gap(together, CROSS)
    assert tempted["difference_high"] < 0 and tempted["reading"] == "regression to the mean not excluded"
    lost = gap(world("loss in proportion", 200, RNG(2), seeds=3), CROSS, shared=False)
    assert lost["reading"] == "highest changed for the worse"


def test_crossing_takes_the_key_from_one_run_and_the_change_from_the_other():
    """The second run loses by the place of the pair in the first, which gains by that in the second."""
    one, other = np.arange(32.0), np.arange(32.0)[::-1] * 2
    tables = [pairs(one, one + other), pairs(other, other - one)]
    quarter = 31 - 2 * 3.5
    crossed = gap(tables, CROSS, shared=False)
    assert crossed["difference"] == pytest.approx((2 * quarter - quarter) / 2)
    assert gap(tables, OWN)["difference"] == pytest.approx((-2 * quarter + quarter) / 2)
    alone = gap(tables[:1], OWN)
    assert alone["difference_high"] - alone["difference_low"] < gap(tables, OWN)["difference_high"]


def test_the_bound_on_regression_holds_where_a_full_reversion_has_the_wrong_sign():
    """Stage 1 helps low margins more, by plan; its luck still makes the highest of the margins fall after."""
    rng, n = RNG(4), 4000
    base, luck = rng.normal(size=n), rng.normal(0, 0.3, n)
    before = base - 0.2 * base + luck
    zero = np.zeros(n)
    table = pairs(zero, zero, base=base, before=before, change=-luck)
    found = gap([table], "stage1_policy_margin")
    assert found["regression"] < found["difference"] < 0
    assert found["reading"] == "regression to the mean not excluded"
    worse = gap([table.assign(change=-luck - 0.3 * base)], "stage1_policy_margin")
    assert worse["reading"] == "highest changed for the worse"
    better = gap([table.assign(change=0.3 * base)], "stage1_policy_margin")
    assert better["reading"] == "highest changed for the better"
    assert gap([table.assign(change=-0.3 * base)], "base")["reading"] == "highest changed for the worse"


def test_the_line_is_that_of_least_squares_and_its_band_goes_through_it():
    rng = RNG(6)
    table = world("loss in proportion", 50, rng)[0]
    line = redistribution.kept_line([table], crossed=False, resamples=400, rng=RNG(0))
    slope, intercept = np.polyfit(table["margin_before"], table["margin_after"], 1)
    assert line[0] == pytest.approx([slope, intercept])
    band = redistribution.line_band(line, table["margin_before"], points=3)
    assert band["kept"].tolist() == pytest.approx((intercept + slope * band["learned"]).tolist())
    assert (band["kept_low"] < band["kept"]).all() and (band["kept"] < band["kept_high"]).all()
    assert band["learned"].iloc[[0, -1]].tolist() == [
        table["margin_before"].min(),
        table["margin_before"].max(),
    ]


def test_luck_attenuates_the_plain_slope_and_not_that_by_another_seed():
    """Of the variance of what was learned 0.36 of 0.52 is reproducible: the plain slope shows that for 1."""
    tables = world("redrawn luck", 4000, RNG(7), seeds=3)
    plain, crossed = pattern(tables), pattern(tables, crossed=True)
    assert plain["slope"] == pytest.approx(0.36 / 0.52, abs=0.03)
    assert crossed["slope"] == pytest.approx(1.0, abs=0.03)
    assert crossed["intercept"] == pytest.approx(0.0, abs=0.03)
    # where nothing was drawn anew both agree
    lost = world("loss in proportion", 4000, RNG(7), seeds=3)
    assert pattern(lost)["slope"] == pytest.approx(0.5, abs=0.02)
    assert pattern(lost, crossed=True)["slope"] == pytest.approx(0.5, abs=0.02)
    # luck of pairs that the seeds share is in the instrument too
    shared = pattern(world("redrawn luck", 4000, RNG(7), seeds=3, shared=True), crossed=True)
    assert shared["slope"] == pytest.approx(0.36 / 0.52, abs=0.03)


def test_an_instrument_that_says_nothing_gives_no_line():
    rng = RNG(8)
    tables = [pairs(rng.normal(size=100), rng.normal(size=100)) for _ in range(2)]
    assert pattern(tables, crossed=True)["pattern"] == "cannot be decided"
    assert pd.isna(pattern(tables, crossed=True)["slope"])
    assert pd.isna(pattern(tables[:1], crossed=True)["slope"])  # no other run
    assert pd.isna(pattern([pairs(np.zeros(40), np.ones(40))])["slope"])  # nothing was learned


def test_runs_that_disagree_widen_the_line():
    """Two runs keep a fifth and four fifths of the same: exact in each, open between them."""
    learned = RNG(9).normal(1, 1, 60)
    found = pattern([pairs(learned, 0.2 * learned), pairs(learned, 0.8 * learned)])
    assert found["slope"] == pytest.approx(0.5) and found["slope_low"] < 0 and found["slope_high"] > 1
    alone = pattern([pairs(learned, 0.2 * learned)])
    assert (alone["slope_low"], alone["slope_high"]) == pytest.approx((0.2, 0.2))


def bounded(slope: tuple[float, float], intercept: tuple[float, float]) -> str:
    draws = np.linspace(0, 1, 1001)[:, None]
    low, high = np.array([slope[0], intercept[0]]), np.array([slope[1], intercept[1]])
    draws = low + (draws - 0.025) / 0.95 * (high - low)
    line = np.vstack([(low + high) / 2, draws])
    return redistribution.loss_pattern(line, learned=1.0)["pattern"]


@pytest.mark.parametrize(
    ("slope", "intercept", "name"),
    [
        ((0.95, 1.05), (-0.05, 0.05), "kept as learned"),
        ((0.4, 0.6), (-0.08, 0.08), "in proportion"),
        ((1.2, 1.4), (-0.08, 0.08), "in proportion"),
        ((0.4, 0.6), (-0.12, 0.08), "not a uniform shift"),
        ((0.4, 0.6), (-0.08, 0.12), "not a uniform shift"),
        ((0.92, 1.08), (-0.5, -0.3), "uniform shift"),
        ((0.92, 1.08), (0.3, 0.5), "uniform shift"),
        ((0.88, 1.08), (-0.5, -0.3), "not in proportion"),
        ((0.92, 1.12), (-0.5, -0.3), "not in proportion"),
        ((0.4, 0.6), (-0.5, -0.3), "neither"),
        ((0.4, 0.6), (0.3, 0.5), "neither"),
        ((0.4, 1.2), (-0.5, 0.3), "cannot be decided"),
    ],
)
def test_the_rule_of_patterns(slope, intercept, name):
    assert bounded(slope, intercept) == name
