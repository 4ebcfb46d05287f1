"""Per-pair records, the study's primary result: scored by chunks, the base model's kept for good."""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import torch
from filelock import FileLock

from seqdpo_utils.errors import StudyError
from seqdpo_utils.pairs import SPLITS, encode_table
from seqdpo_utils.paths import REPORT_KEY, write_table, write_whole
from seqdpo_utils.scoring import PromptRow, Scorer, bare_model, prompt_rows, rounding

CHUNK_PAIRS = 4096
"""Pairs that are encoded, scored and written at one time."""
CHECKED_PAIRS = 2
"""Cached pairs that are scored again before a cache is believed."""
NOISE_ROWS = 8
"""Prompts that are also scored in float32 where the model computes in bfloat16."""
SHARED, PADDED = "one row a prompt", "one padded row a completion"
_NAMES = ["pair_id", "prompt_id", "objective", "split"]
_TEXTS = ["prompt", "chosen", "rejected"]
_LOGPS, _TOKENS = ["chosen_logp", "rejected_logp"], ["chosen_tokens", "rejected_tokens"]
RECORDS = pa.schema(
    [(name, pa.string()) for name in [*_NAMES, "checkpoint"]]
    + [(name, pa.float64()) for name in _LOGPS]
    + [(name, pa.int64()) for name in _TOKENS]
)
"""Columns of the per-pair records: sums over completion tokens in nats, and how many tokens they cover."""


def score_files(
    scorer: Scorer,
    tokenizer: Any,
    files: Sequence[Path],
    target: Path,
    *,
    splits: Sequence[str],
    checkpoint: str,
) -> dict[str, Any]:
    """Score the pairs of data files and write their records to `target`, whole or not at all.

    Pairs are read, encoded, scored and written by chunks of whole prompts, so that memory does not grow with
    their number.

    Args:
        scorer: over the model in evaluation mode.
        tokenizer: the base model's.
        files: `data/<objective>.parquet` of all objectives.
        target: the Parquet file of `RECORDS` to write.
        splits: which splits to score.
        checkpoint: "base", or the chain after whose last stage the model is scored.

    Returns:
        The report, which also lies in the metadata of `target`: `checkpoint`, `pairs`, `scored`, `seconds`,
        `pass_used` (SHARED or PADDED), `reason` (why not the shared one, else None), and `noise`
        (`rounding_noise`). The last three are missing when nothing had to be scored.

    Raises:
        StudyError: when the files hold no pair of these splits.
    """
    report = {"checkpoint": checkpoint, "pairs": 0, "scored": 0}
    chunks = prompt_chunks(files, splits)
    return _write_records(target, (_score(scorer, tokenizer, chunk, report) for chunk in chunks), report)


def score_base(
    scorer: Scorer, tokenizer: Any, files: Sequence[Path], target: Path, *, cache: Path, source: str
) -> dict[str, Any]:
    """Records of the base model for all pairs of data files, each scored once for good.

    What was scored lies in `cache`, a folder for one base model, tokenizer and dtype (`cache_folder`); every
    study, setting, chain, seed and stage takes its reference sums from there. A run that is killed keeps the
    chunks that it finished.

    Args:
        cache: the folder; made when missing.
        source: names the data, so that two settings that share pairs wait for each other and others do not.
        scorer, tokenizer, files, target: as for `score_files`.

    Returns:
        The report of `score_files`; `scored` is less than `pairs` by what the cache held.

    Raises:
        StudyError: when cached sums of a few pairs are not what the model gives now.
    """
    cache.mkdir(parents=True, exist_ok=True)
    report = {"checkpoint": "base", "pairs": 0, "scored": 0}
    lock = FileLock(cache / f".{_short_hash(source)}.lock")

    def records() -> Iterator[pd.DataFrame]:
        checked = False
        for chunk in prompt_chunks(files, SPLITS):
            pairs = chunk.drop_duplicates("pair_id")
            with lock:
                known = _cached(cache, pairs)
                if len(known) and not checked:
                    _check_cached(scorer, tokenizer, known.head(CHECKED_PAIRS), pairs, cache)
                    checked = True
                lacking = pairs[~pairs["pair_id"].isin(known["pair_id"])]
                if len(lacking):
                    fresh = _score(scorer, tokenizer, lacking, report)[known.columns]
                    write_table(cache / f"{_short_hash(''.join(fresh['pair_id']))}.parquet", fresh)
                    known = pd.concat([known, fresh]) if len(known) else fresh
            names = chunk[_NAMES].assign(checkpoint="base")
            yield names.merge(known, on="pair_id", how="left", validate="many_to_one")

    return _write_records(target, records(), report)


def cache_folder(runs: Path, fingerprints: dict[str, str]) -> Path:
    """Where base sums of one base model, tokenizer (with its template) and dtype are kept."""
    return runs / "reference" / "-".join(fingerprints[part] for part in ("base_model", "tokenizer", "dtype"))


def times_scored(cache: Path) -> pd.Series:
    """How often each pair was scored under the base, by pair id: the counter that proves "once"."""
    parts = [pd.read_parquet(file, columns=["pair_id"]) for file in sorted(cache.glob("*.parquet"))]
    return pd.concat(parts)["pair_id"].value_counts()


