"""Sweeps that stop anywhere, even within a block: the files and the model they leave, and how they continue."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from sweep_models import assert_same, make, means, snapshot, tokens

import klfast
from klfast.core import interrupts, signed_json, signed_tensors
from klfast.core.errors import InvalidInputError
from klfast.models.block_chain import Chain
from klfast.sensitivity import resume_file, unfinished
from klfast.sensitivity.results import Sensitivities

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"max_batch_tokens": 4 * 2 * 17, "progress": False}  # two windows at a time, several candidates to a batch


class Killed(BaseException):
    """Ends a sweep as SIGKILL does: nothing is saved on the way out."""


def stopped_at(monkeypatch, number, sweep):
    """Run ``sweep``, kill it at call ``number`` of Chain.step, and return the number of calls it made."""
    step, made = Chain.step, []

    def counted(*args):
        if len(made) == number:
            raise Killed
        made.append(args[1])
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Chain, "step", counted)
        with suppress(Killed):
            sweep()
    return len(made)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), [("mamba2", True), ("hymba", False), ("zamba", True)])
def test_a_sweep_killed_within_a_block_resumes_bit_for_bit(family, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_file, "_SAVE_SECONDS", -1.0)  # save wherever it can
    model, ids, path = make(family, tied), tokens(3), tmp_path / "r.json"
    whole = klfast.sweep(model, ids, **OPTIONS)
    total = stopped_at(monkeypatch, -1, lambda: klfast.sweep(model, ids, **OPTIONS))
    teacher = 2 * len(Chain(model).blocks)  # recomputed by a resumed sweep: the check of the chain, the teacher
    found = []
    for number in random.Random(family).sample(range(teacher, total), 4):
        assert stopped_at(monkeypatch, number, lambda: klfast.sweep(model, ids, resume=path, **OPTIONS)) == number
        again = stopped_at(monkeypatch, -1, lambda: found.append(klfast.sweep(model, ids, resume=path, **OPTIONS)))
        # Plus the own blocks of the (up to 8) candidates that run together.
        assert again <= total - number + teacher + 8
        assert means(found[-1]) == means(whole) and found[-1].noise_floor == whole.noise_floor, number
        assert sorted(os.listdir(tmp_path)) == ["r.json"]
        path.unlink()


def test_an_adaptive_sweep_killed_within_a_block_goes_on_there(tmp_path, monkeypatch):
    """Also after steps of which nothing was due."""
    monkeypatch.setattr(resume_file, "_SAVE_SECONDS", -1.0)
    path, read, found = tmp_path / "r.json", unfinished.read, []

    def sweep(resume=None):
        options = {**OPTIONS, "budget": "adaptive", "vocabulary": 16, "layers": ["*.layers.0.*"]}
        return klfast.sweep(make(), tokens(40), resume=resume, **options)

    def recorded(beside, *args):
        found.append((os.path.exists(beside), read(beside, *args)))
        return found[-1][1]

    whole, total = sweep(), stopped_at(monkeypatch, -1, sweep)
    monkeypatch.setattr(unfinished, "read", recorded)
    for number in range(total // 2, total // 2 + 6):  # a round, of whose steps one is within a block
        stopped_at(monkeypatch, number, lambda: sweep(path))
        assert means(sweep(path)) == means(whole), number
        path.unlink()
    assert any(exists for exists, _ in found) and all(state is not None for exists, state in found if exists)


def test_a_repeatedly_killed_sweep_finishes(tmp_path, monkeypatch):
    """Each run dies one step after the teacher of its micro-batch."""
    monkeypatch.setattr(resume_file, "_SAVE_SECONDS", -1.0)
    model, ids, path, found = make("hymba"), tokens(2), tmp_path / "r.json", []
    options = {**OPTIONS, "layers": ["lm_head", "*.layers.0.*in_proj"], "resume": path}
    whole = klfast.sweep(model, ids, **{**options, "resume": None})
    for _ in range(100):
        stopped_at(monkeypatch, 2 * 3 + 2, lambda: found.append(klfast.sweep(model, ids, **options)))
        if found:
            break
    assert means(found[0]) == means(whole)


@pytest.mark.slow
def test_a_sweep_killed_between_its_files_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(resume_file, "_SAVE_SECONDS", -1.0)
    model, ids, path = make("mamba"), tokens(2), tmp_path / "r.json"
    whole = klfast.sweep(model, ids, **OPTIONS)
    write = signed_json.write_atomic

    def writes(number, after):
        """Sweep until write ``number``, die before or after it, and return the number of writes."""
        made = []

        def dying(*args):
            if len(made) == number and not after:
                raise Killed
            write(*args)
            made.append(args)
            if len(made) > number >= 0 and after:
                raise Killed

        with monkeypatch.context() as patch, suppress(Killed):
            for module in (signed_json, signed_tensors):
                patch.setattr(module, "write_atomic", dying)
            klfast.sweep(model, ids, resume=path, **OPTIONS)
        return len(made)

    total = writes(-1, False)
    path.unlink()
    assert total > 10
    for number in range(total):
        for after in (False, True):
            assert writes(number, after) == number + after
            assert means(klfast.sweep(model, ids, resume=path, **OPTIONS)) == means(whole), number
            path.unlink()


KILLED = """
import sys, torch, klfast
sys.path.insert(0, sys.argv[1])
import sweep_models
from klfast.sensitivity import resume_file

