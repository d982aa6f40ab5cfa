"""Measures a series of checkpoints, one by one into a directory.

The directory holds ``analysis.json`` (task, k and number of parameters), an append-only log (one line a checkpoint,
under the digest of its content), ``history.parquet`` and ``report.html``.  What is in the log is not measured again: a
kill loses at most the checkpoint in work, and a later call measures what is new or has changed.  The log holds what
depends on the weights alone; what the optimizer adds (threshold, ratio) is computed from it, so that another learning
rate costs nothing.  While measurements are taken, a checkpoint of the log has the vectors that the eigenvalue solvers
start from (about six times k + 5 times the weights): an analysis that is cut short goes on to the numbers of an
uninterrupted one, to the last bit.

P parameters.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..autodiff.objective import Objective
from ..autodiff.whole import Loss
from ..errors import InvalidValue, NoSecondDerivative, NotConverged, Unusable
from ..linalg.memory import Memory
from ..measures import measures
from ..measures.iterate import ERROR, LARGE, Iterate
from ..optimizers.gd import GD
from ..records import checkpoints
from ..records.fields import from_fields
from ..records.files import is_draft, read_json, remove_drafts, sync, write_json
from ..records.history import History, Value
from ..records.run_log import RunLog
from ..report.html import write_report
from ..symmetry.scale_groups import ScaleGroups, find_groups
from .diagnosis import AT_THE_EDGE
from .page import CHARTS
from .recorder import RUN

ANALYSIS = "that of an analysis"

RTOL = 1e-3
"""Bound on the residuals relative to λ1: eigenvalues are then right to about RTOL² λ1/gap (seen: 1e-6 to 2e-5)."""

TABLE = (
    ("loss", "loss"),
    ("sharpness", "sharpness"),
    ("residual", "residual"),
    ("spherical_sharpness", "spherical"),
    ("radius", "radius"),
    ("stability_ratio", "s/threshold"),
)
"""Columns of the printed table, and their heads."""


@dataclass(frozen=True)
class Analysis:
    """The measurements of a series of checkpoints: a row each, and why some have none."""

    history: History
    rule: GD | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    measured: int = 0  # in this call; the others were in the log
    numbered: bool = False  # by their order, as their names say no step

    @property
    def table(self) -> str:
        """A line per checkpoint; a dash where there is no value."""
        columns = self.history.columns
        kept = [(name, head) for name, head in TABLE if any(v is not None for v in columns.get(name, []))]
        width = min(40, max([len("checkpoint"), *map(len, columns["checkpoint"])]))
        lines = [f"{'checkpoint':{width}}  {'step':>8}" + "".join(f"  {head:>11}" for _, head in kept)]
        for i, name in enumerate(columns["checkpoint"]):
            short = name if len(name) <= width else "…" + name[1 - width :]
            cells = ("-" if columns[c][i] is None else f"{columns[c][i]:.5g}" for c, _ in kept)
            lines.append(f"{short:{width}}  {columns['step'][i]:>8}" + "".join(f"  {cell:>11}" for cell in cells))
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """Sentences on what was measured, how it changed, and how far it is from the edge of stability."""
        sentences = (
            self._counts(),
            self._change("sharpness", "Sharpness"),
            self._change("spherical_sharpness", "Spherical sharpness"),
            self._change("radius", "The norm of the invariant weights"),
            self._stability(),
            self._gaps(),
            self._not_loaded(),
        )
        return " ".join(filter(None, sentences))

    def _counts(self) -> str:
        n, old = len(self.history), len(self.history) - self.measured
        text = f"{n} checkpoint{'s' * (n != 1)}: {self.measured} measured now, {old} known from before"
        text += f"; {len(self.refused)} could not be measured." if self.refused else "."
        return text + " Their names say no step each: they are numbered in their order." * self.numbered

    def _change(self, column: str, words: str) -> str:
        step, value = self._table("step", column)
        if len(value) < 2:
            return ""
        top = int(value.argmax())
        peak = f", with a peak of {value[top]:.4g} at step {step[top]:g}" if 0 < top < len(value) - 1 else ""
        ends = f"from {value[0]:.4g} at step {step[0]:g} to {value[-1]:.4g} at step {step[-1]:g}"
        return f"{words} goes {ends}{peak}."

    def _stability(self) -> str:
        step, ratios, sharpness = self._table("step", "stability_ratio", "sharpness")
        if self.rule is None or not len(ratios):
            return ""
        low, high = AT_THE_EDGE
        ratio = float(ratios[-1])
        where = "below" if ratio < low else "above" if ratio > high else "at"
        text = f"At step {step[-1]:g} sharpness / threshold is {ratio:.3g}: {where} the edge of stability"
        if ratio <= 0:
            return f"{text}."
        edge = self.rule.edge / (float(sharpness[-1]) + self.rule.weight_decay)
        return f"{text}, which this curvature meets at a learning rate of {edge:.3g}."

    def _gaps(self) -> str:
        notes = [(s, n) for s, n in zip(self.history.columns["step"], self._column("note"), strict=True) if n]
        if not notes:
            return ""
        more = f" ({len(notes) - 1} more have none either)" if len(notes) > 1 else ""
        return f"There is no curvature at step {notes[0][0]}: {notes[0][1]}{more}."

    def _not_loaded(self) -> str:
        names = next((names for names in self._column("kept") if names), None)
        return f"Not in the checkpoints, and left as the task returns them: {names}." if names else ""

    def _column(self, name: str) -> Sequence[Any]:
        return self.history.columns.get(name, [None] * len(self.history))

    def _table(self, *names: str) -> tuple[np.ndarray, ...]:
        known = set(names) <= self.history.columns.keys()
        return self.history.table(RUN, *names) if known else tuple(np.empty(0) for _ in names)


def analyze(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    places: Sequence[Path],
    out: Path,
    *,
    name: str = "",
    rule: GD | None = None,
    k: int = 1,
    environment: Mapping[str, object] | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Analysis:
    """Measure the checkpoints in `places` (files and directories) on `data`, and write the report into `out`.

    Args:
        model, loss, data: as of an `Objective`; the model is copied, and stays as it is.
        name: of the task; a directory belongs to one.
        rule: gradient descent as it trained them, for the distance to the edge.
        k: eigenvalues to find; those after the first are the columns sharpness2, sharpness3, ...
        progress: called with the fraction of the checkpoints that is done.

    Raises:
        Unusable: there is no checkpoint or none that fits, `out` holds something else, or the task has changed.
    """
    if k < 1:
        raise Unusable(f"k={k}: the number of eigenvalues is at least 1")
    files = checkpoints.series(places)
    name = name or type(model).__name__
    f = Objective(_copied(model), loss, data, group=None)
    log = _AnalysisLog(out, {"task": name, "k": k, "parameters": f.size})
    probe = _Probe(f, k, log.groups, log.state)
    digests = {path: _digest(path) for path in files}
    known = next((path for path in files if log.known.get(digests[path], {}).get("loss") is not None), None)
    if known is not None:
        probe.confirm(known, log.known[digests[known]]["loss"], out)
    refused, measured = _measure_new(probe, log, digests, progress)
    if len(refused) == len(files):
        others = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        raise Unusable(f"no checkpoint could be measured: {refused[files[0]]}{others}")
    labels = _labels(files)
    rows = {path: _with_rule(log.known[digests[path]], rule) for path in files if path not in refused}
    reasons = {labels[path]: reason for path, reason in refused.items()}
    history, numbered = _history(rows, labels)
    found = Analysis(history, rule=rule, refused=reasons, measured=measured, numbered=numbered)
    _write(
        found,
        out,
        subtitle=f"{name}: {type(model).__name__}, {f.size} parameters",
        config={"checkpoints": [str(p) for p in places], "k": k},
        environment=environment or {"torch": torch.__version__},
    )
    return found


def _history(rows: Mapping[Path, Mapping[str, Value]], labels: Mapping[Path, str]) -> tuple[History, bool]:
    """The rows with their steps, and whether these are only the order of the files, whose names say no step each."""
    steps = [checkpoints.step_of(path) for path in rows]
    numbered = None in steps or len(set(steps)) < len(steps)
    history = History(
        {"run": RUN, "step": i if numbered else step, "checkpoint": labels[path], **row}
        for i, (step, (path, row)) in enumerate(zip(steps, rows.items(), strict=True))
    )
    return history, numbered


class _AnalysisLog:
    """The analysis that a directory holds, the measurements in it by digest, and where the solvers were."""

    def __init__(self, out: Path, analysis: Mapping[str, Any]) -> None:
        self.path, self.analysis = out / "analysis.json", analysis
        there = _read_analysis(out, self.path)
        for key, value in analysis.items():
            if there and there.get(key) != value:
                mismatch = f"{key} {there.get(key)}, not {value}"
                raise Unusable(f"{out} holds a different analysis ({mismatch}); choose another --out")
        self.groups = None if there.get("invariant") is None else _groups_from_ranges(there["invariant"], self.path)
        with self.explained():
            self.log = RunLog(out, RUN)
            self._save()  # before anything else: it says whose directory this is
            remove_drafts(out)
            self.state = self.log.last_checkpoint()
            if not self.state:
                self.log.drop_damaged()
            self.known: dict[str, Mapping[str, Any]] = {row["digest"]: row for row in self.log.rows}

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of the operating system into a sentence."""
        try:
            yield
        except OSError as error:
            raise _unwritten(self.path.parent, error) from error

    def append(self, digest: str, row: Mapping[str, Value], probe: "_Probe") -> None:
        """Add a measurement, and then where the solvers are after it."""
        self.known[digest] = {"digest": digest, **row}
        with self.explained():
            if self.groups is None and probe.groups is not None:
                self.groups = probe.groups
                self._save()
            self.log.append(**self.known[digest])
            self.log.checkpoint(**probe.tensors())

    def begin(self, probe: "_Probe") -> None:
        """Note where the solvers are before the first measurement of a call, unless it goes on from an earlier one."""
        if not self.state:
            with self.explained():
                self.log.checkpoint(**probe.tensors())

    def end(self) -> None:
        """Drop what only an analysis that is cut short needs; the rows are brought to the disk before."""
        with self.explained():
            if self.log.path.exists():
                sync(self.log.path)
            self.log.state.unlink(missing_ok=True)

    def _save(self) -> None:
        invariant = None if self.groups is None else _ranges(self.groups)
        write_json(self.path, {**self.analysis, "invariant": invariant})


