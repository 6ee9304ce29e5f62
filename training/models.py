"""The frozen base: loading its parts, encoding prompts with it, drawing with it. What another architecture does
differently is in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn

from multisubject.base_models import base_model_errors, fingerprint_text_encoder
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.training.config import TrainConfig


@dataclass
class Models:
    """The frozen base. The encoders come first and the UNet last, so that they are never all in memory for nothing:
    `unet` is None until all data is encoded, `text_encoder` once nothing needs it any more."""

    tokenizer: Any
    text_encoder: nn.Module | None
    vae: AutoencoderKL
    unet: UNet2DConditionModel | None
    unet_config: dict[str, Any]
    noise_scheduler: DDPMScheduler
    sampling_scheduler: Any
    device: torch.device
    dtype: torch.dtype
    fingerprint: str | None

    @property
    def downscale(self) -> int:
        """Picture pixels per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """Picture size that the base was trained at."""
        return int(self.unet_config["sample_size"] * self.downscale)

    @property
    def size_multiple(self) -> int:
        """Picture sides have to be multiples of this for the UNet to halve them all the way down."""
        return int(self.downscale * 2 ** (len(self.unet_config["block_out_channels"]) - 1))


def load_encoders(config: TrainConfig, accelerator: Accelerator) -> Models:
    """All of the base but the UNet, frozen, on the accelerator's device; the VAE in the mixed precision's dtype."""
    dtype = weight_dtype(accelerator)
    source = base_path(config)
    with base_model_errors(source):
        pipe = StableDiffusionPipeline.from_pretrained(
            source,
            revision=config.revision,
            variant=config.variant,
            dtype={"vae": dtype, "default": torch.float32},
            unet=None,
            safety_checker=None,
            requires_safety_checker=False,
        )
        unet_config = UNet2DConditionModel.load_config(source, subfolder="unet", revision=config.revision)
    if unet_config["in_channels"] != pipe.vae.config.latent_channels:
        raise ValueError(
            f"--pretrained_model_name_or_path: {source!r} has a UNet of {unet_config['in_channels']} input and "
            f"{pipe.vae.config.latent_channels} latent channels; expected a text-to-image base, not an inpainting one."
        )
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"--pretrained_model_name_or_path: {source!r} predicts {noise_scheduler.config.prediction_type!r}; "
            "expected a base that predicts 'epsilon' or 'v_prediction'."
        )
    return Models(
        tokenizer=pipe.tokenizer,
        text_encoder=frozen(pipe.text_encoder, accelerator.device, torch.float32),
        vae=frozen(pipe.vae, accelerator.device, dtype),
        unet=None,
        unet_config=unet_config,
        noise_scheduler=noise_scheduler,
        sampling_scheduler=pipe.scheduler,
        device=accelerator.device,
        dtype=dtype,
        fingerprint=fingerprint_text_encoder(pipe.text_encoder),
    )


def load_unet(config: TrainConfig, models: Models) -> UNet2DConditionModel:
    """The base's UNet, frozen, in the models' dtype and on their device."""
    source = base_path(config)
    with base_model_errors(source):
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
    return module if module.dtype == dtype else module.to(dtype)


def base_path(config: TrainConfig) -> str:
    """Hub id or folder of the base."""
    return config.pretrained_model_name_or_path or str(EMBEDDED_BASE)


def tokenize(tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """Sentences -> token ids `(sentences, length)`, cut and padded to the tokenizer's own length."""
    batch = tokenizer(
        list(sentences),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return batch.input_ids


def encode_prompts(text_encoder: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Token ids `(prompts, length)` -> embeddings `(prompts, length, embed_dim)`, as the UNet reads them."""
    return text_encoder(input_ids)[0]


@torch.no_grad()
def generate(
    models: Models, prompt_embeds: torch.Tensor, negative_embeds: torch.Tensor, config: TrainConfig, *, seed: int
) -> list[Image.Image]:
    """One picture per row of `prompt_embeds` `(prompts, length, embed_dim)`."""
    pipe = StableDiffusionPipeline(
        models.vae, None, None, models.unet, models.sampling_scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    resolution = config.resolution
    images = []
    for index, embeds in enumerate(prompt_embeds):
        images += pipe(
            prompt_embeds=embeds[None].to(models.dtype),
            negative_prompt_embeds=negative_embeds.to(models.dtype),
            height=resolution,
            width=resolution,
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            generator=torch.Generator().manual_seed(seed + index),
        ).images
    return images


def base_model_name(config: TrainConfig) -> str:
    """The base as a file that travels may name it: a Hub id, or a folder's own name without the way to it."""
    source = config.pretrained_model_name_or_path
    if source is None or Path(source).resolve() == EMBEDDED_BASE:
        return "tiny_world"
    return Path(source).name if Path(source).is_dir() else source
