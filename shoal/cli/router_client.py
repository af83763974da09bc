"""Asks a running router for its servers, for `shoal router status`, `drain` and `undrain`."""

from __future__ import annotations

from typing import Any

import httpx

from shoal.cli.client_options import RouterClientOptions
from shoal.errors import AuthenticationError, ConfigError, EngineError, ShoalError, UnavailableError


def ask_router(options: RouterClientOptions, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON of its answer. Raises ShoalError for a router that is not there, or does not want to."""
    url = options.router.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--router must begin with http:// or https://; got {options.router!r}")
    headers = {"authorization": f"Bearer {options.admin_key}"} if options.admin_key else {}
    local = any(f"//{host}" in url for host in ("127.0.0.1", "localhost", "[::1]"))
    try:
        response = httpx.request(method, url + path, json=body, headers=headers, timeout=10, trust_env=not local)
        content = response.json()
    except httpx.HTTPError as error:
        raise UnavailableError(f"no router answers at {url} ({error}); `shoal router` starts one") from error
    except ValueError:
        raise EngineError(f"{url}{path} does not answer like a router ({response.status_code})") from None
    if response.status_code == 200:
        return content
    message = content.get("error", {}).get("message", content) if isinstance(content, dict) else content
    if response.status_code == 401:
        raise AuthenticationError(f"{message} (--admin-key)")
    raise ShoalError(str(message))


def show_backends(state: dict[str, Any]) -> str:
    """A line for each server."""
    rows = [("server", "kind", "models", "running", "breaker", "state")]
    for one in state["backends"]:
        condition = "in" if one["available"] else f"out: {one['why_out']}"
        models = ", ".join(one["models"]) or "-"
        rows.append((one["url"], one["kind"], models, str(one["num_running"]), one["breaker"], condition))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for peer in state.get("peers", ()):
        lines.append(f"router {peer['url']}: {'is told of requests' if peer['up'] else 'down: ' + peer['why_down']}")
    taking = "takes requests" if state["admitting"] else "is shutting down"
    lines.append(
        f"The router {taking}: {state['num_running']} run, {state['num_waiting']} wait; policy {state['policy']}."
    )
    return "\n".join(lines)
