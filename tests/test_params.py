import pytest

from seqdpo_utils import params
from seqdpo_utils.paths import StudyError


def test_scale_then_setting_then_order_then_command_line(root):
    flat = params.resolve(root, scale="smoke", setting="safety_signal", seed=3, overrides={"beta": 0.7})
    assert flat["base_model"] == "models/tiny-random-llama"
    assert flat["objectives"] == ["helpful", "safe"]
    assert (flat["order"], flat["seed"], flat["beta"]) == ("helpful-then-safe", 3, 0.7)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"beta": "5e-1"}, ["beta", "'5e-1'", "the command line", "1.0e-4"]),
        ({"beta": -1.0}, ["beta", "greater than 0", "-1.0"]),
        ({"beta": float("nan")}, ["beta", "nan"]),
        ({"train_pairs": 0}, ["train_pairs", "greater than or equal to 1"]),
        ({"activation_checkpointing": "no"}, ["activation_checkpointing", "boolean"]),
        ({"objectives": ["helpful", "polite"]}, ["unknown objective 'polite'", "helpful, harmless"]),
        ({"objectives": ["helpful", "helpful"]}, ["twice"]),
        ({"pairs_per_step": 4, "pairs_per_device": 3}, ["multiple of pairs_per_device"]),
        ({"conflict_pairs": 3}, ["conflict_pairs = 3", "even"]),
        ({"layout": "alpaca"}, ["layout", "hh_rlhf", "'alpaca'"]),
        ({"seeds": []}, ["seeds", "at least 1"]),
        ({"seeds": [-1]}, ["seeds", "greater than or equal to 0"]),
        ({"quantization": "fp4"}, ["quantization", "'nf4'"]),
        ({"attention": "flash"}, ["attention", "flash_attention_2"]),
        ({"subset": "../elsewhere"}, ["subset", "'../elsewhere'"]),
        ({"subset": "/tmp"}, ["subset", "'/tmp'"]),
        ({"rows": ""}, ["rows", "at least 1 character"]),
    ],
)
def test_wrong_values_name_key_value_and_what_is_allowed(root, overrides, words):
    with pytest.raises(StudyError) as caught:
        params.resolve(root, scale="smoke", setting="distributional_conflict", overrides=overrides)
    for word in words:
        assert word in str(caught.value)


def test_a_typo_in_a_file_names_file_and_known_keys(root, tmp_path):
    text = (root / "params" / "scales" / "smoke.yaml").read_text() + "learning_rat: 1.0e-3\n"
    file = tmp_path / "smoke.yaml"
    file.write_text(text)
    with pytest.raises(StudyError, match=r"smoke\.yaml: learning_rat: unknown key; the known keys are .*learning_rate"):
        params.load_yaml(file, params.Scale)


@pytest.mark.parametrize("text", ["- a list\n", "a: [1\n", "!!python/object/apply:os.system ['true']\n"])
def test_files_that_are_no_plain_mapping_are_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(StudyError, match=r"x\.yaml"):
        params.load_yaml(tmp_path / "x.yaml", params.Scale)


@pytest.mark.parametrize("name", ["../smoke", "/etc", "Smoke", "", "a b", "smoke.yaml"])
def test_names_never_become_paths_unchecked(root, name):
    with pytest.raises(StudyError):
        params.resolve(root, scale=name, setting="safety_signal")
    with pytest.raises(StudyError):
        params.resolve(root, scale="smoke", setting=name)


@pytest.mark.parametrize("order", ["helpful", "helpful-then-safe", "helpful-then-../../x", "harmless-then-harmless"])
def test_an_order_must_hold_the_objectives(root, order):
    with pytest.raises(StudyError, match="does not hold the objectives"):
        params.resolve(root, scale="smoke", setting="distributional_conflict", order=order)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_a_seed_is_a_whole_number(root, seed):
    with pytest.raises(StudyError, match="seed"):
        params.resolve(root, scale="smoke", setting="distributional_conflict", seed=seed)


