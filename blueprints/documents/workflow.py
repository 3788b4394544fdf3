"""The document workflow: ``validate >> (summary | keywords | language | word_count) >> save``.

The provider's part is composed in the order of the primitives' guide: Fallback(Cache(Timeout(Retry(CircuitBreaker(
Timeout(call)))))), with the local summary as the fallback, outside the cache: only what the provider said is kept.

Where a :class:`Listener` is in ``context.state``, the summary is told to it while it is made. Retry, breaker and the
provider's whole time are the same objects then; the attempt's limit holds for each piece instead of for the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from blueprints.documents import local
from blueprints.documents.chunks import MalformedAnswerError
from blueprints.documents.llm import RETRIED, BrokenOffError, Provider
from blueprints.documents.schemas import ProcessRequestSchema
from blueprints.documents.store import save_document
from blueprints.settings import Settings
from tta_sync import WorkflowContext, step, thread_step
from tta_sync.exceptions import StepTimeoutError
from tta_sync.marshmallow import load_step
from tta_sync.primitives import (
    MISS,
    CachePrimitive,
    CircuitBreakerConfig,
    CircuitBreakerPrimitive,
    ConditionalPrimitive,
    FallbackPrimitive,
    InMemoryBackend,
    RetryPrimitive,
    TimeoutPrimitive,
    WorkflowPrimitive,
)

logger = logging.getLogger(__name__)

LOCAL = "local"

MAX_RETRIES = 2
CACHE_TTL = 3600.0
# Several requests' worth of failures open the circuit; then one request every few seconds finds out, the others do not
# wait for a provider that does not answer.
FAILURE_THRESHOLD = 10
RECOVERY_TIMEOUT = 5.0

_HITS = "documents.cache_hits"  # our keys in context.state
_LISTENER = "documents.listener"

Answer = dict[str, Any]


class Listener:
    """Hear a summary while it is made: *say* gets its pieces, *forget* is called where those so far are void.

    Loop thread only.
    """

    def __init__(self, say: Callable[[str], None], forget: Callable[[], None]) -> None:
        self._say = say
        self._forget = forget
        self._heard: list[str] = []

    def attach(self, context: WorkflowContext) -> None:
        """Listen to what runs with *context*."""
        context.state[_LISTENER] = self

    @property
    def heard(self) -> str:
        """What was said since the last :meth:`forget`."""
        return "".join(self._heard)

    def say(self, piece: str) -> None:
        self._heard.append(piece)
        self._say(piece)

    def forget(self) -> None:
        self._heard.clear()
        self._forget()


def build_flow(settings: Settings, save: WorkflowPrimitive[Any, Any] = save_document) -> WorkflowPrimitive[Any, Any]:
    """Build the workflow that the settings describe.

    Takes ``{"text": ..., "tasks": [...]}``, as :class:`ProcessRequestSchema` has it; returns what *save* returns, which
    gets the branches' results. Needs a caller with a unit of work, since it saves.

    Raises (when run):
        marshmallow.ValidationError: the data does not fit.
    """
    return complete_flow(settings, build_branches(settings), save)


def complete_flow(
    settings: Settings, branches: WorkflowPrimitive[Any, Any], save: WorkflowPrimitive[Any, Any] = save_document
) -> WorkflowPrimitive[Any, Any]:
    """Put *branches*, which others may run as well, between validation and *save*."""
    return load_step(ProcessRequestSchema(max_text=settings.max_text), name="validate") >> branches >> save


def build_branches(settings: Settings) -> WorkflowPrimitive[Any, Any]:
    """Build what finds out about a text: summary, keywords, language and word count, all at once."""
    return (
        _asked_for("summary", build_summary(settings))
        | _asked_for("keywords", keywords)
        | _asked_for("language", language)
        | word_count
    )


def build_summary(settings: Settings) -> WorkflowPrimitive[Any, Answer]:
    """Build the summary's branch: the provider's where one is set, else the local one."""
    if settings.llm_base_url is None:
        return local_summary >> undegraded >> tell_rest
    provider = FallbackPrimitive(primary=build_provider(settings), fallbacks=[local_summary])
    return remember_hits >> provider >> tell_hits >> tell_rest


def build_provider(settings: Settings) -> WorkflowPrimitive[Any, Answer]:
    """Build the provider's branch: an answer from the cache or the provider, or an error."""
    provider = Provider(settings)

    @step(name="llm call")
    async def call(request: dict[str, Any]) -> Answer:
        try:
            summary = await provider.summarise(request["text"])
        except Exception as error:
            _log_failure(error)
            raise
        return {"summary": summary, "provider": provider.model, "degraded": False}

    @step(name="llm stream")
    async def tell(request: dict[str, Any], context: WorkflowContext) -> Answer:
        listener = listener_of(context)
        assert listener is not None
        try:
            summary = await provider.tell(request["text"], listener.say)
        except Exception as error:
            _log_failure(error)
            if listener.heard:
                raise BrokenOffError(f"the provider's stream broke off: {type(error).__name__}") from error
            raise
        return {"summary": summary, "provider": provider.model, "degraded": False}

    # An attempt that was allowed more than the whole would never be cut by its own limit.
    limited = TimeoutPrimitive(call, timeout_seconds=min(settings.llm_timeout, settings.provider_timeout))
    breaker = CircuitBreakerPrimitive(
        ConditionalPrimitive(has_listener, tell, limited),
        name="llm call",
        config=CircuitBreakerConfig(
            failure_threshold=FAILURE_THRESHOLD,
            recovery_timeout=RECOVERY_TIMEOUT,
            success_threshold=1,
            # A refused key is ours to mend: it says nothing about whether the provider works.
            expected_exception=(*RETRIED, MalformedAnswerError, BrokenOffError, StepTimeoutError),
        ),
    )
    # An open circuit is not waited for: the local summary answers at once.
    retry = RetryPrimitive(breaker, max_retries=MAX_RETRIES, retry_on=(*RETRIED, StepTimeoutError))
    whole = TimeoutPrimitive(retry, timeout_seconds=settings.provider_timeout)

    answers = InMemoryBackend()

    def keep(asked: WorkflowPrimitive[Any, Answer]) -> WorkflowPrimitive[Any, Answer]:
        return CachePrimitive(
            asked,
            cache_key_fn=lambda request: [request["text"], provider.model],
            ttl=CACHE_TTL,
            namespace="documents.summary",
            storage=answers,
        )

    # Who listens must not wait for a call that somebody else has begun, and whose pieces nobody else hears: so a stream
    # looks the answer up, asks for itself, and leaves the answer for others.
    kept = keep(recall)

    @step(name="stream")
    async def stream(request: dict[str, Any], context: WorkflowContext) -> Answer:
        found = kept.peek(request, context)  # not execute, which would join whoever is leaving an answer right now
        if found is not MISS:
            return found
        answer: Answer = await whole.execute(request, context)
        # In a context of its own: it is no hit if somebody else has left an answer meanwhile.
        await kept.execute({**request, "answer": answer}, context.create_child_context())
        return answer

    return ConditionalPrimitive(has_listener, stream, keep(whole))


