"""Figures as pure functions, DataFrame in, Altair chart out, and the sentence beside them.

A stage and an objective keep their colour everywhere. Every chart carries a description for those who cannot see it.
"""

import base64
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from IPython.display import Markdown

INK, GREY = "#263238", "#78909c"
STAGE_COLOURS = [GREY, "#1565c0", "#ef6c00", "#2e7d32", "#6a1b9a"]
OBJECTIVE_COLOURS = ["#00796b", "#ad1457", "#5d4037", "#455a64", "#827717"]
NEGATIVE, POSITIVE = "#c62828", "#1565c0"
WIDTH = 520
HISTOGRAM_BINS, SCATTER_CELLS = 25, 36
"""Charts are drawn from aggregates, so that ten thousand pairs cost what a hundred do."""


def say(text: str) -> Markdown:
    """A computed sentence as Markdown: the numbers in it come from the run, never from typing."""
    return Markdown(text)


def percent(value: float) -> str:
    """A share as whole percent."""
    return f"{value:.0%}"


def with_interval(value: float | None, low: float | None, high: float | None, *, digits: int = 2) -> str:
    """A number with its interval, or what is missing, for a sentence."""
    if value is None or pd.isna(value):
        return "not measured"
    if low is None or pd.isna(low):
        return f"{value:+.{digits}f} (no interval: too few measurements)"
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


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
    half = int.from_bytes(png[16:20], "big") // 2
    bundle = {"image/svg+xml": svg, "image/png": base64.b64encode(png).decode(), "text/plain": description}
    return bundle, {"image/svg+xml": {"alt": description}, "image/png": {"alt": description, "width": half}}


def use_static_charts() -> None:
    """Show charts as pictures that survive offline, in a common style."""
    alt.renderers.register("study", static_bundle)
    alt.renderers.enable("study")
    alt.theme.register("study", enable=True)(_theme)


def _theme() -> dict[str, Any]:
    text = {"labelFontSize": 12, "titleFontSize": 12, "labelColor": INK, "titleColor": INK}
    return {
        "config": {
            "background": "white",
            "font": "DejaVu Sans, Helvetica, Arial, sans-serif",
            "title": {"anchor": "start", "fontSize": 14, "subtitleFontSize": 12, "subtitleColor": "#546e7a", "color": INK, "offset": 10},
            "axis": text | {"gridColor": "#eceff1"},
            "legend": text,
            "header": text,
            "view": {"stroke": None},
        }
    }


def _title(question: str, caption: str) -> alt.TitleParams:
    words, lines = caption.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 84:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return alt.TitleParams(question, subtitle=lines)


def _objective_colour(objectives: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(objectives), range=OBJECTIVE_COLOURS[: len(objectives)])
    return alt.Color("objective:N", scale=scale, title="objective")


def _zero(axis: str) -> alt.Chart:
    rule = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(color=GREY, strokeDash=[4, 3])
    return rule.encode(**{axis: "zero:Q"})


