"""Mixtures of adapters that were trained apart, and where every way to have two objectives ends.

The single stages of a seed begin with one adapter whose B is zero, so the weight change of each is its whole
update, and mixtures W + sum_k w_k dW_k can be scored without any training: the straight line between two
singles (Ramé et al. 2023, arXiv 2306.04488) and their sum (Ilharco et al. 2023, arXiv 2212.04089). Factors
laid side by side give them exactly: sum_k w_k B_k A_k = [B_1 B_2] [w_1 A_1; w_2 A_2].
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from seqdpo_utils import metrics
from seqdpo_utils.chains import Chain, tree
from seqdpo_utils.conflict import cosine
from seqdpo_utils.models import load_base, load_tokenizer
from seqdpo_utils.movement import load_lora, weight_inner
from seqdpo_utils.pairs import encode_table
from seqdpo_utils.params import Parameters
from seqdpo_utils.paths import RunPaths, read_json, read_table, write_table
from seqdpo_utils.scoring import Scorer
from seqdpo_utils.stage_data import check_fingerprints
from seqdpo_utils.verdicts import holm, p_value, units

SHARES = (0.25, 0.5, 0.75)
"""Shares of the second adapter on the line between two; at 0 and 1 stand the adapters themselves."""
FURTHER = 1.5
"""How far a single is extrapolated: theta_0 + 1.5 (theta_1 - theta_0), ExPO with a = 0.5 (2404.16792)."""
ALONE, LINE, SUM, JOINT = "one objective alone", "interpolated", "summed", "both at once"
EXTRAPOLATED = "alone, extrapolated"
SEQUENTIAL, REPLAYED, PROJECTED = "one after the other", "with replay", "with projected steps"
TRAINED = (SEQUENTIAL, ALONE, JOINT, REPLAYED, PROJECTED)
"""The ways to have two objectives that are trained; the other two are mixed from those alone."""
KEY = ["setting", "seed", "checkpoint"]
"""Columns that name a mixture in the records."""
DOMINATED, UNDOMINATED, OPEN = "dominated", "not dominated", "cannot be decided at this size"
SIDES = ("first", "second")

Weights = Mapping[str, float]
"""Text of a single stage to the weight of its update."""
Plane = tuple[list[RunPaths], str, str]
"""Two objectives of a setting: a node of each seed, and the objectives in the setting's order."""


def recipes(first: str, second: str) -> list[tuple[Weights, str]]:
    """What is scored of two singles, and of which kind: mixtures of both, and either taken further."""
    line = [({first: 1 - share, second: share}, LINE) for share in SHARES]
    further = [({name: FURTHER}, EXTRAPOLATED) for name in (first, second)]
    return [*line, ({first: 1.0, second: 1.0}, SUM), *further]


def name_of(weights: Weights) -> str:
    """For example "0.75 helpful & 0.25 safe"."""
    return " & ".join(f"{weight:g} {name}" for name, weight in weights.items())


def with_adapters(base: PreTrainedModel, folders: Sequence[Path]) -> PeftModel:
    """The base model, wrapped in place, with saved adapters named "0", "1", ... ready to be mixed."""
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for k, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, str(k))
    return model.eval()


@contextlib.contextmanager
def mixed(model: PeftModel, weights: Sequence[float]) -> Iterator[PeftModel]:
    """The model with sum_k w_k dW_k as its adapter; a weight for each adapter of `with_adapters`."""
    names = [str(k) for k in range(len(weights))]
    model.add_weighted_adapter(names, list(weights), "mixture", combination_type="cat")
    model.set_adapter("mixture")
    try:
        yield model
    finally:
        model.set_adapter("0")
        model.delete_adapter("mixture")


def single_cosines(planes: Sequence[Plane]) -> pd.DataFrame:
    """Cosine of the whole updates of two singles, in weight space: `setting`, `x`, `y`, `seed`, `cosine`.

    Near 1 the line between them would be a mere change of size.
    """
    rows = []
    for run, x, y in _both_alone(planes):
        adapters = [load_lora(run.at(name).adapter) for name in (x, y)]
        products = np.zeros((2, 2))
        for path in adapters[0]:
            moves = [(a, torch.zeros_like(b), a, b) for a, b in (adapter[path] for adapter in adapters)]
            products += [[weight_inner(left, right) for right in moves] for left in moves]
        angle = cosine(products[0, 1], products[0, 0], products[1, 1])
        rows.append({"setting": run.setting, "x": x, "y": y, "seed": run.seed, "cosine": angle})
    return pd.DataFrame(rows)


