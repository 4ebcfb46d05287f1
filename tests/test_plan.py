"""The plan against what Snakemake would run, what autograd keeps, and figures worked by hand."""

import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from peft import get_peft_model
from test_access import answer, refusal
from transformers import LlamaConfig, LlamaForCausalLM

from seqdpo_utils import models, params
from seqdpo_utils.batch import access, cli, plan
from seqdpo_utils.chains import THEN
from seqdpo_utils.scoring import HEAD_ROWS

RULES = {
    "read_me_first": "00", "data_preparation": "01", "first_stage": "02", "later_stage": "03",
    "evaluation": "04", "pair_diagnostics": "05", "mechanistic_diagnostics": "06", "across_settings": "07",
}  # fmt: skip
NINE = [
    "helpful", "safe", "helpful+safe", "helpful-then-safe", "helpful-then-safe.shuffled",
    "helpful-then-safe-then-helpful", "safe-then-helpful.ref50-then-safe", "safe.half-then-helpful",
    "safe.half-then-helpful-then-safe.half",
]  # fmt: skip
"""Nine chains; besides themselves they need safe-then-helpful.ref50 and safe.half: eleven stages."""


@pytest.fixture
def paper(root) -> params.Parameters:
    return params.resolve(root, scale="paper", setting="safety_signal")


def but(parameters, **changes):
    return parameters.model_copy(update=changes)


def test_the_paper_scale_has_the_papers_trainable_weights(root, paper, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("a download"))
    shape = plan.shape_of(root, paper)
    assert (shape.base, shape.trainable) == (8_030_261_248, 83_886_080)
    assert f"{shape.trainable / (shape.base + shape.trainable):.2%}" == "1.03%"
    # rank x layers x (in + out) of q and o, k and v, gate, up and down
    by_hand = 32 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert shape.trainable == by_hand
    kept = 2 * 128256 * 4096 + 65 * 4096
    assert shape.base - shape.quantisable == kept, "embedding, head and norms stay as they are"


def test_the_laptop_scales_adapter_is_near_the_papers_share(root, tmp_path):
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    laptop = but(params.resolve(root, scale="laptop", setting="safety_signal"), base_model="model")
    shape = plan.shape_of(tmp_path, laptop)
    assert shape.base == 134_515_008 and 0.009 < shape.trainable / (shape.base + shape.trainable) < 0.012


def test_a_beginning_that_chains_share_is_trained_once(root, paper):
    stages = plan.stages_of(root, paper, NINE)
    trained = [stage.chain for stage in stages]
    assert len(NINE) == 9 and sum(len(chain.split(THEN)) for chain in NINE) == 18, "eighteen without sharing"
    assert len(trained) == len(set(trained)) == 11
    assert set(trained) - set(NINE) == {"safe-then-helpful.ref50", "safe.half"}
    assert plan.notebooks(stages, {"safety_signal": NINE}, seeds=2) == {
        "00": 1, "01": 1, "02": 2 * 4, "03": 2 * 7, "04": 18, "05": 18, "06": 18, "07": 1,
    }  # fmt: skip


def test_variants_shape_their_own_stage_alone(root, paper):
    stages = {stage.chain: stage for stage in plan.stages_of(root, paper, NINE)}
    assert stages["safe.half"].train_share == 0.5 and stages["safe.half-then-helpful"].train_share == 1.0
    assert stages["safe-then-helpful.ref50"].reference == 0.5
    assert stages["safe-then-helpful.ref50-then-safe"].reference == 0.0


@pytest.mark.parametrize(
    ("chains", "seeds"),
    [
        ({"safety_signal": NINE}, [0]),
        ({"compatible_quality": ["truthfulness"]}, [0]),
        (
            {"safety_signal": ["helpful-then-safe"], "distributional_conflict": ["helpful", "harmless"]},
            [0, 3],
        ),
    ],
)
def test_the_notebooks_counted_are_those_that_snakemake_would_run(root, tmp_path, chains, seeds):
    for name in ("notebooks", "params", "seqdpo_utils"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "Snakefile", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"scale": "smoke", "seeds": seeds, "chains": chains}))
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "2", "--configfile", "config.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.M)
    jobs = {RULES[name]: int(count) for name, count in counted if name in RULES}
    settings = {name: params.resolve(root, scale="smoke", setting=name) for name in chains}
    stages = [stage for name in chains for stage in plan.stages_of(root, settings[name], chains[name])]
    expected = plan.notebooks(stages, chains, seeds=len(seeds))
    assert jobs == {name: count for name, count in expected.items() if count}


