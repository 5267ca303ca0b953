"""klfast bench openvino."""

import csv
import json

import pytest
from command_line import fails, klf
from tiny_models import tiny

import klfast

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'klfast[openvino]'")

from klfast.benchkit import openvino_core


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "mamba2-ov"
    klfast.export_openvino(tiny("mamba2"), path)
    return path


def test_times_folders(folder, tmp_path):
    few = ["--prompt-tokens", 5, "--new-tokens", 4, "--threads", 1, "--out", tmp_path / "out"]
    found = json.loads(klf("bench", "openvino", folder, folder, *few, "--json").stdout)["rows"]
    assert [(row["folder"], row["device"], row["same_tokens"]) for row in found] == [("mamba2-ov", "CPU", 4)] * 2
    assert all(row["token_seconds"] > 0 and row["first_seconds"] > 0 and not row["error"] for row in found)
    with (tmp_path / "out" / "openvino.csv").open() as file:
        assert [row["device"] for row in csv.DictReader(file)] == ["CPU", "CPU"]
    assert "| mamba2-ov | CPU | " in (tmp_path / "out" / "openvino.md").read_text()


def test_npu_takes_one_token_of_fixed_shapes(folder, tmp_path, monkeypatch):
    """The CPU stands for the NPU."""
    compiled, core = [], openvino_core.core

    class Other:
        def __init__(self):
            self.core = core()
            self.available_devices = ["CPU", "NPU"]

        def read_model(self, path):
            return self.core.read_model(path)

        def compile_model(self, model, device, settings):
            if device == "NPU":
                compiled.append(model)
            return self.core.compile_model(model, "CPU", settings | {"INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(openvino_core, "core", Other)
    few = ["--devices", "cpu,npu", "--prompt-tokens", 3, "--new-tokens", 4, "--out", tmp_path]
    rows = json.loads(klf("bench", "openvino", folder, *few, "--json").stdout)["rows"]
    assert [(row["device"], row["same_tokens"]) for row in rows] == [("CPU", 4), ("NPU", 4)]
    [model] = compiled
    assert not model.is_dynamic() and all(
        op.output(0).partial_shape.is_static for op in model.get_ops() if op.outputs()
    )


def test_a_device_that_cannot_run_it(folder, tmp_path, monkeypatch):
    core = openvino_core.core

    class Other:
        available_devices = ("CPU", "GPU.0")

        def read_model(self, path):
            return core().read_model(path)

        def compile_model(self, model, device, settings):
            if device != "CPU":
                raise RuntimeError("no such\nkernel")
            return core().compile_model(model, device, settings)

    monkeypatch.setattr(openvino_core, "core", Other)
    few = ["--devices", "GPU,CPU", "--prompt-tokens", 3, "--new-tokens", 2, "--out", tmp_path]
    said = klf("bench", "openvino", folder, *few).stdout
    assert "| mamba2-ov | GPU |" in said and "mamba2-ov does not run on GPU: RuntimeError: no such kernel" in said
    assert "| mamba2-ov | CPU |" in said


def test_refusals(folder, tmp_path):
    assert "finds no device 'TPU' here, only CPU" in fails("bench", "openvino", folder, "--devices", "CPU,TPU")
    assert "holds no openvino_model.xml" in fails("bench", "openvino", tmp_path)
    assert "name folders" in fails("bench", "openvino", code=2)
