"""A forked child gets a loop of its own, and the parent keeps its own, whatever the child does."""

import _thread
import asyncio
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from tta_sync import run_on_caller
from tta_sync.exceptions import LoopUnavailableError, TTASyncError
from tta_sync.facade import SyncFacade


@pytest.fixture
def forks(repeats):
    """A hundred, and fewer where another kind of loop forks just the same."""
    return range(repeats(100, 30))


async def add(left, right):
    await asyncio.sleep(0)
    return left + right


async def steps(left, right):
    """Its steps' answers reach the loop by another way than calls do."""
    return await run_on_caller(add_up, left, right)


def add_up(left, right):
    return left + right


def test_child_and_parent_answer_when_forked_idle_a_hundred_times(facade, in_child, forks):
    """With nothing in flight: each of 100 children gets its answer, and so does the parent after each of them."""
    facade.call_sync(add, 0, 0)
    for number in forks:
        assert in_child(lambda number=number: facade.call_sync(add, number, 1)) == str(number + 1)
        assert facade.call_sync(steps, number, 2, timeout=20) == number + 2


def test_child_and_parent_answer_when_forked_busy_a_hundred_times(facade, in_child, in_thread, forks):
    """While four threads are inside calls: the same, and their calls go on, all answered rightly."""
    ended = threading.Event()

    def caller(number):
        answers = 0
        while not ended.is_set():
            assert facade.call_sync(add, number, answers, timeout=30) == number + answers
            answers += 1
        return answers

    callers = [in_thread(caller, number) for number in range(4)]
    try:
        for number in forks:
            assert in_child(lambda number=number: facade.call_sync(add, number, 1)) == str(number + 1)
            assert facade.call_sync(steps, number, 2, timeout=20) == number + 2
    finally:
        ended.set()
    assert all(future.result(30) > 10 for future in callers)


def locks_of(facade):
    """Every lock of the facade, of what it is made of, and of the modules behind, that is free now: its way out."""
    owners = [module for name, module in sys.modules.items() if name.startswith("tta_sync.")] + [facade]
    seen = set()
    while owners:
        owner = owners.pop()
        for thing in list(getattr(owner, "__dict__", {}).values()):
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, (_thread.LockType, _thread.RLock)):
                if thing.acquire(blocking=False):
                    yield thing.release
            elif type(thing).__module__.startswith("tta_sync."):
                owners.append(thing)


def test_child_and_parent_answer_when_forked_with_every_lock_held_a_hundred_times(facade, in_child, in_thread, forks):
    """While another thread holds every lock that the runtime has: no child waits for a holder that it does not have."""
    facade.call_sync(add, 0, 0)
    with pytest.raises(TTASyncError):
        facade.call_sync(asyncio.sleep, 60, timeout=0.01)  # the locks that are made at first use
    for number in forks:
        held, release = threading.Event(), threading.Event()

        def hold(held=held, release=release):
            ways_out = []
            try:
                ways_out.extend(locks_of(facade))
                held.set()
                release.wait(30)
            finally:
                for leave in reversed(ways_out):
                    leave()
            return len(ways_out)

        holder = in_thread(hold)
        if not held.wait(20):
            holder.result(0)
        try:
            assert in_child(lambda number=number: facade.call_sync(add, number, 1)) == str(number + 1)
        finally:
            release.set()
        assert holder.result(20) >= 2  # else nothing was held, and nothing was tested
        assert facade.call_sync(steps, number, 2, timeout=20) == number + 2


def test_child_answers_when_forked_while_another_thread_starts_the_loop(make_facade, in_child, in_thread, monkeypatch):
    """A fork in the middle of the parent's first call: the child starts its own loop, the parent's start goes on."""
    from tta_sync.runtime.loop import ManagedLoop

    facade = make_facade()
    entered, go_on = threading.Event(), threading.Event()
    real, parent = ManagedLoop._new_local, os.getpid()

    def slow(self):
        if os.getpid() == parent:
            entered.set()
            go_on.wait(20)
        return real(self)

    monkeypatch.setattr(ManagedLoop, "_new_local", slow)
    first = in_thread(facade.call_sync, add, 1, 2)
    assert entered.wait(20)
    try:
        assert in_child(lambda: facade.call_sync(add, 3, 4)) == "7"
    finally:
        go_on.set()
    assert first.result(20) == 3


