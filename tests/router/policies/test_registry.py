"""Policies by name: what there is, and what is refused with a reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shoal.errors import ConfigError
from shoal.router.policies import POLICIES, Policy, PolicyOptions, create_policy


@pytest.mark.parametrize("name", POLICIES)
def test_every_name_makes_its_policy(name: str) -> None:
    made = create_policy(name)
    assert isinstance(made, Policy)
    assert type(made).__name__.lower() == name.replace("-", "")


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"'round_robin' is unknown; did you mean round-robin\? there are: round-rob"):
        create_policy("round_robin")
    with pytest.raises(ConfigError, match="'q' is unknown; there are"):
        create_policy("q")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("round-robin", {"by_speed": True}, "round-robin has no use for by_speed=True; its options: none"),
        ("session-affinity", {"by_speed": True}, "has no use for by_speed=True; its options: load_factor"),
        ("least-connections", {"load_factor": 2.0}, "has no use for load_factor=2.0; its options: by_speed"),
        ("prefix-aware", {"load_factor": 0.9}, "load_factor must be 1 or more .*; got 0.9"),
        ("prefix-aware", {"load_factor": float("nan")}, "load_factor must be 1 or more .*; got nan"),
        ("prefix-aware", {"max_blocks": 0}, "max_blocks must be 1 or more; got 0"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_policy(name, PolicyOptions(**options))


def test_policies_are_imported_when_asked_for() -> None:
    program = "import sys, shoal.router.policies; print([m for m in sys.modules if m.endswith(('_robin', '_aware'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
