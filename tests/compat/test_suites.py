"""asgiref's and Flask's own tests, from their source distributions, with async_to_sync replaced by ours."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "sdists"
PLUGINS = Path(__file__).with_name("plugin")

# sha256 of what PyPI serves. For another version, pip's own check against its index has to do.
KNOWN = {
    "asgiref-3.13.0": "034cc8cbf72d00553b4be256703ac545120b4e50af13b49dec99da899aeeecb4",
    "flask-3.1.3": "0ef0e52b8a9cd932855379197dd8f94047b359ca0a78695144304cb45f87c9eb",
}


# ------------------------------------------------------------------------------------------------------- sources


def source_distribution(project: str) -> Path:
    """Return the source distribution of the installed version of *project*: from the cache, else by pip.

    Skips the test where there is neither a cache nor an index within reach.
    """
    name = f"{project}-{importlib.metadata.version(project)}"
    cached, noted = CACHE / f"{name}.tar.gz", CACHE / f"{name}.sha256"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            fetched = download(name.replace("-", "=="), Path(directory))
            noted.write_text(sha256(fetched))
            fetched.replace(cached)  # at once: somebody else may be doing the same
    assert sha256(cached) == KNOWN.get(name, noted.read_text()), f"{cached} is not what it was: remove it"
    return cached


def download(requirement: str, directory: Path) -> Path:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "1",
        "--timeout",
        "20",
    ]
    project = requirement.partition("==")[0]
    fetch = subprocess.run(
        [*pip, "download", "--no-deps", "--no-binary", project, "--dest", directory, requirement],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if fetch.returncode:
        if "connection broken" in fetch.stdout:
            pytest.skip(f"no source distribution of {requirement} in {CACHE}, and no package index within reach")
        pytest.fail(f"pip could not download the source distribution of {requirement}:\n{fetch.stdout}")
    (fetched,) = directory.glob("*.tar.gz")
    return fetched


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """What one run of a suite came to."""

    outcomes: dict[str, str]
    managed_calls: int
    output: str


class Suite:
    """One project's tests, run several times side by side: as stock, and on each kind of managed loop."""

    def __init__(self, project: str, config: str, plugins: list[str], kinds: list[str], directory: Path) -> None:
        with tarfile.open(source_distribution(project)) as archive:
            archive.extractall(directory, filter="data")
        (sources,) = directory.iterdir()
        self.stock = _Started(directory / "stock", sources, config, plugins, None)
        self.ours = {kind: _Started(directory / kind, sources, config, plugins, FACADES[kind]) for kind in kinds}

    def kill(self) -> None:
        for run in self.stock, *self.ours.values():
            run.kill()


FACADES: dict[str, dict[str, Any]] = {"thread": {}, "uvloop": {"use_uvloop": True}, "caller": {"drive": "caller"}}


class _Started:
    """One run on its way."""

    def __init__(
        self, directory: Path, sources: Path, config: str, plugins: list[str], options: dict[str, Any] | None
    ) -> None:
        directory.mkdir()
        self._report, self._junit, self._log = (directory / name for name in ("report.json", "junit.xml", "log"))
        # The installed package is under test, not the one beside the tests.
        command = [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-c",
            sources / config,
            "--rootdir",
            sources,
            sources / "tests",
        ]
        for plugin in plugins:
            command += ["-p", plugin]
        command += ["-p", "no:cacheprovider", f"--junitxml={self._junit}", f"--basetemp={directory / 'tmp'}"]
        foreign = ("PYTEST_", "COV", "TTA_", "FLASK_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment |= {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(PLUGINS),  # and not the checkout: Flask would find its wsgi.py
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if options is not None:
            environment |= {"REPLACED_REPORT": str(self._report), "REPLACED_OPTIONS": json.dumps(options)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=sources, start_new_session=True
            )

    def end(self, within: float = 100.0) -> Run:
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the suite hung; it said:\n{self._log.read_text()}")
        output = self._log.read_text()
        assert self._junit.exists(), output
        outcomes = {}
        for case in ElementTree.parse(self._junit).iter("testcase"):
            told = [child.get("type") or child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            outcomes[f"{case.get('classname')}::{case.get('name')}"] = " ".join(told) or "passed"
        calls = json.loads(self._report.read_text())["calls"] if self._report.exists() else 0
        return Run(outcomes, calls, output)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="session")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Suite]]:
    """Both suites, all their runs under way at once: asgiref's mostly sleep."""
    plugins = ["async_to_sync_replaced"]
    started = {
        "asgiref": Suite(
            "asgiref",
            "setup.cfg",
            [*plugins, "pytest_asyncio.plugin"],
            list(FACADES),
            tmp_path_factory.mktemp("asgiref"),
        ),
        "flask": Suite("flask", "pyproject.toml", plugins, ["thread"], tmp_path_factory.mktemp("flask")),
    }
    yield started
    for suite in started.values():
        suite.kill()


def lost(stock: Run, ours: Run) -> dict[str, str | None]:
    """Return what came out well as stock and did not with ours."""
    return {
        name: ours.outcomes.get(name)
        for name, outcome in stock.outcomes.items()
        if outcome in WELL and ours.outcomes.get(name) != outcome
    }


WELL = {"passed", "skipped", "pytest.skip", "pytest.xfail"}


@pytest.mark.parametrize("kind", FACADES)
def test_asgirefs_own_tests_come_out_as_stock_when_async_to_sync_is_ours(suites: dict[str, Suite], kind: str) -> None:
    """Every test of asgiref passes on the managed loop, but for the one that asgiref expects to fail."""
    stock, ours = suites["asgiref"].stock.end(), suites["asgiref"].ours[kind].end()
    assert lost(stock, ours) == {}, ours.output
    outcomes = Counter(ours.outcomes.values())
    assert set(outcomes) <= WELL, ours.output
    assert outcomes["passed"] > 100, ours.output
    assert stock.managed_calls == 0 < ours.managed_calls


def test_flasks_own_tests_come_out_as_stock_when_async_to_sync_is_ours(suites: dict[str, Suite]) -> None:
    """Every test of Flask comes out on the managed loop as it does without, and all of those of async views pass."""
    stock, ours = suites["flask"].stock.end(), suites["flask"].ours["thread"].end()
    assert lost(stock, ours) == {}, ours.output
    of_async_views = [outcome for name, outcome in ours.outcomes.items() if "tests.test_async::" in name]
    assert of_async_views == ["passed"] * 8, ours.output
    assert Counter(ours.outcomes.values())["passed"] > 400, ours.output
    assert stock.managed_calls == 0 < ours.managed_calls
