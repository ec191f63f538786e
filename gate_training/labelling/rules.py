"""Rule labels: the recipe's trigger table, tried domain by domain in the recipe's order.

Code words, math signs, "return JSON", a language that is neither Chinese nor English; the first domain with a matching
rule wins. A question that no rule claims belongs to the first domain without rules, the general one as a rule.
"""

import re
from dataclasses import dataclass

from fusion.language import detect_language
from fusion.sections.data import Domain, Rule, general_domain

NO_RULE = "no rule matched"
LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff]"  # of a word with spaces around it; Chinese and Japanese are written without


@dataclass(frozen=True)
class RuleLabel:
    """A domain and the sign that spoke for it."""

    domain: str
    evidence: str


def label_by_rules(question: str, domains: dict[str, Domain]) -> RuleLabel:
    """The domain that the recipe's rules give `question`, with the evidence."""
    for name, domain in domains.items():
        for rule in domain.rules:
            evidence = match(rule, question)
            if evidence is not None:
                return RuleLabel(name, evidence)
    return RuleLabel(general_domain(domains), NO_RULE)


def match(rule: Rule, text: str) -> str | None:
    """What of `text` makes the rule apply, None where nothing does."""
    if rule.pattern is not None:
        found = re.search(rule.pattern, text, re.IGNORECASE)
        if found:
            return f"pattern: {found.group(0)!r}"
    if rule.words:
        choices = "|".join(re.escape(word) for word in rule.words)
        found = re.search(rf"(?<!{LETTER})(?:{choices})(?!{LETTER})", text, re.IGNORECASE)
        if found:
            return f"word: {found.group(0)!r}"
    if rule.not_languages:
        language = detect_language(text)
        if language is not None and language not in rule.not_languages:
            return f"language: {language}"
    return None
