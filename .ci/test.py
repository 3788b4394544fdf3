"""Run the tests with branch coverage, and print pytest's summaries and the coverage total.

Without arguments the tests run in shares, some side by side: most of them wait for processes that they have started.
With arguments pytest gets them, in one process.

Not pytest-cov: it starts after the plugin tta_sync.testing, and with it the half of the package that this imports, has
been loaded. What subprocesses of the tests measured is combined.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO

import coverage
import pytest

# The longest first: whoever has finished one takes the next.
SHARES = [
    ["tests/runtime"],
    ["tests/e2e"],
    ["tests/rq", "--ignore-glob=*/test_outbox*"],
    ["tests/primitives"],
    sorted(map(str, Path("tests/rq").glob("test_outbox*"))),
    ["tests/service"],
    ["tests/seams"],
    ["tests/cli", "tests/compat"],
]
AT_ONCE = 4  # most wait for processes that they have started
OUTCOME = re.compile(r"(\d+) (passed|failed|error|skipped|xfailed)")


def run_here(arguments: list[str]) -> int:
    """Run pytest in this process; leave what was measured in a data file of its own."""
    measured = coverage.Coverage()  # as setup.cfg says
    with measured.collect():
        status = pytest.main(arguments)
    measured.save()
    return int(status)


def shares() -> list[list[str]]:
    """Return what each share runs: the last one all that the others leave."""
    named = {path for share in SHARES for path in share}
    rest = [str(path) for path in sorted(Path("tests").iterdir()) if path.is_dir() or path.name.startswith("test_")]
    return [*SHARES, [path for path in rest if path not in named and "__pycache__" not in path]]


def start(share: list[str]) -> tuple[list[str], IO[str], subprocess.Popen[bytes]]:
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # read when the share has ended
    command = [sys.executable, __file__, "--here", "-q", "-p", "no:cacheprovider", *share]
    return share, output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def run_shares() -> int:
    """Run the shares, AT_ONCE side by side, print each one's output when it ends, and add up."""
    totals: Counter[str] = Counter()
    status = 0
    waiting = shares()
    running: list[tuple[list[str], IO[str], subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.append(start(waiting.pop(0)))
            ended = [entry for entry in running if entry[2].poll() is not None]
            for entry in ended:
                running.remove(entry)
                share, output, process = entry
                output.seek(0)
                text = output.read()
                print(f"---- {' '.join(share)}\n{text}", flush=True)
                # 5: no tests were collected, which for a whole share is a failure as well
                status = status or process.returncode
                for count, outcome in OUTCOME.findall(text.rstrip().rpartition("\n")[2]):
                    totals[outcome] += int(count)
            if not ended:
                time.sleep(0.1)
    finally:
        for _, _, process in running:
            process.terminate()
        for _, _, process in running:
            process.wait()
    failed = totals["failed"] + totals["error"]
    print(f"{totals['passed']} passed, {failed} failed, {totals['skipped']} skipped\n")
    return status


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the fixtures end what they started
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours
    if arguments[:1] == ["--here"]:
        return run_here(arguments[1:])
    measured = coverage.Coverage()
    measured.erase()
    status = run_here(arguments) if arguments else run_shares()
    measured.combine(keep=False)
    measured.report(show_missing=False, skip_covered=True)
    return status


sys.exit(main(sys.argv[1:]))
