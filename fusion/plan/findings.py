"""What the preflight finds: how bad, where, what, why it matters, and how to mend it.

Finding("error", "expert 'math'", "rope_theta is 10000, the anchor's is 1e+06", "its MLPs learnt behind another
        attention", "give it an 'anchor' section")
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fusion.errors import UserError
from fusion.recipe import Recipe
from fusion.sections.section import Location

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something about the models. `where` is a key of the recipe, as `serving.max_model_len`, or `expert 'NAME'`."""

    severity: Severity
    where: str
    what: str
    why: str = ""
    fix: str = ""

    def sentence(self) -> str:
        """The finding in one line."""
        why, fix = f": {self.why}" if self.why else "", f"; {self.fix}" if self.fix else ""
        return f"{self.where}: {self.what}{why}{fix}"

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain data."""
        return dict(self.__dict__)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """The findings by severity, each once, otherwise in their order."""
    return sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))


def raise_on_error(recipe: Recipe, findings: Iterable[Finding]) -> None:
    """Raises UserError with the first error among the findings, and the recipe's line that it is about."""
    errors = [finding for finding in worst_first(findings) if finding.severity == "error"]
    if errors:
        first, more = errors[0], len(errors) - 1
        others = f" (and {more} more: `qwen-fusion plan` on the recipe lists them)" if more else ""
        raise UserError(f"{recipe.at(*location(recipe, first.where))}{first.sentence()}{others}")


def location(recipe: Recipe, where: str) -> Location:
    """The recipe's key that a finding's `where` names."""
    for number, expert in enumerate(recipe.experts):
        if where == place_of_expert(expert.name):
            return ("experts", number)
    return tuple(int(key) if key.isdigit() else key for key in where.split("."))


def place_of_expert(name: str) -> str:
    """The `where` of findings on an expert."""
    return f"expert '{name}'"
