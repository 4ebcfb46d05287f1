"""The listwise loss by plain arithmetic, its trainer against TRL's and autograd, lambda and its schedule."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import adapter_of, fresh, random_pairs, records_for, rows_for
from datasets import Dataset
from scipy import stats
from test_resuming import _Killed, _KilledAt

from seqdpo_utils import layouts, lists, listwise, schedule, scoring, stage_data, stages
from seqdpo_utils.errors import StudyError

NAN = float("nan")
BETA = 0.3


def plain_loss(rewards, ratings, weights, temperature):
    """The formula by hand: aspect by aspect, answer by answer."""
    total = 0.0
    for rated, weight in zip(ratings, weights, strict=True):
        here = [i for i, rating in enumerate(rated) if not np.isnan(rating)]
        if len(here) < 2:
            continue
        wanted = np.exp([rated[i] / temperature for i in here])
        odds = np.exp([rewards[i] for i in here])
        total -= weight * sum(np.log(odds / odds.sum()) * wanted / wanted.sum())
    return total


@pytest.mark.parametrize(
    "ratings",
    [
        [[5.0, 1.0, 3.0], [2.0, 2.0, 4.0]],
        [[5.0, NAN, 3.0], [2.0, 2.0, 4.0]],
        [[5.0, NAN, NAN], [2.0, NAN, 4.0]],
    ],
)
def test_the_loss_is_the_formula_with_missing_ratings_left_out(ratings):
    rewards, weights = np.array([0.4, -1.0, 0.2]), np.array([0.3, 0.7])
    found = lists.listwise_loss(
        *(torch.tensor(x, dtype=torch.float64) for x in (rewards, ratings, weights)), temperature=0.8
    )
    assert float(found) == pytest.approx(plain_loss(rewards, ratings, weights, 0.8), abs=1e-9)


def test_a_missing_rating_is_not_the_worst():
    rewards, weights = torch.tensor([0.4, -1.0, 0.2]), torch.tensor([1.0])
    missing, worst = torch.tensor([[5.0, NAN, 3.0]]), torch.tensor([[5.0, 1.0, 3.0]])
    losses = [lists.listwise_loss(rewards, each, weights, temperature=1.0) for each in (missing, worst)]
    assert abs(losses[0] - losses[1]) > 0.05


def test_for_a_fixed_lambda_the_loss_is_cross_entropy_to_the_mixed_target():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rewards, ratings = torch.randn(4, generator=generator), 5 * torch.rand(3, 4, generator=generator)
        weights = torch.rand(3, generator=generator)
        mixed = (weights / weights.sum()) @ lists.targets(ratings, temperature=1.0)
        wanted = torch.nn.functional.cross_entropy(rewards[None], mixed[None])
        found = lists.listwise_loss(rewards, ratings, weights / weights.sum(), temperature=1.0)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_averaging_over_lambda_is_training_with_its_mean():
    """Why a policy that never reads lambda cannot be steered: its gradient knows the mean lambda alone."""
    rewards = torch.tensor([0.4, -1.0, 0.2], requires_grad=True)
    ratings, draws = torch.tensor([[5.0, 1.0, 3.0], [1.0, 4.0, 5.0]]), torch.rand(50)
    weights = torch.stack([draws, 1 - draws], dim=1)
    each = [lists.listwise_loss(rewards, ratings, weight, temperature=1.0) for weight in weights]
    (sampled,) = torch.autograd.grad(torch.stack(each).mean(), rewards)
    mean = lists.listwise_loss(rewards, ratings, weights.mean(dim=0), temperature=1.0)
    assert torch.allclose(sampled, torch.autograd.grad(mean, rewards)[0], atol=1e-6)


def test_the_order_of_answers_does_not_matter():
    rewards, ratings = torch.tensor([0.4, -1.0, 0.2]), torch.tensor([[5.0, NAN, 3.0], [1.0, 4.0, 5.0]])
    weights = torch.tensor([0.3, 0.7])
    found = {
        round(float(lists.listwise_loss(rewards[p], ratings[:, p], weights, temperature=1.0)), 6)
        for p in map(list, itertools.permutations(range(3)))
    }
    assert len(found) == 1


def trainer_for(rows, tokenizer, parameters, folder, *, kind="fixed", earlier=None, **aspects):
    """A listwise trainer on rows of lists, its adapter moved off the start so that rewards are not zero."""
    names = tuple(f"aspect{k}" for k in range(len(rows[0]["ratings"])))
    options = {"temperature": 1.0, "weights": tuple([1 / len(names)] * len(names))} | aspects
    data = stage_data.StageData(
        rows, pd.DataFrame(), earlier or {}, aspects=listwise.Aspects(names, kind, **options)
    )
    flat = parameters.model_copy(update={"lambdas": kind})
    trainer = stages.stage_trainer(fresh(), tokenizer, data, parameters=flat, output_dir=folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (p for p in trainer.model.parameters() if p.requires_grad):
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return trainer


def list_rows(count, answers=3, *, aspects=2, seed=0):
    """Random lists with the base model's sums, whole ratings of 1 to 5."""
    rng, rows, model = np.random.default_rng(seed), [], fresh()
    for number in range(count):
        prompt = rng.integers(10, 5000, 6).tolist()
        texts = [[*rng.integers(10, 5000, int(rng.integers(1, 9))).tolist(), 2] for _ in range(answers)]
        row = {"number": number, "prompt": json.dumps([{"role": "user", "content": f"What of {number}?"}])}
        row |= {"prompt_ids": prompt, "completions": texts}
        row |= {"ref_logps": [scoring.sequence_logp(model, prompt, text) for text in texts]}
        rows.append(row | {"ratings": rng.integers(1, 6, (aspects, answers)).astype(float).tolist()})
    return Dataset.from_list(rows)


