"""The long description of the package. The other metadata is in setup.cfg."""

import re
from pathlib import Path

from setuptools import setup

# Set this at a release, for example to "https://github.com/OWNER/tinyvit/blob/v0.1.0". A package index shows the
# README outside the repository, where only absolute links work.
ADDRESS = ""


def absolute_links(text, address):
    """Return Markdown text whose relative links and pictures begin with the address."""
    pictures = re.sub(r"(!\[[^\]]*\]\()(?!https?:)([^)]+)\)", rf"\1{address}/\2?raw=true)", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)([^)]+)\)", rf"\1{address}/\2)", pictures)


if __name__ == "__main__":
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute_links(readme, ADDRESS) if ADDRESS else readme,
        long_description_content_type="text/markdown",
    )
