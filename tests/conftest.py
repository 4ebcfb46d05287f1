"""Fixtures: the project's folder, a tiny random Llama, and pairs made of its tokens."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from seqdpo_utils import models, params, scoring
from seqdpo_utils.encoding import EncodedPair

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tokenizer(root):
    models.prepare_model(root, models.TINY)
    return models.load_tokenizer(root, models.TINY)


@pytest.fixture
def base(root, tokenizer):
    return models.load_base(root, models.TINY, dtype="float32")


@pytest.fixture
def parameters(root) -> dict:
    """The smoke scale on the first setting, without conflict measurement."""
    return params.resolve(root, scale="smoke", setting="distributional_conflict") | {"conflict_every": 0}


def random_pairs(count: int, *, seed: int = 0) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(10, 5000, int(rng.integers(low, high))).tolist()

    return [EncodedPair(ids(3, 15), [*ids(1, 12), 2], [*ids(1, 20), 2]) for _ in range(count)]


def pair_table(count: int, *, objective: str = "helpful", split: str = "train") -> pd.DataFrame:
    names = [f"{objective}-{i}" for i in range(count)]
    return pd.DataFrame({"pair_id": names, "prompt_id": names, "objective": objective, "split": split})


@pytest.fixture
def scored(base):
    """Eight random pairs with the base model's records."""
    pairs = random_pairs(8)
    return pairs, scoring.score_pairs(base, pair_table(8), pairs, checkpoint="base", token_budget=128)
