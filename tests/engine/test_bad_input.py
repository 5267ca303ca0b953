"""What the engine is given by mistake: an error of one line, and an engine and a state that go on as before."""

import signal

import pytest
import torch
from test_engine import relative
from tiny_models import VOCABULARY, batch, tiny

import klfast
from klfast import _C
from klfast.generation.engine import engine_of, lower

FAMILIES = ("mamba", "qwen3_5")


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (batch(2, 3).int(), r"^ids must be int64 \[B, T\] on the CPU .* got torch\.int32 \[2, 3\] on cpu$"),
        (batch(2, 3)[0], r"got torch\.int64 \[3\] on cpu$"),
        (batch(2, 3)[:, :0], r"with at least one token, got torch\.int64 \[2, 0\] on cpu$"),
        (batch(2, 3).to("meta"), "on meta$"),
        (batch(3, 3), "^ids have 3 rows, but the state has 2 sequences$"),
        (torch.full((2, 3), -1), rf"^token ids must lie in 0\.\.{VOCABULARY - 1}, got -1$"),
        (torch.tensor([[1, 2], [3, VOCABULARY]]), f"got {VOCABULARY}$"),
        (torch.full((2, 1), 2**62), f"got {2**62}$"),
    ],
    ids=["dtype", "dimensions", "empty", "device", "rows", "negative", "unknown", "huge"],
)
def test_ids(family, ids, message):
    engine, text = lower(tiny(family)), batch(2, 9)
    state = engine.state(2)
    engine(text[:, :5], state)
    kept = state.copy()
    for call in (engine, engine.profile):
        with pytest.raises(klfast.InvalidInputError, match=message):
            call(ids, state)
    assert torch.equal(engine(text[:, 5:], state), engine(text[:, 5:], kept))


@torch.inference_mode()
def test_states_of_other_models():
    engine, other = lower(tiny("mamba")), lower(tiny("qwen3_5"))
    state = engine.state()
    for wrong in (other.state(), lower(tiny("mamba2")).state()):
        with pytest.raises(klfast.InvalidInputError, match=r"^the state belongs to another model's engine; make one"):
            engine(batch(1, 3), wrong)
    assert int(state.seen) == 0 and engine(batch(1, 3), state).isfinite().all()
    again = lower(tiny("mamba"))  # another engine of the same model takes it
    assert torch.equal(again(batch(1, 4), state.copy()), engine(batch(1, 4), state))


@pytest.mark.parametrize("sequences", [0, -1, 17])
def test_numbers_of_sequences(sequences):
    with pytest.raises(klfast.InvalidInputError, match=rf"^an engine runs 1 to 16 sequences, got {sequences}$"):
        lower(tiny("mamba")).state(sequences)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_weight_is_named_and_the_engine_goes_on_once_it_is_mended(family):
    model, ids = tiny(family), batch(1, 5)
    engine, right = engine_of(model), klfast.generate(model, ids, 8)
    weight = model.lm_head.weight
    before = weight[3].clone()
    weight[3] = torch.nan
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(klfast.InvalidInputError, match=r"^the model's logits hold a NaN; its weights are damaged$"):
            klfast.generate(model, ids, 8, **options)
    weight[3] = before
    assert torch.equal(klfast.generate(model, ids, 8), right) and engine_of(model) is engine


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        *((wrong, f"^rows must be an integer, 1 or more, got {wrong!r}$") for wrong in (0, -1, "a", 2.5, True, None)),
        (2**20 + 1, "^rows must be at most 1048576, got 1048577$"),
        (2**40, "^rows must be at most 1048576, got 1099511627776$"),
        (2**64, "^rows must fit into 64 bits, got 18446744073709551616$"),
    ],
)
def test_numbers_of_rows(rows, message):
    with pytest.raises(klfast.InvalidInputError, match=message):
        klfast.lower(tiny("mamba"), rows=rows)


def test_more_sequences_than_rows():
    engine, ids = lower(tiny("mamba"), rows=8), batch(16, 2)
    with pytest.raises(klfast.InvalidInputError, match=r"^an engine runs 1 to 8 sequences, got 16$"):
        engine.state(16)
    other = lower(tiny("mamba")).state(16)
    for call in (engine, engine.each, engine.profile):
        with pytest.raises(klfast.InvalidInputError, match=r"^an engine runs 1 to 8 sequences, got 16$"):
            call(ids, other)
    assert engine(ids[:8], engine.state(8)).isfinite().all()


def test_says_that_the_rows_take_too_much_memory(monkeypatch):
    def fails(*_):
        raise MemoryError("std::bad_alloc")

    class Full(_C.Program):
        buffer = fails

    monkeypatch.setattr(_C, "Program", Full)
    with pytest.raises(MemoryError, match=r"^no memory for runs of 99 tokens; lower the model with fewer rows$"):
        lower(tiny("mamba"), rows=99)


class Interrupted:
    """A program during whose third run the user presses Ctrl-C."""

    def __init__(self, program, moment):
        self._program, self._moment, self._runs = program, moment, 0

    def __getattr__(self, name):
        return getattr(self._program, name)

    def run(self, *arguments):
        self._runs += 1
        if self._runs == 3 and self._moment == "before":
            signal.raise_signal(signal.SIGINT)
        self._program.run(*arguments)
        if self._runs == 3 and self._moment == "after":
            signal.raise_signal(signal.SIGINT)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("moment", "fed"), [("before", 14), ("after", 21)])
def test_ctrl_c_leaves_a_state_that_knows_how_far_it_is(family, moment, fed):
    ids, engine = batch(1, 40), lower(tiny(family), rows=7)
    right = engine(ids, engine.state())
    program, state = engine._program, engine.state()
    engine._program = Interrupted(program, moment)
    with pytest.raises(KeyboardInterrupt):
        engine(ids, state)
    engine._program = program
    assert state.seen.tolist() == [fed]
    assert relative(engine(ids[:, fed:], state), right.double()) < 1e-5


@pytest.mark.parametrize("columns", [(0, -1, 3), (0, 6, 3), (0, 0, -1), (0, 2**63 - 1, 2**63 - 1), (1, 0, 3)])
def test_columns_outside_a_buffer_are_refused(columns):
    program = _C.Program()
    whole = (program.buffer(8, 0, 1), 0, 8)
    program.combine("add", "add", 1.0, 1, columns, whole, whole, None)
    with pytest.raises(IndexError):
        program.run(
            torch.zeros(1, dtype=torch.int64).data_ptr(),
            torch.zeros(1, dtype=torch.int64).data_ptr(),
            1,
            1,
            _C.States([]),
            1,
            0,
            False,
        )
