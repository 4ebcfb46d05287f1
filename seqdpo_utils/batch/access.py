"""Whether what a study needs can be had, asked before anything is computed or downloaded.

Every function answers with one sentence that says what is missing and what to do, or with None.
"""

import re
import shutil
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from seqdpo_utils.layouts import LAYOUTS
from seqdpo_utils.params import EMBEDDED_MODELS, Parameters

LEAST_FREE = 10**9
"""Bytes that a study at the smaller scales may come to write."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_OUT_OF_REACH = "Check the connection, unset HF_HUB_OFFLINE, try again later, or give a local folder."
_PACKAGES = {
    "nf4": ("quantization", "bitsandbytes", "pip install -e '.[quantised]'"),
    "flash_attention_2": ("attention", "flash_attn", "pip install flash-attn"),
}
"""Optional package behind a parameter's value: the parameter, the package, how to get it."""


def faults(root: Path, parameters: Parameters) -> list[str]:
    """What stands in the way of a run: model, source, packages; empty when nothing does."""
    model = model_fault(root, parameters.base_model, revision=parameters.base_model_revision)
    packages = (package_fault(value) for value in (parameters.quantization, parameters.attention))
    return [sentence for sentence in (model, source_fault(root, parameters), *packages) if sentence]


def model_fault(root: Path, base_model: str, *, revision: str | None = None) -> str | None:
    """What keeps a base model from being loaded. Embedded models are built by the study itself."""
    what, place = f"base_model {base_model!r}", root / base_model
    if base_model in EMBEDDED_MODELS or (place / "config.json").is_file():
        return None
    if place.exists():
        return f"{what} is no folder of a model: it holds no config.json."
    if not _HUB_ID.match(base_model) or base_model.startswith("models/"):
        return f"{what} is not there: give a folder with a model in transformers' format, or a hub id."
    return _hub_fault(base_model, revision, kind="model", what="base_model")


def source_fault(root: Path, parameters: Parameters) -> str | None:
    """What keeps the rows of a setting from being read, without reading them."""
    if isinstance(parameters.source, dict):
        places = [place | {"objectives": [name]} for name, place in parameters.source.items()]
        each = (source_fault(root, parameters.model_copy(update=place)) for place in places)
        return next(filter(None, each), None)
    source, place = parameters.source, root / parameters.source
    what = f"source {source!r} of {parameters.setting}"
    if source == "embedded" or place.is_file():
        return None
    if place.is_dir():
        inside, subset = LAYOUTS[parameters.layout].folders, Path(parameters.subset or "")
        folders = [subset / inside.get(name, "") for name in parameters.objectives]
        absent = [f"'{folder}'" for folder in folders if not (place / folder).is_dir()]
        lack = f"{what} has no folder {', '.join(absent)}: the copy is not whole, or `subset` is wrong."
        return lack if absent else None
    if not _HUB_ID.match(source):
        return f"{what} is not there: give the file or folder, set rows to hub or embedded, or give a hub id."
    return _hub_fault(source, parameters.revision, kind="dataset", what=f"source of {parameters.setting}")


def _hub_fault(name: str, revision: str | None, *, kind: str, what: str) -> str | None:
    """Ask the hub whether it would hand out `name`; where it does not answer, the local cache will do."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.auth_check(name, repo_type=kind)
        if revision is not None:
            huggingface_hub.repo_info(name, repo_type=kind, revision=revision)
        return None
    except errors.GatedRepoError:
        says = "is gated on the hub. Accept its terms there, then set HF_TOKEN or run `hf auth login`."
    except errors.RevisionNotFoundError:
        says = f"has no revision {revision!r}. Give a commit, tag or branch of it, or null for the newest."
    except errors.RepositoryNotFoundError:
        says = f"is no {kind} that the hub shows. Check the name, or run `hf auth login` if it is private."
    except (OSError, errors.HTTPError) as error:
        if _in_cache(name, revision, kind=kind):
            return None
        answer = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        says = f"is neither in the local cache nor to be had from the hub ({answer}). {_OUT_OF_REACH}"
    return f"{what}: {name} {says}"


def _in_cache(name: str, revision: str | None, *, kind: str) -> bool:
    import huggingface_hub
    from datasets import load  # load_dataset itself turns to this class when the hub does not answer

    if kind == "model":
        config = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
        return isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))
    with suppress(OSError):
        return bool(load.CachedDatasetModuleFactory(name).get_module())
    return False


def package_fault(value: str | None) -> str | None:
    """Whether the optional package behind a parameter's value is installed; most values need none."""
    key, package, remedy = _PACKAGES.get(value, ("", "", ""))
    if not package or find_spec(package):
        return None
    return f"{key} = {value!r} needs the package {package}: `{remedy}`, or choose another {key}."


def disk_fault(root: Path, *, needed: int = LEAST_FREE) -> str | None:
    """Whether `needed` bytes are free where the project lies."""
    free = shutil.disk_usage(root).free
    lack = f"{root} has {free / 1e9:.1f} GB free where {needed / 1e9:.1f} GB are needed"
    return None if free >= needed else f"{lack}: make room, or move the project to another disk."
