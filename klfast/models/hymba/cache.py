"""State that a Hymba model keeps between the tokens of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from klfast.core.errors import InvalidInputError
from klfast.models.hymba.configuration import HymbaConfig
from klfast.models.hymba.padding import Padding


@dataclass
class LayerState:
    """State of one layer; all None before the first tokens.

    Attributes:
        conv: the last inputs of the convolution, [B, D, d_conv].
        ssm: float32 [B, D, N].
        keys: rotated, [B, kv_heads, S, width]; None in layers that use another layer's.
        values: as keys.
    """

    conv: torch.Tensor | None = None
    ssm: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None


class HymbaCache:
    """The state of a batch of sequences: HymbaForCausalLM's ``cache``.

    A layer with a sliding window keeps the keys of the memory tokens and of the last ``sliding_window`` positions. A
    layer that shares another's keys keeps none.

    Attributes:
        layers: a LayerState for each.
        length: tokens seen so far in each row, including padding, without memory tokens.
        positions: for global (True) and sliding (False) layers the positions of the kept keys, int64 [B or 1, S].
    """

    # Read by transformers' generate: neither compiled nor shortened; every layer has keys beside its state.
    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(self, config: HymbaConfig) -> None:
        self._config = config
        self.layers = [LayerState() for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.positions: dict[bool, torch.Tensor] = {}
        self._next: torch.Tensor | None = None  # position of the next token, [B or 1, 1]
        self._padding: Padding | None = None

    @property
    def padded(self) -> bool:
        """True if there was padding."""
        return self._padding is not None

    def require_padding(self, mask: torch.Tensor) -> None:
        """Raise InvalidInputError unless an attention mask [B, length] of past tokens has the padding that they had."""
        made_with = 0 if self._padding is None else self._padding.counts
        if not bool(((mask == 0).sum(1, keepdim=True) == made_with).all()):
            raise InvalidInputError(
                "attention_mask has other padding than the Hymba cache was made with; start a new cache with this mask"
            )

    def begin(
        self, length: int, batch: int, device: torch.device, padding: Padding | None
    ) -> tuple[torch.Tensor, dict[bool, torch.Tensor]]:
        """Return positions of the incoming tokens, [B or 1, L], and of every key they can attend to, per layer kind."""
        if not self.length:
            self._padding = padding
            positions = padding.positions() if padding else torch.arange(length, device=device).unsqueeze(0)
            return positions, {True: positions, False: positions}
        if padding is not None:
            raise InvalidInputError("a Hymba cache takes padding only in the call that starts it")
        conv = self.layers[0].conv
        assert conv is not None and self._next is not None  # set by the first call
        if (found := len(conv)) != batch:
            raise InvalidInputError(f"the Hymba cache holds {found} sequences, got {batch}; start a new one")
        positions = self._next + torch.arange(length, device=device)
        return positions, {kind: torch.cat((kept, positions), dim=1) for kind, kept in self.positions.items()}

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values for this call's queries, and keep those that later calls need."""
        state = self.layers[layer]
        keep: tuple[torch.Tensor, ...]
        if state.keys is not None and state.values is not None:
            keys, values = keep = torch.cat((state.keys, keys), dim=2), torch.cat((state.values, values), dim=2)
        elif self._padding is not None:
            keep = tuple(self._padding.memory_first(t, dim=2) for t in (keys, values))
        else:  # a copy: the values are a view of a whole projection
            keep = tuple(t.clone(memory_format=torch.contiguous_format) for t in (keys, values))
        state.keys, state.values = (self._kept(t.detach(), layer, dim=2) for t in keep)
        return keys, values

    def finish(self, tokens: int, positions: torch.Tensor, keys: dict[bool, torch.Tensor]) -> None:
        """Record, after all layers, the positions of the kept keys; ``tokens`` were new, without memory tokens."""
        if not self.length and self._padding is not None:
            keys = {kind: self._padding.memory_first(found, dim=1) for kind, found in keys.items()}
        self.positions = {kind: found if kind else self._trim(found, dim=1) for kind, found in keys.items()}
        self._next = positions[:, -1:] + 1
        self.length += tokens

    def _kept(self, t: torch.Tensor, layer: int, dim: int) -> torch.Tensor:
        return t if self._config.is_global(layer) else self._trim(t, dim)

    def _trim(self, t: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the memory tokens and at most the last ``sliding_window`` places."""
        memory, window = self._config.num_memory_tokens, self._config.sliding_window
        size = t.shape[dim]
        if window is None or size <= memory + window:
            return t
        return torch.cat((t.narrow(dim, 0, memory), t.narrow(dim, size - window, window)), dim=dim)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept tensors except the positions."""
        return sum(t.numel() * t.element_size() for state in self.layers for t in vars(state).values() if t is not None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen so far; called by transformers."""
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select the rows ``beam_idx`` [B], in that order; called by beam search."""
        for state in self.layers:
            for name, t in vars(state).items():
                if t is not None:
                    setattr(state, name, t.index_select(0, beam_idx.to(t.device)))
        if self._padding is not None:
            self.positions = {kind: found.index_select(0, beam_idx) for kind, found in self.positions.items()}
            if self._next is not None:
                self._next = self._next.index_select(0, beam_idx)
            order, counts = (t.index_select(0, beam_idx) for t in (self._padding.order, self._padding.counts))
            self._padding = replace(self._padding, order=order, counts=counts)


def state_bytes(config: HymbaConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of a HymbaCache with one sequence of ``tokens`` tokens, in a model of ``dtype``.

    ``state_bytes(config, n + 1) - state_bytes(config, n)`` is the cost of one more token: beyond the window, only the
    keys and values of the global layers.
    """
    seen = config.num_memory_tokens + tokens
    window = seen if config.sliding_window is None else min(seen, config.num_memory_tokens + config.sliding_window)
    width = config.num_key_value_heads * (config.key_dim + config.value_dim)
    owners = [layer for layer in range(config.num_hidden_layers) if config.owns_kv(layer)]
    attention = sum((seen if config.is_global(layer) else window) * width for layer in owners)
    conv = config.num_hidden_layers * config.d_inner * config.mamba_d_conv
    return (attention + conv) * dtype.itemsize + config.num_hidden_layers * config.d_inner * config.mamba_d_state * 4