@pytest.fixture
def small(paper):
    return but(
        paper, train_pairs=100, eval_pairs=10, probe_pairs=20, fresh_pairs=0, pairs_per_step=32,
        conflict_every=3, conflict_pairs=8,
        ledger_every=2, ledger_pairs=5, kl_pairs=3,
    )  # fmt: skip


def test_pairs_by_hand(root, small):
    """Two objectives, both orders, two seeds: four stages a seed, two of them later ones."""
    stages = plan.stages_of(root, small, ["helpful-then-safe", "safe-then-helpful"])
    amount = plan.work([small], stages, seeds=2)
    assert amount.steps == 2 * 4 * 4 and amount.trained == 2 * 4 * 100
    measured = 2 * 2 * MEASURED
    assert amount.measured == measured, (
        "conflict at steps 1 and 4 of a later stage, the ledger after 0, 2 and 4, on pairs of two splits"
    )
    assert amount.scored == 2 * 130 + 2 * 4 * 2 * (10 + 2 * 3), "the KL takes policy and base"
    silent = [but(stage, conflict_every=0, ledger_pairs=0) for stage in stages]
    assert plan.work([small], silent, seeds=2).measured == 0


HELD_OUT = 2 * (10 + 2 * 3)
MEASURED = 2 * (2 * 8 + 3 * 5)  # of one earlier objective: training pairs and held-out ones


@pytest.mark.parametrize(
    ("chain", "work"),
    [
        ("helpful", (4, 100, 0, HELD_OUT)),
        ("helpful.half", (2, 50, 0, HELD_OUT)),
        ("helpful+safe", (7, 200, 0, HELD_OUT)),  # no earlier objective
        ("helpful-then-safe", (4, 100, MEASURED, HELD_OUT)),
        ("helpful+safe-then-safe", (4, 100, 2 * MEASURED, HELD_OUT)),  # two earlier objectives
        ("helpful-then-helpful", (4, 100, MEASURED, HELD_OUT)),
        ("helpful-then-safe.replay10", (4, 100, MEASURED, HELD_OUT)),  # exchanged, not added
        ("helpful-then-safe.projected", (4, 100, MEASURED + 4 * 8, HELD_OUT)),
        ("helpful-then-safe.placebo", (4, 100, MEASURED + 4 * 8, HELD_OUT)),
        ("helpful-then-safe.ref50", (4, 100, MEASURED, HELD_OUT + 100)),
        ("helpful-then-safe.half.ref50", (2, 50, 2 * (8 + 2 * 5), HELD_OUT + 50)),
    ],
)
def test_what_variants_and_joint_stages_change_by_hand(root, small, chain, work):
    assert plan.stage_work(plan.stages_of(root, small, [chain])[-1]) == work


def test_epochs_multiply_what_is_trained_and_not_what_is_scored(root, small):
    twice = plan.stages_of(root, but(small, epochs=2), ["helpful-then-safe.ref50"])[-1]
    assert plan.stage_work(twice) == (8, 200, 2 * (3 * 8 + 5 * 5), HELD_OUT + 100)


def test_hours_by_hand(paper):
    shape = plan.Shape(
        base=900, quantisable=0, trainable=100, layers=1, hidden=1, intermediate=1, vocabulary=1
    )
    amount = plan.Work(steps=1, trained=10, measured=5, scored=20)
    operations = 7 * 1000 * (15 * 6 + 20 * 2)
    assert plan.hours(shape, amount, paper, tokens=7, peak=1e3) == pytest.approx(
        operations / (1e3 * plan.UTILISATION) / 3600
    )
    without = plan.hours(shape, amount, but(paper, activation_checkpointing=False), tokens=7, peak=1e3)
    assert without == pytest.approx(7 * 1000 * (15 * 4 + 20 * 2) / (1e3 * plan.UTILISATION) / 3600)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "heads", "kv"), [(256, 896, 8, 2), (192, 512, 6, 2), (256, 1024, 8, 8)]
)
def test_activations_are_what_autograd_keeps(paper, dtype, hidden, intermediate, heads, kv):
    """The bytes that the backward pass of a small Llama with LoRA holds on to, counted layer by layer."""
    tokens, kept = 64, []
    for layers in (2, 4):
        config = LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv,
        )  # fmt: skip
        llama, lora = (
            LlamaForCausalLM(config).to(getattr(torch, dtype)),
            models.lora_config(but(paper, lora_rank=2)),
        )
        model = get_peft_model(llama, lora).train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def keep(tensor, own=own, seen=seen):
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
        inputs = {
            "input_ids": torch.zeros(1, tokens, dtype=torch.long),
            "attention_mask": mask,
            "use_cache": False,
        }
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), mixed:
            # while it lives, so does what its backward pass needs
            hold = model.base_model.model.model(**inputs).last_hidden_state
        kept.append(sum(seen.values()))
        del hold
    shape = plan.Shape(0, 0, 0, layers=1, hidden=hidden, intermediate=intermediate, vocabulary=64)
    counted = plan.activations_a_token(shape, dtype) * (2 if dtype == "bfloat16" else 4)
    assert (kept[1] - kept[0]) / 2 / tokens == pytest.approx(counted, rel=0.12)


