"""generate: one request for an answer, from admission to account. app.py calls it, also for those that are kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from shoal.errors import ShoalError
from shoal.protocol.deadline import DEADLINE_HEADER, read_deadline
from shoal.router.admission import ApiKey, Charge, Entry
from shoal.router.asgi import Answer
from shoal.router.core import Router
from shoal.router.failover import Forwarding
from shoal.router.request import GenerationRequest, model_name, with_model
from shoal.router.resume import KeptRequest

CLIENT_GONE = 499  # as nginx logs it


async def generate(
    router: Router,
    path: str,
    key: ApiKey,
    headers: Mapping[str, str],
    fields: dict[str, Any],
    body: bytes,
    answer: Answer,
    kept: KeptRequest | None = None,
) -> None:
    """Raises ShoalError for a request that is not taken in. fields: of the body; they are changed. kept: what the
    request has been so far."""
    arrived = time.monotonic()
    name = model_name(fields)
    deadline = read_deadline(headers.get(DEADLINE_HEADER), router.settings.options.deadline)
    model = await router.resolve(name, arrived + deadline, len(body))
    key.check_model(name or model)
    request = GenerationRequest(
        path=path,
        request_id=answer.request_id,
        body=with_model(fields, body, model),
        fields=fields,
        model=model,
        deadline=deadline,
        arrived=arrived,
        # Where the router asks for keys of its own, they are nobody else's business.
        authorization=None if len(router.keys) else headers.get("authorization"),
    )
    begun = None
    if kept is not None:
        request.seed, request.created = kept.seed, kept.created
        begun = kept.begun(request)
    given = fields.get("priority")
    # Lower goes first: a request may put itself behind others, not before them.
    priority = max(key.priority, given) if type(given) is int else key.priority
    view = router.view(request, headers, priority)
    charge = router.limits.charge(key, view.num_tokens, time.monotonic())
    entry = Entry(
        key=key.name,
        priority=priority,
        weight=key.weight,
        num_tokens=view.num_tokens,
        num_bytes=len(body),
        max_wait=max(arrived + deadline - time.monotonic(), 0.0),
        max_concurrent=key.max_concurrent,
    )
    forwarding: Forwarding | None = None
    status: int | None = CLIENT_GONE
    # What another router, or an earlier run, has counted.
    num_counted = 0 if begun is None else max(begun.journal.num_tokens, begun.text.num_tokens)
    try:
        async with router.admission.admit(entry):
            router.metrics.queue_time.add(entry.waited)
            forwarding = Forwarding(router.context, request, view, answer, begun)
            await forwarding.run()
            status = answer.outcome
    except ShoalError:
        status = None  # not taken in: counted as refused
        raise
    except Exception:
        status = 500
        raise
    finally:
        _account(router, request, forwarding, charge, status, arrived, answer, num_counted)


def _account(
    router: Router,
    request: GenerationRequest,
    forwarding: Forwarding | None,
    charge: Charge,
    status: int | None,
    arrived: float,
    answer: Answer,
    num_counted: int,
) -> None:
    """A request has ended: count what it really had."""
    now = time.monotonic()
    num_all = forwarding.num_tokens if forwarding is not None else 0
    num_tokens = max(num_all - num_counted, 0)
    num_prompt = forwarding.num_prompt_tokens if forwarding is not None else None
    router.limits.correct(charge, (num_prompt or 0) + num_tokens, now)
    if status is not None:
        router.metrics.ended(request.model, status, num_tokens, now - arrived)
    if request.stream and answer.status == 200:
        router.metrics.time_to_first_token.add(max(answer.started_at - arrived, 0.0))
    if status == 200:
        router.learn(request, num_prompt, num_all)
