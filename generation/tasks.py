"""Entries that have been checked and made ready to run: against the base model, the subjects' files and the layouts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multisubject.generation.adapters import IPAdapters, Weights, lora_source, read_lora
from multisubject.generation.advice import advise
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import ConfigError, ConfigFile, GenerationConfig, Report
from multisubject.generation.places import (
    find_source,
    picture_folder,
    resolve_color_paths,
    resolve_paths,
    texts_of_regions,
)
from multisubject.generation.prompts import check_names, mark_subjects, read_subject
from multisubject.guidance_methods import GUIDANCE_METHODS, resolve_guidance_method
from multisubject.layout import Region, parse_layout
from multisubject.move_times import FEWEST_STEPS, check_moves
from multisubject.placed_prompts import PlacedPrompt, check_served, find_places, read_words
from multisubject.region_ip_adapters import pictures_by_adapter
from multisubject.region_texts import negative_texts, words_texts
from multisubject.residual_embeddings import ParsedPrompt, ResidualEmbedding, parse_prompt


@dataclass(frozen=True)
class TaskSubject:
    """A personal subject of a task.

    Args:
        key: what the config calls it.
        source: file, folder or Hub id, as a pipeline's `load_subject` takes it.
        residual: what was read from there.
    """

    key: str
    source: str
    residual: ResidualEmbedding


@dataclass(frozen=True)
class GenerationTask:
    """An entry that has been checked and made ready to run.

    Args:
        config: the entry as it stands in the file, without `moves` where the run is too short for any.
        prompt: what the pipeline gets: every personal subject marked as `<name>`.
        subjects: name -> personal subject.
        layout: the entry's layout with its paths found; None without layout guidance.
        color_context: the same of the colours.
        size: `(height, width)` in pixels.
        folder: where the pictures go, below the output folder.
        loras: name -> LoRA, of those that regions hold.
        ip_adapters: what regions' reference pictures act by; None where there are none.
    """

    config: GenerationConfig
    prompt: str
    subjects: Mapping[str, TaskSubject]
    layout: Any
    color_context: Any
    size: tuple[int, int]
    folder: Path
    loras: Mapping[str, Weights] = field(default_factory=dict)
    ip_adapters: IPAdapters | None = None

    def regions(self) -> tuple[Region, ...]:
        """The layout at the picture's size, its subjects under the names that the pipeline knows them by.

        Read anew by every call: the masks of a long list of entries would fill the memory. Raises as `parse_layout`.
        """
        if self.layout is None:
            return ()
        height, width = self.size
        return tuple(
            self._renamed(region)
            for region in parse_layout(self.layout, height=height, width=width, color_context=self.color_context)
        )

    def _renamed(self, region: Region) -> Region:
        names = {subject.key.casefold(): name for name, subject in self.subjects.items()}
        texts: dict[str, Any] = {
            key: self.marked(text) for key in ("prompt", "negative_prompt") if (text := getattr(region, key))
        }
        if region.is_named:
            texts["subject"] = names.get(region.subject.casefold()) or self.marked(region.subject)
        elif region.subject == region.prompt:
            texts["subject"] = texts["prompt"]
        return replace(region, **texts)

    @property
    def residuals(self) -> dict[str, ResidualEmbedding]:
        """Name -> what was read of the subject."""
        return {name: subject.residual for name, subject in self.subjects.items()}

    def marked(self, text: str) -> str:
        """Text of the entry with the task's subjects under the names that the pipeline knows them by."""
        for name, subject in self.subjects.items():
            text = re.sub(rf"<\s*{re.escape(subject.key)}\s*>", f"<{name}>", text, flags=re.IGNORECASE)
        return text

    def check_negative_prompt(self, text: str, base: BaseModel) -> None:
        """Raises `ConfigError` for a `<name>` that is no subject of the task's prompt."""
        try:
            for tokenizer in base.tokenizers.values():
                parse_prompt(tokenizer, self.marked(text), self.residuals, by_phrase=False, learned=base.learned)
        except ValueError:
            named = ", ".join(f"<{subject.key}>" for subject in self.subjects.values()) or "none"
            raise ConfigError(
                f"the negative prompt {text!r} names a subject that the prompt {self.config.prompt!r} does not; "
                f"expected one of the prompt's own subjects ({named}) or plain words."
            ) from None


