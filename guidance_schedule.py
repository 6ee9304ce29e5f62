"""What the scheduler says of a UNet call: whether it is guided, how strongly, and how much of the run is done."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from .guidance_methods import GuidanceStep

__multisubject_version__ = "0.1.0"


# Their sigmas are there, but no `alphas_cumprod`.
_EDM_SCHEDULERS = (EDMDPMSolverMultistepScheduler, EDMEulerScheduler)


class GuidanceSchedule:
    """One scheduler under `region_attention`, call after call.

    Args:
        scheduler: drives the UNet.
        guidance_weight, guidance_steps: as for `region_attention`.
    """

    def __init__(self, scheduler: Any, guidance_weight: float, guidance_steps: int | None):
        check_number("guidance_weight", guidance_weight)
        if not abs(guidance_weight) <= 1e6:
            raise ValueError(f"`guidance_weight` is {guidance_weight}, expected a number from -1e6 to 1e6.")
        if guidance_steps is not None and guidance_steps < 0:
            raise ValueError(f"`guidance_steps` is {guidance_steps}, expected at least 0, or None to guide all steps.")
        if not hasattr(scheduler, "alphas_cumprod") and not isinstance(scheduler, _EDM_SCHEDULERS):
            raise ValueError(
                f"{type(scheduler).__name__} has no `alphas_cumprod`, expected one of KarrasDiffusionSchedulers."
            )
        self.scheduler = scheduler
        self.guidance_weight, self.guidance_steps = guidance_weight, guidance_steps
        self.sigmas: torch.Tensor | None = None
        if hasattr(scheduler, "alphas_cumprod"):
            # Zero-terminal-SNR schedules end in alpha_bar = 0; diffusers' own floor keeps the noise level finite.
            alphas_cumprod = scheduler.alphas_cumprod.float().clamp(min=2**-24)
            self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        self.timesteps_of_run: torch.Tensor | None = None
        self.first_timestep: torch.Tensor | None = None
        self.last_timestep: torch.Tensor | None = None

    def is_guided(self, timestep: torch.Tensor) -> bool:
        """Whether this call is guided, decided on the host without waiting for the device where that is possible."""
        if self.guidance_steps == 0:
            return False
        if self.scheduler.timesteps is not self.timesteps_of_run:  # `set_timesteps` makes new ones
            self.timesteps_of_run, self.first_timestep = self.scheduler.timesteps, timestep
        steps = getattr(self.scheduler, "num_inference_steps", None)
        if self.guidance_steps is None or (steps is not None and self.guidance_steps >= steps):
            return True
        return self._steps_taken(timestep)[0] < self.guidance_steps

    def progress(self, timestep: torch.Tensor) -> float:
        """Share of the run's steps that lie behind at a call that `is_guided` has seen; on the host, as that one."""
        taken, of_run = self._steps_taken(timestep)
        return taken / max(of_run, 1)

    def _steps_taken(self, timestep: torch.Tensor) -> tuple[int, int]:
        """How many steps lie behind, and how many the run has."""
        scheduler = self.scheduler
        if hasattr(scheduler, "step_index"):
            first = getattr(scheduler, "begin_index", None) or 0  # image-to-image begins later
            return _step_index(scheduler), scheduler.num_inference_steps - first // scheduler.order
        # DDIM, DDPM and PNDM look their coefficients up by the timestep's value and so read it from the device anyway.
        if self.last_timestep is None or timestep > self.last_timestep:  # time runs backwards: a new run
            self.first_timestep = timestep
        self.last_timestep = timestep
        timesteps = scheduler.timesteps.to(timestep.device)
        timesteps = timesteps[timesteps <= self.first_timestep].unique()
        return int((timesteps > timestep).sum()), len(timesteps)

    def step(self, timestep: torch.Tensor) -> GuidanceStep:
        """What a guidance method is told of a guided call."""
        sigma = self._sigma(timestep)
        timesteps = self.scheduler.timesteps.to(timestep.device)
        assert self.first_timestep is not None
        self.first_timestep = torch.maximum(self.first_timestep, timestep)
        taken = timesteps <= self.first_timestep  # image-to-image begins later
        return GuidanceStep(
            sigma=sigma,
            strength=self.guidance_weight * (sigma**2).log1p(),
            progress=(taken & (timesteps > timestep)).sum() / taken.sum().clamp(min=1),
            time=timestep.float() / self.scheduler.config.num_train_timesteps,
        )

    def _sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Noise level at `timestep`, interpolated between training timesteps, on the timestep's device."""
        if self.sigmas is None:  # EDM's timesteps count no training steps
            return self.scheduler.sigmas[self.scheduler.step_index].to(timestep.device)
        self.sigmas = self.sigmas.to(timestep.device)
        timestep = timestep.clamp(0, len(self.sigmas) - 1)
        if not timestep.is_floating_point():
            return self.sigmas.take(timestep.long())
        position = timestep.float()
        below = position.floor().long()
        above = (below + 1).clamp(max=len(self.sigmas) - 1)
        # `take`, because indexing by a scalar tensor would wait for the device
        return torch.lerp(self.sigmas.take(below), self.sigmas.take(above), position.frac())


def _step_index(scheduler: Any) -> int:
    """0-based index of the step that a scheduler with a `step_index` is at, on the host; of a second-order step's two
    UNet calls both count as one."""
    first = getattr(scheduler, "begin_index", None) or 0
    index = first if scheduler.step_index is None else scheduler.step_index
    return (index - first) // scheduler.order


def check_number(name: str, value: Any) -> None:
    """Raise `TypeError` unless an argument is a number."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` is {value!r}, expected a number.")