resume_file._SAVE_SECONDS = -1.0
torch.set_num_threads(1)
print("ready", flush=True)
klfast.sweep(sweep_models.make("hymba"), sweep_models.tokens(8, 65), resume=sys.argv[2], max_batch_tokens=4 * 65)
print("done", flush=True)
"""


def start(path):
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(path)]
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.slow
def test_a_process_killed_at_any_time_resumes_bit_for_bit(tmp_path):
    path, moments = tmp_path / "r.json", random.Random(0)
    whole = klfast.sweep(make("hymba"), tokens(8, 65), max_batch_tokens=4 * 65)
    for _ in range(2):
        child = start(path)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5))
        child.kill()
        child.wait()
        if path.exists():
            Sensitivities.from_json(path)
    assert means(klfast.sweep(make("hymba"), tokens(8, 65), resume=path, max_batch_tokens=4 * 65)) == means(whole)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".tmp")] == ["r.json"]


@pytest.mark.slow
def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "r.json"
    child = start(path)
    try:
        while not path.exists():
            time.sleep(0.01)
        with pytest.raises(
            InvalidInputError, match=rf"another process \({child.pid} on .*\) is working on .*r\.json; "
        ):
            klfast.sweep(make("hymba"), tokens(8, 65), resume=path, max_batch_tokens=4 * 65)
    finally:
        child.kill()
        child.wait()
    klfast.sweep(make("hymba"), tokens(8, 65), resume=path, max_batch_tokens=4 * 65)  # a killed one holds no lock


def test_a_damaged_step_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(resume_file, "_SAVE_SECONDS", -1.0)
    model, ids, path, beside = make("mamba"), tokens(2), tmp_path / "r.json", tmp_path / "r.json.step"
    whole = klfast.sweep(model, ids, **OPTIONS)
    stopped_at(monkeypatch, 20, lambda: klfast.sweep(model, ids, resume=path, **OPTIONS))
    before, intact = path.read_bytes(), beside.read_bytes()
    for damage in (
        intact[:-1],
        b"",
        intact[:100] + bytes([intact[100] ^ 1]) + intact[101:],
        intact[:-1] + bytes([intact[-1] ^ 1]),
        b"{}" * 100,
    ):
        path.write_bytes(before)
        beside.write_bytes(damage)
        with pytest.warns(UserWarning, match=r"r\.json\.step is damaged .*; its step is measured again"):
            found = klfast.sweep(model, ids, resume=path, **OPTIONS)
        assert means(found) == means(whole) and not beside.exists()
    path.write_bytes(before)
    beside.write_bytes(intact)
    stopped_at(
        monkeypatch, 5, lambda: klfast.sweep(model, ids, resume=tmp_path / "other.json", layers="lm_head", **OPTIONS)
    )
    (tmp_path / "other.json.step").replace(beside)  # another sweep's
    assert means(klfast.sweep(model, ids, resume=path, **OPTIONS)) == means(whole)


def test_a_file_of_klfast_0_1_0_is_continued(tmp_path, monkeypatch):
    """Version 0.1.0 counted blocks, including the head, and wrote no digest."""
    import json

    specs = [
        f"int{bits}-{group}-sym" for bits in (4, 8) for group in ("g8", "g16", "g32", "channel")
    ]  # 16 candidates and more in a block
    model, ids, path = make("llama"), tokens(1), tmp_path / "r.json"
    whole = klfast.sweep(model, ids, specs, **OPTIONS)
    saves = []
    monkeypatch.setattr(resume_file, "_SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        to_json = Sensitivities.to_json
        patch.setattr(
            Sensitivities, "to_json", lambda self, *args, extra: saves.append(to_json(self, *args, extra=extra))
        )
        klfast.sweep(model, ids, specs, resume=path, **OPTIONS)
    places = [json.loads(text)["sweep"]["next"][1] for text in saves]
    assert max(places) > 4  # more steps than the noise, two blocks and the head
    for group, text in [
        (1, saves[places.index(1)]),
        (2, saves[places.index(1 + 4)]),
        (3, saves[places.index(1 + 4 + 4)]),
    ]:
        old = json.loads(text)
        old["sweep"]["next"] = [0, group]
        del old["sha256"], old["sweep"]["steps"]
        path.write_text(json.dumps(old))
        assert means(klfast.sweep(model, ids, specs, resume=path, **OPTIONS)) == means(whole), group


def lines(sweep, interrupt_at=-1):
    """Run a sweep, send SIGINT to the process at that line of klfast's own code, and return the number of lines run."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(os.path.dirname(klfast.__file__)):
            return None
        if event == "line":
            if seen == interrupt_at:
                signal.raise_signal(signal.SIGINT)
            seen += 1
        return trace

    sys.settrace(trace)
    try:
        sweep()
    finally:
        sys.settrace(None)
    return seen


