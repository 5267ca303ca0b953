"""Decode steps with klfast's kernels as graphs: torch's on a GPU; under the interpreter, of torch's operations."""

import pytest
import torch
from operation_recorder import OperationRecorder
from tiny_models import VOCABULARY, tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.backends import operands
from klfast.core.device_graphs import recorder_of
from klfast.generation import graph_stepper
from klfast.models.matrices import matrices
from klfast.quant.layouts import Layout

NEW = 8  # a prompt, the steps that are computed both ways, and three more


@pytest.mark.parametrize("family", ["mamba", "llama"])
def test_a_graph_writes_the_same_tokens(family, device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(operands, "preferred_layout", lambda *_: Layout.TILED)
    model = tiny(family)
    klfast.quantize_model(model, Plan(dict.fromkeys(matrices(model), QuantSpec(8, 16)), "uniform"))
    model = klfast.accelerate(model.to(device))
    ids = torch.randint(2, VOCABULARY, (1, 2)).to(device)
    with monkeypatch.context() as patch:
        patch.setattr(graph_stepper, "recorder_of", lambda device: None)
        own = klfast.generate(model, ids, NEW)
    monkeypatch.setattr(graph_stepper, "LEAST", NEW)
    recorder = OperationRecorder() if device.type == "cpu" else recorder_of(device)
    monkeypatch.setattr(graph_stepper, "recorder_of", lambda device: recorder)
    assert torch.equal(klfast.generate(model, ids, NEW), own)
    assert graph_stepper.how_steps_ran(model) == "replayed as a graph"
