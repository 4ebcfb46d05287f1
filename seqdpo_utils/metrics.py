"""What per-pair records say: margins, accuracies, the stage matrix, transfer, outcomes.

Also what every later comparison begins with: margins of a chain over its runs, and means with intervals.

A record holds the sums s(w) and s(l) of one checkpoint (`chosen_logp`, `rejected_logp`, nats) and the token
counts. Intervals are 95 % bootstrap intervals: prompts are resampled with all their pairs, and so are seeds
where there are several.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import Generator
from scipy import stats

from seqdpo_utils.chains import Chain
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import RunPaths, read_scores

NOT_LEARNED = "not learned"
MEASURES = ("margin", "relative_accuracy", "policy_margin", "policy_accuracy")
DELTA = 0.1
"""Half-width of the band of retention that counts as stable, fixed before any run was looked at."""
DECIDING = ("learned", "end", "over_lower", "over_upper")
"""The four contrasts that decide an outcome: R1, and D(c) at 0, 1 - delta and 1 + delta (`outcome`)."""
_CONTRASTS = {"end": 0.0, "over_lower": 1 - DELTA, "over_upper": 1 + DELTA}
FATE = {"learned": "learned", "backward": "backward transfer", "retention": "retention"}
FATE |= {name: f"D({c:g})" for name, c in _CONTRASTS.items()}
"""Columns of `fate`, and the quantities of `transfer` behind them."""
Reader = Callable[[RunPaths], pd.DataFrame]
"""Reads the per-pair records of a run, those of the base among them."""
_TRANSFER = ["objective", "stage", "checkpoint", "quantity", "value", "low", "high", "note"]


def dpo_margin(records: pd.DataFrame, base: pd.DataFrame, *, beta: float) -> pd.Series:
    """M(i) = beta ([s(w) - s_0(w)] - [s(l) - s_0(l)]), inside DPO's sigmoid (Rafailov et al. 2023, eq. 7).

    Args:
        records: one checkpoint or several, in any order.
        base: the base model's records of at least the same pairs and objectives.
        beta: the training's beta.

    Returns:
        Margins on the index of `records`; exactly 0 where `records` are the base's own.

    Raises:
        StudyError: when a pair has no base record.
    """
    keys, logps = ["pair_id", "objective"], ["chosen_logp", "rejected_logp"]
    reference = records[keys].merge(base[keys + logps], on=keys, how="left", validate="many_to_one")
    if missing := int(reference["chosen_logp"].isna().sum()):
        raise StudyError(f"{missing} pairs have no base record: score the base again.")
    chosen, rejected = (records[logps].to_numpy() - reference[logps].to_numpy()).T
    return pd.Series(beta * (chosen - rejected), index=records.index, name="margin")


def dpo_loss(margin: pd.Series) -> pd.Series:
    """-log sigmoid(M), in nats: log 2 at the base (Rafailov et al. 2023, eq. 7)."""
    return np.logaddexp(0.0, -margin)


def policy_margin(records: pd.DataFrame) -> pd.Series:
    """m(i) = s(w)/n(w) - s(l)/n(l), nats per token: which answer the policy itself finds likelier."""
    chosen = records["chosen_logp"] / records["chosen_tokens"]
    return (chosen - records["rejected_logp"] / records["rejected_tokens"]).rename("policy_margin")


def relative_wins(margin: pd.Series) -> pd.Series:
    """1 where M > 0, one half at a tie, else 0; its mean is the relative accuracy."""
    return (margin > 0) + 0.5 * (margin == 0)


def pair_measures(records: pd.DataFrame, *, beta: float) -> pd.DataFrame:
    """The records with the columns of `MEASURES`, one row a pair, objective and checkpoint.

    `relative_accuracy` is null at the base, where every pair ties by definition.
    """
    trained = records["checkpoint"] != "base"
    margin = dpo_margin(records, records[~trained], beta=beta)
    wins, policy = relative_wins(margin).where(trained), policy_margin(records)
    measures = records.assign(margin=margin, relative_accuracy=wins, policy_margin=policy)
    return measures.assign(policy_accuracy=(policy > 0).astype(float))


def resampled_means(
    values: np.ndarray,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    resamples: int,
    rng: Generator,
) -> np.ndarray:
    """Means of columns under a bootstrap over prompts, crossed with one over seeds where these are given.

    Seeds and prompts are drawn apart, every seed drawn with every prompt drawn. Each way of drawing moves the
    mean by a part of its own (to first order; what only one run does to one prompt counts in both, which errs
    on the wide side), and `widening` widens each part, so that percentiles cover with few prompts and seeds.
    Means are linear in `values`: a contrast of columns has the draws of the contrast of its pairs.

    Args:
        values: (pairs, columns); the columns of one draw see the same resampled prompts, so that differences
            and ratios are paired.
        prompts: prompt id of every pair.
        seeds: seed of every pair's run; null for one run, whose own luck is then not in the draws.
        resamples: number of draws.
        rng: the only source of chance.

    Returns:
        (resamples, columns).
    """
    mean = values.mean(axis=0)
    draws = np.tile(mean, (resamples, 1))
    for labels in (prompts,) if seeds is None else (prompts, seeds):
        _, cluster = np.unique(np.asarray(labels), return_inverse=True)
        clusters = cluster.max() + 1
        sums = np.zeros((clusters, values.shape[1]))
        np.add.at(sums, cluster, values - mean)
        # a draw is how often each cluster was picked, once on average
        drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
        draws += widening(clusters) * (drawn - 1) @ sums / len(values)
    shares = np.isin(values, (0, 0.5, 1)).all(axis=0)  # wins, whose mean cannot leave 0 to 1
    draws[:, shares] = draws[:, shares].clip(0, 1)
    return draws


def widening(clusters: int) -> float:
    """What a percentile interval lacks: its variance is (n - 1) / n of the unbiased, its tails a normal's.

    So widened it covers means of normal data in 94 to 95 % from n = 4 on (alone: 79 % at 4, 94 % at 32), of
    lognormal data in 84 % at 8 and 89 % at 32 (alone: 78 % and 88 %).
    """
    if clusters == 1:
        return 1.0
    tails = stats.t.ppf(0.975, clusters - 1) / stats.norm.ppf(0.975)
    return float(tails * math.sqrt(clusters / (clusters - 1)))


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def estimates(wide: pd.DataFrame, columns: Sequence[str], *, resamples: int, rng: Generator) -> np.ndarray:
    """Means of columns and, below, their bootstrap draws: (1 + resamples, columns).

    `wide` has a row a pair, with its `prompt_id` and, where there are several runs, its `seed`.
    """
    table = wide.reset_index()
    values, seeds = table[list(columns)].to_numpy(dtype=float), table.get("seed")
    draws = resampled_means(values, table["prompt_id"], seeds=seeds, resamples=resamples, rng=rng)
    return np.vstack([values.mean(axis=0), draws])


def bounds(*names: str) -> list[str]:
    """The columns of numbers with intervals: `name`, `name_low`, `name_high` of each."""
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def bounded(drawn: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Numbers with their intervals, named as `bounds` does; `drawn`: each number, then its draws."""
    found: dict[str, float] = {}
    for name, both in drawn.items():
        found |= dict(zip(bounds(name), (both[0], *interval(both[1:])), strict=True))
    return found


