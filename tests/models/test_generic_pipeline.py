"""Models without klfast's kernels pass through the whole pipeline: other recurrent layers, GPT-2, Gemma 3."""

import copy

import pytest
import torch
from sweep_models import KL
from tiny_models import batch, in_float64, tiny

import klfast
from klfast.models.matrices import matrices
from klfast.models.matrices import matrix as matrix_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning"),  # they run transformers' own functions
    pytest.mark.filterwarnings("ignore:.*cannot be quantized"),
]
SPEC = klfast.QuantSpec(4, 32)


def divergence(teacher, student, ids):
    """Return the mean KL(teacher || student) of the next-token distributions, from logits in float64."""
    log_p, log_q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["recurrent_gemma", "rwkv", "xlstm", "minimax", "gemma3"])
@torch.no_grad()
def test_from_sweep_to_generated_text(family, tied, tmp_path, one_thread):
    model, text = tiny(family, tied), batch(4, 24)
    found = klfast.sweep(model, text, [SPEC, "int8-channel-sym"], progress=False)
    names = list(matrices(model))
    assert {name for name, _ in found.measurements} == set(names)
    truth = in_float64(model) if family != "xlstm" else copy.deepcopy(model)  # which mixes in float32
    for name in (*names[::5], names[-1]):
        rounded = copy.deepcopy(truth)
        weight = klfast.quantize(matrix_of(model, name).weight, SPEC).dequantize(torch.float32)
        matrix_of(rounded, name).weight.copy_(weight)
        expected = divergence(truth, rounded, text)
        rounding = (expected * found.noise_floor[KL]) ** 0.5
        assert found.measurements[name, SPEC].mean[KL] == pytest.approx(expected, rel=1e-3, abs=4 * rounding), name

    plain = copy.deepcopy(model)
    klfast.quantize_model(model, klfast.plan(found, mean_bits=6.5))
    klfast.save_quantized(model, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert torch.equal(loaded(text).logits, model(text).logits)
    assert klfast.evaluate(loaded, text, plain).kl == pytest.approx(divergence(plain, loaded, text), rel=1e-4)
    ids = batch(2, 9, seed=5)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(klfast.generate(loaded, ids, 6), expected)