def _unwritten(out: Path, error: OSError) -> Unusable:
    kept = "what is there is kept, and the same command goes on from it"
    return Unusable(f"cannot write the analysis in {out}: {error.strerror}; {kept}")


def _read_analysis(out: Path, path: Path) -> dict[str, Any]:
    """Read analysis.json; the result is empty for a directory that is empty or not there yet."""
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(not is_draft(file) for file in out.iterdir())):
            raise Unusable(f"{out} is not empty and holds no analysis; choose another --out")
        return {}
    return read_json(path, {"task"}, ANALYSIS, "choose another --out")


def _ranges(groups: ScaleGroups) -> dict[str, Any]:
    """The invariant weights as ranges of their indices."""
    joint = groups.joint.cpu()
    breaks = ((joint.diff() != 1).nonzero().flatten() + 1).tolist()
    parts = joint.tensor_split(breaks) if len(joint) else ()
    return {"ranges": [[part[0].item(), part[-1].item() + 1] for part in parts], "cosine": groups.joint_defect}


def _groups_from_ranges(invariant: object, path: Path) -> ScaleGroups:
    try:
        found = from_fields(_Invariant, invariant)
    except InvalidValue as error:
        raise Unusable(f"{path} is not {ANALYSIS}: {error}; choose another --out") from error
    parts = [torch.arange(start, stop) for start, stop in found.ranges]
    return ScaleGroups({}, {}, {}, torch.cat([torch.empty(0, dtype=torch.long), *parts]), found.cosine)


