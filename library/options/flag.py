"""What a flag is: a field of an option group, written once; `Flags` lists all of a script, for whatever walks them."""

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from library.address import Address
from library.errors import Problems
from library.options.kinds import TEXT, Kind, Read, choice, kind_of

_SPECIFICATION = "flag"  # key of a field's metadata


class Level(Enum):
    """Where a flag's value may stand in a --dataset_config: nowhere, down to a data set, down to a subset."""

    RUN = "the command line and --config_file alone"
    DATASET = "[[datasets]] or [general]"
    SUBSET = "[general], [[datasets]] or [[datasets.subsets]]"
    ONE_SUBSET = "[[datasets.subsets]]"  # nothing that several subsets could share


RUN, DATASET, SUBSET, ONE_SUBSET = Level.RUN, Level.DATASET, Level.SUBSET, Level.ONE_SUBSET


class Required:
    """The default of a flag without which no run starts."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


class PathTo(Enum):
    """What a path of the user's must name, for messages."""

    FILE = "a file"
    DATA = "a folder, a shard or the hub's name of a data set"
    STATE = "the folder of a training state, or auto"
    OUTPUT = "a folder, or nothing yet"
    MODEL = "a diffusers folder, a single file or the hub's name of a model"
    VAE = "a folder, a single file or the hub's name of a VAE"
    TOKENIZER = "a folder or the hub's name of a tokenizer"


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: on the command line behind two dashes, in files as it is, and of the field.
        section: of --help.
        page: of docs/ that is about the section's subject; "" where there is none.
        kind: of its values.
        default: None stands for no value; REQUIRED for a flag that must be given.
        help: what it does, its unit among it. Its default is added to it.
        at: the innermost level of a --dataset_config that may hold it.
        key: its name in a --dataset_config.
        aliases: other spellings, without dashes.
        shorthands: flags without a value of their own, each with the value that it gives this flag and its help.
        needs: conditions of which at least one must hold, or the flag has nothing to act on: a flag's name,
            `name=value`, or `name & name` where both must be given.
        idle_without: conditions as those of `needs`; where none holds, the log says that the flag does nothing.
        replaces: flags that a configuration file has in vain where this one stands on the command line.
        path_to: what its path must name, for what is looked for before anything is imported.
        told_on_resume: a run that goes on with another value says so.
        same_on_ranks: all processes of a run must have the same value. Paths may always differ.
        on_command_line: False for what only a --dataset_config can say.
        in_config_file: False for what only the command line can say.
    """

    name: str
    section: str
    page: str
    kind: Kind
    default: Any
    help: str
    at: Level
    key: str
    aliases: tuple[str, ...]
    shorthands: Mapping[str, tuple[Any, str]]
    needs: tuple[str, ...]
    idle_without: tuple[str, ...]
    replaces: tuple[str, ...]
    path_to: PathTo | None
    told_on_resume: bool
    same_on_ranks: bool
    on_command_line: bool
    in_config_file: bool

    @property
    def required(self) -> bool:
        """Whether no run starts without it."""
        return self.default is REQUIRED

    @property
    def help_line(self) -> str:
        """The help with the default behind it, where there is one."""
        nothing = self.default is None or self.default is False or self.default in ("", ())
        return self.help if nothing else f"{self.help} ({self.default})"

    def spellings(self) -> tuple[str, ...]:
        """Its name and aliases on the command line."""
        return tuple(f"--{name}" for name in (self.name, *self.aliases))


@dataclass(frozen=True)
class _Specification:
    """What the author of a field says about its flag."""

    help: str
    default: Any
    kind: Kind | None
    limits: Mapping[str, Any]
    more: Mapping[str, Any]


def flag(
    default: Any,
    help: str,
    *,
    read: Read | None = None,
    choices: typing.Sequence[Any] = (),
    metavar: str | None = None,
    is_text: bool = True,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: int | None = None,
    at: Level = RUN,
    key: str | None = None,
    aliases: tuple[str, ...] = (),
    shorthands: Mapping[str, tuple[Any, str]] | None = None,
    needs: str | tuple[str, ...] = (),
    idle_without: str | tuple[str, ...] = (),
    replaces: tuple[str, ...] = (),
    path_to: PathTo | None = None,
    told_on_resume: bool = True,
    same_on_ranks: bool = True,
    on_command_line: bool = True,
    in_config_file: bool = True,
) -> Any:
    """The field of a frozen dataclass that is a flag; the arguments are `Flag`'s, and these:

    Args:
        default: REQUIRED where the flag must be given.
        read: a value from its text, where the annotation does not tell; ValueError with a sentence that begins "must".
        choices: the values, where they are few; from the registry that they name.
        is_text: with `read`: a file must give a text.
        least, above, most, below: limits of a number.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    kind = choice(choices) if choices else None
    if read is not None:
        kind = Kind(read, "TEXT", is_text=is_text)
    more = {
        "at": at,
        "key": key,
        "aliases": aliases,
        "shorthands": shorthands or {},
        "needs": (needs,) if isinstance(needs, str) else needs,
        "idle_without": (idle_without,) if isinstance(idle_without, str) else idle_without,
        "replaces": replaces,
        "path_to": path_to,
        "told_on_resume": told_on_resume,
        "same_on_ranks": same_on_ranks,
        "on_command_line": on_command_line,
        "in_config_file": in_config_file,
        "metavar": metavar,
    }
    given = {name: limit for name, limit in limits.items() if limit is not None}
    metadata = {_SPECIFICATION: _Specification(help, default, kind, given, more)}
    return field(metadata=metadata) if default is REQUIRED else field(default=default, metadata=metadata)


