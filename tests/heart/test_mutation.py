"""Damage every backward pass in many small ways. The gradient check must see each of them.

A check that cannot fail proves nothing. This file rewrites the functions in `TARGETS` with one change at a time: it
removes a statement, turns a sign, drops a factor, exchanges an axis, doubles a number or swaps two gradients. Each
mutant must raise an error or give a gradient that differs from central differences. Buffers are full of NaN before
they are written, so that a mutant that does not write is always seen.

A few mutants compute the same as the original. `EQUIVALENT` lists them with reasons. It names them by the function
and by the expression that the changed statement computes, so that code may move and variables may be renamed.
"""

import ast
import copy
import importlib
import inspect
import math
import textwrap
import types
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import scipy.special
from operations import MEDIUM, OPERATIONS, in_places, with_constants
from strategies import TOLERANCE, PoisonedWorkspace, normal, plain_adam

from tinyvit import backend, optim
from tinyvit.gradcheck import analytical_gradients, numerical_gradients, relative_error
from tinyvit.model import ViTConfig
from tinyvit.parameters import Parameters

SEEN = 1e-4  # the error of a mutant must exceed this; the error of the original is below TOLERANCE
ONE = ast.Constant(1)


# ---- all small changes of a function ----


def parse(function):
    """Return the tree of a function without its checks of arguments, which `test_arguments.py` tests."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    tree.body = [statement for statement in tree.body if not is_check(statement)]
    return tree


def is_check(statement):
    match statement:
        case ast.Expr(ast.Call(ast.Name(name))):
            return name.startswith(("require_", "check_"))
        case ast.Assign([ast.Name("form")]) | ast.AugAssign(ast.Name("form")):
            return True
        case ast.Assign(value=ast.Call(ast.Name("as_array"))):
            return True
        case ast.If(body=[ast.Raise()], orelse=[]):
            return True
    return False


def places(tree):
    """Yield (node, field, index), the statement or expression at this place, and the statement it belongs to."""
    owner = {}
    for statement in ast.walk(tree):  # outer statements come first, so that the innermost one remains
        if isinstance(statement, ast.stmt):
            owner.update(dict.fromkeys(ast.walk(statement), statement))
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.stmt | ast.expr):
                    yield (node, field, index), child, owner[child]


def replacements(child):
    """Yield (description, new node) for every change of one statement or expression."""
    match child:
        case ast.Assign() | ast.AugAssign() | ast.Expr():
            yield "left out", ast.Pass()
        case ast.Return(ast.Tuple(elements)):
            for i, element in enumerate(elements):
                zero = ast.BinOp(element, ast.Mult(), ast.Constant(0))
                yield f"zeros for value {i} of", ast.Return(ast.Tuple([*elements[:i], zero, *elements[i + 1 :]]))
                for j in range(i):
                    swapped = list(elements)
                    swapped[i], swapped[j] = elements[j], elements[i]
                    yield f"swapped values {j} and {i} of", ast.Return(ast.Tuple(swapped))
        case ast.Return(ast.expr() as value):
            yield "zeros for", ast.Return(ast.BinOp(value, ast.Mult(), ast.Constant(0)))

    match child:  # the arrays that receive gradients are arguments that may be left out
        case ast.Call(_, arguments, keywords):
            for i, argument in enumerate(arguments):
                if i >= 2 or isinstance(argument, ast.Starred):
                    yield f"no {ast.unparse(argument)} in", call(child, args=[*arguments[:i], *arguments[i + 1 :]])
            for i, keyword in enumerate(keywords):
                if keyword.arg == "out":  # mostly a buffer, without which the result is a new and correct array
                    continue
                yield f"no {keyword.arg} in", call(child, keywords=[*keywords[:i], *keywords[i + 1 :]])

    match child:
        case ast.AugAssign(target, operator, value):
            for other in others(operator):
                yield f"{type(other).__name__} in", ast.AugAssign(target, other, value)
            yield "= in", ast.Assign([target], value)
        case ast.BinOp(left, operator, right):
            for other in others(operator):
                yield f"{type(other).__name__} in", ast.BinOp(left, other, right)
            yield "only the left of", left
            yield "only the right of", right
        case ast.UnaryOp(ast.USub(), operand):
            yield "no minus in", operand
            yield "0 for", ast.Constant(0)
        case ast.Constant(bool(value)):
            yield "the reverse of", ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield "twice", ast.Constant(2 * value)
            yield "one more than", ast.Constant(value + 1)
        case ast.Attribute(value, "T"):
            yield "no T in", value
        case ast.Call(ast.Attribute(_, "multiply" | "add" | "subtract"), [a, b]):
            neutral = ONE if child.func.attr == "multiply" else ast.Constant(0)
            yield "only the first of", call(child, args=[a, neutral])
            yield "only the second of", call(child, args=[neutral, b])
            names = {"multiply": ["divide"], "add": ["subtract"], "subtract": ["add"]}
            for name in names[child.func.attr]:
                yield f"{name} in", call(child, func=ast.Attribute(child.func.value, name, ast.Load()))
            if child.func.attr == "subtract":
                yield "swapped arguments of", call(child, args=[b, a])
        case ast.Call(ast.Attribute(_, "sum" | "mean" as name)):
            other = {"sum": "mean", "mean": "sum"}[name]
            yield f"{other} in", call(child, func=ast.Attribute(child.func.value, other, ast.Load()))
        case ast.Call(ast.Attribute(value, "copy" | "swapaxes" | "reshape")):
            yield f"no {child.func.attr} in", value
        case ast.Call(ast.Name("reversed" | "round"), [value]):
            yield f"no {child.func.id} in", value
        case ast.Call(ast.Attribute(ast.Name("np" | "xp" | "math"), "exp" | "tanh" | "sqrt"), [value, *_]):
            yield f"no {child.func.attr} in", value
        case ast.Call(_, [a, b]):
            yield "swapped arguments of", call(child, args=[b, a])
        case ast.Slice(lower, upper):
            if lower is not None or upper is not None:
                yield "all of", ast.Slice()
                yield "the rest of", ast.Slice(upper, lower)


def other_variables(node, child, tree):
    """Yield every other variable of the function in the place of an operand or argument."""
    match node:
        case ast.Call(ast.Name("array_module" | "len" | "empty_like")):  # any array of the same size does
            return
        case ast.keyword("out" | "like"):  # a buffer, and an array that gives only its dtype and device
            return
        case ast.BinOp() | ast.AugAssign() | ast.Call() | ast.keyword():
            if not isinstance(child, ast.Name) or not isinstance(child.ctx, ast.Load):
                return
            if child is getattr(node, "func", None):
                return
            names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            for name in sorted(names | {argument.arg for argument in tree.args.args}):
                yield f"{name} for", ast.Name(name, ast.Load())


def others(operator):
    match operator:
        case ast.Add():
            return [ast.Sub()]
        case ast.Sub():
            return [ast.Add()]
        case ast.Mult():
            return [ast.Div()]
        case ast.Div():
            return [ast.Mult()]
        case ast.Pow():
            return [ast.Mult()]
    return []


def call(node, **changes):
    new = copy.copy(node)
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def computed(statement):
    """Return the expression that a statement computes, as text without the assigned variable."""
    match statement:
        case ast.AugAssign(target, operator, value):
            return ast.unparse(ast.BinOp(target, operator, value))
        case ast.Assign(value=value) | ast.Expr(value) | ast.Return(ast.expr() as value):
            return ast.unparse(value)
        case ast.For(iter=value) | ast.If(test=value) | ast.While(test=value):
            return ast.unparse(value)
    return ast.unparse(statement).split("\n")[0]


def mutants(function):
    """Yield (description, source) of every version of a function, or of its tree, with one change."""
    tree = function if isinstance(function, ast.FunctionDef) else parse(function)
    docstring = tree.body[0]
    first_line = docstring.end_lineno if isinstance(docstring, ast.Expr) else docstring.lineno - 1
    seen, named = {ast.unparse(tree)}, Counter()
    for (node, field, index), child, statement in list(places(tree)):
        if child.lineno <= first_line:
            continue
        value = computed(statement)
        place = value if child is statement else f"{ast.unparse(child)}: {value}"
        for what, new in [*replacements(child), *other_variables(node, child, tree)]:
            before = getattr(node, field)
            after = new if index is None else [*before[:index], new, *before[index + 1 :]]
            setattr(node, field, after)
            source = ast.unparse(ast.fix_missing_locations(tree))
            setattr(node, field, before)
            if source not in seen:
                seen.add(source)
                description = f"{what} {place}"
                named[description] += 1  # numbered, so that no entry of `EQUIVALENT` covers two mutants
                number = f" ({named[description]})" if named[description] > 1 else ""
                yield description + number, source


# ---- the damaged functions, and the pairs that show the damage ----


# The linear layer has as many rows as columns, so that few of its mutants fail only by their shapes. The other sizes
# keep axes apart: with as many patches as pixels per patch, for example, a wrong axis would give right numbers.
SIZES = MEDIUM._replace(leading=(2, 3, 2), inputs=12, outputs=12, across=7, side=3)


def driver_of(name, module_name):
    """Return a function from the names of a module to (forward, backward, inputs) of an operation in the table."""
    operation = OPERATIONS[name]

    def driver(names):
        inputs, constants, _ = operation.draw(SIZES, 0)  # new for every mutant, as a mutant may write into its inputs
        forward, backward = getattr(operation, module_name)(names)
        if operation.places and module_name == "ops":
            backward = in_places(backward, operation.places)
        return with_constants(forward, constants), backward, inputs

    return driver


SMALL = ViTConfig(image_size=4, patch_size=2, width=4, depth=2, heads=2, mlp_width=3, classes=3)


def drive_model(module):
    shapes = SMALL.shapes()

    def forward(images, flat):
        return module["vit_forward"](images, Parameters(shapes, flat), SMALL)

    def backward(dlogits, cache):
        gradients, dimages = module["vit_backward_to_images"](dlogits, cache)
        return dimages, gradients.flat

    images = np.random.default_rng(0).random((2, 4, 4))
    return forward, backward, [images, 0.7 * normal(0, (sum(math.prod(shape) for shape in shapes.values()),))]


def drive_plain_model(module):
    shapes = SMALL.shapes()

    def forward(flat):
        return module["vit_forward"](images, Parameters(shapes, flat), SMALL.heads, SMALL.patch_size)

    def backward(dlogits, cache):
        gradients = module["vit_backward"](dlogits, cache)
        return np.concatenate([gradients[name].ravel() for name in shapes])

    images, flat = normal(0, (2, 4, 4), (sum(math.prod(shape) for shape in shapes.values()),))
    return forward, backward, [0.7 * flat]


TARGETS = [  # module, function, its operation or driver, the least number of mutants that only the gradient reveals
    ("ops.linear", "linear_backward", "linear", 5),
    ("ops.layer_norm", "layer_norm_backward", "layer_norm", 30),
    ("ops.gelu", "gelu_backward", "gelu", 3),
    ("ops.gelu", "gelu_forward", "gelu", 20),
    ("ops.gelu", "gelu_tanh_forward", "gelu_tanh", 30),
    ("ops.softmax", "softmax_backward", "softmax", 10),
    ("ops.attention", "attention_backward", "attention", 10),
    ("ops.attention", "multi_head_attention_backward", "multi_head_attention", 10),
    ("ops.class_attention", "class_attention_backward", "class_attention", 10),
    ("ops.patches", "patches_backward", "patches of colours", 4),
    ("ops.patches", "patch_embedding_backward", "patch_embedding of colours", 7),
    ("ops.cross_entropy", "cross_entropy_backward", "cross_entropy of smoothed labels", 5),
    ("model", "block_backward", drive_model, 10),
    ("model", "vit_backward_to_images", drive_model, 4),
    ("reference", "linear_backward", "linear", 5),
    ("reference", "layer_norm_backward", "layer_norm", 30),
    ("reference", "gelu_backward", "gelu", 3),
    ("reference", "softmax_backward", "softmax", 10),
    ("reference", "attention_backward", "attention", 10),
    ("reference", "multi_head_attention_backward", "multi_head_attention", 10),
    ("reference", "patch_embedding_backward", "patch_embedding", 8),
    ("reference", "cross_entropy_backward", "cross_entropy", 5),
    ("reference", "block_backward", drive_plain_model, 10),
    ("reference", "vit_backward", drive_plain_model, 4),
]

_ANY_NEGATIVE = "NumPy computes the size for -2 as for -1"
_ALIAS = "both names are the same array"
_NOT_IN_DOUBLE = "in float64 erf computes the distribution without the square; `test_gelu.py` tests float32"
_NOT_CALLED = "without a cache there is no gradient; `test_loops.py` tests the values"
EQUIVALENT_POLYNOMIALS = {
    "normal_cdf": {"swapped arguments of min(max(x, -LIMIT), LIMIT): min(max(x, -LIMIT), LIMIT)"},  # min commutes
    "normal_density": set(),
}
EQUIVALENT = {
    "linear_backward": {
        "twice 1: x.reshape(-1, x.shape[-1])": _ANY_NEGATIVE,
        "twice 1: dout.reshape(-1, dout.shape[-1])": _ANY_NEGATIVE,
        "dout for drows: matmul(drows, w.T)": "many small products give the same as one large product",
    },
    "layer_norm_backward": {
        "product for dx: xp.subtract(dnormalised, dx, out=dx)": _ALIAS,
    },
    "gelu_backward": {
        "cache for derivative: array_module(dout).multiply(dout, derivative, out=empty_like(dout))": _ALIAS,
    },
    "gelu_forward": {
        f"{name} for square: normal_cdf(x, square)": _NOT_IN_DOUBLE
        for name in ("derivative", "loops", "with_cache", "x", "xp")
    } | {
        "left out loops.gelu_values(x.ravel(), out.ravel())": _NOT_CALLED,
        "swapped arguments of loops.gelu_values(x.ravel(), out.ravel()): loops.gelu_values(x.ravel(), out.ravel())":
            _NOT_CALLED,
    },
    "gelu_tanh_forward": {"square for slope: derivative * slope": _ALIAS},
    "softmax_backward": {
        "cache for weights: xp.multiply(dweights, weights, out=empty_like(weights))": _ALIAS,
        "cache for weights: dx * weights": _ALIAS,
    },
    "block_backward": {
        "swapped arguments of gelu_backward(dactive, cache.gelu): gelu_backward(dactive, cache.gelu)":
            "it returns the product of the two, which commutes",
    },
}  # fmt: skip


class Mode(NamedTuple):
    """How a pair is run: with which names, and which errors show that it is right or damaged."""

    names: dict
    right: float = TOLERANCE
    seen: float = SEEN


# The compiled loops are run as plain Python in float64. Their polynomials are those of float32, so GELU has an error
# of 1e-8, which is 1e-4 of the smallest value that `relative_error` divides by.
LOOPS = Path(backend.__file__).with_name("loops.py")


def loops_in_python(source=""):
    """Return the names of `tinyvit.loops` without compilation, some of them defined by another source."""
    tree = ast.parse(LOOPS.read_text(encoding="utf-8"))
    compiler = {"njit"}
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.Assign) and not compiler & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)})
    ]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    names = {"np": np}
    exec(compile(ast.fix_missing_locations(tree), "loops", "exec"), names)
    exec(source, names)
    return names


def functions_of(module):
    """Return the compiled definitions of the functions of a module."""
    tree = ast.parse(inspect.getsource(module))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return compile(tree, module.__name__, "exec")


def with_loops(module, loops):
    """Return a mode in which the functions of a module of `ops` always take the loops."""
    names = vars(module) | {"loops_for": lambda *arrays: SimpleNamespace(**loops)}
    exec(functions_of(module), names)
    return Mode(names, right=5e-4, seen=2e-3)


def modes_of(module):
    """Return the ways in which the functions of a module compute."""
    loops = [with_loops(module, loops_in_python())] if "loops_for" in vars(module) else []
    return [Mode(dict(vars(module))), *loops]


def outcome(driver, module):
    """Run a driver's pair in poisoned memory. Return dout and a list of the gradients and out."""
    forward, backward, inputs = driver(module)
    with PoisonedWorkspace(), np.errstate(all="ignore"):
        dout, gradients = analytical_gradients(forward, backward, inputs)
        for i, gradient in enumerate(gradients):
            assert not any(np.shares_memory(gradient, other) for other in gradients[:i]), "gradients share memory"
        return dout, [*gradients, forward(*inputs)[0]]