def test_command_line_words():
    assert params.parse_overrides(["beta=0.5", "objectives=[helpful, harmless]", "activation_checkpointing=true"]) == {
        "beta": 0.5, "objectives": ["helpful", "harmless"], "activation_checkpointing": True,
    }  # fmt: skip
    with pytest.raises(StudyError, match="key=value"):
        params.parse_overrides(["beta"])
    with pytest.raises(StudyError, match="betta: unknown key"):
        params.parse_overrides(["betta=1"])


def test_a_notebook_gets_what_it_declares_and_no_more(root):
    namespace = {"scale": "smoke", "setting": "safety_signal", "beta": 0.5, "unrelated": 1}
    assert params.from_notebook(root, namespace) == {"scale": "smoke", "setting": "safety_signal", "beta": 0.5}
    for wrong in ({"beta": 0.0}, {"order": "helpful-then-../x"}, {"seed": -1}, {"scale": "../x"}):
        with pytest.raises(StudyError, match=str(next(iter(wrong))).replace("order", "objective")):
            params.from_notebook(root, namespace | wrong)
    three = namespace | {"order": "helpful-then-safe-then-other"}
    assert params.from_notebook(root, three)["order"] == three["order"], "objectives may come from the command line, which 01 has checked"


def test_every_shipped_file_is_valid(root):
    for scale in (root / "params" / "scales").glob("*.yaml"):
        for setting in (root / "params" / "settings").glob("*.yaml"):
            flat = params.resolve(root, scale=scale.stem, setting=setting.stem)
            assert params.orders_of(flat)[0] == flat["order"] != params.orders_of(flat)[1]


def test_the_scale_says_where_rows_are_read_and_the_command_line_wins(root, tmp_path):
    for name in ("HH-RLHF", "helpsteer2"):
        (tmp_path / name).mkdir()
    (tmp_path / "hh-rlhf.txt").write_text("not the folder")

    def source(setting, **overrides):
        return params.resolve(root, scale="smoke", setting=setting, overrides=overrides)["source"]

    assert source("distributional_conflict") == "embedded"
    assert source("distributional_conflict", rows="hub") == "Anthropic/hh-rlhf"
    assert source("distributional_conflict", rows=str(tmp_path)) == f"{tmp_path}/HH-RLHF"
    assert source("attribute_interaction", rows=f"{tmp_path}/") == f"{tmp_path}/helpsteer2"
    assert source("compatible_quality", rows=str(tmp_path)) == f"{tmp_path}/ultrafeedback", "absent: named as it should be, and refused when read"
    assert source("distributional_conflict", rows="hub", source="mine.jsonl") == "mine.jsonl"


def test_a_relative_folder_of_rows_starts_at_the_project(root, tmp_path, monkeypatch):
    (tmp_path / "copies" / "Hh-Rlhf").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path)
    assert params.source_of(tmp_path / "project", rows="../copies", hub_id="Anthropic/hh-rlhf") == "../copies/Hh-Rlhf"


def test_every_setting_names_its_hub_data_set(root):
    hub = {
        name: params.resolve(root, scale="paper", setting=name)["source"]
        for name in ("distributional_conflict", "attribute_interaction", "safety_signal", "compatible_quality")
    }
    assert list(hub.values()) == ["Anthropic/hh-rlhf", "nvidia/HelpSteer2", "PKU-Alignment/PKU-SafeRLHF", "openbmb/UltraFeedback"]


def test_the_paper_scale_holds_the_papers_values(root):
    flat = params.resolve(root, scale="paper", setting="safety_signal")
    theirs = {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct", "lora_rank": 32, "lora_alpha": 64, "learning_rate": 5.0e-5, "beta": 0.3, "epochs": 1, "dtype": "bfloat16",
        "activation_checkpointing": True, "pairs_per_step": 32, "max_length": 1024, "rows": "hub",
    }  # fmt: skip
    assert {key: flat[key] for key in theirs} == theirs and len(flat["lora_targets"]) == 7 and len(flat["seeds"]) > 1
