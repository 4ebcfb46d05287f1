"""The real notebooks at smoke scale, through Snakemake and papermill, in a copy of the project."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from study import copy_project, run_study, snakemake
from test_charts import OUTSIDE
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqdpo_utils import models, params, records, scoring
from seqdpo_utils.chains import Chain
from seqdpo_utils.conflict import CONFLICT_COLUMNS
from seqdpo_utils.ledger import LEDGER_COLUMNS
from seqdpo_utils.metrics import MEASURES
from seqdpo_utils.pairs import SPLITS
from seqdpo_utils.paths import RunPaths

PKU = "safety_signal"
ORDERS = ["helpful-then-safe", "safe-then-helpful"]
LONG = "helpful+safe-then-safe.shuffled-then-helpful.replay25"
EVERY = [*ORDERS, LONG, "helpful"]
OTHERS = [name for name in params.settings_of(ROOT) if name != PKU]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def study(copy):
    """One setting in both orders, one of its single stages, a chain of three stages with a joint one and
    variants."""
    done = run_study(copy, "--settings", PKU, "--design", "both_orders", "--chains", LONG, "helpful")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return copy / "runs"


def node(study, chain: str) -> RunPaths:
    return RunPaths(study, "smoke", PKU, chain, 0)


def nodes(study) -> list[RunPaths]:
    """Every trained node, each once."""
    return list({run.chain: run for chain in EVERY for run in node(study, chain).lineage}.values())


def test_every_file_of_the_contract_is_there(study):
    assert len(nodes(study)) == 7
    for run in nodes(study):
        names = (
            "run_json",
            "manifest",
            "history",
            "scores",
            "kl",
            "conflict",
            "ledger",
            "ledger_pairs",
            "within",
        )
        assert [name for name in names if not getattr(run, name).is_file()] == []
        assert (run.adapter / "adapter_model.safetensors").is_file()
        trained = "02_first_stage" if run.chain in ("helpful", "safe", "helpful+safe") else "03_later_stage"
        assert run.page(trained).is_file()
    for chain in EVERY:
        run = node(study, chain)
        assert run.movement.is_file() and all(
            run.table(name).is_file()
            for name in (
                "stage_matrix",
                "transfer",
                "pair_change",
                "quartiles",
                "subspace",
                "ledger",
                "displacement",
                "kl",
                "length",
            )
        )
        assert len(list((run.node / "notebooks").glob("0*.ipynb"))) == 4
    assert node(study, "helpful").start.joinpath("adapter_model.safetensors").is_file()
    assert not list(study.rglob("*.partial*")) and not list(study.rglob("*.tmp"))
    assert not list(study.rglob(".unfinished"))


def test_columns_are_those_of_the_contract(study):
    for chain in EVERY:
        run, sequence = node(study, chain), Chain.parse(chain)
        data = pd.read_parquet(run.data("safe"))
        assert {"pair_id", "prompt_id", "objective", "split", "prompt", "chosen", "rejected"} <= set(data)
        assert set(data["split"]) == set(SPLITS)
        scores = pd.read_parquet(run.scores)
        assert list(scores) == [field.name for field in records.RECORDS] and set(scores["checkpoint"]) == {
            chain
        }
        assert set(scores["objective"]) == {"helpful", "safe"} and scores["chosen_logp"].dtype == "float64"
        conflict, ledger = pd.read_parquet(run.conflict), pd.read_parquet(run.ledger)
        assert list(conflict) == list(CONFLICT_COLUMNS) and list(ledger) == list(LEDGER_COLUMNS)
        assert (
            set(conflict["previous_objective"]) == set(ledger["previous_objective"]) == set(sequence.earlier)
        )
        assert set(conflict["stage"]) == ({len(sequence.stages)} if sequence.earlier else set())
        movement = pd.read_parquet(run.movement)
        assert {
            "from_checkpoint",
            "to_checkpoint",
            "other_from",
            "other_to",
            "space",
            "layer",
            "module",
            "norm",
            "other_norm",
            "cosine",
        } <= set(movement)
        assert set(movement["from_checkpoint"]) | set(movement["to_checkpoint"]) <= set(sequence.checkpoints)
        matrix = pd.read_parquet(run.table("stage_matrix"))
        bounds = {f"{measure}{bound}" for measure in MEASURES for bound in ("", "_low", "_high")}
        assert {"checkpoint", "objective", "n_pairs", "n_prompts", *bounds} <= set(matrix)
        assert matrix["checkpoint"].drop_duplicates().tolist() == sequence.checkpoints
        assert (matrix.loc[matrix["checkpoint"] == "base", "margin"] == 0).all()
        quartiles = pd.read_parquet(run.table("quartiles"))
        assert {"objective", "key", "quartile", "n_pairs", "change", "change_low", "change_high"} <= set(
            quartiles
        )
    history = pd.read_parquet(node(study, ORDERS[0]).history)
    assert {"step", "loss", "learning_rate", "grad_norm", "rewards/margins", "rewards/chosen"} <= set(history)


def test_the_stages_saw_the_pairs_that_their_texts_say(study):
    """A joint stage has both objectives' pairs and twice the steps; replay leaves the number of steps as it
    is."""
    steps = {run.chain: len(pd.read_parquet(run.history)) for run in nodes(study)}
    joint, shuffled, replayed = (run.chain for run in node(study, LONG).lineage)
    assert (steps["helpful"], steps[joint], steps[shuffled], steps[replayed]) == (4, 8, 4, 4)
    manifest = json.loads(node(study, shuffled).manifest.read_text())
    assert manifest["varied"] == ["shuffled_labels"] and manifest["parameters"]["shuffled_labels"] is True


def test_every_pair_was_scored_once_under_the_base(study):
    """Over all chains and stages, and whatever study ran before in this folder."""
    (cache,) = [folder for folder in (study / "reference").iterdir() if folder.is_dir()]
    counter = records.times_scored(cache)
    pairs = pd.concat(map(pd.read_parquet, study.glob("smoke/*/data/*.parquet")))
    assert counter.max() == 1 and set(pairs["pair_id"]) <= set(counter.index)
    for run in nodes(study):
        report = json.loads(run.run_json.read_text())["scoring"]
        assert set(report) == {"base", run.chain} and report[run.chain]["pass_used"] == records.SHARED
        assert report["base"]["pairs"] == len(pd.read_parquet(run.base_scores))


def test_run_json_tells_what_was_run(study):
    for run in nodes(study):
        told = json.loads(run.run_json.read_text())
        assert told["parameters"]["setting"] == PKU and told["parameters"]["chain"] == run.chain
        assert told["parameters"]["beta"] == 0.3 and told["parameters"]["base_model"] == models.TINY
        assert {"torch", "trl", "peft", "transformers"} <= set(told["versions"])
        assert set(told["fingerprints"]) == {"data", "base_model", "tokenizer", "dtype"}
        assert told["seconds_per_step"] > 0 and told["counts"] and told["dtype"] == "float32"
        assert told["began_with"] == str(Chain.parse(run.chain).parent or "base")


def test_records_can_be_recomputed_with_plain_transformers_and_peft(study):
    """Random pairs of every node, one sequence at a time, from the saved adapter and the saved texts
    alone."""
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / models.TINY)
    for run in nodes(study):
        base = AutoModelForCausalLM.from_pretrained(ROOT / models.TINY, dtype=torch.float32)
        policy = PeftModel.from_pretrained(base, run.adapter).eval()
        for row in pd.read_parquet(run.scores).sample(3, random_state=int(rng.integers(1000))).itertuples():
            texts = pd.read_parquet(run.data(row.objective)).set_index("pair_id").loc[row.pair_id]
            turns = json.loads(texts["prompt"])
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            for side in ("chosen", "rejected"):
                text = prompt + texts[side] + "<|im_end|>"
                ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
                with torch.no_grad():
                    logps = torch.log_softmax(policy(ids).logits[0, :-1].double(), dim=1)
                logps = logps.gather(1, ids[0, 1:, None])[start - 1 :, 0]
                assert getattr(row, f"{side}_logp") == pytest.approx(float(logps.sum()), rel=1e-4)
                assert getattr(row, f"{side}_tokens") == len(logps)


def test_stages_go_on_with_the_adapter_before(study):
    """A is random and hardly moves, so two nodes of one lineage share it to a few percent; B is zero at the
    start."""
    from safetensors.torch import load_file

    run = node(study, LONG)
    path = "adapter_model.safetensors"
    start = load_file(run.start / path)
    for one in run.lineage:
        moved = load_file(one.adapter / path)
        for name, weight in start.items():
            if "lora_A" in name:
                assert 0 < (moved[name] - weight).norm() < 0.5 * weight.norm()
            else:
                assert weight.abs().max() == 0 < moved[name].abs().max()


@pytest.fixture(scope="module")
def prepared(copy, study):
    """The first notebook of the other settings."""
    pages = [f"runs/smoke/{name}/notebooks/01_data_preparation.ipynb" for name in OTHERS]
    chains = {name: [] for name in OTHERS}
    done = snakemake(copy, *pages, chains=chains)
    assert done.returncode == 0, done.stderr[-4000:]
    return study


def test_base_records_are_the_base(prepared):
    base = models.load_base(ROOT, models.TINY, dtype="float32")
    tokenizer = models.load_tokenizer(ROOT, models.TINY)
    for setting in (PKU, *OTHERS):
        run = RunPaths(prepared, "smoke", setting)
        scores = pd.read_parquet(run.base_scores)
        assert set(scores["split"]) == set(SPLITS) and set(scores["checkpoint"]) == {"base"}
        row = scores.iloc[0]
        texts = pd.read_parquet(run.data(row.objective)).set_index("pair_id").loc[row.pair_id]
        turns = json.loads(texts["prompt"])
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt, completion = tokenizer([rendered, texts["chosen"] + "<|im_end|>"], add_special_tokens=False)[
            "input_ids"
        ]
        assert row.chosen_logp == pytest.approx(scoring.sequence_logp(base, prompt, completion), rel=1e-4)


def test_pages_read_offline(study):
    appendix = study / "smoke" / "appendix"
    index, pages = (appendix / "index.html").read_text(), sorted(appendix.glob("*.html"))
    assert len(pages) == 1 + 2 + 1 + 7 + 4 * 3
    assert all(path.name in index for path in pages if path.name != "index.html")
    for path in pages:
        text = path.read_text()
        assert not OUTSIDE.search(text) and "<script" not in text, path.name
        assert path.name.startswith(("index", "summary--00")) or "<svg" in text, f"{path.name} has no chart"
        assert "Traceback" not in text and "Warning" not in text, f"{path.name} shows a warning"


@pytest.mark.full
def test_all_settings_in_both_orders(copy, prepared):
    done = run_study(copy)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    chains = [path for path in (prepared / "smoke").glob("*/*-then-*/seed-0/tables/transfer.parquet")]
    assert len(chains) >= 8


@pytest.mark.full
@pytest.mark.parametrize(
    "design", ["controls", "dial", "references", "causal", "remedies", "three_stages", "joint"]
)
def test_every_design_runs(copy, study, design):
    done = run_study(copy, "--settings", PKU, "--design", design)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
