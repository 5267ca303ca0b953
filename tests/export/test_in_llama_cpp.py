"""Exported files in llama.cpp itself, where its programs are: its log probabilities and greedy text are the model's."""

import re

import pytest
import tokenizer_kinds
import torch
from exported_models import FAMILIES, exportable, quantized
from llama_cpp_programs import log_probabilities, needs_llama_cpp, perplexity, run

import klfast
from klfast.export.gguf.tensor_types import tensor_types
from klfast.export.gguf.write import export_gguf

pytestmark = needs_llama_cpp
TEXT = "The sea's waves, 1234 of them,\n\n came on ... and went. " * 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_kinds.tokenizer("byte-level BPE")


@torch.no_grad()
def ours(model, ids):
    first = ids.shape[1] // 2
    return torch.log_softmax(model(torch.from_numpy(ids).long()).logits.double(), -1)[:, first:-1]


def kl(teacher, student):
    return (teacher.exp() * (teacher - student)).sum(-1).mean().item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities(tmp_path, text, tokenizer, family, tied):
    model = exportable(family, tied, vocabulary=tokenizer_kinds.SIZE)
    export_gguf(model, tmp_path / "m.gguf", tokenizer)
    ids, found = log_probabilities(tmp_path / "m.gguf", text, 32, tmp_path / "p")
    assert ids.flatten().tolist() == tokenizer(TEXT)["input_ids"][: ids.size]
    expected = ours(model, ids)
    least = expected.amax(-1, keepdim=True) - 15.9
    assert (torch.from_numpy(found) - expected).abs()[expected > least].max() < 5e-4  # 16 bits


@pytest.mark.parametrize(
    "family", ["mamba", "granite_hybrid", "falcon_h1", "qwen3_5", "granite_hybrid_moe", "lfm2_moe"]
)
def test_quantized_layers(tmp_path, text, tokenizer, family):
    model = quantized(exportable(family, vocabulary=tokenizer_kinds.SIZE))
    export_gguf(model, tmp_path / "m.gguf", tokenizer)
    ids, found = log_probabilities(tmp_path / "m.gguf", text, 32, tmp_path / "p")
    assert kl(ours(model, ids), torch.from_numpy(found).double()) < 2e-3  # llama.cpp rounds activations to int8


def test_kl_of_a_plan_is_what_klfast_measures(tmp_path):
    tokenizer, held_out = klfast.load_tokenizer("mamba2"), klfast.core.bundled.ASSETS / "text" / "evaluation.txt"
    (tmp_path / "text.txt").write_text(held_out.read_text()[:20000])
    teacher = klfast.load_model("mamba2")
    export_gguf(teacher, tmp_path / "teacher.gguf", tokenizer)
    ids, _ = log_probabilities(tmp_path / "teacher.gguf", tmp_path / "text.txt", 128, tmp_path / "p")
    expected = ours(teacher, ids)
    model = quantized(klfast.load_model("mamba2"), ["int4-g32-sym", "int8-g32-sym", "int4-g64-sym"])
    export_gguf(model, tmp_path / "m.gguf", tokenizer)
    options = ["--kl-divergence", "--kl-divergence-base", tmp_path / "p"]
    said = perplexity(tmp_path / "m.gguf", tmp_path / "text.txt", 128, *options)
    rows = re.findall(r"^ *\d+ +[0-9.]+ ± +[0-9.]+ +[-0-9.]+ ± +[0-9.]+ +([0-9.]+) ±", said, re.M)  # means so far
    found = float(rows[-1])
    assert found == pytest.approx(kl(expected, ours(model, ids)), rel=0.05)


@pytest.mark.parametrize("spec", [None, "int4-g32-sym"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_greedy_text(tmp_path, name, spec):
    model, tokenizer, prompt = klfast.load_model(name), klfast.load_tokenizer(name), "In the morning"
    if spec is not None:
        model = quantized(model, [spec])
    export_gguf(model, tmp_path / "m.gguf", tokenizer)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = tokenizer.decode(klfast.generate(model, ids, max_new_tokens=20)[0])
    options = ["-n", 24, "-t", 2, "--temp", 0, "-no-cnv", "--no-warmup"]
    assert expected in run("llama-completion", "-m", tmp_path / "m.gguf", "-p", prompt, *options)


def test_llama_quantize_takes_the_types(tmp_path, tokenizer):
    export_gguf(exportable("mamba2", vocabulary=tokenizer_kinds.SIZE), tmp_path / "dense.gguf", tokenizer)
    types = tensor_types(
        quantized(exportable("mamba2", vocabulary=tokenizer_kinds.SIZE), ["int4-g64-sym", "int8-g32-sym"])
    )
    (tmp_path / "types.txt").write_text(types)
    run(
        "llama-quantize",
        "--tensor-type-file",
        tmp_path / "types.txt",
        tmp_path / "dense.gguf",
        tmp_path / "q.gguf",
        "Q4_0",
    )
    from gguf import GGUFReader

    found = {one.name: one.tensor_type.name for one in GGUFReader(tmp_path / "q.gguf").tensors}
    for line in types.splitlines():
        name, kind = line.split("$=")
        assert found[name[1:].replace("\\", "")] == kind.upper()
