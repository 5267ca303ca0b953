"""Folders of quantized models as the package compressed-tensors writes them, and the same weights decompressed."""

import copy

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from tiny_models import tiny


def weights(bits=4, symmetric=True, group_size=None, type="int"):
    """Return a config group's description of weights, in groups or by channel."""
    strategy = "channel" if group_size is None else "group"
    return dict(num_bits=bits, type=type, symmetric=symmetric, strategy=strategy, group_size=group_size)


@torch.no_grad()
def save(folder, family="llama", dtype=torch.float32, ignore=("lm_head",), **group):
    """Save a tiny model whose linear layers are quantized as ``group`` says, and return it decompressed."""
    model = tiny(family, dtype=dtype)
    config = {
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "quantization_status": "frozen",
        "ignore": list(ignore),
    }
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            values = module.weight.unflatten(1, (-1, scheme.weights.group_size or module.in_features))
            scale, zero_point = calculate_qparams(values.amin(-1), values.amax(-1), scheme.weights)
            module.weight_scale.copy_(scale)
            if not scheme.weights.symmetric:
                module.weight_zero_point.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    dense = copy.deepcopy(model)
    compressor.decompress_model(dense)
    return dense