def loss_and_gradient(trainer, rows):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(rows)))
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    return float(loss), torch.autograd.grad(loss, adapter)


def test_two_answers_with_hard_targets_are_dpo(tokenizer, parameters, tmp_path):
    """The same pairs through TRL's loss and through ours, at equal weights: loss and gradient."""
    pairs = random_pairs(6)
    rows = rows_for(fresh(), pairs)
    as_lists = Dataset.from_list(
        [
            {
                "number": k,
                "prompt": "[]",
                "prompt_ids": row["prompt_ids"],
                "completions": [row["rejected_ids"], row["chosen_ids"]],
                "ref_logps": [row["ref_rejected_logps"], row["ref_chosen_logps"]],
                "ratings": [[1.0, 2.0]],
            }
            for k, row in enumerate(rows)
        ]
    )
    options = {"earlier": {("helpful", "train"): rows}, "temperature": 1e-3}
    trainer = trainer_for(as_lists, tokenizer, parameters, tmp_path, **options)
    ours, gradient = loss_and_gradient(trainer, as_lists)
    trl, wanted = loss_and_gradient(trainer, rows)  # rows of pairs go to TRL's own loss
    assert ours == pytest.approx(trl, abs=1e-6) and abs(trl - np.log(2)) > 1e-3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradient, wanted, strict=True))


def test_the_gradient_is_that_of_the_formula_over_whole_logits(tokenizer, parameters, tmp_path):
    rows = list_rows(3, answers=4)
    trainer = trainer_for(rows, tokenizer, parameters, tmp_path, weights=(0.2, 0.8))
    found, gradient = loss_and_gradient(trainer, rows)
    total, weights = 0.0, torch.tensor([0.2, 0.8])
    for row in rows:
        sums = []
        for answer in row["completions"]:
            ids = torch.tensor([[*row["prompt_ids"], *answer]])
            logps = trainer.model.get_base_model()(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
            sums.append(logps[-len(answer) :].gather(1, torch.tensor(answer)[:, None]).sum())
        rewards = BETA * (torch.stack(sums) - torch.tensor(row["ref_logps"]))
        mixed = weights @ torch.tensor(row["ratings"]).softmax(dim=1)
        total = total - (mixed * rewards.log_softmax(dim=0)).sum() / len(rows)
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(total, adapter)
    assert found == pytest.approx(float(total.detach()), abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradient, wanted, strict=True))
    assert max(float(piece.abs().max()) for piece in gradient) > 1e-3


