"""What the guard is told: where the engine listens, and the recipe's serving section.

GuardSettings("http://127.0.0.1:8001", Guarding(attempts=2))
"""

from dataclasses import dataclass, field

from fusion.sections.serving import Guarding, Sampling
from serving.records.settings import Recording


@dataclass(frozen=True)
class GuardSettings:
    """Settings of one guard.

    `sampling` fills chat requests that do not say (None: leaves them as they are); `max_model_len` caps the filled
    max_tokens, the engine clips it to what the prompt leaves. With `api_keys` a request needs one of them;
    `upstream_key` is the engine's own, sent instead. With `operator_keys` everything recorded may be seen.
    """

    upstream: str
    guard: Guarding = field(default_factory=Guarding)
    sampling: Sampling | None = field(default_factory=Sampling)
    max_model_len: int | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    upstream_key: str | None = field(default=None, repr=False)
    operator_keys: tuple[str, ...] = field(default=(), repr=False)
    recording: Recording | None = None

    @property
    def budget(self) -> int | None:
        """max_tokens of a request that names none."""
        if self.sampling is None:
            return None
        return min(self.sampling.max_tokens, self.max_model_len or self.sampling.max_tokens)