@step
async def recall(request: dict[str, Any]) -> Answer:
    """Stand in for the provider in a cache that is given an answer."""
    answer: Answer = request["answer"]
    return answer


def listener_of(context: WorkflowContext) -> Listener | None:
    """Return who listens to what runs with *context*, if anybody does."""
    return context.state.get(_LISTENER)


async def has_listener(request: Any, context: WorkflowContext) -> bool:
    return listener_of(context) is not None


def _log_failure(error: Exception) -> None:
    logger.warning("the provider failed: %s: %s", type(error).__name__, error)  # neither key nor text is in it


def _asked_for(task: str, then: WorkflowPrimitive[Any, Any]) -> WorkflowPrimitive[Any, Any]:
    return ConditionalPrimitive(lambda request: task in request["tasks"], then, nothing)


@step
async def nothing(request: Any) -> None:
    """Stand for a task that was not asked for."""


@thread_step
def local_summary(request: dict[str, Any]) -> Answer:
    sentences = local.summary_sentences(request["text"])
    return {"summary": " ".join(sentences), "sentences": sentences, "provider": LOCAL, "degraded": True}


@thread_step
def keywords(request: dict[str, Any]) -> list[str]:
    return local.extract_keywords(request["text"])


@thread_step
def language(request: dict[str, Any]) -> str:
    return local.detect_language(request["text"])


@thread_step
def word_count(request: dict[str, Any]) -> int:
    return local.count_words(request["text"])


@step
async def undegraded(answer: Answer) -> Answer:
    """Without a provider the local summary is what was to be had."""
    return {**answer, "degraded": False, "cached": False}


@step
async def remember_hits(request: Any, context: WorkflowContext) -> Any:
    context.state[_HITS] = context.state.get("cache_hits", 0)
    return request


@step
async def tell_hits(answer: Answer, context: WorkflowContext) -> Answer:
    """Say whether the cache answered. A call under way that is shared is no hit: the provider is asked for it too."""
    if answer["degraded"]:
        logger.warning("the local summary answered for the provider, correlation id %s", context.correlation_id)
    hit = context.state.get("cache_hits", 0) > context.state[_HITS]
    return {**answer, "cached": hit}


@step
async def tell_rest(answer: Answer, context: WorkflowContext) -> Answer:
    """Tell the listener what it has not heard: a summary that nobody streamed, or one in place of a broken one."""
    listener = listener_of(context)
    if listener is not None and listener.heard != answer["summary"]:
        if listener.heard:
            listener.forget()
        first, *others = answer.get("sentences") or [answer["summary"]]
        listener.say(first)
        for sentence in others:
            listener.say(f" {sentence}")
    return answer
