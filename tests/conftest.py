"""Fixtures: the project's folder, a tiny random Llama, pairs made of its tokens, and a trained first
stage."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from seqdpo_utils import models, params, scoring, stage_data, stages
from seqdpo_utils.encoding import EncodedPair

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tokenizer(root):
    models.prepare_model(root, models.TINY)
    return models.load_tokenizer(root, models.TINY)


@pytest.fixture
def base(root, tokenizer):
    return fresh()


@pytest.fixture(scope="session")
def parameters(root) -> params.Parameters:
    """The smoke scale on the first setting, without conflict measurement and without a ledger."""
    flat = params.resolve(root, scale="smoke", setting="distributional_conflict")
    return flat.model_copy(update={"conflict_every": 0, "ledger_pairs": 0})


@pytest.fixture(scope="session")
def stage1(tokenizer, parameters, tmp_path_factory) -> Path:
    """The adapter of a first stage on sixteen random pairs; read only."""
    folder = tmp_path_factory.mktemp("first")
    data = data_for(fresh(), random_pairs(16))
    trainer = stages.stage_trainer(fresh(), tokenizer, data, parameters=parameters, output_dir=folder)
    trainer.train()
    shaping = {key: value for key, value in dict(parameters).items() if key in params.SHAPING}
    models.save_adapter(trainer.model, folder / "adapter", manifest={"parameters": shaping, "varied": []})
    return folder / "adapter"


def fresh():
    """The tiny base model, loaded anew."""
    return models.load_base(ROOT, models.TINY, dtype="float32")


def random_pairs(count: int, *, seed: int = 0) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(10, 5000, int(rng.integers(low, high))).tolist()

    return [EncodedPair(ids(3, 15), [*ids(1, 12), 2], [*ids(1, 20), 2]) for _ in range(count)]


def pair_table(count: int, *, objective: str = "helpful", split: str = "train") -> pd.DataFrame:
    names = [f"{objective}-{i}" for i in range(count)]
    return pd.DataFrame({"pair_id": names, "prompt_id": names, "objective": objective, "split": split})


def records_for(model, pairs: list[EncodedPair], *, checkpoint: str = "base") -> pd.DataFrame:
    """Per-pair records of a model for encoded pairs."""
    scorer = scoring.Scorer(model, token_budget=300)
    return scorer.records(pair_table(len(pairs)), pairs, checkpoint=checkpoint)


def rows_for(model, pairs: list[EncodedPair]) -> Dataset:
    """Rows of earlier pairs, as `stage_data.prepare_stage` makes them."""
    records = records_for(model, pairs)
    named = {name: records[name].tolist() for name in ("pair_id", "prompt_id")}
    return Dataset.from_dict(stage_data.training_rows(pairs, records).to_dict() | named)


def data_for(model, pairs: list[EncodedPair], **earlier: list[EncodedPair]) -> stage_data.StageData:
    """What a stage trains on and looks back at, its training pairs, with the sums of `model` as reference."""
    records = records_for(model, pairs)
    old = {(name, "train"): rows_for(model, others) for name, others in earlier.items()}
    return stage_data.StageData(stage_data.training_rows(pairs, records), records, old)


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def trained_log(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def scored(base):
    """Eight random pairs with the base model's records."""
    pairs = random_pairs(8)
    return pairs, scoring.Scorer(base, token_budget=128).records(pair_table(8), pairs, checkpoint="base")
