"""Variants of the built-in corpus with conditions, labels and tags, and with known
entropies.

paired: a condition names subject, verb and object, and the sentence has them. Its other
factors depend on the subject, so that the condition says much about them.
relations: a sentence with two marked entities, the pair of entities as the text, and the
relation as the label.
tagged: the plain sentences with a tag per word and a label.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from math import log
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dsvae.config import convert
from dsvae.data import grammar
from dsvae.data.grammar import FACTORS, Sentence
from dsvae.errors import UserError
from dsvae.files import whole_file

DEPENDENT = ("tense", "polarity", "sentence_type", "subject_number", "object_number")
"""The factors of a paired sentence that depend on its subject."""
RELATIONS = 8
OCCUPATIONS = ("artist", "doctor", "farmer", "king", "pilot", "sailor", "student", "teacher")

# A factor follows its subject in 18 of 20 equally likely cases.
_CASES, _FOLLOWING = 20, 18
# An entity belongs to its relation in 144 of 160 cases, and is any of 16 in the others.
_ENTITY_CASES, _OWN = 160, 144
_NAMES = tuple(FACTORS)


def _entropy(shares: list[float]) -> float:
    return -sum(share * log(share) for share in shares if share)


PAIRED_ENTROPY = sum(
    _entropy([0.9] + [0.1 / (len(FACTORS[name]) - 1)] * (len(FACTORS[name]) - 1))
    for name in DEPENDENT
) + log(len(FACTORS["adjective"]))
"""The entropy of a paired sentence given its condition, 4.2490 nats: no model of x given
c needs less on average."""

_ENTITY_SHARES = [
    [(72 * (entity // 2 == relation) + 1) / _ENTITY_CASES for entity in range(2 * RELATIONS)]
    for relation in range(RELATIONS)
]
_PAIR_SHARES = [
    [
        sum(shares[subject] * shares[other] for shares in _ENTITY_SHARES) / RELATIONS
        for other in range(2 * RELATIONS)
    ]
    for subject in range(2 * RELATIONS)
]
PAIR_ENTROPY = _entropy([share for row in _PAIR_SHARES for share in row])
"""The entropy of the text of `relations`, a pair of entities: 4.239 nats."""
PAIR_ENTROPY_IN_RELATION = 2 * _entropy(_ENTITY_SHARES[0])
"""The entropy of the pair given the relation: 2.320 nats."""
RELATION_INFORMATION = PAIR_ENTROPY - PAIR_ENTROPY_IN_RELATION
"""What the pair says about the relation, of ln 8 = 2.079 nats: 1.919."""


class Variant(NamedTuple):
    """A record of a variant, and the factors of its sentence as in `Sentence`."""

    record: dict[str, Any]
    factors: tuple[int, ...]


def paired(size: int, seed: int) -> Iterator[Variant]:
    """Yields sentences with conditions such as "artist admire knife"."""
    for position in range(size):
        digits = _Digits("paired", seed, position)
        choice = {name: digits.below(len(FACTORS[name])) for name in _NAMES}
        for name in DEPENDENT:
            choice[name] = dependent_value(name, choice["subject"], digits.below(_CASES))
        named = (FACTORS[name][choice[name]] for name in ("subject", "verb", "object"))
        record = {"condition": " ".join(named), "text": grammar.sentence(choice)}
        yield Variant(record, tuple(choice.values()))


def parse_condition(condition: str) -> dict[str, str] | None:
    """Returns the subject, verb and object that a condition of a paired sentence names;
    None for any other text."""
    names, values = ("subject", "verb", "object"), condition.split()
    if len(values) != 3 or any(v not in FACTORS[n] for n, v in zip(names, values, strict=True)):
        return None
    return dict(zip(names, values, strict=True))


def dependent_value(name: str, subject: int, case: int) -> int:
    """Returns the value of one of the `DEPENDENT` factors in one of 20 equally likely
    cases.

    A value that the subject decides has 18 of them, and the others share two.
    """
    count = len(FACTORS[name])
    digest = hashlib.blake2b(f"{name} {FACTORS['subject'][subject]}".encode()).digest()
    usual = int.from_bytes(digest, "big") % count
    if case < _FOLLOWING:
        return usual
    return (usual + 1 + (case - _FOLLOWING) % (count - 1)) % count


def relations(size: int, seed: int) -> Iterator[Variant]:
    """Yields sentences with two marked entities as the condition, the pair as the text,
    and the relation (0 to 7) as the label.

    A relation has two verbs. Its two entities of either kind are likely, and others rare.
    """
    for position in range(size):
        digits = _Digits("relations", seed, position)
        choice = {name: digits.below(len(FACTORS[name])) for name in _NAMES}
        relation = digits.below(RELATIONS)
        choice["verb"] = 2 * relation + digits.below(2)
        for name in ("subject", "object"):
            choice[name] = entity(relation, digits.below(_ENTITY_CASES))
        subject, other = (FACTORS[name][choice[name]] for name in ("subject", "object"))
        words = grammar.sentence(choice).split()
        place = _subject_place(choice["sentence_type"])
        words[place] = f"<e1> {words[place]} </e1>"
        words[-1] = f"<e2> {words[-1][:-1]} </e2>{words[-1][-1]}"  # the mark stays outside
        record = {"condition": " ".join(words), "text": f"{subject} | {other}", "label": relation}
        yield Variant(record, tuple(choice.values()))


def entity(relation: int, case: int) -> int:
    """Returns the subject or object of a relation in one of 160 equally likely
    cases."""
    return 2 * relation + case % 2 if case < _OWN else (case - _OWN) % (2 * RELATIONS)


def tagged(size: int, seed: int, labelled: int | None = None) -> Iterator[Variant]:
    """Yields the plain sentences with tags (PROF: an occupation as the subject, OBJ:
    adjective and object) and the label "occupation" or "none".

    Args:
        labelled: only the first ones have a label and tags. None: all have.
    """
    for position, drawn in enumerate(grammar.draw(size, seed)):
        record: dict[str, Any] = {"text": drawn.text, "label": None, "tags": None}
        if labelled is None or position < labelled:
            factors = dict(zip(_NAMES, drawn.factors, strict=True))
            occupation = FACTORS["subject"][factors["subject"]] in OCCUPATIONS
            tags = ["O"] * len(drawn.text.split())
            if occupation:
                tags[_subject_place(factors["sentence_type"])] = "B-PROF"
            tags[-2:] = ["B-OBJ", "I-OBJ"]
            record |= {"label": "occupation" if occupation else "none", "tags": tags}
        yield Variant(record, drawn.factors)


CorpusKind = Literal["plain", "paired", "relations", "tagged"]


def draw_lines(
    kind: CorpusKind, size: int, seed: int, labelled: int | None = None
) -> Iterator[Sentence]:
    """Yields the lines of a file of some kind, with the factors of each: sentences for
    plain, JSON objects for the others.

    Raises:
        UserError: an unknown kind, or `labelled` with another kind than tagged.
    """
    convert(kind, CorpusKind, "--kind")
    if labelled is not None and kind != "tagged":
        raise UserError(f"--labelled is for --kind tagged, not for {kind}: leave it out")
    if labelled is not None and labelled < 1:
        raise UserError(f"--labelled is {labelled}: give at least 1")
    if kind == "plain":
        return grammar.draw(size, seed)
    if kind == "tagged":
        drawn = tagged(size, seed, labelled)
    else:
        drawn = {"paired": paired, "relations": relations}[kind](size, seed)
    return (Sentence(json.dumps(each.record), each.factors) for each in drawn)


def write_variant(
    path: str | os.PathLike[str],
    kind: CorpusKind,
    size: int,
    seed: int,
    factors_path: str | os.PathLike[str] | None = None,
    labelled: int | None = None,
) -> None:
    """Writes the lines of `draw_lines`, and optionally their factors.

    The factors are a csv: the indices of the values under the names of the factors. Row i
    belongs to line i. Each file appears whole or not at all.

    Raises:
        UserError: a file cannot be written, or the arguments are wrong.
    """

    def drawn() -> Iterator[Sentence]:
        return draw_lines(kind, size, seed, labelled)

    drawn()  # checks the arguments
    if kind != "plain" and Path(path).suffix.lower() != ".jsonl":
        raise UserError(
            f"--output {path}: --kind {kind} writes one JSON object per line; give it a name that "
            f"ends in .jsonl"
        )
    if factors_path is not None and Path(path).resolve() == Path(factors_path).resolve():
        raise UserError(f"{path} cannot hold both the sentences and their factors: name two files")
    _write(Path(path), (f"{each.text}\n" for each in drawn()))
    if factors_path is not None:
        rows = itertools.chain([_NAMES], (each.factors for each in drawn()))
        _write(Path(factors_path), (f"{','.join(map(str, row))}\n" for row in rows))


def _write(path: Path, lines: Iterator[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.writelines(lines)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose a place that can be written"
        ) from error


class _Digits:
    """Random numbers of one sentence, as in `grammar.draw`: digits of a hash, which
    cannot change with the version of a library."""

    def __init__(self, kind: str, seed: int, position: int) -> None:
        digest = hashlib.blake2b(f"{kind} {seed} {position}".encode(), digest_size=32).digest()
        self._rest = int.from_bytes(digest, "big")

    def below(self, count: int) -> int:
        self._rest, digit = divmod(self._rest, count)
        return digit


def _subject_place(sentence_type: int) -> int:
    """Returns which word of a sentence is its subject: "The artist ...", "Did the
    artist ..."."""
    return 2 if FACTORS["sentence_type"][sentence_type] == "question" else 1
