"""The public names, and what importing them costs."""

from __future__ import annotations

import builtins
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tta_sync
import tta_sync.primitives as primitives

ROOT = Path(tta_sync.__file__ or "").parent

INTEGRATIONS = [
    "flask", "werkzeug", "rq", "redis", "marshmallow", "sqlalchemy", "httpx", "gunicorn", "prometheus_client",
    "structlog", "opentelemetry", "uvloop", "gevent", "pytest",
]  # fmt: skip

# The contract's table, row by row.
CONTRACT = [
    "WorkflowContext", "WorkflowPrimitive", "LambdaPrimitive", "SequentialPrimitive", "ParallelPrimitive",
    "MapPrimitive", "ConditionalPrimitive", "SwitchPrimitive", "RouterPrimitive", "RetryPrimitive", "RetryStrategy",
    "TimeoutPrimitive", "FallbackPrimitive", "CircuitBreakerPrimitive", "CircuitBreakerConfig",
    "CircuitBreakerError", "CircuitState", "SagaPrimitive", "CompensationPrimitive", "CachePrimitive",
    "CacheBackend", "InMemoryBackend", "RedisBackend", "MemoryPrimitive", "InMemoryStore", "create_memory_key",
    "StreamingPrimitive", "AbstractRepository", "AbstractUnitOfWork", "FakeUnitOfWork", "MockPrimitive",
    "WorkflowTestCase", "InstrumentedPrimitive", "BulkheadPrimitive", "RateLimitPrimitive", "HedgePrimitive",
    "ChaosPrimitive", "MISS",
]  # fmt: skip

# Modules as the library that the seeds describe has them.
MODULES = [
    "core.base", "core.sequential", "core.parallel", "core.conditional", "core.routing", "recovery.retry",
    "recovery.timeout", "recovery.fallback", "recovery.compensation", "recovery.circuit_breaker",
    "recovery.circuit_breaker_primitive", "performance.cache", "performance.memory", "streaming", "persistence",
    "testing.mocks", "observability",
]  # fmt: skip


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; before = set(sys.modules); {statement}; import json; print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)))


@pytest.mark.parametrize("statement", ["import tta_sync", "import tta_sync.primitives", "import tta_sync.exceptions"])
def test_import_loads_no_library_that_is_not_asked_for(statement: str) -> None:
    """Neither an integration library, nor tenacity, nor asgiref.sync, nor asyncio, before the first use."""
    loaded = loaded_by(statement)
    assert not loaded.intersection([*INTEGRATIONS, "tenacity", "asgiref.sync", "asyncio", "unittest"])


def test_import_of_every_primitive_loads_no_library_that_is_not_asked_for() -> None:
    """Composing and running workflows needs none of them either."""
    loaded = loaded_by(
        "import tta_sync.primitives as p; [getattr(p, name) for name in p.__all__ if name != 'WorkflowTestCase']"
    )
    assert not loaded.intersection([*INTEGRATIONS, "tenacity", "asgiref.sync"])


@pytest.mark.parametrize("name", CONTRACT)
def test_contract_names_are_at_the_top_level(name: str) -> None:
    """Every primitive is importable from tta_sync.primitives."""
    assert name in primitives.__all__
    assert getattr(primitives, name) is not None


def test_namespace_is_what_it_says() -> None:
    """``__all__`` and ``dir`` agree, a star import works, and an unknown name is an AttributeError."""
    assert set(primitives.__all__) <= set(dir(primitives))
    namespace: dict[str, object] = {}
    exec("from tta_sync.primitives import *", namespace)
    assert set(primitives.__all__) <= set(namespace)
    core = importlib.import_module("tta_sync.primitives.core")
    assert set(core.__all__) <= set(dir(core))
    recovery = importlib.import_module("tta_sync.primitives.recovery")
    assert set(recovery.__all__) < set(dir(recovery))
    assert set(tta_sync.__all__) <= set(dir(tta_sync))
    for module in (tta_sync, primitives, core, recovery):
        with pytest.raises(AttributeError, match="no attribute 'NothingPrimitive'"):
            module.NothingPrimitive


@pytest.mark.parametrize(
    "module",
    sorted(
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "primitives").rglob("*.py")
    ),
)
def test_star_import_shadows_no_builtin(module: str) -> None:
    """Who imports all of a module still catches Python's own TimeoutError by that name."""
    namespace: dict[str, object] = {}
    exec(f"from {module} import *", namespace)
    shadowed = {name for name, value in namespace.items() if getattr(builtins, name, value) is not value}
    assert not shadowed - {"__builtins__", "__doc__"}


def test_timeout_error_is_importable_by_name() -> None:
    """Under TTA.dev's name, from both places, though no star import gives it."""
    from tta_sync.primitives.recovery import TimeoutError as from_package
    from tta_sync.primitives.recovery.timeout import TimeoutError as from_module

    assert from_package is from_module is tta_sync.exceptions.StepTimeoutError


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("core", "WorkflowContext"),
        ("core.base", "WorkflowContext"),
        ("core.conditional", "ConditionalPrimitive"),
        ("core.conditional", "SwitchPrimitive"),
        ("core.routing", "RouterPrimitive"),
    ],
)
def test_names_are_where_tta_dev_has_them(module: str, name: str) -> None:
    """The same object, wherever it is imported from."""
    assert getattr(importlib.import_module(f"tta_sync.primitives.{module}"), name) is getattr(primitives, name)


def test_type_checkers_see_the_names_that_run() -> None:
    """The imports for type checkers and the table for the interpreter hold the same names."""
    for package in (
        tta_sync,
        primitives,
        importlib.import_module("tta_sync.primitives.core"),
        importlib.import_module("tta_sync.primitives.recovery"),
    ):
        source = Path(package.__file__ or "").read_text()
        seen = source.partition("if TYPE_CHECKING:")[2].partition("_HOMES")[0]
        declared = set(re.findall(r" as (\w+)", seen))
        assert declared - {"TimeoutError"} == set(package.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_where_the_seeds_import_from(module: str) -> None:
    """The import tree below tta_sync.primitives is that of the library which the seeds describe."""
    importlib.import_module(f"tta_sync.primitives.{module}")
