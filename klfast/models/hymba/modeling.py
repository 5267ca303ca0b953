"""HymbaModel and HymbaForCausalLM, transformers classes with the tensor names of the released checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import generic

from klfast.core.errors import InvalidInputError
from klfast.models.hymba.attention import Mask, rotary_tables
from klfast.models.hymba.attention import attention_mask as key_mask
from klfast.models.hymba.cache import HymbaCache
from klfast.models.hymba.configuration import HymbaConfig
from klfast.models.hymba.mixer import HymbaMixer, SharedKV
from klfast.models.hymba.norm import HymbaRMSNorm
from klfast.models.hymba.padding import Padding

_Forward = TypeVar("_Forward", bound=Callable[..., object])
_can_return_tuple: Callable[[_Forward], _Forward] = generic.can_return_tuple
# The cache's name in transformers' outputs: "cache" since 5.24, "past_key_values" before. Forwards take either.
_CACHE = next(found.name for found in fields(CausalLMOutputWithPast) if found.name in ("cache", "past_key_values"))


class HymbaMLP(nn.Module):
    """Gated feed-forward layer: down_proj(silu(gate_proj x) * up_proj x)."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H]."""
        y: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class HymbaExperts(nn.Module):
    """The feed-forward part. The checkpoints call it a mixture of experts; there is one, without a router."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([HymbaMLP(config)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H]."""
        y: torch.Tensor = self.experts[0](x)
        return y


class HymbaLayer(nn.Module):
    """One block. Beside the hidden states it returns the keys and values that the next block takes, or None."""

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        self.passes_kv = config.passes_kv(layer)
        self.input_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mamba = HymbaMixer(config, layer)
        self.pre_moe_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = HymbaExperts(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared_kv: SharedKV | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: Mask = None,
        padding: torch.Tensor | None = None,
        cache: HymbaCache | None = None,
    ) -> tuple[torch.Tensor, SharedKV | None]:
        """Run the block; arguments as for HymbaMixer."""
        mixed, kv = self.mamba(self.input_layernorm(hidden_states), shared_kv, rotary, attention_mask, padding, cache)
        hidden_states = hidden_states + mixed
        hidden_states = hidden_states + self.moe(self.pre_moe_layernorm(hidden_states))
        return hidden_states, kv if self.passes_kv else None


class HymbaPreTrainedModel(PreTrainedModel):
    """Base class that tells transformers how to initialise and split Hymba models."""

    config: HymbaConfig
    config_class = HymbaConfig
    base_model_prefix = "model"
    _no_split_modules = ["HymbaLayer"]  # noqa: RUF012  (as PreTrainedModel declares it)
    _supports_sdpa = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, HymbaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, HymbaMixer):
            states = self.config.mamba_d_state
            init.copy_(module.A_log[0], torch.arange(1.0, states + 1).log().expand(self.config.d_inner, -1))
            init.ones_(module.D[0])
        elif isinstance(module, HymbaModel) and module.memory_tokens is not None:
            init.normal_(module.memory_tokens, mean=0.0, std=1.0)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # so that generate() leaves the cache to the model


