"""The mutants of the whole library: the operators, the sample, and a small part of the run."""

import ast
import importlib
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("mutants")


@pytest.fixture
def operators(mutants):
    return importlib.import_module("mutation_operators")


SOURCE = '''"""Docstring 1."""
import os

LIMIT = 3  # größe


@decorator(5)
def f(x: "1", *, size=2, name="text", keep=True) -> 7:
    """Docstring 2."""
    y = x[0] + size
    y -= 1
    if x < 4 and not keep:
        raise ValueError(f"message {x + 1}", 8)
    while y:
        y = g(y, axis=1, strict=True)
        break
    print("message", y + 1)
    x[1:] = os.sum(y)
    h(y)
    return -y if keep else y.value(9)
'''
EXPECTED = {
    "comparison": {("x < 4", "x <= 4"), ("x < 4", "x >= 4")},
    "arithmetic": {("x[0] + size", "x[0] - size"), ("y -= 1", "y += 1"), ("-y", "y")},
    "boolean": {("x < 4 and (not keep)", "x < 4 or not keep")},
    "constant": {("3", "4"), ("3", "2"), ("1", "2"), ("1", "0"), ("4", "5"), ("4", "3"), ("9", "10"), ("9", "8")},
    "index": {("0", "1"), ("0", "-1"), ("1", "2"), ("1", "0"), ("1:", ":")},
    "statement": {
        ("y -= 1", "pass"),
        ("raise ValueError(f'message {x + 1}', 8)", "pass"),
        ("y = g(y, axis=1, strict=True)", "pass"),
        ("y = x[0] + size", "pass"),
        ("break", "pass"),
        ("print('message', y + 1)", "pass"),
        ("x[1:] = os.sum(y)", "pass"),
        ("h(y)", "pass"),
    },
    "call": {("g(y, axis=1, strict=True)", "y"), ("os.sum(y)", "y"), ("y.value(9)", "y")},
    "argument": {("g(y, axis=1, strict=True)", "g(y, strict=True)")},
    "branches": {("keep", "not keep")},
    "condition": {("x < 4 and (not keep)", "not (x < 4 and (not keep))"), ("not keep", "keep"), ("y", "not y")},
    "return": {("return -y if keep else y.value(9)", "return None")},
    "default": {("2", "3"), ("2", "1"), ("'text'", "None"), ("True", "False")},
}


def test_each_operator_makes_its_changes_and_texts_stay(operators, tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE, encoding="utf-8")
    found = {kind: set() for kind in operators.KINDS}
    for mutant in operators.mutants_of(path, "source.py"):
        found[mutant.kind].add((mutant.before, mutant.after))
    assert found == EXPECTED


def test_a_mutant_differs_from_the_source_in_its_place_only(operators, tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE, encoding="utf-8")
    original = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in operators.mutants_of(path, "source.py"):
        changed = ast.unparse(ast.parse(mutant.source(path.read_bytes()))).splitlines()
        assert len(changed) == len(original)
        different = [line for line, before in zip(changed, original, strict=True) if line != before]
        assert len(different) == 1, mutant
        assert without_parentheses(mutant.after) in without_parentheses(different[0]), mutant


def without_parentheses(text):
    return text.replace("(", "").replace(")", "")


def test_every_file_has_its_part_of_the_sample(mutants):
    shares = mutants.shares({"a": 100, "b": 10, "c": 1}, 30)
    assert shares == {"a": 24, "b": 4, "c": 2}
    assert sum(mutants.shares(dict.fromkeys("abcdefg", 3), 100).values()) == 100


def test_the_order_changes_kinds_in_turn(mutants, operators):
    file = "tinyvit/optim.py"
    ordered = mutants.in_turns(operators.mutants_of(ROOT / file, file), seed=0)
    kinds = {mutant.kind for mutant in ordered}
    assert {mutant.kind for mutant in ordered[: len(kinds)]} == kinds


def test_the_sample_repeats_and_depends_on_the_seed(mutants):
    names = [mutant.name() for mutant in mutants.sample(150, seed=3)]
    assert names == [mutant.name() for mutant in mutants.sample(150, seed=3)]
    assert len(set(names)) == 150
    assert len(set(names) & {mutant.name() for mutant in mutants.sample(150, seed=4)}) < 75


def test_every_file_has_tests_that_exist(mutants):
    for file in mutants.library():
        for test in mutants.tests_of(file):
            assert (ROOT / test).is_file(), test
    with pytest.raises(ValueError, match=r"tools/new.py has no tests: add a pattern"):
        mutants.tests_of("tools/new.py")


