"""klfast: KL-guided mixed-precision quantization and fast kernels for SSM-Transformer language models."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> module. Modules load on first use: `import klfast` costs no more than torch.
_PUBLIC = {
    "Divergence": "ops.divergence",
    "Layout": "quant.layouts",
    "Plan": "planning.plan_file",
    "QuantSpec": "quant.spec",
    "QuantizedTensor": "quant.tensor",
    "quantize": "quant.rounding",
    "quantize_model": "checkpoint.apply_plan",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "generate": "generation.loop",
    "load_model": "checkpoint.by_name",
    "load_quantized": "checkpoint.load",
    "load_tokenizer": "checkpoint.by_name",
    "save_quantized": "checkpoint.save",
    "dequant_matmul": "ops",
    "linear_divergence": "ops",
    "logit_divergence": "ops",
    "causal_conv1d_fn": "ops",
    "causal_conv1d_update": "ops",
    "selective_scan_fn": "ops",
    "selective_state_update": "ops",
    "mamba_chunk_scan_combined": "ops",
    "accelerate": "acceleration.patch",
    "unaccelerate": "acceleration.patch",
    "QuantLinear": "nn",
    "token_batches": "text",
    "using": "dispatch.pins",
    "sweep": "sensitivity.sweeping",
    "doctor": "diagnostics.doctor",
    "explain": "diagnostics.explain",
    "Sensitivities": "sensitivity.results",
    "plan": "planning",
    "CheckpointError": "core.errors",
    "InfeasibleBudgetError": "core.errors",
    "InvalidInputError": "core.errors",
    "KernelUnavailableError": "core.errors",
    "KlfastError": "core.errors",
    "ModelMismatchError": "core.errors",
    "SlowPathWarning": "core.errors",
    "UnknownLayerError": "core.errors",
}

_MODULES = ("data", "errors", "loading")  # public names of modules that have moved

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"klfast.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'klfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"klfast.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
