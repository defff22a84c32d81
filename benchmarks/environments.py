"""Run the tests where tinyvit promises to work: old and new versions, one core, no shared memory, a read-only home.

    python benchmarks/environments.py                                 all environments, each with the quick tests
    python benchmarks/environments.py no_shm one_core --sample        only a small part of the tests
    python benchmarks/environments.py --json benchmarks/results/environments.json
    python benchmarks/environments.py newest --python PATH            another interpreter

lowest          Python 3.10 and the oldest versions that setup.cfg allows, which constraints-lowest.txt pins
newest          the newest Python that is installed, and the newest versions of all libraries
read_only_home  a home folder and an installation that cannot be written, and no variables that name other folders
one_core        one core of the processor
no_shm          no /dev/shm, as in some containers
no_network      no network

The script builds the source distribution, unpacks it, and installs it as a package in a new virtual environment, one
for each interpreter and set of versions. In each environment it runs the tests of the source distribution, a training
with two workers and `tinyvit doctor`. The two commands may print no error or warning. The exit status is 1 if
anything fails. The environments without a writable home, /dev/shm or network need Linux and `unshare`, as root or
with user namespaces.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

from checkout import copy_to

SAMPLE = (  # quick tests of several wings
    "tests/heart/test_linear.py",
    "tests/heart/test_gelu.py",
    "tests/heart/test_backend.py",
    "tests/heart/test_loops.py",
    "tests/heart/test_parameters.py",
    "tests/data/test_mnist.py",
    "tests/test_checkpoint.py",
    "tests/test_files.py",
    "tests/training/test_results.py",
)
PLACES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR")
TRAINING = ["train", "--epochs", "1", "--train-limit", "2000", "--test-limit", "500", "--workers", "2"]
VERSIONS = (
    "import json; from tinyvit.backend import CPU; from tinyvit.training.results import versions;"
    "print(json.dumps(versions(CPU)))"
)


class Environment(NamedTuple):
    """Where the tests run.

    python: "lowest", "newest" or "this"; constraints: a file of pins; prefix: words before each command;
    namespaces: the flags of `unshare`; setup: shell commands within the namespaces.
    """

    python: str = "this"
    constraints: str = ""
    prefix: tuple = ()
    namespaces: tuple = ()
    setup: str = ""


ENVIRONMENTS = {
    "lowest": Environment(python="lowest", constraints="constraints-lowest.txt"),
    "newest": Environment(python="newest"),
    # This comes first of those that share an installation, so that no other has filled the caches in it.
    "read_only_home": Environment(
        namespaces=("--mount",),
        setup="""
            for folder in "$HOME" "$VIRTUAL_ENV"; do
                mount --bind "$folder" "$folder"
                mount -o remount,bind,ro "$folder"
            done
            if touch "$HOME/file" 2>/dev/null; then exit 1; fi
        """,
    ),
    "one_core": Environment(prefix=("taskset", "-c", "0")),
    "no_shm": Environment(
        namespaces=("--mount",),
        setup="""
            mkdir -p "$SCRATCH/dev"
            mount -t tmpfs -o mode=755 none "$SCRATCH/dev"
            for file in null zero full random urandom tty; do
                touch "$SCRATCH/dev/$file"
                mount --bind "/dev/$file" "$SCRATCH/dev/$file"
            done
            ln -s /proc/self/fd "$SCRATCH/dev/fd"
            mount --rbind "$SCRATCH/dev" /dev
            test ! -e /dev/shm
        """,
    ),
    "no_network": Environment(
        namespaces=("--net",),
        setup="if command -v ip >/dev/null; then ip link set lo up; fi",
    ),
}


class Missing(RuntimeError):
    """This machine cannot make the environment."""


# ---- interpreters and namespaces ----


def pythons():
    """Return the installed interpreters of CPython 3.10 and newer: a dict from (major, minor) to the path."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    for pattern in (".pyenv/versions/3.*/bin", ".local/share/uv/python/cpython-3.*/bin"):
        folders += sorted(map(str, Path.home().glob(pattern)))
    question = "import sys, venv, ensurepip; print(*sys.version_info[:2], sys.executable)"
    found = {}
    for path in (path for folder in folders for path in Path(folder).glob("python3.*")):
        minor = re.fullmatch(r"python3\.(\d+)", path.name)
        if minor and int(minor[1]) >= 10 and (3, int(minor[1])) not in found:
            answer = subprocess.run([str(path), "-c", question], capture_output=True, text=True)
            if answer.returncode == 0:  # a shim may be there without its interpreter
                found[3, int(minor[1])] = answer.stdout.split(maxsplit=2)[2].strip()
    return found


def interpreter(kind):
    """Return the Python of an environment. Raise `Missing` with what to do if there is none."""
    if kind == "this":
        return sys.executable
    found = pythons()
    if kind == "newest":
        return found[max(found)]
    if (3, 10) not in found:
        raise Missing("needs Python 3.10: install it, or give --python PATH")
    return found[3, 10]


def unshare(namespaces):
    """Return the command that makes namespaces. Raise `Missing` with what to do if it is not allowed."""
    for user in ((), ("--user", "--map-root-user")):
        command = ("unshare", *user, *namespaces)
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                return command
    raise Missing(f"needs the permission for unshare {' '.join(namespaces)}: run it as root")


# ---- one environment ----


