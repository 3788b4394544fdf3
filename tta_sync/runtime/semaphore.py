"""The C library's semaphore, for callers to wait on.

A lock's ``release()`` wakes a thread while holding the interpreter's lock, which is the first thing that thread then
wants: it wakes, sleeps again, and is woken a second time. A foreign call gives the interpreter's lock back beforehand,
so that one wake-up is enough. With 16 callers on one core that is 1.0 instead of 2.3 context switches a call, and two
thirds of the processor time (``make bench ARGS=bridge``).

An ImportError where the platform has no such thing.
"""

from __future__ import annotations

import ctypes
import sys
import time

if sys.platform != "linux" or ctypes.sizeof(ctypes.c_long) != 8:
    raise ImportError("the layouts below are those of 64-bit Linux")


class _Moment(ctypes.Structure):  # struct timespec
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


# A library object of our own: the types below are set for nobody else.
_library = ctypes.CDLL(None)
try:
    _init, _post, _wait, _wait_until = (
        _library.sem_init,
        _library.sem_post,
        _library.sem_wait,
        _library.sem_clockwait,  # glibc 2.30
    )
except AttributeError as missing:
    raise ImportError(f"the C library lacks {missing}") from missing
_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
_post.argtypes = _wait.argtypes = (ctypes.c_void_p,)
_wait_until.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

_SIZE = 64  # bytes; a sem_t has 32. The buffer is aligned as malloc's are.


class Semaphore:
    """Where one thread waits and others wake it, with the methods of a lock that the waiter has acquired.

    A release is a hint to look, not a count: those that come before the waiter has looked are one. An acquire may
    return early, after a signal for example.
    """

    __slots__ = ("_address", "_memory", "_moment", "_moment_address", "_rung")

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_SIZE)
        self._address = ctypes.addressof(self._memory)
        self._moment = _Moment()
        self._moment_address = ctypes.addressof(self._moment)
        self._rung = False
        _init(self._address, 0, 0)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> None:
        """Wait for a release, *timeout* seconds at most; -1 is for ever. The waiter's thread only."""
        try:
            if timeout < 0:
                _wait(self._address)
            else:
                end = time.monotonic() + timeout
                moment = self._moment
                moment.seconds = seconds = int(end)
                moment.nanoseconds = int((end - seconds) * 1e9)
                _wait_until(self._address, time.CLOCK_MONOTONIC, self._moment_address)
        finally:
            # Before the waiter looks: whoever finds it set, and so does not post, made its news known before that look.
            self._rung = False

    def release(self) -> None:
        """Wake the waiter, now or when it waits next. Any thread."""
        if not self._rung:
            self._rung = True
            _post(self._address)
