"""What a study would run and need, without downloading or computing anything.

Counts are exact. Memory and hours are estimates from formulas that the plan prints with them; nothing here is
measured on the stated GPU. The words are those of `templates/plan.txt`.
"""

import math
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from huggingface_hub import get_token, try_to_load_from_cache
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from seqdpo_utils import power
from seqdpo_utils.batch import access
from seqdpo_utils.chains import THEN, Chain, tree
from seqdpo_utils.errors import StudyError
from seqdpo_utils.models import lora_config
from seqdpo_utils.pairs import split_sizes
from seqdpo_utils.params import EMBEDDED_MODELS, Parameters, varied
from seqdpo_utils.scoring import HEAD_ROWS

GPUS = {
    "H200 141GB": (989e12, 141e9),  # NVIDIA H200 data sheet: 1,979 TFLOPS with sparsity, half of it without
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
"""Tokens of a pair, its prompt counted once: 180 to 400 on real rows of the four data sets cut to 384."""
_GATED = "meta-llama/Llama-3.1-8B-Instruct"
LIST_MODELS = ("meta-llama/Llama-3.2-1B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct")
"""Models of one to two billion weights, for which a plan says what a list of answers takes."""
LIST_ANSWERS, LIST_LENGTH, LIST_LIMIT = 4, 1024, 20e9
"""Answers in a list, tokens of the longest with its prompt, and what arXiv 2506.19780 says it stays under."""
_SHAPES = {
    _GATED: (128256, 4096, 14336, 32, 32, 8, False),
    LIST_MODELS[0]: (128256, 2048, 8192, 16, 32, 8, True),
    LIST_MODELS[1]: (49152, 2048, 8192, 24, 32, 32, True),
}  # from the configuration files on their pages on the hub
_SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SHAPE_KEYS += ("num_key_value_heads", "tie_word_embeddings")
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "nf4": 0.52}  # nf4: four bits and doubly quantised constants
CONFLICT_COPIES = 6  # gradients kept at once while conflict is measured
LEDGER_COPIES = 4  # weights of two points, the move between them, the gradient of the pair at hand
NORMS = {"bfloat16": 14, "float32": 8}  # in float32 the norms and the LoRA maps keep no copies of their own


class Shape(NamedTuple):
    """Weights of a model with its adapter, and the widths that memory depends on."""

    base: int
    quantisable: int
    trainable: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


class Work(NamedTuple):
    """Optimiser steps, and pairs that go through the model, by what is done with them."""

    steps: int
    trained: int
    measured: int
    scored: int


def _config_file(root: Path, parameters: Parameters) -> Path | None:
    """The base model's configuration: in a folder, else in the local cache of the hub."""
    name, revision = parameters.base_model, parameters.base_model_revision
    if (root / name).is_dir():
        return root / name / "config.json"
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def shape_of(root: Path, parameters: Parameters) -> Shape | None:
    """Count weights by building model and adapter on the meta device, which holds no numbers.

    Returns:
        None when only a download could tell the architecture of the base model.
    """
    file, known = _config_file(root, parameters), _SHAPES.get(parameters.base_model)
    if not file and not known:
        return None
    widths = dict(zip(_SHAPE_KEYS, known, strict=True)) if known else {}
    config = LlamaConfig(**widths) if known else AutoConfig.from_pretrained(file.parent)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, parameters.dtype))
        base, head = model.num_parameters(), model.get_output_embeddings()
        linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
        quantisable = sum(part.weight.numel() for part in linear)
        trainable, _ = get_peft_model(model, lora_config(parameters)).get_nb_trainable_parameters()
    widths = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)
    return Shape(base, quantisable, trainable, *widths)


def stages_of(root: Path, setting: Parameters, chains: Iterable[str]) -> list[Parameters]:
    """Parameters of every stage that the chains of a setting need, a shared beginning once."""
    needed = tree(map(Chain.parse, chains))
    return [setting.model_copy(update={"chain": str(chain)} | varied(root, chain.last)) for chain in needed]


def stage_work(stage: Parameters) -> Work:
    """What one stage trains, measures of earlier objectives and scores."""
    chain, objectives = Chain.parse(stage.chain), len(stage.objectives)
    pairs = max(1, round(stage.train_share * stage.train_pairs * len(chain.last.objectives)))
    if stage.lambdas:  # a list holds about two pairs of answers, and serves all objectives of the stage
        pairs = stage.train_pairs
    steps = math.ceil(pairs / stage.pairs_per_step) * stage.epochs
    batches = math.ceil(steps / stage.conflict_every) if stage.conflict_every else 0
    points = 1 + math.ceil(steps / stage.ledger_every) if stage.ledger_pairs else 0
    # on training pairs, and on as many held-out ones where there are any
    both = len(chain.earlier) * (2 if stage.probe_pairs else 1)
    measured = both * (batches * stage.conflict_pairs + points * stage.ledger_pairs)
    measured += steps * stage.conflict_pairs if stage.projection else 0
    splits = {"train": stage.train_pairs, "eval": stage.eval_pairs}
    scored = objectives * sum(splits[split] for split in set(stage.scored_splits))
    scored += objectives * 2 * min(stage.kl_pairs, stage.eval_pairs)  # KL from the base: policy and base
    scored += pairs if stage.reference else 0  # by the stage before
    kept = (steps - 1) // stage.keep_every if stage.keep_every else 0
    scored += objectives * kept * stage.eval_pairs
    return Work(steps, pairs * stage.epochs, measured, scored)


