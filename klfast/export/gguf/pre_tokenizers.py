"""How a tokenizer splits text before it merges bytes, in llama.cpp's words.

llama.cpp knows a fixed list of ways by name (src/llama-vocab.cpp); here are those whose tokenizer.json says the same.
"""

from __future__ import annotations

from typing import Any

from klfast.core.errors import InvalidInputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)
_GPT2 = "GPT-2's expression"
# By the steps, and whether a piece that is a token itself is not merged.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("each digit", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
}


def pre_tokenizer_name(described: dict[str, Any], remedy: str) -> str:
    """Return llama.cpp's name for the way in which a tokenizer (the content of tokenizer.json) splits text.

    Raises:
        InvalidInputError: it is none of those above.
    """
    steps = tuple(step for one in _flat(described["pre_tokenizer"]) if (step := _step(one)) is not None)
    name = _NAMES.get((steps, bool(described["model"].get("ignore_merges"))))
    if name is None:
        raise InvalidInputError(
            "klfast does not know what llama.cpp calls the way in which this tokenizer splits text; name it with "
            f"--pre-tokenizer, or {remedy}"
        )
    return name


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for one in step["pretokenizers"] for each in _flat(one)] if step["type"] == "Sequence" else [step]


def _step(one: dict[str, Any]) -> str | None:
    """Return what a step of the pre-tokenizer does; None for the step to bytes, which llama.cpp does last."""
    if one["type"] == "ByteLevel":
        if one["add_prefix_space"]:
            return "a space before the text"
        return _GPT2 if one["use_regex"] else None
    if one["type"] == "Digits" and one["individual_digits"]:
        return "each digit"
    if one["type"] == "Split" and one["behavior"] == "Isolated" and not one["invert"]:
        return str(one["pattern"].get("Regex"))
    return str(one)
