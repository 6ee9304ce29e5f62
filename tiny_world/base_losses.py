"""The networks of an embedded base with their losses: a module for each stage of its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from multisubject.tiny_world.words import ATTRIBUTES, MAX_TOKENS
from multisubject.training.models import TextEncoders

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


def edge_error(error: torch.Tensor) -> torch.Tensor:
    """L1 between neighbouring-pixel differences, of `error` `(batch, channels, height, width)`."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


class AutoencoderLoss(nn.Module):
    """AutoencoderKL with L1, edge and KL terms, all means over elements.

    Args:
        teacher: an autoencoder of smaller pictures. The encoder then learns to give its posterior of the picture shrunk
            to its size, instead of one near the standard normal, and the decoder reads that: what reads and makes the
            teacher's latents goes on as it is.
    """

    def __init__(self, vae: AutoencoderKL, edge_weight: float, kl_weight: float, teacher: AutoencoderKL | None = None):
        super().__init__()
        self.vae, self.edge_weight, self.kl_weight = vae, edge_weight, kl_weight
        self.teacher = None if teacher is None else teacher.requires_grad_(False)

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixels`: uint8 `(batch, 3, height, width)`; `noise`: standard normal of the latents' shape."""
        images = pixels.float() / 127.5 - 1
        read = posterior = self.vae.encode(images).latent_dist
        if self.teacher is None:
            off = self.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        else:
            shrunk = F.interpolate(images, size=(self.teacher.config.sample_size,) * 2, mode="area")
            with torch.no_grad():
                read = self.teacher.encode(shrunk).latent_dist
            off = F.mse_loss(posterior.mean.float(), read.mean.float()) / read.mean.float().var()
            off = off + 0.1 * F.mse_loss(posterior.logvar.float(), read.logvar.float())
        decoded = self.vae.decode(read.mean + read.std * noise).sample.float()
        error = decoded - images
        l1 = error.abs().mean()
        loss = l1 + self.edge_weight * edge_error(error) + off
        return {"loss": loss, "l1": l1.detach(), "off": off.detach()}


class PatchDiscriminator(nn.Module):
    """Tells patches of drawn pictures from patches of decoded ones (Isola et al. 2017, arXiv:1611.07004).

    Args:
        channels: of its layers; each but the last halves the picture.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        *strided, last = zip((3, *channels), channels, strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(*pair, kernel_size=4, stride=2, padding=1) for pair in strided)
        self.layers.append(nn.Conv2d(*last, kernel_size=3, padding=1))
        self.head = nn.Conv2d(channels[-1], 1, 3, padding=1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """`(batch, 3, height, width)` -> each layer's features `(batch, channels, h, w)`, then the verdicts
        `(batch, 1, h, w)`, high where it believes in a drawn picture."""
        features = []
        for layer in self.layers:
            images = F.leaky_relu(layer(images), 0.2)
            features.append(images)
        return [*features, self.head(images)]


class DecoderLoss(nn.Module):
    """The decoder of a finished autoencoder, made crisp: L1 and edges, the features of a patch discriminator (Larsen et
    al. 2016, arXiv:1512.09300) and its verdict, as in Stable Diffusion's own autoencoder (Esser et al. 2021,
    arXiv:2012.09841). The encoder stays, so that latents do not change.

    Decoder and discriminator learn in one step: each sees the other's weights as constants.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        discriminator: PatchDiscriminator,
        edge_weight: float,
        feature_weight: float,
        adversarial_weight: float,
    ):
        super().__init__()
        self.vae, self.discriminator = vae, discriminator
        self.edge_weight, self.feature_weight = edge_weight, feature_weight
        self.adversarial_weight = adversarial_weight
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixels`: uint8 `(batch, 3, height, width)`; `noise`: standard normal of the latents' shape."""
        images = pixels.float() / 127.5 - 1
        with torch.no_grad():
            posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        l1 = error.abs().mean()

        *of_drawn, drawn = self.discriminator(images)
        *_, made = self.discriminator(decoded.detach())
        discriminating = (F.relu(1 - drawn).mean() + F.relu(1 + made).mean()).float() / 2

        constant = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        *of_decoded, believed = torch.func.functional_call(self.discriminator, constant, (decoded,))
        features = torch.stack(
            [
                (F.normalize(ours.float(), dim=1) - F.normalize(theirs.detach().float(), dim=1)).square().sum(1).mean()
                for ours, theirs in zip(of_decoded, of_drawn, strict=True)
            ]
        ).mean()
        painted = l1 + self.edge_weight * edge_error(error) + self.feature_weight * features
        convincing = -believed.float().mean()
        # Both terms pull equally hard at the last layer, times the weight.
        last = self.vae.decoder.conv_out.weight
        pulls = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (painted, convincing)]
        weight = self.adversarial_weight * (pulls[0] / (pulls[1] + 1e-6)).clamp(max=1e3)
        return {
            "loss": painted + weight * convincing + discriminating,
            "l1": l1.detach(),
            "features": features.detach(),
            "discriminator": discriminating.detach(),
        }


