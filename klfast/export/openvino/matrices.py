"""``GraphMatrices``: embeddings and products with the model's matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openvino import opset13 as op
from torch import nn

from klfast.engine.columns import Columns
from klfast.export.openvino import weights
from klfast.export.openvino.base import GraphBase
from klfast.export.openvino.nodes import constant
from klfast.nn.embedding import QuantEmbedding
from klfast.nn.linear import QuantLinear
from klfast.quant.tensor import QuantizedTensor


class GraphMatrices(GraphBase):
    """Embeddings and products.

    Attributes:
        kinds: {name of a quantized layer: type of its codes}, float16 where no compressed weight holds its groups.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kinds: dict[str, str] = {}
        self._weights: dict[int, Any] = {}

    def embed(self, embedding: nn.Module, out: Columns, scale: float = 1.0, prefix: torch.Tensor | None = None) -> None:
        """Look up the tokens' rows of an nn.Embedding or a QuantEmbedding.

        The variables' first values stand for a ``prefix``.
        """
        self.expect(embedding, "Embedding", "QuantEmbedding")
        self.prefix = 0 if prefix is None else len(prefix)
        if isinstance(embedding, QuantEmbedding):
            rows = self._rows_of(embedding.head)
            scale *= 1.0 if embedding.scale is None else float(embedding.scale)
        else:
            [table] = self.parameters(embedding, "weight")
            rows = op.gather(self._dense(self.name(embedding), table), self.ids, op.constant(0))
        rows.set_friendly_name(self.name(embedding))
        self.memory.write(out, self.without_padding(rows if scale == 1 else op.multiply(rows, np.float32(scale))))

    def project(self, layer: nn.Module, x: Columns, out: Columns, *, weight_only: bool = False) -> None:
        """Multiply by a linear layer's weight and add its bias; ``weight_only`` leaves out the bias."""
        self.expect(layer, "Linear", "QuantLinear")
        name, value = self.name(layer), self.memory.read(x)
        if isinstance(layer, QuantLinear):
            y = self._product(name, value, self._quantized(layer))
            if layer.spec.corrected:
                y = op.add(y, self._correction(layer, value))
        else:
            [weight] = self.parameters(layer, "weight")
            y = self._product(name, value, self._dense(name, weight))
        [bias] = self.parameters(layer, "bias")
        self.memory.write(out, y if bias is None or weight_only else op.add(y, constant(bias)))

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
        """Multiply by a parameter [N, K] of a module, or by the matrix ``index`` of one of shape [E, N, K]."""
        if isinstance(layer := module._modules.get(name), nn.Linear):
            self.project(layer, x, out)
            return
        [weight] = self.parameters(module, name)
        rows = weight.flatten(0, -2) if index is None else weight[index]
        whole_name = f"{self.name(module)}.{name}"
        self.memory.write(out, self._product(whole_name, self.memory.read(x), weights.dense(rows, whole_name)))

    def project_last(self, layer: nn.Module, x: Columns, out: Columns) -> None:
        """Multiply all tokens: which logits are wanted, a graph's caller says."""
        self.project(layer, x, out)

    def _product(self, name: str, x: Any, weight: Any) -> Any:
        y = op.matmul(x, weight, False, True)
        y.set_friendly_name(name)
        return y

    def _dense(self, name: str, tensor: torch.Tensor) -> Any:
        """Return a tensor as a node, the same one for an embedding and a head that share it."""
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = weights.dense(tensor, name)
        return self._weights[id(tensor)]

    def _quantized(self, layer: QuantLinear) -> Any:
        """Return a layer's weight without what corrects its rows, the same node for a tied embedding."""
        if id(layer) not in self._weights:
            qt = layer.quantized
            self._weights[id(layer)] = self._packed(self.name(layer), qt.halves[0] if qt.spec.corrected else qt)
        return self._weights[id(layer)]

    def _packed(self, name: str, qt: QuantizedTensor, rows: torch.Tensor | None = None) -> Any:
        """Return a quantized matrix [N, K] as a node, or some of its rows [E, n], as [E, n, K]."""
        if weights.misfit(qt):
            self.kinds[name] = "float16"
            dense = qt.dequantize(torch.float32).half()
            return weights.dense(dense if rows is None else dense[rows], name)
        self.kinds[name] = f"{'i' if qt.spec.symmetric else 'u'}{4 if qt.spec.bits == 4 else 8}"
        return weights.quantized(qt, rows)

    def _correction(self, layer: QuantLinear, x: Any) -> Any:
        """Return what is added to the results of a layer's corrected rows, 0 for the others."""
        _, rows, added = layer.quantized.halves
        y = op.matmul(x, weights.quantized(added), False, True)
        padded = op.pad(y, [0, 0, 0], [0, 0, 1], "constant", np.float32(0))
        places = np.full(layer.out_features, len(rows), np.int64)
        places[rows.numpy()] = np.arange(len(rows))
        return op.gather(padded, op.constant(places), op.constant(-1))

    def _rows_of(self, head: QuantLinear) -> Any:
        """Return the tokens' rows of a tied head."""
        rows = op.gather(self._quantized(head), self.ids, op.constant(0))
        if not head.spec.corrected:
            return rows
        _, corrected, added = head.quantized.halves
        table = op.pad(weights.quantized(added), [1, 0], [0, 0], "constant", np.float32(0))
        places = np.zeros(head.out_features, np.int64)
        places[corrected.numpy()] = np.arange(1, len(corrected) + 1)
        which = op.gather(op.constant(places), self.ids, op.constant(0))
        return op.add(rows, op.gather(table, which, op.constant(0)))
