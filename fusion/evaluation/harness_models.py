"""Models as lm-evaluation-harness asks them: behind an OpenAI server, or in transformers.

Generation goes through the chat route of a server, likelihoods, which that cannot give, through its completions route.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fusion.encoding import load_tokenizer, prompt_text
from fusion.evaluation.harness_metrics import unpacked
from fusion.progress import console
from fusion.sources import ModelSource, load_model

MOST_TOKENS = 512  # of an answer, where the task says nothing: lm-eval's 256 cut a model's sums where it is not brief


class Models(Protocol):
    """One model for both kinds of tasks."""

    def generations(self) -> Any:
        """The harness's model for tasks that generate."""

    def likelihoods(self) -> Any:
        """The harness's model for tasks that compare likelihoods."""


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI server, our guard's or vLLM's; `tokenizer` is the folder of its tokenizer.

    `server` gives the server's address, and is called when the first answer that is not kept has to be asked for.
    """

    server: Callable[[], str]
    name: str
    tokenizer: Path
    max_model_len: int = 2048
    concurrency: int = 16
    api_key: str | None = None

    def generations(self) -> Any:
        """Through /v1/chat/completions."""
        from lm_eval.models.openai_completions import LocalChatCompletion

        longest = self.max_model_len // 2  # of an answer: some tasks ask for more than a small model has room for
        tokenizer, length = load_tokenizer(self.tokenizer), self.max_model_len

        def room(messages: Any) -> int:
            """Tokens that a conversation leaves for its answer."""
            return length - len(tokenizer(prompt_text(tokenizer, messages))["input_ids"])

        address = self._address

        class Chat(LocalChatCompletion):
            """Whole conversations, answers whose beginning is given; a prompt over the context's length has none."""

            def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
                fits = [room(self.create_message(request.args[:1])) > 0 for request in requests]
                if over := len(requests) - sum(fits):
                    said = f"  {over} prompts of more than {length} tokens: they have no answer"
                    console.print(said, highlight=False)
                asked = [request for request, fit in zip(requests, fits, strict=True) if fit]
                self.base_url = address("chat/completions")
                answers = iter(super().generate_until(asked, disable_tqdm) if asked else ())
                return [next(answers) if fit else "" for fit in fits]

            def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> Any:
                return super().apply_chat_template(unpacked(chat_history), add_generation_prompt)

            def _create_payload(self, messages: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
                payload: dict[str, Any] = super()._create_payload(messages, *args, **kwargs)
                payload["max_tokens"] = min(payload["max_tokens"], longest, room(messages))
                if not any(payload["stop"]):
                    del payload["stop"]
                if messages[-1]["role"] == "assistant":
                    payload |= {"add_generation_prompt": False, "continue_final_message": True}
                return payload

        return Chat(tokenizer_backend="None", **self._arguments())

    def likelihoods(self) -> Any:
        """Through /v1/completions, with the prompt echoed."""
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        address = self._address

        class Completions(LocalCompletionsAPI):
            """Likelihoods of a server that is called when the first is needed."""

            def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
                self.base_url = address("completions")
                found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **kwargs)
                return found

        return Completions(tokenizer_backend="huggingface", tokenizer=str(self.tokenizer), **self._arguments())

    def _address(self, route: str) -> str:
        return f"{self.server().rstrip('/')}/v1/{route}"

    def _arguments(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "num_concurrent": self.concurrency,
            "max_length": self.max_model_len,
            "max_gen_toks": MOST_TOKENS,
            "timeout": 3600,
            "header": {"Authorization": f"Bearer {self.api_key}"} if self.api_key else None,
        }


class InTransformers:
    """A model loaded with transformers, its adapter merged in."""

    def __init__(self, source: ModelSource, tokenizer: Path, attention: str, loading: Any, batch_rows: int):
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        class Local(HFLM):
            """Whole conversations as prompts."""

            @property
            def max_gen_toks(self) -> int:
                return min(MOST_TOKENS, int(self.max_length) // 2)

            def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> Any:
                return super().apply_chat_template(unpacked(chat_history), add_generation_prompt)

        loaded = load_model(source, attention, loading)
        self._model = Local(
            pretrained=loaded,
            tokenizer=AutoTokenizer.from_pretrained(tokenizer),
            backend="causal",
            batch_size=batch_rows,
            device=str(loaded.device),
        )

    def generations(self) -> Any:
        """The model itself."""
        return self._model

    def likelihoods(self) -> Any:
        """The model itself."""
        return self._model
