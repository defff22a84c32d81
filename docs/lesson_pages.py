"""Sphinx extension: the lessons in the form that sphinx-gallery reads, and formulas as MathML.

The lessons are percent-format scripts with Markdown cells. sphinx-gallery reads reStructuredText. So each lesson is
copied before sphinx-gallery runs, and pandoc translates the text cells of the copy. Formulas become MathML when the
pages are built. Browsers draw MathML without a script and without a network.
"""

import re
import shutil
from pathlib import Path

import jupytext
import pypandoc
from docutils.nodes import SkipNode
from math_core import LatexToMathML

CELL = re.compile(r'^# %% \[markdown\]\n(r"""\n[\s\S]*?"""\n|(?:#.*\n?)+)', re.MULTILINE)
BOUNDARY = "NEXTCELL"  # a paragraph between cells, which pandoc copies unchanged


def prepare(lessons, scripts, gallery, quick):
    """Write the files that Sphinx reads: the translated lessons, their notebooks, and the syllabus.

    Parameters
    ----------
    lessons : Path
        The folder of the lessons.
    scripts : Path
        The folder for the translated lessons.
    gallery : Path
        The folder in which sphinx-gallery writes pages. It is removed if the last build had another value of `quick`,
        so that all lessons run again.
    quick : bool
        Whether the lessons run with --quick.
    """
    scripts.mkdir(parents=True, exist_ok=True)
    mode = scripts / "mode.txt"
    if not mode.exists() or mode.read_text(encoding="utf-8") != str(quick):
        shutil.rmtree(gallery, ignore_errors=True)
        mode.write_text(str(quick), encoding="utf-8")
    (scripts / "index.rst").write_text("Lessons\n=======\n", encoding="utf-8")

    paths = sorted(lessons.glob("[0-9][0-9]_*.py"))
    for old in {path.name for path in scripts.glob("*.py")} - {path.name for path in paths}:
        (scripts / old).unlink()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        _write_if_changed(scripts / path.name, translated(text))  # sphinx-gallery runs a changed script again
        jupytext.write(jupytext.read(path), scripts / f"{path.stem}.ipynb")

    syllabus = with_links_to_pages((lessons / "README.md").read_text(encoding="utf-8"), {path.stem for path in paths})
    _write_if_changed(scripts / "syllabus.txt", to_rst(syllabus))
    _write_if_changed(scripts / "pictures.txt", "\n".join(map(_picture, paths)))


def translated(text):
    """Return the script of a lesson with its Markdown cells translated to reStructuredText."""
    cells = iter(to_rst(f"\n\n{BOUNDARY}\n\n".join(map(_markdown, CELL.findall(text)))).split(BOUNDARY))

    def cell(match):
        rst = next(cells).strip()
        if match[1].startswith("r"):
            return f'r"""\n{rst}\n"""\n'
        return "# %%\n" + "".join(f"# {line}".rstrip() + "\n" for line in rst.splitlines())

    return CELL.sub(cell, text)


def _markdown(cell):
    if cell.startswith("r"):
        return cell[5:-4]
    return "\n".join(re.sub("^# ?", "", line) for line in cell.splitlines())


def to_rst(markdown):
    """Translate Markdown to reStructuredText."""
    return pypandoc.convert_text(markdown, "rst", format="markdown", extra_args=["--wrap=preserve"])


def with_links_to_pages(markdown, names):
    """Replace each link to a lesson's file by a link to its page, or by its title if there is no such lesson."""

    def link(match):
        title, name = match.groups()
        return f'`{title} <lessons/{name}>`{{.interpreted-text role="doc"}}' if name in names else title

    return re.sub(r"\[([^]]+)\]\((\d\d_\w+)\.py\)", link, markdown)


def _picture(path):
    title = re.search(r"^# (\d\d .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)[1]
    image = f"lessons/images/thumb/sphx_glr_{path.stem}_thumb.png"
    return f".. image:: {image}\n   :target: lessons/{path.stem}.html\n   :alt: {title}\n"


def _write_if_changed(path, text):
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def arguments_in_full(gallery_conf, script_vars):
    """Return the command-line arguments of a lesson in a full build."""
    return []


def arguments_quick(gallery_conf, script_vars):
    """Return the command-line arguments of a lesson in a quick build."""
    return ["--quick"]


NOTE = re.compile(r"\.\. only:: html\n\n    \.\. note::.*?(?=\.\. rst-class:: sphx-glr-example-title)", re.DOTALL)
FOOTER = re.compile(r"\n\.\. (rst-class:: sphx-glr-timing|_sphx_glr_download_).*\Z", re.DOTALL)
OWN_FOOTER = """

.. rst-class:: do-it-yourself

Do it yourself
--------------

This page shows the lesson as it runs{quick}, with its exercises unsolved. To run it, in the project's folder:

.. code-block:: text

   python lessons/{name}.py
   python lessons/{name}.py --quick

Downloads: :download:`the script </../lessons/{name}.py>`, :download:`the notebook </_build/lessons/{name}.ipynb>`,
and :download:`the solutions </../lessons/solutions/{name}.py>`. Save the script or the notebook in ``lessons/``.
"""


def replace_note_and_footer(app, docname, content):
    """Replace the text of sphinx-gallery above and below a lesson."""
    if docname.startswith("lessons/"):
        quick = " with ``--quick``, on less data" if app.tags.has("quick") else ""
        footer = OWN_FOOTER.format(name=Path(docname).name, quick=quick)
        content[0] = FOOTER.sub("", NOTE.sub("", content[0])) + footer


def _mathml(latex, display):
    try:
        return LatexToMathML().convert_with_local_state(latex, displaystyle=display)
    except Exception as error:
        raise ValueError(f"the formula {latex!r} cannot be converted to MathML: {error}") from error


def _inline(translator, node):
    translator.body.append(_mathml(node.astext(), display=False))
    raise SkipNode


def _block(translator, node):
    translator.body.append(f'<div class="formula">{_mathml(node.astext(), display=True)}</div>')
    raise SkipNode


def setup(app):
    app.connect("source-read", replace_note_and_footer)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
