"""The script for the first contact with a GPU runs to its end if checks fail, and reports the failures."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import emulate
import pytest
import strict_cupy

from tinyvit.kernels import Kernels
from tinyvit.model import ViTConfig

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
first_contact = importlib.import_module("first_contact")

SMALL = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_width=12)

# The kernels of this stand-in for CuPy check their arguments. Two of them change an array, and the others do nothing.
STAND_IN = """
import sys
import emulate, strict_cupy

def launch(self, name, grid, block, arguments, order=0):
    if name == "adam_step":
        arguments[0][...] += 1
    if name == "cross_entropy":
        arguments[3][...] += 1

emulate.Emulated.launch = launch
sys.modules.update(strict_cupy.modules)
"""


# ---- the step ----

needs_compiler = pytest.mark.skipif(emulate.COMPILER is None, reason=emulate.NO_COMPILER)


@needs_compiler
def test_a_step_of_launches_and_of_the_graph_are_the_same(accelerator):
    assert 1 < first_contact.check_step("tf32", SMALL) < 4


@needs_compiler
def test_a_wrong_graph_is_seen(strict_gpu, monkeypatch):
    launch = strict_cupy.Graph.launch

    def wrong(self, stream=None):
        del self._launches[-1:]  # Adam's
        launch(self, stream)

    monkeypatch.setattr(strict_cupy.Graph, "launch", wrong)
    with pytest.raises(AssertionError, match="graph and launches differ in parameters"):
        first_contact.check_step("float32", SMALL)


def test_kernels_that_compute_nothing_are_seen(strict_gpu, monkeypatch):
    monkeypatch.setattr(Kernels, "_launch", lambda *arguments: None)
    with pytest.raises(AssertionError, match="launches: no weight has changed"):
        first_contact.check_step("float32", SMALL)


# ---- the parts ----


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Simulate a machine with the stand-in for CuPy and fake programs. Return the folder of the programs."""
    (tmp_path / "python" / "cupy").mkdir(parents=True)
    (tmp_path / "python" / "cupy" / "__init__.py").write_text(STAND_IN)
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "python"), str(ROOT / "tests" / "support")]))
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), "/usr/bin", "/bin"]))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(first_contact, "CUDA_FOLDERS", ())
    return programs


def write_program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def records_of(out, number):
    found = json.loads((out / f"part{number}.json").read_text())
    assert found["part"] == number
    for record in found["checks"]:
        if "output" in record:
            assert (out / record["output"]).read_text().strip()
    return {record["name"]: record for record in found["checks"]}


BENCHMARK = (
    "--benchmark=--only graph --precisions float32 --batches 2 --depth 1 --limit 100 --epochs 1 --trainings 1 "
    "--rounds 1 --seconds 0.01 --side 32 --copy 1"
)


def test_both_parts_run_to_their_end(machine, tmp_path, capsys):
    write_program(
        machine,
        "compute-sanitizer",
        'echo "$@"; case "$2" in racecheck) echo "SUMMARY: 3 hazards"; exit 9;; initcheck) echo nothing;; '
        '*) echo "ERROR SUMMARY: 0 errors";; esac',
    )
    write_program(machine, "ncu", 'echo "==PROF== Profiling linear_forward"')
    out = tmp_path / "records"
    small = ["--out", str(out), "--minutes", "4", BENCHMARK, "--tests", "tests/data/test_augment.py"]

    assert first_contact.main(["1", *small]) == 1
    found = records_of(out, 1)
    order = ["machine", "torch", "doctor", "step-float32", "step-tf32", "step-bfloat16", "tests"]
    assert list(found) == [*order, *first_contact.CHECKERS, "quick"]
    states = {name: record["state"] for name, record in found.items()}
    states.pop("torch")  # installed or missing
    # The stand-in cannot train, racecheck finds errors, and initcheck prints no summary.
    failed = {"doctor", "racecheck", "initcheck"}
    assert {name for name, state in states.items() if state != "ok"} == failed
    assert set(states.values()) == {"ok", "failed"}
    assert found["racecheck"]["exit_status"] == 9
    assert "--tool memcheck --error-exitcode 9" in found["memcheck"]["end"][0]
    assert found["memcheck"]["end"][0].endswith("first_contact.py --step tf32")
    for name in ("step-float32", "step-tf32", "step-bfloat16"):
        assert "launches and graph are equal bit for bit" in found[name]["end"][-1]
    tests = (out / "tests.txt").read_text()
    ran = set(re.findall(r"PASSED.* (tests/\S+)|(tests/\S+) PASSED", tests))
    assert ran
    assert all("gpu" in "".join(names) for names in ran)
    assert '"card": "unknown"' in (out / "machine.txt").read_text()
    assert json.loads((out / "quick.json").read_text())["steps"][0]["contestants"]["graph"]["milliseconds"]
    printed = capsys.readouterr().out
    assert "== part 1: " in printed
    assert "not ok: doctor, racecheck, initcheck" in printed

    assert first_contact.main(["2", *small]) == 0
    found = records_of(out, 2)
    assert {name: record["state"] for name, record in found.items()} == {"gpu": "ok", "ncu": "ok"}
    assert json.loads((out / "gpu.json").read_text())["kernels"][0]["rows"]


