"""Messages between the processes of a group, which all of them send in the same order, or learn why one does not.

A message is a collective operation that is begun at once and waited for.  A process that has failed since the last one
leaves a note in the store of torch.distributed, finds out at which message the others wait, takes part in that with
zeros, and so on until they have come to where it stands: the end of what they compute together.  Others look for such
notes while they wait, and raise OtherProcess.  No message is added where nothing fails.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import OtherProcess

TIMEOUT = timedelta(minutes=5)
"""Time after which a process that does not answer counts as lost."""

PATIENCE = 0.2
"""Seconds that a message may take before the notes of others are looked for, and between two looks."""


@dataclass(frozen=True)
class Message:
    """A collective operation on tensors of this length and type; of objects with the depth of what ends with it."""

    kind: str
    length: int = 0
    dtype: str = "float64"
    device: str = "cpu"
    depth: int = 0
    failed: str = ""  # why the process that would send it has failed


class Channel:
    """The messages of the members of a group; its process groups are not those of the training.

    They belong to torch.distributed, which ends them: whoever keeps one beyond that may see its threads abort.
    """

    def __init__(self, group: Any) -> None:
        members = dist.get_process_group_ranks(group)
        make = partial(dist.new_group, members, timeout=TIMEOUT, use_local_synchronization=True)
        backend = dist.get_backend(group)
        vectors = make(backend=None if backend == "undefined" else backend)  # which is one for each kind of device
        objects = make(backend="gloo")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._vectors, self._objects = ref(vectors), ref(objects)
        self.depth = 0  # number of computations on all processes that are going on, one inside of the other
        self._number = 0  # of messages so far
        self._lost = ""  # why there can be no more
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=members[0], group=objects)
        self._store, self._name = _get_default_store(), f"sharpscope/{name[0]}"

    def reduce(self, t: Tensor, error: Exception | None = None) -> None:
        """Sum a tensor over the processes, in place; an `error` of this one comes before those of others."""
        self._send(self._reducing(t), Message("reduce", t.numel(), _name(t), t.device.type), error)

    def gather(self, part: Tensor) -> Tensor:
        """Put the parts ``(n,)`` of all processes one after the other, ``(W n,)``."""
        whole = part.new_empty(self.size * len(part))
        self._send(self._gathering(part, whole), Message("gather", len(part), _name(part), part.device.type))
        return whole

    def exchange(self, value: object, error: Exception | None = None) -> list[Any]:
        """Return the objects of all processes, in their order.

        After an `error` the others may wait elsewhere: this process first goes through these messages.
        """
        own = Message("object", 1, depth=self.depth)
        if error is not None:
            own = replace(own, failed=f"process {self.rank} failed: {type(error).__name__}: {error}")
        arrived = torch.ones(1, dtype=torch.float64)
        try:
            if error is not None:
                self._come_to(own)
            self._send(self._reducing(arrived), own)
        except RuntimeError as lost:  # others do not answer any more
            raise error or lost from None
        if arrived.item() < self.size:
            raise error or OtherProcess("another process failed before it came here")
        found: list[Any] = [None] * self.size
        with self._losing():
            dist.all_gather_object(found, value, group=self._group(arrived))
        return found

    def _reducing(self, t: Tensor) -> Callable[[], Any]:
        return partial(dist.all_reduce, t, group=self._group(t), async_op=True)

    def _gathering(self, part: Tensor, whole: Tensor) -> Callable[[], Any]:
        parts = list(whole.split(len(part)))
        return partial(dist.all_gather, parts, part, group=self._group(part), async_op=True)

    def _group(self, t: Tensor) -> Any:
        """Return the process group for a tensor on its device, alive."""
        group = self._objects() if t.device.type == "cpu" else self._vectors()
        if group is None:
            raise OtherProcess(
                "the process group of this objective was destroyed; make the objective anew in a new one"
            )
        return group

    def _send(self, begin: Callable[[], Any], message: Message, error: Exception | None = None) -> None:
        """Send a message, and wait until all processes have."""
        if self._lost:
            raise OtherProcess(self._lost)
        self._number += 1
        note = ""
        with self._losing():
            work = begin()
            looked = began = time.monotonic()
            pause = 0.0
            while not work.is_completed():
                time.sleep(pause)
                now = time.monotonic()
                pause = 0.0 if now - began < 1e-3 else min(2 * pause + 1e-5, 2e-3)
                if not note and now - looked > PATIENCE and not message.failed:
                    looked, note = now, self._failure(message)
            work.wait()
        if note:
            raise error or OtherProcess(note)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Raise OtherProcess where a message cannot be delivered, and from then on."""
        try:
            yield
        except OtherProcess:
            raise
        except RuntimeError as error:
            self._lost = (
                f"process {self.rank} of {self.size} waits in vain for the others: one has ended, or was not called"
                f" upon to measure within {TIMEOUT.seconds} s; every process has to make the same calls ({error})"
            )
            with suppress(RuntimeError):  # of a store that was with the process that has ended
                self._store.set(f"{self._name}/lost", self._lost)
            raise OtherProcess(self._lost) from error

    def _failure(self, message: Message) -> str:
        """Tell processes that have failed before this message where one waits; return what they say."""
        if not self._store.check([f"{self._name}/{self._number}"]):
            return ""
        self._post(message)
        failed = [m for m in self._posted() if m.failed]
        same = all((m.kind, m.depth) == (message.kind, message.depth) for m in failed)
        return "" if same else failed[0].failed

    def _post(self, message: Message) -> None:
        self._store.set(f"{self._name}/{self._number}/{self.rank}", json.dumps(asdict(message)))

    def _posted(self) -> list[Message]:
        """Read what processes have to say about the present message."""
        keys = [f"{self._name}/{self._number}/{rank}" for rank in range(self.size)]
        return [Message(**json.loads(self._store.get(key))) for key in keys if self._store.check([key])]

    def _come_to(self, own: Message) -> None:
        """Take part in the messages of the others, until they come to that of this process, which has failed."""
        while not self._lost:
            there = self._at_the_next(own)
            target = max([m for m in there if not m.failed] or there, key=lambda m: m.depth)
            if (target.kind, target.depth) == (own.kind, own.depth):
                return
            zeros = torch.zeros(target.length, dtype=getattr(torch, target.dtype), device=target.device)
            reduces = target.kind != "gather"
            whole = zeros.new_empty(0 if reduces else self.size * len(zeros))
            self._send(self._reducing(zeros) if reduces else self._gathering(zeros, whole), own)

    def _at_the_next(self, own: Message) -> list[Message]:
        """Leave a note before the next message, and wait until all others have come to it, or have failed."""
        self._number += 1
        self._post(own)
        self._store.set(f"{self._name}/{self._number}", "failed")
        end = time.monotonic() + TIMEOUT.total_seconds()
        while len(there := self._posted()) < self.size:
            if self._store.check([f"{self._name}/lost"]) or time.monotonic() > end:
                self._lost = f"the others do not come to where {own.failed}"
                raise OtherProcess(self._lost)
            time.sleep(0.01)
        self._number -= 1
        return there


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


_known: WeakKeyDictionary[Any, Channel] = WeakKeyDictionary()


def channel_of(group: Any) -> Channel:
    """Return the channel of a group, which is made once, by all its members."""
    if group not in _known:
        _known[group] = Channel(group)
    return _known[group]
