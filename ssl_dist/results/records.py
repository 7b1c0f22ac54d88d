"""results.json: every number measured on a run, with its protocol, data, checkpoint and time."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from ssl_dist import text_table
from ssl_dist.errors import UserError
from ssl_dist.nn.features import OUTPUT
from ssl_dist.reading import parse_json, read_text
from ssl_dist.storage import durable
from ssl_dist.storage.durable import atomic_write_or_refuse

# checkpoint is the SHA-256 of the checkpoint's file, data and train_data those of the measured split's and the training
# split's samples and labels, transform the test transform in words, version that of the evaluator, options its options,
# layer the one whose features were read, time the moment of measuring (ISO 8601, UTC).
FIELDS = (
    "name", "value", "protocol", "options", "version", "dataset", "split", "data", "train_data", "transform", "layer",
    "seed", "method", "backbone", "checkpoint", "step", "time",
)  # fmt: skip
LATER_FIELDS = ("version", "train_data", "transform")  # None in a record of before there were any
# What a number depends on: a record that differs in one of these is of another measurement.
IDENTITY = (
    "name", "dataset", "split", "data", "train_data", "transform", "layer", "protocol", "options", "version",
    "checkpoint", "backbone",
)  # fmt: skip
FITTED_ON = "fitted on"  # begins what a protocol says of a part of the training split
_TYPES = {
    "options": dict, "value": int | float, "seed": int | None, "step": int, "version": int | None,
    "train_data": str | None, "transform": str | None,
}  # the others are str  # fmt: skip


def make_records(
    values: dict[str, float],
    protocol: str,
    metadata: Mapping[str, str],
    seed: int | None,
    options: dict,
    version: int,
) -> list[dict]:
    """One record for each of an evaluator's values. metadata: the other fields that say what was measured on which
    images, of the output where it names no layer; seed: the run's, None when it is not known; version: the
    evaluator's."""
    common = {
        "layer": OUTPUT, **metadata, "protocol": protocol, "options": options, "version": version, "seed": seed,
        "step": int(metadata["step"]), "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    records = [common | {"name": name, "value": float(value)} for name, value in values.items()]
    return [{field: record[field] for field in FIELDS} for record in records]


def read(path: str | Path) -> list[dict]:
    """The records in the file; none when there is no file, or an empty one, which `add` makes to lock it before its
    first record. Raises `UserError` when it is something else."""
    path = Path(path)
    try:
        text = read_text(path)
        records = parse_json(text) if text else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise UserError(f"{path}: cannot be read: {reason}; move it away and evaluate again") from None
    if isinstance(records, list):
        absent = dict.fromkeys(LATER_FIELDS)
        records = [
            absent | record | {"layer": layer_of(record)} if isinstance(record, dict) else record for record in records
        ]
    if not isinstance(records, list) or not all(_is_record(record) for record in records):
        raise UserError(f"{path}: not a list of results; move it away and evaluate again")
    return records


def add(path: str | Path, new: Sequence[dict]) -> list[dict]:
    """Merge records into the file (whole or not at all) and return all of them.

    A measurement made again (equal in all of `IDENTITY`) takes the old one's place, and also that of a record which
    lacks the fields that came later. One that names no layer is of the output. Raises `UserError` when the file is
    damaged or cannot be written.
    """
    new = [record | {"layer": layer_of(record)} for record in new]
    if not all(_is_record(record) for record in new):
        raise ValueError(f"a record needs the fields {', '.join(FIELDS)}")
    path = Path(path)
    with _locked(path):
        durable.remove_dead(path.parent)
        renewed = {_key(record, LATER_FIELDS) for record in new}
        old = [r for r in read(path) if r["version"] is not None or _key(r, LATER_FIELDS) not in renewed]
        merged = {_key(record): record for record in [*old, *new]}
        with atomic_write_or_refuse(path) as file:
            file.write((json.dumps(list(merged.values()), indent=2, ensure_ascii=False) + "\n").encode())
    return list(merged.values())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock: a process that reads before this one has written would write back without its records.
    A file that was made for the lock is gone where nothing was written."""
    with durable.refuse_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = durable.lock(path, os.O_RDWR | os.O_CREAT)
    try:
        yield
    finally:
        if os.fstat(descriptor).st_size == 0 and durable.is_at(path, descriptor):
            path.unlink()
        os.close(descriptor)


def is_of_a_whole_split(record: dict) -> bool:
    """Whether it measures a whole split; a part held out of one serves to choose by, not to compare."""
    return "[" not in record["split"]


def learned_from_all_images(record: dict) -> bool:
    """Whether what was fitted for it saw the whole training split, and no part of it."""
    return f"; {FITTED_ON} " not in record["protocol"]


def layer_of(record: Mapping) -> str:
    """The layer whose features were read: the output in a record of before others could be chosen."""
    return record.get("layer", OUTPUT)


def label(record: Mapping) -> str:
    """The name of a number as people read it: with the layer, where that is not the output."""
    return record["name"] if layer_of(record) == OUTPUT else f"{record['name']} ({record['layer']})"


def size_of(record: dict) -> str:
    """The size at which the images were measured, in words: the test transform without the constants of the
    normalisation. Empty where it was not recorded."""
    return (record["transform"] or "").partition(", mean")[0]


def require_writable(path: Path) -> None:
    """Raises `UserError` when no record could be added to the file: better before a measurement than after it."""
    folder = path.parent
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"{path}: cannot be written; give a folder that can, with space left")


def table(records: Sequence[dict]) -> str:
    """The records as text, one row each, and the protocols below. A fit that did not converge is marked."""
    shown = [record for record in records if not (record["name"].endswith("_converged") and record["value"] == 1)]
    if not shown:
        return "no results"
    head = ("method", "backbone", "step", "data set", "split", "result", "value")
    rows = []
    for record in shown:
        cells = [str(record[column]) for column in ("method", "backbone", "step", "dataset", "split")]
        cells.append(label(record))
        value = "NOT CONVERGED" if record["name"].endswith("_converged") else number(record["value"])
        rows.append(([*cells, value], record["protocol"]))
    return text_table.with_protocols(head, rows, right_aligned=(2, 6))


def number(value: float, std: float | None = None) -> str:
    """A value, or a mean ± standard deviation, as tables show it."""
    places = decimals(value)
    return f"{value:.{places}f}" + ("" if std is None else f" ± {std:.{places}f}")


def decimals(value: float) -> int:
    """That are shown of a value: two, and four where it is below 1 and probably a score that ends there."""
    return 4 if 0 < abs(value) < 1 else 2


def _key(record: dict, without: Sequence[str] = ()) -> str:
    return json.dumps([record[field] for field in IDENTITY if field not in without], sort_keys=True)


def _is_record(record: object) -> bool:
    return (
        isinstance(record, dict)
        and set(record) == set(FIELDS)
        and all(isinstance(record[field], _TYPES.get(field, str)) for field in FIELDS)
        and not any(isinstance(record[field], bool) for field in FIELDS)  # true would count as 1
    )
