"""Run the tests with branch coverage, and print pytest's summaries and the coverage total.

Without arguments the tests run in three shares side by side: most of them wait for processes that they have started.
With arguments pytest gets them, in one process.

Not pytest-cov: it starts after the plugin tta_sync.testing, and with it the half of the package that this imports, has
been loaded. What subprocesses of the tests measured is combined.
"""

import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import coverage
import pytest

SHARES = [["tests/cli", "tests/e2e"], ["tests/compat", "tests/seams", "tests/service"]]
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


def run_shares() -> int:
    """Run all shares side by side, print each one's output when it ends, and add up."""
    totals: Counter[str] = Counter()
    status = 0
    running = []
    for share in shares():
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # read when the share has ended
        command = [sys.executable, __file__, "--here", "-q", "-p", "no:cacheprovider", *share]
        running.append((share, output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)))
    try:
        for share, output, process in running:
            process.wait()
            output.seek(0)
            text = output.read()
            print(f"---- {' '.join(share)}\n{text}", flush=True)
            # 5: no tests were collected, which for a whole share is a failure as well
            status = status or process.returncode
            for count, outcome in OUTCOME.findall(text.rstrip().rpartition("\n")[2]):
                totals[outcome] += int(count)
    finally:
        for _, _, process in running:
            if process.poll() is None:
                process.terminate()
        for _, _, process in running:
            process.wait()
    failed = totals["failed"] + totals["error"]
    print(f"{totals['passed']} passed, {failed} failed, {totals['skipped']} skipped\n")
    return status


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the fixtures end what they started
    if arguments[:1] == ["--here"]:
        return run_here(arguments[1:])
    measured = coverage.Coverage()
    measured.erase()
    status = run_here(arguments) if arguments else run_shares()
    measured.combine(keep=False)
    measured.report(show_missing=False, skip_covered=True)
    return status


sys.exit(main(sys.argv[1:]))
