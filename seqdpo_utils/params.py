"""Parameters: YAML files, a chain, a seed and the command line become one checked, frozen record.

Later wins: `params/defaults.yaml`, the scale, the setting, the command line, and for one stage its variants.
A value is wrong before any compute, or it is right: unknown keys, wrong types and values out of range stop
here with the file, the key, the value and what is allowed.
"""

import math
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from seqdpo_utils.chains import Chain, Stage, check_chain, expand
from seqdpo_utils.errors import StudyError
from seqdpo_utils.layouts import LAYOUTS

EMBEDDED_MODELS = ("models/smollm2-135m-instruct", "models/tiny-random-llama")
"""Values of `base_model` that `seqdpo_utils.models.prepare_model` builds."""
NEEDS_PAIRS = {"flipped": 0.0, "shuffled_labels": False, "train_share": 1.0, "replay": 0.0, "reference": 0.0}
NEEDS_PAIRS |= {"loss_type": ["sigmoid"], "loss_weights": None}
"""Parameters of a stage that say nothing about rated lists, with the values that ask for nothing."""
NEEDS_LISTS = ("lambda_weights", "lambda_in_prompt", "rating_temperature", "schedule_pairs")
"""Parameters of a stage that say nothing about pairs."""
NEEDS_EARLIER = ("reference", "replay", "projection", "prompts_across_stages")
"""Parameters of a stage that mean nothing where no stage came before."""
TAKEN = ("base", "data", "scores", "notebooks")
"""Names that no objective can have: the base model's, and those of folders beside the chains'."""
LOSSES = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
"""The losses that TRL's `DPOConfig.loss_type` offers."""


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4, which has no dot, as text: here it is the number that everybody means."""
    written = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value)
    return float(value) if written else value


Real = Annotated[float, BeforeValidator(_number)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Share = Annotated[Real, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[Real, Field(ge=0.0, lt=1.0)]
Positive = Annotated[Real, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[Real, Field(ge=0.0, allow_inf_nan=False)]
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Training(_Checked):
    """What shapes one stage; a variant may change any of these and nothing else."""

    learning_rate: Positive
    epochs: Count
    pairs_per_step: Count
    warmup_ratio: BelowOne
    max_grad_norm: Positive
    loss_type: Annotated[list[LOSSES], Field(min_length=1)]
    loss_weights: list[Positive] | None
    label_smoothing: Annotated[Real, Field(ge=0.0, lt=0.5)]
    train_share: Annotated[Real, Field(gt=0.0, le=1.0)]
    flipped: Share
    shuffled_labels: bool
    reference: NotNegative
    beta_factor: Positive
    replay: BelowOne
    projection: Literal["earlier", "placebo"] | None
    prompts_across_stages: Literal["shared", "disjoint"]
    lambdas: Literal["fixed", "uniform", "grid", "dirichlet", "learned"] | None
    lambda_weights: list[Share] | None
    lambda_in_prompt: bool
    rating_temperature: Positive
    schedule_pairs: Annotated[int, Field(ge=2)]


class Model(_Checked):
    """The base model, its adapter, and what else every stage of a study has in common."""

    base_model: str
    base_model_revision: str | None
    dtype: Literal["float32", "bfloat16"]
    quantization: Literal["nf4"] | None
    lora_rank: Count
    lora_alpha: Count
    lora_dropout: BelowOne
    lora_targets: Annotated[list[str], Field(min_length=1)]
    beta: Positive
    pairs_per_device: Count


class Scale(Model, Training):
    """What a run costs: model, adapter, sizes, trainer (defaults.yaml and the scale's file)."""

    label: str
    rows: Annotated[str, Field(min_length=1)]
    seeds: Annotated[list[CountOrNone], Field(min_length=1)]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    activation_checkpointing: bool
    max_length: Annotated[int, Field(ge=16)]
    train_pairs: Count
    eval_pairs: Annotated[int, Field(ge=2)]
    probe_pairs: CountOrNone
    fresh_pairs: CountOrNone
    conflict_every: CountOrNone
    conflict_pairs: Annotated[int, Field(ge=2, multiple_of=2)]
    ledger_every: Count
    ledger_pairs: CountOrNone
    keep_every: CountOrNone
    kl_pairs: CountOrNone
    scored_splits: Annotated[list[Literal["train", "eval"]], Field(min_length=1)]
    token_budget: Annotated[int, Field(ge=64)]
    resamples: Annotated[int, Field(ge=100)]


def _place(written: Any) -> Any:
    return written if isinstance(written, dict) else {"source": written}


class Place(_Checked):
    """Where the rows of one objective are read, relative to the project; all splits where none is named."""

    source: Annotated[str, Field(min_length=1)]
    subset: Folder | None = None
    revision: str | None = None
    split: str | None = None


class Places(_Checked):
    """Objectives as a setting may write them: each with its source, alone or as a `Place`."""

    objectives: dict[Name, Annotated[Place, BeforeValidator(_place)]]


class Setting(_Checked):
    """What is learned: data source and objectives (`params/settings/<setting>.yaml`).

    Where `objectives` is a mapping there, it is `Places`; here `source` then has the place of each by name.
    """

    source: Annotated[str, Field(min_length=1)] | dict[str, dict[str, str | None]]
    subset: Folder | None
    revision: str | None
    layout: str
    objectives: Annotated[list[Name], Field(min_length=2)]
    relationship: Annotated[str, Field(min_length=1)]


class Parameters(Scale, Setting):
    """Everything that one stage of one chain is run with. Equal records give equal results."""

    scale: Name
    setting: Name
    chain: str
    seed: CountOrNone

    @model_validator(mode="after")
    def _fit_together(self) -> "Parameters":
        if self.pairs_per_step % self.pairs_per_device:
            steps, device = self.pairs_per_step, self.pairs_per_device
            raise ValueError(f"pairs_per_step = {steps} must be a multiple of pairs_per_device = {device}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights = {self.loss_weights} must have one weight for each of {self.loss_type}"
            )
        if self.shuffled_labels and self.flipped:
            raise ValueError(
                "shuffled_labels and flipped exclude each other: labels at random have no share to turn"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: {self.layout!r} is not one of {', '.join(LAYOUTS)}")
        known = LAYOUTS[self.layout].objectives
        unknown = [name for name in self.objectives if known and name not in known]
        places = self.source if isinstance(self.source, dict) else {}
        lacking = [name for name in self.objectives if name not in places]
        taken = [name for name in self.objectives if name in TAKEN]
        if taken:
            raise ValueError(f"objectives: {taken[0]!r} is a name of the study's own: choose another")
        if lacking and (places or not known):
            wanted = f"objectives: {{{lacking[0]}: ../mine/{lacking[0]}.jsonl, ...}}"
            raise ValueError(f"layout {self.layout}: {lacking[0]!r} has no source of its own; write {wanted}")
        if unknown:
            choice = ", ".join(known)
            raise ValueError(f"unknown objective {unknown[0]!r} for layout {self.layout}; it has {choice}")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives {self.objectives} name one objective twice")
        return self


class Design(_Checked):
    """Which chains a study runs, the notebook that compares them, and if several answers must be rated."""

    chains: Annotated[list[str], Field(min_length=1)]
    notebook: Annotated[str, Field(pattern=r"^[0-9]{2}_[a-z0-9_]+$")] | None = None
    needs_ratings: bool = False


SHAPING = (*Model.model_fields, *Training.model_fields, "seed")
"""Parameters that the weights of a stage depend on; its manifest keeps them."""
START = ("seed", *(key for key in Model.model_fields if key not in ("beta", "pairs_per_device")))
"""Parameters that the adapter before training depends on."""
_CHAIN_KEYS = ("scale", "setting", "chain", "seed")


def read_yaml(file: Path) -> dict[str, Any]:
    """A parameter file as a dictionary.

    Raises:
        StudyError: when it is not there (with the names that are) or is no YAML mapping.
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
    return content


def settings_of(root: Path) -> list[str]:
    """Names of all settings."""
    return sorted(file.stem for file in (root / "params" / "settings").glob("*.yaml"))


@cache
def variants(root: Path) -> dict[str, dict[str, Any]]:
    """What each variant changes (`params/variants.yaml`), by its name.

    Raises:
        StudyError: for a variant that changes nothing, or something that does not shape one stage.
    """
    file = root / "params" / "variants.yaml"
    found = read_yaml(file)
    for name, changes in found.items():
        if not isinstance(changes, dict) or not changes or not isinstance(name, str):
            raise StudyError(f"{file}: {name}: expected {{key: value}}, got {changes!r}.")
        unknown = [key for key in changes if key not in Training.model_fields]
        if unknown:
            known = ", ".join(Training.model_fields)
            raise StudyError(f"{file}: {name}: {unknown[0]}: a variant may change {known}.")
    return found


def varied(root: Path, stage: Stage) -> dict[str, Any]:
    """What the variants of a stage change, by parameter.

    Raises:
        StudyError: for an unknown variant, or two that change the same parameter.
    """
    changes: dict[str, Any] = {}
    for name in stage.variants:
        if name not in variants(root):
            raise StudyError(
                f"stage '{stage}': unknown variant {name!r}; known are {', '.join(variants(root))}."
            )
        twice = changes.keys() & variants(root)[name].keys()
        if twice:
            raise StudyError(f"stage '{stage}': two of its variants change {min(twice)}.")
        changes |= variants(root)[name]
    return changes


def resolve(
    root: Path,
    *,
    scale: str,
    setting: str,
    chain: str = "",
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
) -> Parameters:
    """All parameters of the last stage of a chain, or of a setting where no chain is given.

    `source` becomes the place that `rows` asks for, unless the command line gives a `source` of its own.

    Args:
        root: the project's folder.
        scale, setting: names of files in `params/scales` and `params/settings`.
        chain: "helpful-then-harmless.shuffled"; the variants of its last stage win over everything else.
        seed: rules the adapter's start, the order of the pairs and every other draw of training.
        overrides: values that win over the files.

    Raises:
        StudyError: for anything unknown, of the wrong type or out of range, and for a stage whose variants
            would change nothing.
    """
    values, origin = _layers(root, scale=scale, setting=setting, overrides=overrides or {})
    values |= {"scale": scale, "setting": setting, "chain": chain, "seed": seed}
    plain = _validated(values, origin)
    if "source" not in (overrides or {}) and isinstance(plain.source, str):
        values["source"] = source_of(root, rows=plain.rows, hub_id=plain.source)
        plain = plain.model_copy(update={"source": values["source"]})
    return for_chain(root, plain, chain) if chain else plain


def for_chain(root: Path, plain: Parameters, chain: str) -> Parameters:
    """Parameters of a setting as the last stage of a chain has them.

    Raises:
        StudyError: for a chain that the setting cannot run, and for a stage whose variants would change
            nothing.
    """
    parsed, plain = Chain.parse(chain), plain.model_copy(update={"chain": chain})
    check_chain(parsed, objectives=plain.objectives, variants=variants(root))
    for beginning in parsed.lineage:
        changes = varied(root, beginning.last)
        shaped = _validated(dict(plain) | changes, dict.fromkeys(changes, f"stage '{beginning.last}'"))
        _check_effect(plain, shaped, beginning)
    return shaped


def _layers(
    root: Path, *, scale: str, setting: str, overrides: dict[str, Any]
) -> tuple[dict, dict[str, str]]:
    """Values of all layers, later ones winning, and where each came from."""
    scale_file = root / "params" / "scales" / f"{check_word(scale, 'scale')}.yaml"
    setting_file = root / "params" / "settings" / f"{check_word(setting, 'setting')}.yaml"
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file, kind in (
        (root / "params" / "defaults.yaml", Scale),
        (scale_file, Scale),
        (setting_file, Setting),
    ):
        content = read_yaml(file)
        unknown = [key for key in content if key not in kind.model_fields]
        if unknown:
            known = ", ".join(kind.model_fields)
            raise StudyError(f"{file}: {unknown[0]}: unknown key; the known keys are {known}.")
        if isinstance(content.get("objectives"), dict):
            content = _with_places(content, file)
        values |= content
        origin |= dict.fromkeys(content, str(file))
    return values | overrides, origin | dict.fromkeys(overrides, "the command line")


def _with_places(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """A setting whose objectives have sources of their own in the form of every other one."""
    shared = {"source": None, "subset": None, "revision": None}
    if twice := [key for key in shared if key in content]:
        raise StudyError(f"{file}: {twice[0]}: leave it out; each objective has a source of its own.")
    checked = _validated({"objectives": content["objectives"]}, {"objectives": str(file)}, Places)
    places = checked.model_dump()["objectives"]
    return shared | content | {"objectives": list(places), "source": places}


def _validated(values: dict[str, Any], origin: dict[str, str], kind: type[_Checked] = Parameters) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise StudyError("\n".join(_explain(fault, origin) for fault in error.errors())) from error


def _explain(fault: Any, origin: dict[str, str]) -> str:
    """One sentence for a fault that pydantic found."""
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return f"{message}."
    key = ".".join(str(part) for part in fault["loc"])
    where = origin.get(str(fault["loc"][0]), "the notebook or the command line")
    if fault["type"] == "missing":
        return f"{key}: missing in the parameter files."
    return f"{where}: {key}: {message}, got {fault['input']!r}."


def _check_effect(plain: Parameters, shaped: Parameters, chain: Chain) -> None:
    """Refuse a variant without effect: its chain would repeat another one under a new name."""
    for name, value in dict(shaped).items():
        if name in NEEDS_EARLIER and value != getattr(plain, name) and chain.parent is None:
            raise StudyError(
                f"chain '{chain}': {name} = {value!r} needs a stage before, and this is the first one."
            )
    changed = [name for name in NEEDS_LISTS if getattr(shaped, name) != getattr(plain, name)]
    if changed and not shaped.lambdas:
        value = getattr(shaped, changed[0])
        raise StudyError(f"chain '{chain}': {changed[0]} = {value!r} needs a listwise stage.")
    _check_lambdas(shaped, chain)
    if chain.last.variants and shaped == plain:
        raise StudyError(f"chain '{chain}': the variants of '{chain.last}' change nothing; leave them out.")


def _check_lambdas(shaped: Parameters, chain: Chain) -> None:
    """Refuse a listwise stage without ratings, or whose weights are no shares of its objectives."""
    if not shaped.lambdas:
        return
    if LAYOUTS[shaped.layout].answers_of is None:
        rated = ", ".join(name for name, layout in LAYOUTS.items() if layout.answers_of)
        raise StudyError(f"chain '{chain}': layout {shaped.layout} has no ratings of answers; {rated} have.")
    for name, idle in NEEDS_PAIRS.items():
        if getattr(shaped, name) != idle:
            needs = "needs pairs, and this stage trains on rated lists"
            raise StudyError(f"chain '{chain}': {name} = {getattr(shaped, name)!r} {needs}.")
    names, weights = chain.last.objectives, shaped.lambda_weights
    if weights and (len(weights) != len(names) or not math.isclose(sum(weights), 1, abs_tol=1e-6)):
        wanted = f"{len(names)} shares of sum one, for {', '.join(names)}"
        raise StudyError(f"chain '{chain}': lambda_weights = {weights} must be {wanted}.")


def from_notebook(root: Path, namespace: dict[str, Any]) -> Parameters:
    """The parameters that a notebook's cell declares, checked as the batch checks them.

    Args:
        root: the project's folder.
        namespace: the notebook's `globals()`; it must hold `scale` and `setting`.

    Returns:
        A record of the declared ones alone: any other attribute raises AttributeError, so that a notebook
            cannot lean
        on a value that it does not show.

    Raises:
        StudyError: as `resolve`.
    """
    mine = {key: namespace[key] for key in (*Scale.model_fields, *Setting.model_fields) if key in namespace}
    names = {key: namespace[key] for key in _CHAIN_KEYS if key in namespace}
    values, origin = _layers(root, scale=names["scale"], setting=names["setting"], overrides=mine)
    full = _validated({"chain": "", "seed": 0} | values | names, origin | dict.fromkeys(mine, "the notebook"))
    if full.chain:
        check_chain(Chain.parse(full.chain), objectives=full.objectives, variants=variants(root))
    return Parameters.model_construct(**{key: getattr(full, key) for key in (*mine, *names)})


def check_word(value: str, what: str) -> str:
    """Return `value` if it may be part of a file name (lower-case letters, digits, underscore).

    Raises:
        StudyError: otherwise, naming the value and what it was to be.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", value):
        raise StudyError(
            f"{what} {value!r} is not a name: use lower-case letters, digits and underscores only."
        )
    return value


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
        if key not in (known := (*Scale.model_fields, *Setting.model_fields)):
            raise StudyError(f"the command line: {key}: unknown key; the known keys are {', '.join(known)}.")
        values[key] = yaml.safe_load(value)
    return values


def source_of(root: Path, *, rows: str, hub_id: str) -> str:
    """Where a setting's rows are read from, as its scale decides.

    Args:
        root: the project's folder.
        rows: "embedded", "hub", or a folder (relative to the project) that holds local copies named like the
            last part of their hub ids.
        hub_id: the setting's data set, for example Anthropic/hh-rlhf; a path, too, is left as it is under
            "hub".

    Returns:
        "embedded", the hub id, or the folder of the copy; upper and lower case are one here. Whether it is
        there is checked later.
    """
    if rows in ("embedded", "hub"):
        return "embedded" if rows == "embedded" else hub_id
    name, place = hub_id.rpartition("/")[2].casefold(), root / rows
    here = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    found = next((other for other in here if other.casefold() == name), name)
    folder = rows.rstrip("/")
    return f"{folder if folder.startswith(('/', '.')) else f'./{folder}'}/{found}"  # never taken for a hub id


def chosen_chains(
    root: Path, settings: Iterable[Parameters], *, designs: Iterable[str], named: Iterable[str] = ()
) -> dict[str, list[str]]:
    """The chains of a study, by setting.

    Args:
        root: the project's folder.
        settings: parameters of each setting.
        designs: names of files in `params/designs`, whose templates are filled with each setting's
            objectives.
        named: chains written out; each goes to the settings that have its objectives.

    Returns:
        Setting to the texts of its chains, each once; a setting without a chain is left out.

    Raises:
        StudyError: for an unknown design, a design that no setting has enough objectives for, a chain that no
            setting has the objectives for, and whatever `resolve` refuses about a chain.
    """
    settings = list(settings)
    found: dict[str, list[Chain]] = {each.setting: [] for each in settings}
    for design in designs:
        asked = read_design(root, design)
        fit = [each for each in settings if not asked.needs_ratings or LAYOUTS[each.layout].answers_of]
        chains = {each.setting: expand(asked.chains, each.objectives)[0] for each in fit}
        if not any(chains.values()):
            needed = (
                "more objectives than a setting has" if fit else "settings whose layout rates several answers"
            )
            raise StudyError(f"design {design!r} ({', '.join(asked.chains)}) needs {needed}.")
        for setting, wanted in chains.items():
            found[setting] += wanted
    for chain in map(Chain.parse, named):
        takers = [each for each in settings if set(chain.objectives) <= set(each.objectives)]
        if not takers:
            have = "; ".join(f"{each.setting} has {', '.join(each.objectives)}" for each in settings)
            raise StudyError(f"chain '{chain}' holds objectives that no chosen setting has: {have}.")
        for each in takers:
            found[each.setting].append(chain)
    for each in settings:
        for chain in found[each.setting]:
            for_chain(root, each, str(chain))  # refused here, before anything is started
    return {setting: list(dict.fromkeys(map(str, chains))) for setting, chains in found.items() if chains}


def read_design(root: Path, design: str) -> Design:
    """A design (`params/designs/<design>.yaml`).

    Raises:
        StudyError: for an unknown design, or a file that is not what `Design` says.
    """
    file = root / "params" / "designs" / f"{check_word(design, 'design')}.yaml"
    content = read_yaml(file)
    try:
        return Design.model_validate(content)
    except ValidationError as error:
        origin = dict.fromkeys(content, str(file))
        faults = "\n".join(_explain(fault, origin) for fault in error.errors())
        raise StudyError(
            f"{file}: expected chains, with a list of templates such as A-then-B.\n{faults}"
        ) from error
