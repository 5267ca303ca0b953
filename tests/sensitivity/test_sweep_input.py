"""Inputs that a sweep refuses, and its error messages."""

import math

import pytest
import torch
from sweep_models import make, tokens

import klfast
from klfast.core.errors import InvalidInputError, UnknownLayerError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, InvalidInputError, "batches is empty"),
        ({"batches": torch.empty(0, 8, dtype=torch.int64)}, InvalidInputError, "batches is empty"),
        (
            {"batches": [torch.zeros(2, 8)]},
            InvalidInputError,
            r"batch 0 must be an int64 tensor \[B, T\] of token ids, got torch.float32 \[2, 8\]",
        ),
        (
            {"batches": [torch.zeros(1, 2, 8, dtype=torch.int64)]},
            InvalidInputError,
            r"batch 0 must be .* got torch.int64 \[1, 2, 8\]",
        ),
        ({"batches": ["text"]}, InvalidInputError, "batch 0 must be .* got str"),
        ({"batches": "text"}, InvalidInputError, "batches must be token ids, got str"),
        ({"batches": [tokens(), tokens(2, 1)]}, InvalidInputError, "batch 1 has windows of 1 tokens"),
        (
            {"batches": tokens() + 50},
            InvalidInputError,
            r"batch 0 holds token id \d+; the model's ids lie between 0 and 60",
        ),
        ({"batches": tokens() - 50}, InvalidInputError, "batch 0 holds token id -"),
        ({"specs": []}, InvalidInputError, "there are no specs"),
        ({"specs": ["int5"]}, InvalidInputError, "'int5' is not a quantization spec"),
        ({"specs": [4]}, InvalidInputError, "got int"),
        ({"metrics": ["ppl"]}, InvalidInputError, "there is no metric 'ppl'; choose from kl_teacher_student"),
        ({"metrics": "jsd2"}, InvalidInputError, "there is no metric 'jsd2'"),
        ({"specs": 4}, InvalidInputError, "specs must be QuantSpecs or their names, got int"),
        ({"metrics": 4}, InvalidInputError, "metrics must be names, got int"),
        ({"layers": 4}, InvalidInputError, "layers must be names or patterns, got int"),
        ({"exclude": ["lm_heat"]}, UnknownLayerError, "did you mean 'lm_head'"),
        ({"exclude": "*"}, InvalidInputError, "leave no linear layer"),
        ({"layers": "re:("}, InvalidInputError, "is not a regular expression"),
        ({"scale": "max"}, InvalidInputError, "scale must be"),
        ({"layers": []}, InvalidInputError, "layers is empty"),
        ({"layers": ["lm_heat"]}, UnknownLayerError, "did you mean 'lm_head'"),
        ({"model": torch.nn.Linear(3, 3)}, InvalidInputError, "klfast sweeps causal language models"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message) as caught:
        klfast.sweep(**{"model": make(), "batches": tokens(), "specs": "int4", **change})
    assert "\n" not in str(caught.value)


def test_quantized_layers_are_refused():
    model = make()
    mixer = model.backbone.layers[0].mixer
    mixer.in_proj = klfast.QuantLinear.from_linear(mixer.in_proj, klfast.QuantSpec())
    with pytest.raises(InvalidInputError, match=r"layers\.0\.mixer\.in_proj is quantized already"):
        klfast.sweep(model, tokens())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_error_names_the_block_where_a_model_breaks(value):
    model = make()
    with torch.no_grad():
        model.backbone.layers[1].norm.weight[3] = value
    with pytest.raises(
        InvalidInputError, match=r"full-precision model's hidden states are NaN or infinite from backbone\.layers\.1 on"
    ):
        klfast.sweep(model, tokens())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_error_names_a_damaged_weight_before_anything_is_written(value, tmp_path):
    model = make()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[3, 4] = value
    with pytest.raises(
        InvalidInputError, match=r"the weight of backbone\.layers\.1\.mixer\.in_proj holds a NaN.*repair"
    ):
        klfast.sweep(model, tokens(), layers=["lm_head"], resume=tmp_path / "sweep.json")
    assert not list(tmp_path.iterdir())


def test_corrected_rows_are_a_heads():
    specs = ["int4-g32-sym", "int4-g32-sym+8"]
    found = klfast.sweep(make(), tokens(1), specs, rows=True, activations=True, layers=["lm_head", "*.0.mixer.in_proj"])
    assert [spec.corrected for name, spec in found.measurements if name == "lm_head"] == [0, 8]
    others = [*found.measurements, *found.rows]
    assert len(others) > 3 and not any(key[-1].corrected for key in others if key[0] != "lm_head")
    with pytest.raises(
        InvalidInputError, match=r"int4-g32-sym\+8 corrects rows of the head, which is not among `layers`"
    ):
        klfast.sweep(make(), tokens(1), specs[1], layers="in_proj")


def test_a_quantized_model_is_refused_by_name():
    model = make("mamba2", tied=True)
    klfast.quantize_model(model, klfast.Plan({"lm_head": "int8-g16-sym"}, "uniform"))
    with pytest.raises(InvalidInputError, match=r"backbone\.embeddings is quantized already; sweep the full-precision"):
        klfast.sweep(model, tokens(1))


def test_adapters_are_refused():
    """Adapters built as peft does, which the tests do not depend on."""

    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer
            self.weight = layer.weight

        def forward(self, hidden):
            return self.base_layer(hidden) * 1.5

    model = make("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    with pytest.raises(InvalidInputError, match="LlamaForCausalLM holds adapters; merge them first"):
        klfast.sweep(model, tokens())
    assert klfast.evaluate(model, tokens()).nll > 0  # the adapters count

    wrapper = type("PeftModelForCausalLM", (torch.nn.Module,), {"__module__": "peft.peft_model"})()
    for measure in (klfast.sweep, klfast.evaluate):
        with pytest.raises(
            InvalidInputError, match=r"PeftModelForCausalLM is peft's wrapper of a model; pass model\.get_base_model"
        ):
            measure(wrapper, tokens())