def _both_alone(planes: Sequence[Plane]) -> Iterator[tuple[RunPaths, str, str]]:
    """The runs, and the two objectives, of which both single stages were trained."""
    for runs, x, y in planes:
        yield from ((run, x, y) for run in runs if all(run.at(name).manifest.is_file() for name in (x, y)))


def made_of(run: RunPaths, weights: Weights) -> str:
    """What the records of a mixture depend on: hash and weight of each adapter, data and base model."""
    parts = {name: [read_json(run.at(name).manifest)["adapter_sha256"], w] for name, w in weights.items()}
    return json.dumps({"adapters": parts} | read_json(run.preparation)["fingerprints"], sort_keys=True)


def score_mixtures(
    root: Path, planes: Sequence[Plane], *, parameters: Parameters
) -> tuple[pd.DataFrame, int]:
    """Per-pair records of the mixtures of all planes, on the held-out pairs of both objectives.

    They are kept in `summary/mixtures.parquet` with what they were made of, and scored again only where that
    has changed. Planes that lack one of the singles have none.

    Args:
        root: the project's folder.
        planes: from `planes_of`.
        parameters: base model, dtype, attention and the like, the same for all.

    Returns:
        The records with `setting`, `seed` and `made_of`, and how many mixtures were scored now.

    Raises:
        StudyError: when an adapter is missing, or belongs to another base model or other data.
    """
    wanted, scored = [], 0
    for run, *names in _both_alone(planes):
        kept = run.summary("mixtures")
        table = read_table(kept) if kept.is_file() else pd.DataFrame(columns=["made_of", *KEY])
        keys = {made_of(run, weights): weights for weights, _ in recipes(*names)}
        lacking = {key: keys[key] for key in keys if key not in set(table["made_of"])}
        if lacking:
            new = pd.concat(_score(root, run, names, lacking, parameters=parameters), ignore_index=True)
            stale = table.set_index(KEY).index.isin(new.set_index(KEY).index)
            table = pd.concat([table[~stale], new], ignore_index=True) if len(table) else new
            write_table(kept, table)
        wanted.append(table[table["made_of"].isin(keys)])
        scored += len(lacking)
    return (pd.concat(wanted, ignore_index=True) if wanted else pd.DataFrame(columns=KEY)), scored


def _score(
    root: Path, run: RunPaths, names: Sequence[str], wanted: Mapping[str, Weights], *, parameters: Parameters
) -> Iterator[pd.DataFrame]:
    """Records of mixtures of two singles, one table each; `wanted`: `made_of` to weights."""
    revision = parameters.base_model_revision
    tokenizer = load_tokenizer(root, parameters.base_model, revision=revision)
    check_fingerprints(root, run, tokenizer, parameters=parameters)
    base = load_base(
        root, parameters.base_model, dtype=parameters.dtype, revision=revision,
        attention=parameters.attention, quantization=parameters.quantization,
    )  # fmt: skip
    model = with_adapters(base, [run.at(name).adapter for name in names])
    held_out = pd.concat([read_table(run.data(name)).query("split == 'eval'") for name in names])
    encoded, scorer = encode_table(tokenizer, held_out), Scorer(model, token_budget=parameters.token_budget)
    for key, weights in wanted.items():
        with mixed(model, [weights.get(name, 0.0) for name in names]):
            found = scorer.records(held_out, encoded, checkpoint=name_of(weights))
        yield found.assign(setting=run.setting, seed=run.seed, made_of=key)


