"""Folders that klfast cannot load, and their error messages; no pickle is read and no network used."""

import json
import os
import shutil
import time

import pytest
import torch
import transformers
from model_folders import INDEX, refused, shard
from safetensors.torch import load_file, save_file

from klfast.checkpoint.by_name import load_model, load_tokenizer
from klfast.core.errors import CheckpointError, InvalidInputError

pytestmark = pytest.mark.usefixtures("no_pickle_and_no_network")


def test_shards_that_are_missing_truncated_or_pointers_are_named(folder):
    expected = load_model(folder).state_dict()
    shard(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(folder).state_dict().items())
    second = folder / "model-00002-of-00002.safetensors"
    data = second.read_bytes()
    for content in (data[:-7], data[:5], b"", b"no safetensors file"):
        second.write_bytes(content)
        refused(folder, r"model-00002-of-00002\.safetensors is damaged .*; fetch or save it again")
    second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(folder, r"model-00002-of-00002\.safetensors: it is a pointer of git-lfs.*git lfs pull")
    second.unlink()
    refused(
        folder, r"lacks model-00002-of-00002\.safetensors, which model\.safetensors\.index\.json lists; fetch it again"
    )
    second.symlink_to(folder / "nowhere")
    refused(folder, r"model-00002-of-00002\.safetensors is not a file, or is a broken link; fetch it again")
    second.unlink()
    (folder / INDEX).unlink()
    refused(
        folder, r"lacks model\.safetensors\.index\.json, which lists what its 1 safetensors files hold; fetch it again"
    )


@pytest.mark.parametrize(
    "name",
    [
        "evil.bin",
        "../evil.safetensors",
        "sub/evil.safetensors",
        "/etc/evil.safetensors",
        "sub\\evil.safetensors",
        3,
        None,
        "",
        ".",
        "a\0.safetensors",
    ],
)
def test_an_index_lists_nothing_but_safetensors_files_of_the_folder(folder, name):
    weight_map = shard(folder)
    torch.save({"x": torch.ones(1)}, folder / "evil.bin")
    (folder / "sub").mkdir()
    for place in (folder.parent, folder / "sub"):
        shutil.copy(folder / "model-00001-of-00002.safetensors", place / "evil.safetensors")
    weight_map[min(weight_map)] = name
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(
        folder,
        r"index\.json lists .*, which is not the name of a safetensors file in this folder; klfast reads nothing else",
    )


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": ["x"]}}', "[" * 200_000],
)
def test_damaged_indices(folder, content):
    shard(folder)
    (folder / INDEX).write_text(content)
    refused(folder, r"index\.json (is not a valid index|lists no file).*; fetch it again")


@pytest.mark.parametrize("name", ["adapter_model.bin", "../evil.safetensors", "other.safetensors"])
def test_a_configuration_that_names_a_weight_file(folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    torch.save({}, folder / "adapter_model.bin")
    refused(folder, r"config\.json names a weight file \(transformers_weights, .*\); call that file model\.safetensors")


@pytest.mark.parametrize(
    ("file", "match"),
    [
        (
            "pytorch_model.bin",
            r"its pytorch_model\.bin is a pickle; klfast never unpickles, so convert it with transformers",
        ),
        ("consolidated.00.pth", r"its consolidated\.00\.pth is a pickle"),
        ("model.Q4_K_M.gguf", r"its model\.Q4_K_M\.gguf is a GGUF file; name the file itself"),
        ("tf_model.h5", r"its tf_model\.h5 is weights of another framework"),
        ("consolidated.safetensors", r"has no model\.safetensors, only consolidated\.safetensors"),
        ("training_args.bin", r"has no weights: model\.safetensors is missing; fetch it again"),
    ],
)
def test_weights_of_other_kinds(folder, file, match):
    (folder / "model.safetensors").rename(folder / file)
    refused(folder, match)
    (folder / "config.json").unlink()
    other = "give the folder" if file in ("training_args.bin", "consolidated.safetensors") else f"its {file} is"
    refused(folder, rf"has no config\.json; {other}")


def test_pointers_of_git_lfs(folder):
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        data = (folder / file).read_bytes()
        (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        for load in (load_model, load_tokenizer):
            refused(folder, rf"{file}: it is a pointer of git-lfs, not the file itself; run `git lfs pull`", load)
        (folder / file).write_bytes(data)


def test_adapters(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    torch.save({}, folder / "adapter_model.bin")
    for _ in range(2):  # with the base model's config.json beside it and without
        for load in (load_model, load_tokenizer):
            refused(folder, r"holds an adapter .*, not a whole model; merge it into its base model", load)
        (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_size": 3}, r"config\.json has no model_type"),
        ({"model_type": ["a"]}, r"config\.json has no model_type"),
        ({"model_type": "unheard-of"}, r"does not know its architecture 'unheard-of'"),
        ({"model_type": "t5"}, r"t5 is not a causal language model"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            r"bert reads text in both directions, so it is not a causal",
        ),
        ({"model_type": "xlm-roberta"}, r"xlm-roberta reads text in both directions"),
        ({"model_type": "bart", "is_encoder_decoder": True}, r"bart reads text in both directions"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "evil.C"}}, r"--trust-remote-code"),
    ],
)
def test_models_of_other_kinds(folder, config, match):
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, match)


