"""Files, chain and command line become one checked record; whatever is wrong is named before any compute."""

import re
import shutil

import pytest

from seqdpo_utils import params
from seqdpo_utils.errors import StudyError
from seqdpo_utils.layouts import LAYOUTS

HH = "distributional_conflict"


def test_later_wins_from_defaults_to_the_variant(root):
    flat = params.resolve(root, scale="smoke", setting="safety_signal", seed=3, overrides={"beta": 0.7})
    assert (flat.base_model, flat.objectives, flat.lora_rank) == (
        params.EMBEDDED_MODELS[1],
        ["helpful", "safe"],
        4,
    )
    assert (flat.chain, flat.seed, flat.beta) == ("", 3, 0.7)
    varied = {"chain": "helpful-then-safe.flip25", "overrides": {"flipped": 0.5, "learning_rate": 0.5}}
    flat = params.resolve(root, scale="smoke", setting="safety_signal", **varied)
    assert (flat.flipped, flat.learning_rate) == (0.25, 0.5), "a variant wins over the command line"


def test_a_variant_belongs_to_its_own_stage_alone(root):
    for chain, share in (
        ("safe.half", 0.5),
        ("safe.half-then-helpful", 1.0),
        ("safe-then-helpful.half", 0.5),
    ):
        assert params.resolve(root, scale="smoke", setting="safety_signal", chain=chain).train_share == share


def test_a_record_cannot_be_changed(root):
    flat = params.resolve(root, scale="smoke", setting=HH)
    with pytest.raises(ValueError, match="frozen"):
        flat.beta = 1.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"beta": "much"}, ["beta", "'much'", "the command line"]),
        ({"beta": -1.0}, ["beta", "greater than 0", "-1.0"]),
        ({"beta": float("nan")}, ["beta", "nan"]),
        ({"train_pairs": 0}, ["train_pairs", "greater than or equal to 1"]),
        ({"activation_checkpointing": "no"}, ["activation_checkpointing", "boolean"]),
        ({"objectives": ["helpful", "polite"]}, ["unknown objective 'polite'", "helpful, harmless"]),
        ({"objectives": ["helpful", "helpful"]}, ["twice"]),
        ({"pairs_per_step": 4, "pairs_per_device": 3}, ["multiple of pairs_per_device"]),
        ({"conflict_pairs": 3}, ["conflict_pairs", "multiple of 2"]),
        ({"layout": "alpaca"}, ["layout", "hh_rlhf", "'alpaca'"]),
        ({"seeds": []}, ["seeds", "at least 1"]),
        ({"seeds": [-1]}, ["seeds", "greater than or equal to 0"]),
        ({"quantization": "fp4"}, ["quantization", "'nf4'"]),
        ({"attention": "flash"}, ["attention", "flash_attention_2"]),
        ({"subset": "../elsewhere"}, ["subset", "'../elsewhere'"]),
        ({"subset": "/tmp"}, ["subset", "'/tmp'"]),
        ({"rows": ""}, ["rows", "at least 1 character"]),
        ({"rows": 3}, ["rows", "string"]),
        ({"loss_type": ["dpo"]}, ["loss_type", "'sigmoid'", "'dpo'"]),
        ({"loss_weights": [1.0, 2.0]}, ["loss_weights = [1.0, 2.0]", "['sigmoid']"]),
        ({"flipped": 1.5}, ["flipped", "less than or equal to 1"]),
        ({"flipped": 0.5, "shuffled_labels": True}, ["exclude each other"]),
        ({"projection": "backwards"}, ["projection", "'earlier' or 'placebo'"]),
    ],
)
def test_wrong_values_name_key_value_and_what_is_allowed(root, overrides, words):
    with pytest.raises(StudyError) as caught:
        params.resolve(root, scale="smoke", setting=HH, overrides=overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("helpful-then-polite", "unknown objective 'polite'; known are harmless, helpful"),
        ("helpful-then-harmless.loud", "unknown variant 'loud'; known are .*shuffled"),
        ("harmless+helpful", "write 'helpful\\+harmless'"),
        ("helpful-then-harmless.flip25.flip50", "two of its variants change flipped"),
        ("helpful-then-harmless.flip25.shuffled", "exclude each other"),
        ("helpful.ref50", "reference = 0.5 needs a stage before, and this is the first one"),
        ("helpful.replay10-then-harmless", "chain 'helpful.replay10': replay = 0.1 needs a stage before"),
        ("helpful.projected", "projection = 'earlier' needs a stage before"),
        ("helpful-then-../x", "not of the form"),
    ],
)
def test_chains_that_cannot_be_run_are_refused(root, chain, message):
    with pytest.raises(StudyError, match=message):
        params.resolve(root, scale="smoke", setting=HH, chain=chain)