def load_tasks(
    config: ConfigFile,
    base: BaseModel,
    size: tuple[int, int] | None = None,
    ip_adapters: IPAdapters | None = None,
    num_steps: int | None = None,
) -> tuple[list[GenerationTask], list[str]]:
    """Check all that a generation config names, and make its entries ready to run.

    Args:
        config: what `read_config` found.
        base: the model that it will run on.
        size: `(height, width)` of the pictures; default: the base's.
        ip_adapters: for the reference pictures of regions.
        num_steps: of the runs, for what depends on it; None: that is not checked.

    Returns:
        One task per entry, and warnings about things that do not matter for the pictures.

    Raises:
        ConfigError: naming all problems, each with line, entry and key; those of `config` too.
    """
    report = replace(config.report, problems=[*config.report.problems], warnings=[*config.report.warnings])
    tasks = [
        _plan(entry, index, report, base, size or base.size, ip_adapters, num_steps)
        for index, entry in enumerate(config.entries)
        if entry is not None
    ]
    report.refuse()
    return _separate_folders(tasks), report.warnings


def _plan(
    config: GenerationConfig,
    index: int,
    report: Report,
    base: BaseModel,
    size: tuple[int, int],
    ip_adapters: IPAdapters | None,
    num_steps: int | None,
) -> GenerationTask:
    """Everything about an entry that needs the files it names and the tokenizer."""
    problems = len(report.problems)
    if config.guidance_method is not None:
        with report.collect(index, "guidance_method"):
            resolve_guidance_method(config.guidance_method)
    layout, color_context, texts = None, config.color_context, list[str]()
    if config.layout is not None and config.guidance_steps != 0:
        if config.moves and num_steps is not None and num_steps < FEWEST_STEPS:
            report.warn(f"nothing is moved in {num_steps} steps, that takes at least {FEWEST_STEPS}.", index, "moves")
            config = replace(config, moves=[])
        elif config.moves and num_steps is not None:
            with report.collect(index, "moves"):
                check_moves(config.moves, num_steps)
        with report.collect(index, "layout"):
            layout = resolve_paths(config.layout, report.path)
            texts = texts_of_regions(layout)
        if color_context is not None:
            with report.collect(index, "color_context"):
                color_context = resolve_color_paths(color_context, report.path)
                texts += texts_of_regions([*color_context.values()])
    prompt, places = mark_subjects(config, index, report, base, texts)
    subjects: dict[str, TaskSubject] = {}
    for name, (key, phrase) in places.items():
        # What stands in for a subject that cannot be read, so that the rest can be checked all the same.
        residual = ResidualEmbedding(phrase or key, {})
        source = config.residual_dict[key]
        with report.collect(index, "residual_dict", key):
            source = find_source(source, report.path)
            residual = read_subject(source, name, key, phrase, base)
        subjects[name] = TaskSubject(key, source, residual)
    _check_unused(config, index, report, {key for key, _ in places.values()})

    folder = picture_folder([subject.key for subject in subjects.values()], config.prompt)
    task = GenerationTask(config, prompt, subjects, layout, color_context, size, folder)
    regions: tuple[Region, ...] = ()
    with report.collect(index, "layout"):
        regions = task.regions()
    task = replace(task, **_held_adapters(config, index, report, base, regions, ip_adapters))
    with report.collect(index, "prompt"):
        check_names(config, prompt, subjects, base)
        parsed = [
            parse_prompt(tokenizer, prompt, task.residuals, learned=base.learned)
            for tokenizer in base.tokenizers.values()
        ]
        key = "color_context" if config.color_context else "layout"
        with report.collect(index, key):
            for problem in _check_regions(task, regions, parsed, base):
                report.problem(problem, index, key)
    with report.collect(index, "negative_prompt"):
        task.check_negative_prompt(config.negative_prompt or "", base)
    if len(report.problems) == problems:
        advise(task, regions, base, lambda message, key: report.warn(message, index, key))
    if not subjects:
        task = replace(task, folder=picture_folder([region.subject for region in regions], config.prompt))
    return task


