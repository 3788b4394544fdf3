"""Measure, compare within one run, and write down what was measured: as text, as a page, as a picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


@contextmanager
def pinned() -> Iterator[None]:
    """Keep the process on one core: unpinned, a thread switch costs one of two amounts, as the cores fall."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def median_us(call: Callable[[], object], repeat: int) -> float:
    """Return the median duration of *call* in microseconds, after a tenth as many unmeasured ones."""
    for _ in range(max(repeat // 10, 10)):
        call()
    clock = time.perf_counter
    samples = []
    for _ in range(repeat):
        began = clock()
        call()
        samples.append(clock() - began)
    return statistics.median(samples) * 1e6


@dataclass
class Goal:
    """What a figure must reach: ``at most`` or ``at least`` *ratio* times the figure of *peer*."""

    peer: str
    ratio: float
    at_least: bool = False

    def text(self, own: float, peer: float) -> str:
        reached = own / peer
        kept = reached >= self.ratio if self.at_least else reached <= self.ratio
        sign = "≥" if self.at_least else "≤"
        return f"{reached:.2f} × {self.peer} (goal {sign} {self.ratio:g}){'' if kept else ' MISSED'}"


@dataclass
class Table:
    """One comparison: a figure per contestant, and what ours must reach."""

    name: str
    title: str
    unit: str
    better: str = "less"
    figures: dict[str, float] = field(default_factory=dict)
    goals: dict[str, list[Goal]] = field(default_factory=dict)
    note: str = ""

    def add(self, who: str, figure: float, *goals: Goal) -> None:
        self.figures[who] = figure
        if goals:
            self.goals[who] = list(goals)

    def verdicts(self, who: str) -> list[str]:
        return [
            goal.text(self.figures[who], self.figures[goal.peer])
            for goal in self.goals.get(who, [])
            if self.figures.get(goal.peer)
        ]

    def lines(self) -> list[str]:
        width = max(map(len, self.figures))
        return [
            f"  {who:{width}s} {_number(figure):>10s} {self.unit}  {'; '.join(self.verdicts(who))}"
            for who, figure in self.figures.items()
        ]

    def show(self) -> None:
        print(f"\n{self.title} ({self.better} is better)", *self.lines(), sep="\n", flush=True)
        if self.note:
            print(f"  {self.note}", flush=True)

    def markdown(self) -> str:
        rows = [
            f"| {who} | {_number(figure)} | {'; '.join(self.verdicts(who))} |" for who, figure in self.figures.items()
        ]
        head = [f"## {self.title}", "", f"| | {self.unit} | ratio, in the same run |", "|---|---:|---|"]
        picture = f"![{self.title}](benchmarks/{self.name}.svg)"
        return "\n".join([*head, *rows, "", *([self.note, ""] if self.note else []), picture, ""])

    def draw(self, folder: Path) -> None:
        """Draw the figures as bars, ours marked."""
        import matplotlib as mpl

        mpl.use("svg")
        mpl.rcParams["svg.hashsalt"] = "tta_sync"  # the same figures give the same file
        from matplotlib import pyplot

        names = list(self.figures)[::-1]
        values = [self.figures[name] for name in names]
        figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.36 * len(names)))
        colours = ["#1f6f5c" if name.startswith("tta_sync") else "#b9c2c8" for name in names]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [f" {_number(value)}" for value in values])
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(f"{self.unit} ({self.better} is better)")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3g}"


def machine(*packages: str) -> str:
    """Say on what the figures were measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages if _installed(name))
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return (
        f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores ({cpu}); {versions}."
    )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write_page(name: str, title: str, introduction: str, tables: list[Table], versions: str) -> None:
    """Write ``docs/<name>.md`` and its pictures."""
    for table in tables:
        table.draw(DOCS)
    page = DOCS.parent / f"{name}.md"
    text = "\n".join(
        [f"# {title}", "", introduction, "", f"Measured on {versions}", "", *(t.markdown() for t in tables)]
    )
    page.write_text(text.rstrip() + "\n")
    print(f"\nwrote {page}", file=sys.stderr)
