"""Damage each kernel in every small way there is: comparison, another order of threads or a sanitizer must see it.

As `test_mutation.py` does for the passes in Python: a barrier left out, a bound off by one, a sign turned, an index
exchanged, one change at a time. What a mutant gives is compared with the plain operation, with the threads in two
orders, in a process that may die of it; those not seen by that run under the address sanitizer, and then under the
thread sanitizer. The few that change nothing are in `EQUIVALENT`, each with its reason.
"""

import re

import emulate
import kernel_cases
import pytest
from emulate import EmulationError
from kernel_cases import CASES, CONFIGS, ROUNDED
from test_kernels import recorded

from tinyvit.backend import to_host
from tinyvit.kernels import launch

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="emulating kernels needs g++ or clang++")

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
    (r"\bfar\[", "near["),
    (r"\bnear\[8\]", "near[0]"),
    (r"near\[8\], far\[0\]", "far[0], near[8]"),
    (r"near\[0\], near\[8\]", "near[8], near[0]"),
    (r"column\[0\], column\[4 \* PITCH\]", "column[4 * PITCH], column[0]"),
    (r"sums \+ 4 \* half", "sums"),
    (r"\bif \(([^()]*(?:\([^()]*\)[^()]*)*)\) return;", ";"),
]


def parts(text):
    """Split a preprocessed file into what stands before the kernels, and each kernel's text by its name."""
    before, *kernels = re.split(r'(?=extern "C" __global__)', text)
    return before, {next(iter(emulate.signatures(kernel))): kernel for kernel in kernels}


def mutants(text):
    """Yield (description, text) of all that one change in the body of a kernel or of a device function makes."""
    seen = {text}
    for pattern, replacement in REPLACEMENTS:
        for match in re.finditer(pattern, text):
            start, end = match.span()
            line = text[text.rfind("\n", 0, start) + 1 : text.find("\n", end)]
            column = start - text.rfind("\n", 0, start)
            if pattern == r" \+= " and replacement == " = " and line.strip().startswith("for ("):
                continue  # a loop that goes on for ever
            mutant = text[:start] + replacement + text[end:]
            if mutant not in seen:
                seen.add(mutant)
                yield f"{match[0].strip()} to {replacement.strip()} at {column}: {line.strip()}", mutant


# ---- what is damaged, and the launches through which it is seen ----

LINEAR = [{"rows": 35, "inputs": 34, "outputs": 40}, {"rows": 33, "inputs": 7, "outputs": 5}]
LAUNCHES = {
    "draw_maps": [{"count": 150, "drawn": 5}, {"count": 3, "counter": 7}],
    "gather_patches": [
        *({"images": 9, "batch": 4, "step": step} for step in (1, 2)),
        {"augmented": False},
    ],
    "linear_forward": [{**sizes, "every": 3} for sizes in LINEAR],
    "linear_gelu_forward": LINEAR,
    "linear_backward": [{**LINEAR[0], "shards": 1}, {**LINEAR[1], "shards": 5, "derivative": False}],
    "layer_norm_forward": [{"rows": 11}],
    "layer_norm_backward": [{"rows": 27, "shards": 2, "every": 3}],
    "attention_forward": [{}, {"class_only": True, "scale": 30.0}],
    "attention_backward": [{}, {"class_only": True}],
    "cross_entropy": [{"batch": 19}, {"batch": 3, "ties": False, "scale": 1e3, "smoothing": 0.0}],
    "sum_shards": [{"count": 2100}],
    "adam_step": [{"count": 2100}, {"count": 1025, "clip": 1e4, "decay": 0.0}],
}
FOR_RACES = {  # a launch as small as can be, for the thread sanitizer takes its time over every thread
    "linear_forward": {"rows": 33, "inputs": 35, "outputs": 5},
    "linear_backward": {"rows": 33, "inputs": 5, "outputs": 35, "shards": 1},
    "layer_norm_backward": {"rows": 8, "shards": 1},
    "attention_forward": {"batch": 1},
    "attention_backward": {"batch": 1},
    "sum_shards": {"count": 600},
    "adam_step": {"count": 600},
}
TARGETS = [  # what is damaged, a kernel or the functions before one; through which kernels; configuration, precision
    *((name, [name], "odd", "float32") for name in CASES if "attention" not in name and name != "cross_entropy"),
    *((name, [name], "many tokens", "float32") for name in ("attention_forward", "attention_backward")),
    ("cross_entropy", ["cross_entropy"], "one patch", "float32"),
    *((f"before {name}", [name], "odd", "float32") for name in ("draw_maps", "gather_patches", "layer_norm_forward")),
    ("before sum_shards", ["sum_shards"], "odd", "float32"),
    ("before attention_forward", ["attention_forward"], "many tokens", "float32"),
    *(("before linear", ["linear_backward", "linear_forward"], "odd", precision) for precision in launch.PRECISIONS),
]
EQUIVALENT = {}


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
    if precision != "float32":  # what all precisions share has been damaged once
        shared, _ = parts(emulate.preprocessed(text, launch.macros(CONFIGS[config], "float32")))
        made = {name: mutant for name, mutant in made.items() if name not in dict(mutants(shared))}

    def whole(mutant):
        return mutant + "".join(bodies[kernel] for kernel in kernels) if damaged is before else before + mutant

    def calls(launches):
        for kernel in kernels:
            rounded = {"rounded": ROUNDED[precision]} if "linear" in kernel else {}
            for sizes in launches(kernel):
                yield recorded(strict_gpu, kernel, config, precision, **sizes, **rounded)

    to_compare = list(calls(LAUNCHES.get))
    for_races = list(calls(lambda kernel: [FOR_RACES.get(kernel, {})]))
    left = {name: mutant for name, mutant in made.items() if name not in EQUIVALENT.get(what, {})}
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


@pytest.mark.parametrize(
    ("what", "kernels", "config", "precision"), TARGETS, ids=[", ".join((t[0], *t[2:])) for t in TARGETS]
)
def test_every_mutant_is_seen(strict_gpu, what, kernels, config, precision):
    made, unseen = survey(strict_gpu, what, kernels, config, precision)
    print(f"{len(made)} mutants of {what}, {config}, {precision}; unseen: {unseen}")
    assert not unseen, "nothing sees these"
