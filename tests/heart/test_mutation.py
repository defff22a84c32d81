"""Damage each backward pass in every small way there is: the gradient check must see each of them.

A check that nothing can fail proves nothing. Here every function below is rewritten, one change at a time: a
statement left out, a sign turned, a factor dropped, an axis exchanged, a number doubled, gradients swapped. Each
mutant must raise, or give a gradient that central differences contradict. Buffers are full of not-a-number before
they are written, so that a mutant which forgets to write is seen for certain, and not only on an unlucky day.

The few that change nothing are in `EQUIVALENT`, each with its reason. They are named by the function and by the
expression that the changed statement computes, so that code may move and variables may be renamed around it.
"""

import ast
import copy
import importlib
import inspect
import math
import textwrap
from collections import Counter

import numpy as np
import pytest
from strategies import TOLERANCE, PoisonedWorkspace, normal, plain_adam

from tinyvit import optim
from tinyvit.gradcheck import analytical_gradients, numerical_gradients, relative_error
from tinyvit.model import ViTConfig
from tinyvit.parameters import Parameters

SEEN = 1e-4  # a mutant's error must be above; that of the function itself is below TOLERANCE
ONE = ast.Constant(1)


# ---- all small changes of a function ----


def parse(function):
    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]


def places(tree):
    """Yield (node, field, index), the statement or expression that is there, and the statement it belongs to."""
    owner = {}
    for statement in ast.walk(tree):  # from the outside in, so that the innermost statement has the last word
        if isinstance(statement, ast.stmt):
            owner.update(dict.fromkeys(ast.walk(statement), statement))
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.stmt | ast.expr):
                    yield (node, field, index), child, owner[child]


def replacements(child):
    """Yield (what was done, the new node) for all that can be done to one statement or expression."""
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

    match child:  # where a gradient goes is an argument that may be left out
        case ast.Call(_, arguments, keywords):
            for i, argument in enumerate(arguments):
                if i >= 2 or isinstance(argument, ast.Starred):
                    yield f"no {ast.unparse(argument)} in", call(child, args=[*arguments[:i], *arguments[i + 1 :]])
            for i, keyword in enumerate(keywords):
                if keyword.arg == "out":  # mostly a buffer: without it the result is a new array, and right
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
    """Yield every other variable of the function for one that is an operand or an argument."""
    match node:
        case ast.Call(ast.Name("array_module" | "len" | "empty_like")):  # what is as long, as large, does as well
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
    """Return the expression that a statement computes, as text: without the variable that gets the value."""
    match statement:
        case ast.AugAssign(target, operator, value):
            return ast.unparse(ast.BinOp(target, operator, value))
        case ast.Assign(value=value) | ast.Expr(value) | ast.Return(ast.expr() as value):
            return ast.unparse(value)
        case ast.For(iter=value) | ast.If(test=value) | ast.While(test=value):
            return ast.unparse(value)
    return ast.unparse(statement).split("\n")[0]


def mutants(function):
    """Yield (description, source) of every function that one change below its docstring makes of `function`."""
    tree = parse(function)
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
                named[description] += 1  # a second mutant of the same name gets a number: no entry excuses two
                number = f" ({named[description]})" if named[description] > 1 else ""
                yield description + number, source


# ---- what is damaged, and the pair of functions through which it is seen ----


def drive_linear(module):
    inputs = normal(0, (2, 3, 6), (6, 6), (6,))  # as many rows as columns, so that few mutants fail by their shapes
    return module["linear_forward"], in_places(module["linear_backward"]), inputs


def drive_layer_norm(module):
    return module["layer_norm_forward"], in_places(module["layer_norm_backward"]), normal(0, (2, 3, 5), (5,), (5,))


def drive_gelu(module):
    return module["gelu_forward"], module["gelu_backward"], [normal(0, (3, 4))]


def drive_gelu_tanh(module):
    return module["gelu_tanh_forward"], module["gelu_backward"], [normal(0, (3, 4))]


def drive_softmax(module):
    return module["softmax_forward"], module["softmax_backward"], [normal(0, (2, 3, 5))]


