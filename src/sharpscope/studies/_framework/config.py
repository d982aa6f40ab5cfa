"""Fields that configurations have in common: numbers are positive, and repeats have seeds of their own."""

from typing import Any

from ...errors import InvalidValue


def demand_positive(config: Any, *free: str) -> None:
    """Demand that numbers, also those in tuples, are positive.

    ``seed`` may be zero; flags and the fields named in `free` are not checked.

    Raises:
        ValueError: one that is not, by name.
    """
    for name, value in vars(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name == "seed":
            if value < 0:
                raise InvalidValue(f"seed is {value}; it must not be negative")
        elif name not in free and not isinstance(value, bool) and not all(v > 0 for v in numbers):
            raise InvalidValue(f"{name} is {value}; it must be positive")


def seeds(config: Any) -> range:
    """The seeds of a study that repeats itself: as many as its field `repeats`, from its field `seed` on."""
    return range(config.seed, config.seed + config.repeats)
