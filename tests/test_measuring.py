"""What is measured while a stage trains: it changes nothing, it equals brute force in double precision, and the ledger closes."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_pairs
from peft import PeftModel
from test_training import adapter_of, fresh, rows_for

from seqdpo_utils import ledger, params, training
from seqdpo_utils.paths import StudyError
from seqdpo_utils.trainer import drawn

EVERY = {"conflict_every": 1, "conflict_pairs": 4, "ledger_every": 1, "probe_pairs": 4}
NEVER = {"conflict_every": 0, "probe_pairs": 0}


@pytest.fixture
def parameters(root) -> dict:
    return params.resolve(root, scale="smoke", setting="distributional_conflict") | NEVER


@pytest.fixture
def stage1(root, tokenizer, parameters, tmp_path):
    """The adapter of a first stage on random pairs."""
    rows, _ = rows_for(fresh(root), random_pairs(16))
    trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path)
    trainer.train()
    training.save_adapter(trainer, tmp_path / "stage1", parameters=parameters)
    return tmp_path / "stage1"


def later_stage(root, tokenizer, parameters, previous, *, earlier=(0,), **changes):
    """A trainer of stage 2 (or later: one more for each seed in `earlier`) on random pairs, and its data sets."""
    now, _ = rows_for(fresh(root), random_pairs(16, seed=1), "harmless")
    old = {f"old{seed}": rows_for(fresh(root), random_pairs(16, seed=seed))[0] for seed in earlier}
    options = {"stage": 1 + len(old), "previous": previous, "earlier": old, "output_dir": previous.parent}
    return training.stage_trainer(fresh(root), tokenizer, now, parameters=parameters | changes, **options), now, old


def trained(root, tokenizer, parameters, previous, **changes):
    trainer, _, _ = later_stage(root, tokenizer, parameters, previous, **changes)  # making a trainer sets the seed, so make and train in turn
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("changes", "trl"),
    [
        ({}, {}),
        ({"lora_dropout": 0.3}, {}),
        ({"activation_checkpointing": True}, {}),
        ({"pairs_per_device": 2, "max_grad_norm": 0.01}, {}),
        ({}, {"bf16": True}),
    ],
    ids=["plain", "dropout", "checkpointing", "padded and clipped", "bf16"],
)
def test_measuring_changes_nothing(root, tokenizer, parameters, stage1, monkeypatch, changes, trl):
    monkeypatch.setattr(training, "DPOConfig", lambda **given: training_config(**(given | trl)))
    measured, plain = (trained(root, tokenizer, parameters, stage1, **more, **changes) for more in (EVERY, NEVER))
    weights = adapter_of(plain)
    assert all(torch.equal(p, weights[name]) for name, p in adapter_of(measured).items())
    columns = [name for name in training.history_table(plain) if name != "seconds"]
    pd.testing.assert_frame_equal(training.history_table(measured)[columns], training.history_table(plain)[columns])
    assert set(training.history_table(measured)) == set(training.history_table(plain))
    assert len(measured.conflict_table()) == 4 and len(ledger.segments(measured.ledger_table())) == 4
    assert plain.conflict_table().empty and plain.ledger_table().empty
    if trl:
        monkeypatch.undo()
        other = trained(root, tokenizer, parameters, stage1, **changes)
        assert not np.allclose(training.history_table(other)["loss"], training.history_table(plain)["loss"], rtol=1e-6), f"{trl} was not in force"


training_config = training.DPOConfig


class Doubled:
    """The same adapter in double precision, one unpadded sequence at a time, with nothing of the project in its loss."""

    def __init__(self, root, folder, beta):
        self.model = PeftModel.from_pretrained(fresh(root), folder, is_trainable=True).double()
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.beta = beta

    def gradient(self, weights, rows):
        for p, value in zip(self.weights, weights, strict=True):
            p.data.copy_(value)
        loss = sum(torch.nn.functional.softplus(-self.margin(row)) for row in rows) / len(rows)
        return float(loss.detach()), [g.clone() for g in torch.autograd.grad(loss, self.weights)]

    def margin(self, row):
        gained = [self.logp(row["prompt_ids"], row[f"{side}_ids"]) - row[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
        return self.beta * (gained[0] - gained[1])

    def logp(self, prompt, completion):
        ids = torch.tensor([[*prompt, *completion]])
        logps = torch.log_softmax(self.model(input_ids=ids).logits[0, :-1], dim=1)
        return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def train_and_watch(trainer):
    """Train; the rows of every step's batch in order, and the weights before each step and at the end."""
    batches, weights, step = [], [], trainer.training_step

    def spy(model, inputs, *args):
        if len(batches) % trainer.args.gradient_accumulation_steps == 0:
            weights.append([p.detach().clone() for p in trainer._adapter()])
        batches.append(inputs["input_ids"])
        return step(model, inputs, *args)

    trainer.training_step = spy
    trainer.train()
    return batches, [*weights, [p.detach().clone() for p in trainer._adapter()]]


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def cosine(a, b) -> float:
    return float(torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0))


