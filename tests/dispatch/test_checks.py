"""Every argument of every op: None, wrong types, tensors without memory and unwritable states are refused.

Some run in a separate process, since these once crashed it.
"""

from typing import Optional

import other_process
import pytest
import torch
from op_calls import calls, dispatched

from klfast import ops, using
from klfast.core.errors import InvalidInputError
from klfast.dispatch import checks, pins

IMPLEMENTATIONS = ["reference", *pins.available_tiers()]
BEGIN = """
import inspect, sys, torch
from op_calls import calls, dispatched
from klfast import using
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins
torch.set_num_threads(1)

def everywhere():  # each call with each implementation
    for implementation in ["reference", *pins.available_tiers()]:
        with using(implementation):
            for call in calls().items():
                yield implementation, call

def refused(call, what, *words):
    try:
        call()
    except InvalidInputError as error:
        assert "\\n" not in str(error) and all(word in str(error) for word in words), (what, str(error))
    else:
        raise AssertionError(f"{what} was accepted")
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
            without = *args[:i], None, *args[i + 1 :]
            refused(lambda: op(*without), (op, argument.name), argument.name, "must be a tensor, got None")
"""
    )


def test_wrong_types():
    other_process.run(
        BEGIN
        + """
for function, arguments in calls().items():
    for name, parameter in inspect.signature(function).parameters.items():
        if "Tensor" in parameter.annotation:
            for wrong in ("text", [1.0], 3, torch.ones(3).numpy()):
                words = f"{name} must be a", "got " + type(wrong).__name__
                refused(lambda: function(**{**arguments, name: wrong}), (function.__name__, name), *words)
from klfast import ops
refused(lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(8), eps="x"), "eps", "eps must be a float, got str")
"""
    )


def test_hints_as_python_3_10_reads_them():
    @checks.public
    def function(bias: Optional[torch.Tensor] = None):  # noqa: UP045 (3.10 makes this of "torch.Tensor | None = None")
        return bias + 1

    with pytest.raises(InvalidInputError, match="function: bias must be a tensor or None, got str"):
        function("text")


def test_errors_of_other_causes_pass_through():
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        ops.rms_norm(torch.ones(2, 8))


def test_tensors_without_memory():
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


@pytest.mark.parametrize("convert", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_tensors_that_are_not_dense(convert):
    weight = getattr(torch.randn(5, 8), convert)()
    with pytest.raises(InvalidInputError, match="linear: weight must be a dense tensor, got layout"):
        ops.linear(torch.randn(3, 8), weight)


def test_torch_quantized_tensors():
    weight = torch.quantize_per_tensor(torch.randn(5, 8), 0.1, 0, torch.quint8)
    with pytest.raises(InvalidInputError, match="weight must be float32"):
        ops.linear(torch.randn(3, 8), weight)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_tensors_count_as_zeros(implementation):
    zeros, x = torch._efficientzerotensor((2, 3, 8)), torch.randn(2, 3, 8)
    with using(implementation):
        assert not ops.rms_norm(zeros, torch.ones(8)).any()
        assert not ops.linear(x, torch._efficientzerotensor((5, 8))).any()


# Tensors written in place -------------------------------------------------------------------------------------------

WRITTEN = {
    "causal_conv1d_fn": "final_states_out",
    "causal_conv1d_update": "conv_state",
    "selective_state_update": "state",
    "gated_delta_rule_update": "state",
}


def written_call(op):
    """Return the function, its arguments and the name of the one that it writes."""
    [(function, arguments)] = [call for call in calls().items() if call[0].__name__ == op]
    return function, arguments, WRITTEN[op]


def test_written_names_all_mutable_ops():
    mutable = {function.__name__ for function, arguments in calls().items() if writes_to_one_of(function, arguments)}
    assert mutable == set(WRITTEN)


def writes_to_one_of(function, arguments):
    op, args = dispatched(function, arguments)
    written = [given for given, declared in zip(args, op._schema.arguments, strict=True) if declared.is_write]
    return any(given is argument for given in written for argument in arguments.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", WRITTEN)
def test_states_that_must_not_be_written(op, implementation):
    function, arguments, name = written_call(op)
    state = torch.randn(arguments[name].shape)

    def call(state):
        with using(implementation):
            return function(**{**arguments, name: state})

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
@pytest.mark.parametrize("op", WRITTEN)
def test_autograd_detects_changes_to_a_saved_state(op, implementation):
    function, arguments, name = written_call(op)
    with using(implementation):
        factor = torch.ones((), requires_grad=True)
        product = factor * arguments[name]
        function(**arguments)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
        with torch.inference_mode():
            function(**{**arguments, name: arguments[name].clone()})


@pytest.mark.parametrize("op", WRITTEN)
def test_negated_views(op):
    """``z.conj().imag`` is a lazily negated z.imag: it can be read, but not be written in place."""
    function, arguments, name = written_call(op)
    read = "x" if "x" in arguments else "v"
    z = torch.complex(*torch.randn(2, *arguments[read].shape))
    plain, negated = arguments[name].clone(), arguments[name].clone()
    expected = function(**{**arguments, name: plain, read: -z.imag})
    assert torch.equal(function(**{**arguments, name: negated, read: z.conj().imag}), expected)
    assert torch.equal(negated, plain)
    with pytest.raises(InvalidInputError, match=f"{name} is written in place and must not be a negated view"):
        function(**{**arguments, name: torch.complex(plain, plain).conj().imag})
