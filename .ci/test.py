"""Run pytest with branch coverage and print the total.

Not pytest-cov: it starts after the plugin tta_sync.testing, and with it the half of the package that this imports, has
been loaded. What subprocesses of the tests measured is combined.
"""

import signal
import sys

import coverage
import pytest

signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the fixtures end what they started
measured = coverage.Coverage()  # as setup.cfg says
measured.erase()
with measured.collect():
    status = pytest.main(sys.argv[1:])
measured.save()
measured.combine(keep=False)
measured.report(show_missing=False, skip_covered=True)
sys.exit(status)
