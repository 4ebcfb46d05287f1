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

from seqdpo_utils.chains import AGAIN, SHUFFLED, THEN
from seqdpo_utils.dial import NEW, SEEN
from seqdpo_utils.ledger import PARTS
from seqdpo_utils.metrics import bounds

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
EARLIER = {"train": "training pairs", "probe": "held-out pairs"}
"""What pages call the two kinds of pairs of an earlier objective on which gradients are measured."""
GHOSTS = {SHUFFLED: GREY, AGAIN: PALE}
"""Colours of controls, which tables of a chain name in a column `control`; "" there is the chain itself."""
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
    x = alt.X("checkpoint:N", sort=list(named["checkpoint"].unique()), title="checkpoint", axis=axis)
    return alt.Chart(named).encode(x=x), max(220, 130 * named["checkpoint"].nunique())


def _ghosted(table: pd.DataFrame, by: str, colours: Labels) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table, and encodings that give each value of `by` its colour and a slot, its controls grey ones."""
    control = table.get("control", pd.Series("", table.index))
    kinds = [kind for kind in control.unique() if kind]
    drawn = table.assign(shown=table[by].where(control == "", control), slot=table[by] + control)
    slots = [f"{name}{kind}" for name in colours for kind in ("", *kinds)]
    shift = alt.XOffset("slot:N", scale=alt.Scale(domain=slots, paddingOuter=0.42))
    colour = _colour("shown", dict(colours) | {kind: GHOSTS[kind] for kind in kinds}, title=by)
    return drawn, {"xOffset": shift, "color": colour}


def _stacked(table: pd.DataFrame, names: Labels, measure: str, what: str) -> pd.DataFrame:
    """Columns with bounds below one another as `measure`; `names` tell them apart in a column `what`."""
    parts = []
    for column, name in names.items():
        columns = dict(zip(bounds(column), bounds(measure), strict=True))
        parts.append(table.rename(columns=columns).assign(**{what: name}))
    return pd.concat(parts, ignore_index=True)


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
        conflict: rows of `conflict.CONFLICT_COLUMNS`; of controls only new against old is drawn.
        caption: what the measurements say; an interval of a mean is no band for points and belongs here.
    """
    names = {"matched_cosine": "new against old objective", "within_cosine": "old objective against itself"}
    names |= {"within_new_cosine": "new objective against itself"}
    control = conflict.get("control", pd.Series("", conflict.index))
    rows = conflict.assign(split=conflict["split"].map(EARLIER), control=control).rename(columns=names)
    keys = ["step", "stage", "previous_objective", "split", "control"]
    long = rows.melt(keys, list(names.values()), var_name="kind").astype({"value": float}).dropna()
    across, ghosts = names["matched_cosine"], [kind for kind in control.unique() if kind]
    long = long[(long["control"] == "") | (long["kind"] == across)]
    long["kind"] = long["kind"].where(long["control"] == "", long["control"])
    colours = dict(zip(names.values(), (INK, *STAGE_COLOURS[1:3]), strict=True))
    colour = _colour("kind", colours | {kind: GHOSTS[kind] for kind in ghosts})
    reach = alt.Scale(domainMin=min(-0.3, long["value"].min()), domainMax=max(0.3, long["value"].max()))
    base = alt.Chart(long).encode(
        x=_steps("optimiser step of the later stage"),
        y=alt.Y("value:Q", scale=reach, title="cosine of gradients of half batches"),
        color=colour.legend(orient="bottom", columns=2, labelLimit=300),
        detail=["stage:N", "previous_objective:N"],
    )
    lines = base.transform_filter(alt.FieldOneOfPredicate("kind", [across, *ghosts])).mark_line()
    points = base.transform_filter("datum.control == ''").mark_point(filled=True, size=50, opacity=1)
    panel = alt.layer(_zero("y", long), lines, points).properties(width=WIDTH / 2 - 40, height=230)
    chart = panel.facet(column=alt.Column("split:N", sort=list(EARLIER.values()), title=None))
    shows = "Cosine of the two gradients at each measured step, those within one objective, and controls."
    return _finish(chart, "Do the gradients oppose each other?", caption, shows=shows)


