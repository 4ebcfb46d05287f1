"""What one stage trains on and looks back at: its pairs or lists, with the base model's sums as reference."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from seqdpo_utils.chains import THEN, Chain
from seqdpo_utils.encoding import EncodedPair
from seqdpo_utils.errors import StudyError
from seqdpo_utils.lists import as_pairs, list_rows, usable
from seqdpo_utils.listwise import Aspects
from seqdpo_utils.models import fingerprints
from seqdpo_utils.pairs import encode_table, part_of, replay, shuffle_labels, turn_labels
from seqdpo_utils.params import Parameters, varied
from seqdpo_utils.paths import RunPaths, check_trained, read_json, read_table
from seqdpo_utils.records import records_of

SUMS = ["chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]


@dataclass(frozen=True)
class StageData:
    """What a stage trains on and looks back at.

    Attributes:
        rows: the stage's pairs (or lists) as token ids, with the base model's sums as reference.
        reference: these sums as a table, in the same order; lists cut into pairs.
        earlier: (earlier objective, split) to its pairs of "train" and, held out, of "probe", with their own
            labels and the base model's sums.
        fingerprints: of data, base model, tokenizer and dtype.
        aspects: what a listwise stage weighs; None for pairs.
    """

    rows: Dataset
    reference: pd.DataFrame
    earlier: dict[tuple[str, str], Dataset] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    aspects: Aspects | None = None


def prepare_stage(root: Path, run: RunPaths, tokenizer: Any, *, parameters: Parameters) -> StageData:
    """The pairs of the last stage of a chain, and those of its earlier objectives, from the run's files.

    Raises:
        StudyError: when the base sums belong to other data, weights, tokens or dtype, an earlier stage was
            trained with other parameters, or a variant leaves nothing to do.
    """
    chain = Chain.parse(run.chain)
    prints = check_fingerprints(root, run, tokenizer, parameters=parameters)
    if chain.parent:
        changes = varied(root, chain.last)
        check_trained(run.at(chain.parent), dict(parameters), varied=changes)
    earlier = {}
    for objective, split in itertools.product(chain.earlier, ("train", "probe")):
        if len(table := with_sums(run, objective, splits=[split])):
            rows = training_rows(encode_table(tokenizer, table), table)
            named = {name: table[name].tolist() for name in ("pair_id", "prompt_id")}
            earlier[objective, split] = Dataset.from_dict(rows.to_dict() | named)
    if parameters.lambdas:
        rows, sums = _lists(run, tokenizer)
        return StageData(rows, sums, earlier, prints, _aspects(run, tokenizer, parameters))
    pairs = training_pairs(run, dict(parameters))
    return StageData(training_rows(encode_table(tokenizer, pairs), pairs), pairs, earlier, prints)


def _lists(run: RunPaths, tokenizer: Any) -> tuple[Dataset, pd.DataFrame]:
    """Rows of a listwise stage, and the base model's sums of its lists, cut into pairs.

    Raises:
        StudyError: when the setting's data have no rated lists, or none that rates two answers.
    """
    names = Chain.parse(run.chain).last.objectives
    if not run.lists.is_file():
        raise StudyError(f"chain '{run.chain}': {run.lists} is missing: run 01_data_preparation again.")
    seen = set().union(*(with_sums(run, name)["prompt_id"] for name in names))
    lists = read_table(run.lists)
    lists = usable(lists[lists["prompt_id"].isin(seen)], names)
    if lists.empty:
        raise StudyError(f"chain '{run.chain}': on no training prompt are two answers rated for {names}.")
    sums = records_of(read_table(run.list_scores), as_pairs(lists))
    return list_rows(tokenizer, lists, sums, names), sums


def _aspects(run: RunPaths, tokenizer: Any, parameters: Parameters) -> Aspects:
    """What a listwise stage weighs, with the held-out pairs that the learned schedule looks at."""
    names, probe = Chain.parse(run.chain).last.objectives, []
    for name in names if parameters.lambdas == "learned" else ():
        table = with_sums(run, name, splits=["probe"]).head(parameters.schedule_pairs)
        if len(table) < 2:
            what = f"{len(table)} held-out pairs of {name} for the learned schedule"
            raise StudyError(f"chain '{run.chain}': {what}: raise probe_pairs.")
        rows = training_rows(encode_table(tokenizer, table), table)
        probe += [(name, row | {"prompt": text}) for row, text in zip(rows, table["prompt"], strict=True)]
    weights = tuple(parameters.lambda_weights or [1 / len(names)] * len(names))
    options = {"temperature": parameters.rating_temperature, "in_prompt": parameters.lambda_in_prompt}
    return Aspects(names, parameters.lambdas, weights, probe=tuple(probe), **options)


def check_fingerprints(
    root: Path, run: RunPaths, tokenizer: Any, *, parameters: Parameters
) -> dict[str, str]:
    """Refuse base sums that were computed for other data, weights, tokens or dtype; return the fingerprints.

    Raises:
        StudyError: naming what differs.
    """
    prepared = read_json(run.preparation)
    tables = {objective: read_table(run.data(objective)) for objective in prepared["counts"]}
    now, then = fingerprints(root, tables, tokenizer, parameters=parameters), prepared["fingerprints"]
    for name in now:
        if then.get(name) != now[name]:
            was = f"{name} was {then.get(name)}, now {now[name]}"
            raise StudyError(f"{run.base_scores} is stale: {was}. Run 01_data_preparation again.")
    return now


def with_sums(run: RunPaths, objective: str, *, splits: Collection[str] = ("train",)) -> pd.DataFrame:
    """Pairs of an objective with the base model's sums and token counts beside their texts."""
    pairs = read_table(run.data(objective)).query("split in @splits").reset_index(drop=True)
    return pairs.join(records_of(read_table(run.base_scores), pairs)[SUMS])


