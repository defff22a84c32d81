"""The public interface has annotations, and the type checker finds nothing to say about the library."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docstrings import MODULES

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]

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
    homes = {"tinyvit.pretrained.pictures", "tinyvit.training.results"}
    for module in map(importlib.import_module, MODULES):
        names = [value for name, value in vars(module).items() if not name.startswith("_")]
        homes |= {getattr(value, "__module__", None) or "" for value in names}
    return sorted(home for home in homes if home.startswith("tinyvit"))


@pytest.mark.parametrize("name", public_modules())
def test_public_functions_have_annotations(name):
    functions = dict(public_functions(importlib.import_module(name)))
    missing = {function: gaps for function, value in functions.items() if (gaps := without_annotations(value))}
    assert missing == {}


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


# A program of a user. Each line that ends with a comment has one error, with this text in its message.
WRONG = """
import numpy as np
import tinyvit
from tinyvit import ops
from tinyvit.checkpoint import load_model, save_model
from tinyvit.gpu import get_backend
from tinyvit.optim import Adam
from tinyvit.training import TrainingConfig, read_checkpoint

data = tinyvit.load_mnist()
model = tinyvit.load_pretrained()
get_backend(3)  # Argument 1 to "get_backend"
get_backend("cpu").synchronise()
tinyvit.train("x")  # Missing positional argument "labels"
tinyvit.train(data.train_images, data.train_labels, device=0)  # Argument "device" to "train"
tinyvit.train(data.train_images, data.train_labels, 1, "note")  # Too many positional arguments
tinyvit.train(data.train_images, data.train_labels, lr=0.1)  # Unexpected keyword argument "lr"
model.predict(data.test_images, "gpu")  # Too many arguments for "predict"
model.predict()  # Missing positional argument "images"
model.evaluate(data.test_images)  # Missing positional argument "labels"
model.evaluate(data.test_images, data.test_labels).acc  # "Evaluation" has no attribute "acc"
model.save(3)  # Argument 1 to "save"
load_model()  # Missing positional argument "path"
load_model("model.safetensors", "gpu")  # Argument 2 to "load_model"
save_model("model.safetensors", model.parameters)  # Missing positional argument "config"
read_checkpoint(3)  # Argument 1 to "read_checkpoint"
tinyvit.load_dataset(classes="10")  # Argument "classes" to "load_dataset"
tinyvit.ViTConfig(width="128")  # Argument "width" to "ViTConfig"
TrainingConfig(augmentation=0.1)  # Argument "augmentation" to "TrainingConfig"
tinyvit.vit_forward(data.test_images, model.parameters)  # Missing positional argument "config"
tinyvit.vit_backward(data.test_images, model.config)  # Argument 2 to "vit_backward"
loss, gradients = tinyvit.loss_and_gradient(  # Too many values to unpack
    data.test_images, data.test_labels, model.parameters, model.config
)
Adam(model.parameters)  # Argument 1 to "Adam"
ops.layer_norm_backward(np.ones((2, 3)), None)  # Argument 2 to "layer_norm_backward"
tinyvit.gradient_error(ops.softmax_forward, ops.softmax_backward, np.float64(1))  # Argument 3 to "gradient_error"
"""


def test_the_type_checker_sees_the_errors_of_a_user(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WRONG.lstrip())
    lines = check_types("--cache-dir", str(tmp_path / "cache"), "--config-file", "setup.cfg", str(program))
    found = {int(line.split(":")[1]): line for line in lines if "program.py:" in line}
    expected = {
        number: line.split("  # ")[1] for number, line in enumerate(WRONG.lstrip().split("\n"), 1) if "  # " in line
    }
    assert len(found) == len(lines)
    assert found.keys() == expected.keys()
    for number, text in expected.items():
        assert text in found[number]


# A program in which every line is right.
RIGHT = """
import gzip
import io
from pathlib import Path

import numpy as np
import tinyvit
from tinyvit.data import read_idx, write_idx
from tinyvit.evaluate import classification_report
from tinyvit.gpu import get_backend
from tinyvit.gradcheck import numerical_gradients
from tinyvit.ops import cross_entropy_backward, cross_entropy_forward, softmax_forward
from tinyvit.pretrained.pictures import prepare_strokes
from tinyvit.training import TUNED, Training, TrainingConfig

images, labels = np.zeros((8, 28, 28), np.uint8), np.zeros(8, int)
model = tinyvit.train(images.tolist(), [0] * 8, epochs=1, recipe=TrainingConfig(), model={"depth": 2}, workers=2)
model = tinyvit.train(images, labels, 1, recipe="note", device="auto", verbose=0)
model.save(Path("model.safetensors"), info={"seed": 0})
model = tinyvit.VisionTransformer.load("model.safetensors")
classes: np.ndarray = model.predict(list(images))
report: str = classification_report(model.evaluate(images, labels, workers=1), ["a", "b"])
config = tinyvit.ViTConfig(image_size=[28, 28], patch_size=(7, 14), pixel_mean=(0.1,), class_names=["0"] * 10)
rows, columns = config.grid
parameters = tinyvit.initialise(config, dtype="float64")
parameters.set_pair("norm", weight=1, bias=[0.0] * config.width)
logits, cache = tinyvit.vit_forward(images, parameters, config)
gradients = tinyvit.vit_backward(logits, cache)
gradients.flat += tinyvit.loss_and_gradient(images, labels, parameters, config, smoothing=0.1)[2].flat
sizes = {name: view.size for name, view in gradients.items()}
numerical_gradients(softmax_forward, (np.ones(3),), 1.0)
tinyvit.gradient_error(lambda x: cross_entropy_forward(x, labels), cross_entropy_backward, [logits])
array = read_idx(gzip.open("images.gz"))
write_idx(io.BytesIO(), read_idx(Path("labels")) + array)
prepare_strokes(np.ones((2, 3, 2)))
prepare_strokes([[(0.1, 0.2), (0.3, 0.4)]])
run = Training(config, TUNED, images, labels, get_backend("cpu"), workers=1)
run.run("folder", on_step=lambda run: print(run.images_done), stop_after=1)
"""


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_type_checker_accepts_right_programs(tmp_path):
    programs = [tmp_path / "right.py", *sorted((ROOT / "examples").glob("*.py"))]
    programs[0].write_text(RIGHT, encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))):
        for number, text in enumerate(python_blocks(page)):
            programs.append(tmp_path / f"{page.stem.lower()}_{number}.py")
            programs[-1].write_text(text, encoding="utf-8")
    assert len(programs) > 10  # with those of the README and of the guide
    options = "--cache-dir", str(tmp_path / "cache"), "--check-untyped-defs", "--follow-imports", "silent"
    assert check_types(*options, *map(str, programs)) == []
