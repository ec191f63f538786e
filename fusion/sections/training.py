"""Recipe sections of training by gradients: a small anchor, branches, anchoring, healing."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from fusion.sections.data import DataSource
from fusion.sections.section import Section

DEMO_ROPE_THETA = 1e4  # of a pretrained anchor: its sequences are short


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


class HealSettings(Steps):
    """How the shared parts of a merge of drifted experts learn to serve them all (fusion/heal.py)."""

    rows: int = Field(1000, gt=0)  # a domain, of its train data
    held_out_rows: int = Field(32, gt=0)  # a domain, for the loss that picks the best step
    score_rows: int = Field(32, gt=0)  # a domain, for the task score before and after
    max_new_tokens: int = Field(128, gt=0)
    lora_rank: int = Field(16, gt=0)  # of the attention
    top_logits: int = Field(64, gt=0)  # of the own expert's, kept for every answer token