def stage_seed(chain: str, seed: int) -> int:
    """Seed of the draws of a chain's last stage.

    Every stage has its own: with one for all, stages that share prompts would meet them in one order.
    """
    return 1000 * seed + chain.count(THEN) + 1


def training_pairs(run: RunPaths, shaping: Mapping[str, Any]) -> pd.DataFrame:
    """The pairs that the last stage of a chain trains on, as it sees them, with the base model's sums.

    The pairs of its objectives are pooled, a share of them is taken, labels are turned, and pairs of earlier
    stages, as those stages saw them, take the place of some. A stage with `prompts_across_stages` "disjoint"
    takes as many pairs of each objective, but from prompts that no earlier stage trained on.

    Args:
        run: the chain.
        shaping: `seed`, `train_share`, `flipped`, `shuffled_labels`, and for a later stage `replay` and
            `prompts_across_stages`.

    Raises:
        StudyError: when a share is so small that it changes nothing, or too few new prompts are left.
    """
    seed, stage = stage_seed(run.chain, shaping["seed"]), Chain.parse(run.chain).last
    if shaping.get("prompts_across_stages") == "disjoint" and run.lineage[:-1]:
        pairs = pd.concat([_unseen(run, objective) for objective in stage.objectives], ignore_index=True)
    else:
        pairs = pd.concat([with_sums(run, objective) for objective in stage.objectives], ignore_index=True)
    if shaping["train_share"] < 1:
        pairs = part_of(pairs, share=shaping["train_share"], seed=seed)
    if shaping["shuffled_labels"]:
        pairs = shuffle_labels(pairs, seed=seed)
    elif shaping["flipped"]:
        pairs = turn_labels(pairs, share=shaping["flipped"], seed=seed)
    if not shaping.get("replay"):  # a first stage has nothing to replay, and its notebook does not name it
        return pairs
    earlier = _trained_before(run).drop_duplicates(["objective", "pair_id"])
    return replay(pairs, earlier, share=shaping["replay"], seed=seed)


def _trained_before(run: RunPaths) -> pd.DataFrame:
    """The pairs of all stages before the last, as they saw them."""
    before = [training_pairs(node, read_json(node.manifest)["parameters"]) for node in run.lineage[:-1]]
    return pd.concat(before, ignore_index=True)


def _unseen(run: RunPaths, objective: str) -> pd.DataFrame:
    """As many pairs of an objective as its training split has, on prompts that no earlier stage saw."""
    pairs, seen = with_sums(run, objective, splits=["train", "fresh"]), _trained_before(run)["prompt_id"]
    wanted, new = int((pairs["split"] == "train").sum()), pairs[~pairs["prompt_id"].isin(seen)]
    if len(new) < wanted:
        raise StudyError(
            f"chain '{run.chain}': {len(new)} pairs of {objective} have prompts that no earlier stage saw, "
            f"{wanted} are needed: raise fresh_pairs or give a larger source."
        )
    return new.head(wanted).reset_index(drop=True)


def training_rows(encoded: Sequence[EncodedPair], reference: pd.DataFrame) -> Dataset:
    """The data set of a stage: token ids, and sums of the reference.

    Args:
        encoded: pairs in the order of `reference`.
        reference: `chosen_logp`, `rejected_logp`, `chosen_tokens`, `rejected_tokens` of the same pairs.

    Raises:
        StudyError: when there is no pair, or pairs and sums are not equally many, or token counts differ.
    """
    if not encoded:
        raise StudyError("the training split is empty: lower eval_pairs or give a larger source.")
    counts = list(zip(reference["chosen_tokens"], reference["rejected_tokens"], strict=True))
    if counts != [(len(pair.chosen), len(pair.rejected)) for pair in encoded]:
        raise StudyError(
            "the cached base scores belong to other tokens than these pairs: "
            "delete scores/base.parquet and run again."
        )
    columns = {
        f"{part}_ids": [getattr(pair, part) for pair in encoded] for part in ("prompt", "chosen", "rejected")
    }
    columns |= {f"ref_{side}_logps": reference[f"{side}_logp"].tolist() for side in ("chosen", "rejected")}
    return Dataset.from_dict(columns)