def work(settings: list[Parameters], stages: list[Parameters], *, seeds: int) -> Work:
    """The whole study: the base model's sums of every setting, and each stage once a seed."""
    base = sum(len(each.objectives) * sum(split_sizes(each).values()) for each in settings)
    total = Work(*(seeds * sum(column) for column in zip(*map(stage_work, stages), strict=True)))
    return total._replace(scored=total.scored + base)


def notebooks(stages: list[Parameters], chains: dict[str, list[str]], *, seeds: int) -> dict[str, int]:
    """How often each notebook is executed: once a study, a setting, a stage, or a chosen chain."""
    later, asked = sum(THEN in stage.chain for stage in stages), sum(map(len, chains.values()))
    counts = {"02": len(stages) - later, "03": later, "04": asked, "05": asked, "06": asked}
    return {"00": 1, "01": len(chains)} | {name: seeds * count for name, count in counts.items()} | {"07": 1}


def memory(shape: Shape, parameters: Parameters, *, tokens: int, checkpointing: bool) -> dict[str, float]:
    """Bytes on the GPU at the height of a training step, by what holds them; an estimate.

    Args:
        shape: from `shape_of`.
        parameters: of the study.
        tokens: in one pair, its prompt counted once.
        checkpointing: whether only the input of each layer is kept.

    Returns:
        Weights, adapter, its gradient, AdamW's two moments, what measuring keeps, activations, logits.
    """
    number, linear = _BYTES[parameters.dtype], _BYTES[parameters.quantization or parameters.dtype]
    # PEFT keeps the adapter in float32; TRL turns it to bfloat16 over a quantised base
    gradient = shape.trainable * (2.0 if parameters.quantization else 4.0)
    copies = CONFLICT_COPIES * bool(parameters.conflict_every) + LEDGER_COPIES * bool(parameters.ledger_pairs)
    rows = parameters.pairs_per_device * tokens
    layer = rows * activations_a_token(shape, parameters.dtype) * number
    inputs = shape.layers * rows * shape.hidden * number
    return {
        "base weights": shape.quantisable * linear + (shape.base - shape.quantisable) * number,
        "adapter": gradient,
        "gradient": gradient,
        "AdamW": 2 * gradient,
        "measuring": copies * gradient,
        "activations": inputs + layer if checkpointing else shape.layers * layer,
        "logits": 3 * 4.0 * HEAD_ROWS * shape.vocabulary,
    }


def list_memory(root: Path, parameters: Parameters) -> dict[str, float]:
    """Bytes at the height of a listwise step of one list, for `LIST_MODELS` in bfloat16; an estimate.

    A list of N answers is one row in which the prompt stands once. At most, N whole answers beside no prompt:
    that is what is counted. Nothing is measured of earlier objectives, and activations are computed again.
    """
    changes = {"dtype": "bfloat16", "quantization": None, "pairs_per_device": 1}
    changes |= {"conflict_every": 0, "ledger_pairs": 0, "base_model_revision": None}
    found = {}
    for name in LIST_MODELS:
        model = parameters.model_copy(update=changes | {"base_model": name})
        size = {"tokens": LIST_ANSWERS * LIST_LENGTH, "checkpointing": True}
        found[name] = sum(memory(shape_of(root, model), model, **size).values())
    return found


def activations_a_token(shape: Shape, dtype: str) -> int:
    """Numbers that autograd keeps a token and layer of a Llama with LoRA on its seven linear maps.

    Counted from the layer's backward pass: the inputs of the norms, of the LoRA maps and of attention are as
    wide as `hidden`, four more as `intermediate`.
    """
    return NORMS[dtype] * shape.hidden + 4 * shape.intermediate


def hours(shape: Shape, amount: Work, parameters: Parameters, *, tokens: int, peak: float) -> float:
    """Hours of computing at `UTILISATION` of `peak` FLOP a second, notebooks' starts and figures left out."""
    operations = tokens * (shape.base + shape.trainable) * effort(amount, parameters)
    return operations / (peak * UTILISATION) / 3600


