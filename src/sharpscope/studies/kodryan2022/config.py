"""Settings of the study of training on the sphere."""

from dataclasses import dataclass

from .._framework.config import demand_positive


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are its full size."""

    steps: int = 6000  # of the network at each rate
    every: int = 20  # steps to a row
    train: int = 200  # digits
    pairs: int = 4  # of the toy
    starts: int = 8  # of the toy at each rate
    toy_steps: int = 40000
    seed: int = 0  # of data, weights and curvatures

    def __post_init__(self) -> None:
        demand_positive(self)


QUICK = Config(steps=1200, starts=4, toy_steps=10000)
