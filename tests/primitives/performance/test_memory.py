"""What a conversation remembers, in this process or in Redis."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import redis

from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives import InMemoryStore, MemoryPrimitive, create_memory_key


def test_records_are_found_by_key_when_they_were_added() -> None:
    """get returns what was added last, None for nothing; clear forgets all."""
    store = InMemoryStore()
    store.add("a", {"text": "one"})
    store.add("a", {"text": "two"})
    assert store.get("a") == {"text": "two"}
    assert store.get("b") is None
    assert store.size() == 1
    store.discard("a")
    store.discard("a")
    assert store.size() == 0
    store.add("a", 1)
    store.clear()
    assert store.get("a") is None


def test_records_are_copies_when_they_go_in_and_out() -> None:
    """Nobody who changes a record changes what others get."""
    store = InMemoryStore()
    record = {"items": [1]}
    store.add("a", record)
    record["items"].append(2)
    got = store.get("a")
    got["items"].append(3)
    store.search("items")[0]["items"].append(4)
    assert store.get("a") == {"items": [1]}


def test_least_recently_used_record_goes_first_when_the_store_is_full() -> None:
    """get counts as use; max_size is never exceeded."""
    store = InMemoryStore(max_size=2)
    store.add("a", 1)
    store.add("b", 2)
    store.get("a")
    store.add("c", 3)
    assert [store.get(key) for key in "abc"] == [1, None, 3]
    assert store.size() == 2


def test_search_finds_the_latest_first_when_a_word_occurs_in_key_or_text() -> None:
    """Whatever the case; at most limit records, 5 by default."""
    store = InMemoryStore()
    for number in range(8):
        store.add(f"note:{number}", {"text": f"Paris {number}"})
    store.add("paris", {"text": "by its key"})
    assert store.search("PARIS") == [{"text": "by its key"}, *({"text": f"Paris {n}"} for n in (7, 6, 5, 4))]
    assert store.search("paris 3", limit=1) == [{"text": "Paris 3"}]
    assert store.search("london") == []
    assert store.search("paris", limit=0) == []


def test_record_is_refused_when_it_cannot_be_copied() -> None:
    """What cannot be copied cannot be remembered."""
    with pytest.raises(ConfigurationError, match="a lock cannot be copied"):
        InMemoryStore().add("a", threading.Lock())


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "9"])
def test_store_is_refused_when_its_size_is_senseless(size: Any) -> None:
    """max_size is a whole number above 0."""
    with pytest.raises(ConfigurationError, match="max_size="):
        InMemoryStore(max_size=size)


def test_memory_stays_in_the_process_when_there_is_no_redis() -> None:
    """Without a URL, or with enable_redis=False, nothing leaves the process."""

    async def main() -> None:
        for memory in (MemoryPrimitive(), MemoryPrimitive("redis://127.0.0.1:1", enable_redis=False)):
            await memory.add("a", {"text": "x"})
            assert await memory.get("a") == {"text": "x"}
            assert await memory.search("x") == [{"text": "x"}]
            assert memory.size() == 1
            assert not memory.is_using_redis()
            await memory.clear()
            assert memory.size() == 0

    asyncio.run(main())


def test_memory_is_shared_when_redis_is_there(redis_url: str) -> None:
    """What one process remembers, another one finds, in the same order of use and with the same bound."""

    async def main() -> None:
        one, other = (MemoryPrimitive(redis_url, max_size=3) for _ in range(2))
        assert not one.is_using_redis()
        for key in "abc":
            await one.add(key, {"text": f"Word {key}", "parts": (1, None)})
        assert one.is_using_redis()
        assert await other.get("a") == {"text": "Word a", "parts": (1, None)}
        assert await other.get("z") is None
        assert other.is_using_redis()
        await other.add("d", {"text": "word d"})
        assert await one.get("b") is None  # the least recently used
        assert [record["text"] for record in await one.search("WORD")] == ["word d", "Word a", "Word c"]
        assert await one.search("word", limit=1) == [{"text": "word d"}]
        assert one.size() == other.size() == 3
        await other.clear()
        assert await one.get("a") is None
        assert (one.size(), other.size()) == (0, 0)

    asyncio.run(main())


def test_memory_goes_on_in_the_process_when_redis_goes_away(own_redis_server: Any) -> None:
    """Nothing raises because of Redis; what was remembered meanwhile stays here, and Redis is used again later."""

    async def main() -> None:
        memory = MemoryPrimitive(own_redis_server.url)
        await memory.add("a", "shared")
        await asyncio.to_thread(own_redis_server.stop)
        await memory.add("b", "local")
        assert not memory.is_using_redis()
        assert await memory.get("b") == "local"
        assert await memory.get("a") is None
        assert await memory.search("a") == ["local"]
        assert memory.size() == 1
        await memory.clear()
        await memory.add("c", "local again")
        await asyncio.to_thread(own_redis_server.start)
        while not memory.is_using_redis():
            await memory.get("x")
            await asyncio.sleep(0.01)
        assert await memory.get("c") == "local again"
        await memory.add("c", "shared again")
        assert await MemoryPrimitive(own_redis_server.url).get("c") == "shared again"
        assert memory._local.size() == 0

    asyncio.run(main())


def test_record_is_refused_when_redis_could_not_give_it_back(redis_url: str) -> None:
    """With Redis, records are what JSON carries, and of a bounded size."""

    async def main() -> None:
        memory = MemoryPrimitive(redis_url)
        with pytest.raises(ConfigurationError, match="JSON cannot carry this object"):
            await memory.add("a", object())
        with pytest.raises(ConfigurationError, match="too large"):
            await memory.add("a", "x" * 2_000_000)

    asyncio.run(main())


def test_foreign_records_are_passed_over_when_they_lie_in_redis(redis_url: str) -> None:
    """What is not ours is not believed."""

    async def main() -> None:
        memory = MemoryPrimitive(redis_url)
        await memory.add("a", "good")
        await memory.add("b", "good, too")
        with redis.Redis.from_url(redis_url) as client:
            client.hset("tta:1:#:memory:records", "b", b"\x80\x04junk")
        assert await memory.get("b") is None
        assert await memory.search("good") == ["good"]

    asyncio.run(main())


def test_bound_holds_when_it_is_lowered(redis_url: str) -> None:
    """A smaller max_size trims what is there at the next add."""

    async def main() -> None:
        large = MemoryPrimitive(redis_url, max_size=50)
        for number in range(50):
            await large.add(str(number), number)
        small = MemoryPrimitive(redis_url, max_size=2)
        await small.add("new", "new")
        assert small.size() == 2
        assert sorted(map(str, await small.search(""))) == ["49", "new"]

    asyncio.run(main())


def test_memory_key_is_short_and_distinct_when_it_is_made() -> None:
    """user:session, with eight digits for a context; parts with colons cannot pass for others."""
    assert create_memory_key("user1", "session2") == "user1:session2"
    assert create_memory_key("a:b", "c") != create_memory_key("a", "b:c")
    assert create_memory_key("a%3A", "c") != create_memory_key("a:", "c")
    one = create_memory_key("u", "s", {"b": 1, "a": 2})
    assert one == create_memory_key("u", "s", {"a": 2, "b": 1})
    assert one != create_memory_key("u", "s", {"a": 2, "b": 2})
    assert one.startswith("u:s:")
    assert len(one) == 12
    with pytest.raises(ConfigurationError, match=r"context\['a'\] is a .*object"):
        create_memory_key("u", "s", {"a": object()})
