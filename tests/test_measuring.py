"""What is measured while a stage trains: it changes nothing, it equals brute force in double precision, and
the ledger closes."""

import itertools
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import adapter_of, data_for, fresh, random_pairs, rows_for, trained_log
from peft import PeftModel
from scipy import stats
from trl import DPOTrainer

from seqdpo_utils import ledger, stage_data, stages
from seqdpo_utils.errors import StudyError
from seqdpo_utils.measuring import drawn, pick, project, turned

EVERY = {"conflict_every": 1, "conflict_pairs": 4, "ledger_every": 1, "ledger_pairs": 4}
NEVER = {"conflict_every": 0, "ledger_pairs": 0}
SEED = stage_data.stage_seed("a-then-b", 0)  # of the draws of the stage under test


@pytest.fixture
def later(tokenizer, parameters, stage1, tmp_path):
    """Makes a trainer of stage 2 (or later: one more for each seed in `earlier`) on random pairs, and its
    data."""

    def make(*, earlier=(0,), pairs=16, output_dir=tmp_path, **changes):
        old = {f"old{seed}": random_pairs(16, seed=seed) for seed in earlier}
        data = data_for(fresh(), random_pairs(pairs, seed=1), **old)
        given = parameters.model_copy(update={"chain": "-then-".join([*old, "new"]), **changes})
        options = {"parameters": given, "output_dir": output_dir, "previous": stage1}
        return stages.stage_trainer(fresh(), tokenizer, data, **options), data

    return make


@pytest.fixture
def trained(later):
    """Makes and trains: making a trainer sets the seed, so one is trained before the next is made."""

    def make(**changes):
        trainer, _ = later(**changes)
        trainer.train()
        return trainer

    return make


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
def test_measuring_changes_nothing(trained, monkeypatch, changes, trl):
    monkeypatch.setattr(stages, "DPOConfig", lambda **given: trl_config(**(given | trl)))
    measured, plain = (trained(**more, **changes) for more in (EVERY, NEVER))
    weights = adapter_of(plain)
    assert all(torch.equal(p, weights[name]) for name, p in adapter_of(measured).items())
    columns = [name for name in stages.history_table(plain) if name != "seconds"]
    pd.testing.assert_frame_equal(
        stages.history_table(measured)[columns], stages.history_table(plain)[columns]
    )
    assert set(stages.history_table(measured)) == set(stages.history_table(plain))
    assert len(measured.conflict_table()) == 4 and len(ledger.segments(measured.ledger_table())) == 4
    assert plain.conflict_table().empty and plain.ledger_table().empty
    if trl:
        monkeypatch.undo()
        other = trained(**changes)
        assert not np.allclose(
            stages.history_table(other)["loss"], stages.history_table(plain)["loss"], rtol=1e-6
        ), f"{trl} was not in force"


trl_config = stages.DPOConfig


class Doubled:
    """The same adapter in double precision, one unpadded sequence at a time, with nothing of the project in
    its loss."""

    def __init__(self, folder, beta):
        self.model = PeftModel.from_pretrained(fresh(), folder, is_trainable=True).double()
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.beta = beta

    def gradient(self, weights, rows):
        for p, value in zip(self.weights, weights, strict=True):
            p.data.copy_(value)
        loss = sum(torch.nn.functional.softplus(-self.margin(row)) for row in rows) / len(rows)
        return float(loss.detach()), [g.clone() for g in torch.autograd.grad(loss, self.weights)]

    def margin(self, row):
        gained = [
            self.logp(row["prompt_ids"], row[f"{side}_ids"]) - row[f"ref_{side}_logps"]
            for side in ("chosen", "rejected")
        ]
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


