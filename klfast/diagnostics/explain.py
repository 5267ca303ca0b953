"""Which implementation of an op would run, and why not the others: ``klfast.explain``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.diagnostics.explain_model import ModelExplanation, explain_model
from klfast.dispatch import pins, registry
from klfast.quant.tensor import QuantizedTensor

# Public functions with the name of the CUDA original instead of their op's.
_OPS_OF = {
    "causal_conv1d_fn": "causal_conv1d",
    "selective_scan_fn": "selective_scan",
    "mamba_chunk_scan_combined": "mamba_chunk_scan",
    "chunk_gated_delta_rule": "gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "gated_delta_rule",
    "chunk_kda": "gated_delta_rule",
    "fused_recurrent_kda": "gated_delta_rule",
    "gated_delta_rule_update": "gated_delta_rule",
}


@dataclass(frozen=True)
class Explanation:
    """The implementation that would run an op, and for every other one why it would not (one sentence each).

    ``chosen`` is one of ``klfast.dispatch.pins.IMPLEMENTATIONS``, or "torch" if klfast leaves the call to torch's
    matmul.
    """

    op: str
    device: str
    chosen: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen}"]
        return "\n".join([*lines, *(f"  not {name}: {reason}" for name, reason in self.rejected.items())])


@overload
def explain(op: nn.Module) -> ModelExplanation: ...  # type: ignore[overload-overlap]  # a module is callable, too
@overload
def explain(op: str | Callable[..., object], *args: object) -> Explanation: ...
def explain(op: str | Callable[..., object] | nn.Module, *args: object) -> Explanation | ModelExplanation:
    """Return which implementation of an op would run now and why the others would not, or how a model would run.

    Args:
        op: an op's name ("dequant_matmul") or its public function (``klfast.dequant_matmul``); or a causal language
            model: whether the native engine runs it in ``generate``, or why not, and what computes each layer.
        args: arguments of the public function; without any, the CPU is assumed. The choice for ``linear`` depends on
            the dtype and shape of its x, too: without one, klfast's own kernel is explained.

    Raises:
        InvalidInputError: no such op.
    """
    from klfast import ops  # noqa: F401 (defines the ops)

    if isinstance(op, nn.Module):
        return explain_model(op)
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    name = _OPS_OF.get(name, name)
    if name not in registry.op_names():
        raise InvalidInputError(f"klfast has no op {name!r}; its ops are {', '.join(registry.op_names())}")
    device = next((a.device.type for a in args if isinstance(a, (torch.Tensor, QuantizedTensor))), "cpu")
    specs = [a.spec for a in args if isinstance(a, QuantizedTensor)]
    if name == "dequant_matmul":
        specs = [spec.base for spec in specs]  # two such products and a sum, if some rows are corrected
    formats = [spec.format.name for spec in specs]
    chosen, why = _chosen(name, device, args, formats)
    rejected = {
        tier: _why_not(name, tier, device, formats) or why
        for tier in (*reversed(pins.CPU_TIERS), "triton")
        if tier != chosen
    }
    if chosen != "reference":
        rejected["reference"] = why if chosen == "torch" else "a kernel runs instead."
    return Explanation(name, device, chosen, rejected)


def _chosen(op: str, device: str, args: Sequence[object], formats: list[str]) -> tuple[str, str]:
    """Return the implementation that runs an op, and why it precedes the others; asks what the calls themselves ask."""
    key, _ = registry.implementation(op, device.upper(), formats)
    if not key and pins.pinned() != "reference" and registry.has_kernel(op, device.upper()):
        return "reference", registry.why_no_format(op, device.upper(), formats)
    if not key:
        return "reference", "klfast.using or KLFAST_ISA asks for the reference."
    if args and (why := registry.handed_over(op, key, *args)):
        return "torch", why
    if key == "CPU":
        from klfast import _C

        chosen = pins.CPU_TIERS[_C.best_tier(op, pins.cpu_tier_limit())]
    else:
        chosen = "triton"
    return chosen, f"{chosen} comes before it."


def _why_not(op: str, tier: str, device: str, formats: list[str]) -> str:
    """Return why a tier cannot run an op now, one sentence; empty if it can."""
    pin = pins.pinned()
    if pin == "reference":
        return "klfast.using or KLFAST_ISA asks for the reference."
    if tier == "triton":
        if device == "cpu":
            return "the tensors are on the CPU."
        return "" if registry.has_kernel(op, device.upper()) else registry.why_no_kernel(device, op)
    if device != "cpu":
        return f"the tensors are on {device}."
    if reason := pins.why_not(tier):
        return reason
    if not registry.has_kernel(op, "CPU"):
        return registry.why_no_kernel("cpu", op)
    if reason := registry.why_no_format(op, "CPU", formats):
        return reason
    from klfast import _C

    if tier not in _C.kernel_tiers().get(op, ()):
        return f"this op has no {tier} kernel."
    if not pins.may_run(tier):
        return f"klfast.using or KLFAST_ISA asks for {pin}."
    return ""