def drive_attention(module):
    inputs = normal(0, (2, 3, 6), (2, 5, 6), (2, 5, 6))
    return module["attention_forward"], module["attention_backward"], inputs


def drive_multi_head_attention(module):
    def forward(*arrays):
        return module["multi_head_attention_forward"](*arrays, 3)

    inputs = normal(0, (4, 5, 6), (6, 18), (18,), (6, 6), (6,))
    return forward, in_places(module["multi_head_attention_backward"]), inputs


def drive_class_attention(module):
    def forward(*arrays):
        return module["class_attention_forward"](*arrays, 3)

    inputs = normal(0, (4, 5, 6), (6, 18), (18,), (6, 6), (6,))
    return forward, in_places(module["class_attention_backward"]), inputs


def in_places(backward):
    """The same, called twice: for new arrays, and then for given ones, which must get the same values."""

    def function(dout, cache):
        dx, *expected = backward(dout, cache)
        places = [np.full_like(gradient, np.nan) for gradient in expected]
        _, *got = backward(dout, cache, *places)
        for place, gradient, value in zip(places, got, expected, strict=True):
            assert gradient is place
            assert np.array_equal(place, value, equal_nan=True)
        return dx, *places

    return function


def drive_patches(module):
    def forward(images):
        return module["patches_forward"](images, 3), images.shape

    return forward, module["patches_backward"], [normal(0, (2, 12, 15))]


def drive_patch_embedding(module):
    def forward(*arrays):
        return module["patch_embedding_forward"](*arrays, 2, 0.3, 0.7)

    inputs = normal(0, (2, 4, 6), (4, 5), (5,), (5,), (7, 5))
    return forward, in_places(module["patch_embedding_backward"]), inputs


def drive_cross_entropy(module):
    def forward(logits):
        return module["cross_entropy_forward"](logits, np.array([0, 2, 4]), 0.1)

    return forward, module["cross_entropy_backward"], [normal(0, (3, 5))]


SMALL = ViTConfig(image_size=4, patch_size=2, width=4, depth=2, heads=2, mlp_width=3, classes=3)


def drive_model(module):
    shapes = SMALL.shapes()

    def forward(images, flat):
        return module["vit_forward"](images, Parameters(shapes, flat), SMALL)

    def backward(dlogits, cache):
        gradients, dimages = module["vit_backward_to_images"](dlogits, cache)
        return dimages, gradients.flat

    images, flat = normal(0, (2, 4, 4), (sum(math.prod(shape) for shape in shapes.values()),))
    return forward, backward, [images, 0.7 * flat]


# ---- the same for the plain model, whose backward passes get no arrays to write into ----


def drive_plain_linear(module):
    return module["linear_forward"], module["linear_backward"], normal(0, (2, 3, 6), (6, 6), (6,))


def drive_plain_layer_norm(module):
    return module["layer_norm_forward"], module["layer_norm_backward"], normal(0, (2, 3, 5), (5,), (5,))


def drive_plain_multi_head_attention(module):
    forward, _, inputs = drive_multi_head_attention(module)
    return forward, module["multi_head_attention_backward"], inputs


def drive_plain_patch_embedding(module):
    images, *inputs = normal(0, (2, 4, 6), (4, 5), (5,), (5,), (7, 5))

    def forward(*arrays):
        return module["patch_embedding_forward"](images, *arrays, 2)

    return forward, module["patch_embedding_backward"], inputs


def drive_plain_cross_entropy(module):
    def forward(logits):
        return module["cross_entropy_forward"](logits, np.array([0, 2, 4, 4, 1]))

    def backward(dloss, cache):
        return dloss * module["cross_entropy_backward"](cache)

    return forward, backward, [normal(0, (5, 5))]


def drive_plain_model(module):
    shapes = SMALL.shapes()

    def forward(flat):
        return module["vit_forward"](images, Parameters(shapes, flat), SMALL.heads, SMALL.patch_size)

    def backward(dlogits, cache):
        gradients = module["vit_backward"](dlogits, cache)
        return np.concatenate([gradients[name].ravel() for name in shapes])

    images, flat = normal(0, (2, 4, 4), (sum(math.prod(shape) for shape in shapes.values()),))
    return forward, backward, [0.7 * flat]


