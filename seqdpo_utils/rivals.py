"""Rival explanations of a lost preference: displaced likelihood, drift from the base, length.

A margin can shrink without any conflict of objectives: chosen and rejected answers may lose probability
together (likelihood displacement, Razin et al. 2024, arXiv 2410.08847), the policy may drift from the base in
general, or a stage may move with the length of answers. Intervals resample prompts.
"""

import itertools
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from seqdpo_utils.metrics import bounded, bounds, estimated, relative_wins
from seqdpo_utils.redistribution import pair_change

_SUMS = ["chosen_logp", "rejected_logp"]
_SPEARMAN = bounds("spearman")


def displacement(records: pd.DataFrame, *, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """What the chosen and the rejected answers gained or lost, apart, between checkpoints.

    Args:
        records: per-pair records of the base, then of every stage in the order of training.
        resamples: bootstrap draws over prompts.
        rng: the only source of chance.

    Returns:
        One row an objective and move, from the base to each stage and from stage to stage: `objective`,
        `from_checkpoint`, `to_checkpoint`, `n_pairs`, `n_prompts`; `chosen`, `rejected` (mean change of the
        summed log-probability, nats), `both_fell` (share of pairs), each with `_low` and `_high`.
    """
    rows = []
    for objective, group in records.groupby("objective", sort=False):
        wide = group.pivot(index=["pair_id", "prompt_id"], columns="checkpoint", values=_SUMS)
        wide = wide.swaplevel(axis=1).droplevel("pair_id")
        base, *stages = dict.fromkeys(group["checkpoint"])
        for start, end in [*((base, stage) for stage in stages), *itertools.pairwise(stages)]:
            moved = (wide[end] - wide[start]).set_axis(["chosen", "rejected"], axis=1)
            moved["both_fell"] = (moved < 0).all(axis=1)
            row = {"objective": objective, "from_checkpoint": start, "to_checkpoint": end}
            row |= {"n_pairs": len(wide), "n_prompts": wide.index.nunique()}
            rows.append(row | estimated(moved, list(moved), resamples=resamples, rng=rng))
    return pd.DataFrame(rows)


def divergence_table(divergence: pd.DataFrame) -> pd.DataFrame:
    """Mean KL from the base for each checkpoint and objective, with an interval.

    Args:
        divergence: from `divergence.base_divergence`, checkpoints one below the other; may be empty.

    Returns:
        `checkpoint`, `objective`, `n_pairs`, `kl`, `kl_low`, `kl_high`, in nats a token; an answer counts
        once, whatever its length. The interval is Student's t over the means of prompts, which are too few
        to resample; null for a single prompt.
    """
    rows = []
    for (checkpoint, objective), group in divergence.groupby(["checkpoint", "objective"], sort=False):
        prompts, kl = group.groupby("prompt_id")["kl"].mean(), group["kl"].mean()
        reach = prompts.sem() * stats.t.ppf(0.975, max(len(prompts) - 1, 1))
        row = {"checkpoint": checkpoint, "objective": objective, "n_pairs": group["pair_id"].nunique()}
        rows.append(row | {"kl": kl, "kl_low": kl - reach, "kl_high": kl + reach})
    return pd.DataFrame(rows, columns=["checkpoint", "objective", "n_pairs", "kl", "kl_low", "kl_high"])


def largest_drift(table: pd.DataFrame) -> str:
    """On whose answers the policy drifted most, for a sentence.

    `table`: rows of `divergence_table` at one checkpoint.
    """
    ordered = table.sort_values("kl")
    if len(table) < 2:
        return "no other objective to compare with"
    if np.ptp(table["kl"]) <= 1e-9:
        return "equal, since the objectives share these answers"
    apart = ordered["kl_low"].iloc[-1] > ordered["kl_high"].iloc[:-1].max()
    return f"largest on **{ordered['objective'].iloc[-1]}**" if apart else "the intervals overlap"


def length_as_predictor(
    measures: pd.DataFrame, *, before: str, after: str, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Do the lengths of the two answers foretell how a pair changed, or which answer is preferred?

    Args:
        measures: from `metrics.pair_measures`.
        before, after: checkpoints between which the policy margin changed.
        resamples: bootstrap draws over prompts.
        rng: the only source of chance.

    Returns:
        One row an objective: `objective`, `n_pairs`; `spearman` (rank correlation of the pair change with the
        tokens of the chosen minus those of the rejected answer; null where all lengths or all changes are
        equal), `longer_chosen` (share of pairs whose chosen answer is the longer one, ties one half: the
        accuracy of that rule), `policy_accuracy` (at `after`), each with `_low` and `_high`.
    """
    rows, shares = [], ["longer_chosen", "policy_accuracy"]
    for objective, group in measures.groupby("objective", sort=False):
        pairs = pair_change(measures, objective, before=before, after=after).set_index("pair_id")
        scored = group[group["checkpoint"] == after].set_index("pair_id")
        pairs["longer"] = scored["chosen_tokens"] - scored["rejected_tokens"]
        pairs = pairs.set_index("prompt_id")
        pairs["longer_chosen"], pairs["policy_accuracy"] = relative_wins(pairs["longer"]), pairs["after"] > 0
        row = {"objective": objective, "n_pairs": len(pairs)}
        row |= _rank_correlation(pairs, resamples=resamples, rng=rng)
        rows.append(row | estimated(pairs, shares, resamples=resamples, rng=rng))
    return pd.DataFrame(rows).astype(dict.fromkeys(_SPEARMAN, "Float64"))


def _rank_correlation(pairs: pd.DataFrame, *, resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    """Spearman's correlation of `longer` with `change`; rows are pairs, indexed by prompt id."""
    values = pairs[["longer", "change"]].to_numpy(dtype=float).T
    if (np.ptp(values, axis=1) == 0).any():
        return dict.fromkeys(_SPEARMAN)
    members = list(pairs.groupby("prompt_id").indices.values())
    draws = []
    for _ in range(resamples):
        drawn = values[:, np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])]
        if (np.ptp(drawn, axis=1) > 0).all():  # a draw of equal values has no ranks to correlate
            draws.append(np.corrcoef(stats.rankdata(drawn, axis=1))[0, 1])
    return bounded({"spearman": np.array([stats.spearmanr(*values).statistic, *draws])})
