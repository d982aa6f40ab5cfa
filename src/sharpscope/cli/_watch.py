"""``sharpscope watch``: the page of a running study or a monitored training loop."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import Refused
from ._common import need_extras, refusing

OURS = (".tmp", ".jsonl")
"""Endings of what a run may have written before it says what it is."""


def add(commands: Any) -> None:
    """Add the parser of this command."""
    watch = commands.add_parser(
        "watch",
        help="serve the page of a running job to this machine, and keep it up to date",
        epilog="RUN_DIR is the --out of a `sharpscope run`, or the directory of a Monitor",
    )
    watch.add_argument("directory", metavar="RUN_DIR", type=Path)
    watch.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: any that is free)")
    watch.set_defaults(act=_watch)


def _watch(args: argparse.Namespace) -> int:
    from ..report.server import Live, server

    need_extras()
    _check(args.directory)
    try:
        serving = server(Live(args.directory, _page, _finished), args.port)
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
    foreign = [p.name for p in directory.iterdir() if p.suffix not in OURS and p.name != "log" and p.name[0] != "."]
    if foreign:
        raise Refused(
            f"{directory} holds no run (there is {sorted(foreign)[0]}, and neither config.json nor monitor.json)"
        )


def _is_run(directory: Path) -> bool:
    from ..studies._framework.run import stored_request
    from ..studies._framework.study import find

    if (directory / "monitor.json").exists():
        return True
    return (directory / "config.json").exists() and bool(find(stored_request(directory)["study"]))


def _page(directory: Path) -> str | None:
    """The page of what is there so far; None where there is nothing yet."""
    from ..monitoring import monitor
    from ..studies._framework import run

    if (directory / "monitor.json").exists():
        return monitor.page(directory)
    return run.page(directory) if (directory / "config.json").exists() else None


def _finished(directory: Path) -> bool:
    from ..monitoring.page import RUN
    from ..records.run_log import RunLog

    if (directory / "monitor.json").exists():
        return RunLog(directory, RUN).finished
    return (directory / "report.html").exists() and (directory / "history.parquet").exists()