def _check_unused(config: GenerationConfig, index: int, report: Report, used: Collection[str]) -> None:
    """Warn of files that are not there, of subjects that the prompt does not use."""
    for key in config.residual_dict.keys() - used:
        try:
            find_source(config.residual_dict[key], report.path)
        except (ValueError, RuntimeError) as error:
            if any(key == meant for meant, _ in config.subject_list or []):  # with a wrong index, reported above
                report.problem(str(error), index, "residual_dict", key)
            else:
                report.warn(f"{error} The prompt does not use it.", index, "residual_dict", key)


def _held_adapters(
    config: GenerationConfig,
    index: int,
    report: Report,
    base: BaseModel,
    regions: Sequence[Region],
    ip_adapters: IPAdapters | None,
) -> dict[str, Any]:
    """The LoRAs and the IP-Adapters of a task's regions, as fields of `GenerationTask`."""
    loras = {}
    places = {name: region.place for region in reversed(regions) for name in region.lora or ()}
    for name in dict.fromkeys(name for region in regions for name in region.lora or ()):
        with report.collect(index, *(("lora_dict", name) if name in config.lora_dict else ("layout",))):
            loras[name] = read_lora(lora_source(config, name, places[name]), report.path, base)
    for name in config.lora_dict.keys() - loras.keys():
        try:
            find_source(config.lora_dict[name], report.path)
        except (ValueError, RuntimeError) as error:
            report.warn(f"{error} No region uses it.", index, "lora_dict", name)
    with_pictures = [region for region in regions if region.ip_adapter_image is not None]
    for region in with_pictures:
        with report.collect(index, "layout"):
            where = f"{region.place}: ip_adapter_image"
            if ip_adapters is None:
                raise ValueError(
                    f"{where} needs an IP-Adapter: pass --ip_adapter, such as"
                    " h94/IP-Adapter/models/ip-adapter_sd15.safetensors."
                )
            pictures_by_adapter(region.ip_adapter_image, len(ip_adapters.weights), where)
    return {"loras": loras, "ip_adapters": ip_adapters if with_pictures else None}


def _check_regions(
    task: GenerationTask, regions: Sequence[Region], prompt: Sequence[ParsedPrompt], base: BaseModel
) -> list[str]:
    """What is wrong with single regions, whose words are not there or mean several places.

    Raises:
        ValueError: where none is wrong by itself, but together they hold what they cannot.
    """

    def read(texts: Sequence[str]) -> list[ParsedPrompt]:
        return [
            parse_prompt(tokenizer, text, task.residuals, by_phrase=False, learned=base.learned)
            for tokenizer, text in zip(base.tokenizers.values(), texts, strict=True)
        ]

    count, problems, words = len(prompt), list[str](), list[Any]()
    for region in regions:
        own = None
        try:
            if region.prompt is not None:
                own = read_words(region, region.prompt, lambda text: read([text] * count))
            find_places(prompt, region, own)
        except ValueError as error:
            problems.append(str(error))
        words.append(own)
    if problems:
        return problems
    placed = [PlacedPrompt(prompt, regions, words=words)]
    words_texts(placed)
    negative_texts(placed, [[task.marked(task.config.negative_prompt or "")] * count], read)
    if (method := task.config.guidance_method) in {*GUIDANCE_METHODS, None}:
        check_served(placed, resolve_guidance_method(method or "multisubject"))
    return []


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
