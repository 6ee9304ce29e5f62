"""The configuration file as it stands: its JSON, the keys of its entries and the kinds of their values.

Nothing here needs torch or the base model, so that a slip of the pen is told at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multisubject import move_times
from multisubject.unknown_names import did_you_mean

MOST_SEED = 2**62  # torch takes 2 ** 63 - 1; the pictures of an entry count on from its seed
# Passed on to the pipeline where the entry gives them; those of sampling are not for `guide`.
SAMPLING_KEYS = ("recurrence", "recurrence_steps", "moves")
# What holds for all entries: options of the command, not keys
OPTIONS = ("num_images", "num_inference_steps", "guidance_scale", "resolution")
GUIDANCE_KEYS = ("guidance_steps", "guidance_weight", "weight_negative", "guidance_method", *SAMPLING_KEYS)


@dataclass(frozen=True)
class GenerationConfig:
    """One entry of the JSON list, as it stands there. What is None was not given: the pipeline's own default holds.

    Args:
        prompt: text with the subjects as keys of `residual_dict`, plain (`person`) or marked (`<person>`).
        residual_dict: the subject's word or name in the prompt -> its file, folder or Hub id. More subjects than the
            prompt uses are fine.
        subject_list: `[subject, index]` pairs: which words of the prompt become the personal subject, by position,
            counted from 1. Left out: every marked `<subject>`, or if there is none, every word that is a key of
            `residual_dict`.
        layout: where subjects stand: a colour map, a JSON file, `{phrase: box}` or a list of dicts, whose regions may
            hold words, negatives and pictures of their own (see `layout.parse_layout`).
        color_context: colour of the map `"255,0,0"` -> `[subject, weight]`.
        lora_dict: name of a LoRA in `lora` of a region -> its file, folder or Hub id. More than regions use are fine.
        guidance_steps: how many of the first steps follow the layout; 0: none, the layout is not even read.
        guidance_weight: strength of the pull into the regions.
        weight_negative: weight of a subject's words outside its region, at most 0.
        guidance_method: a name of `guidance_methods.GUIDANCE_METHODS`.
        recurrence: how often each of the first `recurrence_steps` steps is taken.
        recurrence_steps: how many these are; left out: the guided ones.
        moves: shares of the steps: after the step during which such a share lies behind, objects are moved into their
            regions (0.15 of 20 steps: after the fourth, during which three lie behind); `[]`: never; left out: the
            guidance method's own.
        negative_prompt: instead of the command line's.
        seed: instead of the command line's.
    """

    prompt: str
    residual_dict: Mapping[str, str] = field(default_factory=dict)
    subject_list: Sequence[tuple[str, int]] | None = None
    layout: Any = None
    color_context: Mapping[str, Any] | None = None
    lora_dict: Mapping[str, str] = field(default_factory=dict)
    guidance_steps: int | None = None
    guidance_weight: float | None = None
    weight_negative: float | None = None
    guidance_method: str | None = None
    recurrence: int | None = None
    recurrence_steps: int | None = None
    moves: Sequence[float] | None = None
    negative_prompt: str | None = None
    seed: int | None = None


class ConfigError(ValueError):
    """A generation config that cannot be run. The message lists every problem with its place in the file.

    Attributes:
        problems: the same, one by one, where they are of a file that was read.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


# --- what is expected ----------------------------------------------------------------------------------------------


