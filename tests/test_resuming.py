"""A stage that was killed goes on from its last whole checkpoint and ends where an undisturbed one ends, to the last bit."""

import shutil

import pandas as pd
import pytest
import torch
from test_measuring import EVERY, later_stage, parameters, stage1  # noqa: F401 (fixtures)
from test_training import adapter_of
from transformers import TrainerCallback

from seqdpo_utils import training
from seqdpo_utils.paths import RunPaths

MEASURED = EVERY | {"ledger_every": 2, "epochs": 2}


class _Killed(BaseException):
    pass


class _KilledAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise _Killed


@pytest.fixture
def stage(root, tokenizer, parameters, stage1, tmp_path):  # noqa: F811
    """Makes a trainer of the second stage over one folder, as a notebook that is started again does."""

    def make(folder="unfinished", **changes):
        trainer, _, _ = later_stage(root, tokenizer, parameters, stage1, **(MEASURED | changes))
        trainer.args.output_dir = str(tmp_path / folder)
        return trainer

    return make


def results(trainer) -> list[pd.DataFrame]:
    return [training.history_table(trainer).drop(columns="seconds"), trainer.conflict_table(), trainer.ledger_table()]


@pytest.mark.parametrize(
    ("step", "changes"),
    [(1, {}), (5, {"lora_dropout": 0.3}), (5, {"pairs_per_device": 2})],
    ids=["before the first checkpoint", "with dropout", "grouped by length"],
)
def test_a_killed_stage_ends_as_an_undisturbed_one(stage, monkeypatch, tmp_path, step, changes):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    undisturbed = stage("undisturbed", **changes)
    training.train(undisturbed)
    killed = stage(**changes)
    killed.add_callback(_KilledAt(step))
    with pytest.raises(_Killed):
        training.train(killed)
    assert {file.name for file in (tmp_path / "unfinished").glob("checkpoint-*")} == ({"checkpoint-2", "checkpoint-4"} if step == 5 else set())
    resumed = stage(**changes)
    steps = []
    resumed.add_callback(type("Steps", (TrainerCallback,), {"on_step_begin": lambda self, args, state, control, **_: steps.append(state.global_step)})())
    training.train(resumed)
    assert steps == list(range(4 if step == 5 else 0, 8))
    weights = adapter_of(undisturbed)
    assert all(torch.equal(p, weights[name]) for name, p in adapter_of(resumed).items())
    for ours, theirs in zip(results(resumed), results(undisturbed), strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_like=True)
    assert len(training.history_table(resumed)["seconds"]) == 8


def test_a_stage_killed_after_its_last_step_does_not_train_again(stage, tmp_path):
    """As when the scoring that follows is killed; the checkpoint after the last step needs no minute to have passed."""
    first = stage()
    training.train(first)
    assert [file.name for file in (tmp_path / "unfinished").glob("checkpoint-*")] == ["checkpoint-8"]
    again = stage()
    again.add_callback(_KilledAt(8))
    training.train(again)
    weights = adapter_of(first)
    assert all(torch.equal(p, weights[name]) for name, p in adapter_of(again).items())
    for ours, theirs in zip(results(again), results(first), strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_like=True)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(stage, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    killed = stage()
    killed.add_callback(_KilledAt(5))
    with pytest.raises(_Killed):
        training.train(killed)
    (tmp_path / "unfinished" / "checkpoint-4" / "measured.json").unlink()
    (tmp_path / "unfinished" / "checkpoint-4" / "trainer_state.json").write_text('{"cut')
    training.train(resumed := stage())
    assert training.history_table(resumed)["step"].tolist() == list(range(1, 9))


@pytest.mark.parametrize("differs", ["parameters", "fingerprints", "previous adapter"])
def test_checkpoints_of_another_stage_are_deleted_and_not_taken(stage1, parameters, tmp_path, differs):  # noqa: F811
    paths = RunPaths(tmp_path, "smoke", "distributional_conflict", "a-then-b", 0)
    shutil.copytree(stage1, paths.checkpoint(1))
    prints = {"data": "1"}
    folder = training.unfinished_stage(paths, 2, parameters=parameters, fingerprints=prints)
    folder.mkdir(parents=True)
    assert training.unfinished_stage(paths, 2, parameters=dict(parameters), fingerprints=dict(prints)) == folder and folder.is_dir()
    if differs == "parameters":
        other = training.unfinished_stage(paths, 2, parameters=parameters | {"learning_rate": 0.5}, fingerprints=prints)
    elif differs == "fingerprints":
        other = training.unfinished_stage(paths, 2, parameters=parameters, fingerprints={"data": "2"})
    else:
        manifest = paths.checkpoint(1) / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"adapter_sha256": "', '"adapter_sha256": "0'))
        other = training.unfinished_stage(paths, 2, parameters=parameters, fingerprints=prints)
    assert other != folder and not folder.exists()
    other.mkdir(parents=True)
    training.stage_done(other)
    assert sorted(file.name for file in paths.checkpoint(1).parent.iterdir()) == ["stage1"]
