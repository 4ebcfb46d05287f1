"""One table of preference pairs for all objectives of a setting: stable ids, splits disjoint by prompt, counts."""

import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from seqdpo_utils.encoding import EncodedPair, encode_pair
from seqdpo_utils.paths import StudyError
from seqdpo_utils.sources import CONVERTERS, load_rows

COLUMNS = ["pair_id", "prompt_id", "objective", "split", "prompt", "chosen", "rejected", "chosen_rating", "rejected_rating"]


def normalise(text: str) -> str:
    """Text as prompts are compared: Unicode NFKC, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def pairs_of(rows: list[dict[str, Any]], *, layout: str, objective: str) -> tuple[pd.DataFrame, Counter]:
    """Pairs of one objective as a table without splits, and the rows dropped by reason.

    A pair that occurs twice is kept once and counted.

    Raises:
        StudyError: when a column is missing or no pair is left.
    """
    pairs, counts = CONVERTERS[layout](rows, objective)
    if not pairs:
        raise StudyError(f"no usable pair for objective {objective!r} in {len(rows)} rows of layout {layout}; dropped: {dict(counts)}.")
    table = pd.DataFrame(pairs)
    table["prompt_id"] = [_hash(*(f"{turn['role']}:{normalise(turn['content'])}" for turn in prompt)) for prompt in table["prompt"]]
    table["prompt"] = [json.dumps(prompt, ensure_ascii=False) for prompt in table["prompt"]]
    table["pair_id"] = [_hash(*texts) for texts in zip(table["prompt"], table["chosen"], table["rejected"], strict=True)]
    counts["the same pair again"] += int(table["pair_id"].duplicated().sum())
    table = table.drop_duplicates("pair_id").assign(objective=objective)
    return table.reindex(columns=[name for name in COLUMNS if name != "split"]), +counts


def encode_table(tokenizer: Any, table: pd.DataFrame) -> list[EncodedPair]:
    """Token ids of every pair, in the order of the table (`prompt` as JSON, `chosen`, `rejected`)."""
    texts = zip(table["prompt"], table["chosen"], table["rejected"], strict=True)
    return [encode_pair(tokenizer, json.loads(prompt), chosen=chosen, rejected=rejected) for prompt, chosen, rejected in texts]


def drop_too_long(table: pd.DataFrame, encoded: Sequence[EncodedPair], *, max_length: int) -> tuple[pd.DataFrame, int]:
    """Drop pairs whose prompt and longer completion do not fit in `max_length` tokens; nothing is ever cut.

    Returns:
        The pairs that fit and the number of those that do not.
    """
    fits = [pair.longest <= max_length for pair in encoded]
    return table[fits].reset_index(drop=True), len(fits) - sum(fits)


def assign_splits(tables: dict[str, pd.DataFrame], *, train_pairs: int, eval_pairs: int) -> dict[str, pd.DataFrame]:
    """Divide prompts, not pairs, into "train" and "eval", the same way for all objectives of a setting.

    Prompts are taken in the order of their hash, so that the split depends on the texts and on nothing else. A prompt goes to
    the evaluation split while one of its objectives still lacks evaluation pairs, then to training; pairs beyond what an
    objective needs are left out.

    Raises:
        StudyError: when an objective gets an empty split, with the numbers.
    """
    by_prompt: dict[str, dict[str, list[int]]] = {}
    for objective, table in tables.items():
        for row, prompt_id in enumerate(table["prompt_id"]):
            by_prompt.setdefault(prompt_id, {}).setdefault(objective, []).append(row)
    wanted = {"eval": eval_pairs, "train": train_pairs}
    taken: dict[tuple[str, str], list[int]] = {(o, s): [] for o in tables for s in wanted}
    for prompt_id in sorted(by_prompt, key=lambda name: _hash("split", name)):
        rows = by_prompt[prompt_id]
        lacking = [split for split in wanted if any(len(taken[o, split]) < wanted[split] for o in rows)]
        for objective, numbers in rows.items() if lacking else ():
            room = wanted[lacking[0]] - len(taken[objective, lacking[0]])
            taken[objective, lacking[0]].extend(numbers[:room])
    empty = [(o, s) for (o, s), numbers in taken.items() if not numbers]
    if empty:
        (objective, split) = empty[0]
        raise StudyError(
            f"the {split} split of {objective!r} is empty: {len(tables[objective])} usable pairs for train_pairs = {train_pairs} "
            f"and eval_pairs = {eval_pairs}. Give a larger source or ask for fewer pairs."
        )
    return {
        objective: pd.concat([table.iloc[taken[objective, split]].assign(split=split) for split in ("train", "eval")], ignore_index=True)[COLUMNS]
        for objective, table in tables.items()
    }


def prepare(parameters: dict[str, Any], tokenizer: Any) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """All pairs of a setting, split, and what happened to every row.

    Args:
        parameters: flat parameters with `source`, `revision`, `layout`, `objectives`, `max_length`, `train_pairs`, `eval_pairs`.
        tokenizer: the base model's.

    Returns:
        Objective to its table (`COLUMNS`), and a table `objective`, `what`, `rows` of counts.
    """
    tables, ledger = {}, []
    for objective in parameters["objectives"]:
        rows = load_rows(parameters["source"], layout=parameters["layout"], objective=objective, revision=parameters["revision"])
        table, counts = pairs_of(rows, layout=parameters["layout"], objective=objective)
        tables[objective], too_long = drop_too_long(table, encode_table(tokenizer, table), max_length=parameters["max_length"])
        counts["longer than max_length"] = too_long
        ledger += [{"objective": objective, "what": "rows read", "rows": len(rows)}]
        ledger += [{"objective": objective, "what": f"dropped: {reason}", "rows": n} for reason, n in sorted(counts.items())]
    tables = assign_splits(tables, train_pairs=parameters["train_pairs"], eval_pairs=parameters["eval_pairs"])
    for objective, table in tables.items():
        ledger += [{"objective": objective, "what": f"pairs for {split}", "rows": int((table["split"] == split).sum())} for split in ("train", "eval")]
    return tables, pd.DataFrame(ledger)


def leaked_prompts(tables: dict[str, pd.DataFrame]) -> set[str]:
    """Prompts (by id, so after normalisation) that stand in both splits of any objectives; must be empty."""
    pooled = pd.concat(tables.values())
    return set(pooled.loc[pooled["split"] == "train", "prompt_id"]) & set(pooled.loc[pooled["split"] == "eval", "prompt_id"])


def label_agreement(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How often two objectives order the same two responses alike.

    Returns:
        One row for each two objectives: `first`, `second`, `pairs` (of the objective with fewer), `shared` (pairs of responses that both
        label), `agree` (share of the shared ones, null when none).
    """
    ordered = {
        objective: {(row.prompt_id, *sorted((row.chosen, row.rejected))): row.chosen for row in table.itertuples()} for objective, table in tables.items()
    }
    rows = []
    for first, second in itertools.combinations(ordered, 2):
        shared = ordered[first].keys() & ordered[second].keys()
        agree = sum(ordered[first][key] == ordered[second][key] for key in shared)
        fewer = min(len(tables[first]), len(tables[second]))
        rows.append({"first": first, "second": second, "pairs": fewer, "shared": len(shared), "agree": agree / len(shared) if shared else None})
    return pd.DataFrame(rows)


def data_fingerprint(tables: dict[str, pd.DataFrame]) -> str:
    """Hash of every pair with its objective and split, whatever their order."""
    pooled = pd.concat(tables.values())
    return _hash(*sorted(pooled["pair_id"] + pooled["objective"] + pooled["split"]))
