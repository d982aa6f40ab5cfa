"""``sharpscope list | run | report``."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._common import Refused, find_study, need_extras, refusing

OPTIONS = ("quick", "out", "workers")


def add(commands: Any) -> None:
    """Add the parsers of these commands."""
    listing = commands.add_parser("list", help="every study, its paper and its claims")
    listing.set_defaults(act=_list)
    run = commands.add_parser(
        "run",
        help="run a study and write its report",
        epilog="`sharpscope run NAME --help` shows the study's fields",
        add_help=False,
        allow_abbrev=False,  # what is no option of ours may be a field of the study
    )
    run.add_argument("-h", "--help", action=_Help, nargs=0, help="show this, and the fields of the study NAME")
    run.add_argument("study", metavar="NAME", help="name of a study, or all")
    run.add_argument("--quick", action="store_true", help="small sizes")
    run.add_argument("--out", type=Path, help="directory of the run (default: runs/NAME or runs/NAME-quick)")
    run.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes (default: one per core, up to 8)"
    )
    run.set_defaults(act=_run)
    report = commands.add_parser("report", help="write the report of a finished run again")
    report.add_argument("directory", type=Path)
    report.set_defaults(act=_report)


class _Help(argparse.Action):
    """The options of `run`, then the fields of the study named before."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> NoReturn:
        parser.print_help()
        if namespace.study not in (None, "all"):
            study = find_study(namespace.study)
            _configure(namespace.study, study, study.QUICK if namespace.quick else study.Config(), ["--help"])
        parser.exit()


def _list(args: argparse.Namespace) -> int:
    from ..studies._study import discover

    for name, study in discover().items():
        print(f"{name}\n  {study.PAPER}")
        for claim in study.CLAIMS:
            mark = "" if claim.deciding else " (reported, does not decide)"
            print(f"  - [{claim.part}] {claim.sentence}: {claim.criterion.text}{mark}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from ..studies._study import discover

    need_extras()
    if args.study == "all":
        if args.rest:
            raise Refused(f"{args.rest[0]} is a field of one study; `run all` takes only --quick, --out and --workers")
        names = list(discover())
        statuses = [_run_one(n, args, [], (args.out or Path("runs")) / _folder(n, args.quick)) for n in names]
        return max(statuses)
    return _run_one(args.study, args, args.rest, args.out or Path("runs") / _folder(args.study, args.quick))


def _folder(name: str, quick: bool) -> str:
    return f"{name}-quick" if quick else name


def _run_one(name: str, args: argparse.Namespace, rest: Sequence[str], out: Path) -> int:
    from ..studies._run import Unusable, run_study

    study = find_study(name)
    config = _configure(name, study, study.QUICK if args.quick else study.Config(), rest)
    with refusing(Unusable):
        verdicts = run_study(name, config, out, workers=args.workers)
    return _print(verdicts, out)


def _report(args: argparse.Namespace) -> int:
    from ..studies._run import Unusable, reread

    need_extras()
    with refusing(Unusable, LookupError):
        verdicts = reread(args.directory)
    return _print(verdicts, args.directory)


def _configure(name: str, study: Any, default: Any, rest: Sequence[str]) -> Any:
    """The study's Config with the fields given on the command line."""
    import tyro

    known = [field.name for field in dataclasses.fields(study.Config)]
    for flag in rest:
        field = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        if flag.startswith("--") and field not in (*known, "help", *(f"no_{k}" for k in known)):
            near = difflib.get_close_matches(field, [*known, *OPTIONS], 1, 0.4)
            hint = f"did you mean --{near[0].replace('_', '-')}?" if near else f"fields: {', '.join(known)}"
            raise Refused(f"{name} has no field '{field}'; {hint}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(study.Config, prog=f"sharpscope run {name}", default=default, args=list(rest))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        frame = re.compile("[│╭╮╰╯─]|-{3,}|^[|+]|[|+]$", re.MULTILINE)
        words = " ".join(frame.sub(" ", complaint.getvalue()).split())
        heading = r"Value error Error parsing (Config: )?|Missing argument |Unrecognized options "
        reason = re.sub(rf"^({heading})|\.? (Argument|For full) helptext.*", "", words)
        raise Refused(f"{' '.join(rest)} does not fit {name}: {reason}; see `sharpscope run {name} --help`") from stop
    except ValueError as error:
        raise Refused(str(error)) from error


def _print(verdicts: Sequence[Any], out: Path) -> int:
    """The verdicts as lines, and the exit status they mean."""
    from ..report import observed
    from ..studies._run import stopped

    part = ""
    for v in verdicts:
        if v.part != part:
            part = v.part
            print(f"\n{part}")
        mark = ("ok  " if v.passed else "FAIL") if v.deciding else ("yes " if v.passed else "no  ")
        print(f"  {mark} {v.claim}: {observed(v.observed)} ({v.criterion}{'' if v.deciding else '; does not decide'})")
    for job, note in stopped(out).items():
        print(f"  stop {job}: {note}")
    deciding = [v for v in verdicts if v.deciding]
    failed = [v for v in deciding if not v.passed]
    print(f"\n{len(deciding) - len(failed)} of {len(deciding)} deciding claims hold; report: {out / 'report.html'}")
    return 1 if failed else 0
