"""Tokenizers and chat templates against the anchor's, which the fused model has.

    compare_tokenizers(expert, anchor)
    compare_templates(expert, anchor)

Templates are compared by what they make of a plain conversation and of one with tools, with transformers' own
sandboxed renderer: two that are written differently and render the same are the same.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from fusion.checkpoint import read_json
from fusion.errors import UserError
from fusion.plan.findings import Finding, Severity
from fusion.plan.models import Described
from fusion.vocabulary import CHATML, Tokens, other_token, read_tokens, same_file

PLAIN: list[dict[str, Any]] = [{"role": "user", "content": "What is the time?"}]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "The time in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Paris"}}}
WITH_TOOLS: list[dict[str, Any]] = [
    *PLAIN,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_time", "content": "12:00"},
]
_SYSTEM = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", re.DOTALL)
SHOWN = 60  # characters of a difference


def can_chat(anchor: Described) -> list[Finding]:
    """What the anchor needs to read a chat: a tokenizer and a chat template that renders."""
    if anchor.folder is None:
        return []
    if not any((anchor.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        what = f"{anchor.folder} has no tokenizer.json"
        why = "the fused model reads with the anchor's tokenizer"
        return [Finding("error", "anchor", what, why, "add the model's tokenizer files")]
    template = chat_template(anchor.folder)
    if not template:
        what = f"{anchor.folder} has no chat template, neither chat_template.jinja nor one in tokenizer_config.json"
        why = "training rows, gates and the server all write conversations with it"
        return [Finding("error", "anchor", what, why, "add the one that its experts were trained with")]
    rendered = _render(anchor.folder, template, PLAIN, None)
    if rendered.startswith(_FAILED):
        what = f"its chat template does not render a plain conversation ({rendered.removeprefix(_FAILED)})"
        why = "training rows, gates and the server all write conversations with it"
        return [Finding("error", "anchor", what, why, "correct the template")]
    return []


def compare_tokenizers(model: Described, anchor: Described) -> tuple[list[Finding], bool | None]:
    """What differs, and whether both give the same ids to the same tokens (None where one of them is not here)."""
    if model.folder is None or anchor.folder is None:
        return [], None
    if same_file(anchor.folder, model.folder):
        return [], True
    ours, theirs = _anchor_tokens(anchor.folder), _tokens(model.folder)
    if ours is None or theirs is None:
        what, why = "no tokenizer.json to compare with the anchor's", "the fused model reads with the anchor's"
        return [Finding("warning", model.name, what, why, "add the model's tokenizer files")], None
    token = other_token(ours.ids, theirs.ids)
    if token is not None:
        what = f"its tokenizer gives {token!r} id {theirs.ids[token]}, the anchor's {ours.ids[token]}"
        marked = "which marks the turns of a chat" if token in CHATML else "so that it reads other words"
        fix = "experts must share the anchor's tokenizer"
        return [Finding("error", model.name, what, marked, fix)], False
    return [*_added(model.name, ours, theirs), *_split(model.name, ours, theirs)], True


def _anchor_tokens(folder: Path) -> Tokens | None:
    """The anchor's tokens, parsed once for all experts."""
    path = folder / "tokenizer.json"
    return _parsed(folder, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=1)
def _parsed(folder: Path, changed: int) -> Tokens | None:
    return _tokens(folder)


def _tokens(folder: Path) -> Tokens | None:
    """A model's tokens. Raises UserError where its files are broken, or are JSON and hold none."""
    try:
        return read_tokens(folder)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError) and type(error.__cause__) not in (KeyError, TypeError, ValueError):
            raise
        path = folder / ("tokenizer.json" if (folder / "tokenizer.json").is_file() else "vocab.json")
        raise UserError(f"{path} cannot be used (it holds no tokens): download the tokenizer again") from error


