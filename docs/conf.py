"""The site: `python -m sphinx docs docs/_build/html` builds it, and it opens from the file system.

With `-t quick` the lessons run as with --quick, which takes seconds each.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LESSONS = HERE.parent / "lessons"
SCRIPTS = HERE / "_build" / "lessons"  # the lessons, translated for sphinx-gallery
sys.path[:0] = [str(HERE), str(LESSONS), str(HERE.parent)]  # for lesson_pages, for kit, for tinyvit

from lesson_pages import prepare  # noqa: E402

quick = tags.has("quick")  # noqa: F821  Sphinx puts it here

project = "tinyvit"
author = "the authors of tinyvit"
extensions = ["sphinx_gallery.gen_gallery", "lesson_pages"]
exclude_patterns = ["_build", "_static", "lessons/index.rst", "**sg_execution_times.rst"]
highlight_language = "text"

html_theme = "furo"
html_title = "tinyvit: the lessons"
html_static_path = ["_static"]
html_css_files = ["lessons.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_use_index = False

sphinx_gallery_conf = {
    "examples_dirs": [str(SCRIPTS)],
    "gallery_dirs": ["lessons"],
    "filename_pattern": r"/\d\d_",
    "ignore_pattern": r"__init__\.py",
    "copyfile_regex": r"index\.rst",  # our own, which is none: index.rst is the syllabus
    "within_subsection_order": "FileNameSortKey",
    "reset_argv": "lesson_pages.arguments_quick" if quick else "lesson_pages.arguments_in_full",
    "capture_repr": (),  # lessons print what they want to be seen
    "image_srcset": ["2x"],
    "notebook_extensions": [],  # the notebooks are Jupytext's, of the lessons as they are
    "download_all_examples": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "show_memory": False,
}
prepare(LESSONS, SCRIPTS, gallery=HERE / "lessons", quick=quick)
