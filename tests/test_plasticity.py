"""Planted worlds on disk: opposition, none, a placebo that does as well; matching by hand, its error."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seqdpo_utils import metrics, plasticity
from seqdpo_utils.chains import Chain
from seqdpo_utils.ledger import LEDGER_PAIR_COLUMNS
from seqdpo_utils.paths import RunPaths, write_table

PROMPTS, EACH = 12, 2
PLAIN = "a-then-b"
COMPARED = [PLAIN, f"{PLAIN}.projected", f"{PLAIN}.placebo"]
Point = tuple[float, float]
"""Mean margins of `a` and of `b`."""


def records(checkpoint: str, point: Point, *, rng: np.random.Generator, noise: float) -> pd.DataFrame:
    """Two pairs a prompt of each objective with these mean margins at beta 1, and a training pair."""
    parts = []
    for objective, mean in zip("ab", point, strict=True):
        spread = rng.normal(0, noise, PROMPTS * EACH)
        margins = np.append(mean + spread - spread.mean(), 99.0)
        count = np.arange(PROMPTS * EACH + 1)
        place = {"pair_id": [f"{objective}{i}" for i in count], "prompt_id": [f"q{i // EACH}" for i in count]}
        place |= {"objective": objective, "split": ["eval"] * (PROMPTS * EACH) + ["train"]}
        sums = {"chosen_logp": margins, "rejected_logp": 0.0, "chosen_tokens": 2, "rejected_tokens": 2}
        parts.append(pd.DataFrame(place | {"checkpoint": checkpoint} | sums))
    return pd.concat(parts, ignore_index=True)


def ledger_pairs(left: float) -> pd.DataFrame:
    """Three held-out pairs of `a` and two of another objective, in two stretches."""
    rows = []
    for objective, count, value in (("a", 3, left), ("z", 2, 9.0)):
        for pair in range(count):
            place = {"stage": 2, "previous_objective": objective, "split": "probe", "pair_id": f"p{pair}"}
            change = {"prompt_id": f"q{pair}", "term": 0.0, "loss_before": 0.5, "loss_after": 0.5}
            rows += [place | change | {"from_step": k, "step": k + 1, "left": value / 2} for k in range(2)]
    return pd.DataFrame(rows, columns=list(LEDGER_PAIR_COLUMNS))


def plant(
    root: Path,
    ways: dict[str, list[Point]],
    *,
    start: Point = (1.0, 0.0),
    seeds: int = 2,
    noise: float = 0.02,
    left: dict[str, float] | None = None,
) -> list[RunPaths]:
    """Chains whose last stage goes from `start` over points that are kept within to its last one."""
    rng, runs = np.random.default_rng(3), []
    for seed in range(seeds):
        shift = 0.01 * (seed - (seeds - 1) / 2)  # runs differ, and their mean is as planted
        first = records("a", (start[0] + shift, start[1]), rng=rng, noise=noise)
        for text, way in ways.items():
            run = RunPaths(root, "smoke", "s", text, seed)
            write_table(run.base_scores, records("base", (0.0, 0.0), rng=rng, noise=0.0))
            write_table(run.at("a").scores, first)
            tables = []
            for point in way:
                moved = records(text, (point[0] + shift, point[1]), rng=rng, noise=noise)
                tables.append(moved)
            write_table(run.scores, tables[-1])
            kept = [table.assign(step=2 + 4 * k) for k, table in enumerate(tables[:-1])]
            write_table(run.within, pd.concat(kept) if kept else tables[-1].head(0).assign(step=0))
            write_table(run.ledger_pairs, ledger_pairs((left or {}).get(text, 0.0) + 100 * shift))
            runs.append(run)
    return runs


def walked(way: list[Point], kind: int, *, start: Point, seeds: int, noise: float) -> plasticity.Course:
    """The courses that `plant` writes, without a disk; every kind has noise of its own, after the start."""
    shift = 0.01 * (np.arange(seeds) - (seeds - 1) / 2)
    index = pd.MultiIndex.from_product([range(seeds), range(PROMPTS * EACH)], names=["seed", "pair_id"])
    tables = []
    for side in (0, 1):
        values: dict = {"prompt_id": [f"q{pair // EACH}" for _, pair in index]}
        for k, point in enumerate([start, *way]):
            rng = np.random.default_rng([side, k, kind * (k > 0)])
            spread = rng.normal(0, noise, (seeds, PROMPTS * EACH))
            spread += point[side] + shift[:, None] * (1 - side) - spread.mean(axis=1, keepdims=True)
            values[k] = spread.ravel()
        tables.append(pd.DataFrame(values, index=index))
    return tuple(tables)


def judged(
    ways: dict[str, list[Point]], *, start: Point = (1.0, 0.0), seeds: int = 2, noise: float = 0.02
) -> dict:
    options = {"start": start, "seeds": seeds, "noise": noise}
    courses = {kind: walked(way, k, **options) for k, (kind, way) in enumerate(ways.items())}
    place = ("s", PLAIN, "a", "b", plasticity.CAUSAL, seeds, 0)
    place = dict(zip(plasticity.PLACE, place, strict=True))
    one = plasticity.Comparison(place, groups={}, courses=courses)
    (row,) = plasticity.opposition([one], resamples=400).to_dict("records")
    return row


def causal(plain: Point, projected: Point, placebo: Point) -> dict[str, list[Point]]:
    return {"plain": [plain], "projected": [projected], "placebo": [placebo]}


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        (((0.2, 0.5), (0.9, 0.5), (0.2, 0.5)), plasticity.DRIVES),
        (((0.2, 0.5), (0.2, 0.5), (0.2, 0.5)), plasticity.NOT_DRIVER),
        (((0.2, 0.5), (0.9, 0.5), (0.9, 0.5)), plasticity.AS_GOOD),
        (((0.2, 0.5), (0.2, 0.5), (-0.5, 0.5)), plasticity.UNDECIDED),  # as plain, but the placebo costs
        (((0.9, 0.5), (0.2, 0.5), (0.2, 0.5)), plasticity.AS_GOOD),  # swapped: projected keeps less
        (((1.0, 0.5), (1.3, 0.5), (1.0, 0.5)), plasticity.NO_LOSS),
        (((0.2, -0.1), (0.9, 0.5), (0.2, 0.5)), plasticity.NO_GAIN),
        # half the gain at half the loss: the same course, which a comparison of the ends would praise
        (((0.2, 0.8), (0.6, 0.4), (0.2, 0.8)), plasticity.NOT_DRIVER),
    ],
)
def test_worlds_are_told_apart(ends, verdict):
    assert judged(causal(*ends))["verdict"] == verdict


def test_what_was_not_learned_cannot_be_lost():
    row = judged(causal((-0.9, 0.5), (-0.1, 0.5), (-0.9, 0.5)), start=(0.0, 0.0))
    assert row["verdict"] == metrics.NOT_LEARNED


def test_contrasts_at_equal_gain_are_those_planted():
    """Plain gains 0.8 and loses 0.8; at the 0.4 that the placebo gains it has lost 0.4."""
    row = judged(causal((0.2, 0.8), (0.8, 0.8), (0.7, 0.4)))
    values = {"learned": 1.0, "gain": 0.4, "lost": -0.4, "kept": 0.3, "beyond": 0.2}
    values |= {"kept_over": 0.4, "kept_under": 0.2, "beyond_under": 0.1}
    assert {name: row[name] for name in values} == pytest.approx(values)
    assert row["kept_low"] < 0.3 < row["kept_high"] and row["seeds"] == 2 and row["within"] == 0
    assert row["n_prompts"] == PROMPTS


def test_what_one_run_can_decide():
    ways = causal((0.2, 0.5), (0.3, 0.5), (0.2, 0.5))
    row = judged(ways, seeds=1, noise=0.35)
    assert row["seeds"] == 1 and row["verdict"] == plasticity.UNDECIDED
    assert judged(ways, seeds=1, noise=2.0)["verdict"] == plasticity.NO_GAIN
    assert judged(ways, seeds=1)["verdict"] == plasticity.DRIVES


def test_points_kept_within_bend_the_course(tmp_path):
    """Plain passes a gain of 0.4 at step 10 with a margin of 0.9: the straight line would say 0.6."""
    ways = {PLAIN: [(0.95, 0.2), (0.9, 0.4), (0.2, 0.8)], f"{PLAIN}.projected": [(0.9, 0.2), (0.7, 0.4)]}
    runs = plant(tmp_path, ways)
    (one,) = plasticity.comparisons(runs, beta=1.0)
    assert one.place["within"] == 1 and one.courses["plain"][0].shape[1] == 4 + 1
    table = plasticity.at_equal_gain(one.courses)
    means = table[["before", "gain", "plain", "projected"]].mean()
    assert means.tolist() == pytest.approx([1.0, 0.4, 0.9, 0.7])
    drawn = plasticity.points([one]).set_index(["kind", "point"])
    assert drawn.loc[("plain", 1), ["gain", "margin"]].tolist() == pytest.approx([0.2, 0.95])
    assert drawn.loc[("plain", 3), ["gain", "margin"]].tolist() == pytest.approx([0.8, 0.2])


def test_a_step_that_one_run_did_not_keep_is_left_out(tmp_path):
    ways = {PLAIN: [(0.95, 0.2), (0.9, 0.4), (0.2, 0.8)], f"{PLAIN}.projected": [(0.2, 0.8)]}
    runs = plant(tmp_path, ways)
    kept = pd.read_parquet(runs[0].within)
    write_table(runs[0].within, kept[kept["step"] != 2])
    table = plasticity.course([run for run in runs if run.chain == PLAIN], "a", beta=1.0)
    assert table[1].mean() == pytest.approx(0.9) and table.shape == (2 * PROMPTS * EACH, 3 + 1)


def test_a_pair_stands_between_its_two_points():
    """Gain 0.3 of 0.4 is three quarters of the way, for each pair; the other kind reaches 0.3 at its end."""
    index = pd.MultiIndex.from_tuples([(0, "p"), (0, "q")], names=["seed", "pair_id"])
    prompts = {"prompt_id": ["x", "y"]}
    old = pd.DataFrame({0: [1.0, 2.0], 1: [0.0, 4.0]} | prompts, index=index)
    new = pd.DataFrame({0: [0.0, 0.0], 1: [0.3, 0.5]} | prompts, index=index)
    less = pd.DataFrame({0: [0.0, 0.0], 1: [0.3, 0.3]} | prompts, index=index)
    table = plasticity.at_equal_gain({"plain": (old, new), "other": (old, less)})
    # 0.25 and 3.5, about their mean at twice the distance, since half of the rows are of the new objective
    assert table["plain"].iloc[:2].tolist() == pytest.approx([1.875 - 3.25, 1.875 + 3.25])
    # the slope is 0.5 / 0.4; pair q gained 0.075 more than the mean there, which moves the place back
    assert table["plain"].iloc[2:].tolist() == pytest.approx([1.875 + 0.1875, 1.875 - 0.1875])
    assert table["other"].mean() == pytest.approx(2.0) and table["gain"].tolist() == pytest.approx([0.3] * 4)


def test_the_interval_holds_the_error_of_the_matching():
    """Brute force: the margin at equal gain over fresh draws of the pairs varies as the bootstrap says."""
    rng = np.random.default_rng(0)

    def world() -> dict[str, plasticity.Course]:
        ids = [f"p{i}" for i in range(60)]
        index = pd.MultiIndex.from_product([[0], ids], names=["seed", "pair_id"])

        def table(*points: float, spread: float, prefix: str) -> pd.DataFrame:
            noise = {k: mean + rng.normal(0, spread * (k > 0), 60) for k, mean in enumerate(points)}
            return pd.DataFrame(noise | {"prompt_id": [prefix + name for name in ids]}, index=index)

        plain = table(1.0, 0.0, spread=0.2, prefix="a"), table(0.0, 1.0, spread=1.0, prefix="b")
        return {"plain": plain, "other": (plain[0], table(0.0, 0.5, spread=0.5, prefix="b"))}

    found, widths = [], []
    for _ in range(100):
        table = plasticity.at_equal_gain(world())
        means = metrics.estimates(table, ["plain"], resamples=100, rng=rng)
        found.append(means[0, 0])
        widths.append(means[1:, 0].std())
    assert np.mean(found) == pytest.approx(0.5, abs=0.03)
    assert np.mean(widths) == pytest.approx(np.std(found), rel=0.2)
    assert np.std(found) > 3 * 0.1 / np.sqrt(60)  # what the earlier objective's pairs alone would give


def test_what_may_be_compared():
    study = ["a", "b", *COMPARED, f"{PLAIN}.ref50", f"{PLAIN}.ref150", f"{PLAIN}.flip50", "c-then-b.ref100"]
    study += [f"{PLAIN}.placebo.ref50", "b-then-a", "a.half-then-b.projected"]
    axes = plasticity.beside(Chain.parse(PLAIN), study)
    assert axes[plasticity.CAUSAL] == dict(zip(["plain", "projected", "placebo"], COMPARED, strict=True))
    assert list(axes[plasticity.REFERENCE].items()) == [
        ("l = 0", PLAIN), ("l = 0.5", f"{PLAIN}.ref50"), ("l = 1.5", f"{PLAIN}.ref150"),
    ]  # fmt: skip
    assert plasticity.beside(Chain.parse("b-then-a"), study) == {}


def test_missing_chains_are_missing_rows(tmp_path):
    runs = plant(tmp_path, {PLAIN: [(0.2, 0.5)], f"{PLAIN}.placebo": [(0.2, 0.5)], "a-then-a": [(0.9, 0.1)]})
    compared = plasticity.comparisons(runs, beta=1.0)
    assert [each.place["axis"] for each in compared] == [plasticity.CAUSAL]
    assert plasticity.opposition(compared, resamples=50).empty  # nothing was projected
    assert len(plasticity.states(compared, resamples=50)) == 2
    for empty in (
        plasticity.points([]),
        plasticity.states([], resamples=50),
        plasticity.direction([], resamples=50),
    ):
        assert empty.empty
    assert "verdict" in plasticity.opposition([], resamples=50)


def test_without_a_placebo_opposition_cannot_be_shown():
    ways = causal((0.2, 0.5), (0.9, 0.5), (0.2, 0.5))
    row = judged({kind: ways[kind] for kind in ("plain", "projected")})
    assert row["verdict"] == plasticity.UNDECIDED and np.isnan(row["beyond"]) and np.isnan(row["beyond_p"])


def test_states_along_the_reference(tmp_path):
    """Ends and margins at equal gain; l = 1 gains half and keeps more at equal gain."""
    ways = {PLAIN: [(0.2, 0.8)], f"{PLAIN}.ref50": [(0.3, 0.8)], f"{PLAIN}.ref100": [(0.9, 0.4)]}
    compared = plasticity.comparisons(plant(tmp_path, ways), beta=1.0)
    table = plasticity.states(compared, resamples=400).set_index("kind")
    assert table["end_margin"].tolist() == pytest.approx([0.2, 0.3, 0.9])
    assert table["end_gain"].tolist() == pytest.approx([0.8, 0.8, 0.4])
    assert table["margin"].tolist() == pytest.approx([0.6, 0.65, 0.9])
    assert table["difference"].tolist() == pytest.approx([0.0, 0.05, 0.3])
    assert set(table["gain"].round(9)) == {0.4} and set(table["axis"]) == {plasticity.REFERENCE}
    assert np.isnan(table.loc["l = 0", "difference_p"]) and table.loc["l = 1", "difference_p"] <= 0.05
    assert table.loc["l = 1", "difference_low"] > 0 and (table["within"] == 0).all()


def test_the_direction_of_projected_steps(tmp_path):
    ways = {text: [(0.2, 0.5)] for text in COMPARED}
    left = dict(zip(COMPARED, (0.5, -0.25, 0.6), strict=True))
    compared = plasticity.comparisons(plant(tmp_path, ways, left=left), beta=1.0)
    table = plasticity.direction(compared, resamples=200).set_index("kind")
    assert table["plain"].tolist() == pytest.approx([0.5, 0.5])
    assert table["change"].to_dict() == pytest.approx({"projected": -0.75, "placebo": 0.1})
    assert table[["split", "n_prompts"]].iloc[0].tolist() == ["probe", 3]
