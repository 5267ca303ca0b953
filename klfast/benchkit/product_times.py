"""``time_products``: how long a model's matrices take a token, each shape and format measured once."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from klfast import __version__
from klfast.core.errors import CannotLowerError, InvalidInputError, KernelUnavailableError
from klfast.core.progress import Progress, reporter
from klfast.dispatch.conditions import conditions
from klfast.engine.builder import Builder
from klfast.engine.engine import Engine
from klfast.nn import QuantLinear
from klfast.planning.timings import Product, Timings
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec, storable_spec
from klfast.quant.tensor import QuantizedTensor
from klfast.sensitivity.results import Sensitivities

_ROUTED = re.compile(r"\.experts\.(?!0\.)")  # stacks, or experts one by one; all tokens meet an only one (Hymba's)
_MOST_BYTES, _MOST_COPIES = 2**28, 256  # of the copies of a matrix
_SECONDS, _FEWEST_RUNS, _MOST_RUNS = 0.2, 3, 100  # of each product's timing


def time_products(
    sensitivities: Sensitivities, *, dtype: torch.dtype = torch.float32, progress: Progress = None
) -> Timings:
    """Measure the products with one row (a token) that plans from these sensitivities choose from, on this CPU.

    Each distinct shape of the model's matrices is timed in full precision and in each spec measured on it, with int8
    activations, too, if the sweep measured them. Products run as in the native engine, on torch's number of threads
    (``torch.set_num_threads``), one after another with different copies of the matrix. The copies have as many bytes as
    the whole model would have in that format (at most 256 MiB), so they come from where the model's come from: memory,
    or caches that hold them all. Medians are taken.

    Args:
        sensitivities: of the model.
        dtype: of activations and of matrices in full precision, in which the model is to run.
        progress: as for ``klfast.sweep``.

    Raises:
        InvalidInputError: the model has experts, of which a token meets some, or a dtype without kernels.
        KernelUnavailableError: klfast's extension is missing.
    """
    if routed := next(filter(_ROUTED.search, sensitivities.layers), None):
        raise InvalidInputError(f"timings are of matrices that all tokens meet, but {routed} is a mixture's experts")
    products = _products(sensitivities)
    found = {}
    with reporter(progress, "time products", len(products), 0) as advance, torch.no_grad():
        for product in products:
            found[product] = _median(product, dtype, _model_bytes(sensitivities, product.spec, dtype))
            advance(1, f"{product.shape[0]} x {product.shape[1]} in {product.spec or 'full precision'}")
    structure = None if sensitivities.fingerprint is None else sensitivities.fingerprint.structure
    return Timings(conditions(dtype), {"klfast": __version__, "torch": torch.__version__}, structure, found)


def timings_in(
    path: str | os.PathLike[str], sensitivities: Sensitivities, *, dtype: torch.dtype = torch.float32
) -> Timings:
    """Return the timings in a file if it exists; else measure them, and write it.

    Raises:
        InvalidInputError: they are of another machine, tier, number of threads or dtype; or as for ``time_products``.
        ModelMismatchError: they are of another model.
        CheckpointError: the file is damaged or holds something else.
    """
    if not Path(path).exists():
        made = time_products(sensitivities, dtype=dtype)
        made.to_json(path)
        return made
    found = Timings.from_json(path)
    found.require_conditions(conditions(dtype), os.fspath(path))
    found.require_model(sensitivities)
    return found


def _products(sensitivities: Sensitivities) -> list[Product]:
    shapes = {name: info.shape for name, info in sensitivities.layers.items()}
    found = [Product(shape, None) for shape in shapes.values()]
    activations = ("exact", "int8") if sensitivities.activations else ("exact",)
    for name, spec in sensitivities.measurements:
        stored = storable_spec(spec, shapes[name][1])
        found += [Product(shapes[name], stored, activation) for activation in activations]
    return list(dict.fromkeys(found))


def _model_bytes(sensitivities: Sensitivities, spec: QuantSpec | None, dtype: torch.dtype) -> int:
    """Return the bytes of all matrices in one format."""
    shapes = [info.shape for info in sensitivities.layers.values()]
    if spec is None:
        return sum(n * k for n, k in shapes) * dtype.itemsize
    return sum(storable_spec(spec.base, shape[1]).nbytes(shape) for shape in shapes)


def _median(product: Product, dtype: torch.dtype, model_bytes: int) -> float:
    """Return the median seconds of a product, of calls with copies of the matrix in turn."""
    layers = nn.ModuleList(_copies(product, dtype, model_bytes))
    embedding = nn.Embedding(1, product.shape[1], dtype=dtype)
    try:
        build = Builder(nn.ModuleList([embedding, layers]), dtype, 1, lambda kind: None)
        x, y = build.buffer("x", product.shape[1]), build.buffer("y", product.shape[0], torch.float32)
        build.embed(embedding, x)
        for layer in layers:
            build.project_last(layer, x, y)
    except CannotLowerError as error:
        raise KernelUnavailableError(f"products cannot be timed: {error}") from error
    engine = Engine(build, y)
    token, state = torch.zeros(1, 1, dtype=torch.int64), engine.state()
    taken: list[float] = []
    start, runs = time.perf_counter(), 0
    while runs <= _FEWEST_RUNS or (runs < _MOST_RUNS and time.perf_counter() - start < _SECONDS):
        seconds = [each for _, each in engine.profile(token, state)[1:]]  # without the embedding
        each = len(seconds) // len(layers)  # instructions: two for a head with corrected rows
        if runs:  # after a first one for caches and threads
            taken += [sum(seconds[i : i + each]) for i in range(0, len(seconds), each)]
        runs += 1
    return statistics.median(taken)


def _copies(product: Product, dtype: torch.dtype, model_bytes: int) -> Iterator[nn.Linear]:
    (n, k), spec, activation = product
    weight = torch.randn(n, k) / k**0.5
    if spec is None:
        dense = weight.to(dtype)
        for _ in range(_count(dense.nbytes, model_bytes)):
            layer = nn.Linear(k, n, bias=False, device="meta")
            layer.weight = nn.Parameter(dense.clone(), requires_grad=False)
            yield layer
        return
    qt = quantize(weight, spec)
    for _ in range(_count(qt.nbytes, model_bytes)):
        copy = QuantizedTensor([part.clone() for part in qt.parts], qt.shape, qt.spec, qt.layout)
        yield QuantLinear(copy, None, activation, dtype=dtype)


def _count(nbytes: int, model_bytes: int) -> int:
    return min(max(-(-min(model_bytes, _MOST_BYTES) // nbytes), 1), _MOST_COPIES)
