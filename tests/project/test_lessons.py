"""The lessons run, their pictures appear, their solutions pass, and their checks refuse what is not an answer."""

import ast
import inspect
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

LESSONS = Path(__file__).resolve().parents[2] / "lessons"
sys.path.append(str(LESSONS))  # as it is when a lesson runs; last, so that it hides nothing
import kit  # noqa: E402

pytestmark = pytest.mark.extended

NAMES = sorted(path.stem for path in LESSONS.glob("[0-9][0-9]_*.py"))
QUICK, SLOW_MACHINE = 10, 6  # seconds that --quick may take, and how much slower a busy machine may be
by_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def look_of_before():
    """A lesson has a look of its own, which is not for the pictures of other tests."""
    with matplotlib.rc_context():
        yield


def checks_of(name):
    return kit.load(LESSONS / "checks" / f"{name}.py")


def solutions_of(name):
    return kit.load(LESSONS / "solutions" / f"{name}.py")


def run(path, *flags):
    """Run a file as a stranger does, but with one BLAS thread, as others run beside it; every warning is an error."""
    environment = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "error", str(path), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=LESSONS.parent, timeout=300)


def numbered(module, word):
    """Return the functions of a module called word_1, word_2 and so on (or word_2b), as {name: function}."""
    return {name: value for name, value in vars(module).items() if re.fullmatch(rf"{word}_\d+[a-z]?", name)}


def number_of(name):
    return int(re.search(r"\d+", name).group())


def test_every_lesson_has_its_checks_and_its_solutions_and_a_number_of_its_own():
    for folder in ("checks", "solutions"):
        assert sorted(path.stem for path in (LESSONS / folder).glob("*.py")) == NAMES
    assert [int(name[:2]) for name in NAMES] == list(range(1, len(NAMES) + 1))


@by_name
def test_a_lesson_runs_unsolved_and_leaves_a_picture(name):
    start = time.time()
    done = run(LESSONS / f"{name}.py", "--quick")
    seconds = time.time() - start
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stderr == ""
    assert seconds < QUICK * SLOW_MACHINE

    exercises = len(numbered(checks_of(name), "check"))
    assert 2 <= exercises <= 4
    assert done.stdout.count("not solved yet") == exercises
    pictures = re.findall(r"picture: (\S+)", done.stdout)
    assert pictures
    for picture in pictures:
        path = LESSONS.parent / picture
        assert path.name.startswith(name[:2] + "_")
        assert path.stat().st_mtime > start - 2  # file systems round
        assert imread(path).std() > 0.01, f"{path.name} is one colour"


@by_name
def test_the_solutions_pass(name):
    done = run(LESSONS / "solutions" / f"{name}.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count("right. Yours is what is expected") == len(numbered(checks_of(name), "check"))


@by_name
def test_checks_refuse_the_unsolved_state(name, capsys):
    for number, cases in kit.Lesson(name).checks().items():
        for blank in (None, ..., (..., ...)):
            assert not kit.check(number, cases, lambda *inputs, blank=blank: blank)
            assert "not solved yet" in capsys.readouterr().out


@by_name
def test_checks_refuse_plausible_wrong_answers(name, capsys):
    solutions = solutions_of(name)
    wrong = numbered(solutions, "wrong")
    checks = kit.Lesson(name).checks()
    assert {number_of(label) for label in wrong} == set(checks)
    for label, answer in wrong.items():
        assert answer.__doc__, f"{label} has no docstring to say why it is plausible, and wrong"
        assert not kit.check(number_of(label), checks[number_of(label)], answer), f"{label} passes"
        said = capsys.readouterr().out
        assert "expected" in said
        assert "not solved yet" not in said
        assert "raised" not in said, f"{label} is no plausible answer: {said}"


@by_name
def test_checks_survive_answers_of_any_kind(name, capsys):
    def raises(*inputs):
        raise ZeroDivisionError("on purpose")

    answers = [raises, lambda: 0, 0, "text", [[1], [2, 3]], np.nan, np.zeros((7, 7)), lambda *inputs: "text"]
    answers += [lambda *inputs: [[1], [2, 3]], lambda *inputs: (np.zeros(3), {}), lambda *inputs: np.full(3, np.inf)]
    for number, cases in kit.Lesson(name).checks().items():
        for answer in answers:
            assert not kit.check(number, cases, answer)
            assert capsys.readouterr().out.startswith(f"Exercise {number}: ")


@by_name
def test_the_exercises_of_a_lesson_are_those_of_its_solutions(name):
    lesson = functions(LESSONS / f"{name}.py", "exercise")
    solved = functions(LESSONS / "solutions" / f"{name}.py", "exercise")
    assert lesson == solved, "name and arguments must agree"
    assert [number_of(label) for label in lesson] == list(kit.Lesson(name).checks())


def functions(path, word):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith(word)]
    return {node.name: ast.unparse(node.args) for node in found}


