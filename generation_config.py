"""Generation config: from the JSON file that users write to tasks that are known to run.

A config is a list of entries, one prompt each. All of it is checked before any weight is loaded, against the small
files of the base model (tokenizer, sizes), the subjects' files and the layouts; one report says all that is wrong.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer
from transformers.utils import cached_file

from .base_models import base_model_errors, unsuitable_base
from .guidance_methods import resolve_guidance_method
from .hub_utils import load_subject
from .layout import Region, parse_layout
from .residual_embeddings import ResidualEmbedding, parse_prompt


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
        layout: where subjects stand: a colour map, a JSON file, `{phrase: box}` or a list of dicts (see
            `layout.parse_layout`).
        color_context: colour of the map `"255,0,0"` -> `[subject, weight]`.
        guidance_steps: how many of the first steps follow the layout; 0: none, the layout is not even read.
        guidance_weight: strength of the pull into the regions.
        weight_negative: weight of a subject's words outside its region, at most 0.
        guidance_method: a name of `guidance_methods.GUIDANCE_METHODS`.
        recurrence: how often each of the first `recurrence_steps` steps is taken.
        recurrence_steps: how many these are; left out: the guided ones.
        negative_prompt: instead of the command line's.
        seed: instead of the command line's.
    """

    prompt: str
    residual_dict: Mapping[str, str] = field(default_factory=dict)
    subject_list: Sequence[tuple[str, int]] | None = None
    layout: Any = None
    color_context: Mapping[str, Any] | None = None
    guidance_steps: int | None = None
    guidance_weight: float | None = None
    weight_negative: float | None = None
    guidance_method: str | None = None
    recurrence: int | None = None
    recurrence_steps: int | None = None
    negative_prompt: str | None = None
    seed: int | None = None


MOST_SEED = 2**62  # torch takes 2 ** 63 - 1; the pictures of an entry count on from its seed
# Passed on to the pipeline where the entry gives them.
GUIDANCE_KEYS = (
    "guidance_steps", "guidance_weight", "weight_negative", "guidance_method", "recurrence", "recurrence_steps"
)  # fmt: skip


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
    "guidance_steps": (lambda value: _is_count(value, 0), "a whole number from 0 (no layout guidance)"),
    "guidance_weight": (lambda value: _is_number(value) and abs(value) <= 1e6, "a number such as 0.08"),
    "weight_negative": (lambda value: _is_number(value) and value <= 0, "a number of at most 0 such as -1e8"),
    "guidance_method": (_is_text, 'a name such as "multisubject"'),
    "recurrence": (lambda value: _is_count(value, 1), "a whole number from 1 (each step once)"),
    "recurrence_steps": (lambda value: _is_count(value, 0), "a whole number from 0"),
    "negative_prompt": (lambda value: isinstance(value, str), "text"),
    "seed": (lambda value: _is_count(value, 0) and value <= MOST_SEED, f"a whole number from 0 to {MOST_SEED}"),
}


class ConfigError(ValueError):
    """A generation config that cannot be run. The message lists every problem with its place in the file."""


# --- from the file to tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseModel:
    """What the check of a config has to know of a base model: small files only, no weights.

    Args:
        name: folder or Hub id.
        tokenizer: its CLIP tokenizer.
        size: `(height, width)` of its pictures in pixels.
        embed_dim: width of its text encoder, which is the width of its subjects' residuals.
        version: changes when the model does: a Hub commit, or a checksum of a folder's files (of large ones, the time).
    """

    name: str
    tokenizer: Any
    size: tuple[int, int]
    embed_dim: int
    version: str

    @classmethod
    def read(cls, name: str) -> BaseModel:
        """Read a base model's tokenizer and sizes. Raises `ConfigError` for what is no folder or Hub id of one."""
        try:
            with base_model_errors(name):
                unet, vae, text_encoder = (_read_json(name, part) for part in ("unet", "vae", "text_encoder"))
                tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
                version = _version(_config_file(name, "unet").parent.parent)
                size, blocks, embed_dim = unet["sample_size"], vae["block_out_channels"], text_encoder["hidden_size"]
        except (OSError, ValueError) as error:
            raise ConfigError(f"base model {name!r} cannot be read: {error}") from error
        except KeyError as error:
            raise ConfigError(
                f"base model {name!r} cannot be read: {error} is missing in its unet/config.json, vae/config.json or "
                "text_encoder/config.json; expected the folder or Hub id of a Stable Diffusion model."
            ) from None
        if problem := unsuitable_base(unet, embed_dim):
            raise ConfigError(f"base model {name!r} cannot be used: its UNet {problem}")
        height, width = (size, size) if isinstance(size, int) else size
        scale = 2 ** (len(blocks) - 1)
        return cls(name, tokenizer, (height * scale, width * scale), embed_dim, version)


