"""Stable Diffusion with several personal subjects in one picture, each where a layout wants it.

    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipeline_multisubject.py", trust_remote_code=True)
    pipe.load_subject("embeddings/petrucci.safetensors", name="petrucci")
    pipe("a photo of <petrucci> on the beach", layout={"petrucci": (0.1, 0.2, 0.5, 1.0)}).images[0]

One file with one pipeline class and its siblings beside it, as `custom_pipeline` wants it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor

__multisubject_version__ = "0.1.0"

# All custom pipelines of a process share one folder of sources and one cache of modules, so a sibling may be another
# project's file of the same name, or an older one of ours. Every sibling must be imported here, also those that only
# another sibling needs: for a local file, diffusers copies what it imports and no further.
try:
    from .attention_processors import (
        AttentionRecorder,
        ExpectedCalls,
        RegionConditioning,
        RegionPrompts,
        region_attention,
    )
    from .attention_processors import __multisubject_version__ as _attention_processors_version
    from .base_models import __multisubject_version__ as _base_models_version
    from .base_models import base_model_errors, check_subject_fits, unsuitable_base
    from .guidance_methods import GuidanceMethod, TokenKind, resolve_guidance_method
    from .guidance_methods import __multisubject_version__ as _guidance_methods_version
    from .hub_client import __multisubject_version__ as _hub_client_version
    from .hub_utils import __multisubject_version__ as _hub_utils_version
    from .hub_utils import load_subject
    from .layout import Region, masks_at, parse_layout, region_names
    from .layout import __multisubject_version__ as _layout_version
    from .layout_images import __multisubject_version__ as _layout_images_version
    from .model_card import __multisubject_version__ as _model_card_version
    from .pictures import __multisubject_version__ as _pictures_version
    from .residual_embeddings import (
        ParsedPrompt,
        Place,
        ResidualEmbedding,
        add_residuals,
        find_token_spans,
        parse_prompt,
    )
    from .residual_embeddings import __multisubject_version__ as _residual_embeddings_version
    from .saved_pipeline import __multisubject_version__ as _saved_pipeline_version
    from .saved_pipeline import copy_pipeline_sources, load_saved_subjects, save_subjects_with_pipeline
    from .subject_file import __multisubject_version__ as _subject_file_version
    from .subject_pickle import __multisubject_version__ as _subject_pickle_version
except ImportError as error:
    raise ImportError(
        f"{__name__} found a file beside it that is not of multisubject {__multisubject_version__}: {error}. Another"
        " custom pipeline with a file of that name was loaded, or an older multisubject: start a new process, and"
        " delete diffusers' `modules` cache folder if that does not help."
    ) from error

_SIBLING_VERSIONS = {
    "attention_processors": _attention_processors_version,
    "base_models": _base_models_version,
    "guidance_methods": _guidance_methods_version,
    "hub_client": _hub_client_version,
    "hub_utils": _hub_utils_version,
    "layout": _layout_version,
    "layout_images": _layout_images_version,
    "model_card": _model_card_version,
    "pictures": _pictures_version,
    "residual_embeddings": _residual_embeddings_version,
    "saved_pipeline": _saved_pipeline_version,
    "subject_file": _subject_file_version,
    "subject_pickle": _subject_pickle_version,
}
if set(_SIBLING_VERSIONS.values()) != {__multisubject_version__}:
    raise ImportError(
        f"{__name__} is of multisubject {__multisubject_version__}, but the files beside it are of {_SIBLING_VERSIONS}."
        " An older multisubject was loaded before: start a new process."
    )

# What a region's own prompt says before its subject: the opening that image captions and training templates share.
_REGION_PROMPT = "a photo of"


_KEEP_DTYPE: Any = object()  # what `from_pipe` asks for where the caller asks for no dtype


@dataclass
class MultiSubjectPipelineOutput(StableDiffusionPipelineOutput):
    """Stable Diffusion's output with attention maps.

    Args:
        attention_maps: one dict per image, subject or phrase -> `(UNet calls, h, w)` float32: where its tokens were
            attended to, as probabilities averaged over heads, layers and tokens; empty for a prompt without subject and
            layout; None if not asked for.
    """

    attention_maps: list[dict[str, np.ndarray]] | None = None


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt and where its layout puts what.

    Args:
        text: the prompt with its subjects found.
        regions: of the layout, all masks of one size.
        places: for each region, the words and tokens of the prompt that it places.
    """

    text: ParsedPrompt
    regions: Sequence[Region] = ()
    places: Sequence[Place] = ()


