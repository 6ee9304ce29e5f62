"""Files of results that a benchmark goes on with, and tables of them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIRST_BASE = "tiny_world/base"


def digest_of_weights(*places: Path) -> str:
    """The same for the same safetensors files: those given, and all in the folders given."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_results(path: Path) -> dict[str, Any]:
    """A file's `base`, `settings` and results. Files from the time of one base do not name it."""
    return {"base": FIRST_BASE, **json.loads(path.read_text())}


def load_results(path: Path, base: str, settings: dict[str, Any], argument: str) -> dict[str, Any]:
    """Earlier results of the same base with the same settings; none where there is no file.

    Raises ValueError for another base or other settings, which names the command line's `argument` for the place.
    """
    if not path.exists():
        return {"base": base, "settings": settings, "cells": {}}
    results = read_results(path)
    if results["base"] != base:
        raise ValueError(f"{path} is of {results['base']}, not of {base}; choose another {argument}.")
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
