"""Under which licences a recipe's models are: as the recipe states it, as a model's card does, or as recorded.

licence("Qwen/Qwen2.5-3B-Instruct", None)   # "qwen-research"
"""

import re
from contextlib import suppress
from pathlib import Path

import yaml

from fusion.errors import UserError
from fusion.hub import resolve_model
from fusion.plan.findings import Finding
from fusion.plan.models import known
from fusion.recipe import Recipe

_NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?commercial|research", re.IGNORECASE)
OWN = ("qwen", "tongyi-qianwen")  # licences of Alibaba's own for single models, that allow some commercial use


def licence(model: str | None, folder: Path | None) -> str | None:
    """What a model's card (README.md in its folder) or the recorded facts say; None where neither does."""
    if folder is not None and (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        if front := re.match(r"---\n(.*?)\n---", text, re.DOTALL):
            try:
                card = yaml.safe_load(front.group(1))
            except yaml.YAMLError:
                card = None
            if isinstance(card, dict) and card.get("license"):
                stated = card["license"]
                named = card.get("license_name") if stated == "other" else None
                return str(named or (stated[0] if isinstance(stated, list) else stated))
    return known(model).license if model else None


def licences(recipe: Recipe) -> dict[str, str | None]:
    """The licence of the anchor and of every expert by name, the stricter where recipe and model say different ones."""
    rows = [
        ("anchor", None, [recipe.anchor.model]),
        *((e.name, e.license, [e.model, e.adapter]) for e in recipe.experts),
    ]
    found = {}
    for name, stated, parts in rows:
        named = [word for word in (stated, *(_own(part) for part in parts if part)) if word]
        found[name] = next(filter(non_commercial, named), named[0] if named else None)
    return found


def _own(model: str) -> str | None:
    """What a model or an adapter says of its own licence."""
    folder = None
    with suppress(UserError):  # not on this machine
        folder = resolve_model(model, allow_download=False)
    return licence(model, folder)


def non_commercial(name: str | None) -> bool:
    """Whether a licence of that name forbids commercial use."""
    return bool(name and _NON_COMMERCIAL.search(name))


def check_licence(recipe: Recipe, where: str, stated: str | None, own: str | None) -> list[Finding]:
    """What follows from a model's licence: the recipe's word for it is `stated`, the model's `own`."""
    found = []
    restricted = next((name for name in (own, stated) if non_commercial(name)), None)
    if restricted:
        why = "so is the fused model, whose card names it"
        if recipe.license and not non_commercial(recipe.license):
            why += f", whatever the recipe's own licence {recipe.license} says"
        fix = "leave the model out of what you sell, or name another one"
        found.append(Finding("warning", where, f"licence {restricted} is not for commercial use", why, fix))
    elif (named := own or stated) and named.lower() in OWN:
        what = f"is under a licence of its own ({named})"
        found.append(Finding("note", where, what, "the fused model falls under it", "read it before you pass that on"))
    if stated and own and stated.lower() != own.lower():
        what = f"the recipe says licence {stated}, the model itself {own}"
        found.append(Finding("warning", where, what, "the fused model's card would be wrong", "correct 'license'"))
    return found