class CaptionLoss(nn.Module):
    """Text encoders: what every noun stands for, and what the whole caption tells, must be linear in the embeddings.

    This takes the place of CLIP's contrastive training, at the cost of a text-only classifier: at a noun, linear heads
    name the look that its adjectives give it; at the end of the text, and in the pooled embedding where there is one,
    the setting, and which categories and colours there are. Of two encoders each has to know all by itself. As in
    Stable Diffusion the encoders are frozen afterwards.

    Args:
        encoders: what is trained.
        classes: attribute, `setting` and `present` -> number of classes.
        teacher: an earlier encoder. The first one then learns to give what that gives, and only the other is new.
    """

    def __init__(self, encoders: TextEncoders, classes: Mapping[str, int], teacher: TextEncoders | None = None):
        super().__init__()
        self.encoders, self.widths = encoders, [config.hidden_size for config in text_configs(encoders)]
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        first, *second = text_configs(encoders)
        self.end = first.eos_token_id
        self.heads = nn.ModuleList(_heads(width, classes) for width in self.widths)
        if teacher is not None:
            self.heads[0].requires_grad_(False)  # not read
        summary = {name: classes[name] for name in ("setting", "present")}
        self.pooled_heads = nn.ModuleList(_heads(config.projection_dim, summary) for config in second)

    def forward(
        self, input_ids: torch.Tensor, looks: torch.Tensor, settings: torch.Tensor, present: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`input_ids` `(batch, 77)`; `looks` `(batch, 77, attributes)` class numbers, -100 where no noun stands;
        `settings` `(batch,)` class numbers; `present` `(batch, categories and colours)` 0 or 1."""
        prompt_embeds, pooled = self.encoders(for_each(self.encoders, input_ids))
        length = torch.eq(input_ids, self.end).int().argmax(dim=1)
        nouns = (looks[..., 0] >= 0).flatten()
        looks = looks.flatten(0, 1)[nouns]
        of_looks, of_summaries = [], []
        summaries: list[tuple[Any, torch.Tensor]] = [(heads, pooled) for heads in self.pooled_heads]
        by_encoder: list[tuple[Any, torch.Tensor]] = [
            *zip(self.heads, prompt_embeds.split(self.widths, dim=-1), strict=True)
        ]
        off = prompt_embeds.new_zeros(())
        if self.teacher is not None:
            with torch.no_grad():
                wanted, _ = self.teacher(for_each(self.teacher, input_ids))
            off = F.mse_loss(by_encoder.pop(0)[1].float(), wanted.float()) / wanted.float().var()
        for heads, embeds in by_encoder:
            at_nouns = embeds.flatten(0, 1)[nouns]
            of_looks += [
                F.cross_entropy(heads[name](at_nouns).float(), looks[:, column])
                for column, name in enumerate(ATTRIBUTES)
            ]
            # The first end token and the last padding.
            summaries.append((heads, embeds[torch.arange(len(embeds)), length] + embeds[:, -1]))
        for heads, embeds in summaries:
            setting = F.cross_entropy(heads["setting"](embeds).float(), settings)
            of_summaries.append(setting + F.binary_cross_entropy_with_logits(heads["present"](embeds).float(), present))
        look, summary = torch.stack(of_looks).mean(), torch.stack(of_summaries).mean()
        return {
            "loss": look + 0.25 * summary + off,
            "look": look.detach(),
            "summary": summary.detach(),
            "off": off.detach(),
        }


def _heads(width: int, classes: Mapping[str, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, count) for name, count in classes.items()})


def text_configs(encoders: TextEncoders) -> list[Any]:
    """Each encoder's configuration."""
    return [encoder.config for encoder in encoders.encoders.values()]


def for_each(encoders: TextEncoders, input_ids: torch.Tensor) -> torch.Tensor:
    """Token ids `(batch, length)` -> the same for each encoder, `(batch, encoders, length)`."""
    return input_ids[:, None].expand(-1, len(encoders.encoders), -1)


class DiffusionLoss(nn.Module):
    """UNet after frozen text encoders: the mean squared error of v, trimmed where so little noise is left that only
    texture is to be found.

    A step's weight is 1 up to a signal-to-noise ratio of `snr_gamma` and falls as `snr_gamma / snr` beyond: the cap of
    min-SNR (Hang et al. 2023, arXiv:2303.09556), without its discount of the noisiest steps, where words decide most.

    Some captions are *condensed*: `adjectives` are taken out of the text, and the embeddings of the `nouns` come from
    the caption with them. One vector per object then has to carry its whole look, as the name of a well-known dog
    does for a model that has read the web, and as a residual embedding does. The pooled embedding is the bare text's.

    Of two encoders, sometimes one alone is *carrying*: the other's columns are zero, in a condensed caption its nouns
    stay bare. Each is then listened to.
    """

    adjectives: torch.Tensor
    nouns: torch.Tensor
    encoder_of_column: torch.Tensor

    def __init__(
        self,
        encoders: TextEncoders,
        unet: UNet2DConditionModel,
        snr_gamma: float,
        adjectives: Sequence[int],
        nouns: Sequence[int],
    ):
        super().__init__()
        self.encoders, self.unet, self.snr_gamma = encoders.requires_grad_(False), unet, snr_gamma
        self.end = text_configs(encoders)[0].eos_token_id
        widths = [config.hidden_size for config in text_configs(encoders)]
        buffers = {
            "adjectives": torch.tensor(adjectives),
            "nouns": torch.tensor(nouns),
            "encoder_of_column": torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self.schedule = DDPMScheduler(**NOISE)

    @torch.no_grad()
    def embed(
        self, input_ids: torch.Tensor, condensed: torch.Tensor, carrying: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompt embeddings `(batch, 77, width)` and pooled ones `(batch, pooled width)` (None of one encoder).

        Args:
            input_ids: `(batch, 77)`.
            condensed: `(batch,)` bool.
            carrying: `(batch, encoders)` bool. Where none does, all is zero.
        """
        whole, pooled = self.encoders(for_each(self.encoders, input_ids))
        carried = carrying[:, None, self.encoder_of_column]
        embeds = torch.where(carried, whole, 0.0)
        if pooled is not None:
            pooled = torch.where(carrying[:, -1:], pooled, 0.0)
        if not condensed.any():
            return embeds, pooled
        input_ids, whole, carried = input_ids[condensed], whole[condensed], carried[condensed]
        adjectives = torch.isin(input_ids, self.adjectives)
        order = adjectives.int().argsort(dim=1, stable=True)  # the words that stay, in their order, then the others
        kept = torch.arange(MAX_TOKENS, device=order.device) < MAX_TOKENS - adjectives.sum(dim=1, keepdim=True)
        bare_ids = torch.where(kept, input_ids.gather(1, order), self.end)
        bare, bare_pooled = self.encoders(for_each(self.encoders, bare_ids))
        nouns = torch.isin(bare_ids, self.nouns)[:, :, None]
        moved = whole.gather(1, order[:, :, None].expand_as(whole))
        embeds[condensed] = torch.where(nouns & carried, moved, bare).to(embeds.dtype)
        if pooled is not None:
            pooled[condensed] = bare_pooled.to(pooled.dtype)
        return embeds, pooled

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        input_ids: torch.Tensor,
        condensed: torch.Tensor,
        carrying: torch.Tensor,
        time_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """`latents`, `noise`: `(batch, 4, h, w)`; `timesteps`: `(batch,)`; `time_ids`: `(batch, 6)`, the sizes that
        Stable Diffusion XL's UNet reads; the rest as in `embed`."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = self.schedule.get_velocity(latents, noise, timesteps)
        prompt_embeds, pooled = self.embed(input_ids, condensed, carrying)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        prediction = self.unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=added).sample.float()
        alphas = self.schedule.alphas_cumprod.to(latents.device)[timesteps]
        weights = (self.snr_gamma * (1 - alphas) / alphas).clamp(max=1.0)
        errors = (prediction - target).square().mean(dim=(1, 2, 3))
        return {"loss": (weights * errors).sum() / weights.sum(), "mse": errors.mean().detach()}
