"""``tta-sync cache``: look at what caches keep in Redis, and make them forget it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tta_sync.cli import keeper
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError

LIMIT = 5.0  # seconds for an answer of Redis: an operator has more patience than a request
SECRET = "TTA_CACHE_SECRET"  # noqa: S105  # the name of a variable

_ACTIONS = {
    "stats": "count results by namespace, with their bytes, tenants and tags",
    "get": "show the result for one key",
    "invalidate": "forget the result for one key, or all that carry a tag, in every process",
    "bump": "forget all results of a namespace, in every process",
}


class NotPossible(Exception):
    """It cannot be done as asked; the message is one line that says why."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at what caches keep in Redis, and make them forget it. Redis is at --url, else at TTA_REDIS_URL or "
        "REDIS_URL, else the embedded one of a `tta-sync dev` that runs on TTA_DATA_DIR (default: ./data). "
        f"Results that were sealed with a secret are read with the one in {SECRET}. The exit status is 1 if "
        "there is no such namespace or result, and 2 if Redis cannot be asked."
    )
    parser.set_defaults(url=None, prefix="tta:", json=False)
    # Before the action or after it: without defaults of their own, so that the second does not undo the first.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for options in (parser, common):
        options.add_argument("--url", help="redis://, rediss:// or unix://", default=argparse.SUPPRESS)
        options.add_argument(
            "--prefix", help="what the keys in Redis begin with (default: tta:)", default=argparse.SUPPRESS
        )
        options.add_argument("--json", action="store_true", help="write JSON", default=argparse.SUPPRESS)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in _ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary.capitalize() + ".", parents=[common])
        if name == "stats":
            action.add_argument("--namespace", help="this one only")
            continue
        action.add_argument(
            "namespace", metavar="NAMESPACE", help="as `tta-sync cache stats` writes it, or a key in Redis"
        )
        action.add_argument("--version", help="of the cache (default: every version that there is)")
        if name == "bump":
            continue
        action.add_argument("--tenant", help="whose result (default: that of calls without a tenant)")
        help_of_key = 'the data of the call as JSON ({"id": 5}), or what cache_key_fn makes of them; else plain text'
        if name == "get":
            action.add_argument("key", metavar="KEY", nargs="?", help=help_of_key)
        else:
            action.add_argument("--key", help=help_of_key)
            action.add_argument("--tag", action="append", default=[], dest="tags", help="may be given more than once")


def run(arguments: argparse.Namespace) -> int:
    """Do it; return the exit status."""
    try:
        store = Store(redis_url(arguments.url, os.environ), arguments.prefix, os.environ.get(SECRET))
        try:
            answer, text, status = _DO[arguments.action](store, arguments)
        finally:
            store.close()
    except NotPossible as error:
        print(f"tta-sync: {_line(str(error))}", file=sys.stderr)
        return error.status
    except ConfigurationError as error:  # the redis extra is missing, or the URL is none
        print(f"tta-sync: {_line(str(error))}", file=sys.stderr)
        return 2
    print(json.dumps(answer) if arguments.json else "\n".join(map(_line, text)))
    return status


def redis_url(given: str | None, env: Mapping[str, str]) -> str:
    """Return where Redis is.

    Raises:
        NotPossible: nobody says.
    """
    url = given or env.get("TTA_REDIS_URL") or env.get("REDIS_URL")
    if url:
        return url
    address = keeper.read_address(Path(env.get("TTA_DATA_DIR") or "data", "redis"))
    if address is not None and keeper.answers(*address):
        return f"redis://:{address[1]}@127.0.0.1:{address[0]}/0"
    raise NotPossible("no Redis: set REDIS_URL, or write --url redis://host:port/0")


# ---- actions ---------------------------------------------------------------------------------------------------------


