"""Teach Stable Diffusion 1.x, 2.x or XL a subject: a few pictures + class phrase -> residual embedding.

    accelerate launch train_residual.py --instance_data_dir data/petrucci --instance_prompt person \\
        --output_dir output/petrucci

learns what `person` has to mean so that these pictures come out, and leaves in `output/petrucci`: the adapter
`petrucci.safetensors`, `residual.pt` for older tools (of one text encoder, so not with XL), a model card with sample
pictures, `config.yaml`, the loss curve, validation pictures and checkpoints. `--help` explains every flag;
`--config file.yaml` reads them from a file.

Everything random is a function of (seed, step, number of the sample in the step), never of what ran before. That is
why a resumed run ends where an uninterrupted one does, and several processes learn what one does with their batch.
"""

from __future__ import annotations

import copy
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from multisubject.generation.console import quiet_imports
from multisubject.training.config import (
    LEARNING_RATES,
    TrainConfig,
    check_inputs,
    errors_named,
    parse_config,
    read_concepts,
)
from multisubject.training.progress import ProgressFile
from multisubject.training.stopping import Interrupted, StopRequest

if TYPE_CHECKING:  # torch, diffusers and accelerate take seconds: they are imported when the configuration is sound
    from accelerate import Accelerator

    from multisubject.residual_embeddings import ResidualEmbedding
    from multisubject.training.models import Models

logger = logging.getLogger("multisubject.training")  # above those of its rooms: one level for all


def train(config: TrainConfig) -> dict[str, ResidualEmbedding]:
    """Learn every subject that `config` names; returns them by name, as they are saved in the output folders.

    A `--progress_file` says how far it is, and how it ended.

    Raises:
        ValueError: something about the configuration, the folder or its pictures; the message says what to do.
        OSError: the output folder or the disk.
        FloatingPointError: the loss is not a number any more; the last good checkpoint is kept.
        Interrupted: SIGINT or SIGTERM came; a checkpoint of that moment is kept.
    """
    progress_file = ProgressFile(config.progress_file)
    with progress_file.outcome():
        return _train(config, progress_file)


def _train(config: TrainConfig, progress_file: ProgressFile) -> dict[str, ResidualEmbedding]:
    # 1. Configuration: what is asked for, on what, and where it goes.
    concept_configs = read_concepts(config)
    check_inputs(config, concept_configs)
    with quiet_imports():
        from multisubject.training.checkpoints import claimed_outputs
        from multisubject.training.concepts import prepare_concept, with_class_pictures
        from multisubject.training.devices import make_accelerator
        from multisubject.training.loop import fit
        from multisubject.training.models import load_encoders, load_unet
        from multisubject.training.results import hub_user, save_result

    accelerator = make_accelerator(config)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for flag, need in config.without_effect().items():
        logger.warning("--%s has no effect: it needs %s.", flag, need)
    with claimed_outputs(concept_configs, accelerator):
        user = hub_user() if config.push_to_hub else None

        # 2. Models, all but the UNet: what encodes the data.
        models = load_encoders(config, accelerator)

        # 3. Data: every picture's latents and every prompt's embeddings, computed once.
        concepts = []
        for item in concept_configs:
            with errors_named(config, item):
                concepts.append(prepare_concept(resolve(item, models, accelerator, user), models))
        text_encoders, models.text_encoders = models.text_encoders, None
        if config.method == "residual":
            text_encoders = None  # every prompt is embedded: nothing needs them any more
        models.unet = load_unet(config, models)
        if config.with_prior_preservation:
            with accelerator.main_process_first():
                concepts = [with_class_pictures(concept, models) for concept in concepts]

        # 4. Train and save, one subject after the other.
        if config.report_to:
            plain = {key: value for key, value in asdict(config).items() if isinstance(value, (bool, int, float, str))}
            accelerator.init_trackers("train_residual", config=plain)  # what every tracker can hold
        subjects = {}
        try:
            for number, concept in enumerate(concepts, start=1):
                tuned = text_encoders if number == len(concepts) else copy.deepcopy(text_encoders)
                with StopRequest() as stop:
                    progress = fit(concept, models, accelerator, stop, tuned, progress_file)
                if accelerator.is_main_process:
                    subjects[concept.config.subject_name] = save_result(concept, progress, models)
                accelerator.wait_for_everyone()
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
    return subjects


def resolve(config: TrainConfig, models: Models, accelerator: Accelerator, user: str | None) -> TrainConfig:
    """Fill in the defaults that depend on the base, the method, `accelerate config` or the Hub's `user`."""
    resolution = config.resolution or models.native_resolution
    if resolution % models.size_multiple:
        nearest = max(1, round(resolution / models.size_multiple)) * models.size_multiple
        raise ValueError(
            f"--resolution: {resolution}; this base needs a multiple of {models.size_multiple}, e.g. {nearest}."
        )
    rate = config.learning_rate
    if rate is None:
        rate = 1.0 if config.optimizer == "prodigy" else LEARNING_RATES[config.method]
    repo_id = config.hub_model_id
    return replace(
        config,
        resolution=resolution,
        learning_rate=rate,
        name=config.subject_name,
        mixed_precision=accelerator.mixed_precision,
        hub_model_id=repo_id if user is None or "/" in (repo_id or "") else f"{user}/{repo_id or config.subject_name}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    config = parse_config(arguments)
    try:
        train(config)
    except Interrupted as stopped:
        logger.warning("%s", stopped)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        logger.warning("stopped by SIGINT outside of training; checkpoints that were saved are intact.")
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        logger.error("error: %s", error)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported yet
            raise
        logger.error(
            "error: out of memory (%s); lower --train_batch_size or --resolution, or use --gradient_checkpointing and "
            "--mixed_precision.",
            error,
        )
        return 1
    finally:
        if accelerate := sys.modules.get("accelerate"):  # not where the configuration was refused
            accelerate.PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
