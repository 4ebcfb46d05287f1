"""Rival explanations of a lost preference: displaced likelihood, drift from the base, length.

A margin can shrink without any conflict of objectives: because chosen and rejected answers lose probability together (likelihood displacement, Razin et al.
2024, arXiv 2410.08847), because the policy drifts from the base in general, or because a stage moves with the length of answers. Intervals resample prompts.
"""

import itertools

import numpy as np
import pandas as pd
from scipy import stats

from seqdpo_utils.metrics import interval, pair_change, relative_wins, resampled_means


def displacement(records: pd.DataFrame, *, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """What the chosen and the rejected answers gained or lost, apart, between checkpoints.

    Args:
        records: per-pair records of the base and of every stage.
        resamples: bootstrap draws over prompts.
        rng: the only source of chance.

    Returns:
        One row an objective and move, from the base to each stage and from stage to stage: `objective`, `from_checkpoint`, `to_checkpoint`, `n_pairs`,
        `n_prompts`; `chosen`, `rejected` (mean change of the summed log-probability, nats), `both_fell` (share of pairs), each with `_low` and `_high`.
    """
    rows = []
    for objective, group in records.groupby("objective", sort=False):
        wide = group.pivot(index="pair_id", columns="checkpoint", values=["chosen_logp", "rejected_logp"])
        prompts = group.drop_duplicates("pair_id").set_index("pair_id")["prompt_id"].reindex(wide.index)
        stages = list(dict.fromkeys(group["checkpoint"]))
        moves = [(stages[0], stage) for stage in stages[1:]] + list(itertools.pairwise(stages[1:]))
        for start, end in moves:
            chosen, rejected = (wide[side][end] - wide[side][start] for side in ("chosen_logp", "rejected_logp"))
            measures = {"chosen": chosen, "rejected": rejected, "both_fell": ((chosen < 0) & (rejected < 0)).astype(float)}
            row = {"objective": objective, "from_checkpoint": start, "to_checkpoint": end, "n_pairs": len(wide), "n_prompts": prompts.nunique()}
            rows.append(row | _with_bounds(measures, prompts, resamples=resamples, rng=rng))
    return pd.DataFrame(rows)


def _with_bounds(measures: dict[str, pd.Series], prompts: pd.Series, *, resamples: int, rng: np.random.Generator) -> dict[str, float]:
    values = np.stack([series.to_numpy(dtype=float) for series in measures.values()], axis=1)
    draws = resampled_means(values, prompts, resamples=resamples, rng=rng)
    row = {}
    for k, name in enumerate(measures):
        low, high = interval(draws[:, k])
        row |= {name: values[:, k].mean(), f"{name}_low": low, f"{name}_high": high}
    return row


def divergence_table(divergence: pd.DataFrame, *, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """Mean KL from the base for each checkpoint and objective, with an interval.

    Args:
        divergence: from `divergence.base_divergence`, checkpoints one below the other.

    Returns:
        `checkpoint`, `objective`, `n_pairs`, `kl`, `kl_low`, `kl_high`, in nats a token; an answer counts once, whatever its length.
    """
    rows = []
    for (checkpoint, objective), group in divergence.groupby(["checkpoint", "objective"], sort=False):
        bounds = _with_bounds({"kl": group["kl"]}, group["prompt_id"], resamples=resamples, rng=rng)
        rows.append({"checkpoint": checkpoint, "objective": objective, "n_pairs": group["pair_id"].nunique()} | bounds)
    return pd.DataFrame(rows, columns=["checkpoint", "objective", "n_pairs", "kl", "kl_low", "kl_high"])


def length_as_predictor(measures: pd.DataFrame, *, before: str, after: str, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """Whether the lengths of the two answers foretell what a stage did to a pair, or which answer is preferred.

    Args:
        measures: from `metrics.pair_measures`.
        before, after: checkpoints between which the policy margin changed.

    Returns:
        One row an objective: `n_pairs`; `spearman` (rank correlation of the pair change with the tokens of the chosen minus those of the rejected answer),
        `longer_chosen` (share of pairs whose chosen answer is the longer one, ties one half: the accuracy of that rule), `policy_accuracy` (of
        the model at `after`), each with `_low` and `_high`. Null where all lengths or all changes are equal.
    """
    rows = []
    for objective in dict.fromkeys(measures["objective"]):
        changes = pair_change(measures, objective, before=before, after=after).set_index("pair_id")
        held_out = measures[(measures["objective"] == objective) & (measures["checkpoint"] == after)].set_index("pair_id").reindex(changes.index)
        longer = held_out["chosen_tokens"] - held_out["rejected_tokens"]
        row = {"objective": objective, "n_pairs": len(changes)} | _rank_correlation(
            longer, changes["change"], changes["prompt_id"], resamples=resamples, rng=rng
        )
        shares = {"longer_chosen": relative_wins(longer), "policy_accuracy": (changes["after"] > 0).astype(float)}
        rows.append(row | _with_bounds(shares, changes["prompt_id"], resamples=resamples, rng=rng))
    return pd.DataFrame(rows).astype(dict.fromkeys(("spearman", "spearman_low", "spearman_high"), "Float64"))


def _rank_correlation(left: pd.Series, right: pd.Series, prompts: pd.Series, *, resamples: int, rng: np.random.Generator) -> dict[str, float | None]:
    if left.nunique() < 2 or right.nunique() < 2:
        return dict.fromkeys(("spearman", "spearman_low", "spearman_high"))
    members = list(pd.Series(range(len(prompts))).groupby(prompts.to_numpy()).apply(np.array))
    values = np.stack([left.to_numpy(dtype=float), right.to_numpy(dtype=float)])
    draws = []
    for _ in range(resamples):
        drawn = values[:, np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])]
        if (np.ptp(drawn, axis=1) > 0).all():  # a draw of equal values has no ranks to correlate
            draws.append(np.corrcoef(stats.rankdata(drawn, axis=1))[0, 1])
    low, high = interval(np.array(draws))
    return {"spearman": float(stats.spearmanr(left, right).statistic), "spearman_low": low, "spearman_high": high}
