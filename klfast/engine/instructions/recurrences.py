"""``RecurrenceInstructions``: convolutions, scans and the delta rule, with their states."""

from __future__ import annotations

import torch
from torch import nn

from klfast.backends.cpu.extension import view
from klfast.engine.columns import Columns
from klfast.engine.instructions.vectors import VectorInstructions


class RecurrenceInstructions(VectorInstructions):
    """Convolutions, scans and the delta rule."""

    def convolve(self, conv: nn.Module, silu: bool, x: Columns, out: Columns, first: int = 0) -> None:
        """Apply a causal depthwise nn.Conv1d, its channels from ``first`` on; the state has the last inputs."""
        self.expect(conv, "Conv1d")
        weight, bias = self.parameters(conv, "weight", "bias")
        weight = self.copied(weight)[first : first + x.width]
        bias = None if bias is None else bias[first : first + x.width]
        channels, _, width = weight.shape
        state = self.state(width - 1, channels, dtype=self.dtype)  # steps first, as vectors of channels take them
        weight = self.keep(weight.squeeze(1).t().contiguous())
        self.program.convolve(self.name(conv), view(weight), view(bias), channels, width, silu, state, x, out)

    def selective_scan(
        self,
        name: str,
        A: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        x: Columns,
        dt: Columns,
        B: Columns,
        C: Columns,
        z: Columns,
        out: Columns,
    ) -> None:
        """Apply Mamba's recurrence, with A [D, N] in float32, D [D] and the bias of dt [D]."""
        channels, states = A.shape
        state = self.state(channels, states, dtype=torch.float32)
        self.program.selective_scan(
            name, view(self.keep(A)), view(D), view(dt_bias), channels, states, state, x, dt, B, C, z, out
        )

    def head_scan(
        self,
        name: str,
        A: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        dim: int,
        groups: int,
        dt_limit: tuple[float, float],
        x: Columns,
        dt: Columns | None,
        B: Columns,
        C: Columns,
        out: Columns,
        z: Columns | None = None,
    ) -> None:
        """Apply Mamba-2's recurrence to heads of ``dim`` channels, with A, D and the bias of dt [H].

        Without ``dt``, the bias is the step size as it is.
        """
        heads, states = len(A), B.width // groups
        state = self.state(heads, dim, states, dtype=torch.float32)
        self.program.head_scan(
            name,
            view(self.keep(A)),
            view(D),
            view(dt_bias),
            heads,
            dim,
            groups,
            states,
            *dt_limit,
            state,
            x,
            dt,
            B,
            C,
            z,
            out,
        )

    def delta_rule(
        self,
        name: str,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        largest_beta: float,
        key_heads: int,
        q: Columns,
        k: Columns,
        v: Columns,
        a: Columns,
        b: Columns,
        out: Columns,
    ) -> None:
        """Apply the gated delta rule.

        For each head g = -exp(A_log) softplus(a + dt_bias) and beta = largest_beta sigmoid(b). ``a`` and ``dt_bias``
        have one value a head, or one a channel of its keys. ``A_log`` is a tensor that ``tensors`` found.
        """
        heads = A_log.numel()
        g, beta = (self.buffer(f"delta.{part}", c.width, torch.float32) for part, c in (("g", a), ("beta", b)))
        rate = -torch.exp(self.copied(A_log).float().flatten()).repeat_interleave(a.width // heads)
        self.combine_row("add", a, dt_bias, g)
        self.combine_row("softplus_gate", g, rate, g)
        self.combine_row("sigmoid_gate", b, largest_beta, beta)
        key_dim, value_dim = k.width // key_heads, v.width // heads
        state = self.state(heads, key_dim, value_dim, dtype=torch.float32)
        self.program.delta_rule(name, key_heads, heads, key_dim, value_dim, key_dim**-0.5, state, q, k, v, g, beta, out)