def test_a_check_without_its_tool_is_skipped_with_one_line(machine, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(machine))
    find_spec, absent = importlib.util.find_spec, ("torch", "pytest")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    options = SimpleNamespace(out=tmp_path, tests=["tests"], benchmark="")
    checks = [*first_contact.first_part(options), *first_contact.second_part(options)]
    records = first_contact.run_part(1, [check for check in checks if check.missing], tmp_path, 1)
    assert [record["name"] for record in records] == ["torch", "tests", *first_contact.CHECKERS, "ncu"]
    assert {record["state"] for record in records} == {"missing"}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * len(records)  # the check and the reason
    reasons = ["torch is not installed", "pytest is not installed"]
    reasons += ["compute-sanitizer is missing", "ncu is missing"]
    for reason in reasons:
        assert any(f"skipped: {reason}" in line for line in printed)


def check(name, program, **settings):
    command = first_contact.python("-c", program)
    return first_contact.Check(name, name, command, **{"most": 60, "least": 20, **settings})


def test_a_slow_check_is_ended_with_its_children_and_the_next_one_runs(tmp_path):
    child = "import time\nfor _ in range(1000): print('alive', flush=True); time.sleep(0.05)"
    slow = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    checks = [
        check("slow", slow, most=60),
        check("silent", "print('hello')", expects="something else"),
        check("lost", "raise SystemExit(7)"),
        check("good", "import tinyvit; print(tinyvit.__file__)", expects=re.escape(str(ROOT))),
    ]
    slow, *others = first_contact.run_part(1, checks, tmp_path, first_contact.MINUTES / 10)
    assert (slow["state"], slow["limit"]) == ("timed out", 6)
    assert 6 <= slow["seconds"] < 20
    printed = (tmp_path / "slow.txt").read_text()
    assert printed.startswith("alive\n")
    time.sleep(0.5)
    assert (tmp_path / "slow.txt").read_text() == printed  # the child has ended as well
    assert [record["state"] for record in others] == ["failed", "failed", "ok"]
    assert [record["exit_status"] for record in others] == [0, 7, 0]


def test_a_check_leaves_time_for_those_that_come_later(tmp_path):
    checks = [check("first", "print('a')", most=600, least=10), check("second", "print('b')", most=600, least=100)]
    checks += [check("third", "print('c')", most=600, least=50, missing="there is none")]
    first, second, _ = first_contact.run_part(2, checks, tmp_path, first_contact.MINUTES)
    assert first["limit"] == pytest.approx(540 - 100, abs=0.2)
    assert 540 - 60 < second["limit"] <= 540  # a missing check needs no time
    (left_out,) = first_contact.run_part(2, checks[:1], tmp_path, 0.01)
    assert left_out["state"] == "left out"


@pytest.mark.parametrize("number", [1, 2])
def test_the_time_of_a_part_suffices_for_the_least_of_every_check(number, tmp_path):
    options = SimpleNamespace(out=tmp_path, tests=["tests"], benchmark="")
    checks = first_contact.first_part(options) if number == 1 else first_contact.second_part(options)
    assert sum(entry.least for entry in checks) <= 60 * first_contact.MINUTES <= 540
    assert all(entry.least <= entry.most for entry in checks)


def test_without_a_part_the_error_names_the_arguments(capsys):
    with pytest.raises(SystemExit):
        first_contact.main([])
    assert "give the part, 1 or 2" in capsys.readouterr().err


# ---- the marker ----


def collected(environment, *flags):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *flags]
    files = ["tests/data/test_augment.py", "tests/project/test_first_contact.py"]
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return {line for line in done.stdout.splitlines() if "::" in line}, done


def test_the_marker_gpu_selects_exactly_the_tests_on_the_card(machine):
    environment = first_contact.environment()
    every, _ = collected(environment, "--device", "gpu", "-m", "extended or not extended")
    marked, _ = collected(environment, "--device", "gpu", "-m", "gpu")
    by_default, _ = collected(environment, "--device", "gpu")
    assert by_default == marked
    assert marked == {name for name in every if re.search(r"[\[-]gpu[\]-]", name)}
    assert any("test_a_step_of_launches" in name for name in marked)
    assert len(marked) < len(every) / 2
    none, done = collected(environment, "-m", "gpu")
    assert none == set()
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
