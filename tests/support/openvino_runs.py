"""OpenVINO on the CPU, computing in float32 as exactly as it can."""

import numpy as np
import pytest
import torch

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'klfast[openvino]'")

from klfast.benchkit.openvino_core import core  # noqa: E402

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


class Run:
    """A graph, or the file of one, with its state."""

    def __init__(self, graph):
        self.compiled = core().compile_model(graph, "CPU", EXACT)
        self.request = self.compiled.create_infer_request()

    def __call__(self, ids, beams=None, mask=1):
        """Feed int64 [B, T]; return the logits of each token, float32 [B, T, V]."""
        beams = np.arange(len(ids)) if beams is None else np.array(beams)
        found = self.request.infer(
            {"input_ids": ids.numpy(), "attention_mask": np.full((1, 1), mask), "beam_idx": beams.astype(np.int32)}
        )
        return torch.from_numpy(found["logits"].copy())

    def forget(self):
        """Begin new texts."""
        self.request.reset_state()

    def operations(self):
        """Return the types of the running program's nodes."""
        return {node.get_rt_info()["layerType"].value for node in self.compiled.get_runtime_model().get_ops()}

    def weight_types(self):
        """Return {name of a product: type of its weight in the running program}."""
        found = {}
        for node in self.compiled.get_runtime_model().get_ops():
            if node.get_rt_info()["layerType"].value == "FullyConnected":
                weight = node.input(1).get_source_output().get_node()
                found[node.friendly_name] = weight.get_rt_info()["outputPrecisions"].value
        return found
