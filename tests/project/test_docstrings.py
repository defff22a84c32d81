"""Public docstrings are in numpydoc form, so that they render as the API reference."""

import importlib
import inspect

import pytest

pytestmark = pytest.mark.extended

validate = pytest.importorskip("numpydoc.validate", reason='needs the extra: pip install -e ".[docs]"').validate

MODULES = (
    "tinyvit",
    "tinyvit.backend",
    "tinyvit.memory",
    "tinyvit.ops",
    "tinyvit.parameters",
    "tinyvit.model",
    "tinyvit.optim",
    "tinyvit.gradcheck",
    "tinyvit.data",
    "tinyvit.data.augment",
    "tinyvit.data.batches",
    "tinyvit.checkpoint",
    "tinyvit.evaluate",
    "tinyvit.gpu",
    "tinyvit.training",
    "tinyvit.training.step",
    "tinyvit.pretrained",
    "tinyvit.classifier",
    "tinyvit.sklearn",
)
CHECKS = {
    "GL03": "no double blank lines",
    "GL05": "no tabs",
    "GL06": "known sections only",
    "GL07": "sections in their order",
    "GL08": "there is a docstring",
    "GL10": "directives end with two colons",
    "SS01": "a summary",
    "SS03": "that ends with a period",
    "SS04": "and begins without spaces",
    "SS05": "with an infinitive",
    "SS06": "on one line",
    "PR01": "every parameter is documented",
    "PR02": "no parameter that does not exist",
    "PR03": "in the order of the signature",
    "PR04": "each with a type",
    "PR06": "named as Python names it",
    "PR07": "and a description",
    "PR08": "that begins with a capital letter",
    "PR09": "and ends with a period",
    "PR10": "with a space before the colon",
    "RT01": "what is returned",
    "RT03": "with a description",
    "RT04": "that begins with a capital letter",
    "RT05": "and ends with a period",
    "YD01": "what is yielded",
}


def public_names():
    """List the functions, classes and methods of the public modules, each under the module that defines it."""
    names = set()
    for module in map(importlib.import_module, MODULES):
        for name, value in vars(module).items():
            home = getattr(value, "__module__", None) or ""
            if name.startswith("_") or not home.startswith("tinyvit") or not callable(value):
                continue
            if not module.__file__.endswith("__init__.py") and home != module.__name__:
                continue  # imported for its own use
            names.add(f"{home}.{value.__qualname__}")
            if inspect.isclass(value):
                names |= {
                    f"{home}.{value.__qualname__}.{method}"
                    for method, function in vars(value).items()
                    if not method.startswith("_") and isinstance(function, (type(public_names), classmethod))
                }
    return sorted(names)


@pytest.mark.parametrize("name", public_names())
def test_the_docstring_is_in_numpydoc_form(name):
    faults = [f"{code}: {message}" for code, message in validate(name)["errors"] if code in CHECKS]
    assert not faults, f"{name}: " + "; ".join(faults)
