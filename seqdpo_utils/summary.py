"""Tables across chains: what notebook 07 compares. Everything is read from the chains' own files."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from seqdpo_utils import metrics
from seqdpo_utils.charts import with_interval
from seqdpo_utils.ledger import segments
from seqdpo_utils.mechanics import conflict_verdict, whole_adapter
from seqdpo_utils.paths import RunPaths, read_scores, read_table


def _objectives(run: RunPaths) -> list[str]:
    return run.order.split("-then-")


def _key(run: RunPaths) -> dict[str, Any]:
    return {"setting": run.setting, "first": _objectives(run)[0], "seed": run.seed}


def _held_out(run: RunPaths, *, beta: float) -> pd.DataFrame:
    return metrics.pair_measures(read_scores(run, stages=len(_objectives(run))).query("split == 'eval'"), beta=beta)


def _twin(run: RunPaths, seeds: Sequence[int]) -> RunPaths:
    """The chain of the next seed, cyclically."""
    other = seeds[(list(seeds).index(run.seed) + 1) % len(seeds)]
    return RunPaths(run.root, run.scale, run.setting, run.order, other)


def first_objective(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """The stage-matrix rows of each chain's first objective after its own stage and at the end, with a `label`."""
    parts = []
    for run in runs:
        objectives = _objectives(run)
        matrix = read_table(run.table("stage_matrix"))
        kept = matrix["checkpoint"].isin(["stage1", f"stage{len(objectives)}"]) & (matrix["objective"] == objectives[0])
        label = f"{run.setting}: {run.order.replace('-then-', ', then ')} (seed {run.seed})"
        parts.append(matrix[kept].assign(label=label, order=run.order, **_key(run)))
    return pd.concat(parts, ignore_index=True)


def fates(runs: Sequence[RunPaths], *, seeds: Sequence[int], beta: float, resamples: int) -> pd.DataFrame:
    """What became of each chain's first objective, by the rule of `metrics.outcome`.

    Returns:
        `setting`, `first` (the objective trained first), `seed`, `learned` and `backward` (transfer) with bounds, `retention` with bounds, `churn` (share of
        pairs whose answers changed places after stage 1), `excess_churn_low` (null with one seed) and `outcome`.
    """
    rows = []
    for run in runs:
        table = read_table(run.table("transfer")).set_index(["objective", "quantity"])
        row = _key(run)
        for name, quantity in (("learned", "learned"), ("backward", "backward transfer"), ("retention", "retention")):
            cell = table.loc[(_objectives(run)[0], quantity)]
            row |= {name: cell["value"], f"{name}_low": cell["low"], f"{name}_high": cell["high"]}
        changes = read_table(run.table("pair_change"))
        row["churn"] = metrics.churn(changes["before"], changes["after"])
        row["excess_churn_low"] = _excess_churn_low(run, seeds, beta=beta, resamples=resamples)
        rows.append(row | {"outcome": metrics.outcome(row["retention_low"], row["retention_high"], excess_churn_low=row["excess_churn_low"])})
    return pd.DataFrame(rows).astype({"excess_churn_low": "Float64"})


def _excess_churn_low(run: RunPaths, seeds: Sequence[int], *, beta: float, resamples: int) -> float | None:
    """Lower bound of churn(stage 1 to the end) minus churn between stage 1 of this seed and of another."""
    if len(seeds) < 2:
        return None
    objective, last = _objectives(run)[0], f"stage{len(_objectives(run))}"
    own = metrics.wide_margins(_held_out(run, beta=beta), objective, measure="policy_margin")
    other = metrics.wide_margins(_held_out(_twin(run, seeds), beta=beta), objective, measure="policy_margin")["stage1"].reindex(own.index)
    right = own["stage1"] > 0
    excess = ((right != (own[last] > 0)).astype(float) - (right != (other > 0)).astype(float)).to_numpy()
    draws = metrics.resampled_means(excess[:, None], own["prompt_id"], resamples=resamples, rng=np.random.default_rng(run.seed))
    return metrics.interval(draws[:, 0])[0]


