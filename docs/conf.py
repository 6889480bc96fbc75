"""The documentation site: ``make docs``.

Sphinx, MyST and Furo: all three are maintained and released with each other, the pages stay plain
Markdown that GitHub shows too, and autodoc reads the docstrings as they are.
"""

from __future__ import annotations

import re
from importlib.metadata import version as installed
from typing import Any

project = "fused_dni"
author = "The fused_dni maintainers"
release = installed("fused-dni")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["verdict"]  # figures alone
highlight_language = "text"

# Anchors of headings as GitHub makes them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# What a docstring refers to is on one of the pages, or PyTorch's or Python's.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|nn|collections|os)\..*|Tensor|Loss|Stateful")]

html_theme = "furo"
html_title = f"fused_dni {release}"
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["site.css"]


def entries(inside: list[str]) -> list[str]:
    """The lines of a section, an entry on a line of its own: several may share one."""
    made = []
    for line in inside:
        shared = re.split(r"\. (?=\w+: )", line) if re.match(r" {4}\w", line) else [line]
        # A letter with a full stop would be the beginning of a list.
        made += [
            re.sub(r": ([A-Z])\.$", r": \1", " " * 4 * (n > 0) + p) for n, p in enumerate(shared)
        ]
    return made


def sections(*given: Any) -> None:
    """Write a docstring's Attributes as a list, an entry of Args on each line, and what it says
    under Returns as one paragraph; in place."""
    lines: list[str] = given[-1]
    for title in ("Args:", "Attributes:", "Returns:"):
        if title not in lines:
            continue
        start = lines.index(title)
        stop = start + 1
        while stop < len(lines) and (not lines[stop] or lines[stop].startswith(" ")):
            stop += 1
        inside = entries(lines[start + 1 : stop])
        if title == "Args:":
            made = [title, *inside]
        elif title == "Returns:":
            made = [":returns: " + " ".join(line.strip() for line in inside)]
        else:
            made = [".. rubric:: Attributes", ""]
            for line in inside:
                entry = re.match(r" {4}([\w\[\], .]+): (.*)", line)
                made.append(f"* ``{entry[1]}``: {entry[2]}" if entry else f"  {line.strip()}")
        lines[start:stop] = [*made, ""]


def setup(app: Any) -> None:
    # In front of Napoleon, which takes the sections that are left.
    app.connect("autodoc-process-docstring", sections, priority=100)
