"""Each shipped launch, compiled for an absent NVIDIA GPU (sm_90): registers, spills, matrix instructions."""

from pathlib import Path

import pytest
import torch
import triton
from klfast.kernels.launch import FUSED
from triton.backends.compiler import GPUTarget
from triton_aot import compile_for_hopper, source
from triton_launches import OTHER_SPECS, SPECS, attention, dequant, launches

AMPERE = GPUTarget("cuda", 86, 32)
SHARED_LIMIT = 227 * 1024
LAUNCHES = {name: (launch, matrix) for name, launch, matrix in launches("nvidia")}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch):
    """Keep what is compiled: Triton's key is a hash of the source, the options and the compiler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "triton"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_for_hopper(name):
    launch, matrix = LAUNCHES[name]
    compiled = compile_for_hopper(launch)
    assert compiled.stack == 0 and not compiled.count("STL", "LDL"), "no spills"
    assert compiled.registers <= 255 and compiled.shared <= SHARED_LIMIT
    assert bool(compiled.count("HGMMA", "HMMA")) == (matrix == "float"), compiled
    assert bool(compiled.count("IGMMA", "IMMA")) == (matrix == "int8"), compiled
    if limits := 2 * ("clamped" in name) + ("ssd" in name):
        assert compiled.count("FMNMX.NAN") >= limits, "a NaN in dt or A is not lost; the interpreter always keeps it"
    if "gemv" in name:
        assert compiled.count("LDG.E.128"), "the weight comes in pieces of 16 bytes"
        assert compiled.count("BAR") <= 1, "threads meet once, at the end"


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*SPECS, *OTHER_SPECS], ids=str)
def test_fits_the_shared_memory_of_smaller_gpus(spec):
    """A GeForce RTX 30, 40 or 50, an A10 and an L4 have 99 KB a program."""
    for dtype in (torch.float32, torch.bfloat16):
        *_, one = dequant("nvidia", 4096, spec, dtype, shared=99 << 10)
        assert triton.compile(source(one), target=AMPERE, options=one.options | FUSED).metadata.shared <= 99 << 10


@pytest.mark.parametrize("family", ["nvidia", "intel"])
def test_decoding_recompiles_nothing(family):
    """While the keys grow one by one, except at the step to keys in parts."""

    def programs(keys):
        made = (source(launch) for _, launch, _ in attention(family, keys))
        return str([(each.fn.__name__, each.signature, each.constants, each.attrs) for each in made])

    assert len({programs(keys) for keys in (1, 2, 15, 16, 17, 100, 128)}) == 1
    assert len({programs(keys) for keys in (129, 130, 256, 257, 1000, 1024, 4096, 10_001)}) == 1
