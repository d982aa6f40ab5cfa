"""The command line, ``sharpscope list | run | report | predict | analyze | watch``.

The exit status is 0 when every deciding claim holds, 1 when one does not, 2 when nothing could be run.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

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
    """Run a command; return the exit status."""
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
    except KeyboardInterrupt:
        print(f"\nsharpscope: stopped; {again}", file=sys.stderr)
        return 130