def kind_of(chain: Chain) -> str | None:
    """Which of `KINDS` a chain is; None for chains that are no way to have two objectives."""
    *before, last = chain.stages
    if any(stage.variants for stage in before):
        return None
    if not before and not last.variants:
        return {1: ALONE, 2: JOINT}.get(len(last.objectives))
    if len(before) != 1 or len(before[0].objectives + last.objectives) != 2 or len(chain.objectives) != 2:
        return None
    replayed = len(last.variants) == 1 and last.variants[0].startswith("replay")
    return REPLAYED if replayed else {(): SEQUENTIAL, ("projected",): PROJECTED}.get(last.variants)


def planes_of(runs: Sequence[RunPaths]) -> list[Plane]:
    """Every two objectives of a setting of which the study has both, with a run of each seed."""
    planes = []
    for setting in dict.fromkeys(run.setting for run in runs):
        own = [run for run in runs if run.setting == setting]
        ways = [set(chain.objectives) for chain in chains_of(own) if kind_of(chain)]
        objectives = read_json(own[0].preparation)["parameters"]["objectives"]
        for two in itertools.combinations(objectives, 2):
            if set().union(*(way for way in ways if way <= set(two))) == set(two):
                planes.append((list({run.seed: run for run in own}.values()), *two))
    return planes


def chains_of(runs: Sequence[RunPaths]) -> list[Chain]:
    """The chains of some runs and their beginnings."""
    return tree(Chain.parse(run.chain) for run in runs)


def ends(
    plane: Plane, study: Sequence[RunPaths], mixtures: pd.DataFrame, *, beta: float
) -> tuple[dict[str, str], list[pd.DataFrame]]:
    """Held-out margins of both objectives of a plane at the end of every way to have them.

    Args:
        plane: from `planes_of`.
        study: all runs; beginnings of their chains count too.
        mixtures: from `score_mixtures`.
        beta: the training's beta.

    Returns:
        Name of each way to its kind, and for either objective `prompt_id` and a column a name, indexed by
        `seed` and `pair_id`: the runs that all ways have.
    """
    runs, *objectives = plane
    ways = chains_of([run for run in study if run.setting == runs[0].setting])
    ways = [chain for chain in ways if set(chain.objectives) <= set(objectives)]
    mine = {str(chain): kind for chain in ways if (kind := kind_of(chain))}
    here = mixtures["setting"] == runs[0].setting
    mixed_here = {name_of(weights): kind for weights, kind in recipes(*objectives)}
    mixed_here = {name: mixed_here[name] for name in mixed_here if name in set(mixtures[here]["checkpoint"])}

    def of_mixtures(run: RunPaths) -> pd.DataFrame:
        own = mixtures[here & (mixtures["seed"] == run.seed)]
        return pd.concat([read_table(run.base_scores), own], ignore_index=True)

    tables = []
    for objective in objectives:
        found = {text: metrics.margins([run.at(text) for run in runs], objective, beta=beta) for text in mine}
        wide = {text: margins[text] for text, margins in found.items()}
        if mixed_here:
            mixed_too = metrics.margins(runs, objective, beta=beta, records=of_mixtures)
            wide |= {name: mixed_too[name] for name in mixed_here}
        tables.append(pd.DataFrame(wide | {"prompt_id": found[min(mine)]["prompt_id"]}).dropna())
    return mine | mixed_here, tables


