"""llama.cpp as a peer: the files that the bench makes for it, and llama-bench's part in a race."""

import sys
from dataclasses import replace

import gguf
import pytest
import torch
import transformers

import klfast
from bench import gguf_models, llama_cpp, test_decode, test_families
from klfast.benchkit.runner import Contender, Group, Race, UnavailableError
from klfast.benchkit.settings import Settings

# What llama.cpp demands (load_arch_tensors in src/models/granite-hybrid.cpp and mamba2.cpp of llama-cpp-python 0.3.36),
# columns before rows, with the types that its llama-quantize wrote for these models.
GRANITE = {
    "token_embd.weight": ([256, 512], "Q6_K"),
    "output_norm.weight": ([256], "F32"),
    "blk.0.attn_norm.weight": ([256], "F32"),
    "blk.0.ssm_in.weight": ([256, 2 * 512 + 2 * 2 * 32 + 16], "Q4_0"),
    "blk.0.ssm_conv1d.weight": ([4, 512 + 2 * 2 * 32], "F32"),
    "blk.0.ssm_conv1d.bias": ([512 + 2 * 2 * 32], "F32"),
    "blk.0.ssm_dt.bias": ([16], "F32"),
    "blk.0.ssm_a": ([1, 16], "F32"),
    "blk.0.ssm_d": ([1, 16], "F32"),
    "blk.0.ssm_norm.weight": ([256, 2], "F32"),
    "blk.0.ssm_out.weight": ([512, 256], "Q4_0"),
    "blk.0.ffn_norm.weight": ([256], "F32"),
    "blk.0.ffn_gate.weight": ([256, 384], "Q4_0"),
    "blk.0.ffn_up.weight": ([256, 384], "Q4_0"),
    "blk.0.ffn_down.weight": ([384, 256], "Q4_0"),
    "blk.1.attn_norm.weight": ([256], "F32"),
    "blk.1.attn_q.weight": ([256, 256], "Q4_0"),
    "blk.1.attn_k.weight": ([256, 128], "Q4_0"),
    "blk.1.attn_v.weight": ([256, 128], "Q4_0"),
    "blk.1.attn_output.weight": ([256, 256], "Q4_0"),
    "blk.1.ffn_norm.weight": ([256], "F32"),
    "blk.1.ffn_gate.weight": ([256, 384], "Q4_0"),
    "blk.1.ffn_up.weight": ([256, 384], "Q4_0"),
    "blk.1.ffn_down.weight": ([384, 256], "Q4_0"),
}
MAMBA2 = {
    "token_embd.weight": ([128, 512], "Q4_0"),
    "output.weight": ([128, 512], "Q8_0"),
    "output_norm.weight": ([128], "F32"),
} | {
    f"blk.{block}.{name}": value
    for block in range(2)
    for name, value in {
        "attn_norm.weight": ([128], "F32"),
        "ssm_in.weight": ([128, 2 * 256 + 2 * 128 + 4], "Q4_0"),
        "ssm_conv1d.weight": ([4, 256 + 2 * 128], "F32"),
        "ssm_conv1d.bias": ([256 + 2 * 128], "F32"),
        "ssm_dt.bias": ([4], "F32"),
        "ssm_a": ([1, 4], "F32"),
        "ssm_d": ([1, 4], "F32"),
        "ssm_norm.weight": ([256, 1], "F32"),
        "ssm_out.weight": ([256, 128], "Q4_0"),
    }.items()
}


def granite():
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=512,
        hidden_size=256,
        shared_intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["mamba", "attention"],
        mamba_n_heads=16,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_n_groups=2,
        num_local_experts=0,
        num_experts_per_tok=0,
        position_embedding_type="nope",
        logits_scaling=3.0,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("make", "expected"), [(granite, GRANITE), (lambda: gguf_models.sizes("mamba2-tiny"), MAMBA2)])
def test_tensors_are_those_that_llama_cpp_asks_for(tmp_path, make, expected):
    gguf_models.write(tmp_path / "m.gguf", make())
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert {one.name: (one.shape.tolist(), one.tensor_type.name) for one in tensors} == expected


def test_weights_are_small_random_numbers(tmp_path):
    gguf_models.write(tmp_path / "m.gguf", granite())
    kinds = set()
    for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if one.tensor_type.name.startswith("Q"):
            values = gguf.quants.dequantize(one.data, one.tensor_type)
            assert abs(values.mean()) < 3e-3 and 0.018 < values.std() < 0.022
            kinds.add(one.tensor_type.name)
    assert kinds == {"Q4_0", "Q6_K"}


