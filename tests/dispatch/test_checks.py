"""What no op may take: None, a wrong type, a tensor without memory, a state that must not be written. Every op, every argument.

In processes of their own: these took the whole process down.
"""

import other_process
import pytest
import torch
from op_calls import calls, dispatched

from klfast import ops, using
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins

IMPLEMENTATIONS = ["reference", *pins.available_tiers()]
BEGIN = """
import inspect, sys, torch
from op_calls import calls, dispatched
from klfast.dispatch import pins as runtime; from klfast import using
from klfast.core.errors import InvalidInputError
torch.set_num_threads(1)

def everywhere():  # each call at each implementation
    for implementation in ["reference", *runtime.available_tiers()]:
        with using(implementation):
            for call in calls().items():
                yield implementation, call

def refused(call, what, *says):
    try:
        call()
    except InvalidInputError as error:
        assert "\\n" not in str(error) and all(word in str(error) for word in says), (what, str(error))
    else:
        raise AssertionError(f"{what} was taken")
"""


def test_none_for_a_required_tensor():
    other_process.run(
        BEGIN
        + """
for implementation, (function, arguments) in everywhere():
    for name, parameter in inspect.signature(function).parameters.items():
        if "Tensor" not in parameter.annotation:
            continue
        if "None" in parameter.annotation:
            function(**{**arguments, name: None})
        else:
            refused(lambda: function(**{**arguments, name: None}), (function.__name__, name), "must be a", "got None")
    op, args = dispatched(function, arguments)
    for i, argument in enumerate(op._schema.arguments):
        if str(argument.type) == "Tensor":
            refused(lambda: op(*args[:i], None, *args[i + 1 :]), (op, argument.name), argument.name, "must be a tensor, got None")
"""
    )


def test_a_wrong_type():
    other_process.run(
        BEGIN
        + """
for function, arguments in calls().items():
    for name, parameter in inspect.signature(function).parameters.items():
        if "Tensor" in parameter.annotation:
            for wrong in ("text", [1.0], 3, torch.ones(3).numpy()):
                refused(lambda: function(**{**arguments, name: wrong}), (function.__name__, name), f"{name} must be a", "got " + type(wrong).__name__)
refused(lambda: ops_rms_norm(torch.ones(2, 8), torch.ones(8), eps="x"), "eps", "eps must be a float, got str")
""".replace("ops_rms_norm", "__import__('klfast.ops').ops.rms_norm")
    )


def test_an_error_that_is_no_wrong_type_passes():
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        ops.rms_norm(torch.ones(2, 8))


def test_a_tensor_without_memory():
    other_process.run(
        BEGIN
        + """
import dataclasses
def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t
for implementation, (function, arguments) in everywhere():
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            refused(lambda: function(**{**arguments, name: freed(value)}), (function.__name__, name), "has no memory")
        elif name == "qt":
            for part in range(len(value.parts)):
                qt = dataclasses.replace(value, parts=[freed(t) if i == part else t for i, t in enumerate(value.parts)])
                refused(lambda: function(**{**arguments, name: qt}), (function.__name__, part), "has no memory")
"""
    )


def test_what_is_no_dense_tensor():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    for wrong in (weight.to_sparse(), weight.to_sparse_csr(), weight.to_mkldnn()):
        with pytest.raises(InvalidInputError, match="linear: weight must be a dense tensor, got layout"):
            ops.linear(x, wrong)
    with pytest.raises(InvalidInputError, match="weight must be float32"):
        ops.linear(x, torch.quantize_per_tensor(weight, 0.1, 0, torch.quint8))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_tensors_count_as_zeros(implementation):
    zeros, x = torch._efficientzerotensor((2, 3, 8)), torch.randn(2, 3, 8)
    with using(implementation):
        assert not ops.rms_norm(zeros, torch.ones(8)).any()
        assert not ops.linear(x, torch._efficientzerotensor((5, 8))).any()


# What is written in place ------------------------------------------------------------------------------------------

WRITTEN = {
    "causal_conv1d_fn": "final_states_out",
    "causal_conv1d_update": "conv_state",
    "selective_state_update": "state",
}


def written_calls():
    found = {function: arguments for function, arguments in calls().items() if function.__name__ in WRITTEN}
    assert {op._schema.name for op in (dispatched(*call)[0] for call in calls().items()) if op._schema.is_mutable} == {
        dispatched(*call)[0]._schema.name for call in found.items()
    }
    return [(function, arguments, WRITTEN[function.__name__]) for function, arguments in found.items()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_states_that_must_not_be_written(implementation):
    with using(implementation):
        for function, arguments, name in written_calls():
            state = torch.randn(arguments[name].shape)

            def call(state):
                return function(**{**arguments, name: state})  # noqa: B023

            for overlapping in (
                state[:1].expand(state.shape),
                state[..., :1].expand(state.shape),
                torch.zeros(99).as_strided(state.shape, [1] * state.dim()),
            ):
                before = overlapping.clone()
                with pytest.raises(
                    InvalidInputError, match=f"{name} is written in place, but several of its elements share memory"
                ):
                    call(overlapping)
                assert torch.equal(overlapping, before)
            leaf = state.clone().requires_grad_()
            for graph in (leaf, leaf * 2, leaf[:]):
                with pytest.raises(InvalidInputError, match=f"{name} is written in place and must not require grad"):
                    call(graph)
            with torch.no_grad():
                call(leaf)
            assert not torch.equal(leaf, state)
            strided = torch.stack([state, state], 1)[:, 1]
            call(strided)  # neither contiguous nor overlapping
            plain = state.clone()
            call(plain)
            assert torch.equal(strided, plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autograd_finds_a_saved_state_changed(implementation):
    with using(implementation):
        for function, arguments, name in written_calls():
            factor = torch.ones((), requires_grad=True)
            product = factor * arguments[name]
            function(**arguments)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()
            with torch.inference_mode():
                function(**{**arguments, name: arguments[name].clone()})


def test_negated_views():
    """``z.conj().imag`` is z.imag with its negation still to be done: read as such, refused where it is to be written."""
    for function, arguments, name in written_calls():
        z = torch.complex(*torch.randn(2, *arguments["x"].shape))
        plain, negated = arguments[name].clone(), arguments[name].clone()
        expected = function(**{**arguments, name: plain, "x": -z.imag})
        assert torch.equal(function(**{**arguments, name: negated, "x": z.conj().imag}), expected) and torch.equal(
            negated, plain
        )
        with pytest.raises(InvalidInputError, match=f"{name} is written in place and must not be a negated view"):
            function(**{**arguments, name: torch.complex(plain, plain).conj().imag})
