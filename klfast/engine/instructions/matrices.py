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
        if getattr(embedding, "max_norm", None) is not None:
            raise CannotLowerError(f"{name} has a max_norm")
        self.prefix = 0 if prefix is None else len(prefix)
        if isinstance(embedding, QuantEmbedding):
            if embedding.scale is not None:
                scale *= float(embedding.scale)
            head, rows, *correction = self._projections_of(embedding.head)
            self.program.embed_quantized(name, head, view(prefix), code, scale, out, rows.tolist(), *correction)
            return
        [table] = self.parameters(embedding, "weight")
        self.program.embed(name, view(table), len(table), view(prefix), code, scale, out)

    def project(self, layer: nn.Module, x: Columns, out: Columns, *, weight_only: bool = False) -> None:
        """Multiply by a linear layer's weight and add its bias; ``weight_only`` leaves out the bias.

        Results of corrected rows, which must follow one another, are added to in place.
        """
        whole, rows, *correction = self._projections_of(layer)
        self.program.project(self.name(layer), whole.weight_only() if weight_only else whole, x, out)
        for projection in correction:
            first, last = int(rows[0]), int(rows[-1])
            if last - first >= len(rows):
                raise CannotLowerError(f"{self.name(layer)} has corrected rows that do not follow one another")
            added = self.buffer("corrected_rows", len(rows), torch.float32)
            _, place, _ = out.split(first, len(rows), out.width - last - 1)
            self.program.project(f"{self.name(layer)}.correction", projection, x, added)
            self.program.combine("add", "add", 1.0, 1, place, added, place, None)

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
        whole, rows, *correction = self._projections_of(layer)
        self.program.project_last(self.name(layer), whole, x, out)
        for projection in correction:
            buffer = self.buffer("correction", len(rows), torch.float32, rows=MOST_SEQUENCES)
            self.program.project_last(f"{self.name(layer)}.correction", projection, x, buffer)
            self.corrected, self.correction = rows, buffer

    def _projections_of(self, layer: nn.Module) -> tuple[Any, ...]:
        """Return the product with a layer, its corrected rows, int32 [R], and if there are some, that with them."""
        if not (isinstance(layer, QuantLinear) and layer.spec.corrected):
            return self._projection(layer), torch.empty(0, dtype=torch.int32)
        if layer not in self._halves:
            self.expect(layer, "QuantLinear")
            watch = Watch(*((layer._buffers, name) for name in layer.part_names), (layer._parameters, "bias"))
            watch.tensors = ()
            made_of = options(layer)
            self.checks.append(lambda: made_of == options(layer) and watch.hold())
            self.watch_values(layer._buffers, "weight_correction_rows")  # they are columns of instructions
            whole, rows, correction = layer.quantized.halves
            self._halves[layer] = (
                QuantLinear(whole, layer.bias, layer.activation, dtype=layer.dtype),
                rows,
                QuantLinear(correction, None, layer.activation, dtype=layer.dtype),
            )
        first, rows, second = self._halves[layer]
        return self._projection(first), rows, self._projection(second)

    def _projection(self, layer: nn.Module) -> Any:
        if layer not in self._projections:  # several blocks may share it
            if type(layer) not in (nn.Linear, QuantLinear):
                raise CannotLowerError(f"{self.name(layer)} is a {type(layer).__name__} of {type(layer).__module__}")
            prepared = PreparedLinear(layer)
            if prepared.projection is None or prepared.hold(layer) is None or not prepared.takes(self.dtype):
                raise CannotLowerError(f"{self.name(layer)} has a weight that no kernel takes")
            self.checks.append(lambda: prepared.hold(layer))
            self.kept.append(prepared.hold(layer))
            self._projections[layer] = prepared.projection
        return self._projections[layer]

    def _matrix(self, module: nn.Module, name: str, dtype: torch.dtype | None = None, index: int | None = None) -> Any:
        """Return the product with a parameter [N, K], or with a stack [E, N, K], quantized or not, as [E N, K].

        A parameter of another dtype than ``dtype`` is copied; without, it must be that of activations. ``index`` picks
        one matrix of a parameter [E, N, K].
        """
        if isinstance(layer := module._modules.get(name), nn.Linear):
            return self._projection(layer)
        from klfast import _C

        [weight] = self.parameters(module, name)
        if weight is not None and dtype not in (None, weight.dtype):
            weight = self.keep(self.copied(weight).to(dtype))
        if weight is None or weight.dtype is not (dtype or self.dtype):
            raise CannotLowerError(f"{self.name(module)}.{name} is not a tensor of {self.dtype}")
        rows = weight.flatten(0, -2) if index is None else weight[index]
        return _C.Projection.dense(view(rows), None, *rows.shape)
