"""Figures as pure functions, DataFrame in, Altair chart out, and the sentence beside them.

A stage and an objective keep their colour everywhere. Every chart carries a description for those who cannot
see it. Tables name checkpoints by their chains; figures show the chain's short `labels`.
"""

import base64
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from IPython.display import Markdown
from pandas.io.formats.style import Styler

Figure = alt.TopLevelMixin
Names = Sequence[str]
Labels = Mapping[str, str]
"""Checkpoint to its name in figures: `Chain.labels`."""
INK, GREY, PALE = "#263238", "#78909c", "#b0bec5"
STAGE_COLOURS = [GREY, "#1565c0", "#ef6c00", "#2e7d32", "#6a1b9a", "#6d4c41", "#00838f", "#c2185b", "#9e9d24"]
"""The base, then stage 1, stage 2, ...; a chain that is longer begins again with stage 1's."""
OBJECTIVE_COLOURS = ["#00796b", "#ad1457", "#5d4037", "#455a64", "#827717"]
NEGATIVE, POSITIVE = "#c62828", "#1565c0"
SIDES = {"chosen": POSITIVE, "rejected": NEGATIVE}
WIDTH = 520
HISTOGRAM_BINS, SCATTER_CELLS = 25, 36
"""Charts are drawn from aggregates, so that ten thousand pairs cost what a hundred do."""


def say(text: str) -> Markdown:
    """A computed sentence as Markdown: the numbers in it come from the run, never from typing."""
    return Markdown(text)


def show(table: pd.DataFrame, *, digits: int = 3, missing: str = "–") -> Styler:
    """A table without its index, numbers rounded to `digits` (never to "-0.000"), gaps as `missing`."""
    numbers = table.select_dtypes("floating").columns
    style = table.style.hide(axis="index").format(na_rep=missing)
    return style.format(f"{{:z.{digits}f}}", subset=numbers, na_rep=missing)


def percent(value: float) -> str:
    """A share as whole percent."""
    return f"{value:.0%}"


def span(values: pd.Series, *, form: str = "") -> str:
    """Smallest to largest of some numbers, or the one that they all are. `form`: as for `format`."""
    low, high = format(values.min(), form), format(values.max(), form)
    return low if low == high else f"{low} to {high}"


def counted(values: pd.Series, of: str) -> str:
    """How often each value stands in a column: "stable: 2 of 3 chains; undecided: 1 of 3 chains"."""
    if len(values) == 1:
        return f"{values.iloc[0]} in the only {of}"
    return "; ".join(f"{name}: {n} of {len(values)} {of}s" for name, n in values.value_counts().items())


def with_interval(value: float | None, low: float | None, high: float | None, *, digits: int = 2) -> str:
    """A number with its interval, or what is missing, for a sentence.

    It has more digits (at most four) where a bound would otherwise be rounded to zero and hide its side.
    """
    if pd.isna(value):
        return "not measured"
    while digits < 4 and any(x and not round(x, digits) for x in (value, low, high) if not pd.isna(x)):
        digits += 1
    if pd.isna(low):
        return f"{value:+z.{digits}f} (no interval: too few measurements)"
    return f"{value:+z.{digits}f} ({low:+z.{digits}f} to {high:+z.{digits}f})"