Group = TypeVar("Group", bound="OptionGroup")


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Base of all groups of flags: frozen dataclasses whose fields are made by `flag`."""

    title: ClassVar[str] = ""  # of its section of --help
    page: ClassVar[str] = ""  # of docs/ that is about it

    @classmethod
    def from_values(cls: type[Group], values: Mapping[str, Any], problems: Problems) -> Group:
        """The group with the values that the command line and --config_file have for its flags, by their names.

        Args:
            problems: takes up what is wrong with files that the flags name.
        """
        return cls(**{name: values[name] for name in flag_names(cls)})

    def check(self, options: Any) -> Iterator[str]:
        """Say which flags of this group cannot go together, or not with those of other groups.

        Args:
            options: all groups of the script, as `library.options.training.TrainingOptions` has them.
        """
        yield from ()


def in_words(conditions: Sequence[str]) -> str:
    """What a flag needs, as a user writes it: `--a`, `--a and --b`, `--a, --b, or --c with --d`."""
    if len(conditions) == 1:
        return " and ".join(f"--{name}" for name in conditions[0].split(" & "))
    *first, last = (" with ".join(f"--{name}" for name in needed.split(" & ")) for needed in conditions)
    return f"{', '.join(first)}{',' * (len(first) > 1)} or {last}"


def flag_names(group_type: type[OptionGroup]) -> list[str]:
    """The names of the flags that are fields of a group, inherited ones among them."""
    return [each.name for each in dataclasses.fields(group_type) if _SPECIFICATION in each.metadata]


def group_types(options_type: type) -> dict[str, type[OptionGroup]]:
    """The groups of a script's options, by the names of their fields."""
    hints = typing.get_type_hints(options_type)
    return {each.name: hints[each.name] for each in dataclasses.fields(options_type)}


def nested_group(group_type: type[OptionGroup]) -> tuple[str, type[OptionGroup]] | None:
    """The field of a group that holds other groups, and their type: `subsets: tuple[SubsetOptions, ...]`."""
    for name, hint in typing.get_type_hints(group_type).items():
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
        if isinstance(inner, type) and issubclass(inner, OptionGroup):
            return name, inner
    return None


class Flags:
    """All flags of a script, in the order of --help.

    Args:
        options_type: the script's dataclass of groups; its `defaults` are of flags for which the script has another
            one than their group.
    """

    def __init__(self, options_type: type) -> None:
        defaults: dict[str, Any] = dict(getattr(options_type, "defaults", {}))
        self.options_type = options_type
        self.groups = group_types(options_type)
        found: dict[str, Flag] = {}
        for group_type in self.groups.values():
            for each in flags_of_group(group_type):
                if each.name in found:
                    raise TypeError(f"--{each.name} is a flag of two groups of {options_type.__name__}")
                if each.name in defaults:
                    each = dataclasses.replace(each, default=defaults.pop(each.name))
                found[each.name] = each
        for each in found.values():
            conditions = (*each.needs, *each.idle_without, *each.replaces)
            for needed in (part.partition("=")[0] for needs in conditions for part in needs.split(" & ")):
                if needed not in found:
                    raise TypeError(f"--{each.name} needs --{needed}, which {options_type.__name__} does not have")
        if defaults:
            raise TypeError(f"{options_type.__name__} has no flags {', '.join(defaults)} to give defaults to")
        self.by_name = found
        self.by_key = {key: each for each in self for key in (each.name, *each.aliases)}
        self.shorthands = {name: (each, value) for each in self for name, (value, _) in each.shorthands.items()}

    def __iter__(self) -> Iterator[Flag]:
        return iter(self.by_name.values())

    def sections(self) -> dict[str, list[Flag]]:
        """The flags by the section of --help that they stand in."""
        found: dict[str, list[Flag]] = {}
        for each in self:
            found.setdefault(each.section, []).append(each)
        return found

    def defaults(self) -> dict[str, Any]:
        """By name; None for a flag that must be given."""
        return {each.name: None if each.required else each.default for each in self}


def flags_of_group(group_type: type[OptionGroup]) -> Iterator[Flag]:
    """A group's flags: those of the groups that it holds, then of its bases, then its own."""
    nested = nested_group(group_type)
    if nested is not None:
        yield from flags_of_group(nested[1])
    own = {each.name: each for each in dataclasses.fields(group_type)}
    for declaring in reversed(group_type.__mro__):
        hints = typing.get_type_hints(declaring)
        for name in inspect.get_annotations(declaring):
            if name in own and _SPECIFICATION in own[name].metadata:
                yield _made(own.pop(name), hints[name], declaring)


def _made(of: "dataclasses.Field[Any]", annotation: Any, group: type[OptionGroup]) -> Flag:
    """The flag of a field of a group."""
    said: _Specification = of.metadata[_SPECIFICATION]
    more = dict(said.more)
    key, metavar = more.pop("key"), more.pop("metavar")
    kind = said.kind or kind_of(annotation, **said.limits)
    parts = (annotation, *typing.get_args(annotation))
    if any(typing.get_origin(part) is tuple for part in parts):
        kind = dataclasses.replace(kind, comma_list=not kind.many)
    names_a_place = Path in parts or Address in parts or (kind is TEXT and said.default is REQUIRED)
    if names_a_place:
        kind = dataclasses.replace(kind, empty_is_unset=True)
    if metavar is not None:
        kind = dataclasses.replace(kind, metavar=metavar)
    return Flag(of.name, group.title, group.page, kind, said.default, said.help, key=key or of.name, **more)
