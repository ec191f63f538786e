"""Recipe sections of the server: vLLM, the guard before it, its policy and its records."""

from typing import Any, Literal

from pydantic import Field, model_validator

from fusion.sections.section import Section

MAX_TOKENS = 8192  # of an answer
Detector = Literal["secrets", "email", "phone", "cn_identity", "bank_card"]  # serving/guard/detectors.py


class Sampling(Section):
    """Defaults for requests that do not choose their own."""

    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_tokens: int = Field(MAX_TOKENS, gt=0)


class Question(Section):
    """One sample question that `run` asks the server."""

    question: str
    domain: str | None = None
    json_schema: dict[str, Any] | None = None
    max_tokens: int | None = Field(None, gt=0)
    temperature: float | None = Field(None, ge=0)


class PolicyRule(Section):
    """What is looked for in requests or answers, and what becomes of it."""

    find: tuple[Detector, ...] = ()
    words: tuple[str, ...] = ()  # a block list, in any case of letters
    side: Literal["input", "output", "both"] = "both"
    action: Literal["redact", "refuse"] = "redact"

    @model_validator(mode="after")
    def _of_something(self) -> "PolicyRule":
        if not self.find and not any(word.strip() for word in self.words):
            raise ValueError("a rule looks for nothing: give it 'find' or 'words'")
        return self


class Moderation(Section):
    """A moderation model behind an OpenAI-compatible address; what it flags is refused."""

    url: str = Field(pattern=r"^https?://")  # up to and without /v1
    model: str
    side: Literal["input", "output", "both"] = "both"
    fail: Literal["open", "closed"] = "closed"  # where it does not answer: pass, or refuse
    timeout_s: float = Field(10.0, gt=0)
    api_key_variable: str | None = None  # the environment variable that holds its key


class Policy(Section):
    """What may not go in or out. Rules are applied in their order."""

    rules: tuple[PolicyRule, ...] = ()
    phone_regions: tuple[str, ...] = ("CN", "US")  # whose numbers count where they have no country code
    moderation: Moderation | None = None


class Records(Section):
    """What is kept of every request: why it was routed as it was, and what people said of it (serving/records)."""

    url: str | None = None  # sqlite:///FILE or postgresql://...; None: records.sqlite in the output folder
    prompts: bool = False  # keep what was asked and answered, as the policy leaves it
    engine_routes: bool = False  # on GPUs: vLLM tells the experts of every token (Model Runner V2)
    explain_share: float = Field(0.0, ge=0, le=1)  # of the other requests whose experts are computed aside
    keep_days: float = Field(30.0, gt=0)
    keep_rows: int = Field(1_000_000, gt=0)
    queue: int = Field(2_000, gt=0)  # requests that wait to be written; more are dropped, and counted

    @model_validator(mode="after")
    def _of_a_text(self) -> "Records":
        if self.explain_share and not self.prompts:
            raise ValueError("'explain_share' needs the requests' text: set 'prompts' to true, or leave it out")
        return self


class Guarding(Section):
    """How hard the guard tries to give what a request asks for, and what it takes on."""

    attempts: int = Field(3, gt=0)  # a request, in all
    deadline_s: float = Field(900.0, gt=0)  # for all of them
    unwrap: bool = False  # one JSON value out of a fence or of text around it; the answer says where that was done
    keepalive_s: float = Field(10.0, gt=0)  # between the comment lines of a stream that is being checked
    policy: Policy = Policy()
    api_keys_file: str | None = None  # one a line; those of the variable QWEN_FUSION_API_KEYS count as well
    requests_per_minute: int | None = Field(None, gt=0)  # a key, or a client's address where there are no keys
    max_in_flight: int | None = Field(1024, gt=0)  # requests at a time, the next gets a 503
    max_body_bytes: int = Field(16 * 2**20, gt=0)
    workers: int = Field(1, gt=0)  # guard processes; the two limits above are each one's own
    drain_s: float = Field(30.0, gt=0)  # what requests under way get to end in when the server is told to
    log: Literal["none", "requests", "content"] = "requests"  # a JSON line a request; with what was asked and answered
    records: Records | None = None  # where there is one, requests are recorded, and feedback is taken
    operator_keys_file: str | None = None  # whose keys see every record; where nobody needs a key, everyone does
    ui: bool = False  # the page of live traffic at /ui, which needs records

    @model_validator(mode="after")
    def _recorded(self) -> "Guarding":
        if self.ui and self.records is None:
            raise ValueError("'ui' shows records: add a 'records' section (`records: {}` takes what is usual)")
        return self


class Serving(Section):
    """vLLM behind the guard."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    tensor_parallel_size: int = Field(1, gt=0)
    pipeline_parallel_size: int = Field(1, gt=0)  # stages of layers, each on tensor_parallel_size cards of its own
    data_parallel_size: int = Field(1, gt=0)  # ranks in lock-step that share the experts: no replicas (configs/deploy)
    distributed_executor_backend: Literal["mp", "ray"] | None = None  # ray: cards of other machines too; None: vLLM's
    enable_expert_parallel: bool = False  # whole experts to a card instead of a slice of each
    quantization: Literal["fp8"] | None = None  # by vLLM while it loads; gates, norms, embeddings and head stay as are
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    max_model_len: int = Field(32768, gt=0)
    yarn_factor: float | None = Field(None, gt=1)
    # vLLM's development routes, on the engine's loopback port, take new gates: leave off where others share the machine
    live_gates: bool = False
    checkpoint: str | None = None  # what is served; None: the fused model as it is, otherwise what `quantize` has made
    cpu_kv_cache_bytes: int = Field(256 * 2**20, gt=0)  # CPU only: a share of all memory would be asked for otherwise
    sampling: Sampling = Sampling()
    guard: Guarding = Guarding()
    questions: tuple[Question, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _room_for_a_prompt(cls, given: Any) -> Any:
        """Half of a short context is for the answer, where the recipe does not say how much."""
        if not isinstance(given, dict) or not isinstance(length := given.get("max_model_len"), int):
            return given
        sampling = given.get("sampling") or {}
        if not isinstance(sampling, dict) or "max_tokens" in sampling or not 2 <= length <= MAX_TOKENS:
            return given
        return {**given, "sampling": {**sampling, "max_tokens": length // 2}}
