"""Recipe sections of the fused checkpoint: anchor, experts, shared parts, gates."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator, model_validator

from fusion.sections.section import NAME, Section
from fusion.sections.training import AnchoringSettings, BranchSettings, PretrainSettings, Steps

SharedMethod = Literal["anchor", "mean", "multislerp", "karcher", "regmean"]
PARTS = ("attention", "norms", "embeddings", "head")


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


class SharedParts(Section):
    """Whose attention, norms, embeddings and head the fused model has (fusion/shared.py); `shared: mean` names all."""

    # of the parts that name none; auto: the least held-out loss
    method: Literal["anchor", "mean", "multislerp", "karcher", "regmean", "auto"] = "anchor"
    attention: SharedMethod | None = None
    norms: SharedMethod | None = None
    embeddings: SharedMethod | None = None
    head: SharedMethod | None = None
    weights: dict[str, PositiveFloat] = Field({})  # of the experts, 1 where none is given
    rows: int = Field(64, gt=0)  # a domain, for the statistics of regmean
    held_out_rows: int = Field(16, gt=0)  # a domain, to choose by
    batch_tokens: int = Field(4096, gt=0)
    max_length: int = Field(1024, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _something_to_choose(self) -> "SharedParts":
        if self.method == "auto" and all(self.methods("anchor")[part] == getattr(self, part) for part in PARTS):
            raise ValueError("method 'auto' has nothing to choose where every part names its own: leave it out")
        return self

    def methods(self, method: SharedMethod) -> dict[str, SharedMethod]:
        """The method of every part, `method` for those that name none."""
        return {part: getattr(self, part) or method for part in PARTS}

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


class Loading(Section):
    """How accelerate spreads a whole model over cards, memory and disk (evaluate, heal, gate_training.method lm)."""

    # None: auto where there is a GPU, otherwise all in memory
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    max_memory: dict[int | str, int | str] = Field({})  # of card 0, 1, ... and cpu (20GiB); the rest goes to disk
    offload_folder: str | None = None  # for what goes to disk; None: a temporary folder

    @model_validator(mode="after")
    def _devices(self) -> "Loading":
        if self.max_memory and self.device_map is None:
            raise ValueError("'max_memory' says nothing without a 'device_map': set that to auto")
        for device in self.max_memory:
            if device != "cpu" and not str(device).isdecimal():
                raise ValueError(f"max_memory is of cards, by number, and of 'cpu', not of '{device}'")
        return self