@dataclass(frozen=True)
class _Invariant:
    """The invariant weights as they stand in ``analysis.json``."""

    ranges: tuple[tuple[int, int], ...]
    cosine: float


class _Probe:
    """A model into which one checkpoint after another is put, and what makes the next measurement cheap."""

    def __init__(self, f: Objective, k: int, groups: ScaleGroups | None, state: Mapping[str, Tensor]) -> None:
        self.f = f
        self.k = k
        self.groups = groups
        self.calls = int(state.get("calls", 0))  # measurements since the solvers started from nothing
        self.memories: Mapping[str, Memory] = _memories_of(state, f.weights())
        parts = checkpoints.constituents(f.model)
        self.first = {name: t.detach().clone() for name, t in parts.items() if not t.requires_grad}
        self.buffers = {name: id(parts[name]) for name in f.model.state_dict() if name in self.first}

    def tensors(self) -> dict[str, Tensor]:
        """Return where the solvers are, as tensors for a checkpoint."""
        parts = {f"{solver}:{key}": t for solver, m in self.memories.items() for key, t in m.tensors().items()}
        return {"calls": torch.tensor(self.calls), **parts}

    def load(self, content: bytes, name: str) -> tuple[Tensor, list[str]]:
        """The weights ``(P,)``, and which buffers are not in the file; those that are go into the model."""
        w, others = checkpoints.fit(self.f, checkpoints.read(content, name), name)
        checkpoints.write(self.f.model, self.first | others)
        loaded = {self.buffers[n] for n in others if n in self.buffers}
        return w, [n for n, part in self.buffers.items() if part not in loaded]

    def confirm(self, path: Path, loss: float, out: Path) -> None:
        """Raise Unusable unless the checkpoint still has this loss: old and new measurements must belong together."""
        w, _ = self.load(checkpoints.read_bytes(path), str(path))
        now = self.f.value(w).item()
        if not abs(now - loss) <= torch.finfo(w.dtype).eps ** 0.5 * abs(loss):
            raise Unusable(
                f"the loss at {path} is {now:.8g}, and was {loss:.8g} when it was measured into {out}: the task has"
                " changed, or draws its data anew each time; choose another --out"
            )

    def measure(self, path: Path) -> tuple[str, dict[str, Value]]:
        """Digest and measurements of a checkpoint."""
        content = checkpoints.read_bytes(path)
        w, not_loaded = self.load(content, str(path))
        loss = self.f.value(w).item()
        row: dict[str, Value] = {"loss": loss if math.isfinite(loss) else None, "kept": _listed(not_loaded)}
        try:
            row |= self._curvature(w) if math.isfinite(loss) else {"note": "the loss is not finite"}
        except (NotConverged, ValueError) as error:  # of products or gradients that are not finite
            row["note"] = str(error)
        except NoSecondDerivative as error:
            raise Unusable(str(error)) from error
        self.calls += 1
        return hashlib.sha256(content).hexdigest(), row

    def _curvature(self, w: Tensor) -> dict[str, Value]:
        if self.groups is None:  # found at the first checkpoint, and the same for all
            self.groups = find_groups(self.f, w)
        groups = self.groups
        options: dict[str, Any] = {"k": self.k, "rtol": RTOL, "start": self.memories}
        if self.f.size >= LARGE and self.k == 1:
            options["error"] = ERROR
        it = Iterate(self.f, w, step=self.calls, groups=groups, **options)
        row: dict[str, Value] = {"sharpness": measures.sharpness(it), "residual": it.top.residuals[0].item()}
        row |= {f"sharpness{i}": v for i, v in enumerate(it.top.values[1:].tolist(), start=2)}
        products = it.top.num_matvecs
        if groups.joint.numel():
            row |= {"spherical_sharpness": measures.spherical_sharpness(it), "radius": measures.radius(it)}
            products += 0 if groups.covers(self.f.size) else it.spherical_top.num_matvecs
        self.memories = it.memories
        return row | {"products": products}


