"""One training loop for every network of the embedded world: seeded, resumable, on one or several processes.

All randomness of step `k` comes from a generator seeded by `(seed, k)`, on the device that trains, and drawn for the
whole batch before it is split over the processes. A resumed run therefore repeats an uninterrupted one exactly, and two
processes compute what one process with the whole batch computes, up to the order of floating-point sums.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from tqdm.auto import tqdm

from multisubject.subject_file import write_atomically
from multisubject.training.devices import cpu_has_bfloat16
from multisubject.training.stopping import StopRequest

Batch = dict[str, torch.Tensor]

SHOWN_EVERY = 10  # steps


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a network is trained."""

    steps: int
    batch_size: int  # over all processes together
    learning_rate: float  # after a linear warm-up, and until it falls to 1 % of that along a cosine
    warmup_steps: int = 100
    decay_share: float = 1.0  # share of the steps, at the end, over which it falls
    ema_decay: float = 0.998
    seed: int = 0
    checkpoint_every: int = 100
    mixed_precision: str = "no"  # or "bf16"; "auto" is what the run was begun in, at first bf16 where that is quick
    max_grad_norm: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the 0-based `step`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        start = max(self.warmup_steps, round(self.steps * (1 - self.decay_share)))
        progress = min(1.0, max(0.0, (step - start) / max(1, self.steps - start)))
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def ema_decay_at(self, step: int) -> float:
        """Shorter memory at the start, so that the average does not remember the initial weights."""
        return min(self.ema_decay, (1 + step) / (10 + step))


def process_state() -> PartialState:
    """Who we are among several processes. Without `cpu=True` two CPU processes would each believe to be alone."""
    return PartialState(cpu=not torch.cuda.is_available())


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of all randomness of one step."""
    return torch.Generator(device).manual_seed((seed << 32) + step)


def train(
    model: nn.Module,
    draw_batch: Callable[[torch.Generator, int], Batch],
    schedule: Schedule,
    checkpoint: Path,
    *,
    description: str,
) -> Mapping[str, torch.Tensor] | None:
    """Train `model` until `schedule.steps`, from `checkpoint` when that file exists.

    Args:
        model: `model(**batch)` returns a dict of scalars of which `loss` is minimised and the rest is shown.
        draw_batch: `(generator, batch_size)` -> tensors whose first dimension is the whole batch. The generator is on
            the device that trains.
        checkpoint: file with step, precision, weights, average and optimiser state, written every `checkpoint_every`
            steps and on SIGINT or SIGTERM.

    Returns:
        The exponential moving average of the parameters, by name, or None when the run was interrupted.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
    mixed_precision = schedule.mixed_precision
    if mixed_precision == "auto":
        mixed_precision = "bf16" if torch.cuda.is_available() or cpu_has_bfloat16() else "no"
        if state is not None:
            mixed_precision = state.get("mixed_precision", mixed_precision)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
    if schedule.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size {schedule.batch_size} cannot be shared by {accelerator.num_processes} processes; "
            "choose a multiple."
        )
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=schedule.learning_rate, betas=(0.9, 0.99), fused=True)
    start = 0
    average = {name: parameter.detach().clone().to(accelerator.device) for name, parameter in parameters.items()}
    if state is not None:
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = {name: value.to(accelerator.device) for name, value in state["average"].items()}
        accelerator.print(f"{description}: resumed at step {start} from {checkpoint}")
    torch.backends.cudnn.benchmark = True  # shapes stay the same
    parallel, optimizer = accelerator.prepare(model, optimizer)
    parallel.train()

    def save(step: int) -> None:
        if accelerator.is_main_process:
            state = {
                "step": step,
                "mixed_precision": accelerator.mixed_precision,
                "model": model.state_dict(),
                "average": average,
                "optimizer": optimizer.state_dict(),
            }
            whole = io.BytesIO()
            torch.save(state, whole)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(checkpoint, whole.getvalue())

    share = schedule.batch_size // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    interrupted = False
    progress = tqdm(
        range(start, schedule.steps),
        initial=start,
        total=schedule.steps,
        desc=description,
        disable=not accelerator.is_local_main_process,
        mininterval=1.0,
    )
    shown: dict[str, torch.Tensor] = {}
    with StopRequest() as stop:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate_at(step)
            batch = draw_batch(step_generator(schedule.seed, step, accelerator.device), schedule.batch_size)
            batch = {key: value[mine].to(accelerator.device) for key, value in batch.items()}
            with accelerator.autocast():
                measures = parallel(**batch)
            accelerator.backward(measures["loss"])
            accelerator.clip_grad_norm_(parallel.parameters(), schedule.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = schedule.ema_decay_at(step)
            torch._foreach_lerp_(
                list(average.values()), [parameters[name].detach() for name in average], weight=1 - decay
            )
            for key, value in measures.items():
                value = value.detach().clone()  # a compiled step reuses the memory
                shown[key] = value if key not in shown else shown[key].lerp(value, 0.02)
            if step % SHOWN_EVERY == 0 or step + 1 == schedule.steps:  # reading them waits for the GPU
                progress.set_postfix({key: f"{value.item():.4f}" for key, value in shown.items()}, refresh=False)
            interrupted = bool(stop.agreed(accelerator))
            if interrupted or (step + 1) % schedule.checkpoint_every == 0 or step + 1 == schedule.steps:
                save(step + 1)
            if interrupted:
                break
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if interrupted:
        accelerator.print(f"{description}: interrupted; the same command goes on from {checkpoint}")
        return None
    return average
