"""Everything that is computed from per-pair records: margins, accuracies, the stage matrix, transfer, pair change, quartiles.

A record holds the sums s(w) and s(l) of one checkpoint (`chosen_logp`, `rejected_logp`, nats) and the token counts. Intervals
are 95 % percentile intervals of a bootstrap that resamples prompts, with all pairs of a prompt together.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from seqdpo_utils.paths import StudyError

UNDEFINED = "undefined: stage 1 did not learn"
MEASURES = ("margin", "relative_accuracy", "policy_margin", "policy_accuracy")
DELTA = 0.1
"""Half-width of the band of retention that counts as stable, fixed before any run was looked at."""
UNCHANGED = 0.01
"""A policy margin that moved by at most this many nats a token counts as unchanged."""


def dpo_margin(records: pd.DataFrame, base: pd.DataFrame, *, beta: float) -> pd.Series:
    """M(i) = beta ([s(w) - s_0(w)] - [s(l) - s_0(l)]), the quantity inside DPO's sigmoid (Rafailov et al. 2023, eq. 7).

    Args:
        records: one checkpoint, any order.
        base: the base model's records of at least the same pairs and objectives.
        beta: the training's beta.

    Returns:
        Margins on the index of `records`; exactly 0 where `records` are the base's own.

    Raises:
        StudyError: when a pair has no base record.
    """
    keys = ["pair_id", "objective"]
    reference = records[keys].merge(base[[*keys, "chosen_logp", "rejected_logp"]], on=keys, how="left", validate="many_to_one")
    if reference["chosen_logp"].isna().any():
        raise StudyError(f"{int(reference['chosen_logp'].isna().sum())} pairs have no base record: score the base again.")
    chosen = records["chosen_logp"].to_numpy() - reference["chosen_logp"].to_numpy()
    rejected = records["rejected_logp"].to_numpy() - reference["rejected_logp"].to_numpy()
    return pd.Series(beta * (chosen - rejected), index=records.index, name="margin")


def dpo_loss(margin: pd.Series) -> pd.Series:
    """-log sigmoid(M), in nats: log 2 at the base (Rafailov et al. 2023, eq. 7)."""
    return np.logaddexp(0.0, -margin)


def policy_margin(records: pd.DataFrame) -> pd.Series:
    """m(i) = s(w)/n(w) - s(l)/n(l), nats per token: which answer the policy itself finds likelier, without a reference."""
    chosen = records["chosen_logp"] / records["chosen_tokens"]
    return (chosen - records["rejected_logp"] / records["rejected_tokens"]).rename("policy_margin")


def relative_wins(margin: pd.Series) -> pd.Series:
    """1 where M > 0, one half at a tie, else 0; its mean is the relative accuracy."""
    return (margin > 0) + 0.5 * (margin == 0)


def pair_measures(records: pd.DataFrame, *, beta: float) -> pd.DataFrame:
    """The records of all checkpoints with the columns of `MEASURES`, one row a pair, objective and checkpoint.

    `relative_accuracy` is null at the base, where every pair ties by definition.
    """
    margin = dpo_margin(records, records[records["checkpoint"] == "base"], beta=beta)
    policy = policy_margin(records)
    wins = relative_wins(margin).where(records["checkpoint"] != "base")
    return records.assign(margin=margin, relative_accuracy=wins, policy_margin=policy, policy_accuracy=(policy > 0).astype(float))


def resampled_means(values: np.ndarray, prompts: Sequence[str], *, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of columns under a bootstrap over prompts.

    Args:
        values: (pairs, columns); the columns of one draw see the same resampled prompts, so that differences and ratios are paired.
        prompts: prompt id of every pair.
        resamples: number of draws.
        rng: the only source of chance.

    Returns:
        (resamples, columns).
    """
    _, cluster = np.unique(np.asarray(prompts), return_inverse=True)
    clusters = cluster.max() + 1
    sums = np.zeros((clusters, values.shape[1]))
    np.add.at(sums, cluster, values)
    sizes = np.bincount(cluster)
    drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    return drawn @ sums / (drawn @ sizes)[:, None]


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def stage_matrix(measures: pd.DataFrame, *, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """Every measure of every objective at every checkpoint, on held-out pairs, with intervals.

    Args:
        measures: from `pair_measures`.

    Returns:
        One row a checkpoint and objective: `n_pairs`, `n_prompts`, and each measure with `_low` and `_high`.
    """
    rows = []
    held_out = measures[measures["split"] == "eval"]
    for (checkpoint, objective), group in held_out.groupby(["checkpoint", "objective"], sort=False):
        values = group[list(MEASURES)].to_numpy(dtype=float)
        draws = resampled_means(values, group["prompt_id"], resamples=resamples, rng=rng)
        row = {"checkpoint": checkpoint, "objective": objective, "n_pairs": len(group), "n_prompts": group["prompt_id"].nunique()}
        for k, name in enumerate(MEASURES):
            low, high = interval(draws[:, k])
            row |= {name: values[:, k].mean(), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def wide_margins(measures: pd.DataFrame, objective: str, *, measure: str = "margin") -> pd.DataFrame:
    """Held-out pairs of one objective: `prompt_id` and one column a checkpoint, indexed by pair id."""
    held_out = measures[(measures["split"] == "eval") & (measures["objective"] == objective)]
    wide = held_out.pivot(index="pair_id", columns="checkpoint", values=measure)
    return wide.assign(prompt_id=held_out.drop_duplicates("pair_id").set_index("pair_id")["prompt_id"])


def transfer(measures: pd.DataFrame, objectives: Sequence[str], *, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """What each objective gained when it was trained, and what became of it by the last stage, in margin.

    With R[k][j] the mean margin of objective j after stage k, b_j = R[0][j] = 0 and T stages:
    learned = R[j][j] - R[j-1][j]; forward transfer = R[j-1][j] - b_j (j > 1); backward transfer = R[T][j] - R[j][j] (j < T);
    forgetting = max over l < T of R[l][j], minus R[T][j] (j < T); retention = (R[T][j] - b_j) / (R[j][j] - b_j) (j < T), undefined when the interval of
    its denominator touches zero. (Lopez-Paz and Ranzato 2017, arXiv 1706.08840; Chaudhry et al. 2018, arXiv 1801.10112.)

    Args:
        measures: from `pair_measures`, checkpoints "base", "stage1", ...
        objectives: in the order of training.

    Returns:
        `objective`, `quantity`, `value`, `low`, `high` (null where undefined), `note`.
    """
    last = len(objectives)
    rows = []
    for stage, objective in enumerate(objectives, start=1):
        wide = wide_margins(measures, objective)
        values = wide[["base", *(f"stage{k}" for k in range(1, last + 1))]].to_numpy()
        draws = resampled_means(values, wide["prompt_id"], resamples=resamples, rng=rng)
        for quantity, formula in _transfer_formulas(stage, last).items():
            low, high = interval(formula(draws))
            rows.append({"objective": objective, "quantity": quantity, "value": float(formula(values.mean(0)[None])[0]), "low": low, "high": high, "note": ""})
        if stage < last:
            rows.append({"objective": objective, "quantity": "retention"} | _retention(values.mean(0), draws, stage=stage))
    return pd.DataFrame(rows).astype({"value": "Float64", "low": "Float64", "high": "Float64"})


def _transfer_formulas(stage: int, last: int) -> dict:
    formulas = {"learned": lambda r: r[:, stage] - r[:, stage - 1]}
    if stage > 1:
        formulas["forward transfer"] = lambda r: r[:, stage - 1] - r[:, 0]
    if stage < last:
        formulas["backward transfer"] = lambda r: r[:, last] - r[:, stage]
        formulas["forgetting"] = lambda r: r[:, :last].max(axis=1) - r[:, last]
    return formulas


def _retention(means: np.ndarray, draws: np.ndarray, *, stage: int) -> dict:
    gained = draws[:, stage] - draws[:, 0]
    low, high = interval(gained)
    if low <= 0:
        note = f"undefined: stage {stage} did not learn (gain {low:.3f} to {high:.3f})"
        return {"value": None, "low": None, "high": None, "note": note}
    low, high = interval((draws[:, -1] - draws[:, 0]) / gained)
    return {"value": (means[-1] - means[0]) / (means[stage] - means[0]), "low": low, "high": high, "note": ""}


def outcome(low: float | None, high: float | None, *, excess_churn_low: float | None = None, delta: float = DELTA) -> str:
    """Name what became of an objective, by the rule fixed before looking.

    Args:
        low, high: interval of its retention, None where undefined.
        excess_churn_low: lower bound of the churn of the later stages beyond the churn between two seeds of stage 1; None with one seed, and then
            redistribution is not tested.
        delta: half-width of the band that counts as stable.
    """
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return UNDEFINED
    if low > 1 + delta:
        return "positive transfer"
    if 1 - delta <= low and high <= 1 + delta:
        return "redistribution" if excess_churn_low is not None and excess_churn_low > 0 else "stable"
    if low > 0 and high < 1 - delta:
        return "partial degradation"
    return "reversal" if high < 0 else "undecided"


def gain_in_words(low: float, high: float) -> str:
    """What the interval of a stage's own gain allows one to say."""
    if low > 0:
        return "was learned"
    return "was not learned: its margin fell" if high < 0 else "was not shown to be learned (the interval of its gain covers zero)"


def pair_change(measures: pd.DataFrame, objective: str, *, before: str, after: str) -> pd.DataFrame:
    """Each held-out pair's policy margin before and after, its change, and what the change means.

    Returns:
        `pair_id`, `prompt_id`, `base`, `before`, `after`, `change` (nats per token), `effect` ("helped", "harmed", "unchanged": within
        `UNCHANGED`), `reordered` ("gained": wrong then right, "lost": right then wrong, "same").
    """
    wide = wide_margins(measures, objective, measure="policy_margin")
    table = wide.assign(before=wide[before], after=wide[after], change=wide[after] - wide[before]).reset_index()
    effect = np.select([table["change"] > UNCHANGED, table["change"] < -UNCHANGED], ["helped", "harmed"], "unchanged")
    right = np.stack([table["before"] > 0, table["after"] > 0])
    reordered = np.select([~right[0] & right[1], right[0] & ~right[1]], ["gained", "lost"], "same")
    return table.assign(effect=effect, reordered=reordered)[["pair_id", "prompt_id", "base", "before", "after", "change", "effect", "reordered"]]


def churn(before: pd.Series, after: pd.Series) -> float:
    """Share of pairs whose two answers changed places: the sign of the policy margin differs."""
    return float(((before > 0) != (after > 0)).mean())


def quartiles(changes: pd.DataFrame, key: pd.Series, *, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """Mean change in four equal groups of pairs, cut by a key.

    Args:
        changes: `prompt_id` and `change`, one row a pair.
        key: what to sort by, on the same index; ties keep the table's order, sizes differ by at most one.

    Returns:
        `quartile` (1 lowest key to 4 highest), `n_pairs`, `change`, `change_low`, `change_high`.

    Raises:
        StudyError: with fewer than four pairs.
    """
    if len(changes) < 4:
        raise StudyError(f"{len(changes)} held-out pairs cannot be cut into quartiles: raise eval_pairs.")
    order = np.argsort(key.to_numpy(), kind="stable")
    rows = []
    for quartile, members in enumerate(np.array_split(order, 4), start=1):
        group = changes.iloc[members]
        draws = resampled_means(group[["change"]].to_numpy(), group["prompt_id"], resamples=resamples, rng=rng)
        low, high = interval(draws[:, 0])
        rows.append({"quartile": quartile, "n_pairs": len(group), "change": group["change"].mean(), "change_low": low, "change_high": high})
    return pd.DataFrame(rows)


def highest_minus_lowest(changes: pd.DataFrame, key: pd.Series, *, resamples: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean change of the highest quartile by a key, of the lowest, and their difference with an interval.

    Args:
        changes: `prompt_id` and `change`, one row a pair.
        key: what to sort by, on the same index.

    Returns:
        `lowest`, `highest`, `difference`, `difference_low`, `difference_high`; each quartile is resampled by its own prompts.
    """
    groups = np.array_split(np.argsort(key.to_numpy(), kind="stable"), 4)
    means, draws = [], []
    for members in (groups[0], groups[3]):
        group = changes.iloc[members]
        means.append(group["change"].mean())
        draws.append(resampled_means(group[["change"]].to_numpy(), group["prompt_id"], resamples=resamples, rng=rng)[:, 0])
    low, high = interval(draws[1] - draws[0])
    return {"lowest": means[0], "highest": means[1], "difference": means[1] - means[0], "difference_low": low, "difference_high": high}