def test_a_prompt_is_computed_once_and_the_head_sees_answers_alone(tokenizer, parameters, tmp_path):
    rows = list_rows(2, answers=4)
    trainer = trainer_for(rows, tokenizer, parameters, tmp_path)
    bare, seen = trainer.model.get_base_model(), {"body": 0, "head": []}
    body = bare.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(body=seen["body"] + kwargs["input_ids"].numel()),
        with_kwargs=True,
    )
    head = bare.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: seen["head"].append(len(args[0]))
    )
    for row in rows:
        loss_and_gradient(trainer, [row])
    body.remove(), head.remove()
    answers = [sum(map(len, row["completions"])) for row in rows]
    assert seen["body"] == sum(len(row["prompt_ids"]) - 1 for row in rows) + sum(answers)
    assert seen["head"] == answers and max(seen["head"]) <= scoring.HEAD_ROWS


def test_a_wrong_reference_of_a_list_stops_before_the_first_step(tokenizer, parameters, tmp_path):
    rows = list_rows(3)
    trainer = trainer_for(rows, tokenizer, parameters, tmp_path)
    few = trainer.reference_rows()
    columns = {"ref_chosen_logps": "chosen_logp", "ref_rejected_logps": "rejected_logp"}
    sums = few.to_pandas().rename(columns=columns)[list(columns.values())]
    data = stage_data.StageData(rows, sums)
    assert len(stages.prove_reference(trainer, data)) == 8
    wrong = [[*row["ref_logps"][:-1], row["ref_logps"][-1] + 1.0] for row in rows]
    trainer.train_dataset = rows.remove_columns("ref_logps").add_column("ref_logps", wrong)
    with pytest.raises(StudyError, match="wrong reference"):
        stages.prove_reference(trainer, data)


def test_training_learns_what_the_ratings_want_and_keeps_every_lambda(tokenizer, parameters, tmp_path):
    rows = list_rows(8)
    flat = parameters.model_copy(update={"learning_rate": 2e-2, "epochs": 3})
    trainer = trainer_for(rows, tokenizer, flat, tmp_path, kind="dirichlet")
    before = loss_and_gradient(trainer, rows)[0]
    trainer.lambda_records.clear()
    stages.train(trainer)
    table = pd.DataFrame(trainer.lambda_records)
    assert len(table) == 24 and np.allclose(table.filter(like="lambda_").sum(axis=1), 1)
    assert table["lambda_aspect0"].nunique() == 24
    assert stages.history_table(trainer)["rewards/margins"].tail(2).mean() > 0.5
    assert loss_and_gradient(trainer, rows)[0] < before


def test_lists_are_made_of_training_prompts_alone_and_count_what_they_leave_out(tokenizer):
    talk = [{"role": "user", "content": "Name a  colour."}]
    answers = [
        (talk, ["Blue.", "", "Blue.", "Green."], [{"a": 5.0}, {"a": 1.0}, {"a": 2.0}, {"a": None}]),
        ([{"role": "user", "content": "Unseen?"}], ["x", "y"], [{"a": 1.0}, {"a": 2.0}]),
        ([{"role": "user", "content": "Short?"}], ["x", "x"], [{"a": 1.0}, {"a": 2.0}]),
    ]
    prompts = [json.dumps(talk), json.dumps(answers[2][0]), json.dumps(answers[1][0])]
    ids = [lists.prompt_hash(json.loads(prompt)) for prompt in prompts]
    table = pd.DataFrame({"prompt_id": ids, "prompt": prompts, "split": ["train", "train", "eval"]})
    found, counts = lists.rated_lists(answers, {"a": table}, tokenizer, max_length=64)
    assert found["prompt_id"].tolist() == ids[:1] and found["responses"][0] == ["Blue.", "Green."]
    assert found["a"][0].tolist() == pytest.approx([5.0, NAN], nan_ok=True)
    assert counts["lists: fewer than two answers"] == 1
    assert counts["answers: empty, repeated or too long"] == 3
    assert lists.usable(found, ["a"]).empty  # one rating is no list


