"""From the words of a command line to the call of a function, with python-fire.

fire matches flags to a function's parameters, writes its help from its docstring, and
calls it. Sentences and pipelines need what it does not do by itself: it reads `1, 2`,
`None` or `[ok]` as Python and not as text; it takes `-` for a separator and the word
behind a bare `--json` for its value; and it calls the function first and complains
about unknown words afterwards. So the parameters' annotations say how a word is read,
and every word is checked here before fire gets it as `--name=value`.
"""

import functools
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import fire
from fire import decorators, helptext, inspectutils
from fire.trace import FireTrace

from dsvae.errors import UserError, did_you_mean

Commands = Mapping[str, Callable[..., None]]

# No space before the "=": "-so it was = bad" is a sentence.
_FLAG = re.compile(r"(--?)([A-Za-z][\w-]*)(?:(=)(.*))?", re.DOTALL)
_HELP = ("--help", "-h")


def command(
    options: Mapping[str, type] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a function as a command: its keyword-only parameters are flags, its others
    words in their order, or flags as well.

    The last of the words takes all that are left where it is a `list[str]`.

    Args:
        options: further flags and their types, which the function takes as `**options`.
    """

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function._options = dict(options or {})  # type: ignore[attr-defined]
        return function

    return mark


def dispatch(commands: Commands, words: Sequence[str], program: str) -> None:
    """Calls the command that `words` name, or prints help to stdout.

    Raises:
        UserError: no such command or flag, a value of the wrong type, a word missing or
            one too many.
    """
    before = list(words[: words.index("--")]) if "--" in words else list(words)
    name = before[0].replace("-", "_") if before else ""
    if any(word in before for word in _HELP):
        print(help_text(commands, name if name in commands else None, program))
        return
    if not before:
        raise UserError(
            f"no command: give one of {', '.join(commands)}; {program} --help says more"
        )
    if name not in commands:
        raise UserError(
            f"unknown command {before[0]!r}{did_you_mean(name, commands)}; {program} --help "
            "lists all"
        )
    parsers = {
        each: functools.partial(convert, each, kind)
        for each, kind in _types(commands[name]).items()
    }
    # A copy is marked, because fire's help would list the mark among what the command
    # offers.
    parsed = decorators.SetParseFns(**parsers)(_copy(commands[name]))
    fire.Fire(
        {name: parsed},
        command=[name, *canonical(commands[name], words[1:], f"{program} {name}")],
        name=program,
    )


def canonical(function: Callable[..., None], words: Sequence[str], program: str) -> list[str]:
    """The words of a command as `--name=value`, each name known and given once.

    Flags are `--name value` or `--name=value`, `--name` alone for a boolean; a single
    letter stands for the one flag that begins with it. Words behind `--` are no flags.

    Raises:
        UserError: see `dispatch`.
    """
    kinds, positional = _types(function), _positional(function)
    letters = _letters(function)
    given: dict[str, str] = {}
    loose: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            loose += rest
            break
        match = _FLAG.fullmatch(word)
        if match is None:
            loose.append(word)
            continue
        dashes, written, equals, value = match.groups()
        name = written.replace("-", "_")
        if len(name) == 1:
            name = letters.get(name, name)
        if name not in kinds or (dashes == "-" and len(written) > 1):
            raise UserError(
                f"unknown flag {dashes}{written}{did_you_mean(name, kinds, '--')}; "
                f"{program} --help lists all; "
                "a sentence that begins with a dash goes behind --"
            )
        if not equals:
            if _plain(kinds[name]) is bool:
                value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
            elif rest and not (_FLAG.fullmatch(rest[0]) or rest[0] == "--"):
                value = rest.pop(0)
            else:
                raise UserError(f"--{name} needs a value: write --{name}=VALUE")
        if name in given:
            raise UserError(f"--{name} is given twice")
        given[name] = json.dumps([value]) if name in positional and _is_list(kinds[name]) else value
    open_places = [name for name in positional if name not in given]
    if open_places and _is_list(kinds[open_places[-1]]) and len(loose) >= len(open_places):
        first = len(open_places) - 1
        loose[first:] = [json.dumps(loose[first:])]
    if len(loose) > len(open_places):
        raise UserError(
            f"{loose[len(open_places)]!r} is one word too many for {_usage(function, program)}; "
            f"quote sentences"
        )
    given |= dict(zip(open_places, loose, strict=False))
    for name, parameter in inspect.signature(function).parameters.items():
        if (
            name not in given
            and parameter.default is parameter.empty
            and parameter.kind is not parameter.VAR_KEYWORD
        ):
            what = name.upper() if name in positional else f"--{name}"
            raise UserError(
                f"{what} is missing: {_usage(function, program)}; {program} --help says more"
            )
    return [f"--{name}={value}" for name, value in given.items()]


def convert(name: str, kind: Any, text: str) -> Any:
    """The value of a flag in the type of its parameter; text stays as it is. Raises
    UserError for a word that is none."""
    kind = _plain(kind)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise UserError(
                f"--{name} is {text!r}, not one of {', '.join(choices)}"
                f"{did_you_mean(text, choices)}"
            )
        return text
    if kind is str:
        return text
    kind = list if _is_list(kind) else kind
    wanted = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        list: "a list in JSON",
    }[kind]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = json.loads(text) if kind is list else kind(text)
        if not isinstance(value, kind) or (kind is float and not math.isfinite(value)):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise UserError(f"--{name} must be {wanted}, not {text!r}") from None


def help_text(commands: Commands, name: str | None, program: str) -> str:
    """The help for a command, written by fire from its docstring; a list of all
    commands for None."""
    if name is None:
        summaries = {
            each: inspectutils.Info(function)["docstring_info"].summary
            for each, function in commands.items()
        }
        width = max(map(len, summaries))
        lines = "\n".join(f"    {each:<{width}}  {summary}" for each, summary in summaries.items())
        return (
            f"{program}: a T5 variational autoencoder at work\n\n{lines}\n\n{program} COMMAND "
            f"--help says more."
        )
    shown = _copy(commands[name])
    signature = inspect.signature(shown)
    # fire prints the name of a type: a Literal has none, and in `X | None` the None
    # says no more than the default does.
    parameters = [
        p.replace(annotation=type(_type_name(p.annotation), (), {}))
        for p in signature.parameters.values()
    ]
    shown.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    trace = FireTrace(dict(commands), name=program)
    trace.AddAccessedProperty(shown, name, [name], None, None)
    text = re.sub(
        r"Type: Optional\[(.+?)\]?$", r"Type: \1", helptext.HelpText(shown, trace=trace), flags=re.M
    )
    many = "".join(
        n.upper() for n in _positional(commands[name]) if _is_list(_types(commands[name])[n])
    )
    if many:
        text = text.replace(f"{many} <flags>", f"{many}... <flags>", 1)
    options = getattr(commands[name], "_options", {})
    lines = "\n".join(f"    --{each} {kind.__name__}" for each, kind in options.items())
    return f"{text}\n\nOPTIONS OF GENERATE\n{lines}" if options else text


def _copy(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)

    return call


def _types(function: Callable[..., None]) -> dict[str, Any]:
    """The type of every flag of a command."""
    parameters = inspect.signature(function).parameters.values()
    own = {p.name: p.annotation for p in parameters if p.kind is not p.VAR_KEYWORD}
    return own | getattr(function, "_options", {})


def _positional(function: Callable[..., None]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _letters(function: Callable[..., None]) -> dict[str, str]:
    """Letter -> the flag that it stands for; as in fire's help, among the flags that
    the function itself names."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    firsts = [name[0] for name in names]
    return {name[0]: name for name in names if firsts.count(name[0]) == 1}


def _plain(kind: Any) -> Any:
    """`X` of `X | None`: what a given value is; not giving the flag is None."""
    # `Literal[...] | None` is the second, `str | None` the first
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(each for each in typing.get_args(kind) if each is not type(None))
    return kind


def _is_list(kind: Any) -> bool:
    """Whether a parameter takes any number of words."""
    return typing.get_origin(_plain(kind)) is list


def _type_name(kind: Any) -> str:
    kind = _plain(kind)
    return (
        " | ".join(typing.get_args(kind)) if typing.get_origin(kind) is Literal else kind.__name__
    )


def _usage(function: Callable[..., None], program: str) -> str:
    parameters = inspect.signature(function).parameters
    words = [
        n.upper() if parameters[n].default is inspect.Parameter.empty else f"[{n.upper()}]"
        for n in _positional(function)
    ]
    words = [
        f"{w}..." if _is_list(parameters[n].annotation) else w
        for n, w in zip(_positional(function), words, strict=True)
    ]
    return " ".join([program, *words])
