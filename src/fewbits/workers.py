"""Who does the work: threads of this machine, or processes of a cluster (`fewbits.cluster`).

A job is a function together with what all its tasks need: a model by its path, statistics. A task is one call of it, as
small as a slab of rows. Results are asked for in the order in which they are wanted, which is all that a caller
may rely on: which worker does a task, and how often it was tried, does not change the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
K = TypeVar("K")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A task that was handed out. `concurrent.futures.Future` is one."""

    def result(self) -> T_co:
        """Wait for it.

        Raises:
            FewbitsError: what the task raised.
        """


@dataclass(frozen=True)
class Deferred(Pending[T]):
    """Done by the caller when its turn comes."""

    function: Callable[[], T]

    def result(self) -> T:
        return self.function()


class Job(ABC, Generic[P, T]):
    """A function that workers know."""

    @abstractmethod
    def submit(self, what: str, *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        """Hand out one call of it.

        Args:
            what: the tensor at hand, for errors.
        """


class Workers(ABC):
    """Those who do tasks, several at once.

    Attributes:
        remote: whether they are other processes: arguments and results then travel, and files are opened anew.
    """

    remote: bool

    @property
    @abstractmethod
    def count(self) -> int:
        """How many tasks are done at once. It may change while a cluster grows."""

    @property
    def ahead(self) -> int:
        """How many tasks to hand out ahead of the first whose result is wanted: enough to keep all busy."""
        return 2 * self.count

    @abstractmethod
    def job(self, function: Callable[P, T]) -> Job[P, T]:
        """Make a function known. It goes to each worker once, however many tasks follow.

        Args:
            function: picklable, where workers are remote.
        """

    @abstractmethod
    def near(self, function: Callable[[], T]) -> Pending[T]:
        """Hand out what is to be done on this machine: copying, which others could only do slower."""


def in_order(tasks: Iterable[tuple[K, Callable[[], Pending[T]]]], ahead: int) -> Iterator[tuple[K, T]]:
    """Results in the order of the tasks, of which so many are handed out ahead.

    Args:
        tasks: anything to know a result by, and what hands the task out.
    """
    waiting: deque[tuple[K, Pending[T]]] = deque()
    for key, hand_out in tasks:
        waiting.append((key, hand_out()))
        if len(waiting) >= ahead:
            key, pending = waiting.popleft()
            yield key, pending.result()
    while waiting:
        key, pending = waiting.popleft()
        yield key, pending.result()


class Threads(Workers):
    """Threads of this process."""

    remote = False

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool

    @property
    def count(self) -> int:
        return self.pool._max_workers

    def job(self, function: Callable[P, T]) -> Job[P, T]:
        return _ThreadsJob(self.pool, function)

    def near(self, function: Callable[[], T]) -> Pending[T]:
        return self.pool.submit(function)


@dataclass(frozen=True)
class _ThreadsJob(Job[P, T]):
    pool: ThreadPoolExecutor
    function: Callable[P, T]

    def submit(self, what: str, *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        return self.pool.submit(self.function, *args, **kwargs)
