"""The built-in corpus: English sentences of independent, known factors of variation.

A sentence is one choice per factor (`FACTORS`), drawn independently and uniformly, so
that what a latent dimension has learned can be compared with the factors of the sentence.
The map from choices to sentences is one to one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from math import log, prod
from typing import NamedTuple


def _rows(table: str) -> list[list[str]]:
    """Splits the words of each entry; entries are separated by commas."""
    return [entry.split() for entry in table.split(",")]


# Singular and plural differ in every noun. Otherwise the number of the subject would not
# show in the past and the future.
_SUBJECTS = dict(
    _rows("""
    artist artists, child children, doctor doctors, farmer farmers, hero heroes, king
    kings, lady ladies, man men, neighbor neighbors, pilot pilots, sailor sailors,
    student students, teacher teachers, thief thieves, witch witches, woman women
""")
)
# Base form: (third person singular, past). The past differs from the base (no "put",
# "cut"). Otherwise "the kings put" would be present and past at once.
_VERBS = {
    base: (singular, past)
    for base, singular, past in _rows("""
    admire admires admired, break breaks broke, bring brings brought, buy buys bought,
    carry carries carried, catch catches caught, choose chooses chose, draw draws drew,
    find finds found, hide hides hid, keep keeps kept, lose loses lost, sell sells sold,
    steal steals stole, throw throws threw, wash washes washed
""")
}
# Adjective: its indefinite article, which the first letter does not decide: "an ugly" but
# "a useful".
_ADJECTIVES = {
    adjective: article
    for article, adjective in _rows("""
    a blue, a cheap, an expensive, a heavy, a new, an old, an ordinary, a red, a small,
    a strange, an ugly, a useful
""")
}
_OBJECTS = dict(
    _rows("""
    apple apples, basket baskets, box boxes, candle candles, cup cups, egg eggs, hat
    hats, key keys, knife knives, lamp lamps, leaf leaves, potato potatoes, ring rings,
    toy toys, umbrella umbrellas, watch watches
""")
)

_MARKS = {"statement": ".", "question": "?", "exclamation": "!"}

FACTORS: dict[str, tuple[str, ...]] = {
    "sentence_type": tuple(_MARKS),
    "tense": ("past", "present", "future"),
    "polarity": ("affirmative", "negative"),
    "subject_number": ("singular", "plural"),
    "subject": tuple(_SUBJECTS),
    "verb": tuple(_VERBS),
    "object_number": ("singular", "plural"),
    "adjective": tuple(_ADJECTIVES),
    "object": tuple(_OBJECTS),
}
"""Factor name -> its values. 3,538,944 combinations, each a different sentence."""

_SIZES = tuple(len(values) for values in FACTORS.values())
_TOTAL = prod(_SIZES)
ENTROPY = log(_TOTAL)
"""The entropy of a sentence in nats. All sentences are equally likely, so no code needs
less on average, and the best one needs exactly this for each of them."""


class Sentence(NamedTuple):
    """A sentence and its factors: `factors[i]` indexes the values of the i-th factor of
    `FACTORS`."""

    text: str
    factors: tuple[int, ...]


def sentence(factors: Mapping[str, str | int]) -> str:
    """Returns the English sentence of one choice per factor.

    Args:
        factors: for each factor of `FACTORS` a value, or its index.

    Raises:
        ValueError: a factor is missing or unknown, or does not have the value.
    """
    if factors.keys() != FACTORS.keys():
        raise ValueError(
            f"expected exactly the factors {', '.join(FACTORS)}, got {', '.join(factors) or 'none'}"
        )
    value = {name: _value(name, choice) for name, choice in factors.items()}
    plural = value["subject_number"] == "plural"
    negation = ["not"] if value["polarity"] == "negative" else []
    subject = ["the", _SUBJECTS[value["subject"]] if plural else value["subject"]]
    if value["object_number"] == "plural":
        noun_phrase = [value["adjective"], _OBJECTS[value["object"]]]
    else:
        noun_phrase = [_ADJECTIVES[value["adjective"]], value["adjective"], value["object"]]

    base, tense = value["verb"], value["tense"]
    singular_present, past = _VERBS[base]
    auxiliary = {"past": "did", "present": "do" if plural else "does", "future": "will"}[tense]
    finite = {
        "past": past,
        "present": base if plural else singular_present,
        "future": f"will {base}",
    }[tense]
    if value["sentence_type"] == "question":
        words = [auxiliary, *subject, *negation, base, *noun_phrase]
    elif negation:
        words = [*subject, auxiliary, *negation, base, *noun_phrase]
    else:
        words = [*subject, finite, *noun_phrase]
    text = " ".join(words) + _MARKS[value["sentence_type"]]
    return text[0].upper() + text[1:]


def parse(text: str) -> dict[str, str] | None:
    """Returns the factors of a sentence, the inverse of `sentence`; None for any other
    text."""
    words = text[:-1].split()

    def the_one(forms: Mapping[str, str]) -> str:
        """Returns the value whose form is among the words; empty if there is none."""
        return next((value for form, value in forms.items() if form in words), "")

    verbs = {form: base for base, forms in _VERBS.items() for form in (base, *forms)}
    factors = {
        "sentence_type": next((kind for kind, mark in _MARKS.items() if text[-1:] == mark), ""),
        "polarity": "negative" if "not" in words else "affirmative",
        "verb": the_one(verbs),
        "adjective": the_one({adjective: adjective for adjective in _ADJECTIVES}),
    }
    for name, nouns in (("subject", _SUBJECTS), ("object", _OBJECTS)):
        singular = the_one({noun: noun for noun in nouns})
        factors[name] = singular or the_one({plural: noun for noun, plural in nouns.items()})
        factors[f"{name}_number"] = "singular" if singular else "plural"
    if not all(factors.values()):
        return None
    for tense in FACTORS["tense"]:
        if sentence(factors | {"tense": tense}) == text:
            return {name: factors.get(name, tense) for name in FACTORS}
    return None


def draw(size: int, seed: int) -> Iterator[Sentence]:
    """Yields `size` sentences drawn with replacement, one at a time. The first ones do
    not depend on `size`."""
    # Each sentence comes from a hash and not from a random generator. A hash needs no
    # earlier draw and cannot change with the version of a library.
    names = tuple(FACTORS)
    for position in range(size):
        digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=16).digest()
        code = int.from_bytes(digest, "big") % _TOTAL
        choice = []
        for cardinality in _SIZES:
            code, index = divmod(code, cardinality)
            choice.append(index)
        yield Sentence(sentence(dict(zip(names, choice, strict=True))), tuple(choice))


def generate(size: int, seed: int) -> list[Sentence]:
    """Returns `size` sentences drawn with replacement. The first k of them are
    `generate(k, seed)` on every machine."""
    return list(draw(size, seed))


def _value(name: str, choice: str | int) -> str:
    values = FACTORS[name]
    if choice in values:
        return str(choice)
    if isinstance(choice, int) and 0 <= choice < len(values):
        return values[choice]
    raise ValueError(
        f"factor {name} has no value {choice!r}; it has {', '.join(values)}, or "
        f"0..{len(values) - 1}"
    )
