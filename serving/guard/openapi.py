"""The guard's routes as an OpenAPI description: GET /openapi.json.

python -c "import json; from serving.guard.openapi import DESCRIPTION; print(json.dumps(DESCRIPTION, indent=1))"

Requests and answers of the completion routes are OpenAI's, passed to the engine and checked by it; what is described in
full is what the guard itself reads and says.
"""

from typing import Any

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
                "attempts": {"type": "array", "items": {"type": "object"}},
            },
        }
    },
}
GUARD: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "format": {"enum": ["json", "yaml", "xml"]},
        "schema": {"type": ["object", "boolean"]},
        "live": {"type": "boolean"},
        "routing": {"type": "boolean"},
    },
}
STRUCTURE: dict[str, Any] = {
    "model": {"type": "string"},
    "n": {"type": "integer", "minimum": 1},
    "stream": {"type": "boolean"},
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0},
    "response_format": {"type": "object", "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}}},
    "structured_outputs": {"type": "object"},
    "guard": GUARD,
}
MESSAGES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"type": ["string", "array", "null"], "items": {"type": "object"}},
        },
    },
}
PROMPT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": ["string", "integer"]}},
        {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
COMPLETION: dict[str, Any] = {
    "type": "object",
    "required": ["choices"],
    "properties": {"choices": {"type": "array"}, "usage": {"type": "object"}, "guard": {"type": "object"}},
}


def _answer(description: str, schema: Any = None, kind: str = "application/json") -> dict[str, Any]:
    return {"description": description, **({"content": {kind: {"schema": schema}}} if schema is not None else {})}


def _completion(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    whole = {"type": "object", "required": ["model", *required], "properties": {**STRUCTURE, **properties}}
    content = {"application/json": {"schema": COMPLETION}, "text/event-stream": {"schema": {}}}
    errors = {
        "400": "The request or its schema cannot be used, or the policy refuses it",
        "401": "No known API key",
        "405": "Asked with another method",
        "408": "The body did not come in time",
        "413": "The body is too large",
        "422": "No valid answer within the attempts, or the policy refuses it",
        "429": "Too many requests within a minute",
        "502": "The engine did not answer",
        "503": "Too many requests at a time, or the moderation model does not answer",
        "504": "The deadline passed",
    }
    return {
        "post": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": whole}}},
            "responses": {
                "200": {"description": "An answer that is as asked", "content": content},
                **{status: _answer(said, ERROR) for status, said in errors.items()},
                "default": _answer("The engine's own error", ERROR),
            },
        }
    }


def _reads(said: str, schema: Any, kind: str = "application/json") -> dict[str, Any]:
    return {"get": {"responses": {"200": _answer(said, schema, kind), "default": _answer("An error", ERROR)}}}


FEEDBACK: dict[str, Any] = {
    "type": "object",
    "required": ["request_id"],
    "additionalProperties": False,
    "properties": {
        "request_id": {"type": "string"},
        "rating": {"enum": ["up", "down"]},
        "domain": {"type": "string"},
        "comment": {"type": "string", "maxLength": 2000},
    },
}


DESCRIPTION: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "qwen-fusion guard", "version": "1"},
    "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    "security": [{}, {"key": []}],
    "paths": {
        "/v1/chat/completions": _completion(["messages"], {"messages": MESSAGES, "tools": {"type": "array"}}),
        "/v1/completions": _completion(["prompt"], {"prompt": PROMPT}),
        "/v1/feedback": {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": {"schema": FEEDBACK}}},
                "responses": {
                    "201": _answer("It is kept", {"type": "object", "required": ["request_id", "kept"]}),
                    "default": _answer("An error", ERROR),
                },
            }
        },
        "/v1/routing/{request_id}": {
            "get": {
                "parameters": [{"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}}],
                "responses": {
                    "200": _answer("Why it was routed so", {"type": "object", "required": ["request_id", "shares"]}),
                    "default": _answer("An error", ERROR),
                },
            },
        },
        "/v1/models": _reads("The models served", {"type": "object", "required": ["data"]}),
        "/health": _reads("The guard runs", {"type": "object"}),
        "/ready": {
            "get": {
                "responses": {
                    "200": _answer("The engine is ready", {"type": "object"}),
                    "503": _answer("It is not", {"type": "object"}),
                }
            }
        },
        "/metrics": _reads("Counts for Prometheus", {"type": "string"}, "text/plain"),
    },
}