def _config_file(model: str, component: str) -> Path:
    path = cached_file(model, "config.json", subfolder=component)
    if path is None:
        raise OSError(f"it has no {component}/config.json; expected the folder or Hub id of a Stable Diffusion model.")
    return Path(path)


def _read_json(model: str, component: str) -> dict[str, Any]:
    return json.loads(_config_file(model, component).read_text(encoding="utf-8"))


def _version(folder: Path) -> str:
    if folder.parent.name == "snapshots":  # of the Hub's cache, whose other files may come later
        return folder.name
    digest = hashlib.sha256()
    parts = (folder / part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    for file in (folder / "model_index.json", *(file for part in parts for file in sorted(part.glob("*")))):
        if file.is_file():
            status = file.stat()
            is_small = status.st_size <= 2**26
            digest.update(f"{file.relative_to(folder)} {status.st_size} ".encode())
            digest.update(file.read_bytes() if is_small else str(status.st_mtime_ns).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class TaskSubject:
    """A personal subject of a task.

    Args:
        key: what the config calls it.
        source: file, folder or Hub id, as `MultiSubjectPipeline.load_subject` takes it.
        residual: what was read from there.
    """

    key: str
    source: str
    residual: ResidualEmbedding


@dataclass(frozen=True)
class GenerationTask:
    """An entry that has been checked and made ready to run.

    Args:
        config: the entry as it stands in the file.
        prompt: what the pipeline gets: every personal subject marked as `<name>`.
        subjects: name -> personal subject.
        layout: the entry's layout with its paths found; None without layout guidance.
        size: `(height, width)` in pixels.
        folder: where the pictures go, below the output folder.
    """

    config: GenerationConfig
    prompt: str
    subjects: Mapping[str, TaskSubject]
    layout: Any
    size: tuple[int, int]
    folder: Path

    def regions(self) -> tuple[Region, ...]:
        """The layout at the picture's size, its subjects under the names that the pipeline knows them by.

        Read anew by every call: the masks of a long list of entries would fill the memory. Raises as `parse_layout`.
        """
        if self.layout is None:
            return ()
        height, width = self.size
        names = {subject.key.casefold(): name for name, subject in self.subjects.items()}
        regions = parse_layout(self.layout, height=height, width=width, color_context=self.config.color_context)
        return tuple(
            replace(region, subject=names.get(region.subject.casefold()) or self.marked(region.subject))
            for region in regions
        )

    @property
    def residuals(self) -> dict[str, ResidualEmbedding]:
        """Name -> what was read of the subject."""
        return {name: subject.residual for name, subject in self.subjects.items()}

    def marked(self, text: str) -> str:
        """Text of the entry with the task's subjects under the names that the pipeline knows them by."""
        for name, subject in self.subjects.items():
            text = re.sub(rf"<\s*{re.escape(subject.key)}\s*>", f"<{name}>", text, flags=re.IGNORECASE)
        return text

    def check_negative_prompt(self, text: str, tokenizer: Any) -> None:
        """Raises `ConfigError` for a `<name>` that is no subject of the task's prompt."""
        try:
            parse_prompt(tokenizer, self.marked(text), self.residuals, by_phrase=False)
        except ValueError:
            named = ", ".join(f"<{subject.key}>" for subject in self.subjects.values()) or "none"
            raise ConfigError(
                f"the negative prompt {text!r} names a subject that the prompt {self.config.prompt!r} does not; "
                f"expected one of the prompt's own subjects ({named}) or plain words."
            ) from None


class _Report:
    """Collects problems, each with the place in the file that it is about."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.starts: list[int] = []  # of each entry, in characters

    def problem(self, message: str, entry: int | None = None, *keys: str) -> None:
        """`keys` lead to the place within the entry: a key, then a key of its value."""
        self.problems.append(f"{self._place(entry, keys)}: {message}")

    def warn(self, message: str, entry: int, *keys: str) -> None:
        self.warnings.append(f"{self._place(entry, keys)}: {message}")

    def _place(self, entry: int | None, keys: Sequence[str]) -> str:
        if entry is None:
            return str(self.path)
        position, end = self.starts[entry], (*self.starts, len(self.text))[entry + 1]
        for key in keys:
            match = re.compile(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:").search(
                self.text, position, end
            )
            position = match.start() if match else position
        line = self.text.count("\n", 0, position) + 1
        path = "".join(f"[{key!r}]" if depth else f", {key}" for depth, key in enumerate(keys))
        return f"{self.path}:{line}: entry {entry + 1}{path}"


def load_tasks(
    path: str | os.PathLike[str], base: BaseModel, size: tuple[int, int] | None = None
) -> tuple[list[GenerationTask], list[str]]:
    """Read and check a generation config.

    Args:
        path: JSON file with a list of entries, see `GenerationConfig`.
        base: the model that it will run on.
        size: `(height, width)` of the pictures; default: the base's.

    Returns:
        One task per entry, and warnings about things that do not matter for the pictures.

    Raises:
        ConfigError: naming all problems, each with line, entry and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"generation config {str(path)!r} cannot be read: {error}.") from error
    report = _Report(path, text)
    entries = _read_entries(report)
    tasks: list[GenerationTask] = []
    for index, entry in enumerate(entries):
        num_problems = len(report.problems)
        config = _check_types(entry, index, report)
        if config is not None:
            task = _plan(config, index, report, base, size or base.size)
            if len(report.problems) == num_problems:
                tasks.append(task)
    if report.problems:
        count = f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{count} in the generation config; nothing was generated:", *report.problems]))
    return _separate_folders(tasks), report.warnings


def _read_entries(report: _Report) -> list[Any]:
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


def _check_types(entry: Any, index: int, report: _Report) -> GenerationConfig | None:
    """Keys and kinds of values of one entry."""
    if not isinstance(entry, dict):
        report.problem(f"expected a dictionary with a prompt, got {_shorten(entry)}.", index)
        return None
    good = {}
    for key, value in entry.items():
        if key not in _EXPECTED:
            close = difflib.get_close_matches(key, _EXPECTED, 1)
            remedy = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(_EXPECTED)}."
            report.problem(f"unknown key; {remedy}", index, key)
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
    related = {"prompt", "residual_dict", "subject_list", "layout", "color_context"} & ({"prompt"} | entry.keys())
    return GenerationConfig(**good) if related <= good.keys() else None


