"""Tasks become pictures: the pipeline, what it is called with, and the noise that every picture has of its own."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from multisubject.base_models import Architecture
from multisubject.generation.adapters import IPAdapters
from multisubject.generation.arguments import GenerateArguments
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import GUIDANCE_KEYS
from multisubject.generation.console import quiet_imports, quiet_loading, shown
from multisubject.generation.picture_files import WantedPicture, save_picture
from multisubject.generation.tasks import GenerationTask
from multisubject.layout import Region, as_layout, layout_checksum
from multisubject.region_loras import placed_loras
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.training.devices import cpu_has_bfloat16
from multisubject.visualization import attention_sheet


def pipeline_class(architecture: Architecture) -> Any:
    """The pipeline of a family of base models."""
    with quiet_imports():
        return getattr(importlib.import_module(f"multisubject.{architecture.module}"), architecture.pipeline)


def call_arguments(task: GenerationTask, args: GenerateArguments, pipeline: Any) -> dict[str, Any]:
    """Keyword arguments of the pipeline call that makes a picture of a task, but for the layout and the noise.

    What neither the task nor the command line says is the default of the class `pipeline`.
    """
    config, defaults = task.config, inspect.signature(pipeline.__call__).parameters
    negative_prompt = args.negative_prompt if config.negative_prompt is None else config.negative_prompt
    arguments = {
        "prompt": task.prompt,
        "negative_prompt": None if negative_prompt is None else task.marked(negative_prompt),
        "height": task.size[0],
        "width": task.size[1],
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": defaults["guidance_scale"].default if args.guidance_scale is None else args.guidance_scale,
    }
    if task.layout is not None:
        for key in GUIDANCE_KEYS:
            given = getattr(config, key)
            arguments[key] = defaults[key].default if given is None else given
    return arguments


def task_settings(task: GenerationTask, args: GenerateArguments, dtype: torch.dtype, base: BaseModel) -> dict[str, Any]:
    """All that decides what a task's pictures look like but for the seed, as plain JSON data.

    Subjects and layout are in it by what they are called in the config and by a checksum of what they hold.
    """
    settings = call_arguments(task, args, pipeline_class(base.architecture)) | {
        "model": args.pretrained_model_name or "multisubject.tiny_world",
        "model_version": base.version,
        "dtype": str(dtype).removeprefix("torch."),
        "subjects": {
            name: {
                "source": task.config.residual_dict[subject.key],
                "class_phrase": subject.residual.class_phrase,
                "sha256": _checksum(subject.residual),
            }
            for name, subject in task.subjects.items()
        },
    }
    if task.layout is not None:
        settings["layout"] = task.config.layout
        settings["color_context"] = task.config.color_context
        settings["layout_sha256"] = layout_checksum(task.regions())
    if task.loras:
        settings["loras"] = {name: weights.settings for name, weights in task.loras.items()}
    if task.ip_adapters is not None:
        settings["ip_adapters"] = task.ip_adapters.settings
    return json.loads(json.dumps(settings))  # as it reads back


def _checksum(subject: ResidualEmbedding) -> str:
    """Of a subject's numbers, for all text encoders."""
    digest = hashlib.sha256()
    for _, delta in sorted(subject.deltas.items()):
        digest.update(delta.numpy().tobytes())
    return digest.hexdigest()


def device_and_dtype(args: GenerateArguments, state: PartialState) -> tuple[torch.device, torch.dtype]:
    """Where this process computes, and in which precision. Ends the program where processes would share a device."""
    device = state.device if args.device in (None, state.device.type) else torch.device(args.device)
    if state.num_processes > 1 and device != state.device:
        sys.exit(f"--device {args.device} would put {state.num_processes} processes on one device; leave it out.")
    if args.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.float16
    return device, getattr(torch, args.dtype)


def warn_of_imitation(device: torch.device, dtype: torch.dtype) -> None:
    """Say so where pictures will take many times as long for their precision, which this processor does not have."""
    has_it = dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_has_bfloat16())
    if device.type == "cpu" and not has_it:
        print(
            f"warning: --dtype {str(dtype).removeprefix('torch.')}: CPUs like this one only imitate it, many times "
            "slower than float32, which is what auto means here.",
            file=sys.stderr,
        )


def load_pipeline(base: BaseModel, device: torch.device, dtype: torch.dtype, show_progress: bool) -> Any:
    """The pipeline of a base model; of the steps of its pictures it shows a bar, which needs a terminal."""
    with quiet_loading(transformers_logging, diffusers_logging):
        pipe = pipeline_class(base.architecture).from_pretrained(base.name, dtype=dtype)
        # `warn_of_imitation` has said it once; diffusers would for each component.
        pipe = pipe.to(device, silence_dtype_warnings=True)
    pipe.set_progress_bar_config(disable=None if show_progress else True, leave=False)
    return pipe


