"""One step: which samples it takes, and how far the base is from denoising them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from multisubject.training.concepts import Concept, TrainingPicture
from multisubject.training.models import Models


@dataclass(frozen=True)
class Sample:
    """One picture to denoise: latents and noise `(channels, h, w)`, mask `(1, h, w)`, row of its prompt, weight, and
    the `time_ids` of its view."""

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor | None
    timestep: int
    row: int
    weight: float = 1.0
    time_ids: tuple[int, ...] = ()


def _generator(*key: int) -> torch.Generator:
    """A random stream that depends on nothing but `key`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def draw_sample(
    pictures: Sequence[TrainingPicture],
    *,
    seed: int,
    step: int,
    index: int,
    batch: int,
    num_timesteps: int,
    noise_offset: float = 0.0,
    weight: float = 1.0,
) -> Sample:
    """Sample `index` of the `batch` that all processes together take in `step`.

    Pictures come in epochs, each in its own order; timesteps are uniform, and spread evenly over the batch, which makes
    gradients less noisy than independent ones.
    """
    epoch, place = divmod(step * batch + index, len(pictures))
    picture = pictures[np.random.default_rng((seed, epoch)).permutation(len(pictures))[place]]
    generator = _generator(seed, step, index)
    view = picture.views[int(torch.randint(len(picture.views), (), generator=generator))]
    row = picture.rows[int(torch.randint(len(picture.rows), (), generator=generator))]
    offset = float(torch.rand((), generator=_generator(seed, step)))
    timestep = min(num_timesteps - 1, int((index + offset) / batch * num_timesteps))
    noise = torch.randn(view.latents.shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn((view.latents.shape[0], 1, 1), generator=generator)
    return Sample(view.latents, noise.to(view.latents.device), view.mask, timestep, row, weight, view.time_ids)


def draw_batch(concept: Concept, step: int, micro_step: int, accelerator: Accelerator, models: Models) -> list[Sample]:
    """This process's samples of one accumulation step; with prior preservation, as many of the class follow."""
    config = concept.config
    size = config.train_batch_size
    batch = size * accelerator.num_processes * config.gradient_accumulation_steps
    first = (micro_step * accelerator.num_processes + accelerator.process_index) * size
    num_timesteps = models.noise_scheduler.config.num_train_timesteps

    def draw(pictures: list[TrainingPicture], seed: int, weight: float) -> list[Sample]:
        return [
            draw_sample(
                pictures, seed=seed, step=step, index=index, batch=batch, num_timesteps=num_timesteps,
                noise_offset=config.noise_offset, weight=weight,
            )
            for index in range(first, first + size)
        ]  # fmt: skip

    if not concept.class_pictures:
        return draw(concept.pictures, config.seed, 1.0)
    # The mean runs over both halves; the factor two leaves the subject's half what it is alone.
    return draw(concept.pictures, config.seed, 2.0) + draw(
        concept.class_pictures, config.seed + 1, 2 * config.prior_loss_weight
    )


def compute_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    snr: torch.Tensor,
    *,
    prediction_type: str,
    snr_gamma: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared error of each sample, weighted by its noise level and restricted to the subject.

    Args:
        prediction: the UNet's output `(batch, channels, height, width)`, any dtype; computed in float32.
        target: what it should be (the noise, or the velocity), same shape.
        snr: signal-to-noise ratio ᾱ / (1 − ᾱ) of each sample's timestep, `(batch,)`.
        prediction_type: `epsilon` or `v_prediction`.
        snr_gamma: γ of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); None or 0: off.
        mask: how much each latent cell counts, `(batch, 1, height, width)` in [0, 1]; a sample's weights are normalised
            by their sum, so that a small subject counts as much as a large one. None: all cells alike.

    Returns:
        `(batch,)` float32.
    """
    error = (prediction.float() - target.float()).square().mean(1)  # [B, h, w]
    if mask is None:
        loss = error.mean((1, 2))
    else:
        cells = mask[:, 0].float()
        loss = (error * cells).sum((1, 2)) / cells.sum((1, 2)).clamp(min=1e-6)
    if snr_gamma:
        capped = snr.clamp(max=snr_gamma)
        # In terms of the error of the clean picture both are min(SNR, γ).
        loss = loss * (capped / (snr + 1) if prediction_type == "v_prediction" else capped / snr.clamp(min=1e-8))
    return loss


def denoising_loss(
    samples: Sequence[Sample],
    prompt_embeds: torch.Tensor,
    models: Models,
    snr_gamma: float | None,
    pooled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted mean of `compute_loss` over `samples`, whose prompts' embeddings are `(samples, length, embed_dim)` and,
    where the UNet reads it, `pooled` `(samples, pooled_dim)`.

    Samples of one shape go through the UNet together, so a batch may mix aspect ratios.
    """
    scheduler, unet = models.noise_scheduler, cast(UNet2DConditionModel, models.unet)
    by_shape = defaultdict(list)
    for index, sample in enumerate(samples):
        by_shape[sample.latents.shape].append(index)
    total = prompt_embeds.new_zeros((), dtype=torch.float32)
    for members in by_shape.values():
        group = [samples[index] for index in members]
        latents = torch.stack([sample.latents for sample in group])
        noise = torch.stack([sample.noise for sample in group])
        timesteps = torch.tensor([sample.timestep for sample in group], device=latents.device)
        mask = None
        if any(sample.mask is not None for sample in group):
            whole = latents.new_ones((1, *latents.shape[-2:]))
            mask = torch.stack([whole if sample.mask is None else sample.mask for sample in group])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction_type = scheduler.config.prediction_type
        target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        embeds = prompt_embeds[members].to(models.dtype)
        conditions = {}
        if pooled is not None:
            # In float32, as bfloat16 has not every number of pixels; the UNet rounds what it makes of them.
            time_ids = latents.new_tensor([sample.time_ids for sample in group])
            conditions["added_cond_kwargs"] = {"text_embeds": pooled[members].to(models.dtype), "time_ids": time_ids}
        prediction = unet(noisy.to(models.dtype), timesteps, embeds, **conditions, return_dict=False)[0]
        alphas = scheduler.alphas_cumprod.to(latents.device)[timesteps]
        losses = compute_loss(
            prediction, target, alphas / (1 - alphas), prediction_type=prediction_type, snr_gamma=snr_gamma, mask=mask
        )
        total = total + (losses * losses.new_tensor([sample.weight for sample in group])).sum()
    return total / len(samples)
