"""Sizes and settings of the study."""

from dataclasses import dataclass

from ...errors import InvalidValue
from .._framework.config import demand_positive
from .._shared.nets import NORMS

PARTS = ("sphere", "regression", "completion", "network", "digits", "benefit")
"""The parts of the study, each a file beside this one."""

NETWORKS = ("mlp", "conv", "transformer", "vgg11", "resnet20", "language")

WORDS = ("parts", "data", "network", "norm", "width", "device", "dtype", "chunk")
"""Fields that are no positive numbers."""

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
    parts: tuple[str, ...] = PARTS  # which parts of the study to run
    data: str = "mnist5k"  # of the benefit: digits, mnist5k, patches, text, or a kind and a path (cifar10:DIR, ...)
    network: str = "mlp"  # of the benefit: mlp, conv, transformer, vgg11, resnet20, language
    norm: str = "BN"  # its normalization
    width: int = 0  # of vgg11, resnet20 or language; 0: as published
    invariant: bool = True  # these are scale-invariant in all weights, not as commonly trained
    device: str = "cpu"
    dtype: str = "float64"  # or float32
    examples: int = 300  # to train on
    tests: int = 4000  # to test on
    chunk: int = 0  # examples of a part of the full batch; 0: all at once
    benefit_rate: float = 0.2  # learning rate
    benefit_decay: float = 1e-2  # weight decay
    benefit_steps: int = 8000  # and a quarter more at a tenth of the learning rate, without weight decay
    benefit_every: int = 200  # steps between measurements
    benefit_seeds: int = 10  # training sets and starts
    seed: int = 0  # of data, weights and starts

    def __post_init__(self) -> None:
        demand_positive(self, *WORDS)
        self._demand_known("parts", PARTS, *self.parts)
        self._demand_known("network", NETWORKS, self.network)
        self._demand_known("norm", tuple(NORMS), self.norm)
        self._demand_known("dtype", ("float64", "float32"), self.dtype)
        if self.learning_rate * self.weight_decay >= 1:
            raise InvalidValue(f"lr·wd is {self.learning_rate * self.weight_decay:g}; it must be below one")

    def _demand_known(self, name: str, known: tuple[str, ...], *values: str) -> None:
        unknown = [value for value in values if value not in known]
        if unknown:
            raise InvalidValue(f"{name} is '{unknown[0]}'; known are {', '.join(known)}")

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
    benefit_steps=4000,
    benefit_every=400,
    benefit_seeds=5,
)
