"""The commands ``sharpscope predict | analyze``, for the user's own model, loss and data as well."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..errors import Refused
from ._common import find_study, need_extras, refusing

TASK = "MODULE:FUNCTION, a function that returns (model, loss, data)"


ONLY = (
    "the optimizer is gradient descent (--lr, --wd, --momentum); the threshold of an adaptive one depends on averages"
    " that weights alone do not tell (a Monitor reads them from the live optimizer)"
)


class _Help(argparse.Action):
    """The options of `predict`, then the runs of the study named before."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> NoReturn:
        parser.print_help()
        if namespace.study is not None:
            from ._predict import predictable_runs

            print(f"\n{predictable_runs(find_study(namespace.study))}")
        parser.exit()


def add(commands: Any) -> None:
    """Add the parsers of these commands."""
    predict = commands.add_parser(
        "predict",
        help="what an optimizer does next: its central flow, and then the optimizer itself",
        description="Predict what gradient descent does next by its central flow, then run it beside the flow.",
        epilog="either STUDY and RUN (a network run of a study: `sharpscope predict STUDY --help` lists them), or"
        f" --task (your own model); {ONLY}",
        add_help=False,
    )
    predict.add_argument("-h", "--help", action=_Help, nargs=0, help="show this, and the runs of STUDY")
    predict.add_argument("study", metavar="STUDY", nargs="?", help="name of a study")
    predict.add_argument("run", metavar="RUN", nargs="?", help="name of one of its network runs, such as 'digits BN'")
    predict.add_argument("--step", type=int, default=1000, help="steps of training before (default: 1000)")
    predict.add_argument("--task", help=TASK)
    predict.add_argument("--checkpoint", type=Path, help="file with the model's weights (safetensors, or a state dict)")
    _add_rule(predict)
    predict.add_argument("--steps", type=int, default=500, help="steps to predict (default: 500)")
    predict.add_argument("--points", type=int, default=25, help="measurements in between (default: 25)")
    predict.add_argument("--out", type=Path, default=Path("runs/prediction"), help="directory of the report")
    predict.set_defaults(act=_predict)
    analyze = commands.add_parser(
        "analyze",
        help="measure a series of checkpoints, and what is new in it when called again",
        description="Measure sharpness along a series of checkpoints; called again, only what is new or has changed.",
        epilog=f"files are safetensors or state dicts of torch, which are read without running what is in them; {ONLY}",
    )
    analyze.add_argument(
        "checkpoints", metavar="CHECKPOINTS", type=Path, nargs="+", help="files, or a directory of them"
    )
    analyze.add_argument("--task", required=True, help=TASK)
    _add_rule(analyze)
    analyze.add_argument("--k", type=int, default=1, help="eigenvalues to find (default: 1)")
    analyze.add_argument("--out", type=Path, default=Path("runs/analysis"), help="directory of measurements and report")
    analyze.set_defaults(act=_analyze, again="the same command goes on from the last one that was measured")


def _add_rule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lr", type=float, help="learning rate of gradient descent")
    parser.add_argument("--wd", type=float, default=0.0, help="weight decay")
    parser.add_argument("--momentum", type=float, default=0.0, help="heavy-ball momentum")


def _predict(args: argparse.Namespace) -> int:
    from ..errors import Unusable
    from ..optimizers import GD
    from ._predict import predict_checkpoint, predict_study

    need_extras()
    common = {"steps": args.steps, "points": args.points, "out": args.out}
    with refusing(Unusable, ValueError):
        if args.task:
            if args.study:
                raise Refused("give either a study and its run, or --task, not both")
            if args.lr is None:
                raise Refused("--task needs --lr, the learning rate of gradient descent")
            rule = GD(args.lr, args.wd, args.momentum)
            outcome = predict_checkpoint(args.task, args.checkpoint, rule, **common)
        elif args.study and args.run:
            study = find_study(args.study)
            outcome = predict_study(args.study, study.Config(), args.run, start=args.step, **common)
        else:
            raise Refused("give a study and one of its network runs, or --task; see `sharpscope predict --help`")
    print(f"{outcome}\n\nreport: {args.out / 'report.html'}")
    return 0


def _analyze(args: argparse.Namespace) -> int:
    from ..errors import Unusable
    from ..monitoring.checkpoint_series import analyze
    from ..optimizers import GD
    from ..records.checkpoints import load_task
    from ..studies._framework.run import environment
    from ._predict import progress

    need_extras()
    with refusing(Unusable, ValueError):
        if args.lr is None and (args.wd or args.momentum):
            raise Refused("--wd and --momentum say nothing without --lr, the learning rate")
        rule = None if args.lr is None else GD(args.lr, args.wd, args.momentum)
        found = analyze(
            *load_task(args.task),
            args.checkpoints,
            args.out,
            name=args.task,
            rule=rule,
            k=args.k,
            environment=environment(),
            progress=progress(),
        )
    for why in found.refused.values():
        print(f"sharpscope: not measured: {why}", file=sys.stderr)
    print(f"{found.table}\n\n{found.summary}\n\nreport: {args.out / 'report.html'}")
    return 0
