"""A stage that was killed goes on from its last whole checkpoint and ends where an undisturbed one ends, to
the last bit."""

import shutil

import pandas as pd
import pytest
import torch
from conftest import adapter_of, data_for, fresh, random_pairs
from transformers import TrainerCallback

from seqdpo_utils import stages
from seqdpo_utils.paths import RunPaths

MEASURED = {"conflict_every": 1, "conflict_pairs": 4, "ledger_pairs": 4, "ledger_every": 2, "epochs": 2}


class _Killed(BaseException):
    pass


class _KilledAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise _Killed


@pytest.fixture
def stage(tokenizer, parameters, stage1, tmp_path):
    """Makes a trainer of the second stage over one folder, as a notebook that is started again does."""

    def make(folder="unfinished", **changes):
        data = data_for(fresh(), random_pairs(16, seed=1), old=random_pairs(16))
        given = parameters.model_copy(update={"chain": "old-then-new", **MEASURED, **changes})
        options = {"parameters": given, "output_dir": tmp_path / folder, "previous": stage1}
        return stages.stage_trainer(fresh(), tokenizer, data, **options)

    return make


def results(trainer) -> list[pd.DataFrame]:
    return [
        stages.history_table(trainer).drop(columns="seconds"),
        trainer.conflict_table(),
        trainer.ledger_table(),
    ]


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (1, {}),
        (5, {"lora_dropout": 0.3}),
        (5, {"pairs_per_device": 2}),
        (5, {"projection": "placebo", "reference": 0.5}),
    ],
    ids=["before the first checkpoint", "with dropout", "grouped by length", "projected, mixed reference"],
)
def test_a_killed_stage_ends_as_an_undisturbed_one(stage, monkeypatch, tmp_path, step, changes):
    monkeypatch.setattr(stages, "CHECKPOINT_SECONDS", 0.0)
    undisturbed = stage("undisturbed", **changes)
    stages.train(undisturbed)
    killed = stage(**changes)
    killed.add_callback(_KilledAt(step))
    with pytest.raises(_Killed):
        stages.train(killed)
    assert {file.name for file in (tmp_path / "unfinished").glob("checkpoint-*")} == (
        {"checkpoint-2", "checkpoint-4"} if step == 5 else set()
    )
    resumed = stage(**changes)
    steps = []
    resumed.add_callback(
        type(
            "Steps",
            (TrainerCallback,),
            {"on_step_begin": lambda self, args, state, control, **_: steps.append(state.global_step)},
        )()
    )
    stages.train(resumed)
    assert steps == list(range(4 if step == 5 else 0, 8))
    weights = adapter_of(undisturbed)
    assert all(torch.equal(p, weights[name]) for name, p in adapter_of(resumed).items())
    for ours, theirs in zip(results(resumed), results(undisturbed), strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_like=True)
    assert len(stages.history_table(resumed)["seconds"]) == 8


def test_a_stage_killed_after_its_last_step_does_not_train_again(stage, tmp_path):
    """As when the scoring that follows is killed; the checkpoint after the last step needs no minute to have
    passed."""
    first = stage()
    stages.train(first)
    assert [file.name for file in (tmp_path / "unfinished").glob("checkpoint-*")] == ["checkpoint-8"]
    again = stage()
    again.add_callback(_KilledAt(8))
    stages.train(again)
    weights = adapter_of(first)
    assert all(torch.equal(p, weights[name]) for name, p in adapter_of(again).items())
    for ours, theirs in zip(results(again), results(first), strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_like=True)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(stage, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "CHECKPOINT_SECONDS", 0.0)
    killed = stage()
    killed.add_callback(_KilledAt(5))
    with pytest.raises(_Killed):
        stages.train(killed)
    (tmp_path / "unfinished" / "checkpoint-4" / "measured.json").unlink()
    (tmp_path / "unfinished" / "checkpoint-4" / "trainer_state.json").write_text('{"cut')
    stages.train(resumed := stage())
    assert stages.history_table(resumed)["step"].tolist() == list(range(1, 9))


@pytest.mark.parametrize("differs", ["parameters", "fingerprints", "previous adapter"])
def test_checkpoints_of_another_stage_are_deleted_and_not_taken(stage1, parameters, tmp_path, differs):
    run = RunPaths(tmp_path, "smoke", "distributional_conflict", "a-then-b", 0)
    shutil.copytree(stage1, run.previous)
    prints = {"data": "1"}
    folder = stages.unfinished_folder(run, parameters=parameters, fingerprints=prints)
    folder.mkdir(parents=True)
    again = stages.unfinished_folder(run, parameters=parameters.model_copy(), fingerprints=dict(prints))
    assert again == folder and folder.is_dir()
    if differs == "parameters":
        parameters = parameters.model_copy(update={"learning_rate": 0.5})
    elif differs == "fingerprints":
        prints = {"data": "2"}
    else:
        manifest = run.previous / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"adapter_sha256": "', '"adapter_sha256": "0'))
    other = stages.unfinished_folder(run, parameters=parameters, fingerprints=prints)
    assert other != folder and not folder.exists()