def _measure_new(
    probe: _Probe, log: _AnalysisLog, digests: dict[Path, str], progress: Callable[[float], None]
) -> tuple[dict[Path, str], int]:
    """Measure the files that are not in the log; return the reasons why some could not be, and how many were.

    A digest is set to that of the content that was measured.
    """
    refused: dict[Path, str] = {}
    measured = 0
    log.begin(probe)
    for i, path in enumerate(digests):
        if digests[path] not in log.known:
            try:
                digests[path], row = probe.measure(path)
            except Unusable as error:
                refused[path] = str(error)
            else:
                log.append(digests[path], row, probe)
                measured += 1
        progress((i + 1) / len(digests))
    log.end()
    return refused, measured


def _memories_of(state: Mapping[str, Tensor], like: Tensor) -> dict[str, Memory]:
    """The memories of the solvers that `_Probe.tensors` wrote."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, t in state.items():
        solver, _, key = name.partition(":")
        if key:
            parts.setdefault(solver, {})[key] = t
    return {solver: Memory.of(tensors).to(like) for solver, tensors in parts.items()}


def _with_rule(row: Mapping[str, Any], rule: GD | None) -> dict[str, Any]:
    """The measurements of a checkpoint, and what follows from them for the optimizer."""
    own = {name: value for name, value in row.items() if name != "run"}
    if rule is None or own.get("sharpness") is None:
        return own
    threshold = rule.threshold({})
    own |= {"threshold": threshold, "stability_ratio": own["sharpness"] / threshold}
    if own.get("spherical_sharpness") is not None:
        own["eta_lambda"] = rule.effective_learning_rate(own["radius"], {}) * own["spherical_sharpness"]
    return own


def _listed(names: Sequence[str]) -> str | None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}" or None


def _labels(files: Sequence[Path]) -> dict[Path, str]:
    """The names of the files, with as many folders before them as tell them apart."""
    deep = 1
    while len({path.parts[-deep:] for path in files}) < len(files):
        deep += 1
    return {path: "/".join(path.parts[-deep:]) for path in files}


def _digest(path: Path) -> str:
    """The digest of the content; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise Unusable(f"the task's {type(model).__name__} cannot be copied: {error}") from error


def _write(
    found: Analysis, out: Path, *, subtitle: str, config: Mapping[str, object], environment: Mapping[str, object]
) -> None:
    columns = found.history.columns
    try:
        found.history.save(out / "history.parquet")
        write_report(
            out / "report.html",
            title="Sharpness along checkpoints",
            subtitle=subtitle,
            lead=found.summary,
            charts=[chart for chart in CHARTS if any(v is not None for v in columns.get(chart.y, []))],
            columns=columns,
            config={**config, "rule": found.rule or "not given", "could not be measured": list(found.refused.values())},
            environment=environment,
        )
    except OSError as error:
        raise _unwritten(out, error) from error
