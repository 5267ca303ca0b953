"""What a Hymba model keeps between the tokens of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from klfast.core.errors import InvalidInputError
from klfast.models.hymba.configuration import HymbaConfig
from klfast.models.hymba.padding import Padding


@dataclass
class LayerState:
    """Attributes: conv [B, D, d_conv], the last inputs of the convolution; ssm, float32 [B, D, N]; keys (rotated) and
    values [B, kv_heads, S, width], None in layers that take those of another.
    """

    conv: torch.Tensor | None = None
    ssm: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None


class HymbaCache:
    """The state of a batch of sequences; what ``past_key_values`` is for HymbaForCausalLM.

    A layer with a sliding window keeps the keys of the memory tokens and of the last ``sliding_window`` positions. A
    layer that shares another's keys keeps none.

    Attributes:
        layers: a LayerState for each.
        length: tokens seen so far in each row, padding included, memory tokens not.
        positions: for global (True) and sliding (False) layers the positions of the kept keys, int64 [B or 1, S].
    """

    is_compileable = False  # asked by transformers

    def __init__(self, config: HymbaConfig) -> None:
        self._config = config
        self.layers = [LayerState() for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.positions: dict[bool, torch.Tensor] = {}
        self._next: torch.Tensor | None = None  # position of the next token, [B or 1, 1]
        self._padding: Padding | None = None

    @property
    def padded(self) -> bool:
        """Whether there was padding."""
        return self._padding is not None

    def require_padding(self, mask: torch.Tensor) -> None:
        """Raise unless an attention mask [B, length] of what the cache has seen has as much padding as that had."""
        made_with = 0 if self._padding is None else self._padding.counts
        if not bool(((mask == 0).sum(1, keepdim=True) == made_with).all()):
            raise InvalidInputError(
                "attention_mask has other padding than the Hymba cache was made with; start it with this mask"
            )

    def begin(
        self, length: int, batch: int, device: torch.device, padding: Padding | None
    ) -> tuple[torch.Tensor, dict[bool, torch.Tensor]]:
        """Positions [B or 1, L] of what comes now, and for each kind of layer those of all keys it will then attend to."""
        if not self.length:
            self._padding = padding
            positions = padding.positions() if padding else torch.arange(length, device=device).unsqueeze(0)
            return positions, {True: positions, False: positions}
        if padding is not None:
            raise InvalidInputError("a Hymba cache takes padding only in the call that starts it")
        if (found := len(self.layers[0].conv)) != batch:
            raise InvalidInputError(f"the Hymba cache holds {found} sequences, got {batch}; start a new one")
        positions = self._next + torch.arange(length, device=device)
        return positions, {kind: torch.cat((kept, positions), dim=1) for kind, kept in self.positions.items()}

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values for this call's queries; what later ones need is kept."""
        state = self.layers[layer]
        if state.keys is not None:
            keys, values = keep = torch.cat((state.keys, keys), dim=2), torch.cat((state.values, values), dim=2)
        elif self._padding is not None:
            keep = tuple(self._padding.memory_first(t, dim=2) for t in (keys, values))
        else:  # a copy: the values are a view of a whole projection
            keep = tuple(t.clone(memory_format=torch.contiguous_format) for t in (keys, values))
        state.keys, state.values = (self._kept(t.detach(), layer, dim=2) for t in keep)
        return keys, values

    def finish(self, tokens: int, positions: torch.Tensor, keys: dict[bool, torch.Tensor]) -> None:
        """After all layers: note the positions of what they kept. ``tokens`` were new, memory tokens not counted."""
        if not self.length and self._padding is not None:
            keys = {kind: self._padding.memory_first(found, dim=1) for kind, found in keys.items()}
        self.positions = {kind: found if kind else self._trim(found, dim=1) for kind, found in keys.items()}
        self._next = positions[:, -1:] + 1
        self.length += tokens

    def _kept(self, t: torch.Tensor, layer: int, dim: int) -> torch.Tensor:
        return t if self._config.is_global(layer) else self._trim(t, dim)

    def _trim(self, t: torch.Tensor, dim: int) -> torch.Tensor:
        """The memory tokens and the last ``sliding_window`` places, if there are more."""
        memory, window = self._config.num_memory_tokens, self._config.sliding_window
        size = t.shape[dim]
        if window is None or size <= memory + window:
            return t
        return torch.cat((t.narrow(dim, 0, memory), t.narrow(dim, size - window, window)), dim=dim)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept tensors but the positions."""
        return sum(t.numel() * t.element_size() for state in self.layers for t in vars(state).values() if t is not None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, as transformers asks for it."""
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows ``beam_idx`` [B], in that order, as beam search asks for it."""
        for state in self.layers:
            for name, t in vars(state).items():
                if t is not None:
                    setattr(state, name, t.index_select(0, beam_idx.to(t.device)))
        if self._padding is not None:
            self.positions = {kind: found.index_select(0, beam_idx) for kind, found in self.positions.items()}
            self._next = self._next.index_select(0, beam_idx)
            order, counts = (t.index_select(0, beam_idx) for t in (self._padding.order, self._padding.counts))
            self._padding = replace(self._padding, order=order, counts=counts)


def state_bytes(config: HymbaConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that a HymbaCache holds for one sequence after ``tokens`` tokens, in a model of ``dtype``.

    ``state_bytes(config, n + 1) - state_bytes(config, n)`` is what one more token costs: beyond the window, only the
    keys and values of the global layers.
    """
    seen = config.num_memory_tokens + tokens
    window = seen if config.sliding_window is None else min(seen, config.num_memory_tokens + config.sliding_window)
    width = config.num_key_value_heads * (config.key_dim + config.value_dim)
    owners = [layer for layer in range(config.num_hidden_layers) if config.owns_kv(layer)]
    attention = sum((seen if config.is_global(layer) else window) * width for layer in owners)
    conv = config.num_hidden_layers * config.d_inner * config.mamba_d_conv
    return (attention + conv) * dtype.itemsize + config.num_hidden_layers * config.d_inner * config.mamba_d_state * 4
