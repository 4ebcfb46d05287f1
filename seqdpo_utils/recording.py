"""Per-pair records, the study's primary result: scored by chunks, written as they come, the base model's kept for good."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import torch
from filelock import FileLock

from seqdpo_utils.data import encode_table
from seqdpo_utils.paths import REPORT_KEY, StudyError, read_report, write_table, write_whole
from seqdpo_utils.scoring import PromptRow, bare_model, distrust, prompt_rows, rounding, score_pairs, score_rows

CHUNK_PAIRS = 4096
"""Pairs that are encoded, scored and written at one time."""
CHECKED_PAIRS = 2
"""Cached pairs that are scored again before a cache is believed."""
NOISE_ROWS = 8
"""Prompts that are also scored in float32 where the model computes in bfloat16."""
RECORDS = pa.schema(
    [
        ("pair_id", pa.string()), ("prompt_id", pa.string()), ("objective", pa.string()), ("split", pa.string()), ("checkpoint", pa.string()),
        ("chosen_logp", pa.float64()), ("rejected_logp", pa.float64()), ("chosen_tokens", pa.int64()), ("rejected_tokens", pa.int64()),
    ]
)  # fmt: skip
"""Columns of the per-pair records: sums over completion tokens in nats, and how many tokens they cover."""
SHARED, PADDED = "one row a prompt", "one padded row a completion"
_CACHED = ["pair_id", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
_TEXTS = ["pair_id", "prompt_id", "objective", "split", "prompt", "chosen", "rejected"]


def score_files(
    model: Any, tokenizer: Any, files: Sequence[Path], target: Path, *, splits: Sequence[str], checkpoint: str, token_budget: int
) -> dict[str, Any]:
    """Score the pairs of data files and write their records to `target`, whole or not at all.

    Pairs are read, encoded, scored and written by chunks of whole prompts, so that memory does not grow with their number.

    Args:
        model, checkpoint, token_budget: as for `scoring.score_pairs`.
        tokenizer: the base model's.
        files: `data/<objective>.parquet` of all objectives.
        target: the Parquet file of `RECORDS` to write.
        splits: which splits to score.

    Returns:
        The report, which also lies in the metadata of `target`: `checkpoint`, `pairs`, `scored`, `seconds`, and what `first_look` found.

    Raises:
        StudyError: when the files hold no pair of these splits.
    """
    scorer = _ChunkScorer(model, tokenizer, checkpoint, token_budget)
    return _write_records(target, files, splits, scorer.records, scorer.report)


def score_base(model: Any, tokenizer: Any, files: Sequence[Path], target: Path, *, cache: Path, source: str, token_budget: int) -> dict[str, Any]:
    """Records of the base model for all pairs of data files, each scored once for good.

    What was scored lies in `cache`, a folder for one base model, tokenizer and dtype (`cache_folder`); every study, setting, order, seed and stage
    takes its reference sums from there. A run that is killed keeps the chunks that it finished.

    Args:
        cache: the folder; made when missing.
        source: names the data, so that two settings that share pairs wait for each other and others do not.
        model, tokenizer, files, target, token_budget: as for `score_files`.

    Returns:
        The report of `score_files`; `scored` is less than `pairs` by what the cache held.

    Raises:
        StudyError: when cached sums of a few pairs are not what the model gives now.
    """
    scorer = _ChunkScorer(model, tokenizer, "base", token_budget)
    lock = FileLock(cache / f".{hashlib.sha256(source.encode()).hexdigest()[:16]}.lock")
    checked = False

    def records(chunk: pd.DataFrame) -> pd.DataFrame:
        nonlocal checked
        pairs = chunk.drop_duplicates("pair_id")
        with lock:
            known = _cached(cache, pairs)
            if len(known) and not checked:
                _check_cached(known.head(CHECKED_PAIRS), pairs, scorer, cache)
                checked = True
            lacking = pairs[~pairs["pair_id"].isin(known["pair_id"])]
            if len(lacking):
                fresh = scorer.records(lacking)[_CACHED]
                write_table(cache / f"{hashlib.sha256(''.join(fresh['pair_id']).encode()).hexdigest()[:16]}.parquet", fresh)
                known = pd.concat([known, fresh]) if len(known) else fresh
        return chunk[_TEXTS[:4]].merge(known, on="pair_id", how="left", validate="many_to_one").assign(checkpoint="base")

    cache.mkdir(parents=True, exist_ok=True)
    return _write_records(target, files, ("train", "eval"), records, scorer.report)


def cache_folder(runs: Path, fingerprints: dict[str, str]) -> Path:
    """Where base sums of one base model, tokenizer (with its template) and dtype are kept."""
    return runs / "reference" / "-".join(fingerprints[part] for part in ("base_model", "tokenizer", "dtype"))


def times_scored(cache: Path) -> pd.Series:
    """How often each pair was scored under the base, by pair id: the counter that proves "once"."""
    return pd.concat([pd.read_parquet(file, columns=["pair_id"]) for file in sorted(cache.glob("*.parquet"))])["pair_id"].value_counts()


class _ChunkScorer:
    """Scores chunks of pairs with one model, looks at it before the first, and keeps the report."""

    def __init__(self, model: Any, tokenizer: Any, checkpoint: str, token_budget: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.options = {"checkpoint": checkpoint, "token_budget": token_budget}
        self.report: dict[str, Any] = {"checkpoint": checkpoint, "pairs": 0, "scored": 0}

    def records(self, chunk: pd.DataFrame) -> pd.DataFrame:
        encoded = encode_table(self.tokenizer, chunk)
        if "pass_used" not in self.report:
            self.report |= first_look(self.model, prompt_rows(encoded))
        self.report["scored"] += len(chunk)
        return score_pairs(self.model, chunk, encoded, trusted=self.report["pass_used"] == SHARED, **self.options)


def _write_records(
    target: Path, files: Sequence[Path], splits: Sequence[str], score: Callable[[pd.DataFrame], pd.DataFrame], report: dict[str, Any]
) -> dict[str, Any]:
    began = time.monotonic()

    def write(beside: Path) -> None:
        with pa.parquet.ParquetWriter(beside, RECORDS) as writer:
            for chunk in prompt_chunks(files, splits):
                writer.write_table(pa.Table.from_pandas(score(chunk), schema=RECORDS, preserve_index=False))
                report["pairs"] += len(chunk)
            report["seconds"] = round(time.monotonic() - began, 1)
            writer.add_key_value_metadata({REPORT_KEY: json.dumps(report)})
        if not report["pairs"]:
            raise StudyError(f"{', '.join(map(str, files))} hold no pair of the splits {list(splits)}: nothing to score.")

    write_whole(target, write)
    return read_report(target)  # of several processes only the first has scored


def _cached(cache: Path, pairs: pd.DataFrame) -> pd.DataFrame:
    files = sorted(str(file) for file in cache.glob("*.parquet"))
    if not files:
        return pd.DataFrame(columns=_CACHED)
    ids = pa.array(pairs["pair_id"], pa.string())
    return pa.dataset.dataset(files).to_table(columns=_CACHED, filter=pa.dataset.field("pair_id").isin(ids)).to_pandas()


def _check_cached(known: pd.DataFrame, pairs: pd.DataFrame, scorer: _ChunkScorer, cache: Path) -> None:
    chunk = known[["pair_id"]].merge(pairs, on="pair_id")
    live = score_pairs(scorer.model, chunk, encode_table(scorer.tokenizer, chunk), **scorer.options)
    tolerance = rounding(bare_model(scorer.model).dtype)
    for column in ("chosen_logp", "rejected_logp"):
        for pair_id, now, then in zip(chunk["pair_id"], live[column], known[column], strict=True):
            if not abs(now - then) <= tolerance * max(1.0, abs(now)):
                raise StudyError(f"the base sums kept in {cache} are stale: {column} of pair {pair_id} is {then:.4f} there, {now:.4f} now. Delete that folder.")


def first_look(model: Any, rows: Sequence[PromptRow]) -> dict[str, Any]:
    """What is to be known of a model before it scores: which pass it can be trusted with, and how noisy its dtype is.

    Returns:
        `pass_used` (`SHARED` or `PADDED`), `reason` (why not the shared one, else None), `noise` (see `rounding_noise`).
    """
    reason = distrust(model, rows)
    return {"pass_used": PADDED if reason else SHARED, "reason": reason, "noise": rounding_noise(model, rows[:NOISE_ROWS], trusted=reason is None)}


def rounding_noise(model: Any, rows: Sequence[PromptRow], *, trusted: bool) -> dict[str, Any] | None:
    """How far the sums of a bfloat16 model lie from those of the same weights in float32, on a few rows.

    The model is turned to float32 and back; bfloat16 weights survive that bit by bit. The noise of policy and base does not cancel, so that
    of a DPO-relative margin, made of four sums, is about 2 beta times `rms`.

    Returns:
        `sums` (how many completions), `rms` and `worst` (nats a completion); None for a float32 model. `rms` is None for quantised weights, which have
        no float32 twin.
    """
    bare = bare_model(model)
    if bare.dtype == torch.float32:
        return None
    if getattr(bare, "is_quantized", False):
        return {"sums": 0, "rms": None, "worst": None}
    options = {"token_budget": 4 * max(row.tokens for row in rows), "label": "measuring rounding", "trusted": trusted}
    coarse = torch.tensor(list(itertools.chain(*score_rows(model, rows, **options))), dtype=torch.float64)
    dtypes = {name: weight.dtype for name, weight in bare.named_parameters()}
    bare.float()
    fine = torch.tensor(list(itertools.chain(*score_rows(model, rows, **options))), dtype=torch.float64)
    for name, weight in bare.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    gap = coarse - fine
    return {"sums": len(gap), "rms": float(gap.square().mean().sqrt()), "worst": float(gap.abs().max())}


def prompt_chunks(files: Sequence[Path], splits: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Pairs of data files by chunks of about `CHUNK_PAIRS`, every prompt with all its pairs in one chunk.

    A chunk is a range of `prompt_id`, which is a hash and so spreads evenly.
    """
    source = pa.dataset.dataset([str(file) for file in files])
    wanted = pa.dataset.field("split").isin(list(splits))
    parts = max(1, -(-source.count_rows(filter=wanted) // CHUNK_PAIRS))
    edges = [f"{(part << 64) // parts:016x}" for part in range(parts)]
    prompt_id = pa.dataset.field("prompt_id")
    for low, high in itertools.pairwise([*edges, "g"]):  # "g" stands after every hexadecimal digit
        chunk = source.to_table(columns=_TEXTS, filter=wanted & (prompt_id >= low) & (prompt_id < high)).to_pandas()
        if len(chunk):
            yield chunk


def records_of(scores: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """The records of `pairs` in their order, from the records of many.

    Raises:
        StudyError: when a pair has no record.
    """
    keys = ["pair_id", "objective"]
    found = pairs[keys].merge(scores, on=keys, how="left", validate="one_to_one")
    if found["chosen_logp"].isna().any():
        raise StudyError(f"{int(found['chosen_logp'].isna().sum())} of {len(pairs)} pairs have no record: run 01_data_preparation again.")
    return found.astype({"chosen_tokens": int, "rejected_tokens": int})
