"""Tables across chains: what notebook 07 compares. Everything is read from the chains' own files."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from seqdpo_utils import metrics
from seqdpo_utils.charts import with_interval
from seqdpo_utils.mechanics import conflict_verdict
from seqdpo_utils.paths import RunPaths, read_scores, read_table


def _objectives(run: RunPaths) -> list[str]:
    return run.order.split("-then-")


def _label(run: RunPaths) -> str:
    return f"{run.setting}: {run.order.replace('-then-', ', then ')} (seed {run.seed})"


def _key(run: RunPaths) -> dict[str, object]:
    return {"label": _label(run), "setting": run.setting, "order": run.order, "seed": run.seed}


def first_objective(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """The stage-matrix rows of each chain's first objective, at the base, after its own stage and at the end."""
    parts = []
    for run in runs:
        matrix = read_table(run.table("stage_matrix"))
        kept = matrix["checkpoint"].isin(["base", "stage1", f"stage{len(_objectives(run))}"]) & (matrix["objective"] == _objectives(run)[0])
        parts.append(matrix[kept].assign(**_key(run)))
    return pd.concat(parts, ignore_index=True)


def fates(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """What became of each chain's first objective, by the rule of `metrics.outcome`.

    Returns:
        `setting`, `order`, `seed`, `first` (the objective trained first), `learned` with its lower bound, `backward` with bounds, `retention`
        with bounds, `outcome`, `churn` (share of pairs that changed sides).
    """
    rows = []
    for run in runs:
        objectives = _objectives(run)
        table = read_table(run.table("transfer")).set_index(["objective", "quantity"])
        learned, back, kept = (table.loc[(objectives[0], name)] for name in ("learned", "backward transfer", "retention"))
        changes = read_table(run.table("pair_change"))
        rows.append(
            {"setting": run.setting, "order": run.order, "seed": run.seed, "first": objectives[0], "learned": learned["value"], "learned_low": learned["low"], "backward": back["value"], "backward_low": back["low"], "backward_high": back["high"],
             "retention": kept["value"], "retention_low": kept["low"], "retention_high": kept["high"],
             "outcome": metrics.outcome(kept["low"], kept["high"]), "churn": metrics.churn(changes["before"], changes["after"])}
        )  # fmt: skip
    return pd.DataFrame(rows)


def quartile_contrast(runs: Sequence[RunPaths], *, seeds: Sequence[int], beta: float, resamples: int) -> pd.DataFrame:
    """Change of the highest and of the lowest quartile of each chain.

    The key is the chain's own stage-1 margin and, with several seeds, also the stage-1 margin of another seed: noise of one
    seed is not in the key of another, so regression to the mean drops out.
    """
    rows = []
    for run in runs:
        own = read_table(run.table("quartiles")).query("key == 'stage1_policy_margin'")
        rows.append(_key(run) | {"key": "stage1_policy_margin"} | _contrast(own))
        if len(seeds) > 1:
            other = seeds[(list(seeds).index(run.seed) + 1) % len(seeds)]
            twin = RunPaths(run.root, run.scale, run.setting, run.order, other)
            rows.append(_key(run) | {"key": "cross_seed"} | _contrast(_cross_seed(run, twin, beta=beta, resamples=resamples)))
    return pd.DataFrame(rows).drop(columns="label")


def _cross_seed(run: RunPaths, twin: RunPaths, *, beta: float, resamples: int) -> pd.DataFrame:
    objectives = _objectives(run)
    changes = read_table(run.table("pair_change")).set_index("pair_id")
    measures = metrics.pair_measures(read_scores(twin, stages=len(objectives)).query("split == 'eval'"), beta=beta)
    key = metrics.wide_margins(measures, objectives[0], measure="policy_margin")["stage1"].reindex(changes.index)
    return metrics.quartiles(changes.reset_index(), key, resamples=resamples, rng=np.random.default_rng(run.seed))


def _contrast(table: pd.DataFrame) -> dict[str, float]:
    by = table.set_index("quartile")
    return {f"{name}{bound}": by.loc[number, f"change{bound}"] for name, number in (("lowest", 1), ("highest", 4)) for bound in ("", "_low", "_high")}


def mechanics(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """Cosines of gradients (between objectives, within the earlier one) and of adapter movement, one row a chain."""
    rows = []
    for run in runs:
        conflict = pd.concat([read_table(run.conflict(k)) for k in range(2, len(_objectives(run)) + 1)])
        verdict = conflict_verdict(conflict)
        movement = read_table(run.movement)
        whole = movement[movement["layer"].isna() & movement["module"].isna()].drop_duplicates("space").set_index("space")
        row = {f"{name}{bound}": value for name in ("cross", "within") for bound, value in zip(("", "_low", "_high"), verdict[name], strict=True)}
        rows.append({"setting": run.setting, "order": run.order, "seed": run.seed} | row | {"steps": verdict["steps"], "gradients": verdict["verdict"],
                     "movement_weight": whole.loc["weight", "cosine"], "movement_raw": whole.loc["lora", "cosine"]})  # fmt: skip
    return pd.DataFrame(rows).astype({name: "Float64" for name in ("cross_low", "cross_high", "within_low", "within_high")})


def claims(fates: pd.DataFrame, quartiles: pd.DataFrame, mechanics: pd.DataFrame) -> pd.DataFrame:
    """The source study's claims (from its abstract, arXiv 2606.19744), our figure beside each, and what it allows one to say."""
    parts = [
        _claim_fates(fates),
        _claim_safety(fates),
        _claim_order(fates),
        _claim_quartiles(quartiles),
        _claim_gradients(mechanics),
        _claim_movement(mechanics),
    ]
    return pd.DataFrame(parts, columns=["claim", "figure", "verdict"])


def _claim_fates(fates: pd.DataFrame) -> tuple[str, str, str]:
    counted = fates["outcome"].value_counts()
    figure = "; ".join(f"{name}: {n} of {len(fates)} chains" for name, n in counted.items()) + "."
    decided = [name for name in counted.index if name not in ("undecided", "undefined: the stage did not learn")]
    verdict = (
        "More than one fate is seen."
        if len(decided) > 1
        else f"Only one fate could be told apart ({decided[0]})."
        if decided
        else "Cannot be decided at this size."
    )
    return "Forgetting is not uniform: a first objective may degrade, stay, be redistributed or gain.", figure, verdict


def _claim_safety(fates: pd.DataFrame) -> tuple[str, str, str]:
    claim = "A strong safety signal is retained."
    safe = fates[(fates["setting"] == "safety_signal") & (fates["first"] == "safe")]
    if safe.empty:
        return claim, "The setting was not run.", "No answer."
    row = safe.iloc[0]
    if pd.isna(row["retention"]):
        return claim, f"Stage 1 gained {row['learned']:+.2f} (lower bound {row['learned_low']:+.2f}).", "Undefined: stage 1 did not learn."
    others = fates.drop(safe.index)["retention"].dropna()
    figure = f"Retention of `safe`, trained first (seed {row['seed']}): {with_interval(row['retention'], row['retention_low'], row['retention_high'])}; median of the other chains: {others.median():.2f}."
    return claim, figure, f"By the rule: {row['outcome']}."


def _claim_order(fates: pd.DataFrame) -> tuple[str, str, str]:
    rows = []
    for setting, group in fates.groupby("setting"):
        one, two = (group[group["order"] == order].iloc[0] for order in dict.fromkeys(group["order"]))
        apart = one["backward_low"] > two["backward_high"] or two["backward_low"] > one["backward_high"]
        rows.append((setting, one["backward"] - two["backward"], apart))
    apart = [name for name, _, separate in rows if separate]
    figure = "Backward transfer, one order minus the other: " + "; ".join(f"{name} {gap:+.2f}" for name, gap, _ in rows) + "."
    return (
        "The order matters.",
        figure,
        f"The intervals of the two orders do not overlap in {len(apart)} of {len(rows)} settings{': ' + ', '.join(apart) if apart else ''}.",
    )


def _claim_quartiles(quartiles: pd.DataFrame) -> tuple[str, str, str]:
    key = "cross_seed" if "cross_seed" in set(quartiles["key"]) else "stage1_policy_margin"
    part = quartiles[quartiles["key"] == key]
    fell, rose = int((part["highest_high"] < 0).sum()), int((part["highest_low"] > 0).sum())
    figure = f"Highest quartile by `{key}`: clearly down in {fell} of {len(part)} chains, clearly up in {rose}."
    caution = "" if key == "cross_seed" else " Regression to the mean is not excluded with one seed."
    verdict = "Both directions occur." if fell and rose else "One direction only." if fell or rose else "Cannot be decided at this size."
    return "High-confidence pairs may degrade or improve, depending on the setting.", figure, verdict + caution


def _claim_gradients(mechanics: pd.DataFrame) -> tuple[str, str, str]:
    counted = mechanics["gradients"].value_counts()
    cross, within = mechanics["cross"].mean(), mechanics["within"].mean()
    figure = (
        f"Mean cosine between objectives {cross:+.2f}, of an objective with itself {within:+.2f}; "
        + "; ".join(f"{n} chains {name}" for name, n in counted.items())
        + "."
    )
    undecided = counted.get("cannot be decided at this size", 0)
    verdict = (
        f"{undecided} of {len(mechanics)} chains decide nothing: there the old objective is as orthogonal to itself."
        if undecided
        else "Decided in every chain."
    )
    return "Stage-2 gradients are near-orthogonal to the earlier objective.", figure, verdict


def _claim_movement(mechanics: pd.DataFrame) -> tuple[str, str, str]:
    low, high = mechanics["movement_weight"].min(), mechanics["movement_weight"].max()
    angles = [math.degrees(math.acos(value)) for value in (high, low)]
    figure = f"Cosine of the two stages' moves in weight space: {low:+.2f} to {high:+.2f}; in raw coordinates {mechanics['movement_raw'].min():+.2f} to {mechanics['movement_raw'].max():+.2f}."
    return (
        "Adapter movements of the two stages are near-orthogonal.",
        figure,
        f"The angles between them are {angles[0]:.0f} to {angles[1]:.0f} degrees; 90 is orthogonal.",
    )
