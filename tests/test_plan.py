"""The plan against what Snakemake would run, what autograd keeps, and figures worked by hand."""

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

from seqdpo_utils import access, models, params, plan, run

RULES = {
    "read_me_first": "00", "data_preparation": "01", "first_stage": "02", "later_stage": "03", "evaluation": "04", "pair_diagnostics": "05",
    "mechanistic_diagnostics": "06", "across_settings": "07",
}  # fmt: skip


@pytest.fixture
def paper(root) -> dict:
    return params.resolve(root, scale="paper", setting="safety_signal")


def test_the_paper_scale_has_the_papers_trainable_weights(root, paper, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("something was downloaded"))
    shape = plan.shape_of(plan.model_config(root, paper), paper)
    assert (shape.base, shape.trainable) == (8_030_261_248, 83_886_080)
    assert f"{shape.trainable / (shape.base + shape.trainable):.2%}" == "1.03%"
    by_hand = 32 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # rank x layers x (in + out) of q and o, k and v, gate, up and down
    assert shape.trainable == by_hand
    assert shape.base - shape.quantisable == 2 * 128256 * 4096 + 65 * 4096, "embedding, head and norms stay as they are"


def test_the_laptop_scales_adapter_is_near_the_papers_share(root):
    flat = params.resolve(root, scale="laptop", setting="safety_signal")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
    )
    shape = plan.shape_of(config, flat)
    assert shape.base == 134_515_008 and 0.009 < shape.trainable / (shape.base + shape.trainable) < 0.012


@pytest.mark.parametrize(("settings", "seeds"), [(["safety_signal"], [0]), (["compatible_quality", "distributional_conflict"], [0, 3])])
def test_the_notebooks_counted_are_those_that_snakemake_would_run(root, tmp_path, settings, seeds):
    for name in ("notebooks", "params", "seqdpo_utils"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "Snakefile", tmp_path)
    config = [f"scale={'smoke'}", f"settings=[{','.join(settings)}]", f"seeds=[{','.join(map(str, seeds))}]"]
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "-n",
        "--cores",
        "2",
        "--directory",
        str(tmp_path),
        "--snakefile",
        str(tmp_path / "Snakefile"),
        "--config",
        *config,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    jobs = {RULES[name]: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.M) if name in RULES}
    assert jobs == plan.notebooks([params.resolve(root, scale="smoke", setting=name) for name in settings], seeds)


def test_pairs_by_hand(paper):
    """Two objectives, two orders, two seeds: 4 chains of 2 stages."""
    flat = paper | {
        "train_pairs": 100,
        "eval_pairs": 10,
        "pairs_per_step": 32,
        "conflict_every": 3,
        "conflict_pairs": 8,
        "ledger_every": 2,
        "probe_pairs": 5,
        "kl_pairs": 3,
    }
    amount = plan.work([flat], [0, 1])
    assert amount.steps_a_stage == 4
    assert amount.trained == 4 * 2 * 100
    assert amount.measured == 4 * 1 * (2 * 8 + 3 * 5), "conflict at steps 1 and 4 of the second stage, the ledger after 0, 2 and 4"
    assert amount.scored == 2 * 110 + 4 * 2 * 2 * (10 + 2 * 3), "the drift takes policy and base"
    assert plan.work([flat | {"conflict_every": 0, "probe_pairs": 0}], [0, 1]).measured == 0


def test_hours_by_hand(paper):
    shape = plan.Shape(base=900, quantisable=0, trainable=100, layers=1, hidden=1, intermediate=1, vocabulary=1)
    amount = plan.Work(steps_a_stage=1, trained=10, measured=5, scored=20)
    operations = 7 * 1000 * (15 * 6 + 20 * 2)
    assert plan.hours(shape, amount, paper, tokens=7, peak=1e3) == pytest.approx(operations / (1e3 * plan.UTILISATION) / 3600)
    without = plan.hours(shape, amount, paper | {"activation_checkpointing": False}, tokens=7, peak=1e3)
    assert without == pytest.approx(7 * 1000 * (15 * 4 + 20 * 2) / (1e3 * plan.UTILISATION) / 3600)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "intermediate", "heads", "kv"), [(256, 896, 8, 2), (192, 512, 6, 2), (256, 1024, 8, 8)])
