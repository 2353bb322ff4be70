"""Configuration of Sphinx: `make docs` builds the site from the README, docs/, the notebooks and the docstrings.

The root of the repository is the source folder, so that links between its Markdown files hold in the site as they are.
"""

import io
import logging
import sys
from pathlib import Path

import nbconvert
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the models are not installed

from docstrings import convert_docstring, remove_object, skip_fields  # noqa: E402
from mathml import visit_math  # noqa: E402

logging.getLogger("arviz").setLevel(logging.WARNING)  # it tells of its parts when it is imported

project = "pyro_vnd"
author = "The pyro_vnd authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/*/*.md", "notebooks/*.ipynb"]
exclude_patterns = ["docs/contents.md", "**/.*", "results"]

html_theme = "furo"
html_title = "pyro_vnd"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_show_copyright = html_show_sphinx = html_copy_source = False
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the README, the first page, the contents of the site; drop the empty line that ends a doctest."""
    if docname == root_doc:
        source[0] += (ROOT / "docs" / "contents.md").read_text()
    source[0] = source[0].replace("\n\n```", "\n```")


class NotebookParser(MystParser):
    """Reads an executed notebook as Markdown, its figures in it."""

    supported = ("ipynb",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the text of a notebook."""
        exporter = nbconvert.MarkdownExporter(config={"ExtractOutputPreprocessor": {"enabled": False}})
        markdown, _ = exporter.from_file(io.StringIO(inputstring))
        super().parse(markdown, document)


def setup(app: Sphinx) -> None:
    """Register all of the above."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    app.connect("source-read", prepare)
    app.connect("doctree-read", remove_object)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
