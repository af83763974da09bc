"""The OpenAPI document (/openapi.json, /docs): routes read their bodies themselves, so they say here what those are."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from shoal.protocol.fields import RequestBody

_KINDS: dict[str, type[RequestBody]] = {}


def body_of(kind: type[RequestBody]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a `kind`."""
    _KINDS[kind.__name__] = kind
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def complete_openapi(app: FastAPI) -> None:
    """Let the app's document have the schemas that `body_of` refers to."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name, kind in _KINDS.items():
                schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[name] = schema
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
