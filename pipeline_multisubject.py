"""Stable Diffusion 1.x and 2.x with several personal subjects in one picture, each where a layout wants it.

    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipeline_multisubject.py", trust_remote_code=True)
    pipe.load_subject("embeddings/petrucci.safetensors", name="petrucci")
    pipe("a photo of <petrucci> on the beach", layout={"petrucci": (0.1, 0.2, 0.5, 1.0)}).images[0]

One file with one pipeline class and its siblings beside it, as `custom_pipeline` wants it. Here is what is special
about this architecture; what happens in a call is in `multisubject_mixin.py`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

__multisubject_version__ = "0.1.0"

# All custom pipelines of a process share one folder of sources and one cache of modules, so a sibling may be another
# project's file of the same name, or an older one of ours. Every sibling must be imported here, also those that only
# another sibling needs: for a local file, diffusers copies what it imports and no further.
try:
    from .attention_processors import __multisubject_version__ as _
    from .base_models import unsuitable_base
    from .call_arguments import joined
    from .guidance_methods import __multisubject_version__ as _
    from .guidance_schedule import __multisubject_version__ as _
    from .hub_client import __multisubject_version__ as _
    from .hub_utils import __multisubject_version__ as _
    from .layout import __multisubject_version__ as _
    from .layout_images import __multisubject_version__ as _
    from .model_card import __multisubject_version__ as _
    from .move_times import __multisubject_version__ as _
    from .multisubject_mixin import MultiSubjectMixin
    from .pictures import __multisubject_version__ as _
    from .placed_prompts import __multisubject_version__ as _
    from .prompt_encoder import ENCODING_DEFAULTS
    from .recurrence import __multisubject_version__ as _
    from .region_attention import __multisubject_version__ as _
    from .region_conditioning import __multisubject_version__ as _
    from .region_contents import __multisubject_version__ as _
    from .region_ip_adapters import __multisubject_version__ as _
    from .region_loras import __multisubject_version__ as _
    from .region_moves import __multisubject_version__ as _
    from .region_texts import __multisubject_version__ as _
    from .residual_embeddings import __multisubject_version__ as _
    from .saved_pipeline import __multisubject_version__ as _
    from .shared_models import __multisubject_version__ as _
    from .subject_file import __multisubject_version__ as _
    from .subject_loader import EncoderSlot, hidden_size
    from .subject_pickle import __multisubject_version__ as _
    from .unknown_names import __multisubject_version__ as _
except ImportError as error:
    raise ImportError(
        f"{__name__} found a file beside it that is not of multisubject {__multisubject_version__}: {error}. Another"
        " custom pipeline with a file of that name was loaded, or an older multisubject: start a new process, and"
        " delete diffusers' `modules` cache folder if that does not help."
    ) from error

_SIBLINGS = (
    "attention_processors", "base_models", "call_arguments", "guidance_methods", "guidance_schedule", "hub_client",
    "hub_utils", "layout", "layout_images", "model_card", "move_times", "multisubject_mixin", "pictures",
    "placed_prompts", "prompt_encoder", "recurrence", "region_attention", "region_conditioning", "region_contents",
    "region_ip_adapters", "region_loras", "region_moves", "region_texts",
    "residual_embeddings", "saved_pipeline", "shared_models", "subject_file", "subject_loader", "subject_pickle",
    "unknown_names",
)  # fmt: skip
_versions = {
    name: getattr(sys.modules[f"{__name__.rpartition('.')[0]}.{name}"], "__multisubject_version__", None)
    for name in _SIBLINGS
}
if {*_versions.values()} != {__multisubject_version__}:
    raise ImportError(
        f"{__name__} is of multisubject {__multisubject_version__}, but the files beside it are of {_versions}."
        " An older multisubject was loaded before: start a new process."
    )


@dataclass
class MultiSubjectPipelineOutput(StableDiffusionPipelineOutput):
    """Stable Diffusion's output with attention maps.

    Args:
        attention_maps: one dict per image, subject or phrase -> `(UNet calls, h, w)` float32: where its tokens were
            attended to, as probabilities averaged over heads, layers and tokens; empty for a prompt without subject and
            layout; None if not asked for.
    """

    attention_maps: list[dict[str, np.ndarray]] | None = None


class MultiSubjectPipeline(MultiSubjectMixin, StableDiffusionPipeline):
    """Text-to-image with Stable Diffusion 1.x and 2.x, several subjects and a layout.

    Components, loading and every argument of the call are those of `StableDiffusionPipeline`; without subjects and
    layout the pictures are its pictures, bit for bit. (`<name>` in a prompt is always a subject or a learned token.)

    Attributes:
        subjects: name -> `ResidualEmbedding`, the loaded subjects.
    """

    _file = "pipeline_multisubject"
    _output = MultiSubjectPipelineOutput

    # diffusers reads the components off the signature
    @functools.wraps(StableDiffusionPipeline.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._start()

    __call__ = joined(MultiSubjectMixin.__call__, StableDiffusionPipeline.__call__)
    encode_prompt = joined(MultiSubjectMixin.encode_prompt, StableDiffusionPipeline.encode_prompt, **ENCODING_DEFAULTS)

    @property
    def encoder_slots(self) -> list[EncoderSlot]:
        """One text encoder, whose output is all of the prompt embeddings."""
        return [EncoderSlot("text_encoder", self.tokenizer, hidden_size(self.text_encoder), "prompt")]

    def base_problem(self, unet: Any) -> str | None:
        """A UNet of Stable Diffusion XL, or one that reads embeddings of another width than the text encoder's."""
        return unsuitable_base(unet.config, self.encoder_slots[0].width)

    def _size(self, height: int | None, width: int | None, unet: Any = None) -> tuple[int, int]:
        if not height or not width:
            height = width = None  # as diffusers has it here: one side alone does not count
        return super()._size(height, width, unet)

    def _encode(self, **asked: Any) -> tuple[Any, ...]:
        with _text_model_found(self.text_encoder):
            return super()._encode(**asked)


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
