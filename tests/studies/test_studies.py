"""The studies: what they promise of themselves, their networks, and the reference run in small."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharpscope.autodiff.objective import Objective
from sharpscope.optimizers.gd import GD
from sharpscope.records.history import History
from sharpscope.records.run_log import RunLog
from sharpscope.studies import lyu2022 as lyu
from sharpscope.studies._framework.study import discover
from sharpscope.studies._shared import data as bundled
from sharpscope.studies._shared import forecast as forecast_module
from sharpscope.studies._shared import nets, toys, train
from sharpscope.studies._shared.networks import LOSSES, Variant, run_variant
from sharpscope.studies.lyu2022 import completion, digits, network, regression, sphere
from sharpscope.studies.lyu2022.config import WORDS
from sharpscope.symmetry.scale_groups import find_groups

CONFIGS = {"full": lyu.Config(), "quick": lyu.QUICK}


@pytest.mark.parametrize("name", discover())
def test_a_study_keeps_the_contract(name: str) -> None:
    study = discover()[name]
    assert study.PAPER and study.__doc__
    title, _, argument = study.__doc__.strip().partition("\n\n")
    assert "\n" not in title and argument
    assert is_dataclass(study.Config) and isinstance(study.QUICK, study.Config)
    for config in (study.Config(), study.QUICK):
        jobs = study.jobs(config)
        assert len({job.name for job in jobs}) == len(jobs)
        assert all(job.work.__qualname__ == job.work.__name__ and job.cost > 0 for job in jobs)  # found by workers
    sentences = [(claim.part, claim.sentence) for claim in study.CLAIMS]
    assert len(set(sentences)) == len(sentences)
    assert len({chart.name for chart in study.CHARTS}) == len(study.CHARTS)
    parts = {claim.part for claim in study.CLAIMS}
    assert {chart.part for chart in study.CHARTS if chart.part} <= parts
    for part in parts:
        assert any(c.kind == "negative control" and c.deciding for c in study.CLAIMS if c.part == part), part


def test_every_field_of_the_configuration_turns_something() -> None:
    before = {(job.name, repr(job.arguments)) for job in lyu.jobs(lyu.Config())}
    words = {"data": "digits", "network": "conv", "norm": "LN", "device": "cuda", "dtype": "float32"}
    for field in fields(lyu.Config):
        value = getattr(lyu.Config(), field.name)
        if isinstance(value, tuple):
            other: Any = value[1:]
        elif isinstance(value, str):
            other = words[field.name]
        elif isinstance(value, bool):
            other = not value
        else:
            other = value + 1 if isinstance(value, int) else value / 2
        after = {(job.name, repr(job.arguments)) for job in lyu.jobs(replace(lyu.Config(), **{field.name: other}))}
        assert after != before, f"nothing depends on {field.name}"


def test_the_quick_configuration_only_shrinks() -> None:
    full, quick = ({job.name: job for job in lyu.jobs(config)} for config in CONFIGS.values())
    assert quick.keys() <= full.keys()
    assert all(quick[name].cost <= full[name].cost for name in quick)
    assert sum(job.cost for job in quick.values()) < 0.4 * sum(job.cost for job in full.values())


def test_nonsense_is_refused_by_name() -> None:
    for field in fields(lyu.Config):
        value = getattr(lyu.Config(), field.name)
        if field.name == "seed":
            with pytest.raises(ValueError, match="seed is -1; it must not be negative"):
                lyu.Config(seed=-1)
            continue
        for number in () if isinstance(value, bool) or field.name in WORDS else (-1, 0, float("nan")):
            wrong: Any = (number,) if isinstance(value, tuple) else number
            with pytest.raises(ValueError, match=re.escape(f"{field.name} is {wrong}; it must be positive")):
                lyu.Config(**{field.name: wrong})
    for name in ("network", "norm", "dtype"):
        other: Any = {name: "other"}
        with pytest.raises(ValueError, match=f"{name} is 'other'; known are "):
            lyu.Config(**other)
    with pytest.raises(ValueError, match="parts is 'other'; known are sphere, "):
        lyu.Config(parts=("digits", "other"))
    with pytest.raises(ValueError, match="lr·wd is 1; it must be below one"):
        lyu.Config(learning_rate=10, weight_decay=0.1)


@dataclass
class Written(RunLog):
    """A log of which only the name of its run counts."""

    run: str

    def resume(self) -> dict[str, torch.Tensor]:
        return {}


def measurements(config: lyu.Config, patch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The times τ at which each run of a configuration is measured, without running it."""
    found: dict[str, np.ndarray] = {}
    grid = np.array([0.0, *np.geomspace(1e-3, 20, 400)])

    def note(log: RunLog, *rest: Any) -> None:
        names = next(r for r in rest if isinstance(r, Sequence) and isinstance(r[0], str))
        found.update(dict.fromkeys(names, grid))

    def trained(name: str, rule: GD, steps: int, every: int) -> None:
        rows = {0, steps, *range(0, steps + 1, every), *(s for s in train.EARLY if s <= steps)}
        found[name] = np.array(sorted(rows)) * rule.intrinsic_time_per_step

    for module in (sphere, regression):
        patch.setattr(module, "walk", note)
    patch.setattr(sphere, "write", note)
    for job in lyu.jobs(config):
        variant = job.arguments.get("variant")
        if variant is not None:
            rule = GD(variant.learning_rate, variant.weight_decay, variant.momentum)
            trained(job.name, rule, variant.num_steps + variant.cooling, variant.every)
        elif "forecast" in job.arguments:
            forecast = job.arguments["forecast"]
            found.update(dict.fromkeys(forecast_module.runs(job.name), np.linspace(0, 0.1, forecast.points + 1)))
        elif job.work is completion._complete:
            rule = GD(completion.LR, job.arguments["weight_decay"])
            trained(job.name, rule, job.arguments["steps"], job.arguments["every"])
        else:
            job.work(Written(job.name), lambda fraction: None, **job.arguments)
    return found