def test_ratings_come_from_both_layouts_and_more_is_always_better():
    rows = [{"prompt": "p", "response": r, "helpfulness": 3, "verbosity": v} for r, v in (("x", 1), ("y", 4))]
    ((prompt, texts, ratings),) = layouts.LAYOUTS["helpsteer2"].rated_answers(rows)
    assert prompt[0]["content"] == "p" and texts == ["x", "y"]
    assert [each["verbosity"] for each in ratings] == [-1.0, -4.0]
    assert ratings[0]["helpfulness"] == 3.0 and ratings[0]["coherence"] is None
    with pytest.raises(StudyError, match="no ratings of answers; helpsteer2, ultrafeedback"):
        layouts.LAYOUTS["hh_rlhf"].rated_answers([])


def test_twos_name_every_answer():
    for count in range(2, 9):
        assert set(itertools.chain.from_iterable(lists.twos(count))) == set(range(count))


def test_told_prompts_say_the_weights_and_answers_stay_as_they_are(tokenizer):
    talk = [{"role": "user", "content": "Name a colour."}]
    told = lists.Told(tokenizer, {"aspect_a": 0.25, "b": 0.75})
    text = told.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert "Name a colour.\n\n(What counts here: aspect a 0.25; b 0.75.)" in text
    answered = [*talk, {"role": "assistant", "content": "Blue."}]
    assert "What counts" not in told.apply_chat_template(answered, tokenize=False)
    assert told.name_or_path == tokenizer.name_or_path and talk[0]["content"] == "Name a colour."


def test_the_policy_that_reads_lambda_sees_it_and_the_other_does_not(tokenizer, parameters, tmp_path):
    rows = list_rows(2)
    plain = trainer_for(rows, tokenizer, parameters, tmp_path / "a", kind="dirichlet")
    told = trainer_for(rows, tokenizer, parameters, tmp_path / "b", kind="dirichlet", in_prompt=True)
    one, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert plain.prompt_ids(rows[0], one) == plain.prompt_ids(rows[0], other) == rows[0]["prompt_ids"]
    assert told.prompt_ids(rows[0], one) != told.prompt_ids(rows[0], other)


@pytest.mark.parametrize(("aspects", "parts", "points"), [(2, 4, 5), (4, 2, 10), (3, 4, 15)])
def test_the_lattice_has_every_point_once(aspects, parts, points):
    found = schedule.lattice(aspects, parts=parts)
    assert len(found) == len(np.unique(found, axis=0)) == points and np.allclose(found.sum(axis=1), 1)


def test_draws_depend_on_their_key_alone_and_are_fair():
    for kind in ("dirichlet", "grid"):
        draws = np.array([schedule.draw(kind, 2, key=(0, 1, k)) for k in range(400)])
        assert np.allclose(draws.sum(axis=1), 1) and abs(draws[:, 0].mean() - 0.5) < 0.06
        assert np.array_equal(draws[7], schedule.draw(kind, 2, key=(0, 1, 7)))


def test_the_prediction_is_the_posterior_of_its_model():
    """Against the joint normal distribution of coefficients and measurements, conditioned by brute force."""
    rng = np.random.default_rng(0)
    known, points = rng.dirichlet(np.ones(2), 6), schedule.lattice(2)
    gains, errors = rng.normal(0.3, 0.2, 6), rng.uniform(0.05, 0.2, 6)
    centre, spread = np.average(gains, weights=1 / errors**2), max(gains.std(), errors.min())
    a, b = schedule.features(known), schedule.features(points)
    inside = spread**2 * a @ a.T + np.diag(errors**2)
    across = spread**2 * b @ a.T
    mean = centre + across @ np.linalg.solve(inside, gains - centre)
    variance = np.diag(spread**2 * b @ b.T - across @ np.linalg.solve(inside, across.T))
    found = schedule.predict(points, known, gains, errors)
    assert np.allclose(found[0], mean) and np.allclose(found[1], np.sqrt(variance))


