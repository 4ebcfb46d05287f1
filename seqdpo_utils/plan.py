"""What a study would run and need, without downloading or computing anything.

Counts are exact. Memory and hours are estimates from formulas that the plan prints with them; nothing here is measured on the stated GPU.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token, try_to_load_from_cache
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from seqdpo_utils import access
from seqdpo_utils.models import lora_config
from seqdpo_utils.params import EMBEDDED_MODELS, orders_of
from seqdpo_utils.paths import StudyError
from seqdpo_utils.scoring import HEAD_ROWS

GPUS = {
    "H200 141GB": (989e12, 141e9),  # NVIDIA H200 data sheet: 1,979 TFLOPS bfloat16 with sparsity, half of it without
    "H100 80GB": (989e12, 80e9),  # NVIDIA H100 data sheet, SXM
    "A100 80GB": (312e12, 80e9),  # NVIDIA A100 data sheet
    "A100 40GB": (312e12, 40e9),  # NVIDIA A100 data sheet
    "L40S 48GB": (362e12, 48e9),  # NVIDIA L40S data sheet, without sparsity
    "RTX 4090 24GB": (165e12, 24e9),  # NVIDIA Ada architecture paper, float32 accumulation
}
"""Dense bfloat16 FLOP a second at the most, and bytes of memory."""
UTILISATION = 0.3
"""Share of the peak that the estimate assumes: ours, not measured. Short rows and small batches lower it."""
TYPICAL_TOKENS = 300
"""Tokens of a pair, its prompt counted once: 180 to 400 on real rows of the four data sets fitted to 384 tokens."""
_GATED_SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False
    ),
}  # fmt: skip
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "nf4": 0.52}  # nf4: four bits and doubly quantised constants
_CONFLICT_COPIES = 6  # gradients kept at once while conflict is measured
_LEDGER_COPIES = 3  # the last point's weights and gradient, and the gradient being taken


@dataclass(frozen=True)
class Shape:
    """Weights of a model with its adapter, counted on the meta device, and the widths that memory depends on."""

    base: int
    quantisable: int
    trainable: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Work:
    """Pairs that go through the model in the whole study, by what is done with them, and the optimiser steps of one stage."""

    steps_a_stage: int
    trained: int
    measured: int
    scored: int


def model_config(root: Path, flat: dict[str, Any]) -> PretrainedConfig | None:
    """The architecture of the base model from what is known or lies here already; None when only a download could tell."""
    name = flat["base_model"]
    if name in _GATED_SHAPES:
        return _GATED_SHAPES[name]
    cached = try_to_load_from_cache(name, "config.json", revision=flat["base_model_revision"]) if not (root / name).is_dir() else None
    place = Path(cached).parent if isinstance(cached, str) else root / name
    return AutoConfig.from_pretrained(place) if (place / "config.json").is_file() else None


def shape_of(config: PretrainedConfig, flat: dict[str, Any]) -> Shape:
    """Count weights by building model and adapter without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, flat["dtype"]))
        base, head = model.num_parameters(), model.get_output_embeddings()
        linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
        quantisable = sum(part.weight.numel() for part in linear)
        trainable, _ = get_peft_model(model, lora_config(flat)).get_nb_trainable_parameters()
    widths = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)
    return Shape(base, quantisable, trainable, *widths)


def notebooks(chosen: list[dict[str, Any]], seeds: list[int]) -> dict[str, int]:
    """How often each notebook is executed: once a study, a setting, a chain, or a later stage of a chain."""
    chains = {flat["setting"]: len(orders_of(flat)) * len(seeds) for flat in chosen}
    once_a_chain = dict.fromkeys(("02", "04", "05", "06"), sum(chains.values()))
    later = sum(chains[flat["setting"]] * (len(flat["objectives"]) - 1) for flat in chosen)
    return dict(sorted({"00": 1, "01": len(chosen), **once_a_chain, "03": later, "07": 1}.items()))


def work(chosen: list[dict[str, Any]], seeds: list[int]) -> Work:
    """Pairs trained on, measured (gradients for conflict and ledger) and scored (drift from the base included), as many as the parameters ask for."""
    trained = measured = scored = 0
    for flat in chosen:
        objectives, chains = len(flat["objectives"]), len(orders_of(flat)) * len(seeds)
        steps = math.ceil(flat["train_pairs"] / flat["pairs_per_step"]) * flat["epochs"]
        measurements = math.ceil(steps / flat["conflict_every"]) if flat["conflict_every"] else 0
        points = 1 + math.ceil(steps / flat["ledger_every"]) if flat["probe_pairs"] else 0
        earlier = objectives * (objectives - 1) // 2
        trained += chains * objectives * flat["train_pairs"] * flat["epochs"]
        measured += chains * earlier * (measurements * flat["conflict_pairs"] + points * flat["probe_pairs"])
        scored += objectives * (flat["train_pairs"] + flat["eval_pairs"])
        scored += chains * objectives * objectives * sum(flat[f"{split}_pairs"] for split in set(flat["scored_splits"]))
        scored += chains * objectives * objectives * 2 * min(flat["kl_pairs"], flat["eval_pairs"])  # policy and base
    return Work(steps, trained, measured, scored)