def order_effect(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """For each objective: its final margin when it was trained last, minus when it was trained first, on the same held-out pairs.

    Returns:
        `setting`, `objective`, `seed`, `trained_first`, `trained_last` (mean final margins), `difference` with bounds (paired bootstrap over prompts).
    """
    rows = []
    for one, two in itertools.permutations(runs, 2):
        objective = _objectives(one)[0]
        if (one.setting, one.seed) != (two.setting, two.seed) or _objectives(two)[-1] != objective:
            continue
        ends = [metrics.wide_margins(_held_out(run, beta=beta), objective) for run in (one, two)]
        final = np.stack([end[f"stage{len(_objectives(run))}"].reindex(ends[0].index) for end, run in zip(ends, (one, two), strict=True)], axis=1)
        draws = metrics.resampled_means(final, ends[0]["prompt_id"], resamples=resamples, rng=np.random.default_rng(one.seed))
        low, high = metrics.interval(draws[:, 1] - draws[:, 0])
        first, last = final.mean(axis=0)
        rows.append({"setting": one.setting, "objective": objective, "seed": one.seed, "trained_first": first, "trained_last": last,
                     "difference": last - first, "difference_low": low, "difference_high": high})  # fmt: skip
    return pd.DataFrame(rows)


def quartile_contrast(runs: Sequence[RunPaths], *, seeds: Sequence[int], beta: float, resamples: int) -> pd.DataFrame:
    """Change of the lowest and of the highest quartile of each chain, and the difference of the two.

    The key is the chain's own stage-1 margin and, with several seeds, also that of another seed: the noise of one seed is not in the key of
    another. The noise of the training pairs, which the seeds share, stays in both.

    Returns:
        `setting`, `first`, `seed`, `key`, `pairs`, `lowest`, `highest`, `difference` (highest minus lowest) with bounds.
    """
    rows = []
    for run in runs:
        changes = read_table(run.table("pair_change")).set_index("pair_id")
        keys = {"stage1_policy_margin": changes["before"]}
        if len(seeds) > 1:
            twin = metrics.wide_margins(_held_out(_twin(run, seeds), beta=beta), _objectives(run)[0], measure="policy_margin")
            keys["cross_seed"] = twin["stage1"].reindex(changes.index)
        for name, key in keys.items():
            rng = np.random.default_rng(run.seed)
            rows.append(_key(run) | {"key": name, "pairs": len(changes)} | metrics.highest_minus_lowest(changes, key, resamples=resamples, rng=rng))
    return pd.DataFrame(rows)


def mechanics(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """Cosines of gradients (between objectives and within an objective, of halves), the ledger of the first objective over all later stages, and cosines of
    adapter movement, one row a chain.

    Returns:
        `setting`, `first`, `seed`; `cross`, `within` with bounds, `steps`, `gradients` (the verdict); `explained`, `measured`, `rest` (nats; null where no ledger
        was kept); `movement_weight`, `movement_raw`.
    """
    rows = []
    for run in runs:
        conflict = pd.concat([read_table(run.conflict(k)) for k in range(2, len(_objectives(run)) + 1)])
        verdict = conflict_verdict(conflict)
        entries = pd.concat([read_table(run.ledger(k)) for k in range(2, len(_objectives(run)) + 1)])
        path = segments(entries[entries["previous_objective"] == _objectives(run)[0]])
        bottom = {name: path[column].sum() if len(path) else None for name, column in (("explained", "term"), ("measured", "measured"), ("rest", "rest"))}
        whole = whole_adapter(read_table(run.movement))
        row = {f"{name}{bound}": value for name in ("cross", "within") for bound, value in zip(("", "_low", "_high"), verdict[name], strict=True)}
        rows.append(_key(run) | row | bottom | {"steps": verdict["steps"], "gradients": verdict["verdict"],
                    "movement_weight": whole.loc["weight", "cosine"], "movement_raw": whole.loc["lora", "cosine"]})  # fmt: skip
    numbers = [f"{name}{bound}" for name in ("cross", "within") for bound in ("", "_low", "_high")]
    numbers += ["explained", "measured", "rest", "movement_weight", "movement_raw"]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, "Float64"))


def claims(fates: pd.DataFrame, orders: pd.DataFrame, quartiles: pd.DataFrame, mechanics: pd.DataFrame) -> pd.DataFrame:
    """The source study's claims (from its abstract, arXiv 2606.19744), our figure beside each, and what it allows one to say."""
    parts = [
        _claim_fates(fates),
        _claim_safety(fates),
        _claim_order(orders),
        _claim_quartiles(quartiles),
        _claim_gradients(mechanics),
        _claim_opposition(mechanics),
        _claim_movement(mechanics),
    ]
    return pd.DataFrame(parts, columns=["claim", "figure", "verdict"])


def _counted(values: pd.Series, of: str = "chains") -> str:
    return "; ".join(f"{name}: {n} of {len(values)} {of}" for name, n in values.value_counts().items())


def _claim_fates(fates: pd.DataFrame) -> tuple[str, str, str]:
    claim = "Forgetting is not uniform: a first objective may degrade, stay, be redistributed among pairs, or gain."
    decided = [name for name in fates["outcome"].unique() if name not in ("undecided", metrics.UNDEFINED)]
    verdict = (
        "More than one fate is seen." if len(decided) > 1 else f"Only one fate could be told: {decided[0]}." if decided else "Cannot be decided at this size."
    )
    tested = "" if fates["excess_churn_low"].notna().any() else " Redistribution is not tested with one seed."
    return claim, _counted(fates["outcome"]) + ".", verdict + tested


