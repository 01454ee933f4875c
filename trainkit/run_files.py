"""Files in the folder of a run: its record, args.json, and the lines of metrics.jsonl."""

from pathlib import Path

from trainkit.errors import InputError
from trainkit.files import MAX_ID, number, parse_json, read_json, shown


def file_in_run(folder: Path, name: str) -> Path | None:
    """The file of that name where there is one. Raises InputError where a link leads out of the folder."""
    path = folder / name
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path} is a link that leads out of the run's folder.")
    return path


def read_record(folder: Path, script: str | None = None) -> dict | None:
    """args.json of a run's folder, with "arguments" and "resumed"; None where there is none.

    Raises InputError where it is damaged or a link that leads out, or where the run is not one of `script`.
    """
    path = file_in_run(folder, "args.json")
    if path is None:
        return None
    record = read_json(path, "what a run began with", dict)
    for key, kind in {"arguments": dict, "resumed": list}.items():
        if not isinstance(record.setdefault(key, kind()), kind):
            raise InputError(f"{path}: {key}: expected {kind.__name__}, got {shown(record[key])}")
    if script is not None and record.get("script") != script:
        raise InputError(f"{path}: the run was begun by {shown(record.get('script'))}; {script} cannot go on with it")
    return record


def step_record(line: str) -> dict | None:
    """A line of metrics.jsonl, with a number of at least 0 as its "step"; None where it is something else."""
    try:
        record = parse_json(line, "")
        step = None if isinstance(record["step"], str) else record["step"]
        return record | {"step": number(step, "", 0, MAX_ID)}
    except (InputError, KeyError, TypeError):
        return None
