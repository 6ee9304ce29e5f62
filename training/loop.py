"""The loop: steps, checkpoints, validation scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn

from multisubject.training.checkpoints import (
    Progress,
    checkpoint_parameters,
    identity,
    latest_checkpoint,
    remove_earlier_run,
    resume,
    save_checkpoint,
)
from multisubject.training.concepts import Concept
from multisubject.training.config import TrainConfig
from multisubject.training.learners import make_learner, with_residual
from multisubject.training.loss import denoising_loss, draw_batch, draw_sample
from multisubject.training.models import Models, TextEncoders
from multisubject.training.progress import Phase, ProgressBar, ProgressFile
from multisubject.training.results import save_config, save_validation_sheet, validation_pictures
from multisubject.training.stopping import Interrupted, StopRequest

logger = logging.getLogger(__name__)


def fit(
    concept: Concept,
    models: Models,
    accelerator: Accelerator,
    stop: StopRequest,
    text_encoders: TextEncoders | None,
    progress_file: ProgressFile,
) -> Progress:
    """Learn one subject, and tell `progress_file` of it. Returns the finished progress with `best_residual` set to the
    delta to keep."""
    config = concept.config
    output = Path(config.output_dir)
    plain_learner = make_learner(concept, models, text_encoders)
    parameters = list(plain_learner.tuned().values())
    learner, optimizer = accelerator.prepare(plain_learner, make_optimizer(config, parameters))
    hooks = checkpoint_parameters(plain_learner.tuned(), accelerator)
    rate_factor = learning_rate_factor(config)
    progress = Progress(identity(config, concept.digest, models.fingerprint))
    if config.resume_from_checkpoint:
        progress = resume(config, progress, accelerator)
    if accelerator.is_main_process:
        if progress.step == 0:  # not before all else has shown that the run can start
            remove_earlier_run(config)
        save_config(config)
    accelerator.wait_for_everyone()

    silent = not accelerator.is_main_process

    def tell(phase: Phase) -> None:
        if not silent:
            progress_file.tell(
                phase,
                subject=config.subject_name,
                step=progress.step,
                of=config.max_train_steps,
                losses=progress.losses,
            )

    tell("training")
    with ProgressBar(config.subject_name, config.max_train_steps, "step", done=progress.step, silent=silent) as bar:
        while progress.step < config.max_train_steps:
            for group in optimizer.param_groups:
                group["lr"] = cast(float, config.learning_rate) * rate_factor(progress.step)
            loss = torch.zeros((), device=accelerator.device)
            for micro_step in range(config.gradient_accumulation_steps):
                samples = draw_batch(concept, progress.step, micro_step, accelerator, models)
                rows = [sample.row for sample in samples]
                pooled = concept.prompts.pooled_at(rows)
                with accelerator.accumulate(learner):
                    prompt_embeds, penalty = learner(torch.tensor(rows, device=accelerator.device))
                    batch_loss = denoising_loss(samples, prompt_embeds, models, config.snr_gamma, pooled) + penalty
                    accelerator.backward(batch_loss)
                    loss += batch_loss.detach() / config.gradient_accumulation_steps
                    if accelerator.sync_gradients:
                        mean_loss = float(accelerator.reduce(loss, "mean"))
                        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
                        # In fp16 the gradient scaler skips steps with infinite gradients and lowers its scale.
                        gradients_matter = norm is not None and accelerator.scaler is None
                        if not math.isfinite(mean_loss) or (gradients_matter and not math.isfinite(norm)):
                            raise FloatingPointError(diverged(mean_loss, progress.step, output))
                    optimizer.step()
                    optimizer.zero_grad()
            progress.step += 1
            progress.losses.append(mean_loss)
            tell("training")
            bar.advance(loss=f"{np.mean(progress.losses[-50:]):.4f}")
            values = {"loss": mean_loss, "learning_rate": optimizer.param_groups[0]["lr"]}
            accelerator.log(
                {f"{config.subject_name}/{key}": value for key, value in values.items()}, step=progress.step
            )

            last = progress.step == config.max_train_steps
            signal_number = stop.agreed(accelerator)
            due = last or progress.step % config.checkpointing_steps == 0
            if due or signal_number:
                if concept.held_out and due:  # a signal adds no score: the resumed run keeps the same best
                    score_residual(concept, models, plain_learner.residual(), progress)
                checkpoint = save_checkpoint(config, progress, accelerator)
                if signal_number and not last:
                    tell("stopped")
                    raise Interrupted(signal_number, checkpoint)
            if config.validation_steps and progress.step % config.validation_steps == 0 and not last:
                residual = plain_learner.residual()
                if accelerator.is_main_process:
                    save_validation_sheet(validation_pictures(concept, models, residual), progress.step, output)
                accelerator.wait_for_everyone()
    tell("saving")
    if not concept.held_out:
        progress.best_residual = plain_learner.residual().tolist()
    for hook in hooks:
        hook.remove()
    accelerator.free_memory(learner, optimizer)
    return progress


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of `--optimizer`. Raises ImportError that says what to install."""
    betas = (config.adam_beta1, config.adam_beta2)
    rate = cast(float, config.learning_rate)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, betas, config.adam_epsilon, config.weight_decay)
    try:
        if config.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, rate, betas, config.adam_epsilon, config.weight_decay)
        from prodigyopt import Prodigy

        return Prodigy(
            parameters, rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay,
            use_bias_correction=True, safeguard_warmup=True,
        )  # fmt: skip
    except ImportError as error:
        package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[config.optimizer]
        raise ImportError(f"--optimizer {config.optimizer}: needs `pip install {package}` ({error}).") from error


def learning_rate_factor(config: TrainConfig) -> Callable[[int], float]:
    """Step -> share of the peak rate; of the step alone, so neither resuming nor more processes move it."""
    scheduler = get_scheduler(
        SchedulerType(config.lr_scheduler),
        torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return scheduler.lr_lambdas[0]


def diverged(loss: float, step: int, output: Path) -> str:
    """What to tell the user whose loss is no number."""
    good = latest_checkpoint(output)
    kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    return (
        f"step {step + 1} has a loss of {loss} or infinite gradients; stopped, {kept}. Start anew "
        "(--overwrite_output_dir) with a lower --learning_rate or with --mixed_precision no."
    )


@torch.no_grad()
def score_residual(concept: Concept, models: Models, residual: torch.Tensor, progress: Progress) -> None:
    """Denoising loss on the held-out picture, always with the same noise and timesteps; remembers the best residual."""
    draws = 16
    samples = [
        draw_sample(
            concept.held_out,
            seed=concept.config.seed,
            step=0,
            index=index,
            batch=draws,
            num_timesteps=models.noise_scheduler.config.num_train_timesteps,
        )
        for index in range(draws)
    ]
    losses = []
    for start in range(0, draws, 4):
        chunk = samples[start : start + 4]
        rows = [sample.row for sample in chunk]
        embeds = with_residual(
            concept.prompts.base_embeds[rows], concept.prompts.positions[rows], residual.to(models.device)
        )
        pooled = concept.prompts.pooled_at(rows)
        losses.append(float(denoising_loss(chunk, embeds, models, concept.config.snr_gamma, pooled)))
    score = float(np.mean(losses))
    if score < min(progress.scores.values(), default=math.inf):
        progress.best_residual = residual.tolist()
    progress.scores[progress.step] = score
    logger.info("step %d: validation score %.5f (lower is better)", progress.step, score)
