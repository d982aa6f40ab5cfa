"""Rules on single steps: each sentence where it holds, with its numbers, and not where it does not."""

from typing import Any

import cases
import pytest
import torch
from torch import nn

from sharpscope.autodiff.objective import Objective
from sharpscope.monitoring.diagnosis import diagnose
from sharpscope.monitoring.finding import Finding
from sharpscope.monitoring.loss_watch import LossWatch
from sharpscope.monitoring.measurements import Facts
from sharpscope.monitoring.monitor import Monitor
from sharpscope.monitoring.tensor_table import TensorTable
from sharpscope.records.history import History


def say(*facts: Facts, **columns: Any) -> dict[str, Finding]:
    """What is found on a run of four rows with these columns, one value for all rows or one for each."""
    rows: list[dict[str, Any]] = [
        {"run": "r", "step": 10 * i} | {n: v[i] if isinstance(v, list) else v for n, v in columns.items()}
        for i in range(4)
    ]
    return {f.name: f for f in diagnose(History(rows), "r", *facts or [Facts(100)])}


def test_clipping_that_is_known() -> None:
    found = say(clipping=[1.0, 0.5, 0.2, 0.1], applied_gradient=1.0, loss=[3.0, 2.0, 1.0, 0.5])
    assert "clipping" not in found  # what is measured need not be guessed
    text = found["clipped"].text
    assert "100% of the late gradients were clipped, to 0.2 of their norm in the median" in text
    assert "as if the rate were 0.2 of what it is" in text
    assert found["clipped"].numbers == {"left": 0.2, "clipped": 1.0}
    assert "cancels" in say(clipping=0.5, **{"signal/a": 0.3})["clipped"].text
    assert "clipped" not in say(clipping=1.0) and "clipped" not in say()


def test_steps_that_rounding_absorbs() -> None:
    found = say(**{"unmoved/a": [0.0, 0.3, 0.5, 0.4], "unmoved/b": 0.02})["absorbed"]
    assert "in 1 of 2 tensors" in found.text and "most in a, 40%" in found.text
    assert "absorbed" not in say(**{"unmoved/a": 0.05})


def test_tensors_that_step_unlike_the_others() -> None:
    columns = {f"update/{name}": 1e-3 for name in "abcde"}
    found = say(**columns | {"update/a": 0.02, "update/e": 1e-6})["uneven steps"]
    assert "2 of 5 tensors" in found.text and "e 0.001 times, a 20 times the median, which is 0.001" in found.text
    assert "uneven steps" not in say(**columns | {"update/a": 0.009, "update/e": 2e-5})
    kinds = Facts(100, kinds={"a": "bias"})
    assert "uneven steps" not in say(kinds, **columns | {"update/a": 0.02})
    still = columns | {"update/e": 0.0, "gradient/e": 0.0}
    assert "uneven steps" not in say(**still)  # without a gradient: another sentence
    assert "uneven steps" not in say(**{"update/a": 1.0, "update/b": 1e-3, "update/c": 1e-3})


def test_tensors_without_a_gradient() -> None:
    found = say(**{"gradient/a": 0.0, "gradient/b": [0.0, 0.0, 0.0, 1.0]})["no gradient"]
    assert found.text == "1 tensor has never received a gradient at the 4 steps that were looked at: a."
    assert "no gradient" not in say(**{"gradient/a": [0.0, 0.0, None, None]})


SPIKE: dict[str, Any] = {"spike": 15.0, "spike_loss": 5.0, "spike_base": 1.0, "spike_length": 1.0}
NONE = [None, None, None]


def spike(**columns: Any) -> str:
    """The sentences on a spike at step 15, noticed at step 30; a list has a value for each row."""
    given = {n: v if isinstance(v, list) else [*NONE, v] for n, v in {**SPIKE, **columns}.items()}
    return say(**given)["loss spike"].text


def test_a_spike_in_its_own_words() -> None:
    assert spike() == (
        "1 loss spike, at step 15: the loss of the batch rose from 1 to 5 and was low again after 1 step."
    )
    assert "and was not low again by the last measurement" in spike(spike_length=None)
    assert "loss spike" not in say()


