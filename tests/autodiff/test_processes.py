"""What tells vectors of several processes from each other, and what one process is told about groups.

Several processes are in `tests/distributed`.
"""

import pickle

import pytest
import torch
from torch import Tensor, nn

from sharpscope.autodiff.objective import Objective
from sharpscope.autodiff.processes import ALONE, _angle, fingerprint
from sharpscope.errors import InvalidType, InvalidValue

DATA = [(torch.ones(4, 3), torch.zeros(4, 1))]


def some(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints_differ_where_vectors_do(n: int, dtype: torch.dtype) -> None:
    v = some(n, dtype)
    others = {"scaled": 1.001 * v, "negative": -v, "another": some(n + 1, dtype)[:n]}
    if n > 2:
        others |= {"exchanged": v[torch.tensor([1, 0, *range(2, n)])], "one entry": v + torch.eye(1, n, dtype=dtype)[0]}
    for name, other in others.items():
        assert abs(fingerprint(v) - fingerprint(other)) > 1e-5, name
    assert fingerprint(v) == fingerprint(v.clone())


def test_rounding_does_not_turn_the_angle_and_small_differences_do() -> None:
    """The angles of processes are compared to about 0.03 radians."""
    v = some(40_000)
    far = 1e-4 * some(40_001)[1:]
    rounded = v * (1 + 6e-8 * some(40_002)[2:].sign())
    assert abs((_angle(v) - _angle(rounded)).item()) < 3e-3
    assert abs((_angle(v) - _angle(v + far)).item()) > 1e-5
    assert _angle(torch.zeros(9)) == 0 and _angle(torch.full((9,), torch.nan)) == 0


def test_one_process_needs_no_group_and_takes_none_that_is_no_group() -> None:
    net, loss = nn.Linear(3, 1), nn.functional.mse_loss
    f = Objective(net, loss, DATA, group=torch.distributed.group.WORLD)  # None here
    assert f.processes is ALONE and Objective(net, loss, DATA).processes is ALONE
    with pytest.raises(InvalidType, match="group is a int, not a process group such as torch"):
        Objective(net, loss, DATA, group=0)
    with pytest.raises(InvalidValue, match="hold no batch"):
        Objective(net, loss, [], group=None)


def test_an_objective_is_pickled_with_its_lack_of_a_group() -> None:
    f = Objective(nn.Linear(3, 1), nn.functional.mse_loss, DATA)
    again = pickle.loads(pickle.dumps(f))
    assert again.group == f.group and again.processes.size == 1
    assert torch.equal(again.grad(again.weights()), f.grad(f.weights()))
