import re

import altair as alt
import numpy as np
import pandas as pd
import pytest

from seqdpo_utils import charts
from seqdpo_utils.chains import AGAIN, SHUFFLED, Chain

FETCHED = r"""(?:src|href|xlink:href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?https?:|@import"""
OUTSIDE = re.compile(FETCHED, re.IGNORECASE)
CHAIN = Chain.parse("a-then-b.shuffled")
LABELS = CHAIN.labels


@pytest.fixture(autouse=True)
def static():
    with alt.renderers.enable("default"):
        charts.use_static_charts()
        yield


def svg_of(chart: alt.TopLevelMixin) -> str:
    return charts.static_bundle(chart.to_dict())[0]["image/svg+xml"]


def matrix() -> pd.DataFrame:
    rows = [
        (checkpoint, objective, 9, margin, margin - 0.1, margin + 0.1)
        for checkpoint, margin in zip(CHAIN.checkpoints, (0.0, 1.0, -0.5), strict=True)
        for objective in ("a", "b")
    ]
    columns = ["checkpoint", "objective", "n_pairs", "margin", "margin_low", "margin_high"]
    return pd.DataFrame(rows, columns=columns)


def conflict_rows() -> pd.DataFrame:
    cosines = {"matched_cosine": [0.1, -0.1], "within_cosine": [0.0, None], "within_new_cosine": [0.2, 0.1]}
    return pd.DataFrame({"step": [1, 4], "stage": 2, "previous_objective": "a", "split": "probe"} | cosines)


def bars() -> pd.DataFrame:
    rows = [("0", 0.0, 0.3, "entry"), ("1", 0.3, 0.1, "entry")]
    rows += [("rest", 0.1, 0.15, "rest"), ("measured", 0.0, 0.15, "measured")]
    return pd.DataFrame(rows, columns=["part", "start", "end", "kind"])


def history() -> pd.DataFrame:
    rewards = {"rewards/margins": [0.0, 0.2], "rewards/chosen": [0.0, 0.1], "rewards/rejected": [0.0, -0.1]}
    return pd.DataFrame({"step": [1, 2], "loss": [0.7, 0.6]} | rewards)


def displaced() -> pd.DataFrame:
    sides = {f"{side}{end}": [0.5, -0.5] for side in ("chosen", "rejected") for end in ("", "_low", "_high")}
    ends = {"from_checkpoint": "base", "to_checkpoint": CHAIN.checkpoints[1:]}
    return pd.DataFrame({"objective": "a"} | ends | sides)


def moves() -> pd.DataFrame:
    ends = {"from_checkpoint": "base", "other_to": str(CHAIN), "space": "weight"}
    layer, module = pd.array([0, 1, None], "Int64"), ["q_proj", "up_proj", None]
    return pd.DataFrame(ends | {"layer": layer, "module": module, "cosine": [0.2, -0.2, 0.9]})


def after_each_stage(stages: int) -> pd.DataFrame:
    after = [f"stage {k}" for k in range(1, stages + 1)]
    return pd.DataFrame(
        {"label": "s: a", "after": after, "margin": 1.0, "margin_low": 0.5, "margin_high": 2.0}
    )


def changes() -> pd.DataFrame:
    margins = {"margin_before": [0.5, -0.25], "margin_after": [-0.5, -0.25], "crossed": ["both", "neither"]}
    ends = {"before": [0.1, -0.2], "after": [-0.1, -0.2], "change": [-0.2, 0.0], "objective": "b"}
    return pd.DataFrame(ends | {"reordered": ["lost", "same"]} | margins)


def lines() -> pd.DataFrame:
    means = {"learned": [-0.25, 0.5], "kept": [-0.3, 0.1], "kept_low": [-0.4, 0.0], "kept_high": [-0.2, 0.2]}
    return pd.DataFrame(means | {"objective": "b", "control": ""})


def quartiles() -> pd.DataFrame:
    means = {"change": 0.1, "change_low": 0.0, "change_high": 0.2, "regression": -0.1}
    rows = {"key": ["base"] * 4 + ["stage1_margin"] * 4, "quartile": [*range(1, 5)] * 2}
    rows |= {"measure": ["policy_margin"] * 4 + ["margin"] * 4}
    return pd.DataFrame({"objective": "a"} | rows | means)


