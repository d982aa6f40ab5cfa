"""The tree in CONTRIBUTING.md, made from the first line of every wing.

python tools/tree.py          prints it
python tools/tree.py --write  puts it into CONTRIBUTING.md, into the block that begins with src/sharpscope/
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/sharpscope"
BLOCK = re.compile(r"(?<=^```\n)src/sharpscope/\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)
WINGS = ("linalg", "autodiff", "symmetry", "records", "report", "optimizers", "measures", "flows", "monitoring")
BESIDE = {
    "tests/": "the same wings: known spectra, identities, second ways to compute; browser/ the pages in Chromium",
    "benchmarks/": "comparisons with other packages, in one run; costs of the monitor and of sweeps",
    "docs/": "the pages of the site that `make docs` builds, and tutorials/, scripts that run",
    "LOG.md": "decisions and findings",
}


def caption(path: Path) -> str:
    """The first sentence of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].rstrip(".")


def tree() -> str:
    """Each wing from the ground up, with what it is for."""
    rows = {f"  {name}.py": caption(SOURCE / f"{name}.py") for name in ("errors", "display")}
    rows |= {
        f"  {wing}/": caption(SOURCE / wing / "__init__.py") for wing in (*WINGS, "integrations", "studies", "cli")
    }
    rows |= BESIDE
    width = max(map(len, rows)) + 2
    return "src/sharpscope/\n" + "".join(f"{name:{width}}{text}\n" for name, text in rows.items())


def main() -> None:
    """Print the tree, or write it into CONTRIBUTING.md."""
    page = ROOT / "CONTRIBUTING.md"
    if sys.argv[1:] == ["--write"]:
        page.write_text(BLOCK.sub(lambda _: tree(), page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tree(), end="")


if __name__ == "__main__":
    main()
