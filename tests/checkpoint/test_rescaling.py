import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import STATE_SPACE, tiny

import klfast


@pytest.fixture(params=STATE_SPACE)
def folder(request, tmp_path):
    """Save a model whose configuration says that out_proj was divided before its training."""
    model = tiny(request.param)
    model.config.rescale_prenorm_residual = True
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_are_loaded_as_they_are_stored(folder):
    loaded, stored = klfast.load_model(folder).state_dict(), load_file(folder / "model.safetensors")
    assert any("out_proj" in name for name in stored)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_saved_folders_ask_for_no_division(tmp_path):
    model = tiny("mamba")
    model.config.rescale_prenorm_residual = True
    klfast.quantize_model(model, klfast.Plan({"backbone.layers.0.mixer.in_proj": klfast.QuantSpec(8, 32)}, "uniform"))
    klfast.save_quantized(model, tmp_path / "small")
    assert json.loads((tmp_path / "small/config.json").read_text())["rescale_prenorm_residual"] is False
    assert model.config.rescale_prenorm_residual is True  # of the model in memory
