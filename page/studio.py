"""One base model behind the page: documents are checked, and become pictures on disk."""

from __future__ import annotations

import json
import math
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from multisubject.generation import making
from multisubject.generation.adapters import read_ip_adapters
from multisubject.generation.arguments import GenerateArguments, IPAdapterArguments
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import GUIDANCE_KEYS, SAMPLING_KEYS, ConfigError, Report, parse_config
from multisubject.generation.picture_files import save_picture
from multisubject.generation.tasks import GenerationTask, load_tasks
from multisubject.layout import Region, as_layout, parse_layout
from multisubject.page.document import Document, place_of
from multisubject.page.entries import Settings, arguments_of, entry_of, other_pipeline
from multisubject.unknown_names import did_you_mean
from multisubject.visualization import attention_sheet

# Previews may take this share of a run's time.
_PREVIEW_SHARE = 0.25
_CHECK_SECONDS = 0.2


@dataclass(frozen=True)
class Problem:
    """What is wrong with a document, or could be better.

    Args:
        text: a sentence for people.
        region: id of the region that it is about, or None.
        severity: `error` keeps the document from being run, `warning` does not.
    """

    text: str
    region: str | None = None
    severity: str = "error"


class Refused(ValueError):
    """A document that cannot be run; `problems` says why."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(problem.text for problem in problems))
        self.problems = tuple(problems)


class Cancelled(Exception):
    """The run was told to stop."""


@dataclass(frozen=True)
class Job:
    """A document that has been found sound, ready to run.

    Args:
        document, settings: what was asked for.
        task, args: the same, as `generate_images.py` has them.
        warnings: what could be better.
    """

    document: Document
    settings: Settings
    task: GenerationTask
    args: GenerateArguments
    warnings: tuple[Problem, ...]


@dataclass(frozen=True)
class Progress:
    """News of a run.

    Args:
        number: of the picture, from 1; 0 while others have the model.
        step, steps: of this picture.
        preview: what it looks like so far, or None.
    """

    number: int
    step: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Picture:
    """A picture that is done, and kept.

    Args:
        path: its file, settings included.
        seed: of its noise.
        sheet_path: its attention maps, None where there is nothing to map.
    """

    path: Path
    seed: int
    sheet_path: Path | None


class _PlainReport(Report):
    """Messages without places in a file: there is none."""

    def placed(self, message: str, entry: int | None, keys: Sequence[str]) -> str:
        return message


class Studio:
    """One base model and its pipeline, for all tabs: whoever makes a picture has it alone meanwhile.

    Args:
        base: the model's small files.
        device, dtype: where and how it computes.
        output_dir: every run makes a folder in it.
        loras: name -> file of each LoRA that regions may hold.
        ip_adapters: the IP-Adapters of regions' reference pictures. Raises `ConfigError` for what is none of this base.
    """

    def __init__(
        self,
        base: BaseModel,
        device: torch.device,
        dtype: torch.dtype,
        output_dir: Path,
        loras: Mapping[str, str] | None = None,
        ip_adapters: IPAdapterArguments | None = None,
    ):
        self.base, self.dtype, self.output_dir, self.loras = base, dtype, output_dir, dict(loras or {})
        self.ip_adapters = None if ip_adapters is None else read_ip_adapters(ip_adapters, base)
        self.pipe = making.load_pipeline(base, device, dtype, show_progress=False)
        making.load_ip_adapters(self.pipe, self.ip_adapters)  # says what does not fit before anybody draws
        self._lock = threading.Lock()
        self._loras: Any = None  # settings of those that the pipeline has, under the lock

    def adapter_names(self) -> list[str]:
        """What to call the IP-Adapters, in their order."""
        return [] if self.ip_adapters is None else [weights.path.stem for weights in self.ip_adapters.weights]

    # --- before a run ------------------------------------------------------------------------------------------------

    def sizes(self) -> list[dict[str, Any]]:
        """Sizes to offer, about the base's own in pixels, as `{"size": [width, height], "label": "4:3"}`."""
        height, width = self.base.size
        step = self.pipe.vae_scale_factor * 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)
        sizes = dict[tuple[int, int], str]()
        for across, down in ((1, 1), (5, 4), (4, 5), (3, 2), (2, 3), (16, 9), (9, 16)):
            stretch = (across / down) ** 0.5
            size = (round(width * stretch / step) * step, round(height / stretch / step) * step)
            common = math.gcd(*size)
            sizes[size] = f"{size[0] // common}:{size[1] // common}"
        return [{"size": [*size], "label": label} for size, label in sizes.items()]

    def check(self, document: Document, settings: Settings, sources: Mapping[str, str]) -> Job:
        """The checks of `generate_images.py`.

        Args:
            document, settings: checked ones.
            sources: name of each subject -> its file.

        Raises:
            Refused: with all that is wrong.
        """
        if not document.prompt:
            raise Refused([Problem("Write a prompt: what is to be seen?")])
        problems = self._unknown(document, sources) + self._unfit(document, settings)
        args = arguments_of(document, settings, self.base)
        entry = entry_of(document, settings, sources, self.loras)
        try:
            config = parse_config(_PlainReport(Path("page.json"), json.dumps([entry])))
            (task,), warnings = load_tasks(config, self.base, args.size(), self.ip_adapters)
        except ConfigError as error:
            # What is unknown has been said, with names that the page knows.
            told = ("residual_dict", "lora_dict") if problems else ()
            said = [text for text in error.problems or [str(error)] if not any(key in text for key in told)]
            raise Refused([*problems, *(_about(document, text, "error") for text in said)]) from None
        if problems:
            raise Refused(problems)
        return Job(document, settings, task, args, tuple(_about(document, text, "warning") for text in warnings))

    def _unknown(self, document: Document, sources: Mapping[str, str]) -> list[Problem]:
        """Subjects and LoRAs that the page does not have."""
        known = {name.casefold() for name in sources}
        learned = {word.strip("<>").casefold() for word in self.base.learned}
        problems = []
        for name in document.names():
            if name.casefold() not in known | learned:
                otherwise = "add it under Subjects, or leave the brackets out."
                remedy = did_you_mean(name, sources, otherwise, form="<{}>")
                region = next((region["id"] for region in document.regions if region["subject"] == name), None)
                problems.append(Problem(f"{f'<{name}>'!r} is not among the subjects; {remedy}", region))
        for region in document.regions:
            for name in region["lora"] or ():
                if name not in self.loras:
                    remedy = did_you_mean(name, self.loras, None if self.loras else "this page has none.")
                    problems.append(Problem(f"LoRA {name!r} is not there; {remedy}", region["id"]))
        return problems

    def _unfit(self, document: Document, settings: Settings) -> list[Problem]:
        """Settings that do not go together."""
        problems = list[Problem]()
        if settings.start == "noise":
            return problems
        if document.underlay is None:
            problems.append(Problem("There is no picture under the regions to start from: choose a result."))
        if settings.recurrence > 1:
            problems.append(Problem("Steps can be taken twice in new pictures only: set `recurrence` to 1."))
        region = document.region(settings.region)
        if settings.start == "region" and (region is None or region["shape"] is None):
            problems.append(Problem("Choose the region that is to be redrawn."))
        return problems

    # --- a run -------------------------------------------------------------------------------------------------------

    def run(self, job: Job, stop: threading.Event) -> Iterator[Progress | Picture]:
        """Make a job's pictures, one at a time; tabs that ask at once take turns, picture by picture.

        A thread of its own does it. Closing the iterator ends it after its step, as setting `stop` does.

        Raises:
            Cancelled: `stop` was set.
            ValueError, RuntimeError: what only the model or its scheduler can tell.
        """
        news: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            try:
                self._work(job, stop, news.put)
                news.put(None)
            except BaseException as error:
                news.put(error)

        thread = threading.Thread(target=work, name="pictures", daemon=True)
        thread.start()
        try:
            while (item := news.get()) is not None:
                # A browser that is slower than the model sees fewer previews.
                while isinstance(item, Progress) and not news.empty() and isinstance(news.queue[0], Progress):
                    item = news.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _work(self, job: Job, stop: threading.Event, tell: Any) -> None:
        folder = _new_folder(self.output_dir)
        settings = making.task_settings(job.task, job.args, self.dtype, self.base)
        page = {"document": job.document.plain(), "settings": asdict(job.settings)}
        if job.settings.start == "noise":
            page["document"]["underlay"] = None  # it has no part in the picture
        else:
            settings |= {"start": job.settings.start, "image_strength": job.settings.image_strength}
        regions = job.task.regions()
        for index in range(job.settings.num_images):
            seed = job.settings.seed + index
            with self._turn(stop, lambda: tell(Progress(0, 0, job.settings.num_inference_steps))):
                making.load_subjects(self.pipe, job.task)
                self._load_loras(job.task)
                making.load_ip_adapters(self.pipe, job.task.ip_adapters)
                follow = _Follower(self.pipe, index + 1, stop, tell)
                image, maps = self._draw(job, seed, regions, follow)
            path, sheet_path = folder / f"{index:04d}.png", None
            if maps:
                sheet_path = folder / f"{index:04d}_attention.png"
                save_picture(attention_sheet(image, maps, regions), sheet_path, settings | {"seed": seed})
            one = {**page, "settings": {**page["settings"], "seed": seed, "num_images": 1}}
            save_picture(image, path, settings | {"seed": seed}, page=one)
            tell(Picture(path, seed, sheet_path))

    def _load_loras(self, task: GenerationTask) -> None:
        """As `making.load_loras`; they stay for all pictures that want the same ones, whoever's they are."""
        wanted = {name: weights.settings for name, weights in task.loras.items()}
        if wanted != self._loras:
            self._loras = None  # unless all of them get there
            making.load_loras(self.pipe, task)
            self._loras = wanted

    @contextmanager
    def _turn(self, stop: threading.Event, wait: Any) -> Iterator[None]:
        """Hold the model. Raises `Cancelled` where that is told first."""
        if not self._lock.acquire(blocking=False):
            wait()
            while not self._lock.acquire(timeout=_CHECK_SECONDS):
                if stop.is_set():
                    raise Cancelled
        try:
            if stop.is_set():
                raise Cancelled
            yield
        finally:
            self._lock.release()

    def _draw(self, job: Job, seed: int, regions: Sequence[Region], follow: Any) -> tuple[Image.Image, Any]:
        """One picture and its attention maps, if it has words to map."""
        if job.settings.start != "noise":
            return self._draw_from_picture(job, seed, regions, follow), None
        has_maps = bool(job.task.subjects or regions)
        output = making.draw(
            self.pipe,
            job.task,
            job.args,
            seed,
            regions,
            callback_on_step_end=follow,
            output_attention_maps=has_maps,
        )
        return output.images[0], output.attention_maps[0] if has_maps else None

    def _draw_from_picture(self, job: Job, seed: int, regions: Sequence[Region], follow: Any) -> Image.Image:
        """Image-to-image, or inpainting of one region, under the guidance of all."""
        assert job.document.underlay is not None
        (width, height), pipe = job.document.size, self.pipe
        source = job.document.underlay.resize((width, height))
        name, options = other_pipeline(job.settings.start, is_xl="text_encoder_2" in self.base.embed_dims)
        other = getattr(diffusers, name)(**pipe.components, **options)
        other.set_progress_bar_config(disable=True)
        call = making.call_arguments(job.task, job.args, type(pipe))
        guidance = {key: call[key] for key in GUIDANCE_KEYS if key in call and key not in SAMPLING_KEYS}
        mask, masked = None, dict[str, Any]()
        if job.settings.start == "region":
            region = job.document.region(job.settings.region)
            assert region is not None
            place = place_of(region["shape"], job.document.size) | {"phrase": "here"}
            covered = parse_layout([place], height=height, width=width)[0].mask
            mask = Image.fromarray((255 * covered).round().astype(np.uint8))
            masked = {"mask_image": mask, "height": height, "width": width}
        if call["negative_prompt"] is not None:
            guidance["negative_prompt"] = call["negative_prompt"]
        follow.pipe = other
        with pipe.guide(
            other, job.task.prompt, as_layout(regions) or None, height=height, width=width, **guidance
        ) as embeds:
            image = other(
                **embeds,
                image=source,
                strength=job.settings.image_strength,
                num_inference_steps=call["num_inference_steps"],
                guidance_scale=call["guidance_scale"],
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=follow,
                **masked,
            ).images[0]
        return image if mask is None else Image.composite(image, source, mask)