def truth_of(driver, modes):
    """Return the gradients by central differences and the result. All modes must give them."""
    forward, _, inputs = driver(modes[0].names)
    dout, results = outcome(driver, modes[0].names)
    truth = [*numerical_gradients(forward, inputs, dout), results[-1]]
    for mode in modes:
        assert max(map(relative_error, outcome(driver, mode.names)[1], truth)) < mode.right
    return truth


def is_seen(driver, modes, truth):
    """Return whether the gradients are wrong in some mode, or None if there is an error instead."""
    try:
        return any(max(map(relative_error, outcome(driver, mode.names)[1], truth)) >= mode.seen for mode in modes)
    except Exception:  # any error shows the damage
        return None


def survey(module_name, name, driver):
    """Make all mutants. Return the descriptions of all, of those that the gradient shows, and of those not seen."""
    module = importlib.import_module(f"tinyvit.{module_name}")
    if isinstance(driver, str):
        driver = driver_of(driver, module_name.split(".")[0])
    truth = truth_of(driver, modes_of(module))
    own_functions = functions_of(module)
    found = {}
    for description, source in mutants(getattr(module, name)):
        modes = modes_of(module)
        for mode in modes:
            exec(own_functions, mode.names)  # defined again, so that they call the mutant and not the original
            exec(compile(source, "mutant", "exec"), mode.names)
        found[description] = is_seen(driver, modes, truth)
    made, seen = list(found), [description for description in found if found[description]]
    # `test_loops.py` tests the arguments of `loops_for`, which only decide whether the arrays suit the loops
    unseen = [text for text in found if found[text] is False and "loops_for(" not in text]
    return made, seen, unseen


