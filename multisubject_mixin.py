"""What happens in a call, in every architecture: prompt and layout become embeddings and regions, diffusers samples.

A pipeline is `class X(MultiSubjectMixin, <diffusers' pipeline>)`. It says which text encoders it has (`encoder_slots`)
and what UNet it takes (`base_problem`); the rest is here, and sampling itself is diffusers'.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging

from .base_models import base_model_errors, other_architecture
from .call_arguments import bind_arguments, check_call, check_prompts, check_steps
from .guidance_methods import GuidanceMethod, resolve_guidance_method
from .layout import masks_at
from .placed_prompts import (
    PlacedPrompt,
    check_prompt_embeds,
    check_served,
    make_recorder,
    recorded_tokens,
    shown,
)
from .prompt_encoder import EMBEDS, PromptEncoderMixin
from .recurrence import builds_on_former_steps, recurrent_steps
from .region_attention import ExpectedCalls, RegionConditioning, region_attention
from .region_ip_adapters import encode_pictures
from .region_loras import check_loras
from .region_moves import RegionMover
from .saved_pipeline import PIPELINES, copy_pipeline_sources, load_saved_subjects, save_subjects_with_pipeline
from .shared_models import in_turn

__multisubject_version__ = "0.1.0"

logger = logging.get_logger(__name__)

_KEEP_DTYPE: Any = object()  # what `from_pipe` asks for where the caller asks for no dtype


class MultiSubjectMixin(PromptEncoderMixin):
    """Subjects and layouts for the diffusers pipeline that stands behind this class among a pipeline's bases.

    Attributes:
        subjects: name -> `ResidualEmbedding`, the loaded subjects.
    """

    _file: str  # the pipeline's own, without `.py`
    _output: Callable[..., Any]  # of the values that diffusers' call returns, and `attention_maps`
    _device_of_call: torch.device | None = None

    def _start(self) -> None:
        """The end of a pipeline's `__init__`."""
        if self.unet is not None and (problem := self.base_problem(self.unet)):  # type: ignore[attr-defined]
            raise ValueError(f"The UNet {problem}")
        self.subjects, self._subject_weights = {}, {}
        for name, subject in load_saved_subjects(self.tokenizer).items():  # type: ignore[attr-defined]
            try:
                if all(slot.width is not None and slot.tokenizer is not None for slot in self.encoder_slots):
                    self._check_subject(name, subject, [*self.subjects])
                self.subjects[name] = subject
            except ValueError as error:  # another text encoder, or the tokenizer of another base
                logger.warning("A subject that was saved with the tokenizer is left out: %s", error)

    def base_problem(self, unet: Any) -> str | None:
        """What speaks against this UNet beside the pipeline's text encoders, as the end of a sentence, or None."""
        raise NotImplementedError

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        layout: Any = None,
        color_context: Mapping[str, Sequence[Any]] | list[Mapping[str, Sequence[Any]]] | None = None,
        guidance_steps: int | None = None,
        guidance_weight: float = 0.08,
        weight_negative: float = -1e8,
        guidance_method: str | GuidanceMethod = "multisubject",
        recurrence: int = 1,
        recurrence_steps: int | None = None,
        moves: Sequence[float] | None = None,
        output_attention_maps: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Make pictures.

        Args:
            prompt: text with loaded subjects as `<name>`, or, if it has no `<name>`, by their class phrase.
            layout: where subjects and phrases of the prompt stand: `{phrase or subject: box}` with boxes
                `(xmin, ymin, xmax, ymax)` in fractions of the image, `{phrase or subject: mask}`, a list of dicts, or a
                colour-map image with `color_context` (see `layout.parse_layout`). For a list of prompts: a list with
                one of these, or None, per prompt; anything else counts for all of them.
            color_context: `{"255,0,0": [phrase or subject, weight]}` for a colour map; a list: one per prompt.
            guidance_steps: how many of the scheduler's steps follow the layout, from the first; None: all.
            guidance_weight: strength of the pull into the regions.
            weight_negative: weight of a subject's tokens outside its region; at most 0.
            guidance_method: a name of `GUIDANCE_METHODS`, or a function of an `AttentionLayer` that returns a bias.
            recurrence: how often each of the first `recurrence_steps` steps is taken, with its noise added back in
                between. 2 is what the published Cones 2 does. Needs DDIM, DDPM, Euler, Euler ancestral or LMS (which is
                then of order 1); `callback_on_step_end` is called at every visit.
            recurrence_steps: None: as many as are guided. With several subjects, 20 steps of which the first five are
                taken twice were better than 25 that are taken once (docs/placement.md).
            moves: shares of the steps: after the step during which such a share lies behind, objects that show beside
                their regions are moved into them, without further calls of the UNet (`region_moves.py`). 0.15 of 20
                steps: after the fourth, during which three lie behind. `[]`: never. Needs a scheduler as `recurrence`
                does, at least 10 steps, and shares that end before the last one. None: as the guidance method has it,
                `multisubject` at 0.15, 0.3 and 0.45, where scheduler and number of steps allow. A compiled UNet cannot
                be looked into: nothing moves.
            output_attention_maps: also return where the subjects' tokens were attended to.
            negative_prompt: what not to show; loaded subjects as `<name>`, other words are plain words.
            prompt_embeds: `(batch, tokens, dim)` instead of the prompt's own embeddings, taken as they are: what
                `encode_prompt` gives, residuals and all. With a layout, pass `prompt` too: it says which tokens are
                whose. The words of regions then come from here as well, where `multisubject` and `dense_diffusion`
                else encode them by themselves; nor does a region then see the end of its own prompt, so that one
                word may draw two objects where there is room.
            cross_attention_kwargs: `{"scale": …}` scales LoRA weights.
            return_dict: return an output class; else the tuple of its values.

        Raises:
            ValueError, TypeError: an argument is wrong; a phrase of the layout is missing, ambiguous or cut off.
        """
        # 1. Check inputs
        asked = bind_arguments(super().__call__, args, kwargs, own=MultiSubjectMixin.__call__)  # type: ignore[misc]
        guidance_function = resolve_guidance_method(guidance_method)
        check_call(asked, self, guidance_steps, recurrence, recurrence_steps, moves)
        height, width = asked["height"], asked["width"] = self._size(asked["height"], asked["width"])
        prompt, prompt_embeds, num_images = asked["prompt"], asked["prompt_embeds"], asked["num_images_per_prompt"]
        placed_prompts = {slot.prompt: asked[slot.prompt] for slot in self.encoder_slots}
        if prompt_embeds is not None:
            asked |= dict.fromkeys(placed_prompts)  # diffusers wants one or the other
        self._check_inputs(asked)
        if prompt is None and (layout is not None or output_attention_maps):
            raise ValueError(
                "`layout` and `output_attention_maps` need `prompt` beside `prompt_embeds`: it says which tokens are"
                " whose."
            )

        with in_turn(self.unet):  # type: ignore[attr-defined]
            # 2. Find subjects and regions in the prompts
            placed = self.place(placed_prompts, layout, color_context, height, width)

            # 3. Turn layouts and token spans into what the UNet needs
            device = self._execution_device
            recorder, method = None, None if guidance_steps == 0 else guidance_function
            num_tokens = self.encoder_slots[0].tokenizer.model_max_length if placed else 0
            if prompt_embeds is not None:
                check_prompt_embeds(prompt_embeds, placed)
                num_tokens = prompt_embeds.shape[1]
            if method is not None:
                check_served(placed, method)
            conditioning = self._held_by(placed, self.prepare_regions(placed, num_tokens), self, device, method)
            if conditioning is not None:
                encoding = self._encoding_of_call(asked, device)
                embeds, held = self.encode_with_regions(placed, method, **encoding)
                conditioning = replace(conditioning, **held)
                if embeds and prompt_embeds is None:
                    asked |= dict.fromkeys(name for slot in self.encoder_slots for name in slot.prompts) | embeds
            if conditioning is not None:
                conditioning = conditioning.repeated(num_images)
            if output_attention_maps:
                recorded = [recorded_tokens(of_prompt) for of_prompt in placed]
                recorder = make_recorder(recorded, num_tokens, num_images, conditioning, guidance_function)
            mover = None if method is None else self._mover(conditioning, method, moves)

            # 4. Encode the prompts with their subjects, denoise and decode
            guidance = region_attention(
                self.unet,  # type: ignore[attr-defined]
                conditioning,
                scheduler=self.scheduler,  # type: ignore[attr-defined]
                resize_masks=masks_at,
                guidance_method=guidance_function,
                guidance_weight=guidance_weight,
                weight_negative=weight_negative,
                guidance_steps=guidance_steps,
                recorder=recorder,
                mover=mover,
            )
            repeated = guidance_steps if recurrence_steps is None else recurrence_steps
            again = recurrent_steps(self, recurrence, repeated, asked["generator"], mover)
            # Of what is still to be encoded then, nothing is a region's.
            no_region = self._loras_of_words(placed, False, (), None)
            with guidance, again, self._running_on(device), no_region:
                values = super().__call__(**{**asked, "return_dict": False})  # type: ignore[misc]

        # 5. Collect the attention maps
        attention_maps = None
        if recorder is not None:
            maps = recorder.maps().transpose(0, 1).numpy()  # [images, UNet calls, names, h, w]
            names = [list(tokens) for tokens in recorded for _ in range(num_images)]
            attention_maps = [
                dict(zip(of_names, of_image.swapaxes(0, 1), strict=False))  # rows of absent names are left over
                for of_image, of_names in zip(maps, names, strict=True)
            ]
        if not asked["return_dict"]:
            return (*values, attention_maps) if output_attention_maps else values
        return type(self)._output(*values, attention_maps=attention_maps)

    @contextmanager
    def guide(
        self,
        pipeline: Any,
        prompt: str | list[str],
        layout: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        color_context: Mapping[str, Sequence[Any]] | list[Mapping[str, Sequence[Any]]] | None = None,
        guidance_steps: int | None = None,
        guidance_weight: float = 0.08,
        weight_negative: float = -1e8,
        guidance_method: str | GuidanceMethod = "multisubject",
        **encoding: Any,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Within the context, another pipeline follows a layout: image-to-image, inpainting, ControlNet …

            inpaint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
            with pipe.guide(inpaint, "<petrucci> on the beach", {"petrucci": box}) as embeds:
                inpaint(**embeds, image=image, mask_image=mask)

        Guided are the calls of the code inside, also through `asyncio.to_thread`; other threads and tasks go their own
        way.

        Args:
            pipeline: any whose UNet, of this pipeline's family, is called with the prompts' embeddings alone or behind
                as many negative ones. Others (PAG, SAG, InstructPix2Pix, AnimateDiff) fail at their first step. What is
                cropped (`padding_mask_crop`) or drawn in parts (panoramas) gets the whole layout in each part.
            prompt, layout: as in a call of this pipeline.
            height, width: of the pictures, in pixels; default: the base's.
            color_context, guidance_steps, guidance_weight, weight_negative, guidance_method: as in a call. Steps are
                counted from the first that is taken, also where `strength` leaves some out.
            encoding: `negative_prompt`, `lora_scale`, `clip_skip`, and with XL `prompt_2` and `negative_prompt_2`, as
                for `encode_prompt`.

        Yields:
            The prompts' embeddings by the names under which calls of `pipeline` take them (`prompt_embeds`,
            `negative_prompt_embeds`, with XL the pooled ones), with one picture per prompt or more.

        Raises:
            ValueError, TypeError: an argument is wrong, or `pipeline` calls its UNet in another way.
            RuntimeError: another thread or task uses the scheduler; at the end, if only others have called the UNet.
        """
        # 1. Check inputs
        unet = getattr(pipeline, "unet", None)
        if unet is None or getattr(pipeline, "scheduler", None) is None:
            raise TypeError(f"`pipeline` is a {type(pipeline).__name__}, expected one with a UNet of Stable Diffusion.")
        if any(kind.__name__ == MultiSubjectMixin.__name__ for kind in type(pipeline).__mro__):
            name = type(pipeline).__name__
            raise TypeError(f"`pipeline` is a {name}: call it with `layout`, it needs no guide.")
        slots = self.encoder_slots
        if any(slot.width is None for slot in slots):
            raise ValueError("The pipeline has no text encoder, which the prompts need; load one.")
        if problem := self.base_problem(unet):
            raise ValueError(f"`pipeline`: its UNet {problem}")
        known = {"lora_scale", "clip_skip", *(name for slot in slots for name in slot.prompts)} - {"prompt"}
        if unknown := sorted(set(encoding) - known):
            own = {*inspect.signature(MultiSubjectMixin.guide).parameters} - {"self", "encoding"}
            raise TypeError(f"Unknown arguments {unknown} of `guide`; expected some of {sorted(known | own)}.")
        check_steps("guidance_steps", guidance_steps, "all steps")
        guidance_function = resolve_guidance_method(guidance_method)
        height, width = self._size(height, width, unet)
        asked = {"prompt": prompt, "height": height, "width": width, **encoding}
        check_prompts(asked, slots)
        self._check_inputs(asked)

        # 2. Find subjects and regions in the prompts, and encode them
        with torch.no_grad():
            prompts = {slot.prompt: asked.get(slot.prompt) for slot in slots}
            placed = self.place(prompts, layout, color_context, height, width)
            num_tokens = slots[0].tokenizer.model_max_length
            embeds, method = dict[str, Any](), None if guidance_steps == 0 else guidance_function
            if method is not None:
                check_served(placed, method)
            regions = self.prepare_regions(placed, num_tokens)
            conditioning = self._held_by(placed, regions, pipeline, self._execution_device, method)
            if conditioning is not None:
                embeds, held = self.encode_with_regions(placed, method, prompt=prompt, **encoding)
                conditioning = replace(conditioning, **held)
            if not embeds:
                embeds = dict(zip(EMBEDS, self.encode_prompt(prompt, **encoding), strict=False))
        if conditioning is not None and torch.equal(embeds["prompt_embeds"], embeds["negative_prompt_embeds"]):
            raise ValueError(
                f"`negative_prompt` is {encoding.get('negative_prompt')!r}, the prompt itself; expected another."
            )

        # 3. Guide whatever calls the UNet with these embeddings
        with region_attention(
            unet,
            conditioning,
            scheduler=pipeline.scheduler,
            resize_masks=masks_at,
            guidance_method=guidance_function,
            guidance_weight=guidance_weight,
            weight_negative=weight_negative,
            guidance_steps=guidance_steps,
            calls=ExpectedCalls(
                pipeline,
                (height // self.vae_scale_factor, width // self.vae_scale_factor),  # type: ignore[attr-defined]
                embeds["prompt_embeds"],
                embeds["negative_prompt_embeds"],
            ),
        ):
            yield embeds

    def _mover(self, regions: RegionConditioning | None, method: Any, at: Sequence[float] | None) -> RegionMover | None:
        """What moves the regions' objects at the shares `at` of the steps (`move_times.py`), None for nothing.

        Without `at` they are those of the guidance method, if the scheduler can.
        """
        is_asked = at is not None
        if at is None:
            scheduler = self.scheduler  # type: ignore[attr-defined]
            at = () if builds_on_former_steps(scheduler) else getattr(method, "moves_objects", ())
        return RegionMover(regions.masks, regions.background, at, is_asked) if regions is not None and at else None

    def _held_by(
        self,
        placed: Sequence[PlacedPrompt],
        regions: RegionConditioning | None,
        pipeline: Any,
        device: torch.device,
        method: GuidanceMethod | None,
    ) -> RegionConditioning | None:
        """Regions whose LoRAs are known to be loaded, with the embeddings of their pictures; None if nothing is left to
        do: without guided steps regions act by what they hold alone.

        Args:
            placed: the prompts.
            regions: theirs.
            pipeline: the one whose UNet is called.
            device: where to encode.
            method: the guidance method; None: no step is guided.
        """
        if regions is None or (method is None and not regions.loras and not regions.ip_adapter_images):
            return None
        encoders = [getattr(self, slot.name) for slot in self.encoder_slots]
        held = [region for of_prompt in placed for region in of_prompt.regions]
        holders = {name: shown(region) for region in reversed(held) for name in region.lora or ()}
        check_loras([pipeline.unet, *encoders], holders)
        if not regions.ip_adapter_images:
            return regions
        places = [[shown(region) for region in of_prompt.regions] for of_prompt in placed]
        pictures = encode_pictures(pipeline, regions.ip_adapter_images, places, device)
        return replace(regions, ip_adapter_images=pictures)

    # --- what diffusers is asked --------------------------------------------------------------------------------------

    def _check_inputs(self, asked: Mapping[str, Any]) -> None:
        """diffusers' own checks."""
        names = inspect.signature(super().check_inputs).parameters  # type: ignore[misc]
        self.check_inputs(*(asked.get(name) for name in names))  # type: ignore[attr-defined]

    def _size(self, height: int | None, width: int | None, unet: Any = None) -> tuple[int, int]:
        """Height and width in pixels, the base's where one is not said."""
        size = (unet or self.unet).config.sample_size  # type: ignore[attr-defined]
        sides = (size, size) if isinstance(size, int) else size
        default = tuple(side * self.vae_scale_factor for side in sides)  # type: ignore[attr-defined]
        return height or default[0], width or default[1]

    @property
    def _execution_device(self) -> torch.device:
        """As the base's, which looks at every module; known during a call."""
        return self._device_of_call or super()._execution_device  # type: ignore[misc]

    @contextmanager
    def _running_on(self, device: torch.device) -> Iterator[None]:
        try:
            self._device_of_call = device
            yield
        finally:
            self._device_of_call = None

    # --- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `DiffusionPipeline.from_pretrained`; the error for a base that has left the Hub names its mirror."""
        with base_model_errors(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As `DiffusionPipeline.from_pipe`, but in the models' own dtypes unless `dtype` asks for another: they are
        shared, and diffusers would turn them to float32. Subjects and their weights come along.

        Raises:
            ValueError: a pipeline of another architecture.
        """
        if problem := other_architecture(cls._file, getattr(pipeline, "components", {})):
            raise ValueError(f"`pipeline` is a {type(pipeline).__name__}, {problem}")
        if not {"dtype", "torch_dtype"} & set(kwargs):
            kwargs["dtype"] = _KEEP_DTYPE
        new = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        if hasattr(pipeline, "subjects") and hasattr(pipeline, "_subject_weights"):
            new.subjects, new._subject_weights = dict(pipeline.subjects), dict(pipeline._subject_weights)
        return new

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        return self if kwargs.get("dtype") is _KEEP_DTYPE else super().to(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As the base's. A folder that `save_pretrained` wrote names this class's code: no need to trust its copy."""
        config = super().load_config(*args, **kwargs)  # type: ignore[misc]
        saved = config.get("_class_name") if isinstance(config, dict) else None
        if saved == [cls._file, cls.__name__]:
            config["_class_name"] = cls.__name__
        elif isinstance(saved, list) and tuple(saved) in PIPELINES.items() and cls._file in PIPELINES:
            raise ValueError(f"This folder holds a {saved[1]}, which {cls.__name__} cannot load: use {saved[1]}.")
        return config

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save `model_index.json`, and beside it the code that it names, so that the folder loads by itself."""
        os.makedirs(save_directory, exist_ok=True)
        copy_pipeline_sources(save_directory, self._file)
        save_subjects_with_pipeline(self.subjects, save_directory)
        super().save_config(save_directory, push_to_hub, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """The configuration, with the class named in the form that diffusers loads from the folder's own code."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = [self._file, type(self).__name__]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
