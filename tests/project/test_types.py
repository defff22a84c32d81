"""The public interface has annotations, and the type checker finds nothing to say about the library."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from test_docstrings import MODULES

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]

# Modules whose public functions still need annotations.
STILL_TO_ANNOTATE = {
    "tinyvit.checkpoint",
    "tinyvit.checks",
    "tinyvit.classifier",
    "tinyvit.data.augment",
    "tinyvit.data.batches",
    "tinyvit.data.idx",
    "tinyvit.data.mnist",
    "tinyvit.evaluate",
    "tinyvit.files",
    "tinyvit.kernels",
    "tinyvit.model",
    "tinyvit.ops",
    "tinyvit.optim",
    "tinyvit.parameters",
    "tinyvit.pretrained",
    "tinyvit.training",
}


def without_annotations(function):
    """Return the parameters of a function that have no annotation, and "return" if its result has none."""
    signature = inspect.signature(function)
    missing = [name for name, parameter in signature.parameters.items() if parameter.annotation is parameter.empty]
    if signature.return_annotation is signature.empty:
        missing.append("return")
    return [name for name in missing if name not in ("self", "cls")]


def public_functions(module):
    """Yield the name and each public function of a module, also the methods of its classes."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            for method, function in vars(value).items():
                function = getattr(function, "__func__", getattr(function, "fget", function))
                written = inspect.isfunction(function) and function.__code__.co_filename == module.__file__
                if written and (not method.startswith("_") or method in ("__init__", "__call__")):
                    yield f"{name}.{method}", function
        elif callable(value) and hasattr(inspect.unwrap(value), "__code__"):
            yield name, value


def public_modules():
    """Return the modules that define a name of the public interface."""
    homes = set()
    for module in map(importlib.import_module, MODULES):
        names = [value for name, value in vars(module).items() if not name.startswith("_")]
        homes |= {getattr(value, "__module__", None) or "" for value in names}
    return sorted(home for home in homes if home.startswith("tinyvit"))


def is_still_to_do(module):
    return any(module == name or module.startswith(f"{name}.") for name in STILL_TO_ANNOTATE)


@pytest.mark.parametrize("name", public_modules())
def test_public_functions_have_annotations(name):
    functions = dict(public_functions(importlib.import_module(name)))
    missing = {function: gaps for function, value in functions.items() if (gaps := without_annotations(value))}
    if not is_still_to_do(name):
        assert missing == {}


@pytest.mark.parametrize("name", sorted(STILL_TO_ANNOTATE))
def test_a_module_that_has_its_annotations_leaves_the_list(name):
    modules = [module for module in public_modules() if module == name or module.startswith(f"{name}.")]
    functions = [function for module in modules for _, function in public_functions(importlib.import_module(module))]
    assert any(map(without_annotations, functions)), f"remove {name} from STILL_TO_ANNOTATE"


def test_a_missing_annotation_is_seen():
    def function(a: int, b, *, c: int = 0):
        return a

    assert without_annotations(function) == ["b", "return"]


def check_types(*arguments):
    """Run mypy, and return the lines that report an error."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip('needs the extra: pip install -e ".[test]"')
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 2 is an error of mypy itself
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_the_type_checker_finds_no_error(tmp_path):
    assert check_types("--cache-dir", str(tmp_path)) == []


def test_the_type_checker_sees_a_wrong_argument_of_a_user(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("from tinyvit.gpu import get_backend\n\nget_backend(3)\nget_backend('cpu').synchronise()\n")
    (error,) = check_types("--cache-dir", str(tmp_path / "cache"), "--config-file", "setup.cfg", str(program))
    assert 'program.py:3: error: Argument 1 to "get_backend"' in error