@dataclass
class _Follower:
    """Called after each step of a picture: tells of it, shows it now and then, ends it where that was asked for."""

    pipe: Any
    number: int
    stop: threading.Event
    tell: Any
    taken: int = 0
    spent: float = 0.0  # seconds on previews
    start: float = field(default_factory=time.monotonic)

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if self.stop.is_set():
            raise Cancelled
        self.taken += 1
        preview, before = None, time.monotonic()
        if self.spent <= _PREVIEW_SHARE * (before - self.start):
            preview = preview_of(self.pipe, values["latents"])
            self.spent += time.monotonic() - before
        self.tell(Progress(self.number, self.taken, self.pipe.num_timesteps, preview))
        return values


@torch.no_grad()
def preview_of(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """What latents `(1, channels, h, w)` look like, noise and all."""
    vae = pipe.vae
    dtype = vae.dtype
    has_to_upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)  # else XL's overflows
    try:
        if has_to_upcast:
            vae.to(torch.float32)
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    finally:
        if has_to_upcast:
            vae.to(dtype)
    return pipe.image_processor.postprocess(decoded, output_type="pil")[0]


def _about(document: Document, text: str, severity: str) -> Problem:
    """A message of the library, told in the page's words, with the region that it is about."""
    found = re.search(r"layout\[(\d+)\]", text)
    text = re.sub(r"layout\[(\d+)\]", lambda match: f"Region {int(match[1]) + 1}", text)
    if found:
        return Problem(text, document.regions[int(found[1])]["id"], severity)
    for region in document.regions:
        name = region["subject"] or region["phrase"]
        if name and re.search(rf"['<]{re.escape(name)}(?: \d+)?['>]", text, re.IGNORECASE):
            return Problem(text, region["id"], severity)
    return Problem(text, None, severity)


def _new_folder(parent: Path) -> Path:
    """A folder of this second's name."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise OSError(f"{parent} has a thousand folders of {name}.")
