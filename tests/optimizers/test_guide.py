"""The law of an optimizer of one's own in docs/adding.md, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharpscope.optimizers.from_torch import stability_of

GUIDE = (Path(__file__).parents[2] / "docs/adding.md").read_text(encoding="utf-8")


def test_the_law_of_the_guide_is_that_of_its_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    """At 0.98 and 1.02 of the ratio one iterates shrink and grow, with a deviation that hardly moves."""
    (code,) = re.findall(
        r"^```python\n(from dataclasses import dataclass\n\nimport torch\n.*?)^```", GUIDE, re.M | re.S
    )
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "docs/adding.md", "exec"), space)
    assert "AdaBeliefRule(learning_rate=0.001, beta1=0.9, eps=1e-08)" in capsys.readouterr().out
    assert len(space["monitor"].history.series("training", "stability_ratio")) == 5  # none before the first step
    for factor in (0.98, 1.02):
        p = nn.Parameter(torch.full((3,), 1e-9, dtype=torch.float64))
        optimizer = space["AdaBelief"]([p], lr=0.1, betas=(0.9, 1 - 1e-12))
        optimizer.state[p].update(deviation=torch.tensor([1.0, 4.0, 9.0]).double())
        found = stability_of(optimizer, [p])
        assert found is not None
        optimizer.state[p]["mean"] = -0.1 / 1.9 * found.metric * p.detach()  # where both change sign in a step
        for _ in range(100):  # the factor is about 1 ± 0.05 a step
            p.grad = factor * found.metric * p.detach()
            optimizer.step()
        assert bool((p.detach().abs() < 0.5e-9).all() if factor < 1 else (p.detach().abs() > 2e-9).all())
