"""Layout guidance by gradients of the latents (Chen et al. 2023, arXiv:2304.03373): the way that costs backward passes.

Before each of the first steps the latents move down the gradient of an energy, which is low where every placed token
spends its attention inside its region. It is no bias of the attention, so it lives here and not among
`guidance_methods`; it sees the layers by the same door, as a guidance method that returns no bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from multisubject.guidance_methods import AttentionLayer


def layout_energy(layer: AttentionLayer) -> torch.Tensor:
    """Per image, the mean over heads and placed tokens of `(1 - share inside) ** 2`: `(B,)` float32."""
    logits = layer.query.float() @ layer.key.float().transpose(-1, -2) * layer.scale  # [B, heads, Q, T]
    # A token's attention over its sum over all places; by logarithms, because a token may get none anywhere.
    shares = logits.log_softmax(dim=-1).softmax(dim=2)
    inside = torch.einsum("bhqt,brq->bhrt", shares, layer.maps.inside.to(shares.dtype))
    energy = (1 - inside).square().mean(dim=1)  # [B, R, T]
    tokens = layer.maps.tokens.to(energy.dtype)
    per_region = (energy * tokens).sum(dim=2) / tokens.sum(dim=2).clamp(min=1)
    return per_region.sum(dim=1) / tokens.any(dim=2).sum(dim=1)


class LayoutGuidance:
    """A guidance method for `MultiSubjectPipeline`, to be used inside `attached(pipe)`, with DDIM.

    Args:
        scale: step length of the descent; times the noise's share of the variance. 30 in the published settings.
        threshold: an image whose energy is below is left alone.
        max_iterations: most steps of descent per step of the scheduler.
        guided_share: share of the scheduler's steps, from the first, that are guided; published: 10 of 51.
        coarsest: 1 takes the UNet's coarsest level with cross-attention, 2 the two coarsest.
    """

    def __init__(
        self,
        scale: float = 30.0,
        threshold: float = 0.2,
        max_iterations: int = 5,
        guided_share: float = 0.2,
        coarsest: int = 1,
    ):
        self.scale, self.threshold, self.max_iterations = scale, threshold, max_iterations
        self.guided_share, self.coarsest = guided_share, coarsest
        self._energies: list[tuple[int, torch.Tensor]] | None = None

    def __call__(self, layer: AttentionLayer) -> None:
        """Note the energy of a layer of cross-attention."""
        if self._energies is not None and layer.is_cross:
            self._energies.append((layer.query.shape[2], layout_energy(layer)))

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[None]:
        """Within the context, calls of `pipe` with this object as `guidance_method` descend before their steps."""
        unet, scheduler = pipe.unet, pipe.scheduler
        step = scheduler.step
        moved: torch.Tensor | None = None

        def before_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal moved
            moved = None
            position = int((scheduler.timesteps > args[1]).sum())
            if self._energies is not None or position >= self.guided_share * len(scheduler.timesteps):
                return None
            half = len(args[0]) // 2
            noise_share = float(1 - scheduler.alphas_cumprod[int(args[1])])
            moved = self._descend(module, args[0][half:], args[1], kwargs["encoder_hidden_states"][half:], noise_share)
            return (torch.cat([moved, moved]), *args[1:]), kwargs

        def step_from_moved(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any) -> Any:
            return step(output, timestep, sample if moved is None else moved, *args, **kw)

        handle = unet.register_forward_pre_hook(before_call, with_kwargs=True)
        scheduler.step = step_from_moved
        try:
            yield
        finally:
            handle.remove()
            del scheduler.step

    def _descend(
        self, unet: Any, latents: torch.Tensor, timestep: Any, prompt_embeds: torch.Tensor, noise_share: float
    ) -> torch.Tensor:
        """`latents` `(B, 4, h, w)` -> moved ones; `noise_share` is `1 - alpha_bar`."""
        # `scale * sigma²` in the sigma parametrisation is this for latents that are scaled by sqrt(alpha_bar).
        length = self.scale * noise_share
        for _ in range(self.max_iterations):
            latents = latents.detach().requires_grad_()
            self._energies = []
            try:
                with torch.enable_grad():
                    unet(latents, timestep, encoder_hidden_states=prompt_embeds)
                    levels = sorted({queries for queries, _ in self._energies})[: self.coarsest]
                    chosen = [energy for queries, energy in self._energies if queries in levels]
                    energy = torch.stack(chosen).mean(dim=0)  # [B]
                    (gradient,) = torch.autograd.grad(energy.sum(), latents)
            finally:
                self._energies = None
            unsettled = (energy.detach() > self.threshold)[:, None, None, None]
            latents = latents.detach() - length * gradient * unsettled
            if not unsettled.any():
                break
        return latents
