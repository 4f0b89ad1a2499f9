"""The site's settings. Pages come from the notebooks by pages.py; their saved outputs are shown as they are."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "ftlib"
author = "The ftlib authors"
copyright = author
version = release = re.search(r'^__version__ = "(.+)"', (ROOT / "ftlib" / "__init__.py").read_text(), re.M)[1]

extensions = ["myst_nb"]
exclude_patterns = ["**.ipynb_checkpoints"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"  # what libraries tell their developers
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# A room shows its functions (third level) right under its title.
suppress_warnings = ["myst.header"]

html_theme = "sphinx_book_theme"
html_title = "ftlib"
html_static_path = ["static"]
html_css_files = ["ftlib.css"]
html_favicon = "static/mark.svg"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"image_light": "static/mark.svg", "image_dark": "static/mark.svg", "text": "ftlib"},
    "navbar_persistent": [],
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "pygments_light_style": "friendly",
    "pygments_dark_style": "github-dark",
}
