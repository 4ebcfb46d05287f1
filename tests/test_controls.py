"""Later stages that are planted on disk: one opposes the first objective, one does not, one is noise."""

from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import pytest

from seqdpo_utils import charts, controls, metrics, redistribution
from seqdpo_utils.chains import AGAIN, SHUFFLED, Chain
from seqdpo_utils.controls import ALONE, FIRST, JOINT, LATER, NOTHING, REAL
from seqdpo_utils.metrics import NOT_LEARNED
from seqdpo_utils.paths import RunPaths, write_table

PAIRS, PROMPTS, BETA = 40, 20, 0.5
PLACE = np.arange(PAIRS)
FULL = ["a-then-b", "b-then-a", "a-then-b.shuffled", "b-then-a.shuffled", "a-then-a", "b-then-b", "a+b"]


def write_scores(file: Path, checkpoint: str, margins: dict[str, float | np.ndarray]) -> None:
    """Held-out pairs, two a prompt, with given margins, and a training pair to be left out."""
    parts = []
    for objective, margin in margins.items():
        chosen = np.append(np.zeros(PAIRS) + margin, 99.0) / BETA
        place = {"pair_id": [f"p{i:02}" for i in range(PAIRS + 1)]}
        place |= {"prompt_id": [f"q{i // 2}" for i in range(PAIRS + 1)], "objective": objective}
        place |= {"split": ["eval"] * PAIRS + ["train"], "checkpoint": checkpoint}
        sums = {"chosen_logp": chosen, "rejected_logp": 0.0, "chosen_tokens": 2, "rejected_tokens": 2}
        parts.append(pd.DataFrame(place | sums))
    write_table(file, pd.concat(parts, ignore_index=True))


def plant(root: Path, planted: dict[str, dict], *, setting: str = "s", seed: int = 0) -> list[RunPaths]:
    """Runs of chains; `planted` gives each chain and each beginning the margin of every objective."""
    runs = [RunPaths(root, "smoke", setting, text, seed) for text in planted]
    write_scores(runs[0].base_scores, "base", dict.fromkeys(next(iter(planted.values())), 0.0))
    for run in runs:
        write_scores(run.scores, run.chain, planted[run.chain])
    return runs