def test_conflict_equals_brute_force_in_double_precision(later, parameters, stage1):
    trainer, data = later(**EVERY, max_grad_norm=0.05)
    now, old = data.rows, data.earlier
    batches, weights = train_and_watch(trainer)
    exact = Doubled(stage1, parameters.beta)
    by_prompt = {tuple(row["prompt_ids"]): row for row in now}
    for k, row in enumerate(trainer.conflict_table().itertuples()):
        ids = [batch[0].tolist() for batch in batches[4 * k : 4 * k + 4]]
        rows = [
            next(r for prompt, r in by_prompt.items() if tuple(each[: len(prompt)]) == prompt) for each in ids
        ]
        chosen = drawn(16, 4, key=(SEED, 0, 2, k + 1))
        earlier = [old["old0", "train"][i] for i in chosen]
        (loss_new, new), (loss_old, whole) = (exact.gradient(weights[k], part) for part in (rows, earlier))
        halves = [
            exact.gradient(weights[k], part)[1] for part in (rows[:2], rows[2:], earlier[:2], earlier[2:])
        ]
        assert (row.step, row.stage, row.previous_objective) == (k + 1, 2, "old0")
        assert (row.loss_new, row.loss_old) == (
            pytest.approx(loss_new, abs=1e-5),
            pytest.approx(loss_old, abs=1e-5),
        )
        assert (row.norm_new, row.norm_old) == (
            pytest.approx(float(flat(new).norm()), rel=1e-4),
            pytest.approx(float(flat(whole).norm()), rel=1e-4),
        )
        assert row.cosine == pytest.approx(cosine(new, whole), abs=1e-5)
        assert row.within_cosine == pytest.approx(cosine(*halves[2:]), abs=1e-5)
        assert row.within_new_cosine == pytest.approx(cosine(*halves[:2]), abs=1e-5)
        assert row.matched_cosine == pytest.approx(
            np.mean([cosine(n, o) for n in halves[:2] for o in halves[2:]]), abs=1e-5
        )
        moved = flat(weights[k + 1]) - flat(weights[k])
        assert row.ledger == pytest.approx(float(flat(whole) @ moved), abs=1e-5)


def test_ledger_equals_brute_force_in_double_precision(later, parameters, stage1):
    """Every entry of every segment, from gradients of the fixed probe pairs at the recorded weights."""
    trainer, data = later(ledger_every=3, ledger_pairs=6, pairs_per_device=2)
    _, weights = train_and_watch(trainer)
    exact = Doubled(stage1, parameters.beta)
    probe = [data.earlier["old0", "train"][i] for i in drawn(16, 6, key=(SEED, 0))]
    table = trainer.ledger_table()
    assert table[["from_step", "step"]].drop_duplicates().to_numpy().tolist() == [[0, 3], [3, 4]]
    for (start, end), segment in table.groupby(["from_step", "step"]):
        (loss_a, a), (loss_b, b) = (exact.gradient(weights[k], probe) for k in (start, end))
        moved = [y.double() - x.double() for x, y in zip(weights[start], weights[end], strict=True)]
        entries = {key: [0.0, 0.0] for key in zip(segment["layer"], segment["module"], strict=True)}
        for name, left, right, m in zip(exact.names, a, b, moved, strict=True):
            layer, module = (
                int(name.split(".layers.")[1].split(".")[0]),
                name.split(".lora_")[0].rpartition(".")[2],
            )
            entries[layer, module][0] += float(((left + right) / 2 * m).sum())
            entries[layer, module][1] += float((left * m).sum())
        found = segment[["term", "left"]].to_numpy().tolist()
        assert np.allclose(found, list(entries.values()), rtol=1e-4, atol=1e-6)
        assert segment["loss_before"].tolist() == pytest.approx([loss_a] * len(segment), abs=1e-5)
        assert segment["loss_after"].tolist() == pytest.approx([loss_b] * len(segment), abs=1e-5)
        assert np.abs(found).max() > 1e-3


