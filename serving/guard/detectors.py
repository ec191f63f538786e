"""Where a text holds secrets or personal data: spans of characters, by well-kept libraries.

python -c "from serving.guard.detectors import spans; print(list(spans('call +86 138 0013 8000', 'phone')))"

Secrets: detect-secrets' detectors of tokens and keys, each alone (nothing is verified over a network). Phone numbers:
phonenumbers, valid ones only. Identity and bank-card numbers: python-stdnum's check digits (GB 11643, ISO/IEC 7812).
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module

import phonenumbers
from stdnum import luhn
from stdnum.cn import ric

Span = tuple[int, int]

SECRETS = (
    "artifactory.ArtifactoryDetector",
    "aws.AWSKeyDetector",
    "azure_storage_key.AzureStorageKeyDetector",
    "basic_auth.BasicAuthDetector",
    "cloudant.CloudantDetector",
    "discord.DiscordBotTokenDetector",
    "github_token.GitHubTokenDetector",
    "gitlab_token.GitLabTokenDetector",
    "ibm_cloud_iam.IbmCloudIamDetector",
    "jwt.JwtTokenDetector",
    "keyword.KeywordDetector",
    "mailchimp.MailchimpDetector",
    "npm.NpmDetector",
    "openai.OpenAIDetector",
    "private_key.PrivateKeyDetector",
    "pypi_token.PypiTokenDetector",
    "sendgrid.SendGridDetector",
    "slack.SlackDetector",
    "square_oauth.SquareOAuthDetector",
    "stripe.StripeDetector",
    "telegram_token.TelegramBotTokenDetector",
    "twilio.TwilioKeyDetector",
)
EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
IDENTITY = re.compile(r"(?<![0-9])[0-9]{17}[0-9Xx](?![0-9])")
CARD = re.compile(r"(?<![0-9])[0-9](?:[ -]?[0-9]){12,18}(?![0-9])")
PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z ]*PRIVATE KEY[A-Z ]*-----|\Z)", re.DOTALL
)


def spans(text: str, detector: str, phone_regions: tuple[str, ...] = ("CN", "US")) -> Iterator[Span]:
    """What `detector` (fusion/sections/serving.py) finds in a text, as (begin, end); spans may overlap."""
    if detector == "phone":
        yield from _phones(text, phone_regions)
    else:
        yield from FINDERS[detector](text)


def word_spans(text: str, words: tuple[str, ...]) -> Iterator[Span]:
    """Where a text has one of `words`, whole words where they begin and end with a Latin letter or a digit."""
    for match in _words_pattern(words).finditer(text):
        yield match.span()


@cache
def _words_pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    def bounded(word: str) -> str:
        before, after = (r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])")
        first, last = word[0].isascii() and word[0].isalnum(), word[-1].isascii() and word[-1].isalnum()
        return f"{before if first else ''}{re.escape(word)}{after if last else ''}"

    return re.compile("|".join(bounded(word.strip()) for word in words if word.strip()), re.IGNORECASE)


def _secrets(text: str) -> Iterator[Span]:
    yield from (match.span() for match in PRIVATE_KEY.finditer(text))
    for line in re.finditer(r"[^\n]+", text):
        for detector in _secret_detectors():
            for secret in set(detector(line[0])):
                begin = text.find(secret, line.start())
                while 0 <= begin < line.end():
                    yield begin, begin + len(secret)
                    begin = text.find(secret, begin + 1)


@cache
def _secret_detectors() -> list[Callable[[str], Iterator[str]]]:
    found = []
    for name in SECRETS:
        module, _, kind = name.partition(".")
        found.append(getattr(import_module(f"detect_secrets.plugins.{module}"), kind)().analyze_string)
    return found


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    for region in regions or (None,):
        for match in phonenumbers.PhoneNumberMatcher(text, region):
            yield match.start, match.end


def _identities(text: str) -> Iterator[Span]:
    return (match.span() for match in IDENTITY.finditer(text) if ric.is_valid(match[0]))


def _cards(text: str) -> Iterator[Span]:
    return (match.span() for match in CARD.finditer(text) if luhn.is_valid(re.sub("[ -]", "", match[0])))


FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {
    "secrets": _secrets,
    "email": lambda text: (match.span() for match in EMAIL.finditer(text)),
    "cn_identity": _identities,
    "bank_card": _cards,
}
