"""Files of results that a benchmark goes on with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest_of_weights(*places: Path) -> str:
    """The same for the same safetensors files: those given, and all in the folders given."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def load_results(path: Path, settings: dict[str, Any], argument: str) -> dict[str, Any]:
    """Earlier results made with the same settings; none where there is no file. ValueError for other settings, which
    names the command line's `argument` for the place."""
    if not path.exists():
        return {"settings": settings, "cells": {}}
    results: dict[str, Any] = json.loads(path.read_text())
    if differing := [key for key in settings if results["settings"].get(key) != settings[key]]:
        raise ValueError(f"{path} was made with other settings ({', '.join(differing)}); choose another {argument}.")
    return results
