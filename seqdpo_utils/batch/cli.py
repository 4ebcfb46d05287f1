"""The command line: `python -m seqdpo_utils <command>`. Each command imports what it needs, and no more."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqdpo_utils.batch import notebooks
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import RunPaths, project_root


def main(words: list[str] | None = None) -> int:
    """Run one command; a fault that its message explains ends with status 2 and that message alone."""
    options = _parser().parse_args(words)
    try:
        return options.run(project_root(), options) or 0
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    """The commands and their options; each command carries the function that runs it."""
    parser = argparse.ArgumentParser(prog="python -m seqdpo_utils", description="Sequential DPO in notebooks")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[Path, Any], int | None], says: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=says, description=says)
        added.set_defaults(run=run)
        return added

    whole = command("study", _study, "run whatever is missing or out of date, then render the pages")
    glance = command("look", _look, "prepare the pairs, train nothing; say what they are and could decide")
    for each in (whole, glance):
        each.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    ahead = command("plan", _plan, "what a study would run and need, and what is missing; computes nothing")
    ahead.add_argument("--gpu", default="H100 80GB")
    ahead.add_argument("--tokens", type=int, help="typical tokens of a pair, its prompt counted once")
    for each in (whole, glance, ahead):
        each.add_argument("--scale", default="classroom")
        each.add_argument("--settings", nargs="+", help="all of them where none is named")
        each.add_argument("--seeds", nargs="+", type=int, help="in place of the scale's own")
        each.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="wins over the files")
        each.add_argument("--design", nargs="+", help="of params/designs; both_orders if no chain is named")
        each.add_argument("--chains", nargs="+", default=[], help="written out: helpful-then-harmless")
    one = command("notebook", _notebook, "run one notebook through papermill")
    one.add_argument("source", type=Path)
    one.add_argument("target", type=Path)
    one.add_argument("--label", default="notebook")
    one.add_argument("--gpu", action="store_true", help="hold a GPU of its own meanwhile, where there is one")
    start = command("start", _start, "write the adapter that all chains of a seed begin with")
    record = command("record", _record, "write run.json of a trained chain")
    for each in (one, start, record):
        each.add_argument("--parameters", type=json.loads, required=True, help="as a JSON object")
    command("model", _model, "build an embedded base model once").add_argument("name")
    command("appendix", _appendix, "render executed notebooks").add_argument("--scale", default="classroom")
    command("classroom", _classroom, "write the notebooks for students and for teachers")
    return parser


def _chosen(root: Path, options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Parameters of each setting with chains, and what Snakemake is told: scale, seeds, chains, overrides."""
    from seqdpo_utils import params
    from seqdpo_utils.chains import expand

    overrides = params.parse_overrides(options.set)
    laid = overrides | ({"seeds": options.seeds} if options.seeds else {})
    names = options.settings or params.settings_of(root)
    asked = [params.resolve(root, scale=options.scale, setting=name, overrides=laid) for name in names]
    designs = options.design or ([] if options.chains else ["both_orders"])
    chains = params.chosen_chains(root, asked, designs=designs, named=options.chains)
    read = [params.read_design(root, design) for design in designs]
    templates = [template for design in read for template in design.chains]
    for each in asked:
        for template in dict.fromkeys(expand(templates, each.objectives)[1]):
            print(f"left out    {template} for {each.setting}: {len(each.objectives)} objectives are too few")
    config = {"scale": options.scale, "seeds": asked[0].seeds, "chains": chains, "overrides": overrides}
    config["notebooks"] = sorted({design.notebook for design in read if design.notebook})
    return [each for each in asked if each.setting in chains], config


def _study(root: Path, options: argparse.Namespace) -> int:
    from seqdpo_utils.batch.study import study

    return study(root, *_chosen(root, options), cores=options.cores)


def _look(root: Path, options: argparse.Namespace) -> int:
    from seqdpo_utils.batch import look
    from seqdpo_utils.batch.study import study

    settings, config = _chosen(root, options)
    status = study(root, settings, config, cores=options.cores, target="look")
    print("" if status else "\n\n".join(look.text(root, each, config) for each in settings))
    return status


def _plan(root: Path, options: argparse.Namespace) -> None:
    from seqdpo_utils.batch import plan

    tokens = options.tokens or plan.TYPICAL_TOKENS
    print(plan.text(root, *_chosen(root, options), gpu=options.gpu, tokens=tokens))


def _notebook(root: Path, options: argparse.Namespace) -> None:
    gpus = notebooks.visible_gpus() if options.gpu else []
    with notebooks.one_gpu(gpus, folder=notebooks.lock_folder()) as gpu:
        os.environ |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        notebooks.run_notebook(options.source, options.target, options.parameters, label=options.label)


def _run_of(root: Path, given: dict[str, Any]) -> tuple[RunPaths, Any]:
    """Files and parameters of a chain, or of none for `start`; they were checked when the graph was built."""
    from seqdpo_utils.params import Parameters

    names = given["scale"], given.get("setting", ""), given.get("chain", ""), given["seed"]
    return RunPaths(root / "runs", *names), Parameters.model_construct(**given)


def _start(root: Path, options: argparse.Namespace) -> None:
    os.environ.update(notebooks.QUIET)
    from seqdpo_utils.models import start_adapter

    run, parameters = _run_of(root, options.parameters)
    start_adapter(root, parameters, run.start)


def _record(root: Path, options: argparse.Namespace) -> None:
    from seqdpo_utils.batch.study import record_chain

    record_chain(*_run_of(root, options.parameters), root=root)


def _model(root: Path, options: argparse.Namespace) -> None:
    from seqdpo_utils.models import prepare_model

    print(f"base model ready: {prepare_model(root, options.name) or options.name}")


def _appendix(root: Path, options: argparse.Namespace) -> None:
    from seqdpo_utils.batch.pages import render_appendix
    from seqdpo_utils.params import check_word

    print(f"appendix: {render_appendix(root / 'runs' / check_word(options.scale, 'scale'))}")


def _classroom(root: Path, options: argparse.Namespace) -> None:
    from seqdpo_utils.teaching import copies

    print(f"notebooks for students and teachers: {copies(root)}")