@pytest.mark.slow
def test_ctrl_c_anywhere_leaves_the_model_as_it_was(tmp_path):
    model, path = make("hymba", tied=True).bfloat16(), tmp_path / "r.json"
    model.train()
    before = snapshot(model)
    options = {**OPTIONS, "layers": ["lm_head", "*.layers.0.*in_proj"]}
    whole, handler = klfast.sweep(model, tokens(2), "int4", **options), signal.getsignal(signal.SIGINT)
    total = lines(lambda: klfast.sweep(model, tokens(2), "int4", **options))  # the first sweep runs more: lazy imports
    for number in random.Random(0).sample(range(total), 30):
        with pytest.raises(KeyboardInterrupt):
            lines(lambda: klfast.sweep(model, tokens(2), "int4", resume=path, **options), number)
        assert_same(before, snapshot(model))
        assert torch.is_grad_enabled() and signal.getsignal(signal.SIGINT) is handler
        assert set(os.listdir(tmp_path)) <= {"r.json", "r.json.step"}
        assert means(klfast.sweep(model, tokens(2), "int4", resume=path, **options)) == means(whole), number
        path.unlink()


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    model, path, made = make("hymba"), tmp_path / "r.json", []
    step = Chain.step

    def interrupting(*args):
        if len(made) == 40:
            signal.raise_signal(signal.SIGINT)
        made.append(1)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Chain, "step", interrupting)
        with pytest.raises(KeyboardInterrupt):
            klfast.sweep(model, tokens(3), resume=path, **OPTIONS)
    assert 40 <= len(made) <= 41 and Sensitivities.from_json(path).measurements and (tmp_path / "r.json.step").exists()
    total = stopped_at(monkeypatch, -1, lambda: klfast.sweep(model, tokens(3), **OPTIONS))
    assert (
        stopped_at(monkeypatch, -1, lambda: klfast.sweep(model, tokens(3), resume=path, **OPTIONS))
        <= total - 40 + 2 * 3 + 8
    )


def test_deferred_interrupts_are_raised_at_the_right_place():
    seen = []

    def until_interruptible():
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            seen.append("held back")
            with interrupts.interruptible():
                seen.append("not reached")

    def until_the_end():
        with interrupts.deferred(), interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            seen.append("to the end")
        seen.append("not reached")

    def failing():
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("first")

    with pytest.raises(KeyboardInterrupt):
        until_interruptible()
    assert seen == ["held back"]
    with pytest.raises(KeyboardInterrupt), interrupts.deferred(), interrupts.interruptible():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        until_the_end()
    assert seen == ["held back", "to the end"]
    with pytest.raises(ValueError, match="first"):
        failing()
    with interrupts.interruptible():
        pass
    thread = threading.Thread(target=lambda: seen.append(klfast.sweep(make(), tokens(1), "int4", layers="lm_head")))
    thread.start()
    thread.join()
    assert isinstance(seen[-1], Sensitivities)


def test_the_step_file_survives_every_dtype(tmp_path):
    from klfast.models.block_chain import Carry

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parts = torch.randn(4, 3, 2).to(dtype).split(1)
        made = unfinished.Unfinished(
            list(parts[:2]), Carry(parts[2], (parts[3], torch.ones(2, dtype=torch.int64))), 5, {"suffix": 1.5}
        )
        unfinished.write(tmp_path / "x", made, "before")
        found = unfinished.read(tmp_path / "x", "before", torch.device("cpu"))
        for a, b in zip(
            [*made.finals, made.carry.hidden, *made.carry.extra],
            [*found.finals, found.carry.hidden, *found.carry.extra],
            strict=True,
        ):
            assert a.dtype == b.dtype and a.equal(b)
        assert (found.block, found.costs) == (5, {"suffix": 1.5})
        assert unfinished.read(tmp_path / "x", "other", torch.device("cpu")) is None
