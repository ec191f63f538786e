"""What may not go in or out: a recipe's rules, applied to the texts of a request and of an answer.

    serving.guard.policy: {rules: [{find: [secrets, email], side: output}, {words: [project x], action: refuse}]}

`redact` replaces what is found by a mark, in JSON inside its texts, so that a document stays one; `refuse` is the end
of the request, and so is what would have to be redacted in a JSON number. A moderation model may have the last word
(serving/guard/moderation.py).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import orjson

from fusion.sections.serving import Policy, PolicyRule
from serving.guard.detectors import Span, spans, word_spans

INPUT, OUTPUT = "input", "output"
# what else an answer says its text in, by tokens
TOKENS = ("logprobs", "token_ids", "prompt_token_ids", "prompt_logprobs")
SAID = ("content", "reasoning_content", "reasoning", "refusal")  # of a message
_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class Forbidden(Exception):
    """A text that a rule refuses: `found` is what it looked for, `side` input or output. Never the text itself."""

    def __init__(self, found: str, side: str) -> None:
        super().__init__(f"The {'request' if side == INPUT else 'answer'} holds what may not pass here: {found}.")
        self.found, self.side = found, side


class Censor:
    """The rules of one side. `found` counts what was redacted, by its name."""

    def __init__(self, policy: Policy, side: str) -> None:
        self._rules = [rule for rule in policy.rules if rule.side in (side, "both")]
        self._regions, self._side = policy.phone_regions, side

    def __bool__(self) -> bool:
        return bool(self._rules)

    def text(self, text: str, found: dict[str, int]) -> str:
        """A text with what the rules look for replaced, and counted in `found`. Raises Forbidden."""
        for rule in self._rules:
            marks = sorted(self._spans(text, rule))
            if marks and rule.action == "refuse":
                raise Forbidden(marks[0][1], self._side)
            text = _replaced(text, marks, found)
        return text

    def document(self, text: str, found: dict[str, int]) -> str:
        """As `text`, inside the texts of a JSON document, keys among them: everything else stays as it is written.

        What is refused is looked for everywhere, and so is what cannot be redacted: a number has no room for a mark. A
        text that is no JSON is taken as one text.
        """
        if not _is_json(text):
            return self.text(text, found)
        self.refuse(text)
        self._refuse(_JSON_TEXT.sub('""', text), self._rules)

        def inside(match: re.Match[str]) -> str:
            said = json.loads(match[0], strict=False)
            kept = self.text(said, found)
            return match[0] if kept == said else json.dumps(kept, ensure_ascii=False)

        return _JSON_TEXT.sub(inside, text)

    def refuse(self, text: str) -> None:
        """Raises Forbidden where a text holds what a rule refuses."""
        self._refuse(text, (rule for rule in self._rules if rule.action == "refuse"))

    def _refuse(self, text: str, rules: Iterable[PolicyRule]) -> None:
        for rule in rules:
            if marks := sorted(self._spans(text, rule)):
                raise Forbidden(marks[0][1], self._side)

    def _spans(self, text: str, rule: PolicyRule) -> Iterator[tuple[Span, str]]:
        for name in rule.find:
            yield from ((span, name) for span in spans(text, name, self._regions))
        if rule.words:
            yield from ((span, "a blocked word") for span in word_spans(text, rule.words))


def refused_anywhere(request: Mapping[str, Any], censor: Censor) -> None:
    """Raises Forbidden where any text of a request, its tools and schemas among them, holds what a rule refuses."""
    censor.refuse(json.dumps(request, ensure_ascii=False))


def request_texts(request: Mapping[str, Any]) -> list[str]:
    """What a request says: its messages' and prompts' texts."""
    return _gathered(_rewritten_request, [request])


def redacted_request(request: dict[str, Any], censor: Censor, found: dict[str, int]) -> dict[str, Any]:
    """The request with its texts redacted. Raises Forbidden, and ValueError on a prompt of token ids."""
    return _rewritten_request(request, lambda text: censor.text(text, found), lambda text: censor.document(text, found))


def redacted_answer(answer: dict[str, Any], censor: Censor, is_json: bool, found: dict[str, int]) -> dict[str, Any]:
    """The completion with the texts of its choices redacted, and without tokens that would tell. Raises Forbidden."""
    choices = []
    for choice in answer["choices"]:
        before = sum(found.values())
        changed = _rewritten_choice(
            choice,
            lambda text: censor.document(text, found) if is_json else censor.text(text, found),
            lambda text: censor.document(text, found),
        )
        if sum(found.values()) > before:
            changed = {key: value for key, value in changed.items() if key not in TOKENS}
        choices.append(changed)
    return {**answer, "choices": choices}


def answer_texts(answer: Mapping[str, Any]) -> list[str]:
    """What an answer says: its choices' texts and tool calls."""
    return _gathered(_rewritten_choice, answer["choices"])


Rewrite = Callable[[str], str]


def _gathered(
    rewritten: Callable[[Mapping[str, Any], Rewrite, Rewrite], Any], values: Iterable[Mapping[str, Any]]
) -> list[str]:
    """All texts that a rewriting of `values` comes by."""
    texts: list[str] = []

    def keep(text: str) -> str:
        texts.append(text)
        return text

    for value in values:
        rewritten(value, keep, keep)
    return texts


def _rewritten_request(request: Mapping[str, Any], text: Rewrite, document: Rewrite) -> dict[str, Any]:
    changed = dict(request)
    if isinstance(request.get("messages"), list):
        changed["messages"] = [
            _rewritten_message(message, text, document) if isinstance(message, dict) else message
            for message in request["messages"]
        ]
    if isinstance(request.get("suffix"), str):
        changed["suffix"] = text(request["suffix"])
    prompt = request.get("prompt")
    if request.get("prompt_embeds") is not None:
        raise ValueError("a prompt of embeddings cannot be looked into")
    if isinstance(prompt, str):
        changed["prompt"] = text(prompt)
    elif isinstance(prompt, list):
        if not all(isinstance(part, str) for part in prompt):
            raise ValueError("a prompt of token ids cannot be looked into")
        changed["prompt"] = [text(part) for part in prompt]
    return changed


def _rewritten_choice(choice: Mapping[str, Any], text: Rewrite, document: Rewrite) -> dict[str, Any]:
    if isinstance(choice.get("text"), str):
        return {**choice, "text": text(choice["text"])}
    message = choice.get("message")
    if not isinstance(message, dict):
        return dict(choice)
    return {**choice, "message": _rewritten_message(message, text, document)}


def _rewritten_message(message: dict[str, Any], text: Rewrite, document: Rewrite) -> dict[str, Any]:
    changed = dict(message)
    for key in SAID:
        if isinstance(message.get(key), str):
            changed[key] = text(message[key])
        elif isinstance(message.get(key), list):
            changed[key] = [_rewritten_part(part, text) for part in message[key]]
    if isinstance(message.get("tool_calls"), list):
        changed["tool_calls"] = [_rewritten_call(call, document) for call in message["tool_calls"]]
    return changed


def _rewritten_part(part: Any, text: Rewrite) -> Any:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        return part
    return {**part, "text": text(part["text"])}


def _rewritten_call(call: Any, document: Rewrite) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": document(function["arguments"])}}


def _replaced(text: str, marks: Iterable[tuple[Span, str]], found: dict[str, int]) -> str:
    parts, position = [], 0
    for (begin, end), name in marks:
        if begin >= position:
            parts += [text[position:begin], f"[redacted: {name}]"]
            found[name] = found.get(name, 0) + 1
        position = max(position, end)
    return "".join([*parts, text[position:]])


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