def test_a_variant_that_would_change_nothing_is_refused(root):
    for chain, overrides in (
        ("helpful.half", {"train_share": 0.5}),
        ("helpful-then-harmless.ipo", {"loss_type": ["ipo"]}),
    ):
        with pytest.raises(StudyError, match="change nothing; leave them out"):
            params.resolve(root, scale="smoke", setting=HH, chain=chain, overrides=overrides)


def copy_of_params(root, tmp_path):
    shutil.copytree(root / "params", tmp_path / "params")
    return tmp_path / "params"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "scales/smoke.yaml",
            "learning_rat: 1.0e-3\n",
            r"smoke\.yaml: learning_rat: unknown key; .*learning_rate",
        ),
        ("scales/smoke.yaml", "objectives: [a, b]\n", r"smoke\.yaml: objectives: unknown key"),
        ("settings/distributional_conflict.yaml", "beta: 0.1\n", r"conflict\.yaml: beta: unknown key"),
        (
            "variants.yaml",
            "loud: {beta: 0.1}\n",
            r"variants\.yaml: loud: beta: a variant may change .*learning_rate",
        ),
        ("variants.yaml", "loud: 3\n", r"variants\.yaml: loud: expected \{key: value\}, got 3"),
        ("scales/smoke.yaml", "beta: -1\n", r"smoke\.yaml: beta: .*greater than 0"),
    ],
)
def test_a_fault_in_a_file_names_file_and_key(root, tmp_path, file, text, message):
    changed = copy_of_params(root, tmp_path) / file
    changed.write_text(changed.read_text() + text)
    with pytest.raises(StudyError, match=message):
        params.resolve(tmp_path, scale="smoke", setting=HH, chain="helpful.half")


def test_a_key_that_no_file_sets_is_named(root, tmp_path):
    defaults = copy_of_params(root, tmp_path) / "defaults.yaml"
    defaults.write_text(defaults.read_text().replace("\nbeta: ", "\n# beta: "))
    with pytest.raises(StudyError, match="beta: missing in the parameter files"):
        params.resolve(tmp_path, scale="smoke", setting=HH)


@pytest.mark.parametrize("text", ["- a list\n", "a: [1\n", "!!python/object/apply:os.system ['true']\n"])
def test_files_that_are_no_plain_mapping_are_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(StudyError, match=r"x\.yaml"):
        params.read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["../smoke", "/etc", "Smoke", "", "a b", "smoke.yaml"])
def test_names_never_become_paths_unchecked(root, name):
    with pytest.raises(StudyError):
        params.resolve(root, scale=name, setting="safety_signal")
    with pytest.raises(StudyError):
        params.resolve(root, scale="smoke", setting=name)
    with pytest.raises(StudyError):
        params.read_design(root, name)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_a_seed_is_a_whole_number(root, seed):
    with pytest.raises(StudyError, match="seed"):
        params.resolve(root, scale="smoke", setting=HH, seed=seed)


def test_command_line_words(root):
    words = [
        "beta=0.5",
        "objectives=[helpful, harmless]",
        "activation_checkpointing=true",
        "learning_rate=1e-4",
    ]
    values = params.parse_overrides(words)
    flat = params.resolve(root, scale="smoke", setting=HH, overrides=values)
    assert (flat.beta, flat.objectives, flat.activation_checkpointing) == (0.5, ["helpful", "harmless"], True)
    assert flat.learning_rate == 1e-4, "YAML reads 1e-4 as text; everybody means the number"
    with pytest.raises(StudyError, match="key=value"):
        params.parse_overrides(["beta"])
    with pytest.raises(StudyError, match="betta: unknown key"):
        params.parse_overrides(["betta=1"])


