"""Products are timed once for each shape and format, by the kernels that the engine runs."""

import math

import pytest
import torch
from planning_problems import INT4, INT8, sensitivities

import klfast
from klfast.benchkit import product_times
from klfast.benchkit.product_times import time_products, timings_in
from klfast.core.errors import InvalidInputError
from klfast.planning.timings import Product

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(product_times, "_SECONDS", 0.0)


def found(**changes):
    shapes = [(64, 64), (96, 32), (64, 64)]
    return sensitivities([(0.01, 0.1)] * 3, shapes, **changes)


def test_each_shape_and_format_once(monkeypatch):
    timed = []
    median = product_times._median
    monkeypatch.setattr(
        product_times, "_median", lambda product, *rest: timed.append(product) or median(product, *rest)
    )
    corrected = klfast.QuantSpec(4, 32, corrected=16)
    timings = time_products(found(specs=(INT8, corrected)), dtype=torch.bfloat16, progress=False)
    wide = [Product((64, 64), spec) for spec in (None, INT8, corrected)]
    # Groups as long as a row are stored as one.
    narrow = [
        Product((96, 32), spec)
        for spec in (None, *(klfast.QuantSpec(s.bits, -1, corrected=s.corrected) for s in (INT8, corrected)))
    ]
    assert sorted(map(repr, timed)) == sorted(map(repr, wide + narrow)) and timings.seconds.keys() == set(timed)
    assert all(0 < seconds < 1 and math.isfinite(seconds) for seconds in timings.seconds.values())
    assert timings.conditions["threads"] == 1 and timings.conditions["dtype"] == "bfloat16"


def test_int8_activations_are_timed_if_the_sweep_measured_them():
    swept = found()
    swept.activations["layers.0.proj", 32] = next(iter(swept.measurements.values()))
    timings = time_products(swept, progress=False)
    assert {product.activation for product in timings.seconds if product.spec == INT4} == {"exact", "int8"}


def test_copies_have_the_model_s_bytes():
    count = product_times._count
    assert count(1000, 10_000) == 10 and count(3000, 10_000) == 4
    assert count(2**29, 2**40) == 1 and count(2**27, 2**40) == 2 and count(1, 2**40) == product_times._MOST_COPIES


def test_a_file_is_measured_once_and_only_for_here(tmp_path, monkeypatch):
    path = tmp_path / "timings.json"
    first = timings_in(path, found())
    monkeypatch.setattr(product_times, "time_products", None)
    assert timings_in(path, found()) == first
    with pytest.raises(InvalidInputError, match="timings with dtype float32, but here it is bfloat16"):
        timings_in(path, found(), dtype=torch.bfloat16)
    with klfast.using("scalar"), pytest.raises(InvalidInputError, match=r"with tier .* here it is scalar"):
        timings_in(path, found())


def test_experts_are_refused():
    swept = found()
    swept.layers["layers.0.experts.0.down_proj"] = swept.layers["layers.0.proj"]
    assert time_products(swept, progress=False), "an only expert is met by all tokens"
    swept.layers["layers.0.experts.down_proj"] = swept.layers["layers.0.proj"]
    with pytest.raises(InvalidInputError, match=r"layers.0.experts.down_proj is a mixture's experts"):
        time_products(swept)