def memory(shape: Shape, flat: dict[str, Any], *, tokens: int, checkpointing: bool) -> dict[str, float]:
    """Bytes on the GPU at the height of a training step, by what holds them; an estimate.

    Args:
        shape: from `shape_of`.
        flat: the parameters.
        tokens: in one pair, its prompt counted once.
        checkpointing: whether only the input of each layer is kept.

    Returns:
        Weights, adapter, its gradient, AdamW's two moments, the gradients of conflict and ledger, activations and logits.
    """
    number = _BYTES[flat["dtype"]]
    linear = _BYTES[flat["quantization"] or flat["dtype"]]
    trained = 2.0 if flat["quantization"] else 4.0  # PEFT keeps the adapter in float32, TRL turns it to bfloat16 over a quantised base
    gradient = shape.trainable * trained
    rows = flat["pairs_per_device"] * tokens
    layer = rows * (activations_a_token(shape, flat["dtype"])) * number
    kept = shape.layers * rows * shape.hidden * number + layer if checkpointing else shape.layers * layer
    return {
        "base weights": shape.quantisable * linear + (shape.base - shape.quantisable) * number,
        "adapter": gradient,
        "gradient": gradient,
        "AdamW": 2 * gradient,
        "measuring": (_CONFLICT_COPIES if flat["conflict_every"] else 0) * gradient + (_LEDGER_COPIES if flat["probe_pairs"] else 0) * gradient,
        "activations": kept,
        "logits": 3 * 4.0 * HEAD_ROWS * shape.vocabulary,
    }


def activations_a_token(shape: Shape, dtype: str) -> int:
    """Numbers that autograd keeps a token and layer of a Llama with LoRA on its seven linear maps.

    Counted from the layer's backward pass: the inputs of the norms, of the LoRA maps and of attention are as wide as `hidden`, four more as
    `intermediate`. In float32 the norms and the LoRA maps keep no copies of their own.
    """
    return (14 if dtype == "bfloat16" else 8) * shape.hidden + 4 * shape.intermediate


def hours(shape: Shape, amount: Work, flat: dict[str, Any], *, tokens: int, peak: float) -> float:
    """Hours of computing at `UTILISATION` of `peak` FLOP a second, notebooks' starts and figures left out."""
    weights = shape.base + shape.trainable
    a_step = (6 if flat["activation_checkpointing"] else 4) * weights
    operations = tokens * ((amount.trained + amount.measured) * a_step + amount.scored * 2 * weights)
    return operations / (peak * UTILISATION) / 3600


def lines(root: Path, chosen: list[dict[str, Any]], *, seeds: list[int], gpu: str, tokens: int) -> list[str]:
    """The whole plan as text, what is missing last.

    Args:
        root: the project's folder.
        chosen: the flat parameters of every setting.
        seeds: of the chains.
        gpu: one of `GPUS`.
        tokens: typical tokens of a pair.

    Raises:
        StudyError: for a GPU that is not in the table.
    """
    if gpu not in GPUS:
        raise StudyError(f"gpu {gpu!r} is not in the table: choose one of {', '.join(GPUS)}.")
    flat, config = chosen[0], model_config(root, chosen[0])
    shape = shape_of(config, flat) if config is not None else None
    amount = work(chosen, seeds)
    said = _what_runs(chosen, seeds, amount)
    said += (
        _what_it_takes(shape, amount, flat, gpu=gpu, tokens=tokens) if shape else [f"\nThe shape of {flat['base_model']} is unknown until it was downloaded."]
    )
    return [*said, *_what_is_missing(root, chosen, seeds=seeds, shape=shape, gpu=gpu)]


def _what_runs(chosen: list[dict[str, Any]], seeds: list[int], amount: Work) -> list[str]:
    flat, counted = chosen[0], notebooks(chosen, seeds)
    chains = sum(len(orders_of(each)) * len(seeds) for each in chosen)
    return [
        f"{flat['label']}",
        f"settings    {', '.join(each['setting'] for each in chosen)}; both orders; seeds {', '.join(map(str, seeds))}: {chains} chains",
        f"notebooks   {sum(counted.values())}: " + ", ".join(f"{number} x {count}" for number, count in counted.items()),
        f"pairs       {flat['train_pairs']:,} to train and {flat['eval_pairs']:,} to evaluate an objective, as asked for; a source may have fewer",
        f"steps       {amount.steps_a_stage:,} optimiser steps a stage of {flat['pairs_per_step']} pairs, at most {flat['max_length']} tokens of prompt and longer answer",
        f"in all      {amount.trained:,} pairs trained, {amount.measured:,} measured for conflict and ledger, {amount.scored:,} scored",
    ]


