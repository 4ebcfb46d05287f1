"""What a later stage's labels do to the first objectives, beside what any later training does to them.

Every comparison begins with the same earlier stages and asks for the held-out margin at the end of one way to
go on (`ENDS`). Ends are compared pair by pair and run by run, so that a pair's stage 1 is on both sides:

    real - nothing  =  (real - shuffled)  +  (shuffled - nothing)
    what happened      what the labels do     what any training does
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from seqdpo_utils import metrics, redistribution
from seqdpo_utils.chains import AGAIN, SHUFFLED, Chain, controls
from seqdpo_utils.metrics import DELTA, NOT_LEARNED, bounded, bounds
from seqdpo_utils.paths import RunPaths
from seqdpo_utils.verdicts import adjusted

NOTHING, REAL, JOINT, ALONE = "nothing follows", "real labels", "both at once", "later stage alone"
ENDS = (NOTHING, REAL, SHUFFLED, AGAIN, JOINT, ALONE)
"""Ways to go on after the earlier stages; the last two are single stages that begin with the base."""
FIRST, LATER = "first", "later"
"""Whose margin: an objective of the first stage, or one of the last."""
CONTRASTS = {
    "labels": (REAL, SHUFFLED),
    "training": (SHUFFLED, NOTHING),
    "total": (REAL, NOTHING),
    "again": (AGAIN, NOTHING),
}
QUESTIONS = ("learned", *CONTRASTS, "spared", "taught")
PROTECT, DESTROY, LITTLE = "the labels protect", "the labels destroy", "the labels take little"
TRAINING, LABELS, BOTH = "any training", "the labels", "any training and the labels"
DECIDED = (TRAINING, LABELS, BOTH)
"""What takes from a first objective, where that can be told."""
OPEN, NO_CONTROL = "cannot be told", "no control was run"
CHANGES = {"real": "total", "shuffled": "training", "real minus shuffled": "labels"}
"""Rows of `quartiles`: a change, and its name among the contrasts."""
_PLACE = ["setting", "chain", "objective"]


def ways_on(chain: Chain, among: Collection[str]) -> dict[str, str]:
    """The chains that a chain's end is held against, itself as `REAL`.

    Args:
        chain: of at least two stages; its last stage is questioned.
        among: texts of the chains that were run, with their beginnings.

    Returns:
        Name in `ENDS` to the text of a chain in `among`.
    """
    found = {NOTHING: str(chain.parent), REAL: str(chain), ALONE: str(Chain((chain.last,)))}
    for text in among:
        stages = Chain.parse(text).stages
        if len(stages) == 1 and not stages[0].variants and {*stages[0].objectives} == {*chain.objectives}:
            found[JOINT] = text
    return {name: text for name, text in (found | controls(chain, among)).items() if text in among}


def _questioned(runs: Sequence[RunPaths]) -> Iterator[tuple[list[RunPaths], dict[str, str], dict[str, str]]]:
    """Chains whose last stage is questioned: their runs, the ways on, and objectives with their roles."""
    trained = {node for run in runs for node in run.lineage}
    texts = {node.chain for node in trained}
    for group in metrics.over_seeds(runs):
        chain = Chain.parse(group[0].chain)
        first = dict.fromkeys(chain.stages[0].objectives, FIRST)
        roles = first | dict.fromkeys(chain.last.objectives, LATER)
        if chain.parent and not chain.last.variants and FIRST in roles.values():
            among = {text for text in texts if all(run.at(text) in trained for run in group)}
            yield group, ways_on(chain, among), roles


def by_pair(runs: Sequence[RunPaths], *, beta: float) -> pd.DataFrame:
    """Held-out DPO margins of every pair and run after each way to go on.

    Args:
        runs: every chain of the study with every seed, controls among them. Questioned are chains whose last
            stage has no variants and does not train all objectives of the first stage again.
        beta: the training's beta.

    Returns:
        `setting`, `chain`, `objective`, `role` (`FIRST`, `LATER`), `seed`, `pair_id`, `prompt_id`, and a
        column an end, null where it was not run for every seed of the chain.
    """
    parts = [pd.DataFrame()]
    for group, ways, roles in _questioned(runs):
        place = {"setting": group[0].setting, "chain": group[0].chain}
        for objective in sorted(roles):
            found = {
                name: metrics.margins([run.at(text) for run in group], objective, beta=beta)
                for name, text in ways.items()
            }
            wide = found[REAL][["prompt_id"]].assign(**{name: found[name][ways[name]] for name in found})
            place |= {"objective": objective, "role": roles[objective]}
            parts.append(wide.assign(**place).reset_index())
    columns = [*_PLACE, "role", "seed", "pair_id", "prompt_id", *ENDS]
    table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    return table.astype(dict.fromkeys(ENDS, float))


def _draws(part: pd.DataFrame, resamples: int) -> dict[str, np.ndarray]:
    """Mean margin at each end that was run, its crossed bootstrap draws below."""
    names, rng = [name for name in ENDS if part[name].notna().all()], np.random.default_rng(0)
    return dict(zip(names, metrics.estimates(part, names, resamples=resamples, rng=rng).T, strict=True))


def _compared(draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of `CONTRASTS` whose two ends were run."""
    return {name: draws[a] - draws[b] for name, (a, b) in CONTRASTS.items() if {a, b} <= set(draws)}


