"""The plan of the house: who may import whom, and what every operation has."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinyvit
from tinyvit import ops

LIBRARY = Path(tinyvit.__file__).parent
FILES = sorted(LIBRARY.rglob("*.py"))

# What each file of the library may import from the library. A new file needs a line: what does it stand on?
MAY_IMPORT = {
    "console": set(),
    "reference": set(),
    "checks": {"backend"},
    "backend": {"loops"},  # only where loops are asked for
    "loops": set(),
    "memory": {"backend"},
    "gpu": {"gpu.device"},
    "gpu.device": {"backend", "gpu.diagnosis"},
    "gpu.diagnosis": set(),
    "gradcheck": {"backend", "checks"},
    "files": {"signatures"},
    "parameters": {"checks", "memory"},
    "ops": {"ops"},
    "ops.linear": {"checks", "memory"},
    "ops.layer_norm": {"backend", "checks", "memory"},
    "ops.gelu": {"backend", "checks", "memory"},
    "ops.softmax": {"backend", "checks", "memory"},
    "ops.attention": {"checks", "memory", "ops.linear", "ops.softmax"},
    "ops.class_attention": {"checks", "memory", "ops.linear", "ops.attention"},
    "ops.patches": {"backend", "checks", "memory", "ops.linear"},
    "ops.cross_entropy": {"backend", "checks"},
    "model": {"backend", "checks", "memory", "ops", "parameters"},
    "optim": {"backend", "checks", "parameters"},
    "data": {"data"},
    "signatures": set(),
    "data.idx": {"files", "signatures"},
    "data.mnist": {"data.idx", "files"},
    "data.contents": {"data.idx", "data.mnist", "signatures"},
    "data.families": set(),
    "data.arrays": {"data.contents", "data.mnist"},
    "data.binaries": {"data.arrays", "data.contents", "data.idx", "data.mnist"},
    "data.tables": {"data.arrays", "data.contents", "data.mnist"},
    "data.folders": {"data.arrays", "data.contents", "data.mnist", "signatures"},
    "data.datasets": {"data.arrays", "data.binaries", "data.contents", "data.families", "data.folders", "data.idx",
                      "data.mnist", "data.tables"},
    "data.augment": {"backend", "checks"},
    "data.batches": {"backend", "checks", "data.augment"},
    "checkpoint": {"backend", "checks", "files", "parameters", "model", "signatures"},
    "pretrained": {"checkpoint"},
    "pretrained.pictures": set(),
    "evaluate": {"backend", "checks", "ops", "parameters", "model"},
    "plots": {"files"},
    "kernels": {"backend", "checks", "data.batches", "kernels"},
    "training": {"backend", "training"},
    "training.settings": {"checks", "data.augment", "optim"},
    "training.state": {"backend", "checkpoint", "checks", "kernels", "model", "optim", "parameters",
                       "training.settings"},
    "training.workers": {"backend", "checks", "console", "data.augment", "memory", "model", "parameters"},
    "training.step": {"backend", "data.batches", "kernels", "optim", "training.state", "training.workers"},
    "training.loop": {"backend", "checkpoint", "checks", "evaluate", "files", "model", "training.settings",
                      "training.state", "training.step"},
    "training.progress": set(),
    "training.results": {"checkpoint", "data.augment", "evaluate", "files", "plots", "training.settings",
                         "training.state", "training.workers"},
    "classifier": {"backend", "checks", "gpu", "ops", "parameters", "model", "evaluate", "checkpoint", "pretrained",
                   "training"},
    "sklearn": {"checks", "classifier", "data.augment", "evaluate", "gpu", "ops", "training"},
    "doctor": {"backend", "gpu", "data", "memory", "model", "training"},
    "server": {"backend", "ops", "model", "evaluate", "pretrained", "server"},
    "commands": {"backend", "checkpoint", "console", "files", "gpu", "kernels", "data", "model", "evaluate", "plots",
                 "pretrained", "training", "classifier", "doctor", "server", "commands"},
    "__main__": {"commands"},
}  # fmt: skip
ONLY_FILES_WITH = {"cupy": ("gpu.device",), "cupyx": ("backend",), "joblib": ("backend",), "numba": ("loops",)}
ONLY_FILES_WITH |= {"matplotlib": ("plots",), "PIL": ("pretrained.pictures", "data.folders")}
NEVER = {"torch", "jax", "tensorflow", "keras", "pickle", "dill", "lessons", "tests", "examples"}
NEVER |= {"benchmarks", "conftest", "damaged_files", "devices", "operations", "strategies", "strict_cupy"}
NEVER |= {"fake_cuda"}


def name_of(path):
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path, for_types=True):
    """Every module that a file names in an import statement or hands to importlib, and each of its parents' names.

    Imports under `if TYPE_CHECKING:`, which no program executes, count unless `for_types` is false.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not for_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(None) | ast.ImportFrom(level=1 | 2 | 3):
                raise AssertionError(f"{path.name}, line {node.lineno}: write the whole name, not a relative one")
            case ast.ImportFrom("tinyvit", names):
                yield from (f"tinyvit.{alias.name}" for alias in names)
            case ast.ImportFrom(module):
                yield module
            case ast.Call(ast.Attribute(_, "import_module" | "resolve_name") | ast.Name(
                "import_module" | "resolve_name" | "__import__"
            ), arguments):
                assert isinstance(arguments[0], ast.Constant), f"{path.name}, line {node.lineno}: name the module"
                yield arguments[0].value


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=[name_of(path) or "tinyvit" for path in paths])


