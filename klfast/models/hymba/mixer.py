"""The mixer of a Hymba layer: attention and Mamba on one projection of the input, with averaged normed outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from klfast.models.hymba import ssm
from klfast.models.hymba.attention import Mask, attend, rotate
from klfast.models.hymba.cache import HymbaCache
from klfast.models.hymba.configuration import HymbaConfig
from klfast.models.hymba.norm import HymbaRMSNorm
from klfast.nn import mamba_step
from klfast.nn.dense_product import dense_product

SharedKV = tuple[torch.Tensor, torch.Tensor]


class HymbaMixer(nn.Module):
    """Maps [B, L, H] to [B, L, H]. Module and parameter names are those of the released checkpoints.

    The rows of ``in_proj`` are, in this order: queries, keys and values (only in layers that own them), the input of
    the convolution, the gate of the state-space branch.
    """

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.key_dim, self.value_dim = (
            layer,
            config.num_attention_heads,
            config.key_dim,
            config.value_dim,
        )
        self.owns_kv = config.owns_kv(layer)
        width, inner, states, rank = config.hidden_size, config.d_inner, config.mamba_d_state, config.dt_rank
        kv_heads = config.num_key_value_heads
        self.rows = {"q": width, "k": kv_heads * self.key_dim, "v": kv_heads * self.value_dim, "x": inner, "z": inner}
        if not self.owns_kv:
            del self.rows["k"], self.rows["v"]
        self.split = (rank, states, states)

        self.in_proj = nn.Linear(width, sum(self.rows.values()), bias=config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(inner, inner, config.mamba_d_conv, groups=inner, bias=config.mamba_conv_bias)
        self.x_proj = nn.ModuleList([nn.Linear(inner, sum(self.split), bias=False)])
        self.dt_proj = nn.ModuleList([nn.Linear(rank, inner, bias=True)])
        self.A_log = nn.ParameterList([nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))])
        self.D = nn.ParameterList([nn.Parameter(torch.ones(inner))])
        self.dt_layernorm: HymbaRMSNorm | None
        self.B_layernorm: HymbaRMSNorm | None
        self.C_layernorm: HymbaRMSNorm | None
        self.dt_layernorm, self.B_layernorm, self.C_layernorm = (
            HymbaRMSNorm(part, config.rms_norm_eps) if config.mamba_inner_layernorms else None for part in self.split
        )
        self.pre_avg_layernorm1 = HymbaRMSNorm(inner, config.rms_norm_eps)
        self.pre_avg_layernorm2 = HymbaRMSNorm(inner, config.rms_norm_eps)
        self.out_proj = nn.Linear(inner, width, bias=config.mamba_proj_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared_kv: SharedKV | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: Mask,
        padding: torch.Tensor | None,
        cache: HymbaCache | None,
    ) -> tuple[torch.Tensor, SharedKV]:
        """Return the output and the keys and values that were attended to.

        Args:
            hidden_states: [B, L, H].
            shared_kv: keys and values of the layer before; used only by a layer without its own.
            rotary: cos and sin, from ``rotary_tables``.
            attention_mask: which keys each query sees, from ``attention.attention_mask``.
            padding: bool [B, L, 1], true for padding; None if there is none.
            cache: state of the tokens before; extended.
        """
        parts = dict(zip(self.rows, self.in_proj(hidden_states).split(tuple(self.rows.values()), dim=-1), strict=True))
        q = rotate(self._heads(parts["q"], self.key_dim), rotary)
        if self.owns_kv:
            shared_kv = rotate(self._heads(parts["k"], self.key_dim), rotary), self._heads(parts["v"], self.value_dim)
            if cache is not None:
                shared_kv = cache.extend(self.layer, *shared_kv)
        assert shared_kv is not None  # a layer without its own follows one that passes them on
        attended = attend(q, *shared_kv, attention_mask)
        offloaded = "_hf_hook" in self._modules["conv1d"].__dict__
        with self._weights_loaded() if offloaded else nullcontext():
            scanned = self._state_space(parts["x"], parts["z"], padding, cache)
        fused = (self.pre_avg_layernorm1(attended) + self.pre_avg_layernorm2(scanned)) / 2
        return self.out_proj(fused), shared_kv

    def _heads(self, x: torch.Tensor, width: int) -> torch.Tensor:
        heads: torch.Tensor = x.unflatten(-1, (-1, width))
        return heads.transpose(1, 2)

    @contextmanager
    def _weights_loaded(self) -> Iterator[None]:
        """Load the weights used here without calling their module, if accelerate offloads them until it is called."""
        used = (self.conv1d, self.dt_proj[0], self.A_log, self.D)
        modules: list[Any] = [module for module in used if hasattr(module, "_hf_hook")]
        for module in modules:
            module._hf_hook.pre_forward(module)
        try:
            yield
        finally:
            for module in modules:
                module._hf_hook.post_forward(module, None)

    def _state_space(
        self, x: torch.Tensor, z: torch.Tensor, padding: torch.Tensor | None, cache: HymbaCache | None
    ) -> torch.Tensor:
        """Apply silu(convolution), then the selective scan, gated by z; return [B, L, D]."""
        state = None if cache is None else cache.layers[self.layer]
        conv, before = (None, None) if state is None else (state.conv, state.ssm)  # both None before the first tokens
        if conv is not None and before is not None and x.shape[1] == 1 and padding is None:
            parts = self._parts()
            step = None if parts is None else mamba_step.prepare(self, parts, x, conv, before)
            if step is not None:
                return step(x[:, 0], z[:, 0], conv, before).unsqueeze(1)
        if padding is not None:
            x = x.masked_fill(padding, 0)
        weight = self.conv1d.weight.squeeze(1)
        u = ssm.convolve(x.transpose(1, 2), weight, self.conv1d.bias, conv).transpose(1, 2)
        if padding is not None:
            u = u.masked_fill(padding, 0)  # an input of zero leaves a state of zeros unchanged

        dt, B, C = self.x_proj[0](u).split(self.split, dim=-1)
        if self.dt_layernorm is not None and self.B_layernorm is not None and self.C_layernorm is not None:
            dt, B, C = self.dt_layernorm(dt), self.B_layernorm(B), self.C_layernorm(C)
        projection: Any = self.dt_proj[0]
        delta = dense_product(dt, projection.weight)  # its bias is added in float32
        A = -torch.exp(self.A_log[0].float())
        u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
        y, last = ssm.scan(u, delta, A, B, C, self.D[0], z, projection.bias, before, state is not None)
        if state is not None:
            state.ssm = last
            if conv is None:
                state.conv = ssm.last_inputs(x.transpose(1, 2), self.conv1d.kernel_size[0])
        return y.transpose(1, 2)

    def _parts(self) -> mamba_step.Parts | None:
        """Return the parts of a decoding step; None if a norm is of a kind that a step does not compute."""
        norms: tuple[Any, ...] = (
            () if self.dt_layernorm is None else (self.dt_layernorm, self.B_layernorm, self.C_layernorm)
        )
        if not all(type(norm) is HymbaRMSNorm and norm.eps == norms[0].eps for norm in norms):
            return None
        A_log: tuple[dict[str, Any], str] = (self.A_log._parameters, "0")
        D: tuple[dict[str, Any], str] = (self.D._parameters, "0")
        return mamba_step.Parts(
            self.conv1d, self.x_proj[0], self.dt_proj[0], A_log, D, norms[0].eps if norms else None, norms
        )
