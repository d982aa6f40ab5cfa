"""Engines that carry out calls in this process, or in processes on this machine, with the face of an executor.

``submit(call, *arguments)`` gives a future with ``done()``, ``result()`` and ``cancel()``.  A process that is killed
costs the call that it works on and no other; one that is cancelled ends.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...errors import Unusable

KILLED = "a worker process was killed (out of memory? --workers 1 needs the least)"


class Here:
    """An engine that is this process, whose calls have ended when they have been submitted."""

    slots = 1

    def submit(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Carry out a call."""
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future


class Workers:
    """An engine of up to `slots` processes of one thread, started as they are needed."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.idle: list[Worker] = []
        os.environ.setdefault("OMP_NUM_THREADS", "1")

    def submit(self, call: Callable[..., Any], *arguments: Any) -> "Worker":
        """Let a process carry out a call.

        Raises:
            Exception: whatever pickle raises for a call that cannot be sent.
        """
        worker = self.idle.pop() if self.idle else Worker(self)
        try:
            worker.connection.send((call, arguments))
        except OSError:  # killed while it had nothing to do: its future will say so
            pass
        except Exception:
            self.idle.append(worker)
            raise
        return worker

    def shutdown(self) -> None:
        """End the processes, which have nothing to do."""
        for worker in self.idle:
            worker.cancel()


class Worker:
    """A process, and the future of the call that it works on."""

    def __init__(self, owner: Workers) -> None:
        self._owner = owner
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it inherits this: Ctrl-C is for its parent
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, interrupt)
        theirs.close()

    def done(self) -> bool:
        """Tell whether the call has ended, or the process."""
        return self.connection.poll()

    def result(self) -> Any:
        """Return the value of the call, or raise its error; Unusable where the process was killed."""
        try:
            error, value = self.connection.recv()
        except (EOFError, OSError) as gone:
            self.cancel()
            raise Unusable(KILLED) from gone
        except BaseException:
            self._owner.idle.append(self)
            raise
        self._owner.idle.append(self)
        if error is not None:
            raise error
        return value

    def cancel(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _serve(connection: "Connection[Any, Any]") -> None:
    """Carry out calls, one after the other."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            call, arguments = connection.recv()
            answer: tuple[Exception | None, Any] = (None, call(*arguments))
        except EOFError:
            return
        except Exception as error:  # of a study that cannot be imported here
            answer = (error, None)
        with suppress(BrokenPipeError):  # nobody waits for it any more
            connection.send(answer)


def _end_with_parent() -> None:
    """A worker whose parent was killed must not write on, beside the run that goes on in its place."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
