"""What the README says is so: its tables are generated, its snippet runs, its links lead somewhere."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def load_script():
    spec = importlib.util.spec_from_file_location("benchmarks_readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_what_their_sources_say():
    assert load_script().generated(README) == README, "run: python benchmarks/readme.py"


def test_every_file_of_the_library_is_on_the_map():
    parts = {ROOT / part for part in load_script().PARTS}
    source = {path for path in (ROOT / "tinyvit").rglob("*") if path.suffix in (".py", ".cu", ".cuh")}
    files = {path for path in source if path.name != "__init__.py"}
    assert parts == files


def test_the_snippet_prints_what_the_readme_says():
    form = r"<!-- snippet -->\n```python\n(.*?)```\n<!-- /snippet -->\n\n((?:    [^\n]*\n)+)"
    code, shown = re.search(form, README, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    number = r"\d+e[-+]\d+"
    assert re.sub(number, "N", printed.getvalue()) == re.sub(number, "N", re.sub("(?m)^    ", "", shown))
    pairs = zip(re.findall(number, printed.getvalue()), re.findall(number, shown), strict=True)
    for found, said in pairs:
        assert float(found) < 10 * float(said)  # rounding noise differs between processors
    assert len([line for line in code.splitlines() if line]) <= 12


def test_the_three_lines_that_train_print_what_the_readme_says():
    code, shown = re.search(r"```python\n(import tinyvit\n.*?)```\n\n((?:    [^\n]*\n)+)", README, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    shown = re.sub("(?m)^    ", "", shown)
    number = r"[\d,.]*\d"
    assert re.sub(number, "N", printed.getvalue()) == re.sub(number, "N", shown)
    accuracies = [float(re.search(r"accuracy=([\d.]+)", text)[1]) for text in (printed.getvalue(), shown)]
    assert abs(accuracies[0] - accuracies[1]) < 0.02  # other processors and numbers of workers round differently


def test_links_and_pictures_lead_to_files():
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), target