def test_the_ledger_pair_by_pair_equals_brute_force_and_adds_up(later, parameters, stage1):
    """On the pairs of two splits: each pair's own gradients at the two ends, and their mean is the ledger."""
    trainer, _ = later(ledger_every=2, ledger_pairs=3)
    trainer._probes["old0", "probe"] = pick(rows_for(fresh(), random_pairs(8, seed=5)), 3, key=(SEED, 1))
    _, weights = train_and_watch(trainer)
    exact, table = Doubled(stage1, parameters.beta), trainer.ledger_pairs_table()
    assert table.groupby(["split", "from_step"])["pair_id"].nunique().tolist() == [3, 3, 3, 3]
    for row in table.itertuples():
        pair = next(each for each in trainer._probes["old0", row.split] if each["pair_id"] == row.pair_id)
        (loss_a, a), (loss_b, b) = (exact.gradient(weights[k], [pair]) for k in (row.from_step, row.step))
        moved = [
            y.double() - x.double() for x, y in zip(weights[row.from_step], weights[row.step], strict=True)
        ]
        left, right = (sum(float((g * m).sum()) for g, m in zip(end, moved, strict=True)) for end in (a, b))
        assert (row.left, row.term) == pytest.approx((left, (left + right) / 2), rel=1e-3, abs=1e-6)
        assert (row.loss_before, row.loss_after) == pytest.approx((loss_a, loss_b), abs=1e-5)
    whole, mean = (
        ledger.segments(trainer.ledger_table()),
        table.groupby(["split", "from_step"])[["term", "left"]].mean(),
    )
    found = whole.set_index(["split", "from_step"])[["term", "left"]].sort_index()
    assert np.allclose(found, mean, rtol=1e-6)
    changed = ledger.with_intervals(ledger.by_pair(table)).set_index("split")
    sums = table.assign(d=table["loss_after"] - table["loss_before"]).groupby(["split", "pair_id"])["d"].sum()
    for split, each in sums.groupby("split"):
        low, high = stats.t.interval(0.95, 2, each.mean(), stats.sem(each))
        bounds = changed.loc[split, ["measured", "measured_low", "measured_high"]].tolist()
        assert bounds == pytest.approx([each.mean(), low, high])


def closing_gap(trained, rate) -> tuple[float, float, float]:
    """Measured change, and what the trapezoids and the left ends leave of it, as shares, for one learning
    rate."""
    trainer = trained(ledger_every=1, ledger_pairs=16, learning_rate=rate, seed=4)
    total = ledger.totals(trainer.ledger_table(), dtype="float32").iloc[0]
    return (
        total["measured"],
        abs(total["rest"] / total["measured"]),
        abs((total["measured"] - total["left"]) / total["measured"]),
    )


def test_the_ledger_closes_and_closes_faster_with_smaller_steps(trained):
    """The trapezoid's relative gap is of second order in the step, that of the left end of first order."""
    rates = (8e-3, 4e-3, 2e-3)
    gaps = [closing_gap(trained, rate) for rate in rates]
    assert all(abs(measured) > 3e-3 for measured, _, _ in gaps), "a change near rounding would prove nothing"
    assert gaps[-1][1] < 0.01
    for (_, coarse, coarse_left), (_, fine, fine_left) in itertools.pairwise(gaps):
        assert 2.5 < coarse / fine < 6
        assert 1.4 < coarse_left / fine_left < 3