class Imagined(History):
    """A history that has every column of the runs it is given, and fails where another run is wanted."""

    def __init__(self, taus: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.taus = taus

    @property
    def runs(self) -> list[str]:
        return list(self.taus)

    def table(self, run: str, *names: str) -> tuple[np.ndarray, ...]:
        tau = self.taus[run]
        kinds = {"tau": tau, "step": np.arange(len(tau)) * 1000.0, "eta_lambda": np.linspace(1, 3, len(tau))}
        return tuple(kinds.get(name, 1 / (1 + np.arange(len(tau)))) for name in names)


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, dict[str, np.ndarray]]]:
    with pytest.MonkeyPatch.context() as patch:
        yield {name: measurements(config, patch) for name, config in CONFIGS.items()}


def test_claims_and_charts_are_about_runs_that_are_made(measured: dict[str, dict[str, np.ndarray]]) -> None:
    runs = measured["full"].keys()
    for claim in lyu.CLAIMS:
        assert set(claim.runs) <= runs, claim.sentence
    for chart in lyu.CHARTS:
        assert {*getattr(chart, "runs", ()), *getattr(chart, "paths", ())} <= runs, chart.name


@pytest.mark.parametrize("size", CONFIGS)
def test_claims_find_the_measurements_they_need(
    size: str, measured: dict[str, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No claim needs a run that is not made, or a time at which nothing is measured."""
    monkeypatch.setattr(toys, "path_error", lambda toy, phi0, tau, phi, constant: np.ones(1))  # slow, reads no history
    history = Imagined(measured[size])
    for claim in lyu.CLAIMS:
        if set(claim.runs) <= measured[size].keys():
            claim.observe(history, CONFIGS[size])


def test_the_quick_study_leaves_out_ablations_only(measured: dict[str, dict[str, np.ndarray]]) -> None:
    left_out = [claim for claim in lyu.CLAIMS if not set(claim.runs) <= measured["quick"].keys()]
    made_by_ablations = measured["full"].keys() - {job.name for job in lyu.jobs(replace(lyu.Config(), ablations=False))}
    elsewhere = {"angle, il 0.001, data 1"}  # on another data set
    assert all(set(claim.runs) & (made_by_ablations | elsewhere) for claim in left_out)
    kept = {(claim.part, claim.kind) for claim in lyu.CLAIMS if claim not in left_out and claim.deciding}
    assert {part for part, kind in kept if kind == "negative control"} == {claim.part for claim in lyu.CLAIMS}


NETWORKS = {"regression": nets.regression_net, "mlp": nets.mlp, "conv": nets.conv}


@pytest.mark.parametrize("norm", nets.NORMS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_are_scale_invariant_in_all_weights(kind: str, norm: str) -> None:
    data = bundled.smooth_function() if kind == "regression" else bundled.digits(64)
    loss = LOSSES["squares" if kind == "regression" else "half squares"]
    f = Objective(NETWORKS[kind](norm, 0), loss, [(data.x, data.y)])
    groups = find_groups(f)
    if norm == "none":
        assert groups.joint.numel() == 0
        return
    assert groups.covers(f.size)
    assert groups.groups.keys() == f.slices.keys()
    assert max(groups.joint_defect, *groups.defects.values()) <= 1e-10
    w = f.weights()
    assert f.value(3.7 * w).item() == pytest.approx(f.value(w).item(), rel=1e-12)
    assert torch.allclose(3.7 * f.grad(3.7 * w), f.grad(w), rtol=1e-9, atol=1e-12)


def test_the_transformer_is_scale_invariant_in_all_weights() -> None:
    data = bundled.digits(100)
    f = Objective(nets.transformer("LN", 0), LOSSES["half squares"], [(data.x, data.y)])
    groups = find_groups(f)
    assert groups.covers(f.size) and groups.groups.keys() == f.slices.keys()
    w = f.weights()
    assert f.value(3.7 * w).item() == pytest.approx(f.value(w).item(), rel=1e-12)


def test_variants_are_those_networks() -> None:
    everything = [*digits.variants(lyu.Config()).values(), *network.variants(lyu.Config(), 0).values()]
    assert {variant.norm for variant in everything} == set(nets.NORMS)
    assert {variant.net for variant in everything} == set(NETWORKS)


def test_every_loss_trains(tmp_path: Path) -> None:
    """A few steps of each, with all columns that the charts and claims on networks read."""
    for loss in LOSSES:
        net = "mlp" if "cross" in loss else "regression"
        log = RunLog(tmp_path, loss)
        run_variant(log, lambda fraction: None, Variant(net, "LN", loss, 0.1, 1e-3, steps=3, train=64))
        assert not log.note
        last = log.rows[-1]
        assert {
            "tau",
            "loss",
            "eta_lambda",
            "spherical_threshold",
            "test_loss",
            "test_accuracy",
            "train_accuracy",
        } <= last.keys()
        assert all(np.isfinite(v) for v in last.values() if isinstance(v, float))


def test_the_reference_run_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP on digits with batch normalization starts at a spherical sharpness of about 2076 (another draw of the
    weights moves it by a few percent) and is at the edge within 150 steps; without weight decay its norm only grows.
    """
    monkeypatch.setattr(train, "EARLY", {150})
    base = replace(digits.variants(lyu.Config())["digits BN"], steps=200, every=100)
    rows = {}
    for name, variant in {"decay": base, "none": replace(base, weight_decay=0.0)}.items():
        log = RunLog(tmp_path, name)
        run_variant(log, lambda fraction: None, variant)
        rows[name] = {row["step"]: row for row in log.rows}
        assert list(rows[name]) == [0, 100, 150, 200]
    assert rows["decay"][0]["spherical_sharpness"] == pytest.approx(2076, rel=0.1)
    for step in (150, 200):
        assert 1.9 < rows["decay"][step]["eta_lambda"] < 2.5
        balance = [v for name, v in rows["decay"][step].items() if name.startswith("balance/")]
        assert len(balance) == 3 and all(0 < v < 10 for v in balance)
    assert not [name for name in rows["none"][200] if name.startswith("balance/")]
    norms = [row["radius"] for row in rows["none"].values()]
    assert norms == sorted(norms)
    assert rows["decay"][200]["radius"] < rows["decay"][100]["radius"]
