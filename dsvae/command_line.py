"""From the words of a command line to the call of a function.

Every word is checked and read by the annotations of the function. python-fire writes the
help from its docstring, and nothing else: it reads `1, 2`, `None` or `[ok]` as Python and
not as text, takes `-` for a separator, and complains about unknown words only after the
call.
"""

import functools
import inspect
import io
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

from dsvae.config import convert
from dsvae.errors import UserError, did_you_mean
from dsvae.modeling.settings import without_none

Function = Callable[..., None]

# No space before the "=": "-so it was = bad" is a sentence.
_FLAG = re.compile(r"(--?)([A-Za-z][\w-]*(?:\.[A-Za-z][\w-]*)*)(?:=(.*))?", re.DOTALL)
_HELP = ("--help", "-h")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a command: a flag, and maybe a word that stands without a name."""

    name: str
    kind: Any
    """str, bool, int, float, a list or a Literal."""
    is_word: bool = False
    """Whether it may be given without its name."""
    required: bool = False
    letter: str | None = None
    """A letter that stands for the name."""

    @property
    def takes_all(self) -> bool:
        """Whether it takes all words that are left."""
        return self.is_word and typing.get_origin(self.kind) is list

    def read(self, text: str) -> Any:
        """Returns the value that a word means; raises UserError if it means none."""
        return convert(text, self.kind, f"--{self.name}")


class Command:
    """A function as a command.

    Its keyword-only parameters are flags. Its others are words in their order, and flags
    as well. The last word takes all that are left if it is a `list[str]`.

    Args:
        options: further flags and their types, for a function that takes `**options`.
        about_options: what the help says of them.
        shared: what the help says about parameters that the docstring does not describe,
            by their names.
    """

    def __init__(
        self,
        function: Function,
        options: Mapping[str, type],
        about_options: str,
        shared: Mapping[str, str],
    ) -> None:
        self.function, self.name = function, function.__name__
        declared = inspect.signature(function).parameters.values()
        own = [p for p in declared if p.kind is not p.VAR_KEYWORD]
        takes_more = len(own) < len(declared)
        self.about_options = f"\n\n{about_options}" if takes_more else ""
        self.shared = shared
        firsts = [p.name[0] for p in own if not _positional(p) or p.default is not p.empty]
        self.parameters = {name: Parameter(name, kind) for name, kind in options.items()}
        self.parameters = self.parameters if takes_more else {}
        self.parameters |= {p.name: _parameter(p, firsts) for p in own}

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, on one line."""
        return " ".join((inspect.getdoc(self.function) or "").split("\n\n")[0].split())

    @property
    def usage(self) -> str:
        """The name and the words that follow it, required ones without brackets."""
        shown = [self.name]
        for p in self.parameters.values():
            if p.is_word:
                word = p.name.upper() if p.required else f"[{p.name.upper()}]"
                shown.append(word + "..." * p.takes_all)
        return " ".join(shown)

    def help(self, program: str) -> str:
        """Returns the help that fire writes from the docstring."""
        import fire  # it takes a tenth of a second

        shown = functools.wraps(self.function)(lambda: None)
        signature = inspect.signature(self.function)
        # fire prints the name of a type, and a Literal has none. In `X | None` the None
        # says no more than the default does.
        named = []
        for p in signature.parameters.values():
            known = self.parameters.get(p.name)
            kind = type(_type_name(known.kind), (), {}) if known else p.empty
            named.append(p.replace(annotation=kind))
        shown.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        document = inspect.getdoc(self.function) or ""
        lines = [document] if "\nArgs:" in document else [document, "", "Args:"]
        for name, text in self.shared.items():
            if name in signature.parameters and f"\n    {name}: " not in document:
                lines.append(f"    {name}: {text}")
        shown.__doc__ = "\n".join(lines)
        out = io.StringIO()  # fire opens no pager where neither stream is a terminal
        with redirect_stdout(out), redirect_stderr(out), suppress(SystemExit):
            fire.Fire({self.name: shown}, command=[self.name, "--", "--help"], name=program)
        text = out.getvalue().rstrip("\n")
        text = re.sub(r"Type: Optional\[(.+?)\]?$", r"Type: \1", text, flags=re.M)
        for name in (p.name.upper() for p in self.parameters.values() if p.takes_all):
            text = text.replace(f"{name} <flags>", f"{name}... <flags>", 1)
        return text + self.about_options

    def read(self, words: Sequence[str], program: str) -> dict[str, Any]:
        """Returns the values that the words after the command's name give.

        Flags are `--name value` or `--name=value`, `--name` alone for a boolean. A
        single letter stands for the one flag that begins with it. Words after `--` are
        not flags. Raises UserError for an unknown flag, a wrong value or number of words.
        """
        given: dict[str, Any] = {}
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
            parameter = self._flag(match[1], match[2], program)
            value = match[3] if match[3] is not None else _value_after(parameter, rest)
            if parameter.name in given:
                raise UserError(f"--{parameter.name} is given twice")
            given[parameter.name] = [value] if parameter.takes_all else parameter.read(value)
        places = [p for p in self.parameters.values() if p.is_word and p.name not in given]
        if places and places[-1].takes_all and len(loose) >= len(places):
            given[places[-1].name] = loose[len(places) - 1 :]
            places, loose = places[:-1], loose[: len(places) - 1]
        if len(loose) > len(places):
            extra = loose[len(places)]
            raise UserError(
                f"{extra!r} is one word too many for {program} {self.usage}; quote sentences"
            )
        given |= {p.name: p.read(word) for p, word in zip(places, loose, strict=False)}
        for parameter in self.parameters.values():
            if parameter.required and (name := parameter.name) not in given:
                raise UserError(
                    f"{name.upper() if parameter.is_word else f'--{name}'} is missing: {program} "
                    f"{self.usage}; {program} {self.name} --help says more"
                )
        return given

    def call(self, words: Sequence[str], program: str) -> None:
        """Calls the function with what the words give; raises what `read` raises."""
        self.function(**self.read(words, program))

    def _flag(self, dashes: str, written: str, program: str) -> Parameter:
        name = written.replace("-", "_")
        for parameter in self.parameters.values():
            if parameter.name == name and (dashes == "--" or len(name) == 1):
                return parameter
            if parameter.letter == name:
                return parameter
        raise UserError(
            f"unknown flag {dashes}{written}{did_you_mean(name, self.parameters, '--')}; {program} "
            f"{self.name} --help lists all; a sentence that begins with a dash goes after --"
        )


