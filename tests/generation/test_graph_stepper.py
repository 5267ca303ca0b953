"""Decode steps as a graph: the tokens of the model's own steps, or those steps and a reason. Recorded on the CPU."""

import functools

import pytest
import torch
from operation_recorder import OperationRecorder
from tiny_models import FAMILIES, batch, left_padded, tiny
from transformers import LlamaForCausalLM

import klfast
from klfast import Plan, QuantSpec
from klfast.core.errors import CannotLowerError
from klfast.generation import graph_stepper, stepper
from klfast.models.calling import CACHE_NAMES
from klfast.models.matrices import matrices

pytestmark = pytest.mark.usefixtures("one_thread")
REPLAYED = "replayed as a graph"
# Once for the prompt, and four steps; beside three of these, at fixed addresses, the last to be recorded.
CALLS = 1 + 4 + 3


def count(monkeypatch, model):
    """Return a list that gets an entry for each call of the model's forward."""
    calls, forward = [], type(model).forward

    @functools.wraps(forward)
    def counted(*args, **options):
        calls.append(None)
        return forward(*args, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    return calls


@pytest.fixture
def generate(monkeypatch):
    """Return a function that gives tokens without graphs, tokens with them, and how often the forward ran then."""

    def refuse(model):
        raise CannotLowerError("a test wants the model's own forward")

    monkeypatch.setattr(stepper, "engine_of", refuse)

    def both(model, ids, new_tokens=24, recorder=OperationRecorder, **options):
        torch.manual_seed(5)
        own = klfast.generate(model, ids, new_tokens, **options)
        torch.manual_seed(5)
        with monkeypatch.context() as patch:
            patch.setattr(graph_stepper, "recorder_of", lambda device: recorder())
            calls = count(patch, model)
            return own, klfast.generate(model, ids, new_tokens, **options), len(calls)

    return both


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "hymba"])
def test_a_graph_writes_the_same_tokens(family, generate):
    model = tiny(family)
    own, found, calls = generate(model, batch(3, 9))
    assert graph_stepper.how_steps_ran(model) == REPLAYED and calls == CALLS
    assert torch.equal(found, own)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "qwen3_5", "lfm2"])
def test_klfast_s_ops_in_a_graph(family, generate):
    model = tiny(family)
    klfast.quantize_model(model, Plan(dict.fromkeys(matrices(model), QuantSpec(8, 16)), "uniform"))
    klfast.accelerate(model)
    own, found, calls = generate(model, batch(1, 1))
    assert graph_stepper.how_steps_ran(model) == REPLAYED and calls == CALLS
    assert torch.equal(found, own)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "granite_hybrid_moe", "lfm2_moe"])
def test_experts_are_chosen_by_the_host(family, generate):
    model = tiny(family)
    klfast.quantize_model(model, Plan(dict.fromkeys(matrices(model), QuantSpec(8, 16)), "uniform"))
    refused(generate, klfast.accelerate(model), "the host reads what klfast.grouped_dequant_matmul", batch(1, 1))


def test_what_chooses_tokens_is_not_in_the_graph(generate):
    own, found, calls = generate(tiny("mamba"), batch(2, 5), temperature=1.5, top_k=20, repetition_penalty=1.3)
    assert torch.equal(found, own) and calls == CALLS


def test_each_text_records_a_graph_of_its_own(generate):
    model = tiny("llama")
    for rows, tokens in ((1, 3), (2, 9), (1, 30)):
        own, found, calls = generate(model, batch(rows, tokens))
        assert torch.equal(found, own) and calls == CALLS
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def test_short_texts_are_not_worth_it(generate):
    model = tiny("llama")
    own, found, calls = generate(model, batch(), graph_stepper.LEAST - 1)
    assert torch.equal(found, own) and calls == graph_stepper.LEAST - 1
    assert graph_stepper.how_steps_ran(model) == ""


def refused(generate, model, reason, ids=None, new_tokens=24, **options):
    own, found, calls = generate(model, batch(2, 9) if ids is None else ids, **options)
    assert torch.equal(found, own) and calls >= new_tokens
    assert graph_stepper.how_steps_ran(model).startswith(f"launched one by one: {reason}")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("hymba", "a HymbaCache grows"),
        ("mistral", "a DynamicSlidingWindowLayer grows"),
        ("rwkv", "its rows are continued one by one"),
    ],
)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
def test_caches_that_do_not_stay_where_they_are(family, reason, generate):
    refused(generate, tiny(family), reason)


def test_padding_and_hooks(generate):
    ids, model = batch(2, 9), tiny("llama")
    refused(generate, model, "the prompts are padded", ids, attention_mask=left_padded(ids))
    model.model.norm.register_forward_hook(lambda *_: None)
    refused(generate, model, "model.norm has hooks")
    assert "its decode steps on the GPU were launched one by one: model.norm has hooks\n" in str(klfast.explain(model))


class PositionsInPython(LlamaForCausalLM):
    """Counts tokens in Python, beside its cache."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids, position_ids, **options):
        if cache := next((options[name] for name in CACHE_NAMES if options.get(name) is not None), None):
            cache.steps = getattr(cache, "steps", 0) + 1
            position_ids = torch.full_like(position_ids, 8 + cache.steps)
        return super().forward(input_ids, position_ids=position_ids, **options)


class ReadsPositions(LlamaForCausalLM):
    """Looks at numbers of tensors."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids, position_ids, **options):
        assert position_ids.max() < 1000
        return super().forward(input_ids, position_ids=position_ids, **options)


class Failing(OperationRecorder):
    def record(self, work):
        work()
        raise RuntimeError("CUDA error:\nno graph today")


def of_class(kind):
    model = tiny("llama")
    model.__class__ = kind
    return model


def test_a_graph_that_repeats_python_s_numbers_is_found_out(generate):
    refused(generate, of_class(PositionsInPython), "a replayed step gives other logits")


def test_numbers_that_the_host_reads_are_found_before_recording(generate):
    refused(generate, of_class(ReadsPositions), "the host reads what aten.item")


def test_a_recording_that_fails_leaves_the_model_s_own_steps(generate):
    refused(generate, tiny("mamba"), "RuntimeError: CUDA error: no graph today", recorder=Failing)


def test_numbers_that_are_no_numbers_are_named(generate):
    model = tiny("mamba")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(klfast.InvalidInputError, match="logits hold a NaN"):
        generate(model, batch())
