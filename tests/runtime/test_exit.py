"""The end of a process: soon, quiet, with status 0, and with the `finally` blocks run."""

import pytest

EXIT_WITHIN = 5.0  # seconds from the last statement to the end, beyond those of a process with nothing in flight

SLEEPER = """
async def sleeper():
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(0.01)
        say("cleaned")
"""

# name -> (program, what it must have said)
PROGRAMS = {
    "daemon thread in a call": (
        SLEEPER
        + """
threading.Thread(target=facade.call_sync, args=(sleeper,), daemon=True).start()
until(lambda: facade.in_flight() and facade.in_flight()[0].state == "running")
""",
        ["cleaned"],
    ),
    "non-daemon thread in a call": (
        SLEEPER
        + """
threading.Thread(target=facade.call_sync, args=(sleeper,)).start()
until(lambda: facade.in_flight() and facade.in_flight()[0].state == "running")
""",
        ["cleaned"],
    ),
    "many threads in calls": (
        SLEEPER
        + """
for number in range(16):
    threading.Thread(target=facade.call_sync, args=(sleeper,), daemon=number % 2 == 0).start()
until(lambda: len(facade.in_flight()) == 16)
""",
        ["cleaned"] * 16,
    ),
    "left-over tasks": (
        SLEEPER
        + """
tasks = set()
async def leave():
    tasks.update(asyncio.create_task(sleeper()) for _ in range(3))
    await asyncio.sleep(0)
facade.call_sync(leave)
""",
        ["cleaned"] * 3,
    ),
    "clean-up that needs a thread": (
        """
async def sleeper():
    try:
        await asyncio.sleep(3600)
    finally:
        say(await asyncio.to_thread(lambda: "cleaned in a thread"))
threading.Thread(target=facade.call_sync, args=(sleeper,), daemon=True).start()
until(lambda: facade.in_flight() and facade.in_flight()[0].state == "running")
""",
        ["cleaned in a thread"],
    ),
    "thread step that blocks": (
        """
blocking = []
@thread_step
def block(data):
    say("blocking")
    blocking.append(data)
    time.sleep(60)
threading.Thread(target=facade.run_sync, args=(block, 1), daemon=True).start()
threading.Thread(target=facade.run_sync, args=(block, 1)).start()
until(lambda: len(blocking) == 2)
""",
        ["blocking"] * 2,
    ),
    "caller step that blocks": (
        """
inside = threading.Event()
def block():
    inside.set()
    time.sleep(60)
async def outer():
    try:
        await run_on_caller(block)
    finally:
        say("cleaned")
threading.Thread(target=facade.call_sync, args=(outer,), daemon=True).start()
inside.wait()
""",
        ["cleaned"],
    ),
    "coroutine that swallows the cancel": (
        """
async def stubborn():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
threading.Thread(target=facade.call_sync, args=(stubborn,), daemon=True).start()
threading.Thread(target=facade.call_sync, args=(stubborn,)).start()
until(lambda: len(facade.in_flight()) == 2)
""",
        [],
    ),
    "coroutine that blocks the loop": (
        """
import logging
logging.getLogger("tta_sync").addHandler(logging.NullHandler())  # the watchdog reports what blocks the loop
inside = threading.Event()
async def block():
    inside.set()
    time.sleep(60)
threading.Thread(target=facade.call_sync, args=(block,), daemon=True).start()
inside.wait()
threading.Thread(target=facade.call_sync, args=(answer,)).start()
until(lambda: len(facade.in_flight()) == 2)
""",
        [],
    ),
    "call that ends by itself in time": (
        """
async def soon():
    await asyncio.sleep(0.3)
    return "its result"
threading.Thread(target=lambda: say(facade.call_sync(soon))).start()
until(lambda: facade.in_flight())
""",
        ["its result"],
    ),
    "threads that go on calling": (
        """
def caller():
    try:
        while True:
            facade.call_sync(answer)
    except LoopUnavailableError:
        say("refused")
for _ in range(4):
    threading.Thread(target=caller).start()
until(lambda: facade.stats().calls > 100)
""",
        ["refused"] * 4,
    ),
    "open resources": (
        """
@asynccontextmanager
async def client():
    try:
        yield "client"
    finally:
        await asyncio.sleep(0.01)
        say("closed")
shared = facade.resource(client)
async def use():
    return await shared
assert facade.call_sync(use) == "client"
""",
        ["closed"],
    ),
    "async generator left half-way": (
        """
async def numbers():
    try:
        yield 1
        yield 2
    finally:
        say("cleaned")
kept = []
async def begin():
    kept.append(numbers())
    return await anext(kept[0])
assert facade.call_sync(begin) == 1
""",
        ["cleaned"],
    ),
    "streams whose clean-up takes too long": (
        """
begun = []
async def numbers():
    begun.append(1)
    try:
        while True:
            await asyncio.sleep(0.01)
            yield 1
    finally:
        await asyncio.sleep(60)
async def consume():
    async for _ in numbers():
        pass
threading.Thread(target=lambda: list(facade.iterate_sync(numbers)), daemon=True).start()
threading.Thread(target=facade.call_sync, args=(consume,), daemon=True).start()
until(lambda: len(begun) == 2)
""",
        [],
    ),
    "stubborn work on four facades": (
        """
async def stubborn():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
facades = [SyncFacade(**OPTIONS) for _ in range(3)] + [SyncFacade(**{**OPTIONS, "grace": 30.0})]
for one in facades:
    threading.Thread(target=one.call_sync, args=(stubborn,), daemon=True).start()
until(lambda: all(one.in_flight() for one in facades))
""",
        [],
    ),
    "an exit status of its own": (
        SLEEPER
        + """
threading.Thread(target=facade.call_sync, args=(sleeper,), daemon=True).start()
until(lambda: facade.in_flight() and facade.in_flight()[0].state == "running")
last()
sys.exit(3)
""",
        ["cleaned"],
    ),
    "a deadline that would come later": (
        SLEEPER
        + """
threading.Thread(target=facade.call_sync, args=(sleeper,), kwargs={"timeout": 600}, daemon=True).start()
until(lambda: facade.in_flight() and facade.in_flight()[0].state == "running")
""",
        ["cleaned"],
    ),
    "nothing at all": ("", []),
}


