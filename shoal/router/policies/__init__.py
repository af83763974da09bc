"""Which backend takes a request: policies by name, imported when first asked for. Pure: no clock, no sockets."""

from __future__ import annotations

from shoal.router.policies.base import BackendView, Policy, PolicyOptions, RequestView
from shoal.router.policies.prompt import BLOCK_BYTES, PromptShape, prefix_blocks, read_prompt
from shoal.router.policies.registry import POLICIES, create_policy
from shoal.router.policies.tokens import OutputEstimate, TokenRatio

__all__ = [
    "BLOCK_BYTES",
    "POLICIES",
    "BackendView",
    "OutputEstimate",
    "Policy",
    "PolicyOptions",
    "PromptShape",
    "RequestView",
    "TokenRatio",
    "create_policy",
    "prefix_blocks",
    "read_prompt",
]
