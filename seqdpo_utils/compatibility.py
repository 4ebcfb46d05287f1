"""Can it be known beforehand what a second objective will do to the first?

Before the second stage there are the labels, the policy after stage 1 and its gradients; afterwards there is
what became of the first objective. Chains of two plain stages, one objective each, are compared.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from seqdpo_utils import metrics
from seqdpo_utils.chains import SHUFFLED, Chain, controls
from seqdpo_utils.conflict import corrected_cosine
from seqdpo_utils.metrics import bounds, margins
from seqdpo_utils.pairs import label_agreement
from seqdpo_utils.paths import RunPaths, read_table
from seqdpo_utils.verdicts import holm

BEFORE = {
    "agreement": "label agreement on shared pairs",
    "forward": "what stage 1 did to the second objective",
    "gradients": "corrected cosine of the gradients at the start of stage 2",
}
"""What is known before stage 2; of each, more is more compatible."""
AFTER = {"backward": "backward transfer", "due": "real minus shuffled later stage"}
"""What then happened to the first objective's held-out margin."""
LEAST, MANY = 5, 20
"""Below LEAST chains nothing can be decided; below MANY all is exploratory."""
PERMUTATIONS = 9999
FORETELLS, CONTRARY = (
    "foretells: the more of it, the more was kept",
    "contrary: the more of it, the less was kept",
)
NO_RELATION, ONE_SETTING = "no relation was shown", "the sign hangs on one setting"
TOO_FEW = f"cannot be decided: fewer than {LEAST} chains"


def compatibility(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """What was known before stage 2 beside what then happened, one row a chain, over its seeds.

    Returns:
        `setting`, `chain`, `seeds`, `shared` (pairs of responses outside the evaluation that both objectives
        label); `agreement` (share of these labelled alike; null where none), `forward` (the second
        objective's held-out margin after stage 1) with bounds, `gradients` (null: not estimable); `backward`
        (the first objective's margin at the end minus after stage 1) and `due` (at the end, real minus
        shuffled later stage; null without that control), with bounds.
    """
    rows = []
    for group in metrics.over_seeds(runs):
        setting, chain = group[0].setting, Chain.parse(group[0].chain)
        plain = all(len(stage.objectives) == 1 and not stage.variants for stage in chain.stages)
        if not plain or len(chain.stages) != 2 or len(chain.objectives) != 2:
            continue
        among = {run.chain for run in runs if run.setting == setting}
        changes = _changes(group, chain, controls(chain, among).get(SHUFFLED), beta=beta)
        row = {"setting": setting, "chain": str(chain), "seeds": len(group)} | _labels(group[0], chain)
        row["gradients"] = first_cosine(group, chain.earlier[0])
        rng = np.random.default_rng(0)
        for name, table in changes.items():
            row |= metrics.estimated(table, [name], resamples=resamples, rng=rng)
        rows.append(row)
    numbers = ["agreement", *bounds("forward"), "gradients", *bounds("backward", "due")]
    columns = ["setting", "chain", "seeds", "shared", *numbers]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(numbers, "Float64"))


def _labels(run: RunPaths, chain: Chain) -> dict[str, float]:
    tables = {name: read_table(run.data(name)).query("split != 'eval'") for name in chain.objectives}
    return label_agreement(tables).iloc[0][["shared", "agree"]].rename({"agree": "agreement"}).to_dict()


def _changes(
    group: Sequence[RunPaths], chain: Chain, shuffled: str | None, *, beta: float
) -> dict[str, pd.DataFrame]:
    """Forward transfer, backward transfer and, with the control, what is due to the labels, pair by pair."""
    (first, second), parent = chain.objectives, str(chain.parent)
    new, old = (margins(group, name, beta=beta) for name in (second, first))
    found = {"forward": new.assign(forward=new[parent])}
    found["backward"] = old.assign(backward=old[str(chain)] - old[parent])
    if shuffled:
        sham = margins([run.at(shuffled) for run in group], first, beta=beta)[shuffled]
        found["due"] = old.assign(due=old[str(chain)] - sham)
    return found


def first_cosine(group: Sequence[RunPaths], earlier: str) -> float | None:
    """Noise-corrected cosine of the two objectives' gradients at the start of the last stage.

    From the first measurement on held-out probe pairs; inner products are averaged over the runs.

    Returns:
        None where it is not estimable (`conflict.corrected_cosine`) or was not measured.
    """
    first = []
    for run in group:
        measured = read_table(run.conflict)
        measured = measured[(measured["previous_objective"] == earlier) & (measured["split"] == "probe")]
        first += [measured.nsmallest(1, "step")] if len(measured) else []
    products = ["cross_product", "within_new", "within_old"]
    means = pd.concat(first)[products].astype(float).mean() if first else pd.Series(np.nan, index=products)
    return None if means.isna().any() else corrected_cosine(*means)


