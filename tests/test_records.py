"""Records written by chunks, the base scored once for good, stale caches and dtype noise found out."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from seqdpo_utils import data, models, recording, scoring
from seqdpo_utils.paths import StudyError, read_report

KEY = {"base_model": "m", "tokenizer": "t", "dtype": "float32"}
WORDS = ["tea", "rain", "a long walk", "music", "bread", "the sea", "chess", "snow", "an old map", "birds"]


@pytest.fixture
def files(tmp_path):
    """Two objectives over the same prompts, the second with the labels of every other pair flipped, as `data/*.parquet`."""
    tables = {}
    for objective, flip in (("helpful", 1), ("harmless", 2)):
        rows = []
        for i, word in enumerate(WORDS):
            answers = [f"I like {word}.", f"{word.title()} is dull, and that is all there is to say."][:: -1 if i % flip else 1]
            rows.append({"prompt": json.dumps([{"role": "user", "content": f"What of {word}?"}]), "chosen": answers[0], "rejected": answers[1]})
        table = pd.DataFrame(rows).assign(objective=objective, split=["train", "eval"] * (len(rows) // 2))
        table["prompt_id"] = [data._hash(prompt) for prompt in table["prompt"]]
        table["pair_id"] = [data._hash(*texts) for texts in zip(table["prompt"], table["chosen"], table["rejected"], strict=True)]
        tables[objective] = tmp_path / "data" / f"{objective}.parquet"
        recording.write_table(tables[objective], table)
    return list(tables.values())


def read(path):
    return pd.read_parquet(path).sort_values(["objective", "pair_id"], ignore_index=True)


@pytest.mark.parametrize("chunk", [3, 4096])
def test_chunks_hold_whole_prompts_and_every_pair_once(files, monkeypatch, chunk):
    monkeypatch.setattr(recording, "CHUNK_PAIRS", chunk)
    chunks = list(recording.prompt_chunks(files, ["train", "eval"]))
    assert (len(chunks) > 3) == (chunk == 3)
    where = pd.concat([part.assign(chunk=i) for i, part in enumerate(chunks)])
    assert where.groupby("prompt_id")["chunk"].nunique().max() == 1
    everything = pd.concat(map(pd.read_parquet, files))
    assert sorted(where["pair_id"] + where["objective"]) == sorted(everything["pair_id"] + everything["objective"])
    assert set(pd.concat(recording.prompt_chunks(files, ["eval"]))["split"]) == {"eval"}


def test_records_by_chunks_are_those_of_one_pass(base, tokenizer, files, tmp_path, monkeypatch):
    pairs = pd.concat(map(pd.read_parquet, files), ignore_index=True)
    whole = scoring.score_pairs(base, pairs, data.encode_table(tokenizer, pairs), checkpoint="stage1", token_budget=200)
    monkeypatch.setattr(recording, "CHUNK_PAIRS", 3)
    report = recording.score_files(base, tokenizer, files, tmp_path / "stage1.parquet", splits=["train", "eval"], checkpoint="stage1", token_budget=200)
    written = read(tmp_path / "stage1.parquet")
    assert list(written.columns) == recording.RECORDS.names == list(whole.columns)
    whole = whole.sort_values(["objective", "pair_id"], ignore_index=True)
    assert written["pair_id"].tolist() == whole["pair_id"].tolist()
    assert np.allclose(written["chosen_logp"], whole["chosen_logp"], rtol=1e-5) and written["chosen_tokens"].equals(whole["chosen_tokens"])
    assert report == read_report(tmp_path / "stage1.parquet")
    assert (report["pairs"], report["pass_used"], report["noise"]) == (len(pairs), recording.SHARED, None)
    with pytest.raises(StudyError, match="no pair of the splits"):
        recording.score_files(base, tokenizer, files, tmp_path / "none.parquet", splits=["other"], checkpoint="base", token_budget=200)
    assert not (tmp_path / "none.parquet").exists()


def score_base(base, tokenizer, files, tmp_path, name="base"):
    target, cache = tmp_path / f"{name}.parquet", recording.cache_folder(tmp_path, KEY)
    return recording.score_base(base, tokenizer, files, target, cache=cache, source="rows", token_budget=200), read(target), cache


def test_the_base_is_scored_once_whatever_asks_for_it(base, tokenizer, files, tmp_path):
    first, some, cache = score_base(base, tokenizer, files[:1], tmp_path, "first")
    second, both, _ = score_base(base, tokenizer, files, tmp_path, "second")
    third, again, _ = score_base(base, tokenizer, files, tmp_path, "third")
    distinct = both["pair_id"].nunique()
    assert len(both) == 2 * len(WORDS) > distinct > len(WORDS)  # where the two objectives agree, it is one pair
    assert [r["scored"] for r in (first, second, third)] == [len(WORDS), distinct - len(WORDS), 0]
    counter = recording.times_scored(cache)
    assert counter.max() == 1 and set(counter.index) == set(both["pair_id"])
    pd.testing.assert_frame_equal(both, again)
    pd.testing.assert_frame_equal(some, both[both["objective"] == "helpful"].reset_index(drop=True))
    pairs = pd.concat(map(pd.read_parquet, files), ignore_index=True)
    plain = scoring.score_pairs(base, pairs, data.encode_table(tokenizer, pairs), checkpoint="base", token_budget=200)
    assert np.allclose(both["rejected_logp"], plain.sort_values(["objective", "pair_id"])["rejected_logp"], rtol=1e-5)


def test_finished_chunks_survive_a_run_that_dies(base, tokenizer, files, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "CHUNK_PAIRS", 3)
    honest, calls = recording.score_pairs, []

    def dies(*args, **options):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*args, **options)

    monkeypatch.setattr(recording, "score_pairs", dies)
    with pytest.raises(KeyboardInterrupt):
        score_base(base, tokenizer, files, tmp_path)
    assert not (tmp_path / "base.parquet").exists()
    kept = len(recording.times_scored(recording.cache_folder(tmp_path, KEY)))
    monkeypatch.setattr(recording, "score_pairs", honest)
    report, both, cache = score_base(base, tokenizer, files, tmp_path)
    assert kept == sum(calls[:2]) and report["scored"] == both["pair_id"].nunique() - kept
    assert recording.times_scored(cache).max() == 1


def test_a_stale_cache_is_refused(base, tokenizer, files, tmp_path):
    _, _, cache = score_base(base, tokenizer, files, tmp_path)
    (part,) = cache.glob("*.parquet")
    table = pd.read_parquet(part)
    recording.write_table(part, table.assign(rejected_logp=table["rejected_logp"] * 1.01))
    with pytest.raises(StudyError, match=r"are stale: rejected_logp of pair [0-9a-f]{16} .* Delete that folder"):
        score_base(base, tokenizer, files, tmp_path)


def test_the_cache_folder_is_named_by_what_the_sums_depend_on(tmp_path):
    folders = {recording.cache_folder(tmp_path, KEY | {name: "other"}) for name in KEY}
    assert len(folders | {recording.cache_folder(tmp_path, KEY)}) == 4
    assert recording.cache_folder(tmp_path, KEY | {"data": "other"}) == recording.cache_folder(tmp_path, KEY)


def test_bfloat16_comes_with_its_noise(root, tokenizer, files, tmp_path):
    model = models.load_base(root, models.TINY, dtype="bfloat16")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    report = recording.score_files(model, tokenizer, files, tmp_path / "s.parquet", splits=["eval"], checkpoint="base", token_budget=200)
    assert model.dtype == torch.bfloat16 and all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    exact = models.load_base(root, models.TINY, dtype="bfloat16").float()
    pairs = next(recording.prompt_chunks(files, ["eval"]))
    rows = scoring.prompt_rows(data.encode_table(tokenizer, pairs))[: recording.NOISE_ROWS]
    gaps = np.ravel(scoring.score_rows(model, rows, token_budget=4000)) - np.ravel(scoring.score_rows(exact, rows, token_budget=4000))
    assert report["noise"]["sums"] == len(gaps)
    assert report["noise"]["rms"] == pytest.approx(np.sqrt(np.mean(gaps**2)), rel=0.5) and report["noise"]["rms"] > 1e-4


def test_a_pair_without_a_record_is_an_error():
    pairs = pd.DataFrame({"pair_id": ["a", "b", "c"], "objective": "helpful"})
    scores = pairs.head(2).assign(chosen_logp=-1.0, rejected_logp=-2.0, chosen_tokens=1, rejected_tokens=1)
    assert recording.records_of(scores, pairs.iloc[[1, 0]])["pair_id"].tolist() == ["b", "a"]
    with pytest.raises(StudyError, match="1 of 3 pairs have no record"):
        recording.records_of(scores, pairs)
