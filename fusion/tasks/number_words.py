"""Number words from 0 to 99 in French, German, Spanish and Chinese."""

FRENCH = (
    [
        "zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze",
        "douze", "treize", "quatorze", "quinze", "seize", "dix-sept", "dix-huit", "dix-neuf",
    ],
    [
        "vingt", "trente", "quarante", "cinquante", "soixante", "soixante", "quatre-vingt",
        "quatre-vingt",
    ],
)  # fmt: skip
GERMAN = (
    [
        "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn",
        "elf", "zwölf", "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn",
        "neunzehn",
    ],
    [
        "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig",
    ],
)  # fmt: skip
SPANISH = (
    [
        "cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez",
        "once", "doce", "trece", "catorce", "quince", "dieciséis", "diecisiete", "dieciocho",
        "diecinueve", "veinte", "veintiuno", "veintidós", "veintitrés", "veinticuatro", "veinticinco",
        "veintiséis", "veintisiete", "veintiocho", "veintinueve",
    ],
    [
        "veinte", "treinta", "cuarenta", "cincuenta", "sesenta", "setenta", "ochenta", "noventa",
    ],
)  # fmt: skip
CHINESE = "零一二三四五六七八九"


def number_word(number: int, language: str) -> str:
    """The word for 0 <= number <= 99 in French, German, Spanish or Chinese."""
    tens, ones = divmod(number, 10)
    if language == "Chinese":
        head = "" if tens == 0 else "十" if tens == 1 else CHINESE[tens] + "十"
        return head + (CHINESE[ones] if ones or not tens else "")
    small, decades = {"French": FRENCH, "German": GERMAN, "Spanish": SPANISH}[language]
    if number < len(small):
        return small[number]
    decade = decades[tens - 2]
    if language == "French":
        rest = number - 60 if 60 <= number < 80 else number - 80 if number >= 80 else ones
        if rest == 0:
            return "quatre-vingts" if number == 80 else decade
        return f"{decade} et {small[rest]}" if number < 80 and rest in (1, 11) else f"{decade}-{small[rest]}"
    if ones == 0:
        return decade
    if language == "German":
        return f"{'ein' if ones == 1 else small[ones]}und{decade}"
    return f"{decade} y {small[ones]}"
