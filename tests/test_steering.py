"""Control at inference: planted dials that turn, stand still or turn the wrong way; what a model is asked."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, fresh
from test_contrasts import write_chains
from test_mixing import adapter

from seqdpo_utils import lists, metrics, mixing, models, params, scoring, steering
from seqdpo_utils.errors import StudyError
from seqdpo_utils.pairs import encode_table
from seqdpo_utils.paths import RunPaths, read_table, write_json, write_table

ASPECTS = ("a", "b")
OPTIONS = {"beta": 1.0, "resamples": 400}
SUMS = ["chosen_logp", "rejected_logp"]
TURNED = (steering.MIXED, steering.TOLD)


def planted(way, turn, *, seeds=(0, 1, 2), aspects=ASPECTS, noise=0.05):
    """Records at beta 1 of a way whose margin of each aspect is `turn(its share)`, and the base's."""
    rng, pairs = np.random.default_rng(0), 24
    ids = {name: [f"{name}{i}" for i in range(pairs)] for name in aspects}
    base, found = [], []
    for name in aspects:
        table = pd.DataFrame({"pair_id": ids[name], "prompt_id": [f"q{i}" for i in range(pairs)]})
        table = table.assign(
            objective=name, split="eval", chosen_logp=rng.normal(size=pairs), rejected_logp=0.0
        )
        base.append(table)
        for seed in seeds:
            luck = rng.normal(0, noise, pairs)  # of pair and run, the same at every lambda
            for point in steering.grid(len(aspects)):
                share = point[list(aspects).index(name)]
                moved = table["chosen_logp"] + turn(share) + luck + rng.normal(0, noise, pairs)
                asked = {f"lambda_{each}": x for each, x in zip(aspects, point, strict=True)}
                words = f"{way} {' '.join(f'{x:g}' for x in point)}"
                row = table.assign(chosen_logp=moved, checkpoint=words, way=way, seed=seed, **asked)
                found.append(row)
    return pd.concat(found, ignore_index=True), pd.concat(base, ignore_index=True)


@pytest.mark.parametrize(
    ("turn", "verdict", "rank"),
    [
        (lambda share: 0.8 * share, steering.STEERS, 1.0),
        (lambda share: -0.8 * share, steering.AGAINST, -1.0),
        (lambda share: 0.5, steering.OPEN, None),
        (lambda share: 4 * (share - 0.5) ** 2, steering.OPEN, None),
    ],
)
def test_a_dial_that_turns_is_told_from_one_that_does_not(turn, verdict, rank):
    records, base = planted("w", turn)
    curves, control = steering.control(records, base, ASPECTS, **OPTIONS)
    assert control["verdict"].tolist() == [verdict] * 2
    if rank is not None:
        assert control["rank"].tolist() == pytest.approx([rank] * 2)
        assert (control["monotone"] > 0.9).all() == (rank > 0)
        assert (control["rank_low"] * rank > 0.8).all() or (control["rank_high"] * rank > 0.8).all()
    wanted = [turn(share) for share in curves["share"]]
    assert np.allclose(curves["margin"], wanted, atol=0.1)
    assert (curves["margin_low"] < curves["margin_high"]).all()


def test_slope_and_rank_are_those_of_the_mean_margins():
    records, base = planted("w", lambda share: share**2, noise=0.4)
    curves, control = steering.control(records, base, ASPECTS, **OPTIONS)
    for aspect in ASPECTS:
        own, row = curves[curves["aspect"] == aspect], control[control["aspect"] == aspect].iloc[0]
        part = records[records["objective"] == aspect]
        by_hand = metrics.dpo_margin(part, base, beta=1.0).groupby(part[f"lambda_{aspect}"]).mean()
        assert np.allclose(own["margin"], by_hand) and np.allclose(own["share"], by_hand.index)
        assert row["slope"] == pytest.approx(np.polyfit(by_hand.index, by_hand, 1)[0])
        assert row["rank"] == pytest.approx(by_hand.reset_index().corr("spearman").iloc[0, 1])