def world(
    training: float, labels: float, *, rng: np.random.Generator, learned: float = 1.0, every: bool = False
) -> dict[str, dict]:
    """One seed of a study; the last stage learns its own objective, by 1, where its labels are real."""
    luck = rng.normal(0, 0.02, 20)

    def end(mean: float) -> np.ndarray:
        return mean + luck[rng.integers(20)] + 0.2 * np.sin(PLACE // 2) + rng.normal(0, 0.05, PAIRS)

    found = {}
    for one, other in ("ab", "ba"):
        found[one] = {one: end(learned), other: end(0.0)}
        found[f"{one}-then-{other}"] = {one: end(learned + training + labels), other: end(1.0)}
        found[f"{one}-then-{other}.shuffled"] = {one: end(learned + training), other: end(0.0)}
        if every:
            found[f"{one}-then-{one}"] = {one: end(2 * learned), other: end(0.0)}
    return found | ({"a+b": {"a": end(learned), "b": end(1.0)}} if every else {})


def study(root: Path, *worlds: tuple[float, float], seeds: int = 3, **how: float) -> pd.DataFrame:
    """Pairs of a study with a setting a world (what training does, what labels do)."""
    runs = []
    for setting, truth in enumerate(worlds):
        rng = np.random.default_rng(setting)
        for seed in range(seeds):
            runs += plant(root, world(*truth, rng=rng, **how), setting=f"s{setting}", seed=seed)
    return controls.by_pair(runs, beta=BETA)


def numbers(row: pd.Series, name: str) -> list[float]:
    return row[[name, f"{name}_low", f"{name}_high"]].tolist()


def test_the_ways_on():
    among = {*FULL, "a", "b", "a+b-then-c", "a+c", "a+b.half", "a-then-b-then-c"}
    found = controls.ways_on(Chain.parse("a-then-b"), among)
    singles = {NOTHING: "a", REAL: "a-then-b", JOINT: "a+b", ALONE: "b"}
    assert found == singles | {SHUFFLED: "a-then-b.shuffled", AGAIN: "a-then-a"}
    assert controls.ways_on(Chain.parse("a-then-b"), {"a", "a-then-b"}) == {NOTHING: "a", REAL: "a-then-b"}
    three = {"a", "c", "a-then-b", "a-then-b-then-c", "a-then-b-then-a", "a-then-b-then-c.shuffled", "a+b+c"}
    assert controls.ways_on(Chain.parse("a-then-b-then-c"), three) == {
        NOTHING: "a-then-b",
        REAL: "a-then-b-then-c",
        SHUFFLED: "a-then-b-then-c.shuffled",
        AGAIN: "a-then-b-then-a",
        JOINT: "a+b+c",
        ALONE: "c",
    }


PLANTED = {
    "a": {"a": 1.0, "b": 0.25},
    "b": {"a": -0.25, "b": 1.5},
    "a+b": {"a": 0.75, "b": 1.25},
    "a-then-a": {"a": 1.625, "b": 0.0},
    "a-then-b": {"a": 0.5, "b": 2.0},
    "a-then-b.shuffled": {"a": 0.125, "b": 0.375},
    "a-then-b.flip50": {"a": 7.0, "b": 7.0},
}


def test_ends_and_effects_by_hand(tmp_path):
    runs = plant(tmp_path, PLANTED) + plant(tmp_path, PLANTED, seed=1)
    pairs = controls.by_pair(runs, beta=BETA)
    assert set(pairs["chain"]) == {"a-then-b"} and len(pairs) == 2 * 2 * PAIRS
    ends = controls.ends(pairs, resamples=100).set_index(["role", "objective", "end"])
    ways = {NOTHING: "a", REAL: "a-then-b", SHUFFLED: "a-then-b.shuffled", AGAIN: "a-then-a"}
    for name, text in (ways | {JOINT: "a+b", ALONE: "b"}).items():
        for role, objective in ((FIRST, "a"), (LATER, "b")):
            row = ends.loc[(role, objective, name)]
            assert numbers(row, "margin") == pytest.approx([PLANTED[text][objective]] * 3)
            assert (row["seeds"], row["n_prompts"]) == (2, PROMPTS)
    row = controls.effects(pairs, resamples=100).iloc[0]
    by_hand = {"learned": 1.0, "labels": 0.375, "training": -0.875, "total": -0.5, "again": 0.625}
    by_hand |= {"spared": 0.375 + 0.1, "taught": 2.0 - 0.375}
    for name, value in by_hand.items():
        assert numbers(row, name) == pytest.approx([value] * 3)
    assert row[["objective", "labels_do", "taken_by"]].tolist() == ["a", controls.PROTECT, controls.TRAINING]


def test_worlds_are_told_apart(tmp_path):
    """Labels destroy, labels protect from what training destroys, both destroy, nothing but noise."""
    worlds = [(0.0, -0.6), (-0.8, 0.4), (-0.4, -0.4), (0.0, 0.0)]
    table = controls.effects(study(tmp_path, *worlds), resamples=300)
    said = table.groupby("setting")[["labels_do", "taken_by"]].agg(set)
    assert said["labels_do"].tolist()[:3] == [{controls.DESTROY}, {controls.PROTECT}, {controls.DESTROY}]
    truth = [{controls.LABELS}, {controls.TRAINING}, {controls.BOTH}, {controls.OPEN}]
    assert said["taken_by"].tolist() == truth
    told = controls.findings(table)
    assert told["taken_by"].tolist() == [*controls.DECIDED[1::-1], controls.BOTH, controls.OPEN]
    assert told["cases"].tolist() == [2] * 4 and told["decided"].tolist() == [2, 2, 2, 0]
    for place, row in table.set_index(["setting", "chain"]).iterrows():
        training, labels = worlds[int(place[0][1])]
        assert row[["training", "labels"]].tolist() == pytest.approx([training, labels], abs=0.05)


def test_real_and_shuffled_exchanged_turn_the_verdict(tmp_path):
    """The same records under each other's names: what protected now destroys."""
    rng = np.random.default_rng(0)
    runs = []
    for seed in range(3):
        found = world(-0.8, 0.4, rng=rng)
        for text in ("a-then-b", "b-then-a"):
            found[text], found[f"{text}.shuffled"] = found[f"{text}.shuffled"], found[text]
        runs += plant(tmp_path, found, seed=seed)
    table = controls.effects(controls.by_pair(runs, beta=BETA), resamples=300)
    assert set(table["labels_do"]) == {controls.DESTROY} and (table["taught"] < 0).all()


def test_contrasts_are_paired(tmp_path):
    """Margins differ between pairs by far more than by the way on, and all by the same."""
    wide = np.where(PLACE % 3 == 0, 9.0, -4.0)
    shifts = {"a": 0.0, "b": 0.0, "a-then-b": -0.25, "a-then-b.shuffled": -1.0}
    planted = {text: {"a": wide + shift, "b": 0.0} for text, shift in shifts.items()}
    row = controls.effects(controls.by_pair(plant(tmp_path, planted), beta=BETA), resamples=200).iloc[0]
    assert numbers(row, "labels") == pytest.approx([0.75] * 3)
    assert numbers(row, "training") == pytest.approx([-1.0] * 3)
    assert row["learned_high"] - row["learned_low"] > 2


def test_runs_that_disagree_are_no_verdict(tmp_path):
    """The labels do +.8 in one run and -.2 in the other; each run alone is sure of itself."""
    both = []
    for seed, labels in enumerate((0.8, -0.2)):
        planted = {"a": {"a": 1.0, "b": 0.0}, "b": {"a": 0.0, "b": 1.0}}
        planted |= {"a-then-b": {"a": 0.5 + labels, "b": 1.0}, "a-then-b.shuffled": {"a": 0.5, "b": 0.0}}
        both.append(plant(tmp_path, planted, seed=seed))
    alone = [controls.effects(controls.by_pair(runs, beta=BETA), resamples=200).iloc[0] for runs in both]
    assert [row["labels_do"] for row in alone] == [controls.PROTECT, controls.DESTROY]
    assert all(row["seeds"] == 1 for row in alone)
    row = controls.effects(controls.by_pair(both[0] + both[1], beta=BETA), resamples=2000).iloc[0]
    assert row["labels"] == pytest.approx(0.3) and row["labels_low"] < 0 < row["labels_high"]
    assert (row["labels_do"], row["taken_by"]) == (controls.OPEN, controls.OPEN)
    assert row["training_p"] < 0.05  # which both runs agree on


def test_a_missing_control_is_said_and_does_not_count_among_the_rows(tmp_path):
    """No shuffled stage for one order: its contrast is null, and the other is corrected for one row only."""
    rng = np.random.default_rng(1)
    runs, fewer = [], []
    for seed in range(3):
        full = plant(tmp_path, world(-0.8, 0.4, rng=rng, every=True), seed=seed)
        runs += [run for run in full if run.chain not in ("b-then-a.shuffled", "a-then-a")]
        fewer += [run for run in full if run.seed or run.chain != "a-then-b.shuffled"]
    table = controls.effects(controls.by_pair(runs, beta=BETA), resamples=300).set_index("chain")
    without, held = table.loc["b-then-a"], table.loc["a-then-b"]
    assert (without["labels_do"], without["taken_by"]) == (controls.NO_CONTROL, controls.NO_CONTROL)
    assert without[["labels", "training", "labels_p", "spared", "taught"]].isna().all()
    assert without["total"] == pytest.approx(-0.4, abs=0.1) and without["again"] == pytest.approx(1, abs=0.1)
    assert held["taken_by"] == controls.TRAINING and np.isnan(held["again"])
    alone = [run for run in runs if not run.chain.startswith("b-")]
    one = controls.effects(controls.by_pair(alone, beta=BETA), resamples=300).iloc[0]
    assert held["labels_p"] == one["labels_p"] and held["total_p"] > one["total_p"]
    # a control that lacks a seed is no control of the chain
    pairs = controls.by_pair(fewer, beta=BETA)
    assert pairs.loc[pairs["chain"] == "a-then-b", SHUFFLED].isna().all()


def test_what_is_not_questioned(tmp_path):
    """Variants and repetitions are controls themselves; single stages have nothing that follows."""
    texts = ["a", "a-then-a", "a-then-b.half", "a-then-a+b"]
    runs = plant(tmp_path, {text: {"a": 1.0, "b": 1.0} for text in texts})
    pairs = controls.by_pair(runs, beta=BETA)
    assert pairs.empty and {"seed", *controls.ENDS} <= set(pairs)
    table = controls.effects(pairs, resamples=100)
    assert table.empty and {"labels_p", "taken_by", "again_low"} <= set(table)
    assert controls.ends(pairs, resamples=100).empty and controls.findings(table).empty
    assert controls.quartiles(pairs, resamples=100).empty
    joint = {text: {"a": 1.0, "b": 1.0, "c": 0.5} for text in ("a+b", "a+b-then-c", "a+b-then-b")}
    found = controls.by_pair(plant(tmp_path, joint, setting="t"), beta=BETA)
    asked = found.drop_duplicates(["chain", "objective", "role"])[["chain", "objective", "role"]]
    assert set(asked.itertuples(index=False, name=None)) == {
        ("a+b-then-c", "a", FIRST),
        ("a+b-then-c", "b", FIRST),
        ("a+b-then-c", "c", LATER),
        ("a+b-then-b", "a", FIRST),
        ("a+b-then-b", "b", LATER),
    }


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ({"learned": 1, "labels": 1, "training": -1}, (controls.PROTECT, controls.TRAINING)),
        ({"learned": 1, "labels": 1}, (controls.PROTECT, controls.OPEN)),
        ({"learned": 1, "labels": 1, "training": 1}, (controls.PROTECT, controls.OPEN)),
        ({"learned": 1, "labels": -1}, (controls.DESTROY, controls.LABELS)),
        ({"learned": 1, "labels": -1, "training": 1}, (controls.DESTROY, controls.LABELS)),
        ({"learned": 1, "labels": -1, "training": -1}, (controls.DESTROY, controls.BOTH)),
        ({"learned": 1, "training": -1}, (controls.OPEN, controls.OPEN)),
        ({"learned": 1, "training": -1, "spared": 1, "taught": 1}, (controls.LITTLE, controls.TRAINING)),
        ({"learned": 1, "training": -1, "spared": 1, "taught": -1}, (controls.OPEN, controls.OPEN)),
        ({"learned": 1, "training": -1, "spared": -1, "taught": 1}, (controls.OPEN, controls.OPEN)),
        ({"labels": 1, "training": -1}, (controls.PROTECT, NOT_LEARNED)),
        ({"learned": -1, "labels": -1, "training": -1}, (controls.DESTROY, NOT_LEARNED)),
    ],
)
def test_the_rule(signs, said):
    """What is not named is not clear: its mean has the sign that would mislead most."""
    means = {
        name: signs.get(name, -1 if name in ("labels", "training") else 1) for name in controls.QUESTIONS
    }
    p = {f"{name}_p": 0.05 if name in signs else 0.051 for name in controls.QUESTIONS}
    assert controls.verdict(means | p) == said
    assert controls.verdict(means | p | {"labels": np.nan}) == (controls.NO_CONTROL,) * 2