def ledger_waterfall(bars: pd.DataFrame, *, by: str, caption: str) -> Figure:
    """Bars from zero to the measured change of the earlier objective's loss.

    Args:
        bars: from `ledger.waterfall`; of a control the last bar alone, its `kind` is "control".
        by: what a bar stands for.
        caption: what the ledger says.
    """
    kinds = {"raised the loss": NEGATIVE, "lowered the loss": POSITIVE, "rest": PALE, "measured": INK}
    kinds |= {"control": GREY} if bars["kind"].eq("control").any() else {}
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
        table: rows of `rivals.displacement` that begin at the base; controls at the chain's own checkpoint.
        objectives: in the order of the panels.
        labels: of the checkpoints.
        caption: what the figures say.
    """
    ends = table.rename(columns={"to_checkpoint": "checkpoint"})
    sides = _stacked(ends, {side: side for side in SIDES}, "change", "side")
    drawn, slots = _ghosted(sides, "side", SIDES)
    kept = ["objective", "checkpoint", "shown", "slot", *bounds("change")]
    base, width = _by_checkpoint(drawn[kept], labels)
    base = base.encode(**slots)
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
        matrix: `checkpoint`, `objective`, the measure and its bounds (`<measure>_low`, `<measure>_high`);
            controls at the chain's own checkpoint.
        objectives: of the setting: the place of each decides its colour.
        labels: of the checkpoints.
        measure, axis: the column, and what the axis calls it.
        question, caption: title of the chart, and what it says.
    """
    colours = {name: OBJECTIVE_COLOURS[k % len(OBJECTIVE_COLOURS)] for k, name in enumerate(objectives)}
    drawn, slots = _ghosted(matrix.dropna(subset=[measure]), "objective", colours)
    base, width = _by_checkpoint(drawn, labels)
    base = base.encode(**slots)
    chart, shows = _intervals(base, measure, title=axis), f"{axis} of held-out pairs, with 95 % intervals."
    return _finish(chart, question, caption, shows=shows, size=(width, 240))


def _dots(
    table: pd.DataFrame, axes: Mapping[str, str], *, colour: str, names: Labels, title: str
) -> alt.LayerChart:
    """Pairs as dots by two columns, close ones of one colour as one larger dot; controls as rings behind.

    `axes`: the column across, the column upward, and what the axes call them.
    """
    x, y = axes
    low, high = table[[x, y]].min(), table[[x, y]].max()
    cells = (table[[x, y]] - low) / (high - low).clip(lower=1e-12) * SCATTER_CELLS
    control = table.get("control", pd.Series("", table.index))
    kept = [x, y, colour, "control", "pairs"]
    groups = table.assign(pairs=1, control=control).join(cells.astype(int).add_suffix(" cell"))
    groups[colour] = groups[colour].where(control == "", "")
    groups = groups.groupby([f"{x} cell", f"{y} cell", colour, "control"])
    dots = groups.agg({x: "mean", y: "mean", "pairs": "sum"}).reset_index()[kept]
    most = int(dots["pairs"].max())
    sizes = alt.Scale(type="sqrt", range=[45, 400], domain=[1, max(10, most)])
    legend = alt.Legend() if most > 1 else None
    own, others = (alt.Chart(dots[dots["control"].eq("") == chosen]) for chosen in (True, False))
    layers = [own.mark_circle(opacity=0.85).encode(color=_colour(colour, names, title=title))]
    if kinds := [kind for kind in control.unique() if kind]:
        greys = alt.Scale(domain=kinds, range=[GHOSTS[kind] for kind in kinds])
        rings = others.mark_point(strokeWidth=1.5).encode(stroke=alt.Stroke("control:N", scale=greys))
        layers.insert(0, rings)
    size = alt.Size("pairs:Q", scale=sizes, title="pairs in a dot", legend=legend)
    at = [alt.X(f"{x}:Q", title=axes[x]), alt.Y(f"{y}:Q", title=axes[y])]
    return alt.layer(*layers).encode(*at, size=size)


def pair_scatter(changes: pd.DataFrame, *, before: str, after: str, caption: str) -> Figure:
    """Change of each pair's policy margin over where it began; on the line at zero nothing changed.

    Rows with a `control` are rings behind, in grey.
    """
    names = {"gained": POSITIVE, "same": PALE, "lost": NEGATIVE}
    axes = {"before": f"policy margin at {before} (nats per token)", "change": f"change of it to {after}"}
    points = _dots(changes, axes, colour="reordered", names=names, title="order of answers")
    shows = "Scatter plot of the change of each held-out pair's policy margin over its value before."
    return _finish(_zero("y") + points, "Which pairs moved?", caption, shows=shows, size=(360, 280))


