"""The JSON guard: a core without transport (strict_json, schema, ladder) and the ASGI app around it (asgi)."""