def relations(table: pd.DataFrame, *, rng: np.random.Generator) -> pd.DataFrame:
    """Does what was known beforehand rank the chains as what then happened does?

    Args:
        table: from `compatibility`.
        rng: draws permutations where there are too many to try all.

    Returns:
        A row for each of `BEFORE` and of `AFTER`: `before`, `after`, `chains` and `settings` that have both,
        `rho` (Spearman 1904), `p` (two-sided, chains permuted), `p_holm` (over the rows that have one),
        `same_sign` (rho keeps its sign without any one setting; null where that cannot be seen), `reading`.
        All null with fewer than `LEAST` chains, or where one side does not vary.
    """
    rows = []
    for before, after in itertools.product(BEFORE, AFTER):
        part = table.dropna(subset=[before, after])
        row = {"before": before, "after": after, "chains": len(part), "settings": part["setting"].nunique()}
        rows.append(row | _relation(part, before, after, rng=rng))
    found = pd.DataFrame(rows).astype({"rho": "Float64", "p": "Float64", "same_sign": "boolean"})
    found["p_holm"] = pd.array([pd.NA] * len(found), dtype="Float64")
    if (known := found["p"].notna()).any():
        found.loc[known, "p_holm"] = holm(found.loc[known, "p"].to_numpy(dtype=float))
    return found.assign(reading=[_reading(row) for row in found.to_dict("records")])


def _relation(
    part: pd.DataFrame, before: str, after: str, *, rng: np.random.Generator
) -> dict[str, float | bool | None]:
    rho = _correlation(part, before, after)
    if len(part) < LEAST or pd.isna(rho):
        return {"rho": None, "p": None, "same_sign": None}
    known, happened = (stats.rankdata(part[name].to_numpy(dtype=float)) for name in (before, after))
    test = stats.permutation_test(
        (known - known.mean(),), lambda x, axis: (x * happened).sum(axis=axis), permutation_type="pairings",
        vectorized=True, n_resamples=PERMUTATIONS, rng=rng,
    )  # fmt: skip
    return {"rho": rho, "p": float(test.pvalue), "same_sign": _same_sign(part, before, after, rho)}


def _correlation(part: pd.DataFrame, before: str, after: str) -> float:
    """Spearman's rank correlation; NaN of fewer than three, or where one side does not vary."""
    known, happened = (part[name].astype(float) for name in (before, after))
    varies = min(known.nunique(), happened.nunique()) > 1
    return known.corr(happened, "spearman", min_periods=3) if varies else np.nan


def _same_sign(part: pd.DataFrame, before: str, after: str, rho: float) -> bool | None:
    rests = [part[part["setting"] != setting] for setting in part["setting"].unique()]
    signs = np.sign([_correlation(rest, before, after) for rest in rests])
    return None if np.isnan(signs).any() else bool((signs == np.sign(rho)).all())


def _reading(row: dict) -> str:
    if row["chains"] < LEAST:
        return TOO_FEW
    if pd.isna(row["rho"]):
        return "cannot be decided: one of the two does not vary"
    if row["p_holm"] > 0.05:
        return NO_RELATION
    if pd.isna(row["same_sign"]) or not row["same_sign"]:
        return ONE_SETTING
    return FORETELLS if row["rho"] > 0 else CONTRARY


def in_words(found: pd.DataFrame) -> str:
    """What `relations` allow one to say, for a page."""
    most = found["chains"].max()
    if most < LEAST:
        return f"Nothing can be decided: {most} of the {LEAST} chains that this needs at least."
    parts = []
    for (before, reading), rows in found[found["chains"] >= LEAST].groupby(["before", "reading"], sort=False):
        numbers = ", ".join(
            f"{AFTER[row.after]} {'–' if pd.isna(row.rho) else format(row.rho, '+z.2f')}"
            for row in rows.itertuples()
        )
        parts.append(f"* {BEFORE[before]}: {reading} (rank correlation with {numbers}).")
    few = f"**Exploratory**: {most} chains, of which two orders of one setting share data and labels."
    return "\n".join([few if most < MANY else f"{most} chains.", *parts])
