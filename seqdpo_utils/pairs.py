"""One table of preference pairs for all objectives of a setting, and what variants do to a stage's pairs.

Ids are hashes of texts and splits are disjoint by prompt, so that neither depends on the order of the rows.
"""

import hashlib
import itertools
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from seqdpo_utils.encoding import EncodedPair, encode_pair, encode_prompt
from seqdpo_utils.errors import StudyError
from seqdpo_utils.layouts import LAYOUTS, load_rows
from seqdpo_utils.params import Parameters

COLUMNS = ["pair_id", "prompt_id", "objective", "split", "prompt", "chosen", "rejected"]
COLUMNS += ["chosen_rating", "rejected_rating", "removed_turns"]
SPLITS = ("eval", "train", "probe", "fresh")
"""Disjoint by prompt, in the order in which they are filled: held-out pairs for every margin; the pairs that
stages train on; held-out pairs for gradients alone; pairs for a stage that is to meet new prompts."""
HELD_OUT = ("eval", "probe")
NEAR_IDENTICAL = 0.8
"""Prompts whose word 3-gram sets overlap at least so much (Jaccard) count as near-identical."""
_BLOCK = 512


def normalise(text: str) -> str:
    """Text as prompts are compared: Unicode NFKC, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def pair_hash(prompt: str, chosen: str, rejected: str) -> str:
    """Id of a pair: hash of its prompt (as JSON) and its two texts."""
    return _hash(prompt, chosen, rejected)


def prompt_hash(prompt: list[dict[str, str]]) -> str:
    """Id of a prompt: equal for prompts that are equal after normalisation."""
    return _hash(*(f"{turn['role']}:{normalise(turn['content'])}" for turn in prompt))


def pairs_of(rows: list[dict[str, Any]], *, layout: str, objective: str) -> tuple[pd.DataFrame, Counter]:
    """Pairs of one objective as a table without splits, and the rows dropped by reason.

    A pair that occurs twice is kept once and counted.

    Raises:
        StudyError: when a column is missing or no pair is left.
    """
    pairs, counts = LAYOUTS[layout].convert(rows, objective)
    if not pairs:
        what = f"{len(rows)} rows of layout {layout}; dropped: {dict(counts)}"
        raise StudyError(f"no usable pair for objective {objective!r} in {what}.")
    table = pd.DataFrame(pairs).assign(objective=objective, removed_turns=0)
    table["prompt_id"] = list(map(prompt_hash, table["prompt"]))
    table["prompt"] = [json.dumps(prompt, ensure_ascii=False) for prompt in table["prompt"]]
    table, counts["the same pair again"] = _identified(table)
    return table.reindex(columns=[name for name in COLUMNS if name != "split"]), +counts


def _identified(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Give every pair the hash of its texts, keep the first of equal ones, count the others."""
    texts = zip(table["prompt"], table["chosen"], table["rejected"], strict=True)
    kept = table.assign(pair_id=list(itertools.starmap(pair_hash, texts))).drop_duplicates("pair_id")
    return kept.reset_index(drop=True), len(table) - len(kept)


def encode_table(tokenizer: Any, table: pd.DataFrame) -> list[EncodedPair]:
    """Token ids of every pair, in the order of the table (`prompt` as JSON, `chosen`, `rejected`)."""
    texts = zip(table["prompt"], table["chosen"], table["rejected"], strict=True)
    return [encode_pair(tokenizer, json.loads(prompt), chosen=c, rejected=r) for prompt, c, r in texts]


def fit(table: pd.DataFrame, tokenizer: Any, *, max_length: int) -> tuple[pd.DataFrame, Counter]:
    """Make every pair fit into `max_length` tokens without cutting inside a text.

    Where the prompt and the longer completion are too long, the oldest turns of the prompt go, by user and
    assistant together, until they fit; a leading system message and the last user turn stay. What still does
    not fit is dropped. `prompt_id` remains that of the whole prompt, so that splits do not depend on
    `max_length`; `pair_id` and `prompt` are those of what is left.

    Returns:
        The pairs that fit, with the number of `removed_turns`, and counts by what happened ("kept: ..." or
        "dropped: ...").
    """
    kept, counts = [], Counter()
    for row, pair in zip(table.to_dict("records"), encode_table(tokenizer, table), strict=True):
        room = max_length - max(len(pair.chosen), len(pair.rejected))
        turns = shorter = json.loads(row["prompt"])
        if len(pair.prompt) > room:
            later = _later_starts(turns)
            shorter = next(
                (prompt for prompt in later if len(encode_prompt(tokenizer, prompt)) <= room), None
            )
        if room <= 0:
            counts["dropped: completion longer than max_length"] += 1
        elif shorter is None:
            counts["dropped: last turn and completion longer than max_length"] += 1
        else:
            removed, prompt = len(turns) - len(shorter), json.dumps(shorter, ensure_ascii=False)
            counts["kept: prompt shortened by its oldest turns"] += removed > 0
            kept.append(row | {"prompt": prompt, "removed_turns": removed})
    fitting, again = _identified(pd.DataFrame(kept, columns=table.columns))
    counts["dropped: the same pair again, once shortened"] += again
    return fitting, +counts