def _is_count(value: Any, low: int) -> bool:
    return type(value) is int and value >= low  # not isinstance: True is an int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e38  # whole numbers have no limit of their own


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# key -> (is this value of the right kind?, what is expected)
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_text, "text"),
    "residual_dict": (
        lambda value: isinstance(value, dict) and all(map(_is_text, [*value, *value.values()])),
        'a dictionary such as {"person": "embeddings/petrucci.pt"}',
    ),
    "subject_list": (
        lambda value: (
            isinstance(value, list)
            and all(isinstance(v, list) and len(v) == 2 and _is_text(v[0]) and _is_count(v[1], 1) for v in value)
        ),
        'a list of [subject, index from 1] such as [["person", 4]]',
    ),
    "layout": (
        lambda value: _is_text(value) or (isinstance(value, (dict, list)) and bool(value)),
        "a colour map's path, a JSON file's path, {\"person\": [xmin, ymin, xmax, ymax]} or a list of dictionaries",
    ),
    "color_context": (
        lambda value: isinstance(value, dict) and bool(value),
        'a dictionary such as {"255,0,0": ["person", 2.5]}',
    ),
    "lora_dict": (
        lambda value: (
            isinstance(value, dict)
            and all(map(_is_text, [*value, *value.values()]))
            and not any("." in name for name in value)  # which peft cannot call a LoRA
        ),
        'a dictionary such as {"petrucci": "embeddings/loras/petrucci.safetensors"}, with names without dots',
    ),
    "guidance_steps": (lambda value: _is_count(value, 0), "a whole number from 0 (no layout guidance)"),
    "guidance_weight": (lambda value: _is_number(value) and abs(value) <= 1e6, "a number such as 0.08"),
    "weight_negative": (lambda value: _is_number(value) and value <= 0, "a number of at most 0 such as -1e8"),
    "guidance_method": (_is_text, 'a name such as "multisubject"'),
    "recurrence": (lambda value: _is_count(value, 1), "a whole number from 1 (each step once)"),
    "recurrence_steps": (lambda value: _is_count(value, 0), "a whole number from 0"),
    "moves": (move_times.are_moves, move_times.EXPECTED),
    "negative_prompt": (lambda value: isinstance(value, str), "text"),
    "seed": (lambda value: _is_count(value, 0) and value <= MOST_SEED, f"a whole number from 0 to {MOST_SEED}"),
}


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Collects problems, each with the place in the file that it is about.

    Args:
        path: the file.
        text: what is in it.
        starts: where each entry starts, in characters.
        problems: what keeps the file from being run.
        warnings: what does not matter for the pictures.
    """

    path: Path
    text: str
    starts: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, message: str, entry: int | None = None, *keys: str) -> None:
        """`keys` lead to the place within the entry: a key, then a key of its value."""
        self.problems.append(self.placed(message, entry, keys))

    def warn(self, message: str, entry: int, *keys: str) -> None:
        """As `problem`."""
        self.warnings.append(self.placed(message, entry, keys))

    @contextmanager
    def collect(self, entry: int, *keys: str) -> Iterator[None]:
        """Turns an error that a function raises for bad input into a problem."""
        try:
            yield
        except (ValueError, TypeError, OSError, OverflowError, RuntimeError) as error:
            self.problem(str(error), entry, *keys)

    def refuse(self, *more: str) -> None:
        """Raise `ConfigError` with all problems, if there are any, and lines with `more` to say about them."""
        if self.problems:
            count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
            lines = [f"{count} in the generation config; nothing was generated:", *self.problems, *more]
            raise ConfigError("\n  ".join(lines), self.problems)

    def placed(self, message: str, entry: int | None, keys: Sequence[str]) -> str:
        """The message behind its place in the file."""
        if entry is None:
            return f"{self.path}: {message}"
        position, end = self.starts[entry], (*self.starts, len(self.text))[entry + 1]
        for key in keys:
            match = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:").search(
                self.text, position, end
            )
            position = match.start() if match else position
        line = self.text.count("\n", 0, position) + 1
        path = "".join(f"[{key!r}]" if depth else f", {key}" for depth, key in enumerate(keys))
        return f"{self.path}:{line}: entry {entry + 1}{path}: {message}"


@dataclass(frozen=True)
class ConfigFile:
    """A file that has been read.

    Args:
        entries: what it holds; None for an entry so wrong that nothing else can be said of it.
        report: what is wrong with the keys and values, entry by entry.
    """

    entries: tuple[GenerationConfig | None, ...]
    report: Report


def read_config(path: str | os.PathLike[str]) -> ConfigFile:
    """Read a generation config.

    Args:
        path: JSON file with a list of entries, see `GenerationConfig`.

    Raises:
        ConfigError: for a file that is no JSON list. What is wrong with its entries is in the `report`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"generation config {str(path)!r} cannot be read: {error}.") from error
    return parse_config(Report(path, text))


def parse_config(report: Report) -> ConfigFile:
    """The config in a report's text, as `read_config`; what is wrong with it goes into the report."""
    entries = _read_entries(report)
    return ConfigFile(tuple(_check_types(entry, index, report) for index, entry in enumerate(entries)), report)


def _read_entries(report: Report) -> list[Any]:
    """The list in the file, and where each of its entries starts."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            report.problem(f"the key {key!r} stands twice in one dictionary, so one of the two would be lost.")
        return dict(pairs)

    try:
        entries = json.loads(report.text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{report.path}:{error.lineno}: this is not JSON: {error.msg} (column {error.colno})."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise ConfigError(f"{report.path}: this JSON cannot be read: {error}.") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f'{report.path}:1: expected a list of entries: [{{"prompt": …}}, …].')
    decoder, position = json.JSONDecoder(), report.text.index("[") + 1
    for _ in entries:
        position = re.compile(r"[\s,]*").match(report.text, position).end()  # type: ignore[union-attr]
        report.starts.append(position)
        position = decoder.raw_decode(report.text, position)[1]
    return entries


def _check_types(entry: Any, index: int, report: Report) -> GenerationConfig | None:
    """Keys and kinds of values of one entry."""
    if not isinstance(entry, dict):
        report.problem(f"expected a dictionary with a prompt, got {_shorten(entry)}.", index)
        return None
    good = {}
    for key, value in entry.items():
        if key not in _EXPECTED:
            hint = f"`--{key}` says it for all entries." if key in OPTIONS else did_you_mean(key, _EXPECTED)
            report.problem(f"unknown key; {hint}", index, key)
        elif not _EXPECTED[key][0](value):
            report.problem(f"expected {_EXPECTED[key][1]}, got {_shorten(value)}.", index, key)
        else:
            good[key] = value
    if "prompt" not in entry:
        report.problem("expected a `prompt`.", index)
    if entry.get("color_context") and "layout" not in entry:
        report.problem("colours without a `layout` mean nothing: add the colour map's path.", index, "color_context")
        good.pop("color_context", None)
    # The checks that follow look at these together; without one of them they would report what is not wrong.
    related = {"prompt", "residual_dict", "subject_list", "layout", "color_context", "lora_dict"} & (
        {"prompt"} | entry.keys()
    )
    return GenerationConfig(**good) if related <= good.keys() else None


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"