def test_a_wrong_sign_or_a_displacement_of_the_step_before_would_not_close(later):
    """What the closing test can tell: the same gradients with a wrong displacement miss the measured change
    by far."""
    trainer, data = later(ledger_every=1, ledger_pairs=16, learning_rate=4e-3)
    _, weights = train_and_watch(trainer)
    adapter = trainer._adapter()
    points = []
    for k, values in enumerate(weights):
        for p, value in zip(adapter, values, strict=True):
            p.data.copy_(value)
        loss, gradient = trainer._gradient_of(list(data.earlier["old0", "train"]))
        points.append(ledger.ProbePoint(k, [loss], [gradient]))
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    moves = [[b - a for a, b in zip(x, y, strict=True)] for x, y in itertools.pairwise(weights)]

    def gap(displacements) -> float:
        """What the entries leave of the segments' measured changes, in all, as a share of them."""
        terms = [
            sum(row["term"] for row in ledger.segment_rows(names, points[k], points[k + 1], moved)[0])
            for k, moved in enumerate(displacements)
        ]
        changes = [b.losses[0] - a.losses[0] for a, b in itertools.pairwise(points)]
        return sum(abs(change - term) for change, term in zip(changes, terms, strict=True)) / sum(
            map(abs, changes)
        )

    assert gap(moves) < 0.01
    assert gap([[-m for m in moved] for moved in moves]) == pytest.approx(2, abs=0.01)
    assert gap([[torch.zeros_like(m) for m in moves[0]], *moves[:-1]]) > 0.2
    assert gap([*moves[1:], moves[0]]) > 0.2


def test_a_third_stage_measures_both_earlier_objectives(later):
    trainer, _ = later(earlier=(0, 7), conflict_every=2, conflict_pairs=4, ledger_every=3, ledger_pairs=4)
    calls = []
    gradient = trainer._gradient_of
    trainer._gradient_of = lambda rows: calls.append(len(rows)) or gradient(rows)
    trainer.train()
    conflict, table = trainer.conflict_table(), trainer.ledger_table()
    assert conflict[["step", "previous_objective"]].to_numpy().tolist() == [
        [1, "old0"],
        [1, "old7"],
        [3, "old0"],
        [3, "old7"],
    ]
    assert set(conflict["stage"]) == set(table["stage"]) == {3}
    assert ledger.segments(table)[["previous_objective", "from_step", "step"]].to_numpy().tolist() == [
        ["old0", 0, 3], ["old7", 0, 3], ["old0", 3, 4], ["old7", 3, 4]
    ]  # fmt: skip
    assert conflict["norm_old"].nunique() == 4
    assert sorted(calls) == [1] * 24 + [2] * 8, (
        "two halves a conflict; each pair of a point before the first step, after step 3, after the last"
    )


def test_measured_numbers_stand_in_the_trainers_own_log(trained):
    trainer = trained(conflict_every=3, conflict_pairs=4, ledger_every=2, ledger_pairs=4)
    log = {entry["step"]: entry for entry in trained_log(trainer)}
    conflict = trainer.conflict_table().set_index("step")
    for step in (1, 4):
        for key in ("cosine", "matched_cosine", "within_cosine", "norm_old", "ledger"):
            assert log[step][f"conflict/old0/train/{key}"] == pytest.approx(
                conflict.loc[step, key], rel=1e-3, abs=1e-6
            )
    assert not [key for key in log[2] if key.startswith("conflict/")]
    terms = ledger.segments(trainer.ledger_table()).set_index("step")["term"]
    assert [log[step]["ledger/old0/train/term"] for step in (2, 4)] == pytest.approx(
        terms.tolist(), rel=1e-3, abs=1e-6
    )
    assert [step for step in log if "ledger/old0/train/loss" in log[step]] == [2, 4]


def test_a_batch_that_was_not_accumulated_has_no_halves(trained):
    trainer = trained(conflict_every=1, conflict_pairs=4, pairs_per_device=4)
    table = trainer.conflict_table()
    assert table[["matched_cosine", "within_new_cosine", "corrected_cosine"]].isna().all(axis=None)
    assert table[["cosine", "within_cosine", "dot", "ledger"]].notna().all(axis=None)
    assert not [key for entry in trainer.state.log_history for key in entry if key.endswith("matched_cosine")]
    assert np.isfinite(stages.history_table(trainer)["loss"]).all()


def test_a_short_last_batch_has_no_halves_and_the_others_keep_theirs(trained):
    trainer = trained(pairs=14, **EVERY)
    assert trainer.conflict_table()["matched_cosine"].isna().tolist() == [False, False, False, True]
    assert trainer.conflict_table()["cosine"].notna().all()
    assert ledger.segments(trainer.ledger_table())["step"].tolist() == [1, 2, 3, 4]