def two_margins(changes: pd.DataFrame, *, at: str, caption: str) -> Figure:
    """Both margins of each pair at one checkpoint; lines at zero part four corners.

    Args:
        changes: `margin_after`, `after`, and `crossed` from `redistribution.crossed_zero`; rows with a
            `control` are rings behind, in grey.
        at: the checkpoint's label.
        caption: what the figure says.
    """
    names = {"neither": PALE, "policy margin": POSITIVE, "DPO margin": NEGATIVE, "both": INK}
    axes = {"margin_after": f"DPO margin at {at}: summed, less the base's"}
    axes |= {"after": f"policy margin at {at} (nats per token)"}
    points = _dots(changes, axes, colour="crossed", names=names, title="changed sign")
    chart, shows = _zero("x") + _zero("y") + points, "Scatter plot of each held-out pair's two margins."
    return _finish(chart, "Do the two margins say the same?", caption, shows=shows, size=(360, 280))


def kept_of_learned(
    changes: pd.DataFrame, lines: pd.DataFrame, *, objectives: Names, before: str, after: str, caption: str
) -> Figure:
    """Each pair's DPO margin at the end over that after stage 1; on the dotted diagonal all was kept.

    Args:
        changes: `objective`, `margin_before`, `margin_after`.
        lines: from `redistribution.line_band`, with its `objective`, and the `control` whose grey line it is
            ("": none).
        objectives: of the setting: the place of each decides its colour.
        before, after: labels of the checkpoints.
        caption: what the figure says.
    """
    colours = {name: OBJECTIVE_COLOURS[k % len(OBJECTIVE_COLOURS)] for k, name in enumerate(objectives)}
    colours = {name: colours[name] for name in changes["objective"].unique()}
    title = "held-out pairs of"
    axes = {
        "margin_before": f"learned: DPO margin at {before}",
        "margin_after": f"kept: DPO margin at {after}",
    }
    points = _dots(changes, axes, colour="objective", names=colours, title=title)
    others = alt.Chart(lines[lines["control"] != ""]).mark_line(strokeWidth=1.5, strokeDash=[6, 2])
    apart = ["objective:N", "control:N"]
    ghosts = others.encode(x="learned:Q", y="kept:Q", color=alt.value(GREY), detail=apart)
    own = alt.Chart(lines[lines["control"] == ""])
    fitted = own.encode(x="learned:Q", color=_colour("objective", colours, title=title))
    band = fitted.mark_area(opacity=0.2).encode(y="kept_low:Q", y2="kept_high:Q")
    ends = alt.Chart(pd.DataFrame({"x": [changes["margin_before"].min(), changes["margin_before"].max()]}))
    diagonal = ends.mark_line(color=INK, strokeDash=[2, 2]).encode(x="x:Q", y="x:Q")
    chart = _zero("y") + band + diagonal + ghosts + fitted.mark_line().encode(y="kept:Q") + points
    shows = "Scatter plot of the DPO margin kept over that learned, a line with its band, and the diagonal."
    return _finish(chart, "Was a share lost, or a sum?", caption, shows=shows, size=(360, 280))


def quartile_changes(table: pd.DataFrame, *, caption: str) -> Figure:
    """Mean change by quartile, for rows of `redistribution.quartiles` with their `objective`.

    A panel a `key` and a row an `objective`; grey ticks: the most that regression to the mean can do. Rows
    with a `control` stand beside in grey.
    """
    own = table.assign(chain="this chain")
    drawn, slots = _ghosted(own, "chain", {"this chain": STAGE_COLOURS[2]})
    if "control" not in table or table["control"].eq("").all():
        slots = {"color": alt.value(STAGE_COLOURS[2])}
    units = {"margin": "change of DPO margin", "policy_margin": "change of policy margin per token"}
    parts = []
    for measure, rows in drawn.groupby("measure"):
        x = alt.X("quartile:O", title="quartile (1 lowest)", axis=alt.Axis(labelAngle=0))
        base = alt.Chart(rows).encode(x=x, **slots)
        panel = _intervals(base, "change", title=units[measure])
        panel += base.mark_tick(thickness=3, width=18).encode(y="regression:Q", color=alt.value(PALE))
        keys = alt.Column("key:N", sort=list(rows["key"].unique()), title=None)
        objectives = alt.Row("objective:N", sort=list(rows["objective"].unique()), title=None)
        parts.append(panel.properties(width=150, height=210).facet(column=keys, row=objectives))
    shows = "Mean change of a margin in four groups of pairs, for each sorting key."
    return _finish(alt.hconcat(*parts), "Do confident pairs lose more?", caption, shows=shows)