def token_lengths(lengths: pd.DataFrame, *, objectives: Sequence[str], caption: str) -> alt.Chart:
    """Histogram of completion lengths by side. `lengths`: `objective`, `side` ("chosen", "rejected"), `tokens`."""
    width = max(1, -(-int(lengths["tokens"].max()) // HISTOGRAM_BINS))
    start = lengths["tokens"] // width * width
    counts = lengths.assign(start=start, end=start + width).groupby(["objective", "side", "start", "end"], as_index=False).size()
    return alt.Chart(counts).mark_bar(opacity=0.55).encode(
        x=alt.X("start:Q", bin="binned", title="completion tokens"), x2="end:Q",
        y=alt.Y("size:Q", stack=None, title="completions"),
        color=alt.Color("side:N", scale=alt.Scale(domain=["chosen", "rejected"], range=[POSITIVE, NEGATIVE]), title=None),
        column=alt.Column("objective:N", sort=list(objectives), title=None),
    ).properties(
        width=240, height=180, title=_title("Does length give the preferred answer away?", caption),
        description=f"Histograms of the lengths of chosen and rejected answers. {caption}",
    )  # fmt: skip


def learning_curves(history: pd.DataFrame, *, stage: int, caption: str) -> alt.Chart:
    """Loss, margin and what chosen and rejected answers gained over the base, by optimiser step, from the trainer's own log."""
    parts = {
        "loss (nats)": {"loss": "loss"},
        "margin": {"margin": "rewards/margins"},
        "β × log-probability gained": {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
    }
    colours = {"loss": STAGE_COLOURS[stage], "margin": STAGE_COLOURS[stage], "chosen": POSITIVE, "rejected": NEGATIVE}
    panels = []
    for title, columns in parts.items():
        long = pd.concat([pd.DataFrame({"step": history["step"], "value": history[column], "what": what}) for what, column in columns.items()])
        colour = alt.Color(
            "what:N", title=None, legend=alt.Legend(orient="bottom") if len(columns) > 1 else None,
            scale=alt.Scale(domain=list(columns), range=[colours[what] for what in columns]),
        )  # fmt: skip
        line = alt.Chart(long).mark_line(point=True).encode(
            x=alt.X("step:Q", axis=alt.Axis(tickMinStep=1), title="optimiser step"),
            y=alt.Y("value:Q", scale=alt.Scale(zero=False), title=title),
            color=colour,
        )  # fmt: skip
        panels.append(line.properties(width=205, height=170))
    return alt.hconcat(*panels).resolve_scale(color="independent").properties(
        title=_title(f"Does stage {stage} learn its objective?", caption),
        description=f"Loss, margin and log-probability gained over the base by chosen and rejected answers at each step of stage {stage}. {caption}",
    )  # fmt: skip


def conflict_over_steps(conflict: pd.DataFrame, *, band: tuple[float | None, float | None], caption: str) -> alt.Chart:
    """Cosine of new against old halves at each measured step, beside what halves of one objective give among themselves.

    Args:
        conflict: rows with `step`, `stage`, `previous_objective`, `matched_cosine`, `within_cosine`, `within_new_cosine`.
        band: interval of the mean cosine within an objective, drawn behind the points; None twice when there is none.
        caption: what the measurements say.
    """
    names = {
        "matched_cosine": "new against old objective",
        "within_cosine": "old objective against itself",
        "within_new_cosine": "new objective against itself",
    }
    long = conflict.melt(["step", "stage", "previous_objective"], list(names), var_name="kind", value_name="value").replace({"kind": names})
    long = long.astype({"value": float}).dropna(subset=["value"])
    x = alt.X("step:Q", axis=alt.Axis(tickMinStep=1), title="optimiser step of the later stage")
    y = alt.Y(
        "value:Q",
        scale=alt.Scale(domainMin=min(-0.3, long["value"].min()), domainMax=max(0.3, long["value"].max())),
        title="cosine of gradients of half batches",
    )
    colour = alt.Color(
        "kind:N", scale=alt.Scale(domain=list(names.values()), range=[STAGE_COLOURS[2], GREY, "#b0bec5"]), title=None,
        legend=alt.Legend(orient="bottom", labelLimit=300),
    )  # fmt: skip
    detail = ["stage:N", "previous_objective:N"]
    points = alt.Chart(long).mark_point(filled=True, size=50, opacity=1).encode(x=x, y=y, color=colour, detail=detail)
    line = alt.Chart(long[long["kind"] == names["matched_cosine"]]).mark_line().encode(x=x, y=y, color=colour, detail=detail)
    layers = [_zero("y"), line, points]
    if band[0] is not None:
        layers.insert(0, alt.Chart(pd.DataFrame({"low": [band[0]], "high": [band[1]]})).mark_rect(color=GREY, opacity=0.18).encode(y="low:Q", y2="high:Q"))
    return alt.layer(*layers).properties(
        width=WIDTH, height=230, title=_title("Do the gradients oppose each other?", caption),
        description=f"Cosine of the new and the old objective's gradient at each measured step, beside cosines within each objective, whose mean has the grey band. {caption}",
    )  # fmt: skip


def ledger_waterfall(bars: pd.DataFrame, *, by: str, caption: str) -> alt.Chart:
    """Bars from zero to the measured change of the earlier objective's loss. `bars`: from `ledger.waterfall`; `by`: what a bar stands for."""
    kinds = {"raised the loss": NEGATIVE, "lowered the loss": POSITIVE, "rest": "#b0bec5", "measured": INK}
    raised = (bars["end"] >= bars["start"]).map({True: "raised the loss", False: "lowered the loss"})
    drawn = bars.assign(kind=bars["kind"].where(bars["kind"] != "entry", raised))
    chart = alt.Chart(drawn).mark_bar().encode(
        x=alt.X("part:N", sort=None, title=by, axis=alt.Axis(labelAngle=0 if len(bars) < 12 else -90)),
        y=alt.Y("start:Q", title="change of the earlier loss (nats)"),
        y2="end:Q",
        color=alt.Color("kind:N", scale=alt.Scale(domain=list(kinds), range=list(kinds.values())), title=None, legend=alt.Legend(orient="bottom")),
    )  # fmt: skip
    return (_zero("y") + chart).properties(
        width=WIDTH, height=210, title=_title(f"Which {by.partition(' ')[0]} changed the earlier objective's loss?", caption),
        description=f"Waterfall of the ledger's entries by {by}, then the rest and the measured change. {caption}",
    )  # fmt: skip


def displaced_likelihood(table: pd.DataFrame, *, objectives: Sequence[str], caption: str) -> alt.Chart:
    """What chosen and rejected answers gained over the base at each checkpoint, a panel an objective. `table`: rows of `rivals.displacement` from the base."""
    sides = {"chosen": POSITIVE, "rejected": NEGATIVE}
    keys = ["objective", "to_checkpoint"]
    long = pd.concat(
        [table[[*keys, side, f"{side}_low", f"{side}_high"]].set_axis([*keys, "change", "low", "high"], axis=1).assign(side=side) for side in sides]
    )
    base = alt.Chart(long).encode(
        x=alt.X("to_checkpoint:N", sort=None, title="checkpoint", axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("side:N", scale=alt.Scale(paddingOuter=0.42)),
        color=alt.Color("side:N", scale=alt.Scale(domain=list(sides), range=list(sides.values())), title=None),
    )
    bars = base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title="change of summed log-probability (nats)"), y2="high:Q")
    points = base.mark_point(filled=True, size=70, opacity=1).encode(y="change:Q")
    zero = alt.Chart(long).mark_rule(color=GREY, strokeDash=[4, 3]).encode(y=alt.datum(0))
    return alt.layer(zero, bars, points).properties(width=220, height=200).facet(
        column=alt.Column("objective:N", sort=list(objectives), title=None)
    ).properties(
        title=_title("Did the chosen answer lose, or the rejected one gain?", caption),
        description=f"Change of the log-probability of chosen and of rejected answers against the base, with 95 % intervals. {caption}",
    )  # fmt: skip


def stage_heat_map(matrix: pd.DataFrame, *, objectives: Sequence[str], caption: str) -> alt.Chart:
    """Mean margin of every objective at every checkpoint, centred on zero, with the number in each cell."""
    bound = max(abs(matrix["margin"]).max(), 1e-9)
    base = alt.Chart(matrix).encode(
        x=alt.X("checkpoint:N", sort=None, title="checkpoint", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("objective:N", sort=list(objectives), title="held-out pairs of", axis=alt.Axis(labelLimit=200)),
    )
    cells = base.mark_rect().encode(color=alt.Color("margin:Q", scale=alt.Scale(scheme="redblue", domain=[-bound, bound], domainMid=0), title="margin"))
    dark = f"abs(datum.margin) > {0.6 * bound}"
    numbers = base.mark_text(fontSize=13).encode(text=alt.Text("margin:Q", format="+.2f"), color=alt.condition(dark, alt.value("white"), alt.value(INK)))
    return (cells + numbers).properties(
        width=WIDTH - 120, height=60 * len(objectives), title=_title("What does each stage do to each objective?", caption),
        description=f"Heat map of the mean DPO-relative margin by checkpoint and objective. {caption}",
    )  # fmt: skip


def margins_by_stage(matrix: pd.DataFrame, *, objectives: Sequence[str], measure: str, axis: str, question: str, caption: str) -> alt.Chart:
    """One measure with its interval at each checkpoint, a line an objective."""
    shift = alt.XOffset("objective:N", sort=list(objectives), scale=alt.Scale(paddingOuter=0.42))
    base = alt.Chart(matrix.dropna(subset=[measure])).encode(
        x=alt.X("checkpoint:N", sort=None, title="checkpoint", axis=alt.Axis(labelAngle=0)), xOffset=shift, color=_objective_colour(objectives)
    )
    bars = base.mark_rule(strokeWidth=2).encode(y=alt.Y(f"{measure}_low:Q", title=axis), y2=f"{measure}_high:Q")
    points = base.mark_point(filled=True, size=80, opacity=1).encode(y=alt.Y(f"{measure}:Q", title=axis, scale=alt.Scale(zero=False)))
    return (_zero("y") + bars + points).properties(
        width=WIDTH - 100, height=240, title=_title(question, caption),
        description=f"{axis} of held-out pairs at each checkpoint, with 95 % intervals. {caption}",
    )  # fmt: skip


def pair_scatter(changes: pd.DataFrame, *, before: str, after: str, caption: str) -> alt.Chart:
    """Policy margin before and after, pairs that lie close together as one larger dot; on the diagonal nothing changed."""
    names = {"gained": POSITIVE, "same": "#b0bec5", "lost": NEGATIVE}
    ends = pd.concat([changes["before"], changes["after"]])
    low, high = float(ends.min()), float(ends.max())
    cell = {f"{end} cell": ((changes[end] - low) / max(high - low, 1e-12) * SCATTER_CELLS).astype(int) for end in ("before", "after")}
    dots = changes.assign(**cell).groupby([*cell, "reordered"]).agg(before=("before", "mean"), after=("after", "mean"), pairs=("before", "size")).reset_index()
    points = alt.Chart(dots[["before", "after", "reordered", "pairs"]]).mark_circle(opacity=0.85).encode(
        size=alt.Size("pairs:Q", scale=alt.Scale(type="sqrt", range=[45, 400], domain=[1, max(10, int(dots["pairs"].max()))]),
                      title="pairs in a dot", legend=alt.Legend() if dots["pairs"].max() > 1 else None),
        x=alt.X("before:Q", title=f"policy margin at {before} (nats per token)"),
        y=alt.Y("after:Q", title=f"policy margin at {after} (nats per token)"),
        color=alt.Color("reordered:N", scale=alt.Scale(domain=list(names), range=list(names.values())), title="order of answers"),
    )  # fmt: skip
    diagonal = alt.Chart(pd.DataFrame({"x": [low, high]})).mark_line(color=GREY, strokeDash=[2, 2]).encode(x="x:Q", y="x:Q")
    return (_zero("x") + _zero("y") + diagonal + points).properties(
        width=360, height=320, title=_title("Which pairs moved?", caption),
        description=f"Scatter plot of each held-out pair's policy margin before and after the later stage. {caption}",
    )  # fmt: skip


def quartile_changes(table: pd.DataFrame, *, caption: str) -> alt.Chart:
    """Mean change by quartile with intervals, one panel a key. `table`: from `metrics.quartiles`, with `key`."""
    base = alt.Chart(table).encode(x=alt.X("quartile:O", title="quartile of the key (1 lowest)", axis=alt.Axis(labelAngle=0)))
    bars = base.mark_rule(strokeWidth=2, color=STAGE_COLOURS[2]).encode(
        y=alt.Y("change_low:Q", title="change of policy margin (nats per token)"), y2="change_high:Q"
    )
    points = base.mark_point(filled=True, size=80, opacity=1, color=STAGE_COLOURS[2]).encode(y="change:Q")
    zero = base.mark_rule(color=GREY, strokeDash=[4, 3]).encode(y=alt.datum(0))
    return alt.layer(zero, bars, points).properties(width=230, height=210).facet(
        column=alt.Column("key:N", sort=list(dict.fromkeys(table["key"])), title=None)
    ).properties(
        title=_title("Do confident pairs lose more?", caption),
        description=f"Mean change of the policy margin in four groups of pairs, for each sorting key. {caption}",
    )  # fmt: skip


def movement_map(movement: pd.DataFrame, *, caption: str) -> alt.Chart:
    """Cosine of the first move with the last, by layer and module, in weight space, centred on zero."""
    first, last = movement["from_checkpoint"].iloc[0], movement["other_to"].iloc[-1]
    kept = (movement["space"] == "weight") & (movement["from_checkpoint"] == first) & (movement["other_to"] == last)
    cells = movement[kept & movement["layer"].notna() & movement["module"].notna()]
    cells = cells.assign(layer=cells["layer"].astype(int), cosine=cells["cosine"].astype(float))
    bound = max(cells["cosine"].abs().max(), 1e-9)
    order = [m for m in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") if m in set(cells["module"])]
    return alt.Chart(cells[["layer", "module", "cosine"]]).mark_rect().encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("module:N", sort=order or "ascending", title=None),
        color=alt.Color("cosine:Q", scale=alt.Scale(scheme="redblue", domain=[-bound, bound], domainMid=0), title="cosine"),
    ).properties(
        width=WIDTH, height=170, title=_title("Where does the later stage go on, and where does it turn back?", caption),
        description=f"Heat map of the cosine between the two stages' weight changes, by layer and module. {caption}",
    )  # fmt: skip


def retention_overview(table: pd.DataFrame, *, caption: str) -> alt.Chart:
    """Margin of the first objective after stage 1 and after the last stage, for every setting, order and seed."""
    data = table.drop(columns=["order"])
    stages = list(dict.fromkeys(data["checkpoint"]))
    colour = alt.Color("checkpoint:N", scale=alt.Scale(domain=stages, range=STAGE_COLOURS[1 : 1 + len(stages)]), title="margin after")
    base = alt.Chart(data).encode(
        y=alt.Y("label:N", sort=list(dict.fromkeys(data["label"])), title=None, axis=alt.Axis(labelLimit=420)),
        yOffset=alt.YOffset("checkpoint:N", sort=stages),
        color=colour,
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("margin_low:Q", title="held-out margin of the first objective"), x2="margin_high:Q")
    points = base.mark_point(filled=True, size=70, opacity=1).encode(x="margin:Q")
    return (_zero("x") + bars + points).properties(
        width=WIDTH - 140, height=alt.Step(20), title=_title("What became of the first objective?", caption),
        description=f"Held-out margin of the first objective after stage 1 and after the last stage, with 95 % intervals. {caption}",
    )  # fmt: skip
