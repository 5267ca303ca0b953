"""Models for pictures and text: klfast's folders hold the language model alone."""

import pytest
import torch
from tiny_models import CONFIGS, batch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

import klfast
from klfast import Plan, QuantSpec
from klfast.models.matrices import matrices


@torch.inference_mode()
def test_the_language_model_is_read_and_saved_alone(tmp_path):
    text = CONFIGS["qwen3_5"]().to_dict() | dict(
        initializer_range=0.2, linear_num_value_heads=6, linear_value_head_dim=16
    )
    eyes = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4)
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=eyes)).eval()
    original, folder, ids = tmp_path / "original", tmp_path / "quantized", batch()
    model.save_pretrained(original)
    plan = Plan({name: QuantSpec(8, 16) for name in matrices(model) if "visual" not in name}, "uniform")
    klfast.quantize_model(model, plan)
    message = r"^Qwen3_5ForConditionalGeneration is more than a language model, .* that klfast\.load_model reads"
    with pytest.raises(klfast.InvalidInputError, match=message):
        klfast.save_quantized(model, folder)
    assert not folder.exists()

    alone = klfast.load_model(original, dtype="float32")
    klfast.quantize_model(alone, Plan(dict.fromkeys(matrices(alone), QuantSpec(8, 16)), "uniform"))
    klfast.save_quantized(alone, folder)
    found = klfast.load_model(folder)(ids).logits
    assert torch.equal(found, alone(ids).logits)
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
