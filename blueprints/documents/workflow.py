"""The document workflow: ``validate >> (summary | keywords | language | word_count) >> save``.

The provider's part is composed in the order of the primitives' guide: Fallback(Cache(Timeout(Retry(CircuitBreaker(
Timeout(call)))))), with the local summary as the fallback, outside the cache: only what the provider said is kept.
"""

from __future__ import annotations

import logging
from typing import Any

from blueprints.documents import local
from blueprints.documents.llm import RETRIED, MalformedAnswerError, Provider
from blueprints.documents.schemas import ProcessRequestSchema
from blueprints.documents.store import save_document
from blueprints.settings import Settings
from tta_sync import WorkflowContext, step, thread_step
from tta_sync.exceptions import StepTimeoutError
from tta_sync.marshmallow import load_step
from tta_sync.primitives import (
    CachePrimitive,
    CircuitBreakerConfig,
    CircuitBreakerPrimitive,
    ConditionalPrimitive,
    FallbackPrimitive,
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

_HITS = "documents.cache_hits"  # our key in context.state

Answer = dict[str, Any]


def build_flow(settings: Settings, save: WorkflowPrimitive[Any, Any] = save_document) -> WorkflowPrimitive[Any, Any]:
    """Build the workflow that the settings describe.

    Takes ``{"text": ..., "tasks": [...]}``, as :class:`ProcessRequestSchema` has it; returns what *save* returns, which
    gets the branches' results. Needs a caller with a unit of work, since it saves.

    Raises (when run):
        marshmallow.ValidationError: the data does not fit.
    """
    return (
        load_step(ProcessRequestSchema(max_text=settings.max_text), name="validate")
        >> (
            _asked_for("summary", build_summary(settings))
            | _asked_for("keywords", keywords)
            | _asked_for("language", language)
            | word_count
        )
        >> save
    )


def build_summary(settings: Settings) -> WorkflowPrimitive[Any, Answer]:
    """Build the summary's branch: the provider's where one is set, else the local one."""
    if settings.llm_base_url is None:
        return local_summary >> undegraded
    return remember_hits >> FallbackPrimitive(primary=build_provider(settings), fallbacks=[local_summary]) >> tell_hits


def build_provider(settings: Settings) -> WorkflowPrimitive[Any, Answer]:
    """Build the provider's branch: an answer from the cache or the provider, or an error."""
    provider = Provider(settings)

    @step(name="llm call")
    async def call(request: dict[str, Any]) -> Answer:
        try:
            summary = await provider.summarise(request["text"])
        except Exception as error:
            logger.warning("the provider failed: %s: %s", type(error).__name__, error)  # neither key nor text is in it
            raise
        return {"summary": summary, "provider": provider.model, "degraded": False}

    # An attempt that was allowed more than the whole would never be cut by its own limit.
    attempt = TimeoutPrimitive(call, timeout_seconds=min(settings.llm_timeout, settings.provider_timeout))
    breaker = CircuitBreakerPrimitive(
        attempt,
        config=CircuitBreakerConfig(
            failure_threshold=FAILURE_THRESHOLD,
            recovery_timeout=RECOVERY_TIMEOUT,
            success_threshold=1,
            # A refused key is ours to mend: it says nothing about whether the provider works.
            expected_exception=(*RETRIED, MalformedAnswerError, StepTimeoutError),
        ),
    )
    # An open circuit is not waited for: the local summary answers at once.
    retry = RetryPrimitive(breaker, max_retries=MAX_RETRIES, retry_on=(*RETRIED, StepTimeoutError))
    whole = TimeoutPrimitive(retry, timeout_seconds=settings.provider_timeout)
    return CachePrimitive(
        whole,
        cache_key_fn=lambda request: [request["text"], provider.model],
        ttl=CACHE_TTL,
        namespace="documents.summary",
    )


def _asked_for(task: str, then: WorkflowPrimitive[Any, Any]) -> WorkflowPrimitive[Any, Any]:
    return ConditionalPrimitive(lambda request: task in request["tasks"], then, nothing)


@step
async def nothing(request: Any) -> None:
    """Stand for a task that was not asked for."""


@thread_step
def local_summary(request: dict[str, Any]) -> Answer:
    return {"summary": local.summarise(request["text"]), "provider": LOCAL, "degraded": True}


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
