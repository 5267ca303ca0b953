"""A bundled model with its calibration and evaluation texts, for benchmarks of rounding and plans."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import klfast

LENGTH = 256  # tokens of a window


class Bundled:
    """A bundled model in float32, and windows of the bundled texts.

    Args:
        name: the model's.
        windows: of the calibration text.
        held_out: windows of the evaluation text.
    """

    def __init__(self, name: str, windows: int, held_out: int) -> None:
        self.name, tokenizer = name, klfast.load_tokenizer(name)
        self.teacher = klfast.load_model(name, dtype="float32")
        options: dict[str, Any] = {"vocab_size": self.teacher.config.vocab_size, "length": LENGTH}
        self.calibration = torch.cat(klfast.token_batches("calibration", tokenizer, windows=windows, **options))
        self.text = klfast.token_batches("evaluation", tokenizer, windows=held_out, **options)

    def kl_of(self, student: nn.Module) -> float:
        """Return a student's KL divergence from the model on the evaluation text, in nats a token."""
        kl = klfast.evaluate(student, self.text, teacher=self.teacher, progress=False).kl
        assert kl is not None  # there is a teacher
        return kl
