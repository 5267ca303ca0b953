"""generate: the same greedy tokens as transformers, and samples from the right distribution."""

import subprocess
import sys
import warnings

import pytest
import torch
from tiny_models import CONFIGS, FAMILIES, OTHERS, VARIANTS, VOCABULARY, batch, left_padded, made, tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.core import errors
from klfast.generation import stepper
from klfast.models.calling import reads_padding
from klfast.models.linears import linears

BY_ROW = {"rwkv": "RwkvForCausalLM mixes rows", "minimax": "padding changes what", "xlstm": "padding changes what"}


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.mark.parametrize("tokens", [1, 9])
def test_greedy_equals_transformers(model, tokens):
    ids = batch(3, tokens)
    assert torch.equal(
        klfast.generate(model, ids, max_new_tokens=7), model.generate(ids, do_sample=False, max_new_tokens=7)
    )


@pytest.mark.parametrize("family", [name for name in (*VARIANTS, *OTHERS) if name not in BY_ROW])
def test_greedy_equals_transformers_in_other_families(family, one_thread):
    model, ids = tiny(family, tied=None), batch(3, 9)

    def expected(ids, mask):
        return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=7, pad_token_id=0)

    full, padded = torch.ones_like(ids), left_padded(ids)
    unpadded = expected(ids, full)
    for mask in (None, full):
        assert torch.equal(klfast.generate(model, ids, 7, attention_mask=mask), unpadded)
    assert torch.equal(klfast.generate(model, ids, 7, attention_mask=padded), expected(ids, padded))
    assert torch.equal(klfast.generate(model, ids[:, :1], 7), expected(ids[:, :1], full[:, :1]))


BIASED = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "nemotron_h"), "use_bias"),
    **dict.fromkeys(("granite_hybrid", "falcon_h1", "bamba", "jamba", "zamba", "hymba"), "mamba_proj_bias"),
    **dict.fromkeys(("lfm2", *(name for name in VARIANTS if name == "lfm3")), "conv_bias"),
    "zamba2": "add_bias_linear",
}


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.no_grad()
def test_padding_where_projections_have_biases(family, monkeypatch, one_thread):
    """The biases would fill what the mask has emptied; without the engine, as with more rows than it takes."""
    config = CONFIGS[family]()
    without, model = (made(type(config)(**config.to_dict() | {BIASED[family]: on}), family) for on in (False, True))
    assert reads_padding(model) == (family != "hymba") and not reads_padding(without)
    for name, parameter in model.named_parameters():
        if name.endswith("in_proj.bias"):
            parameter.copy_(torch.linspace(-2, 2, len(parameter)))
    ids = batch(3, 9)
    mask = torch.tensor([[0] * pads + [1] * (9 - pads) for pads in (0, 5, 7)])
    monkeypatch.setattr(stepper, "MOST_SEQUENCES", 2)
    found = klfast.generate(model, ids, 6, attention_mask=mask)
    for row, prompt, real in zip(found, ids, mask, strict=True):
        text = prompt[real != 0].unsqueeze(0)
        for _ in range(6):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert row[9:].tolist() == text[0, -6:].tolist()


@pytest.mark.parametrize("length", [1, 9, 20])
@pytest.mark.parametrize("family", BY_ROW)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.no_grad()
def test_rows_continue_as_if_alone(family, length, one_thread):
    """The truth runs each row without its padding, and again for each token, without a cache."""
    model, ids = tiny(family, tied=None), batch(3, length)
    for mask in (torch.ones_like(ids), left_padded(ids))[: 1 if length == 1 else 2]:
        found = klfast.generate(model, ids, 6, attention_mask=mask)
        for row, prompt, real in zip(found, ids, mask, strict=True):
            text = prompt[real != 0].unsqueeze(0)
            for _ in range(6):
                text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            assert row[length:].tolist() == text[0, -6:].tolist()


@pytest.mark.parametrize(("family", "why"), BY_ROW.items())
def test_warns_about_models_that_continue_row_by_row(family, why):
    ids = batch(17, 9)  # more rows than an engine takes
    with pytest.warns(klfast.SlowPathWarning, match=rf"generate \[17, 9\] runs row by row: {why}"):
        klfast.generate(tiny(family), ids, 2, attention_mask=left_padded(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        klfast.generate(tiny(family), ids[:1], 2)


def test_greedy_equals_transformers_quantized(model):
    klfast.quantize_model(model, Plan(dict.fromkeys(linears(model), QuantSpec(4, 16)), "uniform"))
    ids = batch(2, 9)
    assert torch.equal(
        klfast.generate(model, ids, max_new_tokens=8), model.generate(ids, do_sample=False, max_new_tokens=8)
    )


def test_left_padding_changes_nothing(model):
    ids, mask = batch(3, 9), left_padded(batch(3, 9))
    found = klfast.generate(model, ids, 7, attention_mask=mask)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=7))
    assert torch.equal(found[:1, 4:], klfast.generate(model, ids[:1, 4:], 7))
    assert torch.equal(found[2:], klfast.generate(model, ids[2:], 7))


