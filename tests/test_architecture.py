"""The shape of the package: who imports whom, where derivatives are taken, what is written down where."""

import ast
import builtins
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sharpscope
from sharpscope import errors

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/sharpscope"
WINGS = (
    *("linalg", "autodiff", "symmetry", "records", "report", "optimizers", "measures", "flows", "monitoring"),
    *("integrations", "studies", "cli", "__main__"),
)
"""From the ground up: a wing imports those before it, and the ground that they stand on."""
GROUND = ("errors", "display")
"""Files that all wings may import: `errors` knows nobody, and `display` only `errors`."""
EXTRAS = (
    *("tyro", "pyarrow", "sklearn", "matplotlib", "safetensors", "tqdm"),
    *("lightning", "pytorch_lightning", "transformers", "tensorboard", "wandb", "mlflow", "trackio"),
)
DERIVATIVES = {"grad", "grad_and_value", "hessian", "jacfwd", "jacrev", "jvp", "linearize", "vjp", "vhp", "hvp"}
UNSAFE = {"eval", "exec", "compile", "__import__"}
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(SOURCE)], "sharpscope."))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module or name that a file imports, in full, also inside functions."""
    package = ["sharpscope", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the dotted name of what is called as it is written."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def wing(path: Path) -> str:
    """The folder of the package that a file lies in; the file's own name for those at the top."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_the_order_names_every_wing() -> None:
    assert {wing(path) for path in FILES} - {"__init__"} == {*GROUND, *WINGS}
    assert len(list(SOURCE.iterdir())) <= 20  # rooms on the top floor


@pytest.mark.parametrize("own", [*GROUND, *WINGS])
def test_a_wing_imports_only_wings_before_it(own: str) -> None:
    order = (*GROUND, *WINGS)
    allowed = set(order[: order.index(own) + 1])
    for path in FILES:
        if wing(path) == own:
            others = {[*name.split("."), "__init__"][1] for name in imports(path) if name.split(".")[0] == "sharpscope"}
            assert others <= allowed, f"{path.relative_to(SOURCE)} imports {', '.join(sorted(others - allowed))}"


def test_no_circle_of_files() -> None:
    """Also inside a wing: the files can be put into an order in which each imports only earlier ones."""
    names = {".".join(["sharpscope", *p.relative_to(SOURCE).with_suffix("").parts]): p for p in FILES}
    needs = {
        own: {name for full in imports(path) for name in (full, full.rpartition(".")[0]) if name in names} - {own}
        for own, path in names.items()
        if path.name != "__init__.py"
    }
    while needs:
        free = {own for own, others in needs.items() if not others & needs.keys()}
        assert free, f"these import each other: {', '.join(sorted(needs))}"
        needs = {own: others for own, others in needs.items() if own not in free}


