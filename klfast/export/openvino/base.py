"""``GraphBase``: a graph's inputs, its state, and what a program's buffers hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from torch import nn

from klfast.core.errors import CannotLowerError
from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.engine.program import NormReader
from klfast.export.openvino.memory import Memory
from klfast.export.openvino.nodes import constant, integers, size

_Put = Callable[[Any], None]


class _NoProgram:
    """Stands for the engine's program: an instruction of ``Builder`` that has no nodes here would end there."""

    def __getattr__(self, name: str) -> Any:
        raise CannotLowerError(f"no nodes compute the engine's {name}")


class GraphBase(Builder):
    """What the nodes of a graph are made with.

    A value of columns is a node [B, T, width] in float32. The state is kept in variables, which begin as zeros, or as
    what a learned prefix makes of them. ``beam_idx`` says which sequence each one goes on from.

    Args:
        model: the model.
        norm_of: as for ``ProgramBase``.
        initial: the tensors of a new sequence's state, [1, ...], as the engine has them; None for zeros.

    Attributes:
        ids: the input ``input_ids``, int64 [B, T].
        mask: the input ``attention_mask``, int64 [B, S], ones.
        memory: which nodes the program's columns are.
        past: number of positions before these tokens, int64 [1], which ``finish`` connects.
    """

    def __init__(
        self,
        model: nn.Module,
        norm_of: Callable[[type], NormReader | None],
        initial: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__(model, torch.float32, 1, norm_of)
        self.program = _NoProgram()  # type: ignore[assignment]  # it has no instructions
        self.memory = Memory()
        self.ids = op.parameter([-1, -1], np.int64, name="input_ids")
        self.beams = op.parameter([-1], np.int32, name="beam_idx")
        self.mask = op.parameter([-1, -1], np.int64, name="attention_mask")
        self.past = op.parameter([1], np.int64)
        self._initial = initial
        self._named: dict[tuple[str, int], Columns] = {}
        self._sinks: list[Any] = []
        self._growing: Any = None

    def buffer(self, name: str, width: int, dtype: torch.dtype | None = None, rows: int | None = None) -> Columns:
        """Return the whole of a buffer, which has no memory; the same one for the same name and width."""
        return self._named.setdefault((name, width), Columns(len(self._named), 0, width))

    def variable(self, index: int, arranged: Callable[[torch.Tensor], torch.Tensor] | None = None) -> tuple[Any, _Put]:
        """Return a tensor of the state as a node [B, ...], and what takes its new value.

        ``arranged`` returns a tensor of the engine's state, [1, ...], as the graph has it; None for as it is.
        """
        spec = self.states[index]
        first = self._first(index)
        if spec.growing is not None:  # the rest is ``learned``
            first = spec.places(first, 0, 0)
        first = first if arranged is None else arranged(first)
        growing = None if spec.growing is None else spec.growing + 1
        info = VariableInfo()
        info.variable_id, info.data_type = f"state.{index}", ov.Type.f32
        sizes = [-1 if i == growing else first.shape[i] for i in range(1, first.dim())]
        info.data_shape = ov.PartialShape([-1, *sizes])
        kept = Variable(info)
        value = op.gather(op.read_value(self._for_each(first), kept), self.beams, op.constant(0))
        if growing is not None and self._growing is None:
            self._growing = size(value, growing)
        return value, lambda new: self._assign(new, kept)

    def learned(self, index: int) -> Any:
        """Return what a learned prefix leaves in a tensor of the state that grows, [B, ...]; None without one.

        It is no variable's first value: OpenVINO 2026.4 does not go back to that of keys or values.
        """
        return self._for_each(self._first(index)) if self._initial is not None else None

    def _first(self, index: int) -> torch.Tensor:
        """Return a tensor of a new sequence's state, [1, ...]."""
        return torch.zeros(1, *self.states[index].shape) if self._initial is None else self._initial[index].float()

    def _for_each(self, tensor: torch.Tensor) -> Any:
        """Return a tensor [1, ...] for each sequence, [B, ...]."""
        shape = op.concat([size(self.ids, 0), integers(*tensor.shape[1:])], 0)
        return op.broadcast(constant(tensor), shape)

    def _assign(self, new: Any, variable: Variable) -> None:
        # Assign takes nodes alone, not one of a Loop's outputs; OpenVINO removes what converts nothing.
        self._sinks.append(op.assign(op.convert(new, np.float32), variable))

    def finish(self, logits: Any) -> ov.Model:
        """Return the graph whose result is ``logits`` [B, T, V]."""
        if self.past.output(0).get_target_inputs():
            past = self._counted() if self._growing is None else op.add(self._growing, integers(self.prefix))
            self.past.output(0).replace(past.output(0))
        logits.output(0).set_names({"logits"})
        inputs = [self.ids, self.mask, self.beams]
        for parameter in inputs:
            parameter.output(0).set_names({parameter.friendly_name})
        return ov.Model([op.result(logits)], self._sinks, inputs)

    def without_padding(self, x: Any) -> Any:
        """Return x, or NaN if the mask leaves out a token: padding would be read as text."""
        least = op.reduce_min(self.mask, op.constant([0, 1]), keep_dims=False)
        whole = op.equal(least, op.constant(np.int64(1)))
        return op.add(x, op.select(whole, op.constant(np.float32(0)), op.constant(np.float32(np.nan))))

    def _counted(self) -> Any:
        """Return the number of positions before these tokens, from a variable that counts them."""
        info = VariableInfo()
        info.variable_id, info.data_type, info.data_shape = "past", ov.Type.f32, ov.PartialShape([1])
        count = Variable(info)
        past = op.read_value(op.constant(np.array([self.prefix], np.float32)), count)
        self._assign(op.add(past, op.convert(size(self.ids, 1), np.float32)), count)
        return op.convert(past, np.int64)