def compare_templates(model: Described, anchor: Described, led_back: bool) -> list[Finding]:
    """What the model's chat template renders differently; of one that is `led_back` to the anchor only a note."""
    if model.folder is None or anchor.folder is None:
        return []
    ours, theirs = chat_template(anchor.folder), chat_template(model.folder)
    if not ours or theirs == ours:
        return []
    why = "the fused model has the anchor's template"
    if not theirs:
        untrained = f"{why}, which it may not have been trained with"
        return [Finding("note", model.name, "has no chat template", untrained)]
    severity: Severity = "note" if led_back else "warning"
    fix = "it learns the anchor's in its 'anchor' section" if led_back else "put what differs into its requests"
    pair = ((anchor.folder, ours), (model.folder, theirs))
    plain = _system_prompts(*(_render(folder, template, PLAIN, None) for folder, template in pair))
    differ = [plain] if plain else []
    with_tools = [
        _SYSTEM.sub(_without_first_line, _render(folder, template, WITH_TOOLS, TOOLS), count=1)
        for folder, template in pair
    ]
    if with_tools[0] != with_tools[1]:
        differ.append(f"a conversation with tools {_first_difference(*with_tools)}")
    if not differ:
        return []
    return [Finding(severity, model.name, f"its chat template differs: {'; '.join(differ)}", why, fix)]


def chat_template(folder: Path) -> str | None:
    """A model's chat template: its own file, or the (default) one in tokenizer_config.json.

    Raises UserError where the file is broken.
    """
    if (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            path = folder / "chat_template.jinja"
            raise UserError(f"{path} cannot be read (it is no UTF-8 text): download it again") from error
    found = _settings(folder).get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default") or next(iter(named.values()), None)
    return None if found is None else str(found)


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none. Raises UserError where it is broken."""
    path = folder / "tokenizer_config.json"
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be used (it holds no settings): download the tokenizer again")
    return found


_FAILED = "\0"  # of what a template that raises an error has rendered


def _render(folder: Path, template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    """The conversation as the template writes it; its error after _FAILED where it raises one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    special = _settings(folder)
    tokens = {name: special.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=True, **texts
        )
    except Exception as error:  # whatever a stranger's template raises
        return f"{_FAILED}{str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return str(rendered[0])


def _system_prompts(ours: str, theirs: str) -> str | None:
    """How two renderings of the plain conversation differ, most tellingly in their default system prompt."""
    if ours == theirs:
        return None
    prompts = [match.group(1).strip() if match else "" for match in map(_SYSTEM.search, (ours, theirs))]
    if prompts[0] != prompts[1]:
        return f"its default system prompt is {_short(prompts[1])}, the anchor's {_short(prompts[0])}"
    return f"a plain conversation {_first_difference(ours, theirs)}"


def _first_difference(ours: str, theirs: str) -> str:
    for text, whose in ((theirs, "its"), (ours, "the anchor's")):
        if text.startswith(_FAILED):
            return f"is refused by {whose} template ({text.removeprefix(_FAILED)})"
    first, second = ours.splitlines(), theirs.splitlines()
    length = max(len(first), len(second))
    padded = ([*lines, *[""] * (length - len(lines))] for lines in (first, second))
    pairs = zip(*padded, strict=True)
    own, its = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    return f"reads {_short(its)} where the anchor's reads {_short(own)}"


def _without_first_line(match: re.Match[str]) -> str:
    """A system message without its first line, the default prompt, which is told apart."""
    return match.group(1).partition("\n")[2]


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...") if text else "none"


def _added(name: str, ours: Tokens, theirs: Tokens) -> list[Finding]:
    found: list[Finding] = []
    if ours.ids == theirs.ids:
        return found
    extra = sorted(theirs.ids.keys() - ours.ids.keys(), key=theirs.ids.__getitem__)
    if extra:
        what = f"its tokenizer has {len(extra)} tokens that the anchor's lacks ({_short(extra[0])}, ...)"
        why = "the fused model cannot read or write them"
        found.append(Finding("warning", name, what, why, "check that its answers do without them"))
    unknown = [token for token in ours.added if token not in theirs.ids]
    if unknown:
        marks = [token for token in CHATML if token in unknown]
        what = f"its tokenizer lacks {len(unknown)} of the anchor's added tokens ({_short((marks or unknown)[0])}, ...)"
        why = "it has never seen them" + (", and every chat is written with them" if marks else "")
        found.append(Finding("warning", name, what, why, "give it an 'anchor' section, which shows them to it"))
    return found


def _split(name: str, ours: Tokens, theirs: Tokens) -> list[Finding]:
    parts = [] if ours.same_merges(theirs) else ["merges"]
    if ours.splitting and theirs.splitting:
        parts += [part for part in ours.splitting if ours.splitting[part] != theirs.splitting[part]]
    if not parts:
        return []
    what = f"its tokenizer splits text otherwise than the anchor's (other {' and '.join(parts)})"
    why = "it reads other tokens in the fused model than it was trained on"
    return [Finding("warning", name, what, why, "give it an 'anchor' section, or name a model with the same tokenizer")]
