"""Records written by chunks, the base scored once for good, stale caches and dtype noise found out."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch

from seqdpo_utils import models, pairs, paths, records, scoring
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import RunPaths, read_report, write_table
from seqdpo_utils.scoring import Scorer

KEY = {"base_model": "m", "tokenizer": "t", "dtype": "float32"}
WORDS = ["tea", "rain", "a long walk", "music", "bread", "the sea", "chess", "snow", "an old map", "birds"]


@pytest.fixture
def files(tmp_path):
    """Two objectives over the same prompts; the second flips every other pair's labels."""
    files = []
    for objective, flip in (("helpful", 1), ("harmless", 2)):
        rows = []
        for i, word in enumerate(WORDS):
            prompt = json.dumps([{"role": "user", "content": f"What of {word}?"}])
            answers = [f"I like {word}.", f"{word.title()} is dull, and that is all there is to say."]
            rows.append([prompt, *answers[:: -1 if i % flip else 1]])
        table = pd.DataFrame(rows, columns=["prompt", "chosen", "rejected"])
        table = table.assign(objective=objective, split=["train", "eval"] * (len(rows) // 2))
        table["prompt_id"] = [short_hash(row[0]) for row in rows]
        table["pair_id"] = [short_hash(*row) for row in rows]
        files.append(write_table(tmp_path / "data" / f"{objective}.parquet", table))
    return files


def short_hash(*texts):
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def read(path):
    return pd.read_parquet(path).sort_values(["objective", "pair_id"], ignore_index=True)


@pytest.mark.parametrize("chunk", [3, 4096])
def test_chunks_hold_whole_prompts_and_every_pair_once(files, monkeypatch, chunk):
    monkeypatch.setattr(records, "CHUNK_PAIRS", chunk)
    chunks = list(records.prompt_chunks(files, ["train", "eval"]))
    assert (len(chunks) > 3) == (chunk == 3)
    where = pd.concat([part.assign(chunk=i) for i, part in enumerate(chunks)])
    assert where.groupby("prompt_id")["chunk"].nunique().max() == 1
    everything = pd.concat(map(pd.read_parquet, files))
    assert sorted(where["pair_id"] + where["objective"]) == sorted(
        everything["pair_id"] + everything["objective"]
    )
    assert set(pd.concat(records.prompt_chunks(files, ["eval"]))["split"]) == {"eval"}


def test_records_by_chunks_are_those_of_one_pass(base, tokenizer, files, tmp_path, monkeypatch):
    table = pd.concat(map(pd.read_parquet, files), ignore_index=True)
    scorer, target = Scorer(base, token_budget=200), tmp_path / "helpful.parquet"
    whole = scorer.records(table, pairs.encode_table(tokenizer, table), checkpoint="helpful")
    monkeypatch.setattr(records, "CHUNK_PAIRS", 3)
    options = {"splits": ["train", "eval"], "checkpoint": "helpful"}
    report = records.score_files(scorer, tokenizer, files, target, **options)
    written = read(target)
    assert list(written.columns) == records.RECORDS.names == list(whole.columns)
    whole = whole.sort_values(["objective", "pair_id"], ignore_index=True)
    logps = ["chosen_logp", "rejected_logp"]
    assert np.allclose(written[logps], whole[logps], rtol=1e-5)
    pd.testing.assert_frame_equal(written.drop(columns=logps), whole.drop(columns=logps), check_dtype=False)
    assert report == read_report(target)
    assert (report["pairs"], report["scored"], report["checkpoint"]) == (len(table), len(table), "helpful")
    assert (report["pass_used"], report["reason"], report["noise"]) == (records.SHARED, None, None)
    with pytest.raises(StudyError, match="no pair of the splits"):
        records.score_files(
            scorer, tokenizer, files, tmp_path / "no.parquet", splits=["x"], checkpoint="base"
        )
    assert not list(tmp_path.glob("*no.parquet*"))


def test_a_model_that_is_scored_on_padded_rows_says_why(base, tokenizer, files, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "shared_pass_fault", lambda *_: "it is deaf")
    scorer = Scorer(base, token_budget=200)
    options = {"splits": ["eval"], "checkpoint": "base"}
    report = records.score_files(scorer, tokenizer, files, tmp_path / "s.parquet", **options)
    assert (report["pass_used"], report["reason"]) == (records.PADDED, "it is deaf")


def score_base(base, tokenizer, files, tmp_path, name="base"):
    target, cache = tmp_path / f"{name}.parquet", records.cache_folder(tmp_path, KEY)
    scorer = Scorer(base, token_budget=200)
    report = records.score_base(scorer, tokenizer, files, target, cache=cache, source="rows")
    return report, read(target), cache


def test_the_base_is_scored_once_whatever_asks_for_it(base, tokenizer, files, tmp_path):
    first, some, cache = score_base(base, tokenizer, files[:1], tmp_path, "first")
    second, both, _ = score_base(base, tokenizer, files, tmp_path, "second")
    third, again, _ = score_base(base, tokenizer, files, tmp_path, "third")
    distinct = both["pair_id"].nunique()
    assert (
        len(both) == 2 * len(WORDS) > distinct > len(WORDS)
    )  # where the two objectives agree, it is one pair
    assert [r["scored"] for r in (first, second, third)] == [len(WORDS), distinct - len(WORDS), 0]
    counter = records.times_scored(cache)
    assert counter.max() == 1 and set(counter.index) == set(both["pair_id"])
    pd.testing.assert_frame_equal(both, again)
    pd.testing.assert_frame_equal(some, both[both["objective"] == "helpful"].reset_index(drop=True))
    table = pd.concat(map(pd.read_parquet, files), ignore_index=True)
    encoded = pairs.encode_table(tokenizer, table)
    plain = Scorer(base, token_budget=200).records(table, encoded, checkpoint="base")
    plain = plain.sort_values(["objective", "pair_id"])
    assert np.allclose(both["rejected_logp"], plain["rejected_logp"], rtol=1e-5)


def test_finished_chunks_survive_a_run_that_dies(base, tokenizer, files, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_PAIRS", 3)
    honest, calls = Scorer.records, []

    def dies(scorer, chunk, encoded, *, checkpoint):
        calls.append(len(chunk))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(scorer, chunk, encoded, checkpoint=checkpoint)

    monkeypatch.setattr(Scorer, "records", dies)
    with pytest.raises(KeyboardInterrupt):
        score_base(base, tokenizer, files, tmp_path)
    assert not (tmp_path / "base.parquet").exists()
    kept = len(records.times_scored(records.cache_folder(tmp_path, KEY)))
    monkeypatch.setattr(Scorer, "records", honest)
    report, both, cache = score_base(base, tokenizer, files, tmp_path)
    assert kept == sum(calls[:2]) and report["scored"] == both["pair_id"].nunique() - kept
    assert records.times_scored(cache).max() == 1


def test_a_stale_cache_is_refused(base, tokenizer, files, tmp_path):
    _, _, cache = score_base(base, tokenizer, files, tmp_path)
    (part,) = cache.glob("*.parquet")
    table = pd.read_parquet(part)
    write_table(part, table.assign(rejected_logp=table["rejected_logp"] * 1.01))
    with pytest.raises(
        StudyError, match=r"are stale: rejected_logp of pair [0-9a-f]{16} .* Delete that folder"
    ):
        score_base(base, tokenizer, files, tmp_path)


def test_the_cache_folder_is_named_by_what_the_sums_depend_on(tmp_path):
    folders = {records.cache_folder(tmp_path, KEY | {name: "other"}) for name in KEY}
    assert len(folders | {records.cache_folder(tmp_path, KEY)}) == 4
    assert records.cache_folder(tmp_path, KEY | {"data": "other"}) == records.cache_folder(tmp_path, KEY)


def test_bfloat16_comes_with_its_noise(root, tokenizer, files, tmp_path):
    model = models.load_base(root, models.TINY, dtype="bfloat16")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    scorer, options = Scorer(model, token_budget=200), {"splits": ["eval"], "checkpoint": "base"}
    report = records.score_files(scorer, tokenizer, files, tmp_path / "s.parquet", **options)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    exact = models.load_base(root, models.TINY, dtype="bfloat16").float()
    chunk = next(records.prompt_chunks(files, ["eval"]))
    rows = scoring.prompt_rows(pairs.encode_table(tokenizer, chunk))[: records.NOISE_ROWS]
    gaps = np.ravel(scorer.sums(rows)) - np.ravel(Scorer(exact, token_budget=4000).sums(rows))
    assert report["noise"]["sums"] == len(gaps)
    assert (
        report["noise"]["rms"] == pytest.approx(np.sqrt(np.mean(gaps**2)), rel=0.5)
        and report["noise"]["rms"] > 1e-4
    )


def test_a_pair_without_a_record_is_an_error():
    wanted = pd.DataFrame({"pair_id": ["a", "b", "c"], "objective": "helpful"})
    sums = {"chosen_logp": -1.0, "rejected_logp": -2.0, "chosen_tokens": 1, "rejected_tokens": 1}
    scores = wanted.head(2).assign(**sums)
    assert records.records_of(scores, wanted.iloc[[1, 0]])["pair_id"].tolist() == ["b", "a"]
    with pytest.raises(StudyError, match="1 of 3 pairs have no record"):
        records.records_of(scores, wanted)


def test_scores_of_a_chain_are_those_of_the_base_and_of_every_stage(tmp_path):
    run = RunPaths(tmp_path, "smoke", "some", "a-then-b-then-a", 3)
    checkpoints = ["base", "a", "a-then-b", "a-then-b-then-a"]
    for place, name in zip(
        [run.base_scores, *(node.scores for node in run.lineage)], checkpoints, strict=True
    ):
        write_table(place, pd.DataFrame({"pair_id": ["x", "y"], "checkpoint": name}))
    scores = paths.read_scores(run)
    assert scores["checkpoint"].tolist() == [name for name in checkpoints for _ in range(2)]
    assert scores.index.tolist() == list(range(8))
    run.at("a-then-b").scores.unlink()
    with pytest.raises(StudyError, match="is missing"):
        paths.read_scores(run)
