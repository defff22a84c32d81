"""The site: `python -m sphinx docs docs/_build/html` builds it, and it opens from the file system.

With `-t quick` the lessons run as with --quick, which takes seconds each.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LESSONS = HERE.parent / "lessons"
SCRIPTS = HERE / "_build" / "lessons"  # the lessons, translated for sphinx-gallery
sys.path[:0] = [str(HERE), str(LESSONS), str(HERE.parent)]  # for the extensions here, for kit, for tinyvit

import api_pages  # noqa: E402
import lesson_pages  # noqa: E402
import repository_pages  # noqa: E402
from numpydoc.xref import DEFAULT_LINKS  # noqa: E402

quick = tags.has("quick")  # noqa: F821  Sphinx defines it

project = "tinyvit"
author = "the authors of tinyvit"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "api_pages",
    "lesson_pages",
    "repository_pages",
]
exclude_patterns = ["_build", "_static", "lessons/index.rst", "**sg_execution_times.rst", "README.md"]
highlight_language = "text"
default_role = "py:obj"  # `name` in a docstring links to the entry of that name, if there is one
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

html_theme = "furo"
html_title = "tinyvit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_use_index = False

autosummary_generate = False  # api_pages writes the pages
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types and shapes
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_attributes_as_param_list = True
numpydoc_xref_param_type = True  # a class of the reference in a parameter's type is a link,
numpydoc_xref_ignore = "all"  # other words are text,
numpydoc_xref_aliases = {name: name for name in DEFAULT_LINKS} | api_pages.classes()  # and nothing links to a network
toc_object_entries_show_parents = "hide"

sphinx_gallery_conf = {
    "examples_dirs": [str(SCRIPTS)],
    "gallery_dirs": ["lessons"],
    "filename_pattern": r"/\d\d_",
    "ignore_pattern": r"__init__\.py",
    "copyfile_regex": r"index\.rst",  # lessons.rst is the page above the lessons, and this index is excluded
    "within_subsection_order": "FileNameSortKey",
    "reset_argv": "lesson_pages.arguments_quick" if quick else "lesson_pages.arguments_in_full",
    "capture_repr": (),  # a page shows what a lesson prints, and no values of expressions
    "image_srcset": ["2x"],
    "notebook_extensions": [],  # lesson_pages makes the notebooks, with Jupytext
    "download_all_examples": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "show_memory": False,
}
lesson_pages.prepare(LESSONS, SCRIPTS, gallery=HERE / "lessons", quick=quick)
api_pages.prepare(HERE / "api" / "generated")
repository_pages.prepare(HERE)
