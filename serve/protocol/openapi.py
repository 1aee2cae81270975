"""The OpenAPI description, as far as FastAPI does not derive it from the routes: the body of a request."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from . import messages

_REFS = "#/components/schemas/{model}"
DESCRIPTION = (
    "Classifies images, each answered at the first exit that is confident enough. Speaks the Open Inference Protocol "
    "(KServe v2); tensors are JSON, or bytes after the JSON."
)
BODY = {
    "parameters": [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Bytes of the JSON, if tensors follow it as bytes.",
            "schema": {"type": "integer", "minimum": 0},
        },
        {
            "name": "Content-Encoding",
            "in": "header",
            "description": "How the body is compressed; other headers describe it before that.",
            "schema": {"enum": ["gzip", "deflate", "identity"]},
        },
        *(
            {"name": name, "in": "header", "description": text, "schema": {"type": "number", "exclusiveMinimum": 0}}
            for name, text in (
                ("X-Request-Timeout-Ms", "Milliseconds that the client waits; known before the body is read."),
                ("X-Envoy-Expected-Rq-Timeout-Ms", "The same, as Envoy sends it."),
            )
        ),
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _REFS.format(model="InferenceRequest")}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description, with the request's body, which FastAPI does not read and so does not know."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, request = models_json_schema([(messages.InferenceRequest, "validation")], ref_template=_REFS)
        schema["components"]["schemas"].update(request["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