class HymbaModel(HymbaPreTrainedModel):
    """Embedding, memory tokens, layers and final norm."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        config.require_supported()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        memory = torch.randn(config.num_memory_tokens, config.hidden_size)
        self.memory_tokens = nn.Parameter(memory) if config.num_memory_tokens else None
        self.layers = nn.ModuleList([HymbaLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.final_layernorm = HymbaRMSNorm(config.hidden_size, config.rms_norm_eps)
        PreTrainedModel.post_init(self)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    @_can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: HymbaCache | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Return the final hidden states [B, T, H].

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 for padding, which may be anywhere; with a filled cache also [B, past + T], with
                the padding that the cache was made with and none among the new tokens.
            position_ids: not used: positions follow from the mask and the cache.
            past_key_values: ``cache`` by its name in transformers before 5.24.
            inputs_embeds: [B, T, H], in place of input_ids.
            use_cache: return a cache; the configuration's ``use_cache`` if None.
            output_hidden_states: also return the input of each layer and the final hidden states, [B, M + T, H] each,
                M memory tokens first.
            cache: a HymbaCache, extended in place; None starts a sequence.
            **kwargs: ignored.

        Raises:
            InvalidInputError: both or neither of ids and embeddings, no tokens at all, an invalid mask or cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidInputError("give either input_ids or inputs_embeds")
        if cache is not None and past_key_values is not None:
            raise InvalidInputError("cache and past_key_values are the same; give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, HymbaCache):
            raise InvalidInputError(f"cache must be a klfast.models.hymba.HymbaCache, got {type(cache).__name__}")
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = text.shape[:2]
        if not batch or not length:
            raise InvalidInputError(f"Hymba needs at least one sequence of one token, got {[batch, length]}")
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = HymbaCache(self.config)
        past = cache.length if cache else 0
        memory = 0 if past else self.config.num_memory_tokens
        if attention_mask is not None and cache and past and tuple(attention_mask.shape) == (batch, past + length):
            cache.require_padding(attention_mask[:, :past])
            attention_mask = attention_mask[:, past:]
        padding = Padding.of(attention_mask, (batch, length), memory)

        if cache is not None:
            positions, keys = cache.begin(memory + length, batch, text.device, padding)
        else:
            positions = (
                padding.positions() if padding else torch.arange(memory + length, device=text.device).unsqueeze(0)
            )
            keys = {True: positions, False: positions}
        hidden = self._with_memory(text, memory, padding)
        padded = padding is not None or (cache is not None and cache.padded)
        windows = {True: None, False: self.config.sliding_window}
        masks = {
            kind: key_mask(positions, keys[kind], self.config.num_memory_tokens, windows[kind], padded) for kind in keys
        }
        rotary = rotary_tables(self.config, positions, text.dtype)
        nothing = None if padding is None else (positions < 0).unsqueeze(-1)

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[torch.Tensor] = []
        shared_kv: SharedKV | None = None
        for index, layer in enumerate(self.layers):
            if wanted:
                seen.append(hidden)
            mask = masks[self.config.is_global(index)]
            hidden, shared_kv = layer(
                hidden, shared_kv=shared_kv, rotary=rotary, attention_mask=mask, padding=nothing, cache=cache
            )
        hidden = self.final_layernorm(hidden)
        if cache is not None:
            cache.finish(length, positions, keys)

        if padding is not None:
            hidden, seen = padding.restore(hidden), [padding.restore(one) for one in seen]
        all_hidden = (*seen, hidden) if wanted else None
        returned: dict[str, Any] = {_CACHE: cache, "hidden_states": all_hidden}
        return BaseModelOutputWithPast(last_hidden_state=hidden[:, memory:], **returned)

    def _with_memory(self, text: torch.Tensor, memory: int, padding: Padding | None) -> torch.Tensor:
        """Return [B, memory + T, H]: the memory tokens, unless ``memory`` is 0, and the text."""
        learned = self.memory_tokens if memory else None
        tokens = text[:, :0] if learned is None else learned.to(text.dtype).expand(len(text), -1, -1)
        return torch.cat((tokens, text), dim=1) if padding is None else padding.arrange(tokens, text)


class HymbaForCausalLM(HymbaPreTrainedModel, GenerationMixin):
    """HymbaModel with a language-model head; AutoModelForCausalLM builds it for the model type "hymba"."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (likewise)

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.model = HymbaModel(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        PreTrainedModel.post_init(self)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = value

    @_can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: HymbaCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits, float32 [B, T, vocab_size].

        Args:
            input_ids: as for HymbaModel.
            attention_mask: as for HymbaModel.
            position_ids: as for HymbaModel.
            past_key_values: as for HymbaModel.
            inputs_embeds: as for HymbaModel.
            labels: int64 [B, T], -100 for none: also return the mean cross-entropy of each next label.
            use_cache: as for HymbaModel.
            output_hidden_states: as for HymbaModel.
            logits_to_keep: return only the logits of this many last tokens (0: all), or of these places.
            cache: as for HymbaModel.
            **kwargs: for transformers' loss function.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=cache,
        )
        hidden = outputs.last_hidden_state
        places = (
            slice(-logits_to_keep if logits_to_keep else None, None)
            if isinstance(logits_to_keep, int)
            else logits_to_keep
        )
        logits = self.lm_head(hidden[:, places]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        returned: dict[str, Any] = {_CACHE: outputs.get(_CACHE), "hidden_states": outputs.hidden_states}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **returned)
