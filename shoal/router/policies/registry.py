"""Policies by name, imported when first asked for."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from random import Random

from shoal.errors import ConfigError
from shoal.router.policies.base import Policy, PolicyOptions

_CLASSES = {
    "round-robin": ("shoal.router.policies.round_robin", "RoundRobin"),
    "weighted-round-robin": ("shoal.router.policies.weighted_round_robin", "WeightedRoundRobin"),
    "least-connections": ("shoal.router.policies.least_connections", "LeastConnections"),
    "least-outstanding-tokens": ("shoal.router.policies.least_outstanding_tokens", "LeastOutstandingTokens"),
    "power-of-two": ("shoal.router.policies.power_of_two", "PowerOfTwo"),
    "prefix-aware": ("shoal.router.policies.prefix_aware", "PrefixAware"),
    "session-affinity": ("shoal.router.policies.session_affinity", "SessionAffinity"),
}
POLICIES = tuple(_CLASSES)


def create_policy(name: str, options: PolicyOptions | None = None, random: Random | None = None) -> Policy:
    """The policy called `name`; `random`: where it draws from, seeded for tests.

    Raises ConfigError for an unknown name, an option out of its range, or one that this policy has no use for.
    """
    if name not in _CLASSES:
        nearest = difflib.get_close_matches(name, POLICIES, 1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ConfigError(f"routing policy {name!r} is unknown; {hint}there are: {', '.join(POLICIES)}")
    options = options or PolicyOptions()
    module, class_name = _CLASSES[name]
    kind: type[Policy] = getattr(importlib.import_module(module), class_name)
    _check(name, kind, options)
    return kind(options, random or Random())


def _check(name: str, kind: type[Policy], options: PolicyOptions) -> None:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default and field.name not in kind.used_options:
            used = ", ".join(sorted(kind.used_options)) or "none"
            raise ConfigError(f"routing policy {name} has no use for {field.name}={value}; its options: {used}")
    # The comparisons are written so that NaN fails them.
    if not options.load_factor >= 1:
        raise ConfigError(f"load_factor must be 1 or more (1.25: a quarter above the mean); got {options.load_factor}")
    if options.max_blocks < 1:
        raise ConfigError(f"max_blocks must be 1 or more; got {options.max_blocks}")
