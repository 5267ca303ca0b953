"""Measurement of a sweep's jobs by the workers of a Ray cluster.

This process alone decides what is measured and adds up, in the order of a sweep without Ray.
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

import torch

from klfast import __version__
from klfast.core import heap
from klfast.core.errors import ClusterError, InvalidInputError, KlfastError, one_line
from klfast.core.interrupts import interruptible
from klfast.sensitivity.measurer import Measurer
from klfast.sensitivity.ray_connection import Watch
from klfast.sensitivity.shared_tensors import pack, unpack
from klfast.sensitivity.state import Job
from klfast.sensitivity.steps import NOISE, Step
from klfast.sensitivity.unfinished import Unfinished

_FORWARDS = 10  # passes through the network that a task is worth at least, beside that of its teacher
_RETRIES = 10  # of a task whose worker or node was lost
_LOOK_SECONDS = 2.0
_VERSIONS = {"klfast": __version__, "torch": torch.__version__}


@dataclass(frozen=True)
class _Found:
    """The sums of a task's jobs, and what they cost."""

    sums: list[torch.Tensor]
    seconds: dict[str, float]
    block_tokens: int
    in_full: int


class RayMeasurer:
    """Measures jobs on the cluster that this process is connected to.

    The model lies once on each node, in Ray's object store. A worker computes with as many threads as this process, so
    that results do not depend on the number of workers; a task that is lost with its worker runs again.

    Args:
        local: measures the same here.
        workers: tasks that run at a time, at most; None for as many as the cluster has CPUs for.

    Raises:
        InvalidInputError: the model is not on the CPU, or no node has a CPU for each thread.
    """

    def __init__(self, local: Measurer, workers: int | None) -> None:
        import ray
        from ray import cloudpickle

        device, threads = local.engine.chain.head.device, torch.get_num_threads()
        if device.type != "cpu":
            raise InvalidInputError(f'engine="ray" takes models on the CPU, this one is on {device}')
        most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        if most < threads:
            raise InvalidInputError(
                f"no node of the Ray cluster has {threads} CPUs, one for each thread, but {most:g} at most; "
                "set fewer threads (--threads, torch.set_num_threads)"
            )
        self._local, self._workers, self._watch = local, workers, Watch()
        task = ray.remote(num_cpus=threads, max_retries=_RETRIES)(_measure)
        model = ray.put(pack(local, cloudpickle.CloudPickler))
        self._start = functools.partial(task.remote, [model], threads, _VERSIONS)

    def measured(self, jobs: Iterable[Job], unfinished: Unfinished | None = None) -> Iterator[tuple[Job, torch.Tensor]]:
        """Yield each job with its sums, float64 [C, len(COLUMNS), B], in order.

        A job that was ``unfinished`` starts over.

        Raises:
            ClusterError: the cluster is gone, or a worker failed for other reasons than InvalidInputError.
        """
        tasks = list(_tasks(jobs, self._local.steps))
        for task, found in zip(tasks, self._in_order(tasks), strict=True):
            engine = self._local.engine
            for stage, seconds in found.seconds.items():
                engine.stages.seconds[stage] += seconds
            engine.block_tokens += found.block_tokens
            engine.comparison.in_full += found.in_full
            yield from zip(task, found.sums, strict=True)

    def _in_order(self, tasks: Sequence[Sequence[Job]]) -> Iterator[_Found]:
        import ray

        waiting, found = iter(enumerate(tasks)), dict[int, _Found]()
        running: dict[Future[_Found], tuple[int, Any]] = {}
        ended: queue.SimpleQueue[Future[_Found]] = queue.SimpleQueue()
        try:
            for turn in range(len(tasks)):
                while turn not in found:
                    for number, task in islice(waiting, (self._workers or len(tasks)) - len(running)):
                        reference = self._start(task)
                        future = reference.future()
                        running[future] = number, reference
                        future.add_done_callback(ended.put)
                    future = self._next(ended)
                    number, _ = running.pop(future)
                    found[number] = _result(future)
                yield found.pop(turn)
        finally:
            for _, reference in running.values():
                ray.cancel(reference)

    def _next(self, ended: queue.SimpleQueue[Future[_Found]]) -> Future[_Found]:
        while True:
            try:
                with interruptible():
                    return ended.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                self._watch.look()


def _tasks(jobs: Iterable[Job], steps: Sequence[Step]) -> Iterator[list[Job]]:
    """Split jobs into tasks of one micro-batch each, which do not depend on the number of workers."""
    enough = _FORWARDS * steps[NOISE].work / 2
    for _, of_one in groupby(jobs, attrgetter("micro_batch")):
        task, work = list[Job](), 0.0
        for job in of_one:
            task.append(job)
            work += steps[job.step].work * len(job.rows) / steps[job.step].rows
            if work >= enough:
                yield task
                task, work = [], 0.0
        if task:
            yield task


def _result(future: Future[_Found]) -> _Found:
    from ray.exceptions import RayError, RayTaskError

    try:
        return future.result()
    except RayTaskError as error:
        if isinstance(error.cause, KlfastError):
            raise error.cause from None
        raise ClusterError(f"a worker of the Ray cluster failed ({one_line(error.cause)})") from error
    except RayError as error:
        raise ClusterError(f"the Ray cluster failed ({one_line(error)}); run the sweep again to go on") from error


# On the workers ---------------------------------------------------------------------------------------------------


def _measure(model: Sequence[Any], threads: int, versions: Mapping[str, str], jobs: Sequence[Job]) -> _Found:
    """Measure jobs with the measurer that the only entry of ``model``, an ObjectRef, holds."""
    if versions != _VERSIONS:
        raise InvalidInputError(f"a node of the Ray cluster has {_VERSIONS}, the sweep {dict(versions)}")
    torch.set_num_threads(threads)
    measurer = _unpacked(model[0])
    engine = measurer.engine
    engine.reset_costs()
    with torch.no_grad(), heap.kept():
        sums = [found for _, found in measurer.measured(jobs)]
    return _Found(sums, dict(engine.stages.seconds), engine.block_tokens, engine.comparison.in_full)


@functools.lru_cache(maxsize=1)
def _unpacked(reference: Any) -> Measurer:
    import ray

    found: Measurer = unpack(ray.get(reference))
    return found
