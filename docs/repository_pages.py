"""Sphinx extension: the repository's files that pages link to become pages of the site.

The Markdown pages of this folder link to files beside it, as in `../../tinyvit/model.py`, so that they work on a code
host. In the site such a link leads to a page with the file's text. Links to other files, such as JSON, are downloads.
"""

import os
import re
from pathlib import Path, PurePosixPath

FOLDER = "repository"  # of the pages made here
LANGUAGES = {".py": "python", ".cu": "cuda", ".cuh": "cuda", ".h": "cpp", ".js": "javascript", ".css": "css"}
LANGUAGES |= {".html": "html", "": "bash"}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")


def prepare(docs):
    """Write a page for each file that a page of `docs` links to, and for each that those link to."""
    sources = [path for path in docs.rglob("*.md") if not {"_build", FOLDER} & set(path.relative_to(docs).parts)]
    waiting, pages = [], {}
    for source in sources:
        waiting += linked_files(source.read_text(encoding="utf-8"), source, docs)
    while waiting:
        path = waiting.pop()
        name = page_name(path, docs)
        if name in pages:
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            waiting += linked_files(text, path, docs)
            pages[name] = "---\norphan: true\n---\n\n" + with_links_to_pages(text, path, docs, name)
        else:
            title = path.relative_to(docs.parent).as_posix()
            include = f"```{{literalinclude}} /../{title}\n:language: {LANGUAGES[path.suffix]}\n```"
            pages[name] = f"---\norphan: true\n---\n\n# `{title}`\n\n{include}\n"
    folder = docs / FOLDER
    for old in folder.rglob("*.md"):
        if old.relative_to(docs).as_posix() not in pages:
            old.unlink()
    for name, text in pages.items():
        target = docs / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def page_name(path, docs):
    """Return the page of a repository's file, relative to `docs`, or None if it has none."""
    name = path.relative_to(docs.parent).as_posix()
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if re.fullmatch(r"lessons/\d\d_\w+\.py", name):
        return name.replace(".py", ".rst")
    if special := {"lessons/README.md": "lessons.rst", "README.md": "index.md"}.get(name):
        return special
    if path.is_file() and path.suffix in {".md", *LANGUAGES}:
        return f"{FOLDER}/{name}" + ("" if path.suffix == ".md" else ".md")
    return None


def linked_files(text, source, docs):
    """Return the files outside `docs` that a page's text links to and that need a page made here."""
    targets = [target for target, _, name in links(text, source, docs) if name and name.startswith(f"{FOLDER}/")]
    return [path for path in targets if path.is_file()]


def links(text, source, docs):
    """Yield the file, the text of the link and the page of each link to a file of the repository."""
    for match in LINK.finditer(text):
        if ":" not in match[1]:
            target = Path(os.path.normpath(source.parent / match[1]))
            if target.is_relative_to(docs.parent):
                yield target, match[1], page_name(target, docs)


def with_links_to_pages(text, source, docs, page):
    """Return a Markdown text with its links to the repository's files as links of the page `page`."""
    here = PurePosixPath(page).parent.as_posix()

    def link(match):
        found = next(links(f"]({match[0]})", source, docs), None)
        if found is None:
            return match[0]
        target, _, name = found
        if name is None:  # a download, or a folder
            name = os.path.relpath(target, docs)
        return Path(os.path.relpath(name, here)).as_posix() + (match[2] or "")

    return LINK.sub(link, text)


def replace_links(app, docname, content):
    """Lead the links of the pages that are written by hand to the pages made here."""
    source = Path(app.env.doc2path(docname))
    docs = Path(app.srcdir)
    if source.suffix == ".md" and not docname.startswith(f"{FOLDER}/"):
        content[0] = with_links_to_pages(content[0], source, docs, f"{docname}.md")


def setup(app):
    app.connect("source-read", replace_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
