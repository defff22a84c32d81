"""Damage each kernel in every small way there is: comparison, another order of threads or a sanitizer must see it.

As `test_mutation.py` does for the passes in Python: a barrier left out, a bound off by one, a sign turned, an index
exchanged, one change at a time. What a mutant gives is compared with the plain operation, with the threads in two
orders, in a process that may die of it; those not seen by that run under the address sanitizer, and then under the
thread sanitizer. The few that change nothing are in `EQUIVALENT`, each with its reason.
"""

import re
from collections import Counter

import emulate
import kernel_cases
import pytest
from emulate import EmulationError
from kernel_cases import CASES, CONFIGS, ROUNDED
from test_kernels import recorded

from tinyvit.backend import to_host
from tinyvit.kernels import launch

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(emulate.COMPILER is None, reason=emulate.NO_COMPILER),
]

SEEN = 1e-5  # a mutant's error must be above; the kernels' own is below 1e-6

# ---- all small changes of a text ----

REPLACEMENTS = [
    (r"__syncthreads\(\);", ";"),
    (r"__syncwarp\(\);", ";"),
    (r" < ", " <= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" && ", " || "),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" % ", " / "),
    (r" \+= ", " = "),
    (r" \+= ", " -= "),
    (r" -= ", " += "),
    (r"\bfminf\(", "fmaxf("),
    (r"\bfmaxf\(", "fminf("),
    (r" <= ", " < "),
    (r"\bfar\[", "near["),
    (r"\bnear\[8\]", "near[0]"),
    (r"near\[8\], far\[0\]", "far[0], near[8]"),
    (r"near\[0\], near\[8\]", "near[8], near[0]"),
    (r"column\[0\], column\[4 \* PITCH\]", "column[4 * PITCH], column[0]"),
    (r"sums \+ 4 \* half", "sums"),
    (r"\bif \(([^()]*(?:\([^()]*\)[^()]*)*)\) return;", ";"),
]


def parts(text):
    """Split a preprocessed file into what the kernels call, and each kernel's text by its name."""
    kernels = re.findall(r'extern "C" __global__.*?\n}\n', text, re.DOTALL)
    for kernel in kernels:
        text = text.replace(kernel, "")
    return text, {next(iter(emulate.signatures(kernel))): kernel for kernel in kernels}


def mutants(text):
    """Yield (description, text) of all that one change in the body of a kernel or of a device function makes."""
    seen, repeated = {text}, Counter()
    for pattern, replacement in REPLACEMENTS:
        for match in re.finditer(pattern, text):
            start, end = match.span()
            line = text[text.rfind("\n", 0, start) + 1 : text.find("\n", end)]
            if pattern == r" \+= " and replacement == " = " and line.strip().startswith("for ("):
                continue  # a loop that goes on for ever
            mutant = text[:start] + replacement + text[end:]
            if mutant not in seen:
                seen.add(mutant)
                description = f"{match[0].strip()} to {replacement.strip()}: {line.strip()}"
                repeated[description] += 1  # the same line, or the same sign in it
                number = repeated[description]
                yield description + f" ({number})" * (number > 1), mutant


# ---- what is damaged, and the launches through which it is seen ----

LINEAR = [
    {"rows": 35, "inputs": 34, "outputs": 40},
    {"rows": 33, "inputs": 7, "outputs": 5},
    {"rows": 32, "inputs": 32, "outputs": 31},  # whole tiles, and one just not whole
]
LAUNCHES = {
    "draw_maps": [{"count": 150, "drawn": 5}, {"count": 3, "counter": 7}],
    "gather_patches": [
        *({"images": 9, "batch": 4, "step": step} for step in (1, 2)),
        {"augmented": False},
    ],
    "linear_forward": [{**sizes, "every": 3} for sizes in LINEAR],
    "linear_gelu_forward": LINEAR,
    "linear_backward": [
        {**LINEAR[0], "partials": 1},
        {**LINEAR[1], "partials": 5, "derivative": False},
        {**LINEAR[2], "partials": 1, "db": False},
        {"rows": 5, "inputs": 40, "outputs": 31, "partials": 2, "dx": False},
    ],
    "layer_norm_forward": [{"rows": 11}, {"rows": 3, "spread": 1e-3, "offset": 0.0}],  # where epsilon counts
    "layer_norm_backward": [{"rows": 27, "partials": 2, "every": 3}],
    "attention_forward": [{}, {"class_only": True, "scale": 30.0}],
    "attention_backward": [{}, {"class_only": True}],
    "cross_entropy": [{"batch": 19}, {"batch": 3, "ties": False, "scale": 1e3, "smoothing": 0.0}]
    + [{"batch": 3, "wrong_label": label} for label in (-1, 40, 99)],
    "sum_partials": [{"count": 2100}],
    "adam_step": [{"count": 2100}, {"count": 1025, "clip": 1e4, "decay": 0.0, "averaged": False}],
}
FOR_RACES = {  # a launch as small as can be, for the thread sanitizer takes its time over every thread
    "linear_forward": {"rows": 33, "inputs": 35, "outputs": 5},
    "linear_backward": {"rows": 33, "inputs": 5, "outputs": 35, "partials": 1},
    "layer_norm_backward": {"rows": 8, "partials": 1},
    "attention_forward": {"batch": 1},
    "attention_backward": {"batch": 1},
    "sum_partials": {"count": 600},
    "adam_step": {"count": 600},
}
TARGETS = [  # what is damaged, a kernel or the functions before one; through which kernels; configuration, precision
    *((name, [name], "odd", "float32") for name in ("draw_maps", "sum_partials", "adam_step")),
    *((name, [name], "odd", "float32") for name in ("linear_forward", "linear_gelu_forward", "linear_backward")),
    *((name, [name], "odd", "float32") for name in ("layer_norm_forward", "layer_norm_backward")),
    *((name, [name], "many tokens", "float32") for name in ("attention_forward", "attention_backward")),
    ("gather_patches", ["gather_patches"], "colours", "float32"),
    ("cross_entropy", ["cross_entropy"], "one patch", "float32"),
    ("before patches", ["draw_maps", "gather_patches"], "odd", "float32"),
    ("before layer_norm", ["layer_norm_forward", "layer_norm_backward"], "odd", "float32"),
    ("before adam", ["sum_partials", "adam_step"], "odd", "float32"),
    ("before attention", ["attention_forward", "attention_backward"], "many tokens", "float32"),
    ("before cross_entropy", ["cross_entropy"], "one patch", "float32"),
    *(("before linear", ["linear_backward", "linear_forward"], "odd", precision) for precision in launch.PRECISIONS),
]
_BEYOND = "what lies beyond the last column or token is not written, and adds nothing"
_ZEROS = "what is fetched beyond the end is zero, and is not stored"
_NEVER = "no number is just as large"
_ONE = "a word is one number in this precision; under bfloat16 it is seen"
_SIZE = "the size of an array that is a parameter says nothing"
_ANY_ORDER = "which lane carries what is a matter of speed alone, as long as all is carried"
_UNUSED = "these kernels take no maximum"
_MAXIMUM = "fmaxf( to fminf(: value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));"
_MORE = "more memory than it takes"
_CARRY = "carry[i * WORD + half] = inside ? operand.numbers[(k + half) * operand.k_step + j * operand.j_step] : 0.0f;"
_STORE_SLAB = "void store_slab(const Operand& operand, const float carry[LOADS * WORD], Word* slab) {"
_IN_ALL_PRECISIONS = {
    "< to <=: if (k + DEPTH < end_k) {": _ZEROS,
    "+ to -: if (k + DEPTH < end_k) {": _ZEROS,
    "* to +: float carry[LOADS * WORD]) {": _SIZE,
    f"* to +: __device__ __forceinline__ {_STORE_SLAB}": _SIZE,
    "/ to *: const int SLAB = DEPTH / WORD * PITCH;": _MORE,
    "/ to *: const int lanes = 8 / WORD;": _ANY_ORDER,
}
_WHERE_A_WORD_IS_ONE = _IN_ALL_PRECISIONS | {
    "+ to -: bool inside = j < operand.j_count && k + half < end_k;": _ONE,
    f"+ to -: {_CARRY}": _ONE,
    f"+ to -: {_CARRY} (2)": _ONE,
    "* to +: float a_carry[LOADS * WORD], b_carry[LOADS * WORD], carried_sum = 0.0f;": _ONE,
    "* to +: float a_carry[LOADS * WORD], b_carry[LOADS * WORD], carried_sum = 0.0f; (2)": _ONE,
    "/ to *: slab[k / WORD * PITCH + j] = word;": _ONE,
}
EQUIVALENT = {  # by target and precision
    ("draw_maps", "float32"): {
        "< to <=: double mirror = drawn[5] < 2.0 * flip - 1.0 ? -1.0 : 1.0;": _NEVER,
    },
    ("layer_norm_forward", "float32"): {
        "< to <=: for (int i = 0; i < PER_LANE; i++) { (3)": _BEYOND,
        "+ to -: float inverse = 1.0f / sqrtf(variance + epsilon) + (variance - variance); (2)": "it is 0 or NaN",
    },
    ("layer_norm_backward", "float32"): {"< to <=: for (int i = 0; i < PER_LANE; i++) { (2)": _BEYOND},
    ("attention_forward", "float32"): {"< to <=: for (int i = 0; i < KEYS_PER_LANE; i++) { (3)": _BEYOND},
    ("attention_backward", "float32"): {"< to <=: for (int i = 0; i < KEYS_PER_LANE; i++) { (2)": _BEYOND},
    ("before layer_norm", "float32"): {"/ to *: const int PER_LANE = (40 + 31) / 32;": _BEYOND, _MAXIMUM: _UNUSED},
    ("before adam", "float32"): {_MAXIMUM: _UNUSED},
    ("adam_step", "float32"): {
        '<= to <: if (!(norm <= 3.402823466e+38f)) scale = nanf("");': _NEVER,
    },
    ("before attention", "float32"): {"/ to *: const int KEYS_PER_LANE = (37 + 31) / 32;": _BEYOND},
    ("before linear", "float32"): _WHERE_A_WORD_IS_ONE,
    ("before linear", "tf32"): _WHERE_A_WORD_IS_ONE | {"/ to *: for (int k = 0; k < DEPTH / WORD; k += 8) {": _ONE},
    ("before linear", "bfloat16"): _IN_ALL_PRECISIONS,
    ("cross_entropy", "float32"): {
        "< to <=: if (row[c] == largest && c < first) first = c;": "a lane comes to every class once, and in order",
    },
}


def file_of(kernel):
    return next(file for file, names in launch.FUNCTIONS.items() if kernel in names)


class Stage:
    """Mutants compiled together, which are launched and compared one by one."""

    def __init__(self, texts, options, sanitizer):
        self.sanitizer = sanitizer
        self.batch, self.names = emulate.variants(texts, options, draft=True)

    def sees(self, i, calls, orders):
        for case, arrays, call in calls:
            for order in orders:
                for name, array in case.arrays.items():  # as they were
                    arrays[name]._values[...] = array
                name = self.names[i][call.name]
                try:
                    self.batch.launch_checked(name, call.grid, call.block, call.arguments, self.sanitizer, order)
                except EmulationError:
                    return True
                errors = kernel_cases.errors(case, {name: to_host(array) for name, array in arrays.items()})
                if not max(errors.values()) < SEEN:
                    return True
        return False


def survey(strict_gpu, what, kernels, config, precision):
    """Make all mutants of a target; return the descriptions of all and of those that nothing sees."""
    options = launch.macros(CONFIGS[config], precision)
    text = launch.source(file_of(kernels[0]))
    before, bodies = parts(emulate.preprocessed(text, options))
    damaged = before if what.startswith("before") else bodies[kernels[0]]
    made = dict(mutants(damaged))
    if precision != "float32":  # what all precisions share has been damaged once, if it was seen
        shared, _ = parts(emulate.preprocessed(text, launch.macros(CONFIGS[config], "float32")))
        seen = set(dict(mutants(shared))) - set(EQUIVALENT[what, "float32"])
        made = {name: mutant for name, mutant in made.items() if name not in seen}

    def whole(mutant):
        return mutant + "".join(bodies[kernel] for kernel in kernels) if damaged is before else before + mutant

    def calls(launches):
        for kernel in kernels:
            rounded = {"rounded": ROUNDED[precision]} if "linear" in kernel else {}
            for sizes in launches(kernel):
                yield recorded(strict_gpu, kernel, config, precision, **sizes, **rounded)

    to_compare = list(calls(LAUNCHES.get))
    for_races = list(calls(lambda kernel: [FOR_RACES.get(kernel, {})]))
    left = {name: mutant for name, mutant in made.items() if name not in EQUIVALENT.get((what, precision), {})}
    for sanitizer, chosen, orders in (
        (None, to_compare, (0, 1)),
        ("address", to_compare, (0,)),
        ("thread", for_races, (0,)),
    ):
        if left:
            stage = Stage([whole(text) for text in (damaged, *left.values())], options, sanitizer)
            assert not stage.sees(0, chosen, orders), f"what is whole must pass, under {sanitizer or 'no sanitizer'}"
            left = {name: text for i, (name, text) in enumerate(left.items(), 1) if not stage.sees(i, chosen, orders)}
    return list(made), list(left)


def test_every_kernel_is_damaged():
    assert {what for what, *_ in TARGETS} >= set(CASES)
    assert {f"before {file}" for file in launch.FUNCTIONS} <= {what for what, *_ in TARGETS}


@pytest.mark.parametrize(
    ("what", "kernels", "config", "precision"), TARGETS, ids=[", ".join((t[0], *t[2:])) for t in TARGETS]
)
def test_every_mutant_is_seen(strict_gpu, what, kernels, config, precision, sanitizers):
    made, unseen = survey(strict_gpu, what, kernels, config, precision)
    print(f"{len(made)} mutants of {what}, {config}, {precision}; unseen: {unseen}")
    assert not unseen, "nothing sees these"
    assert set(EQUIVALENT.get((what, precision), {})) <= set(made), "no longer made: take them off the list"