def test_conflict_equals_brute_force_in_double_precision(root, tokenizer, parameters, stage1):
    trainer, now, old = later_stage(root, tokenizer, parameters, stage1, **EVERY, max_grad_norm=0.05)
    batches, weights = train_and_watch(trainer)
    exact = Doubled(root, stage1, parameters["beta"])
    by_prompt = {tuple(row["prompt_ids"]): row for row in now}
    for k, row in enumerate(trainer.conflict_table().itertuples()):
        ids = [batch[0].tolist() for batch in batches[4 * k : 4 * k + 4]]
        rows = [next(r for prompt, r in by_prompt.items() if tuple(each[: len(prompt)]) == prompt) for each in ids]
        chosen = drawn(16, 4, key=(parameters["seed"], 0, 2, k + 1))
        earlier = [old["old0"][i] for i in chosen]
        (loss_new, new), (loss_old, whole) = (exact.gradient(weights[k], part) for part in (rows, earlier))
        halves = [exact.gradient(weights[k], part)[1] for part in (rows[:2], rows[2:], earlier[:2], earlier[2:])]
        assert (row.step, row.stage, row.previous_objective) == (k + 1, 2, "old0")
        assert (row.loss_new, row.loss_old) == (pytest.approx(loss_new, abs=1e-5), pytest.approx(loss_old, abs=1e-5))
        assert (row.norm_new, row.norm_old) == (pytest.approx(float(flat(new).norm()), rel=1e-4), pytest.approx(float(flat(whole).norm()), rel=1e-4))
        assert row.cosine == pytest.approx(cosine(new, whole), abs=1e-5)
        assert row.within_cosine == pytest.approx(cosine(*halves[2:]), abs=1e-5)
        assert row.within_new_cosine == pytest.approx(cosine(*halves[:2]), abs=1e-5)
        assert row.matched_cosine == pytest.approx(np.mean([cosine(n, o) for n in halves[:2] for o in halves[2:]]), abs=1e-5)
        moved = flat(weights[k + 1]) - flat(weights[k])
        assert row.ledger == pytest.approx(float(flat(whole) @ moved), abs=1e-5)


def test_ledger_equals_brute_force_in_double_precision(root, tokenizer, parameters, stage1):
    """Every entry of every segment, from gradients of the fixed probe pairs at the recorded weights."""
    trainer, _, old = later_stage(root, tokenizer, parameters, stage1, ledger_every=3, probe_pairs=6, pairs_per_device=2)
    _, weights = train_and_watch(trainer)
    exact = Doubled(root, stage1, parameters["beta"])
    probe = [old["old0"][i] for i in drawn(16, 6, key=(parameters["seed"], 0))]
    table = trainer.ledger_table()
    assert table[["from_step", "step"]].drop_duplicates().to_numpy().tolist() == [[0, 3], [3, 4]]
    for (start, end), segment in table.groupby(["from_step", "step"]):
        (loss_a, a), (loss_b, b) = (exact.gradient(weights[k], probe) for k in (start, end))
        moved = [y.double() - x.double() for x, y in zip(weights[start], weights[end], strict=True)]
        entries = {key: [0.0, 0.0] for key in zip(segment["layer"], segment["module"], strict=True)}
        for name, left, right, m in zip(exact.names, a, b, moved, strict=True):
            layer, module = int(name.split(".layers.")[1].split(".")[0]), name.split(".lora_")[0].rpartition(".")[2]
            entries[layer, module][0] += float(((left + right) / 2 * m).sum())
            entries[layer, module][1] += float((left * m).sum())
        found = segment[["term", "left"]].to_numpy().tolist()
        assert np.allclose(found, list(entries.values()), rtol=1e-4, atol=1e-6)
        assert segment["loss_before"].tolist() == pytest.approx([loss_a] * len(segment), abs=1e-5)
        assert segment["loss_after"].tolist() == pytest.approx([loss_b] * len(segment), abs=1e-5)
        assert np.abs(found).max() > 1e-3


