"""The causal convolution: whole sequences, and steps that continue them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from ssm_truth import true_conv

from klfast import ops
from xpu.cases.case import ROUNDING, Case, error


def cases() -> Iterator[Case]:
    yield from sequences()
    yield from updates()


def sequences() -> Iterator[Case]:
    for batch, channels, length, dtype in (
        (2, 1536, 32, torch.bfloat16),
        (2, 1536, 1, torch.bfloat16),
        (3, 77, 19, torch.float32),
    ):

        def run(batch=batch, channels=channels, length=length, dtype=dtype) -> float:
            x, weight, bias = (
                torch.randn(batch, length, channels).transpose(1, 2).to(dtype),
                torch.randn(channels, 4).to(dtype),
                torch.randn(channels).to(dtype),
            )
            past = torch.randn(batch, channels, 3)
            found = ops.causal_conv1d_fn(x, weight, bias, initial_states=past, activation="silu")
            return error(found, true_conv(x, weight, bias, past, True)[0])

        yield Case(f"causal_conv1d, {str(dtype)[6:]}", f"{batch} x {channels} x {length}", run, ROUNDING[dtype])


def updates() -> Iterator[Case]:
    """Yield steps that continue sequences whose states lie in a cache, one entry without, as rings or not."""
    for length, held, dtype in ((1, 4, torch.bfloat16), (5, 9, torch.float32)):
        for rings in (False, True):

            def run(length=length, held=held, dtype=dtype, rings=rings) -> float:
                slots, seen = torch.tensor([5, -1, 0]), torch.tensor([3, 0, 1000], dtype=torch.int32)
                x, weight, bias = torch.randn(3, 77, length).to(dtype), torch.randn(77, 4).to(dtype), torch.randn(77)
                state = torch.randn(6, 77, held).to(dtype)
                after, truth = state.double(), torch.zeros(x.shape).double()
                for i in (0, 2):
                    in_order = [(int(seen[i]) * rings + t) % held for t in range(held)]
                    past = state[slots[i]][:, in_order]
                    truth[i] = true_conv(x[i : i + 1], weight, bias, past[None, :, held - 3 :], True)[0]
                    kept = torch.cat((past, x[i]), -1)[:, length:].double()
                    places = [(place + length * rings) % held for place in in_order]
                    after[slots[i]] = torch.empty(77, held).double().index_copy_(1, torch.tensor(places), kept)
                found = ops.causal_conv1d_update(x, state, weight, bias, "silu", seen if rings else None, slots)
                return max(error(found, truth), error(state, after))

            name = f"3 x 77 x {length} in a cache{', rings' * rings}"
            yield Case(f"causal_conv1d_update, {str(dtype)[6:]}", name, run, ROUNDING[dtype])