def test_labels_that_take_little_are_found_in_a_study_that_can_see_it(tmp_path):
    """Labels do nothing, training takes most of a large gain: with many runs a tenth of it is excluded."""
    pairs = study(tmp_path, (-3.0, 0.0), seeds=5, learned=4.0)
    table = controls.effects(pairs, resamples=300)
    assert set(table["labels_do"]) == {controls.LITTLE} and set(table["taken_by"]) == {controls.TRAINING}


def test_a_setting_whose_cases_differ_names_both():
    table = pd.DataFrame({"setting": "s", "taken_by": [controls.TRAINING, controls.LABELS, controls.OPEN]})
    row = controls.findings(table).iloc[0]
    assert (row["cases"], row["decided"]) == (3, 2)
    assert f"{controls.TRAINING} (1)" in row["taken_by"] and f"{controls.LABELS} (1)" in row["taken_by"]


def quartile_world(root: Path, *, real_only: float, seeds: int = 3) -> pd.DataFrame:
    """Luck of stage 1 is lost after it; the real stage also takes a share of the truth."""
    rng, runs = np.random.default_rng(5), []
    truth = rng.normal(1.0, 0.3, PAIRS)
    for seed in range(seeds):
        first, real, shuffled = (truth + rng.normal(0, 0.4, PAIRS) for _ in range(3))
        planted = {"a": {"a": first, "b": 0.0}, "b": {"a": 0.0, "b": 1.0}}
        planted |= {"a-then-b": {"a": real - real_only * first, "b": 1.0}}
        runs += plant(root, planted | {"a-then-b.shuffled": {"a": shuffled, "b": 0.0}}, seed=seed)
    return controls.by_pair(runs, beta=BETA)


