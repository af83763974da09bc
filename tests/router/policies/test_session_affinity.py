"""session-affinity: a session has one home, whoever asks; load goes before that."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router.policies.views import Counts, backends, policy, request

SESSIONS = [f"session-{number}" for number in range(400)]


def homes(views: list) -> dict[str, str]:
    chooser = policy("session-affinity")
    return {session: views[chooser.pick(request(session=session), views)].key for session in SESSIONS}


@settings(max_examples=20)
@given(st.permutations(range(5)), st.integers(0, 4))
def test_a_leaving_backend_moves_its_own_sessions_only(order: list[int], leaving: int) -> None:
    views = backends(1, 1, 1, 1, 1)
    before = homes(views)
    shuffled = [views[index] for index in order]
    assert homes(shuffled) == before  # the order of candidates says nothing, nor which router asks
    after = homes([view for view in shuffled if view.key != views[leaving].key])
    moved = {session for session in SESSIONS if before[session] != after[session]}
    assert moved == {session for session in SESSIONS if before[session] == views[leaving].key}
    assert len(Counter(after[session] for session in moved)) > 1  # and they spread over the others


def test_weights_are_shares_of_the_sessions() -> None:
    found = Counter(homes(backends(1, 1, 6)).values())
    assert 30 <= found["a"] <= 70 and 30 <= found["b"] <= 70 and 260 <= found["c"] <= 340


def test_the_places_are_the_same_in_every_process() -> None:
    views = backends()
    chooser = policy("session-affinity")
    assert [views[chooser.pick(request(session=name), views)].key for name in ("x", "y", "z", "ü\ud800")] == list(
        "bada"
    )


def test_a_busy_home_is_left_until_it_has_room() -> None:
    counts = Counts(policy("session-affinity"), backends())
    home = counts.send(request(session="x"))
    assert counts.send(request(session="x")) is home
    elsewhere = counts.send(request(session="x"))
    assert elsewhere is not home
    assert counts.send(request(session="x")) is not home
    while counts.running:
        counts.end()
    assert counts.send(request(session="x")) is home


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8), st.integers(1, 500))
def test_the_bound_on_load(loads: list[int], num_tokens: int) -> None:
    views = backends(*[1.0] * len(loads))
    for view, load in zip(views, loads, strict=True):
        view.outstanding_tokens = load
    chosen = policy("session-affinity").pick(
        request(session="x", num_prompt_tokens=num_tokens, num_output_tokens=0), views
    )
    assert loads[chosen] <= max(1.25 * sum(loads) / len(loads) + num_tokens, min(loads))


def test_without_a_session_the_least_loaded() -> None:
    views = backends()
    for view, load in zip(views, (3, 2, 1, 4), strict=True):
        view.outstanding_tokens = load
    assert views[policy("session-affinity").pick(request(), views)].key == "c"
