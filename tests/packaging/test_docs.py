"""Documents name files that exist, and link to pages that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_pages_that_a_document_names_exist(page: Path) -> None:
    text = page.read_text()
    files = re.findall(r"(?<![\w/.-])((?:quant|offload|cli|tests|recipes)/[a-z0-9_/-]+\.\w+)", text)  # COMMAND: any
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [link for link in links if not (page.parent / link).exists()] == []
