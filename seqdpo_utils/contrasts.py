"""Tables across chains: what notebook 07 compares. Everything is read from the chains' own files.

Most tables follow the objectives of a chain's FIRST stage, through chains of at least two stages: one row a
setting, chain, objective and seed. Without such a chain a table is empty and keeps its columns.
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
from seqdpo_utils.paths import RunPaths, read_chain, read_table

KEY = ["setting", "chain", "objective", "seed"]


def _bounds(*names: str) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def _table(rows: list[dict[str, Any]], *, numbers: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
    columns = [*KEY, *others, *numbers]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(numbers, "Float64"))


def _key(run: RunPaths, objective: str) -> dict[str, Any]:
    return {"setting": run.setting, "chain": run.chain, "objective": objective, "seed": run.seed}


def _followed(runs: Iterable[RunPaths]) -> Iterator[tuple[RunPaths, Chain, str]]:
    """Every chain of at least two stages, with each objective of its first stage."""
    for run in runs:
        chain = Chain.parse(run.chain)
        for objective in chain.stages[0].objectives if chain.parent else ():
            yield run, chain, objective


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
        stages = run.chain.replace("-then-", ", then ")
        inside = f"{objective} in " if len(chain.stages[0].objectives) > 1 else ""
        key = _key(run, objective) | {"label": f"{run.setting}: {inside}{stages} (seed {run.seed})"}
        matrix = _rows_of(run.table("stage_matrix"), objective).set_index("checkpoint")
        for number, checkpoint in enumerate(chain.checkpoints[1:], start=1):
            place = {"after": f"stage {number}", "checkpoint": checkpoint}
            rows.append(matrix.loc[checkpoint].to_dict() | key | place)
    others = ["label", "after", "checkpoint", "n_pairs", "n_prompts"]
    return _table(rows, others=others, numbers=_bounds("margin"))


def fates(runs: Sequence[RunPaths], *, resamples: int) -> pd.DataFrame:
    """What became of the objectives of each chain's first stage, by the rule of `metrics.outcome`.

    Returns:
        The key, `outcome`, `learned`, `backward` (transfer) and `retention` with bounds, `churn` (share of
        pairs whose answers changed places after stage 1) and `excess_churn_low` (null with one seed).
    """
    rows = []
    quantities = {"learned": "learned", "backward": "backward transfer", "retention": "retention"}
    for run, chain, objective in _followed(runs):
        table = _rows_of(run.table("transfer"), objective)
        table = table[table["checkpoint"] == chain.checkpoints[1]].set_index("quantity")
        estimates = table.loc[list(quantities.values()), ["value", "low", "high"]].to_numpy(dtype=object)
        row = _key(run, objective) | dict(zip(_bounds(*quantities), estimates.flatten(), strict=True))
        changes = _changes(run, objective)
        row["churn"] = metrics.churn(changes["before"], changes["after"])
        other = _other_seed(run, runs, objective)
        low = None if other is None else _excess_churn_low(changes, other, resamples=resamples, seed=run.seed)
        name = metrics.outcome(row["retention_low"], row["retention_high"], excess_churn_low=low)
        rows.append(row | {"excess_churn_low": low, "outcome": name})
    return _table(rows, others=["outcome"], numbers=[*_bounds(*quantities), "churn", "excess_churn_low"])


def _excess_churn_low(changes: pd.DataFrame, other: pd.Series, *, resamples: int, seed: int) -> float:
    """Lower bound of churn(stage 1 to the end) minus churn between stage 1 of this seed and of another."""
    right, after = changes["before"] > 0, changes["after"] > 0
    elsewhere = other.reindex(changes.index) > 0
    excess = (right != after).astype(float) - (right != elsewhere).astype(float)
    values, rng = excess.to_numpy()[:, None], np.random.default_rng(seed)
    draws = metrics.resampled_means(values, changes["prompt_id"], resamples=resamples, rng=rng)
    return metrics.interval(draws[:, 0])[0]


def order_effect(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """An objective's final margin when it was trained last, minus when it was trained first, pair by pair.

    Compared are chains without variants whose stages are each other's reverse.

    Returns:
        The key (`chain`: the one that trains the objective first), `trained_first`, `trained_last` (mean
        final margins), `difference` with bounds (paired bootstrap over prompts).
    """
    rows = []
    for run, chain, objective in _followed(runs):
        mirror = run.at(Chain(chain.stages[::-1]))
        plain = not any(stage.variants for stage in chain.stages)
        if mirror not in runs or not plain or objective in chain.last.objectives:
            continue
        scores = [read_table(file) for file in (run.base_scores, run.scores, mirror.scores)]
        measures = metrics.pair_measures(pd.concat(scores, ignore_index=True), beta=beta)
        wide = metrics.wide_margins(measures, objective)
        both = wide[[run.chain, mirror.chain]].to_numpy()
        rng = np.random.default_rng(run.seed)
        draws = metrics.resampled_means(both, wide["prompt_id"], resamples=resamples, rng=rng)
        first, last = both.mean(axis=0)
        gap = (last - first, *metrics.interval(draws[:, 1] - draws[:, 0]))
        row = _key(run, objective) | {"trained_first": first, "trained_last": last}
        rows.append(row | dict(zip(_bounds("difference"), gap, strict=True)))
    return _table(rows, numbers=["trained_first", "trained_last", *_bounds("difference")])


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


def decided(fates: pd.DataFrame) -> list[str]:
    """The outcomes that say something, each once."""
    return [name for name in fates["outcome"].unique() if name not in ("undecided", metrics.UNDEFINED)]


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