class Installation:
    """A folder with the unpacked source distribution and a virtual environment in which it is installed."""

    def __init__(self, python, constraints, folder):
        self.venv, self._checkout = folder / "venv", folder / "checkout"
        copy_to(self._checkout)
        self._do([python, "-m", "venv", str(self.venv)])
        own_python = str(self.venv / "bin" / "python")
        pip = [own_python, "-m", "pip", "install", "--quiet"]
        self._do([*pip, "--target", str(folder / "tools"), "setuptools>=68"])
        build = [own_python, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)]
        self._do(build, PYTHONPATH=str(folder / "tools"))
        (archive,) = folder.glob("tinyvit-*.tar.gz")
        self._do(["tar", "-xf", str(archive), "-C", str(folder)])
        self.source = archive.with_name(archive.name.removesuffix(".tar.gz"))
        pins = ["-c", str(self.source / constraints)] if constraints else []
        self._do([*pip, *pins, f"{self.source}[test,fast]"])

    def _do(self, command, **variables):
        environment = os.environ | variables
        done = subprocess.run(command, cwd=self._checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"{shlex.join(command)} fails:\n{(done.stdout + done.stderr)[-3000:]}")


def run(environment, command, installation, scratch, limit=3600):
    """Run a command of an installation in an environment. Return its exit status, its output and its errors."""
    variables = {name: value for name, value in os.environ.items() if name not in (*PLACES, "PYTHONPATH")}
    variables |= {"HOME": str(scratch / "home"), "SCRATCH": str(scratch), "VIRTUAL_ENV": str(installation.venv)}
    variables["PATH"] = f"{installation.venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [*environment.prefix, *command]
    if environment.namespaces:
        script = f'{environment.setup}\nexec "$@"'
        command = [*unshare(environment.namespaces), "sh", "-euc", script, "sh", *command]
    try:
        done = subprocess.run(
            command,
            cwd=installation.source,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace"), f"no end after {limit} s"
    return done.returncode, done.stdout, done.stderr


def check(environment, installation, tests=()):
    """Run the tests and two commands in an environment, and return the figures."""
    with tempfile.TemporaryDirectory(prefix="tinyvit-environment-") as folder:
        scratch, failures = Path(folder).resolve(), []
        (scratch / "home").mkdir()
        report, began = scratch / "report.xml", time.perf_counter()
        commands = [["pytest", "-n", "auto", f"--junitxml={report}", *tests]]
        commands += [["tinyvit", *TRAINING, "--out", str(scratch / "run")], ["tinyvit", "doctor", "--device", "cpu"]]
        for command in commands:
            status, output, errors = run(environment, command, installation, scratch)
            unexpected = [line for line in errors.splitlines() if not line.startswith("note: Numba compiled")]
            if status != 0 or (unexpected and command[0] == "tinyvit"):
                failures.append({"command": shlex.join(command[:2]), "output": (output + errors)[-6000:]})
        seconds = time.perf_counter() - began
        status, output, _ = run(environment, ["python", "-c", VERSIONS], installation, scratch)
        return {
            "passed": not failures,
            **counts(report),
            "seconds": round(seconds),
            "versions": json.loads(output.splitlines()[-1]) if status == 0 else {},
            "failures": failures,
        }


def counts(report):
    """Return how many tests ran, failed and were skipped, from pytest's report."""
    if not report.exists():
        return {"tests": 0, "failed": 0, "skipped": 0}
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    number = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    return {"tests": number["tests"], "failed": number["failures"] + number["errors"], "skipped": number["skipped"]}


def described(name, figures):
    """Return a line that says what happened in an environment."""
    if "missing" in figures:
        return f"{name:<15} not made: {figures['missing']}"
    found = [f"{figures['tests']} tests", f"{figures['failed']} failed", f"{figures['skipped']} skipped"]
    names = {"python": "Python", "numpy": "NumPy"}
    found += [f"{names[key]} {figures['versions'][key]}" for key in names if key in figures["versions"]]
    return f"{name:<15} {'passed' if figures['passed'] else 'FAILED'}: {', '.join(found)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"environments: {', '.join(ENVIRONMENTS)} (all)")
    add("--sample", action="store_true", help="run a small part of the tests")
    add("--python", metavar="PATH", help="the interpreter, where an environment should not choose its own")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    options = parser.parse_args()
    for name in options.names:
        if name not in ENVIRONMENTS:
            parser.error(f"no environment is named {name!r}: give some of {', '.join(ENVIRONMENTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder is removed
    results, installations = {}, {}
    with tempfile.TemporaryDirectory(prefix="tinyvit-environments-") as scratch:
        for name, environment in ENVIRONMENTS.items():
            if options.names and name not in options.names:
                continue
            try:
                if environment.namespaces:
                    unshare(environment.namespaces)
                key = (options.python or interpreter(environment.python), environment.constraints)
                if key not in installations:
                    folder = Path(tempfile.mkdtemp(dir=scratch)).resolve()
                    installations[key] = Installation(*key, folder)
                results[name] = check(environment, installations[key], SAMPLE if options.sample else ())
            except Missing as error:
                results[name] = {"passed": False, "missing": str(error)}
            print(described(name, results[name]), flush=True)
            for failure in results[name].get("failures", ()):
                print(f"$ {failure['command']}\n{failure['output']}", flush=True)
    if options.json:
        arguments = [*options.names, *(["--sample"] if options.sample else [])]
        command = shlex.join(["python", "benchmarks/environments.py", *arguments, "--json", options.json.name])
        record = {"command": command, "environments": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(not all(figures["passed"] for figures in results.values()))


if __name__ == "__main__":
    sys.exit(main())
