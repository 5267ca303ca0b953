"""The repository that klfast export-kernels writes: read by the package kernels, run without klfast."""

import ast
import sys

import pytest
from command_line import fails, klf
from other_process import run, run_tests

from klfast.integrations import hub_repository
from klfast.integrations.hub_layers import KERNELS
from klfast.ops import ssm

# Small sizes: Triton's interpreter takes its time.
ON_THE_DEVICE = [
    "test_device_ssm.py::test_conv[shape1-4]",
    "test_device_ssm.py::test_scan[shape1-3]",
    "test_device_ssm.py::test_state_update[shape1-state_dtype0]",
    "test_device_ssm.py::test_conv_update_of_a_cache[case0]",
    "test_device_ssm.py::test_conv_of_packed_sequences",
    "test_device_ssm.py::test_chunk_scan[shape1]",
    "test_device_ssm.py::test_chunk_scan_in_chunks[nvidia-shape2]",
    "test_device_delta_rule.py::test_equals_float64[shape1-head]",
    "test_device_delta_rule.py::test_equals_float64[shape1-channel]",
    "test_device_delta_rule.py::test_update_continues_a_sequence[head]",
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return the folder of the variants."""
    folder = tmp_path_factory.mktemp("exported") / "repository"
    klf("export-kernels", folder)
    assert [path.name for path in folder.parent.iterdir()] == ["repository"]
    return folder / "build"


def test_kernels_reads_the_metadata(build):
    try:
        from kernels._rust import Digest, DigestAlgorithm, Metadata
    except ImportError:  # kernels 0.16
        from kernels_data import Digest, DigestAlgorithm, Metadata

    ids = set()
    for backend in ("cuda", "xpu"):
        variant = build / f"torch-{backend}"
        found = Metadata.read_from_file(variant / "metadata.json")
        assert (str(found.name), found.version, found.license) == ("klfast-ssm", 0, "Apache-2.0")
        assert str(found.backend.backend_type) == backend and found.id.isidentifier()
        found.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert "Apache License" in (variant / "LICENSE").read_text()
        ids.add(found.id)
    assert len(ids) == 2
    card = (build / "CARD.md").read_text()
    assert all(name in card for name in {*ssm.__all__, *KERNELS})


@pytest.mark.parametrize(("backend", "found"), [("cu130", ["torch-cuda"]), ("xpu20260", ["torch-xpu"]), ("cpu", [])])
def test_kernels_chooses_the_variant(build, backend, found):
    """As on a machine with that backend; no variant is for CPUs, on which Triton does not run."""
    from kernels.backends import parse_backend

    from kernels import variants

    here = dict(cpu="x86_64", os="linux", torch_version=None, torch_cxx11_abi=True, tvm_ffi_version=None)
    there = variants.get_variants_local(build)
    chosen, _ = variants._resolve_variant_for_system(there, parse_backend(backend), **here)
    assert [variant.variant_str for variant in chosen] == found


def test_it_imports_nothing_but_torch_and_triton(build):
    """Except for activations that klfast does not compute, which only transformers asks for."""
    found = {}
    for path in (build / "torch-xpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.name)
    assert found.keys() - sys.stdlib_module_names == {"torch", "triton", "transformers"}
    assert found["transformers"] == {"transformers_functions.py"}


def test_without_klfast(build):
    """In a process that cannot import it, against float64."""
    run(
        f"""
        import sys
        sys.modules["klfast"] = None
        from pathlib import Path
        import torch
        from kernels import get_local_kernel
        from ssm_truth import close, make, true_conv, true_scan

        kernel = get_local_kernel(Path({str(build / "torch-cuda")!r}))
        x, weight, bias = make(2, 5, 13, last=1), make(5, 3), make(5)
        y, state = kernel.causal_conv1d_fn(x, weight, bias, return_final_states=True, activation="silu")
        expected, after = true_conv(x, weight, bias, None, True)
        close(y, expected)
        close(state, after)

        u, delta, z, A = make(1, 6, 9), make(1, 6, 9), make(1, 6, 9), -torch.rand(6, 3)
        B, C, D, bias = make(1, 2, 3, 9), make(1, 2, 3, 9), make(6), make(6)
        y, state = kernel.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
        expected, after = true_scan(u, delta, A, B, C, D, z, bias, True)
        close(y, expected)
        close(state, after)

        assert all(hasattr(kernel, name) for name in kernel.__all__)
        assert all(hasattr(kernel.layers, name) for name in {sorted(KERNELS)})
        assert not [name for name in sys.modules if name.startswith("klfast.")]
        """,
        TRITON_INTERPRET="1",
        KLFAST_STRICT="1",
    )


@pytest.mark.slow
def test_functions_against_float64(build):
    """klfast's own tests of the Triton kernels, with the repository's functions."""
    files = [f"tests/backends/device/{name}" for name in ON_THE_DEVICE]
    environment = dict(REPOSITORY=str(build / "torch-cuda"), TRITON_INTERPRET="1", KLFAST_STRICT="1")
    run_tests(*files, plugins=["exported_ops"], **environment)


@pytest.mark.slow
def test_layers_in_transformers(build):
    files = ["tests/integrations/with_repository.py"]
    environment = dict(REPOSITORY=str(build / "torch-xpu"), TRITON_INTERPRET="1", KLFAST_STRICT="1")
    run_tests(*files, plugins=["kernels_taken"], **environment)


def test_an_existing_folder_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "exists; name another folder or remove it" in fails("export-kernels", tmp_path / "mine")
    assert "missing" in fails("export-kernels", tmp_path / "missing" / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_the_same_source_makes_the_same_files(build, tmp_path):
    hub_repository.write(tmp_path / "again")
    again = tmp_path / "again" / "build"
    files = {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    # Other tests may have imported what is there.
    before = {path.relative_to(build) for path in build.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert files == before
    assert all((again / path).read_bytes() == (build / path).read_bytes() for path in files)