def figures() -> dict[str, alt.TopLevelMixin]:
    lengths = pd.DataFrame({"objective": "a", "side": ["chosen", "rejected"], "tokens": [5, 9]})
    both = {"objectives": ["a", "b"], "labels": LABELS, "caption": "n = 9."}
    asked = {"measure": "margin", "axis": "margin", "question": "?"}
    one = {"objectives": ["a"], "labels": LABELS, "caption": "n = 2."}
    two = {"before": "1 a", "after": "2 b", "caption": "n = 2."}
    return {
        "token_lengths": charts.token_lengths(lengths, objectives=["a"], caption="n = 2."),
        "learning_curves": charts.learning_curves(history(), stage=1, pairs=2, seed=0),
        "conflict_over_steps": charts.conflict_over_steps(conflict_rows(), caption="n = 2."),
        "ledger_waterfall": charts.ledger_waterfall(bars(), by="layer", caption="n = 4."),
        "displaced_likelihood": charts.displaced_likelihood(displaced(), **one),
        "stage_heat_map": charts.stage_heat_map(matrix(), **both),
        "margins_by_stage": charts.margins_by_stage(matrix(), **both, **asked),
        "pair_scatter": charts.pair_scatter(changes(), **two),
        "two_margins": charts.two_margins(changes(), at="2 b", caption="n = 2."),
        "kept_of_learned": charts.kept_of_learned(changes(), lines(), objectives=["a", "b"], **two),
        "quartile_changes": charts.quartile_changes(quartiles(), caption="n = 4."),
        "movement_map": charts.movement_map(moves(), caption="n = 2."),
        "retention_overview": charts.retention_overview(after_each_stage(2), caption="n = 9."),
    }


@pytest.mark.parametrize("name", figures())
def test_every_figure_is_a_picture_with_a_text_that_asks_nothing_of_a_network(name):
    chart = figures()[name]
    bundle, metadata = charts.static_bundle(chart.to_dict())
    assert bundle["image/svg+xml"].startswith("<svg") and not OUTSIDE.search(bundle["image/svg+xml"])
    assert metadata["image/svg+xml"]["alt"] == bundle["text/plain"]
    assert re.search(r"n = \d|2 pairs", bundle["text/plain"])
    assert chart.to_dict()["title"]["text"].endswith("?")


def test_the_marks_carry_the_numbers():
    """A figure that draws nothing would pass for a picture: count its marks and read its labels."""
    svg = svg_of(figures()["stage_heat_map"])
    assert svg.count("+1.00") >= 2 and "0.50" in svg and len(re.findall(r"#[0-9a-f]{6}|rgb\(", svg)) > 4
    for name in ("pair_scatter", "two_margins", "kept_of_learned"):
        assert svg_of(figures()[name]).count('aria-roledescription="circle"') == 2
    kept = svg_of(figures()["kept_of_learned"])
    assert charts.OBJECTIVE_COLOURS[1] in kept and charts.OBJECTIVE_COLOURS[0] not in kept
    assert kept.count('aria-roledescription="area mark"') == 1
    assert kept.count('aria-roledescription="line mark"') == 2  # the fit, and the diagonal


def test_quartiles_of_two_measures_have_axes_of_their_own_and_the_bound_of_regression():
    svg = svg_of(figures()["quartile_changes"])
    assert "change of DPO margin" in svg and "change of policy margin per token" in svg
    assert svg.count('aria-roledescription="tick"') == 8


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("displaced_likelihood", 4),
        ("margins_by_stage", 6),
        ("quartile_changes", 8),
        ("retention_overview", 2),
    ],
)
def test_every_interval_has_its_point_its_rule_and_a_zero_to_be_read_against(name, points):
    svg = svg_of(figures()[name])
    assert svg.count('aria-roledescription="point"') == points
    assert svg.count('aria-roledescription="rule mark"') == points
    assert 'stroke-dasharray="4,3"' in svg


@pytest.mark.parametrize("name", ["stage_heat_map", "margins_by_stage", "displaced_likelihood"])
def test_checkpoints_bear_their_labels_and_an_unknown_one_is_refused(name):
    svg = svg_of(figures()[name])
    assert "2 b.shuffled" in svg and str(CHAIN) not in svg
    with pytest.raises(KeyError, match="shuffled"):
        charts.stage_heat_map(matrix(), objectives=["a"], labels={"base": "base", "a": "1 a"}, caption="")


def test_the_learning_curves_say_what_they_are_of():
    description = charts.learning_curves(history(), stage=2, pairs=30, seed=7).to_dict()["description"]
    assert "30 pairs, 2 steps, seed 7; mean training margin of the last 2 steps +0.10" in description


def test_the_waterfall_has_a_bar_for_every_part_in_the_colour_of_its_direction():
    svg = svg_of(figures()["ledger_waterfall"])
    assert svg.count('aria-roledescription="bar"') == 4
    assert all(svg.count(colour) >= 2 for colour in (charts.NEGATIVE, charts.POSITIVE, charts.INK))


def test_conflict_shows_what_was_measured_and_no_band():
    drawn = svg_of(charts.conflict_over_steps(conflict_rows(), caption="n = 2."))
    assert drawn.count('aria-roledescription="point"') == 5 and "rect mark container" not in drawn
    assert drawn.count('aria-roledescription="line mark"') == 1  # between the objectives only
    charts.conflict_over_steps(conflict_rows().head(0), caption="nothing").to_dict()


