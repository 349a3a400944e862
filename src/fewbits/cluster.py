"""Workers on Ray (https://docs.ray.io): the same tasks on the processes of this machine or of many.

Everything travels pickled by this module rather than by Ray, so that versions are compared before anything is
unpickled, and arrays arrive writable. Ray does the rest: it places tasks, and repeats those whose worker has died.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from uuid import uuid4

from fewbits.errors import FewbitsError
from fewbits.version import __version__
from fewbits.workers import Deferred, Job, P, Pending, T, Workers

LOCAL = "local"
"""The address that means: start Ray here."""
TRIES = 5
"""How often a task whose worker died is given to another before it is given up."""
PATIENCE = 10.0
"""Seconds for a head to answer."""
COUNT_EVERY = 5.0
"""Seconds between two looks at how large the cluster is."""
JOBS_KEPT = 2
"""Jobs that a worker keeps unpickled: a model is opened once, not once a task."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else pages on a dead machine go to stdout, where data goes
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning on what a later version will do
    "RAY_NUM_REDIS_GET_RETRIES": "2",  # else it waits minutes for a head that is not there
    "RAY_worker_niceness": "0",  # else workers starve beside anything else
}
"""How Ray is told to keep to itself."""
COMPARED = ("numpy", "numba", "llvmlite", "torch", "transformers")
"""Packages whose versions results depend on."""


@contextmanager
def workers_at(address: str | None, threads: int | None = None) -> Iterator[Workers | None]:
    """The workers of a cluster; None without an address, which means threads of this process.

    Args:
        address: `local` to start Ray on this machine for as long as this lasts, `auto` for the cluster that this
            machine belongs to, or the `host:port` of its head.
        threads: for `local`, how many processes; None means one for each core.

    Raises:
        FewbitsError: Ray is not installed, or does not answer.
    """
    if address is None:
        yield None
        return
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _start(ray, address, threads)
    try:
        yield RayWorkers(ray)
    finally:
        if ours:
            ray.shutdown()


def _ray() -> Any:
    """Ray, which looks at its environment when it is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise FewbitsError("--cluster needs Ray, which is not installed.", "pip install 'fewbits[cluster]'") from None
    return ray


def _start(ray: Any, address: str, threads: int | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "configure_logging": False}
    try:
        if address == LOCAL:
            ray.init(address=LOCAL, include_dashboard=False, num_cpus=threads or os.cpu_count() or 1, **quiet)
        else:
            host, _, port = address.rpartition(":")
            if host and port.isdecimal():
                socket.create_connection((host, int(port)), PATIENCE).close()
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "Start it with `ray start --head`, and join it on every machine: see docs/cluster.md."
        raise FewbitsError(f"{address}: no Ray cluster answers ({reason}).", hint) from None


class RayWorkers(Workers):
    """The processes of a Ray cluster, one for each of its cores.

    Args:
        ray: the module, connected.
        tries: how often a task whose worker died is given to another.
    """

    remote = True

    def __init__(self, ray: Any, tries: int = TRIES) -> None:
        self.ray, self.tries = ray, tries
        self._count, self._counted = 0, float("-inf")
        self.do = ray.remote(max_retries=tries, num_cpus=1)(_worker())
        self.versions = versions()
        self._told: set[str] = set()

    @property
    def count(self) -> int:
        if time.monotonic() - self._counted > COUNT_EVERY:
            self._count = max(1, int(self.ray.cluster_resources().get("CPU", 1)))
            self._counted = time.monotonic()
        return self._count

    def job(self, function: Callable[P, T]) -> Job[P, T]:
        return _RayJob(self, uuid4().hex, self.ray.put(self.ray.cloudpickle.dumps(function)))

    def near(self, function: Callable[[], T]) -> Pending[T]:
        return Deferred(function)

    def result(self, reference: Any, what: str) -> Any:
        try:
            outcome, told, where, processor = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError:
            raise  # a bug of ours: with its traceback
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise FewbitsError(
                f"{what}: its worker died {self.tries + 1} times ({type(error).__name__}: {reason}).",
                "Look for its machine's memory, or quantize without --cluster.",
            ) from None
        if outcome == "refused":
            raise FewbitsError(f"The worker on {where} {told}.", "Install the same everywhere; see docs/cluster.md.")
        if outcome == "failed":
            raise FewbitsError(*told)
        if processor != _processor() and processor not in self._told:
            self._told.add(processor)
            logging.getLogger(__name__).warning(
                "the worker on %s has another processor (%s, here %s): results may differ in the last bit",
                *(where, processor, _processor()),
            )
        return pickle.loads(told)


@dataclass(frozen=True)
class _RayJob(Job[P, T]):
    workers: RayWorkers
    key: str
    data: Any

    def submit(self, what: str, *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        # within a list a reference is passed on as it is: a worker that knows the job does not fetch it again
        packed = pickle.dumps((args, kwargs), 5)
        task = self.workers.do.options(name=what).remote(self.workers.versions, self.key, [self.data], packed)
        return _RayPending(self.workers, what, task)


@dataclass(frozen=True)
class _RayPending(Pending[T]):
    workers: RayWorkers
    what: str
    reference: Any

    def result(self) -> T:
        found: T = self.workers.result(self.reference, self.what)
        return found


def versions() -> dict[str, str]:
    """Of everything that results depend on."""
    found = {"fewbits": __version__, "python": "{}.{}".format(*sys.version_info)}
    for package in COMPARED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _worker() -> Callable[..., tuple[str, Any, str, str]]:
    """What runs on a worker. A function within a function travels as code: the worker may have no fewbits at all."""

    def work(theirs: Mapping[str, str], key: str, data: list[Any], packed: bytes) -> tuple[str, Any, str, str]:
        import socket

        try:
            from fewbits.cluster import run_here
        except ImportError as error:
            return "refused", f"cannot import this version of fewbits ({error})", socket.gethostname(), ""
        return run_here(theirs, key, data, packed)

    return work


_jobs: OrderedDict[str, Callable[..., Any]] = OrderedDict()
"""Of this worker."""


def run_here(theirs: Mapping[str, str], key: str, data: list[Any], packed: bytes) -> tuple[str, Any, str, str]:
    """One task on a worker.

    Args:
        theirs: the driver's versions.
        key: of the job.
        data: reference to the pickled job.
        packed: the pickled arguments.

    Returns:
        `done` and the pickled result, `failed` and message and hint, or `refused` and the reason; the host's name; the
        processor.
    """
    where, ours = socket.gethostname(), versions()
    other = [f"{name} {ours.get(name)} (here {there})" for name, there in theirs.items() if ours.get(name) != there]
    if other:
        return "refused", f"has {', '.join(other)}", where, ""
    try:
        if key not in _jobs:
            import ray

            _jobs[key] = pickle.loads(ray.get(data[0]))
            while len(_jobs) > JOBS_KEPT:
                _jobs.popitem(last=False)
        _jobs.move_to_end(key)
        args, kwargs = pickle.loads(packed)
        return "done", pickle.dumps(_jobs[key](*args, **kwargs), 5), where, _processor()
    except FewbitsError as error:
        return "failed", (error.message, error.hint), where, ""


@cache
def _processor() -> str:
    """By which name the compiler knows it: kernels are compiled for it."""
    from llvmlite.binding import get_host_cpu_name  # type: ignore[import-untyped]

    return str(get_host_cpu_name())