def movement_map(movement: pd.DataFrame, *, caption: str) -> Figure:
    """Cosine of the first move with the last, by layer and module, in weight space, centred on zero.

    Args:
        movement: from `movement.movement_table`, and below it those of controls, a panel each.
        caption: what the map says.
    """
    control = movement.get("control", pd.Series("", movement.index)).replace("", "this chain")
    own = movement.groupby(control)
    first, last = own["from_checkpoint"].transform("first"), own["other_to"].transform("last")
    kept = (movement["from_checkpoint"] == first) & (movement["other_to"] == last)
    cells = movement.assign(panel=control)[kept & (movement["space"] == "weight")]
    cells = cells.dropna(subset=["layer", "module"])[["panel", "layer", "module", "cosine"]]
    cells = cells.astype({"layer": int, "cosine": float})
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y, colour = alt.Y("module:N", sort=order, title=None), _centred("cosine", cells["cosine"])
    panel = alt.Chart(cells).mark_rect().encode(x=x, y=y, color=colour).properties(width=WIDTH, height=150)
    header = alt.Header(labelOrient="top", labelAnchor="start")
    rows = alt.Row("panel:N", sort=list(control.unique()), title=None, header=header)
    chart = panel.facet(row=rows) if control.nunique() > 1 else panel
    shows = "Heat map of the cosine of the first and the last stage's weight changes, by layer and module."
    question = "Where does the later stage go on, and where does it turn back?"
    return _finish(chart, question, caption, shows=shows)


def retention_overview(table: pd.DataFrame, *, caption: str) -> Figure:
    """Margin of each chain's first objectives after each stage, and after its controls, in grey.

    For rows of `contrasts.first_objectives` or `contrasts.beside_controls`.
    """
    chains, stages = list(table["label"].unique()), [x for x in table["after"].unique() if x not in GHOSTS]
    colours = {name: _stage_colour(k) for k, name in enumerate(stages, start=1)}
    colours |= {name: grey for name, grey in GHOSTS.items() if table["after"].eq(name).any()}
    after = list(colours)
    y = alt.Y("label:N", sort=chains, title=None, axis=alt.Axis(labelLimit=420))
    slot, colour = alt.YOffset("after:N", sort=after), _colour("after", colours, title="margin after")
    base = alt.Chart(table[["label", "after", *bounds("margin")]]).encode(y=y, yOffset=slot, color=colour)
    chart = _intervals(base, "margin", title="held-out margin of the first objective", axis="x")
    shows = "Held-out margin of the first objective after each stage, with 95 % intervals."
    question, size = "What became of the first objective?", (WIDTH - 140, alt.Step(20))
    return _finish(chart, question, caption, shows=shows, size=size)


def ends_of_controls(ends: pd.DataFrame, *, caption: str) -> Figure:
    """Margin of first objectives after stage 1 and after each way to go on: real in colour, controls grey.

    `ends`: `label` (of the chain), `end` with `margin` and its bounds, in the order to be shown; the first
    is the end of stage 1 and the second that of the real chain.
    """
    names, labels = list(ends["end"].unique()), list(ends["label"].unique())
    colours = dict.fromkeys(names, GREY) | {names[0]: _stage_colour(1), names[1]: _stage_colour(2)}
    shown = ends[["label", "end", "margin", "margin_low", "margin_high"]]
    y = alt.Y("end:N", sort=names, title=None, axis=alt.Axis(labelLimit=200))
    base = alt.Chart(shown).encode(y=y, color=_colour("end", colours, legend=None))
    panel = _intervals(base, "margin", title="held-out margin of the first objective", axis="x")
    header = alt.Header(labelOrient="top", labelAnchor="start", labelFontWeight="bold", labelPadding=2)
    rows = alt.Row("label:N", sort=labels, title=None, header=header)
    panels = panel.properties(width=WIDTH - 60, height=alt.Step(22)).facet(row=rows, spacing=14)
    chart = panels.resolve_scale(y="independent")  # a panel has the ends that were run
    shows = "Held-out margin of the first objective after each way to go on, with 95 % intervals."
    return _finish(chart, "Is it the labels, or training at all?", caption, shows=shows)


