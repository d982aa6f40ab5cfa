"""Sizes and settings of the study."""

from dataclasses import dataclass

from ...errors import InvalidValue
from .._framework.config import demand_positive

LR_CLOSED = 0.1
"""Learning rate of the toys and of the linear regression."""


@dataclass(frozen=True)
class Config:
    """Sizes of all parts; the defaults are the full study."""

    toy_rates: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6)  # intrinsic rates il = lr·wd
    speed_rate: float = 1e-6  # il at which speeds are measured
    rmsprop_steps: int = 500_000
    frozen_steps: int = 1_000_000  # without weight decay, below the edge
    regression_rates: tuple[float, ...] = (1e-3, 1e-4, 1e-5)
    regression_data: int = 4  # data sets
    completion_tau: float = 30.0
    completion_control: int = 20_000  # steps without weight decay
    completion_seeds: int = 3
    learning_rate: float = 0.5  # of the regression network
    weight_decay: float = 1e-3
    network_seeds: int = 3
    network_tau: float = 6.0
    network_every: int = 50  # steps between measurements
    smaller: float = 5.0  # weight decay is divided by this for the comparison at equal τ
    ablations: bool = True  # also the runs that are only reported
    digits_steps: int = 6000
    digits_every: int = 50  # steps between measurements
    forecast_steps: int = 1000  # predicted by the central flow
    seed: int = 0  # of data, weights and starts

    def __post_init__(self) -> None:
        demand_positive(self)
        if self.learning_rate * self.weight_decay >= 1:
            raise InvalidValue(f"lr·wd is {self.learning_rate * self.weight_decay:g}; it must be below one")

    @property
    def first_seed(self) -> int:
        """Number that all seeds are counted from, so far apart that no two values of `seed` share a draw."""
        return 100 * self.seed


QUICK = Config(
    toy_rates=(1e-3, 1e-4, 1e-5),
    speed_rate=1e-5,
    rmsprop_steps=100_000,
    frozen_steps=100_000,
    regression_rates=(1e-3, 1e-4),
    regression_data=1,
    completion_tau=8.0,
    completion_control=8000,
    completion_seeds=1,
    network_seeds=1,
    network_every=200,
    smaller=2.5,
    ablations=False,
    digits_steps=3000,
    digits_every=100,
    forecast_steps=500,
)
