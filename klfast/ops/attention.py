"""Attention of one query per head over many keys, as in decoding; part of klfast.ops."""

from __future__ import annotations

import torch

from klfast import reference
from klfast.core.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import DecodeAttention, schema
from klfast.dispatch.checks import public, same_device
from klfast.dispatch.registry import define


def _check(a: DecodeAttention) -> None:
    q, k, v, _ = a
    for name, t, dims in (("q", q, 3), ("k", k, 4), ("v", v, 4)):
        if t.dtype not in FLOAT_DTYPES or t.dim() != dims:
            raise InvalidInputError(
                f"decode_attention: {name} must be {FLOAT_NAMES} with {dims} dimensions, got {t.dtype} {list(t.shape)}"
            )
    batch, heads, key_dim = q.shape
    groups, keys = k.shape[1:3]
    if k.shape != (batch, groups, keys, key_dim) or v.shape[:3] != k.shape[:3]:
        raise InvalidInputError(
            f"decode_attention: k must be [{batch}, groups, keys, {key_dim}] and v like k except for its last "
            f"dimension, got {list(k.shape)} and {list(v.shape)}"
        )
    if not keys or not groups or heads % groups:
        raise InvalidInputError(
            f"decode_attention: k must have at least one key and a number of groups that divides the {heads} heads, "
            f"got {list(k.shape)}"
        )
    same_device("decode_attention", q, k, v)


def _fake(a: DecodeAttention) -> torch.Tensor:
    return a.q.new_empty(*a.q.shape[:2], a.v.shape[-1])


decode_attention_op = define(
    schema("decode_attention", DecodeAttention, "Tensor"),
    arguments=DecodeAttention,
    check=_check,
    fake=_fake,
    reference=lambda a: reference.decode_attention(*a),
)


@public
def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Compute softmax(scale q k^T) v with one query per head, which sees every key; grouped heads, values of any width.

    Args:
        q: float32, bfloat16 or float16 [B, H, Dk].
        k: [B, G, S, Dk] with G a divisor of H and S at least 1; query head h takes key head h // (H / G).
        v: [B, G, S, Dv].
        scale: 1 / sqrt(Dk) by default.

    Returns:
        [B, H, Dv] in q's dtype, computed in float32.

    Raises:
        InvalidInputError: a wrong dtype, shape or device.

    Equals torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True) with q as
    [B, H, 1, Dk].
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    return decode_attention_op(q, k, v, scale)