def test_draws_follow_their_key_and_nothing_else():
    one, same, *others = (
        drawn(50, 8, key=key)
        for key in ((0, 1, 2, 3), (0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4))
    )
    assert one == same and one not in others
    assert len(set(one)) == 8 and max(one) < 50
    assert sorted(drawn(5, 5, key=(0,))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conflict_every": 1, "conflict_pairs": 40}, "conflict_pairs = 40"),
        ({"projection": "earlier", "conflict_pairs": 40}, "conflict_pairs = 40"),
        ({"ledger_pairs": 17}, "ledger_pairs = 17"),
    ],
)
def test_more_pairs_than_there_are_is_refused_before_the_first_step(later, changes, message):
    with pytest.raises(
        StudyError, match=f"{message} exceeds the 16 train pairs of old0: lower it or raise train_pairs"
    ):
        later(**changes)


# ---- projected steps ----


def test_a_step_loses_what_would_raise_the_earlier_loss_and_nothing_else():
    before, gradient = [torch.tensor([1.0, 1.0])], [torch.tensor([3.0, 4.0])]
    weights = [torch.tensor([2.0, 1.5])]  # moved by (1, 0.5): g . d = 5 of |g|^2 = 25
    assert project(weights, before=before, against=gradient) == pytest.approx(5.0)
    assert torch.allclose(weights[0], torch.tensor([2.0 - 0.6, 1.5 - 0.8]))
    assert float(((weights[0] - before[0]) * gradient[0]).sum()) == pytest.approx(0, abs=1e-6)
    lowering = [torch.tensor([0.0, 1.0])]
    assert project(lowering, before=before, against=gradient) == pytest.approx(-3.0)
    assert torch.equal(lowering[0], torch.tensor([0.0, 1.0])), (
        "a step that lowers the earlier loss is left alone"
    )


def test_a_turned_row_is_the_other_label():
    row = {
        "prompt_ids": [1],
        "chosen_ids": [2],
        "rejected_ids": [3, 4],
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
    }
    other = turned(row)
    assert (other["chosen_ids"], other["rejected_ids"], other["prompt_ids"]) == ([3, 4], [2], [1])
    assert (other["ref_chosen_logps"], other["ref_rejected_logps"]) == (-2.0, -1.0) and turned(other) == row


@pytest.mark.parametrize("projection", ["earlier", "placebo"])
def test_projected_steps_equal_brute_force(later, parameters, stage1, projection):
    """Each step of the run, from gradients in double precision, on the pairs that the key draws."""
    trainer, data = later(projection=projection, conflict_pairs=4)
    steps, finish = [], trainer.finish_step

    def spy(*, last):
        steps.append(
            [
                torch.cat([p.detach().flatten() for p in part])
                for part in (trainer._before, trainer._adapter())
            ]
        )
        gradient = torch.cat([g.flatten() for g in trainer._held_back])
        finish(last=last)
        steps[-1] += [torch.cat([p.detach().flatten() for p in trainer._adapter()]), gradient]

    trainer.finish_step = spy
    _, weights = train_and_watch(trainer)
    exact, pool, changed = Doubled(stage1, parameters.beta), list(data.earlier["old0", "train"]), 0
    for k, (start, free, kept, used) in enumerate(steps):
        chosen = drawn(16, 4, key=(SEED, 1 << 20, 2, k + 1))
        coins = np.random.default_rng((SEED, 1 << 20, 2)).random(16) < 0.5
        rows = [turned(pool[i]) if projection == "placebo" and coins[i] else pool[i] for i in chosen]
        gradient = flat(exact.gradient(weights[k], rows)[1])
        assert torch.allclose(used.double(), gradient, atol=1e-5)
        rise = float(gradient @ (free.double() - start.double()))
        expected = free.double() - max(0.0, rise) * gradient / float(gradient @ gradient)
        assert torch.allclose(kept.double(), expected, atol=1e-6)
        changed += rise > 0
    assert changed, "no step had anything to hold back: the test would prove nothing"


