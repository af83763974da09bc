"""prefix-aware: it follows the cache, believes the reports, and never lets a hot spot form."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.router.policies import RequestView
from tests.router.policies.views import Counts, backends, policy, request


def document(number: int, num_blocks: int = 20, tail: int = 0) -> list[int]:
    """Blocks of a prompt that begins with a document; with a tail of its own that differs by `tail`."""
    own = [10_000_000 + 1000 * tail + index for index in range(4 if tail else 0)]
    return [1000 * number + index for index in range(num_blocks)] + own


@pytest.fixture
def counts() -> Counts:
    return Counts(policy("prefix-aware"), backends())


def test_a_prefix_stays_with_its_backend_and_new_ones_spread(counts: Counts) -> None:
    homes = {number: counts.serve(request(document(number))) for number in range(4)}
    assert len(set(homes.values())) == 4
    for turn in range(1, 9):
        for number in range(4):
            assert counts.serve(request(document(number, tail=turn)), cached=20 / 24) == homes[number]


def test_the_longest_match_wins(counts: Counts) -> None:
    short = counts.serve(request(document(1, 10)))
    views = [view for view in counts.views if view.key != short]
    long = counts.send(request(document(1, 20)), views).key
    counts.end()
    assert counts.serve(request(document(1, 30))) == long
    # Less than a sixteenth of the prompt is no reason to go anywhere.
    first_block = document(1, 1) + document(9, 99)
    assert counts.serve(request(first_block)) not in (short, long)


def test_a_busy_backend_is_not_chosen_for_its_prefix(counts: Counts) -> None:
    home = counts.send(request(document(1)))
    assert counts.send(request(document(1, tail=1))).key == home.key  # one request above the mean is allowed
    second = counts.send(request(document(1, tail=2)))
    assert second.key != home.key
    counts.end()
    counts.end()
    counts.end()
    # Now both have it, and the one with less to do is taken.
    home.outstanding_tokens = 10
    assert counts.serve(request(document(1, tail=3))) == second.key


def test_a_hot_prefix_spreads_over_backends(counts: Counts) -> None:
    picks = Counter[str]()
    for turn in range(1, 400):
        picks[counts.send(request(document(1, tail=turn))).key] += 1
        if len(counts.running) > 16:
            counts.end(20 / 24)
    assert len(picks) == 4
    assert max(picks.values()) <= 1.3 * sum(picks.values()) / 4


def test_a_report_of_no_hit_takes_back_what_is_older(counts: Counts) -> None:
    one = backends(1)
    alone = Counts(policy("prefix-aware"), one)
    table = lambda: alone.policy._tables["a"]  # noqa: E731
    for number in (1, 2, 3):
        alone.serve(request(document(number)), cached=0.0)
    assert [table().match(document(number)) for number in (1, 2, 3)] == [20, 20, 20]
    # 2 turns out to be gone: then so is 1, which was used before it; 3 was used later, and 2 has just been computed.
    alone.serve(request(document(2, tail=1)), cached=0.0)
    assert [table().match(document(number)) for number in (1, 2, 3)] == [0, 20, 20]
    # As expected, or nearly: nothing is lost.
    alone.serve(request(document(3, tail=1)), cached=18 / 24)
    alone.serve(request(document(3, tail=2)))
    assert [table().match(document(number)) for number in (1, 2, 3)] == [0, 20, 20]


def test_after_an_eviction_the_request_goes_where_the_prefix_is() -> None:
    counts = Counts(policy("prefix-aware"), backends(1, 1))
    home = counts.serve(request(document(1)))
    other = counts.serve(request(document(2)))
    assert home != other
    gone = counts.serve(request(document(3)))  # on one of them, later
    kept = {home: 1, other: 2}[gone]
    # The backend of 3 reports that it has nothing of what came before 3.
    assert counts.serve(request(document(kept, tail=1)), cached=0.0) == gone
    counts.policy.removed("nobody")
    assert counts.policy._tables[gone].match(document(3)) == 20


def test_a_burst_of_one_prefix_is_no_eviction(counts: Counts) -> None:
    """The second comes while the first computes the prefix, finds nothing, and nothing follows from that."""
    alone = Counts(policy("prefix-aware"), backends(1))
    alone.serve(request(document(1)), cached=0.0)
    alone.send(request(document(2, tail=1)))
    alone.send(request(document(2, tail=2)))
    alone.end(0.0)
    alone.end(0.0)
    table = alone.policy._tables["a"]
    assert table.match(document(1)) == 20 and table.trust == 1.0


def test_a_backend_that_caches_nothing_is_not_believed(counts: Counts) -> None:
    """a never has anything, b always: in the end a prefix that both have seen goes to b, however busy within bounds."""
    counts = Counts(policy("prefix-aware"), backends(1, 1))
    for turn in range(1, 60):
        for view in counts.views:
            counts.send(request(document(1, tail=turn)), [view])
            counts.end(0.0 if view.key == "a" else 20 / 24)
    tables = counts.policy._tables
    assert tables["a"].trust < 0.1 and tables["b"].trust > 0.9
    counts.views[1].outstanding_tokens = 50
    assert counts.serve(request(document(1, tail=999)), 20 / 24) == "b"


def test_a_server_that_says_nothing_is_predicted_from_what_was_sent(counts: Counts) -> None:
    home = counts.serve(request(document(1)), cached=None)
    assert [counts.serve(request(document(1, tail=turn)), cached=None) for turn in range(1, 9)] == [home] * 8


def test_a_backend_that_was_removed_is_new(counts: Counts) -> None:
    home = counts.send(request(document(1)))
    counts.policy.removed(home.key)
    counts.end(1.0)  # of the time before: no error, and nothing to learn
    assert home.key not in counts.policy._tables
    assert counts.policy.pick(request(document(1)), counts.views) >= 0


def test_prompts_without_a_block_go_to_the_least_loaded(counts: Counts) -> None:
    counts.views[0].outstanding_tokens = counts.views[1].outstanding_tokens = counts.views[3].outstanding_tokens = 5
    assert counts.serve(request([])) == "c"


SENDS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 50), st.integers(1, 3000), st.sampled_from(["stay", "end", "end"])),
    min_size=1,
    max_size=120,
)


@settings(max_examples=150)
@given(SENDS, st.lists(st.sampled_from([1.0, 1.0, 2.0, 4.0]), min_size=2, max_size=5), st.integers(0, 2**32))
def test_no_backend_is_chosen_above_the_bound(sends: list[tuple], weights: list[float], seed: int) -> None:
    """At every pick: the chosen one has at most 1.25 of its share and one request, or it is the least loaded of all."""
    random = Random(seed)
    counts = Counts(policy("prefix-aware"), backends(*weights))
    for number, tail, num_tokens, then in sends:
        before = {view.key: view.outstanding_tokens for view in counts.views}
        one: RequestView = request(document(number, tail=tail), None, num_tokens, 0)
        chosen = counts.send(one)
        mean = sum(before.values()) / sum(weights)
        least = min(before[view.key] / view.weight for view in counts.views)
        load = before[chosen.key]
        assert load <= 1.25 * mean * chosen.weight + num_tokens or load / chosen.weight == least
        if then == "end":
            counts.end(random.choice([None, 0.0, 0.8]), random.randrange(len(counts.running)))
