"""What a study of a given size can decide, from measured spreads, and what deciding more would cost.

The mean of an objective's margin over prompts and runs differs from its true value by three parts: what all
runs do to a prompt (`prompt_sd`), what one run does to one prompt (`rest_sd`), what one run does to all
prompts (`run_sd`). The rule is that of `metrics`: a 95 % interval must be clear of a bound.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from seqdpo_utils.chains import Chain
from seqdpo_utils.conflict import LEVEL, NEGLIGIBLE
from seqdpo_utils.metrics import DELTA, edges, followed, margins, over_seeds
from seqdpo_utils.paths import RunPaths, read_chain, read_json, read_table

POWER = 0.8
"""The chance of a verdict at which an effect counts as decidable."""
SHIPPED = Path(__file__).parent / "embedded" / "spreads.json"
"""Spreads of an earlier study of the embedded rows, for a plan before the first run."""
QUANTITIES = {"learned": "a gain", "backward": "a change backward", "order": "an effect of the order"}
"""What is decided against zero, in the words of a page."""
_EDGES = ("over_lower", "over_upper")
_SDS = ["prompt_sd", "rest_sd", "run_sd"]
_COLUMNS = ["setting", "chain", "objective", "quantity", "mean", "prompts", "seeds", "half", *_SDS]
_GRID = (np.arange(40) + 0.5) / 40


def components(values: pd.DataFrame) -> dict[str, float]:
    """SDs of the parts of a table of prompts (rows) by runs (columns), from its mean squares.

    Returns:
        `prompt_sd`, `rest_sd`, `run_sd`. Of one run only the sum of the first two can be seen: it is given as
        `prompt_sd`, and `run_sd` is NaN.
    """
    prompts, runs = values.shape
    if runs == 1:
        return dict(zip(_SDS, (float(values.iloc[:, 0].std()), 0.0, np.nan), strict=True))
    by_prompt, by_run = values.mean(axis=1), values.mean(axis=0)
    rest = values.sub(by_prompt, axis=0).sub(by_run, axis=1) + by_prompt.mean()
    noise = float((rest**2).to_numpy().sum() / (prompts - 1) / (runs - 1))
    found = (by_prompt.var() - noise / runs, noise, by_run.var() - noise / prompts)
    return {name: max(float(square), 0.0) ** 0.5 for name, square in zip(_SDS, found, strict=True)}


def spreads(runs: Sequence[RunPaths], *, beta: float) -> pd.DataFrame:
    """What was measured of each quantity for the first objectives of every chain of at least two stages.

    Returns:
        `setting`, `chain`, `objective`, `quantity`; `mean`, `prompts`, `seeds` and the SDs of `components` in
        margin for "learned" R1, "backward" R2 - R1, "over_lower" and "over_upper" D(1 -+ delta), "order"
        (last minus first). For "within" and "matched", cosines of half batches, `prompts` are measurements,
        `prompt_sd` their SD and `half` the pairs in a half.
    """
    rows = []
    for group, chain, objective in followed(over_seeds(runs)):
        place = {"setting": group[0].setting, "chain": group[0].chain, "objective": objective}
        by_prompt = _by_prompt(group, objective, beta=beta)
        first, end = (by_prompt[name] for name in (chain.checkpoints[1], group[0].chain))
        values = {"learned": first, "backward": end - first} | edges(first, end)
        mirror = [run.at(Chain(chain.stages[::-1])) for run in group]
        plain = not any(stage.variants for stage in chain.stages) and chain.last != chain.stages[0]
        if plain and set(mirror) <= set(runs):
            values["order"] = _by_prompt(mirror, objective, beta=beta)[mirror[0].chain] - end
        for name, column in values.items():
            table = column.unstack("seed")
            size = {"mean": float(column.mean()), "prompts": len(table), "seeds": len(group)}
            rows.append(place | {"quantity": name} | size | components(table))
        rows += [place | row for row in _cosines(group, objective)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _by_prompt(group: Sequence[RunPaths], objective: str, *, beta: float) -> pd.DataFrame:
    """Mean held-out margins by prompt and seed (index), one column a checkpoint."""
    return margins(group, objective, beta=beta).groupby(["prompt_id", "seed"]).mean()


def _cosines(group: Sequence[RunPaths], objective: str) -> list[dict[str, Any]]:
    """Rows "within" and "matched", from the held-out pairs of the earlier objective."""
    read = pd.concat([read_chain(run, "conflict").assign(seed=run.seed) for run in group])
    read = read[(read["previous_objective"] == objective) & (read["split"] != "train")]
    half = read_json(group[0].run_json)["parameters"]["conflict_pairs"] // 2
    size, rows = {"prompts": len(read) / len(group), "seeds": len(group), "half": half}, []
    halves = {"within": ["within_cosine", "within_new_cosine"], "matched": ["matched_cosine"]}
    for name, columns in halves.items():
        cosines = read[columns].astype(float)
        spread = cosines.groupby(read["seed"]).std().to_numpy()
        means = {"mean": np.nanmean(cosines.to_numpy()), "prompt_sd": np.nanmean(spread)} if len(read) else {}
        rows.append({"quantity": name} | size | means)
    return rows


def typical(spreads: pd.DataFrame) -> pd.DataFrame:
    """Medians over the chains, by quantity; `spreads` as the function of that name gives it."""
    return spreads.groupby("quantity")[_COLUMNS[4:]].median()


def shipped() -> tuple[pd.DataFrame, str]:
    """`typical` spreads of an earlier study of the embedded rows, and which study that was."""
    content = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return pd.DataFrame(content["spreads"]).T.astype(float).rename_axis("quantity"), content["measured"]


def known(root: Path, scale: str) -> tuple[pd.DataFrame, str]:
    """`typical` spreads of the study of this scale that was run here, else the shipped ones; and whose."""
    table = RunPaths(root / "runs", scale, "").summary("spreads")
    found = read_table(table) if table.is_file() else ()
    return (typical(found), f"the {scale} study run here") if len(found) else shipped()


def chance(
    effect: float, spread: Mapping[str, float], *, prompts: int, seeds: int = 1, level: float = 0.95
) -> float:
    """Probability that the interval of a mean, whose true value is `effect`, lies above zero.

    For normal parts: given the two sample variances the interval's reach is known (`metrics.resampled_means`)
    and the mean is normal and independent of it; their chi-square distributions are averaged over. With one
    seed the truth is that of this run, and the chance that of Student's t test; NaN where several seeds are
    asked for and `run_sd` is not known.

    Args:
        effect: in the unit of the SDs.
        spread: `prompt_sd` and, with several seeds, `rest_sd` and `run_sd`.
        prompts, seeds: how many.
        level: of the interval.
    """
    own, shared = spread["prompt_sd"] ** 2, 0.0
    if seeds > 1:
        own, shared = own + spread["rest_sd"] ** 2 / seeds, spread["run_sd"] ** 2
    error = own / prompts + shared / seeds
    reach = _reach(own / prompts, prompts - 1, level)[:, None]
    if seeds > 1:
        # what a run does to a prompt is seen in both ways of resampling
        reach = reach + _reach((shared + spread["rest_sd"] ** 2 / prompts) / seeds, seeds - 1, level)
    return float(stats.norm.sf((np.sqrt(reach) - effect) / np.sqrt(error)).mean())


def _reach(square: float, df: float, level: float) -> np.ndarray:
    """Squared reach of a t interval over the grid of its sample variance, whose expectation is `square`."""
    return stats.t.ppf((1 + level) / 2, df) ** 2 * square * stats.chi2.ppf(_GRID, df) / df


def smallest(
    spread: Mapping[str, float], *, prompts: int, seeds: int = 1, level: float = 0.95, power: float = POWER
) -> float:
    """The effect whose interval lies above zero with probability `power`; arguments as of `chance`.

    NaN where several seeds are asked for and `run_sd` is not known.
    """
    scale = float(sum(spread[name] for name in (_SDS if seeds > 1 else _SDS[:1])))
    if not scale > 0:
        return scale
    size = {"prompts": prompts, "seeds": seeds, "level": level}
    return optimize.brentq(lambda effect: chance(effect, spread, **size) - power, 0, 100 * scale)


def decidable(typical: pd.DataFrame, *, prompts: int, seeds: int) -> pd.DataFrame:
    """The table with `smallest`, the smallest effect that a study of this size decides, for every margin."""
    margins = typical.drop(index=["within", "matched"], errors="ignore")
    found = [smallest(row, prompts=prompts, seeds=seeds) for row in margins.to_dict("records")]
    return margins.assign(smallest=found)


def retention(typical: pd.DataFrame, gains: Sequence[float], *, prompts: int, seeds: int) -> pd.DataFrame:
    """What can be said of retention, by how much was gained, at the spread as measured.

    Returns:
        `gain`; `lost_below`: the retention from which on "lost" is found with probability `POWER`;
        `not_lost_above`: the same for "not lost"; `stable`: least chance of "stable" where all was kept.
    """
    lower, upper = (typical.loc[name] for name in _EDGES)
    size, rows = {"prompts": prompts, "seeds": seeds}, []
    reach = smallest(lower, **size)
    for gain in gains:
        both = [chance(DELTA * gain, edge, **size) for edge in (lower, upper)]
        ends = {"lost_below": 1 - DELTA - reach / gain, "not_lost_above": 1 - DELTA + reach / gain}
        rows.append({"gain": gain} | ends | {"stable": max(sum(both) - 1, 0.0)})
    return pd.DataFrame(rows)


def ways(typical: pd.DataFrame, *, prompts: int, seeds: int, scoring: float) -> pd.DataFrame:
    """Three ways to decide more, beside the study as it is.

    Whether twice the steps double the gain is not known, nor what they do to the spread; so `loss` has the
    spread as it is, `loss_at_worst` has it over prompts double with the gain.

    Args:
        typical: from `typical`, with a gain above zero.
        prompts, seeds: of the study as it is.
        scoring: share of its cost that grows with held-out pairs.

    Returns:
        `way`, `cost` (1: as it is), `loss` and `loss_at_worst`: the smallest loss of retention that is named
        with probability `POWER`, as a share of the gain (NaN where `run_sd` is not known); `return`: by what
        power of the cost `loss_at_worst` falls. Without a second seed losses are those of one run, and more
        seeds have no return that could be compared.
    """
    edge, gain = typical.loc["over_lower"], typical.loc["learned", "mean"]
    wider = edge * pd.Series({"prompt_sd": 2, "rest_sd": 2}).reindex(edge.index, fill_value=1)
    more = max(2 * seeds, 3)
    doubled = "twice the steps, if that doubles the gain (its spread the same to doubled)"
    plans = {
        "as it is": (1.0, prompts, seeds, gain, edge),
        "twice the held-out pairs": (1 + scoring, 2 * prompts, seeds, gain, edge),
        f"{more} seeds{' (about any run)' * (seeds == 1)}": (more / seeds, prompts, more, gain, edge),
        doubled: (2 - scoring, prompts, seeds, 2 * gain, wider),
    }
    rows = []
    for way, (cost, pairs, runs, gained, worst) in plans.items():
        found = [smallest(spread, prompts=pairs, seeds=runs) for spread in (edge, worst)]
        rows.append((way, cost, *(DELTA + effect / gained for effect in found)))
    table = pd.DataFrame(rows, columns=["way", "cost", "loss", "loss_at_worst"])
    fall = np.log(table["loss_at_worst"].iloc[0] / table["loss_at_worst"])
    paid = (fall / np.log(table["cost"].where(table["cost"] > 1))).round(9)
    return table.assign(**{"return": paid.mask((table.index == 2) & (seeds == 1))})


def measurements(typical: pd.DataFrame, *, half: int) -> float:
    """How many measurements of halves of `half` pairs show a cosine of `NEGLIGIBLE` with chance `POWER`.

    A half is signal and noise of single pairs, so its cosine with another is w = h s / (1 + h s) for h pairs
    (Spearman 1910 and Brown 1910), and the cosine of two objectives is shrunk by w. Shown is a cosine of
    which both the matched and the within cosine have intervals of `conflict.LEVEL` clear of zero; their
    spread is taken as measured. Infinite where halves did not agree with themselves on average.
    """
    within, matched = typical.loc["within"], typical.loc["matched"]
    signal = within["mean"] / (1 - within["mean"]) / within["half"]
    shrunk = half * signal / (1 + half * signal)
    if not shrunk > 0:
        return np.inf
    tests = [(shrunk, within), (NEGLIGIBLE * shrunk, matched)]
    wanted = 1 - (1 - POWER) / len(tests)  # both at once

    def lacking(log_count: float) -> float:
        size = {"prompts": np.exp(log_count), "level": LEVEL}
        return min(chance(effect, spread, **size) for effect, spread in tests) - wanted

    ends = np.log(3), np.log(1e9)
    return 3 if lacking(ends[0]) >= 0 else int(np.ceil(np.exp(optimize.brentq(lacking, *ends))))


def scoring_share(runs: Sequence[RunPaths]) -> float:
    """Measured share of held-out scoring in the seconds of all stages that the chains needed."""
    scored = trained = 0.0
    for node in {each.node: each for run in runs for each in run.lineage}.values():
        told = read_json(node.run_json)
        scored += told["scoring"][node.chain]["seconds"]
        trained += told["seconds_per_step"] * len(read_table(node.history))
    return scored / (scored + trained)


def run_spread_in_words(typical: pd.DataFrame, measured: str, *, seeds: int) -> str:
    """What intervals say of run-to-run spread, and how large it was where it was measured, for a page.

    Args:
        typical, measured: from `known` or `shipped`.
        seeds: behind the intervals of the page.
    """
    said = f"Run-to-run spread is {'not ' if seeds == 1 else ''}in these intervals"
    change = typical.loc["backward"]
    if pd.isna(change["run_sd"]):
        return f"{said}, and {measured} did not measure it."
    gain = typical.loc["learned", "run_sd"]
    return (
        f"{said}. By {measured} ({change['seeds']:.0f} seeds) a gain differs between runs by an SD of "
        f"{gain:.2f}, a change backward by {change['run_sd']:.2f}."
    )


def decidable_in_words(typical: pd.DataFrame, *, prompts: int, seeds: int) -> list[str]:
    """What a study of this size decides, one sentence each: of means, of retention."""
    typical, told = _at_best(typical, seeds)
    found = decidable(typical, prompts=prompts, seeds=seeds)["smallest"]
    effects = (f"{words} of {found[name]:.2f}" for name, words in QUANTITIES.items() if name in found)
    lines, gain = [f"Margins: {told}{', '.join(effects)}."], typical.loc["learned", "mean"]
    if gain > 0:
        size = {"prompts": prompts, "seeds": seeds}
        left = retention(typical, [gain], **size)["lost_below"].iloc[0]
        needed = max(smallest(typical.loc[name], **size, power=(1 + POWER) / 2) for name in _EDGES) / DELTA
        lines.append(
            f"Retention of a gain of {gain:.2f} (the median there): lost, where {left:.0%} or less is left; "
            f"stable, from a gain of {needed:.1f} on, were its spread the same."
        )
    return lines


def _at_best(typical: pd.DataFrame, seeds: int) -> tuple[pd.DataFrame, str]:
    """The spreads as a study of so many seeds has them.

    Several seeds whose spread was not measured are taken as alike: what they decide at best. With one seed,
    what one run does to one prompt is part of the spread over prompts.
    """
    if seeds == 1:
        rest = typical["rest_sd"].fillna(0.0)
        return typical.assign(prompt_sd=np.hypot(typical["prompt_sd"], rest), rest_sd=0.0), ""
    if typical["run_sd"].isna().all():
        return typical.fillna({"run_sd": 0.0}), "at best, were all runs alike, "
    return typical, ""


def gradients_in_words(typical: pd.DataFrame, *, half: int, count: int) -> str:
    """How many measurements of the gradients would decide, beside the `count` that there are."""
    needed = {size: measurements(typical, half=size) for size in sorted({half, 8, 32})}
    if np.isinf(needed[half]):
        return "Gradients: nothing, as halves of one objective did not agree with themselves."
    told = ", ".join(f"{number:,} of {size}" for size, number in needed.items())
    said = f"Gradients: a cosine of {NEGLIGIBLE} by measurements of halves"
    return f"{said}: {told} pairs; here {count} of {half}."


def cheapest_in_words(typical: pd.DataFrame, *, prompts: int, seeds: int, scoring: float) -> str:
    """Which way to decide more lowers the smallest decidable loss of retention most for its cost."""
    if not typical.loc["learned", "mean"] > 0:
        return "More: nothing was learned; raise learning rate or steps first."
    typical, told = _at_best(typical, seeds)
    table, others = ways(typical, prompts=prompts, seeds=seeds, scoring=scoring), []
    for row in table.iloc[1:].itertuples():
        ends = dict.fromkeys(f"{loss:.0%}" for loss in (row.loss, row.loss_at_worst))
        loss = "not known" if pd.isna(row.loss) else " to ".join(ends)
        others.append(f"{row.way}: {loss} at {row.cost:.2f} times the cost")
    return (
        f"More: {told}the smallest loss that is named is {table['loss'].iloc[0]:.0%} of the gain. "
        f"With {'; '.join(others)}. Most for its cost: {table.loc[table['return'].idxmax(), 'way']}."
    )