@pytest.mark.parametrize(
    ("module", "name", "driver", "fewest"), TARGETS, ids=[f"{module}.{name}" for module, name, *_ in TARGETS]
)
def test_every_mutant_is_seen(module, name, driver, fewest):
    made, seen, unseen = survey(module, name, driver)
    equivalent = {} if module == "reference" else EQUIVALENT.get(name, {})  # the reference has no equivalent mutants
    assert set(unseen) <= set(equivalent), "the gradient check is too weak for these"
    assert set(equivalent) <= set(made), "these mutants no longer exist: remove them from EQUIVALENT"
    assert len(seen) >= fewest, "the gradient check decides too few mutants to prove much"


def tree_of_loop(name):
    """Return the definition of a function of loops.py without its decorator."""
    module = ast.parse(LOOPS.read_text(encoding="utf-8"))
    tree = next(node for node in module.body if getattr(node, "name", "") == name)
    tree.decorator_list = []
    return tree


@pytest.mark.parametrize(
    ("name", "module", "fewest"),
    [
        ("gelu_forward", "gelu", 10),
        ("layer_norm_forward", "layer_norm", 30),
        ("layer_norm_backward", "layer_norm", 30),
    ],
)
def test_every_mutant_of_a_loop_is_seen(name, module, fewest):
    driver, module = driver_of(module, "ops"), importlib.import_module(f"tinyvit.ops.{module}")
    truth = truth_of(driver, modes_of(module))
    found = {
        description: is_seen(driver, [with_loops(module, loops_in_python(source))], truth)
        for description, source in mutants(tree_of_loop(name))
    }
    assert [description for description, seen in found.items() if seen is False] == []
    assert sum(map(bool, found.values())) >= fewest


