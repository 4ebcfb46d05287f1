"""Tables across chains: what notebook 07 compares. Everything is read from the chains' own files.

Most tables follow the objectives of a chain's FIRST stage, through chains of at least two stages: one row a
setting, chain, objective and seed, or one for all seeds (`..._over_seeds`). Without such a chain a table is
empty and keeps its columns.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seqdpo_utils import metrics
from seqdpo_utils.chains import Chain
from seqdpo_utils.conflict import conflict_verdict
from seqdpo_utils.ledger import segments
from seqdpo_utils.movement import whole_adapter
from seqdpo_utils.paths import RunPaths, read_chain, read_scores, read_table
from seqdpo_utils.verdicts import holm, p_value

KEY = ["setting", "chain", "objective", "seed"]


def _bounds(*names: str) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def _table(rows: list[dict[str, Any]], *, numbers: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
    columns = [*KEY, *others, *numbers]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(numbers, "Float64"))


def _key(run: RunPaths, objective: str) -> dict[str, Any]:
    return {"setting": run.setting, "chain": run.chain, "objective": objective, "seed": run.seed}


def _measures(group: Sequence[RunPaths], *, beta: float) -> pd.DataFrame:
    """The measures of one chain at all its checkpoints, with the `seed` of each run."""
    parts = [metrics.pair_measures(read_scores(run), beta=beta).assign(seed=run.seed) for run in group]
    return pd.concat(parts, ignore_index=True)


def _followed(runs: Iterable[RunPaths]) -> Iterator[tuple[RunPaths, Chain, str]]:
    """Every chain of at least two stages, with each objective of its first stage."""
    for run in runs:
        chain = Chain.parse(run.chain)
        for objective in chain.stages[0].objectives if chain.parent else ():
            yield run, chain, objective


def _grouped(runs: Sequence[RunPaths], together: bool) -> Iterator[tuple[list[RunPaths], Chain, str]]:
    """The same by runs, or, `together`, by the runs of all seeds of a chain."""
    for run, chain, objective in _followed(runs):
        group = [other for other in runs if replace(other, seed=run.seed) == run] if together else [run]
        if group[0] == run:
            yield group, chain, objective


def _rows_of(file: Path, objective: str) -> pd.DataFrame:
    return read_table(file).query("objective == @objective")


def _changes(run: RunPaths, objective: str) -> pd.DataFrame:
    return _rows_of(run.table("pair_change"), objective).set_index("pair_id")


def _other_seed(run: RunPaths, runs: Iterable[RunPaths], objective: str) -> pd.Series | None:
    """Policy margin by pair after stage 1 of the same chain with the next seed, cyclically, or None."""
    seeds = sorted({other.seed for other in runs if replace(other, seed=run.seed) == run})
    twin = replace(run, seed=seeds[(seeds.index(run.seed) + 1) % len(seeds)])
    if twin == run:
        return None
    records = _rows_of(twin.lineage[0].scores, objective)
    return metrics.policy_margin(records).set_axis(records["pair_id"])


def ends(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """Where every objective of the setting stands at the end of every chain.

    Returns:
        The key, `trained` (anywhere in the chain), `n_pairs`, `n_prompts`, `margin` with bounds.
    """
    rows = []
    for run in runs:
        trained = Chain.parse(run.chain).objectives
        for row in read_table(run.table("stage_matrix")).query("checkpoint == @run.chain").to_dict("records"):
            rows.append(row | _key(run, row["objective"]) | {"trained": row["objective"] in trained})
    return _table(rows, others=["trained", "n_pairs", "n_prompts"], numbers=_bounds("margin"))


def first_objectives(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """The held-out margin of each chain's first objectives after every stage.

    Returns:
        The key, `label` (of the chain, for a figure), `after` ("stage 1", ...), `checkpoint`, `n_pairs`,
        `n_prompts`, `margin` with bounds.
    """
    rows = []
    for run, chain, objective in _followed(runs):
        stages = ", then ".join(map(str, chain.stages))
        inside = f"{objective} in " if len(chain.stages[0].objectives) > 1 else ""
        key = _key(run, objective) | {"label": f"{run.setting}: {inside}{stages} (seed {run.seed})"}
        matrix = _rows_of(run.table("stage_matrix"), objective).set_index("checkpoint")
        for number, checkpoint in enumerate(chain.checkpoints[1:], start=1):
            place = {"after": f"stage {number}", "checkpoint": checkpoint}
            rows.append(matrix.loc[checkpoint].to_dict() | key | place)
    others = ["label", "after", "checkpoint", "n_pairs", "n_prompts"]
    return _table(rows, others=others, numbers=_bounds("margin"))


def fates(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """What became of the objectives of each chain's first stage, run by run, by the rule `metrics.outcome`.

    Returns:
        The key, `outcome`, `later_objective`, `seeds` (1), `n_prompts`; the numbers of `metrics.fate` with
        bounds; `churn` (share of pairs whose answers changed places after stage 1) and `excess_churn_low`
        (null with one seed).
    """
    return _fates(runs, False, beta, resamples)


def fates_over_seeds(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """The same with one verdict over all seeds of a chain: seeds are resampled beside prompts.

    Returns:
        As `fates`, without `seed`; the p-value of each contrast that decides (`learned_p`, ...), adjusted
        over the rows (Holm), and `outcome_holm`: the outcome where only contrasts with p <= .05 decide.
    """
    table = _fates(runs, True, beta, resamples).drop(columns="seed")
    held = table.copy()
    for name in metrics.DECIDING:
        table[f"{name}_p"] = _adjusted(table, name)
        bounds = _bounds(name)[1:]
        held[bounds] = held[bounds].where(table[f"{name}_p"] <= 0.05, 0.0)  # a bound of zero decides nothing
    return table.assign(outcome_holm=_outcomes(held))


def _fates(runs: Sequence[RunPaths], together: bool, beta: float, resamples: int) -> pd.DataFrame:
    rows = []
    for group, chain, objective in _grouped(runs, together):
        names = read_table(group[0].table("transfer"))["objective"].unique()
        measures, rng = _measures(group, beta=beta), np.random.default_rng(group[0].seed)
        found = metrics.transfer(measures, chain, names, resamples=resamples, rng=rng)
        row = _key(group[0], objective) | metrics.fate(found, chain, objective)
        rows.append(row | _churn(group, runs, objective, resamples))
    numbers = [*_bounds(*metrics.FATE, "later"), "churn", "excess_churn_low"]
    table = _table(rows, others=["later_objective", "seeds", "n_prompts"], numbers=numbers)
    table.insert(len(KEY), "outcome", _outcomes(table))
    return table


def _outcomes(fates: pd.DataFrame) -> list[str]:
    rows = fates.to_dict("records")
    return [metrics.outcome(row, excess_churn_low=row["excess_churn_low"]) for row in rows]


def _adjusted(table: pd.DataFrame, name: str) -> np.ndarray:
    """p-values of a column of means, adjusted over the rows; several seeds count as few as they are."""
    units = table["n_prompts"].where(table["seeds"] == 1, table[["n_prompts", "seeds"]].min(axis=1))
    bounds = (table[bound].to_numpy(dtype=float) for bound in _bounds(name))
    return holm(p_value(*bounds, df=units.to_numpy(dtype=float) - 1))


def _churn(group: list[RunPaths], runs: Sequence[RunPaths], objective: str, resamples: int) -> dict[str, Any]:
    """Churn from stage 1 to the end, and the lower bound of what it has beyond that between two seeds."""
    parts = []
    for run in group:
        changes, other = _changes(run, objective).assign(seed=run.seed), _other_seed(run, runs, objective)
        right, after = changes["before"] > 0, changes["after"] > 0
        changes["churn"], changes["excess"] = (right != after).astype(float), np.nan
        if other is not None:
            changes["excess"] = changes["churn"] - (right != (other.reindex(changes.index) > 0))
        parts.append(changes)
    table, rng = pd.concat(parts), np.random.default_rng(group[0].seed)
    means = metrics.estimates(table, ["churn", "excess"], resamples=resamples, rng=rng)
    sizes = {"seeds": len(group), "n_prompts": table["prompt_id"].nunique()}
    return sizes | {"churn": means[0, 0], "excess_churn_low": metrics.interval(means[1:, 1])[0]}


def order_effect(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """An objective's final margin when it was trained last, minus when it was trained first, pair by pair.

    Compared are chains without variants whose stages are each other's reverse, run by run.

    Returns:
        The key (`chain`: the one that trains the objective first), `seeds` (1), `n_prompts`, `trained_first`,
        `trained_last` (mean final margins), `difference` with bounds (paired bootstrap).
    """
    return _orders(runs, False, beta, resamples)


def order_over_seeds(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """The same over all seeds of a chain, without `seed`; `difference_p` is adjusted over the rows (Holm)."""
    table = _orders(runs, True, beta, resamples).drop(columns="seed")
    return table.assign(difference_p=_adjusted(table, "difference"))


def _orders(runs: Sequence[RunPaths], together: bool, beta: float, resamples: int) -> pd.DataFrame:
    rows, numbers = [], ["trained_first", "trained_last", *_bounds("difference")]
    for group, chain, objective in _grouped(runs, together):
        mirror = Chain(chain.stages[::-1])
        both = [run for run in group if run.at(mirror) in runs]
        plain = not any(stage.variants for stage in chain.stages)
        if not both or not plain or objective in chain.last.objectives:
            continue
        ends = []
        for sides in (both, [run.at(mirror) for run in both]):
            margins = metrics.wide_margins(_measures(sides, beta=beta), objective)
            ends.append(margins.rename(columns={sides[0].chain: "end"})[["prompt_id", "end"]])
        wide = ends[0].assign(last=ends[1]["end"], gap=ends[1]["end"] - ends[0]["end"])
        rng = np.random.default_rng(both[0].seed)
        means = metrics.estimates(wide, ["end", "last", "gap"], resamples=resamples, rng=rng)
        row = _key(both[0], objective) | {"seeds": len(both), "n_prompts": wide["prompt_id"].nunique()}
        values = [*means[0], *metrics.interval(means[1:, 2])]
        rows.append(row | dict(zip(numbers, values, strict=True)))
    return _table(rows, others=["seeds", "n_prompts"], numbers=numbers)


def quartile_contrast(runs: Sequence[RunPaths], *, resamples: int) -> pd.DataFrame:
    """Change of the lowest and of the highest quartile of each chain's first objectives, and the difference.

    Sorted by the chain's own margin after stage 1; by that of the base, which holds no noise of stage 1; and
    with several seeds by that of another seed after stage 1. The noise of the training pairs, which the seeds
    share, stays in both margins after stage 1.

    Returns:
        The key, `key` ("stage1_policy_margin", "base", "cross_seed"), `pairs`, `lowest`, `highest`,
        `difference` (highest minus lowest) with bounds.
    """
    rows = []
    for run, _, objective in _followed(runs):
        changes = _changes(run, objective)
        keys = {"stage1_policy_margin": changes["before"], "base": changes["base"]}
        if (other := _other_seed(run, runs, objective)) is not None:
            keys["cross_seed"] = other.reindex(changes.index)
        for name, key in keys.items():
            rng = np.random.default_rng(run.seed)
            ends = metrics.highest_minus_lowest(changes, key, resamples=resamples, rng=rng)
            rows.append(_key(run, objective) | {"key": name, "pairs": len(changes)} | ends)
    return _table(rows, others=["key", "pairs"], numbers=["lowest", "highest", *_bounds("difference")])


def mechanics(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """What the later stages' gradients, steps and moves have to do with each chain's first objectives.

    Returns:
        The key; `gradients` (the verdict), `steps` (measurements), `cross` and `within` (cosines of half
        batches) with bounds; `explained`, `measured`, `rest` (nats, sums over the later stages; null where no
        ledger was kept); `movement_weight`, `movement_raw` (cosine of the first and the last stage's move).
    """
    rows = []
    ledger, moved = ("explained", "measured", "rest"), ("movement_weight", "movement_raw")
    for run, _, objective in _followed(runs):
        tables = [read_chain(run, name) for name in ("conflict", "ledger")]
        conflict, entries = (table[table["previous_objective"] == objective] for table in tables)
        verdict, path = conflict_verdict(conflict), segments(entries)
        cosines = dict(zip(_bounds("cross", "within"), verdict["cross"] + verdict["within"], strict=True))
        sums = path[["term", "measured", "rest"]].sum() if len(path) else [None] * 3
        moves = whole_adapter(read_table(run.movement)).loc[["weight", "lora"], "cosine"]
        row = _key(run, objective) | {"gradients": verdict["verdict"], "steps": verdict["steps"]} | cosines
        rows.append(row | dict(zip([*ledger, *moved], [*sums, *moves], strict=True)))
    return _table(rows, others=["gradients", "steps"], numbers=[*_bounds("cross", "within"), *ledger, *moved])


def sides(table: pd.DataFrame, column: str) -> tuple[int, int]:
    """How many intervals of a column lie clearly below zero, and how many clearly above."""
    return int((table[f"{column}_high"] < 0).sum()), int((table[f"{column}_low"] > 0).sum())


def ledger_counts(mechanics: pd.DataFrame) -> dict[str, int]:
    """How many ledgers were `kept`, in how many the loss `rose`, and how many `closed` to a tenth."""
    kept = mechanics.dropna(subset=["measured"])
    closed = kept["rest"].abs() <= 0.1 * kept["measured"].abs()
    return {"kept": len(kept), "rose": int((kept["measured"] > 0).sum()), "closed": int(closed.sum())}


def angles(cosines: pd.Series) -> pd.Series:
    """A column of cosines as angles, in degrees."""
    return cosines.astype(float).map(lambda cosine: math.degrees(math.acos(cosine)))
