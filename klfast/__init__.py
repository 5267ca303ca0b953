"""klfast: KL-guided mixed-precision quantization and fast kernels for SSM-Transformer language models."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> module. Modules load on first use: `import klfast` costs no more than torch.
_PUBLIC = {
    "Divergence": "ops_divergence",
    "Layout": "types",
    "Plan": "plan_file",
    "QuantSpec": "types",
    "QuantizedTensor": "types",
    "quantize": "quantization",
    "quantize_model": "convert",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "generate": "decode",
    "load_quantized": "checkpoint",
    "save_quantized": "checkpoint",
    "dequant_matmul": "ops",
    "linear_divergence": "ops",
    "logit_divergence": "ops",
    "causal_conv1d_fn": "ops",
    "causal_conv1d_update": "ops",
    "selective_scan_fn": "ops",
    "selective_state_update": "ops",
    "mamba_chunk_scan_combined": "ops",
    "accelerate": "models.native_ssm",
    "unaccelerate": "models.native_ssm",
    "QuantLinear": "nn",
    "using": "runtime",
    "sweep": "sensitivity.sweeping",
    "doctor": "diagnostics",
    "explain": "diagnostics",
    "Sensitivities": "sensitivity.results",
    "plan": "planner",
    "CheckpointError": "errors",
    "InfeasibleBudgetError": "errors",
    "InvalidInputError": "errors",
    "KernelUnavailableError": "errors",
    "KlfastError": "errors",
    "ModelMismatchError": "errors",
    "SlowPathWarning": "errors",
    "UnknownLayerError": "errors",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'klfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"klfast.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