def test_with_three_aspects_lambdas_of_one_share_are_averaged():
    records, base = planted("w", lambda share: share, aspects=("a", "b", "c"))
    curves, control = steering.control(records, base, ("a", "b", "c"), **OPTIONS)
    assert curves.groupby("aspect")["share"].unique().map(list).tolist() == [[0, 0.5, 1]] * 3
    assert set(control["verdict"]) == {steering.STEERS}


@pytest.fixture(scope="module")
def asked(tmp_path_factory, parameters, tokenizer):
    """Two singles and two listwise stages of one seed with random adapters, ready to be asked."""
    flat = params.resolve(ROOT, scale="smoke", setting="compatible_quality")
    flat = flat.model_copy(update={"objectives": list(ASPECTS)})
    talk = [json.dumps([{"role": "user", "content": f"What of {word}?"}]) for word in ("tea", "rain")]
    tables = {}
    for name in ASPECTS:
        rows = [[f"{name}{i}", f"q{i}", name, "eval", talk[i], "I like it.", "It is dull"] for i in (0, 1)]
        columns = ["pair_id", "prompt_id", "objective", "split", "prompt", "chosen", "rejected"]
        tables[name] = pd.DataFrame(rows, columns=columns)
    run = RunPaths(tmp_path_factory.mktemp("runs"), "smoke", "compatible_quality", "a", 0)
    prints = models.fingerprints(ROOT, tables, tokenizer, parameters=flat)
    write_json(run.preparation, {"counts": dict.fromkeys(tables, 0), "fingerprints": prints})
    for name, table in tables.items():
        write_table(run.data(name), table)
    for number, name in enumerate(["a", "b", "a+b.listwise_uniform", "a+b.listwise_dirichlet.steered"]):
        adapter(run.at(name).adapter, flat, seed=number + 1)
    held_out = pd.concat(tables.values(), ignore_index=True)
    for name in ASPECTS:  # as the stage left it
        single = mixing.with_adapters(fresh(), [run.at(name).adapter])
        write_table(run.at(name).scores, score(single, tokenizer, held_out))
    trained = {steering.TOLD: "a+b.listwise_dirichlet.steered", steering.UNHEARD: "a+b.listwise_uniform"}
    return lambda: steering.Asked(ROOT, run, ASPECTS, trained, parameters=flat)


def test_each_way_asks_the_right_policy_in_the_right_words(asked, tokenizer):
    """Every record against a model that was loaded for it alone."""
    one = asked()
    records = one.records()
    assert one.computed == 3 + 5 + 2 + 2 and set(records["way"]) == set(one.ways)
    held_out = pd.concat([read_table(one.run.data(name)) for name in ASPECTS], ignore_index=True)
    chains = {steering.TOLD: one.trained[steering.TOLD], steering.UNHEARD: one.trained[steering.UNHEARD]}
    for way, lean in [(w, x) for w in one.ways for x in (1.0, 0.5 if w in TURNED else 0.0)]:
        found = records[(records["way"] == way) & (records["lambda_a"] == lean)]
        if way == steering.MIXED:
            model = mixing.with_adapters(fresh(), [one.run.at(name).adapter for name in ASPECTS])
            with mixing.mixed(model, [lean, 1 - lean]):
                wanted = score(model, tokenizer, held_out)
        else:
            model = fresh()
            if way in chains:
                model = mixing.with_adapters(model, [one.run.at(chains[way]).adapter])
            wanted = score(model, lists.Told(tokenizer, {"a": lean, "b": 1 - lean}), held_out)
        assert np.allclose(found[SUMS], wanted[SUMS], rtol=1e-5), (way, lean)
    totals = records.groupby(["way", "lambda_a"])["chosen_logp"].sum().round(3)
    assert totals.nunique() == len(totals), "two ways gave the same sums"