def test_child_of_a_child_answers_when_forked_again(facade, in_child):
    """Every generation gets its own loop: a grandchild too."""
    facade.call_sync(add, 0, 0)

    def child():
        assert facade.call_sync(add, 1, 1) == 2
        assert in_child(lambda: facade.call_sync(add, 2, 2)) == "4"
        return facade.call_sync(add, 3, 3)

    assert in_child(child) == "6"
    assert facade.call_sync(steps, 4, 4, timeout=20) == 8


def test_child_answers_when_forked_from_a_caller_step(facade, in_child):
    """A fork inside a caller step: the child may call, and its copy of the outer call ends in a typed error."""

    def fork_here():
        return in_child(lambda: facade.call_sync(add, 20, 22))

    async def outer():
        return await run_on_caller(fork_here)

    assert facade.call_sync(outer, timeout=30) == "42"
    assert facade.call_sync(steps, 1, 2, timeout=20) == 3


def test_copied_call_ends_in_a_typed_error_when_its_caller_forked_inside_it(facade, in_child):
    """A child that returns from the caller step in which it was forked gets a TTASyncError from the copied call."""
    children = []

    def fork():
        children.append(os.fork())
        signal.alarm(20)  # a grandchild that hangs is killed as well

    def child():
        async def outer():
            return await run_on_caller(fork)

        try:
            facade.call_sync(outer)
        except TTASyncError as error:
            if children == [0]:
                os.write(out, type(error).__name__.encode())
                os._exit(0)
            raise
        assert children[0] > 0
        os.close(out)
        said = os.read(into, 1000).decode()
        return said, os.waitpid(children[0], 0)[1], facade.call_sync(add, 1, 2)

    into, out = os.pipe()
    try:
        assert in_child(child) == str((LoopUnavailableError.__name__, 0, 3))
    finally:
        os.close(into)
        os.close(out)


def test_child_answers_when_forked_on_the_loop_thread(facade, in_child):
    """A coroutine that forks: the child, a copy of the loop thread, is an ordinary caller."""

    async def forks():
        return in_child(lambda: facade.call_sync(add, 20, 22))

    assert facade.call_sync(forks, timeout=30) == "42"
    assert facade.call_sync(steps, 1, 2, timeout=20) == 3


def test_childs_signal_handlers_are_called_when_it_was_forked_on_the_loop_thread(facade, in_child):
    """A child forked by a coroutine hears its signals at once, though its parent may hold them back for the loop."""
    noted = []
    before = signal.signal(signal.SIGUSR1, lambda *_: noted.append(os.getpid()))

    def child():
        signal.raise_signal(signal.SIGUSR1)
        assert facade.call_sync(add, 1, 2) == 3
        signal.raise_signal(signal.SIGUSR1)
        return noted == [os.getpid()] * 2

    async def forks():
        return in_child(child)

    try:
        assert facade.call_sync(forks, timeout=30) == "True"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert noted == []


@pytest.mark.parametrize("first", ["parent", "child"])
def test_loop_starts_in_the_child_when_the_facade_was_made_before_the_fork(facade, in_child, first):
    """A facade that is made at import time starts its loop in whichever process calls first."""
    if first == "parent":
        assert facade.call_sync(add, 1, 2) == 3
    assert in_child(lambda: facade.call_sync(add, 3, 4)) == "7"
    assert facade.call_sync(steps, 5, 6, timeout=20) == 11