def test_memory_by_hand(paper):
    shape = plan.Shape(1000, quantisable=800, trainable=10, layers=3, hidden=2, intermediate=4, vocabulary=5)
    flat = but(paper, pairs_per_device=2)
    parts = plan.memory(shape, flat, tokens=7, checkpointing=False)
    named = ("base weights", "adapter", "gradient", "AdamW", "measuring")
    assert [parts[name] for name in named] == [2000, 40, 40, 80, (6 + 4) * 40]
    assert parts["activations"] == 3 * 14 * (14 * 2 + 4 * 4) * 2
    assert parts["logits"] == 3 * 4 * HEAD_ROWS * 5
    saving = plan.memory(shape, flat, tokens=7, checkpointing=True)
    assert saving["activations"] == 14 * 2 * (3 * 2 + 14 * 2 + 4 * 4)
    lean = but(flat, quantization="nf4", conflict_every=0, ledger_pairs=0)
    quantised = plan.memory(shape, lean, tokens=7, checkpointing=False)
    assert quantised["base weights"] == pytest.approx(800 * 0.52 + 400)
    assert (quantised["AdamW"], quantised["measuring"]) == (40, 0)


@pytest.fixture
def offline(monkeypatch):
    """A hub that refuses the model, a machine without accelerator, token or room."""
    errors = huggingface_hub.errors
    answers = {
        "model": refusal(errors.GatedRepoError, 401),
        "dataset": refusal(errors.RepositoryNotFoundError),
    }
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda _, repo_type: answer(answers[repo_type])())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(plan, "get_token", lambda: None)
    monkeypatch.setattr(plan, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 2 * 10**9}))


@pytest.fixture
def said(root, monkeypatch, capsys):
    monkeypatch.chdir(root)

    def ask(*words):
        assert cli.main(["plan", *words]) == 0
        return capsys.readouterr().out

    return ask


def test_the_command_prints_the_plan_and_what_is_missing_last(said, offline):
    words = ["--gpu", "RTX 4090 24GB", "--tokens", "250", "--set", "pairs_per_device=32"]
    text = said("--scale", "paper", "--settings", "safety_signal", *words)
    assert "83,886,080 trainable, 1.03%" in text and "250 tokens a pair" in text and "0.67 GB" in text
    assert "02 x 6" in text and "seeds 0, 1, 2" in text
    assert "safety_signal: 4 stages trained for 2 chains\n            helpful-then-safe\n" in text
    missing = text[text.index("missing") :]
    for each in (
        "Llama-3.1-8B-Instruct is gated",
        "PKU-Alignment/PKU-SafeRLHF is no dataset that the hub shows",
        "no token",
        "room on a RTX 4090",
        "GB free where",
    ):
        assert each in missing, each
    assert int(re.search(r"where (\d+)\.\d GB are needed", missing)[1]) >= 16


def test_a_large_model_without_a_gpu_is_named(said, offline):
    assert "no GPU here" in said("--scale", "paper", "--settings", "safety_signal", "--gpu", "H200 141GB")