def test_a_notebook_gets_what_it_declares_and_no_more(root):
    namespace = {"scale": "smoke", "setting": "safety_signal", "beta": 0.5, "unrelated": 1}
    given = params.from_notebook(root, namespace)
    assert dict(given) == {"scale": "smoke", "setting": "safety_signal", "beta": 0.5}
    with pytest.raises(AttributeError, match="learning_rate"):
        _ = given.learning_rate
    for wrong in ({"beta": 0.0}, {"chain": "helpful-then-../x"}, {"seed": -1}, {"scale": "../x"}):
        with pytest.raises(StudyError, match=next(iter(wrong))):
            params.from_notebook(root, namespace | wrong)
    three = {"chain": "helpful-then-safe-then-helpful"}
    assert params.from_notebook(root, namespace | three).chain == three["chain"]


def test_every_shipped_file_is_valid(root):
    scales = [file.stem for file in (root / "params" / "scales").glob("*.yaml")]
    assert set(scales) >= {"classroom", "laptop", "paper", "smoke"}
    for scale in scales:
        for setting in params.settings_of(root):
            flat = params.resolve(root, scale=scale, setting=setting)
            first, second = flat.objectives[:2]
            for variant in params.variants(root):
                words = "listwise.steered" if variant == "steered" else variant
                chain, listwise = f"{first}-then-{second}.{words}", words.startswith("listwise")
                if listwise and not LAYOUTS[flat.layout].answers_of:
                    with pytest.raises(StudyError, match="no ratings of answers"):
                        params.resolve(root, scale=scale, setting=setting, chain=chain)
                else:
                    assert params.resolve(root, scale=scale, setting=setting, chain=chain) != flat


@pytest.mark.parametrize(
    ("chain", "overrides", "said"),
    [
        ("truthfulness.steered", {}, "lambda_in_prompt = True needs a listwise stage"),
        (
            "truthfulness.flip50.listwise",
            {},
            "flipped = 0.5 needs pairs, and this stage trains on rated lists",
        ),
        ("truthfulness.listwise", {"flipped": 0.5}, "flipped = 0.5 needs pairs"),
        ("instruction_following-then-truthfulness.listwise.replay10", {}, "replay = 0.1 needs pairs"),
        ("truthfulness.listwise.listwise_grid", {}, "two of its variants change lambdas"),
        (
            "instruction_following+truthfulness.listwise",
            {"lambda_weights": [0.5, 0.6]},
            "2 shares of sum one",
        ),
        ("instruction_following+truthfulness.listwise", {"lambda_weights": [1.0]}, "2 shares of sum one"),
        ("instruction_following+truthfulness.listwise", {"rating_temperature": 0.0}, "rating_temperature"),
    ],
)
def test_a_listwise_stage_that_makes_no_sense_is_refused(root, chain, overrides, said):
    with pytest.raises(StudyError, match=re.escape(said)):
        params.resolve(root, scale="smoke", setting="compatible_quality", chain=chain, overrides=overrides)


def test_a_design_on_rated_lists_leaves_out_settings_without_ratings(root):
    settings = [params.resolve(root, scale="smoke", setting=name) for name in params.settings_of(root)]
    found = params.chosen_chains(root, settings, designs=["aspects"])
    assert set(found) == {"attribute_interaction", "compatible_quality"}
    alone = [each for each in settings if each.setting == "safety_signal"]
    with pytest.raises(StudyError, match="needs settings whose layout rates several answers"):
        params.chosen_chains(root, alone, designs=["aspects"])


def test_every_design_gives_chains_that_can_be_run(root):
    settings = [params.resolve(root, scale="smoke", setting=name) for name in params.settings_of(root)]
    designs = sorted(file.stem for file in (root / "params" / "designs").glob("*.yaml"))
    named = {
        "both_orders",
        "singles",
        "joint",
        "controls",
        "dial",
        "references",
        "causal",
        "remedies",
        "three_stages",
    }
    assert named <= set(designs)
    for design in designs:
        for setting, chains in params.chosen_chains(root, settings, designs=[design]).items():
            for chain in chains:
                params.resolve(root, scale="smoke", setting=setting, chain=chain)


