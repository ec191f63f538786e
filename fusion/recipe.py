"""The recipe: one YAML schema for the whole road; fusion/sections has its sections, the only place of their keys.

A key in the YAML is a field there and a `--set section.key=value` on the command line, under one name;
fusion/recipe_file.py reads both.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from fusion.sections.data import Domain
from fusion.sections.evaluation import Benchmarking, Evaluation
from fusion.sections.fusing import AnchorModel, Expert, GateTraining, Loading, Merging, Routing, SharedParts
from fusion.sections.section import Location, Misfit, Section, place_of
from fusion.sections.serving import Serving
from fusion.sections.training import HealSettings

RESERVED = {
    "anchor": "the anchor",
    "fused": "the fused model",
    "shared": "the shared parts",
    "shared-expert": "the shared expert",
}


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
    def _experts_stand_apart(self) -> "Recipe":
        names = [expert.name for expert in self.experts]
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
        shared = self.routing.shared_expert
        known = shared in (None, "anchor", *names) or "/" in str(shared) or Path(str(shared)).is_dir()
        if not known:
            message = f"'{shared}' is neither 'anchor' nor an expert of the recipe, nor a model's folder or hub id"
            raise Misfit(("routing", "shared_expert"), message)
        return self

    @model_validator(mode="after")
    def _domains_are_served(self) -> "Recipe":
        for name, domain in self.domains.items():
            if domain.fallback is not None and domain.fallback not in self.domains:
                message = f"domain '{name}' falls back to '{domain.fallback}', which 'domains' does not have"
                raise Misfit(("domains", name, "fallback"), message)
        for name in self.domains:
            self.expert_of(name)
            if name in self.evaluation.extra:
                raise Misfit(("evaluation", "extra", name), f"'{name}' is a domain already: give the task another name")
        labels = self.gate_training.labels
        if self.gate_training.classifier and labels not in ("classifier", "combined"):
            message = f"it labels nothing with gate_training.labels '{labels}': set that to combined"
            raise Misfit(("gate_training", "classifier"), message)
        return self

    @model_validator(mode="after")
    def _cards_hold_experts(self) -> "Recipe":
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
        return self

    @model_validator(mode="after")
    def _questions_fit(self) -> "Recipe":
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
