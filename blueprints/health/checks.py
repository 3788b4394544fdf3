"""Ask the parts that the service needs whether they answer, within a second, whatever state they are in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from blueprints.settings import SettingsError

BUDGET = 1.0  # seconds for all checks together, which run at once


class Check:
    """One part and how to ask it.

    The question is asked on a thread of its own, so that a part that hangs costs its budget and no more. While an old
    question is still unanswered no new one is asked: a part that hangs for an hour holds one thread, not thousands.
    """

    def __init__(self, name: str, ask: Callable[[], object]) -> None:
        self.name = name
        self._ask = ask
        self._lock = threading.Lock()
        self._pending: _Question | None = None  # guarded by _lock

    def begin(self) -> _Question:
        with self._lock:
            if self._pending is None or self._pending.answered.is_set():
                self._pending = _Question(self.name, self._ask)
            return self._pending


class _Question:
    def __init__(self, name: str, ask: Callable[[], object]) -> None:
        self.answered = threading.Event()
        self.error: str | None = None
        self._ask = ask
        threading.Thread(target=self._run, name=f"tta_sync check {name}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._ask()
        except SettingsError as error:
            self.error = str(error)
        except Exception as error:
            # The class only: messages of drivers quote addresses, users, sometimes passwords.
            self.error = f"unavailable ({type(error).__name__})"
        finally:
            self.answered.set()


def ask_all(checks: Iterable[Check], budget: float = BUDGET) -> dict[str, str]:
    """Return what each part says: "ok", or why not."""
    questions = [(check.name, check.begin()) for check in checks]
    give_up = time.monotonic() + budget
    answers: dict[str, str] = {}
    for name, question in questions:
        if not question.answered.wait(max(0.0, give_up - time.monotonic())):
            answers[name] = f"no answer within {budget:g} s"
        else:
            answers[name] = question.error or "ok"
    return answers
