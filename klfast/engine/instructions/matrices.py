"""``MatrixInstructions``: embeddings and products with the model's matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from klfast.backends.cpu.extension import DTYPE_CODES, view
from klfast.core.errors import CannotLowerError
from klfast.engine.columns import Columns
from klfast.engine.program import MOST_SEQUENCES, ProgramBase
from klfast.nn.direct_call import PreparedLinear, Watch, options
from klfast.nn.embedding import QuantEmbedding
from klfast.nn.linear import QuantLinear


class MatrixInstructions(ProgramBase):
    """Embeddings and products."""

    def embed(self, embedding: nn.Module, out: Columns, scale: float = 1.0, prefix: torch.Tensor | None = None) -> None:
        """Look up the tokens' rows of an nn.Embedding or a QuantEmbedding.

        ``prefix`` [M, width], if any, comes before the tokens of each sequence, at the first positions.
        """
        self.expect(embedding, "Embedding", "QuantEmbedding")
        name, code = self.name(embedding), DTYPE_CODES[self.dtype]
        self.prefix = 0 if prefix is None else len(prefix)
        if isinstance(embedding, QuantEmbedding):
            if embedding.scale is not None:
                scale *= float(embedding.scale)
            head, *correction = self._projections_of(embedding.head)
            rows = [] if self.corrected is None else self.corrected.tolist()
            self.program.embed_quantized(name, head, view(prefix), code, scale, out, rows, *correction)
            return
        [table] = self.parameters(embedding, "weight")
        self.program.embed(name, view(table), len(table), view(prefix), code, scale, out)

    def project(self, layer: nn.Module, x: Columns, out: Columns, *, weight_only: bool = False) -> None:
        """Multiply by a linear layer's weight and add its bias; ``weight_only`` leaves out the bias."""
        self.program.project(self.name(layer), self._projection(layer, not weight_only), x, out)

    def project_parameter(
        self,
        module: nn.Module,
        name: str,
        x: Columns,
        out: Columns,
        *,
        dtype: torch.dtype | None = None,
        index: int | None = None,
    ) -> None:
        """Multiply by a parameter [N, K] of a module, or by the matrix ``index`` of one of shape [E, N, K].

        It does so in a dtype, which x has; None for that of activations.
        """
        self.program.project(self.name(module), self._matrix(module, name, dtype, index), x, out)

    def project_last(self, layer: nn.Module, x: Columns, out: Columns) -> None:
        """Multiply each sequence's last token alone; a buffer of its own gets what corrects some rows of the layer."""
        whole, *correction = self._projections_of(layer)
        self.program.project_last(self.name(layer), whole, x, out)
        for projection in correction:
            assert self.corrected is not None  # as there is a correction
            buffer = self.buffer("correction", len(self.corrected), torch.float32, rows=MOST_SEQUENCES)
            self.program.project_last(f"{self.name(layer)}.correction", projection, x, buffer)
            self.correction = buffer

    def _projections_of(self, layer: nn.Module) -> tuple[Any, ...]:
        """Return the product with a layer, and if it has corrected rows, noted as the program's, that with theirs."""
        if not (isinstance(layer, QuantLinear) and layer.spec.corrected):
            return (self._projection(layer),)
        if layer not in self._halves:
            self.expect(layer, "QuantLinear")
            watch = Watch(*((layer._buffers, name) for name in layer.part_names), (layer._parameters, "bias"))
            watch.tensors = ()
            made_of = options(layer)
            self.checks.append(lambda: made_of == options(layer) and watch.hold())
            whole, self.corrected, correction = layer.quantized.halves
            self._halves[layer] = (
                QuantLinear(whole, layer.bias, layer.activation, dtype=layer.dtype),
                QuantLinear(correction, None, layer.activation, dtype=layer.dtype),
            )
        return tuple(map(self._projection, self._halves[layer]))

    def _projection(self, layer: nn.Module, activations: bool = True) -> Any:
        if layer not in self._projections:  # several blocks may share it
            self.expect(layer, "Linear", "QuantLinear")
            prepared = PreparedLinear(layer)
            if prepared.projection is None or prepared.hold(layer) is None or not prepared.takes(self.dtype):
                raise CannotLowerError(f"{self.name(layer)} has a weight that no kernel takes")
            self.checks.append(lambda: prepared.hold(layer))
            self.kept.append(prepared.hold(layer))
            self._projections[layer] = prepared.projection
        projection = self._projections[layer]
        return projection if activations else projection.weight_only()

    def _matrix(self, module: nn.Module, name: str, dtype: torch.dtype | None = None, index: int | None = None) -> Any:
        """Return the product with a parameter [N, K], or with a stack [E, N, K], quantized or not, as [E N, K].

        A parameter of another dtype than ``dtype`` is copied; without, it must be that of activations. ``index`` picks
        one matrix of a parameter [E, N, K].
        """
        if isinstance(layer := module._modules.get(name), nn.Linear):
            return self._projection(layer)
        from klfast import _C

        [weight] = self.parameters(module, name)
        if weight is not None and dtype is not None:
            weight = self.keep(weight.to(dtype))
        if weight is None or weight.dtype is not (dtype or self.dtype):
            raise CannotLowerError(f"{self.name(module)}.{name} is not a tensor of {self.dtype}")
        rows = weight.flatten(0, -2) if index is None else weight[index]
        return _C.Projection.dense(view(rows), None, *rows.shape)