def test_two_spikes_are_counted_and_the_last_row_of_each_holds() -> None:
    columns = {"spike": [5.0, 5.0, 15.0, 15.0], "spike_loss": [2.0, 2.5, 2.0, 3.0], "spike_base": 1.0}
    text = say(**columns, spike_length=[None, 4.0, None, 9.0])["loss spike"].text
    assert text == (
        "2 loss spikes, the highest at step 15: the loss of the batch rose from 1 to 3 and was low again after 9 steps."
    )


def test_what_came_before_a_spike() -> None:
    seen = {"spike_gradient": 9.0, "spike_gradient_before": 4.0}
    assert "The gradient was large from 3 steps before, up to 4 times its median." in spike(spike_lead=3.0, **seen)
    assert "as usual before, and that of the batch 9 times the median." in spike(spike_lead=0.0, **seen)
    hidden = spike(spike_lead=0.0, spike_gradient=1.0, spike_gradient_before=1.0)
    assert "clipping may hide more" in hidden
    assert "raised to 10 times its median" in spike(spike_rate=10.0) and "rate" not in spike(spike_rate=1.2)
    assert "v lagged behind the gradient before it (g/√v of rms 9.6)" in spike(spike_lag=9.6)
    assert "v had kept up" in spike(spike_lag=1.1)
    assert "Sharpness / threshold had been 0.80 at step 10." in spike(stability_ratio=[0.5, 0.8, 2.0, 2.0])


def test_the_loss_of_the_fixed_data_tells_a_batch_from_the_weights() -> None:
    losses: list[Any] = [2.0, 1.0, 1.0, 1.0]
    assert "The batch was unusual: after it the loss of the fixed data was 1.05, and 1 at step 10." in spike(
        spike_probe=1.05, loss=losses
    )
    assert "Not the batch alone: after it the loss of the fixed data was 4" in spike(spike_probe=4.0, loss=losses)
    assert "fixed data" not in spike(spike_probe=4.0) and "fixed data" not in spike(loss=losses)


def test_a_row_of_meters_alone_is_no_divergence() -> None:
    rate, loss = [0.1, None, 0.1, None], [1.0, None, 1.0, None]
    assert "diverged" not in say(loss=loss, learning_rate=rate)
    assert say(loss=[1.0, None, None, None], learning_rate=rate)["diverged"].numbers["step"] == 20


def test_a_run_in_low_precision_with_a_bad_batch_and_an_idle_layer() -> None:
    """The whole chain: a network in bfloat16 whose rate is too small for it, a part without use, one bad batch."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 16).bfloat16(), torch.randn(64, 4).bfloat16()
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).bfloat16()
    net.register_parameter("idle", nn.Parameter(torch.zeros(3).bfloat16()))
    f = Objective(net, nn.functional.mse_loss, [(x, y)])
    sgd = torch.optim.SGD(net.parameters(), lr=1e-4)
    table = TensorTable(5)
    monitor = Monitor(f, sgd, every=20, meters=[table, LossWatch(5)])
    for step in range(60):
        sgd.zero_grad()
        loss = nn.functional.mse_loss(net(x), y + 10.0 * (step == 45))
        loss.backward()
        table.unclipped(nn.utils.clip_grad_norm_(net.parameters(), 0.1))
        sgd.step()
        monitor.step(loss)
    found = {finding.name: finding for finding in monitor.findings()}
    assert {"absorbed", "clipped", "no gradient", "loss spike"} <= found.keys()
    assert "idle" in found["no gradient"].text and found["loss spike"].numbers["step"] == 46
    assert "The batch was unusual" in found["loss spike"].text


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_found_on_an_ordinary_run(seed: int) -> None:
    f = cases.plain(seed)
    adam = torch.optim.Adam(f.model.parameters(), lr=1e-2)
    monitor = Monitor(f, adam, every=20, meters=[TensorTable(5), LossWatch(5)])
    x, y = next(iter(f.data))
    for _ in range(60):
        adam.zero_grad()
        loss = f.loss(f.model(x), y)
        loss.backward()
        adam.step()
        monitor.step(loss)
    names = {finding.name for finding in monitor.findings()}
    assert not names & {"absorbed", "clipped", "no gradient", "loss spike", "uneven steps", "diverged"}
