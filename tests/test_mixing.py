"""Mixtures of adapters against dense weights, records that are kept, and planted planes of two objectives."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, fresh, random_pairs, records_for
from peft import get_peft_model
from test_contrasts import PLACE, records

from seqdpo_utils import charts, mixing, models, movement, params
from seqdpo_utils.chains import Chain
from seqdpo_utils.paths import RunPaths, read_json, write_json, write_table

SUMS = ["chosen_logp", "rejected_logp"]


def adapter(folder, parameters, *, seed: int):
    """A saved adapter with random A and B."""
    model, generator = (
        get_peft_model(fresh(), models.lora_config(parameters)),
        torch.Generator().manual_seed(seed),
    )
    for weight in (p for p in model.parameters() if p.requires_grad):
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    models.save_adapter(model, folder, manifest={})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, parameters, tokenizer):
    place = tmp_path_factory.mktemp("adapters")
    return [adapter(place / str(seed), parameters, seed=seed) for seed in (1, 2)]


@pytest.mark.parametrize("weights", [(0.75, 0.25), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_mixture_is_the_weighted_sum_of_the_weight_changes(folders, parameters, weights):
    """Against W + sum w (alpha / r) B A, formed by hand in the bare base model's weights."""
    pairs, dense = random_pairs(4), fresh()
    scaling, wanted = parameters.lora_alpha / parameters.lora_rank, {}
    for folder, weight in zip(folders, weights, strict=True):
        for path, (a, b) in movement.load_lora(folder).items():
            name = path.removeprefix("base_model.model.")
            wanted[name] = wanted.get(name, 0) + weight * scaling * (b @ a)
    for name, change in wanted.items():
        dense.get_submodule(name).weight.data += change.float()
    right, before = records_for(dense, pairs), records_for(fresh(), pairs)
    model = mixing.with_adapters(fresh(), folders)
    with mixing.mixed(model, weights) as mixture:
        for name, change in wanted.items():
            made = mixture.get_base_model().get_submodule(name).get_delta_weight("mixture")
            assert torch.allclose(made.double(), change, atol=1e-6) and change.abs().max() > 1e-2
        found = records_for(mixture, pairs)
    assert np.allclose(found[SUMS], right[SUMS], rtol=1e-5)
    assert not np.allclose(found[SUMS], before[SUMS], rtol=1e-3)
    assert set(model.peft_config) == {"0", "1"} and model.active_adapters == ["0"]


def test_a_mixture_of_one_adapter_with_weight_one_is_that_adapter(folders, parameters):
    alone, pairs = get_peft_model(fresh(), models.lora_config(parameters)), random_pairs(4)
    models.load_adapter(alone, folders[1])
    with mixing.mixed(mixing.with_adapters(fresh(), folders[1:]), [1.0]) as mixture:
        found = records_for(mixture, pairs)
    assert np.allclose(found[SUMS], records_for(alone.eval(), pairs)[SUMS], rtol=1e-6)


@pytest.fixture
def study(tmp_path, parameters, tokenizer):
    """Two seeds of two singles with random adapters, and what the mixtures' records depend on."""
    flat = params.resolve(ROOT, scale="smoke", setting="safety_signal")
    tables = {}
    for name in flat.objectives:
        rows = []
        for i, (word, split) in enumerate(itertools.product(["tea", "rain", "snow"], ["train", "eval"])):
            talk = json.dumps([{"role": "user", "content": f"What of {word}?"}])
            sides = [f"I like {word}.", f"{word} is dull"][:: 1 if name == "safe" else -1]
            rows.append([f"{name}{i}", f"{word}{split}", name, split, talk, *sides])
        columns = ["pair_id", "prompt_id", "objective", "split", "prompt", "chosen", "rejected"]
        tables[name] = pd.DataFrame(rows, columns=columns)
    prints = models.fingerprints(ROOT, tables, tokenizer, parameters=flat)
    known = {"objectives": flat.objectives}
    runs = [RunPaths(tmp_path, "smoke", "safety_signal", "helpful-then-safe", seed) for seed in (0, 1)]
    counts = dict.fromkeys(tables, 0)
    write_json(runs[0].preparation, {"counts": counts, "fingerprints": prints, "parameters": known})
    for name, table in tables.items():
        write_table(runs[0].data(name), table)
        for run in runs:
            adapter(run.at(name).adapter, flat, seed=run.seed + 10 * len(name))
    return [(runs, *flat.objectives)], flat