def stats(store: Store, arguments: argparse.Namespace) -> tuple[Any, list[str], int]:
    """Count what there is."""
    spaces = store.spaces(arguments.namespace, weigh=True)
    if arguments.namespace is not None and not spaces:
        raise store.no_namespace(arguments.namespace)
    rows = [space.counts() for space in spaces]
    server = store.server()
    lines = table(rows) if rows else ["no cache keeps anything here"]
    lines.append(
        f"Redis: {server['used_memory']} bytes in use of {server['maxmemory'] or 'all'}, "
        f"{server['evicted_keys']} keys evicted, {server['role']}"
    )
    return {"namespaces": rows, "redis": server}, lines, 0


def get(store: Store, arguments: argparse.Namespace) -> tuple[Any, list[str], int]:
    """Show one result."""
    store.locate(arguments)
    if arguments.key is None and arguments.name is None:
        raise NotPossible("say which: tta-sync cache get NAMESPACE KEY")
    found = [(space.version, store.examine(arguments, space)) for space in store.meant(arguments)]
    there = [each for each in found if each[1].fault != "absent"]
    if len(there) > 1:
        raise NotPossible(f"there is one in the versions {', '.join(version for version, _ in there)}: add --version")
    version, examined = (there or found)[0]
    envelope = examined.envelope
    answer: dict[str, Any] = {
        "namespace": arguments.namespace,
        "version": version,
        "tenant": arguments.tenant,
        "name": examined.name,
        "state": examined.fault or "fresh",
        "bytes": examined.size,
    }
    if envelope is not None:
        now = time.time()
        if not examined.fault and now >= envelope.fresh_until:
            answer["state"] = "stale"
        answer |= {
            "created": envelope.created,
            "age": round(now - envelope.created, 3),
            "expires_in": round(envelope.expires_at - now, 3),
            "cost": round(envelope.cost, 6),
            "tags": max(0, len(envelope.versions) - 1),
            "degraded": envelope.degraded,
            "error": envelope.is_error,
            "value": store.as_json(examined.value),
        }
    lines = [f"{name}: {json.dumps(value) if name == 'value' else value}" for name, value in answer.items()]
    return answer, lines, 0 if envelope is not None else 1


def invalidate(store: Store, arguments: argparse.Namespace) -> tuple[Any, list[str], int]:
    """Forget by key, by tag, or by both."""
    store.locate(arguments)
    if arguments.key is None and arguments.name is None and not arguments.tags:
        raise NotPossible("say what to forget: --key KEY or --tag TAG; all of a namespace: tta-sync cache bump")
    spaces = store.meant(arguments)
    for space in spaces:
        store.invalidate(arguments, space)
    versions = [space.version for space in spaces]
    what = [] if arguments.key is None else [f"key {arguments.key}"]
    what += [] if arguments.name is None else [arguments.name]
    what += [f"tag {tag}" for tag in arguments.tags]
    done = {"namespace": arguments.namespace, "versions": versions, "invalidated": what}
    return done, [f"{arguments.namespace}, version {', '.join(versions)}: {', '.join(what)} invalidated"], 0


def bump(store: Store, arguments: argparse.Namespace) -> tuple[Any, list[str], int]:
    """Forget all."""
    spaces = store.meant(arguments)
    for space in spaces:
        store.clear(space)
    versions = [space.version for space in spaces]
    done = {"namespace": arguments.namespace, "versions": versions, "bumped": True}
    return done, [f"{arguments.namespace}, version {', '.join(versions)}: all results are forgotten"], 0


_DO = {"stats": stats, "get": get, "invalidate": invalidate, "bump": bump}


# ---- Redis -----------------------------------------------------------------------------------------------------------


class Space:
    """What there is of one version of one namespace."""

    def __init__(self, namespace: bytes, version: bytes) -> None:
        self.written = namespace.decode(errors="replace")
        self.namespace, self.version = _plain(namespace), _plain(version)
        self.results = self.bytes = self.computing = self.tags = 0
        self.tenants: set[str | None] = set()

    def counts(self) -> dict[str, Any]:
        return {
            "namespace": self.namespace,
            "version": self.version,
            "results": self.results,
            "bytes": self.bytes,
            "tenants": len(self.tenants - {None}),
            "tags": self.tags,
            "computing": self.computing,
        }


