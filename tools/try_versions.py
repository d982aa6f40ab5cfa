"""Tries the package with other versions of Python, torch and numpy, each in an environment of its own.

    python tools/try_versions.py python3.11:2.4.0:1.26.0 python3.13:2.14.1:2.4.6

An argument is PYTHON:TORCH:NUMPY. Each takes minutes, and up to 7 GB of disk: torch of the index brings CUDA along.
Prints a row of the table of docs/tested-versions.md for each: how many blocks of the pages ran, how many tests passed.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("start", "numbers", "monitoring", "sweeps", "concepts/flows"))]
PAGES += [f"docs/reference/{wing}.md" for wing in ("autodiff", "linalg", "symmetry", "measures", "optimizers", "flows")]
PAGES += [f"docs/reference/{wing}.md" for wing in ("monitoring", "records", "errors")]
TESTS = [
    *("tests/linalg/test_lanczos.py", "tests/linalg/test_warm_start.py", "tests/autodiff/test_objective.py"),
    *("tests/symmetry/test_scale_groups.py", "tests/optimizers/test_rules.py", "tests/monitoring/test_monitor.py"),
]
TOOLS = ["pytest", "scipy", "scikit-learn", "clarabel", "matplotlib"]
NEEDED = ["einops", "einconv", "unfoldNd", "linear_operator"]
"""By the tools of tools/no-deps.txt."""

BLOCKS = """
import os, re, sys, tempfile, traceback
os.chdir(tempfile.mkdtemp())
good = count = 0
for page in sys.argv[1:]:
    for code in re.findall(r"^```python\\n(.*?)^```$", open(page, encoding="utf-8").read(), re.MULTILINE | re.DOTALL):
        count += 1
        try:
            exec(compile(code, page, "exec"), {"__name__": "__main__"})
            good += 1
        except Exception as error:
            print(page, repr(error), file=sys.stderr)
print(good, "of", count)
"""
"""Runs every block of pages in one process."""


def tried(python: str, torch: str, numpy: str) -> str:
    """Install and run everything; a row of the table."""
    with tempfile.TemporaryDirectory() as place:
        inside = f"{place}/venv/bin/python"
        subprocess.run([python, "-m", "venv", f"{place}/venv"], check=True)
        pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        versions = [f"torch=={torch}", f"numpy=={numpy}"]
        done = subprocess.run([*pip, *versions, str(ROOT), *TOOLS], capture_output=True, text=True)
        found = subprocess.run([inside, "--version"], capture_output=True, text=True).stdout.split()[-1]
        if done.returncode:
            return f"| {found} | {torch} | {numpy} | not installed: {done.stderr.strip().splitlines()[-1]} | |"
        alone = ["--no-deps", "--requirement", str(ROOT / "tools/no-deps.txt")]
        subprocess.run([*pip, *alone, *NEEDED], check=True)
        done = subprocess.run(
            [inside, "-c", BLOCKS, *(str(ROOT / page) for page in PAGES)], capture_output=True, text=True
        )
        print(done.stderr, file=sys.stderr)
        blocks = done.stdout.strip().splitlines()[-1]
        command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print("\n".join(re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)), file=sys.stderr)
        counts = done.stdout.strip().splitlines()[-1].strip("= ")
        return f"| {found} | {torch} | {numpy} | {blocks} | {counts} |"


if __name__ == "__main__":
    print("| Python | torch | numpy | blocks of the pages that ran | tests |\n|---|---|---|---|---|")
    for argument in sys.argv[1:]:
        print(tried(*argument.split(":")), flush=True)