class MultiSubjectPipeline(StableDiffusionPipeline):
    """Text-to-image with Stable Diffusion 1.x and 2.x, several subjects and a layout.

    Components, loading and every argument of the call are those of `StableDiffusionPipeline`; without subjects and
    layout the pictures are its pictures, bit for bit. (`<name>` in a prompt is always a subject or a learned token.)

    Attributes:
        subjects: name -> `ResidualEmbedding`, the loaded subjects.
    """

    scheduler: Any

    # diffusers reads the components off the signature
    @functools.wraps(StableDiffusionPipeline.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        width = getattr(getattr(self.text_encoder, "config", None), "hidden_size", None)
        if self.unet is not None and (problem := unsuitable_base(self.unet.config, width)):
            raise ValueError(f"The UNet {problem}")
        self.subjects: dict[str, ResidualEmbedding] = load_saved_subjects(self.tokenizer)
        self._subject_weights: dict[str, float] = {}
        self._device_of_call: torch.device | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `DiffusionPipeline.from_pretrained`; the error for a base that has left the Hub names its mirror."""
        with base_model_errors(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As `DiffusionPipeline.from_pipe`, but in the models' own dtypes unless `dtype` asks for another: they are
        shared, and diffusers would turn them to float32. Subjects and their weights come along."""
        if not {"dtype", "torch_dtype"} & set(kwargs):
            kwargs["dtype"] = _KEEP_DTYPE
        new = super().from_pipe(pipeline, **kwargs)
        if hasattr(pipeline, "subjects") and hasattr(pipeline, "_subject_weights"):
            new.subjects, new._subject_weights = dict(pipeline.subjects), dict(pipeline._subject_weights)
        return new

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        return self if kwargs.get("dtype") is _KEEP_DTYPE else super().to(*args, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As the base's. A folder that `save_pretrained` wrote names this class's code: no need to trust its copy."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict) and config.get("_class_name") == cls._saved_class_name():
            config["_class_name"] = cls.__name__
        return config

    @classmethod
    def _saved_class_name(cls) -> list[str]:
        return ["pipeline_multisubject", cls.__name__]

    # --- subjects ----------------------------------------------------------------------------------------------------

    def load_subject(
        self,
        source: str | os.PathLike[str],
        name: str | None = None,
        class_phrase: str | None = None,
        **hub_options: Any,
    ) -> list[str]:
        """Load the subject, or all the subjects, of a file, a folder or a Hub repository; prompts then name `<name>`.

        Args:
            source: `.safetensors` file, Cones 2 `.pt` file, folder or Hub id.
            name: what to call the subject; which one to take if the source holds several.
            class_phrase: words that stand for the subject in a prompt; default: what the file says. A `.pt` does not.
            hub_options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Returns:
            The names that were loaded.

        Raises:
            ValueError: a name is taken, or the subject was not made for this base model.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError("The pipeline has no tokenizer or no text encoder, which subjects need; load both.")
        loaded = load_subject(source, name=name, class_phrase=class_phrase, **hub_options)
        accepted = [*self.subjects]
        for new_name, subject in loaded.items():
            self._check_subject(new_name, subject, accepted)
            accepted.append(new_name)
        self.subjects.update(loaded)
        return list(loaded)

    def unload_subject(self, name: str) -> None:
        """Forget a subject."""
        self._check_loaded([name])
        del self.subjects[name]
        self._subject_weights.pop(name, None)

    def get_list_subjects(self) -> list[str]:
        """Names of the loaded subjects."""
        return list(self.subjects)

    def set_subjects(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Choose the active subjects and scale their residuals; the other loaded ones become their plain class.

        Args:
            names: loaded subjects; an empty list makes class phrases plain words everywhere.
            weights: factor of each residual, or one for all; default 1. Not saved by `save_pretrained`.

        Raises:
            ValueError, TypeError: a subject that is not loaded or stands twice; a weight that is no finite number.
        """
        if not isinstance(names, (str, Sequence)):
            raise TypeError(
                f"`names` is {names!r}, expected a subject's name or a list of names; factors go to `weights`."
            )
        names = [names] if isinstance(names, str) else list(names)
        if isinstance(weights, (np.ndarray, torch.Tensor)):
            weights = weights.tolist()
        factors = list(weights) if isinstance(weights, Sequence) else [1.0 if weights is None else weights] * len(names)
        self._check_loaded(names)
        if len(set(names)) < len(names):
            raise ValueError(f"`names` is {names}, expected every subject once.")
        for factor in factors:
            if not isinstance(factor, numbers.Real):
                raise TypeError(f"`weights` has {factor!r}, expected numbers such as 0.8.")
            if not abs(factor) < math.inf:
                raise ValueError(f"`weights` has {factor!r}, expected finite numbers such as 0.8.")
        if len(factors) != len(names):
            raise ValueError(
                f"`weights` has {len(factors)} entries, expected one for each of the {len(names)} `names`."
            )
        self._subject_weights = dict.fromkeys(self.subjects, 0.0) | dict(zip(names, factors, strict=True))

    def _check_loaded(self, names: Sequence[str]) -> None:
        if missing := [name for name in names if name not in self.subjects]:
            raise ValueError(f"Subjects {missing} are not loaded; the loaded ones are {self.get_list_subjects()}.")

    def _check_subject(self, name: str, subject: ResidualEmbedding, names: Sequence[str]) -> None:
        for taken in names:  # prompts name subjects in any case
            if name.casefold() == taken.casefold():
                raise ValueError(
                    f"A subject {taken!r} is loaded already. Pass another `name`, or `unload_subject({taken!r})` first."
                )
        if f"<{name}>".casefold() in map(str.casefold, self.tokenizer.get_added_vocab()):
            raise ValueError(
                f"The tokenizer has a learned token '<{name}>' already, from a textual inversion. Pass another `name`."
            )
        check_subject_fits(
            subject, {"text_encoder": self.text_encoder}, name=name, base_model=self.config.get("_name_or_path")
        )
        if not subject.class_phrase:
            raise ValueError(
                f"The file of subject {name!r} does not say which words it was trained with, as no `.pt` does. Pass"
                f" them as `class_phrase`, such as `load_subject(…, name={name!r}, class_phrase='person')`."
            )
        span = find_token_spans(self.tokenizer, subject.class_phrase, subject.class_phrase)[0]
        if len(span) != len(subject.delta):
            raise ValueError(
                f"Subject {name!r} has {len(subject.delta)} rows, but its class phrase {subject.class_phrase!r} has"
                f" {len(span)} tokens with this tokenizer. Pass the `class_phrase` that it was trained with."
            )

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        *,
        layout: Any = None,
        color_context: Mapping[str, Sequence[Any]] | list[Mapping[str, Sequence[Any]]] | None = None,
        guidance_steps: int | None = None,
        guidance_weight: float = 0.08,
        weight_negative: float = -1e8,
        guidance_method: str | GuidanceMethod = "multisubject",
        recurrence: int = 1,
        recurrence_steps: int | None = None,
        output_attention_maps: bool = False,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> MultiSubjectPipelineOutput | tuple:
        """Make pictures. Arguments that are not listed here are those of `StableDiffusionPipeline.__call__`.

        Args:
            prompt: text with loaded subjects as `<name>`, or, if it has no `<name>`, by their class phrase.
            height, width: size in pixels.
            num_inference_steps: number of scheduler steps.
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
            output_attention_maps: also return where the subjects' tokens were attended to.
            guidance_scale: of classifier-free guidance; at most 1: none.
            negative_prompt: what not to show; loaded subjects as `<name>`, other words are plain words.
            num_images_per_prompt: pictures per prompt.
            generator: makes the noise; a list: one per picture.
            prompt_embeds: `(batch, tokens, dim)` instead of the prompt's own embeddings, taken as they are: what
                `encode_prompt` gives, residuals and all. With a layout, pass `prompt` too: it says which tokens are
                whose. The words of regions then come from here as well, where `multisubject` and `dense_diffusion`
                else encode them by themselves.
            negative_prompt_embeds: the same for the negative prompt.
            cross_attention_kwargs: `{"scale": …}` scales LoRA weights.
            clip_skip: layers of the text encoder to skip.
            return_dict: return a `MultiSubjectPipelineOutput`; else the tuple of its values.
            kwargs: further arguments of `StableDiffusionPipeline.__call__`.

        Raises:
            ValueError, TypeError: an argument is wrong; a phrase of the layout is missing, ambiguous or cut off.
        """
        # 1. Check inputs
        _check_arguments(kwargs, guidance_steps, recurrence, recurrence_steps)
        guidance_function = resolve_guidance_method(guidance_method)
        if not height or not width:
            height, width = self._default_size(self.unet)
        self.check_inputs(
            prompt if prompt_embeds is None else None,
            height,
            width,
            kwargs.get("callback_steps"),
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
        )
        if prompt is None and (layout is not None or output_attention_maps):
            raise ValueError(
                "`layout` and `output_attention_maps` need `prompt` beside `prompt_embeds`: it says which tokens are"
                " whose."
            )

        # 2. Find subjects and regions in the prompts
        placed = self._place(prompt, layout, color_context, height, width)

        # 3. Turn layouts and token spans into what the UNet needs
        device = self._execution_device
        num_tokens = self._check_prompt_embeds(prompt_embeds, placed)
        conditioning, recorder = None, None
        if guidance_steps != 0:
            conditioning = self.prepare_regions(
                placed,
                guidance_function,
                num_tokens=num_tokens,
                encode_words=prompt_embeds is None,
                device=device,
                lora_scale=(cross_attention_kwargs or {}).get("scale"),
                clip_skip=clip_skip,
            )
        if conditioning is not None:
            conditioning = conditioning.repeated(num_images_per_prompt)
        if output_attention_maps:
            recorded = [_recorded_tokens(of_prompt) for of_prompt in placed]
            recorder = _make_recorder(recorded, num_tokens, num_images_per_prompt, conditioning)

        # 4. Encode the prompts with their subjects, denoise and decode
        scheduler = self.scheduler
        guidance = region_attention(
            self.unet,
            conditioning,
            scheduler=scheduler,
            resize_masks=masks_at,
            guidance_method=guidance_function,
            guidance_weight=guidance_weight,
            weight_negative=weight_negative,
            guidance_steps=guidance_steps,
            recorder=recorder,
        )
        recurrence_steps = guidance_steps if recurrence_steps is None else recurrence_steps
        with guidance, self._recurrent_steps(recurrence, recurrence_steps, generator), self._running_on(device):
            images, has_nsfw_concept = super().__call__(
                prompt if prompt_embeds is None else None,
                height,
                width,
                num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                cross_attention_kwargs=cross_attention_kwargs,
                clip_skip=clip_skip,
                return_dict=False,
                **kwargs,
            )

        # 5. Collect the attention maps
        attention_maps = None
        if recorder is not None:
            maps = recorder.maps().transpose(0, 1).numpy()  # [images, UNet calls, names, h, w]
            names = [list(tokens) for tokens in recorded for _ in range(num_images_per_prompt)]
            attention_maps = [
                dict(zip(of_names, of_image.swapaxes(0, 1), strict=False))  # rows of absent names are left over
                for of_image, of_names in zip(maps, names, strict=True)
            ]
        if not return_dict:
            return (images, has_nsfw_concept) + ((attention_maps,) if output_attention_maps else ())
        return MultiSubjectPipelineOutput(images, has_nsfw_concept, attention_maps)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the base's, with the residuals of the subjects that the prompts name. What comes out holds the subjects
        and works wherever diffusers takes `prompt_embeds`, in image-to-image or inpainting for example.

        Args:
            prompt, negative_prompt: may name loaded subjects, as in a call of the pipeline.
            device: where to encode; None: where the pipeline runs.
            num_images_per_prompt: rows per prompt.
            do_classifier_free_guidance: also encode the negative prompt.
            prompt_embeds, negative_prompt_embeds: taken as they are, instead of encoding.
            lora_scale: of LoRA weights on the text encoder.
            clip_skip: layers of the text encoder to skip.

        Returns:
            Embeddings `(prompts * num_images_per_prompt, tokens, dim)` of the prompts and of the negative prompts.
        """
        positive = self._parse(prompt) if prompt_embeds is None else []
        reads_negative = do_classifier_free_guidance and negative_prompt_embeds is None
        negative = self._parse(negative_prompt, negative=True) if reads_negative else []
        if isinstance(negative_prompt, str) and prompt is None and prompt_embeds is not None:
            negative, negative_prompt = negative * len(prompt_embeds), [negative_prompt] * len(prompt_embeds)
        with _text_model_found(self.text_encoder):
            embeds, negative_embeds = super().encode_prompt(
                _texts(positive, prompt),
                device or self._execution_device,
                num_images_per_prompt,
                do_classifier_free_guidance,
                _texts(negative, negative_prompt),
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                lora_scale=lora_scale,
                clip_skip=clip_skip,
            )
        if negative_embeds is not None:
            negative_embeds = self._add_subjects(negative_embeds, negative, num_images_per_prompt)
        return self._add_subjects(embeds, positive, num_images_per_prompt), negative_embeds

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
        negative_prompt: str | list[str] | None = None,
        guidance_steps: int | None = None,
        guidance_weight: float = 0.08,
        weight_negative: float = -1e8,
        guidance_method: str | GuidanceMethod = "multisubject",
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Within the context, another pipeline follows a layout: image-to-image, inpainting, ControlNet …

            inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe, dtype=pipe.dtype)
            with pipe.guide(inpaint, "<petrucci> on the beach", {"petrucci": box}) as embeds:
                inpaint(**embeds, image=image, mask_image=mask)

        Args:
            pipeline: any whose UNet, of Stable Diffusion 1.x or 2.x, is called with the prompts' embeddings alone or
                behind as many negative ones. Others (PAG, SAG, InstructPix2Pix, AnimateDiff) fail at their first step.
                What is cropped (`padding_mask_crop`) or drawn in parts (panoramas) gets the whole layout in each part.
            prompt, layout, negative_prompt: as in a call of this pipeline.
            height, width: of the pictures, in pixels; default: the base's.
            lora_scale, clip_skip: as for `encode_prompt`.
            color_context, guidance_steps, guidance_weight, weight_negative, guidance_method: as in a call. Steps are
                counted from the first that is taken, also where `strength` leaves some out.

        Yields:
            `prompt_embeds` and `negative_prompt_embeds` for calls of `pipeline`, with one picture per prompt or more.

        Raises:
            ValueError, TypeError: an argument is wrong, or `pipeline` calls its UNet in another way.
        """
        unet = getattr(pipeline, "unet", None)
        if unet is None or getattr(pipeline, "scheduler", None) is None:
            raise TypeError(f"`pipeline` is a {type(pipeline).__name__}, expected one with a UNet of Stable Diffusion.")
        if any(kind.__name__ == MultiSubjectPipeline.__name__ for kind in type(pipeline).__mro__):
            raise TypeError("`pipeline` is a MultiSubjectPipeline: call it with `layout`, it needs no guide.")
        if self.text_encoder is None:
            raise ValueError("The pipeline has no text encoder, which the prompts need; load one.")
        if problem := unsuitable_base(unet.config, self.text_encoder.config.hidden_size):
            raise ValueError(f"`pipeline`: its UNet {problem}")
        _check_steps("guidance_steps", guidance_steps, "all steps")
        guidance_function = resolve_guidance_method(guidance_method)
        if not height or not width:
            height, width = self._default_size(unet)
        self.check_inputs(prompt, height, width, None, negative_prompt)
        conditioning = None
        with torch.no_grad():
            placed = self._place(prompt, layout, color_context, height, width)
            prompt_embeds, negative_prompt_embeds = self.encode_prompt(
                prompt, negative_prompt=negative_prompt, lora_scale=lora_scale, clip_skip=clip_skip
            )
            if guidance_steps != 0:
                conditioning = self.prepare_regions(
                    placed,
                    guidance_function,
                    num_tokens=prompt_embeds.shape[1],
                    lora_scale=lora_scale,
                    clip_skip=clip_skip,
                )
        assert negative_prompt_embeds is not None
        if conditioning is not None and torch.equal(prompt_embeds, negative_prompt_embeds):
            raise ValueError(f"`negative_prompt` is {negative_prompt!r}, the prompt itself; expected another.")
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
                (height // self.vae_scale_factor, width // self.vae_scale_factor),
                prompt_embeds,
                negative_prompt_embeds,
            ),
        ):
            yield {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}

    def _place(
        self, prompt: str | list[str] | None, layout: Any, color_context: Any, height: int, width: int
    ) -> list[PlacedPrompt]:
        """Text and layout brought together, one per prompt."""
        if prompt is not None and self.tokenizer is None:
            raise ValueError("`prompt` needs a tokenizer, which the pipeline does not have; load one.")
        texts = self._parse(prompt)
        layouts, contexts = _per_prompt(layout, prompt, "layout"), _per_prompt(color_context, prompt, "color_context")
        placed = []
        for text, of_prompt, context in zip(texts, layouts, contexts, strict=True):
            regions: Sequence[Region] = ()
            if of_prompt is not None or layout is None:  # one of several prompts may have none
                regions = parse_layout(of_prompt, height=height, width=width, color_context=context)
            places = [text.find(region.subject, region.occurrence) for region in regions]
            self._check_subjects_are_named(text, regions)
            placed.append(PlacedPrompt(text, regions, places))
        return placed

    def _check_prompt_embeds(self, prompt_embeds: torch.Tensor | None, placed: Sequence[PlacedPrompt]) -> int:
        """The number of tokens that the prompts' embeddings have; raises unless given ones may be of these prompts."""
        if prompt_embeds is None:
            return self.tokenizer.model_max_length if placed else 0
        if prompt_embeds.ndim != 3:
            raise ValueError(
                f"`prompt_embeds` has shape {tuple(prompt_embeds.shape)}, expected (prompts, tokens, dim)."
            )
        rows, num_tokens = prompt_embeds.shape[:2]
        if placed and rows != len(placed):
            raise ValueError(f"`prompt_embeds` has {rows} rows, expected one for each of {len(placed)} prompts.")
        spans = [place.span for of_prompt in placed for place in of_prompt.places]
        spans += [mention.span for of_prompt in placed for mention in of_prompt.text.mentions]
        if (longest := max((span.stop for span in spans), default=0)) > num_tokens:
            raise ValueError(
                f"`prompt_embeds` has {num_tokens} tokens, but what `prompt` names goes on to token {longest}: it"
                " embeds another prompt."
            )
        return num_tokens

    def prepare_regions(
        self,
        placed: Sequence[PlacedPrompt],
        guidance_method: GuidanceMethod,
        *,
        num_tokens: int,
        encode_words: bool = True,
        device: torch.device | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> RegionConditioning | None:
        """What `region_attention` needs of prompts and their layouts; None if no prompt has regions.

        Args:
            placed: one per prompt.
            guidance_method: says whether the regions' own prompts are wanted.
            num_tokens: length of the prompt embeddings.
            encode_words: False leaves the regions' words as they are in the prompt embeddings, where a method can.
            device, lora_scale, clip_skip: as for `encode_prompt`.
        """
        batch, most = len(placed), max((len(of_prompt.regions) for of_prompt in placed), default=0)
        if most == 0:
            return None
        size = next(region.mask.shape for of_prompt in placed for region in of_prompt.regions)
        masks = torch.zeros(batch, most, *size)
        tokens = torch.zeros(batch, most, num_tokens, dtype=torch.bool)
        weights = torch.zeros(batch, most)
        kinds = torch.full((batch, num_tokens), int(TokenKind.PADDING))
        for row, of_prompt in enumerate(placed):
            for column, (region, place) in enumerate(zip(of_prompt.regions, of_prompt.places, strict=True)):
                masks[row, column] = torch.from_numpy(region.mask)
                tokens[row, column, place.span.start : place.span.stop] = True
                weights[row, column] = region.weight
            kinds[row] = _token_kinds(len(self._input_ids(of_prompt.text)), num_tokens)

        prompts = None
        appended = getattr(guidance_method, "uses_region_prompts", False)
        if appended or (encode_words and getattr(guidance_method, "uses_own_words", False)):
            prompts = self.encode_region_prompts(
                placed, device=device, padded=appended, lora_scale=lora_scale, clip_skip=clip_skip
            )
        return RegionConditioning(masks, tokens, weights, kinds, prompts)

    def encode_region_prompts(
        self,
        placed: Sequence[PlacedPrompt],
        *,
        device: torch.device | None = None,
        padded: bool = True,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> RegionPrompts:
        """Encode each region's own prompt, `a photo of` what stands there, with its subject's residual.

        In the whole prompt a causal text encoder lets every word hear of the words before it: of two dogs, the second
        one's embedding knows the first one's colour. Here each is by itself.

        Args:
            placed: B prompts, at least one with regions.
            device: where to encode; None: where the pipeline runs.
            padded: to the tokenizer's full length. Padding changes none of the words before it, and takes time.
            lora_scale, clip_skip: as for `encode_prompt`.
        """
        texts, own_spans = [], []
        start = len(self.tokenizer(_REGION_PROMPT).input_ids) - 1  # the end of the text is not part of it
        for words, span in itertools.chain(*(of_prompt.places for of_prompt in placed)):
            texts.append(f"{_REGION_PROMPT} {words}")
            own_spans.append(range(start, start + len(span)))
        full_length = self.tokenizer.model_max_length
        longest = max(own_span.stop for own_span in own_spans) + 1  # and the end of the text
        if longest > full_length:
            found, limit = longest - start - 1, full_length - start - 1
            raise ValueError(
                f"a phrase of the layout has {found} tokens, expected at most {limit}: it is also encoded by itself, as"
                f" {_REGION_PROMPT!r} and the phrase. Shorten it, or use guidance_method='cones2', which encodes the"
                " prompt alone."
            )
        try:
            if not padded:
                self.tokenizer.model_max_length = longest
            with _text_model_found(self.text_encoder):
                encoded, _ = super().encode_prompt(
                    texts, device or self._execution_device, 1, False, lora_scale=lora_scale, clip_skip=clip_skip
                )
        finally:
            self.tokenizer.model_max_length = full_length
        shape = (len(placed), max(len(of_prompt.places) for of_prompt in placed), encoded.shape[1])
        embeds = encoded.new_zeros(*shape, encoded.shape[2])
        tokens = torch.zeros(shape, dtype=torch.bool)
        kinds = torch.full(shape, int(TokenKind.PADDING))
        rows = iter(zip(own_spans, encoded, strict=True))
        for image, of_prompt in enumerate(placed):
            for column, (_, span) in enumerate(of_prompt.places):
                own_span, own_embeds = next(rows)
                residuals = [
                    (self.subjects[mention.subject], _shifted(mention.span, own_span.start - span.start), weight)
                    for mention in of_prompt.text.mentions
                    if mention.span.start in span
                    and mention.span.stop <= span.stop
                    and (weight := self._subject_weights.get(mention.subject, 1.0))
                ]
                embeds[image, column] = add_residuals(own_embeds, residuals) if residuals else own_embeds
                tokens[image, column, own_span.start : own_span.stop] = True
                kinds[image, column] = _token_kinds(own_span.stop + 1, shape[2])
        return RegionPrompts(embeds, tokens, kinds)

    def _input_ids(self, text: ParsedPrompt) -> list[int]:
        return self.tokenizer(self.maybe_convert_prompt(text.text, self.tokenizer)).input_ids

    def _default_size(self, unet: Any) -> tuple[int, int]:
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _subjects_in_use(self, text: str) -> dict[str, ResidualEmbedding]:
        """The active subjects, and of the inactive ones those that the prompt names outright."""
        return {
            name: subject
            for name, subject in self.subjects.items()
            if self._subject_weights.get(name, 1.0) or f"<{name}>".casefold() in text.casefold()
        }

    def _check_subjects_are_named(self, text: ParsedPrompt, regions: Sequence[Region]) -> None:
        """A layout that says `petrucci` where the prompt says so without brackets means the subject, not the word."""
        mentioned = {mention.subject for mention in text.mentions}
        for region in regions:
            for name in self.subjects.keys() - mentioned:
                word = region.subject.strip().casefold()
                if word == name.casefold() != self.subjects[name].class_phrase.casefold():
                    raise ValueError(
                        f"`layout` places the subject {region.subject!r}, but the prompt {text.text!r} has it as a"
                        f" plain word, which draws no subject. Write `<{name}>` there, or load it under another name."
                    )

    def _parse(self, prompt: str | list[str] | None, *, negative: bool = False) -> list[ParsedPrompt]:
        if prompt is None or self.tokenizer is None:
            return []
        texts = [prompt] if isinstance(prompt, str) else prompt
        if negative:
            return [parse_prompt(self.tokenizer, text, self.subjects, by_phrase=False) for text in texts]
        return [parse_prompt(self.tokenizer, text, self._subjects_in_use(text)) for text in texts]

    def _add_subjects(
        self, prompt_embeds: torch.Tensor, parsed: Sequence[ParsedPrompt], num_images_per_prompt: int
    ) -> torch.Tensor:
        """Residuals of the prompts' subjects; each prompt has `num_images_per_prompt` rows of `prompt_embeds`."""
        if not any(text.mentions for text in parsed):
            return prompt_embeds
        rows = []
        for text, of_prompt in zip(parsed, prompt_embeds.split(num_images_per_prompt), strict=True):
            residuals = [
                (self.subjects[mention.subject], mention.span, self._subject_weights.get(mention.subject, 1.0))
                for mention in text.mentions
            ]
            rows.append(add_residuals(of_prompt, residuals) if residuals else of_prompt)
        return torch.cat(rows)

    @property
    def _execution_device(self) -> torch.device:
        """As the base's, which looks at every module; known during a call."""
        return self._device_of_call or super()._execution_device

    @contextmanager
    def _running_on(self, device: torch.device) -> Iterator[None]:
        try:
            self._device_of_call = device
            yield
        finally:
            self._device_of_call = None

    @contextmanager
    def _recurrent_steps(
        self, recurrence: int, steps: int | None, generator: torch.Generator | list[torch.Generator] | None
    ) -> Iterator[None]:
        """Within the context, the pipeline's scheduler takes each of its first `steps` steps several times."""
        if recurrence == 1 or steps == 0:
            yield
            return
        scheduler = self.scheduler
        try:
            self.scheduler = RecurrentScheduler(scheduler, recurrence, steps, generator)
            yield
        finally:
            self.scheduler = scheduler

    # --- saving ------------------------------------------------------------------------------------------------------

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save `model_index.json`, and beside it the code that it names, so that the folder loads by itself."""
        os.makedirs(save_directory, exist_ok=True)
        copy_pipeline_sources(save_directory)
        save_subjects_with_pipeline(self.subjects, save_directory)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The configuration, with the class named in the form that diffusers loads from the folder's own code."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = self._saved_class_name()
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class RecurrentScheduler:
    """A scheduler that takes its first steps several times: step, add the step's noise back, step again.

    Self-recurrence as in Cones 2: between two visits the noise `sqrt(sigma_i² - sigma_{i+1}²)` is added to the sample
    in the sigma parametrisation (Euler, LMS). For schedulers that scale the sample by `sqrt(alpha_bar)` (DDIM, DDPM)
    the same is the forward process from `alpha_bar_{i+1}` back to `alpha_bar_i`. LMS runs at order 1, because its
    history of derivatives is one of another trajectory after a revisit.

    Args:
        scheduler: one of `DDIMScheduler`, `DDPMScheduler`, `EulerDiscreteScheduler`,
            `EulerAncestralDiscreteScheduler`, `LMSDiscreteScheduler`; everything else is looked up on it.
        recurrence: visits per step, at least 2.
        steps: how many of the first steps are taken repeatedly; None: all.
        generator: makes the noise; a list: one per sample.
    """

    def __init__(
        self,
        scheduler: Any,
        recurrence: int,
        steps: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ):
        self._in_sigmas = isinstance(
            scheduler, (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler)
        )
        if not self._in_sigmas and not isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
            raise ValueError(
                f"`recurrence` is {recurrence}, but {type(scheduler).__name__} cannot take a step twice: it builds on"
                " its former steps. Use DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler,"
                " EulerAncestralDiscreteScheduler or LMSDiscreteScheduler, or recurrence=1."
            )
        self._scheduler, self._recurrence, self._steps, self._generator = scheduler, recurrence, steps, generator
        self._calls = 0
        # Pipelines read the signatures of these two.
        self.set_timesteps = functools.wraps(scheduler.set_timesteps)(
            lambda *args, **kw: self._set_timesteps(*args, **kw)
        )
        self.step = functools.wraps(scheduler.step)(lambda *args, **kwargs: self._step(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self._scheduler.set_timesteps(*args, **kwargs)
        timesteps = self._scheduler.timesteps
        repeated = len(timesteps) if self._steps is None else min(self._steps, len(timesteps))
        visits = torch.ones(len(timesteps), dtype=torch.long, device=timesteps.device)
        visits[:repeated] = self._recurrence
        self.timesteps = timesteps.repeat_interleave(visits)
        self._num_revisits = repeated * self._recurrence
        self._calls = 0

    def _step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        self._calls += 1
        again = self._calls <= self._num_revisits and self._calls % self._recurrence != 0
        index = self._scheduler.step_index if self._in_sigmas else None
        if isinstance(self._scheduler, LMSDiscreteScheduler):
            kwargs["order"] = 1
        kwargs["return_dict"] = False
        sample, *rest = self._scheduler.step(model_output, timestep, sample, **kwargs)
        if again:
            noise = randn_tensor(sample.shape, generator=self._generator, device=sample.device, dtype=sample.dtype)
            if index is not None:
                self._scheduler._step_index = index
                sigma, next_sigma = self._scheduler.sigmas[index], self._scheduler.sigmas[index + 1]
                sample = sample + (sigma**2 - next_sigma**2).sqrt() * noise
            else:
                kept = self._kept_signal(timestep)
                sample = kept.sqrt() * sample + (1 - kept).sqrt() * noise
        return (sample, *rest)

    def _kept_signal(self, timestep: Any) -> torch.Tensor:
        """`alpha_bar` at `timestep` over that at the timestep which the scheduler steps to from there."""
        scheduler = self._scheduler
        if isinstance(scheduler, DDPMScheduler):
            next_timestep, last_alpha = scheduler.previous_timestep(timestep), scheduler.one
        else:
            stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            next_timestep, last_alpha = timestep - stride, scheduler.final_alpha_cumprod
        next_alpha = scheduler.alphas_cumprod[next_timestep] if next_timestep >= 0 else last_alpha
        return scheduler.alphas_cumprod[timestep] / next_alpha


def _token_kinds(length: int, num_tokens: int) -> torch.Tensor:
    """`(num_tokens,)` int64 of `TokenKind` for a prompt of `length` tokens, start and end of text included."""
    length = min(length, num_tokens)
    kinds = torch.full((num_tokens,), int(TokenKind.PADDING))
    kinds[:length] = TokenKind.WORD
    kinds[0], kinds[length - 1] = TokenKind.START, TokenKind.END
    return kinds


@contextmanager
def _text_model_found(text_encoder: Any) -> Iterator[None]:
    """Let diffusers find `text_encoder.text_model`, which it needs for `clip_skip` and transformers 5 has dropped."""
    missing = text_encoder is not None and not hasattr(text_encoder, "text_model")
    if missing:
        vars(text_encoder)["text_model"] = text_encoder  # not as a submodule, which would make a cycle
    try:
        yield
    finally:
        if missing:
            del vars(text_encoder)["text_model"]


def _texts(parsed: Sequence[ParsedPrompt], prompt: str | list[str] | None) -> str | list[str] | None:
    """What the text encoder is to read, in the form that the prompts came in."""
    if not parsed:
        return prompt
    return parsed[0].text if isinstance(prompt, str) else [text.text for text in parsed]


def _check_arguments(
    kwargs: Mapping[str, Any], guidance_steps: int | None, recurrence: int, recurrence_steps: int | None
) -> None:
    known = {*inspect.signature(StableDiffusionPipeline.__call__).parameters, "callback", "callback_steps"}
    if unknown := sorted(set(kwargs) - known):
        expected = sorted({*known, *inspect.signature(MultiSubjectPipeline.__call__).parameters} - {"self", "kwargs"})
        raise TypeError(f"Unknown arguments {unknown}; expected some of {expected}.")
    _check_steps("guidance_steps", guidance_steps, "all steps")
    _check_steps("recurrence_steps", recurrence_steps, "the guided steps")
    if not _is_whole(recurrence) or recurrence < 1:
        raise ValueError(f"`recurrence` is {recurrence!r}, expected a whole number of at least 1 (each step once).")


def _check_steps(name: str, steps: int | None, otherwise: str) -> None:
    if steps is not None and (not _is_whole(steps) or steps < 0):
        raise ValueError(f"`{name}` is {steps!r}, expected a whole number of at least 0, or None for {otherwise}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _per_prompt(value: Any, prompt: str | list[str] | None, argument: str) -> list[Any]:
    """One value for each prompt: a list beside a list of prompts holds one each, anything else counts for all."""
    if prompt is None:
        return []
    if isinstance(prompt, str):
        return [value]
    if isinstance(value, (list, tuple)):
        if any(
            isinstance(part, Mapping) and {"box", "mask"} & {*part} and {"subject", "phrase"} & {*part}
            for part in value
        ):
            raise ValueError(
                f"`{argument}` is a list of regions, expected a layout for each of the {len(prompt)} prompts. Write a "
                "list of lists, one per prompt; the same one may stand there several times."
            )
        if len(value) != len(prompt):
            raise ValueError(
                f"`{argument}` is a list of {len(value)}, expected one entry (or None) for each of the {len(prompt)}"
                " prompts."
            )
        return list(value)
    return [value] * len(prompt)


def _recorded_tokens(placed: PlacedPrompt) -> dict[str, list[range]]:
    """Name -> tokens whose attention is recorded: what the layout places, then the subjects that it leaves alone."""
    spans = [place.span for place in placed.places]
    tokens = {name: [span] for name, span in zip(region_names(placed.regions), spans, strict=True)}
    for mention in placed.text.mentions:
        if not any(mention.span.start in span for span in spans):
            tokens.setdefault(mention.subject, []).append(mention.span)
    return tokens


def _shifted(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)


def _make_recorder(
    recorded: Sequence[dict[str, list[range]]],
    num_tokens: int,
    num_images: int,
    conditioning: RegionConditioning | None,
) -> AttentionRecorder:
    if not any(recorded):
        raise ValueError(
            "`output_attention_maps` is True, but no prompt names a loaded subject or has a layout: there is nothing"
            " to map. Name a subject as `<name>`, or place a phrase with `layout`."
        )
    tokens = torch.zeros(len(recorded), max(map(len, recorded)), num_tokens, dtype=torch.bool)
    for row, groups in enumerate(recorded):
        for column, group in enumerate(groups.values()):
            for span in group:
                tokens[row, column, span.start : span.stop] = True
    tokens = tokens.repeat_interleave(num_images, dim=0)
    if conditioning is not None and conditioning.prompts is not None:
        # A group that names a region is also what its own prompt names.
        same = (tokens[:, :, None] == conditioning.tokens[:, None]).all(dim=-1)  # [B, groups, R]
        own = same[..., None] & conditioning.prompts.tokens[:, None]  # [B, groups, R, L]
        tokens = torch.cat([tokens, own.flatten(2)], dim=2)
    return AttentionRecorder(tokens, num_tokens)