def score(model, tokenizer, pairs):
    scorer = scoring.Scorer(model.eval(), token_budget=300)
    return scorer.records(pairs, encode_table(tokenizer, pairs), checkpoint="x")


def test_what_was_asked_is_kept_until_an_adapter_changes(asked):
    asked().records()
    again = asked()
    table = again.records()
    assert again.computed == 0 and len(table) == 14 * 4
    texts = again.texts()
    assert len(texts) == 2 * 3 and texts["text"].str.len().gt(0).all() and texts["prompt"].nunique() == 1
    adapter(again.run.at("a").adapter, again.parameters, seed=77)
    changed = asked()
    changed.records()
    assert changed.computed == 3, "only mixtures hold that adapter"


STUDY = ["a", "b", "a-then-b", "b-then-a", "a+b", "a+b.listwise", "a+b.listwise_uniform"]


def test_every_way_has_its_place_and_its_kind(tmp_path):
    """Margins planted at the end of each chain come out where `charts.margin_planes` draws them."""
    margins = {text: {"a": 0.1 * k, "b": 1 - 0.1 * k} for k, text in enumerate(STUDY, start=1)}
    for seed in (0, 1):
        write_chains(tmp_path / "runs", margins, seed=seed)
    chains = {"s": [*STUDY, "a+b.listwise_dirichlet.steered", "a-then-b.shuffled"]}
    (study,) = steering.studies_of(tmp_path, "smoke", chains, [0, 1])
    assert study.aspects == ASPECTS and study.missing() == ["a+b.listwise_learned"]
    records, _ = planted(steering.MIXED, lambda share: share, seeds=(0, 1))
    told, _ = planted(steering.TOLD, lambda share: 0.5, seeds=(0, 1))
    kept = read_table(study.nodes[0].base_scores)
    for table in (records, told):  # the same pairs as the chains
        table["pair_id"] = table["pair_id"].str.replace(r"^[ab]", "p", regex=True)
    own = [t[t["pair_id"].isin(kept["pair_id"])] for t in (records, told)]
    zero = (
        pd.concat(own, ignore_index=True)
        .drop(columns=SUMS)
        .merge(kept[["pair_id", "objective", *SUMS]], on=["pair_id", "objective"])
    )
    share = np.where(zero["objective"] == "a", zero["lambda_a"], zero["lambda_b"])
    zero["chosen_logp"] += np.where(zero["way"] == steering.MIXED, share, 0.5)
    study = steering.AspectStudy(study.nodes, tuple(STUDY), ASPECTS)
    places = study.places(zero, **OPTIONS).set_index("name")
    for text in STUDY:
        assert places.loc[text, ["first", "second"]].tolist() == pytest.approx(list(margins[text].values()))
    kinds = places["kind"].to_dict()
    assert kinds["a+b"] == mixing.JOINT and kinds["a+b.listwise"] == steering.LISTWISE
    assert kinds["a-then-b"] == mixing.SEQUENTIAL and kinds["a"] == mixing.ALONE
    assert places.loc[f"{steering.MIXED} 0.25 0.75", ["first", "second", "share"]].tolist() == [
        pytest.approx(0.25), pytest.approx(0.75), 0.75,
    ]  # fmt: skip
    assert f"{steering.MIXED} 1 0" not in places.index and f"{steering.TOLD} 1 0" in places.index
    assert places.loc["a-then-b", "order"] == "across" and places.loc["b-then-a", "order"] == "upward"
    gap = study.difference("a+b.listwise", "a+b.listwise_uniform", **OPTIONS).set_index("objective")
    assert gap["difference"].to_dict() == pytest.approx({"a": -0.1, "b": 0.1, steering.POOLED: 0.0}, abs=1e-9)
    assert gap["runs_above"].tolist()[:2] == [0, 2]


def test_a_study_without_rated_lists_is_refused_with_the_command(tmp_path):
    with pytest.raises(StudyError, match="make study DESIGN=aspects"):
        steering.studies_of(tmp_path, "smoke", {"s": ["a", "a-then-b"]}, [0])
