"""The text of `train.py --help`: every field of a run with its type, its default and its
docstring."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from typing import Any

from dsvae import config as configuration
from dsvae.config import ALIASES, RECIPES, RunConfig, field_types, flatten, to_tree

HEAD = """\
usage: deepspeed [--num_gpus N] dsvae/train.py --ds_config FILE
       [--config RECIPE_OR_FILE] [--FIELD VALUE ...]

It also runs as python dsvae/train.py (one process), under torchrun and under srun.
The argument of --config is a YAML file or a recipe: {recipes}.
The default is quickstart. Every field below is a flag; recipes change its default.
"""


def help_text() -> str:
    """The help text."""
    short = {field: flag for flag, field in ALIASES.items() if flag != field}
    defaults = flatten(to_tree(RunConfig()))
    documents = _documents()
    lines = [HEAD.format(recipes=", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml"))))]
    for name, kind in field_types().items():
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
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_args(kind) and typing.get_origin(kind) not in (list, dict):  # X | None
        return _words(next(each for each in typing.get_args(kind) if each is not type(None)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _documents() -> dict[str, str]:
    """The docstring of every field by its dotted name.

    Python keeps the docstrings of fields only in the source.
    """
    classes: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(configuration)).body:
        if isinstance(node, ast.ClassDef):
            documented = classes.setdefault(node.name, {})
            for base in node.bases:
                documented |= classes.get(ast.unparse(base), {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    documented[ast.unparse(field.target)] = " ".join(str(text.value.value).split())

    def walk(cls: type, prefix: str) -> dict[str, str]:
        documents: dict[str, str] = {}
        for name, kind in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                documents |= walk(typing.cast(type, kind), f"{prefix}{name}.")
            else:
                documents[prefix + name] = classes[cls.__name__][name]
        return documents

    return walk(RunConfig, "")
