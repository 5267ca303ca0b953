"""Sensitivities to plan from, every plan they allow, and a model whose perplexity follows them."""

import itertools
import math

import pytest

from klfast.models.fingerprint import Fingerprint
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.results import LayerInfo, Measurement, Sensitivities

INT4, INT8 = QuantSpec(4, 32), QuantSpec(8, 32)
OTHER_BYTES = 1000
SHAPE = 16  # bytes of weight_shape


def sensitivities(kl, shapes=None, specs=(INT8, INT4), metric="kl_teacher_student", **fields):
    """Return sensitivities of fp16 layers; ``kl`` has a row per layer with a figure per spec (None: not measured)."""
    shapes = shapes or [(64 * (n + 1), 64) for n in range(len(kl))]
    layers = {f"layers.{n}.proj": LayerInfo(shape, 2 * math.prod(shape)) for n, shape in enumerate(shapes)}
    measurements = {
        (name, spec): Measurement({metric: value}, {metric: 0.0}, 100)
        for name, row in zip(layers, kl, strict=True)
        for spec, value in zip(specs, row, strict=True)
        if value is not None
    }
    return Sensitivities(Fingerprint("x", (1.0,)), layers, OTHER_BYTES, measurements, **fields)


def layer_bytes(found, name, spec):
    info = found.layers[name]
    return info.float_bytes if spec is None else spec.nbytes(info.shape) + SHAPE


def every_plan(found, metric="kl_teacher_student"):
    """Yield (bytes, cost) of every assignment."""
    per_layer = [
        [
            (layer_bytes(found, name, spec), 0.0 if spec is None else found.measurements[name, spec].mean[metric])
            for spec in (None, INT8, INT4)
            if spec is None or (name, spec) in found.measurements
        ]
        for name in found.layers
    ]
    for assignment in itertools.product(*per_layer):
        yield OTHER_BYTES + sum(b for b, _ in assignment), math.fsum(c for _, c in assignment)


def check_predictions(found, made):
    """Check that a plan's predictions are the sums over its specs."""
    specs = {name: made.specs.get(name) for name in found.layers}
    total = sum(layer_bytes(found, name, spec) for name, spec in specs.items())
    assert made.predicted["bytes"] == total + OTHER_BYTES
    weights = sum(math.prod(info.shape) for info in found.layers.values())
    assert made.predicted["mean_bits"] == 8 * (total - SHAPE * len(made.specs)) / weights
    kl = math.fsum(found.measurements[name, spec].mean["kl_teacher_student"] for name, spec in specs.items() if spec)
    assert made.predicted["kl"] == pytest.approx(kl, rel=1e-12, abs=1e-300)
    assert made.fingerprint == found.fingerprint


class Perplexity:
    """A model whose log-perplexity rises by the KL of each layer; it records the plans that it was asked about."""

    def __init__(self, found, start=10.0):
        self.found, self.start, self.asked = found, start, []

    def __call__(self, made):
        self.asked.append(dict(made.specs))
        kl = sum(self.found.measurements[name, spec].mean["kl_teacher_student"] for name, spec in made.specs.items())
        return self.start * math.exp(kl)
