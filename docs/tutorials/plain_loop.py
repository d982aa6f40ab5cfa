"""The monitor in a training loop of your own: three lines, and a report at the end."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import sharpscope as ss

torch.set_num_threads(1)  # so small a problem only gets slower with more
torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

net = nn.Sequential(
    nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 10)
)  # fmt: skip
optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)

# First line: what is measured. The loss on a few batches that stay the same; with a `Monitor` these need not be all the
# data, but what is reported about the edge of stability is about the loss on them. Dropout makes a loss random, which
# has no curvature: leave it out of the measured loss. Your modules are not touched.
f = ss.Objective(net, nn.functional.cross_entropy, [(x[:256], y[:256])], without_dropout=True)

# Second line: when. A budget plans how often and on how many of these examples, so that measuring takes at most this
# fraction of the time; `every=20` instead measures every 20 steps, whatever it costs. `steps` is how long the run will
# be; what is reported about its end needs it.
steps = 2000
monitor = ss.Monitor(f, optimizer, budget="20%", steps=steps)

for _ in range(steps):
    picked = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x[picked]), y[picked]).backward()
    optimizer.step()
    monitor.step()  # third line: the run is the same with it and without it, to the last bit

print(monitor.diagnosis())
print("columns:", ", ".join(list(monitor.history.columns)[:12]), "...")
monitor.report("run.html")  # one page that works offline: every sentence with its numbers and its source, and charts