def errors_of_polynomials(names):
    """Return the absolute error of `normal_cdf` and the relative one of `normal_density`, each over what is right."""
    x = np.concatenate([np.linspace(-6, 6, 301), [-1e4, -20.0, -7.0, 7.0, 20.0, 1e4]])
    with np.errstate(all="ignore"):
        cdf, density = (np.array([names[name](value) for value in x]) for name in ("normal_cdf", "normal_density"))
    exact = np.where(np.abs(x) <= 6, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), 0)  # float32 has no use for the rest
    density_error = np.abs(density - exact) / np.maximum(exact, 1e-9)
    return np.max([np.abs(cdf - scipy.special.ndtr(x)) / 2e-8, density_error / 4e-7])


@pytest.mark.parametrize("name", ["normal_cdf", "normal_density"])
def test_every_mutant_of_a_polynomial_is_seen(name):
    assert errors_of_polynomials(loops_in_python()) < 1
    unseen = []
    for description, source in mutants(tree_of_loop(name)):
        try:
            error = errors_of_polynomials(loops_in_python(source))
        except Exception:
            continue
        if error < 2:  # a NaN shows the damage too
            unseen.append(description)
    assert set(unseen) == EQUIVALENT_POLYNOMIALS[name]


def test_no_backward_is_left_out():
    ops, reference = (importlib.import_module(f"tinyvit.{name}") for name in ("ops", "reference"))
    plain = {name for name in vars(reference) if name.endswith("_backward")}
    assert plain == {name for module, name, *_ in TARGETS if module == "reference"}
    fast = {name for name in dir(ops) if name.endswith("_backward")}
    assert fast <= {name for module, name, *_ in TARGETS if module != "reference"}


