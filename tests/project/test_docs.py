"""The site builds without a warning, opens from the file system, and loads nothing from a network."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.extended

for package in ("sphinx", "furo", "myst_parser", "numpydoc", "sphinx_gallery", "jupytext", "pypandoc", "math_core"):
    pytest.importorskip(package, reason='needs the extra: pip install -e ".[docs]"')

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "lessons").glob("[0-9][0-9]_*.py"))
RUN = NAMES[0]  # the only lesson that runs; the pages of the others have no results


class Page(HTMLParser):
    """What a page loads, its links, its anchors and its text."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.places, self.words = [], [], set(), []
        self._quiet = None  # inside a script or a style
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places.add(attributes.get("id"))
        if tag in ("script", "style"):
            self._quiet = tag
        loaded = [attributes.get(name) for name in ("src", "poster", "data")]
        loaded += [part.split()[0] for part in (attributes.get("srcset") or "").split(",") if part.strip()]
        if tag == "link" and attributes.get("rel") not in ("search", "next", "prev", "index"):
            loaded.append(attributes.get("href"))
        self.loads += [url for url in loaded if url]
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        if tag == self._quiet:
            self._quiet = None

    def handle_data(self, data):
        if self._quiet is None:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, which is built in a copy so that nothing is left behind in the project."""
    here = tmp_path_factory.mktemp("site")
    for folder in ("docs", "lessons"):
        leave = shutil.ignore_patterns("_build", "output", "__pycache__", "sg_execution_times.rst")
        shutil.copytree(ROOT / folder, here / folder, ignore=leave)
    for other in ROOT.iterdir():  # pages link to files of the whole repository
        if other.name not in ("docs", "lessons"):
            (here / other.name).symlink_to(other)
    for made in ("lessons", "repository", "api/generated"):  # pages of an earlier build
        shutil.rmtree(here / "docs" / made, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "-t", "quick"]
    command += ["-D", f"sphinx_gallery_conf.filename_pattern=/{RUN}"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OPENBLAS_NUM_THREADS="2")
    done = subprocess.run(
        [*command, "docs", "html"], capture_output=True, text=True, cwd=here, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return here / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def test_there_is_a_page_for_every_lesson_and_the_syllabus_leads_to_it(pages):
    assert {f"lessons/{name}.html" for name in NAMES} <= set(pages)
    assert "lessons.html" in pages["index.html"].links
    syllabus = pages["lessons.html"]
    for name in NAMES:
        assert f"lessons/{name}.html" in syllabus.links
        assert [url for url in syllabus.loads if f"sphx_glr_{name}_thumb" in url], "a picture from each lesson"
    assert "For a teacher" in syllabus.text


def test_there_is_a_page_for_every_markdown_file_and_the_index_leads_to_each_part(pages):
    sources = [path for path in (ROOT / "docs").rglob("*.md") if not {"_build", "_static"} & set(path.parts)]
    for path in sources:
        assert path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in pages
    for part in ("guide", "api", "results"):
        assert f"{part}/index.html" in pages["index.html"].links
    assert "search.html" in pages


def test_no_block_of_markdown_is_left_as_text(site, pages):
    for name, page in pages.items():
        if not name.startswith(("lessons", "repository", "_modules")):
            html = (site / name).read_text(encoding="utf-8")
            assert "{eval-rst}" not in page.text, name
            assert "system-message" not in html, name
            assert "processed by numpydoc" not in page.text, name
            assert not re.search(r"\]\([\w./]+\)", page.text), f"{name}: a link of Markdown"


@pytest.fixture
def api_pages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("api_pages")


def test_the_reference_has_every_public_name(pages, api_pages):
    assert api_pages.MODULES[0] == "tinyvit"
    for module in api_pages.MODULES:
        page = pages[f"api/generated/{module}.html"]
        own, others = api_pages.public_names(module)
        assert own or others, module
        for home, name in own:
            assert f"{home}.{name}" in page.places, f"{module}: no entry of {name}"
        for home, name in others:
            assert name in page.text
            assert f"{home}.{name}" in pages[f"api/generated/{home}.html"].places
    entry = pages["api/generated/tinyvit.gpu.html"].text
    for part in ("Parameters", "Returns", "Raises", "is “gpu” and no GPU computes"):
        assert part in entry


def test_a_docstring_that_is_text_becomes_markup(api_pages):
    lines = ["|a| of `*b` and `name`, *c:", "", "    x = a * b", "", "    y = x", "", "train  makes", "load   reads"]
    api_pages.docstring_as_rst(None, "module", "m", None, None, lines)
    assert lines == [
        "\\|a\\| of ``*b`` and `name`, \\*c:", "", "::", "", "    x = a * b", "", "    y = x", "",
        "::", "", "    train  makes", "    load   reads", "",
    ]  # fmt: skip


def test_a_link_to_a_file_of_the_repository_leads_to_its_page(site, pages):
    assert "repository/tinyvit/reference.py.html" in pages["index.html"].links
    page = pages["repository/tinyvit/reference.py.html"]
    assert "def layer_norm_forward" in page.text
    assert "../repository/benchmarks/NOTES.html" in pages["results/accuracy.html"].links
    assert "lessons.html" in pages["index.html"].links  # lessons/README.md
    assert "../lessons/16_to_the_gpu.html" in pages["guide/gpu.html"].links


def test_nothing_is_loaded_from_a_network(site, pages):
    for name, page in pages.items():
        assert not [url for url in page.loads if urlsplit(url).scheme or url.startswith("//")], name
    for path in site.rglob("*.css"):
        addresses = re.findall(r"url\(\s*['\"]?([^'\")]+)", path.read_text(encoding="utf-8"))
        assert not [url for url in addresses if re.match("https?:|//", url)], path.name
        assert "@import" not in path.read_text(encoding="utf-8")


def test_all_that_is_loaded_or_linked_is_there(site, pages):
    for name, page in pages.items():
        for url in page.loads + page.links:
            parts = urlsplit(url)
            if parts.scheme or url.startswith("//"):
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            assert target.is_file(), f"{name} needs {url}"
            key = target.resolve().relative_to(site.resolve()).as_posix()
            if parts.fragment and key in pages:
                assert unquote(parts.fragment) in pages[key].places | {"top", ""}, f"{name} needs {url}"


def test_formulas_are_set_and_no_markup_is_left(site, pages):
    for name in NAMES:
        html = (site / f"lessons/{name}.html").read_text(encoding="utf-8")
        assert html.count("<math") >= 1
        text = pages[f"lessons/{name}.html"].text
        prose = re.sub(r'<div class="highlight.*?</div>', "", html, flags=re.DOTALL)
        assert "$$" not in prose, name
        assert not re.search(r"\\(frac|sqrt|mathrm|begin)\b", prose), name
        assert "%%" not in text, f"the boundary of a cell of {name} is left"
        assert "system-message" not in html
        headings = re.findall("^# ##+ (.*)$", (ROOT / f"lessons/{name}.py").read_text(encoding="utf-8"), re.MULTILINE)
        assert html.count("<h2>") + html.count("<h3>") == len(headings) + 1, name  # and "Do it yourself"


def test_a_run_lesson_shows_its_pictures_and_its_checks(pages):
    page = pages[f"lessons/{RUN}.html"]
    assert "Exercise 1: not solved yet" in page.text
    assert [url for url in page.loads if f"sphx_glr_{RUN}_001" in url]


def test_the_notebook_to_take_along_is_the_lesson_as_it_is(site):
    for name in NAMES:
        (path,) = site.glob(f"_downloads/*/{name}.ipynb")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = (ROOT / f"lessons/{name}.py").read_text(encoding="utf-8")
        assert len(cells) == len(re.findall("^# %%", text, re.MULTILINE))
        first = "".join(cells[0]["source"])
        assert cells[0]["cell_type"] == "markdown"
        assert first.lstrip().startswith(f"# {name[:2]} ")
        scripts = sorted(site.glob(f"_downloads/*/{name}.py"))  # the lesson and its solutions
        assert text in [script.read_text(encoding="utf-8") for script in scripts]
        assert len(scripts) == 2


def test_the_syllabus_names_every_lesson_by_its_title():
    syllabus = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d) \| \[([^]]+)\]\((\w+)\.py\) \|", syllabus, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 17))
    for name in NAMES:
        title = re.search(r"^# (\d\d) (.*)$", (ROOT / f"lessons/{name}.py").read_text(encoding="utf-8"), re.MULTILINE)
        assert (title[1], title[2], name) in rows