def test_chains_are_chosen_by_design_and_by_name(root):
    settings = [params.resolve(root, scale="smoke", setting=name) for name in params.settings_of(root)]
    both = params.chosen_chains(root, settings, designs=["both_orders", "singles", "both_orders"])
    assert len(both) == 4 and both["safety_signal"] == [
        "helpful-then-safe",
        "safe-then-helpful",
        "helpful",
        "safe",
    ]
    named = params.chosen_chains(root, settings, designs=[], named=["helpful-then-harmless.ref100"])
    assert named == {HH: ["helpful-then-harmless.ref100"]}, "it goes to the setting that has its objectives"
    with pytest.raises(
        StudyError, match=r"holds objectives that no chosen setting has: .*safety_signal has helpful, safe"
    ):
        params.chosen_chains(root, settings, designs=[], named=["polite-then-safe"])
    with pytest.raises(StudyError, match=r"dials\.yaml is not among designs: choose one of .*dial"):
        params.chosen_chains(root, settings, designs=["dials"])


def test_a_design_of_three_objectives_gives_all_six_orders(root):
    attributes = ["helpfulness", "verbosity", "correctness"]
    three = params.resolve(
        root, scale="smoke", setting="attribute_interaction", overrides={"objectives": attributes}
    )
    chains = params.chosen_chains(root, [three], designs=["three_stages"])["attribute_interaction"]
    assert len([text for text in chains if len(set(text.split("-then-"))) == 3]) == 6


def test_flips_are_those_that_their_names_say(root):
    for name, changes in params.variants(root).items():
        for word, key, scale in (
            ("flip", "flipped", 100),
            ("ref", "reference", 100),
            ("replay", "replay", 100),
        ):
            if name.startswith(word):
                assert changes == {key: float(name.removeprefix(word)) / scale}


def test_the_scale_says_where_rows_are_read_and_the_command_line_wins(root, tmp_path):
    for name in ("HH-RLHF", "helpsteer2"):
        (tmp_path / name).mkdir()
    (tmp_path / "hh-rlhf.txt").write_text("not the folder")

    def source(setting, **overrides):
        return params.resolve(root, scale="smoke", setting=setting, overrides=overrides).source

    assert source(HH) == "embedded"
    assert source(HH, rows="hub") == "Anthropic/hh-rlhf"
    assert source(HH, rows=str(tmp_path)) == f"{tmp_path}/HH-RLHF"
    assert source("attribute_interaction", rows=f"{tmp_path}/") == f"{tmp_path}/helpsteer2"
    absent = source("compatible_quality", rows=str(tmp_path))
    assert absent == f"{tmp_path}/ultrafeedback", "named as it should be, and refused when read"
    assert source(HH, rows="hub", source="mine.jsonl") == "mine.jsonl"


def test_a_relative_folder_of_rows_starts_at_the_project(tmp_path, monkeypatch):
    (tmp_path / "copies" / "Hh-Rlhf").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path)
    found = params.source_of(tmp_path / "project", rows="../copies", hub_id="Anthropic/hh-rlhf")
    assert found == "../copies/Hh-Rlhf"


def test_every_setting_names_its_hub_data_set(root):
    names = (HH, "attribute_interaction", "safety_signal", "compatible_quality")
    hub = [params.resolve(root, scale="paper", setting=name).source for name in names]
    assert hub == [
        "Anthropic/hh-rlhf",
        "nvidia/HelpSteer2",
        "PKU-Alignment/PKU-SafeRLHF",
        "openbmb/UltraFeedback",
    ]


def test_the_paper_scale_holds_the_papers_values(root):
    flat = params.resolve(root, scale="paper", setting="safety_signal")
    theirs = {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct", "lora_rank": 32, "lora_alpha": 64,
        "learning_rate": 5.0e-5, "beta": 0.3, "epochs": 1, "dtype": "bfloat16",
        "activation_checkpointing": True, "pairs_per_step": 32,
        "max_length": 1024, "rows": "hub",
    }  # fmt: skip
    assert {key: getattr(flat, key) for key in theirs} == theirs
    assert len(flat.lora_targets) == 7 and len(flat.seeds) > 1