def test_regression_to_the_mean_drops_out_of_the_difference_of_differences(tmp_path, monkeypatch):
    pairs = quartile_world(tmp_path / "luck", real_only=0.0)
    table = controls.quartiles(pairs, resamples=300).set_index("change")
    for change in ("real", "shuffled"):
        assert table.loc[change, "difference"] < -0.5 and table.loc[change, "difference_p"] < 0.05
    assert table.loc["real minus shuffled", "difference_p"] > 0.05
    loss = quartile_world(tmp_path / "loss", real_only=0.8)
    row = controls.quartiles(loss, resamples=300).set_index("change").loc["real minus shuffled"]
    assert row["difference"] < -0.6 and row["difference_p"] < 0.05
    first = loss[(loss["role"] == FIRST) & (loss["seed"] == 0)].sort_values(NOTHING)
    quarter, gap = PAIRS // 4, first[REAL] - first[SHUFFLED]
    one = controls.quartiles(loss[loss["seed"] == 0], resamples=100).set_index("change")
    ends = [gap[:quarter].mean(), gap[-quarter:].mean()]
    assert one.loc["real minus shuffled", ["lowest", "highest"]].tolist() == pytest.approx(ends)
    monkeypatch.setattr(redistribution, "MIN_QUARTILE", PAIRS)
    assert controls.quartiles(loss, resamples=100).empty


