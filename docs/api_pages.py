"""Sphinx extension: one page of the API reference per public module, from the docstrings."""

import importlib
import inspect
import re

MODULES = (  # in the order of the reference
    "tinyvit",
    "tinyvit.ops",
    "tinyvit.model",
    "tinyvit.optim",
    "tinyvit.gradcheck",
    "tinyvit.parameters",
    "tinyvit.memory",
    "tinyvit.backend",
    "tinyvit.data",
    "tinyvit.data.augment",
    "tinyvit.data.batches",
    "tinyvit.training",
    "tinyvit.training.step",
    "tinyvit.evaluate",
    "tinyvit.pretrained",
    "tinyvit.pretrained.pictures",
    "tinyvit.checkpoint",
    "tinyvit.sklearn",
    "tinyvit.gpu",
    "tinyvit.kernels",
    "tinyvit.reference",
)


OPERATIONS = (  # in the order of reading
    "linear",
    "layer_norm",
    "gelu",
    "softmax",
    "attention",
    "class_attention",
    "patches",
    "cross_entropy",
)
NAME = re.compile(r"`[A-Za-z_][\w.]*`")
TABLE = re.compile(  # two lines or more of `name    meaning`
    r"(?:^\w+ {2,}\S.*\n?){2,}", re.MULTILINE
)


def prepare(folder):
    """Write the page of each module, and the tables of all modules, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{name}.rst": page(name) for name in MODULES}
    names = [f"   {name}" for name in MODULES]
    hidden = [".. toctree::", "   :hidden:", "", *(f"   generated/{name}" for name in MODULES), ""]
    pages["modules.txt"] = "\n".join([".. autosummary::", "   :nosignatures:", "", *names, "", *hidden])
    for old in {path.name for path in folder.iterdir()} - set(pages):
        (folder / old).unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def page(name):
    """Return the page of a module: its docstring, a table of its names, and the entry of each."""
    own, others = public_names(name)
    parts = [name, "=" * len(name), "", f".. automodule:: {name}", "   :no-members:", ""]
    for title, table in (("", own), ("Names from other modules", others)):
        if table:
            parts += [f".. rubric:: {title}", ""] if title else []
            parts += [".. autosummary::", "   :nosignatures:", ""]
            parts += [f"   ~{home}.{entry}".replace(f"~{name}.", "~") for home, entry in table] + [""]
    for home, entry in own:
        value = getattr(importlib.import_module(home), entry)
        kind = "class" if inspect.isclass(value) else "function"
        if kind == "class" and issubclass(value, BaseException):
            kind = "exception"
        parts += [f".. auto{kind}:: {home}.{entry}"]
        if kind == "class" and not issubclass(value, tuple):  # the members of a tuple are its fields
            parts += ["   :members:"]
            if hasattr(value, "set_score_request"):  # scikit-learn adds it, and its text needs scikit-learn's site
                parts += ["   :exclude-members: set_score_request"]
        parts += [""]
    return "\n".join(parts)


def public_names(name):
    """Return the names that belong on a module's page, and those that have an entry on another page.

    Each is a pair of the module that the entry is documented under and the name. A name of a package is documented
    on the package's page, unless the module that defines it has a page.
    """
    module = importlib.import_module(name)
    package = module.__file__.endswith("__init__.py")
    own, others = [], []
    for entry, value in vars(module).items():
        home = getattr(value, "__module__", None) or ""
        if entry.startswith("_") or not home.startswith("tinyvit") or not callable(value):
            continue
        if home == name or (package and home.startswith(f"{name}.") and not documented_elsewhere(home, name)):
            own.append((name, entry))
        elif package:
            others.append((documented_elsewhere(home, name) or home, entry))
    return sorted(own, key=place_in_the_source), others


def place_in_the_source(pair):
    """Return a key that sorts names as the source has them: by module, and within a module by line."""
    value = getattr(importlib.import_module(pair[0]), pair[1])
    home = value.__module__.rpartition(".")[2]
    order = OPERATIONS.index(home) if home in OPERATIONS else len(OPERATIONS)
    return order, value.__module__, inspect.getsourcelines(value)[1]


def classes():
    """Return the classes of the reference: a dict from the name of each to the name of its entry."""
    own = [pair for module in MODULES for pair in public_names(module)[0]]
    return {name: f"{home}.{name}" for home, name in own if name[0].isupper()}


def documented_elsewhere(home, name):
    """Return the page, other than that of `name`, on which names of the module `home` are documented, or None."""
    candidates = [page for page in MODULES if page not in ("tinyvit", name) and f"{home}.".startswith(f"{page}.")]
    return max(candidates, key=len, default=None)


def docstring_as_rst(app, kind, name, value, options, lines):
    """Change the lines of a docstring, which is written to be read as text, into reStructuredText.

    Formulas such as |x| and `*inputs` keep their characters. The indented examples of a module become code.
    """
    text = "\n".join(lines)
    if kind == "module":
        text = TABLE.sub(lambda table: "::\n\n" + re.sub("(?m)^(?=.)", "    ", table[0]), text)
        text = re.sub(r"(?m)^(\S.*)(?<!::)\n\n(?= {4}\S)", r"\1\n\n::\n\n", text)
    lines[:] = [*with_escapes(text.splitlines()), ""]  # what follows a docstring needs a blank line


def with_escapes(lines):
    """Return lines with `*` and `|` escaped, except between backticks, in examples, and in literal blocks.

    Between backticks a name stays, and anything else is a literal: it cannot be a reference.
    """
    result, block = [], None  # the indentation of the line that begins a literal block
    for line in lines:
        indentation = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indentation <= block:
            block = None
        if block is None and not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(`+[^`]+`+)", line)
            parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
            parts[1::2] = [part if NAME.fullmatch(part) else f"``{part.strip('`')}``" for part in parts[1::2]]
            if line.rstrip().endswith("::"):
                block = indentation
            line = "".join(parts)
        result.append(line)
    return result


def setup(app):
    app.connect("autodoc-process-docstring", docstring_as_rst, priority=100)  # before numpydoc
    return {"parallel_read_safe": True, "parallel_write_safe": True}
