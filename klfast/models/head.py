"""The output head of a causal language model: from hidden states to logits, and the divergence of two heads' logits.

Most models only multiply by a matrix. Some scale the product (Granite, Falcon-H1, Cohere), some cap it with a tanh
(Gemma 2, RecurrentGemma), some add a bias (Phi). The rule that a family's record or the configuration suggests is
compared with the model's own logits before it is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from klfast import ops, reference
from klfast.backends.operands import flat_targets
from klfast.core.errors import InvalidInputError
from klfast.models.calling import last_hidden
from klfast.models.families import family_of, text_config
from klfast.models.families.base import LogitRule
from klfast.models.vocabulary import input_embedding
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.ops.divergence import Divergence
from klfast.quant.tensor import QuantizedTensor

# Names in the configurations of transformers 5.23.0. Granite divides by logits_scaling, HyperCLOVA X multiplies by it.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_PLAIN = LogitRule()
_MOST_LOGITS = 2**25  # made at once where full logits are needed: 128 MiB for each of the two models
_WIDENED_ROWS = 8192  # rows of a 16-bit matrix that are in float32 at a time


@dataclass(frozen=True, eq=False)
class Readout:
    """A head's tensors and rule: ``softcap * tanh(y / softcap)`` or ``y``, for y = scale * (h W^T + bias).

    Attributes:
        weight: float [V, H], or a QuantizedTensor of that shape.
        bias: [V], or None.
        rule: scale and cap.
    """

    weight: torch.Tensor | QuantizedTensor
    bias: torch.Tensor | None = None
    rule: LogitRule = _PLAIN

    @property
    def is_linear(self) -> bool:
        """True if the logits are a product with the weight, up to a factor."""
        return self.bias is None and self.rule.softcap is None

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden states [..., H] times the scale, in float32 if a smaller dtype would round them."""
        if self.rule.scale == 1:
            return hidden
        is_power_of_two = abs(math.frexp(self.rule.scale)[0]) == 0.5
        is_exact = is_power_of_two and hidden.dtype != torch.float16  # whose exponents are few
        return (hidden if is_exact else hidden.float()) * self.rule.scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [N, V], of hidden states [N, H], computed in float32."""
        hidden = hidden.float()
        if isinstance(self.weight, QuantizedTensor):
            found = ops.dequant_matmul(hidden, self.weight)
        elif self.weight.dtype == torch.float32:
            found = F.linear(hidden, self.weight)
        else:
            found = hidden.new_empty(len(hidden), len(self.weight))
            for first in range(0, len(self.weight), _WIDENED_ROWS):
                rows = self.weight[first : first + _WIDENED_ROWS].float()
                found[:, first : first + len(rows)] = hidden @ rows.T
        if self.bias is not None:
            found += self.bias
        return _ruled(found, self.rule)


@dataclass(frozen=True, eq=False)
class Head:
    """The output projection of a model, and the rule that the model applies to its product.

    Attributes:
        module: an nn.Linear, perhaps a QuantLinear.
        rule: scale and cap.
    """

    module: nn.Linear
    rule: LogitRule = _PLAIN

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the model's logits [..., V] of hidden states [..., H]."""
        return _ruled(self.module(hidden.to(self.dtype)), self.rule)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self.module.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.module.weight.device

    def readout(self) -> Readout:
        """Return its current tensors and rule; giving the module another weight later does not change them."""
        weight = self.module.quantized if isinstance(self.module, QuantLinear) else self.module.weight.detach()
        if isinstance(weight, QuantizedTensor) and weight.spec.corrected:  # no kernel of divergences adds two products
            weight = weight.dequantize(torch.float32)
        bias = None if self.module.bias is None else self.module.bias.detach()
        return Readout(weight, bias, self.rule)

    def inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the weight's operand for hidden states, with the rounding of int8 activations."""
        hidden = hidden.to(self.dtype)
        if isinstance(self.module, QuantLinear) and self.module.activation == "int8":
            hidden = reference.fake_quantize_rows(hidden.float(), self.module.spec)
        return hidden


def _ruled(y: torch.Tensor, rule: LogitRule) -> torch.Tensor:
    if rule.scale != 1:
        y = y * rule.scale
    return y if rule.softcap is None else torch.tanh(y / rule.softcap) * rule.softcap


# Divergence -------------------------------------------------------------------------------------------------------


def divergence(
    teacher_hidden: torch.Tensor,
    teacher: Readout,
    student_hidden: torch.Tensor,
    student: Readout,
    targets: torch.Tensor | None = None,
) -> Divergence:
    """Compare two models' next-token distributions, as ``klfast.linear_divergence`` does, whatever their heads do.

    A scale goes into the hidden states, in float32, so full logits are never made. Caps and biases need full logits,
    which are made for a few tokens at a time.

    Args:
        teacher_hidden: float32, bfloat16 or float16 [..., H], the input of the teacher's head.
        teacher: the teacher's head.
        student_hidden: [S..., ..., H]: the teacher broadcasts over leading dimensions that it lacks.
        student: the student's head.
        targets: int64, of the student's or the teacher's leading dimensions.
    """
    if teacher.is_linear and student.is_linear:
        same = student_hidden is teacher_hidden and student.rule == teacher.rule
        first = teacher.scaled(teacher_hidden)
        second = first if same else student.scaled(student_hidden)
        return ops.linear_divergence(first, teacher.weight, second, student.weight, targets)
    return _from_logits(teacher_hidden, teacher, student_hidden, student, targets)