def test_records_of_mixtures_are_made_once(study, monkeypatch):
    planes, flat = study
    table, scored = mixing.score_mixtures(ROOT, planes, parameters=flat)
    assert scored == 12 and len(table) == 12 * 6 and set(table["split"]) == {"eval"}
    named = {"0.75 helpful & 0.25 safe", "0.5 helpful & 0.5 safe", "0.25 helpful & 0.75 safe"}
    assert set(table["checkpoint"]) == named | {"1 helpful & 1 safe", "1.5 helpful", "1.5 safe"}
    kept = planes[0][0][0].summary("mixtures")
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(mixing, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    again, scored = mixing.score_mixtures(ROOT, planes, parameters=flat)
    assert scored == 0 and kept.stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(again, table)


def test_the_cosine_of_two_singles_is_that_of_their_dense_changes(study):
    planes, _ = study
    table = mixing.single_cosines(planes)
    assert table[["setting", "x", "y", "seed"]].to_numpy().tolist() == [
        ["safety_signal", "helpful", "safe", seed] for seed in (0, 1)
    ]
    adapters = [movement.load_lora(planes[0][0][1].at(name).adapter) for name in ("helpful", "safe")]
    left, right = (torch.cat([(b @ a).flatten() for a, b in found.values()]) for found in adapters)
    assert table["cosine"][1] == pytest.approx(float(torch.cosine_similarity(left, right, dim=0)))
    assert abs(table["cosine"][1]) > 1e-5


def test_a_changed_adapter_is_mixed_anew_and_only_it(study):
    planes, flat = study
    first, _ = mixing.score_mixtures(ROOT, planes, parameters=flat)
    run = planes[0][0][1].at("safe")
    adapter(run.adapter, flat, seed=99)
    table, scored = mixing.score_mixtures(ROOT, planes, parameters=flat)
    assert scored == 5 and len(table) == len(first)
    key = ["seed", "checkpoint", "pair_id"]
    kept, new = (found.set_index(key)[SUMS].sort_index() for found in (first, table))
    changed = (np.abs(kept / new - 1) > 1e-4).any(axis=1).groupby(level=["seed", "checkpoint"]).any()
    assert not changed[0].any() and changed[1].drop("1.5 helpful").all() and not changed[1]["1.5 helpful"]
    here = table.query("seed == 1 and checkpoint == '1.5 safe'")["made_of"]
    assert read_json(run.manifest)["adapter_sha256"] in here.iloc[0]
    (run.manifest).unlink()
    table, scored = mixing.score_mixtures(ROOT, planes, parameters=flat)
    assert scored == 0 and set(table["seed"]) == {0}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a", mixing.ALONE),
        ("a+b", mixing.JOINT),
        ("a-then-b", mixing.SEQUENTIAL),
        ("a-then-b.replay10", mixing.REPLAYED),
        ("b-then-a.projected", mixing.PROJECTED),
        ("a-then-b.projected.replay10", None),
        ("a-then-b.shuffled", None),
        ("a.half", None),
        ("a.half-then-b", None),
        ("a-then-a", None),
        ("a-then-a+b", None),
        ("a+b+c", None),
        ("a-then-b-then-c", None),
    ],
)
def test_which_chains_are_ways_to_have_two_objectives(text, kind):
    assert mixing.kind_of(Chain.parse(text)) == kind


