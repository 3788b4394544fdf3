"""100,000 calls and 20,000 raises: no growth in memory, threads, descriptors."""

LIMIT = 2.0  # MB; a leak of one pointer per call is 0.8


def test_memory_threads_and_descriptors_stay_flat_when_a_hundred_thousand_calls_are_made(program, options):
    """After a warm-up, 100,000 calls and 20,000 raises of one object leave the process as large as it was."""
    ended = program(
        """
        error = ValueError("always the same")
        async def short(): return 42
        async def fails(): raise error

        def held():
            gc.collect()
            with open("/proc/self/statm") as statm:
                pages = int(statm.read().split()[1])
            return pages * 4096 / 2**20, threading.active_count(), len(os.listdir("/proc/self/fd"))

        def work(calls, raises):
            for _ in range(calls):
                assert facade.call_sync(short) == 42
            for _ in range(raises):
                try:
                    facade.call_sync(fails)
                except ValueError:
                    pass

        def spread(calls, raises):
            work(calls // 2, raises // 2)
            running = [threading.Thread(target=work, args=(calls // 8, raises // 8)) for _ in range(4)]
            for thread in running: thread.start()
            for thread in running: thread.join()

        spread(12_000, 4_000)
        before = held()
        spread(25_000 if OPTIONS else 100_000, 5_000 if OPTIONS else 20_000)
        after = held()
        say(after[0] - before[0], after[1] - before[1], after[2] - before[2])
        assert facade.stats().calls == (46_000 if OPTIONS else 136_000)
        """
    ).end(60)
    assert ended.stderr == ""
    assert ended.status == 0
    megabytes, more_threads, descriptors = map(float, ended.said[0].split())
    assert megabytes < (LIMIT / 4 if options else LIMIT)  # other kinds of loop: a quarter of the calls
    assert more_threads <= 0
    assert descriptors <= 0


def test_memory_stays_flat_when_calls_fail_in_every_other_way(run_program, repeats):
    """Deadlines, refusals, orphans, steps, nested calls, threads that come and go: flat as well."""
    ended = run_program(
        """
        import logging
        logging.getLogger("tta_sync").addHandler(logging.NullHandler())
        facade = SyncFacade(**OPTIONS, max_in_flight=4, grace=0.001)

        async def slow(): await asyncio.sleep(60)
        async def stubborn():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.002)
        async def steps(): return await run_on_caller(facade.call_sync, answer)
        async def interrupted():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await asyncio.sleep(60)

        def quietly(function, *args, **keywords):
            try:
                function(*args, **keywords)
            except (TTASyncError, KeyboardInterrupt):
                pass

        def once():
            quietly(facade.call_sync, slow, timeout=0.0005)
            quietly(facade.call_sync, stubborn, timeout=0.0005)
            quietly(facade.call_sync, slow, timeout=-1)
            quietly(facade.call_sync, interrupted)
            facade.call_sync(steps)
            thread = threading.Thread(target=facade.call_sync, args=(answer,))
            thread.start()
            thread.join()

        def held():
            until(lambda: not facade.in_flight())
            gc.collect()
            with open("/proc/self/statm") as statm:
                pages = int(statm.read().split()[1])
            return pages * 4096 / 2**20, len(os.listdir("/proc/self/fd")), len(gc.get_objects())

        for _ in range(60): once()
        before = held()
        for _ in range(100 if OPTIONS else 300): once()
        after = held()
        say(after[0] - before[0], after[1] - before[1], after[2] - before[2])
        """
    )
    megabytes, descriptors, objects = map(float, ended.said[0].split())
    assert megabytes < LIMIT
    assert descriptors <= 0
    assert objects < repeats(200, 70)
