"""The graph of the study: notebooks through papermill, one rule a notebook. `make study` starts it; see README.md."""

import json
from pathlib import Path

from seqdpo_utils import params, run, sources

ROOT = Path(workflow.basedir)
SCALE = config.get("scale", "classroom")
SEEDS = config.get("seeds", [0])
SETTINGS = config.get("settings", sorted(file.stem for file in (ROOT / "params" / "settings").glob("*.yaml")))
OVERRIDES = config.get("overrides", {})
FLAT = {name: params.resolve(ROOT, scale=SCALE, setting=name, overrides=OVERRIDES) for name in SETTINGS}
OUT = f"runs/{SCALE}"
CHAIN = OUT + "/{setting}/{order}/seed-{seed}"
GPUS = int(config.get("gpus", 0))
GPU = min(GPUS, 1)  # a computing notebook takes one GPU for itself, where there are any
SHARE = max(1, workflow.cores // max(2, GPUS))  # two chains side by side on a CPU: one computes while the other starts its kernel; else one a GPU


wildcard_constraints:
    setting="|".join(SETTINGS),
    order="[a-z0-9_]+(-then-[a-z0-9_]+)+",
    seed="[0-9]+",


def source(number):
    """The notebook with that number."""
    return str(next(Path("notebooks").glob(f"{number}_*.ipynb")))


def needs(number):
    """What a notebook's results depend on: the notebook itself and the helper modules that it imports."""
    return [source(number), *run.helper_files(ROOT, ROOT / source(number))]


def given(number, wildcards=None, **more):
    """The parameters that a notebook declares, as JSON; Snakemake reruns it when they change."""
    values = dict(wildcards.items()) if wildcards is not None else {}
    flat = FLAT[values["setting"]] if "setting" in values else FLAT[SETTINGS[0]]
    chain = {"order": values["order"], "seed": int(values["seed"])} if "order" in values else {}
    return json.dumps(run.notebook_parameters(ROOT / source(number), flat | chain | more), sort_keys=True)


def chains(pattern, settings=SETTINGS):
    """`pattern` for every setting, order and seed of the study."""
    return [
        pattern.format(setting=setting, order=order, seed=seed)
        for setting in settings for order in params.orders_of(FLAT[setting]) for seed in SEEDS
    ]  # fmt: skip


def last_stage(wildcards):
    return len(FLAT[wildcards.setting]["objectives"])


def stage_files(folder):
    """Parquet files of all stages of a chain in `folder`."""
    def files(wildcards):
        first = 2 if folder in ("conflict", "ledger") else 1
        return [f"{CHAIN.format(**wildcards)}/{folder}/stage{k}.parquet" for k in range(first, last_stage(wildcards) + 1)]
    return files


def adapters(wildcards):
    return [f"{CHAIN.format(**wildcards)}/checkpoints/stage{k}/manifest.json" for k in range(last_stage(wildcards) + 1)]


NOTEBOOK = "python -m seqdpo_utils notebook {input.code[0]} {output.page} --label {params.label:q} --parameters {params.given:q}"
COMPUTING = NOTEBOOK + " --gpu"
LAUNCH = config.get("launch", "")  # a launcher shares each stage among several processes, which then see all GPUs
TRAINING = NOTEBOOK.replace("python", LAUNCH, 1) if LAUNCH else COMPUTING
TRAINING_GPUS, TRAINING_THREADS = (GPUS, workflow.cores) if LAUNCH else (GPU, SHARE)


rule all:
    input:
        f"{OUT}/appendix/index.html",
        chains(CHAIN + "/run.json"),


rule base_model:
    output: "models/{name}/manifest.json"
    params: label="base model"
    shell: "python -m seqdpo_utils model models/{wildcards.name}"


def base_model(wildcards):
    name = FLAT[wildcards.setting]["base_model"]
    return [f"{name}/manifest.json"] if name in params.EMBEDDED_MODELS else []


rule read_me_first:
    input: code=needs("00"), settings=expand("params/settings/{name}.yaml", name=SETTINGS)
    output: page=f"{OUT}/summary/notebooks/00_read_me_first.ipynb"
    params: given=given("00"), label="00 read me first"
    shell: NOTEBOOK


def row_files(wildcards):
    """Local files with the setting's rows, so that changed rows are prepared again; none for a data set on the hub."""
    flat = FLAT[wildcards.setting]
    place = sources.EMBEDDED / flat["layout"] if flat["source"] == "embedded" else ROOT / flat["source"]
    within = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [str(file) for file in within if file.is_file() and not any(part.startswith(".") for part in file.relative_to(place).parts)]


rule data_preparation:
    input: code=needs("01"), model=base_model, rows=row_files
    output:
        page=OUT + "/{setting}/notebooks/01_data_preparation.ipynb",
        base=OUT + "/{setting}/scores/base.parquet",
        counts=OUT + "/{setting}/data/preparation.json",
    params: given=lambda w: given("01", w), label=lambda w: f"01 {w.setting}"
    priority: 3  # what most work waits for comes first, so that no core is idle at the end
    threads: SHARE
    resources: gpu=GPU
    shell: COMPUTING


rule first_stage:
    input: code=needs("02"), base=rules.data_preparation.output.base, counts=rules.data_preparation.output.counts
    output:
        CHAIN + "/checkpoints/stage0/manifest.json",
        CHAIN + "/checkpoints/stage1/manifest.json",
        CHAIN + "/history/stage1.parquet",
        CHAIN + "/scores/stage1.parquet",
        CHAIN + "/tables/kl_stage1.parquet",
        page=CHAIN + "/notebooks/02_first_stage.ipynb",
    params: given=lambda w: given("02", w), label=lambda w: f"02 {w.setting} {w.order} seed {w.seed}"
    priority: 2
    threads: TRAINING_THREADS
    resources: gpu=TRAINING_GPUS
    shell: TRAINING


rule later_stage:
    input:
        code=needs("03"),
        base=rules.data_preparation.output.base,
        counts=rules.data_preparation.output.counts,
        previous=lambda w: f"{CHAIN.format(**w)}/checkpoints/stage{int(w.stage) - 1}/manifest.json",
    output:
        CHAIN + "/checkpoints/stage{stage,[2-9]}/manifest.json",
        CHAIN + "/history/stage{stage,[2-9]}.parquet",
        CHAIN + "/conflict/stage{stage,[2-9]}.parquet",
        CHAIN + "/ledger/stage{stage,[2-9]}.parquet",
        CHAIN + "/scores/stage{stage,[2-9]}.parquet",
        CHAIN + "/tables/kl_stage{stage,[2-9]}.parquet",
        page=CHAIN + "/notebooks/03_later_stage-{stage,[2-9]}.ipynb",
    params:
        given=lambda w: given("03", w, stage=int(w.stage)),
        label=lambda w: f"03 {w.setting} {w.order} seed {w.seed} stage {w.stage}",
    priority: 1
    threads: TRAINING_THREADS
    resources: gpu=TRAINING_GPUS
    shell: TRAINING


rule evaluation:
    input: code=needs("04"), base=rules.data_preparation.output.base, scores=stage_files("scores")
    output: CHAIN + "/tables/stage_matrix.parquet", CHAIN + "/tables/transfer.parquet", page=CHAIN + "/notebooks/04_evaluation.ipynb"
    params: given=lambda w: given("04", w), label=lambda w: f"04 {w.setting} {w.order} seed {w.seed}"
    shell: NOTEBOOK


rule pair_diagnostics:
    input: code=needs("05"), base=rules.data_preparation.output.base, scores=stage_files("scores")
    output: CHAIN + "/tables/pair_change.parquet", CHAIN + "/tables/quartiles.parquet", page=CHAIN + "/notebooks/05_pair_diagnostics.ipynb"
    params: given=lambda w: given("05", w), label=lambda w: f"05 {w.setting} {w.order} seed {w.seed}"
    shell: NOTEBOOK


rule mechanistic_diagnostics:
    input:
        code=needs("06"),
        adapters=adapters,
        conflict=stage_files("conflict"),
        ledger=stage_files("ledger"),
        base=rules.data_preparation.output.base,
        scores=stage_files("scores"),
        drift=lambda w: [f"{CHAIN.format(**w)}/tables/kl_stage{k}.parquet" for k in range(1, last_stage(w) + 1)],
    output:
        CHAIN + "/movement.parquet",
        expand(CHAIN + "/tables/{name}.parquet", name=["subspace", "ledger", "displacement", "log_probabilities", "kl", "length"], allow_missing=True),
        page=CHAIN + "/notebooks/06_mechanistic_diagnostics.ipynb",
    params: given=lambda w: given("06", w), label=lambda w: f"06 {w.setting} {w.order} seed {w.seed}"
    shell: NOTEBOOK


rule record:
    input: adapters=adapters, counts=rules.data_preparation.output.counts, history=stage_files("history"), base=rules.data_preparation.output.base, scores=stage_files("scores")
    output: CHAIN + "/run.json"
    params: given=lambda w: json.dumps(FLAT[w.setting] | {"order": w.order, "seed": int(w.seed)}, sort_keys=True)
    shell: "python -m seqdpo_utils record --parameters {params.given:q}"


rule across_settings:
    input:
        code=needs("07"),
        tables=[chains(f"{CHAIN}/tables/{name}.parquet") for name in ("stage_matrix", "transfer", "pair_change", "quartiles")],
        movement=chains(CHAIN + "/movement.parquet"),
        runs=chains(CHAIN + "/run.json"),
    output: page=f"{OUT}/summary/notebooks/07_across_settings.ipynb"
    params: given=given("07", orders={name: params.orders_of(FLAT[name]) for name in SETTINGS}, seeds=SEEDS), label="07 across settings"
    shell: NOTEBOOK


def later_pages():
    """Pages of notebook 03 for every later stage of every chain."""
    stages = {setting: range(2, len(FLAT[setting]["objectives"]) + 1) for setting in SETTINGS}
    return [page for setting in SETTINGS for k in stages[setting] for page in chains(f"{CHAIN}/notebooks/03_later_stage-{k}.ipynb", [setting])]


PER_CHAIN = (rules.first_stage, rules.evaluation, rules.pair_diagnostics, rules.mechanistic_diagnostics)
PAGES = [
    rules.read_me_first.output.page,
    rules.across_settings.output.page,
    *expand(rules.data_preparation.output.page, setting=SETTINGS),
    *(page for each in PER_CHAIN for page in chains(each.output.page)),
    *later_pages(),
]


rule appendix:
    input: PAGES, "seqdpo_utils/appendix.py"
    output: f"{OUT}/appendix/index.html"
    shell: f"python -m seqdpo_utils appendix --scale {SCALE}"
