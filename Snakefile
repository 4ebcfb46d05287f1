"""The graph of the study: notebooks through papermill, one rule a notebook. `make study` starts it.

A chain's node needs the adapter of its parent, so every common beginning is trained once for all chains that
begin with it. The patterns of all files come from `seqdpo_utils.paths.RunPaths`, with wildcards for names.
"""

import json
from functools import cache
from pathlib import Path

from seqdpo_utils import params
from seqdpo_utils.batch.notebooks import helper_files, notebook_parameters
from seqdpo_utils.chains import STAGE_PATTERN, THEN, Chain, controls, tree
from seqdpo_utils.layouts import EMBEDDED
from seqdpo_utils.paths import RunPaths

ROOT = Path(workflow.basedir)
SCALE = config.get("scale", "classroom")
OVERRIDES = config.get("overrides", {})


@cache
def resolved(setting, chain="", seed=0):
    """All parameters of a setting, or of the last stage of a chain of it."""
    return params.resolve(ROOT, scale=SCALE, setting=setting, chain=chain, seed=seed, overrides=OVERRIDES)


if "chains" not in config:  # started by hand: all settings in both orders
    everything = [resolved(name) for name in params.settings_of(ROOT)]
    config["chains"] = params.chosen_chains(ROOT, everything, designs=["both_orders"])
