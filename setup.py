"""The long description of the package. The other metadata is in setup.cfg."""

import re
from pathlib import Path

from setuptools import setup

# Set this at a release to the address of the released files, for example "https://github.com/OWNER/tinyvit/blob/v0.2.0".
# A package index shows the README outside the repository, where only absolute links work.
ADDRESS = ""


def absolute_links(text, address):
    """Return Markdown text whose relative links and pictures begin with the address."""
    pictures = re.sub(r"(!\[[^\]]*\]\()(?!https?:)([^)]+)\)", rf"\1{address}/\2?raw=true)", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)([^)]+)\)", rf"\1{address}/\2)", pictures)


def project_links(address):
    """Return the links of the package: those to the sources of the model, and the project's own at a release."""
    links = {
        "Technical note": "https://github.com/chama-x/ViT-model-on-the-MNIST-dataset",
        "Vision Transformer paper": "https://arxiv.org/abs/2010.11929",
    }
    if address:
        links["Source"] = address.partition("/blob/")[0]
        links["Documentation"] = f"{address}/docs/guide/index.md"
        links["Changelog"] = f"{address}/CHANGELOG.md"
    return links


if __name__ == "__main__":
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute_links(readme, ADDRESS) if ADDRESS else readme,
        long_description_content_type="text/markdown",
        project_urls=project_links(ADDRESS),
    )