def _from_logits(
    teacher_hidden: torch.Tensor,
    teacher: Readout,
    student_hidden: torch.Tensor,
    student: Readout,
    targets: torch.Tensor | None,
) -> Divergence:
    same = student_hidden is teacher_hidden and student is teacher
    teacher_hidden = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    tokens = len(teacher_hidden)
    students = student_hidden.reshape(-1, tokens, student_hidden.shape[-1])
    if targets is not None:
        targets = flat_targets(targets, len(students) * tokens).view(len(students), tokens)
    size = max(1, _MOST_LOGITS // teacher.weight.shape[0])
    parts: list[list[Divergence]] = [[] for _ in students]
    for start in range(0, tokens, size):
        some = slice(start, start + size)
        first = teacher.logits(teacher_hidden[some])
        for index, hidden in enumerate(students):
            second = first if same else student.logits(hidden[some])
            found = ops.logit_divergence(first, second, None if targets is None else targets[index, some])
            parts[index].append(found)
    return _joined([part for of_student in parts for part in of_student])


def _joined(parts: list[Divergence]) -> Divergence:
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Divergence)}
    joined: dict[str, Any] = {
        name: None if column[0] is None else torch.cat(column) for name, column in columns.items()
    }
    return Divergence(**joined)


# Finding it -------------------------------------------------------------------------------------------------------


class _Causal(Protocol):
    def get_output_embeddings(self) -> nn.Module | None: ...


def linear_head(model: nn.Module) -> nn.Linear:
    """Return the output projection, a linear layer.

    Raises:
        InvalidInputError: the model has none.
    """
    head = cast(_Causal, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise InvalidInputError(
            f"{type(model).__name__} has no linear head; klfast takes only causal language models that have one"
        )
    return head


@torch.no_grad()
def find_head(model: nn.Module, ids: torch.Tensor) -> tuple[Head, torch.Tensor]:
    """Return the head, compared with the model on a few tokens, and their logits, which may contain NaN.

    Args:
        model: a causal language model.
        ids: int64 [B, T].

    Raises:
        InvalidInputError: the model has no linear head, or changes its logits in a way that klfast does not know.
    """
    module = linear_head(model)
    ids = ids.to(module.weight.device)
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    product = module(last_hidden(model, ids).to(module.weight.dtype))
    best: tuple[float, LogitRule] | None = None
    for rule in _suggested(model):
        for made in dict.fromkeys((product.dtype, torch.float32)):  # a model may widen its logits first
            expected = _ruled(product.to(made), rule).to(found.dtype)
            if close(expected, found) and (best is None or _distance(expected, found) < best[0]):
                best = _distance(expected, found), rule
    if best is None:
        raise InvalidInputError(
            f"{type(model).__name__} does more to its logits than multiply by its head's weight, scale and cap; "
            "klfast does not support this head"
        )
    return Head(module, best[1]), found


def _suggested(model: nn.Module) -> list[LogitRule]:
    """Return the rules that a model may apply to its logits, most likely first."""
    family, config = family_of(model), text_config(model)
    if family.logits is not None:
        return [family.logits(config)]

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0]

    scales = [scale for value in numbers(_SCALES) for scale in (value, 1 / value)]
    return [LogitRule(scale, cap) for cap in (*numbers(_CAPS), None) for scale in (*scales, 1.0)]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.cpu().double() - b.cpu().double()).abs().nan_to_num(0, 0, 0).max().item()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return True if both are equal up to a little rounding (the operations are the same).

    NaN equals NaN, so that another check can name a broken weight.
    """
    if found.shape != expected.shape:
        return False
    found, expected = found.cpu(), expected.cpu()  # some GPUs have no float64
    tolerance = 8 * torch.finfo(found.dtype).eps * expected.double().nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=tolerance, equal_nan=True)


def _output_head(model: nn.Module) -> nn.Module | None:
    """Return the output projection, in transformers' models or mamba_ssm's (2.3.2, models/mixer_seq_simple.py)."""
    if hasattr(model, "get_output_embeddings"):
        return cast(_Causal, model).get_output_embeddings()
    return getattr(model, "lm_head", None)


def head_name(model: nn.Module) -> str:
    """Return the module name of the output projection (lm_head)."""
    head = _output_head(model)
    name: str
    for name, module in model.named_modules():
        if module is head:
            return name
    raise InvalidInputError(f"{type(model).__name__} has no output embeddings; klfast needs a causal language model")


def is_head_tied(model: nn.Module) -> bool:
    """Return True if the head and the input embedding share one weight."""
    head, embedding = _output_head(model), input_embedding(model)
    if isinstance(embedding, QuantEmbedding):
        return embedding.head is head
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)
