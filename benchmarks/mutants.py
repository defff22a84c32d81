"""Damage the library in many small ways, one at a time, and count the mutants that its tests see.

    python benchmarks/mutants.py --count 600 --seed 0 --json benchmarks/results/mutants.json
    python benchmarks/mutants.py --json FILE --again      run the recorded survivors again, after the tests changed
    python benchmarks/mutants.py --count 600 --list       only list the mutants

The sample depends only on the seed and the library. Every file of `tinyvit/` has a part in proportion to its lines of
code, and at least two mutants. Within a file the kinds of changes take turns. `mutation_operators.py` makes the
changes. Each mutant runs the tests of its file, which `TESTS` lists, until the first failure. A mutant is killed if a
test fails, or if the tests take ten times as long as usual. Otherwise it survives. The tests run in copies of the
checkout, two at a time by default.

The results are written after each mutant. The next run with the same arguments continues, and runs a mutant again
only if its file has changed. `mutants_equivalent.json` lists mutants that compute the same as the original, and why.
"""

import argparse
import concurrent.futures
import fnmatch
import hashlib
import itertools
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from checkout import ROOT, copy_to
from mutation_operators import KINDS, mutants_of
from tables import code_lines

EQUIVALENT = Path(__file__).with_name("mutants_equivalent.json")
FEWEST = 2  # mutants per file
PATIENCE = 10  # a mutant that takes this many times as long as the original is killed
LEAST_SECONDS = 30  # no time limit is shorter
MOST_MEMORY = 8 * 2**30  # bytes per process, since a mutant may allocate without end
PYTEST = (
    f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({MOST_MEMORY}, {MOST_MEMORY}));"
    "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
)

OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-m", "extended or not extended", "--tb=line")

OPERATIONS = ("tests/heart/test_operations.py", "tests/heart/test_loops.py")
TESTS = {  # the tests of each file, the quickest first; the first pattern that fits a file counts
    "tinyvit/__init__.py": ("tests/test_classifier.py",),
    "tinyvit/__main__.py": ("tests/commands/test_commands.py",),
    "tinyvit/backend.py": ("tests/heart/test_backend.py", "tests/heart/test_loops.py", "tests/gpu/test_device.py"),
    "tinyvit/checkpoint.py": ("tests/test_checkpoint.py", "tests/training/test_train.py"),
    "tinyvit/checks.py": ("tests/data/test_augment.py", "tests/heart/test_model.py", "tests/training/test_train.py"),
    "tinyvit/classifier.py": ("tests/test_classifier.py",),
    "tinyvit/console.py": ("tests/commands/test_commands.py",),
    "tinyvit/commands/predict.py": ("tests/commands/test_predict_digit.py", "tests/commands/test_commands.py"),
    "tinyvit/commands/serve.py": ("tests/page/test_digit_app.py", "tests/commands/test_commands.py"),
    "tinyvit/commands/doctor.py": ("tests/gpu/test_doctor.py", "tests/commands/test_commands.py"),
    "tinyvit/commands/*": ("tests/commands/test_commands.py", "tests/commands/test_predict_digit.py"),
    "tinyvit/data/augment.py": ("tests/data/test_augment.py", "tests/data/test_batches.py"),
    "tinyvit/data/batches.py": ("tests/data/test_batches.py",),
    "tinyvit/data/idx.py": ("tests/data/test_idx.py", "tests/data/test_mnist.py"),
    "tinyvit/data/mnist.py": ("tests/data/test_mnist.py", "tests/data/test_idx.py"),
    "tinyvit/data/*": ("tests/data/test_datasets.py", "tests/data/test_mnist.py"),
    "tinyvit/doctor.py": ("tests/gpu/test_doctor.py",),
    "tinyvit/evaluate.py": ("tests/test_evaluate.py", "tests/test_classifier.py"),
    "tinyvit/files.py": ("tests/test_files.py", "tests/test_checkpoint.py"),
    "tinyvit/gpu/*": ("tests/gpu/test_device.py", "tests/gpu/test_diagnosis.py", "tests/gpu/test_doctor.py"),
    "tinyvit/gradcheck.py": ("tests/heart/test_gradcheck.py",),
    "tinyvit/kernels/launch.py": ("tests/kernels/test_kernels.py",),
    "tinyvit/kernels/*": ("tests/kernels/test_kernel_step.py", "tests/kernels/test_kernels.py"),
    "tinyvit/loops.py": ("tests/heart/test_loops.py", "tests/heart/test_mutation.py"),
    "tinyvit/memory.py": ("tests/heart/test_parameters.py", "tests/heart/test_backend.py", *OPERATIONS),
    "tinyvit/model.py": ("tests/heart/test_model.py", "tests/heart/test_reference.py"),
    "tinyvit/ops/attention.py": ("tests/heart/test_attention.py", *OPERATIONS),
    "tinyvit/ops/class_attention.py": ("tests/heart/test_attention.py", *OPERATIONS),
    "tinyvit/ops/cross_entropy.py": ("tests/heart/test_cross_entropy.py", *OPERATIONS),
    "tinyvit/ops/gelu.py": ("tests/heart/test_gelu.py", *OPERATIONS),
    "tinyvit/ops/layer_norm.py": ("tests/heart/test_layer_norm.py", *OPERATIONS),
    "tinyvit/ops/linear.py": ("tests/heart/test_linear.py", *OPERATIONS),
    "tinyvit/ops/patches.py": ("tests/heart/test_patches.py", *OPERATIONS),
    "tinyvit/ops/*": OPERATIONS,
    "tinyvit/optim.py": ("tests/heart/test_optim.py", "tests/heart/test_loops.py"),
    "tinyvit/parameters.py": ("tests/heart/test_parameters.py", "tests/heart/test_optim.py"),
    "tinyvit/plots.py": ("tests/test_plots.py",),
    "tinyvit/pretrained/pictures.py": ("tests/pretrained/test_pictures.py",),
    "tinyvit/pretrained/*": ("tests/pretrained/test_pretrained.py",),
    "tinyvit/reference.py": ("tests/heart/test_reference.py", "tests/heart/test_operations.py"),
    "tinyvit/server/*": ("tests/page/test_digit_app.py",),
    "tinyvit/signatures.py": ("tests/test_checkpoint.py", "tests/data/test_datasets.py"),
    "tinyvit/sklearn.py": ("tests/test_sklearn.py",),
    "tinyvit/training/results.py": ("tests/training/test_results.py", "tests/training/test_train.py"),
    "tinyvit/training/workers.py": ("tests/training/test_workers.py",),
    "tinyvit/training/*": ("tests/training/test_train.py", "tests/training/test_results.py"),
}


