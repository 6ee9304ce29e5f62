"""What a run leaves: configuration, validation pictures, loss curve, adapter, model card."""

from __future__ import annotations

import io
import logging
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import torch
import yaml
from huggingface_hub import whoami
from huggingface_hub.errors import HTTPError
from PIL import Image
from transformers.utils import logging as transformers_logging

from multisubject.base_models import BASE_MODEL_MIRRORS
from multisubject.generation.console import quiet_loading
from multisubject.hub_utils import inspect_subject, push_subject_to_hub, save_subject
from multisubject.model_card import sample_path, subject_card
from multisubject.pictures import png_bytes
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.subject_file import write_atomically
from multisubject.training.checkpoints import Progress, writing
from multisubject.training.concepts import Concept
from multisubject.training.config import TrainConfig
from multisubject.training.learners import with_residual
from multisubject.training.models import Models, base_model_name, generate
from multisubject.visualization import contact_sheet

logger = logging.getLogger(__name__)


def save_config(config: TrainConfig) -> None:
    """`config.yaml`: every flag's value, as `--config` reads it."""
    # The rest is for each run to say.
    again = replace(config, overwrite_output_dir=False, resume_from_checkpoint=None, progress_file=None)
    text = yaml.safe_dump(asdict(again), sort_keys=False, allow_unicode=True)
    path = Path(config.output_dir) / "config.yaml"
    with writing(path, path.parent):
        write_atomically(path, text.encode())


def validation_pictures(concept: Concept, models: Models, residual: torch.Tensor) -> list[Image.Image]:
    """The validation prompts with the subject in them."""
    prompts, rows = concept.prompts, concept.validation_rows
    embeds = with_residual(prompts.base_embeds[rows], prompts.positions[rows], residual.to(models.device))
    return generate(
        models, embeds, prompts.negative_embeds, concept.config, seed=concept.config.seed,
        pooled=prompts.pooled_at(rows), negative_pooled=prompts.negative_pooled,
    )  # fmt: skip


def save_validation_sheet(pictures: list[Image.Image], step: int, output: Path) -> None:
    """The subject as it is after that step: `validation/step-….png`."""
    path = output / "validation" / f"step-{step:06}.png"
    with writing(path, output):
        write_atomically(path, png_bytes(contact_sheet(pictures, columns=4)))


def save_loss_curve(progress: Progress, folder: Path) -> None:
    """`loss.csv` with every step, and `loss.png`, where matplotlib is installed."""
    rows = "".join(f"{step},{loss!r}\n" for step, loss in enumerate(progress.losses, start=1))
    write_atomically(folder / "loss.csv", f"step,loss\n{rows}".encode())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed, so there is no loss.png: pip install 'multisubject[train]'.")
        return
    steps = np.arange(1, len(progress.losses) + 1)
    window = max(1, len(steps) // 20)
    smooth = np.convolve(progress.losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, progress.losses, color="lightsteelblue", linewidth=0.7, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="navy", label=f"mean of {window} steps")
    if progress.scores:
        axes.plot(
            list(progress.scores), list(progress.scores.values()), "o-", color="darkorange", label="held-out picture"
        )
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomically(folder / "loss.png", data.getvalue())


def save_result(concept: Concept, progress: Progress, models: Models) -> ResidualEmbedding:
    """Write the adapter first, then what explains it: sample pictures, loss curve, model card."""
    config = concept.config
    output = Path(config.output_dir)
    delta = torch.tensor(progress.best_residual)
    step = min(progress.scores, key=lambda step: progress.scores[step]) if progress.scores else progress.step
    metadata = {
        "base_model": base_model_name(config),
        "base_model_revision": config.revision,
        **{f"{encoder}_fingerprint": fingerprint for encoder, fingerprint in models.fingerprints.items()},
        "method": config.method,
        "steps": step,
        "resolution": config.resolution,
        "training_pictures": list(concept.picture_digests),
        "license": config.license,
        "library_versions": {name: version(name) for name in ("multisubject", "diffusers", "transformers", "torch")},
    }
    subject = ResidualEmbedding(
        cast(str, config.instance_prompt),
        dict(zip(models.widths, delta.split([*models.widths.values()], dim=-1), strict=True)),
        {key: value for key, value in metadata.items() if value is not None},
    )
    with writing(output / f"{config.subject_name}.safetensors", output):
        adapter = save_subject(subject, output / f"{config.subject_name}.safetensors")
        if len(subject.deltas) == 1:  # more than that file can hold
            save_subject(subject, output / "residual.pt")
        save_loss_curve(progress, output)
    images = validation_pictures(concept, models, delta)
    prompts = [concept.prompts.texts[row] for row in concept.validation_rows]
    paths = [output / sample_path(config.subject_name, index) for index in range(len(images))]
    repo_id = config.hub_model_id or f"your-name/{config.subject_name}"
    entries = inspect_subject(adapter, name=config.subject_name)
    card = subject_card(repo_id, entries, {config.subject_name: prompts}, mirrors=BASE_MODEL_MIRRORS)
    save_validation_sheet(images, step, output)
    with writing(output / "README.md", output):
        for path, image in zip(paths, images, strict=True):
            write_atomically(path, png_bytes(image))
        write_atomically(output / "README.md", card.encode())
    logger.info("%s: saved in %s", config.subject_name, output)
    if config.push_to_hub:
        try:
            with quiet_loading(transformers_logging):  # which switches the Hub client's bars as well
                commit = push_subject_to_hub(
                    adapter, repo_id, samples=list(zip(prompts, paths, strict=True)), private=config.hub_private
                )
        except (OSError, ValueError, HTTPError) as error:
            raise OSError(
                f"--push_to_hub: {error}; {adapter} is whole: `multisubject push {adapter} {repo_id}` tries again."
            ) from error
        logger.info("%s: pushed, %s", config.subject_name, commit.commit_url)
    return subject


def hub_user() -> str:
    """The user who is logged in. Raises OSError that says how to log in: before training, not after."""
    try:
        return str(whoami()["name"])
    except (OSError, HTTPError) as error:
        raise OSError(f"--push_to_hub: log in with `hf auth login` first ({error}).") from error