def commands(
    functions: Iterable[Function],
    options: Mapping[str, type] | None = None,
    about_options: str = "",
    shared: Mapping[str, str] | None = None,
) -> dict[str, Command]:
    """Returns the commands of functions by their names; arguments as of `Command`."""
    return {f.__name__: Command(f, options or {}, about_options, shared or {}) for f in functions}


def dispatch(known: Mapping[str, Command], words: Sequence[str], program: str) -> None:
    """Calls the command that `words` name, or prints help; raises UserError as `read`."""
    before = list(words[: words.index("--")]) if "--" in words else list(words)
    name = before[0].replace("-", "_") if before else ""
    if any(word in before for word in _HELP):
        print(known[name].help(program) if name in known else overview(known, program))
        return
    if not before:
        raise UserError(f"no command: give one of {', '.join(known)}; {program} --help says more")
    if name not in known:
        raise UserError(
            f"unknown command {before[0]!r}{did_you_mean(name, known)}; {program} --help lists all"
        )
    known[name].call(words[1:], program)


def overview(known: Mapping[str, Command], program: str) -> str:
    """Returns the list of all commands."""
    width = max(map(len, known))
    lines = "\n".join(f"    {name:<{width}}  {each.summary}" for name, each in known.items())
    return (
        f"{program}: a T5 variational autoencoder at work\n\n{lines}\n\n"
        f"{program} COMMAND --help says more."
    )


def _value_after(parameter: Parameter, rest: list[str]) -> str:
    """The value of a flag, taken off the words that follow it."""
    if parameter.kind is bool:
        return rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
    if rest and not (_FLAG.fullmatch(rest[0]) or rest[0] == "--"):
        return rest.pop(0)
    raise UserError(f"--{parameter.name} needs a value: write --{parameter.name}=VALUE")


def _positional(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _parameter(parameter: inspect.Parameter, firsts: list[str]) -> Parameter:
    """A parameter by its annotation; `firsts` are the first letters of all flags."""
    name, required = parameter.name, parameter.default is parameter.empty
    has_letter = firsts.count(name[0]) == 1 and not (_positional(parameter) and required)
    return Parameter(
        name,
        without_none(parameter.annotation),
        is_word=_positional(parameter),
        required=required,
        letter=name[0] if has_letter else None,
    )


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Annotated:
        return _type_name(typing.get_args(kind)[0])
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    return (typing.get_origin(kind) or kind).__name__