class BrokenTests(RuntimeError):
    """The tests of a file fail or run nothing although the file is unchanged."""


# ---- the sample ----


def library(root=ROOT):
    """Return the names of the library's Python files, relative to the root."""
    return sorted(path.relative_to(root).as_posix() for path in (root / "tinyvit").rglob("*.py"))


def sample(count, seed, root=ROOT):
    """Draw mutants from all files, in an order that mixes the files.

    The rank of a mutant depends on the seed and its name. So most of the sample stays when other code changes.
    """
    ordered = {file: in_turns(mutants_of(root / file, file), seed) for file in library(root)}
    sizes = {file: code_lines(root / file) for file, mutants in ordered.items() if mutants}
    chosen = [mutant for file, number in shares(sizes, count).items() for mutant in ordered[file][:number]]
    return sorted(chosen, key=lambda mutant: mutant.rank(f"order {seed}"))[:count]


def in_turns(mutants, seed):
    """Return the mutants of a file in an order in which the kinds take turns, and no place comes twice in a kind."""
    kinds = {}
    for mutant in sorted(mutants, key=lambda mutant: mutant.rank(seed)):
        places = kinds.setdefault(mutant.kind, {})
        places.setdefault((mutant.start, mutant.stop), mutant)
    queues = [list(places.values()) for places in kinds.values()]
    return [mutant for turn in itertools.zip_longest(*queues) for mutant in turn if mutant is not None]


def shares(sizes, count):
    """Divide `count` among names in proportion to their sizes, at least `FEWEST` for each."""
    count = max(count, FEWEST * len(sizes))
    rest = count - FEWEST * len(sizes)
    exact = {name: rest * size / sum(sizes.values()) for name, size in sizes.items()}
    found = {name: FEWEST + math.floor(part) for name, part in exact.items()}
    by_remainder = sorted(exact, key=lambda name: math.floor(exact[name]) - exact[name])
    for name in by_remainder[: count - sum(found.values())]:
        found[name] += 1
    return found


def tests_of(file):
    """Return the pytest arguments that name the tests of a file."""
    for pattern, tests in TESTS.items():
        if fnmatch.fnmatch(file, pattern):
            return tests
    raise ValueError(f"{file} has no tests: add a pattern to TESTS in benchmarks/mutants.py")


