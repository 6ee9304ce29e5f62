"""The three ways to learn: what is tuned, and how the residual comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from multisubject.training.concepts import Concept, Prompts
from multisubject.training.config import TrainConfig
from multisubject.training.models import Models, TextEncoders


class Learner(nn.Module):
    """What the loop asks of a method: embeddings for a batch of prompts, parameters to tune, and the delta so far."""

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the prompts `(batch,)` -> embeddings `(batch, length, embed_dim)`, and a penalty for the loss."""
        raise NotImplementedError

    def residual(self) -> torch.Tensor:
        """The delta as it would be saved now: float32 `(num_tokens, embed_dim)` on the CPU."""
        raise NotImplementedError

    def tuned(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name: all that a checkpoint has to hold of the learner."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class ResidualLearner(Learner):
    """The delta is the only parameter, added to frozen embeddings; gradients never enter the text encoder.

    Args:
        prompts: the prompts to learn in.
        unet: whose keys are to stay where they are.
        key_preservation: weight of how far they move, see `key_metric`.
        scale: `(embed_dim,)`, in whose lengths the parameter is measured, see `word_scale`; None: 1.
    """

    scale: torch.Tensor
    base_embeds: torch.Tensor
    positions: torch.Tensor
    metric: torch.Tensor

    def __init__(
        self,
        prompts: Prompts,
        unet: nn.Module | None = None,
        key_preservation: float = 0.0,
        scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        embed_dim = prompts.base_embeds.shape[2]
        self.delta = nn.Parameter(torch.zeros(prompts.positions.shape[1], embed_dim))
        self.register_buffer("scale", torch.ones(embed_dim) if scale is None else scale, persistent=False)
        self.register_buffer("base_embeds", prompts.base_embeds, persistent=False)
        self.register_buffer("positions", prompts.positions, persistent=False)

        self.key_preservation = key_preservation
        if key_preservation:
            assert unet is not None
            words = prompts.base_embeds[torch.arange(len(prompts.positions))[:, None], prompts.positions]
            self.register_buffer("metric", key_metric(unet, words), persistent=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frozen embeddings plus the delta; the penalty is how far the subject's keys have moved."""
        delta = self.scale * self.delta
        penalty = delta.new_zeros(())
        if self.key_preservation:
            moved = torch.einsum("td,tde,te->t", delta, self.metric, delta)
            penalty = self.key_preservation * moved.mean()
        return with_residual(self.base_embeds[rows], self.positions[rows], delta), penalty

    def residual(self) -> torch.Tensor:
        """The parameter at its scale."""
        return (self.scale * self.delta).detach().float().cpu()


class TextEncoderLearner(Learner):
    """Cones 2 (arXiv:2305.19327): tune the encoder, hold every other token's embedding in place, then take the mean
    change at the subject's tokens. With LoRA layers in the encoder, only those are tuned.

    Args:
        prompts: the prompts to learn in.
        rows: of them, those that the residual is averaged over.
        text_encoders: to be tuned in place, a `TextEncoders` or one with LoRA layers.
        config: how much drift costs.
        scale: `(embed_dim,)`, in whose lengths drift is measured, see `word_scale`; None: 1.
    """

    scale: torch.Tensor
    input_ids: torch.Tensor
    base_embeds: torch.Tensor
    positions: torch.Tensor

    def __init__(
        self,
        prompts: Prompts,
        rows: list[int],
        text_encoders: nn.Module,
        config: TrainConfig,
        scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.text_encoders = text_encoders
        self.rows = rows
        embed_dim = prompts.base_embeds.shape[2]
        self.register_buffer("scale", torch.ones(embed_dim) if scale is None else scale, persistent=False)
        self.weights = (config.preservation_before, config.preservation_after)
        self.register_buffer("input_ids", prompts.input_ids, persistent=False)
        self.register_buffer("base_embeds", prompts.base_embeds, persistent=False)
        self.register_buffer("positions", prompts.positions, persistent=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tuned embeddings; the penalty is how far the other tokens have drifted, before and after the subject's."""
        # Half precision's rounding is larger than the drift that the penalty is about.
        with torch.autocast(rows.device.type, enabled=False):
            embeds, _ = self.text_encoders(self.input_ids[rows])
        drift = (embeds - self.base_embeds[rows]) / self.scale  # [B, L, D]
        token = torch.arange(drift.shape[1], device=drift.device)
        before = (token < self.positions[rows, :1])[..., None]  # [B, L, 1]
        after = (token > self.positions[rows, -1:])[..., None]
        lengths = [torch.linalg.vector_norm(drift * part, dim=(1, 2)).mean() for part in (before, after)]
        return embeds, self.weights[0] * lengths[0] + self.weights[1] * lengths[1]

    @torch.no_grad()
    def residual(self) -> torch.Tensor:
        """Mean over the training prompts of tuned minus base at the subject's tokens."""
        changes = []
        for chunk in torch.tensor(self.rows, device=self.positions.device).split(16):
            change = self.text_encoders(self.input_ids[chunk])[0] - self.base_embeds[chunk]
            changes.append(change[torch.arange(len(chunk))[:, None], self.positions[chunk]])  # [B, num_tokens, D]
        return torch.cat(changes).mean(0).float().cpu()


def with_residual(prompt_embeds: torch.Tensor, positions: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`delta` `(num_tokens, embed_dim)` added to `(batch, length, embed_dim)` at `positions` `(batch, num_tokens)`."""
    batch, _, embed_dim = prompt_embeds.shape
    index = positions[..., None].expand(-1, -1, embed_dim)
    return prompt_embeds.scatter_add(1, index, delta.to(prompt_embeds).expand(batch, -1, -1))


def key_metric(unet: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """How far a change of a word's embedding moves its keys, in lengths of these keys.

    Args:
        unet: with `Attention` layers.
        words: `(prompts, num_tokens, embed_dim)`, the class phrase's embeddings.

    Returns:
        `(num_tokens, embed_dim, embed_dim)` float32: `delta @ metric @ delta` is the mean over the layers of
        cross-attention of `|W_k delta|^2 / |W_k word|^2`, the latter as its mean over the prompts.
    """
    layers = [module for module in unet.modules() if isinstance(module, Attention) and module.is_cross_attention]
    weights = [layer.to_k.weight.detach().float() for layer in layers]
    lengths = [(words.float() @ weight.T).square().sum(dim=-1).mean(dim=0) for weight in weights]  # [num_tokens]
    metrics = [weight.T @ weight / length[:, None, None] for weight, length in zip(weights, lengths, strict=True)]
    return torch.stack(metrics).mean(dim=0)


def word_scale(prompts: Prompts, rows: list[int], widths: Sequence[int]) -> torch.Tensor:
    """How large the class words' embeddings are, `(embed_dim,)`: the root of their mean square in each text encoder.

    Args:
        prompts: the prompts.
        rows: of them, those that are learnt with.
        widths: columns of each text encoder.
    """
    places = prompts.positions[rows]  # [prompts, num_tokens]
    words = prompts.base_embeds[torch.tensor(rows, device=places.device)[:, None], places]
    sizes = [part.square().mean().sqrt() for part in words.split(list(widths), dim=-1)]
    return torch.cat([size.expand(width) for size, width in zip(sizes, widths, strict=True)])


def make_learner(concept: Concept, models: Models, text_encoders: TextEncoders | None) -> Learner:
    """The learner of `--method`. Encoders that are given are tuned in place."""
    config, prompts = concept.config, concept.prompts
    rows = sorted({row for picture in concept.pictures for row in picture.rows})
    # Before an encoder's final norm, which Stable Diffusion XL does without, its output has a size of its own.
    scale = word_scale(prompts, rows, [*models.widths.values()]) if models.is_xl else None
    if config.method == "residual":
        return ResidualLearner(prompts, models.unet, config.key_preservation, scale)
    assert text_encoders is not None
    tuned: nn.Module = text_encoders
    if config.method == "text_encoder":
        text_encoders.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        layers = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # every process starts from the same layers
            tuned = cast(nn.Module, get_peft_model(text_encoders, layers))
    text_encoders.freeze_unread()
    if config.gradient_checkpointing:
        text_encoders.enable_gradient_checkpointing()
    return TextEncoderLearner(prompts, rows, tuned, config, scale)
