"""Tables across chains: what notebook 07 compares. Everything is read from the chains' own files.

Most tables follow the objectives of a chain's FIRST stage, through chains of at least two stages: one row a
setting, chain, objective and seed, or one for all seeds (`..._over_seeds`). Without such a chain a table is
empty and keeps its columns.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from seqdpo_utils import metrics, redistribution
from seqdpo_utils.chains import AGAIN, SHUFFLED, Chain, controls
from seqdpo_utils.conflict import conflict_verdict
from seqdpo_utils.ledger import PARTS, by_pair, with_intervals
from seqdpo_utils.metrics import bounds, followed, over_seeds
from seqdpo_utils.movement import whole_adapter
from seqdpo_utils.paths import RunPaths, read_chain, read_json, read_table
from seqdpo_utils.verdicts import adjusted

KEY = ["setting", "chain", "objective", "seed"]


def _table(rows: list[dict[str, Any]], *, numbers: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
    columns = [*KEY, *others, *numbers]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(numbers, "Float64"))


def _key(run: RunPaths, objective: str) -> dict[str, Any]:
    return {"setting": run.setting, "chain": run.chain, "objective": objective, "seed": run.seed}


def _sizes(group: Sequence[RunPaths], wide: pd.DataFrame) -> dict[str, int]:
    return {"seeds": len(group), "n_prompts": wide["prompt_id"].nunique()}


def _rows_of(file: Path, objective: str) -> pd.DataFrame:
    return read_table(file).query("objective == @objective")


def _changes(run: RunPaths, objective: str) -> pd.DataFrame:
    return _rows_of(run.table("pair_change"), objective).set_index("pair_id")


def _other_seed(run: RunPaths, runs: Iterable[RunPaths], objective: str) -> pd.Series | None:
    """Policy margin by pair after stage 1 of the same chain with the next seed, cyclically, or None."""
    seeds = sorted({other.seed for other in runs if replace(other, seed=run.seed) == run})
    twin = replace(run, seed=seeds[(seeds.index(run.seed) + 1) % len(seeds)])
    return None if twin == run else _changes(twin, objective)["before"]


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
    return _table(rows, others=["trained", "n_pairs", "n_prompts"], numbers=bounds("margin"))


def first_objectives(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """The held-out margin of each chain's first objectives after every stage.

    Returns:
        The key, `label` (of the chain, for a figure), `after` ("stage 1", ...), `checkpoint`, `n_pairs`,
        `n_prompts`, `margin` with bounds.
    """
    rows = []
    for (run,), chain, objective in followed([run] for run in runs):
        stages = ", then ".join(map(str, chain.stages))
        inside = f"{objective} in " if len(chain.stages[0].objectives) > 1 else ""
        key = _key(run, objective) | {"label": f"{run.setting}: {inside}{stages} (seed {run.seed})"}
        matrix = _rows_of(run.table("stage_matrix"), objective).set_index("checkpoint")
        for number, checkpoint in enumerate(chain.checkpoints[1:], start=1):
            place = {"after": f"stage {number}", "checkpoint": checkpoint}
            rows.append(matrix.loc[checkpoint].to_dict() | key | place)
    others = ["label", "after", "checkpoint", "n_pairs", "n_prompts"]
    return _table(rows, others=others, numbers=bounds("margin"))


def fates(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """What became of the objectives of each chain's first stage, run by run, by the rule `metrics.outcome`.

    Returns:
        The key, `outcome`, `later_objective`, `seeds` (1), `n_prompts`; the numbers of `metrics.fate` with
        bounds; `churn` (share of pairs whose answers changed places after stage 1) and `excess_churn_low`
        (null with one seed).
    """
    return _fates([[run] for run in runs], beta, resamples)


def fates_over_seeds(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """The same with one verdict over all seeds of a chain: seeds are resampled beside prompts.

    Returns:
        As `fates`, without `seed`; the p-value of each contrast that decides (`learned_p`, ...), adjusted
        over the rows (Holm), and `outcome_holm`: the outcome where only contrasts with p <= .05 decide.
    """
    table = _fates(over_seeds(runs), beta, resamples).drop(columns="seed")
    held = table.copy()
    for name in metrics.DECIDING:
        table[f"{name}_p"], ends = adjusted(table, name), bounds(name)[1:]
        held[ends] = held[ends].where(table[f"{name}_p"] <= 0.05, 0.0)  # a bound of zero decides nothing
    return table.assign(outcome_holm=_outcomes(held))


def _fates(groups: Sequence[list[RunPaths]], beta: float, resamples: int) -> pd.DataFrame:
    rows, runs = [], [run for group in groups for run in group]
    for group, chain, objective in followed(groups):
        names = read_table(group[0].table("transfer"))["objective"].unique()
        measures, rng = metrics.measures_of(group, beta=beta), np.random.default_rng(group[0].seed)
        found = metrics.transfer(measures, chain, names, resamples=resamples, rng=rng)
        row = _key(group[0], objective) | metrics.fate(found, chain, objective)
        rows.append(row | _churn(group, runs, objective, resamples))
    numbers = [*bounds(*metrics.FATE, "later"), "churn", "excess_churn_low"]
    table = _table(rows, others=["later_objective", "seeds", "n_prompts"], numbers=numbers)
    table.insert(len(KEY), "outcome", _outcomes(table))
    return table


def _outcomes(fates: pd.DataFrame) -> list[str]:
    rows = fates.to_dict("records")
    return [metrics.outcome(row, excess_churn_low=row["excess_churn_low"]) for row in rows]


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
    means = metrics.estimated(table, ["churn", "excess"], resamples=resamples, rng=rng)
    return _sizes(group, table) | {"churn": means["churn"], "excess_churn_low": means["excess_low"]}


def order_effect(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """An objective's final margin when it was trained last, minus when it was trained first, pair by pair.

    Compared are chains without variants whose stages are each other's reverse, run by run.

    Returns:
        The key (`chain`: the one that trains the objective first), `seeds` (1), `n_prompts`, `trained_first`,
        `trained_last` (mean final margins), `difference` with bounds (paired bootstrap).
    """
    return _orders([[run] for run in runs], beta, resamples)


def order_over_seeds(runs: Sequence[RunPaths], *, beta: float, resamples: int) -> pd.DataFrame:
    """The same over all seeds of a chain, without `seed`; `difference_p` is adjusted over the rows (Holm)."""
    table = _orders(over_seeds(runs), beta, resamples).drop(columns="seed")
    return table.assign(difference_p=adjusted(table, "difference"))


def _orders(groups: Sequence[list[RunPaths]], beta: float, resamples: int) -> pd.DataFrame:
    rows, means = [], ["trained_first", "trained_last", "difference"]
    runs = [run for group in groups for run in group]
    for group, chain, objective in followed(groups):
        mirror = Chain(chain.stages[::-1])
        both = [run for run in group if run.at(mirror) in runs]
        plain = not any(stage.variants for stage in chain.stages)
        if not both or not plain or objective in chain.last.objectives:
            continue
        wide = metrics.margins(both, objective, beta=beta).rename(columns={str(chain): means[0]})
        last = metrics.margins([run.at(mirror) for run in both], objective, beta=beta)
        wide[means[1]] = last[str(mirror)]
        wide[means[2]] = wide[means[1]] - wide[means[0]]
        rng = np.random.default_rng(both[0].seed)
        found = metrics.estimated(wide, means, resamples=resamples, rng=rng)
        rows.append(_key(both[0], objective) | _sizes(both, wide) | found)
    return _table(rows, others=["seeds", "n_prompts"], numbers=[*means[:2], *bounds(means[2])])


def quartile_contrast(runs: Sequence[RunPaths], *, resamples: int) -> pd.DataFrame:
    """Change of the lowest and of the highest quartile of each chain's first objectives, over its seeds.

    Returns:
        The key without `seed`; `seeds`, `pairs`, `n_prompts`, `shared` (`shared_training`), `key` (of
        `redistribution.KEYS`; `CROSS` only with several seeds), `lowest`, `highest`, `difference` (highest
        minus lowest) with bounds, `regression` (the most of it that may be regression to the mean),
        `reading`, and `difference_p`, adjusted over the rows of a key (Holm). Chains with too few held-out
        pairs have no row.
    """
    rows = []
    for place, tables in _changes_over_seeds(runs):
        for key in redistribution.KEYS:
            options = {"resamples": resamples, "rng": np.random.default_rng(place["seed"])}
            found = redistribution.highest_minus_lowest(tables, key, shared=place["shared"] > 0, **options)
            rows += [place | {"key": key} | found] if found else []
    numbers = ["lowest", "highest", *bounds("difference"), "regression"]
    others = ["seeds", "pairs", "n_prompts", "shared", "key", "reading"]
    table = _table(rows, others=others, numbers=numbers).drop(columns="seed")
    return table.assign(difference_p=adjusted(table, "difference", over=["key"]))


def kept_of_learned(runs: Sequence[RunPaths], *, resamples: int) -> pd.DataFrame:
    """The line of what was kept on what was learned, for each chain's first objectives, over its seeds.

    Returns:
        The key without `seed`; `seeds`, `pairs`, `shared`, `instrument` ("none": each run by itself; `CROSS`:
        what another seed learned), `slope`, `intercept` with bounds, `pattern` (of
        `redistribution.loss_pattern`; where seeds share training pairs, whose luck is then in the instrument
        too, it decides nothing).
    """
    rows = []
    for place, tables in _changes_over_seeds(runs):
        learned = float(np.mean([table["margin_before"].mean() for table in tables]))
        for crossed in (False, True)[: len(tables)]:
            rng = np.random.default_rng(place["seed"])
            line = redistribution.kept_line(tables, crossed=crossed, resamples=resamples, rng=rng)
            found = redistribution.loss_pattern(line, learned=learned)
            if crossed and place["shared"]:
                found["pattern"] = "cannot be decided"
            rows.append(place | {"instrument": redistribution.CROSS if crossed else "none"} | found)
    others = ["seeds", "pairs", "shared", "instrument", "pattern"]
    return _table(rows, others=others, numbers=bounds("slope", "intercept")).drop(columns="seed")


def _changes_over_seeds(runs: Sequence[RunPaths]) -> Iterator[tuple[dict[str, Any], list[pd.DataFrame]]]:
    """What names the runs of each chain in a table, and their tables of pair changes, pair by pair."""
    for group, _, objective in followed(over_seeds(runs)):
        first = _changes(group[0], objective)
        tables = [_changes(run, objective).reindex(first.index) for run in group]
        place = _key(group[0], objective) | {"shared": shared_training(group)}
        yield place | {"pairs": len(first)} | _sizes(group, first), tables


def shared_training(group: Sequence[RunPaths]) -> float:
    """Share of their first stage's training pairs that two seeds have in common, on average; 0 for one seed.

    All seeds draw from one training split: of two random parts, each a share f of it, f is common.
    """
    if len(group) == 1:
        return 0.0
    return float(read_json(group[0].lineage[0].manifest)["parameters"]["train_share"])


def mechanics(runs: Sequence[RunPaths]) -> pd.DataFrame:
    """What the later stages' gradients, steps and moves have to do with each chain's first objectives.

    Returns:
        The key; `split` of the earlier pairs (held out, "probe", where there are such); `gradients` (the
        verdict), `steps` (measurements), `cross` and `within` (cosines of half batches) with bounds; `left`
        (direction), `curvature`, `measured` with bounds and `rest` (nats, sums over the later stages; null
        where no ledger was kept); `left_beyond`, ... (the last stage minus the same with shuffled labels,
        pair by pair, where that was run); `movement_weight`, `movement_raw` (cosine of the first and the last
        stage's move).
    """
    rows, beyond = [], [f"{part}_beyond" for part in PARTS]
    for (run,), chain, objective in followed([run] for run in runs):
        tables = (read_chain(run, name) for name in ("conflict", "ledger_pairs"))
        conflict, pairs = (_looked_back(table, objective) for table in tables)
        verdict, shuffled = conflict_verdict(conflict), controls(chain, _beside(run, runs)).get(SHUFFLED)
        row = _key(run, objective) | {"split": "".join(conflict["split"].unique())}
        row |= {"gradients": verdict["verdict"], "steps": verdict["steps"]}
        row |= dict(zip(bounds("cross", "within"), verdict["cross"] + verdict["within"], strict=True))
        row |= _over_stages(with_intervals(by_pair(pairs)), PARTS)
        if shuffled:
            row |= _over_stages(_looked_back(ledger_beyond(run, shuffled), objective), beyond)
        moves = whole_adapter(read_table(run.movement)).loc[["weight", "lora"], "cosine"]
        rows.append(row | dict(zip(("movement_weight", "movement_raw"), moves, strict=True)))
    numbers = bounds("cross", "within", *PARTS, *beyond)
    numbers += ["movement_weight", "movement_raw"]
    table = _table(rows, others=["split", "gradients", "steps"], numbers=numbers)
    table.insert(table.columns.get_loc("measured"), "rest", table.eval("measured - left - curvature"))
    return table


def _beside(run: RunPaths, runs: Iterable[RunPaths]) -> set[str]:
    """Chains that were run with the same setting and seed."""
    return {other.chain for other in runs if run.at(other.chain) == other}


def _looked_back(table: pd.DataFrame, objective: str) -> pd.DataFrame:
    """Rows against one earlier objective, on its held-out pairs where there are such."""
    rows = table[table["previous_objective"] == objective]
    return rows[rows["split"] == ("probe" if rows["split"].eq("probe").any() else "train")]


def ledger_beyond(run: RunPaths, control: str) -> pd.DataFrame:
    """What a chain's last stage did to earlier losses minus what its control did, on the same pairs.

    Returns:
        As `ledger.with_intervals`.
    """
    own, other = (by_pair(read_table(node.ledger_pairs)) for node in (run, run.at(control)))
    return with_intervals(own - other)


def _over_stages(found: pd.DataFrame, names: Sequence[str]) -> dict[str, float]:
    """Sums of `PARTS` over stages, whose pairs are drawn independently, under other names."""
    row = {}
    for part, name in zip(PARTS, names, strict=True) if len(found) else ():
        mean, reach = found[part].sum(), np.hypot.reduce(found[f"{part}_high"] - found[part])
        row |= dict(zip(bounds(name), (mean, mean - reach, mean + reach), strict=True))
    return row


def moves(mechanics: pd.DataFrame) -> pd.DataFrame:
    """The cosine of the first and the last move in weight space, beside that of the chain's controls.

    Args:
        mechanics: from `mechanics`.

    Returns:
        One row a setting and chain whose last stage has no variants: `seeds`; the means over these of
        `cosine`, of `shuffled`, `again` and `disjoint` (the last stage with shuffled labels, with the first
        objectives again, or on prompts that the first did not see; null where not run); `spread` (SD over
        seeds); `beyond` (cosine minus shuffled) with bounds (Student's t over seeds; null for one).
    """
    key, kinds = ["setting", "chain"], ["cosine", "shuffled", "again", "disjoint"]
    single = mechanics.drop_duplicates([*key, "seed"]).set_index([*key, "seed"])["movement_weight"]
    rows = []
    for setting, text in single.groupby(key, sort=False).groups:
        chain, here = Chain.parse(text), single.astype(float).loc[setting].unstack("chain")
        if chain.last.variants:
            continue
        twins = controls(chain, here.columns)
        texts = [text, *(twins.get(kind, "") for kind in (SHUFFLED, AGAIN)), f"{text}.disjoint"]
        at = here.reindex(columns=texts).set_axis(kinds, axis=1).dropna(subset="cosine")
        gaps = (at["cosine"] - at["shuffled"]).dropna()
        reach = gaps.sem() * stats.t.ppf(0.975, max(len(gaps) - 1, 1))
        beyond = zip(bounds("beyond"), gaps.mean() + np.array([0, -reach, reach]), strict=True)
        row = {"setting": setting, "chain": text, "seeds": len(at), "spread": at["cosine"].std()}
        rows.append(row | at.mean().to_dict() | dict(beyond))
    numbers = ["cosine", "spread", *kinds[1:], *bounds("beyond")]
    return pd.DataFrame(rows, columns=[*key, "seeds", *numbers]).astype(dict.fromkeys(numbers, "Float64"))


def beside(
    own: pd.DataFrame, run: RunPaths, kinds: Mapping[str, str], rows: Callable[[RunPaths], pd.DataFrame]
) -> pd.DataFrame:
    """The rows of a chain and, below them, those of its controls, as figures take them.

    Args:
        own: rows of the chain.
        run: its files.
        kinds: from `chains.controls`.
        rows: what a control has to show, from its files.

    Returns:
        Both with a column `control`, "" for the chain itself; a checkpoint that is a control's end is told as
        the chain's own.
    """
    parts = [own.assign(control="")]
    for kind, text in kinds.items():
        parts.append(rows(run.at(text)).replace(text, run.chain).assign(control=kind))
    return pd.concat(parts, ignore_index=True)


def controls_in_words(run: RunPaths, kinds: Mapping[str, str]) -> str:
    """Which controls of a chain are shown in grey, or what cannot be known without them."""
    chain = Chain.parse(run.chain)
    if chain.parent is None:
        return "This chain has one stage: no later one, and so no control of it."
    if chain.last.variants:
        return "The last stage is itself a variant: notebook 07 has all chains that were run side by side."
    told = [f"{kind} (`{text}`)" for kind, text in kinds.items()]
    words = [f"In grey, in place of the last stage: {' and '.join(told)}, seed {run.seed}."] if told else []
    if SHUFFLED not in kinds:
        words += ["No later stage with shuffled labels was run: how much of all this is what any"]
        words += ["training does is not known here."]
        words += [f'`make study DESIGN="both_orders controls" SETTINGS="{run.setting}"` runs it.']
    return " ".join(words)


def beside_controls(overview: pd.DataFrame) -> pd.DataFrame:
    """Rows of `first_objectives`; what is a control of another chain becomes a last point of that chain.

    Returns:
        The same columns; `after` names the kind of a control.
    """
    place, used, parts = ["setting", "chain", "seed"], set(), []
    for (setting, text, seed), own in overview.groupby(place, sort=False):
        others = overview[(overview["setting"] == setting) & (overview["seed"] == seed)]
        labels, parts = own.groupby("objective")["label"].first(), [*parts, own]
        for kind, control in controls(Chain.parse(text), set(others["chain"])).items():
            end = others[(others["checkpoint"] == control) & (others["chain"] == control)]
            parts.append(end.assign(after=kind, chain=text, label=end["objective"].map(labels)))
            used.add((setting, control, seed))
    kept = [part for part in parts if tuple(part[place].iloc[0]) not in used]
    return pd.concat(kept, ignore_index=True) if kept else overview


def sides(table: pd.DataFrame, column: str) -> tuple[int, int]:
    """How many intervals of a column lie clearly below zero, and how many clearly above."""
    return int((table[f"{column}_high"] < 0).sum()), int((table[f"{column}_low"] > 0).sum())


def ledger_counts(mechanics: pd.DataFrame) -> dict[str, int]:
    """How many ledgers were `kept`, in how many the loss `rose`, and how many `closed` to a tenth."""
    kept = mechanics.dropna(subset=["measured"])
    closed = kept["rest"].abs() <= 0.1 * kept["measured"].abs()
    return {"kept": len(kept), "rose": int((kept["measured"] > 0).sum()), "closed": int(closed.sum())}


def questioned(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of chains that ask the study's question: no variants, and not the first objectives again."""
    asks = [
        chain.last.objectives != chain.stages[0].objectives and not any(s.variants for s in chain.stages)
        for chain in map(Chain.parse, table["chain"])
    ]
    return table[np.array(asks, dtype=bool)]