def dial_panels(table: pd.DataFrame, *, caption: str) -> Figure:
    """Every instrument over the share of labels turned: on new pairs in colour, on seen pairs in grey.

    Ticks on the right are chains that go on with another objective, by the name of their last stage; lines
    are the scale that they are placed on.

    Args:
        table: from `dial.calibrate`.
        caption: what the figure says.
    """
    kept = ["instrument", "pairs", "share", *bounds("value"), "fitted", "label"]
    axis = alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format="%", labelAngle=0)
    x = alt.X("share:Q", scale=alt.Scale(domain=[0, 1.5]), axis=axis, title="labels turned")
    colour = _colour("pairs", {NEW: STAGE_COLOURS[2], SEEN: GREY}, legend="bottom")
    parts = []
    for (setting, objective), rows in table.groupby(["setting", "objective"], sort=False):
        others = rows[rows["share"].isna()].drop_duplicates(["instrument", "chain"])
        label = others["chain"].str.partition(THEN)[2]
        others = others.assign(pairs="", share=1.1, label=label)[label != ""]
        aside = rows["share"] + 0.03 * (rows["pairs"] == SEEN)  # so that neither hides the other
        shown = pd.concat([rows.assign(share=aside, label="")[rows["share"].notna()], others])[kept]
        base = alt.Chart(shown).encode(x=x)
        dial = base.transform_filter(alt.datum.pairs != "").encode(color=colour)
        scale = dial.mark_line(opacity=0.5).encode(y="fitted:Q")
        ticks = base.transform_filter(alt.datum.label != "").encode(y="value:Q")
        names = ticks.mark_text(align="left", dx=8, fontSize=10, color=INK).encode(text="label:N")
        ends = ticks.mark_tick(orient="horizontal", color=INK)
        drawn = [scale, _intervals(dial, "value", title=None), ends, names]
        panel = alt.layer(*drawn, data=shown).properties(width=165, height=130)
        order = alt.Facet("instrument:N", sort=list(rows["instrument"].unique()), title=None)
        panels = panel.facet(facet=order, columns=4, title=f"{setting}, first {objective}")
        parts.append(panels.resolve_scale(y="independent"))
    shows = "Readings of each instrument at each share of labels turned, with 95 % intervals."
    return _finish(alt.vconcat(*parts), "Which instrument sees which share?", caption, shows=shows)


def ledger_parts(table: pd.DataFrame, *, caption: str) -> Figure:
    """Direction, curvature and measured change of an earlier loss, with intervals; controls in grey.

    Args:
        table: from `ledger.with_intervals`, of one stage and earlier objective; controls below it.
        caption: what the ledger says.
    """
    names = dict(zip(PARTS, ("direction", "curvature", "measured"), strict=True))
    parts = _stacked(table.assign(stage="this chain"), names, "change", "part")
    drawn, slots = _ghosted(parts, "stage", {"this chain": STAGE_COLOURS[2]})
    drawn = drawn.assign(split=drawn["split"].map(EARLIER))
    kept = ["split", "part", "shown", "slot", *bounds("change")]
    x = alt.X("part:N", sort=list(names.values()), title=None, axis=alt.Axis(labelAngle=0))
    base = alt.Chart(drawn[kept]).encode(x=x, **slots)
    panel = _intervals(base, "change", title="change of the earlier loss (nats)")
    chart = panel.properties(width=WIDTH / 2 - 40, height=210)
    chart = chart.facet(column=alt.Column("split:N", sort=list(EARLIER.values()), title=None))
    shows = "Three parts of the change of the earlier objective's loss, with 95 % intervals over prompts."
    question = "Is it where the steps pointed, or how the loss curved on the way?"
    return _finish(chart, question, caption, shows=shows)