def _plan(
    config: GenerationConfig, index: int, report: _Report, base: BaseModel, size: tuple[int, int]
) -> GenerationTask:
    """Everything about an entry that needs the files it names and the tokenizer."""
    if config.guidance_method is not None:
        with _collect(report, index, "guidance_method"):
            resolve_guidance_method(config.guidance_method)
    prompt, places = _mark_subjects(config, index, report, base)
    subjects: dict[str, TaskSubject] = {}
    for name, (key, phrase) in places.items():
        # What stands in for a subject that cannot be read, so that the rest can be checked all the same.
        residual = ResidualEmbedding(phrase or key, {})
        source = config.residual_dict[key]
        with _collect(report, index, "residual_dict", key):
            source = _find_source(source, report.path)
            residual = _read_subject(source, name, key, phrase, base)
        subjects[name] = TaskSubject(key, source, residual)
    for key in config.residual_dict.keys() - {key for key, _ in places.values()}:
        try:
            _find_source(config.residual_dict[key], report.path)
        except (ValueError, RuntimeError) as error:
            if any(key == meant for meant, _ in config.subject_list or []):  # with a wrong index, reported above
                report.problem(str(error), index, "residual_dict", key)
            else:
                report.warn(f"{error} The prompt does not use it.", index, "residual_dict", key)

    layout = None
    if config.layout is not None and config.guidance_steps != 0:
        with _collect(report, index, "layout"):
            layout = resolve_paths(config.layout, report.path)
    folder = _folder([subject.key for subject in subjects.values()], config.prompt)
    task = GenerationTask(config, prompt, subjects, layout, size, folder)
    regions: tuple[Region, ...] = ()
    with _collect(report, index, "layout"):
        regions = task.regions()
    with _collect(report, index, "prompt"):
        _check_names(config, prompt, subjects, base)
        parsed = parse_prompt(base.tokenizer, prompt, task.residuals)
        for region in regions:
            with _collect(report, index, "color_context" if config.color_context else "layout"):
                parsed.find(region.subject, region.occurrence)
    with _collect(report, index, "negative_prompt"):
        task.check_negative_prompt(config.negative_prompt or "", base.tokenizer)
    if not subjects:
        task = replace(task, folder=_folder([region.subject for region in regions], config.prompt))
    return task