def test_bert_as_a_decoder_is_a_causal_language_model(tmp_path):
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_model(tmp_path) is not None


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "unknown"])
def test_models_quantized_by_others(folder, method):
    config = json.loads((folder / "config.json").read_text())
    details = {"bits": 4, "group_size": 128} if method in ("gptq", "awq") else {"load_in_4bit": True}
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method, **details}})
    )
    refused(folder, rf"its weights are quantized with {method} \(.*\); load the full-precision model instead")


@pytest.mark.parametrize("part", ["qweight", "scales", "weight_packed"])
def test_models_quantized_by_others_without_a_quantization_config(folder, part):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("in_proj.weight"))
    tensors[name.replace("weight", part)] = tensors.pop(name).to(torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        folder,
        rf"holds weights that another tool has quantized, such as .*in_proj\.{part}; load the full-precision model",
    )


def test_a_weight_file_instead_of_a_folder(folder):
    for file, match in (("a.bin", "is a pickle; klfast never unpickles"), ("a.txt", "is a file; give the folder")):
        (folder / file).touch()
        with pytest.raises(InvalidInputError, match=match):
            load_model(folder / file)


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors", "chat_template.jinja"])
def test_pipes_are_not_read(folder, file):
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    for load in (load_model, load_tokenizer):
        refused(folder, rf"{file} is a pipe, socket or device, not a regular file; remove it", load)


@pytest.mark.parametrize("layers", [100_000, 10**15])
def test_very_many_layers_are_refused_at_once(folder, layers):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    start = time.monotonic()
    refused(folder, r"config\.json describes a far larger model than the \d+ tensors stored; fetch or save it again")
    assert time.monotonic() - start < 10


def test_very_many_experts_are_refused_at_once(tmp_path):
    """Configurations have no common name for their number, so created parameters are counted, too."""
    from klfast.checkpoint.model_config import bounded

    with (
        pytest.raises(CheckpointError, match="far larger model"),
        bounded(tmp_path / "config.json", 10),
        torch.device("meta"),
    ):
        torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(10**9))
    torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2000))  # the counting has ended


@pytest.mark.parametrize("limit", [[1], "x", [2.0, 1.0], ["a", "b"], [0, 1, 2], [0.0, 10**400], 3, {"a": 1}, [[], []]])
def test_wrong_time_step_limits(folder, limit):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "time_step_limit": limit}))
    refused(
        folder, r"config\.json: time_step_limit must be two numbers, the smaller first, got .*; fetch or save it again"
    )


def test_valid_time_step_limits(folder):
    config = json.loads((folder / "config.json").read_text())
    for limit in ([0.0, 1.0], [0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        (folder / "config.json").write_text(json.dumps({**config, "time_step_limit": limit}))
        assert load_model(folder) is not None


@pytest.mark.parametrize("content", ["9" * 5000, "[]", "3", "null", '"x"', b"\xff\xfe"])
def test_unusual_json(folder, content):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, r"config\.json is not a valid configuration")


@pytest.mark.parametrize("longest", ["many", [1], None, True, -3, float("nan"), {"a": 1}])
def test_damaged_model_max_length(folder, longest):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": longest}))
    if longest is None:  # transformers treats it as missing
        assert load_tokenizer(folder)("a")["input_ids"]
    else:
        refused(folder, "the tokenizer of|model_max_length must be a positive number", load_tokenizer)


@pytest.mark.parametrize("name", ["", "a\0b", "a\\b/c", "a/b/c", b"bytes"])
def test_invalid_names(name):
    with pytest.raises(InvalidInputError):
        load_model(name)