def test_equivalent_mutants_exist_and_have_a_reason(mutants, operators):
    made = {}
    for name, reason in mutants.equivalents().items():
        if name[0] not in made:
            made[name[0]] = {mutant.name() for mutant in operators.mutants_of(ROOT / name[0], name[0])}
        assert name in made[name[0]], "this mutant no longer exists: remove it"
        assert len(reason) > 20


def test_a_record_continues_and_runs_changed_files_again(mutants, tmp_path):
    first, second, *rest = drawn = mutants.sample(100, seed=0)
    record = mutants.Record(tmp_path / "record.json", drawn, seed=0)
    record.add(first, outcome="killed", source="1")
    record.add(second, outcome="survived", source="1")
    record = mutants.Record(tmp_path / "record.json", drawn, seed=0)
    assert record.is_done(first, "1", again=False)
    assert not record.is_done(first, "2", again=False)
    assert record.is_done(second, "1", again=False)
    assert not record.is_done(second, "1", again=True)
    assert not record.is_done(rest[0], "1", again=False)
    assert mutants.summary(record.entries())["killed_percent"] == 50
    record = mutants.Record(tmp_path / "record.json", [second, *rest], seed=0)
    assert mutants.summary(record.entries())["mutants"] == 1


def test_an_equivalent_mutant_is_not_a_survivor(mutants, monkeypatch):
    first, second = mutants.sample(100, seed=0)[:2]
    monkeypatch.setattr(mutants, "equivalents", lambda: {first.name(): "a reason"})
    record = mutants.Record(None, [first, second])
    record.add(first, outcome="survived")
    record.add(second, outcome="survived")
    found = mutants.summary(record.entries())
    assert (found["equivalent"], found["survived"]) == (1, 1)


# ---- mutants that run ----


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("mutants").Copy(tmp_path_factory.mktemp("mutants"))


def change(mutants, file, before, after):
    """Return a mutant that replaces the first occurrence of a text in a file."""
    start = (ROOT / file).read_text(encoding="utf-8").encode().index(before.encode())
    draft = mutants.sample(100, seed=0)[0]
    return draft._replace(file=file, start=start, stop=start + len(before.encode()), text=after)


def test_outcomes(mutants, copy):
    tests, file = ("tests/test_files.py",), "tinyvit/files.py"
    assert copy.seconds(tests) > 0
    harmless = change(mutants, file, "data = content", "data = (content)")
    assert copy.outcome(harmless, tests, limit=100)[0] == "survived"
    wrong = change(mutants, file, "            _rename(temporary, target)", "            pass")
    outcome, seen_by = copy.outcome(wrong, tests, limit=100)
    assert outcome == "killed"
    assert seen_by.startswith("FAILED tests/test_files.py::")
    began = time.monotonic()
    sleeping = "__import__('subprocess').run(['sleep', '987']); data = content"
    endless = change(mutants, file, "data = content", sleeping)
    assert copy.outcome(endless, tests, limit=15)[0] == "timeout"
    assert time.monotonic() - began < 60
    assert (copy.folder / file).read_bytes() == (ROOT / file).read_bytes()
    assert not any(b"sleep\x00987" in command for command in command_lines())
    with pytest.raises(mutants.BrokenTests, match="although nothing was changed"):
        copy.seconds(("tests/no_such_file.py",))


def command_lines():
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield (process / "cmdline").read_bytes()
        except OSError:
            continue


QUICK = ("ops/", "gradcheck", "memory", "parameters", "optim", "files", "data/augment", "data/batches", "data/idx")


def test_twelve_mutants_are_seen(mutants, operators, copy):
    files = [file for file in mutants.library() if file.removeprefix("tinyvit/").startswith(QUICK)]
    drawn = [mutant for file in files for mutant in operators.mutants_of(ROOT / file, file)]
    drawn = [mutant for mutant in drawn if mutant.name() not in mutants.equivalents()]
    chosen = sorted(drawn, key=lambda mutant: mutant.rank("twelve"))[:12]
    survivors = [
        mutants.describe(mutant)
        for mutant in chosen
        if copy.outcome(mutant, mutants.tests_of(mutant.file), limit=300)[0] == "survived"
    ]
    assert len(survivors) <= 1, "write tests that see these:\n" + "\n".join(survivors)