def _check_names(config: GenerationConfig, prompt: str, subjects: Mapping[str, Any], base: BaseModel) -> None:
    """Every `<name>` of the marked prompt is a subject, or a learned token of the base's."""
    known = {f"<{name}>".casefold() for name in subjects} | {*map(str.casefold, base.tokenizer.get_added_vocab())}
    for word in re.findall(r"<\s*([^<>]+?)\s*>", prompt):
        if f"<{word}>".casefold() not in known:
            close = difflib.get_close_matches(word, config.residual_dict, 1)
            remedy = f"did you mean '<{close[0]}>'?" if close else "add its file there, or leave the brackets out."
            raise ValueError(
                f"{f'<{word}>'!r} has no file in residual_dict, which has {list(config.residual_dict)}; {remedy}"
            )


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"


@contextmanager
def _collect(report: _Report, entry: int, *keys: str) -> Iterator[None]:
    """Turns an error that a function raises for bad input into a problem of the report."""
    try:
        yield
    except (ValueError, TypeError, OSError, OverflowError, RuntimeError) as error:
        report.problem(str(error), entry, *keys)


# --- subjects ------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def _mark_subjects(
    config: GenerationConfig, index: int, report: _Report, base: BaseModel
) -> tuple[str, dict[str, tuple[str, str | None]]]:
    """Write the entry's personal subjects as `<name>`: the prompt, and name -> (key, class phrase if plain).

    A word that is already marked keeps its file's own class phrase; a plain one *is* the class phrase.
    """
    places: dict[tuple[int, int], str] = {}  # characters of the prompt -> key
    if config.subject_list is not None:
        for position, (key, number) in enumerate(config.subject_list):
            with _collect(report, index, "subject_list"):
                place = _find_place(config, base.tokenizer, key, number)
                if any(_overlap(place, other) for other in places):
                    raise ValueError(
                        f"pair {position + 1} names the same word as another pair; expected each word once."
                    )
                places[place] = key
    found = {key: list(_find_phrase(config.prompt, key)) for key in config.residual_dict}
    names_of: dict[str, str] = {}
    for key in (key for key, hits in found.items() if hits):
        other = names_of.setdefault(subject_name(key).casefold(), key)
        if other != key:
            report.problem(
                f"{other!r} and {key!r} mean the same name in a prompt, where case and spaces do not count; expected "
                "different ones. Rename one, here and in the prompt.",
                index,
                "residual_dict",
                key,
            )
    marked = {place: key for key, hits in found.items() for place in hits if config.prompt[place[0]] == "<"}
    for place in [place for place in places if place not in marked and any(_overlap(place, mark) for mark in marked)]:
        word, (start, end) = places.pop(place), next(mark for mark in marked if _overlap(place, mark))
        report.problem(
            f"{word!r} is a part of {config.prompt[start:end]!r}, which the prompt marks as a subject of its own; "
            "expected one of both.",
            index,
            "subject_list",
        )
    places |= marked
    if config.subject_list is None and not marked:
        for key in sorted(found, key=len, reverse=True):  # `red dog` before `dog`
            free = [place for place in found[key] if not any(_overlap(place, other) for other in places)]
            if len(free) > 1:
                message = f"{key!r} stands {len(free)} times in the prompt: say which one is the subject, as `<{key}>`."
                report.problem(message, index, "prompt")
            places |= dict.fromkeys(free[:1], key)

    prompt = config.prompt
    names: dict[str, tuple[str, str | None]] = {}
    for (start, end), key in sorted(places.items(), reverse=True):
        name = subject_name(key)
        prompt = f"{prompt[:start]}<{name}>{prompt[end:]}"
        if name not in names or (start, end) not in marked:
            names[name] = (key, None if (start, end) in marked else key)
    return prompt, dict(sorted(names.items()))


