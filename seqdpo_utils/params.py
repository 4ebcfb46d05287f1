"""Parameters: two YAML files, an order and a seed become one checked, flat dictionary.

A value is wrong before any compute, or it is right: unknown keys, wrong types and values out of range stop here with
the file, the key, the value and what is allowed.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from seqdpo_utils.paths import StudyError

LAYOUT_OBJECTIVES = {
    "hh_rlhf": ("helpful", "harmless"),
    "helpsteer2": ("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
    "pku_saferlhf": ("helpful", "safe"),
    "ultrafeedback": ("instruction_following", "truthfulness", "honesty", "helpfulness"),
}
"""Objectives that each layout carries labels for. Of `verbosity` the lower rating is preferred."""

EMBEDDED_MODELS = ("models/smollm2-135m-instruct", "models/tiny-random-llama")
"""Values of `base_model` that `seqdpo_utils.models.prepare_model` builds."""

Word = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")]  # never upward


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Scale(_Checked):
    """What a run costs: model, adapter, sizes, trainer (`params/scales/<scale>.yaml`)."""

    label: str
    rows: Annotated[str, Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    base_model: str
    base_model_revision: str | None
    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["nf4"] | None
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    lora_rank: Count
    lora_alpha: Count
    lora_dropout: Share
    lora_targets: Annotated[list[str], Field(min_length=1)]
    learning_rate: Positive
    beta: Positive
    epochs: Count
    pairs_per_step: Count
    pairs_per_device: Count
    warmup_ratio: Share
    max_grad_norm: Positive
    activation_checkpointing: bool
    max_length: Annotated[int, Field(ge=16)]
    train_pairs: Count
    eval_pairs: Annotated[int, Field(ge=2)]
    conflict_every: Annotated[int, Field(ge=0)]
    conflict_pairs: Annotated[int, Field(ge=2)]
    ledger_every: Count
    probe_pairs: Annotated[int, Field(ge=0)]
    kl_pairs: Annotated[int, Field(ge=0)]
    scored_splits: Annotated[list[Literal["train", "eval"]], Field(min_length=1)]
    token_budget: Annotated[int, Field(ge=64)]
    resamples: Annotated[int, Field(ge=100)]

    @model_validator(mode="after")
    def _whole_batches(self) -> "Scale":
        if self.pairs_per_step % self.pairs_per_device:
            raise ValueError(f"pairs_per_step = {self.pairs_per_step} must be a multiple of pairs_per_device = {self.pairs_per_device}")
        if self.conflict_pairs % 2:
            raise ValueError(f"conflict_pairs = {self.conflict_pairs} must be even: it is split into two halves")
        return self


class Setting(_Checked):
    """What is learned: data source and objectives (`params/settings/<setting>.yaml`)."""

    source: Annotated[str, Field(min_length=1)]
    subset: Folder | None
    revision: str | None
    layout: Literal["hh_rlhf", "helpsteer2", "pku_saferlhf", "ultrafeedback"]
    objectives: Annotated[list[Word], Field(min_length=2)]
    relationship: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _known_objectives(self) -> "Setting":
        known = LAYOUT_OBJECTIVES[self.layout]
        unknown = [name for name in self.objectives if name not in known]
        if unknown:
            raise ValueError(f"unknown objective {unknown[0]!r} for layout {self.layout}; it has {', '.join(known)}")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives {self.objectives} name one objective twice")
        return self


def load_yaml(file: Path, kind: type[_Checked], overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read one parameter file, lay `overrides` for its keys over it, and check the result.

    Args:
        file: a YAML mapping.
        kind: `Scale` or `Setting`.
        overrides: values from the command line; keys of the other kind are left alone.

    Raises:
        StudyError: naming file, key, value and what is allowed.
    """
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise StudyError(f"{file.name} is not among {file.parent.name}: choose one of {known}.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise StudyError(f"{file}: not valid YAML ({error}).") from error
    if not isinstance(content, dict):
        raise StudyError(f"{file}: expected one 'key: value' a line, found {type(content).__name__}.")
    mine = {key: value for key, value in (overrides or {}).items() if key in kind.model_fields}
    try:
        return kind.model_validate(content | mine).model_dump()
    except ValidationError as error:
        raise StudyError(_explain(error, file, kind, from_command_line=set(mine))) from error


def _explain(error: ValidationError, file: Path, kind: type[_Checked], *, from_command_line: set[str]) -> str:
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        where = "the command line" if key in from_command_line else str(file)
        if fault["type"] == "extra_forbidden":
            message = f"unknown key; the known keys are {', '.join(kind.model_fields)}"
        elif fault["type"] == "missing":
            message = "missing"
        elif key:
            message = f"{fault['msg']}, got {fault['input']!r}"
            if fault["type"] == "float_type" and isinstance(fault["input"], str):
                message += " (YAML reads 1e-4 as text: write 1.0e-4)"
        else:
            message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {key + ': ' if key else ''}{message}.")
    return "\n".join(lines)


def check_word(value: str, what: str) -> str:
    """Return `value` if it may be part of a file name (lower-case letters, digits, underscore).

    Raises:
        StudyError: otherwise, naming the value and what it was to be.
    """
    if not value or not value.replace("_", "a").isalnum() or not value.isascii() or value != value.lower():
        raise StudyError(f"{what} {value!r} is not a name: use lower-case letters, digits and underscores only.")
    return value


def orders_of(setting: dict[str, Any]) -> list[str]:
    """Both directions of a setting's objectives, written "a-then-b"."""
    forward = setting["objectives"]
    return ["-then-".join(forward), "-then-".join(reversed(forward))]


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Turn `key=value` words from the command line into values, read as YAML.

    Raises:
        StudyError: for a word without "=", or a key that neither scale nor setting has.
    """
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise StudyError(f"{word!r} is not of the form key=value.")
        if key not in Scale.model_fields and key not in Setting.model_fields:
            known = ", ".join([*Scale.model_fields, *Setting.model_fields])
            raise StudyError(f"the command line: {key}: unknown key; the known keys are {known}.")
        values[key] = yaml.safe_load(value)
    return values


def source_of(root: Path, *, rows: str, hub_id: str) -> str:
    """Where a setting's rows are read from, as its scale decides.

    Args:
        root: the project's folder.
        rows: "embedded", "hub", or a folder (relative to the project) that holds local copies named like the last part of their hub ids.
        hub_id: the setting's data set, for example Anthropic/hh-rlhf; a path, too, is left as it is under "hub".

    Returns:
        "embedded", the hub id, or the folder of the copy; upper and lower case are one here. Whether it is there is checked later.
    """
    if rows in ("embedded", "hub"):
        return "embedded" if rows == "embedded" else hub_id
    name = hub_id.rpartition("/")[2].casefold()
    place = root / rows
    found = sorted(path.name for path in place.iterdir() if path.name.casefold() == name) if place.is_dir() else []
    folder = rows.rstrip("/") if rows.startswith(("/", ".")) or Path(rows).is_absolute() else f"./{rows.rstrip('/')}"  # never taken for a hub id
    return f"{folder}/{found[0] if found else name}"


def resolve(root: Path, *, scale: str, setting: str, order: str | None = None, seed: int = 0, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """All parameters of one chain, flat: scale, then setting, then order and seed, then the command line.

    `source` becomes the place that `rows` asks for, unless the command line gives a `source` of its own.

    Args:
        root: the project's folder.
        scale, setting: names of files in `params/scales` and `params/settings`.
        order: objectives joined by "-then-"; the setting's own order when None.
        seed: rules the adapter's start, the order of the pairs and the conflict batches.
        overrides: values that win over the files.

    Raises:
        StudyError: for anything unknown, of the wrong type or out of range.
    """
    check_word(scale, "scale")
    check_word(setting, "setting")
    flat = load_yaml(root / "params" / "scales" / f"{scale}.yaml", Scale, overrides)
    flat |= load_yaml(root / "params" / "settings" / f"{setting}.yaml", Setting, overrides)
    if "source" not in (overrides or {}):
        flat["source"] = source_of(root, rows=flat["rows"], hub_id=flat["source"])
    order = order or orders_of(flat)[0]
    if sorted(order.split("-then-")) != sorted(flat["objectives"]):
        raise StudyError(f"order {order!r} does not hold the objectives of {setting}: {', '.join(flat['objectives'])}.")
    _check_seed(seed)
    return flat | {"scale": scale, "setting": setting, "order": order, "seed": seed}


def from_notebook(root: Path, namespace: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a notebook's cell declares, checked as the batch checks them.

    Args:
        root: the project's folder.
        namespace: the notebook's `globals()`; it must hold `scale` and `setting`.

    Returns:
        Only the declared ones, so that a notebook cannot lean on a value that it does not show.

    Raises:
        StudyError: as `resolve`.
    """
    mine = {key: namespace[key] for key in (*Scale.model_fields, *Setting.model_fields) if key in namespace}
    chain = {key: namespace[key] for key in ("scale", "setting", "order", "seed") if key in namespace}
    checked = load_yaml(root / "params" / "scales" / f"{check_word(chain['scale'], 'scale')}.yaml", Scale, mine)
    checked |= load_yaml(root / "params" / "settings" / f"{check_word(chain['setting'], 'setting')}.yaml", Setting, mine)
    for objective in chain.get("order", "any").split("-then-"):
        check_word(objective, "objective")
    _check_seed(chain.get("seed", 0))
    return {key: checked[key] for key in mine} | chain


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise StudyError(f"seed {seed!r} is not a whole number of 0 or more.")