@by_name
def test_the_form_of_a_lesson(name):
    text = (LESSONS / f"{name}.py").read_text(encoding="utf-8")
    assert text.startswith(f'# %% [markdown]\nr"""\n# {name[:2]} ')  # so that a notebook's first cell is text
    opening = inspect.cleandoc(ast.get_docstring(ast.parse(text)))
    for word in ("**Goal.**", "**The one equation.**", "$$", "**Source.**", "**Time.**"):
        assert word in opening
    assert "\n# ## Exercises\n" in text
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
    for cell in cells:
        head, first, *_ = cell.split("\n")
        assert head in ("", " [markdown]")
        # a comment right after the marker of a code cell would be a text on the rendered page
        assert (head == "") != first.startswith(("#", 'r"""')), f"a cell that begins with {first!r}"
        assert cell.count("$$") % 2 == 0


@by_name
def test_what_a_lesson_stands_on(name):
    for path in (LESSONS / f"{name}.py", LESSONS / "checks" / f"{name}.py", LESSONS / "solutions" / f"{name}.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        unwanted = {"tests", "benchmarks", "examples", "conftest", "torch", "jax", "tensorflow"}
        assert not {module.split(".")[0] for module in modules} & unwanted


# ---- the kit ----


def said_of(capsys, yours, expected):
    verdict = kit.check(1, lambda answer: [("it", answer, expected)], yours)
    said = capsys.readouterr().out
    assert verdict == ("right" in said)
    return said


@pytest.mark.parametrize(
    ("yours", "expected", "words"),
    [
        (np.zeros(3), np.zeros(3), "right"),
        ([0.0, 1.0], np.array([0.0, 1.0]), "right"),
        (1, 1.0, "right"),
        ((1.0, [2.0]), (1.0, np.array([2.0])), "right"),
        (0.5, kit.Between(0, 1), "right"),
        (True, True, "right"),
        (None, 1.0, "not solved yet"),
        ((1.0, ...), (1.0, 2.0), "not solved yet"),
        (np.zeros((3, 2)), np.zeros((2, 3)), "its shape is (3, 2), and (2, 3) is expected"),
        (np.zeros(3, np.float32), np.zeros(3), "its dtype is float32, and float64 is expected"),
        (np.array([1.0, np.nan]), np.zeros(2), "not finite"),
        (np.array([1.0, 2.5]), np.array([1.0, 2.0]), "the values differ, most at [1]: yours 2.5, expected 2"),
        ([[1], [2, 3]], np.zeros(2), "rows have different lengths"),
        ("three", 3.0, "numbers are expected, and this is str"),
        (1.0, (1.0, 2.0), "2 results are expected, together in a tuple"),
        ((1.0, 3.0), (1.0, 2.0), "result 2: the values differ"),
        (2, kit.Between(0, 1), "expected a number from 0 to 1"),
        ("0.5", kit.Between(0, 1), "not there yet"),
        (1 + 1e-9, 1.0, "right"),
        (1 + 1e-3, 1.0, "the values differ"),
        (np.array([2, 3]), np.array([2, 4]), "the values differ"),
        (False, True, "not the expected answer"),
    ],
)
def test_what_is_said_of_an_answer(capsys, yours, expected, words):
    assert words in said_of(capsys, yours, expected)


def test_an_error_is_explained_with_its_line(capsys):
    def answer(x):
        return x @ np.zeros(7)

    assert not kit.check(1, lambda answer: [("it", answer(np.zeros(3)), 0.0)], answer)
    said = capsys.readouterr().out
    assert re.search(r"your function raised ValueError: .*\n +\(test_lessons\.py, line \d+\)", said)


def test_an_answer_that_writes_into_its_input_is_refused(capsys):
    def answer(x):
        x += 1
        return x

    assert not kit.check(1, lambda answer: [("it", answer(np.zeros(3)), np.ones(3))], answer)
    assert "wrote into its input 1" in capsys.readouterr().out


def test_a_failed_solution_ends_with_an_error(capsys):
    lesson = kit.Lesson(NAMES[0])
    solved = numbered(solutions_of(NAMES[0]), "exercise")
    lesson.check_all(solved)
    with pytest.raises(SystemExit, match="1"):
        lesson.check_all(dict(solved, exercise_1=lambda place: (0, 0, 0)))


def test_the_flags_are_explained():
    done = run(LESSONS / f"{NAMES[0]}.py", "--help")
    assert "--quick" in done.stdout
    assert run(LESSONS / f"{NAMES[0]}.py", "--fast").returncode == 2
