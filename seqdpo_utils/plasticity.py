"""Forgetting at equal plasticity: is direct opposition its cause, and does the reference matter?

A stage that learns less of the new objective also forgets less of the old. So chains that differ in one
variant of their last stage are compared where they have gained equally much: on the course of each, from the
stage before over the adapters kept within the stage to its end, at the largest gain that all of them reach.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from seqdpo_utils import metrics
from seqdpo_utils.chains import Chain
from seqdpo_utils.ledger import by_pair
from seqdpo_utils.metrics import bounds
from seqdpo_utils.paths import RunPaths, read_scores, read_table
from seqdpo_utils.verdicts import adjusted

PLAIN, PROJECTED, PLACEBO = "plain", "projected", "placebo"
CAUSAL, REFERENCE = "causal", "reference"
"""The two comparisons: steps projected or not, and the reference between the base and the stage before."""
DRIVES = "opposition drives the loss"
NOT_DRIVER = "opposition is not the driver"
AS_GOOD = "opposition is not the driver: the placebo does as well"
NO_LOSS, NO_GAIN, UNDECIDED = "no loss shown", "no common gain shown", "cannot be decided"
DECIDING = ("learned", "gain", "lost", "kept", "beyond", "kept_over", "kept_under", "beyond_under")
"""The contrasts that decide a verdict of `opposition`."""
PLACE = ["setting", "chain", "objective", "later_objective", "axis", "seeds", "within"]
STATE = ("end_margin", "end_gain", "gain", "margin", "difference")
Course = tuple[pd.DataFrame, pd.DataFrame]
"""Held-out margins of the earlier and of the new objective along a stage, as from `course`."""


@dataclass(frozen=True)
class Comparison:
    """Chains that differ in one variant of their last stage, by `kind`; the first is without a variant.

    `place`: what names it in a table (`PLACE`), with its `seeds` and how many points `within` every stage
    were kept.
    """

    place: dict[str, Any]
    groups: dict[str, list[RunPaths]]
    courses: dict[str, Course]


def course(group: Sequence[RunPaths], objective: str, *, beta: float) -> pd.DataFrame:
    """Held-out margins of an objective along the last stage of one chain, over its runs.

    Returns:
        `prompt_id` and the points 0 (the stage before), 1, ... (adapters that every run kept), the last (the
        end of the stage), indexed by `seed` and `pair_id`.
    """

    def records(run: RunPaths) -> pd.DataFrame:
        kept = read_table(run.within)
        kept["checkpoint"] = kept["step"].astype(str).str.zfill(9)
        return pd.concat([read_scores(run), kept.drop(columns="step")], ignore_index=True)

    wide = metrics.margins(group, objective, beta=beta, records=records)
    steps = sorted(name for name in wide if name.isdigit() and wide[name].notna().all())
    points = wide[[Chain.parse(group[0].chain).checkpoints[-2], *steps, group[0].chain]]
    return points.set_axis(range(points.shape[1]), axis=1).assign(prompt_id=wide["prompt_id"])


def beside(chain: Chain, among: Collection[str]) -> dict[str, dict[str, str]]:
    """The chains that differ from this one in a variant of the last stage, by axis and kind.

    Args:
        chain: whose last stage has no variant.
        among: texts of the chains of the study.

    Returns:
        Axis to kind ("plain", "projected", "placebo"; "l = 0", "l = 0.5", ...) to the text of a chain; an
        axis that was not run is left out.
    """
    named = {}
    for other in map(Chain.parse, among):
        alike = (other.stages[:-1], other.last.objectives) == (chain.stages[:-1], chain.last.objectives)
        if alike and len(other.last.variants) == 1:
            named[other.last.variants[0]] = str(other)
    shares = sorted((int(name[3:]) / 100, name) for name in named if re.fullmatch(r"ref\d+", name))
    axes = {
        CAUSAL: {PLAIN: str(chain)} | {name: named[name] for name in (PROJECTED, PLACEBO) if name in named},
        REFERENCE: {"l = 0": str(chain)} | {f"l = {share:g}": named[name] for share, name in shares},
    }
    return {axis: kinds for axis, kinds in axes.items() if len(kinds) > 1}


def comparisons(runs: Sequence[RunPaths], *, beta: float) -> list[Comparison]:
    """Every comparison that the chains of a study allow, read from their records.

    Compared are last stages that train one objective which no earlier stage trained.

    Args:
        runs: every chain and seed of the study.
        beta: the training's beta.
    """
    found = []
    for group in metrics.over_seeds(runs):
        setting, chain = group[0].setting, Chain.parse(group[0].chain)
        new = chain.last.objectives
        if chain.parent is None or len(new) > 1 or set(new) & set(chain.earlier):
            continue
        among = [each.chain for each in runs if each.setting == setting]
        for axis, kinds in beside(chain, among).items() if not chain.last.variants else ():
            groups = {kind: [each.at(text) for each in group] for kind, text in kinds.items()}
            gained = {kind: course(each, new[0], beta=beta) for kind, each in groups.items()}
            for old in chain.stages[0].objectives:
                courses = {kind: (course(groups[kind], old, beta=beta), gained[kind]) for kind in groups}
                within = min(points.shape[1] - 3 for points, _ in courses.values())
                place = (setting, str(chain), old, new[0], axis, len(group), within)
                found.append(Comparison(dict(zip(PLACE, place, strict=True)), groups, courses))
    return found


def at_equal_gain(courses: Mapping[str, Course]) -> pd.DataFrame:
    """The earlier objective's margin of every kind at the largest mean gain that all kinds reach.

    On each course the first place of that mean gain is taken, on the straight line between two points. The
    place is itself estimated from the pairs of the new objective, so these have rows too: to first order, a
    pair that gained more than the mean there moves the place back by so much, and the margin along the slope
    of the course. Their rows have the mean of the others: means are those of the margin, and a bootstrap over
    all rows (`metrics.estimates`) holds both sources of error.

    Args:
        courses: kind to the margins of the earlier and of the new objective; all kinds begin alike, and have
            the same runs and pairs.

    Returns:
        `prompt_id`, `before` (margin at the beginning), `gain` (the common one), and the margin of each kind,
        indexed by `seed` and `pair_id`; margins are null where no gain is common.
    """
    gains = {kind: (means := _points(new).mean()) - means[0] for kind, (_, new) in courses.items()}
    reached = {kind: gain.max() for kind, gain in gains.items()}
    least = min(reached, key=reached.__getitem__)
    old, new = courses[least]
    size = len(old) + len(new)

    def rows(margins: pd.Series, errors: pd.Series) -> np.ndarray:
        parts = (size / len(part) * (part - part.mean()) for part in (margins, errors))
        return margins.mean() + np.concatenate([part.to_numpy() for part in parts])

    at, slopes = {}, {}
    for kind, gain in gains.items():
        point = max(int(np.argmax(gain >= reached[least])), 1)
        step = gain[point] - gain[point - 1] if reached[least] > 0 else np.nan
        share = (reached[least] - gain[point - 1]) / step
        at[kind] = tuple(each[point - 1] * (1 - share) + each[point] * share for each in courses[kind])
        slopes[kind] = (courses[kind][0][point] - courses[kind][0][point - 1]).mean() / step
    shared = at[least][1]
    columns = {"before": rows(old[0], 0 * new[0])}
    columns["gain"] = rows(0 * old[0] + reached[least], shared - new[0])
    columns |= {kind: rows(margin, -slopes[kind] * (own - shared)) for kind, (margin, own) in at.items()}
    together = pd.concat([old["prompt_id"], new["prompt_id"]])
    return pd.DataFrame({"prompt_id": together} | columns, index=together.index)


def _points(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="prompt_id")


def points(compared: Sequence[Comparison]) -> pd.DataFrame:
    """The courses by their means, for a figure.

    Returns:
        What names a comparison, `kind`, `point` (0: the stage before), `gain` of the new objective, `margin`
        of the earlier one.
    """
    parts = []
    for each in compared:
        for kind, (old, new) in each.courses.items():
            means = pd.DataFrame({"gain": _points(new).mean() - new[0].mean(), "margin": _points(old).mean()})
            parts.append(means.rename_axis("point").reset_index().assign(**each.place, kind=kind))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def states(compared: Sequence[Comparison], *, resamples: int) -> pd.DataFrame:
    """Where every kind ends, and where it stands at equal gain.

    Returns:
        What names a comparison, `kind`, `n_prompts`; with bounds (seeds crossed with prompts) `end_margin`,
        `end_gain`, and at equal gain `gain`, `margin`, `difference` (margin minus that of the first kind),
        whose p-values `difference_p` are corrected (Holm) over all rows of an axis that are not the first.
    """
    rows = []
    for each in compared:
        table, plain = at_equal_gain(each.courses), next(iter(each.courses))
        for kind, (old, new) in each.courses.items():
            ends = {STATE[:1]: old.assign(end_margin=old[max(_points(old))])}
            ends[STATE[1:2]] = new.assign(end_gain=new[max(_points(new))] - new[0])
            ends[STATE[2:]] = table.assign(margin=table[kind], difference=table[kind] - table[plain])
            row = each.place | {"kind": kind, "n_prompts": table["prompt_id"].nunique()}
            for names, part in ends.items():
                row |= _estimated(part, names, resamples=resamples)
            rows.append(row)
    found = _table(rows, ["kind", "n_prompts"], STATE)
    others = found[found.duplicated(["setting", "chain", "objective", "axis"])]
    return found.assign(difference_p=adjusted(others, "difference", over=["axis"]))


def opposition(compared: Sequence[Comparison], *, resamples: int) -> pd.DataFrame:
    """Does direct opposition drive the loss? One verdict (`verdict`) a chain and earlier objective.

    Returns:
        What names a comparison, `n_prompts`, `verdict`; with bounds and p-values (`..._p`, Holm over the
        rows) `learned` (R1, before the last stage), and at equal gain `gain`, `lost` (plain minus R1), `kept`
        (projected minus plain), `beyond` (projected minus placebo; null where that was not run), with delta
        of `metrics.DELTA`: `kept_over` (kept + delta R1), `kept_under` (kept - delta R1), `beyond_under`.
    """
    rows = []
    for each in compared:
        if PROJECTED not in each.courses or each.place["axis"] != CAUSAL:
            continue
        table = at_equal_gain(each.courses).rename(columns={"before": "learned"})
        table["lost"] = table[PLAIN] - table["learned"]
        table["kept"] = table[PROJECTED] - table[PLAIN]
        table["beyond"] = table[PROJECTED] - table.get(PLACEBO, np.nan)
        band = metrics.DELTA * table["learned"]
        table = table.assign(kept_over=table["kept"] + band, kept_under=table["kept"] - band)
        table["beyond_under"] = table["beyond"] - band
        row = each.place | {"n_prompts": table["prompt_id"].nunique()}
        rows.append(row | _estimated(table, DECIDING, resamples=resamples))
    found = _table(rows, ["n_prompts"], DECIDING)
    found = found.assign(**{f"{name}_p": adjusted(found, name) for name in DECIDING})
    return found.assign(verdict=[verdict(row) for row in found.to_dict("records")])


def verdict(row: Mapping[str, Any]) -> str:
    """What one row of `opposition` allows one to say, by a rule fixed before looking.

    A contrast counts where its interval is clear of zero and its corrected p at most .05. Where something was
    learned, something gained, and something lost: opposition drives the loss if projected steps keep more
    than plain ones and more than the placebo. It does not if they keep as much as plain ones (within delta of
    R1) and no more than the placebo, or if they keep at most delta of R1 more than the placebo.
    """
    learned, gain, lost, kept, beyond, over, under, beyond_under = (_side(row, name) for name in DECIDING)
    if learned < 1:
        return metrics.NOT_LEARNED
    if gain < 1:
        return NO_GAIN
    if lost > -1:
        return NO_LOSS
    if kept > 0 and beyond > 0:
        return DRIVES
    if over > 0 and under < 0 and beyond < 1:
        return NOT_DRIVER
    return AS_GOOD if beyond_under < 0 else UNDECIDED


def _side(row: Mapping[str, Any], name: str) -> int:
    """On which side of zero a contrast surely lies: 1, -1, or 0 where that is not known."""
    if pd.isna(row[name]) or row[f"{name}_p"] > 0.05:
        return 0
    return int(row[f"{name}_low"] > 0) - int(row[f"{name}_high"] < 0)


def direction(compared: Sequence[Comparison], *, resamples: int) -> pd.DataFrame:
    """Did the projection change the direction of the steps? From the ledgers, pair by pair.

    Returns:
        What names a comparison, `kind` (not plain), `split` of the earlier pairs, `n_prompts`; with bounds,
        in nats: `plain` (how far the earlier loss should rise by the gradients at the start of each stretch,
        under plain steps) and `change` of it (this kind minus plain).
    """
    rows = []
    for each in compared:
        if each.place["axis"] != CAUSAL:
            continue
        left = {kind: _left(group, each.place["objective"]) for kind, group in each.groups.items()}
        for kind in list(left)[1:]:
            table = pd.DataFrame({"plain": left[PLAIN], "change": left[kind] - left[PLAIN]})
            for split, part in table.groupby("split"):
                row = each.place | {"kind": kind, "split": split}
                row |= {"n_prompts": part.index.get_level_values("prompt_id").nunique()}
                rows.append(row | _estimated(part, ["plain", "change"], resamples=resamples))
    return _table(rows, ["kind", "split", "n_prompts"], ["plain", "change"])


def _left(group: Sequence[RunPaths], objective: str) -> pd.Series:
    parts = [by_pair(read_table(run.ledger_pairs)).assign(seed=run.seed) for run in group]
    table = pd.concat(parts).reset_index().query("previous_objective == @objective")
    return table.set_index(["seed", "split", "prompt_id", "pair_id"])["left"]


def _estimated(table: pd.DataFrame, names: Sequence[str], *, resamples: int) -> dict[str, float]:
    return metrics.estimated(table, names, resamples=resamples, rng=np.random.default_rng(0))


def _table(rows: list[dict[str, Any]], others: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    numbers = bounds(*numbers)
    return pd.DataFrame(rows, columns=[*PLACE, *others, *numbers]).astype(dict.fromkeys(numbers, float))