def test_metadata_of_granite(tmp_path):
    gguf_models.write(tmp_path / "m.gguf", granite())
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {name.removeprefix("granitehybrid."): field.contents() for name, field in fields.items()}
    expected = {
        "general.architecture": "granitehybrid",
        "vocab_size": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": [0, 2],
        "attention.key_length": 64,
        "feed_forward_length": 384,
        "ssm.inner_size": 512,
        "ssm.state_size": 32,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 16,
        "ssm.conv_kernel": 4,
        "rope.scaling.finetuned": False,
        "logit_scale": 3.0,
    }
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.filterwarnings("ignore:.*as stored")
@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3_5TextConfig(
            vocab_size=512,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            linear_conv_kernel_dim=3,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            tie_word_embeddings=True,
        ),
        transformers.Lfm2Config(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention", "conv"],
            conv_L_cache=4,
        ),
        transformers.MambaConfig(
            vocab_size=512, hidden_size=96, num_hidden_layers=3, state_size=8, time_step_rank=5, conv_kernel=3
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_transformers_reads_the_model_back(tmp_path, config):
    """Its own conversion makes the model that the file was made for."""
    with torch.device("meta"):
        expected = transformers.AutoModelForCausalLM.from_config(config)
    gguf_models.write(tmp_path / "m.gguf", expected)
    found = klfast.load_model(tmp_path / "m.gguf", gguf="dense")
    assert shapes(found) == shapes(expected)
    with torch.inference_mode():
        logits = found(torch.arange(7)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0.01


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_models_without_a_peer():
    with pytest.raises(UnavailableError, match="klfast writes no GGUF file of zamba2, only of bamba, falcon_h1, "):
        gguf_models.made("zamba2-1.2b")


def test_one_file_is_kept_at_a_time():
    first = gguf_models.made("mamba-tiny")
    assert gguf_models.made("mamba-tiny") == first and first.exists()
    second = gguf_models.made("mamba2-tiny")
    assert list(first.parent.iterdir()) == [second]


# What llama-bench prints with -o json, shortened; the arguments that it was given go to stderr.
PROGRAM = """#!{python}
import json, sys
tokens = sys.argv[sys.argv.index("-pg") + 1] if "-pg" in sys.argv else sys.argv[sys.argv.index("-p") + 1]
open({log!r}, "a").write(" ".join(sys.argv[1:]) + chr(10))
print(json.dumps([{{"model_type": "mamba 0.1B Q4_0", "samples_ns": [1000000 * len(tokens)], "samples_ts": [1.0]}}]))
"""


@pytest.fixture
def settings(tmp_path):
    """Return settings with a program that answers as llama-bench does, and the file with the arguments it was given."""
    (tmp_path / "bin").mkdir()
    program, log = tmp_path / "bin" / "llama-bench", tmp_path / "calls"
    program.write_text(PROGRAM.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    return Settings(quick=True, threads=3, llama_cpp=tmp_path), log


def test_llama_bench_is_asked_for_the_same_tokens(settings):
    settings, log = settings
    groups = [group for group in test_decode.groups(settings) if "llama.cpp q4_0" in group.contenders]
    prefill, decode = [group for group in groups if group.facts["model"] == "mamba-tiny"]
    seconds = {}
    for group in (prefill, decode):
        contender = group.contenders["llama.cpp q4_0"]()
        seconds[group.facts["stage"]] = contender()
        assert contender.own_clock and contender.facts(2.0) == {"tok_s": group.facts["tokens"] / 2}
    assert seconds == {"prefill": 0.002, "decode": 0.003}
    first, second = log.read_text().splitlines()
    assert "mamba-tiny-q4_0.gguf -p 64 -n 0 -t 3 -r 1 -o json" in first
    assert "mamba-tiny-q4_0.gguf -p 0 -n 0 -pg 8,4 -t 3 -r 1 -o json" in second


def test_a_given_file_takes_the_place_of_the_made_one(settings, tmp_path):
    settings, _ = settings
    given = tmp_path / "lfm2-tiny-bf16.gguf"
    settings = replace(settings, gguf=(given,))
    names = {group.facts["model"]: list(group.contenders)[-1] for group in test_families.groups(settings)}
    assert names == {"lfm2-tiny": "llama.cpp bf16", "qwen3.5-tiny": "llama.cpp q4_0"}
    assert not any("llama" in name for group in test_families.groups(Settings(quick=True)) for name in group.contenders)


def test_a_program_that_times_itself_takes_turns():
    calls = []
    ours = Contender([lambda: calls.append("klfast")], lambda: 0.0, 0.0)
    peer = Contender([lambda: calls.append("peer") or 2.0], None, 0.0, own_clock=True)
    race = Race(Settings())
    race.enter(Group("group", {}, {"klfast": lambda: ours, "peer": lambda: peer}))
    times, ratios = race.run("peer", None)
    assert times.median == times.min == 2.0 and ratios["klfast"] > 100
    assert calls == ["klfast"] + ["klfast", "peer"] * len(times.rounds)


def test_failure_of_llama_bench(settings):
    settings, _ = settings
    settings.llama_cpp.joinpath("bin", "llama-bench").write_text("#!/bin/sh\necho no such model >&2; exit 3\n")
    with pytest.raises(RuntimeError, match=r"llama-bench failed on m.gguf \(exit 3\): no such model"):
        llama_cpp.seconds(settings, settings.llama_cpp / "m.gguf", prompt=1, new=0)


def test_wrong_settings(settings, tmp_path):
    settings, _ = settings
    for wrong, message in (
        (replace(settings, llama_cpp=tmp_path / "nowhere"), "there is no llama-bench in .*nowhere"),
        (replace(settings, llama_cpp=None, gguf=(tmp_path / "mamba-tiny.gguf",)), "--gguf needs --llama-cpp"),
        (replace(settings, gguf=(tmp_path / "x.gguf",)), "the name of x.gguf does not begin with one of mamba-130m, "),
    ):
        with pytest.raises(klfast.InvalidInputError, match=message):
            llama_cpp.require(wrong)