def test_room_on_the_disk_grows_with_the_stages_that_are_trained(said, monkeypatch):
    asked = []
    monkeypatch.setattr(access, "disk_fault", lambda _, needed: asked.append(needed))
    monkeypatch.setattr(access, "faults", lambda *_: [])
    words = ("--scale", "paper", "--settings", "safety_signal")
    said(*words, "--seeds", "0", "1", "--chains", "helpful")
    said(*words, "--seeds", "0", "1", "--chains", "helpful", "helpful-then-safe", "safe-then-helpful")
    assert asked[1] - asked[0] == 3 * 2 * 4 * 83_886_080, "three stages more, two seeds, four bytes a weight"
    adapters, checkpoints, texts = 2 * 2 * 4 * 83_886_080, 2 * 12 * 83_886_080, 2 * 9256 * 8 * 1024
    assert asked[0] == 2 * 8_030_261_248 + adapters + checkpoints + texts + access.LEAST_FREE


def test_the_scales_without_a_gated_model_miss_nothing(said, monkeypatch):
    monkeypatch.setattr(access, "disk_fault", lambda *_, **__: None)
    text = said("--scale", "smoke", "--seeds", "0", "1", "--design", "both_orders", "three_stages")
    assert text.rstrip().endswith("missing     nothing") and "seeds 0, 1" in text
    assert "left out    A-then-B-then-C for safety_signal: 2 objectives are too few" in text
    assert "safety_signal: 6 stages trained for 4 chains" in text


def test_a_model_that_is_not_here_has_no_known_shape(said, offline):
    text = said("--scale", "paper", "--settings", "safety_signal", "--set", "base_model=someone/other")
    assert "The shape of someone/other is unknown" in text and "trainable" not in text


def test_the_share_of_held_out_scoring_by_hand(root, small):
    """Ten held-out pairs: the KL takes three of them twice; training costs three forward passes."""
    stages = plan.stages_of(root, small, ["helpful-then-safe"])
    growing = 2 * 10 + 2 * 2 * HELD_OUT  # base, and two stages with two seeds
    whole = 2 * (2 * 120 + growing) + 6 * 2 * (2 * 100 + MEASURED)
    assert plan.scoring_share([small], stages, seeds=2) == pytest.approx(2 * growing / whole)
    plain = but(small, activation_checkpointing=False)
    assert plan.scoring_share([plain], stages, seeds=2) > plan.scoring_share([small], stages, seeds=2)


def test_the_plan_says_what_its_size_decides_and_what_deciding_more_costs(said, monkeypatch):
    monkeypatch.setattr(access, "disk_fault", lambda *_, **__: None)
    monkeypatch.setattr(plan.power, "known", lambda *_: (plan.power.shipped()[0], "a planted study"))

    def effect(*words: str) -> float:
        text = said("--scale", "smoke", "--settings", "safety_signal", *words)
        assert "were spreads those of a planted study" in text and text.index("decides") < text.index(
            "missing"
        )
        assert "Most for its cost: twice the held-out pairs." in " ".join(text.split())
        return float(re.search(r"a change backward of (\d\.\d\d)", text)[1])

    few, many = effect("--set", "eval_pairs=12"), effect("--set", "eval_pairs=48")
    assert few / many == pytest.approx(2.2, abs=0.1), "four times the prompts, and Student's t"
    text = said("--scale", "smoke", "--settings", "safety_signal", "--set", "conflict_every=0")
    assert "Gradients" not in text and "Run-to-run spread is not in these intervals" in text


def test_a_list_of_four_answers_stays_under_the_limit_of_its_source(root, paper):
    """Against the weights of the two shapes by hand, and what one more answer adds."""
    found = plan.list_memory(root, paper.model_copy(update={"lora_rank": 8, "lora_alpha": 16}))
    assert list(found) == list(plan.LIST_MODELS)
    for size, weights, layers in zip(found.values(), (1.236e9, 1.711e9), (16, 24), strict=True):
        inputs = layers * plan.LIST_ANSWERS * plan.LIST_LENGTH * 2048 * 2
        assert 2 * weights + inputs < size < plan.LIST_LIMIT


def test_a_plan_with_rated_lists_says_what_they_take(said, offline):
    text = said("--scale", "classroom", "--design", "aspects")
    assert "rated lists of 4 answers" in text and text.count("under 20") == 2
    assert "rated lists" not in said("--scale", "classroom", "--design", "both_orders")


def test_an_unknown_gpu_is_named_with_the_known_ones(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    assert cli.main(["plan", "--gpu", "toaster"]) == 2
    assert "'toaster' is not in the table: choose one of H200 141GB" in capsys.readouterr().err