def test_projection_keeps_the_earlier_loss_lower_than_the_plain_stage(later):
    """The later labels oppose the earlier ones on the same pairs: the plain stage undoes them, the projected
    one less."""
    losses = {}
    for projection in (None, "earlier"):
        trainer, data = later(projection=projection, conflict_pairs=16, ledger_pairs=16, ledger_every=4)
        rows = data.earlier["old0", "train"]
        trainer.train_dataset = rows.from_list([turned(row) for row in rows])
        trainer.train()
        losses[projection] = trainer.ledger_table()["loss_after"].iloc[-1]
    assert losses["earlier"] < losses[None] - 0.05


def spied_gradients(trainer, *, plain: bool = False) -> tuple[list, list]:
    """Train; prompts and weights of every step with the gradient that the optimiser was about to use."""
    steps, prompts, step = [], [], trainer.training_step
    if plain:  # as transformers has it: every micro-batch alike
        trainer.get_batch_samples = types.MethodType(DPOTrainer.get_batch_samples, trainer)
        step = types.MethodType(DPOTrainer.training_step, trainer)

    def spy(model, inputs, *args):
        loss = step(model, inputs, *args)
        half = len(inputs["input_ids"]) // 2
        prompts.extend(ids[mask.bool()].tolist() for ids, mask in each_row(inputs, half))
        if trainer.accelerator.sync_gradients:
            gradient = [p.grad.detach().clone() for p in trainer._adapter()]
            steps.append((prompts.copy(), [p.detach().clone() for p in trainer._adapter()], gradient))
            prompts.clear()
        return loss

    trainer.training_step = spy
    trainer.train()
    return steps, [p.detach().clone() for p in trainer._adapter()]


def each_row(inputs, half):
    return zip(inputs["input_ids"][:half], inputs["attention_mask"][:half], strict=True)


@pytest.mark.parametrize(
    ("pairs", "sizes", "behind"),
    [
        (14, {"pairs_per_step": 4, "pairs_per_device": 2}, [4, 4, 4, 2]),
        (14, {"pairs_per_step": 8, "pairs_per_device": 4}, [8, 6]),
        (7, {"pairs_per_step": 4, "pairs_per_device": 2}, [4, 3]),
    ],
    ids=["short window", "short micro-batch", "both full but one pair"],
)
def test_every_pair_of_a_step_weighs_the_same(later, parameters, stage1, pairs, sizes, behind):
    trainer, data = later(pairs=pairs, **NEVER, **sizes)
    steps, _ = spied_gradients(trainer)
    exact = Doubled(stage1, parameters.beta)
    assert [len(prompts) for prompts, _, _ in steps] == behind
    for prompts, weights, gradient in steps:
        rows = [
            next(r for r in data.rows if each[: len(r["prompt_ids"])] == r["prompt_ids"]) for each in prompts
        ]
        _, mean = exact.gradient(weights, rows)
        off = float((flat(gradient) - flat(mean)).norm() / flat(mean).norm())
        assert off < 1e-4
    losses = stages.history_table(trainer)["loss"]
    _, last = steps[-1][:2]
    assert losses.iloc[-1] == pytest.approx(exact.gradient(last, rows)[0], abs=1e-4)


def test_full_batches_train_as_transformers_does_to_the_last_bit_and_short_ones_do_not(later):
    for pairs, same in ((16, True), (7, False)):
        ends = [
            spied_gradients(later(pairs=pairs, pairs_per_device=2, **NEVER)[0], plain=plain)[1]
            for plain in (False, True)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)) == same


def test_a_short_micro_batch_makes_no_half(trained):
    table = trained(pairs=7, pairs_per_device=2, **EVERY).conflict_table()
    assert table["matched_cosine"].isna().tolist() == [False, True]
