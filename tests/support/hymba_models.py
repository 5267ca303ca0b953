"""Hymba models for tests: the golden ones, and tiny random ones with every feature of the release."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import HYMBA_RELEASE
from transformers import AutoModelForCausalLM

from klfast.models.hymba import HymbaConfig, HymbaForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden" / "hymba"
SETS = ("hybrid_full", "swa_plain")


def golden_model(name):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()


def golden_tensors(name):
    return load_file(GOLDEN / name / "golden.safetensors")


def tiny_model(dtype=torch.float32, **changes):
    """Return a model with random weights, large enough that layers matter; norms, states and biases are random, too."""
    torch.manual_seed(1)
    model = HymbaForCausalLM(HymbaConfig(**{**HYMBA_RELEASE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name or name.endswith(("norm.weight", "D.0", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.dim() > 1 and "A_log" not in name:
                parameter.copy_(
                    torch.randn_like(parameter)
                    * (0.3 if "embed" in name or "memory" in name else parameter[0].numel() ** -0.5)
                )
    return model.to(dtype)
