"""``sharpscope list | run | report | predict``: exit status 0 when every deciding claim holds, 1 when one does not, 2
when nothing could be run.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

EXTRAS = ("tyro", "safetensors", "pyarrow", "sklearn", "tqdm", "matplotlib")
HINT = "the command line needs the extra packages of sharpscope[studies]: pip install 'sharpscope[studies]'"
OPTIONS = ("quick", "out", "workers")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _Parser(prog="sharpscope", description="Measure the sharpness of normalized networks, study by study.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    commands.add_parser("list", help="every study, its paper and its claims")
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
    predict = commands.add_parser(
        "predict",
        help="what an optimizer does next: its central flow, and then the optimizer itself",
        epilog="either STUDY and RUN (a network run of a study), or --task (your own model)",
    )
    predict.add_argument("study", nargs="?", help="name of a study")
    predict.add_argument("run", nargs="?", help="name of one of its network runs, such as 'digits BN'")
    predict.add_argument("--step", type=int, default=1000, help="steps of training before (default: 1000)")
    predict.add_argument("--task", help="MODULE:FUNCTION, a function that returns (model, loss, data)")
    predict.add_argument("--checkpoint", type=Path, help="safetensors file with the model's weights")
    predict.add_argument("--lr", type=float, help="learning rate of gradient descent")
    predict.add_argument("--wd", type=float, default=0.0, help="weight decay")
    predict.add_argument("--momentum", type=float, default=0.0, help="heavy-ball momentum")
    predict.add_argument("--steps", type=int, default=500, help="steps to predict (default: 500)")
    predict.add_argument("--points", type=int, default=25, help="readings on the way (default: 25)")
    predict.add_argument("--out", type=Path, default=Path("runs/prediction"), help="directory of the report")
    report = commands.add_parser("report", help="write the report of a finished run again")
    report.add_argument("directory", type=Path)
    try:
        args, rest = parser.parse_known_args(argv)
        if rest and args.command != "run":
            parser.error(f"unknown argument {rest[0]}")
        if args.command == "list":
            return _list()
        if args.command == "report":
            return _report(args.directory)
        if args.command == "predict":
            return _predict(args)
        return _run(args, rest)
    except _Refused as refusal:
        print(f"sharpscope: {refusal}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sharpscope"):
            raise
        print(f"sharpscope: {error.name} is not installed; {HINT}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsharpscope: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


class _Refused(Exception):
    """A sentence for the user; exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message}; see `{self.prog} --help`")


class _Help(argparse.Action):
    """The options of `run`, then the fields of the study named before."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> NoReturn:
        parser.print_help()
        if namespace.study not in (None, "all"):
            study = _find(namespace.study)
            _configure(namespace.study, study, study.QUICK if namespace.quick else study.Config(), ["--help"])
        parser.exit()


def _list() -> int:
    from .studies._study import discover

    for name, study in discover().items():
        print(f"{name}\n  {study.PAPER}")
        for claim in study.CLAIMS:
            mark = "" if claim.deciding else " (reported, does not decide)"
            print(f"  - [{claim.part}] {claim.sentence}: {claim.criterion.text}{mark}")
    return 0


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from .studies._study import discover

    _need_extras()
    if args.study == "all":
        if rest:
            raise _Refused(f"{rest[0]} is a field of one study; `run all` takes only --quick, --out and --workers")
        names = list(discover())
        statuses = [_run_one(n, args, [], (args.out or Path("runs")) / _folder(n, args.quick)) for n in names]
        return max(statuses)
    return _run_one(args.study, args, rest, args.out or Path("runs") / _folder(args.study, args.quick))


def _need_extras() -> None:
    """Now, and not at the end of a long run."""
    for name in EXTRAS:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


def _folder(name: str, quick: bool) -> str:
    return f"{name}-quick" if quick else name


def _run_one(name: str, args: argparse.Namespace, rest: Sequence[str], out: Path) -> int:
    from .studies._run import Unusable, run_study

    study = _find(name)
    config = _configure(name, study, study.QUICK if args.quick else study.Config(), rest)
    try:
        verdicts = run_study(name, config, out, workers=args.workers)
    except Unusable as error:
        raise _Refused(str(error)) from error
    return _print(verdicts, out)


def _report(directory: Path) -> int:
    from .studies._run import Unusable, reread

    _need_extras()
    try:
        return _print(reread(directory), directory)
    except (Unusable, LookupError) as error:
        raise _Refused(str(error)) from error


def _predict(args: argparse.Namespace) -> int:
    from .rules import GD
    from .studies import _predict
    from .studies._run import Unusable

    _need_extras()
    common = (args.steps, args.points, args.out)
    try:
        if args.task:
            if args.study:
                raise _Refused("give either a study and its run, or --task, not both")
            if args.lr is None:
                raise _Refused("--task needs --lr, the learning rate of gradient descent")
            said = _predict.predict_checkpoint(args.task, args.checkpoint, GD(args.lr, args.wd, args.momentum), *common)
        elif args.study and args.run:
            study = _find(args.study)
            said = _predict.predict_study(args.study, study.Config(), args.run, args.step, *common)
        else:
            raise _Refused("give a study and one of its network runs, or --task; see `sharpscope predict --help`")
    except (Unusable, ValueError) as error:
        raise _Refused(str(error)) from error
    print(f"{said}\n\nreport: {args.out / 'report.html'}")
    return 0


def _find(name: str) -> Any:
    from .studies._study import find

    try:
        return find(name)
    except LookupError as error:
        raise _Refused(str(error)) from error


def _configure(name: str, study: Any, default: Any, rest: Sequence[str]) -> Any:
    """The study's Config with the fields given on the command line."""
    import tyro

    known = [field.name for field in dataclasses.fields(study.Config)]
    for flag in rest:
        field = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        if flag.startswith("--") and field not in (*known, "help", *(f"no_{k}" for k in known)):
            near = difflib.get_close_matches(field, [*known, *OPTIONS], 1, 0.4)
            hint = f"did you mean --{near[0].replace('_', '-')}?" if near else f"fields: {', '.join(known)}"
            raise _Refused(f"{name} has no field '{field}'; {hint}")
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
        raise _Refused(f"{' '.join(rest)} does not fit {name}: {reason}; see `sharpscope run {name} --help`") from stop
    except ValueError as error:
        raise _Refused(str(error)) from error


def _print(verdicts: Sequence[Any], out: Path) -> int:
    """The verdicts as lines, and the exit status they mean."""
    from .report import observed
    from .studies._run import stopped

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
