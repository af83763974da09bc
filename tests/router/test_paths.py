"""Paths that somebody might resolve to others, which clients are not to reach."""

from __future__ import annotations

import pytest

from shoal.errors import NotFoundError
from shoal.router.passthrough import check_path


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/v1/files/a.b..c", "/v1/…/x", "/v1/chat/completions", "/v1/a%20b"]
)
def test_plain_paths(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    "path",
    ["/v1/../metrics", "/v1/x/../chat/completions", "/v1/./models", "/v1//models", "//v1/models", "/v1/..",
     "/v1/%2e%2e/internal/v1/continue", "/v1/..\\metrics", "/v1/%2E./x"],
)  # fmt: skip
def test_others_are_refused(path: str) -> None:
    with pytest.raises(NotFoundError, match="dots or empty parts"):
        check_path(path)
