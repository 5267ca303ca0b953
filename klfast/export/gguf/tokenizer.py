"""A tokenizer in GGUF's metadata, where llama.cpp looks for it: BPE on bytes ("gpt2") or on text ("llama")."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.export.gguf.pre_tokenizers import pre_tokenizer_name

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's llama_token_type
_REMEDY = "export without it (--no-tokenizer), for programs that give token ids"
_SPACE = "\u2581"


def write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, model: nn.Module, pre_tokenizer: str | None
) -> list[str]:
    """Write a tokenizer into a file's metadata; return what differs, a sentence each.

    Raises:
        InvalidInputError: GGUF cannot say it.
    """
    config: Any = model.config
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        writer.add_token_list([str(token) for token in range(config.vocab_size)])  # transformers counts them
        return ["the file has no tokenizer: programs must give token ids"]
    described = _described(tokenizer)
    tokens, kinds = _tokens(described, config.vocab_size)
    if _is_on_bytes(described):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer or pre_tokenizer_name(described, _REMEDY))
        writer.add_token_merges([_merge(pair) for pair in described["model"]["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(described, tokens))
        writer.add_add_space_prefix(_SPACE in json.dumps(_prefixes(described), ensure_ascii=False))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_special(writer, tokenizer, model)
    normalizer = described.get("normalizer") or {}
    is_lossy = _is_on_bytes(described) and normalizer
    return [f"llama.cpp does not normalise text ({normalizer['type']})"] if is_lossy else []


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of tokenizer.json; raise unless it is a BPE that llama.cpp has."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise InvalidInputError(f"GGUF cannot say a {type(tokenizer).__name__}, which has no tokenizer.json; {_REMEDY}")
    described: dict[str, Any] = json.loads(fast.to_str())
    kind = described["model"]["type"]
    if kind != "BPE":
        raise InvalidInputError(f"klfast writes BPE tokenizers into GGUF files, this one is {kind}; {_REMEDY}")
    if not described["model"]["merges"]:
        raise InvalidInputError(f"llama.cpp loads no BPE without merges, as this tokenizer is; {_REMEDY}")
    if not _is_on_bytes(described) and not described["model"]["byte_fallback"]:
        raise InvalidInputError(
            f"GGUF cannot say this tokenizer, a BPE neither on bytes nor with bytes for unknown text; {_REMEDY}"
        )
    return described


def _is_on_bytes(described: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(described["pre_tokenizer"])


def _tokens(described: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """Return text and kind of each token; those that the model has beyond the tokenizer's are unused."""
    tokens, kinds = [f"[PAD{i}]" for i in range(count)], [_UNUSED] * count
    unknown = described["model"].get("unk_token")
    added = {token["content"]: token for token in described["added_tokens"]}
    known = {token: _kind_in_text(token, unknown) for token in described["model"]["vocab"]}
    known |= {text: _CONTROL if one["special"] else _USER_DEFINED for text, one in added.items()}
    if unknown in known:
        known[unknown] = _UNKNOWN
    ids = described["model"]["vocab"] | {text: one["id"] for text, one in added.items()}
    if (beyond := max(ids.values()) + 1 - count) > 0:
        raise InvalidInputError(f"the tokenizer has {beyond} tokens more than the model, {count}; {_REMEDY}")
    for text, place in ids.items():
        tokens[place], kinds[place] = text, known[text]
    return tokens, kinds


def _kind_in_text(token: str, unknown: str | None) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return _BYTE if is_byte else _UNKNOWN if token == unknown else _NORMAL


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _scores(described: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return scores by which llama.cpp, which joins the pair of the highest score, merges in the same order."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(described["model"]["merges"]):
        ranks.setdefault(_merge(pair).replace(" ", ""), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _prefixes(described: dict[str, Any]) -> list[Any]:
    """Return the steps that put a space before a text."""
    steps = [described.get("normalizer") or {}, described.get("pre_tokenizer") or {}]
    flat = [each for one in steps for each in (one.get("normalizers") or one.get("pretokenizers") or [one])]
    return [
        one
        for one in flat
        if one.get("type") == "Prepend" or (one.get("type") == "Metaspace" and one.get("prepend_scheme") != "never")
    ]


def _write_special(writer: gguf.GGUFWriter, tokenizer: Any, model: Any) -> None:
    """Write the tokens that begin and end texts, and whether a text gets them by itself."""
    ends = _ends(tokenizer, model)
    for token, write in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (ends[0] if ends else None, writer.add_eos_token_id),
        (ends[1] if ends[1:] else None, writer.add_eot_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            write(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _ends(tokenizer: Any, model: Any) -> list[int]:
    """Return the tokens that end a text, the tokenizer's first."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = given if isinstance(given, list) else [given]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *ends) if token is not None))
