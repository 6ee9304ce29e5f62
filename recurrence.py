"""Self-recurrence: a scheduler that takes each of its first steps several times."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

__multisubject_version__ = "0.1.0"


@contextmanager
def recurrent_steps(
    pipeline: Any, recurrence: int, steps: int | None, generator: torch.Generator | list[torch.Generator] | None
) -> Iterator[None]:
    """Within the context, the pipeline's scheduler takes each of its first `steps` steps `recurrence` times."""
    if recurrence == 1 or steps == 0:
        yield
        return
    scheduler = pipeline.scheduler
    try:
        pipeline.scheduler = RecurrentScheduler(scheduler, recurrence, steps, generator)
        yield
    finally:
        pipeline.scheduler = scheduler


class RecurrentScheduler:
    """A scheduler that takes its first steps several times: step, add the step's noise back, step again.

    Self-recurrence as in Cones 2: between two visits the noise `sqrt(sigma_i² - sigma_{i+1}²)` is added to the sample
    in the sigma parametrisation (Euler, LMS). For schedulers that scale the sample by `sqrt(alpha_bar)` (DDIM, DDPM)
    the same is the forward process from `alpha_bar_{i+1}` back to `alpha_bar_i`. LMS runs at order 1, because its
    history of derivatives is one of another trajectory after a revisit.

    Args:
        scheduler: one of `DDIMScheduler`, `DDPMScheduler`, `EulerDiscreteScheduler`,
            `EulerAncestralDiscreteScheduler`, `LMSDiscreteScheduler`; everything else is looked up on it.
        recurrence: visits per step, at least 2.
        steps: how many of the first steps are taken repeatedly; None: all.
        generator: makes the noise; a list: one per sample.
    """

    def __init__(
        self,
        scheduler: Any,
        recurrence: int,
        steps: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ):
        self._in_sigmas = isinstance(
            scheduler, (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler)
        )
        if not self._in_sigmas and not isinstance(scheduler, (DDIMScheduler, DDPMScheduler)):
            raise ValueError(
                f"`recurrence` is {recurrence}, but {type(scheduler).__name__} cannot take a step twice: it builds on"
                " its former steps. Use DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler,"
                " EulerAncestralDiscreteScheduler or LMSDiscreteScheduler, or recurrence=1."
            )
        self._scheduler, self._recurrence, self._steps, self._generator = scheduler, recurrence, steps, generator
        self._calls = 0
        # Pipelines read the signatures of these two.
        self.set_timesteps = functools.wraps(scheduler.set_timesteps)(
            lambda *args, **kw: self._set_timesteps(*args, **kw)
        )
        self.step = functools.wraps(scheduler.step)(lambda *args, **kwargs: self._step(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self._scheduler.set_timesteps(*args, **kwargs)
        timesteps = self._scheduler.timesteps
        repeated = len(timesteps) if self._steps is None else min(self._steps, len(timesteps))
        visits = torch.ones(len(timesteps), dtype=torch.long, device=timesteps.device)
        visits[:repeated] = self._recurrence
        self.timesteps = timesteps.repeat_interleave(visits)
        self._num_revisits = repeated * self._recurrence
        self._calls = 0

    def _step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        self._calls += 1
        again = self._calls <= self._num_revisits and self._calls % self._recurrence != 0
        index = self._scheduler.step_index if self._in_sigmas else None
        if isinstance(self._scheduler, LMSDiscreteScheduler):
            kwargs["order"] = 1
        kwargs["return_dict"] = False
        sample, *rest = self._scheduler.step(model_output, timestep, sample, **kwargs)
        if again:
            noise = randn_tensor(sample.shape, generator=self._generator, device=sample.device, dtype=sample.dtype)
            if index is not None:
                self._scheduler._step_index = index
                sigma, next_sigma = self._scheduler.sigmas[index], self._scheduler.sigmas[index + 1]
                sample = sample + (sigma**2 - next_sigma**2).sqrt() * noise
            else:
                kept = self._kept_signal(timestep)
                sample = kept.sqrt() * sample + (1 - kept).sqrt() * noise
        return (sample, *rest)

    def _kept_signal(self, timestep: Any) -> torch.Tensor:
        """`alpha_bar` at `timestep` over that at the timestep which the scheduler steps to from there."""
        scheduler = self._scheduler
        if isinstance(scheduler, DDPMScheduler):
            next_timestep, last_alpha = scheduler.previous_timestep(timestep), scheduler.one
        else:
            stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            next_timestep, last_alpha = timestep - stride, scheduler.final_alpha_cumprod
        next_alpha = scheduler.alphas_cumprod[next_timestep] if next_timestep >= 0 else last_alpha
        return scheduler.alphas_cumprod[timestep] / next_alpha
