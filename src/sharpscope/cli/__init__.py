"""The command line, ``sharpscope list | run | report | predict | analyze | watch``.

The exit status is 0 when every deciding claim holds, 1 when one does not, 2 when nothing could be run.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import Refused
from . import _studies, _tasks, _watch
from ._common import EXTRAS as EXTRAS
from ._common import HINT, Parser


def _version() -> str:
    try:
        return version("sharpscope")
    except PackageNotFoundError:
        return "of a checkout that is not installed"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, that of this process where none is given; return the exit status."""
    if argv is None:
        _stop_on_signals()
    parser = Parser(
        prog="sharpscope",
        description="Measure the sharpness of normalized networks, study by study.",
        epilog=f"All but --help and --version: {HINT}.",
    )
    parser.add_argument("--version", action="version", version=f"sharpscope {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for chapter in (_studies, _tasks, _watch):
        chapter.add(commands)
    again = "the same command starts again"
    try:
        args, rest = parser.parse_known_args(argv)
        again = getattr(args, "again", again)
        if rest and args.command != "run":
            parser.error(f"unknown argument {rest[0]}")
        args.rest = rest
        status = int(args.act(args))
        sys.stdout.flush()
        return status
    except Refused as refusal:
        print(f"sharpscope: {refusal}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sharpscope"):
            raise
        print(f"sharpscope: {error.name} is not installed; {HINT}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads what is printed (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        print(f"\nsharpscope: stopped; {again}", file=sys.stderr)
        status = 128 + (stop.args or (signal.SIGINT,))[0]
        if argv is None:
            _end_at_once(status)
        return status


def _stop_on_signals() -> None:
    """Have the system end this process as Ctrl-C does: with a sentence, and with nothing left in queues."""
    here = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != here:  # a process that an executor has forked
            os._exit(128 + number)
        raise KeyboardInterrupt(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


def _end_at_once(status: int) -> None:
    """End this process where an executor has threads that would be waited for, and its processes."""
    for child in multiprocessing.active_children():
        child.kill()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
