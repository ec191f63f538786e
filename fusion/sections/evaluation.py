"""Recipe sections of what is measured: held-out rows, and tasks of lm-evaluation-harness."""

from typing import Literal

from pydantic import Field, PositiveInt

from fusion.sections.data import ExtraSource
from fusion.sections.section import Section


class Evaluation(Section):
    """What is measured on held-out rows."""

    rows: int = Field(100, gt=0)  # a domain
    baseline_rows: int | None = Field(None, gt=0)  # a domain, for random and hidden gates; None: rows
    max_new_tokens: int = Field(64, gt=0)
    batch_rows: int = Field(32, gt=0)
    long_rows: int = Field(8, gt=0)  # questions a length, and passkeys a depth, of `evaluate --long`
    hidden_prompts: int = Field(32, gt=0)  # an expert, for mergekit's `hidden` gates
    cross_domains: bool = False  # score every expert on every domain, not on its own alone
    # no held-out question may share so many words in a row with what was trained on, GPT-3's 13 (arXiv:2005.14165,
    # appendix C); None: none may be the same
    contamination_ngram: int | None = Field(13, ge=5)
    contaminated: Literal["refuse", "leave_out"] = "refuse"
    extra: dict[str, ExtraSource] = Field({})  # more held-out tasks, scored on anchor and fused
    seed: int = 0


class Benchmarking(Section):
    """Which tasks of lm-evaluation-harness are run, and on what (fusion/evaluation/benchmarks.py)."""

    tasks: tuple[str, ...] = ("domains",)  # files of configs/benchmarks, or tasks of the harness
    limit: int | None = Field(None, gt=0)  # rows of a task; None: all
    limits: dict[str, PositiveInt] = Field({})  # rows of a task, by the name in `tasks`
    # `router`: the expert that rules, or else a classifier, pick; then what fusion.evaluation.alternatives has made
    against: tuple[Literal["experts", "anchor", "router", "average", "TIES", "DARE", "union"], ...] = (
        "experts",
        "anchor",
    )
    backend: Literal["vllm", "transformers"] = "vllm"
    concurrency: int = Field(16, gt=0)  # requests under way
