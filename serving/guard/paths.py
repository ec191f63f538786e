"""The paths that the guard answers.

CHAT in POSTED
"""

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
FEEDBACK, ROUTING = "/v1/feedback", "/v1/routing/"
UI, OVERVIEW, EXPLAIN = "/ui", "/ui/overview", "/ui/explain/"
OPEN = ("/health", "/ready")  # without a key, however many requests are under way
COUNTED = (*OPEN, "/metrics", "/openapi.json", CHAT, COMPLETIONS, MODELS, FEEDBACK)
POSTED = (CHAT, COMPLETIONS, FEEDBACK)


def is_ui(path: str) -> bool:
    """Whether a path is one of the page's."""
    return path in (UI, OVERVIEW) or path.startswith(EXPLAIN)
