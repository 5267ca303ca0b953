"""Folders of quantized models as the package compressed-tensors writes them, and the same weights decompressed."""

import copy

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from tiny_models import tiny


def weights(bits=4, symmetric=True, group_size=None, type="int"):
    """Return a config group's description of weights, in groups or by channel."""
    strategy = "channel" if group_size is None else "group"
    return dict(num_bits=bits, type=type, symmetric=symmetric, strategy=strategy, group_size=group_size)


@torch.no_grad()
def save(folder, family="llama", dtype=torch.float32, ignore=("lm_head",), **group):
    """Save a tiny model whose linear layers are quantized as ``group`` says, and return it decompressed."""
    model = tiny(family, dtype=dtype)
    _quantize(model, ignore, group)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    dense = copy.deepcopy(model)
    compressor.decompress_model(dense)
    return dense


def _quantize(model, ignore, group):
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


@torch.no_grad()
def save_mixture(folder, family, gate, up, down, rename=lambda name: name, **group):
    """Save a tiny mixture as ``save`` does, its experts one by one under the names that they were published with.

    Args:
        folder: where to.
        family: the model's.
        gate, up, down: names of an expert's matrices; no gate if None.
        rename: function from a tensor's name in the model to that in the file.
        **group: as for ``save``.
    """
    model, dense = tiny(family), tiny(family)
    experts = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    for name, stacks in experts.items():
        top = stacks.up_proj if gate is None else stacks.gate_up_proj
        each = torch.nn.ModuleList(torch.nn.Module() for _ in top)
        for expert, upper, lower in zip(each, top, stacks.down_proj, strict=True):
            halves = [upper] if gate is None else upper.chunk(2)
            names = [up] if gate is None else [gate, up]
            for leaf, matrix in zip([*names, down], [*halves, lower], strict=True):
                linear = torch.nn.Linear(*matrix.T.shape, bias=False)
                linear.weight.copy_(matrix)
                expert.add_module(leaf, linear)
        model.set_submodule(name, each)
    _quantize(model, ["lm_head", "re:.*gate$"], group)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    stored = {rename(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(folder)
    compressor.decompress_model(model)
    for name, module in dense.named_modules():
        if type(module) is torch.nn.Linear:
            module.weight.copy_(model.get_submodule(name).weight)
    for name in experts:
        stacks, each = dense.get_submodule(name), model.get_submodule(name)
        top = [torch.cat([e.get_submodule(n).weight for n in (gate, up) if n]) for e in each]
        (stacks.up_proj if gate is None else stacks.gate_up_proj).copy_(torch.stack(top))
        stacks.down_proj.copy_(torch.stack([e.get_submodule(down).weight for e in each]))
    return dense
