"""Mutation fuzzing of everything that reads strangers' files.

python tools/fuzz/campaign.py gguf --executions 250000 --seed 1

Each execution changes a small valid file a little and reads it in all the ways that the verbs do. Either that works or
it ends in a FewbitsError; everything else is a find: another exception, more than `MEMORY` beyond what the process had,
more than `SECONDS` of computing. tests/test_hostile.py runs the same targets under hypothesis for a moment.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))
from mutations import Draw, mutated
from targets import TARGETS, Case, Target

from fewbits.errors import FewbitsError

MEMORY = 1 << 30
"""More than the largest reasonable buffer, less than what one lying length asks for."""
SECONDS = 5.0


class Hang(BaseException):
    """Raised by the timer, past every `except Exception`."""


def judged(read: Callable[[], None]) -> BaseException | None:
    """What went wrong in reading, None where it worked or was refused in the proper way."""
    try:
        read()
    except FewbitsError as error:
        message = str(error)
        if not message.isprintable() and any(ord(letter) < 32 for letter in message):
            return error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust extension is no Exception
        if isinstance(error, MemoryError):
            traceback.clear_frames(error.__traceback__)  # what was allocated before it was refused
        return error
    return None


def run_case(target: Target, case: Case, folder: Path, draw: Draw) -> tuple[BaseException | None, dict[str, bytes]]:
    """Change one file of a case that lies in `folder`, read it and put the file back.

    Returns:
        What went wrong, and the changed file by name.
    """
    names = target.mutable(case)
    name = names[draw(len(names))]
    data = mutated(case.files[name], case.kind(name), draw)
    path = folder / name
    path.write_bytes(data)
    try:
        return judged(lambda: target.read(folder)), {name: data}
    finally:
        path.write_bytes(case.files[name])


def place(error: BaseException) -> str:
    """Kind of an error and the last line of our own in it, by which finds are told apart."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fewbits/" in frame.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {last}"


def campaign(target: Target, executions: int, seed: int, folder: Path, keep: Path | None) -> dict[str, int]:
    """Run one target. Finds are printed as they come; their files are kept under `keep`."""
    rng = random.Random(f"{target.name} {seed}")
    cases = target.cases(folder / "made", False)
    for number, case in enumerate(cases):
        case.write(folder / str(number))
        target.read(folder / str(number))  # a seed that is not valid would hide everything behind it
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGVTALRM, _hang)
    finds: dict[str, int] = {}
    started = time.monotonic()
    for execution in range(1, executions + 1):
        number = rng.randrange(len(cases))
        before = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            error, changed = run_case(target, cases[number], folder / str(number), rng.randrange)
        except Hang as hang:
            error, changed = hang, {}
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if error is None and time.process_time() - before > SECONDS:
            error = Hang("slow")
        if error is not None:
            where = place(error)
            finds[where] = finds.get(where, 0) + 1
            if finds[where] == 1:
                print(f"FIND {target.name} execution {execution}: {where}: {str(error)[:200]!r}", flush=True)
                _keep(keep, f"{target.name}-{len(finds)}", cases[number], changed, error)
        if execution % 10000 == 0 or execution == executions:
            rate = execution / (time.monotonic() - started)
            print(f"{target.name}: {execution} executions, {len(finds)} finds, {rate:.0f}/s", flush=True)
    return finds


def _hang(_: int, frame: FrameType | None) -> None:
    raise Hang(f"{SECONDS} s of computing")


def _keep(keep: Path | None, name: str, case: Case, changed: dict[str, bytes], error: BaseException) -> None:
    if keep is None:
        return
    folder = keep / name
    shutil.rmtree(folder, ignore_errors=True)
    case.write(folder)
    for file, data in changed.items():
        (folder / file).write_bytes(data)
    (keep / f"{name}.txt").write_text("".join(traceback.format_exception(error)), errors="replace")


def main() -> int:
    """Exit code 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--executions", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for files that made finds")
    parser.add_argument("--scratch", type=Path, help="folder for the files under test, best in memory (/dev/shm)")
    options = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        finds = campaign(TARGETS[options.target], options.executions, options.seed, Path(folder), options.keep)
    print(
        json.dumps({"target": options.target, "executions": options.executions, "seed": options.seed, "finds": finds})
    )
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
