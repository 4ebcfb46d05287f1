"""What is missing is said in one sentence, with the remedy, before anything starts. The hub's answers are its own exception classes."""

import shutil
import subprocess
from collections import namedtuple

import datasets
import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import httpx

from seqdpo_utils import access, params, run

REQUEST = httpx.Request("GET", "https://example.invalid")


def refusal(kind: type, status: int = 404) -> Exception:
    return kind("no", response=httpx.Response(status, request=REQUEST))


HUB = [
    (refusal(errors.GatedRepoError, 403), ["is gated", "HF_TOKEN"]),
    (refusal(errors.RepositoryNotFoundError, 401), ["the hub shows no", "Check the name"]),
    (refusal(errors.RevisionNotFoundError), ["has no revision 'abc'", "or null for the newest"]),
    (refusal(errors.HfHubHTTPError, 503), ["the hub answered 503", "local folder"]),
    (errors.OfflineModeIsEnabled("offline"), ["not in the local cache", "Unset HF_HUB_OFFLINE"]),
    (errors.LocalEntryNotFoundError("not cached"), ["cannot be reached (LocalEntryNotFoundError)", "Check the connection"]),
    (httpx.ConnectError("Name or service not known"), ["cannot be reached (ConnectError)", "Check the connection"]),
    (ConnectionResetError("reset"), ["cannot be reached (ConnectionResetError)", "Check the connection"]),
]


def answer(error: Exception | None):
    def asked(*_, **__):
        if error is not None:
            raise error

    return asked


@pytest.fixture
def flat(root) -> dict:
    return params.resolve(root, scale="smoke", setting="distributional_conflict")


@pytest.mark.parametrize(("error", "words"), HUB, ids=lambda value: type(value).__name__)
def test_what_the_hub_answers_becomes_one_sentence(root, flat, monkeypatch, error, words):
    """A revision is asked for by the second call; every other refusal comes from the first."""
    late = isinstance(error, errors.RevisionNotFoundError)
    monkeypatch.setattr(huggingface_hub, "auth_check", answer(None if late else error))
    monkeypatch.setattr(huggingface_hub, "repo_info", answer(error))
    model = access.model_fault(root, "someone/model", revision="abc")
    source = access.source_fault(root, flat | {"source": "someone/rows", "revision": "abc"})
    for sentence, name in ((model, "someone/model"), (source, "someone/rows")):
        assert sentence and "\n" not in sentence and name in sentence
        assert all(word in sentence for word in words)


def test_what_the_hub_grants_is_no_fault_and_a_revision_is_asked_for_only_when_given(root, flat, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda name, repo_type: asked.append((name, repo_type)))
    monkeypatch.setattr(huggingface_hub, "repo_info", lambda name, repo_type, revision: asked.append((name, repo_type, revision)))
    assert access.faults(root, flat | {"base_model": "someone/model", "source": "someone/rows", "revision": "abc"}) == []
    assert asked == [("someone/model", "model"), ("someone/rows", "dataset"), ("someone/rows", "dataset", "abc")]


def test_a_cached_model_needs_no_hub(root, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "auth_check", answer(errors.OfflineModeIsEnabled("offline")))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    assert "not in the local cache" in access.model_fault(root, "someone/model"), "a configuration without weights is no model"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert access.model_fault(root, "someone/model") is None


def test_rows_that_were_read_before_need_no_hub(root, flat, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "auth_check", answer(httpx.ConnectError("no route")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert "cannot be reached" in access.source_fault(root, flat | {"source": "someone/rows"})
    (tmp_path / "someone___rows" / "default" / "0.0.0" / "abc").mkdir(parents=True)
    assert access.source_fault(root, flat | {"source": "someone/rows"}) is None


def test_local_folders_that_are_absent_or_not_whole_are_named(root, flat, tmp_path):
    (tmp_path / "hh-rlhf" / "helpful-base").mkdir(parents=True)
    flat |= {"source": str(tmp_path / "hh-rlhf")}
    assert "has no folder 'harmless-base'" in access.source_fault(root, flat)
    assert access.source_fault(root, flat | {"objectives": ["helpful"]}) is None
    assert "has no folder 'more/helpful-base'" in access.source_fault(root, flat | {"subset": "more"})
    for place in ("./nowhere", "../no/where", "/no/where"):
        assert "is not there" in access.source_fault(root, flat | {"source": place}), place
        assert "is not there" in access.model_fault(root, place), place
    assert "is not there" in access.model_fault(root, "models/other")
    assert "no config.json" in access.model_fault(root, str(tmp_path))


def test_a_folder_of_rows_beside_the_project_is_never_taken_for_a_hub_id(root, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda *_, **__: pytest.fail("the hub was asked"))
    flat = params.resolve(root, scale="smoke", setting="attribute_interaction", overrides={"rows": "nowhere"})
    assert "'./nowhere/helpsteer2' of attribute_interaction is not there" in access.source_fault(root, flat)


def test_optional_packages_are_asked_for_by_name(root, flat, monkeypatch):
    monkeypatch.setattr(access, "find_spec", lambda name: None)
    sentences = access.faults(root, flat | {"quantization": "nf4", "attention": "flash_attention_2"})
    assert len(sentences) == 2 and "needs the package bitsandbytes" in sentences[0] and "flash_attn" in sentences[1]
    assert access.faults(root, flat | {"attention": "eager"}) == []


def test_a_full_disk_is_a_sentence(root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 3 * 10**8))
    assert "has 0.3 GB free where 1.0 GB are needed" in access.disk_fault(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**12))
    assert access.disk_fault(root) is None


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--set", "rows=hub"], ["Anthropic/hh-rlhf is not in the local cache", "nvidia/HelpSteer2 is not in the local cache"]),
        (["--set", "rows=../nowhere"], ["'../nowhere/hh-rlhf' of distributional_conflict is not there"]),
        (["--set", "base_model=meta-llama/Llama-3.1-8B-Instruct"], ["meta-llama/Llama-3.1-8B-Instruct is gated"]),
    ],
)
def test_the_study_starts_nothing_that_it_could_not_finish(root, words, messages, capsys, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    gated, offline = refusal(errors.GatedRepoError, 401), errors.OfflineModeIsEnabled("offline")
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda name, repo_type: answer(gated if repo_type == "model" else offline)())
    assert run.main(["study", "--scale", "smoke", "--settings", "distributional_conflict", "attribute_interaction", *words]) == 2
    said = capsys.readouterr().err
    assert all(message in said for message in messages) and said.count("is gated") <= 1