def test_the_schedule_finds_the_lambda_that_pays_and_goes_on_exploring():
    rng, points = np.random.default_rng(0), schedule.lattice(2)
    known = points[rng.integers(0, 5, 40)]
    gains = known[:, 0] + rng.normal(0, 0.1, 40)
    chances = schedule.chances(schedule.predict(points, known, gains, np.full(40, 0.1))[0])
    assert stats.spearmanr(chances, points[:, 0]).statistic > 0.99 and chances.sum() == pytest.approx(1)
    assert chances.min() >= schedule.EXPLORED / 5 - 1e-12 and chances[0] > 0.3
    assert np.allclose(schedule.chances(np.zeros(5)), 0.2)


def test_the_schedule_measures_what_a_step_did_and_a_resumed_one_goes_on(tokenizer, parameters, tmp_path):
    rows, probe = list_rows(16), random_pairs(6, seed=5)
    reference = rows_for(fresh(), probe)
    pairs = tuple((f"aspect{k % 2}", row | {"prompt": "[]"}) for k, row in enumerate(reference))
    trainer = trainer_for(rows, tokenizer, parameters, tmp_path / "a", kind="learned", probe=pairs)
    held_out = records_for(trainer.model.eval(), probe)
    stages.train(trainer)
    table = pd.DataFrame(trainer.schedule_records)
    assert len(table) == 4 and (table["error"] > 0).all()
    margins = [
        BETA * ((one.chosen_logp - b["ref_chosen_logps"]) - (one.rejected_logp - b["ref_rejected_logps"]))
        for one, b in zip(held_out.itertuples(), reference, strict=True)
    ]
    after = records_for(trainer.model.eval(), probe)
    end = [
        BETA * ((one.chosen_logp - b["ref_chosen_logps"]) - (one.rejected_logp - b["ref_rejected_logps"]))
        for one, b in zip(after.itertuples(), reference, strict=True)
    ]
    rates = np.array(stages.history_table(trainer)["learning_rate"]) / parameters.learning_rate
    gained = float((table["gain"] * rates).sum())
    assert gained == pytest.approx(np.mean(end) - np.mean(margins), abs=1e-4) and abs(gained) > 1e-3
    assert np.mean(end[::2]) == pytest.approx(table["margin_aspect0"].iloc[-1], abs=1e-4)
    again = trainer_for(rows, tokenizer, parameters, tmp_path / "b", kind="learned", probe=pairs)
    again.schedule_records = trainer.schedule_records[:2]
    again.state.global_step = 2
    step = next(entry for entry in trainer.lambda_records if entry["step"] == 3)
    assert again.lambda_of(step["number"])[0] == step["lambda_aspect0"]


def test_a_killed_listwise_stage_ends_as_an_undisturbed_one(tokenizer, parameters, tmp_path, monkeypatch):
    """Weights, log, lambdas and what the schedule measured, to the last bit."""
    monkeypatch.setattr(stages, "CHECKPOINT_SECONDS", 0.0)
    reference = rows_for(fresh(), random_pairs(4, seed=5))
    probe = tuple((f"aspect{k % 2}", row | {"prompt": "[]"}) for k, row in enumerate(reference))

    def make(name):
        return trainer_for(list_rows(16), tokenizer, parameters, tmp_path / name, kind="learned", probe=probe)

    undisturbed, killed = make("a"), make("b")
    stages.train(undisturbed)
    killed.add_callback(_KilledAt(2))
    with pytest.raises(_Killed):
        stages.train(killed)
    resumed = make("b")
    stages.train(resumed)
    assert resumed.lambda_records == undisturbed.lambda_records
    assert resumed.schedule_records == undisturbed.schedule_records
    ends = [list(adapter_of(trainer).values()) for trainer in (undisturbed, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    logs = [stages.history_table(trainer).drop(columns="seconds") for trainer in (undisturbed, resumed)]
    pd.testing.assert_frame_equal(*logs, check_like=True)
