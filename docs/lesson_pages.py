"""Sphinx extension: the lessons' Markdown for sphinx-gallery, and formulas as MathML, which needs no network.

The lessons are percent-format scripts with Markdown cells, as notebooks have them. sphinx-gallery wants its text as
reStructuredText. So before it looks for scripts, each lesson is copied with its text cells translated by pandoc.
Formulas become MathML when the pages are built: every browser draws it by itself, from the file system too.
"""

import re
from pathlib import Path

import pypandoc
from math_core import LatexToMathML

CELL = re.compile(r"^# %% \[markdown\]\n((?:#.*\n?)+)", re.MULTILINE)
OPENING = re.compile(r'\A# %% \[markdown\]\nr"""\n(.*?)"""\n', re.DOTALL)


def translated(text):
    """Return a lesson's script with its Markdown cells as reStructuredText ones."""

    def opening(match):
        return f'r"""\n{to_rst(match[1])}"""\n'

    def cell(match):
        lines = [re.sub("^# ?", "", line) for line in match[1].splitlines()]
        return "# %%\n" + "".join(f"# {line}".rstrip() + "\n" for line in to_rst("\n".join(lines)).splitlines())

    return CELL.sub(cell, OPENING.sub(opening, text))


def to_rst(markdown):
    return pypandoc.convert_text(markdown, "rst", format="markdown", extra_args=["--wrap=preserve"])


def translate_lessons(source, target):
    """Write every lesson of the folder `source`, translated, to the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(source).glob("[0-9][0-9]_*.py")):
        text = translated(path.read_text(encoding="utf-8"))
        if not (target / path.name).exists() or (target / path.name).read_text(encoding="utf-8") != text:
            (target / path.name).write_text(text, encoding="utf-8")  # only a changed one, as building takes long


def _inline(translator, node):
    translator.body.append(LatexToMathML().convert_with_local_state(node.astext(), displaystyle=False))
    raise _skip()


def _block(translator, node):
    formula = LatexToMathML().convert_with_local_state(node.astext(), displaystyle=True)
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise _skip()


def _skip():
    from docutils.nodes import SkipNode

    return SkipNode()


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
