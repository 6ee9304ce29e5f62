"""A scheduler that takes each of its first steps several times, and one after whose steps objects are moved."""

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

from .region_moves import RegionMover

__multisubject_version__ = "0.1.0"

_IN_SIGMAS = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler)
_IN_ALPHAS = (DDIMScheduler, DDPMScheduler)


def builds_on_former_steps(scheduler: Any) -> bool:
    """Whether a scheduler's steps follow from more than the sample: after a change of that they would go astray."""
    return not isinstance(scheduler, (*_IN_SIGMAS, *_IN_ALPHAS)) or isinstance(scheduler, LMSDiscreteScheduler)


@contextmanager
def recurrent_steps(
    pipeline: Any,
    recurrence: int,
    steps: int | None,
    generator: torch.Generator | list[torch.Generator] | None,
    mover: RegionMover | None = None,
) -> Iterator[None]:
    """Within the context, the pipeline's scheduler takes each of its first `steps` steps `recurrence` times, and
    `mover` moves objects after some of its steps."""
    if (recurrence == 1 or steps == 0) and mover is None:
        yield
        return
    scheduler = pipeline.scheduler
    try:
        pipeline.scheduler = RecurrentScheduler(scheduler, recurrence, steps, generator, mover)
        yield
    finally:
        pipeline.scheduler = scheduler


class RecurrentScheduler:
    """A scheduler that takes its first steps several times: step, add the step's noise back, step again.

    Self-recurrence as in Cones 2: between two visits the noise `sqrt(sigma_i² - sigma_{i+1}²)` is added to the sample
    in the sigma parametrisation (Euler, LMS). For schedulers that scale the sample by `sqrt(alpha_bar)` (DDIM, DDPM)
    the same is the forward process from `alpha_bar_{i+1}` back to `alpha_bar_i`. LMS runs at order 1, because its
    history of derivatives is one of another trajectory after a revisit or a move.

    Args:
        scheduler: one of `DDIMScheduler`, `DDPMScheduler`, `EulerDiscreteScheduler`,
            `EulerAncestralDiscreteScheduler`, `LMSDiscreteScheduler`; everything else is looked up on it.
        recurrence: visits per step, at least 1.
        steps: how many of the first steps are taken repeatedly; None: all.
        generator: makes the noise; a list: one per sample.
        mover: moves objects after the last visit of a step, if it has seen any.
    """

    def __init__(
        self,
        scheduler: Any,
        recurrence: int,
        steps: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        mover: RegionMover | None = None,
    ):
        self._in_sigmas = isinstance(scheduler, _IN_SIGMAS)
        if not isinstance(scheduler, (*_IN_SIGMAS, *_IN_ALPHAS)):
            asked, cannot = f"`recurrence` is {recurrence}", "take a step twice"
            if mover is not None:
                asked, cannot = f"`moves` is {[*mover.at]}", "go on from a sample that was changed"
            raise ValueError(
                f"{asked}, but {type(scheduler).__name__} cannot {cannot}: it builds on its former steps. Use"
                " DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler or"
                f" LMSDiscreteScheduler, or {'recurrence=1' if mover is None else 'give [] to move nothing'}."
            )
        self._mover = mover
        self._scheduler, self._recurrence, self._steps, self._generator = scheduler, recurrence, steps, generator
        self._calls = 0
        # Pipelines read the signatures of these two.
        self.set_timesteps = functools.wraps(scheduler.set_timesteps)(
            lambda *args, **kw: self._set_timesteps(*args, **kw)
        )
        self.step = functools.wraps(scheduler.step)(lambda *args, **kwargs: self._step(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name == "_scheduler":  # of one that is being copied
            raise AttributeError(name)
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
        if self._mover is not None:
            self._mover.start(len(timesteps))

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
                kept = self._scheduler.alphas_cumprod[timestep] / self._next_alpha(timestep)
                sample = kept.sqrt() * sample + (1 - kept).sqrt() * noise
        elif self._mover is not None:
            if self._mover.looks_at():
                if index is not None:
                    sigma = self._scheduler.sigmas[index + 1].to(sample.device)
                    levels = torch.ones_like(sigma), sigma
                else:
                    alpha = self._next_alpha(timestep).to(sample.device)
                    levels = alpha.sqrt(), (1 - alpha).sqrt()
                with torch.autocast(sample.device.type, enabled=False):
                    sample = self._mover.move(sample, rest[0], *levels, self._generator)
            self._mover.go_on()
        return (sample, *rest)

    def _next_alpha(self, timestep: Any) -> torch.Tensor:
        """`alpha_bar` at the timestep which the scheduler steps to from `timestep`."""
        scheduler = self._scheduler
        if isinstance(scheduler, DDPMScheduler):
            next_timestep, last_alpha = scheduler.previous_timestep(timestep), scheduler.one
        else:
            stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
            next_timestep, last_alpha = timestep - stride, scheduler.final_alpha_cumprod
        return scheduler.alphas_cumprod[next_timestep] if next_timestep >= 0 else last_alpha