def test_the_movement_map_has_a_cell_a_matrix_and_no_other():
    assert svg_of(figures()["movement_map"]).count('aria-roledescription="rect mark"') == 2
    both = svg_of(charts.movement_map(ghosted(moves(), moves()), caption="n = 2."))
    assert both.count('aria-roledescription="rect mark"') == 4 and "this chain" in both and SHUFFLED in both


def ghosted(own: pd.DataFrame, *controls: pd.DataFrame) -> pd.DataFrame:
    """A chain's rows, and below them those of controls."""
    parts = [
        part.assign(control=kind) for part, kind in zip((own, *controls), ("", SHUFFLED, AGAIN), strict=False)
    ]
    return pd.concat(parts, ignore_index=True)


def parts_of_a_ledger() -> pd.DataFrame:
    bounds = {
        f"{part}{end}": 0.5 for part in ("left", "curvature", "measured") for end in ("", "_low", "_high")
    }
    return pd.DataFrame({"split": ["train", "probe"]} | bounds)


def test_controls_stand_beside_the_chain_in_grey():
    """A point and a rule each, in a grey that nothing else of the figure has, and named in the legend."""
    end = matrix().tail(2)
    asked = {"measure": "margin", "axis": "margin", "question": "?"}
    both = {"objectives": ["a", "b"], "labels": LABELS, "caption": "n = 9."}
    overview = pd.concat([after_each_stage(2), after_each_stage(2).assign(after=[SHUFFLED, AGAIN])])
    drawn = {
        6 + 4: charts.margins_by_stage(ghosted(matrix(), end, end), **both, **asked),
        4 + 4: charts.displaced_likelihood(ghosted(displaced(), *[displaced().tail(1)] * 2), **both),
        6 * 3: charts.ledger_parts(ghosted(*[parts_of_a_ledger()] * 3), caption="n = 4."),
        2 + 2: charts.retention_overview(overview, caption="n = 9."),
    }
    for points, chart in drawn.items():
        svg = svg_of(chart)
        assert svg.count('aria-roledescription="point"') == points
        assert svg.count('aria-roledescription="rule mark"') == points
        assert SHUFFLED in svg and AGAIN in svg
        greys = [svg.count(f'stroke="{grey}" stroke-width="2"') for grey in charts.GHOSTS.values()]
        assert greys[0] == greys[1] > 0
    assert "training pairs" in svg_of(drawn[18]) and "direction" in svg_of(drawn[18])


def test_controls_have_a_line_among_the_cosines_and_a_bar_in_the_waterfall():
    drawn = svg_of(charts.conflict_over_steps(ghosted(*[conflict_rows()] * 3), caption="n = 2."))
    assert drawn.count('aria-roledescription="line mark"') == 3 and AGAIN in drawn
    assert (
        drawn.count('aria-roledescription="point"') == 5
    )  # what is within an objective is the chain's alone
    extra = pd.DataFrame([(SHUFFLED, 0.0, 0.2, "control")], columns=list(bars()))
    fall = svg_of(charts.ledger_waterfall(pd.concat([bars(), extra]), by="layer", caption="n = 4."))
    assert fall.count('aria-roledescription="bar"') == 5 and charts.GREY in fall and SHUFFLED in fall


def test_pairs_of_controls_are_grey_rings_behind_those_of_the_chain():
    both = ghosted(*[changes()] * 3)
    scatter = charts.pair_scatter(both, before="1 a", after="2 b", caption="n = 2.")
    for chart in (scatter, charts.two_margins(both, at="2 b", caption="n = 2.")):
        svg = svg_of(chart)
        dot, ring = (f'aria-roledescription="{kind}"' for kind in ("circle", "point"))
        assert svg.count(dot) == 2 and svg.count(ring) == 4 and svg.index(ring) < svg.index(dot)
        assert all(kind in svg and f'stroke="{grey}"' in svg for kind, grey in charts.GHOSTS.items())
    assert not any(kind in svg_of(figures()["pair_scatter"]) for kind in charts.GHOSTS)


def test_a_chart_without_a_text_is_refused():
    with pytest.raises(ValueError, match="description"):
        charts.static_bundle(alt.Chart(pd.DataFrame({"x": [1]})).mark_point().encode(x="x").to_dict())


def test_sentences_say_what_is_missing():
    assert charts.with_interval(0.5, 0.25, 0.75) == "+0.50 (+0.25 to +0.75)"
    assert charts.with_interval(None, None, None) == charts.with_interval(np.nan, 0, 0) == "not measured"
    assert charts.with_interval(pd.NA, pd.NA, pd.NA) == "not measured"
    assert "no interval" in charts.with_interval(0.5, None, None)
    assert charts.percent(0.256) == "26%"


