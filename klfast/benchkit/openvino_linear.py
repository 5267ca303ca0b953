"""A linear layer with INT4 weights in OpenVINO, as NNCF's weight compression writes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov
from openvino import opset13 as op

from klfast.benchkit.openvino_core import core
from klfast.quant import packing
from klfast.quant.tensor import QuantizedTensor


def compiled(rows: np.ndarray, qt: QuantizedTensor, threads: int) -> Callable[[], np.ndarray]:
    """Return a call that multiplies float32 ``rows`` [M, K] by a weight i4 [N, G, L] with a float16 scale per group."""
    assert qt.packed is not None and qt.scale is not None
    n, k = qt.shape
    groups = qt.scale.shape[1]
    nibbles = (packing.unpack(qt.packed, 4, k) ^ 8).numpy()  # in two's complement
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    integers = op.constant(ov.Tensor(packed.reshape(-1), ov.Shape([n, groups, k // groups]), ov.Type.i4))
    scale = op.constant(qt.scale.float().numpy().astype(np.float16)[..., None])
    weight = op.reshape(op.multiply(op.convert(integers, np.float16), scale), np.array([n, k]), special_zero=False)
    x = op.parameter(list(rows.shape), np.float32)
    model = ov.Model([op.matmul(x, op.convert(weight, np.float32), False, True)], [x])
    request = (
        core()
        .compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads})
        .create_infer_request()
    )
    request.set_input_tensor(ov.Tensor(rows))  # a copy

    def run() -> np.ndarray:
        request.infer()
        found: np.ndarray = request.get_output_tensor().data
        return found

    return run
