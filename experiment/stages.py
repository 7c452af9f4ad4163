"""Doing the stages of a run: which there are to do, in order, each noted in the manifest when done.

This file knows what a stage reads and writes and which settings it follows from, not what it does.
"""

import dataclasses
import hashlib
import json
import shutil
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache

from experiment import folder
from experiment.folder import Manifest


@dataclass(frozen=True)
class Stage:
    """A function of files to files: function(run, settings, folder for what is not finished).

    reads: names of stages; writes: files and folders below the run's. shared: which settings of the
    whole run its result follows from, beside its own.
    """

    function: Callable[[Any, Any, Path], None]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("seed", "env", "world_file")


@dataclass(frozen=True)
class Plan:
    """The stages that a command names, with their settings and those that all share.

    Settings may have `recorded()`, what of them counts (else all do), and `inputs()`, hashes of the
    files that they name.
    """

    manifest: Manifest
    stages: Mapping[str, Stage]
    names: Sequence[str]  # of those to run if need be
    settings: Mapping[str, Any]
    shared: Mapping[str, Any]
    force: bool

    def record(self, name: str) -> dict:
        """The settings that a stage's result follows from: {run, settings}. Reads no file."""
        settings = self.settings[name]
        recorded = getattr(settings, "recorded", lambda: dataclasses.asdict(settings))
        shared = {key: self.shared[key] for key in self.stages[name].shared}
        return {"run": shared, "settings": recorded()}

    def inputs(self, name: str) -> dict:
        """Hashes of the files that a stage's settings name."""
        return getattr(self.settings[name], "inputs", dict)()

    def fingerprint(self, name: str) -> str:
        """Hash of what a stage's result follows from; an input counts by content, not by name."""
        record = self.record(name)
        counts = {**record["run"], **record["settings"], **self.inputs(name)}
        read = {}
        for needed in self.stages[name].reads:
            read[needed] = self.manifest.stages.get(needed, {}).get("fingerprint")
        text = json.dumps([name, counts, read], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_do(self) -> list[str]:
        """Stages that are not done so, or follow one. Raises ValueError if inputs are missing."""
        undone = []
        for name in self.names:
            follows = set(self.stages[name].reads) & set(undone)
            is_done = self.manifest.is_done(name, self.fingerprint(name))
            if self.force or follows or not is_done:
                undone.append(name)
        return undone

    def check(self, given: Iterable[str]) -> None:
        """Raise ValueError where what a stage reads is missing, or made with other settings."""
        for name in self.names:
            for needed in self.stages[name].reads:
                if needed not in (*self.names, *self.manifest.stages):
                    lacks = f"stage {name!r} reads what stage {needed!r} writes, and "
                    lacks += f"{self.manifest.run} has none"
                    raise ValueError(f"{lacks}; run `--stage {needed}` first")
        for name in self.upstream():
            before = self.manifest.stages[name]
            wanted = self.record(name)
            pairs = [(key, before["run"], wanted["run"]) for key in wanted["run"]]
            named = [key for key in given if key in wanted["settings"]]
            pairs += [(key, before["settings"], wanted["settings"]) for key in named]
            for key, was, would_be in pairs:
                if was.get(key) != would_be[key]:
                    problem = f"stage {name!r} was run with --{key} {was.get(key)}, and this "
                    problem += f"command has {would_be[key]}"
                    advice = f"repeat that option, or name {name!r} in --stage too"
                    raise ValueError(f"{problem}; {advice}")

    def upstream(self) -> list[str]:
        """Stages whose output those of this command follow from, directly or not, in order."""
        found = set()
        for name in reversed(self.stages):  # what one reads comes before it
            if name in self.names or name in found:
                found.update(self.stages[name].reads)
        return [name for name in self.stages if name in found and name not in self.names]

    def in_words(self, todo: Sequence[str]) -> str:
        """What will happen: a paragraph a stage."""
        columns = min(max(shutil.get_terminal_size().columns, 80), 120) - 1
        paragraphs = []
        for name in self.names:
            recorded = self.record(name)["settings"].items()
            settings = [f"{key} {value}" for key, value in recorded if value != ""]
            status = "" if name in todo else "(done before)  "
            text = f"  {name:9} {status}{', '.join(settings)}"
            options = {"break_long_words": False, "break_on_hyphens": False}
            paragraphs.append(textwrap.fill(text, columns, subsequent_indent=" " * 12, **options))
        return "\n".join(paragraphs)


def do(plan: Plan, run: Any, todo: Sequence[str], begins: Callable[[str], None]) -> None:
    """Run stages one after the other, on all processes; the main one notes each when it is done.

    begins: told the name of each stage. A stage that writes nothing is not noted.
    """
    state = PartialState()
    manifest = plan.manifest
    for number, name in enumerate(todo):
        begins(name)
        manifest.read()
        stage = plan.stages[name]
        work = manifest.run / folder.UNFINISHED / f"{name}-{plan.fingerprint(name)}"
        earlier = 0.0
        if state.is_main_process:
            print(f"{name} ...", flush=True)
            manifest.check_files(set(stage.reads) - set(todo[:number]))
            if stage.writes:
                earlier = manifest.begin(work, anew=plan.force)
        state.wait_for_everyone()
        transformers.set_seed(plan.shared["seed"])
        began = time.monotonic()
        began_cpu = time.process_time()
        with folder.naming_full_disk(manifest.run):
            stage.function(run, plan.settings[name], work)
        clear_device_cache(garbage_collection=True)  # models leave the device with their stage
        cpu_seconds = gather_object([round(time.process_time() - began_cpu, 1)])
        seconds = round(earlier + time.monotonic() - began, 1)
        if state.is_main_process:
            if stage.writes:
                record = {"fingerprint": plan.fingerprint(name), **plan.record(name)}
                record |= {"inputs": plan.inputs(name), "time_s": seconds, "files": {}}
                manifest.stages[name] = record
                leave_records(plan, name)
                manifest.note(name, stage.writes)
                log = manifest.run / "logs" / "stages.jsonl"
                folder.append_json(log, stage=name, time_s=seconds, cpu_s=cpu_seconds)
            print(f"{name} took {seconds:.0f} s", flush=True)
        state.wait_for_everyone()


def leave_records(plan: Plan, name: str) -> None:
    """Settings of all stages that are done -> config.yaml, and with seconds -> results.json."""
    run, done = plan.manifest.run, plan.manifest.stages
    hashes = ("world_file", "llm_weights")
    config = {name: value for name, value in plan.shared.items() if name not in hashes}
    for record in done.values():
        config |= record["settings"]
    with folder.replacing(run / "config.yaml") as aside:
        text = yaml.safe_dump({"stage": list(done), **config}, sort_keys=False, allow_unicode=True)
        head = "# To repeat this run: kalm.py --config THIS_FILE --output_dir ANOTHER_FOLDER\n"
        aside.write_text(head + text, encoding="utf-8")
    if name == "evaluate":
        seconds = {stage: done[stage]["time_s"] for stage in plan.stages if stage in done}
        seconds.pop("report", None)
        results = folder.read_json(run / "results.json")
        folder.write_json(run / "results.json", {**results, "time_s": seconds, "config": config})