@by_name(FILES)
def test_arrows_point_one_way(path):
    name = name_of(path)
    if not name:  # the public names, which may come from everywhere
        return
    room = name if name in MAY_IMPORT else name.split(".")[0]
    assert room in MAY_IMPORT, f"tinyvit/{path.name} is new: add to MAY_IMPORT what it may import"
    modules = imported(path, for_types=False)  # an annotation may name a class of a file above
    own = {module.removeprefix("tinyvit.") for module in modules if module.startswith("tinyvit")}
    own.discard("__version__")  # a constant, which every file may import
    for module in own:
        allowed = any(module == other or module.startswith(other + ".") for other in MAY_IMPORT[room])
        assert allowed, f"{name} imports {module}, against the arrows of the house"


def test_the_reference_stands_apart():
    assert sorted(imported(LIBRARY / "reference.py")) == ["numpy", "scipy.special"]
    tree = ast.parse((LIBRARY / "reference.py").read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert names == ["erf"]
    assert not any("tinyvit.reference" in imported(path) for path in FILES)


def test_arrows_make_no_circle():
    def visit(name, above):
        assert name not in above, f"{name} stands on itself: {above}"
        for below in MAY_IMPORT[name] - {name}:
            visit(below, [*above, name])

    for name in MAY_IMPORT:
        visit(name, [])


def test_the_check_sees_an_import_however_it_is_written(tmp_path):
    path = tmp_path / "new.py"
    for text in (
        "import cupy",
        "def f():\n    import cupy.linalg as la",
        "from cupy import linalg",
        "import importlib\ncupy = importlib.import_module('cupy')",
        "__import__('cupy')",
    ):
        path.write_text(text, encoding="utf-8")
        assert any(module.split(".")[0] == "cupy" for module in imported(path)), text
    path.write_text("from tinyvit import model", encoding="utf-8")
    assert list(imported(path)) == ["tinyvit.model"]
    path.write_text("if TYPE_CHECKING:\n    import cupy\nelse:\n    import numpy", encoding="utf-8")
    assert list(imported(path)) == ["cupy", "numpy"]
    assert list(imported(path, for_types=False)) == ["numpy"]
    for text in ("from . import model", "from .model import ViTConfig", "import_module(name)"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(AssertionError, match=r"new\.py, line 1"):
            list(imported(path))


@by_name(FILES)
def test_only_some_files_import_cupy_and_other_large_libraries(path):
    name, modules = name_of(path), {module.split(".")[0] for module in imported(path)}
    for module, files in ONLY_FILES_WITH.items():
        assert name in files or module not in modules, f"{name} imports {module}, which is only for {files}"


@by_name(FILES)
def test_what_the_library_never_imports(path):
    modules = {module.split(".")[0] for module in imported(path)}
    assert not modules & NEVER
    assert not re.search(r"allow_pickle\s*=\s*True", path.read_text(encoding="utf-8"))


def test_training_on_a_cpu_imports_neither_cupy_nor_a_framework():
    unwanted = {"cupy", "torch", "jax", "tensorflow"}
    program = f"import sys, tinyvit.training; print({unwanted} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- operations ----

OPERATIONS = [importlib.import_module(f"tinyvit.ops.{m.name}") for m in pkgutil.iter_modules(ops.__path__)]
FUNCTIONS = [
    function
    for module in OPERATIONS
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
]
SERVED_BY_ANOTHER = {"gelu_tanh_forward": "gelu_backward"}  # the cache holds the derivative, whatever the formula


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_public_operation_says_what_it_does(function):
    assert function.__doc__
    assert len(function.__doc__.split()) >= 6


@pytest.mark.parametrize(
    "forward", [f for f in FUNCTIONS if f.__name__.endswith("_forward")], ids=lambda function: function.__name__
)
def test_every_forward_has_its_backward_which_takes_a_gradient_and_a_cache(forward):
    backward_name = SERVED_BY_ANOTHER.get(forward.__name__, forward.__name__.replace("_forward", "_backward"))
    backward = getattr(inspect.getmodule(forward), backward_name)
    first, second, *places = inspect.signature(backward).parameters.values()
    places = [place for place in places if place.name != "patch_size"]
    assert first.name.startswith("d")
    assert second.name in ("cache", "image_shape")
    assert all(place.name.startswith("d") and place.default is None for place in places)  # where gradients may go
    assert {forward.__name__, backward_name} <= set(dir(ops))


@pytest.mark.parametrize("module", OPERATIONS, ids=lambda module: module.__name__)
def test_operations_have_no_state(module):
    tree = ast.parse(inspect.getsource(module))
    assert not any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert all([ast.unparse(base) for base in node.bases] == ["NamedTuple"] for node in classes)  # caches
    changeable = [
        name
        for name, value in vars(module).items()
        if not name.startswith("__") and isinstance(value, list | dict | set | bytearray)
    ]
    assert changeable == []