def test_a_number_keeps_the_side_of_zero_that_it_is_on():
    assert charts.with_interval(0.016, 0.003, 0.029) == "+0.016 (+0.003 to +0.029)"
    assert charts.with_interval(-0.5, -0.7, 0.0) == "-0.50 (-0.70 to +0.00)"
    assert charts.with_interval(-1e-9, -0.7, 0.5) == "+0.0000 (-0.7000 to +0.5000)"


def test_counts_read_well_when_there_is_one():
    assert charts.span(pd.Series([32, 32])) == "32" and charts.span(pd.Series([30, 32, 31])) == "30 to 32"
    assert charts.span(pd.Series([-2.5, 10.0]), form="+.1f") == "-2.5 to +10.0"
    assert charts.span(pd.Series([77.6, 78.4]), form=".0f") == "78"
    assert charts.counted(pd.Series(["stable"]), "seed") == "stable in the only seed"
    assert charts.counted(pd.Series(list("aba")), "chain") == "a: 2 of 3 chains; b: 1 of 3 chains"


def test_a_table_shows_numbers_without_a_negative_zero_and_gaps_as_such():
    table = pd.DataFrame({"name": ["x", None], "n": [3, 4], "plain": [-0.0001, 0.5], "gap": [0.25, None]})
    html = charts.show(table.astype({"gap": "Float64"}), digits=2, missing="none").to_html()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    assert cells == ["x", "3", "0.00", "0.25", "none", "4", "0.50", "none"]


def test_stages_and_objectives_keep_their_colours():
    options = {"objectives": ["a", "b"], "labels": LABELS, "measure": "margin", "axis": "margin"}
    for place, objective in enumerate(options["objectives"]):
        part = matrix()[matrix()["objective"] == objective]
        svg = svg_of(charts.margins_by_stage(part, **options, question="?", caption="n = 9."))
        rule = 'stroke="{}" stroke-width="2"'
        assert rule.format(charts.OBJECTIVE_COLOURS[place]) in svg
        assert rule.format(charts.OBJECTIVE_COLOURS[1 - place]) not in svg
    curves = [charts.learning_curves(history(), stage=k, pairs=2, seed=0) for k in (1, 2)]
    assert [charts.STAGE_COLOURS[k] in str(chart.to_dict()) for k, chart in enumerate(curves, 1)] == [
        True,
        True,
    ]
    overview = str(charts.retention_overview(after_each_stage(3), caption="n = 9.").to_dict())
    assert all(colour in overview for colour in charts.STAGE_COLOURS[1:4])


def test_a_chain_longer_than_the_palette_begins_again_without_the_colour_of_the_base():
    stages = len(charts.STAGE_COLOURS) + 1
    colours = charts.retention_overview(after_each_stage(stages), caption="n = 9.").to_dict()
    (scale,) = {str(found) for found in re.findall(r"'range': (\[.*?\])", str(colours))}
    assert scale.count("#") == stages and charts.GREY not in scale


def test_ten_thousand_pairs_are_drawn_from_aggregates_that_lose_none():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 10_000))
    reordered = rng.choice(["gained", "same", "lost"], 10_000)
    many = pd.DataFrame({"before": before, "change": after, "reordered": reordered})
    sides, tokens = rng.choice(["chosen", "rejected"], 20_000), rng.integers(1, 900, 20_000)
    lengths = pd.DataFrame({"objective": "a", "side": sides, "tokens": tokens})
    scatter = charts.pair_scatter(many, before="1 a", after="2 b", caption="n = 10000.")
    histogram = charts.token_lengths(lengths, objectives=["a"], caption="n = 20000.")
    for chart, column, total in ((scatter, "pairs", 10_000), (histogram, "size", 20_000)):
        spec = chart.to_dict()  # Altair refuses more than 5,000 rows here
        assert total in [sum(row.get(column, 0) for row in rows) for rows in spec["datasets"].values()]
        assert charts.static_bundle(spec)[0]["image/svg+xml"].startswith("<svg")


def test_pairs_that_stand_alone_stay_where_they_are():
    ends = {"before": [-1.0, 0.3, 2.0], "change": [0.5, -0.7, 1.1]}
    table = pd.DataFrame(ends | {"reordered": ["gained", "lost", "same"]})
    spec = charts.pair_scatter(table, before="a", after="b", caption="n = 3.").to_dict()
    (dots,) = [rows for rows in spec["datasets"].values() if "pairs" in rows[0]]
    found = sorted((dot["before"], dot["change"], dot["pairs"]) for dot in dots)
    assert found == [(-1.0, 0.5, 1), (0.3, -0.7, 1), (2.0, 1.1, 1)]