# ---- Adam, which is compared with the plain version because it has no gradient ----


def error_of_adam(kind, huge=1e200):
    """Return the error of some steps of Adam, with inputs of its own: a mutant may write into them.

    The error is infinite unless the square of `huge` is found to overflow, and that of infinity is not.
    """
    weights, gradients = normal(0, (4,), (5, 4))
    decayed = np.array([1.0, 0.0, 1.0, 1.0])
    settings = {"beta1": 0.7, "beta2": 0.8, "epsilon": 0.05}
    expected = plain_adam(weights, gradients, 0.1, decay=0.3, decayed=decayed, **settings)
    errors = []
    for threads in (1, 3):
        flat = weights.copy()
        adam = kind(weights.copy(), **settings, weight_decay=0.3, decayed=decayed.copy(), threads=threads)
        for gradient in gradients.copy():
            before = gradient.copy()
            adam.step(flat, gradient, 0.1)
            assert (gradient == before).all()
        errors.append(relative_error(flat, expected))
        for value, expected_to_overflow in ((huge, True), (np.inf, False)):
            try:
                with np.errstate(invalid="ignore"):
                    adam.step(flat, np.array([value, 1.0, 1.0, 1.0]), 0.1)
            except ArithmeticError:
                overflows = True
            else:
                overflows = False
            small = np.abs([adam.first_moment, adam.second_moment]).max() < 1e10
            if overflows != expected_to_overflow or small != expected_to_overflow:
                errors.append(math.inf)
    return max(errors)