CHAINS = config["chains"]
EXPERIMENTS = config.get("notebooks", [])  # those that compare the chains of a design
SEEDS = config.get("seeds", [0])
GPUS = int(config.get("gpus", 0))
GPU = min(GPUS, 1)  # a computing notebook takes one GPU for itself, where there are any
# on a CPU two chains run side by side: one computes while the other starts its kernel; else one chain a GPU
SHARE = max(1, workflow.cores // max(2, GPUS))
NODE = RunPaths(Path("runs"), SCALE, "{setting}", "{chain}", "{seed}")
TREE = {name: [str(chain) for chain in tree(map(Chain.parse, chains))] for name, chains in CHAINS.items()}


wildcard_constraints:
    setting="|".join(CHAINS),
    chain=f"{STAGE_PATTERN}({THEN}{STAGE_PATTERN})*",
    seed="[0-9]+",
    experiment="|".join(EXPERIMENTS) or "none",


@cache
def source(number):
    """The notebook with that number."""
    return str(next(Path("notebooks").glob(f"{number}_*.ipynb")))


@cache
def needs(number):
    """What a notebook's results depend on: the notebook itself and the helper modules that it imports."""
    return [source(number), *helper_files(ROOT, ROOT / source(number))]


def page(number):
    """Pattern of an executed notebook of a chain."""
    return NODE.page(Path(source(number)).stem)


def given(number, wildcards, **more):
    """The parameters that a notebook declares, as JSON; Snakemake runs it again when they change."""
    chain, seed = wildcards.get("chain", ""), int(wildcards.get("seed", 0))
    flat = resolved(wildcards.get("setting", next(iter(CHAINS))), chain, seed).model_dump()
    return json.dumps(notebook_parameters(ROOT / source(number), flat | more), sort_keys=True)


def each(pattern, chains):
    """A pattern for every setting, chain and seed."""
    every = [(setting, chain, seed) for setting in chains for chain in chains[setting] for seed in SEEDS]
    return [str(pattern).format(setting=setting, chain=chain, seed=seed) for setting, chain, seed in every]


def node_of(wildcards):
    return RunPaths(Path("runs"), SCALE, wildcards.setting, wildcards.chain, wildcards.seed)


def previous(wildcards):
    """The adapter that a stage begins with: its parent's, or the start."""
    return node_of(wildcards).previous / "manifest.json"


def lineage(*names):
    """Files of every beginning of a chain, itself included, and of its controls in this study."""

    def files(wildcards):
        node = node_of(wildcards)
        nodes = [*node.lineage, *(node.at(chain) for chain in controls_of(wildcards))]
        return [getattr(each, name) for each in nodes for name in names]

    return files


def controls_of(wildcards):
    """The chains of this study that show what any later stage does, beside the chain's own."""
    return sorted(controls(Chain.parse(wildcards.chain), CHAINS[wildcards.setting]).values())


def compared(number):
    """The parameters of a notebook that shows a chain beside its controls."""
    return lambda wildcards: given(number, wildcards, controls=controls_of(wildcards))


NOTEBOOK = (
    "python -m seqdpo_utils notebook {input.code[0]} {output.page:q} --label {params.label:q}"
    " --parameters {params.given:q}"
)
COMPUTING = NOTEBOOK + " --gpu"


rule all:
    input: f"runs/{SCALE}/appendix/index.html", each(NODE.run_json, TREE)


rule base_model:
    output: "models/{name}/manifest.json"
    params: label="base model"
    shell: "python -m seqdpo_utils model models/{wildcards.name}"


def base_model(wildcards):
    name = resolved(wildcards.get("setting", next(iter(CHAINS)))).base_model
    return [f"{name}/manifest.json"] if name in params.EMBEDDED_MODELS else []


def start_parameters(wildcards):
    flat = resolved(next(iter(CHAINS)), seed=int(wildcards.seed)).model_dump()
    return json.dumps({key: flat[key] for key in ("scale", *params.START)}, sort_keys=True)


rule start:
    input: base_model
    output: NODE.start / "manifest.json"
    params: given=start_parameters
    priority: 3
    threads: SHARE
    resources: gpu=GPU
    shell: "python -m seqdpo_utils start --parameters {params.given:q}"


rule read_me_first:
    input: code=needs("00"), settings=expand("params/settings/{name}.yaml", name=CHAINS)
    output: page=f"runs/{SCALE}/summary/notebooks/00_read_me_first.ipynb"
    params: given=lambda w: given("00", w), label="00 read me first"
    shell: NOTEBOOK


def row_files(wildcards):
    """Local files with the setting's rows, so that changed rows are prepared again; none on the hub."""
    flat = resolved(wildcards.setting)
    source = flat.source
    named = [source] if isinstance(source, str) else [place["source"] for place in source.values()]
    found = []
    for place in [EMBEDDED / flat.layout if name == "embedded" else ROOT / name for name in named]:
        within = sorted(place.rglob("*")) if place.is_dir() else [place]
        shown = [file for file in within if not any(p.startswith(".") for p in file.relative_to(place).parts)]
        found += [file for file in shown if file.is_file()]
    return found


rule data_preparation:
    input: code=needs("01"), model=base_model, rows=row_files
    output: page=NODE.at("").page("01_data_preparation"), base=NODE.base_scores, counts=NODE.preparation
    params: given=lambda w: given("01", w), label=lambda w: f"01 {w.setting}"
    priority: 3  # what most work waits for comes first, so that no core is idle at the end
    threads: SHARE
    resources: gpu=GPU
    shell: COMPUTING


rule look:
    input: expand(rules.data_preparation.output.page, setting=CHAINS)


STAGE = [NODE.manifest, NODE.history, NODE.scores, NODE.kl]
STAGE += [NODE.conflict, NODE.ledger, NODE.ledger_pairs, NODE.within]


rule first_stage:
    input: code=needs("02"), previous=previous, base=NODE.base_scores, counts=NODE.preparation
    output: *STAGE, page=page("02")
    wildcard_constraints: chain=STAGE_PATTERN
    params: given=lambda w: given("02", w), label=lambda w: f"02 {w.setting} {w.chain} seed {w.seed}"
    priority: 2
    threads: SHARE
    resources: gpu=GPU
    shell: COMPUTING


rule later_stage:
    input: code=needs("03"), previous=previous, base=NODE.base_scores, counts=NODE.preparation
    output: *STAGE, page=page("03")
    wildcard_constraints: chain=f"{STAGE_PATTERN}({THEN}{STAGE_PATTERN})+"
    params: given=lambda w: given("03", w), label=lambda w: f"03 {w.setting} {w.chain} seed {w.seed}"
    priority: 1
    threads: SHARE
    resources: gpu=GPU
    shell: COMPUTING


rule record:
    input: NODE.manifest, NODE.preparation, NODE.base_scores
    output: NODE.run_json
    params: given=lambda w: resolved(w.setting, w.chain, int(w.seed)).model_dump_json()
    shell: "python -m seqdpo_utils record --parameters {params.given:q}"


rule evaluation:
    input: code=needs("04"), base=NODE.base_scores, scores=lineage("scores")
    output: NODE.table("stage_matrix"), NODE.table("transfer"), page=page("04")
    params: given=compared("04"), label=lambda w: f"04 {w.setting} {w.chain} seed {w.seed}"
    shell: NOTEBOOK


rule pair_diagnostics:
    input: code=needs("05"), base=NODE.base_scores, scores=lineage("scores")
    output: NODE.table("pair_change"), NODE.table("quartiles"), page=page("05")
    params: given=compared("05"), label=lambda w: f"05 {w.setting} {w.chain} seed {w.seed}"
    shell: NOTEBOOK


DERIVED = ["subspace", "ledger", "displacement", "log_probabilities", "kl", "length"]


rule mechanistic_diagnostics:
    input: code=needs("06"), base=NODE.base_scores, stages=lineage("manifest", "scores")
    output: NODE.movement, *(NODE.table(name) for name in DERIVED), page=page("06")
    params: given=compared("06"), label=lambda w: f"06 {w.setting} {w.chain} seed {w.seed}"
    shell: NOTEBOOK


TABLES = [NODE.table(name) for name in ("stage_matrix", "transfer", "pair_change", "quartiles")]


rule across_settings:
    input:
        code=needs("07"),
        tables=[each(file, CHAINS) for file in (*TABLES, NODE.movement)],
        runs=each(NODE.run_json, TREE),
    output: page=f"runs/{SCALE}/summary/notebooks/07_across_settings.ipynb"
    params: given=lambda w: given("07", w, chains=CHAINS, seeds=SEEDS), label="07 across settings"
    shell: NOTEBOOK


EXPERIMENT = f"runs/{SCALE}/summary/notebooks/{{experiment}}.ipynb"


rule experiment:
    input:
        code=lambda w: needs(w.experiment[:2]),
        moved=each(NODE.movement, CHAINS),
        runs=each(NODE.run_json, TREE),
    output: page=EXPERIMENT
    params:
        given=lambda w: given(w.experiment[:2], w, chains=CHAINS, seeds=SEEDS),
        label=lambda w: w.experiment.replace("_", " "),
    threads: workflow.cores  # it runs at the end and scores policies of its own
    resources: gpu=GPU
    shell: COMPUTING


PER_CHAIN = [file for number in ("04", "05", "06") for file in each(page(number), CHAINS)]
FIRST = {name: [chain for chain in TREE[name] if THEN not in chain] for name in TREE}
LATER = {name: [chain for chain in TREE[name] if THEN in chain] for name in TREE}


rule appendix:
    input:
        rules.read_me_first.output.page,
        rules.across_settings.output.page,
        expand(rules.data_preparation.output.page, setting=CHAINS),
        *each(page("02"), FIRST),
        *each(page("03"), LATER),
        *PER_CHAIN,
        expand(EXPERIMENT, experiment=EXPERIMENTS),
        "seqdpo_utils/batch/pages.py",
        sorted(Path("seqdpo_utils/batch/templates").iterdir()),
    output: f"runs/{SCALE}/appendix/index.html"
    shell: f"python -m seqdpo_utils appendix --scale {SCALE}"
