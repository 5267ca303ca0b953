"""Fixtures shared by all tests."""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads make tests crawl on busy machines

import pytest
import torch

import klfast
from klfast.dispatch import pins

# Tests that a shell runs in the background ignore Ctrl-C, as do the processes they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests of Triton kernels run on a GPU or, as the Makefile runs them, in Triton's interpreter (TRITON_INTERPRET=1).
collect_ignore = (
    [] if pins.interprets_triton() or torch.cuda.is_available() or torch.xpu.is_available() else ["backends/device"]
)


def pytest_terminal_summary(terminalreporter, config):
    """Name the tests left out, if all tests or those for GPUs were asked for."""
    if collect_ignore and ("gpu" in config.option.markexpr or not any(".py" in argument for argument in config.args)):
        terminalreporter.write_line(
            "SKIPPED pytest -m gpu (tests/backends/device on a GPU): "
            f"torch {torch.__version__} finds neither a CUDA nor an XPU device"
        )


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _fresh_start():
    torch.manual_seed(0)
    pins.forget_warnings()
    if torch.get_num_threads() != THREADS:  # left by a test; more threads than cores make all that follow slow
        torch.set_num_threads(THREADS)


@pytest.fixture(params=["reference", *pins.available_tiers()])
def tier(request):
    """Run the test once with each implementation of this machine."""
    with pins.using(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Use one thread, for tiny matrices: several would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_packed_quantizer():
    """Leave folders in compressed-tensors' formats to transformers' own quantizer."""
    klfast.unregister_quantizer()
    yield
    klfast.register_quantizer()
