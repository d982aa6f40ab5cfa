"""Settings of the study of periodic jumps."""

from dataclasses import dataclass

from .._framework.config import demand_positive


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

    tau: float = 20.0  # intrinsic time of the network's runs
    every: int = 10  # steps to a row
    stair: int = 2000  # steps at each fixed effective rate
    train: int = 200  # digits
    slow: bool = True  # also a third of the intrinsic rate
    grid: int = 15  # of the regression: values of k, and of eps
    toy_tau: float = 12.0  # intrinsic time of the regression's runs
    seed: int = 0  # of data, weights and rotations

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(tau=10.0, stair=700, slow=False, grid=10)
