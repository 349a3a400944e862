"""The documentation says what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewbits.cli import application

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_capability_page_is_generated() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "write_capabilities.py"))["page"]
    assert (ROOT / "docs" / "capabilities.md").read_text() == page(), "run: python tools/write_capabilities.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_exist(page: Path) -> None:
    """Every `fewbits VERB --option` that a page shows is one that the command line knows."""
    for line in page.read_text().splitlines():
        for command in re.findall(r"(?:^    |`)fewbits ([a-z]+[^`#]*)", line):
            verb, options = command.split()[0], re.findall(r"(?<!\S)(--[a-z][a-z-]*)", command)
            shown = CliRunner().invoke(application(), [verb, "--help"], env={"COLUMNS": "200"})
            assert shown.exit_code == 0, f"{page.name}: {line.strip()}"
            for option in options:
                assert option in shown.output, f"{page.name}: {line.strip()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link
