"""save_quantized and load_quantized on families that klfast knows only through transformers."""

import pytest
import torch
from tiny_models import OTHERS, VARIANTS, batch, tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.checkpoint import tensors
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.models.head import is_head_tied
from klfast.models.matrices import matrices

pytestmark = pytest.mark.filterwarnings(
    "ignore::klfast.SlowPathWarning"
)  # most of them run transformers' own functions


# The implementation of llama_eager's attention is not part of a saved configuration.
FAMILIES = [name for name in (*VARIANTS, *OTHERS) if name != "llama_eager"]


def quantized(family, tied):
    model = tiny(family, tied)
    names = list(matrices(model))[1:]
    specs = (QuantSpec(4, 32), QuantSpec(8, -1), QuantSpec(4, 16, symmetric=False))
    plan = {
        name: klfast.quant.spec.storable_spec(specs[i % 3], matrices(model)[name].shape[1])
        for i, name in enumerate(names)
    }
    return klfast.accelerate(klfast.quantize_model(model, Plan(plan, "uniform")))


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_buffers(family, tied, tmp_path):
    model = quantized(family, tied)
    ids = batch()
    expected = model(ids).logits
    klfast.save_quantized(model, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    # The last bits of torch's own products, of experts that stay as they are, depend on where in memory weights lie.
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.isfinite().all()
    assert is_head_tied(loaded) == is_head_tied(model)
    for name, buffer in model.named_buffers():  # including those that no file holds
        assert torch.equal(loaded.get_buffer(name), buffer) and loaded.get_buffer(name).dtype == buffer.dtype, name
    state, original = loaded.state_dict(), model.state_dict()
    assert list(state) == list(original) and all(torch.equal(state[name], tensor) for name, tensor in original.items())


def test_falcon_h1_scales_its_projections():
    """The model fills each mixer's mup_vector with different numbers; none may be lost."""
    assert len(tiny("falcon_h1").model.layers[0].mamba.mup_vector.unique()) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str)
def test_a_buffer_that_transformers_does_not_compute(dtype, tmp_path, monkeypatch):
    """A buffer of any dtype is refused, before anything is written."""
    model = quantized("lfm2", False)
    real = tensors.empty_model

    def with_buffer(*args):
        built = real(*args)
        built.model.layers[0].register_buffer("lost", torch.zeros(3, dtype=dtype, device="meta"), persistent=False)
        return built

    klfast.save_quantized(model, tmp_path / "model")
    for user in ("load", "save"):
        monkeypatch.setattr(f"klfast.checkpoint.{user}.empty_model", with_buffer)
    message = r"transformers does not compute the buffer lost of model\.layers\.0"
    with pytest.raises(CheckpointError, match=f"{message}; this model cannot be loaded"):
        klfast.load_quantized(tmp_path / "model")
    with pytest.raises(InvalidInputError, match=message):
        klfast.save_quantized(model, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
