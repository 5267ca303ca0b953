"""Killed sweeps continue where they stopped, and refuse another sweep's file."""

import json
import os
import signal
import subprocess
import sys

import pytest
from sweep_models import make, means, tokens

import klfast
from klfast.core.errors import CheckpointError, InvalidInputError, ModelMismatchError
from klfast.sensitivity.results import Sensitivities

pytestmark = pytest.mark.usefixtures("one_thread")


KILLED = """
import os, signal, sys
import torch
import klfast
sys.path.insert(0, sys.argv[1])
import sweep_models
from klfast.sensitivity import resume_file

resume_file._SAVE_SECONDS = -1.0  # save after every group

def kill(done, total, what):
    if done >= 15:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
klfast.sweep(sweep_models.make(), sweep_models.tokens(), resume=sys.argv[2], max_batch_tokens=4 * 17, progress=kill)
"""


@pytest.mark.slow
def test_a_killed_sweep_resumes_bit_for_bit(tmp_path):
    path = tmp_path / "resume.json"
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(path)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert json.loads(path.read_text())["sweep"]["next"] == [1, 2]  # in the middle of a micro-batch
    partial = Sensitivities.from_json(path)
    assert partial.provenance["micro_batches"] == [1, 3] and {m.tokens for m in partial.measurements.values()} == {
        16,
        32,
    }

    whole = klfast.sweep(make(), tokens(), max_batch_tokens=4 * 17)
    steps = []
    resumed = klfast.sweep(
        make(), tokens(), resume=path, max_batch_tokens=4 * 17, progress=lambda *args: steps.append(args)
    )
    assert steps[0][0] > 15 and steps[-1][:2] == (33, 33)
    assert means(resumed) == means(whole) and resumed.noise_floor == whole.noise_floor
    assert means(Sensitivities.from_json(path)) == means(whole)

    steps.clear()
    again = klfast.sweep(
        make(), tokens(), resume=path, max_batch_tokens=4 * 17, progress=lambda *args: steps.append(args)
    )
    assert means(again) == means(whole) and not steps


def test_resume_refuses_foreign_and_damaged_files(tmp_path):
    path = tmp_path / "resume.json"
    model, ids = make(), tokens()
    options = {"layers": ["lm_head"], "resume": path}
    result = klfast.sweep(model, ids, "int4", **options)
    before = path.read_text()
    for error, message, change in (
        (ModelMismatchError, "another model's sweep", {"model": make(seed=5)}),
        (InvalidInputError, "a sweep with other specs", {"specs": "int8"}),
        (InvalidInputError, "a sweep with other calibration", {"batches": tokens(seed=7)}),
        (InvalidInputError, "a sweep with other scale", {"scale": "mse"}),
        (InvalidInputError, "a sweep with other layers", {"layers": None}),
    ):
        with pytest.raises(error, match=message):
            klfast.sweep(**{"model": model, "batches": ids, "specs": "int4", **options, **change})
    assert path.read_text() == before

    result.to_json(tmp_path / "plain.json")
    with pytest.raises(CheckpointError, match="is not the resume file of a sweep"):
        klfast.sweep(model, ids, "int4", layers=["lm_head"], resume=tmp_path / "plain.json")
    path.write_text(before[: len(before) // 2])
    with pytest.raises(
        CheckpointError, match=r"truncated or not valid JSON .*; to start over delete it \(--no-resume\)"
    ):
        klfast.sweep(model, ids, "int4", **options)
    for content in (
        "[]",
        "{}",
        '{"schema": "klfast-sensitivities/9"}',
        json.dumps({**json.loads(before), "layers": 3}),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"; to start over delete it \(--no-resume\)") as caught:
            klfast.sweep(model, ids, "int4", **options)
        assert str(caught.value).startswith(str(path))
    damaged = json.loads(before)
    damaged["sweep"]["sums"]["square"] = "AAAA"
    path.write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match=r"resume\.json is damaged \(the sums"):
        klfast.sweep(model, ids, "int4", **options)


def test_an_unwritable_resume_path_fails_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        klfast.sweep(
            make(),
            tokens(),
            resume=tmp_path / "missing" / "resume.json",
            progress=lambda *_: pytest.fail("it measured"),
        )
