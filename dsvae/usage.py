"""The text of `train.py --help`: every field of a run with its type, its default and its
docstring."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from typing import Any

from dsvae.config import ALIASES, RECIPES, RunConfig, field_types, flatten, to_tree
from dsvae.modeling.settings import Rule, without_none
from dsvae.shipped import ds_configs

HEAD = """\
usage: deepspeed [--num_gpus N] dsvae/train.py --ds_config FILE_OR_NAME
       [--config RECIPE_OR_FILE] [--FIELD VALUE ...]

dsvae train takes the same flags and the launcher's. It also runs as python dsvae/train.py
(one process), under torchrun and under srun.
The argument of --ds_config is a file or a shipped one: {ds_configs}.
The argument of --config is a YAML file or a recipe: {recipes}.
The default is quickstart. Every field below is a flag; recipes change its default.
"""


def help_text() -> str:
    """The help text."""
    short = {field: flag for flag, field in ALIASES.items() if flag != field}
    defaults = flatten(to_tree(RunConfig()))
    documents = _documents(RunConfig)
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    lines = [HEAD.format(recipes=recipes, ds_configs=", ".join(ds_configs()))]
    for name, kind in field_types(plain=False).items():
        default = defaults.get(name)
        lines.append(
            f"--{name}{f', --{short[name]}' if name in short else ''}  {_words(kind)}; default "
            f"{default}"
        )
        lines += textwrap.wrap(
            documents[name], 126, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(lines)


def _words(kind: Any) -> str:
    """The type and the rule of a field."""
    if typing.get_origin(kind := without_none(kind)) is typing.Annotated:
        plain, *more = typing.get_args(kind)
        return " ".join([_words(plain), *(rule.words for rule in more if isinstance(rule, Rule))])
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"list of {_words(typing.get_args(kind)[0])}"
    return str(kind) if typing.get_args(kind) else kind.__name__


def _documents(cls: Any, prefix: str = "") -> dict[str, str]:
    """The docstring of every field by its dotted name.

    Python keeps the docstrings of fields only in the source.
    """
    documents: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):  # a base first; the last is `object`
        body: list[Any] = ast.parse(inspect.getsource(each)).body[0].body  # type: ignore
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign):
                name, value = ast.unparse(field.target), text.value.value
                documents[prefix + name] = " ".join(value.split())
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            documents |= _documents(kind, f"{prefix}{name}.")
    return documents
