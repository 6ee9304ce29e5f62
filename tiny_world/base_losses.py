"""The networks of the embedded base with their losses: one module each for autoencoder, text encoder and UNet."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from multisubject.tiny_world.words import ATTRIBUTES, MAX_TOKENS

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


class AutoencoderLoss(nn.Module):
    """AutoencoderKL with L1, edge and KL terms, all means over elements."""

    def __init__(self, vae: AutoencoderKL, edge_weight: float, kl_weight: float):
        super().__init__()
        self.vae, self.edge_weight, self.kl_weight = vae, edge_weight, kl_weight

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixels`: uint8 `(batch, 3, height, width)`; `noise`: standard normal of the latents' shape."""
        images = pixels.float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        l1, kl = error.abs().mean(), posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": l1 + self.edge_weight * edges + self.kl_weight * kl, "l1": l1.detach(), "kl": kl.detach()}


class CaptionLoss(nn.Module):
    """Text encoder: what every noun stands for, and what the whole caption tells, must be linear in the embeddings.

    This takes the place of CLIP's contrastive training, at the cost of a text-only classifier: at a noun, linear heads
    name the look that its adjectives give it; at the end of the text, the setting, and which categories and colours
    there are. As in Stable Diffusion the encoder is frozen afterwards.
    """

    def __init__(self, text_encoder: CLIPTextModel, classes: dict[str, int]):
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in classes.items()})

    def forward(
        self, input_ids: torch.Tensor, looks: torch.Tensor, settings: torch.Tensor, present: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`input_ids` `(batch, 77)`; `looks` `(batch, 77, attributes)` class numbers, -100 where no noun stands;
        `settings` `(batch,)` class numbers; `present` `(batch, categories and colours)` 0 or 1."""
        embeds = self.text_encoder(input_ids)[0]
        length = (input_ids == self.text_encoder.config.eos_token_id).int().argmax(dim=1)
        summary = embeds[torch.arange(len(embeds)), length] + embeds[:, -1]  # the first end token and the last padding
        nouns = (looks[..., 0] >= 0).flatten()
        at_nouns, looks = embeds.flatten(0, 1)[nouns], looks.flatten(0, 1)[nouns]
        of_looks = [
            nn.functional.cross_entropy(self.heads[name](at_nouns).float(), looks[:, column])
            for column, name in enumerate(ATTRIBUTES)
        ]
        setting = nn.functional.cross_entropy(self.heads["setting"](summary).float(), settings)
        things = nn.functional.binary_cross_entropy_with_logits(self.heads["present"](summary).float(), present)
        look = torch.stack(of_looks).mean()
        return {"loss": look + 0.25 * (setting + things), "look": look.detach(), "things": things.detach()}


class DiffusionLoss(nn.Module):
    """UNet after a frozen text encoder: the mean squared error of v, trimmed where so little noise is left that only
    texture is to be found.

    A step's weight is 1 up to a signal-to-noise ratio of `snr_gamma` and falls as `snr_gamma / snr` beyond: the cap of
    min-SNR (Hang et al. 2023, arXiv:2303.09556), without its discount of the noisiest steps, where words decide most.

    Some captions are *condensed*: `adjectives` are taken out of the text, and the embeddings of the `nouns` come from
    the caption with them. One vector per object then has to carry its whole look, as the name of a well-known dog
    does for a model that has read the web, and as a residual embedding does.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        snr_gamma: float,
        adjectives: list[int],
        nouns: list[int],
    ):
        super().__init__()
        self.text_encoder, self.unet, self.snr_gamma = text_encoder.requires_grad_(False), unet, snr_gamma
        self.adjectives, self.nouns = torch.tensor(adjectives), torch.tensor(nouns)
        self.schedule = DDPMScheduler(**NOISE)

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor, condensed: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings `(batch, 77, width)` of `input_ids` `(batch, 77)`; rows of `condensed` `(batch,)` bool."""
        whole = self.text_encoder(input_ids)[0]
        if not condensed.any():
            return whole
        input_ids, full = input_ids[condensed], whole[condensed]
        adjectives = torch.isin(input_ids, self.adjectives.to(input_ids.device))
        order = adjectives.int().argsort(dim=1, stable=True)  # the words that stay, in their order, then the others
        kept = torch.arange(MAX_TOKENS, device=order.device) < MAX_TOKENS - adjectives.sum(dim=1, keepdim=True)
        bare_ids = torch.where(kept, input_ids.gather(1, order), self.text_encoder.config.eos_token_id)
        nouns = torch.isin(bare_ids, self.nouns.to(bare_ids.device))[:, :, None]
        moved = full.gather(1, order[:, :, None].expand_as(full))
        prompt_embeds = whole.clone()
        prompt_embeds[condensed] = torch.where(nouns, moved, self.text_encoder(bare_ids)[0])
        return prompt_embeds

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        input_ids: torch.Tensor,
        condensed: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """`latents`, `noise`: `(batch, 4, h, w)`; `timesteps`, `condensed`: `(batch,)`; `input_ids`: `(batch, 77)`."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = self.schedule.get_velocity(latents, noise, timesteps)
        prompt_embeds = self.embed(input_ids, condensed)
        prediction = self.unet(noisy, timesteps, prompt_embeds).sample.float()
        alphas = self.schedule.alphas_cumprod.to(latents.device)[timesteps]
        weights = (self.snr_gamma * (1 - alphas) / alphas).clamp(max=1.0)
        errors = (prediction - target).square().mean(dim=(1, 2, 3))
        return {"loss": (weights * errors).sum() / weights.sum(), "mse": errors.mean().detach()}