def _later_starts(turns: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The prompt begun at its second user turn, its third, ...; a leading system message stays."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    return [[*system, *turns[i:]] for i in starts[1:]]


def assign_splits(tables: dict[str, pd.DataFrame], *, sizes: dict[str, int]) -> dict[str, pd.DataFrame]:
    """Divide prompts, not pairs, into splits, the same way for all objectives of a setting.

    Prompts are taken in the order of their hash, so that the split depends on the texts and on nothing else.
    A prompt goes to the first of `SPLITS` in which one of its objectives still lacks pairs; pairs beyond what
    an objective needs are left out. So where rows are few, "fresh" falls short first.

    Args:
        tables: objective to its pairs.
        sizes: pairs wanted of each objective in each of `SPLITS` (`split_sizes`).

    Raises:
        StudyError: when an objective gets no pair for a split that must have some, with the numbers.
    """
    wanted = {split: sizes[split] for split in SPLITS}
    taken: dict[tuple[str, str], list[int]] = {(name, split): [] for name in tables for split in wanted}
    rows_of = {name: table.groupby("prompt_id").indices for name, table in tables.items()}
    for prompt_id in sorted(set().union(*rows_of.values()), key=lambda prompt_id: _hash("split", prompt_id)):
        rows = {name: found[prompt_id] for name, found in rows_of.items() if prompt_id in found}
        lacking = (s for s in wanted if any(len(taken[name, s]) < wanted[s] for name in rows))
        if split := next(lacking, None):
            for name, numbers in rows.items():
                taken[name, split].extend(numbers[: wanted[split] - len(taken[name, split])])
    for (name, split), numbers in taken.items():
        if not numbers and wanted[split] and split != "fresh":
            asked = ", ".join(f"{part}_pairs = {count}" for part, count in wanted.items())
            what = f"the {split} split of {name!r} is empty: {len(tables[name])} usable pairs for {asked}"
            raise StudyError(f"{what}. Give a larger source or ask for fewer pairs.")
    found = {}
    for name, table in tables.items():
        parts = [table.iloc[taken[name, split]].assign(split=split) for split in SPLITS]
        found[name] = pd.concat(parts, ignore_index=True)[COLUMNS]
    return found


def split_sizes(parameters: Parameters) -> dict[str, int]:
    """Pairs of an objective wanted in each split."""
    return {split: getattr(parameters, f"{split}_pairs") for split in SPLITS}


def prepare(
    parameters: Parameters, tokenizer: Any, *, root: Path
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """All pairs of a setting, split, and what happened to every row.

    Every row read ends in exactly one line that begins with "joined", "dropped", "pairs for" or "left over";
    the other lines say more about some of them.

    Args:
        parameters: `source`, `subset`, `revision`, `layout`, `objectives`, `max_length` and the sizes of
            `split_sizes` are read.
        tokenizer: the base model's.
        root: the project's folder, which a relative `source` starts from.

    Returns:
        Objective to its table (`COLUMNS`), and a table `objective`, `what`, `rows` of counts.
    """
    tables, counts = {}, []
    layout, place = parameters.layout, {"subset": parameters.subset, "revision": parameters.revision}
    for name in parameters.objectives:
        rows = load_rows(root, parameters.source, layout=layout, objective=name, **place)
        table, dropped = pairs_of(rows, layout=layout, objective=name)
        tables[name], fitted = fit(table, tokenizer, max_length=parameters.max_length)
        counts += [(name, "rows read", len(rows))]
        if joined := len(rows) - len(table) - dropped.total():
            counts += [(name, "joined: the second answer of a pair", joined)]
        counts += [(name, f"dropped: {reason}", n) for reason, n in sorted(dropped.items())]
        counts += [(name, what, n) for what, n in sorted(fitted.items())]
    usable = {name: len(table) for name, table in tables.items()}
    tables = assign_splits(tables, sizes=split_sizes(parameters))
    similar = near_identical(tables)["eval_prompt_id"]
    for name, table in tables.items():
        held_out, in_split = table[table["split"].isin(HELD_OUT)], table["split"].value_counts()
        alike = held_out.loc[held_out["prompt_id"].isin(similar), "prompt_id"].nunique()
        counts += [(name, f"pairs for {split}", int(in_split.get(split, 0))) for split in SPLITS]
        counts += [(name, "left over: not needed for the sizes asked", usable[name] - len(table))]
        counts += [(name, "held-out prompts near-identical to a training prompt", alike)]
    return tables, pd.DataFrame(counts, columns=["objective", "what", "rows"])


def leaked_prompts(tables: dict[str, pd.DataFrame]) -> set[str]:
    """Prompts (by id, so after normalisation) that stand in two splits of any objectives; must be empty."""
    splits = pd.concat(tables.values()).groupby("prompt_id")["split"].nunique()
    return set(splits.index[splits > 1])


def near_identical(tables: dict[str, pd.DataFrame], *, threshold: float = NEAR_IDENTICAL) -> pd.DataFrame:
    """Held-out prompts that nearly repeat a training prompt of any objective: paraphrases that a hash misses.

    Held out are the splits of `HELD_OUT`; stages train on the others.

    A prompt, all its turns normalised and joined, is the set of its sequences of three words (of all its
    words when it has fewer). Similarity is Jaccard's: sequences in common over sequences in either. Prompts
    are taken as stored, so those that became alike by shortening count too.

    Returns:
        One row for each two such prompts: `eval_prompt_id`, `train_prompt_id`, `similarity`, the most similar
        first.
    """
    pooled = pd.concat(tables.values()).drop_duplicates(["split", "prompt"])
    names, grams = pooled["prompt_id"].to_numpy(), _gram_matrix(pooled["prompt"])
    sizes = np.asarray(grams.sum(axis=1)).ravel()
    away = pooled["split"].isin(HELD_OUT)
    held_out, train = np.flatnonzero(away), np.flatnonzero(~away)
    found = []
    for start in range(0, len(held_out), _BLOCK):  # in blocks, so that the product stays small
        block = held_out[start : start + _BLOCK]
        common = (grams[block] @ grams[train].T).tocoo()
        one, other = block[common.row], train[common.col]
        similarity = common.data / (sizes[one] + sizes[other] - common.data)
        alike = similarity >= threshold
        found += zip(names[one[alike]], names[other[alike]], similarity[alike], strict=True)
    table = pd.DataFrame(found, columns=["eval_prompt_id", "train_prompt_id", "similarity"])
    return table.sort_values("similarity", ascending=False, ignore_index=True)


def _gram_matrix(prompts: Iterable[str]) -> csr_matrix:
    """One row a prompt, one column a sequence of three words, ones where it occurs."""
    vocabulary: dict[tuple[str, ...], int] = {}
    columns = []
    for prompt in prompts:
        words = normalise(" ".join(turn["content"] for turn in json.loads(prompt))).split()
        grams = {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        columns.append([vocabulary.setdefault(gram, len(vocabulary)) for gram in grams])
    pointer = np.cumsum([0, *map(len, columns)])
    flat = np.fromiter(itertools.chain.from_iterable(columns), dtype=np.int64, count=pointer[-1])
    return csr_matrix((np.ones(len(flat), dtype=np.int32), flat, pointer), (len(columns), len(vocabulary)))


def label_agreement(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How often two objectives order the same two responses alike.

    Returns:
        One row for each two objectives: `first`, `second`, `pairs` (of the objective with fewer), `shared`
            (pairs
        of responses that both label), `agree` (share of the shared ones, null when none).
    """
    winners = {
        name: {(row.prompt_id, *sorted((row.chosen, row.rejected))): row.chosen for row in table.itertuples()}
        for name, table in tables.items()
    }
    rows = []
    for first, second in itertools.combinations(winners, 2):
        shared = winners[first].keys() & winners[second].keys()
        agree = sum(winners[first][key] == winners[second][key] for key in shared)
        fewer = min(len(tables[first]), len(tables[second]))
        rows.append((first, second, fewer, len(shared), agree / len(shared) if shared else None))
    return pd.DataFrame(rows, columns=["first", "second", "pairs", "shared", "agree"])


def data_fingerprint(tables: dict[str, pd.DataFrame]) -> str:
    """Hash of every pair with its objective and split, whatever their order."""
    pooled = pd.concat(tables.values())
    return _hash(*sorted(pooled["pair_id"] + pooled["objective"] + pooled["split"]))


def turn_labels(table: pd.DataFrame, *, share: float, seed: int) -> pd.DataFrame:
    """Exchange chosen and rejected in `share` of the pairs; `seed` and the pairs decide which.

    The sets are nested: the pairs turned at 0.25 are among those turned at 0.5.

    Args:
        table: `pair_id`, `objective`, `chosen`, `rejected`, and any `chosen_*` with its `rejected_*`, which
            are exchanged with them. `pair_id` stays: it names the two texts.
        share: between 0 and 1.
        seed: of the chain.

    Returns:
        The table in its own order, numbered from 0, with a column `turned`.

    Raises:
        StudyError: when `share` is above 0, but less than one pair in these.
    """
    turned = _drawn(table, round(share * len(table)), key="turn", seed=seed)
    if share > 0 and not len(turned):
        raise StudyError(f"{len(table)} pairs are too few to turn {share:.0%} of them: take more pairs.")
    return _turned(table, np.isin(np.arange(len(table)), turned))


def shuffle_labels(table: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Decide every label by a fair coin of its own; otherwise as `turn_labels`."""
    turned = np.empty(len(table), dtype=bool)
    turned[_by_name(table)] = _chance("shuffle", seed).random(len(table)) < 0.5
    return _turned(table, turned)


def part_of(table: pd.DataFrame, *, share: float, seed: int) -> pd.DataFrame:
    """`share` of the pairs (at least one) in their order; `seed` and the pairs decide which."""
    drawn = _drawn(table, max(1, round(share * len(table))), key="part", seed=seed)
    return table.iloc[np.sort(drawn)].reset_index(drop=True)


def replay(table: pd.DataFrame, earlier: pd.DataFrame, *, share: float, seed: int) -> pd.DataFrame:
    """Exchange `share` of the pairs for as many pairs of earlier objectives; the total stays.

    Args:
        table: pairs of the stage.
        earlier: pairs of earlier objectives; those that stand in `table` too are not drawn.
        share: of the pairs of `table`; who goes and who comes is drawn without replacement, ruled by `seed`.
        seed: of the chain.

    Returns:
        The pairs of `table` that stay, then those of `earlier`, both in their order, numbered from 0.

    Raises:
        StudyError: when `share` is less than one pair, or `earlier` holds too few.
    """
    count = round(share * len(table))
    there, others = (pd.MultiIndex.from_frame(pairs[["pair_id", "objective"]]) for pairs in (table, earlier))
    earlier = earlier[~others.isin(there)]
    if not count:
        raise StudyError(f"{len(table)} pairs are too few to replay {share:.0%} of them: take more pairs.")
    if len(earlier) < count:
        raise StudyError(f"replay asks for {count} earlier pairs, there are {len(earlier)}: lower its share.")
    staying = _drawn(table, len(table) - count, key="replay: staying", seed=seed)
    coming = _drawn(earlier, count, key="replay: coming", seed=seed)
    return pd.concat([table.iloc[np.sort(staying)], earlier.iloc[np.sort(coming)]], ignore_index=True)


def _chance(key: str, seed: int) -> np.random.Generator:
    """A stream of its own for each use of chance and each seed."""
    return np.random.default_rng([seed, zlib.crc32(key.encode())])


def _by_name(table: pd.DataFrame) -> np.ndarray:
    """Row numbers, sorted by the names of the pairs: a draw must not depend on the order of the rows."""
    return table.reset_index(drop=True).sort_values(["pair_id", "objective"]).index.to_numpy()


def _drawn(table: pd.DataFrame, count: int, *, key: str, seed: int) -> np.ndarray:
    """Row numbers of `count` pairs: the beginning of one permutation, so small draws lie in larger ones."""
    return _chance(key, seed).permutation(_by_name(table))[:count]


def _turned(table: pd.DataFrame, turned: np.ndarray) -> pd.DataFrame:
    table = table.reset_index(drop=True).assign(turned=turned)
    for chosen in [name for name in table if name.split("_")[0] == "chosen"]:
        rejected = chosen.replace("chosen", "rejected", 1)
        one, other = table[chosen], table[rejected]
        table[chosen], table[rejected] = one.where(~turned, other), other.where(~turned, one)
    return table