# ---- one copy of the checkout ----


class Copy:
    """A copy of the checkout in which one mutant at a time is tested."""

    def __init__(self, folder):
        self.folder = folder / "checkout"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        copy_to(self.folder)
        self.token = f"mutant-{os.getpid()}-{id(self)}"
        self._changes = 0
        self._numba = self.scratch / "numba"
        compile_loops = "from tinyvit.backend import compiled_loops; compiled_loops()"
        self._python(["-c", compile_loops], limit=600, numba=self._numba)  # a first use prints a note

    def seconds(self, tests):
        """Run the tests on the original, and return the time. Raise `BrokenTests` if they fail twice."""
        for _ in range(2):
            began = time.perf_counter()
            status, output = self._python(["-c", PYTEST, *OPTIONS, *tests], limit=3600, numba=self._numba)
            if status == 0:
                return time.perf_counter() - began
        raise BrokenTests(f"pytest {' '.join(tests)} ended with {status} although nothing was changed:\n{output}")

    def outcome(self, mutant, tests, limit):
        """Return "killed", "timeout" or "survived", and the last line that the tests printed."""
        path = self.folder / mutant.file
        original, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        is_compiled = mutant.file == "tinyvit/loops.py"  # it must leave the compiled original alone
        numba = Path(tempfile.mkdtemp(dir=self.scratch)) if is_compiled else self._numba
        try:
            # By a time of change of its own, caches of compiled code notice every mutant.
            self._changes += 1
            path.write_bytes(mutant.source(original))
            os.utime(path, (self._changes, self._changes))
            status, output = self._python(["-c", PYTEST, *OPTIONS, *tests], limit=limit, numba=numba)
        finally:
            path.write_bytes(original)
            os.utime(path, ns=times)
        lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if status is None:
            return "timeout", ""
        return ("survived" if status == 0 else "killed"), (lines or [""])[0][:200]

    def _python(self, arguments, limit, numba):
        """Run Python and return its exit status, or None after `limit` seconds, and the end of its output."""
        place = Path(tempfile.mkdtemp(dir=self.scratch))
        variables = os.environ | {
            "PYTHONPATH": str(self.folder),
            "TINYVIT_MUTANT": self.token,
            "OPENBLAS_NUM_THREADS": "1",
            "NUMBA_CACHE_DIR": str(numba),
            "TMPDIR": str(place),
        }
        with tempfile.TemporaryFile(dir=self.scratch) as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_processes(self.token)
                process.wait()
                shutil.rmtree(place, ignore_errors=True)
            output.seek(0)
            return status, output.read().decode(errors="replace")[-4000:]


def end_processes(token):
    """End the processes that carry a token in their environment, such as the helpers of a mutant that hangs."""
    for _ in range(3):  # a process may start another one meanwhile
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"TINYVIT_MUTANT={token}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:  # it has ended, or belongs to another user
                continue


# ---- the record ----


class Record:
    """The results of a sample in a JSON file, which is written after each mutant.

    Results of mutants that no longer belong to the sample are dropped.
    """

    def __init__(self, path, mutants, **conditions):
        self.path, self.mutants, self.conditions = path, mutants, conditions
        self._lock, self.results = threading.Lock(), {}
        if path and path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            self.results = {tuple(entry[field] for field in FIELDS): entry for entry in old["mutants"]}

    def is_done(self, mutant, digest, again):
        """Return whether the file has the mutant's result for the present source."""
        entry = self.results.get(mutant.name())
        return entry is not None and entry["source"] == digest and not (again and entry["outcome"] == "survived")

    def add(self, mutant, **result):
        """Add the result of a mutant, and write the file."""
        with self._lock:
            names = dict(zip(FIELDS, mutant.name(), strict=True))
            self.results[mutant.name()] = names | {"line": mutant.line} | result
            if self.path:
                content = self.conditions | {"summary": summary(self.entries()), "mutants": self.entries()}
                temporary = self.path.with_name(f".{self.path.name}.part")
                temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                temporary.replace(self.path)

    def entries(self):
        """Return the results in the order of the sample."""
        return [self.results[mutant.name()] for mutant in self.mutants if mutant.name() in self.results]


FIELDS = ("file", "function", "statement", "kind", "before", "after", "number")


