"""The processes of one job as torchrun starts them: what each does, and what all of them sum.

A process that torchrun did not start is a group of one, whose methods do nothing: no caller asks how many there are. What
is on the CPU goes between processes by gloo, what is on a GPU by NCCL.
"""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401 -- imported later, it would keep the group: see leave
from torch import Tensor

from storage import InputError, RunError

START_WAIT = timedelta(minutes=10)  # for all processes to come
WAIT = timedelta(hours=24)  # for others to be done with their experts or networks; gloo knows at once of one that dies,
# and of those that wait in NCCL torchrun ends what runs on its node
GRACE = 1  # seconds in which a signal to the whole job explains why another process is gone
TALLY_EVERY = 0.5  # seconds


class LostError(RunError):
    """Another process of the job is gone."""


class DivergedError(RunError):
    """Processes do not hold the same state: what this one holds may be wrong."""


class Group:
    """The processes of a job. Every process calls the methods, all of them in the same order."""

    def __init__(self, rank: int = 0, count: int = 1, on_node: int = 1, first_of_node: bool = True, store=None):
        self.rank, self.count, self.on_node, self.first_of_node, self.store = rank, count, on_node, first_of_node, store
        self.is_main = rank == 0  # writes, and speaks
        self.bytes = 0  # of the tensors that were summed or sent
        self._keys = map(str, itertools.count())  # of the store, one for each call

    # --- who does what

    def share(self, count: int) -> slice:
        """This process's part of `count` things; sizes differ by at most one, and may be zero."""
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def each(self, items: Sequence) -> Iterator:
        """Yields the items that this process is to do: whoever is free takes the next one."""
        if self.count == 1:
            yield from items
            return
        key = next(self._keys)
        while (taken := self._call(self.store.add, key, 1) - 1) < len(items):
            yield items[taken]

    @contextlib.contextmanager
    def one_per_node_first(self):
        """The first process of a node goes through the block before its others, which find what it left in the cache."""
        if not self.first_of_node:
            self.gather()
        yield
        if self.first_of_node:
            self.gather()

    # --- tensors, in place

    def sum_(self, tensor: Tensor):
        if self.count > 1:
            self._call(dist.all_reduce, tensor)
            self.bytes += tensor.nbytes

    def from_main_(self, tensor: Tensor):
        """Rank 0's values."""
        if self.count > 1:
            self._call(dist.broadcast, tensor, 0)
            self.bytes += tensor.nbytes

    # --- plain values

    def gather(self, value=None) -> list:
        """The value of every rank."""
        values = [value] * self.count
        if self.count > 1:
            self._call(dist.all_gather_object, values, value)
        return values

    def largest(self, number: int) -> int:
        found = torch.tensor(number)
        if self.count > 1:
            self._call(dist.all_reduce, found, dist.ReduceOp.MAX)
        return int(found)

    def from_main(self, function: Callable, *args):
        """What rank 0 gets from calling a function; an InputError is raised in all processes."""
        if self.count == 1:
            return function(*args)
        answer = [None, None]
        if self.is_main:
            try:
                answer = [function(*args), None]
            except InputError as error:
                answer = [None, error]
        self._call(dist.broadcast_object_list, answer)
        if answer[1]:
            raise answer[1]
        return answer[0]

    def require_same(self, values: dict, what: str):
        """Raises InputError where a process has other values than rank 0, naming the first."""
        first, *others = self.gather(values)
        for rank, theirs in enumerate(others, 1):
            for name in first:
                if theirs.get(name) != first[name]:
                    raise InputError(
                        f"Process {rank} has {name} {theirs.get(name)}, and process 0 has {first[name]}; all processes need "
                        f"the same {what}."
                    )

    def require_identical(self, checksum: Callable[[], str]):
        """Raises DivergedError where the state of a process has another checksum than that of rank 0."""
        sums = self.gather(checksum()) if self.count > 1 else []
        if other := [rank for rank, found in enumerate(sums) if found != sums[0]]:
            raise DivergedError(
                f"The images of process {other[0]} are no longer those of process 0; look for faulty hardware, and go on "
                "from the last checkpoint."
            )

    def first_to_say(self, text: str) -> bool:
        """Whether no other process has said this."""
        if self.count == 1:
            return True
        try:
            return self.store.add(f"said: {text}", 1) == 1
        except RuntimeError:  # the store is gone, with the node that held it
            return True

    def tally(self) -> Callable[[], int]:
        """A function to call whenever one of something is done here; it returns how many more than before are known to be
        done in all processes."""
        if self.count == 1:
            return lambda: 1
        key, here, known, asked = next(self._keys), 0, 0, time.monotonic()

        def another() -> int:
            nonlocal here, known, asked
            here += 1
            if time.monotonic() - asked < TALLY_EVERY:
                return 0
            before, known = known, self._call(self.store.add, key, here)
            here, asked = 0, time.monotonic()
            return known - before

        return another

    def leave(self):
        """Ends the group and its threads, which would now and then abort a process that ends beside them. That needs the
        last reference, and functions of torch.distributed.nn keep the group that is there when they are imported."""
        if self.count > 1:
            dist.destroy_process_group()

    def _call(self, function: Callable, *args):
        try:
            return function(*args)
        except RuntimeError as error:
            time.sleep(GRACE)
            raise LostError(
                "Another process of this job is gone or cannot be reached; torchrun's report says which ended first."
            ) from error


ALONE = Group()


@functools.cache
def group() -> Group:
    """The processes that torchrun started together with this one. Raises RunError where one does not come."""
    variables = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    rank, count, local_rank, on_node = (int(os.environ.get(name, name.endswith("SIZE"))) for name in variables)
    if count == 1:
        return ALONE
    came = [f"came {r}" for r in range(count)]
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=START_WAIT))
        # torchrun keeps the store when it starts all again: what the processes before wrote there is not for these
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        store.set(came[rank], "")
        store.wait(came, START_WAIT)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=WAIT)
    except RuntimeError as error:  # DistError, or what gloo raises
        raise RunError(
            f"Process {rank} waited {START_WAIT.total_seconds():.0f} s at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} for all {count} processes, and not all came; start as many as --nnodes and "
            "--nproc_per_node say, with an address that all can reach."
        ) from error
    return Group(rank, count, on_node, local_rank == 0, store)