CALL = """
def call():
    try:
        say("result", facade.call_sync(answer))
    except LoopUnavailableError:
        say("refused")
"""

LATE_CALLS = {
    "atexit, after a call": CALL + "facade.call_sync(answer)\natexit.register(call)\n",
    "atexit, registered before the first call": CALL + "atexit.register(call)\nfacade.call_sync(answer)\n",
    "atexit, the first call of all": CALL + "atexit.register(call)\n",
    "atexit, on another thread": CALL
    + """
facade.call_sync(answer)
def elsewhere():
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
atexit.register(elsewhere)
""",
    "__del__ at finalization": CALL
    + """
class Late:
    def __del__(self, call=call):
        call()
facade.call_sync(answer)
keep = Late()
keep.me = keep
""",
    "__del__ at finalization, the first call of all": CALL
    + """
class Late:
    def __del__(self, call=call):
        call()
keep = Late()
""",
    "a non-daemon thread after the main thread's end": CALL
    + """
facade.call_sync(answer)
main = threading.main_thread()
def after():
    main.join()
    time.sleep(0.2)
    call()
threading.Thread(target=after).start()
""",
    "atexit with the loop blocked": CALL
    + """
import logging
logging.getLogger("tta_sync").addHandler(logging.NullHandler())  # the watchdog reports what blocks the loop
inside = threading.Event()
async def block():
    inside.set()
    time.sleep(60)
threading.Thread(target=facade.call_sync, args=(block,), daemon=True).start()
inside.wait()
atexit.register(call)
""",
    "a second facade in atexit": """
facade.call_sync(answer)
def call():
    try:
        say("result", SyncFacade(**OPTIONS).call_sync(answer))
    except LoopUnavailableError:
        say("refused")
atexit.register(call)
""",
    "threading's own exit list": CALL
    + """
threading._register_atexit(call)
facade.call_sync(answer)
""",
    "shutdown in atexit": """
facade.call_sync(answer)
def call():
    facade.shutdown()
    say("refused")
atexit.register(call)
""",
}


@pytest.fixture(scope="module")
def endings(run_together):
    """How each of the programs ended."""
    bodies = {name: body for name, (body, _) in PROGRAMS.items()} | LATE_CALLS
    return run_together({name: body + ("" if "last()" in body else "last()\n") for name, body in bodies.items()})


@pytest.mark.parametrize("name", PROGRAMS)
def test_process_ends_soon_and_quietly_when_it_leaves_work_in_flight(endings, name):
    """Whatever is in flight: the end comes within 5 s, with the program's status, empty stderr, and clean-up done."""
    ended = endings[name]
    assert ended.stderr == ""
    assert ended.said == PROGRAMS[name][1]
    assert ended.status == (3 if "sys.exit(3)" in PROGRAMS[name][0] else 0)
    assert ended.seconds_after_last < EXIT_WITHIN + endings["nothing at all"].seconds_after_last


@pytest.mark.parametrize("name", LATE_CALLS)
def test_call_never_hangs_when_made_at_the_end(endings, name):
    """A call in atexit, at finalization or from a thread that outlives the main one: its result or the named error."""
    ended = endings[name]
    assert ended.stderr == ""
    assert ended.said in (["result 42"], ["refused"])
    assert ended.status == 0
    assert ended.seconds_after_last < EXIT_WITHIN + endings["nothing at all"].seconds_after_last


def test_calls_work_when_an_exit_hook_of_the_users_shuts_the_facade_down_first(run_program):
    """A process that shuts its facade down itself, as a server's hook does, ends as quietly."""
    ended = run_program(
        """
        facade.call_sync(answer)
        facade.shutdown()
        last()
        """
    )
    assert ended.seconds_after_last < EXIT_WITHIN