def subject_name(key: str) -> str:
    """What the prompt calls the subject of a key of `residual_dict`."""
    return re.sub(r"[^\w-]+", "-", key)  # names have no spaces, phrases may


def _find_place(config: GenerationConfig, tokenizer: Any, key: str, number: int) -> tuple[int, int]:
    """The place in the prompt that a pair of `subject_list` means; its number may count words or tokens."""
    pair = f"[{json.dumps(key)}, {number}]"
    if key not in config.residual_dict:
        raise ValueError(
            f"{pair}: {key!r} has no file in residual_dict, which has {list(config.residual_dict)}; add it there, or "
            "leave the pair out to draw the plain word."
        )
    places = list(_find_phrase(config.prompt, key))
    if not places:
        words = ", ".join(f"{number} {word!r}" for number, word in enumerate(_WORD.findall(config.prompt), 1))
        raise ValueError(f"{pair}: {key!r} is not in the prompt, whose words are {words}.")
    by_word = [1 + len(_WORD.findall(config.prompt[:start])) for start, _ in places]
    # Tokens can be counted only where the prompt is what the text encoder will read.
    by_token = [1 + len(tokenizer.tokenize(config.prompt[:start])) for start, _ in places]
    by_token = by_word if "<" in config.prompt else by_token
    hits = {place for numbers in (by_word, by_token) for n, place in zip(numbers, places, strict=True) if n == number}
    if len(hits) != 1:
        expected = " or ".join(
            f"{word}" if word == token else f"{word} ({token} in tokens)"
            for word, token in zip(by_word, by_token, strict=True)
        )
        problem = "means two places, one in words and one in tokens" if hits else "is not its place in the prompt"
        raise ValueError(f"{pair}: {number} {problem}; expected {expected} for {key!r}, counted from 1.")
    return hits.pop()


