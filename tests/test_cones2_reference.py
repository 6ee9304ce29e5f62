"""`guidance_method="cones2"` against Cones 2 by the book: dense attention, one sample at a time, formulas written out.

Nothing here uses the package's own maps, bias, attention or recurrence: regions are measured cell by cell, the product
of queries and keys is materialised, unconditional and conditional prompts have their own UNet calls, and the samplers
are written out in the sigma and the alpha_bar parametrisation.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import assert_equal_up_to_rounding
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler

from multisubject.guidance_methods import GUIDANCE_METHODS, AttentionLayer

GUIDANCE_WEIGHT, WEIGHT_NEGATIVE, WEIGHT, CFG = 0.08, -1e8, 2.5, 5.0
PROMPT = "a red dog, a blue ball, a mug and a person"
# Phrase -> its token positions (0 is the start token) and its box (xmin, ymin, xmax, ymax). The last box covers less
# than a cell of the coarser levels.
REGIONS = {
    "red dog": ([2, 3], (0.0, 0.1, 0.45, 1.0)),
    "blue ball": ([6, 7], (0.55, 0.0, 1.0, 0.6)),
    "person": ([13], (0.55, 0.65, 1.0, 1.0)),
    "mug": ([10], (0.47, 0.02, 0.53, 0.07)),
}
SIZES = [(32, 32), (40, 24), (24, 56)]  # picture (height, width); latents have half of it


def covered(low: float, high: float, cell: int, cells: int) -> float:
    """Share of a cell that lies between two fractions of the axis."""
    return max(0.0, min(high * cells, cell + 1) - max(low * cells, cell))


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """The three resolutions of the tiny UNets."""
    return [(math.ceil(height / n), math.ceil(width / n)) for n in (1, 2, 4)]


def signed_weights(num_regions: int, height: int, width: int, num_tokens: int) -> torch.Tensor:
    """W of Cones 2, `(height * width, tokens)`, cell by cell."""
    weights = torch.zeros(height * width, num_tokens)
    for positions, (xmin, ymin, xmax, ymax) in list(REGIONS.values())[:num_regions]:
        share = torch.tensor(
            [
                covered(ymin, ymax, y, height) * covered(xmin, xmax, x, width)
                for y in range(height)
                for x in range(width)
            ]
        )
        share[share.argmax()] = 1.0  # a region keeps its best cell
        for position in positions:
            weights[:, position] = torch.tensor(
                [WEIGHT * float(part) if part >= 0.5 else WEIGHT_NEGATIVE for part in share]
            )
    return weights


def cones2_logits(query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, sigma: float) -> torch.Tensor:
    """One sample: query `(heads, queries, dim)`, key `(heads, tokens, dim)` -> logits before the softmax."""
    products = query @ key.transpose(-1, -2)
    strength = GUIDANCE_WEIGHT * math.log(1 + sigma**2)
    return (products + strength * weights * products.std()) / math.sqrt(query.shape[-1])


class DenseProcessor:
    """Attention with a materialised matrix, for a batch of one."""

    def __init__(self, num_regions: int, height: int, width: int):
        self.levels = {h * w: signed_weights(num_regions, h, w, 77) for h, w in level_sizes(height, width)}
        self.sigma: float | None = None  # None: not guided

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            torch.stack(layer(states)[0].chunk(attn.heads, dim=-1))
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        weights = torch.zeros(query.shape[1], key.shape[1])
        if encoder_hidden_states is not None and self.sigma is not None:
            weights = self.levels[query.shape[1]]
        probabilities = cones2_logits(query, key, weights, self.sigma or 0.0).softmax(dim=-1)
        return attn.to_out[0](torch.cat(list(probabilities @ value), dim=-1))[None]


def by_the_book(
    pipe: Any, num_regions: int, noise: torch.Tensor, steps: int, guided: int, visits: int, generator: torch.Generator
) -> torch.Tensor:
    """A whole run with DDIM, Euler or LMS of order 1: final latents `(1, 4, h, w)`."""
    conditional, unconditional = pipe.encode_prompt(PROMPT, "cpu", 1, True, "")
    scheduler, unet = type(pipe.scheduler).from_config(pipe.scheduler.config), pipe.unet
    scheduler.set_timesteps(steps)
    in_sigmas = not isinstance(scheduler, DDIMScheduler)
    epsilon_prediction = scheduler.config.prediction_type == "epsilon"
    processor = DenseProcessor(num_regions, *noise.shape[-2:])
    original = dict(unet.attn_processors)
    unet.set_attn_processor(processor)
    x = noise * scheduler.init_noise_sigma
    try:
        for i, t in enumerate(scheduler.timesteps):
            if in_sigmas:
                sigma, next_sigma = float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1])
                alpha = 1 / (1 + sigma**2)
            else:
                previous = int(t) - 1000 // steps
                alpha = float(scheduler.alphas_cumprod[int(t)])
                next_alpha = float(scheduler.alphas_cumprod[max(previous, 0)])
                sigma, next_sigma = ((1 / a - 1) ** 0.5 for a in (alpha, next_alpha))
            for visit in range(visits if i < guided else 1):
                scaled = x * alpha**0.5 if in_sigmas else x  # what the UNet sees has variance one
                processor.sigma = None
                free = unet(scaled, t, unconditional).sample
                processor.sigma = sigma if i < guided else None
                output = free + CFG * (unet(scaled, t, conditional).sample - free)
                if epsilon_prediction:
                    epsilon = output
                else:
                    epsilon = alpha**0.5 * output + (1 - alpha) ** 0.5 * scaled
                clean = (scaled - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
                again = i < guided and visit + 1 < visits
                fresh = torch.randn(x.shape, generator=generator) if again else torch.zeros_like(x)
                # In sigmas: x = clean + sigma * epsilon; the step's noise goes back on top.
                x = clean + next_sigma * epsilon + max(sigma**2 - next_sigma**2, 0) ** 0.5 * fresh
                if not in_sigmas:
                    x = x * (alpha if again else next_alpha) ** 0.5
    finally:
        unet.set_attn_processor(original)
    return x


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_regions", [1, 2, 3, 4])
def test_logits_equal_the_dense_formula(sd1_pipe, size, num_regions):
    layers: list[tuple[AttentionLayer, torch.Tensor]] = []

    def spy(layer):
        bias = GUIDANCE_METHODS["cones2"](layer)
        if layer.is_cross:
            layers.append((layer, bias))
        return bias

    run(sd1_pipe, num_regions, size, steps=2, guidance_method=spy)

    assert len(layers) == 2 * 10
    levels = {math.prod(level): level for level in level_sizes(size[0] // 2, size[1] // 2)}
    for layer, bias in layers:
        weights = signed_weights(num_regions, *levels[layer.query.shape[2]], 77)
        expected = cones2_logits(layer.query[0], layer.key[0], weights, float(layer.step.sigma))
        logits = (layer.query @ layer.key.transpose(-1, -2) * layer.scale + bias)[0]
        hidden = expected < -1e4
        assert_equal_up_to_rounding(logits[~hidden], expected[~hidden])
        if hidden.any():
            assert_equal_up_to_rounding(logits[hidden] / expected[hidden], torch.ones_like(expected[hidden]))


def run(pipe: Any, num_regions: int, size: tuple[int, int], steps: int, **kwargs: Any) -> torch.Tensor:
    layout = {phrase: box for phrase, (_, box) in list(REGIONS.items())[:num_regions]}
    noise = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(5))
    return pipe(
        PROMPT,
        guidance_method=kwargs.pop("guidance_method", "cones2"),
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        layout=layout,
        latents=noise,
        guidance_scale=CFG,
        output_type="latent",
        **kwargs,
    ).images


@pytest.mark.parametrize(
    ("kind", "size", "num_regions", "scheduler_class", "recurrence", "guidance_steps"),
    [
        ("sd1", SIZES[0], 1, EulerDiscreteScheduler, 1, 3),
        ("sd2", SIZES[1], 2, DDIMScheduler, 1, 3),
        ("sd1", SIZES[2], 4, DDIMScheduler, 1, 2),
        ("sd1", SIZES[0], 2, LMSDiscreteScheduler, 2, 3),
        ("sd1", SIZES[1], 4, DDIMScheduler, 2, 3),
        ("sd2", SIZES[2], 3, EulerDiscreteScheduler, 2, 2),
    ],
)
def test_whole_run_equals_the_book(request, kind, size, num_regions, scheduler_class, recurrence, guidance_steps):
    pipe = request.getfixturevalue(f"{kind}_pipe")
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)

    latents = run(
        pipe,
        num_regions,
        size,
        steps=3,
        guidance_steps=guidance_steps,
        recurrence=recurrence,
        generator=torch.Generator().manual_seed(6),
    )

    noise = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    expected = by_the_book(pipe, num_regions, noise, 3, guidance_steps, recurrence, generator)
    assert_equal_up_to_rounding(latents, expected, 500)


def test_guidance_changes_the_reference_run_visibly(sd1_pipe):
    """Guards the comparisons above: with random weights the edit must still be far above their tolerance."""
    guided = run(sd1_pipe, 2, SIZES[0], steps=2)
    free = run(sd1_pipe, 2, SIZES[0], steps=2, guidance_steps=0)
    assert (guided - free).abs().max() > 1e-2
