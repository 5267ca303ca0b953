"""Sweeps on a real Ray cluster of this machine: the same for any number of workers, whatever happens to them."""

import json
import os
import re
import signal
import sys
import time

import other_process
import pytest
import torch
from sweep_models import make, means, tokens

import klfast
from klfast.core.errors import ClusterError, InvalidInputError, KlfastError
from klfast.sensitivity import ray_connection, ray_measurer
from klfast.sensitivity.ray_connection import Watch
from klfast.sensitivity.results import Sensitivities
from klfast.sensitivity.state import Job
from klfast.sensitivity.steps import Step

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'klfast[ray]'")

SETTINGS = {  # of the cluster's processes
    "RAY_worker_niceness": "0",  # else tests beside these starve the workers
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
OPTIONS = {"max_batch_tokens": 4 * 2 * 17, "progress": False}  # two windows at a time


@pytest.fixture(scope="module")
def cluster():
    """Two workers: each takes seconds to import torch and transformers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            object_store_memory=10**8,
        )
        yield
        ray.shutdown()


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr(ray_measurer, "_FORWARDS", 2)


def sweep(**changes):
    return klfast.sweep(make("zamba", tied=True), tokens(6), **{**OPTIONS, **changes})


def text(found):
    """Return a sweep as JSON, without what a run of its own takes: seconds, and the teacher's passes by task."""
    data = json.loads(found.to_json())
    del data["sha256"], data["provenance"]["seconds"], data["provenance"]["token_forwards"]
    return data


def test_results_are_the_same_bits_for_any_number_of_workers(cluster, small_tasks):
    found = [sweep(engine="ray", workers=workers) for workers in (1, 2)]
    forwards = {one.provenance["token_forwards"] for one in found}
    assert len(forwards) == 1  # the same work, whoever does it
    assert text(found[0]) == text(found[1]) == text(sweep())


def test_an_adaptive_sweep_goes_on_where_the_other_engine_stopped(cluster, tmp_path):
    def stop(done, total, what):
        raise KeyboardInterrupt

    def adaptive(**changes):
        return klfast.sweep(make(), tokens(40), **{**OPTIONS, "budget": "adaptive", "vocabulary": 16, **changes})

    for engine in ("local", "ray"):
        with pytest.raises(KeyboardInterrupt):
            adaptive(engine=engine, progress=stop, resume=tmp_path / "r.json")
    assert means(adaptive(engine="ray", resume=tmp_path / "r.json")) == means(adaptive())


def kill_once(mark, measure):
    """Return ``measure`` for a worker that is killed within its first task, and leaves a file then."""

    def measured(*args):
        try:
            open(mark, "x").close()
        except FileExistsError:
            return measure(*args)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    return measured


def test_a_killed_worker_loses_nothing(cluster, tmp_path, monkeypatch):
    mark = tmp_path / "killed"
    monkeypatch.setattr(ray_measurer, "_measure", kill_once(mark, ray_measurer._measure))
    found = sweep(engine="ray", layers="lm_head")
    assert mark.exists() and text(found) == text(sweep(layers="lm_head"))


def raising(error):
    def measure(*args):
        raise error

    return measure


def test_error_of_a_worker_is_the_sweep_s(cluster, monkeypatch):
    monkeypatch.setattr(ray_measurer, "_measure", raising(InvalidInputError("as a worker found")))
    with pytest.raises(InvalidInputError, match=r"^as a worker found$"):
        sweep(engine="ray", layers="lm_head")
    monkeypatch.setattr(ray_measurer, "_measure", raising(KeyError("nothing")))
    with pytest.raises(ClusterError, match=r"^a worker of the Ray cluster failed \(KeyError: 'nothing'\)$"):
        sweep(engine="ray", layers="lm_head")


class Gone(Watch):
    """Looks where nothing listens, once it is lost; a real loss would end the processes of other tests, too."""

    is_lost = False

    def look(self):
        if self.is_lost:
            self._servers = (("127.0.0.1", 1),)
        super().look()


def hang_at_the_last(measure):
    """Return ``measure`` for workers that never answer from the third micro-batch on, until they are cancelled."""

    def measured(*args):
        while args[-1][0].micro_batch == 2:
            time.sleep(0.01)
        return measure(*args)

    return measured


def test_a_cluster_that_goes_away_is_one_error_and_loses_nothing(cluster, tmp_path, monkeypatch):
    path = tmp_path / "r.json"

    def lose(done, total, what):
        Gone.is_lost = done * 3 >= total * 2

    with monkeypatch.context() as patch:
        patch.setattr(ray_connection, "_GONE_SECONDS", -1.0)
        patch.setattr(ray_measurer, "_LOOK_SECONDS", 0.1)
        patch.setattr(ray_measurer, "Watch", Gone)
        patch.setattr(ray_measurer, "_measure", hang_at_the_last(ray_measurer._measure))
        with pytest.raises(ClusterError, match=r"^the Ray cluster is gone \(.*refused\); run the sweep again to go on"):
            sweep(engine="ray", resume=path, progress=lose)
    assert Sensitivities.from_json(path).provenance["micro_batches"] == [2, 3]
    assert text(sweep(resume=path)) == text(sweep())


LOSING = """
import os, signal, time
from pathlib import Path
import torch
import klfast
import sweep_models
from klfast.core.errors import ClusterError
from klfast.sensitivity import ray_connection, ray_measurer

def kill_half_way(done, total, what):
    if done * 2 >= total:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == os.environ["VICTIM"]:
                os.kill(int(child), signal.SIGKILL)

def hang_at_the_last(measure):
    def measured(*args):
        while args[-1][0].micro_batch == 2:
            time.sleep(0.01)
        return measure(*args)
    return measured

torch.set_num_threads(1)
ray_connection._GONE_SECONDS = 1.0
ray_measurer._measure = hang_at_the_last(ray_measurer._measure)
model, ids = sweep_models.make("zamba", tied=True), sweep_models.tokens(6)
options = dict(max_batch_tokens=4 * 2 * 17, engine="ray", workers=1)
try:
    klfast.sweep(model, ids, resume=os.environ["RESUME"], progress=kill_half_way, **options)
except ClusterError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])  # the head's own process, and that of a node
def test_a_killed_head_or_node_is_one_error_and_loses_nothing(tmp_path, victim):
    path = tmp_path / "r.json"
    said = other_process.run(LOSING, **SETTINGS, VICTIM=victim, RESUME=str(path))
    gone = r"the Ray cluster is gone \(.*refused\); run the sweep again to go on"
    assert re.fullmatch(gone, said.splitlines()[-1])  # after what Ray itself has to say
    done, of = Sensitivities.from_json(path).provenance["micro_batches"]
    assert 1 <= done <= 2 and of == 3  # the node takes along what its workers were at
    assert text(sweep(resume=path)) == text(sweep())


def test_tasks_are_of_one_micro_batch_and_worth_more_than_their_teacher(monkeypatch):
    monkeypatch.setattr(ray_measurer, "_FORWARDS", 3)
    steps = [Step("noise", (), 0, 20.0), *(Step(0, (None,) * 4, first, 40.0) for first in (1, 5, 9))]
    jobs = [Job(0, 0, (0,)), Job(0, 1, (1, 2)), Job(0, 2, (5,)), Job(0, 3, (9, 10, 11, 12)), Job(1, 3, (9,))]
    assert list(ray_measurer._tasks(jobs, steps)) == [jobs[:2], jobs[2:4], jobs[4:]]


def test_error_says_what_the_cluster_lacks(cluster, monkeypatch):
    torch.set_num_threads(5)
    with pytest.raises(InvalidInputError, match=r"no node of the Ray cluster has 5 CPUs, .* but 2 at most"):
        sweep(engine="ray")
    with pytest.raises(InvalidInputError, match='engine must be "local" or "ray", got \'spark\''):
        sweep(engine="spark")
    for workers in (0, 1):
        with pytest.raises(InvalidInputError, match="workers"):
            sweep(engine="ray" if workers == 0 else "local", workers=workers)


def test_error_says_that_ray_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidInputError, match=r"needs the package ray.*pip install 'klfast\[ray\]'"):
        sweep(engine="ray")


def test_error_says_that_no_cluster_answers(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address, said in {
        "127.0.0.1:1": r"^no Ray cluster answers at RAY_ADDRESS, 127.0.0.1:1 \(.*refused\)$",
        "ray://head:10001": "^a sweep runs on a node of the Ray cluster, not behind ray://head:10001; start it there$",
    }.items():
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(KlfastError, match=said):
            sweep(engine="ray")
