"""Options in files: a YAML or JSON file read by --config, the config.yaml that a run leaves, and the nearest name to a wrong one.

This file knows how options are spelled in a file, not what they mean.
"""
import difflib
import json
import os
from pathlib import Path

import yaml

from data import store

HEAD = "# To repeat this run: python kalm.py --config THIS_FILE --output_dir ANOTHER_FOLDER\n"
WORDS = {int: "a whole number", float: "a number", str: "a text"}
PATHS = ("llm", "encoder", "adapter", "goals", "data")  # options that may name a file or a folder
NAMES = ("smollm2", "tiny", "llm", "released")  # values of these that never do


def did_you_mean(name, names):
    """": did you mean X?" for the known name that is nearest to a wrong one, "" where none is near."""
    near = difflib.get_close_matches(name.lstrip("-").split("=")[0].replace("-", "_"), names, 1)
    return f": did you mean {'--' * name.startswith('--')}{near[0]}?" if near else ""


def read(path, types):
    """Options of a config file: {name: value}, each converted as on the command line. types: {name: type} of the known ones.

    A list becomes a text with commas, true and false 1 and 0, null an empty text. Raises ValueError that names the file
    and the key.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        line = where.line + 1 if where else getattr(error, "lineno", None)
        raise ValueError(f"--config {path}{f', line {line}' if line else ''}: neither YAML nor JSON; write `name: value` lines, "
                         "as in the config.yaml of a run") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {path}: write `name: value` lines, as in the config.yaml of a run; found a {type(found).__name__}")
    options = {}
    for name, value in found.items():
        if name not in types:
            raise ValueError(f"--config {path}: there is no option {name!r}{did_you_mean(str(name), types)}")
        if types[name] is list:  # the stages
            options[name] = value.split() if isinstance(value, str) else value if isinstance(value, list) else [str(value)]
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        try:
            if isinstance(value, (dict, float)) and types[name] is int:
                raise ValueError
            options[name] = types[name]("" if value is None else value)
        except (TypeError, ValueError):
            raise ValueError(f"--config {path}: {name} takes {WORDS[types[name]]}, got {value!r}") from None
    return options


def absolute_paths(values):
    """{name: path} of the options that name a file or folder, so that they hold wherever a config.yaml is used."""
    return {name: os.path.abspath(values[name]) for name in PATHS if values[name] not in ("", *NAMES) and os.path.exists(values[name])}


def remember(options, records, done):
    """The options of a run's finished stages -> RUN/config.yaml, which `read` reads. Of stages that this command has not run,
    those stay that the file had.

    options: a namespace with `run`, `stages`, `scale`, `seed` and a value for each of records, which have `name` and `stage`.
    """
    path = options.run / "config.yaml"
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        before = before if isinstance(before, dict) else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        before = {}
    values = {r.name: getattr(options, r.name) for r in records}
    values |= {r.name: before[r.name] for r in records if r.stage not in options.stages and r.name in before}
    with store.replacing(path) as aside:
        aside.write_text(HEAD + yaml.safe_dump({"stage": done, "scale": options.scale, "seed": options.seed, **values}, sort_keys=False,
                                               allow_unicode=True, width=1000), encoding="utf-8")
