"""Settings of every test run."""

import torch

# The problems are small: a second thread costs more than it does, many times more on a busy processor.
torch.set_num_threads(1)
