"""Choosing learning rate and weight decay for a normalized network: two measured numbers instead of a grid.

For scale-invariant weights lr and wd are not two knobs that act alone. Their product lr·wd is the intrinsic time per
step: τ, which is lr·wd·steps, says for how long weight decay acts. What lr does by itself it does once, at the start,
relative to ‖w‖².
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import sharpscope as ss

torch.set_num_threads(1)  # so small a problem only gets slower with more
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
train_set, test_set = (x[:1200], y[:1200]), (x[1200:], y[1200:])


def run(lr: float, wd: float, steps: int) -> tuple[ss.Monitor, float]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False), nn.GELU(),
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False), nn.GELU(), nn.Linear(64, 10),
    )  # fmt: skip
    invariant = [p for p in net.parameters() if p.dim() > 1][:2]
    rest = [p for p in net.parameters() if not any(p is q for q in invariant)]
    # Weight decay on the invariant weights alone: on the readout it is a penalty, which is another matter.
    groups = [{"params": invariant, "weight_decay": wd}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    f = ss.Objective(net, nn.functional.cross_entropy, [(train_set[0][:256], train_set[1][:256])])
    monitor = ss.Monitor(f, optimizer, every=50, steps=steps)
    for _ in range(steps):
        picked = torch.randint(1200, (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train_set[0][picked]), train_set[1][picked]).backward()
        optimizer.step()
        monitor.step()  # before the schedule moves on: the row is about the step that was taken
        schedule.step()
    net.eval()
    accuracy = (net(test_set[0]).argmax(1) == test_set[1]).float().mean().item()
    return monitor, accuracy


def numbers(monitor: ss.Monitor, name: str) -> dict[str, float]:
    return next((dict(found.numbers) for found in monitor.findings() if found.name == name), {})


# 1. The learning rate. A short run at a rate that is surely small; what is measured says how large it may become.
short, _ = run(0.01, 0.0, 50)
largest = numbers(short, "largest rate")["largest"]
print(f"after 50 small steps the largest stable learning rate is {largest:.3g}")
lr = min(0.2 * largest, 0.5)
print(f"a fifth of it leaves room for the sharpness to rise: lr = {lr:.3g}")

# 2. Weight decay. It needs τ of a few units to act: wd = τ (1 - momentum)/(mean lr · steps), since momentum is part of
#    the intrinsic time, and the mean of a linear schedule is lr/2. The monitor adds up τ as it runs.
steps = 400
for tau in (0.03, 3.0):
    wd = tau * (1 - 0.9) / (lr / 2 * steps)
    monitor, accuracy = run(lr, wd, steps)
    turned = numbers(monitor, "rotation")
    print(f"\nτ = {tau:g}: wd = {wd:.2g}, test accuracy {accuracy:.3f}, spherical sharpness", end=" ")
    print(f"{monitor.history.series('training', 'spherical_sharpness')[-1]:.3g}")
    print(" ", next(str(found) for found in monitor.findings() if found.name in ("intrinsic time", "no time")))
    if turned:
        print(f"  layers turn by {turned['least']:.2g} to {turned['most']:.2g} of what the equilibrium predicts")

# 3. The symmetry behind it. Starting from c times the weights, with c²·lr and wd/c², every step turns the weights by
#    the same angle: lr alone means nothing without ‖w‖².
print(f"\n{ss.optimizers.rescaled.__doc__.splitlines()[0] if ss.optimizers.rescaled.__doc__ else ''}")
