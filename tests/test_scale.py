"""The plan on paper: its page shows what the command prints, and its queue behaves as queues do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate.py"])
    runpy.run_path(str(ROOT / "tools" / "scale" / "simulate.py"), run_name="__main__")
    page = (ROOT / "docs" / "scale.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("|"):
            assert line in page, "put what tools/scale/simulate.py prints into docs/scale.md"


def test_waiting_grows_with_the_load_and_work_is_kept() -> None:
    hub = runpy.run_path(str(ROOT / "tools" / "scale" / "simulate.py"))["hub"]
    services = [(0.9, 0.5), (0.1, 5.0)]  # 0.95 hours on average
    few, many = (hub(services, 240, machines, 1e9) for machines in (11, 20))
    assert few.p99_wait > 1 > many.p99_wait and many.median_wait == 0 == few.failures
    assert many.utilisation == pytest.approx(240 / 24 * 0.95 / 20, rel=0.2)
    kept, lost = (hub(services, 240, 20, 20.0, lost=share) for share in (0.02, 1.0))
    assert kept.failures > 0 and lost.utilisation > kept.utilisation > many.utilisation
