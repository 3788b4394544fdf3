"""What travels with a call: its context, its deadline, and the ports through which the layers above are reached.

One :class:`WorkflowContext` belongs to one call: shared by the steps of a sequence, copied for the branches of a
parallel. Nothing here is thread-safe by itself: at any time only one thread, the loop's or the waiting caller's, works
on a context.
"""

from __future__ import annotations

import asyncio
import copy
import math
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from tta_sync.clock import SYSTEM_CLOCK, Clock
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError

T = TypeVar("T")


class Deadline:
    """The moment by which a whole call must have ended.

    Monotonic inside the process; ``expires_at`` is the same moment on the wall clock, for what crosses to another one.
    Whoever cancels a call because its deadline has passed sets ``struck`` first: :func:`cancel_reason` reads it.
    ``kept`` is set by whoever waits for a call in a thread, and ends it then: without it, nobody need be looked for.
    """

    __slots__ = ("at", "clock", "kept", "seconds", "struck")

    def __init__(self, at: float, seconds: float | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self.at = at  # on clock.monotonic()
        self.seconds = seconds  # what it was set to, for messages
        self.clock = clock
        self.kept = self.struck = False

    @classmethod
    def after(cls, seconds: float, clock: Clock = SYSTEM_CLOCK) -> Deadline:
        """Make the deadline that passes *seconds* from now."""
        return cls(clock.monotonic() + seconds, seconds, clock)

    @classmethod
    def from_expires_at(cls, expires_at: float, clock: Clock = SYSTEM_CLOCK) -> Deadline:
        """Rebase a wall-clock moment, as another process gave it, onto this process's clock."""
        remaining = expires_at - clock.time()
        return cls(clock.monotonic() + remaining, None, clock)

    @property
    def expires_at(self) -> float:
        """Seconds since the epoch."""
        return self.clock.time() + self.remaining()

    def remaining(self) -> float:
        """Return the seconds left; negative once it has passed."""
        return self.at - self.clock.monotonic()

    def raise_exceeded(self) -> NoReturn:
        """Raise the error that belongs to this deadline."""
        raise DeadlineExceededError(self.seconds)

    def __repr__(self) -> str:
        return f"Deadline({self.remaining():.3f} s left)"


class Reporter(Protocol):
    """Where a call's progress goes: ``tta_sync.rq`` binds one to each job."""

    def report(self, done: float, total: float | None, message: str | None) -> None:
        """Note how far the call has come. Any thread; must not block."""


MAX_PROGRESS_MESSAGE = 500
"""Characters of a progress message that are kept."""


_asked_first: dict[int, str] = {}
"""New ids, by their context, until they have been written down there."""


class WorkflowContext:
    """Carry one call's identity, deadline and shared state through its steps.

    Args:
        correlation_id: the same for everything that one request causes; made at first use where it is None.
        deadline: a :class:`Deadline`; every primitive honours it.
        tenant: whose call this is; part of every cache key.
        state: what steps tell each other; a branch of a parallel gets a shallow copy.

    ``degraded`` is True once a fallback has answered, here or in a child context. ``reporter`` is where progress goes,
    None outside jobs; it does not travel. An unknown keyword is a TypeError.
    The names are TTA.dev's; ``deadline``, ``tenant`` and ``clock`` are ours.
    """

    __slots__ = (
        "_correlation_id",
        "_degraded",
        "_parent",
        "baggage",
        "causation_id",
        "checkpoints",
        "clock",
        "deadline",
        "metadata",
        "parent_span_id",
        "player_id",
        "reporter",
        "session_id",
        "span_id",
        "start_time",
        "state",
        "tags",
        "tenant",
        "trace_flags",
        "trace_id",
        "workflow_id",
    )

    def __init__(
        self,
        workflow_id: str | None = None,
        session_id: str | None = None,
        player_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        state: dict[str, Any] | None = None,
        trace_id: str | None = None,
        span_id: str | None = None,
        parent_span_id: str | None = None,
        trace_flags: int = 1,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        baggage: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
        start_time: float | None = None,
        checkpoints: list[tuple[str, float]] | None = None,
        deadline: Deadline | None = None,
        tenant: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if deadline is not None and not isinstance(deadline, Deadline):
            raise TypeError(f"deadline is a Deadline, not {deadline!r}: write Deadline.after(seconds)")
        if deadline is not None and deadline.clock is not clock:
            raise ConfigurationError(
                "the deadline is on another clock than the context: write Deadline.after(seconds, clock)"
            )
        self.workflow_id = workflow_id
        self.session_id = session_id
        self.player_id = player_id
        self.metadata: dict[str, Any] = {} if metadata is None else metadata
        self.state: dict[str, Any] = {} if state is None else state
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_span_id = parent_span_id
        self.trace_flags = trace_flags
        self._correlation_id = correlation_id
        self.causation_id = causation_id
        self.baggage: dict[str, str] = {} if baggage is None else baggage
        self.tags: dict[str, str] = {} if tags is None else tags
        self.start_time = clock.time() if start_time is None else start_time
        self.checkpoints: list[tuple[str, float]] = [] if checkpoints is None else checkpoints
        self.deadline = deadline
        self.tenant = tenant
        self.clock = clock
        self._degraded = False
        self.reporter: Reporter | None = None
        self._parent: WorkflowContext | None = None

    @property
    def correlation_id(self) -> str:
        """The id that joins all that one request causes."""
        if self._correlation_id is None:
            # A child asks its parent, so that siblings which ask first still share one id. Where several threads ask
            # first they get the same one: a dict's setdefault is atomic, a lock would not survive a fork.
            own = str(uuid.uuid4()) if self._parent is None else self._parent.correlation_id
            first = _asked_first.setdefault(id(self), own)
            if self._correlation_id is None:
                self._correlation_id = first
            _asked_first.pop(id(self), None)
        return self._correlation_id

    @correlation_id.setter
    def correlation_id(self, value: str) -> None:
        self._correlation_id = value

    def __getstate__(self) -> object:
        self.correlation_id  # noqa: B018  # a copy has the same, also if nobody has asked for it so far
        return super().__getstate__()

    def checkpoint(self, name: str) -> None:
        """Note that *name* was reached now."""
        self.checkpoints.append((name, self.clock.time()))

    async def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Say how far the job has come: *done* of *total*, and what is being done in a few words.

        Cheap enough for every item: the newest report is written to the job about twice a second, the last one before
        the job ends. The loop, and whoever wants to cancel the job, get their turn. Outside a job nothing is written.

        Raises:
            TypeError, ValueError: a number is none, is negative or not finite; the message is no text.
        """
        self.report_progress(done, total, message)
        await asyncio.sleep(0)

    def report_progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Do what :meth:`progress` does from synchronous code: a caller step, a session step, a plain job."""
        _check_amount("done", done)
        if total is not None:
            _check_amount("total", total)
        if message is not None:
            if not isinstance(message, str):
                raise TypeError(f"message is a text, not {type(message).__name__}")
            message = message[:MAX_PROGRESS_MESSAGE]
        if self.reporter is not None:
            self.reporter.report(done, total, message)

    def elapsed_ms(self) -> float:
        """Return the milliseconds since the context was made."""
        return (self.clock.time() - self.start_time) * 1000.0

    @property
    def degraded(self) -> bool:
        """Whether something lesser than asked for has answered; set to True, it is set in every ancestor as well."""
        return self._degraded

    @degraded.setter
    def degraded(self, value: bool) -> None:
        self._degraded = value
        if value:
            self.mark_degraded()

    def mark_degraded(self) -> None:
        """Say that something lesser than asked for has answered, here and in every ancestor."""
        context: WorkflowContext | None = self
        while context is not None:
            context._degraded = True
            context = context._parent

    def create_child_context(self) -> WorkflowContext:
        """Make the context of a branch: same identity, deadline and clock, its own shallow copy of the rest."""
        child = WorkflowContext(
            self.workflow_id,
            self.session_id,
            self.player_id,
            self.metadata.copy(),
            self.state.copy(),
            self.trace_id,
            None,
            self.span_id,
            self.trace_flags,
            self._correlation_id,
            None,
            self.baggage.copy(),
            self.tags.copy(),
            self.start_time,
            tenant=self.tenant,
            clock=self.clock,
        )
        child.deadline = self.deadline
        child._parent = self
        child.causation_id = self.correlation_id
        child.reporter = self.reporter
        if type(self) is WorkflowContext:
            return child
        own = copy.copy(self)  # with whatever a subclass has added
        for name in WorkflowContext.__slots__:
            setattr(own, name, getattr(child, name))
        return own

    def next_call(self) -> WorkflowContext:
        """Make the context of another call in the same request or job: same id, deadline and tenant, fresh state."""
        following = WorkflowContext(
            workflow_id=self.workflow_id,
            session_id=self.session_id,
            player_id=self.player_id,
            trace_id=self.trace_id,
            parent_span_id=self.parent_span_id,
            trace_flags=self.trace_flags,
            correlation_id=self.correlation_id,
            causation_id=self.causation_id,
            baggage=self.baggage.copy(),
            tenant=self.tenant,
            clock=self.clock,
        )
        following.deadline = self.deadline
        following.reporter = self.reporter
        return following

    def to_otel_context(self) -> dict[str, Any]:
        """Return the span attributes that TTA.dev sets."""
        return {
            "workflow.id": self.workflow_id or "unknown",
            "workflow.session_id": self.session_id or "unknown",
            "workflow.player_id": self.player_id or "unknown",
            "workflow.correlation_id": self.correlation_id,
            "workflow.elapsed_ms": self.elapsed_ms(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what crosses to another process as plain JSON types; the deadline goes as a wall-clock moment."""
        return {
            "workflow_id": self.workflow_id,
            "session_id": self.session_id,
            "player_id": self.player_id,
            "metadata": self.metadata,
            "state": self.state,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "parent_span_id": self.parent_span_id,
            "trace_flags": self.trace_flags,
            "correlation_id": self.correlation_id,
            "causation_id": self.causation_id,
            "baggage": self.baggage,
            "tags": self.tags,
            "start_time": self.start_time,
            "checkpoints": [list(checkpoint) for checkpoint in self.checkpoints],
            "tenant": self.tenant,
            "degraded": self.degraded,
            "expires_at": None if self.deadline is None else self.deadline.expires_at,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], clock: Clock = SYSTEM_CLOCK) -> WorkflowContext:
        """Rebuild what :meth:`to_dict` gave, with the deadline rebased onto this process's clock."""
        fields = dict(data)
        expires_at = fields.pop("expires_at", None)
        degraded = fields.pop("degraded", False)
        fields["checkpoints"] = [(name, when) for name, when in fields.get("checkpoints") or ()]
        context = cls(**fields, clock=clock)
        context.degraded = degraded
        if expires_at is not None:
            context.deadline = Deadline.from_expires_at(expires_at, clock)
        return context

    def __repr__(self) -> str:
        return f"WorkflowContext(correlation_id={self.correlation_id!r}, workflow_id={self.workflow_id!r})"


def _check_amount(name: str, amount: float) -> None:
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise TypeError(f"{name} is a number, not {type(amount).__name__}")
    if not (0 <= amount < math.inf):  # NaN is in no order
        raise ValueError(f"{name} is {amount}: give a number from 0 on")


# ---- where a call stands -------------------------------------------------------------------------------------------

running_context: ContextVar[WorkflowContext | None] = ContextVar("tta_sync_context", default=None)
"""The context of the workflow that the current task runs; set by the facade inside the task, so it never leaks out."""


class TimeLimit(float):
    """The moment at which a TimeoutPrimitive will cut the step inside it; ``struck`` is set just before it does.

    ``outer`` is the limit around it. ``over`` is set when the step has ended: a task that the step has started and left
    running still sees the limit, which does not hold for it any more. ``step`` is the step's coroutine: only what runs
    inside it is sure to be cut with it.
    """

    outer: float | None = None
    over = False
    step: Any = None
    struck = False


time_limit: ContextVar[float | None] = ContextVar("tta_sync_time_limit", default=None)
"""The earliest moment (``context.clock.monotonic()``) at which somebody will cut this step: a :class:`TimeLimit`."""


def cancel_reason(context: WorkflowContext) -> str | None:
    """Say why the running step is being cancelled: "timeout", "deadline", or None for anybody else's cancellation.

    So a breaker can tell a call that took too long from one that nobody wants any more.
    """
    limit = time_limit.get()
    while isinstance(limit, TimeLimit):
        if limit.struck and not limit.over:
            return "timeout"
        limit = limit.outer
    deadline = context.deadline
    return "deadline" if deadline is not None and deadline.struck else None


context_providers: list[Callable[[], WorkflowContext | None]] = []
"""Who else may know the current context: tta_sync.flask adds the request's, tta_sync.rq the job's."""


def current_context() -> WorkflowContext | None:
    """Return the context of the running workflow, else of the current request or job, else None."""
    context = running_context.get()
    if context is not None:
        return context
    for provider in context_providers:
        context = provider()
        if context is not None:
            return context
    return None


def limit_in_force(limit: float | None) -> float | None:
    """Return *limit*, the value of ``time_limit``, or the innermost one around it whose step has not ended."""
    while isinstance(limit, TimeLimit) and limit.over:
        limit = limit.outer
    return limit


def cut_off(context: WorkflowContext) -> float | None:
    """Return the moment on ``context.clock`` at which this step will be cut: by deadline or time limit."""
    limit = limit_in_force(time_limit.get())
    if limit == math.inf:  # of work that several wait for, none of whom is in a hurry
        limit = None
    deadline = context.deadline
    if deadline is None:
        return limit
    return deadline.at if limit is None or deadline.at < limit else limit


# ---- ports: filled from above, asked from below --------------------------------------------------------------------


class Caller(Protocol):
    """A synchronous thread that waits for a workflow and can be given work meanwhile."""

    deadline: float | None
    """When this caller cuts its call, on ``time.monotonic()``; None where that is somebody else's business."""
    task: asyncio.Task[Any] | None
    """What it cuts then; None where there is nothing yet, or no more."""

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run *fn* on the caller's thread.

        Raises:
            NoCallerError: the caller has left.
        """

    def step_left_behind(self) -> str | None:
        """Count a step that ran on after it was cut; "quietly" where nobody is left to read about it."""


class Pool(Protocol):
    """Threads for sync steps that need no caller."""

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run *fn* on one of the pool's threads."""


current_caller: ContextVar[Caller | None] = ContextVar("tta_sync_caller", default=None)
current_pool: ContextVar[Pool | None] = ContextVar("tta_sync_pool", default=None)


class Workflow(Protocol):
    """Anything that runs as a workflow: ours, or a foreign object with the same method."""

    def execute(self, data: Any, context: Any, /) -> Awaitable[Any]: ...


class Message(NamedTuple):
    """What an outbox hands to a delivery."""

    key: str
    """Its own for ever, so that who has had it can tell."""
    unit: str
    """The same for all messages of one transaction: these are delivered in the order in which they come."""
    body: str


class Delivery(Protocol):
    """Where an outbox's messages go; ``tta_sync.rq`` has one for jobs."""

    def deliver(self, messages: Sequence[Message], fresh: Callable[[], bool]) -> Mapping[str, Exception | None]:
        """Deliver each message once, however often it is given; return what became of each, by its key.

        None: it has been delivered, now or before. An error: it could not be, and those of its unit behind it were not
        tried and are left out. A message may be delivered only if it was asked first whether it has been, and *fresh*
        said yes after the answer: else somebody else may have delivered it, and forgotten it, since it was read.

        Raises:
            ConnectionError: nothing can be delivered at present; what was delivered so far is known next time.
        """

    def forget(self, keys: Sequence[str]) -> None:
        """Take note that these will not be given again, but by who has read them already. Raises as ``deliver``."""


class Outbox(Protocol):
    """Messages that go out if, and only if, the SQL transaction in which they were written commits."""

    def write(self, session: Any, name: str, job_id: str, body: str, delivery: Delivery) -> None:
        """Write a message in *session*'s transaction; None is the session of the current unit of work or request."""

    def relay(self, engine: Any, delivery: Delivery, attempts: int) -> Any:
        """Return the relay that delivers what is left in the database of *engine*."""


class _Ports:
    """What lower layers may call upwards, or sideways."""

    sync_entry: Callable[[Workflow, Any, WorkflowContext | None, float | None], Any]
    """Set by tta_sync.facade at import: run a workflow on the managed loop and wait for it."""

    outbox: Outbox
    """Set by tta_sync.sqlalchemy at import; tta_sync.rq writes jobs to it."""


ports = _Ports()
