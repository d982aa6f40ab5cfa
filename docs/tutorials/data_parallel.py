"""Training with DistributedDataParallel, and one Monitor over all processes.

    torchrun --nproc-per-node 2 docs/tutorials/data_parallel.py

With `python` in the place of torchrun it is a training in one process. Every process makes the objective of its own
batches and calls the monitor after every step; what they measure is the loss of the batches of all, and the rows are
the same on all. The first process writes and prints.
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sharpscope as ss

torch.set_num_threads(1)  # so small a problem only gets slower with more
if "RANK" in os.environ:  # set by torchrun
    dist.init_process_group("gloo")  # on GPUs: "nccl", and torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32)[rank::processes] / 16  # the part of this process
y = torch.tensor(digits.target)[rank::processes]

torch.manual_seed(0)  # the same weights everywhere, with and without DistributedDataParallel
net = nn.Sequential(
    nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False), nn.GELU(), nn.Linear(64, 10)
)  # fmt: skip
model: nn.Module = DistributedDataParallel(net) if processes > 1 else net
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

probe = [(x[:128], y[:128])]  # of this process
f = ss.Objective(model, nn.functional.cross_entropy, probe, group=dist.group.WORLD)  # None where there is no group
monitor = ss.Monitor(f, optimizer, every=20)

picker = torch.Generator().manual_seed(rank)
for _ in range(100):
    picked = torch.randint(len(x), (64,), generator=picker)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
    loss.backward()
    optimizer.step()
    monitor.step(loss)

top = ss.top_eigenpairs(f)  # on every process, as all that measures; inside of `if rank == 0` it would wait in vain
if rank == 0:
    print(monitor.diagnosis())
    print(top)
    print(f"{processes} process(es): {top.num_matvecs} products of all batches")
if dist.is_initialized():
    dist.destroy_process_group()