def mutants_of_adam_in(loops):
    """Return the descriptions of all mutants of Adam and of those not seen, without or with loops."""
    made, unseen = [], []
    for name in ("step", "_update"):
        for description, source in mutants(getattr(optim.Adam, name)):
            made.append(description)
            names = dict(vars(optim)) if loops is None else with_loops(optim, loops).names
            exec(compile(source, "mutant", "exec"), names)
            methods = {name: names[name]}
            if name == "step" and loops is not None:
                methods["_update"] = types.FunctionType(optim.Adam._update.__code__, names)
            try:
                with np.errstate(all="ignore"):
                    error = error_of_adam(type("Mutant", (optim.Adam,), methods), 1e200 if loops is None else 1e30)
            except Exception:
                continue
            if not error >= SEEN:
                unseen.append(description)
    return made, set(unseen)


def test_every_mutant_of_a_step_of_adam_is_seen():
    assert error_of_adam(optim.Adam) < 1e-13
    made, unseen = mutants_of_adam_in(None)
    _, unseen_with_loops = mutants_of_adam_in(loops_in_python())
    assert len(made) > 140
    # `v - v` is computed on a GPU only; `test_optim.py` tests it
    both = {text for text in unseen & unseen_with_loops if "loops_for(" not in text and "v - v" not in text}
    assert both == {"left out wait(jobs)"}  # `job.result()` waits too


def test_every_mutant_of_the_loop_of_adam_is_seen():
    update = optim.Adam._update

    def error_of(source=""):
        names = with_loops(optim, loops_in_python(source)).names
        methods = {"_update": types.FunctionType(update.__code__, names)}
        with np.errstate(all="ignore"):
            return error_of_adam(type("Mutant", (optim.Adam,), methods), huge=1e30)

    assert error_of() < 1e-6
    unseen = []
    for description, source in mutants(tree_of_loop("adam_step")):
        try:
            if not error_of(source) >= SEEN:
                unseen.append(description)
        except Exception:
            continue
    assert unseen == []