def estimated(
    wide: pd.DataFrame, columns: Sequence[str], *, resamples: int, rng: Generator
) -> dict[str, float]:
    """Means of columns with their intervals, from `estimates`."""
    means = estimates(wide, columns, resamples=resamples, rng=rng)
    return bounded(dict(zip(columns, means.T, strict=True)))


def stage_matrix(measures: pd.DataFrame, *, resamples: int, rng: Generator) -> pd.DataFrame:
    """Every measure of every objective at every checkpoint, on held-out pairs, with intervals.

    Args:
        measures: from `pair_measures`.

    Returns:
        One row a checkpoint and objective: `n_pairs`, `n_prompts`, and each measure with `_low` and `_high`.
    """
    rows, keys = [], ["checkpoint", "objective"]
    for key, group in measures[measures["split"] == "eval"].groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        row |= {"n_pairs": len(group), "n_prompts": group["prompt_id"].nunique()}
        rows.append(row | estimated(group, MEASURES, resamples=resamples, rng=rng))
    return pd.DataFrame(rows)


def wide_margins(measures: pd.DataFrame, objective: str, *, measure: str = "margin") -> pd.DataFrame:
    """Held-out pairs of one objective: `prompt_id` and one column a checkpoint.

    Indexed by pair id; by seed and pair id where `measures` tell runs apart by a column `seed`.
    """
    held_out = measures[(measures["split"] == "eval") & (measures["objective"] == objective)]
    key = ["seed", "pair_id"] if "seed" in measures else ["pair_id"]
    wide = held_out.pivot(index=key, columns="checkpoint", values=measure)
    return wide.assign(prompt_id=held_out.drop_duplicates(key).set_index(key)["prompt_id"])


