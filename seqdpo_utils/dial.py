"""The conflict dial: what every instrument reads where the opposition of the later stage is known.

The chains train one objective, then the same again with a known share of its labels turned, on pairs that
stage 1 did not see or on those that it saw. Chains that go on with another objective are placed on that
scale.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from seqdpo_utils import metrics
from seqdpo_utils.chains import Chain
from seqdpo_utils.conflict import cosine
from seqdpo_utils.ledger import by_pair
from seqdpo_utils.movement import load_lora, weight_inner
from seqdpo_utils.paths import RunPaths, read_json, read_table
from seqdpo_utils.verdicts import adjusted, units

NEW, SEEN, OTHER = "new pairs", "seen pairs", "another objective"
"""What the later stage trains on: a dial on pairs new to the chain, one on stage 1's pairs, or no dial."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ZERO = "zero"
"""Name of the reading 0 where it is placed on the scale: no change, or a right angle."""
RANDOM = 0.5
"""The share at which labels say nothing."""
_HALVES = ("matched_cosine", "within_cosine", "within_new_cosine")
INSTRUMENTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "margin change": (-1, ("margin",)),
    "matched cosine (training)": (-1, ("train matched_cosine",)),
    "matched cosine (held out)": (-1, ("probe matched_cosine",)),
    "corrected cosine (training)": (-1, tuple(f"train {name}" for name in _HALVES)),
    "corrected cosine (held out)": (-1, tuple(f"probe {name}" for name in _HALVES)),
    "ledger direction (nats)": (1, ("probe left",)),
    "ledger measured (nats)": (1, ("probe measured",)),
    "movement cosine": (-1, ("movement",)),
}
"""Which way each reading should go as labels are turned, and the quantities whose means it is made of."""
KEY = ["setting", "objective", "pairs", "instrument"]
_BOUNDED = metrics.bounds("value", "difference", "place")
_COLUMNS = [*KEY, "chain", "share", "seeds", "units", *_BOUNDED]
_COLUMNS += ["difference_p", "fitted", "monotone", "outside"]


