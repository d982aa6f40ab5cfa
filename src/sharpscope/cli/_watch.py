"""The command ``sharpscope watch``: serves the page of a running study or a monitored training loop."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import Refused
from ._common import need_extras, refusing

OWN_SUFFIXES = (".tmp", ".jsonl")
"""Endings of files that a run may have written before its description."""


def add(commands: Any) -> None:
    """Add the parser of this command."""
    watch = commands.add_parser(
        "watch",
        help="serve the page of a running job to this machine, and keep it up to date",
        description="Serve the page of a running job to this machine, and keep it up to date until Ctrl-C.",
        epilog="RUN_DIR is the --out of a `sharpscope run`, or the directory of a Monitor",
    )
    watch.add_argument("directory", metavar="RUN_DIR", type=Path, help="directory of the running job")
    watch.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: any that is free)")
    watch.set_defaults(act=_watch)


def _watch(args: argparse.Namespace) -> int:
    from ..report.server import Live, server

    need_extras()
    _check(args.directory)
    try:
        serving = server(Live(args.directory, page, finished), args.port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refused(f"port {args.port} cannot be had ({reason}); leave --port out for one that is free") from error
    with serving:
        try:
            print(f"{args.directory} is at http://127.0.0.1:{serving.server_port}/ (Ctrl-C ends this)", flush=True)
            serving.serve_forever()
        except KeyboardInterrupt:
            print(f"\nno longer serving {args.directory}; the run itself is not touched")
    return 0


def _check(directory: Path) -> None:
    """Refuse what is not the directory of a run, and never will be."""
    from ..errors import Unusable

    if not directory.is_dir():
        raise Refused(f"there is no directory {directory}; give that of a `sharpscope run`, or of a Monitor")
    with refusing(Unusable, ValueError, LookupError):
        if _is_run(directory):
            return
    if several := [name for name in ("all.json", "seeds.json") if (directory / name).exists()]:
        inside = sorted(p.parent.name for p in directory.glob("*/config.json"))
        one = f", {directory / inside[0]} say" if inside else ""
        raise Refused(f"{directory} holds several runs ({several[0]}): watch one{one}, or open {directory}/index.html")
    names = sorted(p.name for p in directory.iterdir() if p.suffix not in OWN_SUFFIXES)
    foreign = [name for name in names if name != "log" and not name.startswith(".")]
    if foreign:
        raise Refused(f"{directory} holds no run (there is {foreign[0]}, and neither config.json nor monitor.json)")


def _is_run(directory: Path) -> bool:
    from ..studies._framework.run import stored_request
    from ..studies._framework.study import find

    if _is_monitored(directory):
        return True
    return (directory / "config.json").exists() and bool(find(stored_request(directory)["study"]))


def _is_monitored(directory: Path) -> bool:
    from ..monitoring.recorder import DESCRIPTION

    return (directory / DESCRIPTION).exists()


def page(directory: Path) -> str | None:
    """Make the page of what is there so far; None where there is nothing yet."""
    from ..monitoring.page import render_directory
    from ..studies._framework import run

    if _is_monitored(directory):
        return render_directory(directory)
    return run.page(directory) if (directory / "config.json").exists() else None


def finished(directory: Path) -> bool:
    """Say whether the run in a directory has ended."""
    from ..monitoring.recorder import RUN
    from ..records import RunLog

    if _is_monitored(directory):
        return RunLog(directory, RUN).finished
    return (directory / "report.html").exists() and (directory / "history.parquet").exists()
