"""The figures of `shoal bench serve`: pure functions of the requests' timestamps."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

from shoal.benchmark.record import RequestRecord
from shoal.errors import ConfigError
from shoal.stats import Summary, percentile

_SLO_NAMES = ("ttft", "itl", "e2e")
_SLO_ITEM = re.compile(r"\s*(\w+)\s*=\s*(\d+(?:\.\d*)?)\s*(ms|s)\s*")


@dataclasses.dataclass(frozen=True)
class Slo:
    """What a request must keep to be good, in seconds: the first token, the mean time between tokens, the whole."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """ "ttft=200ms,itl=50ms,e2e=3s", each at most once. Raises ConfigError."""
        limits: dict[str, float] = {}
        for item in text.split(","):
            match = _SLO_ITEM.fullmatch(item)
            if match is None or match[1] not in _SLO_NAMES or match[1] in limits:
                raise ConfigError(
                    f"--slo must be limits of {', '.join(_SLO_NAMES)}, such as ttft=200ms,itl=50ms,e2e=3s; got {text!r}"
                )
            limits[match[1]] = float(match[2]) * (1e-3 if match[3] == "ms" else 1.0)
        return cls(**limits)

    def kept_by(self, times: RequestTimes) -> bool:
        """Whether a request was good. One without a second token keeps any limit between tokens."""
        pairs = ((self.ttft, times.ttft), (self.itl, times.mean_itl), (self.e2e, times.e2e))
        return all(limit is None or found is None or found <= limit for limit, found in pairs)


@dataclasses.dataclass(frozen=True)
class RequestTimes:
    """The times of one answered request, in seconds. mean_itl: between its tokens; None where all came at once."""

    ttft: float
    e2e: float
    mean_itl: float | None
    # (time for each token, number of tokens) of each chunk after the first.
    gaps: list[tuple[float, float]]

    @classmethod
    def of(cls, record: RequestRecord) -> RequestTimes:
        """record: one that succeeded."""
        assert record.end is not None
        arrivals = record.token_arrivals()
        gaps, waited = [], 0.0
        for (before, _), (now, num_tokens) in zip(arrivals, arrivals[1:], strict=False):
            waited += now - before
            if num_tokens > 0:  # text that was held back can come without a new token: its wait is the next token's
                gaps.append((waited / num_tokens, num_tokens))
                waited = 0.0
        num_after_first = sum(num_tokens for _, num_tokens in gaps)
        total = sum(seconds * num_tokens for seconds, num_tokens in gaps)
        return cls(
            ttft=arrivals[0][0] - record.start,
            e2e=record.end - record.start,
            mean_itl=total / num_after_first if num_after_first else None,
            gaps=gaps,
        )


@dataclasses.dataclass(frozen=True)
class ServeReport:
    """Rates per second over `seconds`, from the first start to the last end; times in milliseconds.

    itl: over all tokens of all requests but those of first chunks; tokens of one chunk share its gap.
    chunk_gap: what a reader sees, whatever a chunk holds. num_good: requests that kept the SLO, of all that ended.
    num_uncounted: answers without usage, whose chunks were counted as tokens. start_delay_p99: how much later than
    intended requests were sent because this program, or the limit of concurrency, held them back.
    """

    seconds: float
    num_requests: int
    num_succeeded: int
    num_unfinished: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    num_prompt_tokens: int
    num_output_tokens: int
    num_uncounted: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    peak_concurrency: int
    start_delay_p99_ms: float | None
    ttft_ms: Summary | None
    itl_ms: Summary | None
    chunk_gap_ms: Summary | None
    e2e_ms: Summary | None
    num_good: int | None
    goodput: float | None


def serve_report(records: Sequence[RequestRecord], slo: Slo | None = None) -> ServeReport:
    """The figures of all requests that were sent. Those that failed count in `errors` and in the time only."""
    good = [record for record in records if record.succeeded]
    times = [RequestTimes.of(record) for record in good]
    ends = [record.end for record in records if record.end is not None]
    seconds = max(ends) - min(record.start for record in records) if ends else 0.0
    failed = [record for record in records if record.error is not None]
    num_prompt = sum(record.prompt_tokens or 0 for record in good)
    num_output = sum(record.num_output_tokens for record in good)
    num_good = None if slo is None else sum(slo.kept_by(one) for one in times)
    return ServeReport(
        seconds=seconds,
        num_requests=len(records),
        num_succeeded=len(good),
        num_unfinished=len(records) - len(good) - len(failed),
        errors=dict(collections.Counter(record.error for record in failed if record.error)),
        error_examples={record.error: record.message for record in reversed(failed) if record.error},
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        num_uncounted=sum(record.output_tokens is None for record in good),
        requests_per_second=_rate(len(good), seconds),
        output_tokens_per_second=_rate(num_output, seconds),
        total_tokens_per_second=_rate(num_prompt + num_output, seconds),
        peak_concurrency=peak_concurrency(records),
        start_delay_p99_ms=1e3 * percentile([one.start - one.scheduled for one in records], 0.99) if records else None,
        ttft_ms=_summary([one.ttft for one in times]),
        itl_ms=_itl_summary([gap for one in times for gap in one.gaps]),
        chunk_gap_ms=_summary(
            [
                now - before
                for record in good
                for (before, _), (now, _) in zip(record.arrivals, record.arrivals[1:], strict=False)
            ]
        ),
        e2e_ms=_summary([one.e2e for one in times]),
        num_good=num_good,
        goodput=None if num_good is None else _rate(num_good, seconds),
    )


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """Most requests that ran at one time. An end counts before a start at the same instant."""
    events = sorted(
        [(record.start, 1) for record in records] + [(record.end, -1) for record in records if record.end is not None]
    )
    running = peak = 0
    for _, change in events:
        running += change
        peak = max(peak, running)
    return peak


def _itl_summary(gaps: list[tuple[float, float]]) -> Summary | None:
    """Each gap as often as it stands for tokens; the mean counts fractions of a token too, the percentiles do not."""
    summary = _summary([seconds for seconds, num_tokens in gaps for _ in range(max(1, round(num_tokens)))])
    if summary is None:
        return None
    total, count = sum(seconds * num_tokens for seconds, num_tokens in gaps), sum(num for _, num in gaps)
    return dataclasses.replace(summary, mean=1e3 * total / count)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _summary(seconds: list[float]) -> Summary | None:
    return Summary.of(1e3 * one for one in seconds) if seconds else None