class Store:
    """The caches in one Redis."""

    def __init__(self, url: str, prefix: str, secret: str | None) -> None:
        from tta_sync.redis import endpoint

        self._endpoint = endpoint(url)  # first: it says what to do where the library is missing

        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        from tta_sync.primitives.performance import codec, keys

        self._endpoint.bounds.limit = LIMIT
        self._client = Redis.from_url(
            url, socket_timeout=LIMIT, socket_connect_timeout=LIMIT, retry=Retry(NoBackoff(), 0), decode_responses=False
        )
        self._url, self._prefix, self._secret, self._codec, self._keys = url, prefix, secret, codec, keys
        head = re.escape(f"{prefix}{keys.SCHEMA}:".encode())
        self._head = f"{prefix}{keys.SCHEMA}:"
        # No part holds a colon, see keys.prefix; "#" begins what is no result.
        self._result = re.compile(head + rb"([^:#]+):([^:]+):([^:]+):[0-9a-f]{32}(:lock)?")
        self._control = re.compile(head + rb"#:([^:]+):([^:]+):(epoch|news|tag:.+)", re.DOTALL)

    def close(self) -> None:
        self._client.close()

    def _ask(self, question: Any) -> Any:
        from redis.exceptions import RedisError

        try:
            return question()
        except (RedisError, OSError) as error:
            raise NotPossible(f"{self._endpoint.name} cannot be asked: {error}") from None

    # ---- what there is

    def spaces(self, namespace: str | None = None, weigh: bool = False) -> list[Space]:
        """Return what there is, by namespace and version; long names may be given whole, or as they are shown."""
        found: dict[tuple[bytes, bytes], Space] = {}
        wanted = None if namespace is None else (self._keys.prefix(namespace)[:-1].encode(),)
        for names in self._scan():
            results: list[tuple[Space, bytes]] = []
            for name in names:
                result, control = self._result.fullmatch(name), self._control.fullmatch(name)
                match = result or control
                if match is None:
                    continue
                parts = (match[2], match[3]) if result else (match[1], match[2])
                if wanted is not None and parts[0] not in wanted and _plain(parts[0]) != namespace:
                    continue
                space = found.get(parts)
                if space is None:
                    space = found[parts] = Space(*parts)
                if control:
                    space.tags += control[3].startswith(b"tag:")
                elif match[4]:
                    space.computing += 1
                else:
                    space.results += 1
                    space.tenants.add(None if match[1] == b"_" else _plain(match[1]))
                    results.append((space, name))
            if weigh and results:
                for (space, _), size in zip(results, self._sizes([name for _, name in results]), strict=True):
                    space.bytes += size
        return sorted(found.values(), key=lambda space: (space.namespace, space.version))

    def _scan(self) -> Iterator[list[bytes]]:
        cursor: Any = 0
        pattern = re.sub(r"([\\*?\[\]^])", r"\\\1", self._head) + "*"
        while True:
            cursor, names = self._ask(lambda: self._client.scan(cursor, match=pattern, count=1000))  # noqa: B023
            yield names
            if not cursor:
                return

    def _sizes(self, names: list[bytes]) -> list[int]:
        def ask() -> list[Any]:
            with self._client.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.strlen(name)
                return pipe.execute(raise_on_error=False)

        return [size if isinstance(size, int) else 0 for size in self._ask(ask)]  # of another type: none of ours

    def server(self) -> dict[str, Any]:
        told = self._ask(self._client.info)
        return {name: told.get(name) for name in ("used_memory", "maxmemory", "evicted_keys", "role")}

    def meant(self, arguments: argparse.Namespace) -> list[Space]:
        """Return what is meant, by version.

        Raises:
            NotPossible: there is no such namespace.
        """
        there = self.spaces(arguments.namespace)
        if arguments.version is not None:
            there = [space for space in there if space.version == arguments.version]
        if not there:
            raise self.no_namespace(arguments.namespace, arguments.version)
        return there

    def no_namespace(self, namespace: str, version: str | None = None) -> NotPossible:
        known = sorted({space.namespace for space in self.spaces()})
        which = f"{namespace!r}" if version is None else f"{namespace!r} in version {version!r}"
        there = f"there are {', '.join(known[:20])}" if known else "there is none at all"
        return NotPossible(f"no cache has the namespace {which} here: {there}", 1)

    # ---- one namespace

    def locate(self, arguments: argparse.Namespace) -> None:
        """Take a key in Redis, where one was given in the place of a namespace, for what it says."""
        arguments.name = None
        match = self._result.fullmatch(arguments.namespace.encode(errors="surrogateescape"))
        if match is not None and match[4] is None:
            arguments.name = arguments.namespace
            arguments.namespace, arguments.version = _plain(match[2]), _plain(match[3])
            arguments.tenant = None if match[1] == b"_" else _plain(match[1])

    def _cache(self, space: Space) -> Any:
        from tta_sync.primitives.performance import CachePrimitive, RedisBackend

        return CachePrimitive(
            _never,
            storage=RedisBackend(self._url, self._prefix),
            namespace=self._keys.Written(space.written),
            version=space.version,
            secret=self._secret or None,
            max_value_bytes=256 * 2**20,
        )

    def _do(self, work: Any) -> Any:
        from tta_sync.primitives.performance.shared import Bypass

        async def do() -> Any:
            try:
                return await work()
            except Bypass as bypass:
                raise NotPossible(f"{self._endpoint.name} cannot be asked: {bypass.detail}") from None
            except ConnectionError as error:
                raise NotPossible(str(error)) from None

        return asyncio.run(do())

    def examine(self, arguments: argparse.Namespace, space: Space) -> Any:
        layer, context = self._cache(space)._layer, WorkflowContext(tenant=arguments.tenant)
        name = arguments.name and arguments.name.encode()
        key = name or layer.key(self._key(arguments.key), arguments.tenant)
        return self._do(lambda: layer.examine(key, context))

    def invalidate(self, arguments: argparse.Namespace, space: Space) -> None:
        cache = self._cache(space)
        if arguments.key is not None:
            known = self._key(arguments.key)
            self._do(lambda: cache.ainvalidate(known, tenant=arguments.tenant))
        if arguments.name is not None:
            self._do(lambda: cache._layer.forget_key(arguments.name.encode()))
        if arguments.tags:
            self._do(lambda: cache.ainvalidate(tags=arguments.tags))

    def clear(self, space: Space) -> None:
        self._do(self._cache(space).aclear_cache)

    def _key(self, text: str) -> Any:
        try:
            return self._codec.parse(text)
        except ValueError:
            return text

    def as_json(self, value: Any) -> Any:
        """Return *value* as JSON has it; types that JSON does not know are tagged."""
        encoded = self._codec.encode(value)
        return None if encoded is None else json.loads(encoded[1])


async def _never(data: Any) -> Any:
    """Stand for the step of a cache that is only looked at."""
    raise NotPossible("this computes nothing")


# ---- text ------------------------------------------------------------------------------------------------------------


def _plain(part: bytes) -> str:
    """Return what keys.prefix has written as *part*."""
    text = part.decode(errors="replace")
    return re.sub(r"%([0-9A-F]+);", lambda match: chr(int(match[1], 16)), "_" if text == "%5F" else text)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lay *rows* out in columns under their names."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(_line(line[column])) for line in cells) for column in range(len(rows[0]))]
    return [
        "  ".join(
            _line(cell).ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _line(text: str) -> str:
    """Return *text* on one line, without what would move a terminal's cursor: it may be a stranger's."""
    return (
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        .encode(sys.stdout.encoding or "utf-8", "backslashreplace")
        .decode(sys.stdout.encoding or "utf-8")
    )