def _claim_safety(fates: pd.DataFrame) -> tuple[str, str, str]:
    claim = "A strong safety signal is retained."
    safe = fates[(fates["setting"] == "safety_signal") & (fates["first"] == "safe")]
    if safe.empty:
        return claim, "The setting was not run with `safe` first.", "No answer."
    each = [
        f"seed {row.seed}: gain {with_interval(row.learned, row.learned_low, row.learned_high)}, retention "
        + ("undefined" if pd.isna(row.retention) else with_interval(row.retention, row.retention_low, row.retention_high))
        for row in safe.itertuples()
    ]
    return claim, "`safe` trained first, " + "; ".join(each) + ".", "By the rule: " + _counted(safe["outcome"], "seeds") + "."


def _claim_order(orders: pd.DataFrame) -> tuple[str, str, str]:
    claim = "The order matters: an objective ends elsewhere when it is trained first than when it is trained last."
    if orders.empty:
        return claim, "Only one order was run.", "No answer."
    apart = orders[(orders["difference_low"] > 0) | (orders["difference_high"] < 0)]
    gaps = "; ".join(f"{row.setting}, {row.objective} {row.difference:+.2f}" for row in orders.itertuples())
    return (
        claim,
        f"Final held-out margin, trained last minus trained first: {gaps}.",
        f"The interval of the difference is clear of zero in {len(apart)} of {len(orders)} cases.",
    )


def _claim_quartiles(quartiles: pd.DataFrame) -> tuple[str, str, str]:
    claim = "High-confidence pairs may degrade or improve, depending on the setting."
    key = "cross_seed" if "cross_seed" in set(quartiles["key"]) else "stage1_policy_margin"
    part = quartiles[quartiles["key"] == key]
    fell, rose = int((part["difference_high"] < 0).sum()), int((part["difference_low"] > 0).sum())
    figure = (
        f"Change of the highest quartile minus that of the lowest, by `{key}`: clearly below zero in {fell} of {len(part)} chains, clearly above in {rose}."
    )
    verdict = "Both directions occur." if fell and rose else "One direction only." if fell or rose else "Cannot be decided at this size."
    shared = (
        " The seeds share their training pairs, whose noise is still in the key."
        if key == "cross_seed"
        else " With one seed regression to the mean is not excluded."
    )
    return claim, figure, verdict + shared


def _claim_gradients(mechanics: pd.DataFrame) -> tuple[str, str, str]:
    claim = "Stage-2 gradients are near-orthogonal to the earlier objective."
    if (mechanics["gradients"] == "not measured").all():
        return claim, "Conflict was not measured.", "No answer."
    cross, within = mechanics["cross"].mean(), mechanics["within"].mean()
    undecided = int((mechanics["gradients"] == "cannot be decided at this size").sum())
    figure = f"Mean cosine between objectives {cross:+.2f}, within an objective {within:+.2f}, halves of batches of like size."
    return (
        claim,
        figure,
        _counted(mechanics["gradients"]) + "." + (" Where nothing can be decided the cosine near zero says nothing about the objectives." if undecided else ""),
    )


def _claim_opposition(mechanics: pd.DataFrame) -> tuple[str, str, str]:
    claim = "Direct opposition of the objectives is not what drives forgetting."
    kept = mechanics.dropna(subset=["measured"])
    if kept.empty:
        return claim, "No ledger was kept.", "No answer."
    rose = kept[kept["measured"] > 0]
    closed = kept[kept["rest"].abs() <= 0.1 * kept["measured"].abs()]
    figure = (
        f"Training loss of the first objective over the later stages: {kept['measured'].min():+.3f} to {kept['measured'].max():+.3f} nats; it rose in {len(rose)} of "
        f"{len(kept)} chains. The gradients along the way account for the change to a tenth in {len(closed)} of {len(kept)}."
    )
    against = int((rose["explained"] > 0).sum())
    verdict = f"In {against} of {len(rose)} chains with a rising loss the steps went up the earlier gradient, whatever the cosines of small batches say."
    return claim, figure, verdict if len(rose) else "The earlier training loss rose nowhere: there was nothing to drive."


def _claim_movement(mechanics: pd.DataFrame) -> tuple[str, str, str]:
    claim = "Adapter movements of the two stages are near-orthogonal."
    weight, raw = mechanics["movement_weight"].dropna(), mechanics["movement_raw"].dropna()
    if weight.empty:
        return claim, "A stage did not move the adapter.", "No answer."
    angles = [math.degrees(math.acos(value)) for value in (weight.max(), weight.min())]
    figure = (
        f"Cosine of the two stages' moves in weight space: {weight.min():+.2f} to {weight.max():+.2f}; in raw coordinates {raw.min():+.2f} to {raw.max():+.2f}."
    )
    return (
        claim,
        figure,
        f"The angles in weight space are {angles[0]:.0f} to {angles[1]:.0f} degrees; 90 is orthogonal, and notebook 06 shows what random directions give.",
    )
