# make run     the service, from nothing: .venv, Redis, database, gunicorn and an RQ worker
# make test    the tests, with branch coverage        make test ARGS="tests/cli -k batch"
# make check   ruff, mypy, import contracts
# make bench   the benchmarks of docs/benchmarks.md

# The first interpreter that fits: 3.11 and 3.12 first, for which there is an embedded Redis.
PYTHON ?= $(shell for python in .venv/bin/python python3.12 python3.11 python3 python3.14 python3.13 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# Each recipe execs: a signal to make, which it hands on to its child, reaches the program itself.
with = @test -n "$(PYTHON)" || { echo "no Python 3.11 or newer on PATH" >&2; exit 1; }; exec $(PYTHON) .ci/environment.py

.PHONY: run test check bench

run:
	$(with) service .venv/bin/tta-sync dev

test:
	$(with) service,dev .venv/bin/python .ci/test.py $(ARGS)

check:
	$(with) service,dev
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

bench:
	$(with) service,dev,bench .venv/bin/python -m benchmarks $(ARGS)
