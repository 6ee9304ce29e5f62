"""The forms in which distilled models are sampled: one to eight steps, without classifier-free guidance."""

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler

LAYOUT = {"dog": (0, 0, 0.5, 1), "ball": (0.5, 0, 1, 1)}


def sample(pipe, steps, scale, **arguments):
    return pipe(
        "a dog and a ball",
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.parametrize("kind", ["sd1", "xl"])
@pytest.mark.parametrize(
    ("scheduler", "steps", "scale"),
    [
        (EulerAncestralDiscreteScheduler, 1, 0.0),  # Turbo
        (LCMScheduler, 4, 1.0),
        (EulerDiscreteScheduler, 4, 0.0),  # Lightning
        (TCDScheduler, 4, 0.0),
    ],
)
def test_a_layout_guides_every_step(kind, scheduler, steps, scale, request):
    """The pull follows the noise alone, so that four steps are pulled as hard as the same places of a longer run; the
    second half of them has open borders, which a single step has not."""
    pipe = request.getfixturevalue(f"{kind}_pipe")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    plain = sample(pipe, steps, scale)
    guided = sample(pipe, steps, scale, layout=LAYOUT)
    assert torch.isfinite(guided).all() and not torch.equal(plain, guided)

    told: dict[int, tuple[float, float]] = {}  # timestep in thousandths -> strength, progress

    def spy(layer):
        assert len(layer.query) == 1  # no unconditional half
        told[round(1000 * float(layer.step.time))] = float(layer.step.strength), float(layer.step.progress)

    sample(pipe, steps, scale, layout=LAYOUT, guidance_method=spy)
    noise = pipe.scheduler.alphas_cumprod.reciprocal().log()  # log(1 + sigma ** 2)
    assert [progress for _, progress in told.values()] == [index / steps for index in range(steps)]
    assert [strength for strength, _ in told.values()] == pytest.approx([0.08 * float(noise[at]) for at in told], 1e-3)
    assert max(told) == 999

    maps = pipe(
        "a dog and a ball", num_inference_steps=steps, guidance_scale=scale, layout=LAYOUT, output_attention_maps=True
    ).attention_maps[0]
    for name, inside in (("dog", slice(None, -1)), ("ball", slice(1, None))):  # but for the cells at the border
        first = maps[name][0]  # later steps open the borders
        left, right = (first[:, part] for part in (slice(None, first.shape[1] // 2), slice(first.shape[1] // 2, None)))
        own, other = (left, right) if name == "dog" else (right, left)
        assert other.max() < 1e-6 < own[:, inside].min()
