"""HymbaConfig: the fields of the released config.json, and values derived from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from klfast.core.errors import InvalidInputError

_RELEASED_GROUPS = (
    (1, 2),
    (3, 4),
    (5, 6),
    (7, 8),
    (9, 10),
    (11, 12),
    (13, 14),
    (16, 17, 18),
    *((i, i + 1) for i in range(19, 31, 2)),
)


class HymbaConfig(PreTrainedConfig):
    """Configuration of a Hymba model. The defaults match nvidia/Hymba-1.5B-Base.

    Fields that the released code does not use, or overwrites, are kept but not read. Any configuration can be read;
    building a model from one that klfast does not support raises InvalidInputError.

    Attributes:
        mamba_expand, mamba_d_state, mamba_d_conv, mamba_dt_rank: sizes of the state-space branch; a rank of "auto" is
            hidden_size / 16, rounded up.
        num_memory_tokens: learned tokens before each sequence, visible from everywhere.
        sliding_window: how many positions back a layer that is not in ``global_attn_idx`` sees; None for all.
        global_attn_idx: layers that see everything.
        kv_reuse_group: groups of neighbouring layers that share the keys and values of their first.
        kv_reuse_every_i_layer: without groups, and if above 0, layer i shares unless this divides i.
        rope_type: "ntk" stretches the base by ``max_position_embeddings`` over ``orig_max_position_embeddings``;
            "default" or None does not.
    """

    model_type = "hymba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = 32001
    hidden_size: int = 1600
    intermediate_size: int = 5504
    num_hidden_layers: int = 32
    num_attention_heads: int = 25
    num_key_value_heads: int = 5
    hidden_act: str = "silu"
    mlp_hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    mamba_expand: int = 2
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_inner_layernorms: bool = True
    num_memory_tokens: int = 128
    sliding_window: int | None = 1024
    global_attn_idx: Sequence[int] | None = (0, 15, 31)
    kv_reuse_group: Sequence[Sequence[int]] | None = _RELEASED_GROUPS
    kv_reuse_every_i_layer: int = -1
    rope: bool = True
    rope_theta: float = 10000.0
    rope_type: str | None = "ntk"
    max_position_embeddings: int = 8192
    orig_max_position_embeddings: int | None = 2048

    def __post_init__(self, **kwargs: Any) -> None:
        # The release sets its attention ("flex") where transformers expects one of its own, and refers to remote code.
        for key in ("attn_implementation", "attn_implementation_new", "auto_map"):
            kwargs.pop(key, None)
        if self.global_attn_idx is not None:
            self.global_attn_idx = list(self.global_attn_idx)
        if self.kv_reuse_group is not None:
            self.kv_reuse_group = [list(group) for group in self.kv_reuse_group]
        post_init: Callable[..., None] = super().__post_init__
        post_init(**kwargs)

    @property
    def d_inner(self) -> int:
        """Channels of the state-space branch, and of the attention's output."""
        return self.mamba_expand * self.hidden_size

    @property
    def dt_rank(self) -> int:
        """Rank of the step size's projection."""
        rank = self.mamba_dt_rank
        if not isinstance(rank, str):
            return rank
        if rank != "auto":
            raise InvalidInputError(f"Hymba's mamba_dt_rank must be an integer or 'auto', got {rank!r}")
        return math.ceil(self.hidden_size / 16)

    @property
    def key_dim(self) -> int:
        """Width of a query or key head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.d_inner // self.num_attention_heads

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies, stretched if ``rope_type`` is "ntk"."""
        if self.rope_type != "ntk" or self.orig_max_position_embeddings is None:
            return self.rope_theta
        stretch = 2 * self.max_position_embeddings / self.orig_max_position_embeddings - 1
        power: float = stretch ** (self.key_dim / (self.key_dim - 2))
        return self.rope_theta * power

    def is_global(self, layer: int) -> bool:
        """Return True if a layer sees every earlier position."""
        return self.sliding_window is None or layer in (self.global_attn_idx or ())

    def owns_kv(self, layer: int) -> bool:
        """Return True if a layer computes its own keys and values, False if it uses those of the layer before it."""
        if self.kv_reuse_group is not None:
            return not any(layer in group[1:] for group in self.kv_reuse_group)
        return self.kv_reuse_every_i_layer <= 0 or layer % self.kv_reuse_every_i_layer == 0

    def passes_kv(self, layer: int) -> bool:
        """Return True if the next layer uses this one's keys and values."""
        return layer + 1 < self.num_hidden_layers and not self.owns_kv(layer + 1)

    def require_supported(self) -> None:
        """Raise InvalidInputError, naming the field, unless klfast supports this configuration."""
        for name, supported in _SUPPORTED.items():
            found = getattr(self, name, supported[0])
            if found not in supported:
                raise InvalidInputError(f"klfast's Hymba supports only {name} {supported[0]!r}, got {found!r}")
        for name, own in (("attn_hidden_size", self.hidden_size), ("kq_head_dim", self.key_dim)):
            if (found := getattr(self, name, -1)) not in (-1, own):
                raise InvalidInputError(f"klfast's Hymba supports only {name} -1 (here {own}), got {found!r}")
        for whole, part in (
            ("hidden_size", "num_attention_heads"),
            ("d_inner", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
            ("key_dim", None),
        ):
            divisor = 2 if part is None else getattr(self, part)
            if divisor < 1 or getattr(self, whole) % divisor:
                raise InvalidInputError(
                    f"Hymba's {whole} must be a multiple of {part or 2}, got {getattr(self, whole)} and {divisor}"
                )
        if self.rope and self.rope_type == "ntk" and (self.key_dim < 4 or not self.orig_max_position_embeddings):
            raise InvalidInputError(
                "Hymba's rope_type 'ntk' needs orig_max_position_embeddings and query heads of 4 or more channels"
            )
        if self.sliding_window is not None and self.global_attn_idx is None:
            raise InvalidInputError(
                "Hymba's global_attn_idx must be a list if sliding_window is set; give [] if every layer slides"
            )
        self._require_neighbours()

    def _require_neighbours(self) -> None:
        for group in self.kv_reuse_group or ():
            if (
                not group
                or list(group) != list(range(group[0], group[0] + len(group)))
                or group[0] < 0
                or group[-1] >= self.num_hidden_layers
            ):
                raise InvalidInputError(
                    f"the layers of each kv_reuse_group must be neighbours within 0..{self.num_hidden_layers - 1}, "
                    f"got {group}"
                )
        members = [layer for group in self.kv_reuse_group or () for layer in group]
        if len(members) > len(set(members)):
            raise InvalidInputError("a layer must not be in two groups of kv_reuse_group")
        for layer in range(1, self.num_hidden_layers):
            if not self.owns_kv(layer) and self.is_global(layer) != self.is_global(layer - 1):
                raise InvalidInputError(
                    f"layers {layer - 1} and {layer} share keys and values, "
                    "so both or neither must be in global_attn_idx"
                )


_SUPPORTED: dict[str, tuple[object, ...]] = {
    "mlp_hidden_act": ("silu",),
    "hidden_act": ("silu",),
    "num_experts": (1,),
    "num_mamba": (1,),
    "kq_norm": ("none", None),
    "memory_tokens_interspersed_every": (0, -1, None),
    "attention_dropout": (0, None),
    "rope_type": ("ntk", "default", None),
}
