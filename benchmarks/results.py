"""Files of results that a benchmark goes on with, and tables of them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multisubject.subject_file import write_atomically


def digest_of_weights(*places: Path) -> str:
    """The same for the same safetensors files: those given, and all in the folders given."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_results(path: Path) -> dict[str, Any]:
    """A file's `base`, `settings` and results."""
    results = json.loads(path.read_text())
    for found in _each(results):
        if isinstance(found.get("pictures"), dict):
            found["pictures"] = as_rows(found["pictures"])
    return results


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write what `read_results` reads, the scores of pictures as columns; a file is whole or as it was."""
    cells = {
        cell: {method: {**found, "pictures": as_columns(found["pictures"])} for method, found in methods.items()}
        for cell, methods in results["cells"].items()
    }
    write_atomically(path, (json.dumps({**results, "cells": cells}, separators=(",", ":")) + "\n").encode())


def as_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of pictures, which all have the same keys, by key: one for each picture, or the number that all
    have."""
    columns: dict[str, Any] = {"count": len(rows)}
    for key in rows[0] if rows else ():
        column = [row[key] for row in rows]
        same = not isinstance(column[0], list) and column.count(column[0]) == len(column)
        columns[key] = column[0] if same else column
    return columns


def as_rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other way round."""
    keys = [key for key in columns if key != "count"]
    return [
        {key: columns[key][row] if isinstance(columns[key], list) else columns[key] for key in keys}
        for row in range(columns["count"])
    ]


def _each(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was found with each method in each cell."""
    return itertools.chain.from_iterable(methods.values() for methods in results["cells"].values())


def load_results(path: Path, base: str, settings: dict[str, Any], argument: str) -> dict[str, Any]:
    """Earlier results of the same base with the same settings; none where there is no file.

    Raises ValueError for another base or other settings, which names the command line's `argument` for the place.
    """
    if not path.exists():
        return {"base": base, "settings": settings, "cells": {}}
    results = read_results(path)
    if results.get("base") != base:
        raise ValueError(f"{path} is of {results.get('base')}, not of {base}; choose another {argument}.")
    if differing := [key for key in settings if results["settings"].get(key) != settings[key]]:
        raise ValueError(f"{path} was made with other settings ({', '.join(differing)}); choose another {argument}.")
    return results


def side_by_side(tables: Mapping[str, str]) -> str:
    """One Markdown table of those of several bases, by name: rows whose first two columns agree follow one another.

    The table of one base stays as it is.
    """
    if len(tables) == 1:
        return next(iter(tables.values()))
    rows: dict[tuple[str, ...], list[str]] = {}
    for base, table in tables.items():
        header, rule, *lines = table.splitlines()
        for line in lines:
            rows.setdefault(tuple(line.split("|")[1:3]), []).append(f"| {base} {line}")
    return "\n".join([f"| base {header}", f"|---{rule}", *itertools.chain(*rows.values())])