def closing_gap(root, tokenizer, parameters, stage1, rate) -> tuple[float, float, float]:
    """Measured change, and what the trapezoids and the left ends leave of it, as shares, for one learning rate."""
    trainer, _, _ = later_stage(root, tokenizer, parameters, stage1, ledger_every=1, probe_pairs=16, learning_rate=rate)
    trainer.train()
    total = ledger.totals(trainer.ledger_table(), dtype="float32").iloc[0]
    return total["measured"], abs(total["rest"] / total["measured"]), abs((total["measured"] - total["left"]) / total["measured"])


def test_the_ledger_closes_and_closes_faster_with_smaller_steps(root, tokenizer, parameters, stage1):
    """The trapezoid's relative gap is of second order in the step, that of the left end of first order."""
    rates = (8e-3, 4e-3, 2e-3)
    gaps = [closing_gap(root, tokenizer, parameters, stage1, rate) for rate in rates]
    assert all(abs(measured) > 3e-3 for measured, _, _ in gaps), "a change near rounding would prove nothing"
    assert gaps[-1][1] < 0.01
    for (_, coarse, coarse_left), (_, fine, fine_left) in itertools.pairwise(gaps):
        assert 2.5 < coarse / fine < 6
        assert 1.4 < coarse_left / fine_left < 3


def test_a_wrong_sign_or_a_displacement_of_the_step_before_would_not_close(root, tokenizer, parameters, stage1):
    """What the closing test can tell: the same gradients with a wrong displacement miss the measured change by far."""
    trainer, _, old = later_stage(root, tokenizer, parameters, stage1, ledger_every=1, probe_pairs=16, learning_rate=4e-3)
    _, weights = train_and_watch(trainer)
    adapter = trainer._adapter()
    points = []
    for k, values in enumerate(weights):
        for p, value in zip(adapter, values, strict=True):
            p.data.copy_(value)
        points.append(ledger.ProbePoint(k, *trainer._gradient_of(list(old["old0"]), adapter)))
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    moves = [[b - a for a, b in zip(x, y, strict=True)] for x, y in itertools.pairwise(weights)]

    def gap(displacements) -> float:
        """What the entries leave of the segments' measured changes, in all, as a share of them."""
        terms = [sum(row["term"] for row in ledger.segment_rows(names, points[k], points[k + 1], moved)) for k, moved in enumerate(displacements)]
        changes = [b.loss - a.loss for a, b in itertools.pairwise(points)]
        return sum(abs(change - term) for change, term in zip(changes, terms, strict=True)) / sum(map(abs, changes))

    assert gap(moves) < 0.01
    assert gap([[-m for m in moved] for moved in moves]) == pytest.approx(2, abs=0.01)
    assert gap([[torch.zeros_like(m) for m in moves[0]], *moves[:-1]]) > 0.2
    assert gap([*moves[1:], moves[0]]) > 0.2


