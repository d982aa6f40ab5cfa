"""The commands ``list``, ``run`` and ``report`` of the command line."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import Refused, Unusable
from ..studies._framework.claims import WIDER
from ._common import find_study, need_extras, refusing

OPTIONS = ("quick", "full", "out", "workers", "on", "seeds")
WORKERS = min(os.cpu_count() or 1, 8)


def add(commands: Any) -> None:
    """Add the parsers of these commands."""
    listing = commands.add_parser("list", help="every study and its paper, or the claims of one")
    listing.add_argument("study", metavar="NAME", nargs="?", help="name of a study: its claims as well")
    listing.add_argument("--claims", action="store_true", help="the claims of all studies")
    listing.set_defaults(act=_list)
    run = commands.add_parser(
        "run",
        help="run a study, or all of them side by side, and write the report",
        epilog="`sharpscope run NAME --help` shows the study's fields",
        add_help=False,
        allow_abbrev=False,  # what is no option of ours may be a field of the study
    )
    run.add_argument("-h", "--help", action=_Help, nargs=0, help="show this, and the fields of the study NAME")
    run.add_argument("study", metavar="NAME", help="name of a study, or all: side by side, with one page over them")
    run.add_argument("--quick", action="store_true", help="small sizes")
    run.add_argument("--full", action="store_true", help="full sizes (the default)")
    run.add_argument("--seeds", type=int, metavar="N", help="repeat under N seeds, from that of the configuration on")
    run.add_argument("--out", type=Path, help="directory of the run (default: runs/NAME or runs/NAME-quick)")
    run.add_argument("--workers", type=int, default=WORKERS, help="processes (default: one per core, up to 8)")
    run.add_argument("--on", metavar="ENGINE", help="run on dask://HOST:PORT, slurm:NAME=VALUE,... or MODULE:EXECUTOR")
    run.set_defaults(act=_run, again="the same command goes on from the last checkpoint")
    report = commands.add_parser(
        "report",
        help="write the report of a finished run, or of a run of all, again",
        description="Write report.html and its figures again from the measurements of a finished run.",
        epilog="DIRECTORY is the --out of a `sharpscope run` (default: runs/NAME or runs/NAME-quick)",
    )
    report.add_argument(
        "directory", metavar="DIRECTORY", type=Path, help="directory of a finished run, or of `run all`"
    )
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
    from ..studies._framework.study import find, headings, known

    names = known() if args.study is None else [args.study]
    width = max(map(len, names))
    status = 0
    for name in names:
        try:
            study = find(name) if args.study is None else find_study(name)
        except (Refused, ModuleNotFoundError):
            raise
        except Exception as error:  # the others can be listed
            print(f"{name:{width}}  cannot be imported: {type(error).__name__}: {error}")
            status = 2
            continue
        print(f"{name:{width}}  {headings(study)[0]}: {study.PAPER}")
        for claim in study.CLAIMS if args.claims or args.study else ():
            mark = "" if claim.deciding else " (reported, does not decide)"
            print(f"  - [{claim.part}] {claim.sentence}: {claim.criterion.text}{mark}")
    return status


def _run(args: argparse.Namespace) -> int:
    from ..studies._framework.batch import all_entries, entry, run_batch

    need_extras()
    if args.quick and args.full:
        raise Refused("--quick and --full contradict each other; give one of them")
    if args.seeds is not None and args.seeds < 1:
        raise Refused(f"--seeds is {args.seeds}; it must be at least 1")
    out = args.out or Path("runs") / (f"{args.study}-quick" if args.quick else args.study)
    with refusing(Unusable):
        if args.study == "all":
            if args.rest:
                options = ", ".join(f"--{name}" for name in OPTIONS)
                raise Refused(f"{args.rest[0]} is a field of one study; `run all` takes only {options}")
            entries = all_entries(out, quick=args.quick, seeds=args.seeds)
            with _engine(args.on, out) as engine:
                run_batch(entries, workers=args.workers, engine=engine, index=out)
            return _print_all(entries, out)
        study = find_study(args.study)
        config = _configure(args.study, study, study.QUICK if args.quick else study.Config(), args.rest)
        one = entry(args.study, config, out, args.seeds)
        with _engine(args.on, out) as engine:
            run_batch([one], workers=args.workers, engine=engine)
    return _print_one(one)


def _engine(line: str | None, out: Path) -> contextlib.AbstractContextManager[Any]:
    """The engine that a line names, or None where there is no line; its files are beside the directory of the run."""
    from ..studies._framework.engines import engine_of

    return contextlib.nullcontext() if line is None else engine_of(line, out.absolute().with_name(f"{out.name}.jobs"))


def _report(args: argparse.Namespace) -> int:
    from ..studies._framework.batch import ALL, run_batch, stored_entries

    need_extras()
    several = (args.directory / ALL).exists()
    with refusing(Unusable, LookupError):
        entries = stored_entries(args.directory)
        run_batch(entries, workers=WORKERS, index=args.directory if several else None)
    return _print_all(entries, args.directory) if several else _print_one(entries[0])


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


def _print_one(e: Any) -> int:
    """Every verdict on a study as a line, and the exit status they mean."""
    part = ""
    for v in e.verdicts:
        if v.part != part:
            part = v.part
            print(f"\n{part}")
        print(f"  {_line(v)}")
    for job, note in e.stopped.items():
        print(f"  stop {job}: {note}")
    _complain([e])
    if e.verdicts or e.seeds:
        where = f"on {e.seeds} seeds; page: {e.page}" if e.seeds else f"report: {e.page}"
        print(f"\n{_tally(e.verdicts)}{' ' if e.seeds else '; '}{where}")
    return _status(e)


def _line(v: Any) -> str:
    from ..studies._framework.pages import observed

    mark = ("ok  " if v.passed else "FAIL") if v.deciding else ("yes " if v.passed else "no  ")
    claim = v.claim if v.passed or v.kind != WIDER else f"not supported here: {v.claim}"
    return f"{mark} {claim}: {observed(v.observed)} ({v.criterion}{'' if v.deciding else '; does not decide'})"


def _failed(verdicts: Sequence[Any]) -> list[Any]:
    return [v for v in verdicts if v.deciding and not v.passed]


def _tally(verdicts: Sequence[Any]) -> str:
    deciding = sum(v.deciding for v in verdicts)
    return f"{deciding - len(_failed(verdicts))} of {deciding} deciding claims hold"


def _print_all(entries: Sequence[Any], out: Path) -> int:
    """One line per study, and the claims that fail."""
    from ..studies._framework.pages import duration

    width = max((len(e.study) for e in entries), default=0)
    for e in entries:
        mark = "none" if e.failures else "FAIL" if _failed(e.verdicts) else "ok  "
        wider = sum(v.kind == WIDER and not v.passed for v in e.verdicts)
        aside = f", {wider} wider not supported here" if wider else ""
        seeds = f" on {e.seeds} seeds" if e.seeds else ""
        text = f"{_tally(e.verdicts)}{seeds}{aside}" if e.verdicts else "could not run"
        print(f"{mark} {e.study:{width}}  {text}{f' ({e.note})' if e.note else ''}")
        for v in _failed(e.verdicts):
            print(f"     {_line(v)}")
        for job, note in e.stopped.items():
            print(f"     stop {job}: {note}")
    _complain(entries)
    verdicts = [v for e in entries for v in e.verdicts]
    spent = duration(sum(e.seconds for e in entries))
    print(f"\n{_tally(verdicts)} in {len(entries)} studies, {spent} of processor time; page: {out / 'index.html'}")
    return max((_status(e) for e in entries), default=0)


def _complain(entries: Sequence[Any]) -> None:
    for e in entries:
        for sentence in e.failures:
            print(f"sharpscope: {' '.join(sentence.split())}", file=sys.stderr)


def _status(e: Any) -> int:
    return 2 if e.failures else 1 if _failed(e.verdicts) else 0
