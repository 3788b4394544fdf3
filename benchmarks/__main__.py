"""Run the benchmarks: ``make bench``, or one of them with ``make bench ARGS="bridge --quick"``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "report")


def main(arguments: list[str]) -> None:
    names, options = (arguments[:1], arguments[1:]) if arguments and arguments[0] in NAMES else (NAMES, arguments)
    if options and not options[0].startswith("-"):
        sys.exit(f"there is no benchmark {options[0]!r}: choose from {', '.join(NAMES)}")
    for name in names:
        print(f"==== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main(options)


main(sys.argv[1:])