def test_a_third_stage_measures_both_earlier_objectives(root, tokenizer, parameters, stage1):
    trainer, *_ = later_stage(root, tokenizer, parameters, stage1, earlier=(0, 7), conflict_every=2, conflict_pairs=4, ledger_every=3, probe_pairs=4)
    calls = []
    gradient = trainer._gradient_of
    trainer._gradient_of = lambda rows, adapter: calls.append(len(rows)) or gradient(rows, adapter)
    trainer.train()
    conflict, table = trainer.conflict_table(), trainer.ledger_table()
    assert conflict[["step", "previous_objective"]].to_numpy().tolist() == [[1, "old0"], [1, "old7"], [3, "old0"], [3, "old7"]]
    assert set(conflict["stage"]) == set(table["stage"]) == {3}
    assert ledger.segments(table)[["previous_objective", "from_step", "step"]].to_numpy().tolist() == [
        ["old0", 0, 3], ["old7", 0, 3], ["old0", 3, 4], ["old7", 3, 4]
    ]  # fmt: skip
    assert conflict["norm_old"].nunique() == 4
    assert sorted(calls) == [2] * 8 + [4] * 6, "two halves a conflict, and a point before the first step, after step 3 and after the last: each once"


def test_measured_numbers_stand_in_the_trainers_own_log(root, tokenizer, parameters, stage1):
    trainer = trained(root, tokenizer, parameters, stage1, conflict_every=3, conflict_pairs=4, ledger_every=2, probe_pairs=4)
    log = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    conflict = trainer.conflict_table().set_index("step")
    for step in (1, 4):
        for key in ("cosine", "matched_cosine", "within_cosine", "norm_old", "ledger"):
            assert log[step][f"conflict/old0/{key}"] == pytest.approx(conflict.loc[step, key], rel=1e-3, abs=1e-6)
    assert not [key for key in log[2] if key.startswith("conflict/")]
    terms = ledger.segments(trainer.ledger_table()).set_index("step")["term"]
    assert [log[step]["ledger/old0/term"] for step in (2, 4)] == pytest.approx(terms.tolist(), rel=1e-3, abs=1e-6)
    assert [step for step in log if "ledger/old0/loss" in log[step]] == [2, 4]


def test_a_batch_that_was_not_accumulated_has_no_halves(root, tokenizer, parameters, stage1):
    trainer = trained(root, tokenizer, parameters, stage1, conflict_every=1, conflict_pairs=4, pairs_per_device=4)
    table = trainer.conflict_table()
    assert table[["matched_cosine", "within_new_cosine", "corrected_cosine"]].isna().all(axis=None)
    assert table[["cosine", "within_cosine", "dot", "ledger"]].notna().all(axis=None)
    assert not [key for entry in trainer.state.log_history for key in entry if key.endswith("matched_cosine")]
    assert np.isfinite(training.history_table(trainer)["loss"]).all()


def test_a_short_last_batch_has_no_halves_and_the_others_keep_theirs(root, tokenizer, parameters, stage1):
    now, _ = rows_for(fresh(root), random_pairs(14, seed=1), "harmless")
    old, _ = rows_for(fresh(root), random_pairs(16))
    options = {"stage": 2, "previous": stage1, "earlier": {"old0": old}, "output_dir": stage1.parent}
    trainer = training.stage_trainer(fresh(root), tokenizer, now, parameters=parameters | EVERY, **options)
    trainer.train()
    assert trainer.conflict_table()["matched_cosine"].isna().tolist() == [False, False, False, True]
    assert trainer.conflict_table()["cosine"].notna().all()
    assert ledger.segments(trainer.ledger_table())["step"].tolist() == [1, 2, 3, 4]


def test_draws_follow_their_key_and_nothing_else():
    one, same, *others = (drawn(50, 8, key=key) for key in ((0, 1, 2, 3), (0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)))
    assert one == same and one not in others
    assert len(set(one)) == 8 and max(one) < 50
    assert sorted(drawn(5, 5, key=(0,))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"), [({"conflict_every": 1, "conflict_pairs": 40}, "conflict_pairs = 40"), ({"probe_pairs": 17}, "probe_pairs = 17")]
)
def test_more_pairs_than_there_are_is_refused_before_the_first_step(root, tokenizer, parameters, stage1, changes, message):
    with pytest.raises(StudyError, match=f"{message} exceeds the 16 training pairs of old0: lower it or raise train_pairs"):
        later_stage(root, tokenizer, parameters, stage1, **changes)
