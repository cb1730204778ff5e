"""How the documentation is built: `make docs`.

The source directory is the root of the repository, so that the pages link to one another as they
do where the repository is browsed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx

import patrol_prune

HERE = Path(__file__).parent
shutil.rmtree(HERE / "api", ignore_errors=True)  # pages of names that may be gone

project = "patrol-prune"
author = "the patrol-prune authors"
copyright = author  # noqa: A001
version = release = patrol_prune.__version__

root_doc = "docs/index"
include_patterns = [
    "README.md", "CHANGELOG.md", "SECURITY.md", "docs/**", "integrations/*/README.md",
]
exclude_patterns = [".*", "**/.*", "build", "dist", "runs", "docs/_*"]
templates_path = [str(HERE / "_templates")]  # else relative to the source

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon",
]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "config.cache"]  # pages may begin at a second heading

autosummary_imported_members = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"  # and what is returned
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"  # docstrings are in Markdown's manner: `name` is code
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"patrol-prune {release}"
html_copy_source = False


def begin_at_the_index(app: Sphinx, exception: Exception | None) -> None:
    """`index.html` where readers and servers look for it."""
    if exception is None and app.builder.format == "html":
        Path(app.outdir, "index.html").write_text(
            '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">'
            '<a href="docs/index.html">patrol-prune</a>\n', "utf-8")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", begin_at_the_index)