NOISE = np.array([-1.0, 0.0, 1.0])[PLACE // 4]
SINGLES = {"a": {"a": 1.0, "b": 0.0}, "b": {"a": 0.0, "b": 1.0}}
WORLDS = {
    "the later stage opposes": ({"a": 0.1, "b": 0.9}, {"a": 0.8, "b": 1.2}),
    "it does not": ({"a": 1.1, "b": 1.3}, {"a": 0.8, "b": 1.2}),
    "noise": ({"a": 0.8 + NOISE, "b": 0.8 - NOISE}, {"a": 0.9 - NOISE, "b": 0.9}),
}


def write(folder, ends, *, seed=0):
    """Scores of a study of objectives `a` and `b` whose chains end at given margins."""
    runs = [RunPaths(folder, "smoke", "s", text, seed) for text in ends]
    write_table(runs[0].base_scores, records("base", {"a": 0.0, "b": 0.0}))
    write_json(runs[0].preparation, {"parameters": {"objectives": ["a", "b", "c"]}})
    for run in runs:
        write_table(run.scores, records(run.chain, ends[run.chain]))
    return runs


def planted(folder, world, *, sign=1, seed=0):
    """One setting whose `a-then-b` and `a+b` end where a world says."""
    sequence, joint = ({name: sign * margin for name, margin in end.items()} for end in world)
    return write(folder, SINGLES | {"a-then-b": sequence, "a+b": joint}, seed=seed)


def none_mixed():
    return pd.DataFrame(columns=["setting", "seed", "checkpoint", "made_of"])


def found(runs, mixtures=None):
    """`places` and `standing` of a study of one plane."""
    (plane,) = mixing.planes_of(runs)
    kinds, tables = mixing.ends(plane, runs, none_mixed() if mixtures is None else mixtures, beta=1.0)
    options = {"resamples": 400, "rng": np.random.default_rng(0)}
    rivals = mixing.rivalries(kinds, tables, **options).assign(setting="s")
    return mixing.places(kinds, tables, **options).set_index("name"), rivals, mixing.standing(rivals)


@pytest.mark.parametrize(
    ("world", "sign", "standing", "by"),
    [
        ("the later stage opposes", 1, mixing.DOMINATED, "a+b"),
        ("it does not", 1, mixing.UNDOMINATED, ""),
        ("noise", 1, mixing.OPEN, ""),
        ("the later stage opposes", -1, mixing.DOMINATED, "a, b"),  # the joint stage now ends lowest
        ("it does not", -1, mixing.DOMINATED, "a, b, a+b"),
    ],
)
def test_planted_planes_are_told_apart(tmp_path, world, sign, standing, by):
    table = found(planted(tmp_path, WORLDS[world], sign=sign))[2]
    assert table[["name", "standing", "by"]].to_numpy().tolist() == [["a-then-b", standing, by]]


def test_where_each_way_ends(tmp_path):
    """Means, the front, and differences rival minus chain, all known by hand."""
    table, rivals, _ = found(planted(tmp_path, WORLDS["the later stage opposes"]))
    assert table.loc["a-then-b", ["first", "second"]].tolist() == pytest.approx([0.1, 0.9])
    assert table.index[table["on_front"]].tolist() == ["a", "a+b"]  # b alone has less of both than a+b has
    gaps = rivals.set_index("rival")[["first", "second"]]
    assert gaps.loc["a+b"].tolist() == pytest.approx([0.7, 0.3])
    assert gaps.loc["a"].tolist() == pytest.approx([0.9, -0.9])


def test_mixtures_stand_among_the_ways(tmp_path):
    runs = planted(tmp_path, WORLDS["it does not"])
    names = [weights for weights, _ in mixing.recipes("a", "b")]
    parts = [records(mixing.name_of(weights), {"a": 2.0 * k, "b": 2.0}) for k, weights in enumerate(names)]
    mixtures = pd.concat(parts).assign(setting="s", seed=0, made_of="x")
    table, _, standing = found(runs, mixtures)
    assert table.loc["1 a & 1 b", ["kind", "first", "second"]].tolist() == [mixing.SUM, 6.0, 2.0]
    assert table.index[table["kind"] == mixing.LINE].tolist() == [
        mixing.name_of(weights) for weights in names[:3]
    ]
    assert table.index[table["kind"] == mixing.EXTRAPOLATED].tolist() == ["1.5 a", "1.5 b"]
    assert table.loc["0.75 a & 0.25 b", "first"] == 0.0  # the mixture with most of a comes first
    assert standing["standing"].tolist() == [mixing.DOMINATED]
    elsewhere = found(runs, mixtures.assign(setting="t"))[0]
    assert mixing.LINE not in set(elsewhere["kind"])


def test_runs_that_disagree_decide_nothing(tmp_path):
    """Each run alone is clear; two runs of which one turns round are not."""
    study = planted(tmp_path, WORLDS["the later stage opposes"])
    study += planted(tmp_path, WORLDS["it does not"], seed=1)
    _, rivals, standing = found(study)
    assert standing["standing"].tolist() == [mixing.OPEN]
    assert rivals.set_index("rival").loc["a+b", "first"] == pytest.approx((0.7 - 0.3) / 2)


def test_the_correction_is_over_all_rivals():
    """A p of .02 for one rival stands alone and falls among five."""
    row = {"setting": "s", "chain": "a-then-b", "rival": "x", "better_p": 0.02, "worse_p": 1.0}
    alone = pd.DataFrame([row])
    assert mixing.standing(alone)["standing"].tolist() == [mixing.DOMINATED]
    five = pd.DataFrame([row, *(row | {"rival": f"y{k}", "better_p": 0.5} for k in range(4))])
    assert mixing.standing(five)["standing"].tolist() == [mixing.OPEN]
    free = pd.DataFrame([row | {"better_p": 1.0, "worse_p": 0.01}, row | {"better_p": 1.0, "worse_p": 0.2}])
    assert mixing.standing(free)["standing"].tolist() == [mixing.OPEN]  # one rival may yet be better
    assert mixing.standing(free.head(1))["standing"].tolist() == [mixing.UNDOMINATED]


def test_a_study_without_two_objectives_has_no_plane(tmp_path):
    runs = write(tmp_path, SINGLES)
    assert mixing.planes_of(runs[:1]) == [] and mixing.standing(pd.DataFrame()).empty
    assert [plane[1:] for plane in mixing.planes_of(runs)] == [("a", "b")]


def test_what_the_figure_is_drawn_from(tmp_path):
    """Legend, place on the line of mixtures, and the figure itself."""
    ends = SINGLES | {"a-then-b": SINGLES["b"], "b-then-a": SINGLES["a"], "b-then-a.projected": SINGLES["a"]}
    runs = write(tmp_path, ends)
    recipes = [weights for weights, _ in mixing.recipes("a", "b")]
    parts = [records(mixing.name_of(w), {"a": w.get("a", 0), "b": w.get("b", 0)}) for w in recipes]
    mixtures = pd.concat(parts).assign(setting="s", seed=0, made_of="x")
    places, rivals = mixing.compare(runs, mixtures, beta=1.0, resamples=50)
    table = places.set_index("name")
    line = table.dropna(subset=["share"]).sort_values("share")
    assert line["share"].tolist() == [0, 0.25, 0.5, 0.75, 1] and line.index[0] == "a"
    assert line["second"].tolist() == pytest.approx(line["share"].tolist())
    ordered = table.loc[["a-then-b", "b-then-a.projected", "1 a & 1 b", "a"], "order"]
    assert ordered.tolist() == ["across", "upward", "neither", "neither"]
    assert table.index[table["sequential"]].tolist() == ["a-then-b", "b-then-a"]
    assert set(rivals["x"]) == {"a"} and set(rivals["y"]) == {"b"} and len(rivals) == 2 * 9
    bundle, _ = charts.static_bundle(charts.margin_planes(places, caption="Three.").to_dict())
    svg = bundle["image/svg+xml"]
    assert "margin of a" in svg and "Three." in bundle["text/plain"]
    assert svg.count('aria-roledescription="point"') == len(places) == 5 + 6
    assert svg.count('aria-roledescription="line mark"') == 2  # through the mixtures, and along the front
    assert [len(table) for table in mixing.compare(runs[:1], none_mixed(), beta=1.0, resamples=50)] == [0, 0]
