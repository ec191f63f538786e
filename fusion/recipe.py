"""The recipe: one YAML schema for the whole road, and the only place where a key is defined.

A key in the YAML is a field here and a `--set section.key=value` on the command line, under one name;
fusion/recipe_file.py reads both.
"""

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)

MAX_TOKENS = 8192  # of an answer
DEMO_ROPE_THETA = 1e4  # of a pretrained anchor: its sequences are short
NAME = r"^[a-z0-9][a-z0-9_-]*$"
# fusion/evaluation/scores.py
ScoreName = Literal["exact_match", "exact_values", "function_calls", "number", "tests_passed", "chrf"]
Detector = Literal["secrets", "email", "phone", "cn_identity", "bank_card"]  # serving/guard/detectors.py
SharedMethod = Literal["anchor", "mean", "multislerp", "karcher", "regmean"]
RESERVED = {
    "anchor": "the anchor",
    "fused": "the fused model",
    "shared": "the shared parts",
    "shared-expert": "the shared expert",
}
SCORE_NAMES: tuple[str, ...] = get_args(ScoreName)


Location = tuple[str | int, ...]  # the keys that lead to a value, items of lists by number


class Misfit(ValueError):
    """Sections that contradict each other, with the location of the one to change."""

    def __init__(self, location: Location, message: str):
        super().__init__(message)
        self.location = location


