"""What the documentation site takes from the code: the configuration reference, and the contributing page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from qbert_ray.config.reference import markdown, rows

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """The pages of the site, with CONTRIBUTING.md of the repository as one of them."""
    files.append(File.generated(config, "contributing.md", content=(ROOT / "CONTRIBUTING.md").read_text()))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """The page with its markers replaced by tables of configuration fields."""
    return fill(text)


def fill(page: str) -> str:
    """A page whose markers are tables of fields: `<!-- fields -->` of all of them, `<!-- fields: a.b c.d -->` of those named.

    Raises:
        ConfigError: a named field does not exist.
    """
    page = re.sub(r"<!-- fields: ([\w. \n<>]+) -->", lambda found: "\n".join(rows(found[1].split())), page)
    return page.replace("<!-- fields -->", markdown()) if "<!-- fields -->" in page else page