def test_activations_are_what_autograd_keeps(paper, dtype, hidden, intermediate, heads, kv):
    """The bytes that the backward pass of a small Llama with LoRA holds on to, counted layer by layer."""
    tokens, kept = 64, []
    for layers in (2, 4):
        config = LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv
        )
        model = get_peft_model(LlamaForCausalLM(config).to(getattr(torch, dtype)), models.lora_config(paper | {"lora_rank": 2})).train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def keep(tensor, own=own, seen=seen):
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
        inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "attention_mask": mask, "use_cache": False}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hold = model.base_model.model.model(**inputs).last_hidden_state  # while it lives, so does what its backward pass needs
        kept.append(sum(seen.values()))
        del hold
    shape = plan.Shape(base=0, quantisable=0, trainable=0, layers=1, hidden=hidden, intermediate=intermediate, vocabulary=64)
    counted = plan.activations_a_token(shape, dtype) * (2 if dtype == "bfloat16" else 4)
    assert (kept[1] - kept[0]) / 2 / tokens == pytest.approx(counted, rel=0.12)


def test_memory_by_hand(paper):
    shape = plan.Shape(base=1000, quantisable=800, trainable=10, layers=3, hidden=2, intermediate=4, vocabulary=5)
    flat = paper | {"pairs_per_device": 2}
    parts = plan.memory(shape, flat, tokens=7, checkpointing=False)
    assert (parts["base weights"], parts["adapter"], parts["gradient"], parts["AdamW"]) == (2000, 40, 40, 80)
    assert parts["activations"] == 3 * 14 * (14 * 2 + 4 * 4) * 2
    assert plan.memory(shape, flat, tokens=7, checkpointing=True)["activations"] == 14 * 2 * (3 * 2 + 14 * 2 + 4 * 4)
    quantised = plan.memory(shape, flat | {"quantization": "nf4", "conflict_every": 0, "probe_pairs": 0}, tokens=7, checkpointing=False)
    assert (quantised["base weights"], quantised["AdamW"], quantised["measuring"]) == (pytest.approx(800 * 0.52 + 400), 40, 0)


@pytest.fixture
def offline(monkeypatch):
    """A hub that refuses the model, a machine without accelerator, token or room."""
    gated, absent = refusal(huggingface_hub.errors.GatedRepoError, 401), refusal(huggingface_hub.errors.RepositoryNotFoundError)
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda name, repo_type: answer(gated if repo_type == "model" else absent)())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(plan, "get_token", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 2 * 10**9}))


def test_the_command_prints_the_plan_and_what_is_missing_last(root, capsys, monkeypatch, offline):
    monkeypatch.chdir(root)
    assert (
        run.main(["plan", "--scale", "paper", "--settings", "safety_signal", "--gpu", "RTX 4090 24GB", "--tokens", "250", "--set", "pairs_per_device=32"]) == 0
    )
    said = capsys.readouterr().out
    assert "83,886,080 trainable, 1.03%" in said and "250 tokens a pair" in said and "02 x 6" in said and "0.67 GB" in said
    missing = said[said.index("missing") :]
    for words in ("Llama-3.1-8B-Instruct is gated", "the hub shows no data set PKU-Alignment/PKU-SafeRLHF", "no token", "room on a RTX 4090", "GB free where"):
        assert words in missing, words
    assert int(re.search(r"where (\d+)\.\d GB are needed", missing)[1]) >= 16


def test_the_scales_without_a_gated_model_miss_nothing(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(access, "disk_fault", lambda *_, **__: None)
    assert run.main(["plan", "--scale", "smoke", "--seeds", "0", "1"]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith("missing     nothing") and "seeds 0, 1: 16 chains" in said


def test_a_model_that_is_not_here_has_no_known_shape(root, capsys, monkeypatch, offline):
    monkeypatch.chdir(root)
    assert run.main(["plan", "--scale", "paper", "--settings", "safety_signal", "--set", "base_model=someone/other"]) == 0
    said = capsys.readouterr().out
    assert "The shape of someone/other is unknown" in said and "trainable" not in said


def test_an_unknown_gpu_is_named_with_the_known_ones(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    assert run.main(["plan", "--gpu", "toaster"]) == 2
    assert "'toaster' is not in the table: choose one of H200 141GB" in capsys.readouterr().err