def places(
    kinds: Mapping[str, str], tables: Sequence[pd.DataFrame], *, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Where each way ends in the plane of two objectives.

    Args:
        kinds, tables: from `ends`.
        resamples, rng: of the bootstrap over prompts and seeds.

    Returns:
        `name`, `kind`, mean margins `first` and `second` with bounds, `on_front`: no other way has higher
        means of both.
    """
    rows = pd.DataFrame({"name": list(kinds), "kind": list(kinds.values())})
    for side, table in zip(SIDES, tables, strict=True):
        found = metrics.estimated(table, list(kinds), resamples=resamples, rng=rng)
        rows[metrics.bounds(side)] = np.reshape([*found.values()], (-1, 3))
    means = rows[list(SIDES)].to_numpy()
    beaten = (means[None] > means[:, None]).all(axis=-1).any(axis=1)
    return rows.assign(on_front=~beaten)


def rivalries(
    kinds: Mapping[str, str], tables: Sequence[pd.DataFrame], *, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """What each other way has over each sequential chain, pair by pair and run by run.

    Args:
        kinds, tables: from `ends`.
        resamples, rng: of the bootstrap over prompts and seeds.

    Returns:
        `chain`, `rival`, `kind` (the rival's), `first` and `second` (rival minus chain) with bounds,
        `better_p` (both differences are above zero: the larger of their p-values) and `worse_p` (at least
        one is below: twice the smallest of theirs).
    """
    rows = []
    for chain, rival in itertools.product(kinds, kinds):
        if kinds[chain] != SEQUENTIAL or kinds[rival] == SEQUENTIAL:
            continue
        row, better, worse = {"chain": chain, "rival": rival, "kind": kinds[rival]}, 0.0, 0.5
        for side, table in zip(SIDES, tables, strict=True):
            gap = table.assign(**{side: table[rival] - table[chain]})
            found = metrics.estimated(gap, [side], resamples=resamples, rng=rng)
            repeated = units(len(table.index.unique("seed")), table["prompt_id"].nunique())
            p = float(p_value(*found.values(), df=repeated - 1))
            better = max(better, p if found[side] > 0 else 1.0)
            worse = min(worse, p if found[side] < 0 else 0.5)
            row |= found
        rows.append(row | {"better_p": better, "worse_p": 2 * worse})
    return pd.DataFrame(rows)


def compare(
    runs: Sequence[RunPaths], mixtures: pd.DataFrame, *, beta: float, resamples: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`places` and `rivalries` of every plane of a study.

    Returns:
        Both with `setting`, `x` and `y` (the plane's objectives, whose margins `first` and `second` are).
        Places also have `order` (which of them a chain of two stages trains first: "across" is `x`, "upward"
        is `y`, else "neither"), `sequential` (such a chain without a remedy) and `share` (of the second
        adapter on the line of mixtures; null off it).
    """
    found: tuple[list, list] = ([], [])
    for plane in planes_of(runs):
        nodes, x, y = plane
        kinds, tables = ends(plane, runs, mixtures, beta=beta)
        options = {"resamples": resamples, "rng": np.random.default_rng(0)}
        place = {"setting": nodes[0].setting, "x": x, "y": y}
        inner = {name_of(weights): weights[y] for weights, kind in recipes(x, y) if kind == LINE}
        on_line = {x: 0.0, y: 1.0} | inner
        table = places(kinds, tables, **options).assign(**place)
        table["order"] = [_order(name, kind, x) for name, kind in kinds.items()]
        table["sequential"] = table["kind"] == SEQUENTIAL
        found[0].append(table.assign(share=table["name"].map(on_line)))
        found[1].append(rivalries(kinds, tables, **options).assign(**place))
    return tuple(pd.concat(part, ignore_index=True) if part else pd.DataFrame() for part in found)


def _order(name: str, kind: str, x: str) -> str:
    if kind not in (SEQUENTIAL, REPLAYED, PROJECTED):
        return "neither"
    return "across" if Chain.parse(name).earlier == (x,) else "upward"


def standing(rivals: pd.DataFrame) -> pd.DataFrame:
    """Is a sequential chain dominated: does some other way keep clearly more of both objectives?

    Args:
        rivals: rows of `rivalries` of the whole study, with their `setting`.

    Returns:
        `setting`, `name` (of the chain); `by` (the rivals that dominate it: `better_p` <= .05 after Holm's
        correction over all rows); `standing`: "dominated", "not dominated" (every rival clearly has less of
        one objective: the largest `worse_p`, corrected over the chains) or that it cannot be decided.
    """
    if rivals.empty:
        return pd.DataFrame(columns=["setting", "name", "by", "standing"])
    sure = holm(rivals["better_p"].to_numpy()) <= 0.05
    chains = rivals.assign(by=rivals["rival"].where(sure)).groupby(["setting", "chain"], sort=False)
    table = chains.agg(by=("by", lambda names: ", ".join(names.dropna())), p=("worse_p", "max"))
    free = holm(table.pop("p").to_numpy()) <= 0.05
    words = np.where(table["by"] != "", DOMINATED, np.where(free, UNDOMINATED, OPEN))
    return table.assign(standing=words).rename_axis(["setting", "name"]).reset_index()