def load_subjects(pipe: Any, task: GenerationTask) -> None:
    """Give the pipeline the personal subjects of a task, and no others. `ValueError` for one of another base."""
    for name in pipe.get_list_subjects():
        pipe.unload_subject(name)
    for name, subject in task.subjects.items():
        try:
            pipe.load_subject(subject.source, name=name, class_phrase=subject.residual.class_phrase)
        except ValueError as error:  # made for another base of the same width
            raise ValueError(f"subject {subject.key!r} of the prompt {task.config.prompt!r}: {error}") from None


def load_loras(pipe: Any, task: GenerationTask) -> None:
    """Give the pipeline the LoRAs that regions of a task hold, and no others."""
    if any(pipe.get_list_adapters().values()):
        pipe.unload_lora_weights()
    models = [pipe.unet, *(getattr(pipe, slot.name) for slot in pipe.encoder_slots)]
    for name, lora in task.loras.items():
        folder, file = lora.path.parent, lora.path.name
        try:
            with quiet_loading(transformers_logging, diffusers_logging), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # at every second LoRA
                pipe.load_lora_weights(str(folder), weight_name=file, adapter_name=name, use_safetensors=True)
            if not any(name in of_model for of_model in pipe.get_list_adapters().values()):
                raise ValueError("none of its weights is for a layer of the base model.")
            for model in models:
                with placed_loras(model, [name]):  # says what cannot act in a region
                    pass
        except (ValueError, RuntimeError, KeyError) as error:
            reason = "its layers are of another base model" if "size mismatch" in str(error) else error
            raise ValueError(f"LoRA {name!r} of the prompt {task.config.prompt!r}: {lora.source}: {reason}") from None


def load_ip_adapters(pipe: Any, adapters: IPAdapters | None) -> None:
    """Give the pipeline the IP-Adapters of a run for a task whose regions have pictures, or take them away (None) for
    one whose regions have none: diffusers wants a picture in every call then."""
    is_loaded = getattr(pipe.unet.config, "encoder_hid_dim_type", None) is not None
    if adapters is None and is_loaded:
        pipe.unload_ip_adapter()
    if adapters is None or is_loaded:
        return
    try:
        with quiet_loading(transformers_logging, diffusers_logging):
            place = adapters.image_encoder
            image_encoder = CLIPVisionModelWithProjection.from_pretrained(
                place.repository, subfolder=place.subfolder, revision=place.revision or "main", dtype=pipe.dtype
            )
            pipe.register_modules(image_encoder=image_encoder.to(pipe.device))
            paths = [weights.path for weights in adapters.weights]
            pipe.load_ip_adapter(
                [str(path.parent) for path in paths],
                subfolder=[""] * len(paths),
                weight_name=[path.name for path in paths],
                image_encoder_folder=None,
            )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        is_other = any(said in str(error) for said in ("size mismatch", "expected shape"))  # by torch, by diffusers
        reason = "its layers are of another base model" if is_other else error
        names = " ".join(weights.source for weights in adapters.weights)
        raise ValueError(f"--ip_adapter {names}: {reason}") from None
    pipe.set_ip_adapter_scale([*adapters.scales])


def make_pictures(
    pipe: Any, share: Sequence[WantedPicture], tasks: Sequence[GenerationTask], args: GenerateArguments
) -> None:
    """Make this process's share of the pictures, when the subjects and LoRAs of all tasks fit the model."""
    for task in tasks:
        load_subjects(pipe, task)
        load_loras(pipe, task)
    current = None
    for picture in shown(share, "picture", lambda picture: picture.path):
        if picture.task is not current:
            load_subjects(pipe, picture.task)
            load_loras(pipe, picture.task)
            load_ip_adapters(pipe, picture.task.ip_adapters)
            current = picture.task
        make_picture(pipe, picture, args)


def make_picture(pipe: Any, wanted: WantedPicture, args: GenerateArguments) -> None:
    """Make a picture and save it, with its attention sheet if that is asked for."""
    regions = wanted.task.regions()
    output = draw(pipe, wanted.task, args, wanted.seed, regions, output_attention_maps=wanted.has_attention)
    wanted.attention_path.unlink(missing_ok=True)  # of the picture that is replaced
    if output.attention_maps is not None:
        sheet = attention_sheet(output.images[0], output.attention_maps[0], regions)
        save_picture(sheet, wanted.attention_path, wanted.settings)
    save_picture(output.images[0], wanted.path, wanted.settings)


def draw(
    pipe: Any, task: GenerationTask, args: GenerateArguments, seed: int, regions: Sequence[Region], **more: Any
) -> Any:
    """What the pipeline gives for one picture of a task, whose subjects it has.

    Args:
        pipe, task, args: of the run.
        seed: of the picture's noise.
        regions: of the task.
        more: arguments of the call that change nothing in the picture, such as `callback_on_step_end`.
    """
    # On the CPU and in float32, so that a seed means the same noise on every device and in every precision.
    generator = torch.Generator("cpu").manual_seed(seed)
    height, width = (side // pipe.vae_scale_factor for side in task.size)
    noise = torch.randn(1, pipe.unet.config.in_channels, height, width, generator=generator)
    return pipe(
        **call_arguments(task, args, type(pipe)),
        layout=as_layout(regions) or None,
        latents=noise.to(pipe.unet.dtype),
        generator=generator,
        **more,
    )
