import re

import altair as alt
import numpy as np
import pandas as pd
import pytest

from seqdpo_utils import charts

OUTSIDE = re.compile(r"""(?:src|href|xlink:href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?https?:|@import""", re.IGNORECASE)


@pytest.fixture(autouse=True)
def static():
    with alt.renderers.enable("default"):
        charts.use_static_charts()
        yield


def matrix() -> pd.DataFrame:
    rows = [
        {"checkpoint": c, "objective": o, "n_pairs": 9, "margin": m, "margin_low": m - 0.1, "margin_high": m + 0.1}
        for c, m in (("base", 0.0), ("stage1", 1.0), ("stage2", -0.5)) for o in ("a", "b")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def conflict_rows() -> pd.DataFrame:
    cosines = {"matched_cosine": [0.1, -0.1], "within_cosine": [0.0, None], "within_new_cosine": [0.2, 0.1]}
    return pd.DataFrame({"step": [1, 4], "stage": 2, "previous_objective": "a"} | cosines)


def bars() -> pd.DataFrame:
    rows = [("0", 0.0, 0.3, "entry"), ("1", 0.3, 0.1, "entry"), ("rest", 0.1, 0.15, "rest"), ("measured", 0.0, 0.15, "measured")]
    return pd.DataFrame(rows, columns=["part", "start", "end", "kind"])


def figures() -> dict[str, alt.TopLevelMixin]:
    steps = pd.DataFrame({"step": [1, 2], "loss": [0.7, 0.6], "rewards/margins": [0.0, 0.2], "rewards/chosen": [0.0, 0.1], "rewards/rejected": [0.0, -0.1]})
    fallen = {f"{side}{bound}": [0.5, -0.5] for side in ("chosen", "rejected") for bound in ("", "_low", "_high")}
    displaced = pd.DataFrame({"objective": "a", "from_checkpoint": "base", "to_checkpoint": ["stage1", "stage2"]} | fallen)
    changes = pd.DataFrame({"before": [0.1, -0.2], "after": [-0.1, -0.2], "reordered": ["lost", "same"]})
    quartiles = pd.DataFrame({"key": "base", "quartile": range(1, 5), "change": 0.1, "change_low": 0.0, "change_high": 0.2})
    moves = {"from_checkpoint": "stage0", "other_to": "stage2"}
    cells = pd.DataFrame(moves | {"space": "weight", "layer": pd.array([0, 1], "Int64"), "module": ["q_proj", "up_proj"], "cosine": [0.2, -0.2]}, index=[0, 1])
    ends = matrix().query("checkpoint != 'base' and objective == 'a'").assign(label="s: a, then b", setting="s", order="a-then-b")
    lengths = pd.DataFrame({"objective": "a", "side": ["chosen", "rejected"], "tokens": [5, 9]})
    return {
        "token_lengths": charts.token_lengths(lengths, objectives=["a"], caption="n = 2."),
        "learning_curves": charts.learning_curves(steps, stage=1, caption="n = 2."),
        "conflict_over_steps": charts.conflict_over_steps(conflict_rows(), band=(-0.05, 0.25), caption="n = 2."),
        "ledger_waterfall": charts.ledger_waterfall(bars(), by="layer", caption="n = 4."),
        "displaced_likelihood": charts.displaced_likelihood(displaced, objectives=["a"], caption="n = 2."),
        "stage_heat_map": charts.stage_heat_map(matrix(), objectives=["a", "b"], caption="n = 9."),
        "margins_by_stage": charts.margins_by_stage(matrix(), objectives=["a", "b"], measure="margin", axis="margin", question="?", caption="n = 9."),
        "pair_scatter": charts.pair_scatter(changes, before="stage 1", after="stage 2", caption="n = 2."),
        "quartile_changes": charts.quartile_changes(quartiles, caption="n = 4."),
        "movement_map": charts.movement_map(cells, caption="n = 2."),
        "retention_overview": charts.retention_overview(ends, caption="n = 9."),
    }


@pytest.mark.parametrize("name", figures())
def test_every_figure_is_a_picture_with_a_text_that_asks_nothing_of_a_network(name):
    chart = figures()[name]
    bundle, metadata = charts.static_bundle(chart.to_dict())
    assert bundle["image/svg+xml"].startswith("<svg") and not OUTSIDE.search(bundle["image/svg+xml"])
    assert metadata["image/svg+xml"]["alt"] == bundle["text/plain"] and "n = " in bundle["text/plain"]
    assert chart.to_dict()["title"]["text"].endswith("?")


def test_the_marks_carry_the_numbers():
    """A figure that draws nothing would pass for a picture: count its marks and read its labels."""
    svg = charts.static_bundle(figures()["stage_heat_map"].to_dict())[0]["image/svg+xml"]
    assert svg.count("+1.00") >= 2 and "0.50" in svg and len(re.findall(r"#[0-9a-f]{6}|rgb\(", svg)) > 4
    assert charts.static_bundle(figures()["pair_scatter"].to_dict())[0]["image/svg+xml"].count('aria-roledescription="circle"') == 2


def test_the_waterfall_has_a_bar_for_every_part_in_the_colour_of_its_direction():
    svg = charts.static_bundle(figures()["ledger_waterfall"].to_dict())[0]["image/svg+xml"]
    assert svg.count('aria-roledescription="bar"') == 4
    assert all(svg.count(colour) >= 2 for colour in (charts.NEGATIVE, charts.POSITIVE, charts.INK))


def test_conflict_shows_what_was_measured_and_the_band_only_where_there_is_one():
    with_band, without = (
        charts.static_bundle(charts.conflict_over_steps(conflict_rows(), band=band, caption="n = 2.").to_dict())[0]["image/svg+xml"]
        for band in ((-0.1, 0.2), (None, None))
    )
    assert with_band.count('aria-roledescription="point"') == without.count('aria-roledescription="point"') == 5
    assert "rect mark container" in with_band and "rect mark container" not in without


def test_a_chart_without_a_text_is_refused():
    with pytest.raises(ValueError, match="description"):
        charts.static_bundle(alt.Chart(pd.DataFrame({"x": [1]})).mark_point().encode(x="x").to_dict())


def test_sentences_say_what_is_missing():
    assert charts.with_interval(0.5, 0.25, 0.75) == "+0.50 (+0.25 to +0.75)"
    assert charts.with_interval(None, None, None) == charts.with_interval(np.nan, 0, 0) == "not measured"
    assert "no interval" in charts.with_interval(0.5, None, None)
    assert charts.percent(0.256) == "26%"


def test_stages_and_objectives_keep_their_colours():
    colours = [figures()[name].to_dict() for name in ("margins_by_stage", "retention_overview")]
    assert charts.OBJECTIVE_COLOURS[0] in str(colours[0]) and charts.STAGE_COLOURS[1] in str(colours[1])


def test_ten_thousand_pairs_are_drawn_from_aggregates_that_lose_none():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 10_000))
    changes = pd.DataFrame({"before": before, "after": after, "reordered": rng.choice(["gained", "same", "lost"], 10_000)})
    lengths = pd.DataFrame({"objective": "a", "side": rng.choice(["chosen", "rejected"], 20_000), "tokens": rng.integers(1, 900, 20_000)})
    for chart, column, total in (
        (charts.pair_scatter(changes, before="stage 1", after="stage 2", caption="n = 10000."), "pairs", 10_000),
        (charts.token_lengths(lengths, objectives=["a"], caption="n = 20000."), "size", 20_000),
    ):
        spec = chart.to_dict()  # Altair refuses more than 5,000 rows here
        assert total in [sum(row.get(column, 0) for row in rows) for rows in spec["datasets"].values()]
        assert charts.static_bundle(spec)[0]["image/svg+xml"].startswith("<svg")


def test_pairs_that_stand_alone_stay_where_they_are():
    changes = pd.DataFrame({"before": [-1.0, 0.3, 2.0], "after": [0.5, -0.7, 1.1], "reordered": ["gained", "lost", "same"]})
    (dots,) = [d for d in charts.pair_scatter(changes, before="a", after="b", caption="n = 3.").to_dict()["datasets"].values() if "pairs" in d[0]]
    assert sorted((d["before"], d["after"], d["pairs"]) for d in dots) == [(-1.0, 0.5, 1), (0.3, -0.7, 1), (2.0, 1.1, 1)]
