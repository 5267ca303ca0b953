"""Fixtures shared by all tests."""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin make tests on busy machines crawl

import pytest
import torch

from klfast.dispatch import pins

# A shell that runs the tests in the background lets them ignore Ctrl-C, and every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests of Triton kernels run on a GPU or, as test_triton.py does, in a process of their own under Triton's interpreter.
collect_ignore = (
    [] if pins.interprets_triton() or torch.cuda.is_available() or torch.xpu.is_available() else ["backends/device"]
)


def pytest_terminal_summary(terminalreporter, config):
    """What was left out, where all tests were asked for, or those for GPUs."""
    if collect_ignore and (config.option.markexpr or not any(".py" in argument for argument in config.args)):
        terminalreporter.write_line(
            f"SKIPPED pytest -m gpu (tests/backends/device on a GPU): torch {torch.__version__} finds neither a CUDA nor an XPU device"
        )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", *pins.available_tiers()])
def tier(request):
    """Run a test once per implementation that this machine has."""
    with pins.using(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """For tiny matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