def test_totals_begin_anew_when_forked(make_facade, in_child, expires):
    """A child's statistics are its own: its calls, no inherited orphans, nothing in flight, the next generation."""
    facade = make_facade(grace=0.0)
    release, orphans_before = threading.Event(), []

    async def stubborn():
        orphans_before.append(facade.stats().orphans)
        while not release.is_set():
            try:
                await asyncio.sleep(0.002)
            except asyncio.CancelledError:
                pass

    expires(facade.call_sync, stubborn, timeout=0.01)
    before = facade.stats()

    def child():
        assert facade.in_flight() == []
        facade.call_sync(add, 1, 2)
        stats = facade.stats()
        return stats.calls, stats.orphans, stats.restarts, stats.generation - before.generation

    try:
        assert in_child(child) == str((1, 0, 0, 1))
        assert facade.stats().orphans == before.orphans == orphans_before[0] + 1
    finally:
        release.set()


def test_facade_works_in_the_child_when_the_parent_shut_it_down(facade, in_child):
    """shutdown() holds for the process in which it was called."""
    facade.call_sync(add, 1, 2)
    facade.shutdown()
    with pytest.raises(LoopUnavailableError):
        facade.call_sync(add, 1, 2)
    assert in_child(lambda: facade.call_sync(add, 3, 4)) == "7"


def test_parent_goes_on_when_the_child_shuts_its_facade_down(facade, in_child):
    """A child that shuts down, before and after a call of its own, takes nothing from its parent."""
    facade.call_sync(add, 0, 0)
    in_child(facade.shutdown)

    def child():
        facade.call_sync(add, 1, 2)
        facade.shutdown()

    in_child(child)
    assert facade.call_sync(steps, 1, 2, timeout=20) == 3


# ------------------------------------------------------------------------------------------------ multiprocessing


def _square(facade, number, pipe):
    async def square():
        await asyncio.sleep(0)
        return number * number

    pipe.send(facade.call_sync(square, timeout=20))


def test_processes_answer_when_multiprocessing_forks_them(facade, in_thread):
    """multiprocessing's forked processes call the facade that they inherited; the parent's still answers."""
    forking = multiprocessing.get_context("fork")
    facade.call_sync(add, 0, 0)
    running = []
    for number in range(8):
        here, there = forking.Pipe(duplex=False)
        process = forking.Process(target=_square, args=(facade, number, there), daemon=True)
        process.start()
        there.close()
        running.append((process, here))
    try:
        for number, (process, here) in enumerate(running):
            assert here.poll(30), "the process hung"
            assert here.recv() == number * number
            process.join(20)
            assert process.exitcode == 0
            here.close()
    finally:
        for process, _ in running:
            process.kill()
            process.join()
    assert facade.call_sync(steps, 1, 2, timeout=20) == 3


# ------------------------------------------------------------------------------------- children that end normally


LEAVES = {
    "returns": ("return 0", 0, ""),
    "exits": ("sys.exit(3)", 3, ""),
    "exits with a word": ("sys.exit('so it ends')", 1, "so it ends"),
    "fails": ("raise ValueError('in the child')", 1, "ValueError: in the child"),
}


@pytest.mark.parametrize("leaves", LEAVES)
def test_child_ends_with_the_coroutine_that_forked_it(run_program, options, leaves):
    """It runs no other code of the loop, ends with a status that says how, and the parent's loop wakes as before."""
    code, status, said = LEAVES[leaves]
    # Where callers drive, one does all the while: a child forked by the driver's own call returns to its caller.
    ended = run_program(
        f"""
        async def forks():
            loop = asyncio.get_running_loop()
            woken = loop.create_future()

            def wake():
                woken.set_result(None)
                for _ in range(3):
                    loop.call_soon(other)  # in the same turn as what follows here, and after it

            loop.call_soon(wake)
            await woken
            pid = os.fork()
            if not pid:
                {code}
            return pid

        def other():
            say("parent's" if os.getpid() == parent else "parent's, in its child")

        async def nap():
            await asyncio.sleep(0.001)

        async def drives():
            while not done:
                await asyncio.sleep(0.001)

        parent, done = os.getpid(), []
        driver = threading.Thread(target=facade.call_sync, args=(drives,))
        driver.start()
        until(facade.in_flight)
        for _ in range(3):
            pid = facade.call_sync(forks)
            say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            for _ in range(50):
                facade.call_sync(nap, timeout=20)
        done.append(1)
        driver.join()
        last()
        """,
        quiet=False,
    )
    assert [line for line in ended.said if "parent's" not in line] == [str(status)] * 3
    assert ended.said.count("parent's") == 9
    if not options.get("use_uvloop"):  # which shows nobody what is ready to run
        assert "parent's, in its child" not in ended.said
    assert ended.stderr.count(said) >= 3 if said else ended.stderr == ""


