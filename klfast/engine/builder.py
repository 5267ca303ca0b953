"""``Builder``: lowers the layers of a model to the instructions of a program."""

from __future__ import annotations

from klfast.engine.instructions.attention import AttentionInstructions
from klfast.engine.instructions.experts import ExpertInstructions
from klfast.engine.instructions.recurrences import RecurrenceInstructions


class Builder(RecurrenceInstructions, AttentionInstructions, ExpertInstructions):
    """Builds the program of a model, as ``ProgramBase`` says; methods named after instructions append one."""
