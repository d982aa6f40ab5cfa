"""Streams of random numbers that are independent of each other and always the same."""

import numpy as np
import torch


def stream(*numbers: int) -> torch.Generator:
    """A generator of its own for every list of numbers: of the experiment, the repeat, the depth and so on.

    >>> torch.equal(torch.rand(3, generator=stream(1, 2)), torch.rand(3, generator=stream(1, 2)))
    True
    >>> torch.equal(torch.rand(3, generator=stream(1, 2)), torch.rand(3, generator=stream(2, 1)))
    False
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
