"""The command line with the tiny studies beside the package's own, also for the worker processes it starts.

TINY_ALL names those that `run all` runs.
"""

import os
import sys
from pathlib import Path

import sharpscope.studies
from sharpscope.cli import main
from sharpscope.studies._framework import batch

sharpscope.studies.__path__.append(str(Path(__file__).parent / "tiny_studies"))

if __name__ == "__main__":
    if "TINY_ALL" in os.environ:
        batch.known = os.environ["TINY_ALL"].split
    sys.exit(main())