def static_bundle(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Vega-Lite chart as SVG, as PNG of double density and as text, none of which needs a network.

    Raises:
        ValueError: when the chart has no description to serve as alternative text.
    """
    description = spec.get("description")
    if not description:
        raise ValueError("a chart needs a description: its text for readers who cannot see it")
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    svg = vl_convert.vegalite_to_svg(spec, vl_version=version)
    png = vl_convert.vegalite_to_png(spec, vl_version=version, scale=2)
    half = int.from_bytes(png[16:20], "big") // 2  # the width stands in the PNG's header
    bundle = {"image/svg+xml": svg, "image/png": base64.b64encode(png).decode(), "text/plain": description}
    return bundle, {"image/svg+xml": {"alt": description}, "image/png": {"alt": description, "width": half}}


def use_static_charts() -> None:
    """Show charts as pictures that survive offline, in a common style."""
    alt.renderers.register("study", static_bundle)
    alt.renderers.enable("study")
    alt.theme.register("study", enable=True)(_theme)


def _theme() -> dict[str, Any]:
    text = {"labelFontSize": 12, "titleFontSize": 12, "labelColor": INK, "titleColor": INK}
    title = {"anchor": "start", "fontSize": 14, "color": INK, "offset": 10}
    title |= {"subtitleFontSize": 12, "subtitleColor": "#546e7a"}
    style = {"background": "white", "font": "DejaVu Sans, Helvetica, Arial, sans-serif", "title": title}
    style |= {"view": {"stroke": None}, "legend": text, "header": text}
    return {"config": style | {"axis": text | {"gridColor": "#eceff1"}}}


def _finish(chart: Any, question: str, caption: str, *, shows: str, size: tuple | None = None) -> Figure:
    """The chart with its question as title, the caption below, and a description of both."""
    sized = chart.properties(width=size[0], height=size[1]) if size else chart
    title = alt.TitleParams(question, subtitle=textwrap.wrap(caption, 84))
    return sized.properties(title=title, description=f"{shows} {caption}")


def _colour(field: str, names: Labels, *, title: str | None = None, legend: str | None = "right") -> Any:
    """Every name of a column in its own colour; `legend`: where it stands, None for none."""
    scale = alt.Scale(domain=list(names), range=list(names.values()))
    shown = alt.Legend(orient=legend, labelLimit=300) if legend else None
    return alt.Color(f"{field}:N", scale=scale, title=title, legend=shown)


def _centred(field: str, values: pd.Series) -> alt.Color:
    """Red below zero, blue above, pale at zero."""
    bound = max(values.abs().max(), 1e-9)
    scale = alt.Scale(scheme="redblue", domain=[-bound, bound], domainMid=0)
    return alt.Color(f"{field}:Q", scale=scale, title=field)


def _stage_colour(stage: int) -> str:
    """Colour of stage 1, 2, ..."""
    return STAGE_COLOURS[1 + (stage - 1) % (len(STAGE_COLOURS) - 1)]


def _by_checkpoint(table: pd.DataFrame, labels: Labels) -> tuple[alt.Chart, int]:
    """A chart of the table by checkpoint, in the order of its rows, and a width that fits the labels."""
    named = table.assign(checkpoint=[labels[name] for name in table["checkpoint"]])
    axis = alt.Axis(labelAngle=0, labelLimit=128)
    x = alt.X("checkpoint:N", sort=None, title="checkpoint", axis=axis)
    return alt.Chart(named).encode(x=x), max(220, 130 * named["checkpoint"].nunique())


def _steps(title: str) -> alt.X:
    return alt.X("step:Q", axis=alt.Axis(tickMinStep=1), title=title)


def _zero(axis: str, data: Any = None) -> alt.Chart:
    """A dashed line at zero; the layers of a facet must share their `data`."""
    drawn = alt.Chart(pd.DataFrame({"zero": [0.0]}) if data is None else data)
    return drawn.mark_rule(color=GREY, strokeDash=[4, 3]).encode(**{axis: alt.datum(0)})


def _intervals(base: alt.Chart, measure: str, *, title: str, axis: str = "y") -> alt.LayerChart:
    """Points of a measure, rules over `<measure>_low` to `<measure>_high`, and zero, along an axis."""
    at = alt.X if axis == "x" else alt.Y
    low, high = at(f"{measure}_low:Q", title=title), f"{measure}_high:Q"
    rules = base.mark_rule(strokeWidth=2).encode(**{axis: low, f"{axis}2": high})
    points = base.mark_point(filled=True, size=75, opacity=1).encode(**{axis: at(f"{measure}:Q")})
    return alt.layer(_zero(axis, base.data), rules, points)


def token_lengths(lengths: pd.DataFrame, *, objectives: Names, caption: str) -> Figure:
    """Histogram of completion lengths, a colour a side and a panel an objective.

    Args:
        lengths: `objective`, `side` ("chosen", "rejected"), `tokens`.
        objectives: in the order of the panels.
        caption: what the figures say.
    """
    width = max(1, -(-int(lengths["tokens"].max()) // HISTOGRAM_BINS))
    start = lengths["tokens"] // width * width
    bins = lengths.assign(start=start, end=start + width)
    bars = alt.Chart(bins.groupby(["objective", "side", "start", "end"], as_index=False).size())
    chart = bars.mark_bar(opacity=0.55).encode(
        x=alt.X("start:Q", bin="binned", title="completion tokens"),
        x2="end:Q",
        y=alt.Y("size:Q", stack=None, title="completions"),
        color=_colour("side", SIDES),
        column=alt.Column("objective:N", sort=list(objectives), title=None),
    )
    question, shows = "Does length give the preferred answer away?", "Histograms of the lengths of answers."
    return _finish(chart, question, caption, shows=shows, size=(240, 180))


def learning_curves(history: pd.DataFrame, *, stage: int, pairs: int, seed: int) -> Figure:
    """Loss, margin and what chosen and rejected answers gained over the base, by step, from the log.

    Args:
        history: `step`, `loss`, `rewards/margins`, `rewards/chosen`, `rewards/rejected`.
        stage: 1, 2, ...
        pairs: how many the stage trained on.
        seed: of the run.
    """
    names = {f"rewards/{side}": side for side in SIDES} | {"rewards/margins": "margin"}
    found = history.rename(columns=names)
    colours = SIDES | dict.fromkeys(("loss", "margin"), _stage_colour(stage))
    parts = {"loss (nats)": ["loss"], "margin": ["margin"], "β × log-probability gained": list(SIDES)}
    panels = []
    for title, curves in parts.items():
        line = alt.Chart(found.melt("step", curves, var_name="what")).mark_line(point=True)
        own, legend = {name: colours[name] for name in curves}, "bottom" if len(curves) > 1 else None
        y = alt.Y("value:Q", scale=alt.Scale(zero=False), title=title)
        drawn = line.encode(x=_steps("optimiser step"), y=y, color=_colour("what", own, legend=legend))
        panels.append(drawn.properties(width=205, height=170))
    chart = alt.hconcat(*panels).resolve_scale(color="independent")
    late = history["rewards/margins"].tail(3)
    caption = f"{pairs} pairs, {len(history)} steps, seed {seed}; "
    caption += f"mean training margin of the last {len(late)} steps {late.mean():+.2f}."
    shows = f"Loss, margin and log-probability gained over the base at each step of stage {stage}."
    return _finish(chart, f"Does stage {stage} learn its objective?", caption, shows=shows)


def conflict_over_steps(conflict: pd.DataFrame, *, caption: str) -> Figure:
    """Cosine of new against old halves at each measured step, beside what halves of one objective give.

    Args:
        conflict: rows of `conflict.CONFLICT_COLUMNS`.
        caption: what the measurements say; an interval of a mean is no band for points and belongs here.
    """
    names = {"matched_cosine": "new against old objective", "within_cosine": "old objective against itself"}
    names |= {"within_new_cosine": "new objective against itself"}
    keys = ["step", "stage", "previous_objective"]
    long = conflict.rename(columns=names).melt(keys, list(names.values()), var_name="kind")
    long = long.astype({"value": float}).dropna(subset=["value"])
    reach = alt.Scale(domainMin=min(-0.3, long["value"].min()), domainMax=max(0.3, long["value"].max()))
    colours = dict(zip(names.values(), (STAGE_COLOURS[2], GREY, PALE), strict=True))
    base = alt.Chart(long).encode(
        x=_steps("optimiser step of the later stage"),
        y=alt.Y("value:Q", scale=reach, title="cosine of gradients of half batches"),
        color=_colour("kind", colours, legend="bottom"),
        detail=["stage:N", "previous_objective:N"],
    )
    across = base.transform_filter(alt.datum.kind == names["matched_cosine"]).mark_line()
    chart = _zero("y") + across + base.mark_point(filled=True, size=50, opacity=1)
    shows = "Cosine of the two gradients at each measured step; in grey those within an objective."
    question, size = "Do the gradients oppose each other?", (WIDTH, 230)
    return _finish(chart, question, caption, shows=shows, size=size)


def ledger_waterfall(bars: pd.DataFrame, *, by: str, caption: str) -> Figure:
    """Bars from zero to the measured change of the earlier objective's loss.

    Args:
        bars: from `ledger.waterfall`.
        by: what a bar stands for.
        caption: what the ledger says.
    """
    kinds = {"raised the loss": NEGATIVE, "lowered the loss": POSITIVE, "rest": PALE, "measured": INK}
    raised = (bars["end"] >= bars["start"]).map({True: "raised the loss", False: "lowered the loss"})
    drawn = alt.Chart(bars.assign(kind=bars["kind"].where(bars["kind"] != "entry", raised)))
    chart = drawn.mark_bar().encode(
        x=alt.X("part:N", sort=None, title=by, axis=alt.Axis(labelAngle=0 if len(bars) < 12 else -90)),
        y=alt.Y("start:Q", title="change of the earlier loss (nats)"),
        y2="end:Q",
        color=_colour("kind", kinds, legend="bottom"),
    )
    question = f"Which {by.partition(' ')[0]} changed the earlier objective's loss?"
    shows = f"Waterfall of the ledger's entries by {by}, then the rest and the measured change."
    return _finish(_zero("y") + chart, question, caption, shows=shows, size=(WIDTH, 210))


def displaced_likelihood(table: pd.DataFrame, *, objectives: Names, labels: Labels, caption: str) -> Figure:
    """What chosen and rejected answers gained over the base at each checkpoint, a panel an objective.

    Args:
        table: rows of `rivals.displacement` that begin at the base.
        objectives: in the order of the panels.
        labels: of the checkpoints.
        caption: what the figures say.
    """
    ends = table.rename(columns={"to_checkpoint": "checkpoint"})
    columns = {side: {f"{side}{end}": f"change{end}" for end in ("", "_low", "_high")} for side in SIDES}
    parts = [ends.rename(columns=columns[side]).assign(side=side) for side in SIDES]
    kept = ["objective", "checkpoint", "side", "change", "change_low", "change_high"]
    base, width = _by_checkpoint(pd.concat([part[kept] for part in parts]), labels)
    shift = alt.XOffset("side:N", scale=alt.Scale(paddingOuter=0.42))
    base = base.encode(xOffset=shift, color=_colour("side", SIDES))
    panel = _intervals(base, "change", title="change of summed log-probability (nats)")
    names = alt.Column("objective:N", sort=list(objectives), title=None)
    chart = panel.properties(width=width, height=200).facet(column=names)
    shows = "Change of the log-probability of chosen and of rejected answers against the base."
    return _finish(chart, "Did the chosen answer lose, or the rejected one gain?", caption, shows=shows)


def stage_heat_map(matrix: pd.DataFrame, *, objectives: Names, labels: Labels, caption: str) -> Figure:
    """Mean margin of every objective at every checkpoint, centred on zero, with the number in each cell."""
    base, width = _by_checkpoint(matrix[["checkpoint", "objective", "margin"]], labels)
    axis = alt.Axis(labelLimit=200)
    base = base.encode(y=alt.Y("objective:N", sort=list(objectives), title="held-out pairs of", axis=axis))
    strong = f"abs(datum.margin) > {0.6 * matrix['margin'].abs().max()}"
    ink = alt.condition(strong, alt.value("white"), alt.value(INK))
    numbers = base.mark_text(fontSize=13).encode(text=alt.Text("margin:Q", format="+.2f"), color=ink)
    chart = base.mark_rect().encode(color=_centred("margin", matrix["margin"])) + numbers
    shows = "Heat map of the mean DPO-relative margin by checkpoint and objective."
    question, size = "What does each stage do to each objective?", (width, 60 * len(objectives))
    return _finish(chart, question, caption, shows=shows, size=size)


def margins_by_stage(
    matrix: pd.DataFrame,
    *,
    objectives: Names,
    labels: Labels,
    measure: str,
    axis: str,
    question: str,
    caption: str,
) -> Figure:
    """One measure with its interval at each checkpoint, a colour an objective.

    Args:
        matrix: `checkpoint`, `objective`, the measure and its bounds (`<measure>_low`, `<measure>_high`).
        objectives: of the setting: the place of each decides its colour.
        labels: of the checkpoints.
        measure, axis: the column, and what the axis calls it.
        question, caption: title of the chart, and what it says.
    """
    colours = {name: OBJECTIVE_COLOURS[k % len(OBJECTIVE_COLOURS)] for k, name in enumerate(objectives)}
    base, width = _by_checkpoint(matrix.dropna(subset=[measure]), labels)
    shift = alt.XOffset("objective:N", sort=list(objectives), scale=alt.Scale(paddingOuter=0.42))
    base = base.encode(xOffset=shift, color=_colour("objective", colours, title="objective"))
    chart, shows = _intervals(base, measure, title=axis), f"{axis} of held-out pairs, with 95 % intervals."
    return _finish(chart, question, caption, shows=shows, size=(width, 240))


def pair_scatter(changes: pd.DataFrame, *, before: str, after: str, caption: str) -> Figure:
    """Policy margin before and after, close pairs as one larger dot; on the diagonal nothing changed."""
    ends = changes[["before", "after"]]
    low, high = float(ends.min().min()), float(ends.max().max())
    cells = ((ends - low) / max(high - low, 1e-12) * SCATTER_CELLS).astype(int).add_suffix(" cell")
    groups = changes.assign(pairs=1).join(cells).groupby([*cells, "reordered"])
    dots = groups.agg({"before": "mean", "after": "mean", "pairs": "sum"}).reset_index()
    most = int(dots["pairs"].max())
    sizes = alt.Scale(type="sqrt", range=[45, 400], domain=[1, max(10, most)])
    legend = alt.Legend() if most > 1 else None
    names = {"gained": POSITIVE, "same": PALE, "lost": NEGATIVE}
    circles = alt.Chart(dots.drop(columns=list(cells))).mark_circle(opacity=0.85)
    points = circles.encode(
        size=alt.Size("pairs:Q", scale=sizes, title="pairs in a dot", legend=legend),
        x=alt.X("before:Q", title=f"policy margin at {before} (nats per token)"),
        y=alt.Y("after:Q", title=f"policy margin at {after} (nats per token)"),
        color=_colour("reordered", names, title="order of answers"),
    )
    corners = alt.Chart(pd.DataFrame({"x": [low, high]}))
    diagonal = corners.mark_line(color=GREY, strokeDash=[2, 2]).encode(x="x:Q", y="x:Q")
    chart, size = _zero("x") + _zero("y") + diagonal + points, (360, 320)
    shows = "Scatter plot of each held-out pair's policy margin at two checkpoints."
    return _finish(chart, "Which pairs moved?", caption, shows=shows, size=size)


def quartile_changes(table: pd.DataFrame, *, caption: str) -> Figure:
    """Mean change by quartile, for rows of `metrics.quartiles`: a column a `key`, a row an `objective`."""
    x = alt.X("quartile:O", title="quartile of the key (1 lowest)", axis=alt.Axis(labelAngle=0))
    base = alt.Chart(table).encode(x=x, color=alt.value(STAGE_COLOURS[2]))
    panel = _intervals(base, "change", title="change of policy margin (nats per token)")
    keys = alt.Column("key:N", sort=list(table["key"].unique()), title=None)
    objectives = alt.Row("objective:N", sort=list(table["objective"].unique()), title=None)
    chart = panel.properties(width=230, height=210).facet(column=keys, row=objectives)
    shows = "Mean change of the policy margin in four groups of pairs, for each sorting key."
    return _finish(chart, "Do confident pairs lose more?", caption, shows=shows)


def movement_map(movement: pd.DataFrame, *, caption: str) -> Figure:
    """Cosine of the first move with the last, by layer and module, in weight space, centred on zero."""
    first, last = movement["from_checkpoint"].iloc[0], movement["other_to"].iloc[-1]
    kept = (movement["from_checkpoint"] == first) & (movement["other_to"] == last)
    cells = movement[kept & (movement["space"] == "weight")].dropna(subset=["layer", "module"])
    cells = cells[["layer", "module", "cosine"]].astype({"layer": int, "cosine": float})
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y, colour = alt.Y("module:N", sort=order, title=None), _centred("cosine", cells["cosine"])
    chart = alt.Chart(cells).mark_rect().encode(x=x, y=y, color=colour)
    shows = "Heat map of the cosine of the first and the last stage's weight changes, by layer and module."
    question = "Where does the later stage go on, and where does it turn back?"
    return _finish(chart, question, caption, shows=shows, size=(WIDTH, 170))


def retention_overview(table: pd.DataFrame, *, caption: str) -> Figure:
    """Margin of each chain's first objectives after each stage, for rows of `contrasts.first_objectives`."""
    after, chains = list(table["after"].unique()), list(table["label"].unique())
    colours = {name: _stage_colour(k) for k, name in enumerate(after, start=1)}
    base = alt.Chart(table[["label", "after", "margin", "margin_low", "margin_high"]]).encode(
        y=alt.Y("label:N", sort=chains, title=None, axis=alt.Axis(labelLimit=420)),
        yOffset=alt.YOffset("after:N", sort=after),
        color=_colour("after", colours, title="margin after"),
    )
    chart = _intervals(base, "margin", title="held-out margin of the first objective", axis="x")
    shows = "Held-out margin of the first objective after each stage, with 95 % intervals."
    question, size = "What became of the first objective?", (WIDTH - 140, alt.Step(20))
    return _finish(chart, question, caption, shows=shows, size=size)