def _size(part: pd.DataFrame) -> dict[str, int]:
    return {"seeds": part["seed"].nunique(), "n_prompts": part["prompt_id"].nunique()}


def _table(rows: list[dict[str, Any]], others: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    numbers = bounds(*numbers)
    return pd.DataFrame(rows, columns=[*_PLACE, *others, *numbers]).astype(dict.fromkeys(numbers, float))


def ends(pairs: pd.DataFrame, *, resamples: int) -> pd.DataFrame:
    """Mean held-out margin after each way to go on that was run. `pairs`: from `by_pair`.

    Returns:
        `setting`, `chain`, `objective`, `role`, `end`, `seeds`, `n_prompts`, and `margin` with bounds over
        prompts and, where there are several, runs.
    """
    rows = []
    for place, part in pairs.groupby([*_PLACE, "role"], sort=False):
        row = dict(zip([*_PLACE, "role"], place, strict=True)) | _size(part)
        draws = _draws(part, resamples)
        rows += [row | {"end": name} | bounded({"margin": both}) for name, both in draws.items()]
    return _table(rows, ["role", "end", "seeds", "n_prompts"], ["margin"])


def effects(pairs: pd.DataFrame, *, resamples: int) -> pd.DataFrame:
    """What labels and training did to each chain's first objectives, with a verdict by a rule.

    Args:
        pairs: from `by_pair`.
        resamples: bootstrap draws, over prompts crossed with runs.

    Returns:
        `setting`, `chain`, `objective`, `labels_do`, `taken_by` (both from `verdict`), `seeds`, `n_prompts`;
        each of `QUESTIONS` with bounds and its p-value (`..._p`), adjusted over the rows (Holm), null where a
        control was not run: `learned` (margin with nothing after), the `CONTRASTS`, `spared` (labels + delta
        learned) and `taught`: what the labels did to the last stage's own objective (of several the least).
    """
    rows = []
    for place, part in pairs.groupby(["setting", "chain"], sort=False):
        draws = {row: _draws(own, resamples) for row, own in part.groupby(["role", "objective"])}
        taught = [_compared(own).get("labels") for (role, _), own in draws.items() if role == LATER]
        for objective, own in part[part["role"] == FIRST].groupby("objective", sort=False):
            found = {"learned": draws[FIRST, objective][NOTHING]} | _compared(draws[FIRST, objective])
            if "labels" in found:
                found["spared"] = found["labels"] + DELTA * found["learned"]
                found["taught"] = min(taught, key=lambda both: both[0])
            rows.append(dict(zip(_PLACE, (*place, objective), strict=True)) | _size(own) | bounded(found))
    table = _table(rows, ["labels_do", "taken_by", "seeds", "n_prompts"], QUESTIONS)
    table = table.assign(**{f"{name}_p": adjusted(table, name) for name in QUESTIONS})
    said = [verdict(row) for row in table.to_dict("records")]
    return table.assign(labels_do=[do for do, _ in said], taken_by=[found for _, found in said])


def verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """What the labels do, and what takes from the first objective, by a rule fixed before looking.

    A contrast is clear where its corrected p-value is at most .05. The labels *protect* where real minus
    shuffled is clearly above zero, *destroy* where it is clearly below, and *take little* where they were
    learned (`taught`) and clearly take less than a share delta of the margin (`spared`). Where something was
    learned, *any training* takes from it if shuffled minus nothing is clearly below zero and the labels
    protect or take little; *the labels* take from it if they destroy, and *both* if shuffled minus nothing
    is clearly below zero as well. All else cannot be told.

    Args:
        row: of `effects`: `QUESTIONS` and their p-values.
    """
    if pd.isna(row["labels"]):
        return NO_CONTROL, NO_CONTROL
    clear = [name for name in QUESTIONS if row[f"{name}_p"] <= 0.05]
    above, below = ({name for name in clear if sign * row[name] > 0} for sign in (1, -1))
    do = PROTECT if "labels" in above else DESTROY if "labels" in below else OPEN
    if do == OPEN and {"spared", "taught"} <= above:
        do = LITTLE
    if "learned" not in above:
        return do, NOT_LEARNED
    if do == DESTROY:
        return do, BOTH if "training" in below else LABELS
    return do, TRAINING if "training" in below and do != OPEN else OPEN


def findings(effects: pd.DataFrame) -> pd.DataFrame:
    """One finding a setting: what its decided cases agree on.

    Returns:
        `setting`, `cases`, `decided` (how many), and `taken_by`: what these are, `OPEN` where none is, each
        with its number where they differ.
    """
    rows = []
    for setting, part in effects.groupby("setting", sort=False):
        counts = part["taken_by"][part["taken_by"].isin(DECIDED)].value_counts()
        told = [f"{name} ({count})" for name, count in counts.items()] if len(counts) > 1 else [*counts.index]
        rows.append((setting, len(part), int(counts.sum()), ", ".join(told) or OPEN))
    return pd.DataFrame(rows, columns=["setting", "cases", "decided", "taken_by"])


def quartiles(pairs: pd.DataFrame, *, resamples: int) -> pd.DataFrame:
    """Change of the pairs that stage 1 left lowest and highest: real, shuffled, and the difference of both.

    Pairs are sorted by the margin that the change begins with, so that regression to the mean is in the real
    change and in the shuffled one; what it does to both alike drops out of their difference.

    Returns:
        `setting`, `chain`, `objective`, `change` (of `CHANGES`), `seeds`, `n_prompts`, `lowest`, `highest`
        (means of the quartiles), `difference` (highest minus lowest) with bounds, and `difference_p`,
        adjusted over the rows of a change (Holm). No row without shuffled labels, or with too few pairs.
    """
    rows = []
    controlled = pairs[(pairs["role"] == FIRST) & pairs[SHUFFLED].notna()]
    for place, part in controlled.groupby(_PLACE, sort=False):
        for change, name in CHANGES.items():
            end, start = CONTRASTS[name]
            moved = part.assign(margin_before=part[NOTHING], margin_change=part[end] - part[start])
            tables, rng = [run for _, run in moved.groupby("seed")], np.random.default_rng(0)
            found = redistribution.highest_minus_lowest(tables, "stage1_margin", resamples=resamples, rng=rng)
            row = dict(zip(_PLACE, place, strict=True)) | {"change": change} | _size(part)
            rows += [row | found] if found else []
    table = _table(rows, ["change", "seeds", "n_prompts", "lowest", "highest"], ["difference"])
    return table.assign(difference_p=adjusted(table, "difference", over=["change"]))
