"""What surrounds the Triton kernels: import, registration, launch. The kernels' own tests are in device/."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.core.errors import KernelUnavailableError
from klfast.dispatch import registry


def test_kernels_import_without_a_driver():
    code = "import klfast, sys; assert 'triton' not in sys.modules; import klfast.kernels.dequant_matmul"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", ["CUDA", "XPU"])
def test_accelerate_finds_its_kernels(device):
    assert all(registry.has_kernel(op, device) for op in (*(each.op for each in REPLACEMENTS.values()), "rms_norm"))


def test_old_gpus_are_refused(monkeypatch):
    from klfast.kernels.launch import Launch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:7")
    said = r"need an NVIDIA GPU of compute capability 8.0 or newer, and Tesla T4 has 7.5; with klfast.using\("
    with pytest.raises(KernelUnavailableError, match=said):
        Launch(None, (2,), {"x_ptr": x}).run()


@pytest.mark.parametrize("device", ["cuda:1", "xpu:1"])
def test_launches_on_the_device_of_the_tensors(device, monkeypatch):
    from klfast.kernels.launch import Launch

    class Kernel:
        def __getitem__(self, grid):
            return lambda **args: seen.append(("launched", grid, args))

    def device_of(t):
        seen.append(t.device)
        return nullcontext()

    with FakeTensorMode():
        x = torch.empty(3, device=device)
    seen = []
    monkeypatch.setattr(torch.get_device_module(x.device), "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    Launch(Kernel(), (2,), {"n": 3, "x_ptr": x}, {"num_warps": 1}).run()
    assert seen == [x.device, ("launched", (2,), {"n": 3, "x_ptr": x, "num_warps": 1, "enable_fp_fusion": True})]