def test_the_correction_counts_the_rows(tmp_path):
    """A contrast of several is not as sure as the same contrast alone."""
    pairs = study(tmp_path, (-0.8, 0.4), (0.0, 0.0))
    every = controls.effects(pairs, resamples=300)
    alone = controls.effects(pairs[pairs["setting"] == "s0"], resamples=300)
    np.testing.assert_allclose(
        np.sort(every["labels_p"][:2])[0], 2 * np.sort(alone["labels_p"])[0], rtol=1e-9
    )
    first = pairs[(pairs["chain"] == "a-then-b") & (pairs["setting"] == "s0") & (pairs["role"] == FIRST)]
    gap = first.assign(gap=first[REAL] - first[SHUFFLED])
    draws = metrics.estimates(gap, ["gap"], resamples=300, rng=np.random.default_rng(0))[:, 0]
    assert numbers(alone.iloc[0], "labels") == pytest.approx([draws[0], *metrics.interval(draws[1:])])


def test_the_figure_shows_every_end_with_the_controls_in_grey(tmp_path):
    with alt.renderers.enable("default"):
        charts.use_static_charts()
        ends = controls.ends(study(tmp_path, (-0.8, 0.4), seeds=1, every=True), resamples=100)
        shown = ends[ends["role"] == FIRST].assign(label=lambda table: table["chain"])
        chart = charts.ends_of_controls(shown, caption="n = 40.")
        svg = charts.static_bundle(chart.to_dict())[0]["image/svg+xml"]
    points = 2 * len(controls.ENDS)
    assert svg.count('aria-roledescription="point"') == points
    assert all(f">{name}<" in svg for name in controls.ENDS) and "b-then-a" in svg
    coloured = [f'fill="{colour}"' for colour in (*charts.STAGE_COLOURS[1:3], charts.GREY)]
    assert [svg.count(colour) for colour in coloured] == [2, 2, points - 4]