def _score(scorer: Scorer, tokenizer: Any, chunk: pd.DataFrame, report: dict[str, Any]) -> pd.DataFrame:
    """Records of a chunk; notes in `report` how many, and before the first how they are scored."""
    encoded = encode_table(tokenizer, chunk)
    if "pass_used" not in report:
        rows = prompt_rows(encoded)
        report["noise"] = rounding_noise(scorer, rows[:NOISE_ROWS])
        report["reason"] = scorer.fault(rows)
        report["pass_used"] = PADDED if report["reason"] else SHARED
    report["scored"] += len(chunk)
    return scorer.records(chunk, encoded, checkpoint=report["checkpoint"])


def _write_records(target: Path, chunks: Iterator[pd.DataFrame], report: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()

    def write(beside: Path) -> None:
        with pa.parquet.ParquetWriter(beside, RECORDS) as writer:
            for records in chunks:
                writer.write_table(pa.Table.from_pandas(records, schema=RECORDS, preserve_index=False))
                report["pairs"] += len(records)
            report["seconds"] = round(time.monotonic() - began, 1)
            writer.add_key_value_metadata({REPORT_KEY: json.dumps(report)})

    write_whole(target, write)
    return report


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cached(cache: Path, pairs: pd.DataFrame) -> pd.DataFrame:
    columns, files = ["pair_id", *_LOGPS, *_TOKENS], sorted(map(str, cache.glob("*.parquet")))
    if not files:
        return pd.DataFrame(columns=columns)
    wanted = pa.dataset.field("pair_id").isin(pa.array(pairs["pair_id"], pa.string()))
    return pa.dataset.dataset(files).to_table(columns=columns, filter=wanted).to_pandas()


def _check_cached(
    scorer: Scorer, tokenizer: Any, known: pd.DataFrame, pairs: pd.DataFrame, cache: Path
) -> None:
    chunk = known[["pair_id"]].merge(pairs, on="pair_id")
    live = scorer.records(chunk, encode_table(tokenizer, chunk), checkpoint="base")
    tolerance = rounding(bare_model(scorer.model).dtype)
    for column in _LOGPS:
        for pair_id, now, then in zip(chunk["pair_id"], live[column], known[column], strict=True):
            if not abs(now - then) <= tolerance * max(1.0, abs(now)):
                stale = f"{column} of pair {pair_id} is {then:.4f} there, {now:.4f} now"
                raise StudyError(f"the base sums kept in {cache} are stale: {stale}. Delete that folder.")


def rounding_noise(scorer: Scorer, rows: Sequence[PromptRow]) -> dict[str, Any] | None:
    """How far the sums of a bfloat16 model lie from those of the same weights in float32, on a few rows.

    The model is turned to float32 and back; bfloat16 weights survive that bit by bit. The noise of policy and
    base does not cancel, so that of a DPO-relative margin, made of four sums, is about 2 beta times `rms`.

    Returns:
        `sums` (how many completions), `rms` and `worst` (nats a completion); None for a float32 model. `rms`
        is None for quantised weights, which have no float32 twin.
    """
    bare = bare_model(scorer.model)
    if bare.dtype == torch.float32:
        return None
    if getattr(bare, "is_quantized", False):
        return {"sums": 0, "rms": None, "worst": None}
    coarse = scorer.sums(rows, label="measuring rounding")
    dtypes = {name: weight.dtype for name, weight in bare.named_parameters()}
    bare.float()
    fine = scorer.sums(rows, label="measuring rounding")
    for name, weight in bare.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    flat = (torch.tensor(list(itertools.chain(*sums)), dtype=torch.float64) for sums in (coarse, fine))
    gap = next(flat) - next(flat)
    return {"sums": len(gap), "rms": float(gap.square().mean().sqrt()), "worst": float(gap.abs().max())}


def prompt_chunks(files: Sequence[Path], splits: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Pairs of data files by chunks of about `CHUNK_PAIRS`, every prompt with all its pairs in one chunk.

    A chunk is a range of `prompt_id`, which is a hash and so spreads evenly.

    Raises:
        StudyError: when the files hold no pair of these splits.
    """
    source, prompt_id = pa.dataset.dataset(list(map(str, files))), pa.dataset.field("prompt_id")
    wanted = pa.dataset.field("split").isin(list(splits))
    count = source.count_rows(filter=wanted)
    if not count:
        places = ", ".join(map(str, files))
        raise StudyError(f"{places} hold no pair of the splits {list(splits)}: nothing to score.")
    parts = -(-count // CHUNK_PAIRS)
    edges = [f"{(part << 64) // parts:016x}" for part in range(parts)]
    for low, high in itertools.pairwise([*edges, "g"]):  # "g" stands after every hexadecimal digit
        here = wanted & (prompt_id >= low) & (prompt_id < high)
        chunk = source.to_table(columns=[*_NAMES, *_TEXTS], filter=here).to_pandas()
        if len(chunk):
            yield chunk


def records_of(scores: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """The records of `pairs` in their order, from the records of many.

    Raises:
        StudyError: when a pair has no record.
    """
    keys = ["pair_id", "objective"]
    found = pairs[keys].merge(scores, on=keys, how="left", validate="one_to_one")
    lacking = int(found["chosen_logp"].isna().sum())
    if lacking:
        raise StudyError(f"{lacking} of {len(pairs)} pairs have no record: run 01_data_preparation again.")
    return found.astype(dict.fromkeys(_TOKENS, int))
