"""One stage in two processes gives what one process gives. Two gloo processes on the CPU stand for two GPUs."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from safetensors.torch import load_file

from seqdpo_utils import training
from seqdpo_utils.paths import StudyError, read_json

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from conftest import ROOT, pair_table, random_pairs
from seqdpo_utils import models, params, paths, scoring, training

out = Path(sys.argv[1])
flat = params.resolve(ROOT, scale="smoke", setting="distributional_conflict") | {"conflict_every": 1, "conflict_pairs": 4}
tokenizer, base = models.load_tokenizer(ROOT, models.TINY), models.load_base(ROOT, models.TINY, dtype="float32")
made = []
for objective, seed in (("helpful", 0), ("harmless", 1)):
    pairs = random_pairs(16, seed=seed)
    scores = scoring.score_pairs(base, pair_table(16, objective=objective), pairs, checkpoint="base", token_budget=300)
    made.append((training.training_rows(pairs, scores), scores))
(rows, scores), (earlier, _) = made
trainer = training.stage_trainer(base, tokenizer, rows, parameters=flat, output_dir=out / "scratch", stage=2, earlier={"harmless": earlier})
training.prove_reference(trainer, scores)
trainer.train()
paths.write_json(out / "processes.json", {"processes": trainer.accelerator.num_processes})
manifest = training.save_adapter(trainer, out / "stage2", parameters=flat)
paths.write_table(out / "conflict.parquet", trainer.conflict_table())
paths.write_table(out / "history.parquet", training.history_table(trainer))
assert paths.read_json(out / "stage2" / "manifest.json") == manifest and len(paths.read_table(out / "conflict.parquet")) == 4
"""
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # what `accelerate launch` runs for GPUs; for CPUs it wants MPI


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder that one process wrote, and the one that two wrote together."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "train.py").write_text(PROGRAM)
    for name, launch in (("one", []), ("two", LAUNCH)):
        (folder / name).mkdir()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, *launch, str(folder / "train.py"), str(folder / name)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two"


def test_two_processes_train_the_weights_that_one_trains(both):
    one, two = (load_file(folder / "stage2" / "adapter_model.safetensors") for folder in both)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
    assert max(float(one[name].abs().max()) for name in one if "lora_B" in name) > 1e-3, "something was trained"


def test_two_processes_measure_what_one_measures(both):
    one, two = (pd.read_parquet(folder / "conflict.parquet") for folder in both)
    numbers = one.select_dtypes("number").columns
    assert np.allclose(one[numbers].astype(float), two[numbers].astype(float), rtol=1e-3, atol=1e-5, equal_nan=True)
    logs = [pd.read_parquet(folder / "history.parquet") for folder in both]
    for name in ("loss", "grad_norm", "rewards/margins", "learning_rate"):
        assert np.allclose(logs[0][name], logs[1][name], rtol=1e-3, atol=1e-5), name


def test_only_the_first_process_leaves_files(both):
    assert [read_json(folder / "processes.json")["processes"] for folder in both] == [1, 2]
    assert sorted(file.name for file in both[0].iterdir()) == sorted(file.name for file in both[1].iterdir())
    assert read_json(both[1] / "stage2" / "manifest.json")["parameters"] == json.loads((both[0] / "stage2" / "manifest.json").read_text())["parameters"]


def test_pairs_that_processes_cannot_share_are_refused(parameters, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(StudyError, match="pairs_per_step = 4 is no multiple of pairs_per_device = 1 times 3 processes"):
        training.dpo_config(parameters, pairs=16, output_dir=tmp_path)
