"""The frozen base: loading its parts, encoding prompts with it, drawing with it. What another architecture does
differently is in here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import nn
from transformers.utils import logging as transformers_logging

from multisubject.base_models import (
    base_model_errors,
    fingerprint_text_encoder,
    native_size,
    pixels_per_latent,
    tokenizer_of,
    unsuitable_channels,
)
from multisubject.generation.console import quiet_loading
from multisubject.pipeline_multisubject import MultiSubjectPipeline
from multisubject.pipeline_multisubject_xl import MultiSubjectXLPipeline
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL
from multisubject.training.config import TrainConfig

# Classes that a base of Stable Diffusion XL may be saved as. Others have another UNet, or another use for it.
XL_PIPELINES = tuple(
    kind.__name__ for kind in (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, MultiSubjectXLPipeline)
)


class TextEncoders(nn.Module):
    """The base's text encoders as one: token ids -> what its UNet reads.

    Args:
        encoders: name of the component -> encoder. Of one, the output is read (Stable Diffusion 1.x, 2.x); of two, the
            last but one layers, side by side, and the second one's pooled embedding (XL).
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids `(prompts, encoders, length)` -> embeddings `(prompts, length, embed_dim)`, and the pooled ones
        `(prompts, pooled_dim)`, None where the UNet reads none."""
        encoders, ids = [*self.encoders.values()], input_ids.unbind(1)
        if len(encoders) == 1:
            return encoders[0](ids[0])[0], None
        outputs = [encoder(of_it, output_hidden_states=True) for encoder, of_it in zip(encoders, ids, strict=True)]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds

    def freeze_unread(self) -> None:
        """Freeze what comes after the layer that is read: no gradient reaches it, and several processes would wait for
        one. The pooled embedding, which goes through it, is that of the untuned encoders."""
        for module in self._unread():
            module.requires_grad_(False)

    def _unread(self) -> Iterator[nn.Module]:
        for encoder in self.encoders.values() if len(self.encoders) > 1 else ():
            text_model: Any = getattr(encoder, "text_model", encoder)
            yield from (text_model.encoder.layers[-1], text_model.final_layer_norm)
            if (projection := getattr(encoder, "text_projection", None)) is not None:
                yield cast(nn.Module, projection)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        for encoder in self.encoders.values():
            encoder.gradient_checkpointing_enable()  # type: ignore[operator]
        self.train()  # transformers recomputes in this mode alone; CLIP has no dropout that it would turn on


@dataclass
class Models:
    """The frozen base. The encoders come first and the UNet last, so that they are never all in memory for nothing:
    `unet` is None until all data is encoded, `text_encoders` once nothing needs them any more.

    `tokenizers`, `fingerprints` and `widths` (columns of the prompt embeddings) are of each text encoder by its
    component's name; `zero_negative` says that an empty negative prompt is embedded as zeros.
    """

    tokenizers: dict[str, Any]
    text_encoders: TextEncoders | None
    vae: AutoencoderKL
    unet: UNet2DConditionModel | None
    unet_config: dict[str, Any]
    noise_scheduler: DDPMScheduler
    sampling_scheduler: Any
    device: torch.device
    dtype: torch.dtype
    fingerprints: dict[str, str | None]
    widths: dict[str, int]
    zero_negative: bool = False

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's; `build_prompts` sees to it that the others' have the subject at the same tokens."""
        return self.tokenizers["text_encoder"]

    @property
    def fingerprint(self) -> str | None:
        """Of all text encoders together; None where one has none."""
        known = [fingerprint for fingerprint in self.fingerprints.values() if fingerprint is not None]
        return " ".join(known) if len(known) == len(self.fingerprints) else None

    @property
    def is_xl(self) -> bool:
        """Whether the base is one of Stable Diffusion XL, whose UNet reads a pooled embedding and sizes."""
        return _reads_sizes(self.unet_config)

    @property
    def default_guidance_scale(self) -> float:
        """Classifier-free guidance that pictures of this architecture get where nobody asks for another."""
        pipeline = StableDiffusionXLPipeline if self.is_xl else StableDiffusionPipeline
        return inspect.signature(pipeline.__call__).parameters["guidance_scale"].default

    @property
    def downscale(self) -> int:
        """Picture pixels per latent."""
        return pixels_per_latent(self.vae.config)

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the square pictures that the base was trained at; of others, the shorter one."""
        return min(native_size(self.unet_config, self.vae.config))

    @property
    def size_multiple(self) -> int:
        """Picture sides have to be multiples of this for the UNet to halve them all the way down."""
        return int(self.downscale * 2 ** (len(self.unet_config["block_out_channels"]) - 1))

    def tokenize(self, sentences: Sequence[str]) -> torch.Tensor:
        """Sentences -> token ids `(sentences, encoders, length)`, cut and padded to the tokenizers' own length."""
        ids = [
            tokenizer(
                list(sentences),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers.values()
        ]
        return torch.stack(ids, dim=1).to(self.device)

    @torch.no_grad()
    def encode(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the untuned `text_encoders` make of token ids, a few at a time."""
        assert self.text_encoders is not None
        embeds, pooled = zip(*(self.text_encoders(chunk) for chunk in input_ids.split(16)), strict=True)
        return torch.cat(embeds), None if pooled[0] is None else torch.cat(pooled)


def load_encoders(config: TrainConfig, accelerator: Accelerator) -> Models:
    """All of the base but the UNet, frozen, on the accelerator's device; the VAE in the mixed precision's dtype, or in
    float32 where it would overflow in float16."""
    dtype = weight_dtype(accelerator)
    source = base_path(config)
    kind: Any = MultiSubjectPipeline  # which loads also what it has saved
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    with _loading(source):
        index = DiffusionPipeline.load_config(source, revision=config.revision)
        if "unet" not in index:
            raise ValueError(
                f"--pretrained_model_name_or_path: {source!r} is for {_saved_as(index)}, which has no UNet; expected a "
                "base of Stable Diffusion 1.x, 2.x or XL."
            )
        unet_config = UNet2DConditionModel.load_config(source, subfolder="unet", revision=config.revision)
        is_xl = _reads_sizes(unet_config)
        if is_xl:
            _check_xl_index(source, index)
            kind, options = MultiSubjectXLPipeline, {"add_watermarker": False}
        if config.pretrained_vae_model_name_or_path is not None:
            options["vae"] = _load_vae(config.pretrained_vae_model_name_or_path)
        pipe = kind.from_pretrained(
            source, revision=config.revision, variant=config.variant, dtype=torch.float32, unet=None, **options
        )
    _check_channels(config, source, unet_config, pipe.vae)
    names = ["text_encoder", *(["text_encoder_2"] if is_xl else [])]
    encoders = {name: getattr(pipe, name) for name in names}
    tokenizers = {name: getattr(pipe, tokenizer_of(name)) for name in names}
    widths = {name: int(encoder.config.hidden_size) for name, encoder in encoders.items()}
    if is_xl:
        _check_xl(source, pipe, unet_config, widths)
    # Stable Diffusion's own says `force_upcast` too, and has never needed it.
    overflows = is_xl and dtype == torch.float16 and pipe.vae.config.force_upcast
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"--pretrained_model_name_or_path: {source!r} predicts {noise_scheduler.config.prediction_type!r}; "
            "expected a base that predicts 'epsilon' or 'v_prediction'."
        )
    return Models(
        tokenizers=tokenizers,
        text_encoders=frozen(TextEncoders(encoders), accelerator.device, torch.float32),
        vae=frozen(pipe.vae, accelerator.device, torch.float32 if overflows else dtype),
        unet=None,
        unet_config=unet_config,
        noise_scheduler=noise_scheduler,
        sampling_scheduler=pipe.scheduler,
        device=accelerator.device,
        dtype=dtype,
        fingerprints={name: fingerprint_text_encoder(encoder) for name, encoder in encoders.items()},
        widths=widths,
        zero_negative=is_xl and pipe.config.force_zeros_for_empty_prompt,
    )


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """Around what reads the base or a part of it: errors say which one, and in a terminal each part has a bar."""
    barred = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()  # a bar around those of the parts
    try:
        with base_model_errors(source), quiet_loading(transformers_logging):
            yield
    finally:
        if barred:
            diffusers_logging.enable_progress_bar()


def _reads_sizes(unet_config: Mapping[str, Any]) -> bool:
    return unet_config.get("addition_embed_type") == "text_time"


def _saved_as(index: Mapping[str, Any]) -> str:
    name = index.get("_class_name")
    return str(name[-1] if isinstance(name, list) else name)  # a list where the code is saved with it


def _check_xl_index(source: str, index: Mapping[str, Any]) -> None:
    """Raise ValueError unless that `model_index.json` is of a text-to-image base of Stable Diffusion XL."""
    if None in (index.get("text_encoder") or [None]):
        raise ValueError(
            f"--pretrained_model_name_or_path: {source!r} has no first text encoder, as refiners of Stable Diffusion "
            "XL; a refiner takes no subjects. Expected the base that it refines."
        )
    if _saved_as(index) not in XL_PIPELINES:
        raise ValueError(
            f"--pretrained_model_name_or_path: {source!r} is for {_saved_as(index)}; of Stable Diffusion XL, expected "
            f"a text-to-image base, saved as one of {', '.join(XL_PIPELINES)}."
        )


def _check_channels(config: TrainConfig, source: str, unet_config: Mapping[str, Any], vae: AutoencoderKL) -> None:
    problem = unsuitable_channels(unet_config, vae.config)
    if problem is None:
        return
    read, made = unet_config["in_channels"], vae.config.latent_channels
    if config.pretrained_vae_model_name_or_path is not None and read == unet_config["out_channels"]:
        raise ValueError(
            f"--pretrained_vae_model_name_or_path: {config.pretrained_vae_model_name_or_path!r} makes latents of "
            f"{made} channels, the UNet of {source!r} reads {read}; expected a VAE of the base's family."
        )
    raise ValueError(f"--pretrained_model_name_or_path: {source!r} has a UNet that {problem}")


def _check_xl(source: str, pipe: Any, unet_config: Mapping[str, Any], widths: Mapping[str, int]) -> None:
    """Raise ValueError where the parts of a base of Stable Diffusion XL do not go together."""
    reads, made = unet_config["cross_attention_dim"], " + ".join(map(str, widths.values()))
    if reads != sum(widths.values()):
        problem = f"has a UNet that reads prompt embeddings of width {reads}, but text encoders of {made}"
    elif pipe.tokenizer.get_vocab() != pipe.tokenizer_2.get_vocab():
        problem = "has two tokenizers of different words, so that a subject's could be at different places"
    elif "sigma_data" in pipe.scheduler.config:
        problem = f"is denoised by {type(pipe.scheduler).__name__}, which adds noise in another way (EDM)"
    else:
        return
    raise ValueError(
        f"--pretrained_model_name_or_path: {source!r} {problem}; expected a text-to-image base of Stable Diffusion XL."
    )


def _load_vae(source: str) -> AutoencoderKL:
    try:
        with _loading(source):
            return AutoencoderKL.from_pretrained(source, dtype=torch.float32)
    except OSError as error:
        raise OSError(f"--pretrained_vae_model_name_or_path: {source!r} cannot be loaded: {error}") from error


def load_unet(config: TrainConfig, models: Models) -> UNet2DConditionModel:
    """The base's UNet, frozen, in the models' dtype and on their device."""
    source = base_path(config)
    with _loading(source):
        unet = UNet2DConditionModel.from_pretrained(
            source, subfolder="unet", revision=config.revision, variant=config.variant, dtype=models.dtype
        )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return frozen(unet, models.device, models.dtype)


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen UNet and VAE in the accelerator's mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def frozen(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """`module` on that device in that dtype, in evaluation mode, without gradients of its own."""
    module = module.requires_grad_(False).eval().to(device)
    return module if next(module.parameters()).dtype == dtype else module.to(dtype)


def base_path(config: TrainConfig) -> str:
    """Hub id or folder of the base."""
    return config.pretrained_model_name_or_path or str(EMBEDDED_BASE)


@torch.no_grad()
def generate(
    models: Models,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    config: TrainConfig,
    *,
    seed: int,
    pooled: torch.Tensor | None = None,
    negative_pooled: torch.Tensor | None = None,
) -> list[Image.Image]:
    """One picture per row of `prompt_embeds` `(prompts, length, embed_dim)`, and of `pooled` `(prompts, pooled_dim)`
    where the UNet reads it."""
    parts = {"vae": models.vae, "unet": models.unet, "scheduler": models.sampling_scheduler}
    absent: list[str]
    if models.is_xl:
        absent = ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
        pipe: Any = StableDiffusionXLPipeline(**parts, **dict.fromkeys(absent), add_watermarker=False)
    else:
        absent = ["text_encoder", "tokenizer", "safety_checker", "feature_extractor"]
        pipe = StableDiffusionPipeline(**parts, **dict.fromkeys(absent), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    resolution = config.resolution
    images = []
    for index, embeds in enumerate(prompt_embeds):
        conditions = {"prompt_embeds": embeds[None], "negative_prompt_embeds": negative_embeds}
        if pooled is not None and negative_pooled is not None:
            conditions |= {
                "pooled_prompt_embeds": pooled[index, None],
                "negative_pooled_prompt_embeds": negative_pooled,
            }
        (latents,) = pipe(
            **{name: value.to(models.dtype) for name, value in conditions.items()},
            height=resolution,
            width=resolution,
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            generator=torch.Generator().manual_seed(seed + index),
            output_type="latent",
            return_dict=False,
        )[:1]
        # Decoded here, because XL's pipeline does not with a VAE in float32 beside a UNet in float16.
        scaled = latents.to(models.vae.dtype) / models.vae.config.scaling_factor
        images += pipe.image_processor.postprocess(models.vae.decode(scaled, return_dict=False)[0])
    return images


def base_model_name(config: TrainConfig) -> str:
    """The base as a file that travels may name it: a Hub id, or a folder's own name without the way to it."""
    source = base_path(config)
    embedded = {EMBEDDED_BASE: "tiny_world", EMBEDDED_BASE_XL: "tiny_world_xl"}
    if name := embedded.get(Path(source).resolve()):
        return name
    return Path(source).name if Path(source).is_dir() else source
