"""Damage to files: of their bytes, of the tree of their JSON, of the header of a safetensors file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from typing import Any

_NUMBERS = (-1, 0, 1, 3, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40, 0.5, 1e-320, 1e308, -1e308)
_TEXTS = ("", "a" * 5000, "\0", "../x", "/etc/passwd", "\ud800", "int4-g64-sym", "int9", "float32", "NaN", "é\n\r{{1}}")
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": 0}, float("nan"), float("inf"))
_NASTY: tuple[Any, ...] = (*_NUMBERS, *_TEXTS, *_OTHERS)
_INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return a damaged copy of a file's content; a digest that JSON carries is often made to fit again."""
    kinds = (
        [_bytes_mutated] + [_json_mutated] * 3 * (data[:1] in (b"{", b"[")) + [_header_mutated] * 2 * _has_header(data)
    )
    return chance.choice(kinds)(data, chance)


def _has_header(data: bytes) -> bool:
    return data[8:9] == b"{" and 8 + int.from_bytes(data[:8], "little") <= len(data)


def _header_mutated(data: bytes, chance: random.Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = _json_mutated(data[8:end], chance)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _json_mutated(data: bytes, chance: random.Random) -> bytes:
    tree = json.loads(data)
    signed = isinstance(tree, dict) and "sha256" in tree
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        tree = _tree_mutated(tree, chance)
    if signed and isinstance(tree, dict) and chance.random() < 0.7:
        content = {name: value for name, value in tree.items() if name != "sha256"}
        with contextlib.suppress(TypeError, ValueError):
            text = json.dumps(content, sort_keys=True, separators=(",", ":"))
            tree["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    text = json.dumps(tree)
    if chance.random() < 0.02:
        text = text.replace("0", chance.choice(("[" * 100_000, "1" * 10_000, "0" * 300, "1e999", "-", "0x1")), 1)
    return text.encode("utf-8", "surrogatepass")


def _tree_mutated(tree: Any, chance: random.Random) -> Any:
    """Change one place of a tree of JSON; the copy shares the rest."""
    if not isinstance(tree, (dict, list)) or not tree or chance.random() < 0.05:
        return _value_mutated(tree, chance)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, copy = chance.choice(keys), tree.copy()
    what = chance.random()
    if what < 0.08:
        del copy[key]
    elif what < 0.16 and isinstance(copy, dict):
        copy[chance.choice((*_TEXTS, str(key) + "x", str(key)[:-1]))] = copy.pop(key)
    elif what < 0.24:
        copy[key] = tree[chance.choice(keys)]
    elif what < 0.3 and isinstance(copy, list):
        copy.insert(chance.randrange(len(copy) + 1), copy[key])
    else:
        copy[key] = _tree_mutated(copy[key], chance)
    return copy


def _value_mutated(value: Any, chance: random.Random) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and chance.random() < 0.5:
        return chance.choice((value + 1, -value, value * 2, value * 10**6, float(value), str(value), [value]))
    if isinstance(value, str) and value and chance.random() < 0.5:
        at = chance.randrange(len(value))
        return value[:at] + chance.choice(("", "0", "9", "-", "\0", "é", value)) + value[at + chance.choice((0, 1)) :]
    return chance.choice(_NASTY)


def _bytes_mutated(data: bytes, chance: random.Random) -> bytes:
    """Change, insert, remove or repeat some bytes, near the beginning in one half of cases; or cut the rest off."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        end = min(len(found), chance.choice((64, 1024, len(found)))) if found else 0
        at, length = chance.randint(0, end), chance.choice((1, 2, 4, 8, 8, 30, 300))
        what = chance.randrange(7)
        if what == 0 and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            found[at : at + length] = chance.randbytes(length)
        elif what == 2:
            width = chance.choice((1, 2, 4, 8))
            found[at : at + width] = (chance.choice(_INTEGERS) % 256**width).to_bytes(width, "little")
        elif what == 3:
            del found[at : at + length]
        elif what == 4:
            found[at:at] = found[at : at + length]
        elif what == 5:
            other = chance.randint(0, end)
            found[at : at + length] = found[other : other + length]
        elif chance.random() < 0.3:
            del found[at:]
    return bytes(found)
