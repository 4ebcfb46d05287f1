"""Whether what a study needs can be had, asked before anything is computed or downloaded.

Every function answers with one sentence that says what is missing and what to do, or with None.
"""

import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from seqdpo_utils.params import EMBEDDED_MODELS
from seqdpo_utils.sources import HH_FOLDERS

LEAST_FREE = 10**9
"""Bytes that a study at the smaller scales may come to write."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def faults(root: Path, flat: dict[str, Any]) -> list[str]:
    """What stands in the way of a run with these flat parameters: model, source, packages; empty when nothing does."""
    found = (
        model_fault(root, flat["base_model"], revision=flat["base_model_revision"]),
        source_fault(root, flat),
        package_fault("quantization", flat["quantization"], package="bitsandbytes", remedy="pip install -e '.[quantised]'"),
        package_fault("attention", flat["attention"] if flat["attention"].startswith("flash") else None, package="flash_attn", remedy="pip install flash-attn"),
    )
    return [sentence for sentence in found if sentence]


def model_fault(root: Path, base_model: str, *, revision: str | None = None) -> str | None:
    """What keeps a base model from being loaded. Embedded models are built by the study itself."""
    if base_model in EMBEDDED_MODELS or (root / base_model / "config.json").is_file():
        return None
    if (root / base_model).exists():
        return f"base_model {base_model!r} is no folder of a model: it holds no config.json."
    if not _HUB_ID.match(base_model) or base_model.startswith("models/"):
        return f"base_model {base_model!r} is not there: give a folder with a model in transformers' format (from the project on), or a hub id."
    return _hub_fault("base_model", base_model, revision=revision, kind="model", in_cache=lambda: _model_in_cache(base_model, revision))


def source_fault(root: Path, flat: dict[str, Any]) -> str | None:
    """What keeps the rows of a setting from being read, without reading them."""
    source, place = flat["source"], root / flat["source"]
    if source == "embedded" or place.is_file():
        return None
    parts = [HH_FOLDERS[objective] for objective in flat["objectives"]] if flat["layout"] == "hh_rlhf" else [""]
    inside = ["/".join(part for part in (flat["subset"], part) if part) for part in parts]
    if place.is_dir():
        absent = [part for part in inside if not (place / part).is_dir()]
        return f"source {source!r} of {flat['setting']} has no folder {absent[0]!r}: the copy is not whole, or `subset` is wrong." if absent else None
    if not _HUB_ID.match(source):
        return f"source {source!r} of {flat['setting']} is not there: give the file or folder (from the project on), set rows to hub or embedded, or give a hub id."
    return _hub_fault(f"source of {flat['setting']}", source, revision=flat["revision"], kind="dataset", in_cache=lambda: _source_in_cache(source))


def _hub_fault(what: str, name: str, *, revision: str | None, kind: str, in_cache: Callable[[], bool]) -> str | None:
    noun = {"model": "model", "dataset": "data set"}[kind]
    try:
        huggingface_hub.auth_check(name, repo_type=kind)
        if revision is not None:
            huggingface_hub.repo_info(name, repo_type=kind, revision=revision)
    except GatedRepoError:
        return f"{what}: {name} is gated on the hub. Accept its terms on its page there, then set HF_TOKEN or run `hf auth login`."
    except RevisionNotFoundError:
        return f"{what}: the {noun} {name} has no revision {revision!r}. Give a commit, tag or branch of it, or null for the newest."
    except RepositoryNotFoundError:
        return f"{what}: the hub shows no {noun} {name}. Check the name, or log in (`hf auth login`) if it is private."
    except (OSError, HTTPError) as error:
        return None if in_cache() else f"{what}: {name} {_out_of_reach(error)}"
    return None


def _out_of_reach(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "is not in the local cache, and HF_HUB_OFFLINE forbids fetching it. Unset HF_HUB_OFFLINE, or give a local folder."
    if isinstance(error, HfHubHTTPError):
        return f"could not be asked for: the hub answered {error.response.status_code}. Try again later, or give a local folder."
    return f"is not in the local cache, and the hub cannot be reached ({type(error).__name__}). Check the connection, or give a local folder."


def _model_in_cache(name: str, revision: str | None) -> bool:
    config = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))


def _source_in_cache(name: str) -> bool:
    from datasets.load import CachedDatasetModuleFactory  # what load_dataset itself turns to when the hub does not answer

    try:
        CachedDatasetModuleFactory(name).get_module()
    except OSError:
        return False
    return True


def package_fault(key: str, value: str | None, *, package: str, remedy: str) -> str | None:
    """Whether the optional package behind a parameter's value is installed; a value of None needs none."""
    if value is None or find_spec(package):
        return None
    return f"{key} = {value!r} needs the package {package}: `{remedy}`, or choose another {key}."


def disk_fault(root: Path, *, needed: int = LEAST_FREE) -> str | None:
    """Whether `needed` bytes are free where the project lies."""
    free = shutil.disk_usage(root).free
    if free >= needed:
        return None
    return f"{root} has {free / 1e9:.1f} GB free where {needed / 1e9:.1f} GB are needed: make room, or move the project to another disk."
