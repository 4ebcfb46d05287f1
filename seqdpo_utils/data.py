"""One table of preference pairs for all objectives of a setting: stable ids, splits disjoint by prompt, counts."""

import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from seqdpo_utils.encoding import EncodedPair, encode_pair, encode_prompt
from seqdpo_utils.paths import StudyError
from seqdpo_utils.sources import CONVERTERS, load_rows

COLUMNS = ["pair_id", "prompt_id", "objective", "split", "prompt", "chosen", "rejected", "chosen_rating", "rejected_rating", "removed_turns"]
NEAR_IDENTICAL = 0.8
"""Prompts whose word 3-gram sets overlap at least so much (Jaccard) count as near-identical."""
_BLOCK = 512


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
    table, again = _identified(table.assign(objective=objective, removed_turns=0))
    counts["the same pair again"] += again
    return table.reindex(columns=[name for name in COLUMNS if name != "split"]), +counts


def _identified(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Give every pair the hash of its texts, keep the first of equal ones, count the others."""
    named = table.assign(pair_id=[_hash(*texts) for texts in zip(table["prompt"], table["chosen"], table["rejected"], strict=True)])
    kept = named.drop_duplicates("pair_id").reset_index(drop=True)
    return kept, len(named) - len(kept)


def encode_table(tokenizer: Any, table: pd.DataFrame) -> list[EncodedPair]:
    """Token ids of every pair, in the order of the table (`prompt` as JSON, `chosen`, `rejected`)."""
    texts = zip(table["prompt"], table["chosen"], table["rejected"], strict=True)
    return [encode_pair(tokenizer, json.loads(prompt), chosen=chosen, rejected=rejected) for prompt, chosen, rejected in texts]


def fit(table: pd.DataFrame, tokenizer: Any, *, max_length: int) -> tuple[pd.DataFrame, Counter]:
    """Make every pair fit into `max_length` tokens without cutting inside a text.

    Where the prompt and the longer completion are too long, the oldest turns of the prompt go, by user and assistant together, until they fit; a leading
    system message and the last user turn stay. What still does not fit is dropped. `prompt_id` remains that of the whole prompt, so that splits
    do not depend on `max_length`; `pair_id` and `prompt` are those of what is left.

    Returns:
        The pairs that fit, with the number of `removed_turns`, and counts by what happened ("kept: ..." or "dropped: ...").
    """
    kept, counts = [], Counter()
    for row, pair in zip(table.to_dict("records"), encode_table(tokenizer, table), strict=True):
        room = max_length - max(len(pair.chosen), len(pair.rejected))
        turns = json.loads(row["prompt"])
        shorter = turns if len(pair.prompt) <= room else next((p for p in _later_starts(turns) if len(encode_prompt(tokenizer, p)) <= room), None)
        if room <= 0:
            counts["dropped: completion longer than max_length"] += 1
        elif shorter is None:
            counts["dropped: last turn and completion longer than max_length"] += 1
        else:
            counts["kept: prompt shortened by its oldest turns"] += shorter is not turns
            kept.append(row | {"prompt": json.dumps(shorter, ensure_ascii=False), "removed_turns": len(turns) - len(shorter)})
    fitting, again = _identified(pd.DataFrame(kept, columns=table.columns))
    counts["dropped: the same pair again, once shortened"] += again
    return fitting, +counts


def _later_starts(turns: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The prompt begun at its second user turn, its third, ...; a leading system message stays."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    return [[*system, *turns[i:]] for i in starts[1:]]


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


def prepare(parameters: dict[str, Any], tokenizer: Any, *, root: Path) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """All pairs of a setting, split, and what happened to every row.

    Args:
        parameters: flat parameters with `source`, `subset`, `revision`, `layout`, `objectives`, `max_length`, `train_pairs`, `eval_pairs`.
        tokenizer: the base model's.
        root: the project's folder, which a relative `source` starts from.

    Returns:
        Objective to its table (`COLUMNS`), and a table `objective`, `what`, `rows` of counts.
    """
    tables, ledger = {}, []
    for objective in parameters["objectives"]:
        place = {"subset": parameters["subset"], "revision": parameters["revision"]}
        rows = load_rows(root, parameters["source"], layout=parameters["layout"], objective=objective, **place)
        table, dropped = pairs_of(rows, layout=parameters["layout"], objective=objective)
        tables[objective], fitted = fit(table, tokenizer, max_length=parameters["max_length"])
        happened = {"rows read": len(rows)} | {f"dropped: {reason}": n for reason, n in sorted(dropped.items())} | dict(sorted(fitted.items()))
        ledger += [{"objective": objective, "what": what, "rows": n} for what, n in happened.items()]
    tables = assign_splits(tables, train_pairs=parameters["train_pairs"], eval_pairs=parameters["eval_pairs"])
    similar = set(near_identical(tables)["eval_prompt_id"])
    for objective, table in tables.items():
        ledger += [{"objective": objective, "what": f"pairs for {split}", "rows": int((table["split"] == split).sum())} for split in ("train", "eval")]
        alike = table.loc[(table["split"] == "eval") & table["prompt_id"].isin(similar), "prompt_id"].nunique()
        ledger += [{"objective": objective, "what": "held-out prompts near-identical to a training prompt", "rows": alike}]
    return tables, pd.DataFrame(ledger)


def leaked_prompts(tables: dict[str, pd.DataFrame]) -> set[str]:
    """Prompts (by id, so after normalisation) that stand in both splits of any objectives; must be empty."""
    pooled = pd.concat(tables.values())
    return set(pooled.loc[pooled["split"] == "train", "prompt_id"]) & set(pooled.loc[pooled["split"] == "eval", "prompt_id"])


def near_identical(tables: dict[str, pd.DataFrame], *, threshold: float = NEAR_IDENTICAL) -> pd.DataFrame:
    """Held-out prompts that nearly repeat a training prompt of any objective: paraphrases that a hash of the text does not see.

    A prompt, all its turns normalised and joined, is the set of its sequences of three words (of all its words when it has fewer). Similarity
    is Jaccard's: sequences in common over sequences in either. Prompts are taken as stored, so those that became alike by shortening count too.

    Returns:
        One row for each two such prompts: `eval_prompt_id`, `train_prompt_id`, `similarity`, the most similar first.
    """
    pooled = pd.concat(tables.values()).drop_duplicates(["split", "prompt"])
    parts = {split: pooled[pooled["split"] == split] for split in ("eval", "train")}
    vocabulary: dict[tuple[str, ...], int] = {}
    grams = {split: _gram_matrix(part["prompt"], vocabulary) for split, part in parts.items()}
    for matrix in grams.values():
        matrix.resize(matrix.shape[0], len(vocabulary))
    sizes = {split: np.asarray(matrix.sum(axis=1)).ravel() for split, matrix in grams.items()}
    found = []
    for start in range(0, grams["eval"].shape[0], _BLOCK):  # in blocks, so that the product stays small
        common = (grams["eval"][start : start + _BLOCK] @ grams["train"].T).tocoo()
        similarity = common.data / (sizes["eval"][start + common.row] + sizes["train"][common.col] - common.data)
        alike = similarity >= threshold
        found += zip(start + common.row[alike], common.col[alike], similarity[alike], strict=True)
    names = {split: part["prompt_id"].to_numpy() for split, part in parts.items()}
    rows = [{"eval_prompt_id": names["eval"][e], "train_prompt_id": names["train"][t], "similarity": s} for e, t, s in found]
    table = pd.DataFrame(rows, columns=["eval_prompt_id", "train_prompt_id", "similarity"])
    return table.sort_values("similarity", ascending=False, ignore_index=True)


def _gram_matrix(prompts: Iterable[str], vocabulary: dict[tuple[str, ...], int]) -> csr_matrix:
    """One row a prompt, one column a sequence of words, ones where it occurs; `vocabulary` grows."""
    columns = []
    for prompt in prompts:
        words = normalise(" ".join(turn["content"] for turn in json.loads(prompt))).split()
        grams = {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        columns.append([vocabulary.setdefault(gram, len(vocabulary)) for gram in grams])
    pointer = np.cumsum([0, *map(len, columns)])
    flat = np.fromiter(itertools.chain.from_iterable(columns), dtype=np.int64, count=pointer[-1])
    return csr_matrix((np.ones(len(flat), dtype=np.int32), flat, pointer), shape=(len(columns), len(vocabulary)))


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