def _what_it_takes(shape: Shape, amount: Work, flat: dict[str, Any], *, gpu: str, tokens: int) -> list[str]:
    peak, room = GPUS[gpu]
    most = 2 * flat["max_length"]
    parts = memory(shape, flat, tokens=most, checkpointing=flat["activation_checkpointing"])
    totals = {both: sum(memory(shape, flat, tokens=most, checkpointing=both).values()) for both in (True, False)}
    factor = 14 if flat["dtype"] == "bfloat16" else 8
    return [
        f"\nmodel       {flat['base_model']}, {flat['quantization'] or flat['dtype']}",
        f"weights     {shape.base:,} base, {shape.trainable:,} trainable, {shape.trainable / (shape.base + shape.trainable):.2%} of both",
        f"optimizer   {parts['AdamW'] / 1e9:.2f} GB (AdamW: two moments of every trainable weight)",
        f"\nGPU memory at most, for {flat['pairs_per_device']} pairs of {most} tokens at a time, in GB (estimate)",
        "            " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()),
        f"            with activation checkpointing {totals[True] / 1e9:.1f}, without {totals[False] / 1e9:.1f}; {gpu} has {room / 1e9:.0f}",
        f"            activations: tokens x layers x ({factor} x hidden + 4 x intermediate) numbers; under checkpointing hidden a layer, and one layer whole;",
        f"            measuring: {_CONFLICT_COPIES} gradients for conflict, {_LEDGER_COPIES} for the ledger; logits: 3 x {HEAD_ROWS} x vocabulary in float32",
        f"\nhours on one {gpu} (estimate, starts and figures left out)",
        f"            {hours(shape, amount, flat, tokens=tokens, peak=peak):.1f} at {tokens} tokens a pair, {hours(shape, amount, flat, tokens=most, peak=peak):.1f} at {most}, the most",
        f"            tokens x weights x (2 forward + 2 backward{' + 2 recompute' if flat['activation_checkpointing'] else ''}; scoring 2) FLOP,",
        f"            at {UTILISATION:.0%} (assumed) of {peak / 1e12:.0f} TFLOP/s",
    ]


def _what_is_missing(root: Path, chosen: list[dict[str, Any]], *, seeds: list[int], shape: Shape | None, gpu: str) -> list[str]:
    flat = chosen[0]
    found = [fault for each in chosen for fault in access.faults(root, each)]
    if shape is not None:
        found += [_token_fault(root, flat), _gpu_fault(shape, flat, gpu), access.disk_fault(root, needed=disk_bytes(root, shape, chosen, seeds))]
    missing = list(dict.fromkeys(fault for fault in found if fault))
    return ["\nmissing     " + ("nothing" if not missing else ""), *(f"  - {fault}" for fault in missing)]


def _token_fault(root: Path, flat: dict[str, Any]) -> str | None:
    if flat["base_model"] not in _GATED_SHAPES or get_token() or not _to_download(root, flat):
        return None
    return f"no token: {flat['base_model']} is gated. Accept its terms on its page on the hub, then set HF_TOKEN or run `hf auth login`."


def _to_download(root: Path, flat: dict[str, Any]) -> bool:
    name = flat["base_model"]
    here = name in EMBEDDED_MODELS or (root / name).is_dir()
    return not here and not isinstance(try_to_load_from_cache(name, "config.json", revision=flat["base_model_revision"]), str)


def _gpu_fault(shape: Shape, flat: dict[str, Any], gpu: str) -> str | None:
    needed = sum(memory(shape, flat, tokens=2 * flat["max_length"], checkpointing=flat["activation_checkpointing"]).values())
    if needed > GPUS[gpu][1]:
        return f"room on a {gpu}: about {needed / 1e9:.0f} GB are needed. Lower pairs_per_device, set activation_checkpointing or quantization, or take a larger GPU."
    if shape.base > 10**9 and not torch.accelerator.is_available():
        return f"no GPU here: torch {torch.__version__} sees none, and {shape.base / 1e9:.1f} billion weights are too many for a CPU."
    return None


def disk_bytes(root: Path, shape: Shape, chosen: list[dict[str, Any]], seeds: list[int]) -> int:
    """Bytes to download (a hub model that is not here, two a weight) and to write: adapters in float32, two checkpoints of a stage with its optimiser, records and texts."""
    flat = chosen[0]
    adapters = sum(len(orders_of(each)) * len(seeds) * (len(each["objectives"]) + 1) for each in chosen) * shape.trainable * 4
    checkpoints = 2 * (4 + 8) * shape.trainable
    texts = sum(len(each["objectives"]) * (each["train_pairs"] + each["eval_pairs"]) for each in chosen) * 8 * flat["max_length"]
    return int(2 * shape.base * _to_download(root, flat) + adapters + checkpoints + texts) + access.LEAST_FREE