class Section(BaseModel):
    """A recipe section: immutable, and no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSource(Section):
    """Where chat rows come from: a generated task, a hub data set, a file (in place of `hub` if both), or parts.

    `form` names public data whose files are no table of prompts and answers (fusion/tasks/public.py reads them).
    """

    generated: str | None = None  # MODULE.TASK of fusion/tasks
    path: str | None = None  # JSON lines: {"messages": [...]}, {"conversations": [...]} or the two columns below
    hub: str | None = None  # data set id, with config and columns
    file: str | None = None  # file or folder within the recipe's data_folder
    parts: tuple["DataSource", ...] = ()  # of which each gives its `rows`, or an equal share of what is asked for
    config: str | None = None
    split: str = "train"
    lines: tuple[PositiveInt, PositiveInt] | None = None  # first and last line of the file that count
    form: Literal["table", "bfcl", "codeio", "xquad", "xquad_json"] = "table"
    prompt: str = "prompt"  # column, or a text with {columns} in it
    answer: str = "answer"  # column, or a text with {columns} in it
    reference: str | None = None  # column that the scorer compares with; None: the answer
    score: ScoreName = "exact_match"
    rows: int | None = Field(None, gt=0)
    license: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "DataSource":
        if [bool(self.generated), bool(self.path or self.hub), bool(self.parts)].count(True) != 1:
            why = "'file' is one of the recipe's data_folder, which is not set" if self.file and not self.path else ""
            raise ValueError(why or "name a 'generated' task, or a 'hub' data set or a file's 'path', or 'parts'")
        if self.lines and self.lines[0] > self.lines[1]:
            raise ValueError(f"'lines' are the first and the last, not {self.lines[0]} and {self.lines[1]}")
        if self.form != "table" and self.split not in ("train", "held_out"):
            raise ValueError(f"form '{self.form}' has the splits 'train' and 'held_out', not '{self.split}'")
        if self.generated and self.split not in ("train", "held_out"):
            raise ValueError(f"a generated task has the splits 'train' and 'held_out', not '{self.split}'")
        if self.score == "tests_passed" and self.form == "table" and not (self.generated or self.reference):
            raise ValueError("score 'tests_passed' needs 'reference', the column with the tests")
        return self

    def describe(self) -> str:
        """The source in a few words, for messages."""
        if self.parts:
            return " and ".join(part.describe() for part in self.parts)
        return f"{self.generated or self.path or self.hub}, {self.split}"


class ExtraSource(DataSource):
    """Rows that anchor and fused model are compared on, and that no expert is for."""

    max_new_tokens: int | None = Field(None, gt=0)  # None: evaluation.max_new_tokens
    optional: bool = False  # left out with a note where it cannot be had


class PretrainSettings(Section):
    """How a small anchor is trained from scratch: the demo family (fusion/demo_family.py)."""

    data: DataSource
    rows: int = Field(20000, gt=0)
    steps: int = Field(1000, gt=0)
    batch_rows: int = Field(32, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    hidden_size: int = Field(256, gt=0)
    intermediate_size: int = Field(512, gt=0)
    num_hidden_layers: int = Field(4, gt=0)
    num_attention_heads: int = Field(8, gt=0)
    num_key_value_heads: int = Field(4, gt=0)
    vocab_size: int = Field(1024, ge=300)  # 256 bytes and the special tokens come first
    max_position_embeddings: int = Field(512, ge=256)  # rows are packed into sequences of 256
    workers: int = Field(1, gt=0)  # processes of one thread that share every batch
    seed: int = 0

    @model_validator(mode="after")
    def _divides(self) -> "PretrainSettings":
        pairs = (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"))
        for whole, part in pairs:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} {getattr(self, part)} does not divide {whole} {getattr(self, whole)}")
        if self.workers > self.batch_rows:
            raise ValueError(f"{self.workers} workers cannot share a batch of {self.batch_rows} rows")
        return self


class Steps(Section):
    """The steps of any training by gradients (fusion/training.py)."""

    steps: int = Field(200, gt=0)
    batch_rows: int = Field(16, gt=0)
    gradient_accumulation: int = Field(1, gt=0)
    max_length: int = Field(1024, gt=0)  # tokens a packed sequence
    learning_rate: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(10, ge=0)
    evaluate_every: int = Field(50, gt=0)  # steps
    seed: int = 0


class TrainingSettings(Steps):
    """What training an expert's weights takes, whatever it learns from (fusion/branch.py)."""

    data: DataSource
    held_out: DataSource | None = None  # None: the domain's own held_out
    lora_rank: int | None = Field(None, gt=0)  # None: full weights
    rows: int = Field(1000, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    held_out_rows: int = Field(64, gt=0)  # for the loss that picks the best step
    score_rows: int = Field(32, gt=0)  # for the task score before and after
    max_new_tokens: int = Field(128, gt=0)
    allow_no_gain: bool = False


class Turn(Section):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class AnswerSampling(Section):
    """How a teacher's answers are drawn, and which of them an expert learns (fusion/sampled.py)."""

    preamble: tuple[Turn, ...] = ()  # before every question, for the teacher alone: an instruction, worked examples
    samples: int = Field(4, gt=0)  # a question
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)  # less sorts the vocabulary at every token, much of the time on CPUs
    max_tokens: int = Field(512, gt=0)  # an answer; one that is cut there is not learnt
    keep: int = Field(2, gt=0)  # different verified answers a question, at most
    unanswered: Literal["leave_out", "reference"] = "leave_out"  # what a question without a verified answer teaches
    minimum_chrf: float = Field(0.5, ge=0, le=1)  # from which a row scored by chrf counts as verified
    questions_at_once: int = Field(16, gt=0)  # requests under way; answers under way are `samples` times as many
    max_model_len: int = Field(2048, gt=0)  # tokens of question and answer
    seed: int = 0

    @model_validator(mode="after")
    def _room_for_a_question(self) -> "AnswerSampling":
        if self.max_tokens >= self.max_model_len:
            raise ValueError(f"max_tokens {self.max_tokens} leaves no room within max_model_len {self.max_model_len}")
        if self.keep > self.samples:
            raise ValueError(f"keep {self.keep} is more than the {self.samples} samples a question")
        return self

    @field_validator("preamble")
    @classmethod
    def _whole_turns(cls, preamble: tuple[Turn, ...]) -> tuple[Turn, ...]:
        roles = [turn.role for turn in preamble]
        examples = roles[roles[:1] == ["system"] :]
        if examples != ["user", "assistant"] * (len(examples) // 2):
            raise ValueError("a preamble is a system message, questions of the user with their answers, or both")
        return preamble


class BranchSettings(TrainingSettings):
    """How an expert is trained from the anchor."""

    trainable: Literal["mlp", "mlp+embeddings", "all"] = "mlp"  # embeddings: and the head, where it is not tied to them
    anchor_penalty: float = Field(0.0, ge=0)  # on what is trained outside the MLPs: the pull of fusion/branch.py
    general_share: float = Field(0.0, ge=0, lt=1)  # of the rows, drawn from the general domain's train data
    answers: Literal["reference", "sampled"] = "reference"  # the data's own, or a teacher's that are verified by them
    teacher: str | None = None  # of sampled answers: path or hub id, any tokenizer; None: the anchor
    sampling: AnswerSampling = AnswerSampling()

    @model_validator(mode="after")
    def _sampled_by_someone(self) -> "BranchSettings":
        if self.answers == "reference" and (self.teacher or self.sampling != AnswerSampling()):
            key = "teacher" if self.teacher else "sampling"
            raise ValueError(f"'{key}' is of no use with answers 'reference': set answers to sampled")
        return self

    @model_validator(mode="after")
    def _trains_what_it_says(self) -> "BranchSettings":
        if self.anchor_penalty and self.trainable == "mlp":
            raise ValueError(
                "'anchor_penalty' holds what is trained outside the MLPs, and trainable 'mlp' trains nothing there: "
                "leave it out, or use trainable 'mlp+embeddings' or 'all'"
            )
        if self.lora_rank and self.trainable == "mlp+embeddings":
            raise ValueError(
                "'lora_rank' makes adapters of linear maps alone, which embeddings are not: leave it out, or use "
                "trainable 'mlp' or 'all' (MLPs and attention)"
            )
        return self


class AnchoringSettings(TrainingSettings):
    """How a drifted expert is led back to the anchor before the merge (fusion/anchor.py): its MLPs alone learn."""

    method: Literal["logits", "text"]
    teacher: str | None = None  # path or hub id, for logits with the anchor's vocabulary; None: the drifted expert
    # whose MLPs the training starts from; best: of expert, halfway and anchor the one with the least held-out loss
    start: Literal["best", "expert", "halfway", "anchor", "transported"] = "best"
    top_logits: int = Field(64, gt=0)  # of the teacher's, kept for every answer token
    sampling: AnswerSampling = AnswerSampling()  # of the teacher's answers, for text

    @model_validator(mode="after")
    def _learnt_from_answers(self) -> "AnchoringSettings":
        if self.method == "logits" and self.sampling != AnswerSampling():
            raise ValueError("'sampling' is of no use with method 'logits': set method to text")
        return self


class AnchorModel(Section):
    """The model that the experts come from and whose shared parts the fused model has."""

    model: str | None = None  # path or hub id
    pretrain: PretrainSettings | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "AnchorModel":
        if bool(self.model) == bool(self.pretrain):
            raise ValueError("name exactly one of 'model' and 'pretrain'")
        return self


class Expert(Section):
    """One expert: a checkpoint, a checkpoint with an adapter, or a branch still to be trained."""

    name: str = Field(pattern=NAME)
    domain: str = Field(pattern=NAME)
    purpose: str = ""
    model: str | None = None  # path or hub id; None with `branch`
    adapter: str | None = None  # LoRA adapter, path or hub id, applied while reading
    license: str | None = None
    branch: BranchSettings | None = None
    anchor: AnchoringSettings | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Expert":
        if bool(self.model) == bool(self.branch):
            raise ValueError(f"expert '{self.name}' needs exactly one of 'model' and 'branch'")
        if self.branch and self.adapter:
            raise ValueError(f"expert '{self.name}' is branched from the anchor: 'adapter' does not apply")
        if self.branch and self.anchor and self.branch.trainable == "mlp":
            raise ValueError(f"expert '{self.name}' is branched with its MLPs alone: there is nothing to anchor")
        return self


class Rule(Section):
    """One sign that a question belongs to a domain; any of its parts is enough."""

    pattern: str | None = None  # regular expression, searched for without regard to case
    words: tuple[str, ...] = ()  # whole words, without regard to case
    not_languages: tuple[str, ...] = ()  # matches when the detected language is none of these ISO 639-1 codes

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression ({error})") from error
        return pattern

    @model_validator(mode="after")
    def _not_empty(self) -> "Rule":
        if not (self.pattern or self.words or self.not_languages):
            raise ValueError("a rule needs 'pattern', 'words' or 'not_languages'")
        return self


class Domain(Section):
    """What one kind of request looks like, and which data stand for it."""

    description: str = ""
    train: DataSource
    held_out: DataSource
    rules: tuple[Rule, ...] = ()  # domains are tried in the recipe's order; the first match wins
    fallback: str | None = None  # the domain whose expert serves this one, where it has none of its own


class SharedParts(Section):
    """Whose attention, norms, embeddings and head the fused model has (fusion/shared.py); `shared: mean` names all."""

    # of the parts that name none; auto: the least held-out loss
    method: Literal["anchor", "mean", "multislerp", "karcher", "regmean", "auto"] = "anchor"
    attention: SharedMethod | None = None
    norms: SharedMethod | None = None
    embeddings: SharedMethod | None = None
    head: SharedMethod | None = None
    weights: dict[str, PositiveFloat] = {}  # of the experts, 1 where none is given
    rows: int = Field(64, gt=0)  # a domain, for the statistics of regmean
    held_out_rows: int = Field(16, gt=0)  # a domain, to choose by
    batch_tokens: int = Field(4096, gt=0)
    max_length: int = Field(1024, gt=0)
    seed: int = 0

    def methods(self, method: SharedMethod) -> dict[str, SharedMethod]:
        """The method of every part, `method` for those that name none."""
        return {part: getattr(self, part) or method for part in ("attention", "norms", "embeddings", "head")}

    @property
    def is_anchor(self) -> bool:
        """Whether all parts are the anchor's as they are."""
        return self.method != "auto" and set(self.methods(self.method).values()) == {"anchor"}


class Routing(Section):
    """The shape of the sparse model."""

    top_k: int = Field(1, gt=0)
    shared_expert: str | None = None  # 'anchor', an expert's name, or another model's path or hub id
    moe_layers: tuple[NonNegativeInt, ...] | None = Field(
        None, min_length=1
    )  # None: every layer; the others keep the anchor's dense MLP


class Merging(Section):
    """How the fused checkpoint is written."""

    shard_bytes: int = Field(4 * 2**30, gt=0)  # of a safetensors file; a merge that was killed goes on after the last


class Refinement(Steps):
    """How gates that are fitted layer by layer learn on from the answers' loss (method lm, gate_training/refine.py)."""

    steps: int = Field(40, gt=0)
    learning_rate: float = Field(1e-3, ge=0)
    evaluate_every: int = Field(10, gt=0)  # steps
    load_balance: float = Field(0.0, ge=0)  # weight of transformers' load-balance loss


class GateTraining(Section):
    """How the gates are fitted (gate_training/)."""

    # lm: cross-entropy, then refinement through the whole model
    method: Literal["ridge", "cross-entropy", "likelihood", "regression", "lm", "auto"] = "cross-entropy"
    # the rows' own domain, or what rules, classifier or both (rules first) say of the question
    labels: Literal["data", "rules", "classifier", "combined"] = "data"
    classifier: str | None = None  # a transformers sequence classifier; None: one on the anchor's hidden states
    rows: int = Field(200, gt=0)  # a domain
    held_out_rows: int = Field(50, gt=0)  # a domain
    max_length: int = Field(1024, gt=0)
    batch_tokens: int = Field(4096, gt=0)
    ridge: float = Field(1e-3, gt=0)  # λ of method ridge, relative to the mean diagonal of the Gram matrix
    # while gates are fitted, tokens move on through the experts that the fresh gates pick, or through their label's
    propagation: Literal["gates", "labels"] = "gates"
    # a token goes to the general expert unless the gate gives another one this probability against it; auto: what
    # loses least on held-out examples
    threshold: float | Literal["auto"] | None = None
    # of the training examples, by repeating them (OUTPUT/feedback.jsonl)
    feedback_share: float = Field(0.2, gt=0, lt=1)
    feedback_margin: float = Field(0.02, ge=0)  # nats that gates with new feedback may lose on any domain
    window: int = Field(8, ge=0)  # tokens to each side whose likelihoods decide a token's label (method likelihood)
    refinement: Refinement = Refinement()  # of method lm
    seed: int = 0

    @field_validator("threshold", mode="before")
    @classmethod
    def _probability(cls, given: Any) -> Any:
        if given in (None, "auto"):
            return given
        try:
            threshold = float(given)
        except (TypeError, ValueError):
            threshold = 0.0
        if not 0.5 <= threshold < 1:
            raise ValueError(f"{given!r} is no threshold: give a probability from 0.5 to below 1, or auto")
        return threshold

    @model_validator(mode="after")
    def _threshold_of_a_fit(self) -> "GateTraining":
        if self.threshold is not None and self.method == "lm":
            raise ValueError("method 'lm' moves the gates behind a threshold: leave one of the two out")
        return self


class HealSettings(Steps):
    """How the shared parts of a merge of drifted experts learn to serve them all (fusion/heal.py)."""

    rows: int = Field(1000, gt=0)  # a domain, of its train data
    held_out_rows: int = Field(32, gt=0)  # a domain, for the loss that picks the best step
    score_rows: int = Field(32, gt=0)  # a domain, for the task score before and after
    max_new_tokens: int = Field(128, gt=0)
    lora_rank: int = Field(16, gt=0)  # of the attention
    top_logits: int = Field(64, gt=0)  # of the own expert's, kept for every answer token


class Loading(Section):
    """How accelerate spreads a whole model over cards, memory and disk (evaluate, heal, gate_training.method lm)."""

    # None: auto where there is a GPU, otherwise all in memory
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    max_memory: dict[int | str, int | str] = {}  # of card 0, 1, ... and cpu (20GiB); the rest goes to disk
    offload_folder: str | None = None  # for what goes to disk; None: a temporary folder

    @model_validator(mode="after")
    def _devices(self) -> "Loading":
        if self.max_memory and self.device_map is None:
            raise ValueError("'max_memory' says nothing without a 'device_map': set that to auto")
        for device in self.max_memory:
            if device != "cpu" and not str(device).isdecimal():
                raise ValueError(f"max_memory is of cards, by number, and of 'cpu', not of '{device}'")
        return self


class Evaluation(Section):
    """What is measured on held-out rows."""

    rows: int = Field(100, gt=0)  # a domain
    baseline_rows: int | None = Field(None, gt=0)  # a domain, for random and hidden gates; None: rows
    max_new_tokens: int = Field(64, gt=0)
    batch_rows: int = Field(32, gt=0)
    long_rows: int = Field(8, gt=0)  # questions a length, and passkeys a depth, of `evaluate --long`
    hidden_prompts: int = Field(32, gt=0)  # an expert, for mergekit's `hidden` gates
    cross_domains: bool = False  # score every expert on every domain, not on its own alone
    # no held-out question may share so many words in a row with what was trained on; None: none may be the same
    contamination_ngram: int | None = Field(None, ge=5)
    contaminated: Literal["refuse", "leave_out"] = "refuse"
    extra: dict[str, ExtraSource] = {}  # more held-out tasks, scored on anchor and fused
    seed: int = 0


class Benchmarking(Section):
    """Which tasks of lm-evaluation-harness are run, and on what (fusion/evaluation/benchmarks.py)."""

    tasks: tuple[str, ...] = ("domains",)  # files of configs/benchmarks, or tasks of the harness
    limit: int | None = Field(None, gt=0)  # rows of a task; None: all
    limits: dict[str, PositiveInt] = {}  # rows of a task, by the name in `tasks`
    # `router`: the expert that rules, or else a classifier, pick; then what fusion.evaluation.alternatives has made
    against: tuple[Literal["experts", "anchor", "router", "average", "TIES", "DARE", "union"], ...] = (
        "experts",
        "anchor",
    )
    backend: Literal["vllm", "transformers"] = "vllm"
    concurrency: int = Field(16, gt=0)  # requests under way


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


class Recipe(Section):
    """The whole road from experts to a served model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = Field(min_length=1)
    data_folder: str | None = None  # of public data: a source's `file` that is in it stands in for its `hub`
    license: str | None = None
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    anchor: AnchorModel
    experts: tuple[Expert, ...] = Field(min_length=2)
    domains: dict[str, Domain]
    shared: SharedParts = SharedParts()
    branches_at_once: int = Field(1, gt=0)  # experts trained side by side, one thread each: for small models on CPUs
    routing: Routing = Routing()
    merging: Merging = Merging()
    gate_training: GateTraining = GateTraining()
    heal: HealSettings | None = None  # where there is one, `run` heals the merge before it evaluates
    loading: Loading = Loading()
    evaluation: Evaluation = Evaluation()
    benchmark: Benchmarking = Benchmarking()
    serving: Serving = Serving()
    _places: dict[Location, str] = PrivateAttr(default_factory=dict)  # of what was read from a file

    @model_validator(mode="before")
    @classmethod
    def _within_data_folder(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("data_folder"), str):
            return _with_paths(given, given["data_folder"])
        return given

    @field_validator("shared", mode="before")
    @classmethod
    def _one_word(cls, shared: Any) -> Any:
        return {"method": shared} if isinstance(shared, str) else shared

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [expert.name for expert in self.experts]
        labels = self.gate_training.labels
        if self.gate_training.classifier and labels not in ("classifier", "combined"):
            message = f"it labels nothing with gate_training.labels '{labels}': set that to combined"
            raise Misfit(("gate_training", "classifier"), message)
        for name in self.shared.weights:
            if name not in names:
                raise Misfit(("shared", "weights", name), f"the recipe has no expert '{name}'")
        for i, expert in enumerate(self.experts):
            if expert.name in RESERVED:
                message = f"'{expert.name}' names {RESERVED[expert.name]}: give the expert another name"
                raise Misfit(("experts", i, "name"), message)
            if expert.name in names[:i]:
                raise Misfit(("experts", i, "name"), f"two experts are called '{expert.name}'")
            if expert.domain in [other.domain for other in self.experts[:i]]:
                message = f"two experts are for domain '{expert.domain}': give each its own, with its own data"
                raise Misfit(("experts", i, "domain"), message)
            if expert.domain not in self.domains:
                message = f"expert '{expert.name}' is for domain '{expert.domain}', which 'domains' does not have"
                raise Misfit(("experts", i, "domain"), message)
        if self.routing.top_k > len(self.experts):
            message = f"{self.routing.top_k} experts a token are more than the {len(self.experts)} there are"
            raise Misfit(("routing", "top_k"), message)
        if self.serving.tensor_parallel_size > len(self.experts):
            ways = self.serving.tensor_parallel_size
            most = max(size for size in range(1, len(self.experts) + 1) if ways % size == 0)
            message = (
                f"{ways} ways are more than the {len(self.experts)} experts, which vLLM refuses: set it to {most}, "
                f"for {ways // most} servers side by side on {ways} cards"
            )
            raise Misfit(("serving", "tensor_parallel_size"), message)
        if self.serving.live_gates and max(self.serving.pipeline_parallel_size, self.serving.data_parallel_size) > 1:
            message = (
                "new gates reach a model in one stage and one rank alone: set it to false, and restart to serve them"
            )
            raise Misfit(("serving", "live_gates"), message)
        ranks = self.serving.data_parallel_size
        if ranks > 1 and self.serving.distributed_executor_backend == "ray":
            message = (
                f"{ranks} ranks find each other on one machine alone: set it to 1, with serving.pipeline_parallel_size "
                "for the machines of one model, or with a server a machine behind a balancer"
            )
            raise Misfit(("serving", "data_parallel_size"), message)
        holders = ranks * self.serving.tensor_parallel_size
        if self.serving.enable_expert_parallel and holders > len(self.experts):
            message = (
                f"{holders} cards (tensor_parallel_size x data_parallel_size) are more than the {len(self.experts)} "
                "experts, and some would hold none: leave it out, which cuts every expert"
            )
            raise Misfit(("serving", "enable_expert_parallel"), message)
        for name, domain in self.domains.items():
            if domain.fallback is not None and domain.fallback not in self.domains:
                message = f"domain '{name}' falls back to '{domain.fallback}', which 'domains' does not have"
                raise Misfit(("domains", name, "fallback"), message)
        for name in self.domains:
            self.expert_of(name)
            if name in self.evaluation.extra:
                raise Misfit(("evaluation", "extra", name), f"'{name}' is a domain already: give the task another name")
        shared = self.routing.shared_expert
        known = shared in (None, "anchor", *names) or "/" in str(shared) or Path(str(shared)).is_dir()
        if not known:
            message = f"'{shared}' is neither 'anchor' nor an expert of the recipe, nor a model's folder or hub id"
            raise Misfit(("routing", "shared_expert"), message)
        for i, question in enumerate(self.serving.questions):
            if question.domain is not None and question.domain not in self.domains:
                message = f"the question is for domain '{question.domain}', which 'domains' does not have"
                raise Misfit(("serving", "questions", i, "domain"), message)
            if question.max_tokens is not None and question.max_tokens >= self.serving.max_model_len:
                message = f"leaves no room for the question within serving.max_model_len {self.serving.max_model_len}"
                raise Misfit(("serving", "questions", i, "max_tokens"), message)
        if self.serving.sampling.max_tokens >= self.serving.max_model_len:
            message = f"leaves no room for a prompt within serving.max_model_len {self.serving.max_model_len}"
            raise Misfit(("serving", "sampling", "max_tokens"), message)
        return self

    def at(self, *location: str | int) -> str:
        """Where the recipe says so, as the beginning of a sentence: `FILE, line N: `; empty for one made in Python.

        A `--set` of anything inside `location` is named rather than the file's line.
        """
        for place, said in reversed(self._places.items()):
            if place[: len(location)] == location and said.startswith("--set "):
                return f"{said}: "
        return f"{place_of(self._places, location)}: " if self._places else ""

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output).expanduser()

    @property
    def fused(self) -> Path:
        """The folder of the fused checkpoint."""
        return self.folder / "fused"

    def expert_names(self) -> dict[str, str]:
        """The name of the expert that serves each domain."""
        return {name: self.experts[self.expert_of(name)].name for name in self.domains}

    def expert_of(self, domain: str) -> int:
        """The index of the expert that serves `domain`: its own, or that of its chain of fallbacks."""
        asked, here = domain, ("domains", domain)
        for _ in self.domains:
            for index, expert in enumerate(self.experts):
                if expert.domain == domain:
                    return index
            fallback = self.domains[domain].fallback
            if fallback is None:
                raise Misfit(here, f"domain '{asked}' has neither an expert nor a fallback that has one")
            domain = fallback
        raise Misfit((*here, "fallback"), f"the fallbacks of domain '{asked}' run in a circle")


def _with_paths(given: Any, folder: str) -> Any:
    """A raw recipe in which a source's `file` in `folder` is its `path`, if it is there or the source has no hub."""
    if isinstance(given, dict):
        found = {key: _with_paths(value, folder) for key, value in given.items()}
        if isinstance(found.get("file"), str) and found.get("path") is None:
            path = f"{folder}/{found['file']}"
            if not found.get("hub") or Path(path).expanduser().exists():
                found["path"] = path
        return found
    return [_with_paths(item, folder) for item in given] if isinstance(given, list | tuple) else given


def place_of(places: dict[Location, str], location: Location) -> str:
    """The place of the deepest part of `location` that is known."""
    return next(places[location[:depth]] for depth in range(len(location), -1, -1) if location[:depth] in places)


def general_domain(domains: dict[str, Domain]) -> str:
    """The domain that takes what no rule claims: the first without rules, otherwise the first."""
    return next((name for name, domain in domains.items() if not domain.rules), next(iter(domains)))