def test_left_padding_shifts_absolute_positions():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)  # rotary positions are invariant to a shift
    ids = batch(3, 9)
    found = klfast.generate(model, ids, 12, attention_mask=left_padded(ids))
    assert torch.equal(found, model.generate(ids, attention_mask=left_padded(ids), do_sample=False, max_new_tokens=12))
    assert torch.equal(found[:1, 4:], klfast.generate(model, ids[:1, 4:], 12))


def test_end_tokens(model):
    ids = batch(3, 9)
    free = klfast.generate(model, ids, 10)
    ends = {int(free[0, 9 + 2]), int(free[1, 9 + 5])}
    found = klfast.generate(model, ids, 10, eos_token_id=ends, pad_token_id=60)
    expected = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=list(ends), pad_token_id=60)
    assert torch.equal(found, expected)
    one = int(free[0, 9])
    alone = klfast.generate(model, ids[:1], 10, eos_token_id=one)
    assert alone[0].tolist() == [*ids[0].tolist(), one]  # it stops when every row is done


def test_callback_modes_and_result(model):
    seen, ids = [], batch(2, 5)
    model.train()
    model.base_model.eval()
    modes = [module.training for module in model.modules()]
    found = klfast.generate(model, ids, max_new_tokens=4, callback=seen.append)
    assert torch.equal(torch.stack(seen, 1), found[:, 5:]) and torch.equal(found[:, :5], ids)
    assert [module.training for module in model.modules()] == modes and found.dtype == torch.int64
    found += 1  # an ordinary tensor
    assert torch.equal(klfast.generate(model, ids, max_new_tokens=0), ids)


def test_sampling():
    model, ids = tiny("llama"), batch(1, 2)

    def draw(rows, **options):
        return klfast.generate(model, ids.expand(rows, -1), 1, generator=torch.Generator().manual_seed(3), **options)[
            :, -1
        ]

    with torch.no_grad():
        p = (model(ids).logits[0, -1] / 1.5).softmax(-1)
    counts = torch.bincount(draw(4000, temperature=1.5), minlength=VOCABULARY) / 4000
    assert (counts - p).abs().max() < 5 * (p.max() / 4000).sqrt()
    assert (
        torch.equal(draw(50, temperature=1.5), draw(50, temperature=1.5))
        and len(set(draw(50, temperature=1.5).tolist())) > 1
    )
    order = p.argsort(descending=True)
    assert set(draw(1000, temperature=1.5, top_k=3).tolist()) == set(order[:3].tolist())
    kept = int((p[order].cumsum(0) < 0.5).sum()) + 1
    assert set(draw(1000, temperature=1.5, top_p=0.5).tolist()) == set(order[:kept].tolist())
    assert (
        set(draw(50, temperature=1.5, top_p=1e-9).tolist())
        == set(draw(50, top_k=1, temperature=2).tolist())
        == {int(order[0])}
    )
    assert set(draw(50, temperature=1e-6).tolist()) == {int(order[0])}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ids": batch().int()}, "int64"),
        ({"ids": batch()[:, :0]}, "1 columns"),
        ({"ids": batch() + VOCABULARY}, "another tokenizer"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask must have the shape"),
        ({"attention_mask": 1 - left_padded(batch(2, 12))}, "padding must be on the left"),
        ({"attention_mask": left_padded(batch(2, 12)).flip(1)}, "padding must be on the left"),
        ({"attention_mask": torch.ones(2, 12).tril(-1)}, "row 0 of ids has no tokens: its attention_mask is all zeros"),
        ({"attention_mask": torch.ones(2, 12) * torch.tensor([[1], [0]])}, "row 1 of ids has no tokens"),
    ],
)
def test_refuses_arguments(changes, match):
    with pytest.raises(errors.InvalidInputError, match=match):
        klfast.generate(tiny("mamba"), **{"ids": batch(2, 12), "max_new_tokens": 3, **changes})


def test_refuses_models():
    model = tiny("mamba")
    with pytest.raises(errors.InvalidInputError, match="no output embeddings"):
        klfast.generate(model.backbone, batch(), 3)
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = torch.nan
    with pytest.raises(errors.InvalidInputError, match="logits hold a NaN"):
        klfast.generate(model, batch(), 3)


LONG_TEXT = """
import klfast, torch
from transformers import AutoModelForCausalLM, PhiConfig

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

model = AutoModelForCausalLM.from_config(PhiConfig(  # which no engine runs
    hidden_size=256, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, vocab_size=2000,
    max_position_embeddings=4000,
)).eval()
klfast.generate(model, torch.tensor([[1, 2]]), 50, eos_token_id=[])
before, at_end = resident(), []
klfast.generate(model, torch.tensor([[1, 2]]), 2000, eos_token_id=[], callback=lambda token: at_end.append(resident()))
print((max(at_end) - before) // 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_long_text_follows_its_cache():
    """The cache takes 16 MB, and twice that while it grows.

    Tensors kept between the caches of all steps made that 200 to 400 MB.
    """
    done = subprocess.run([sys.executable, "-c", LONG_TEXT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