def _find_phrase(prompt: str, phrase: str) -> Iterator[tuple[int, int]]:
    """Whole-word occurrences in characters, with the brackets where it is marked as `<phrase>`."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    for match in re.finditer(rf"<\s*{words}\s*>|(?<!\w){words}(?!\w)", prompt, re.IGNORECASE):
        yield match.span()


def _overlap(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first[0] < second[1] and second[0] < first[1]


def _read_subject(source: str, name: str, key: str, class_phrase: str | None, base: BaseModel) -> ResidualEmbedding:
    subject = load_subject(source, name=name, class_phrase=class_phrase)[name]
    if not subject.class_phrase:  # of a `.pt`, whose key in `residual_dict` is its words
        subject = replace(subject, class_phrase=key)
    num_tokens = len(base.tokenizer.tokenize(subject.class_phrase))
    if tuple(subject.delta.shape) != (num_tokens, base.embed_dim):
        remedy = "Use the base model and the phrase that the subject was trained with."
        if subject.delta.shape[1] == base.embed_dim:
            own = load_subject(source, name=name)[name].class_phrase
            if class_phrase is not None and own not in ("", class_phrase):
                remedy = f"It was trained as {own!r}: write `<{name}>` in the prompt, which stands for that."
            elif not own:
                remedy = (
                    "The file does not say which words it was trained with: write these in the prompt, and as its key "
                    "in residual_dict, or put them into the file with `multisubject convert --class-phrase`."
                )
        raise ValueError(
            f"{source} has shape {tuple(subject.delta.shape)}, but the phrase {subject.class_phrase!r} takes "
            f"({num_tokens} tokens, width {base.embed_dim}) in {base.name}. {remedy}"
        )
    return subject


# --- files and layouts ---------------------------------------------------------------------------------------------


def _search_folders(config_path: Path) -> list[Path]:
    folder = config_path.resolve().parent
    return [Path.cwd(), folder, folder.parent]


def _find_file(name: str, config_path: Path) -> str:
    """The path of a file or folder. Raises `ValueError` if it is in none of the search folders."""
    folders = _search_folders(config_path)
    for folder in folders:
        if (path := folder / Path(name).expanduser()).exists():
            return str(path)
    raise ValueError(f"{name!r} does not exist; looked in {', '.join(dict.fromkeys(map(str, folders)))}.")


def _find_source(name: str, config_path: Path) -> str:
    """A subject's file or folder; what cannot be one is passed on as a Hub id."""
    owner, *rest = name.split("/")
    is_local = name.startswith((".", "/", "~")) or (name.endswith((".pt", ".safetensors")) and len(rest) < 2)
    is_local = is_local or not rest or any((folder / owner).exists() for folder in _search_folders(config_path))
    return _find_file(name, config_path) if is_local else name


def resolve_paths(layout: Any, config_path: Path) -> Any:
    """The layout with its JSON file read, if it is one, and with the paths of colour map and masks found."""
    find = partial(_find_file, config_path=config_path)
    if isinstance(layout, str):
        layout = find(layout)
        if not layout.lower().endswith(".json"):
            return layout
        try:
            layout = json.loads(Path(layout).read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{layout}:{error.lineno}: this is not JSON: {error.msg}.") from None
        if not isinstance(layout, (dict, list)):
            raise ValueError(f"the layout's file holds {layout!r}, expected a dictionary or a list of dictionaries.")
    if isinstance(layout, dict):
        return {subject: find(value) if isinstance(value, str) else value for subject, value in layout.items()}
    return [
        {**part, "mask": find(part["mask"])} if isinstance(part, dict) and isinstance(part.get("mask"), str) else part
        for part in layout
    ]


def _folder(subjects: Sequence[str], prompt: str) -> Path:
    """`guitar_person/a_photo_of_person_and_guitar_on_the_beach`."""
    return Path(_slug("_".join(sorted(set(subjects)))) or "no_subject") / (_slug(prompt) or "prompt")


def _slug(text: str, limit: int = 160) -> str:
    """Text as a folder's name. One that had to be cut ends in a checksum of the whole."""
    slug = re.sub(r"[^\w.-]+", "_", text).strip("_.")
    if len(slug.encode()) <= limit:
        return slug
    return f"{slug.encode()[:limit].decode(errors='ignore')}_{zlib.crc32(text.encode()):08x}"


def _separate_folders(tasks: Sequence[GenerationTask]) -> list[GenerationTask]:
    """Entries with equal subjects and prompts go to `…`, `…_2`, `…_3` in the order of the file, past folders that
    another entry has. Upper and lower case count as equal, as on the disks of macOS and Windows."""

    def key(folder: Path) -> str:
        return str(folder).casefold()

    others = {key(task.folder) for task in tasks}
    taken: set[str] = set()
    separate = []
    for task in tasks:
        folder, count = task.folder, 1
        while key(folder) in taken or (count > 1 and key(folder) in others):
            count += 1
            folder = task.folder.with_name(f"{task.folder.name}_{count}")
        taken.add(key(folder))
        separate.append(replace(task, folder=folder))
    return separate
