"""The kernels without Python: csrc/ without csrc/python/ builds and is correct at every tier of this machine."""

import re
import shutil
import subprocess
from pathlib import Path

import csrc_program
import pytest

from klfast import _C
from klfast.dispatch import pins

ROOT = Path(__file__).parents[2]
FAMILIES = {
    "quantized_matmul": ["dequant_matmul", "grouped_dequant_matmul"],
    "dense_matmul": ["linear"],
    "attention": ["decode_attention"],
    "divergence": ["logit_divergence"],
    "gathered_logits": ["gathered_logits"],
    "conv": ["causal_conv1d", "causal_conv1d_update"],
    "scan": ["mamba_chunk_scan", "selective_scan", "selective_state_update"],
    "delta": ["gated_delta_rule"],
    "norm": ["rms_norm"],
    "elementwise": ["combine", "largest", "weighted_sum"],
}
SAME_KERNELS = {"linear_divergence": "logit_divergence"}
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or shutil.which("g++") is None, reason="needs a source tree and g++"
)


@pytest.fixture(scope="module")
def built():
    """Return the test program and its object files."""
    return csrc_program.build("alone", "tests/csrc/*.cpp")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_correct_at_every_tier(built, family):
    done = subprocess.run([built["program"], family], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = {tuple(line.partition(":")[0].split()) for line in done.stdout.splitlines()}
    kernels = _C.kernel_tiers()
    assert checked == {(op, tier) for op in FAMILIES[family] for tier in pins.available_tiers() if tier in kernels[op]}


def test_no_op_is_left_out():
    tested = {op for ops in FAMILIES.values() for op in ops}
    assert {SAME_KERNELS.get(op, op) for op in _C.kernel_tiers()} == tested


def test_every_op_has_the_kernels_that_its_tiers_cpp_names():
    built = {tier for tier in pins.CPU_TIERS if "could not build" not in pins.why_not(tier)}
    for path in (ROOT / "csrc").rglob("tiers.cpp"):
        text = path.read_text()
        for op in re.findall(r"^KLFAST_DISPATCH\((\w+),", text, re.MULTILINE):
            [named] = re.findall(r"^#define KLFAST_TIERS (.+)$", text, re.MULTILINE)
            assert _C.kernel_tiers()[op] == set(named.split(", ")) & built, op


@pytest.mark.slow
def test_nothing_outside_csrc_python_includes_pythons_headers(built):
    for path in built["objects"]:
        headers = (ROOT / f"{path}.d").read_text()
        assert "Python.h" not in headers and "pybind11" not in headers, path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_no_tier_code_runs_or_is_shared_before_cpu_detection(built):
    """No initialisers, no functions that the linker could share: they could contain a tier's instructions."""
    of_tiers = [path for path in built["objects"] if set(Path(path).parts) & set(pins.CPU_TIERS)]
    assert of_tiers
    for path in of_tiers:
        sections = subprocess.run(["objdump", "-h", path], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert ".init_array" not in sections and ".ctors" not in sections, path
        symbols = subprocess.run(["objdump", "-t", path], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if line[17:18] == "w" and " .text" in line]
        assert not shared, (path, shared)
