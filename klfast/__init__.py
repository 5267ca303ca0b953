"""klfast: KL-guided mixed-precision quantization and fast kernels for SSM-Transformer language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; tests hold it to _PUBLIC
    from klfast.acceleration.patch import accelerate as accelerate
    from klfast.acceleration.patch import unaccelerate as unaccelerate
    from klfast.benchkit.product_times import time_products as time_products
    from klfast.checkpoint.apply_plan import quantize_model as quantize_model
    from klfast.checkpoint.by_name import load_model as load_model
    from klfast.checkpoint.by_name import load_tokenizer as load_tokenizer
    from klfast.checkpoint.load import load_quantized as load_quantized
    from klfast.checkpoint.save import save_quantized as save_quantized
    from klfast.core.errors import CannotLowerError as CannotLowerError
    from klfast.core.errors import CheckpointError as CheckpointError
    from klfast.core.errors import ClusterError as ClusterError
    from klfast.core.errors import InfeasibleBudgetError as InfeasibleBudgetError
    from klfast.core.errors import InvalidInputError as InvalidInputError
    from klfast.core.errors import KernelUnavailableError as KernelUnavailableError
    from klfast.core.errors import KlfastError as KlfastError
    from klfast.core.errors import ModelMismatchError as ModelMismatchError
    from klfast.core.errors import SlowPathWarning as SlowPathWarning
    from klfast.core.errors import UnknownLayerError as UnknownLayerError
    from klfast.diagnostics.doctor import doctor as doctor
    from klfast.diagnostics.explain import explain as explain
    from klfast.dispatch.pins import using as using
    from klfast.evaluation.comparing import compare as compare
    from klfast.evaluation.comparison import Comparison as Comparison
    from klfast.evaluation.front import Front as Front
    from klfast.evaluation.quality import Evaluation as Evaluation
    from klfast.evaluation.quality import evaluate as evaluate
    from klfast.evaluation.study_results import Study as Study
    from klfast.evaluation.studying import study as study
    from klfast.export.gguf.write import export_gguf as export_gguf
    from klfast.export.openvino.write import export_openvino as export_openvino
    from klfast.generation.engine import lower as lower
    from klfast.generation.loop import generate as generate
    from klfast.generation.state_file import load_state as load_state
    from klfast.generation.state_file import save_state as save_state
    from klfast.generation.transcript import Transcript as Transcript
    from klfast.integrations.hub_kernels import register_kernels as register_kernels
    from klfast.integrations.hub_kernels import unregister_kernels as unregister_kernels
    from klfast.integrations.quantizer import register_quantizer as register_quantizer
    from klfast.integrations.quantizer import unregister_quantizer as unregister_quantizer
    from klfast.measured_front import measure_front as measure_front
    from klfast.measured_plan import measured_kl as measured_kl
    from klfast.nn import QuantLinear as QuantLinear
    from klfast.ops import causal_conv1d_fn as causal_conv1d_fn
    from klfast.ops import causal_conv1d_update as causal_conv1d_update
    from klfast.ops import causal_conv1d_varlen_states as causal_conv1d_varlen_states
    from klfast.ops import chunk_gated_delta_rule as chunk_gated_delta_rule
    from klfast.ops import chunk_kda as chunk_kda
    from klfast.ops import dequant_matmul as dequant_matmul
    from klfast.ops import fused_recurrent_gated_delta_rule as fused_recurrent_gated_delta_rule
    from klfast.ops import fused_recurrent_kda as fused_recurrent_kda
    from klfast.ops import gated_delta_rule_update as gated_delta_rule_update
    from klfast.ops import linear_divergence as linear_divergence
    from klfast.ops import logit_divergence as logit_divergence
    from klfast.ops import mamba_chunk_scan_combined as mamba_chunk_scan_combined
    from klfast.ops import selective_scan_fn as selective_scan_fn
    from klfast.ops import selective_state_update as selective_state_update
    from klfast.ops.divergence import Divergence as Divergence
    from klfast.planning import plan as plan
    from klfast.planning.plan_file import Plan as Plan
    from klfast.planning.timings import Timings as Timings
    from klfast.quant.layouts import Layout as Layout
    from klfast.quant.rounding import quantize as quantize
    from klfast.quant.spec import QuantSpec as QuantSpec
    from klfast.quant.tensor import QuantizedTensor as QuantizedTensor
    from klfast.rounding.second_order_costs import second_order_costs as second_order_costs
    from klfast.sensitivity.results import Sensitivities as Sensitivities
    from klfast.sensitivity.sweeping import sweep as sweep
    from klfast.text import token_batches as token_batches

__version__ = "0.2.0"

# Public name -> module. Modules load on first use: `import klfast` costs no more than torch.
_PUBLIC = {
    "Divergence": "ops.divergence",
    "Layout": "quant.layouts",
    "Plan": "planning.plan_file",
    "QuantSpec": "quant.spec",
    "QuantizedTensor": "quant.tensor",
    "quantize": "quant.rounding",
    "quantize_model": "checkpoint.apply_plan",
    "Comparison": "evaluation.comparison",
    "compare": "evaluation.comparing",
    "Evaluation": "evaluation.quality",
    "evaluate": "evaluation.quality",
    "Study": "evaluation.study_results",
    "study": "evaluation.studying",
    "generate": "generation.loop",
    "lower": "generation.engine",
    "load_state": "generation.state_file",
    "save_state": "generation.state_file",
    "Transcript": "generation.transcript",
    "load_model": "checkpoint.by_name",
    "load_quantized": "checkpoint.load",
    "load_tokenizer": "checkpoint.by_name",
    "save_quantized": "checkpoint.save",
    "export_gguf": "export.gguf.write",
    "export_openvino": "export.openvino.write",
    "measured_kl": "measured_plan",
    "Front": "evaluation.front",
    "measure_front": "measured_front",
    "dequant_matmul": "ops",
    "linear_divergence": "ops",
    "logit_divergence": "ops",
    "causal_conv1d_fn": "ops",
    "causal_conv1d_update": "ops",
    "causal_conv1d_varlen_states": "ops",
    "selective_scan_fn": "ops",
    "selective_state_update": "ops",
    "mamba_chunk_scan_combined": "ops",
    "chunk_gated_delta_rule": "ops",
    "chunk_kda": "ops",
    "fused_recurrent_gated_delta_rule": "ops",
    "fused_recurrent_kda": "ops",
    "gated_delta_rule_update": "ops",
    "accelerate": "acceleration.patch",
    "unaccelerate": "acceleration.patch",
    "register_kernels": "integrations.hub_kernels",
    "unregister_kernels": "integrations.hub_kernels",
    "register_quantizer": "integrations.quantizer",
    "unregister_quantizer": "integrations.quantizer",
    "QuantLinear": "nn",
    "token_batches": "text",
    "using": "dispatch.pins",
    "sweep": "sensitivity.sweeping",
    "second_order_costs": "rounding.second_order_costs",
    "doctor": "diagnostics.doctor",
    "explain": "diagnostics.explain",
    "Sensitivities": "sensitivity.results",
    "plan": "planning",
    "Timings": "planning.timings",
    "time_products": "benchkit.product_times",
    "CannotLowerError": "core.errors",
    "CheckpointError": "core.errors",
    "ClusterError": "core.errors",
    "InfeasibleBudgetError": "core.errors",
    "InvalidInputError": "core.errors",
    "KernelUnavailableError": "core.errors",
    "KlfastError": "core.errors",
    "ModelMismatchError": "core.errors",
    "SlowPathWarning": "core.errors",
    "UnknownLayerError": "core.errors",
}

_MODULES = ("data", "errors", "loading")  # public names of modules that have moved

__all__ = sorted(_PUBLIC)  # noqa: PLE0605 (a list)


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


# For whenever transformers is imported. By name, since `integrations` lies above what imports klfast.
importlib.import_module("klfast.integrations.quantizer").register_quantizer()
