"""The package's metadata agree with each other, and the source distribution has all that its tests need."""

import configparser
import itertools
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tinyvit

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg", encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = re.findall(r"(?m)^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", CHANGELOG)
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def numbers(version):
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version)[0].split(".")))


def test_the_version_has_one_place_and_the_next_one_is_above_the_last_release():
    assert SETTINGS["metadata"]["version"] == "attr: tinyvit.__version__"
    latest = RELEASES[0][0]
    versions = [numbers(version) for version, _ in RELEASES]
    assert all(newer > older for newer, older in itertools.pairwise(versions))
    if ".dev" in tinyvit.__version__:
        assert numbers(tinyvit.__version__) > numbers(latest)
        assert "\n## Unreleased\n" in CHANGELOG
    else:
        assert tinyvit.__version__ == latest


def test_the_citation_is_of_the_last_release():
    assert re.findall(r"(?m)^version: (.*)$", CITATION) == [RELEASES[0][0]]
    assert re.findall(r"(?m)^date-released: (.*)$", CITATION) == [RELEASES[0][1]]


def test_the_citation_has_the_required_keys():
    yaml = pytest.importorskip("yaml", reason='needs the extra: pip install -e ".[docs]"')
    citation = yaml.safe_load(CITATION)
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == SETTINGS["metadata"]["license"]
    for entry in [citation, *citation["references"]]:
        assert entry["title"]
        assert all({"name"} == set(a) or {"alias"} == set(a) or {"family-names", "given-names"} == set(a)
                   for a in entry["authors"])  # fmt: skip


def test_classifiers_name_the_tested_versions_of_python():
    classifiers = SETTINGS["metadata"]["classifiers"].split("\n")
    versions = [text.rpartition(" :: ")[2] for text in classifiers if re.search(r":: 3\.\d+$", text)]
    lowest = SETTINGS["options"]["python_requires"].removeprefix(">=")
    assert versions == [f"3.{minor}" for minor in range(int(lowest[2:]), int(versions[-1][2:]) + 1)]
    for page in ("README.md", "docs/guide/install.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"Python {lowest} to {versions[-1]}" in text, page


def test_annotations_are_announced():
    assert "Typing :: Typed" in SETTINGS["metadata"]["classifiers"]
    assert (ROOT / "tinyvit" / "py.typed").is_file()
    assert "py.typed" in SETTINGS["options.package_data"]["tinyvit"]


def test_the_lowest_versions_are_those_that_setup_cfg_allows():
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")))
    extras = SETTINGS["options.extras_require"]
    named = "\n".join([SETTINGS["options"]["install_requires"], extras["test"], extras["fast"]])
    bounds = dict(re.findall(r"(?m)^([\w-]+)>=([\d.]+)", named))
    assert set(bounds) == set(re.findall(r"(?m)^[\w-]+", named))
    for name, bound in bounds.items():
        pinned, least = numbers(pins[name]), numbers(bound)
        assert pinned[: len(least)] == least, name
        assert name == "nvidia-cuda-nvrtc" or not any(pinned[len(least) :]), f"{name}: pin the first release"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The files of the repository that git does not ignore, in a copy of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no checkout")
    folder = tmp_path_factory.mktemp("sources")
    files = [file for file in listed.stdout.splitlines() if (ROOT / file).is_file()]
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / file)
    return folder, files


@pytest.mark.extended
def test_the_source_distribution_has_every_file(sources):
    pytest.importorskip("setuptools")
    folder, files = sources
    made_by_tests = ["tests/output/new.png", "lessons/output/new.png", "docs/_build/new.html", "docs/lessons/new.rst"]
    for file in made_by_tests:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=folder, check=True, capture_output=True)
    (archive,) = (folder / "dist").iterdir()
    assert archive.name == f"tinyvit-{tinyvit.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        found = {name.partition("/")[2] for name in tar.getnames()}
    assert set(files) - found == {".gitignore"}
    assert not found & set(made_by_tests)
