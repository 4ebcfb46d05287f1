"""Verdicts on a whole study: p-values, Holm's correction, and how often the rule errs if nothing happens."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from seqdpo_utils import metrics


def p_value(value: np.ndarray, low: np.ndarray, high: np.ndarray, *, df: int) -> np.ndarray:
    """Two-sided p of a mean of zero, from its 95 % interval: .05 where a bound is zero, Student's t beyond.

    Args:
        value, low, high: the mean and its bounds; numbers or arrays.
        df: degrees of freedom: prompts less one, or seeds less one where these are several and fewer.
    """
    reach = np.maximum(np.where(value > 0, value - low, high - value), 1e-12)
    return 2 * stats.t.sf(stats.t.ppf(0.975, df) * np.abs(value) / reach, df)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for how many there are on the last axis (Holm 1979, Scand. J. Statist. 6)."""
    order, m = np.argsort(p, axis=-1), np.shape(p)[-1]
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(m, 0, -1)
    adjusted = np.maximum.accumulate(steps, axis=-1).clip(max=1)
    return np.take_along_axis(adjusted, np.argsort(order, axis=-1), axis=-1)


def units(seeds: int, prompts: int) -> int:
    """What a mean over seeds and prompts was repeated over: the fewer of those that are several, else 1."""
    return min((size for size in (seeds, prompts) if size > 1), default=1)


def adjusted(table: pd.DataFrame, name: str, *, over: Sequence[str] = ()) -> pd.Series:
    """p-values of a column of means, adjusted over the rows that have one (Holm); null in the others.

    Args:
        table: `seeds`, `n_prompts`, and the column with its bounds.
        name: of the column.
        over: columns; rows that differ in them are no family.
    """
    known = table[table[name].notna()]
    counted = [units(*sizes) for sizes in zip(known["seeds"], known["n_prompts"], strict=True)]
    values = (known[bound].to_numpy(dtype=float) for bound in metrics.bounds(name))
    p = pd.Series(p_value(*values, df=np.array(counted) - 1), known.index)
    for rows in known.groupby(list(over)).groups.values() if over else [known.index]:
        p[rows] = holm(p[rows].to_numpy())
    return p.reindex(table.index)


def decided(outcomes: pd.Series) -> list[str]:
    """The outcomes that say something, each once."""
    return [name for name in outcomes.unique() if name not in ("undecided", metrics.NOT_LEARNED)]


def several_fates(fates: pd.DataFrame) -> bool:
    """Whether no single fate fits all objectives: some clearly above an edge of the band, others below it.

    `fates`: from `contrasts.fates_over_seeds`; only what stands after Holm's correction counts.
    """
    learned = fates[fates["outcome_holm"] != metrics.NOT_LEARNED]
    sides = [np.sign(learned[name]) * (learned[f"{name}_p"] <= 0.05) for name in metrics.DECIDING[2:]]
    return any(_differ(side.to_numpy(dtype=float)) for side in sides)


def _differ(sides: np.ndarray) -> np.ndarray:
    """Whether some on the last axis lie above and others below."""
    return (sides > 0).any(axis=-1) & (sides < 0).any(axis=-1)


def null_rates(fates: pd.DataFrame, *, rng: np.random.Generator, studies: int = 200) -> pd.DataFrame:
    """How often the rule errs in studies of this size where nothing happens, or nothing was learned.

    Simulated margins are normal over prompts; their gain, and how gain and change differ over prompts, are
    medians of this study. Each training adds to its run a normal number of SD `run_sd`.

    Args:
        fates: of this study, run by run: a study simulated has its objectives, seeds and prompts.
        rng: the only source of chance.
        studies: how many are simulated of each kind.

    Returns:
        `truth`, `run_sd`; `false_verdict` and `after_holm` (share of objectives of which something false is
        said, as it stands and with Holm's correction), `more_than_one` (share of studies with more than one
        fate, corrected).
    """
    if fates.empty:
        return pd.DataFrame(columns=["truth", "run_sd", "false_verdict", "after_holm", "more_than_one"])
    seeds, prompts = fates["seed"].nunique(), int(fates["n_prompts"].median())
    size, cases = fates.median(numeric_only=True).astype(float), (studies, len(fates) // seeds)
    to_sd = math.sqrt(prompts) / stats.t.ppf(0.975, prompts - 1) / 2
    sd = {name: to_sd * (size[f"{name}_high"] - size[f"{name}_low"]) for name in ("learned", "backward")}
    rows = []
    gains = {"nothing happens": abs(size["learned"]), "nothing learned": 0.0}
    for (truth, gain), run_sd in itertools.product(gains.items(), (0.0, 0.1, 0.2)):
        moves = [
            rng.normal(0, run_sd, (seeds, 1, *cases)) + rng.normal(0, sd[name], (1, prompts, *cases))
            for name in sd
        ]
        first = gain + moves[0]
        sides, sure = _simulated_sides(first, first + moves[1], rng=rng)
        row = {"truth": truth, "run_sd": run_sd}
        for name, (learned, *edges) in {"false_verdict": sides, "after_holm": sure}.items():
            wrong = (edges[0] < 0) | (edges[1] > 0) if gain else True
            row[name] = float(((learned > 0) & wrong).mean())
        seen = [np.where(sure[0] > 0, edge, 0) for edge in sure[1:]]
        rows.append(row | {"more_than_one": float((_differ(seen[0]) | _differ(seen[1])).mean())})
    return pd.DataFrame(rows)


def _simulated_sides(first: np.ndarray, end: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """On which side of zero R1, D(1 - delta) and D(1 + delta) lie clearly: as they stand, then after Holm.

    `first`, `end`: (seeds, prompts, studies, objectives). Returns (2, 3, studies, objectives).
    """
    seeds, prompts, *cases = first.shape
    contrasts = np.stack([first, *metrics.edges(first, end).values()], axis=2)
    values = contrasts.reshape(seeds * prompts, -1)
    runs, asked = np.indices((seeds, prompts)).reshape(2, -1)
    draws = metrics.resampled_means(values, asked, seeds=runs, resamples=400, rng=rng)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    p = p_value(values.mean(axis=0), low, high, df=units(seeds, prompts) - 1).reshape(3, *cases)
    side = np.sign(values.mean(axis=0)).reshape(3, *cases)
    return np.stack([side * (p <= 0.05), side * (holm(p) <= 0.05)])
