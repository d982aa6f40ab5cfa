"""The command line with the tiny study beside the package's own, also for the worker processes it starts."""

import sys
from pathlib import Path

import sharpscope.studies
from sharpscope.cli import main

sharpscope.studies.__path__.append(str(Path(__file__).parent / "tiny_studies"))

if __name__ == "__main__":
    sys.exit(main())
