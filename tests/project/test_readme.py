"""README.md, CONTRIBUTING.md and docs/ are true: generated parts, code, commands, and links."""

import argparse
import configparser
import contextlib
import importlib
import importlib.util
import io
import math
import os
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tinyvit.commands import COMMANDS, main
from tinyvit.model import ViTConfig
from tinyvit.pretrained import pretrained_card
from tinyvit.training import NOTE, TUNED

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parents[2]
DOCS = [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if not {"_build", "_static", "repository"} & set(path.parts)
]
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
NUMBER = r"\d[\d,.]*(?:e[-+]\d+)?"


def load_tables():
    spec = importlib.util.spec_from_file_location("benchmarks_tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()

# ---- generated parts ----


@pytest.mark.parametrize("page", tables.PARTS)
def test_generated_parts_are_what_their_sources_say(page):
    text = TEXTS[page]
    assert tables.generated(page, text) == text, "run: python benchmarks/tables.py"


def test_a_page_without_its_markers_is_an_error():
    with pytest.raises(ValueError, match=r"docs/results/server.md needs one pair of markers <!-- server -->"):
        tables.generated("docs/results/server.md", "no markers")


def test_every_file_of_the_library_is_on_both_maps():
    source = {path for path in (ROOT / "tinyvit").rglob("*") if path.suffix in tables.CODE}
    on_the_map = {path for parts, _ in tables.FOLDERS for part in parts for path in tables.files_of(part)}
    initial = {path for path in source if path.name == "__init__.py"}  # the one at the top has no row in the README
    assert source - on_the_map <= {ROOT / "tinyvit" / "__init__.py"}
    assert source - initial == {path for path in tables.reading_order() if path.name != "__init__.py"}


def test_no_file_is_counted_twice():
    counted = [path for parts, _ in tables.FOLDERS for part in parts for path in tables.files_of(part)]
    assert len(counted) == len(set(counted))
    assert all(path.is_file() for path in counted)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.py", '"""Two\nlines."""\n\nimport os  # why\n# a comment\n\ndef f():\n    """One."""\n    return 1\n', 3),
        ("b.py", 'text = """kept\n\nas it is"""\n', 3),
        ("c.cu", "// a comment\n\n/* two\n lines */\nint f() {  // why\n}\n", 2),
    ],
)
def test_lines_of_code_are_without_docstrings_comments_and_blanks(tmp_path, name, text, lines):
    (tmp_path / name).write_text(text)
    assert tables.code_lines(tmp_path / name) == lines


# ---- code ----


def blocks(text):
    """Return the Python blocks of a page, and the indented block that shows what each prints, if there is one."""
    form = r"```python\n(.*?)```\n(?:<!-- /\w+ -->\n)?\n?(?:[^\n`]*[Pp]rints[^\n]*:\n\n)?((?:    [^\n]*\n)*)"
    return [(code, re.sub("(?m)^    ", "", shown)) for code, shown in re.findall(form, text, re.DOTALL)]


PROGRAMS = [
    pytest.param(code, shown, id=f"{page}-{number}")
    for page in PAGES
    for number, (code, shown) in enumerate(blocks(TEXTS[page]), 1)
]


@pytest.mark.parametrize(("code", "shown"), PROGRAMS)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(code, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run(code)[1]
    if not shown or shown.startswith(("tinyvit ", "pip ", "python ")):
        return
    assert re.sub(NUMBER, "N", printed) == re.sub(NUMBER, "N", shown)
    pairs = list(zip(re.findall(NUMBER, printed), re.findall(NUMBER, shown), strict=True))
    for found, said in pairs:
        if "e" in said:
            assert float(found) < 10 * float(said)  # rounding noise differs between processors
    if shown.startswith("["):
        assert printed == shown  # integers, such as predicted classes
    for name, tolerance in (("accuracy=", 0.02), ("accuracy ", 0.1), ("loss ", 0.2), ("error ", 0.2)):
        results = [list(map(float, re.findall(name + r"([\d.]+)(?!\S)", text))) for text in (printed, shown)]
        # other processors and numbers of workers round differently
        np.testing.assert_allclose(*results, atol=tolerance, rtol=0 if "accuracy" in name else 0.2)


def run(code):
    """Run a program and return its names and what it prints."""
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "program", "exec"), names)
    return names, printed.getvalue()


def test_the_snippet_of_the_readme_has_twelve_lines():
    (code,) = re.findall(r"<!-- snippet -->\n```python\n(.*?)```\n<!-- /snippet -->", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 12
    assert "relative error" in run(code)[1]


def program(name):
    """Return the program of the page "Your own loop" that follows a marker."""
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```", TEXTS["docs/guide/your_own_loop.md"], re.DOTALL)[1]


@pytest.mark.parametrize("name", ["regression", "freezing", "ensemble"])
def test_a_program_of_your_own_loop_is_short(name):
    assert len(program(name).splitlines()) < 25


def test_the_regression_learns():
    _, printed = run(program("regression").replace("[:2000]", "[:800]"))
    errors = [float(value) for value in re.findall(r"error ([\d.]+)", printed)]
    assert len(errors) == 3
    assert errors[-1] < 0.5 * min(errors[0], 1)  # 1 is the error of always predicting the mean


def test_freezing_trains_the_head_and_leaves_every_other_bit():
    names, printed = run(program("freezing").replace("[:2000]", "[:600]"))
    parameters, before = names["parameters"], names["model"].parameters
    for name in parameters:
        if not name.startswith("head."):
            assert parameters[name].tobytes() == before[name].tobytes(), name
    start = names["tinyvit"].initialise(names["config"], seed=0)
    assert (parameters["head.weight"] != start["head.weight"]).all()
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.5 * losses[0]
    assert "changed: False" in printed


def test_the_ensemble_is_at_least_as_good_as_the_mean_of_its_members():
    names, printed = run(program("ensemble").replace("[:3000]", "[:1500]"))
    *members, together = (float(value) for value in re.findall(r"accuracy ([\d.]+)", printed))
    assert len(members) == 3
    assert together >= np.mean(members)
    truth, rows = names["truth"], np.arange(len(names["truth"]))
    losses = [-np.log(each[rows, truth]).mean() for each in names["probabilities"]]
    assert -np.log(names["ensemble"][rows, truth]).mean() < np.mean(losses)


# ---- commands ----


def command_lines(text):
    """Return the command lines of a page: those of its code, without comments, and those between backticks."""
    prose = re.sub(r"```\w*\n.*?```", "", text, flags=re.DOTALL)
    lines = re.findall(r"(?m)^ {4}(\S.*)$", prose) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
    found = []
    for line in lines:
        for part in line.split("&&"):
            part = re.split(r"\s{2,}|\s#|\s\|", part.strip())[0]
            if re.match(r"(tinyvit|python|pip|pytest|bash) ", part):
                found.append(part)
    return sorted(set(found))


COMMAND_LINES = [pytest.param(line, id=f"{page}: {line}") for page in PAGES for line in command_lines(TEXTS[page])]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_line_is_one_that_its_command_takes(line):
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "tinyvit"]:
        words = ["tinyvit", *words[3:]]
    if words[:2] == ["python", "examples/train_mnist.py"]:
        words = ["tinyvit", "train", *words[2:]]
    if words[0] == "tinyvit":
        check_tinyvit(words[1:])
    elif words[:2] == ["pip", "install"]:
        check_extras(line)
    elif words[0] == "python" and words[1] != "-m":
        check_script(words[1], words[2:])
    elif words[0] in ("pytest", "bash"):
        for word in words[1:]:
            if "/" in word:
                marked = "\npytestmark = pytest.mark.extended" in (ROOT / word).read_text(encoding="utf-8")
                assert words[0] == "bash" or marked == ("-m extended" in line), "another tier: no test would run"


def check_tinyvit(arguments):
    """Fail unless the parser of the command takes the arguments."""
    if arguments in ([], ["--help"], ["--version"], ["COMMAND"], ["COMMAND", "--help"]):
        return
    assert arguments[0] in COMMANDS, arguments
    module = importlib.import_module(f"tinyvit.commands.{arguments[0]}")
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    module.add_arguments(parser)
    if "--help" in arguments:
        return
    try:
        parser.parse_args(arguments[1:])
    except (argparse.ArgumentError, SystemExit) as error:
        if arguments[1:]:  # `tinyvit evaluate` in prose is the name of a command
            raise AssertionError(f"tinyvit {shlex.join(arguments)}: {error}") from error


def check_extras(line):
    """Fail unless the extras of an installation exist."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    for extras in re.findall(r"\[([\w,-]+)\]", line):
        assert set(extras.split(",")) <= set(settings["options.extras_require"]), line


def test_figures_of_the_model_are_those_of_its_card_and_its_settings():
    accuracy = f"{100 * pretrained_card().test_accuracy:.2f} %"
    for page in ("docs/guide/draw_a_digit.md", "docs/results/accuracy.md"):
        assert accuracy in TEXTS[page]
    size = sum(math.prod(shape) for shape in ViTConfig().shapes().values())
    assert f"{size:,}\nparameters" in TEXTS["docs/guide/train.md"]


def test_the_table_of_recipes_has_their_settings():
    rows = dict(re.findall(r"(?m)^\| ([\w ,]+) \| (.*) \|$", TEXTS["docs/guide/train.md"].partition("## Recipes")[2]))
    for column, recipe in enumerate((TUNED, NOTE)):
        cells = {name: row.split(" | ")[column] for name, row in rows.items() if " | " in row}
        assert cells["epochs, batch size"] == f"{recipe.epochs}, {recipe.batch_size}"
        assert f"beta2 {recipe.beta2:g}" in cells["optimiser"]
        assert (f"weight decay {recipe.weight_decay:g}" in cells["optimiser"]) == (recipe.weight_decay > 0)
        rate = float(re.match(r"[\d.]+e-\d", cells["learning rate"])[0])
        assert rate == recipe.learning_rate
        assert (f"{recipe.warmup_steps} steps" in cells["learning rate"]) == (recipe.schedule == "cosine")
        assert cells["gradient"] == (f"clipped to norm {recipe.clip:g}" if recipe.clip else "not clipped")
        assert cells["label smoothing"] == (f"{recipe.smoothing:g}" if recipe.smoothing else "none")
        assert cells["average of the weights"].startswith(f"decay {recipe.average:g}," if recipe.average else "none")
        changes = recipe.augmentation
        assert f"rotation {changes.rotation:g} degrees" in cells["augmentation"]
        assert (f"scale {100 * changes.scale:g} %" in cells["augmentation"]) == (changes.scale > 0)
        assert (f"shear {changes.shear:g} degrees" in cells["augmentation"]) == (changes.shear > 0)
        assert (f"shift {changes.shift:g} pixel" in cells["augmentation"]) == (changes.shift > 0)
        assert ("one image in ten mirrored" in cells["augmentation"]) == (changes.flip == 0.1)


def test_the_number_of_mutants_is_about_what_the_page_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "heart"))
    mutation = importlib.import_module("test_mutation")
    counts = Counter()
    for module, name, *_ in mutation.TARGETS:
        function = getattr(importlib.import_module(f"tinyvit.{module}"), name)
        counts[module == "reference"] += len(list(mutation.mutants(function)))
    text = " ".join(TEXTS["docs/results/gradients.md"].split())
    form = r"about ([\d,]+) such mutants, about ([\d,]+) of the library's functions and ([\d,]+) of"
    said = [int(number.replace(",", "")) for number in re.search(form, text).groups()]
    np.testing.assert_allclose(said, [counts.total(), counts[False], counts[True]], rtol=0.1)


