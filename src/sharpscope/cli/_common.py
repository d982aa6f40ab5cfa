"""Parts of all commands: how they refuse, and which packages they need."""

import argparse
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import Refused

EXTRAS = ("tyro", "safetensors", "pyarrow", "sklearn", "scipy", "tqdm", "matplotlib")
HINT = "the command line needs the extra packages 'studies'; in a checkout of sharpscope: pip install '.[studies]'"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message}; see `{self.prog} --help`")


def need_extras() -> None:
    """Refuse to start without the extra packages, rather than fail at the end of a long run."""
    for name in EXTRAS:
        if importlib.util.find_spec(name) is None:
            raise Refused(f"{name} is not installed; {HINT}")


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn these exceptions into sentences for the user."""
    try:
        yield
    except kinds as error:
        raise Refused(" ".join(str(error).split())) from error


def find_study(name: str) -> Any:
    """Find the study of that name."""
    from ..studies._framework.study import find

    try:
        return find(name)
    except ModuleNotFoundError:
        raise
    except LookupError as error:
        raise Refused(str(error)) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Refused(f"the study {name} cannot be imported: {reason}") from error