def equivalents(path=EQUIVALENT):
    """Return the survivors that compute the same as the original: a dict from name to reason."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {tuple(entry[field] for field in FIELDS): entry["reason"] for entry in entries}


def summary(entries):
    """Count outcomes, and survivors by kind. Equivalent mutants are no survivors."""
    known = equivalents()
    outcomes, kinds = Counter(), {kind: Counter() for kind in KINDS}
    for entry in entries:
        outcome = entry["outcome"]
        if outcome == "survived" and tuple(entry[field] for field in FIELDS) in known:
            outcome = "equivalent"
        outcomes[outcome] += 1
        kinds[entry["kind"]][outcome] += 1
    killed, total = outcomes["killed"] + outcomes["timeout"], outcomes.total()
    return {
        "mutants": total,
        **{name: outcomes[name] for name in ("killed", "timeout", "survived", "equivalent")},
        "killed_percent": round(100 * killed / total, 1) if total else None,
        "kinds": {kind: dict(counts) for kind, counts in kinds.items() if counts},
    }


# ---- the command ----


def run(mutants, record, jobs, again=False):
    """Test the mutants that have no result yet, `jobs` at a time. Yield each with its outcome."""
    stopping = threading.Event()
    digests = {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16] for file in library()}
    waiting = [mutant for mutant in mutants if not record.is_done(mutant, digests[mutant.file], again)]
    locks, usual = {tests_of(mutant.file): threading.Lock() for mutant in waiting}, {}
    with tempfile.TemporaryDirectory(prefix="tinyvit-mutants-") as scratch:
        every, free = [], queue.SimpleQueue()
        for number in range(jobs):
            (Path(scratch) / str(number)).mkdir()
            every.append(Copy(Path(scratch) / str(number)))
            free.put(every[-1])

        def with_copy(work, *arguments):
            copy = free.get()
            try:
                return work(copy, *arguments)
            finally:
                free.put(copy)

        def test(copy, mutant):
            tests = tests_of(mutant.file)
            with locks[tests]:
                if tests not in usual:
                    try:
                        usual[tests] = copy.seconds(tests)
                    except BrokenTests as error:
                        usual[tests] = None
                        print(error, file=sys.stderr)
            if usual[tests] is None:
                return mutant, "no result"
            began = time.perf_counter()
            outcome, seen_by = copy.outcome(mutant, tests, limit=max(LEAST_SECONDS, PATIENCE * usual[tests]))
            if not stopping.is_set():  # otherwise its tests were ended
                seconds = round(time.perf_counter() - began, 1)
                record.add(mutant, outcome=outcome, seconds=seconds, seen_by=seen_by, source=digests[mutant.file])
            return mutant, outcome

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            try:
                for done in concurrent.futures.as_completed(
                    [pool.submit(with_copy, test, mutant) for mutant in waiting]
                ):
                    yield done.result()
            except BaseException:  # Ctrl-C among others
                stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for copy in every:
                    end_processes(copy.token)
                raise


def describe(mutant):
    """Return a line that shows a mutant."""
    where = f"{mutant.file}:{mutant.line} {mutant.function}".rstrip()
    inside = "" if mutant.statement == mutant.before else f"  in  {mutant.statement}"
    return f"{where}: {mutant.kind}: {mutant.before}  ->  {mutant.after}{inside}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--count", type=int, default=600, metavar="N", help="number of mutants (600)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the sample (0)")
    add("--json", type=Path, metavar="FILE", help="write the results to FILE, and continue with it")
    add("--jobs", type=int, default=2, metavar="N", help="number of mutants that are tested at once (2)")
    add("--files", default="*", metavar="PATTERN", help="only mutants of these files, such as 'tinyvit/ops/*'")
    add("--again", action="store_true", help="run recorded survivors again")
    add("--list", action="store_true", help="list the mutants and test nothing")
    options = parser.parse_args()
    drawn = sample(options.count, options.seed)
    mutants = [mutant for mutant in drawn if fnmatch.fnmatch(mutant.file, options.files)]
    if options.list:
        print("\n".join(map(describe, mutants)))
        return
    if not Path("/proc/self/environ").exists():
        parser.error("mutants.py ends hanging processes by /proc, which only Linux has; run it on Linux")
    from turns import conditions

    settings = {"count": options.count, "seed": options.seed, "conditions": conditions()}
    record = Record(options.json, drawn, **settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it also ends the tests that run
    for number, (mutant, outcome) in enumerate(run(mutants, record, options.jobs, options.again), 1):
        print(f"{number:4}  {outcome:<9} {describe(mutant)}", flush=True)
    print(json.dumps(summary(record.entries()), indent=1))


if __name__ == "__main__":
    main()