TARGETS = [  # module, function, its driver, how many mutants at least only the gradient tells from it
    ("ops.linear", "linear_backward", drive_linear, 5),
    ("ops.layer_norm", "layer_norm_backward", drive_layer_norm, 30),
    ("ops.gelu", "gelu_backward", drive_gelu, 3),
    ("ops.gelu", "gelu_forward", drive_gelu, 20),
    ("ops.gelu", "gelu_tanh_forward", drive_gelu_tanh, 30),
    ("ops.softmax", "softmax_backward", drive_softmax, 10),
    ("ops.attention", "attention_backward", drive_attention, 10),
    ("ops.attention", "multi_head_attention_backward", drive_multi_head_attention, 10),
    ("ops.class_attention", "class_attention_backward", drive_class_attention, 10),
    ("ops.patches", "patches_backward", drive_patches, 4),
    ("ops.patches", "patch_embedding_backward", drive_patch_embedding, 7),
    ("ops.cross_entropy", "cross_entropy_backward", drive_cross_entropy, 5),
    ("model", "block_backward", drive_model, 10),
    ("model", "vit_backward_to_images", drive_model, 4),
    ("reference", "linear_backward", drive_plain_linear, 5),
    ("reference", "layer_norm_backward", drive_plain_layer_norm, 30),
    ("reference", "gelu_backward", drive_gelu, 3),
    ("reference", "softmax_backward", drive_softmax, 10),
    ("reference", "attention_backward", drive_attention, 10),
    ("reference", "multi_head_attention_backward", drive_plain_multi_head_attention, 10),
    ("reference", "patch_embedding_backward", drive_plain_patch_embedding, 8),
    ("reference", "cross_entropy_backward", drive_plain_cross_entropy, 5),
    ("reference", "block_backward", drive_plain_model, 10),
    ("reference", "vit_backward", drive_plain_model, 4),
]

_ANY_NEGATIVE = "NumPy reads every negative size as the one to be found, so that -2 says what -1 does"
_ALIAS = "two names of the same array"
_NOT_IN_DOUBLE = "in float64 erf gives the distribution, and does not need the square; `test_gelu.py` has float32"
EQUIVALENT = {
    "linear_backward": {
        "twice 1: x.reshape(-1, x.shape[-1])": _ANY_NEGATIVE,
        "twice 1: dout.reshape(-1, dout.shape[-1])": _ANY_NEGATIVE,
        "dout for drows: matmul(drows, w.T)": "many small products in place of a large one: slower, and equal",
    },
    "layer_norm_backward": {
        "product for dx: xp.subtract(dnormalised, dx, out=dx)": _ALIAS,
    },
    "gelu_backward": {
        "cache for derivative: array_module(dout).multiply(dout, derivative, out=empty_like(dout))": _ALIAS,
    },
    "gelu_forward": {
        f"{name} for square: normal_cdf(x, square)": _NOT_IN_DOUBLE
        for name in ("derivative", "with_cache", "x", "xp")
    },
    "gelu_tanh_forward": {"square for slope: derivative * slope": _ALIAS},
    "softmax_backward": {
        "cache for weights: xp.multiply(dweights, weights, out=empty_like(weights))": _ALIAS,
        "cache for weights: dx * weights": _ALIAS,
    },
    "block_backward": {
        "swapped arguments of gelu_backward(dactive, cache.gelu): gelu_backward(dactive, cache.gelu)":
            "it multiplies the two, and a product commutes",
    },
}  # fmt: skip


def outcome(driver, module):
    """Run a driver's pair in poisoned memory: dout, and the gradients, none of which may share memory, and out."""
    forward, backward, inputs = driver(module)
    with PoisonedWorkspace(), np.errstate(all="ignore"):
        dout, gradients = analytical_gradients(forward, backward, inputs)
        for i, gradient in enumerate(gradients):
            assert not any(np.shares_memory(gradient, other) for other in gradients[:i]), "gradients share memory"
        return dout, [*gradients, forward(*inputs)[0]]


