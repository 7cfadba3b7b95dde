"""The settings of the latent path and of the adapters, which a run's configuration and
a model's config.json share; and how a field is declared.

A field is declared once, as a field of a dataclass: its type, in `Annotated` what else
is true of it, its default, and under it what it means. `convert` reads a value by that.
The help, the command line and the checks need nothing more.

Nothing here needs torch: the command line has to be fast.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml


@dataclass(frozen=True)
class Rule:
    """What a value must be besides its type."""

    words: str
    """They follow "must be"."""
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class ReadBy:
    """Says that a field is read only if another field of its section has one of the
    given values."""

    field: str
    values: tuple[str, ...]


SHORT = object()
"""Marks a field that has a flag without its section: `--latent_dim`."""


def at_least(least: int) -> Rule:
    """Makes the rule of a smallest value."""
    return Rule(f"at least {least}", lambda value: value >= least)


Count = Annotated[int, at_least(1)]
Amount = Annotated[int, at_least(0)]
Weight = Annotated[float, at_least(0)]
Positive = Annotated[float, Rule("positive", lambda value: value > 0)]
# Two phases and a purpose are packed with the seed into 64 bits.
Seed = Annotated[int, Rule("from 0 to 2^53 - 1", lambda seed: 0 <= seed < 2**53)]
Share = Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)]

FamilyName = Literal["gaussian", "spike_slab", "categorical"]
Pooling = Literal["mean", "max", "first", "attention", "chunks", "queries"]
InjectionName = Literal["memory", "embedding", "both", "cross", "none"]
PosteriorReads = Literal["both", "condition"]
Precision = Literal["fp32", "tf32", "bf16"]
"""Of a finished model."""


@dataclass
class LatentConfig:
    """The latent path that is added to a T5."""

    family: FamilyName = "gaussian"
    """What z is. gaussian: a diagonal Gaussian. spike_slab: a sparse vector (Prokhorov
    et al. 2021). categorical: variables of `categories` values each."""
    latent_dim: Annotated[Count, SHORT] = 32
    """Number of units of each vector of the latent: dimensions of z, or categorical
    variables."""
    latent_vectors: Annotated[Count, SHORT] = 1
    """Largest number of vectors K that z has. More than one need pooling chunks or
    queries, and injection cross or memory."""
    categories: Annotated[int, at_least(2), ReadBy("family", ("categorical",))] = 16
    """Number of values of each variable, for the categorical family."""
    spike_prior: Annotated[
        list[float],
        Rule(
            "two numbers above 0.5 and at most 100",
            lambda pair: len(pair) == 2 and all(0.5 < each <= 100 for each in pair),
        ),
        ReadBy("family", ("spike_slab",)),
    ] = field(default_factory=lambda: [4.0, 1.0])
    """The numbers a and b of the prior Beta(a, b) of the spike's weight, for the
    spike_slab family. With (4, 1), a unit is off in four of five sentences."""
    prior: Literal["learned", "fixed"] | None = None
    """What z is compared with. fixed: one p(z) for all sentences. learned: p(z|c) of the
    sentence's condition (Fang et al. 2021). Without it, learned if the decoder reads a
    condition, and fixed otherwise."""
    pooling: Annotated[Pooling, SHORT] = "mean"
    """How the encoder's states become vectors. mean, max, first, attention: one vector.
    chunks: one per `chunk` consecutive states, so that a longer text has more. queries:
    one per learned query that attends to all states."""
    chunk: Annotated[Count, ReadBy("pooling", ("chunks",))] = 4
    """Tokens per vector, for pooling by chunks."""
    query_layers: Annotated[Count, ReadBy("pooling", ("queries",))] = 1
    """Layers of attention to the states, for pooling by queries."""
    normalize: Literal["none", "l2"] = "none"
    """What is done to z before it is decoded. none: nothing. l2: each vector is scaled to
    the length sqrt(latent_dim), so that its length says nothing."""
    posterior_reads: PosteriorReads = "both"
    """What the encoder makes z of, if there are conditions. both: the condition and the
    sentence; the decoder reads the condition and z. condition: the condition alone; the
    decoder reads z alone, so that z has to say what of the condition the sentence needs.
    Without conditions z is made of the sentence."""
    clusters: Annotated[int, Rule("0 (none) or at least 2", lambda n: n == 0 or n >= 2)] = 0
    """Number of clusters of sentences, through which the posterior reads a sentence
    (after Yuan & Eldardiry 2021). 0: none."""
    injection: Annotated[InjectionName, SHORT] = "memory"
    """How z enters the decoder. memory: slots in self-attention. embedding: added to its
    input. both: these two. cross: vectors for its pretrained cross-attention, before the
    condition if there is one. With none, the model has no latent: it is a language model
    of the same decoder without encoder, or a plain T5 if sentences have conditions."""
    memory_slots: Annotated[Count, ReadBy("injection", ("memory", "both", "cross"))] = 1
    """Key/value slots per decoder layer that a vector of z becomes, for injection by
    memory. Vectors that it becomes, for cross: with one in all, every position reads the
    same; with more it can choose."""

    @property
    def has_latent(self) -> bool:
        """Whether there is a latent at all."""
        return self.injection != "none"

    @property
    def discrete(self) -> bool:
        """Whether z consists of categories."""
        return "categories" in read_by(self, "family")

    def check_latent(self, conditional: bool, labelled: bool) -> None:
        """Raises ValueError if fields do not go together, in one line that begins with the
        name of one.

        Args:
            conditional: whether the decoder reads a condition.
            labelled: whether sentences have labels or tags.
        """
        if not self.has_latent and (labelled or self.clusters):
            raise ValueError(
                "injection none has no encoder that reads the sentence, and labels, tags and "
                "clusters need one: choose an injection other than none"
            )
        if self.prior == "learned" and not self.has_learned_prior(conditional):
            raise ValueError(
                "prior learned needs conditions that the decoder reads, and an injection other "
                "than none: use prior fixed without them"
            )
        if self.normalize == "l2" and self.discrete:
            raise ValueError(f"normalize l2 is for numbers, and family {self.family} has values")
        several, count = self.latent_vectors > 1, f"latent_vectors is {self.latent_vectors}"
        if several and self.injection not in ("memory", "cross"):
            raise ValueError(
                f"{count}, and injection {self.injection} has no place for several vectors: use "
                f"cross or memory"
            )
        if self.pooling not in ("chunks", "queries"):
            if several:
                raise ValueError(
                    f"{count}, and pooling {self.pooling} gives one vector: use chunks or queries"
                )
        elif self.clusters:
            raise ValueError(
                f"clusters read one vector per text, and pooling {self.pooling} gives several: "
                f"use mean"
            )
        elif self.pooling == "chunks" and self.has_learned_prior(conditional):
            raise ValueError(
                "prior learned does not work with pooling chunks, because chunks of a condition "
                "are not chunks of its text: use queries, or prior fixed"
            )

    def has_learned_prior(self, conditional: bool) -> bool:
        """Returns whether the prior is learned.

        Args:
            conditional: whether the decoder reads a condition.
        """
        return conditional and self.has_latent and self.prior != "fixed"


@dataclass
class LoraConfig:
    """Low-rank adapters of the T5 (LoRA, Hu et al. 2021). With them the T5 is frozen in both
    phases, and the adapters and the latent path train."""

    rank: Amount = 0
    """Rank r of the adapters. 0: no adapters, and the whole T5 trains."""
    alpha: Positive = 16.0
    """The change of a matrix is alpha / r times the product of its adapter."""
    targets: Annotated[
        list[Literal["q", "k", "v", "o", "wi", "wo"]], Rule("not empty", lambda names: len(names))
    ] = field(default_factory=lambda: ["q", "v"])
    """The projections that have adapters: q, k, v and o of every attention, wi and wo of
    every feed-forward."""


@dataclass
class DenoiserConfig:
    """The size of the transformer that is trained as a prior over z."""

    width: Count = 256
    """Numbers that it has for each vector of z."""
    layers: Count = 6
    """Its layers."""


def declared(cls: type, plain: bool = False) -> dict[str, Any]:
    """Returns the types of the fields of a section by their names, with rules and marks
    unless `plain`."""
    return typing.get_type_hints(cls, include_extras=not plain)


def unread(settings: Any) -> list[str]:
    """Returns the names of the fields that a section does not read because of the
    values of others."""
    return [
        name
        for name, mark in _readers(type(settings))
        if getattr(settings, mark.field) not in mark.values
    ]


def read_by(settings: Any, choice: str) -> dict[str, Any]:
    """Returns the fields of `LatentConfig` that the value of the field `choice` reads:
    the categories of a categorical family."""
    return {
        name: getattr(settings, name)
        for name, mark in _readers(LatentConfig)
        if mark.field == choice and getattr(settings, choice) in mark.values
    }


def _readers(cls: type) -> Iterator[tuple[str, ReadBy]]:
    for name, kind in declared(cls).items():
        yield from ((name, mark) for mark in get_args(kind) if isinstance(mark, ReadBy))


_EXAMPLES = {list: "a list such as [1, 2]", dict: "a dict such as {a: 1}"}


def convert(value: Any, kind: Any, name: str) -> Any:
    """Returns `value` (of YAML, JSON or a command line) as `kind`.

    Raises:
        ValueError: it does not fit, or breaks a rule; one line that begins with `name`.
    """
    container, arguments = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return value
    if container is Annotated:
        value = convert(value, arguments[0], name)
        for rule in arguments[1:]:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise ValueError(f"{name} must be {rule.words}, not {value!r}")
        return value
    if container in (types.UnionType, typing.Union):
        if value is None or isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        return convert(value, without_none(kind), name)
    if container is Literal:
        if str(value) not in arguments:
            raise ValueError(f"{name} is {value!r}, not one of {', '.join(arguments)}")
        return str(value)
    if container in _EXAMPLES:
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ValueError(f"{name} is not valid YAML: {value!r}") from None
        if not isinstance(value, (list, tuple) if container is list else dict):
            raise ValueError(f"{name} must be {_EXAMPLES[container]}, not {value!r}")
        return [convert(each, arguments[0], name) for each in value] if container is list else value
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        return value
    if kind is str:
        if value is None or isinstance(value, (dict, list)):
            raise ValueError(f"{name} must be text, not {value!r}")
        return str(value)
    try:
        number = kind(float(value))
        if isinstance(value, bool) or number != float(value) or not math.isfinite(number):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        whole = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {whole}, not {value!r}") from None


def without_none(kind: Any) -> Any:
    """Returns X of an annotation `X | None`; any other as it is."""
    if get_origin(kind) in (types.UnionType, typing.Union):
        return next(each for each in get_args(kind) if each is not type(None))
    return kind
