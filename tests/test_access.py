"""What is missing is said in one sentence with the remedy, before anything starts; refusals are real ones."""

import shutil
import subprocess
from collections import namedtuple

import datasets
import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import httpx

from seqdpo_utils import params
from seqdpo_utils.batch import access, cli

REQUEST = httpx.Request("GET", "https://example.invalid")


def refusal(kind: type, status: int = 404) -> Exception:
    return kind("no", response=httpx.Response(status, request=REQUEST))


ELSEWHERE = "neither in the local cache nor to be had from the hub"
HUB = [
    (refusal(errors.GatedRepoError, 403), ["is gated", "HF_TOKEN"]),
    (refusal(errors.RepositoryNotFoundError, 401), ["that the hub shows", "Check the name"]),
    (refusal(errors.RevisionNotFoundError), ["has no revision 'abc'", "or null for the newest"]),
    (refusal(errors.HfHubHTTPError, 503), [ELSEWHERE, "HfHubHTTPError: no", "try again later"]),
    (errors.OfflineModeIsEnabled("is offline"), [ELSEWHERE, "is offline", "unset HF_HUB_OFFLINE"]),
    (
        errors.LocalEntryNotFoundError("not cached\nat all"),
        [ELSEWHERE, "LocalEntryNotFoundError: not cached)"],
    ),
    (httpx.ConnectError("Name or service not known"), [ELSEWHERE, "not known", "Check the connection"]),
    (ConnectionResetError("reset"), [ELSEWHERE, "ConnectionResetError: reset", "give a local folder"]),
]


def answer(error: Exception | None):
    def asked(*_, **__):
        if error is not None:
            raise error

    return asked


@pytest.fixture
def smoke(root) -> params.Parameters:
    return params.resolve(root, scale="smoke", setting="distributional_conflict")


def but(parameters, **changes):
    return parameters.model_copy(update=changes)


@pytest.mark.parametrize(("error", "words"), HUB, ids=lambda value: type(value).__name__)
def test_what_the_hub_answers_becomes_one_sentence(root, smoke, monkeypatch, error, words):
    """A revision is asked for by the second call; every other refusal comes from the first."""
    late = isinstance(error, errors.RevisionNotFoundError)
    monkeypatch.setattr(huggingface_hub, "auth_check", answer(None if late else error))
    monkeypatch.setattr(huggingface_hub, "repo_info", answer(error))
    model = access.model_fault(root, "someone/model", revision="abc")
    source = access.source_fault(root, but(smoke, source="someone/rows", revision="abc"))
    for sentence, name in ((model, "someone/model"), (source, "someone/rows")):
        assert sentence and "\n" not in sentence and name in sentence
        assert all(word in sentence for word in words)


def test_what_the_hub_grants_is_no_fault_and_a_revision_is_asked_for_only_when_given(
    root, smoke, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "auth_check", lambda name, repo_type: asked.append((name, repo_type))
    )
    monkeypatch.setattr(
        huggingface_hub, "repo_info", lambda *name, **more: asked.append((*name, *more.values()))
    )
    remote = but(smoke, base_model="someone/model", source="someone/rows", revision="abc")
    assert access.faults(root, remote) == []
    assert asked == [
        ("someone/model", "model"),
        ("someone/rows", "dataset"),
        ("someone/rows", "dataset", "abc"),
    ]


def test_a_cached_model_needs_no_hub(root, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "auth_check", answer(errors.OfflineModeIsEnabled("offline")))
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json")
    )
    fault = access.model_fault(root, "someone/model")
    assert "in the local cache" in fault, "a configuration without weights is no model"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert access.model_fault(root, "someone/model") is None


def test_rows_that_were_read_before_need_no_hub(root, smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "auth_check", answer(httpx.ConnectError("no route")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert "no route" in access.source_fault(root, but(smoke, source="someone/rows"))
    (tmp_path / "someone___rows" / "default" / "0.0.0" / "abc").mkdir(parents=True)
    assert access.source_fault(root, but(smoke, source="someone/rows")) is None


def test_local_folders_that_are_absent_or_not_whole_are_named(root, smoke, tmp_path):
    (tmp_path / "hh-rlhf" / "helpful-base").mkdir(parents=True)
    local = but(smoke, source=str(tmp_path / "hh-rlhf"))
    assert "has no folder 'harmless-base':" in access.source_fault(root, local)
    assert access.source_fault(root, but(local, objectives=["helpful"])) is None
    assert "has no folder 'more/helpful-base'" in access.source_fault(root, but(local, subset="more"))
    assert access.source_fault(root, but(local, layout="pku_saferlhf")) is None, (
        "one folder for all objectives"
    )
    for place in ("./nowhere", "../no/where", "/no/where"):
        assert "is not there" in access.source_fault(root, but(smoke, source=place)), place
        assert "is not there" in access.model_fault(root, place), place
    assert "is not there" in access.model_fault(root, "models/other")
    assert "no config.json" in access.model_fault(root, str(tmp_path))


def test_a_folder_of_rows_beside_the_project_is_never_taken_for_a_hub_id(root, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda *_, **__: pytest.fail("the hub was asked"))
    flat = params.resolve(root, scale="smoke", setting="attribute_interaction", overrides={"rows": "nowhere"})
    assert "'./nowhere/helpsteer2' of attribute_interaction is not there" in access.source_fault(root, flat)


def test_optional_packages_are_asked_for_by_name(root, smoke, monkeypatch):
    monkeypatch.setattr(access, "find_spec", lambda name: None)
    sentences = access.faults(root, but(smoke, quantization="nf4", attention="flash_attention_2"))
    assert (
        len(sentences) == 2
        and "needs the package bitsandbytes" in sentences[0]
        and "flash_attn" in sentences[1]
    )
    assert access.faults(root, but(smoke, attention="eager")) == []


def test_a_full_disk_is_a_sentence(root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 3 * 10**8))
    assert "has 0.3 GB free where 1.0 GB are needed" in access.disk_fault(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**12))
    assert access.disk_fault(root) is None


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--set", "rows=hub"], [f"Anthropic/hh-rlhf is {ELSEWHERE}", f"nvidia/HelpSteer2 is {ELSEWHERE}"]),
        (["--set", "rows=../nowhere"], ["'../nowhere/hh-rlhf' of distributional_conflict is not there"]),
        (
            ["--set", "base_model=meta-llama/Llama-3.1-8B-Instruct"],
            ["meta-llama/Llama-3.1-8B-Instruct is gated"],
        ),
    ],
)
def test_the_study_starts_nothing_that_it_could_not_finish(root, words, messages, capsys, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    answers = {
        "model": refusal(errors.GatedRepoError, 401),
        "dataset": errors.OfflineModeIsEnabled("offline"),
    }
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda _, repo_type: answer(answers[repo_type])())
    settings = ["--settings", "distributional_conflict", "attribute_interaction"]
    assert cli.main(["study", "--scale", "smoke", *settings, *words]) == 2
    said = capsys.readouterr().err
    assert all(message in said for message in messages) and said.count("is gated") <= 1