def test_the_page_about_installing_names_every_extra():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = set(re.findall(r"^\| `pip install -e \"\.\[([\w-]+)\]\"`", TEXTS["docs/guide/install.md"], re.MULTILINE))
    assert named == set(settings["options.extras_require"])


def check_script(script, arguments):
    """Fail unless the script exists and names all the flags."""
    path = ROOT / script
    assert path.is_file(), script
    text = path.read_text(encoding="utf-8")
    if path.parent.name == "lessons":
        text += (path.parent / "kit.py").read_text(encoding="utf-8")  # it reads the flags of a lesson
    for flag in re.findall(r"--[a-z][\w-]*", " ".join(arguments)):
        if f'"{flag}"' not in text:
            assert "parse_known_args" in text, f"{script} has no {flag}"
            check_tinyvit(["train", flag, "1"])  # the script passes it to the training command


def test_the_pictures_that_the_readme_reads_are_read_as_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for file, shown in re.findall(r"(?m)^    tinyvit predict (\S+)\n\n((?:    [^\n]*\n)+)", README):
        if (ROOT / file).exists():
            assert main(["predict", file]) == 0
            printed = capsys.readouterr().out
            shown = re.sub("(?m)^    ", "", shown)
            assert re.sub(NUMBER, "N", printed) == re.sub(NUMBER, "N", shown)
            assert printed.split(" (")[0] == shown.split(" (")[0]  # the digit


# ---- links ----


def heading_anchors(text):
    """Return the anchors of a page's headings, as code hosts and the site make them."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = Path(os.path.normpath((ROOT / page).parent / file)) if file else ROOT / page
        assert path.exists(), target
        if page.startswith("docs/"):
            assert path.is_file(), f"{target} is a folder, which is no page of the site"
        if anchor:
            assert anchor in heading_anchors(path.read_text(encoding="utf-8")), target


def test_every_page_of_docs_is_linked_from_an_index():
    for page in DOCS:
        if Path(page).name != "index.md":
            index = (ROOT / page).parent / "index.md"
            assert f"({Path(page).name})" in index.read_text(encoding="utf-8"), page


def test_links_for_a_package_index_are_absolute():
    spec = importlib.util.spec_from_file_location("tinyvit_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    text = setup.absolute_links(README, "https://example.org/blob/v1")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert "](https://example.org/blob/v1/tinyvit/reference.py)" in text
    assert "](https://example.org/blob/v1/benchmarks/results/learning_and_looking.png?raw=true)" in text