def test_linear_algebra_knows_no_autograd() -> None:
    for path in FILES:
        if wing(path) == "linalg":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\bautograd\b|requires_grad|\.backward\(|torch\.func|\bnn\b", text), path.name


def test_studies_are_discovered_and_not_imported() -> None:
    for path in FILES:
        if wing(path) not in ("studies", "cli"):
            assert not [name for name in imports(path) if "studies" in name]
    named = [m.name for m in pkgutil.iter_modules([str(SOURCE / "studies")]) if not m.name.startswith("_")]
    assert named
    shared = [path for path in FILES if path.parent.name in ("studies", "_framework", "_shared") or wing(path) == "cli"]
    assert not [(path, name) for path in shared for name in named if name in path.read_text(encoding="utf-8")]


def test_only_one_wing_takes_derivatives() -> None:
    for path in FILES:
        if wing(path) == "autodiff":
            continue
        taken = [name for name, _ in calls(path) if re.search(r"\bautograd\b|\bfunc\.", name) or ".backward" in name]
        taken += [
            n for n in imports(path) if re.match(r"torch\.(autograd|func)\.", n) and n.split(".")[-1] in DERIVATIVES
        ]
        assert not taken, f"{path.relative_to(SOURCE)} takes derivatives: {', '.join(taken)}"
    assert any(name == "torch.autograd.grad" for name, _ in calls(SOURCE / "autodiff/objective.py"))


def test_nothing_read_from_disk_is_executed() -> None:
    attributes = [
        (path.name, node) for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)
    ]
    readers = [(place, ast.unparse(node)) for place, node in attributes if node.attr in ("serialization", "_load")]
    readers += [(place, ast.unparse(node)) for place, node in attributes if ast.unparse(node).endswith("torch.load")]
    assert readers == [("checkpoints.py", "torch.load")]  # the one place that may, and only in this way:
    (reader,) = (call for name, call in calls(SOURCE / "records/checkpoints.py") if name == "torch.load")
    assert "weights_only=True" in [ast.unparse(keyword) for keyword in reader.keywords]
    assert not [path for path in FILES if "import torch as" in path.read_text(encoding="utf-8")]
    for path in FILES:
        taken = set(imports(path))
        assert not {n.split(".")[0] for n in taken} & {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
        assert not [name for name in taken if name == "torch.load" or name.startswith("torch.serialization")]
        for name, call in calls(path):
            assert name not in UNSAFE, f"{path.name} calls {name}()"
            assert name not in ("torch.save", "os.system", "os.popen"), f"{path.name} calls {name}()"
            assert "allow_pickle" not in [keyword.arg for keyword in call.keywords]
            shell = [keyword for keyword in call.keywords if keyword.arg == "shell"]
            assert not shell, f"{path.name} passes shell="


PUBLIC = [sharpscope, *(getattr(sharpscope, name) for name in WINGS[:9])]
ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if getattr(kind, "__module__", "") == errors.__name__ and isinstance(kind, type)
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: str(module.__name__))
def test_every_public_name_has_a_docstring(module: ModuleType) -> None:
    assert (module.__doc__ or "").strip()
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        thing = getattr(module, name)
        assert not isinstance(thing, ModuleType), f"{module.__name__}.{name} is a file, not what it is named after"
        assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
        assert not str(thing.__doc__).startswith(f"{name}("), f"{name} has only the docstring that dataclasses make up"


def test_the_public_face_is_small_and_its_wings_are_at_hand() -> None:
    assert len(sharpscope.__all__) <= 20
    assert {*sharpscope.__all__, *WINGS[:9], "errors"} <= set(dir(sharpscope))
    with pytest.raises(AttributeError, match="no attribute 'lanczos'"):
        sharpscope.lanczos  # noqa: B018


PYTHON = ("AttributeError", "StopIteration", "KeyboardInterrupt")
"""What the language itself waits for."""


def test_every_error_is_a_kind_of_one_base() -> None:
    assert all(issubclass(kind, errors.SharpscopeError) for kind in ERRORS.values())
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                name = node.exc.func.id
                foreign = name in vars(builtins) and name not in PYTHON
                assert not foreign, f"{path.relative_to(SOURCE)}:{node.lineno} raises {name}; use one of errors.py"


@pytest.mark.parametrize("name", ["sharpscope", *MODULES])
def test_examples_run(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_examples_exist() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 5


def test_rows_of_the_notation_are_cited_and_cited_rows_exist() -> None:
    text = (ROOT / "docs/notation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (N\d+) \|", text, re.MULTILINE)
    assert len(rows) == len(set(rows))
    cited = {row for path in FILES for row in re.findall(r"\[(N\d+)\]", path.read_text(encoding="utf-8"))}
    assert cited == set(rows)


def test_importing_the_library_needs_no_extras() -> None:
    """What torch itself imports (tqdm, at present) does not count: everything is compared with `import torch`."""
    code = "import torch, sys; before = set(sys.modules); import sharpscope; "
    code += "[getattr(sharpscope, name) for name in dir(sharpscope)]; print(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sharpscope.autodiff.objective" in found
    assert not {name.split(".")[0] for name in found} & {*EXTRAS, "scipy", "pandas"}
    assert not [n for n in found if n.startswith(("sharpscope.studies", "sharpscope.cli", "sharpscope.integrations"))]
    library = [path for path in FILES if wing(path) not in ("studies", "integrations")]
    mine = {name.split(".")[0] for path in library for name in module_level_imports(path)}
    assert not mine & set(EXTRAS)


def module_level_imports(path: Path) -> list[str]:
    body = tree(path).body
    plain = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module or "" for node in body if isinstance(node, ast.ImportFrom) and not node.level]


def test_the_printed_tree_is_that_of_the_package() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "tools/tree.py"], capture_output=True, text=True, check=True
    ).stdout
    assert printed in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^  (\w+)/", printed, re.MULTILINE)
    assert (*listed, "__main__") == WINGS  # from the ground up, as the order of imports
