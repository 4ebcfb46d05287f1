"""The grammar of chains: round trip, refusals, lineage; designs as templates."""

import pytest

from seqdpo_utils.chains import AGAIN, SHUFFLED, Chain, Stage, check_chain, controls, expand, tree
from seqdpo_utils.errors import StudyError

TEXTS = [
    "helpful", "helpful-then-harmless", "helpful+harmless", "helpful-then-harmless.shuffled",
    "a-then-b-then-c",
    "a+b.half.ref50-then-c.flip25-then-a", "a-then-a-then-a", "instruction_following-then-truthfulness.ipo",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_chain_is_printed_back_as_it_was_written(text):
    chain = Chain.parse(text)
    assert str(chain) == text and Chain.parse(str(chain)) == chain and hash(chain) == hash(Chain.parse(text))


def test_the_parts_of_a_chain():
    chain = Chain.parse("a-then-b+c.half.ref50-then-a")
    assert chain.stages[1] == Stage(("b", "c"), ("half", "ref50")) and chain.last == Stage(("a",))
    assert [str(each) for each in chain.lineage] == ["a", "a-then-b+c.half.ref50", str(chain)]
    assert str(chain.parent) == "a-then-b+c.half.ref50" and Chain.parse("a").parent is None
    assert chain.objectives == ("a", "b", "c") == chain.earlier and Chain.parse("a").earlier == ()
    assert chain.parent.earlier == ("a",)
    assert chain.checkpoints == ["base", "a", "a-then-b+c.half.ref50", "a-then-b+c.half.ref50-then-a"]
    assert list(chain.labels.values()) == ["base", "1 a", "2 b+c.half.ref50", "3 a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a stage is empty"),
        ("a-then-", "chain 'a-then-': a stage is empty"),
        ("-then-a", "a stage is empty"),
        ("a-then--then-b", "a stage is empty"),
        ("a+", "stage 'a\\+' is not of the form"),
        ("a..half", "is not of the form"),
        (".half", "is not of the form"),
        ("A-then-b", "is not of the form .* lower-case"),
        ("../x", "is not of the form"),
        ("a/b", "is not of the form"),
        ("a then b", "is not of the form"),
        ("a-then-b.half.half", "stage 'b.half.half' names the variant 'half' twice"),
        ("a+b+a", "names the objective 'a' twice"),
    ],
)
def test_what_is_no_chain_is_refused_with_its_text(text, message):
    with pytest.raises(StudyError, match=message):
        Chain.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a-then-z", "chain 'a-then-z': unknown objective 'z'; known are a, b"),
        ("a-then-b.loud", "unknown variant 'loud'; known are half, ref50"),
        ("b+a", "chain 'b\\+a': write 'a\\+b', so that one training has one folder"),
        ("a-then-b.ref50.half", "write 'a-then-b.half.ref50'"),
    ],
)
def test_a_setting_refuses_what_it_cannot_run(text, message):
    with pytest.raises(StudyError, match=message):
        check_chain(Chain.parse(text), objectives=["a", "b"], variants=["ref50", "half"])
    check_chain(Chain.parse("a+b-then-b.half.ref50"), objectives=["a", "b"], variants=["ref50", "half"])


def test_every_beginning_is_trained_once():
    chains = [
        Chain.parse(text) for text in ("a-then-b", "a-then-b.half", "a-then-a", "b", "b-then-a", "a-then-b")
    ]
    expected = ["a", "a-then-b", "a-then-b.half", "a-then-a", "b", "b-then-a"]
    assert [str(chain) for chain in tree(chains)] == expected


@pytest.mark.parametrize(
    ("templates", "objectives", "chains", "skipped"),
    [
        (["A-then-B"], "ab", ["a-then-b", "b-then-a"], []),
        (["A"], "abc", ["a", "b", "c"], []),
        (["A+B"], "ab", ["a+b"], []),
        (["ALL"], "bca", ["b+c+a"], []),
        (["A-then-A.half", "A-then-A.half"], "ab", ["a-then-a.half", "b-then-b.half"], []),
        (["A-then-B-then-C", "A"], "ab", ["a", "b"], ["A-then-B-then-C"]),
        (["ALL-then-A"], "ab", ["a+b-then-a", "a+b-then-b"], []),
        (["a-then-A"], "ab", ["a-then-a", "a-then-b"], []),
    ],
)
def test_designs_are_templates_over_the_objectives(templates, objectives, chains, skipped):
    found, left_out = expand(templates, list(objectives))
    assert ([str(chain) for chain in found], left_out) == (chains, skipped)


def test_three_objectives_have_six_orders_and_fifteen_trainings():
    orders, _ = expand(["A-then-B-then-C"], ["x", "y", "z"])
    assert len(orders) == 6 and len(tree(orders)) == 15


def test_controls_are_the_same_chain_with_another_last_stage():
    among = ["a-then-b", "a-then-b.shuffled", "a-then-a", "b-then-b", "a-then-b-then-a"]
    found = {text: controls(Chain.parse(text), among) for text in among}
    assert found["a-then-b"] == {SHUFFLED: "a-then-b.shuffled", AGAIN: "a-then-a"}
    assert found["a-then-b.shuffled"] == found["a-then-a"] == {}, "a control has none of its own"
    assert controls(Chain.parse("a"), among) == controls(Chain.parse("b-then-a"), among[:1]) == {}