def margin_planes(places: pd.DataFrame, *, caption: str) -> Figure:
    """Both objectives' margins at the end of every way to have them; chains of two stages in colour.

    The pale line leads through the mixtures of two adapters, the dotted one along the front.

    Args:
        places: from `mixing.compare`.
        caption: what the figure says.
    """
    kinds, orders = list(dict.fromkeys(places["kind"])), [*dict.fromkeys(places["order"])]
    marks = ["circle", "square", "triangle-up", "triangle-down", "diamond", "cross", "triangle-left"]
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=marks[: len(kinds)]), title="way")
    chosen = {"across": _stage_colour(1), "upward": _stage_colour(2), "neither": INK}
    colour = _colour("order", {name: chosen[name] for name in orders}, title="trained first")
    panels = []
    for (setting, x, y), rows in places.groupby(["setting", "x", "y"], sort=False):
        axes = {"first": alt.X, "second": alt.Y}
        titles, padded = {"first": f"margin of {x}", "second": f"margin of {y}"}, alt.Scale(padding=9)
        at = [axes[side](f"{side}:Q", title=titles[side], scale=padded) for side in axes]
        base = alt.Chart(rows.drop(columns=["setting", "x", "y"])).encode(*at)
        line = base.transform_filter("isValid(datum.share)").mark_line(color=PALE, strokeWidth=3)
        front = base.transform_filter("datum.on_front").mark_line(color=INK, strokeDash=[2, 3])
        rule = base.transform_filter("datum.sequential").mark_rule(strokeWidth=2).encode(color=colour)
        drawn = [_zero("x"), _zero("y"), line.encode(order="share:Q"), front.encode(order="first:Q")]
        drawn += [rule.encode(x="first_low:Q", x2="first_high:Q")]
        drawn += [rule.encode(y="second_low:Q", y2="second_high:Q")]
        points = base.mark_point(size=95, opacity=1, filled=True).encode(color=colour, shape=shape)
        panels.append(alt.layer(*drawn, points).properties(width=280, height=260, title=setting))
    shows = "Margin of one objective over that of the other at the end of each way to have both."
    return _finish(alt.concat(*panels, columns=2), "How much of both can be had?", caption, shows=shows)


def _compared(table: pd.DataFrame) -> pd.Series:
    """What names a comparison of `plasticity` in a figure."""
    return table["setting"] + ": " + table["objective"] + " in " + table["chain"]


def plasticity_paths(points: pd.DataFrame, states: pd.DataFrame, *, caption: str) -> Figure:
    """Margin of the earlier objective over the gain of the new one, a panel a chain, plain steps in colour.

    Args:
        points: from `plasticity.points`, of the causal comparison.
        states: from `plasticity.states`, of the same: `gain` and `margin` are the marks.
        caption: what the figures say.
    """
    shown = ["comparison", "kind", "point", "gain", "margin"]
    parts = [part.assign(comparison=_compared(part)).reindex(columns=shown) for part in (points, states)]
    table = pd.concat([part.assign(mark=k) for k, part in enumerate(parts)]).astype({"point": float})
    colours = dict(zip(points["kind"].unique(), (STAGE_COLOURS[2], GREY, PALE), strict=False))
    x = alt.X("gain:Q", title="gain of the new objective")
    y = alt.Y("margin:Q", title="margin of the earlier objective", scale=alt.Scale(zero=False))
    base = alt.Chart(table).encode(x=x, y=y, color=_colour("kind", colours, title="steps", legend="bottom"))
    paths = base.transform_filter("datum.mark == 0").mark_line(point=True).encode(order="point:Q")
    marks = base.transform_filter("datum.mark == 1")
    marks = marks.mark_point(shape="diamond", filled=True, size=160, opacity=1)
    names = alt.Facet("comparison:N", title=None, header=alt.Header(labelLimit=320))
    chart = (paths + marks).properties(width=WIDTH / 2 - 20, height=200).facet(facet=names, columns=2)
    shows = "Held-out margin of the earlier objective over the gain of the new one; diamonds at equal gain."
    return _finish(chart, "What does the same gain cost?", caption, shows=shows)


