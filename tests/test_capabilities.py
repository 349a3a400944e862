"""The capability table: targets that leave the bits open are in it, and are what planning takes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import fewbits
from fewbits.cli import application
from fewbits.layouts import LAYOUTS
from fewbits.plan.directory import target

OPEN = {row.name: row for row in fewbits.capabilities().open_directories}


def test_every_ecosystem_with_open_targets_is_there() -> None:
    families = {name for name, layout in LAYOUTS.items() if layout.open_specs}
    assert {"gptq", "ct", "hqq"} <= families == {name.partition(":")[0] for name in OPEN}
    assert {"gptq:g64", "ct:a16g128", "hqq:g64"} <= set(OPEN)
    assert not set(OPEN) & {row.name for row in fewbits.capabilities().directories}


@pytest.mark.parametrize("name", OPEN)
def test_open_targets_are_what_planning_takes(name: str) -> None:
    row = OPEN[name]
    found = target(name, None, calibrated=True, decided=True)
    assert found.open and [layout.type.bits for layout in found.members] == row.widths
    assert found.method == row.methods[0]
    assert [layout.type.bits for layout in found.among(()).members] == [
        bits for bits in row.widths if bits not in row.named_widths
    ]
    assert min(row.widths) <= row.least < row.most and row.most >= max(row.widths)
    assert all(str(bits) in row.choice for bits in row.widths)


def test_the_list_shows_them() -> None:
    shown = CliRunner().invoke(application(), ["list"])
    assert shown.exit_code == 0, shown.output
    line = next(line for line in shown.stdout.splitlines() if line.startswith("gptq:g128 "))
    assert "2, 3, 4, 8" in line and "gptqmodel" in line
    data = json.loads(CliRunner().invoke(application(), ["list", "--json"]).stdout)
    assert {row["name"] for row in data["open_directories"]} == set(OPEN)
