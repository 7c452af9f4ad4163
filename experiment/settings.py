"""Settings: dataclasses, one a stage, read by transformers' HfArgumentParser.

The command line comes first, then a config file, then the defaults of a scale, then a field's own
default. This file knows no particular setting and imports nothing of ours.
"""

import dataclasses
import difflib
import json
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def setting(default: Any, text: str, **metadata) -> Any:
    """A field of a settings class: its default, and what `--help` says of it."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: [*default], metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


def absolute(value: str, *names: str) -> str:
    """A path that holds from anywhere, where a value is one of a file or folder and no name."""
    return value if value in ("", *names) or not Path(value).exists() else os.path.abspath(value)


def at_least(least: float, settings: Any, *names: str) -> None:
    """Raise ValueError for the first of the named settings that is lower, infinite or no number."""
    for name in names:
        value = getattr(settings, name)
        if not least <= value < math.inf:
            raise ValueError(f"--{name} must be at least {least}, got {value}")


class SettingsParser(HfArgumentParser):
    """HfArgumentParser for several settings classes; what is wrong is a ValueError."""

    def __init__(self, classes: Sequence[type], renamed: Mapping[str, str] | None = None):
        super().__init__(classes, add_help=False, allow_abbrev=False)
        self.renamed = renamed or {}
        self.names = {}  # of a setting, by each way to write it on a command line
        for action in self._actions:
            for option in action.option_strings:
                self.names[option] = action.dest

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; `kalm.py --help` lists the options")

    def given(self, arguments: Sequence[str]) -> dict[str, str]:
        """The settings that arguments name, each with the words after it, "" for a switch."""
        found = {}
        name = None
        for argument in arguments:
            option, _, value = argument.partition("=")
            if option in self.names:
                name = self.names[option]
                found[name] = value
            elif name:
                found[name] = f"{found[name]} {argument}".strip()
        return found

    def all_given(self, arguments: Sequence[str]) -> dict[str, str]:
        """As `given`, with the settings of a config file; without them where that is wrong."""
        try:
            return self.given(with_config(arguments, self))
        except ValueError:
            return self.given(arguments)

    def hint(self, option: str) -> str:
        """ ": did you mean X?" for an unknown option, "" where no name is near."""
        name = option.lstrip("-").replace("-", "_")
        dashes = "--" if option.startswith("--") else ""
        if name in self.renamed:
            return f": it is {dashes}{self.renamed[name]} now"
        near = difflib.get_close_matches(name, set(self.names.values()), 1)
        return f": did you mean {dashes}{near[0]}?" if near else ""


def parse(
    arguments: Sequence[str],
    classes: Sequence[type],
    defaults: Callable[[dict[str, str]], dict],
    renamed: dict[str, str],
) -> tuple[list, dict[str, str]]:
    """An instance of each settings class, and the settings that were given by name.

    defaults: from the settings given (as texts) to the defaults of the rest. renamed: present names
    of former options. Raises ValueError for what is unknown or wrong.
    """
    parser = SettingsParser(classes, renamed)
    arguments = with_config(arguments, parser)
    given = parser.given(arguments)
    parser.set_defaults(**defaults(given))
    *found, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        hint = parser.hint(unknown[0].partition("=")[0])
        raise ValueError(f"unknown option {unknown[0]}{hint}")
    return found, given


def with_config(arguments: Sequence[str], parser: SettingsParser) -> list[str]:
    """Arguments, and before them those of the config file that they name, if they do."""
    config = parser.given(arguments).get("config")
    return [*config_arguments(config, parser), *arguments] if config else [*arguments]


def is_on(given: Mapping[str, str], name: str) -> bool:
    """Whether a switch is given as a word for yes, or alone."""
    return given.get(name, "no").lower() in ("", "yes", "true", "t", "y", "1")


def config_arguments(path: str, parser: SettingsParser) -> list[str]:
    """The settings of a YAML or JSON file as arguments of a command line.

    A list becomes a text with commas. Raises ValueError that names the file and the key.
    """
    advice = "write `name: value` lines, as in the config.yaml of a run"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else path
        raise ValueError(f"--config {where}: neither YAML nor JSON; {advice}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {path}: {advice}; found a {type(found).__name__}")
    arguments = []
    for name, value in found.items():
        if name not in parser.names.values():
            hint = parser.hint(str(name))
            raise ValueError(f"--config {path}: there is no option {name!r}{hint}")
        if name == "stage":
            stages = value if isinstance(value, list) else str(value).split()
            arguments += ["--stage", *map(str, stages)]
        elif value is not None:
            if isinstance(value, list):
                value = ",".join(map(str, value))
            if isinstance(value, dict):
                value = json.dumps(value)
            arguments.append(f"--{name}={value}")
    return arguments


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    """Raise ValueError, with the nearest name and all of them, for one that is not known."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{what} {name!r}; {hint}There are {', '.join(known)}")


def help_text(intro: str, classes: Sequence[type], scales: dict[str, dict]) -> str:
    """What `--help` prints: our settings by class, with their defaults at each scale."""
    columns = min(max(shutil.get_terminal_size().columns, 80), 120)
    legend = f"(defaults at {' / '.join(scales)}; the last holds for the rest)"
    lines = [intro, legend]
    for each in classes:
        lines += ["", each.__doc__.splitlines()[0]]
        for field in dataclasses.fields(each):
            if field.name not in each.__annotations__:
                continue
            own = field.default if field.default_factory is dataclasses.MISSING else "all"
            values = [scale.get(field.name, own) for scale in scales.values()]
            while values[1:] and values[-1] == values[-2]:
                values.pop()
            shown = " / ".join(f"{v:g}" if type(v) is float else str(v) for v in values) or "none"
            text = f"--{field.name}  {field.metadata['help']} ({shown})"
            lines += textwrap.wrap(
                text, columns - 1, initial_indent="  ", subsequent_indent=" " * 6
            )
    return "\n".join(lines)