def reference_axis(states: pd.DataFrame, *, caption: str) -> Figure:
    """Earlier margin and new gain over the share l of the stage before in the reference, a panel a chain.

    `states`: from `plasticity.states`, of the reference comparison.
    """
    names = {"end_gain": "gain of the new objective", "end_margin": "margin of the earlier one"}
    names |= {"margin": "the same at equal gain"}
    colours = dict(zip(names.values(), (*STAGE_COLOURS[2:0:-1], GREY), strict=True))
    shown = states[["kind", *bounds(*names)]].assign(comparison=_compared(states))
    table = _stacked(shown, names, "value", "what")
    table = table[["kind", "comparison", *bounds("value"), "what"]]
    table["l"] = table["kind"].str.removeprefix("l = ").astype(float)
    x = alt.X("l:Q", title="l (0: base, 1: stage before)", scale=alt.Scale(padding=15))
    base = alt.Chart(table).encode(x=x, color=_colour("what", colours, title=None, legend="bottom"))
    panel = base.mark_line().encode(y="value:Q") + _intervals(base, "value", title="held-out margin")
    facet = alt.Facet("comparison:N", title=None, header=alt.Header(labelLimit=320))
    chart = panel.properties(width=WIDTH / 2 - 20, height=200).facet(facet=facet, columns=2)
    shows = "Margin of the earlier objective and gain of the new one along the reference axis."
    return _finish(chart, "Does another reference keep more?", caption, shows=shows)


def control_curves(curves: pd.DataFrame, *, caption: str) -> Figure:
    """Held-out margin of each aspect over the share that it was given, one panel a setting and aspect.

    Args:
        curves: from `steering.control`, with `setting`.
        caption: what the figure says.
    """
    ways = dict(zip(dict.fromkeys(curves["way"]), [*STAGE_COLOURS[1:3], GREY, PALE], strict=False))
    colour = _colour("way", ways, legend="bottom")
    axis = alt.Axis(labelExpr="format(datum.value, '.0%')", labelAngle=0)
    parts = []
    for (setting, aspect), rows in curves.groupby(["setting", "aspect"], sort=False):
        shift = alt.XOffset("way:N", scale=alt.Scale(domain=list(ways)))
        base = alt.Chart(rows).encode(alt.X("share:O", axis=axis, title=f"share of {aspect}"), colour, shift)
        line = base.mark_line(opacity=0.5).encode(y="margin:Q")
        panel = alt.layer(line, _intervals(base, "margin", title=f"margin of {aspect}"))
        parts.append(panel.properties(width=260, height=190, title=setting))
    shows = "Margin of each aspect over the share it was given, by way of asking, with 95 % intervals."
    return _finish(alt.concat(*parts, columns=2), "Does the dial turn anything?", caption, shows=shows)


def schedule(predicted: pd.DataFrame, measured: pd.DataFrame, *, aspect: str, caption: str) -> Figure:
    """What a learned schedule believes of each lambda at the end of its stage, over what it measured.

    Args:
        predicted: `seed`, `share`, `gain`, `gain_low`, `gain_high` along the first aspect's share.
        measured: `seed`, `share`, `gain`, `step` of every step.
        aspect: whose share is the axis.
        caption: what the figure says.
    """
    x = alt.X("share:Q", axis=alt.Axis(format="%"), title=f"share of {aspect}")
    data = pd.concat([predicted, measured.rename(columns={"gain": "seen"})])
    believed = alt.Chart().transform_filter("isValid(datum.gain)")
    layers = [
        believed.mark_area(color=PALE, opacity=0.5).encode(x, y=alt.Y("gain_low:Q"), y2="gain_high:Q"),
        believed.mark_line(color=INK).encode(x, y=alt.Y("gain:Q", title="gain of a step")),
        alt.Chart()
        .transform_filter("isValid(datum.seen)")
        .mark_point(filled=True, size=55, opacity=1)
        .encode(
            x,
            y="seen:Q",
            color=alt.Color("step:Q", scale=alt.Scale(scheme="viridis", reverse=True), title="step"),
        ),
    ]
    panels = alt.layer(*layers, data=data).properties(width=200, height=190)
    shows = "Predicted and measured gain of a step over lambda, one panel a run."
    facet = alt.Facet("seed:N", title="seed")
    return _finish(panels.facet(facet=facet, columns=3), "Which lambda pays?", caption, shows=shows)
