"""Behind the mean: which pairs moved, were they the confident ones, and was a share lost or a sum?

Of every run there is a table from `pair_change`, a row a held-out pair. What is asked of one run is asked of
several runs of a chain in the same way: tables of equal pairs in, resampled are prompts, and runs where there
are several. The pairs of two runs can be crossed, so that the luck of one is not on both sides.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import Generator

from seqdpo_utils.metrics import DELTA, bounded, bounds, interval, resampled_means, wide_margins, widening

UNCHANGED = 0.01
"""A policy margin that moved by at most so many nats a token, or within rounding, counts as unchanged."""
MIN_QUARTILE = 8
"""Fewer pairs in a quartile are not shown."""
CROSS = "cross_seed"
KEYS = {
    "stage1_margin": ("margin_before", "margin_change"),
    CROSS: ("margin_before", "margin_change"),
    "stage1_policy_margin": ("before", "change"),
    "base": ("base", "change"),
}
"""Name of a key to the columns that sort and that are averaged; `CROSS` takes them from different runs."""
_LINE = ("slope", "intercept")


def pair_change(
    measures: pd.DataFrame, objective: str, *, before: str, after: str, noise: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """Each held-out pair's two margins at two checkpoints, their change, and what the change means.

    Args:
        measures: from `metrics.pair_measures`.
        objective: whose pairs.
        before, after: checkpoints.
        noise: rounding of the sums, from `records.rounding_noise`.

    Returns:
        `objective`, `pair_id`, `prompt_id`; `base`, `before`, `after`, `change` (policy margin, nats per
        token); `within` (`unchanged_within`), `effect` ("helped", "harmed", "unchanged"), `reordered`
        ("gained": now right, "lost": no longer right, "same"); `margin_before`, `margin_after`,
        `margin_change` (the DPO margin, 0 at the base).
    """
    wide = wide_margins(measures, objective, measure="policy_margin")
    table = wide[["prompt_id", "base"]].assign(before=wide[before], after=wide[after])
    change, was_right, is_right = table["after"] - table["before"], table["before"] > 0, table["after"] > 0
    last = measures.query("objective == @objective and checkpoint == @after and split == 'eval'")
    within = unchanged_within(last.set_index("pair_id"), noise).reindex(table.index)
    effect = np.select([change > within, change < -within], ["helped", "harmed"], "unchanged")
    reordered = np.select([~was_right & is_right, was_right & ~is_right], ["gained", "lost"], "same")
    table = table.assign(change=change, within=within, effect=effect, reordered=reordered)
    margin = wide_margins(measures, objective)
    table = table.assign(margin_before=margin[before], margin_after=margin[after])
    table["margin_change"] = table["margin_after"] - table["margin_before"]
    table.insert(0, "objective", objective)
    return table.reset_index().rename_axis(columns=None)[["objective", "pair_id", *table.columns[1:]]]


def unchanged_within(records: pd.DataFrame, noise: Mapping[str, Any] | None) -> pd.Series:
    """How far a pair's policy margin may move and count as unchanged, in nats a token.

    The greater of `UNCHANGED` and three times the rounding of the difference of two policy margins. Errors of
    single tokens add up at random, so that with rms e of a sum over N tokens on average a mean over n tokens
    is off by e / sqrt(N n). An rms of 16 sums leaves 0.9 % of the unchanged pairs outside (Student's t).

    Args:
        records: `chosen_tokens`, `rejected_tokens`.
        noise: from `records.rounding_noise`. Null for float32; without an `rms` (quantised weights) rounding
            is not known, and `UNCHANGED` stands alone.
    """
    tokens = records[["chosen_tokens", "rejected_tokens"]]
    rms = (noise or {}).get("rms") or 0.0
    rounding = rms * np.sqrt(2 * (1 / tokens).sum(axis=1) / tokens.to_numpy().mean())
    return (3 * rounding).clip(lower=UNCHANGED).rename("within")


def churn(before: pd.Series, after: pd.Series) -> float:
    """Share of pairs whose two answers changed places: the sign of the policy margin differs."""
    return float(((before > 0) != (after > 0)).mean())


def crossed_zero(changes: pd.DataFrame) -> pd.Series:
    """Which of a pair's margins changed sign: "both", "DPO margin", "policy margin" or "neither".

    At the base every DPO margin is zero, has no sign, and so does not change it.
    """
    summed = changes["margin_before"] * changes["margin_after"] < 0
    mean = changes["before"] * changes["after"] < 0
    names = np.select([summed & mean, summed, mean], ["both", "DPO margin", "policy margin"], "neither")
    return pd.Series(names, index=changes.index, name="crossed")


def quartiles(
    tables: Sequence[pd.DataFrame], key: str, *, resamples: int, rng: Generator, shared: bool = True
) -> pd.DataFrame:
    """Mean change in four equal groups of pairs, cut by a key; cut points move with every bootstrap draw.

    `CROSS` sorts by one run what changed in another, over all ordered pairs of runs; the other keys sort each
    run by itself.

    Args:
        tables: of the runs of one chain, from `pair_change`, with equal pairs.
        key: one of `KEYS`.
        resamples: number of draws.
        rng: the only source of chance.
        shared: whether the runs were trained on pairs in common, whose noise is then in all their margins.

    Returns:
        `key`, `measure` ("margin" or "policy_margin": what changed), `quartile` (1 lowest key to 4 highest),
        `n_pairs` (a pair on a cut counts in part on both sides, here on one), `change`, `change_low`,
        `change_high`, and `regression`: the most that regression to the mean can do to it (`_regression`).
        Without a row where a quartile has fewer than `MIN_QUARTILE` pairs, or there is one run to cross.
    """
    columns = ["key", "measure", "quartile", "n_pairs", *bounds("change"), "regression"]
    if not _sortings(tables, key):
        return pd.DataFrame(columns=columns)
    draws, regressed = _quarter_means(tables, key, resamples, rng), _regression(tables, key, shared)
    place = {"key": key, "measure": "margin" if KEYS[key][1] == "margin_change" else "policy_margin"}
    rows = []
    for k, part in enumerate(np.array_split(np.arange(len(tables[0])), 4)):
        size = {"quartile": k + 1, "n_pairs": len(part), "regression": regressed[k]}
        rows.append(place | size | bounded({"change": draws[:, k]}))
    return pd.DataFrame(rows, columns=columns)


def highest_minus_lowest(
    tables: Sequence[pd.DataFrame], key: str, *, resamples: int, rng: Generator, shared: bool = True
) -> dict[str, Any] | None:
    """Mean change of the highest quartile, of the lowest, and their difference. Arguments: of `quartiles`.

    Returns:
        `lowest`, `highest`, `difference` with `_low` and `_high`; `regression` (of the difference, 0 or
        less), and `reading`: what they allow one to say. None where `quartiles` has no row.
    """
    if not _sortings(tables, key):
        return None
    draws, regressed = _quarter_means(tables, key, resamples, rng), _regression(tables, key, shared)
    found = {"lowest": draws[0, 0], "highest": draws[0, 3]}
    found |= bounded({"difference": draws[:, 3] - draws[:, 0]})
    bound = min(regressed[3] - regressed[0], 0.0)
    reading = _reading(found["difference_low"], found["difference_high"], bound)
    return found | {"regression": bound, "reading": reading}


def _reading(low: float, high: float, bound: float) -> str:
    if low > 0:
        return "highest changed for the better"
    if high < bound:
        return "highest changed for the worse"
    return "regression to the mean not excluded" if high < 0 else "no contrast shown"


def _sortings(tables: Sequence[pd.DataFrame], key: str) -> list[tuple[pd.DataFrame, pd.DataFrame, int]]:
    """The table that sorts, the one that changed, and the place of the latter; none with too few pairs."""
    if len(tables[0]) < 4 * MIN_QUARTILE:
        return []
    runs = list(enumerate(tables))
    both = itertools.product(runs, runs)
    return [(a, b, place) for (other, a), (place, b) in both if (other != place) == (key == CROSS)]


def _quarter_means(tables: Sequence[pd.DataFrame], key: str, resamples: int, rng: Generator) -> np.ndarray:
    """Mean change in each quarter, then draws of it: (1 + resamples, 4).

    Prompts and runs are drawn apart, as in `metrics.resampled_means`; two quarters hold half of the prompts,
    and their difference is widened as a mean of so few.
    """
    sorts, changes = KEYS[key]
    found = _sortings(tables, key)
    weights, prompts = _prompt_weights(tables[0], resamples, rng)
    means = np.stack([_cut(a[sorts], b[changes], weights) for a, b, _ in found])
    point = means[:, 0].mean(axis=0)
    draws = point + widening(max(1, prompts // 2)) * (means.mean(axis=0) - point)
    runs = [place for *_, place in found]
    draws[1:] += resampled_means(means[:, 0], runs, resamples=resamples, rng=rng) - point
    return draws


def _prompt_weights(table: pd.DataFrame, resamples: int, rng: Generator) -> tuple[np.ndarray, int]:
    """How often each pair counts: once, then in each draw of prompts; and the number of prompts."""
    names, prompt = np.unique(table["prompt_id"], return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, prompt]
    return np.vstack([np.ones_like(prompt), drawn]), len(names)


def _cut(key: pd.Series, change: pd.Series, weights: np.ndarray) -> np.ndarray:
    """Weighted mean change in each quarter of the weight, lowest key first: (draws, 4).

    A running sum of change over weight, read at the four cuts, so that a pair on a cut counts in part.
    """
    order = np.argsort(key.to_numpy(), kind="stable")
    weight = weights[:, order]
    ends = np.cumsum(weight, axis=1)
    sums = np.cumsum(weight * change.to_numpy()[order], axis=1)
    cuts = ends[:, -1:] * np.arange(5) / 4
    read = [np.interp(at, [0, *end], [0, *total]) for at, end, total in zip(cuts, ends, sums, strict=True)]
    return np.diff(read, axis=1) / (ends[:, -1:] / 4)


def _regression(tables: Sequence[pd.DataFrame], key: str, shared: bool) -> np.ndarray:
    """The most that regression to the mean can change each quarter, on average over the sortings: (4,).

    Of what stage 1 did to the pairs, some is luck that stage 2 need not find again. In the key that luck has
    at most the variance of all that stage 1 did; between two runs, where the pairs they share bring it about,
    at most the covariance. Luck is unrelated to the rest, so it goes with the key by that variance over the
    key's. The base's key has none, nor has that of a run that shares no training pair.
    """
    sorts, _ = KEYS[key]
    if key == "base" or (key == CROSS and not shared):
        return np.zeros(4)
    parts = []
    for a, b, _ in _sortings(tables, key):
        done = [t["margin_before"] if sorts == "margin_before" else t["before"] - t["base"] for t in (a, b)]
        centred = a[sorts] - a[sorts].mean()
        variance = float(centred.var(ddof=0))
        slope = float(np.cov(*done, ddof=0)[0, 1]) / variance if variance else 0.0
        parts.append(-slope * _cut(a[sorts], centred, np.ones((1, len(a))))[0])
    return np.mean(parts, axis=0)


def kept_line(tables: Sequence[pd.DataFrame], *, crossed: bool, resamples: int, rng: Generator) -> np.ndarray:
    """Slope and intercept of what was kept (margin after) on what was learned (margin before), with draws.

    With `crossed` false it is the least-squares line within each run: what became of all that the run held.
    Where part of that was luck which the later stage draws anew, the slope is attenuated: below 1 although
    nothing that another run would find again was lost. With `crossed` true, what another run learned is the
    instrument, over all ordered pairs of runs: slope = cov(M_1 of b, M_2 of a) / cov(M_1 of b, M_1 of a).
    That luck is then on one side only and drops out, if the runs were not trained on the same pairs.

    Args:
        tables: of the runs of one chain, from `pair_change`, with equal pairs.
        crossed: as above.
        resamples: number of draws of prompts and, apart, of runs.
        rng: the only source of chance.

    Returns:
        (1 + resamples, 2). Null throughout where there are no two runs to cross, or where the instrument
        cannot be told from one that says nothing of what was learned.
    """
    weights, prompts = _prompt_weights(tables[0], resamples, rng)
    runs = len(tables)
    learned = np.stack([table["margin_before"].to_numpy() for table in tables])
    kept = np.stack([table["margin_after"].to_numpy() for table in tables])
    means_l, means_k = (_weighted(values[:, None] * weights, weights) for values in (learned, kept))
    sums = np.zeros((2, runs, len(weights)))
    for a, b in itertools.product(range(runs), repeat=2):
        if (a != b) == crossed:
            away = weights * (learned[b] - means_l[b][:, None])
            sums[:, a] += [_weighted(away * values, weights) for values in (kept[a], learned[a])]
    if not sums.any():
        return np.full((len(weights), 2), np.nan)
    parts = np.stack([*sums, means_k, means_l])  # (4, runs, draws)
    over_prompts = parts.mean(axis=1)
    point = _line(over_prompts[:, 0])
    strength = over_prompts[1]
    strength = strength[0] + widening(prompts) * (strength[1:] - strength[0])
    if interval(strength)[0] <= 0:
        return np.full((len(weights), 2), np.nan)
    draws = point + widening(prompts) * (_line(over_prompts) - point)
    picked = rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    draws[1:] += widening(runs) * (_line(parts[:, :, 0] @ picked.T) - point)
    return draws


def _weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums over pairs of values that carry their weights, over the weight of each draw."""
    return values.sum(axis=-1) / weights.sum(axis=1)


def _line(parts: np.ndarray) -> np.ndarray:
    """Slope and intercept from two covariances and two means: (4, ...) to (..., 2)."""
    with_kept, with_learned, kept, learned = parts
    slope = with_kept / with_learned
    return np.stack([slope, kept - slope * learned], axis=-1)


def loss_pattern(line: np.ndarray, *, learned: float) -> dict[str, Any]:
    """What `kept_line` allows one to say of two hypotheses, by a rule fixed before looking (`DELTA`).

    A loss in proportion keeps a share of every margin: intercept 0. A uniform shift takes as much from all:
    slope 1. Either is refused where its interval excludes that number, and held only where the other is
    refused and its own interval lies within a band: 0 plus or minus DELTA of the mean learned, 1 plus or
    minus DELTA.

    Args:
        line: (1 + resamples, 2).
        learned: mean margin before.

    Returns:
        `slope`, `intercept` with bounds, and `pattern`.
    """
    found = bounded(dict(zip(_LINE, line.T, strict=True)))
    _, low, high, _, below, above = found.values()
    even, through_zero = low > 1 - DELTA and high < 1 + DELTA, max(-below, above) < DELTA * learned
    no_shift, no_share = high < 1 or low > 1, above < 0 or below > 0
    rules = {
        "kept as learned": even and through_zero,
        "in proportion": no_shift and through_zero,
        "uniform shift": no_share and even,
        "neither": no_shift and no_share,
        "not a uniform shift": no_shift,
        "not in proportion": no_share,
    }
    pattern = next((name for name, holds in rules.items() if holds), "cannot be decided")
    return found | {"pattern": pattern}


def line_band(line: np.ndarray, learned: pd.Series, *, points: int = 25) -> pd.DataFrame:
    """`kept_line` over the range of what was learned: `learned`, `kept`, `kept_low`, `kept_high`."""
    x = np.linspace(learned.min(), learned.max(), points)
    kept = line[:, 1:] + line[:, :1] * x
    low, high = np.quantile(kept[1:], [0.025, 0.975], axis=0)
    return pd.DataFrame({"learned": x, "kept": kept[0], "kept_low": low, "kept_high": high})
