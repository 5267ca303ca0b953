"""Errors are printable lines, whatever they quote."""

import pickle

import klfast
from klfast.core.errors import printable


def test_messages_are_lines_for_a_terminal():
    error = klfast.CheckpointError("f.json has the entry 'a\n\x1b[31mb\ud800'")
    assert str(error) == "f.json has the entry 'a  [31mb '"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(klfast.UnknownLayerError("no layer 'x'")) == "no layer 'x'"


def test_long_messages_keep_both_ends():
    text = printable("begin" + "x" * 5000 + "end")
    assert len(text) == 1000 and text.startswith("begin") and text.endswith("end") and " ... " in text
    assert printable("x" * 1000) == "x" * 1000
