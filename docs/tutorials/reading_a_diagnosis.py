"""What the sentences of a diagnosis mean, on one network trained in four ways."""

import torch
from torch import nn

import sharpscope as ss

torch.set_num_threads(1)  # so small a problem only gets slower with more


def train(lr: float, wd: float, steps: int) -> ss.Monitor:
    """Full-batch descent on a small regression, with normalization after every map."""
    torch.manual_seed(0)
    x = torch.randn(64, 10, dtype=torch.float64)
    y = torch.tanh(1.5 * x[:, :1]) + 0.5 * x[:, 1:2].sin()
    net = nn.Sequential(
        nn.Linear(10, 24, bias=False), nn.BatchNorm1d(24, affine=False, eps=1e-12), nn.Tanh(),
        nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24, affine=False, eps=1e-12), nn.Tanh(),
        nn.Linear(24, 1, bias=False),
    ).double()  # fmt: skip
    net[-1].requires_grad_(False)  # a fixed readout: now every trained weight is scale-invariant
    f = ss.Objective(net, nn.functional.mse_loss, [(x, y)])
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=wd)
    monitor = ss.Monitor(f, optimizer, every=25, steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        f.loss(net(x), y).backward()
        optimizer.step()
        monitor.step()
    return monitor


def show(title: str, monitor: ss.Monitor, *names: str) -> None:
    print(f"\n{title}")
    for finding in monitor.findings():
        if finding.name in names:
            print(f"  [{finding.name}] {finding}")
    monitor.plot().savefig(f"{title.rstrip(':')}.svg")


# lr·wd = .01 a step: within 100 steps weight decay has acted for τ = 1. Norms shrink until steps are as long as the
# curvature allows, and from then on the run rides the edge: the sharpness is set by the learning rate.
show("Weight decay has had time:", train(0.3, 0.03, 600), "edge", "intrinsic time", "rotation", "twice the rate")

# The same learning rate with a thousandth of the weight decay. The sentence to heed is "no time": whatever weight decay
# could do for this network, it does not do it here. Multiply wd, or train longer: only lr·wd·steps counts.
show("Weight decay has no time:", train(0.3, 3e-5, 600), "no time", "settling", "twice the decay")

# Without weight decay norms only grow and steps only shrink; the run stops moving at the first minimum it finds.
show("No weight decay:", train(0.3, 0.0, 600), "below", "edge", "no decay")

# A small learning rate: far below the edge. `largest rate` says how far.
show("Small steps:", train(0.01, 0.03, 300), "below", "approaching", "sharpening", "largest rate", "steps to the edge")
