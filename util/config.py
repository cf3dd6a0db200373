"""Frozen dataclasses as command-line flags: one definition gives name, type, default, help, range.

    @dataclass(frozen=True)
    class SamplerConfig:
        num_iter: int = setting(64, "autoregressive steps per image", least=1)

    parser = FlagParser("eval.py", "Generate images.")
    parser.add(SamplerConfig, "sampling")
    flags = parser.parse()
    config = flags.build(SamplerConfig)  # given flags, then defaults, then the class's own values

A flag that several classes name is one flag. `setting` is `dataclasses.field` with metadata, so the
classes work without any command line.
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from util.errors import UserError

Config = TypeVar("Config")

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: value without the flag.
        help: half a line for --help.
        flag: name of the flag, if it is not the field's.
        parse: text to value, for types other than int, float, str and bool; it raises ValueError.
        metavar, choices: as in argparse.
        least, most: the range of sensible numbers, ends included.
    """
    metadata = {
        "help": help,
        "flag": flag,
        "parse": parse,
        "metavar": metavar,
        "choices": choices,
        "least": least,
        "most": most,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One flag: its name, the field that defines it, and the type of a value."""

    name: str
    field: "dataclasses.Field[Any]"
    type: type

    @property
    def to_change(self) -> str:
        """As a user gives it to change the default: --no_NAME for a switch that is on."""
        return f"--{'no_' if self.field.default is True else ''}{self.name}"

    def check(self, value: Any) -> None:
        """UserError for a number out of range, and for NaN and infinity."""
        least, most = self.field.metadata["least"], self.field.metadata["most"]
        if value is None or isinstance(value, (str, bool, tuple)):
            return
        if not -math.inf < value < math.inf or (least is not None and value < least):
            raise UserError(
                f"--{self.name} is {value}; it must be a number"
                + ("" if least is None else f" of at least {least:g}")
            )
        if most is not None and value > most:
            raise UserError(f"--{self.name} is {value}; it must be at most {most:g}")


def flags_of(config: type, prefix: str = "") -> list[_Flag]:
    """The flags of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(config)
    found = []
    for field in dataclasses.fields(config):
        if "help" in field.metadata:
            name = field.metadata["flag"] or prefix + field.name
            found.append(_Flag(name, field, _value_type(hints[field.name])))
    return found


def _value_type(hint: Any) -> type:
    """int for `int | None`; the type itself otherwise."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint


def _name_flag(message: str, flags: Sequence[_Flag]) -> str:
    """The message of a config, with the flag in place of a field's name at its beginning."""
    field, space, rest = message.partition(" ")
    names = {flag.field.name: f"--{flag.name}" for flag in flags}
    return names.get(field, field) + space + rest


class Flags:
    """The flags given on a command line, and the configs that follow from them."""

    def __init__(
        self, given: Mapping[str, Any], owners: Mapping[str, set[str]], defaults: Mapping[str, Any]
    ) -> None:
        self.given = dict(given)
        self.resolved: dict[str, Any] = dict(given)  # every value that a config was built with
        self._owners, self._defaults = owners, defaults

    def value(self, name: str, default: Any = None) -> Any:
        """Value of one flag: as given, else the command's default, else `default`."""
        value = self.given.get(name, self._defaults.get(name, default))
        self.resolved[name] = value
        return value

    def build(
        self, config: type[Config], defaults: Mapping[str, Any] | None = None, prefix: str = ""
    ) -> Config:
        """A config from the given flags, then `defaults`, then the command's, then the class's own.

        UserError for a number out of range or a ValueError of the class.
        """
        defaults = {**self._defaults, **(defaults or {})}
        values = {}
        for flag in flags_of(config, prefix):
            value = self.given.get(flag.name, defaults.get(flag.name, flag.field.default))
            flag.check(value)
            values[flag.field.name] = self.resolved[flag.name] = value
        try:
            return config(**values)
        except ValueError as error:
            raise UserError(_name_flag(str(error), flags_of(config, prefix))) from error

    def build_optional(
        self,
        config: type[Config],
        switch: str,
        title: str,
        defaults: Mapping[str, Any] | None = None,
        prefix: str = "",
    ) -> Config | None:
        """The config if the flag `switch` is on, else None. UserError for its flags without it."""
        if self.value(switch, (defaults or {}).get(switch, False)):
            return self.build(config, defaults, prefix)
        for flag in flags_of(config, prefix):
            if flag.name in self.given:
                raise UserError(f"{flag.to_change} belongs to {title}: add --{switch}")
        return None

    def refuse(self, configs: Iterable[type], reason: str) -> None:
        """UserError for a given flag of one of these configs."""
        for flag in (flag for config in configs for flag in flags_of(config)):
            if flag.name in self.given:
                raise UserError(f"{flag.to_change} {reason}: remove it")

    def take(self, *names: str) -> list[Any]:
        """Values of a command's own flags, None where not given; they are no part of any config."""
        return [self.given.pop(name, None) for name in names]

    def refuse_foreign(self, owner: str, model: str) -> None:
        """UserError for a given flag that belongs only to other families than `owner`."""
        for name in self.given:
            owners = self._owners.get(name, set())
            if owners and owner not in owners:
                *others, last = sorted(owners)
                known = f"{', '.join(others)} and {last}" if others else last
                raise UserError(
                    f"--{name} is for {known} models; --model {model} is a {owner} model"
                )


class FlagParser:
    """Builds the command line of a program from dataclasses."""

    def __init__(
        self, program: str, description: str = "", defaults: Mapping[str, Any] | None = None
    ) -> None:
        """defaults: values of this command that differ from those of the classes."""
        self._parser = SentenceParser(
            prog=program,
            description=description,
            formatter_class=_HelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        self._defaults = dict(defaults or {})
        self._owners: dict[str, set[str]] = {}
        self._common: set[str] = set()
        self._names: set[str] = set()
        self._groups: dict[str, Any] = {}

    def add(
        self,
        config: type,
        title: str,
        *,
        description: str = "",
        prefix: str = "",
        switch: tuple[str, str] | None = None,
        owner: str | None = None,
        from_model: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
        hidden: bool = False,
    ) -> None:
        """A group of flags, one per field of `config`.

        Args:
            prefix: in front of each flag's name.
            switch: name and help of the flag that turns the group on.
            owner: family of models that these flags are for; None: for all commands and families.
            from_model: flags whose value follows from --model where they are not given.
            defaults: values that the help shows instead of the class's own.
            hidden: accepted, but not in the help: the flags mean nothing to this command.
        """
        group = self._groups.get(title)
        if group is None:
            group = self._parser.add_argument_group(title, description or None)
            self._groups[title] = group
        defaults = {**(defaults or {}), **self._defaults}
        if switch:
            self._add_owner(switch[0], owner)
            if switch[0] not in self._names:
                self._add(group, switch[0], bool, False, {"help": switch[1]})
        for flag in flags_of(config, prefix):
            self._add_owner(flag.name, owner)
            if flag.name in self._names:
                continue
            default = defaults.get(flag.name, flag.field.default)
            if flag.name in from_model:
                default = "model"
            metadata = {**flag.field.metadata, "hidden": hidden}
            self._add(group, flag.name, flag.type, default, metadata)

    def _add_owner(self, name: str, owner: str | None) -> None:
        if owner is None:
            self._common.add(name)
        else:
            self._owners.setdefault(name, set()).add(owner)

    def _add(
        self, group: Any, name: str, kind: type, default: Any, metadata: Mapping[str, Any]
    ) -> None:
        self._names.add(name)
        shown = "" if default is None or default is False or default == "" else default
        text = f"{metadata['help']} [{_as_text(shown)}]" if shown != "" else metadata["help"]
        text = argparse.SUPPRESS if metadata.get("hidden") else text.replace("%", "%%")
        if kind is bool:
            group.add_argument(f"--{name}", nargs="?", type=_boolean, const=True, help=text)
            if default is not False:
                off = {"dest": name, "action": "store_false", "help": argparse.SUPPRESS}
                group.add_argument(f"--no_{name}", **off)
            return
        parse, choices = metadata.get("parse"), metadata.get("choices")
        metavar = metadata.get("metavar") or (None if choices else _METAVAR[kind])
        reader = _parsed_by(parse) if parse else kind
        group.add_argument(f"--{name}", type=reader, choices=choices, metavar=metavar, help=text)

    def add_flag(self, name: str, help: str, **options: Any) -> None:
        """A flag of this command alone; options as in argparse."""
        self._names.add(name)
        self._parser.add_argument(f"--{name}", help=help, **options)

    def parse(self, words: Sequence[str] | None = None) -> Flags:
        """Parse words, or sys.argv; --a-b is --a_b. UserError for what it does not understand."""
        words = sys.argv[1:] if words is None else words
        return self.flags(vars(self._parser.parse_args([_with_underscores(w) for w in words])))

    def flags(self, given: Mapping[str, Any]) -> Flags:
        """Flags of this command by name, without a command line."""
        owners = {
            name: families for name, families in self._owners.items() if name not in self._common
        }
        return Flags(given, owners, self._defaults)


_METAVAR = {int: "N", float: "X", str: "TEXT", tuple: "X,..."}


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(
            ":".join(f"{part:g}" for part in item) if isinstance(item, tuple) else str(item)
            for item in value
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with_underscores(word: str) -> str:
    """--local-rank=0 as --local_rank=0; negative numbers and values stay."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _parsed_by(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse: its ValueError becomes the sentence that the user sees."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class SentenceParser(argparse.ArgumentParser):
    """A mistake on the command line is a UserError: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class _HelpFormatter(argparse.HelpFormatter):
    """One line per flag where a terminal of 120 columns allows it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == "?":  # --flag is --flag true
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)

    def add_usage(self, *_: Any) -> None:
        self._add_item(lambda: f"usage: {self._prog} [--flag value ...]\n\n", [])
