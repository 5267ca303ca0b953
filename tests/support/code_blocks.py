"""Code blocks of README and docs, and the commands in their prose.

A block that cannot run here has a comment in the line before it, which readers do not see:
<!-- not run: needs an Intel GPU -->
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
_INLINE = re.compile(r"`(klfast [^`]+)`")
_DRAWN = ("mermaid",)


@dataclass(frozen=True)
class Block:
    """A code block: its language ("" is the shell's), its text, and why it is not run, None if it is."""

    language: str
    code: str
    reason: str | None


def blocks(page):
    """Return the code blocks of a page, without drawings."""
    found = [Block(m["language"], m["code"], m["reason"]) for m in _FENCE.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language not in _DRAWN]


def lines(code):
    """Return a shell block's commands as lists of words, without comments."""
    return [words for line in code.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def klfast_commands(page):
    """Return all of klfast's commands on a page, in blocks and in prose, as lists of words without "klfast"."""
    text = page.read_text(encoding="utf-8")
    prose = [shlex.split(" ".join(found.split())) for found in _INLINE.findall(_FENCE.sub("", text))]
    shell = [words for block in blocks(page) if not block.language for words in lines(block.code)]
    return [words[words.index("klfast") + 1 :] for words in [*prose, *shell] if "klfast" in words]
