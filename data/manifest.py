"""manifest.json of a run folder: which stages are done, from what, and the checksum of every file that they wrote."""
import json

from data import store


def read_manifest(run):
    """The manifest of a run folder, an empty one where there is none yet. Raises ValueError if it is something else."""
    path = run / "manifest.json"
    if not path.is_file():
        return {"format": "kalm-run", "version": 1, "stages": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert manifest["format"] == "kalm-run"
        assert all(isinstance(part, dict) for s in manifest["stages"].values() for part in (s["options"], s.get("files", {})))
    except (ValueError, KeyError, AssertionError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a manifest of a KALM run; give another --output_dir") from None
    return manifest


def open_run(run):
    """Mend what a killed process left of a run, and see to it that there is a manifest."""
    store.recover(run)
    if not (run / "manifest.json").is_file():
        store.write_json(run / "manifest.json", read_manifest(run))


def keep_unfinished(work, anew=False):
    """Make the folder of what a stage has not finished, and delete those of other stages and options; anew: this one's content too."""
    for other in work.parent.glob("*"):
        if anew or other != work:
            store.remove(other)
    work.mkdir(parents=True, exist_ok=True)


def check_files(run, manifest, stages):
    """Raise ValueError, which names file and stage, where a file that one of the stages wrote is not as it was then."""
    for stage in stages:
        if problem := store.damaged(run, manifest["stages"].get(stage, {}).get("files", {})):
            raise ValueError(f"{run}: {problem} since stage {stage!r} wrote it; redo it with `--stage {stage} --force`")


def note_stage(run, manifest, stage, record, writes):
    """Add a finished stage's record to the manifest, with the checksums of what it `writes`, names below the run folder."""
    manifest["stages"][stage] = {**record, "files": store.checksums(run, writes)}
    store.write_json(run / "manifest.json", manifest)
    store.remove(run / "unfinished")
