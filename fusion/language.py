"""Which language a text is in, for rule labels and for the verification of sampled answers.

python -c "from fusion.language import detect_language; print(detect_language('Wo ist der Bahnhof?'))"
"""

from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

SURE = 0.5  # probability from which a detected language counts; greetings and sums stay below


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect_language(text: str) -> str | None:
    """The ISO 639-1 code of the text's language (py3langid), None where too little speaks for any.

    The Chinese languages count as zh.
    """
    language, probability = _identifier().classify(text)
    if probability < SURE:
        return None
    return "zh" if language in ("yue", "wuu") else str(language)
