"""The site: `python -m sphinx docs docs/_build/html` builds it, and it opens from the file system."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LESSONS = HERE.parent / "lessons"
SCRIPTS = HERE / "_build" / "lessons"  # the lessons, translated for sphinx-gallery
sys.path[:0] = [str(HERE), str(LESSONS), str(HERE.parent)]  # for lesson_pages, for kit, for tinyvit

from lesson_pages import translate_lessons  # noqa: E402

project = "tinyvit"
author = "the authors of tinyvit"
extensions = ["sphinx_gallery.gen_gallery", "lesson_pages"]
exclude_patterns = ["_build"]
html_math_renderer = "mathml"
html_show_copyright = False

translate_lessons(LESSONS, SCRIPTS)
(SCRIPTS / "GALLERY_HEADER.rst").write_text("Lessons\n=======\n", encoding="utf-8")
sphinx_gallery_conf = {
    "examples_dirs": [str(SCRIPTS)],
    "gallery_dirs": ["lessons"],
    "filename_pattern": r"/\d\d_",
    "ignore_pattern": r"__init__\.py",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "abort_on_example_error": True,
    "show_memory": False,
}