def survey(module_name, name, driver):
    """Make all mutants; return the descriptions of all, of those that the gradient shows, and of those not seen."""
    module = importlib.import_module(f"tinyvit.{module_name}")
    forward, _, inputs = driver(vars(module))
    dout, results = outcome(driver, vars(module))
    truth = [*numerical_gradients(forward, inputs, dout), results[-1]]
    assert max(map(relative_error, results, truth)) < TOLERANCE

    functions = ast.parse(inspect.getsource(module))
    functions.body = [node for node in functions.body if isinstance(node, ast.FunctionDef)]
    own_functions = compile(functions, module_name, "exec")
    function = getattr(module, name)
    made, seen, unseen = [], [], []
    for description, source in mutants(function):
        made.append(description)
        mutated = dict(vars(module))
        exec(own_functions, mutated)  # once more, so that they call the mutant and not the function it comes from
        exec(compile(source, "mutant", "exec"), mutated)
        try:
            _, results = outcome(driver, mutated)
        except Exception:  # whatever it is, nobody could overlook it
            continue
        (unseen if max(map(relative_error, results, truth)) < SEEN else seen).append(description)
    return made, seen, unseen


@pytest.mark.parametrize(
    ("module", "name", "driver", "fewest"), TARGETS, ids=[f"{module}.{name}" for module, name, *_ in TARGETS]
)
def test_every_mutant_is_seen(module, name, driver, fewest):
    made, seen, unseen = survey(module, name, driver)
    equivalent = {} if module == "reference" else EQUIVALENT.get(name, {})  # the plain model has none
    assert set(unseen) <= set(equivalent), "the gradient check is too weak for these"
    assert set(equivalent) <= set(made), "no longer made: take them off the list"
    assert len(seen) >= fewest, "so few were left to the gradient check that it proves little"


def test_no_backward_is_left_out():
    ops, reference = (importlib.import_module(f"tinyvit.{name}") for name in ("ops", "reference"))
    plain = {name for name in vars(reference) if name.endswith("_backward")}
    assert plain == {name for module, name, *_ in TARGETS if module == "reference"}
    fast = {name for name in dir(ops) if name.endswith("_backward")}
    assert fast <= {name for module, name, *_ in TARGETS if module != "reference"}


# ---- Adam, which has no gradient to check but the plain version to agree with ----

def test_every_mutant_of_a_step_of_adam_is_seen():
    weights, gradients = normal(0, (4,), (5, 4))
    decayed = np.array([1.0, 0.0, 1.0, 1.0])
    settings = {"beta1": 0.7, "beta2": 0.8, "epsilon": 0.05}
    expected = plain_adam(weights, gradients, 0.1, decay=0.3, decayed=decayed, **settings)

    def error_of(kind):
        errors = []
        for threads in (1, 3):
            flat, adam = weights.copy(), kind(
                weights, **settings, weight_decay=0.3, decayed=decayed, threads=threads
            )
            for gradient in gradients:
                before = gradient.copy()
                adam.step(flat, gradient, 0.1)
                assert (gradient == before).all()
            errors.append(relative_error(flat, expected))
        return max(errors)

    assert error_of(optim.Adam) < 1e-13
    made, unseen = [], []
    for name in ("step", "_update"):
        for description, source in mutants(getattr(optim.Adam, name)):
            made.append(description)
            mutated = dict(vars(optim))
            exec(compile(source, "mutant", "exec"), mutated)
            try:
                with np.errstate(all="ignore"):
                    error = error_of(type("Mutant", (optim.Adam,), {name: mutated[name]}))
            except Exception:
                continue
            if error < SEEN:
                unseen.append(description)
    assert len(made) > 140
    assert set(unseen) == {  # each waits for the threads if the other is left out; `test_optim.py` has their errors
        "left out wait(jobs)",
        "left out job.result()",
    }