def roles(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """The runs of dials, and those that are placed on them, by what their last stage was trained with.

    Returns:
        `setting`, `objective` (of stage 1), `pairs` (`NEW`, `SEEN`, `OTHER`), `share` (of labels turned; null
        for another objective, whose labels may be its own or at random), `chain`, `seed`, `steps` (of the
        last stage), `run`; only objectives that were trained again with more than one share.
    """
    rows = []
    for run in runs:
        chain = Chain.parse(run.chain)
        first, last = chain.stages[0], chain.last
        if len(chain.stages) != 2 or first.variants or len(first.objectives) > 1:
            continue
        made, objective = read_json(run.manifest), first.objectives[0]
        shaped, varied = made["parameters"], set(made["varied"])
        pairs, share = OTHER, None
        if last.objectives == first.objectives and varied <= {"flipped", "prompts_across_stages"}:
            pairs = NEW if shaped["prompts_across_stages"] == "disjoint" else SEEN
            share = shaped["flipped"]
        elif objective in last.objectives or not varied <= {"shuffled_labels"}:
            continue
        steps = int(read_table(run.history)["step"].max())
        rows.append((run.setting, objective, pairs, share, run.chain, run.seed, steps, run))
    columns = ["setting", "objective", "pairs", "share", "chain", "seed", "steps", "run"]
    table = pd.DataFrame(rows, columns=columns).astype({"share": float})
    dials = table.groupby(["setting", "objective"])["share"].transform("nunique")
    return table[dials > 1].sort_values([*KEY[:3], "share", "chain", "seed"], ignore_index=True)


def absent(found: pd.DataFrame) -> list[str]:
    """What the dials of `roles` lack of the full design, a line a dial."""
    lines = []
    for (setting, objective), group in found.groupby(["setting", "objective"], sort=False):
        for pairs in (NEW, SEEN):
            there = set(group.loc[group["pairs"] == pairs, "share"])
            if missing := [f"{share:.0%}" for share in SHARES if share not in there]:
                lines.append(f"{setting}, {objective}, {pairs}: no chain with {', '.join(missing)} turned")
    return lines


def _movement_cosine(run: RunPaths) -> float | None:
    """Cosine in weight space of the two stages' moves; the scale alpha / r of both drops out."""
    start, first, last = map(load_lora, (run.start, run.previous, run.adapter))
    products = np.zeros(3)
    for path, origin in start.items():
        u, v = (*origin, *first[path]), (*first[path], *last[path])
        products += [weight_inner(u, v), weight_inner(u, u), weight_inner(v, v)]
    return cosine(*products)


def _looked_back(file: Path, objective: str) -> pd.DataFrame:
    return read_table(file).query("previous_objective == @objective").astype({"split": str})


def _observed(run: RunPaths, objective: str, *, beta: float) -> pd.DataFrame:
    """All that the instruments average in one run.

    Returns:
        `chain`, `seed`, `part`, `item` (pair, or step of a cosine), `prompt_id` (what is resampled: the
        prompt, or again the step), `value`.
    """
    wide = metrics.margins([run], objective, beta=beta).reset_index()
    change = wide[run.chain] - wide[str(Chain.parse(run.chain).parent)]
    steps = _looked_back(run.conflict, objective).astype({"step": str}).rename(columns={"step": "pair_id"})
    steps = steps.assign(prompt_id=steps["pair_id"])
    pairs = by_pair(_looked_back(run.ledger_pairs, objective)).reset_index()
    item = ["pair_id", "prompt_id"]
    moved = {"pair_id": ["all"], "prompt_id": ["all"], "part": "movement", "value": _movement_cosine(run)}
    parts = [wide[item].assign(part="margin", value=change), pd.DataFrame(moved)]
    for table, names in ((steps, _HALVES), (pairs, ("left", "measured"))):
        long = table.melt(["split", *item], list(names), var_name="part")
        parts.append(long.assign(part=long.pop("split") + " " + long["part"]))
    table = pd.concat([part.astype({"value": float}) for part in parts if len(part)], ignore_index=True)
    return table.rename(columns={"pair_id": "item"}).assign(chain=run.chain, seed=run.seed)


def calibrate(found: pd.DataFrame, *, beta: float, resamples: int) -> pd.DataFrame:
    """Every instrument at every share, and where other chains stand on its scale.

    All chains of a dial are compared on the seeds and pairs (of cosines: steps) that they share. A p-value
    counts as many units as there are seeds, or prompts where these are fewer. The scale is the isotonic
    regression of the readings on the share; a reading's place on it is found by inverse interpolation, in
    each bootstrap draw, and only where the instrument sees the dial (`seen`).

    Args:
        found: from `roles`.
        beta: the training's beta.
        resamples: bootstrap draws behind each interval.

    Returns:
        `KEY` and a row a chain (and one for `ZERO`): `share`, `seeds`, `units`; `value`, `difference` (from
        share 0) and `place` with bounds; `difference_p` (Holm over the shares), `fitted` (the scale),
        `monotone` (Spearman of share and reading over seeds, each less its mean, in the expected direction),
        `outside` ("below", "beyond" or ""). Null where undefined or, for bounds, where nothing was repeated.
    """
    rows: list[dict[str, Any]] = []
    for (setting, objective), group in found.groupby(["setting", "objective"], sort=False):
        observed = pd.concat([_observed(run, objective, beta=beta) for run in group["run"]])
        for pairs in (NEW, SEEN):
            shares = group[group["pairs"].isin([pairs, OTHER])].drop_duplicates("chain")
            shares = shares.set_index("chain")["share"]
            if shares.nunique() < 2 or 0 not in shares.tolist():
                continue
            for instrument in INSTRUMENTS:
                key = dict(zip(KEY, (setting, objective, pairs, instrument), strict=True))
                rows += [key | row for row in _readings(observed, shares, instrument, resamples)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _readings(
    observed: pd.DataFrame, shares: pd.Series, instrument: str, resamples: int
) -> list[dict[str, Any]]:
    """Rows of one instrument on one dial."""
    way, parts = INSTRUMENTS[instrument]
    wide = observed[observed["part"].isin(parts)].pivot(
        index=["seed", "item", "prompt_id"], columns=["part", "chain"], values="value"
    )
    whole = wide.columns[wide.notna().any()]
    chains = [chain for chain in shares.index if all((part, chain) in whole for part in parts)]
    wide = wide.reindex(columns=list(itertools.product(parts, chains))).dropna()
    if wide.empty or 0 not in shares[chains].tolist():
        return []
    shares = shares[chains]
    by_seed = wide.groupby("seed").mean().to_numpy().reshape(-1, len(parts), len(chains))
    wide.columns = range(wide.shape[1])
    drawn = metrics.estimates(wide, wide.columns, resamples=resamples, rng=np.random.default_rng(0))
    draws = _gated(drawn.reshape(len(drawn), len(parts), len(chains)))
    draws = np.column_stack([draws, np.zeros(len(draws))])
    sizes = [wide.index.get_level_values(name).nunique() for name in ("seed", "prompt_id")]
    repeated = units(*sizes)
    places = {"chain": [*chains, ZERO], "share": [*shares[chains], np.nan]}
    table = pd.DataFrame(places | {"seeds": sizes[0], "units": repeated})
    changes = draws - draws[:, [int(table["share"].eq(0).argmax())]]
    table[_BOUNDED[:6]] = np.hstack([_bounded(draws, repeated), _bounded(changes, repeated)])
    turned = table[table["share"] > 0].assign(n_prompts=sizes[1])
    table["difference_p"] = adjusted(turned, "difference")
    dial = table.index[table["share"].notna() & table["value"].notna()]
    table["monotone"] = _monotone(way * _combined(by_seed)[:, dial], table["share"][dial].to_numpy())
    return _placed(table, draws, dial, way)


def _combined(parts: np.ndarray) -> np.ndarray:
    """A reading from its quantities, (..., parts, chains): a mean, or a cosine freed of noise."""
    if parts.shape[-2] == 1:
        return parts[..., 0, :]
    cross, old, new = np.moveaxis(parts, -2, 0)
    return cross / np.sqrt(np.where((old > 0) & (new > 0), old * new, np.nan))


def _gated(parts: np.ndarray) -> np.ndarray:
    """Draws of a reading, (1 + resamples, chains); no cosine where halves do not clearly agree."""
    found = _combined(parts)
    if parts.shape[1] == 1:
        return found
    agree = (np.quantile(parts[1:, 1:], 0.025, axis=0) > 0).all(axis=0) & (np.abs(found[0]) <= 1)
    return np.where(agree, found.clip(-1, 1), np.nan)


def _bounded(draws: np.ndarray, repeated: int) -> np.ndarray:
    """Value, low and high, (columns, 3); no bounds where nothing was repeated."""
    kept = (column[np.isfinite(column)] for column in draws[1:].T)
    bounds = [metrics.interval(each) if repeated > 1 and len(each) else (np.nan, np.nan) for each in kept]
    return np.column_stack([draws[0], np.where(np.isfinite(draws[:1].T), bounds, np.nan)])


def _monotone(readings: np.ndarray, shares: np.ndarray) -> float:
    """Spearman's correlation of share and reading, (seeds, shares), each seed less its mean."""
    whole = readings[np.isfinite(readings).all(axis=1)]
    left = whole - whole.mean(axis=1, keepdims=True) if whole.size else whole
    varies = left.size > 2 and np.ptp(left) > 1e-12
    return float(stats.spearmanr(left.ravel(), np.tile(shares, len(left))).statistic) if varies else np.nan


def _placed(table: pd.DataFrame, draws: np.ndarray, dial: pd.Index, way: int) -> list[dict[str, Any]]:
    """The rows with `fitted`, and with the places of those that are no dial (`dial`: the others)."""
    table[[*_BOUNDED[6:], "fitted"]], table["outside"] = np.nan, ""
    dial = dial[np.argsort(table["share"][dial])]
    shares, rising = table["share"][dial].to_numpy(), way * draws[np.isfinite(draws[:, dial]).all(axis=1)]
    scales = np.array([optimize.isotonic_regression(row).x for row in rising[:, dial]])
    if len(dial):
        table.loc[dial, "fitted"] = way * scales[0]
    if not _sees(table, way).any() or _sees(table, -way).any():
        return table.to_dict("records")
    for k in table.index[table["share"].isna() & table["value"].notna()]:
        usable = np.isfinite(rising[:, k])
        found = [np.interp(*each, shares) for each in zip(rising[usable, k], scales[usable], strict=True)]
        table.loc[k, _BOUNDED[6:]] = _bounded(np.array([found]).T, int(table["units"][k]))[0]
        reading, scale = rising[0, k], scales[0]
        table.loc[k, "outside"] = "below" if reading < scale[0] else "beyond" if reading > scale[-1] else ""
    return table.to_dict("records")


def _sees(table: pd.DataFrame, way: int) -> pd.Series:
    """Where a reading differs clearly from that at share 0, in the direction `way`."""
    return (table["difference_p"] <= 0.05) & (way * table["difference"] > 0)


def seen(calibrated: pd.DataFrame) -> pd.DataFrame:
    """Which share each instrument sees first.

    Args:
        calibrated: from `calibrate`.

    Returns:
        `KEY`, `first` (smallest share whose reading differs from that at share 0, in the expected direction,
        p <= .05 after Holm over the shares; null where none does), `monotone`, `difference` with bounds at
        the largest share, `seeds`, `units`, `reading` (words); the most sensitive first.
    """
    rows = []
    for key, group in calibrated.groupby(KEY, sort=False):
        way, row = INSTRUMENTS[key[-1]][0], dict(zip(KEY, key, strict=True))
        full = group.loc[group["share"].idxmax()]
        right, wrong = (group.loc[_sees(group, side), "share"] for side in (way, -way))
        row |= full[["monotone", *_BOUNDED[3:6], "seeds", "units"]].to_dict() | {"first": right.min()}
        rows.append(row | {"reading": _in_words(right, wrong, group["difference_p"].notna().any())})
    columns = [*KEY, "first", "reading", "monotone", *_BOUNDED[3:6], "seeds", "units"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values([*KEY[:3], "first"], kind="stable", ignore_index=True)


def _in_words(right: pd.Series, wrong: pd.Series, measured: bool) -> str:
    if not measured:
        return "cannot be decided: no interval or not estimable"
    if len(wrong):
        return f"moves the wrong way at {wrong.min():.0%}"
    return f"sees {right.min():.0%} turned" if len(right) else "sees no share"


def place_in_words(row: pd.Series) -> str:
    """What the place of a chain's reading on the scale allows one to say; `row` of `calibrate`."""
    if pd.isna(row["place"]):
        return "no place: not measured, or the instrument does not see the dial"
    told = f"as at {row['place']:.0%} turned ({row['place_low']:.0%} to {row['place_high']:.0%})"
    if row["outside"]:
        end = "milder than with none" if row["outside"] == "below" else "worse than with all"
        told = f"outside the scale, {end} turned; {told}"
    if row["place_high"] < RANDOM:
        return f"{told}: milder than labels at random"
    return f"{told}: {'worse than' if row['place_low'] > RANDOM else 'not told from'} labels at random"


def new_minus_seen(found: pd.DataFrame, *, beta: float, resamples: int) -> pd.DataFrame:
    """Final held-out margin of the first objective: later stage on new pairs minus on seen pairs.

    Args:
        found: from `roles`.
        beta: the training's beta.
        resamples: bootstrap draws behind each interval.

    Returns:
        `setting`, `objective`, `share` (where both were run), `seeds`, `new`, `seen` and `difference` with
        bounds, paired by seed and pair; `difference_p`, Holm's correction over the shares of an objective.
    """
    rows, keys, means = [], ["setting", "objective", "share"], ["new", "seen", "difference"]
    for key, group in found.groupby(keys, sort=False):
        runs = {pairs: part["run"].tolist() for pairs, part in group.groupby("pairs")}
        if len(runs) < 2:
            continue
        new, seen = (metrics.margins(runs[pairs], key[1], beta=beta) for pairs in (NEW, SEEN))
        ends = {"new": new[runs[NEW][0].chain], "seen": seen[runs[SEEN][0].chain]}
        wide = new[["prompt_id"]].assign(**ends).dropna()
        wide["difference"] = wide["new"] - wide["seen"]
        rng = np.random.default_rng(0)
        row = metrics.estimated(wide, means, resamples=resamples, rng=rng) | dict(zip(keys, key, strict=True))
        sizes = {"seeds": len(wide.index.unique("seed")), "n_prompts": wide["prompt_id"].nunique()}
        rows.append(row | sizes)
    columns = [*keys, "seeds", "n_prompts", *means[:2], *metrics.bounds(means[2])]
    table = pd.DataFrame(rows, columns=columns)
    p = adjusted(table, "difference", over=keys[:2])
    return table.drop(columns="n_prompts").assign(difference_p=p)


def outcomes(found: pd.DataFrame, *, beta: float, resamples: int) -> pd.DataFrame:
    """What the rule `metrics.outcome` says of the first objective at every share, over the seeds.

    Args:
        found: from `roles`.
        beta: the training's beta.
        resamples: bootstrap draws behind each interval.

    Returns:
        `setting`, `objective`, `pairs`, `share`, `chain`, `outcome`, `learned` (margin after stage 1), `end`
        (at the end), both with bounds. Churn is not tested: redistribution counts as stable.
    """
    rows = []
    keys = ["setting", "objective", "pairs", "share", "chain"]
    for key, group in found.groupby(keys, sort=False, dropna=False):
        wide = metrics.margins(group["run"].tolist(), key[1], beta=beta)
        first, end = wide[str(Chain.parse(key[-1]).parent)], wide[key[-1]]
        wide = wide.assign(learned=first, end=end, **metrics.edges(first, end))
        rng = np.random.default_rng(0)
        fate = metrics.estimated(wide, metrics.DECIDING, resamples=resamples, rng=rng)
        rows.append(dict(zip(keys, key, strict=True)) | {"outcome": metrics.outcome(fate)} | fate)
    return pd.DataFrame(rows, columns=[*keys, "outcome", *metrics.bounds("learned", "end")])


def force(margin: np.ndarray, share: float) -> np.ndarray:
    """1 - f - sigma(M): how hard DPO lifts a pair's margin M where a share f of such labels is turned.

    It is minus the derivative of (1 - f) L(M) + f L(-M), with L(M) = -log sigma(M) (Rafailov et al. 2023,
    eq. 7; Chowdhury et al. 2024, arXiv 2403.00409, on noisy labels): zero at f = 1 - sigma(M).
    """
    return 1 - share - 1 / (1 + np.exp(-np.asarray(margin, dtype=float)))


def foretold(found: pd.DataFrame, *, beta: float) -> pd.DataFrame:
    """The share at which `force` vanishes on average over held-out pairs where stage 1 left them.

    Returns:
        `setting`, `objective`, `share`, `margin` (after stage 1), `seeds`.
    """
    rows = []
    for (setting, objective), group in found.groupby(["setting", "objective"], sort=False):
        runs = group.drop_duplicates("seed")["run"].tolist()
        first = metrics.margins([run.lineage[0] for run in runs], objective, beta=beta)[objective]
        rows.append((setting, objective, force(first, 0.0).mean(), first.mean(), len(runs)))
    return pd.DataFrame(rows, columns=["setting", "objective", "share", "margin", "seeds"])
