"""Sphinx's configuration: MyST pages, the PyData theme, the Python API from docstrings.

`make docs` builds with warnings as errors and without a network.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "sps2_mega"
author = "The sps2_mega authors"
copyright = author
html_title = "sps2_mega"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "config_fields"]
default_role = "literal"  # docstrings put code between single backquotes
smartquotes = False
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["results/*.json", "figures"]
suppress_warnings = ["myst.header"]  # generated result tables start at the third level
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
myst_all_links_external = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