def over_seeds(runs: Iterable[RunPaths]) -> list[list[RunPaths]]:
    """The runs of a study, those of one chain together."""
    groups: dict[tuple[str, str], list[RunPaths]] = {}
    for run in runs:
        groups.setdefault((run.setting, run.chain), []).append(run)
    return list(groups.values())


def followed(groups: Iterable[list[RunPaths]]) -> Iterator[tuple[list[RunPaths], Chain, str]]:
    """Runs of chains of at least two stages, with the chain and each objective of its first stage."""
    for group in groups:
        chain = Chain.parse(group[0].chain)
        for objective in chain.stages[0].objectives if chain.parent else ():
            yield group, chain, objective


def measures_of(group: Sequence[RunPaths], *, beta: float, records: Reader = read_scores) -> pd.DataFrame:
    """The measures of one chain over its runs, with the `seed` of each.

    Args:
        group: the runs.
        beta: the training's beta.
        records: reads the records of a run, of the base among them; by default of all its checkpoints.
    """
    parts = [pair_measures(records(run), beta=beta).assign(seed=run.seed) for run in group]
    return pd.concat(parts, ignore_index=True)


def margins(
    group: Sequence[RunPaths], objective: str, *, beta: float, records: Reader = read_scores
) -> pd.DataFrame:
    """Held-out DPO margins of one chain over its runs; arguments: of `measures_of`.

    Returns:
        `prompt_id` and a column a checkpoint of the chain ("base", ...), indexed by `seed` and `pair_id`, so
        that chains are compared pair by pair and run by run.
    """
    return wide_margins(measures_of(group, beta=beta, records=records), objective)


def edges(first: Any, end: Any) -> dict[str, Any]:
    """D(1 - delta) and D(1 + delta), the edges of stable, from margins after stage 1 and at the end."""
    return {name: end - _CONTRASTS[name] * first for name in DECIDING[2:]}


def transfer(
    measures: pd.DataFrame, chain: Chain, objectives: Sequence[str], *, resamples: int, rng: Generator
) -> pd.DataFrame:
    """What each objective gained in each stage that trained it, and what became of it by the last, in margin.

    R(l) is the objective's mean margin after stage l (R(0) = 0, the base), T the last, k one that trains it:

        learned            R(k) - R(k-1)
        forward transfer   R(k-1) - R(0)                   where k is its first stage, but not the chain's
        backward transfer  R(T) - R(k)                     where k < T, as for the next two
        forgetting         max of R(k), ..., R(T-1), minus R(T)
        retention          (R(T) - R(0)) / (R(k) - R(0))   undefined where the denominator may be zero
        D(c)               R(T) - R(0) - c (R(k) - R(0))   c = 0, 1 - delta, 1 + delta: for `outcome`

    The maximum leaves out the base and what came before k: what was not learned cannot be forgotten.
    (Lopez-Paz and Ranzato 2017, arXiv 1706.08840; Chaudhry et al. 2018, arXiv 1801.10112.)

    Args:
        measures: from `pair_measures`, with every checkpoint of the chain; with a column `seed` for several
            runs of it, whose seeds are then resampled with the prompts.
        chain: what was trained, and when.
        objectives: of the setting. One that no stage trains has one row: its forward transfer R(T) - R(0).

    Returns:
        `objective`, `stage` (its text, "" if never trained), `checkpoint` (after that stage, which tells two
        trainings of one objective apart; the last if never trained), `quantity`, `value`, `low`, `high` (null
        where undefined), `note`.
    """
    rows: list[tuple] = []
    for objective in objectives:
        wide = wide_margins(measures, objective)
        r = estimates(wide, chain.checkpoints, resamples=resamples, rng=rng)
        trained = [k for k, stage in enumerate(chain.stages, start=1) if objective in stage.objectives]
        for k in trained or [0]:
            place = (objective, str(chain.stages[k - 1]) if k else "", chain.checkpoints[k or -1])
            rows += [(*place, *row) for row in _transfer_rows(r, k, first=k == min(trained, default=0))]
    return pd.DataFrame(rows, columns=_TRANSFER).astype(dict.fromkeys(("value", "low", "high"), "Float64"))


