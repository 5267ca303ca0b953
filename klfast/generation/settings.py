"""Settings of a call of ``generate``, completed by the model's generation_config."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from klfast.core.arguments import integer, number
from klfast.core.errors import InvalidInputError
from klfast.generation import stopping
from klfast.generation.penalties import Penalties
from klfast.generation.sampling import Sampling
from klfast.models.vocabulary import vocabulary_size

# Options of generation_config that klfast ignores, with their neutral values.
_NOT_FOLLOWED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "exponential_decay_length_penalty": (),
    "penalty_alpha": (0,),
    "watermarking_config": (),
    "max_time": (),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


@dataclass(frozen=True)
class Settings:
    """Checked settings of one call; without ``sampling`` it takes the most likely tokens."""

    max_new_tokens: int
    sampling: Sampling | None
    penalties: Penalties
    ends: list[int]
    strings: list[str]
    pad: int | None


def settle(
    model: nn.Module,
    prompt_tokens: int,
    *,
    max_new_tokens: int | None,
    do_sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    presence_penalty: float | None,
    frequency_penalty: float | None,
    eos_token_id: int | Iterable[int] | None,
    stop_strings: str | Iterable[str] | None,
    pad_token_id: int | None,
) -> Settings:
    """Return the settings of a call; ``prompt_tokens`` is the prompts' width.

    Raises:
        InvalidInputError: a setting is out of range.
    """
    config = getattr(model, "generation_config", None)

    def own(given: object, name: str) -> Any:
        return getattr(config, name, None) if given is None else given

    _warn_about_ignored_options(model, config)
    ends = own(eos_token_id, "eos_token_id")
    ends = [] if ends is None else stopping.end_tokens(ends)
    pad = own(pad_token_id, "pad_token_id")
    strings = own(stop_strings, "stop_strings")
    return Settings(
        max_new_tokens=_length(config, prompt_tokens)
        if max_new_tokens is None
        else integer("max_new_tokens", max_new_tokens, 0),
        sampling=_sampling(do_sample, temperature, {"top_k": top_k, "top_p": top_p, "min_p": min_p}, own),
        penalties=Penalties.checked(own(repetition_penalty, "repetition_penalty"), presence_penalty, frequency_penalty),
        ends=ends,
        strings=[] if strings is None else stopping.stop_strings(strings),
        pad=_pad(model, pad_token_id)
        if pad_token_id is not None
        else pad
        if pad is not None
        else ends[0]
        if ends
        else None,
    )


def _sampling(
    do_sample: bool | None, temperature: float | None, given: dict[str, float | None], own: Callable[[object, str], Any]
) -> Sampling | None:
    if do_sample is not None and not isinstance(do_sample, bool):
        raise InvalidInputError(f"do_sample must be True, False or None, got {do_sample!r}")
    if temperature is not None:
        temperature = number("temperature", temperature, lambda t: t >= 0, "0 or more")
        if do_sample is not None and do_sample != (temperature > 0):
            raise InvalidInputError(
                f"temperature {temperature} and do_sample={do_sample} contradict each other; give one of them"
            )
    limits = given
    if do_sample or temperature:
        limits = {name: own(value, name) for name, value in given.items()}
    k, p, least = limits["top_k"], limits["top_p"], limits["min_p"]
    top_k = None if k is None else integer("top_k", k, 0) or None  # 0 is transformers' value for no limit
    top_p = None if p is None else number("top_p", p, lambda p: 0 < p <= 1, "above 0 and at most 1")
    min_p = None if least is None else number("min_p", least, lambda p: 0 <= p <= 1, "between 0 and 1")
    if do_sample or temperature:
        stored = own(temperature, "temperature")
        sampled_at = 1.0 if stored is None else number("temperature", stored, lambda t: t > 0, "above 0")
        return Sampling(sampled_at, top_k, top_p, min_p)
    if unused := [name for name, value in given.items() if value is not None]:
        warnings.warn(
            f"{', '.join(unused)} has no effect without sampling; give a temperature above 0", UserWarning, stacklevel=6
        )
    return None


def _length(config: object, prompt_tokens: int) -> int:
    """Return the number of new tokens by generation_config's max_new_tokens or max_length."""
    if (new := getattr(config, "max_new_tokens", None)) is not None:
        return integer("generation_config.max_new_tokens", new, 0)
    whole = getattr(config, "max_length", None)
    if whole is None:
        raise InvalidInputError("the model's generation_config sets no length; give max_new_tokens")
    whole = integer("generation_config.max_length", whole, 1)
    if whole <= prompt_tokens:
        raise InvalidInputError(
            f"the prompt's {prompt_tokens} tokens reach generation_config's max_length of {whole}; give max_new_tokens"
        )
    return whole - prompt_tokens


def _pad(model: nn.Module, given: object) -> int:
    found, vocabulary = integer("pad_token_id", given, 0), vocabulary_size(model)
    if found >= vocabulary:
        raise InvalidInputError(f"pad_token_id must lie in 0..{vocabulary - 1}, got {found}")
    return found


def _warn_about_ignored_options(model: nn.Module, config: object) -> None:
    ignored = [
        name
        for name, neutral in _NOT_FOLLOWED.items()
        if (value := getattr(config, name, None)) is not None and value not in neutral
    ]
    if ignored:
        warnings.warn(
            f"generate ignores {', '.join(ignored)} in the generation_config of {type(model).__name__}",
            UserWarning,
            stacklevel=5,
        )
