"""Models on the hub: found in its cache, fetched in two steps, without network access with local_files_only."""

import json
import os
import shutil

import gguf_files
import pytest
import torch
from model_folders import INDEX, refused, shard

import klfast
from klfast.checkpoint.by_name import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("no_pickle_and_no_network")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a function that puts a folder into the hub's cache under an id."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(folder, name="me/small"):
        commit = "0123456789abcdef0123456789abcdef01234567"
        home = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        for file in sorted(folder.iterdir()):  # blobs, and links to them
            blob = home / "blobs" / file.name
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(file, blob)
            link = home / "snapshots" / commit / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return home / "snapshots" / commit

    return put


def test_a_model_on_the_hub(original, cache):
    cache(original)
    expected = load_model(original).state_dict()
    found = load_model("me/small", local_files_only=True).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert load_tokenizer("me/small", local_files_only=True)("Hello")["input_ids"]
    for load in (load_model, load_tokenizer):
        message = "of me/other: there is no such file or folder here; as a hub id: it is not in the local cache"
        refused("me/other", message, load, local_files_only=True)


def test_a_quantized_model_on_the_hub(original, cache, tmp_path):
    model = load_model(original)
    plan = klfast.Plan({"lm_head": klfast.QuantSpec(4, 32)}, "uniform")
    klfast.save_quantized(klfast.quantize_model(model, plan), tmp_path / "small", load_tokenizer(original))
    cache(tmp_path / "small")
    loaded = load_model("me/small", local_files_only=True)
    assert isinstance(loaded.lm_head, klfast.QuantLinear)
    ids = torch.randint(0, 256, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, klfast.load_quantized(tmp_path / "small")(ids).logits)


def test_a_gguf_file_on_the_hub(cache, tmp_path):
    (tmp_path / "files").mkdir()
    gguf_files.write(tmp_path / "files" / "m.gguf", "mamba", gguf_files.tiny("mamba", tied=True), {"*": "Q8_0"})
    cache(tmp_path / "files", "me/small-GGUF")
    loaded = load_model("me/small-GGUF/m.gguf", local_files_only=True)
    assert isinstance(loaded.lm_head, klfast.QuantLinear)
    assert load_tokenizer("me/small-GGUF/m.gguf", local_files_only=True)("the sea")["input_ids"]
    for load in (load_model, load_tokenizer):
        refused("me/small-GGUF/other.gguf", "not in the local cache", load, local_files_only=True)
        with pytest.raises(klfast.InvalidInputError, match=r"there is no file 'm\.gguf'; one on the hub reads o"):
            load("m.gguf", local_files_only=True)


def test_damage_in_the_cache(folder, cache):
    shard(folder)
    snapshot = cache(folder)
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    refused("me/small", r"lacks model-00001-of-00002\.safetensors", local_files_only=True)
    (snapshot / INDEX).unlink()
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "evil.bin"}}))
    refused("me/small", r"lists 'evil\.bin'", local_files_only=True)
    (snapshot / "adapter_config.json").write_text("{}")
    refused("me/small", r"holds an adapter", local_files_only=True)


def test_files_fetched_from_the_hub(original, cache, tmp_path, monkeypatch):
    """Fetch small files first, then the weight files that they name; use the cache if the hub is unreachable."""
    import huggingface_hub

    snapshot, asked = cache(original), []

    def download(name, *, allow_patterns, revision=None, **_):
        asked.append((name, revision, list(allow_patterns)))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("me/small")
    assert [name for name, _, _ in asked] == ["me/small"] * 2 and asked[1][1:] == (snapshot.name, ["model.safetensors"])
    assert "*.json" in asked[0][2] and not any("safetensors" in pattern or pattern == "*.py" for pattern in asked[0][2])
    asked.clear()
    load_tokenizer("me/small", trust_remote_code=True)
    assert len(asked) == 1 and "*.py" in asked[0][2]
    shutil.copytree(snapshot, tmp_path / "sharded")
    shard(tmp_path / "sharded")
    snapshot = tmp_path / "sharded"
    asked.clear()
    load_model("me/small")
    assert asked[1][2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]

    snapshot = tmp_path / "mamba_ssm"
    snapshot.mkdir()
    (snapshot / "config.json").write_text(json.dumps({"d_model": 8, "n_layer": 1}))
    asked.clear()
    refused("me/small", "has no weights: pytorch_model.bin is missing")
    assert asked[1][2] == ["pytorch_model.bin"]

    def unreachable(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert load_model("me/small") is not None
    refused("me/other", "not in the local cache, and the hub cannot be reached")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("GatedRepoError", "only after you accepted its terms"),
        ("RepositoryNotFoundError", "the hub has no such model; check the id"),
        ("RevisionNotFoundError", "the hub has no such version"),
    ],
)
def test_errors_of_the_hub(name, match, monkeypatch):
    import huggingface_hub

    def download(*_, **__):
        kind = getattr(huggingface_hub.errors, name)
        raise kind.__new__(kind, "no")  # its initialiser needs a response of the hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused("me/other", match)


@pytest.mark.parametrize("name", ["a b/c d", "-a/b", "a/b--c..d"])
def test_ids_that_are_invalid_on_the_hub(name):
    refused(name, r"that is not a hub id, which reads owner/name", local_files_only=True)
