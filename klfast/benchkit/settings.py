"""Options of a run of the suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from klfast.core.arguments import parse_bytes

if TYPE_CHECKING:
    import pytest


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(k), int(n)) for k, n in (part.split("x") for part in text.split(",")))


def add_options(parser: pytest.Parser) -> None:
    """Add the suite's options to pytest."""
    group = parser.getgroup("klfast bench")
    group.addoption(
        "--quick",
        action="store_true",
        help="one small case per suite and little memory: a quick check of about a minute",
    )
    group.addoption(
        "--device", default="auto", help="cpu, cuda or xpu; auto uses an accelerator if there is one, else the CPU"
    )
    group.addoption("--isa", help="pin klfast to a CPU tier, such as avx2")
    group.addoption("--threads", type=int, help="CPU threads of every contender; torch decides by default")
    group.addoption(
        "--working-set",
        type=parse_bytes,
        help="memory that each contender's weights rotate through (1GB; 64MB with --quick)",
    )
    group.addoption("--seconds", type=float, help="time for the rounds of one contender (0.5; 0.05 with --quick)")
    group.addoption("--shapes", type=_shapes, help="linear layers as KxN,KxN")
    group.addoption("--rows", type=_sizes, help="rows of x (M) as 1,8,128")
    group.addoption(
        "--models", help="models of decode, families and serve, by the beginnings of their names: qwen3.5,lfm2"
    )
    group.addoption("--out", type=Path, default=Path("klfast-bench"), help="folder for the results, created if needed")
    group.addoption(
        "--compare", type=Path, help="folder of an earlier run; differences are shown and written to compare.md"
    )
    group.addoption("--llama-cpp", type=Path, help="llama.cpp's llama-bench, or the folder that holds it")
    group.addoption(
        "--gguf",
        type=Path,
        action="append",
        default=[],
        help="a model for llama-bench; its file name starts with the model's name (random weights in Q4_0 by default)",
    )


@dataclass(frozen=True)
class Settings:
    """Options of a run with defaults filled in; without ``shapes`` (K, N), ``rows`` or ``models``, the suite's own."""

    quick: bool = False
    device: str = "cpu"
    isa: str | None = None
    threads: int = 1
    working_set: int = 1_000_000_000
    seconds: float = 0.5
    shapes: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    out: Path = Path("klfast-bench")
    compare: Path | None = None
    llama_cpp: Path | None = None
    gguf: tuple[Path, ...] = ()

    def takes(self, model: str) -> bool:
        """Return whether a model is to be timed."""
        return not self.models or model.startswith(self.models)

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        """Return the settings in pytest's config."""
        get = config.getoption
        quick = get("quick")
        device = get("device")
        if device == "auto":
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = "cpu" if accelerator is None else accelerator.type
        return cls(
            quick,
            device,
            get("isa"),
            get("threads") or torch.get_num_threads(),
            get("working_set") or (64_000_000 if quick else 1_000_000_000),
            get("seconds") or (0.05 if quick else 0.5),
            get("shapes") or (),
            get("rows") or (),
            tuple(get("models").split(",")) if get("models") else (),
            get("out"),
            get("compare"),
            get("llama_cpp"),
            tuple(get("gguf")),
        )