def _transfer_rows(r: np.ndarray, k: int, *, first: bool) -> list[tuple]:
    """Quantity, value, low, high and note for stage k (0: none); `r` is R, (1 + resamples, checkpoints)."""
    last, gained = r.shape[1] - 1, r - r[:, :1]
    if k == 0:
        return [("forward transfer", gained[0, last], *interval(gained[1:, last]), "never trained")]
    low, high = interval(gained[1:, k])
    found = {"learned": r[:, k] - r[:, k - 1]}
    if first and k > 1:
        found["forward transfer"] = gained[:, k - 1]
    if k < last:
        found["backward transfer"] = r[:, last] - r[:, k]
        found["forgetting"] = r[:, k:last].max(axis=1) - r[:, last]
        found |= {FATE[name]: gained[:, last] - c * gained[:, k] for name, c in _CONTRASTS.items()}
    if k < last and low > 0:
        found["retention"] = gained[:, last] / gained[:, k]
    rows = [(quantity, both[0], *interval(both[1:]), "") for quantity, both in found.items()]
    if k < last and low <= 0:
        note = f"undefined: stage {k} did not learn (gain {low:.3f} to {high:.3f})"
        rows.append(("retention", None, None, None, note))
    return rows


def fate(transfer: pd.DataFrame, chain: Chain, objective: str) -> dict[str, float]:
    """What `transfer` says of an objective of the first stage, in one row.

    Returns:
        `learned`, `backward`, `retention`, and D(c) for c = 0, 1 - delta, 1 + delta as `end`, `over_lower`,
        `over_upper`; beside them, since keeping says little where nothing else was learned, `later`: the gain
        of the last stage on its own objective, `later_objective` (of several the one that gained least). All
        numbers with `_low` and `_high`.
    """
    own = transfer[(transfer["objective"] == objective) & (transfer["checkpoint"] == chain.checkpoints[1])]
    found = {name: own[own["quantity"] == quantity].iloc[0] for name, quantity in FATE.items()}
    last = (transfer["checkpoint"] == str(chain)) & (transfer["quantity"] == "learned")
    found["later"] = transfer[last].sort_values("value").iloc[0]
    ends = {"": "value", "_low": "low", "_high": "high"}
    numbers = {f"{name}{end}": row[ends[end]] for name, row in found.items() for end in ends}
    return numbers | {"later_objective": found["later"]["objective"]}


def outcome(fate: Mapping[str, float], *, excess_churn_low: float | None = None) -> str:
    """Name what became of an objective, by the rule fixed before looking (`DELTA`).

    With R1 its margin after its own stage, R2 at the end and D(c) = R2 - c R1, less than a share c of R1 is
    left exactly where D(c) < 0. A contrast decides only where its interval is clear of zero.

    Args:
        fate: `_low` and `_high` of the contrasts in `DECIDING`, zero where it is not to decide.
        excess_churn_low: lower bound of the churn of the later stages beyond that between two seeds of stage
            1; null with one seed, and then redistribution is not tested.
    """
    sides = (int(fate[f"{name}_low"] > 0) - int(fate[f"{name}_high"] < 0) for name in DECIDING)
    learned, end, lower, upper = sides
    if learned < 1:
        return NOT_LEARNED
    if lower < 0:
        return {1: "lost: partial", -1: "lost: reversal", 0: "lost, extent open"}[end]
    if upper > 0:
        return "gained"
    if lower > 0 and upper < 0:
        return "redistribution" if not pd.isna(excess_churn_low) and excess_churn_low > 0 else "stable"
    return "not gained" if upper < 0 else "not lost" if lower > 0 else "undecided"


def gain_in_words(low: float, high: float) -> str:
    """What the interval of a stage's own gain allows one to say."""
    if low > 0:
        return "was learned"
    if high < 0:
        return "was not learned: its margin fell"
    return "was not shown to be learned (the interval of its gain covers zero)"
