"""Threads that share an engine, and a model that another one changes in the meantime."""

import gc
from concurrent.futures import ThreadPoolExecutor

import meanwhile
import pytest
import torch
from tiny_models import batch, tiny

import klfast
from klfast.generation.engine import lower
from klfast.models.matrices import matrices

pytestmark = pytest.mark.usefixtures("one_thread")


def text(model, rows=1):
    return klfast.generate(model, batch(rows, 9), max_new_tokens=6)


def quantized(spec="int4-g32-sym"):
    model = tiny("jamba")
    return klfast.quantize_model(
        model, klfast.Plan(dict.fromkeys(matrices(model), klfast.QuantSpec.of(spec)), "uniform")
    )


def test_threads_take_turns():
    model = tiny("jamba")
    engine = lower(model)

    def answers(rows):
        torch.set_num_threads(1)
        state = engine.state(rows)
        return text(model, rows), engine(batch(rows, 9), state), engine.each(batch(rows, 3, seed=rows), state)

    sizes = (1, 2, 3) * 6
    expected = {rows: answers(rows) for rows in set(sizes)}
    with ThreadPoolExecutor(3) as pool:
        for rows, found in zip(sizes, pool.map(answers, sizes), strict=True):
            assert all(map(torch.equal, found, expected[rows]))


def test_a_state_that_another_thread_makes_larger_is_held():
    state = lower(tiny("jamba")).state()
    state.reserve(1)
    held = state.native()
    grown = [tensor for spec, tensor in zip(state.specs, state.tensors, strict=True) if spec.growing is not None]
    state.reserve(10_000)
    assert grown and all(any(tensor is one for one in held[1]) for tensor in grown)
    assert state.native()[1] == state.tensors


@pytest.mark.parametrize("change", ["layer", "same weights", "dtype", "activation", "save"])
def test_a_model_that_another_thread_changes(change, tmp_path):
    """Text is that of the model before or after; saved files are those of the model."""
    model, other = quantized(), quantized("int8-g32-sym")
    expected, weights = [text(model)], {name: t.clone() for name, t in model.state_dict().items()}
    heads = model.lm_head, other.lm_head
    if change == "layer":
        model.lm_head = other.lm_head
        expected.append(text(model))
    head = heads[0]

    def apply(i):
        match change:
            case "layer":
                model.lm_head = heads[i % 2]
            case "same weights":
                model.load_state_dict(weights, assign=bool(i % 2))
            case "dtype":
                head.to((torch.bfloat16, torch.float32)[i % 2])
            case "activation":
                head.activation = ("exact", "int8")[i % 2]
            case "save":
                klfast.save_quantized(model, tmp_path / str(i))

    if change == "activation":
        head.activation = "int8"
        expected.append(text(model))
    found = meanwhile.results(lambda: text(model), apply)
    assert all(any(torch.equal(one, each) for each in expected) for one in found)
    if change == "save":
        assert torch.equal(text(klfast.load_quantized(tmp_path / "2")), expected[0])


def test_layers_deleted_in_the_middle_of_a_text():
    model = quantized()
    expected = text(model)

    def delete(tokens):
        if model.model.layers:
            del model.lm_head, model.model.layers[:]
            gc.collect()
            torch.full((1 << 20,), -1.0)  # in freed memory

    assert torch.equal(klfast.generate(model, batch(1, 9), max_new_tokens=6, callback=delete), expected)