def effort(amount: Work, parameters: Parameters) -> int:
    """FLOP a token and weight: 2 forward, 2 backward, and 2 where activations are computed again."""
    a_step = 6 if parameters.activation_checkpointing else 4
    return (amount.trained + amount.measured) * a_step + amount.scored * 2


def scoring_share(settings: list[Parameters], stages: list[Parameters], *, seeds: int) -> float:
    """Share of a study's FLOP that grows with held-out pairs."""
    without = [[each.model_copy(update={"eval_pairs": 0}) for each in part] for part in (settings, stages)]
    efforts = [effort(work(*parts, seeds=seeds), settings[0]) for parts in (without, (settings, stages))]
    return 1 - efforts[0] / efforts[1]


def decides(
    root: Path, settings: list[Parameters], stages: list[Parameters], *, seeds: int, scale: str
) -> tuple[str, list[str]]:
    """Whose spreads are used, and what a study of this size decides by them; notebook 07 says the same."""
    (typical, measured), first = power.known(root, scale), settings[0]
    later = [stage_work(stage).steps for stage in stages if THEN in stage.chain]
    size = {"prompts": first.eval_pairs, "seeds": seeds}
    lines = power.decidable_in_words(typical, **size)
    if later and first.conflict_every:
        count = math.ceil(max(later) / first.conflict_every)
        lines.append(power.gradients_in_words(typical, half=first.conflict_pairs // 2, count=count))
    lines.append(power.run_spread_in_words(typical, measured, seeds=seeds))
    share = scoring_share(settings, stages, seeds=seeds)
    return measured, [*lines, power.cheapest_in_words(typical, **size, scoring=share)]


def text(root: Path, settings: list[Parameters], config: dict[str, Any], *, gpu: str, tokens: int) -> str:
    """The whole plan, what is missing last.

    Args:
        root: the project's folder.
        settings: parameters of each setting that has chains.
        config: as `study` takes it: chains by setting, seeds.
        gpu: one of `GPUS`.
        tokens: typical tokens of a pair.

    Raises:
        StudyError: for a GPU that is not in the table.
    """
    if gpu not in GPUS:
        raise StudyError(f"gpu {gpu!r} is not in the table: choose one of {', '.join(GPUS)}.")
    stages = {each.setting: stages_of(root, each, config["chains"][each.setting]) for each in settings}
    every = [stage for each in stages.values() for stage in each]
    shape, adapters = shape_of(root, settings[0]), (len(every) + 1) * len(config["seeds"])
    missing = [fault for each in settings for fault in access.faults(root, each)]
    missing += _lacks(root, shape, settings, gpu=gpu, adapters=adapters) if shape else []
    says = {"root": root, "settings": settings, "stages": stages, "every": every, "shape": shape, "gpu": gpu}
    says |= {"tokens": tokens, "missing": list(dict.fromkeys(missing))}
    found = decides(root, settings, every, seeds=len(config["seeds"]), scale=config["scale"])
    says |= dict(zip(("measured", "decided"), found, strict=True))
    template = (files("seqdpo_utils.batch") / "templates" / "plan.txt").read_text(encoding="utf-8")
    # the template calls the functions of this module, reads its constants and what a study is told
    return jinja2.Template(template, trim_blocks=True).render(config | globals() | says)


def _lacks(root: Path, shape: Shape, settings: list[Parameters], *, gpu: str, adapters: int) -> list[str]:
    """A token, room on the GPU, a GPU at all, room on the disk: a sentence for each that is missing."""
    first, found = settings[0], []
    name, saving = first.base_model, first.activation_checkpointing
    download = name not in EMBEDDED_MODELS and not _config_file(root, first)
    if name == _GATED and download and not get_token():
        remedy = "Accept its terms on its page on the hub, then set HF_TOKEN or run `hf auth login`"
        found.append(f"no token: {name} is gated. {remedy}.")
    needed = sum(memory(shape, first, tokens=2 * first.max_length, checkpointing=saving).values())
    if needed > GPUS[gpu][1]:
        remedy = "Lower pairs_per_device, set activation_checkpointing or quantization, or take a larger GPU"
        found.append(f"room on a {gpu}: about {needed / 1e9:.0f} GB are needed. {remedy}.")
    elif shape.base > 10**9 and not torch.accelerator.is_available():
        weights = f"{shape.base / 1e9:.1f} billion weights are too many for a CPU"
        found.append(f"no GPU here: torch {torch.__version__} sees none, and {weights}.")
    # a download has two bytes a weight, an adapter four; a stage keeps two checkpoints with their optimiser
    weights = 2 * shape.base * download + shape.trainable * (4 * adapters + 2 * (4 + 8))
    texts = sum(len(each.objectives) * sum(split_sizes(each).values()) for each in settings)
    disk = access.disk_fault(root, needed=weights + texts * 8 * first.max_length + access.LEAST_FREE)
    return [*found, disk] if disk else found