def test_child_forked_on_uvloop_polls_none_of_its_parents_descriptors(in_child):
    """libuv polls once more before it leaves, and would take a wake-up from the epoll that both share."""
    facade = SyncFacade(use_uvloop=True)

    async def forks():
        loop = asyncio.get_running_loop()

        def watched():
            return Path(f"/proc/self/fdinfo/{loop._get_backend_id()}").read_text().count("tfd:")

        return watched(), in_child(watched)

    before, inside = facade.call_sync(forks, timeout=30)
    assert (before > 0, inside) == (True, "0")
    facade.shutdown(0)


def test_loop_goes_on_when_a_subprocess_is_started_on_it(facade, works):
    """uvloop runs the hooks of a fork in the child of every subprocess: the program has nothing of the loop's."""
    look = "import glob, os; print([os.readlink(fd) for fd in glob.glob('/proc/self/fd/*') if os.path.exists(fd)])"

    async def run():
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", look, stdout=asyncio.subprocess.PIPE)
        said, _ = await process.communicate()
        return said.decode(), process.returncode

    open_there, status = facade.call_sync(run, timeout=30)
    assert (status, "eventpoll" in open_there) == (0, False)
    works(facade)


def test_child_does_not_count_what_goes_on_in_its_parent(run_program):
    """A child that leaves an inherited stream, or a caller step of an inherited call, says nothing of orphans."""
    ended = run_program(
        """
        async def numbers():
            number = 0
            while True:
                yield number
                number += 1
                await asyncio.sleep(0.01)

        def forks():
            pid = os.fork()
            if not pid:
                sys.exit(0)
            say(os.waitpid(pid, 0)[1])

        async def step():
            await run_on_caller(forks)

        with facade.iterate_sync(numbers) as stream:
            next(stream)
            forks()
            say(next(stream))
        facade.call_sync(step)
        last()
        """
    )
    assert ended.said == ["0", "1", "0"]
    assert ended.stderr == ""


@pytest.mark.parametrize(
    "child", ["pass", "gc.collect()", "assert facade.call_sync(answer) == 42", "facade.shutdown()"]
)
def test_parent_still_works_when_a_child_exits_normally(run_program, child):
    """A child that ends by sys.exit, finalizers and all, says nothing on stderr, and the parent's loop still wakes."""
    ended = run_program(
        f"""
        async def nap():
            await asyncio.sleep(0.001)
            return os.getpid()

        async def ask():
            return await run_on_caller(os.getpid)

        assert facade.call_sync(answer) == 42
        for _ in range(3):
            pid = os.fork()
            if not pid:
                {child}
                sys.exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            for _ in range(50):
                assert facade.call_sync(nap, timeout=20) == os.getpid()
                assert facade.call_sync(ask, timeout=20) == os.getpid()
        say("parent works")
        last()
        """
    )
    assert ended.said == ["parent works"]


def test_parent_keeps_nothing_when_loops_ran_in_its_children(run_program):
    """Forty children with loops of their own leave no descriptor and no thread behind in the parent."""
    ended = run_program(
        """
        def held():
            return len(os.listdir("/proc/self/fd")), threading.active_count()
        def forks(count):
            for _ in range(count):
                facade.call_sync(answer)
                pid = os.fork()
                if not pid:
                    os._exit(facade.call_sync(answer) != 42)
                assert os.waitpid(pid, 0)[1] == 0
        forks(10)
        until(lambda: any(thread.name == "tta_sync-watchdog" for thread in threading.enumerate()))  # started beside
        before = held()
        forks(40)
        until(lambda: held() <= before)
        say("flat")
        """
    )
    assert ended.said == ["flat"]
