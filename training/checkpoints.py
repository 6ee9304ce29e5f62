"""Stop and go on: checkpoints that are whole or absent, and what has to be the same for a run to go on from one."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from multisubject.subject_file import make_writable_folder
from multisubject.training.config import TrainConfig
from multisubject.training.devices import is_imitated
from multisubject.training.run_lock import locked

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-{}"
LEARNER_FILE = "learner.safetensors"
UNFINISHED = ".unfinished-"
# What a full disk or a damaged file looks like from torch and safetensors.
FILE_ERRORS = (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError)


@dataclass
class Progress:
    """How far a run is. A checkpoint holds it as `progress.json`."""

    identity: dict[str, Any]
    step: int = 0
    losses: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)  # step -> validation score, lower is better
    best_residual: list[list[float]] | None = None


@contextmanager
def claimed_outputs(configs: Sequence[TrainConfig], accelerator: Accelerator) -> Iterator[None]:
    """While entered the output folders are this run's: made, writable, with no other run in them, over or going on."""
    failure: list[Exception | None] = [None]
    with ExitStack() as claims:
        if accelerator.is_main_process:  # for all processes of this run
            try:
                for config in configs:
                    claims.enter_context(_claimed(config, Path(config.output_dir)))
            except (OSError, ValueError) as error:
                failure = [error]
        broadcast_object_list(failure)  # else the other processes would wait for one that is gone
        if failure[0] is not None:
            raise failure[0]
        yield


@contextmanager
def _claimed(config: TrainConfig, output: Path) -> Iterator[None]:
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    with ExitStack() as claim:
        claim.callback(_remove_empty, made)  # last of all: nothing is left of a run that was refused
        try:
            make_writable_folder(output)
            claim.enter_context(locked(output))
        except BlockingIOError as error:
            raise ValueError(
                f"--output_dir: {str(output)!r}: another run is writing here ({error}); wait for its end, or choose "
                "another folder."
            ) from None
        except OSError as error:
            raise OSError(f"--output_dir: {str(output)!r} cannot be written ({error}); choose another.") from error
        _check_output(config, output)
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove these folders, the inner ones first, up to the first one that holds anything."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _check_output(config: TrainConfig, output: Path) -> None:
    kept = checkpoints(output)
    earlier = [*kept, *output.glob("*.safetensors")]
    if earlier and not (config.resume_from_checkpoint or config.overwrite_output_dir):
        raise ValueError(
            f"--output_dir: {str(output)!r} holds another run ({earlier[0].name}); --resume_from_checkpoint "
            "latest goes on with it, --overwrite_output_dir replaces it; or choose another folder."
        )
    adapter = output / f"{config.subject_name}.safetensors"
    if adapter.exists() and not kept and config.resume_from_checkpoint == "latest" and not config.overwrite_output_dir:
        raise ValueError(
            f"--resume_from_checkpoint: latest, but {str(output)!r} has no checkpoint, only the finished "
            f"{adapter.name}; --overwrite_output_dir replaces it, or choose another --output_dir."
        )
    chosen_checkpoint(config)  # before models load: is it one?
    for leftover in output.glob(f"{UNFINISHED}*"):
        _remove(leftover)


def remove_earlier_run(config: TrainConfig) -> None:
    """Remove everything that the run which this one replaces has left, and nothing of another subject."""
    output, name = Path(config.output_dir), config.subject_name
    files = ("residual.pt", "loss.csv", "loss.png", "README.md", "config.yaml")
    left = [*checkpoints(output), output / f"{name}.safetensors", *(output / file for file in files)]
    left += [*output.glob("validation/step-*.png"), *output.glob(f"samples/{escape(name)}-[0-9]*.png")]
    for path in left:
        if path.exists():
            _remove(path)


def _remove(path: Path) -> None:
    """A folder vanishes under its name at once, so that there is never half a checkpoint."""
    if not path.is_dir():
        path.unlink()
        return
    if not path.name.startswith(UNFINISHED):
        path = path.rename(path.with_name(f"{UNFINISHED}{path.name}"))
    shutil.rmtree(path)


@contextmanager
def writing(path: Path, output: Path) -> Iterator[None]:
    """While `path` is written: a failure says which file it was, and which checkpoint of `output` to go on from."""
    try:
        yield
    except FILE_ERRORS as error:
        kept = latest_checkpoint(output)
        rest = f"{kept} is intact: go on from it with --resume_from_checkpoint latest" if kept else "no checkpoint yet"
        raise OSError(f"{path} could not be written ({error}); {rest}, after freeing some space.") from error


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output.glob(CHECKPOINT.format("*")) if path.name.rpartition("-")[2].isdecimal()]
    found = [path for path in found if path.name == CHECKPOINT.format(_step(path))]  # and no copy under another name
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def latest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint, or None."""
    return (checkpoints(output) or [None])[-1]  # type: ignore[list-item]


def checkpoint_parameters(parameters: Mapping[str, nn.Parameter], accelerator: Accelerator) -> list[Any]:
    """Have checkpoints hold these parameters alone, under names that do not depend on the number of processes.

    FSDP and DeepSpeed write their shards themselves; their lists of models are empty here. Returns the hooks' handles.
    """

    def save(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        if weights:
            weights.clear()
            state = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
            save_file(state, Path(folder) / LEARNER_FILE)

    def load(models: list[nn.Module], folder: str) -> None:
        if models:
            models.clear()
            state = load_file(Path(folder) / LEARNER_FILE)
            if state.keys() != parameters.keys():
                raise ValueError(
                    f"{folder}: holds other parameters than this run tunes; it belongs to another base or method."
                )
            with torch.no_grad():
                for name, value in state.items():
                    parameters[name].copy_(value)

    return [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]


def save_checkpoint(config: TrainConfig, progress: Progress, accelerator: Accelerator) -> Path:
    """Write `checkpoint-{step}` beside its final place, then rename it; then drop the oldest beyond the limit."""
    output = Path(config.output_dir)
    target = output / CHECKPOINT.format(progress.step)
    unfinished = output / f"{UNFINISHED}{target.name}"
    with writing(target, output):
        try:
            accelerator.save_state(str(unfinished))
            accelerator.wait_for_everyone()  # each process has its own file in there
            if accelerator.is_main_process:
                (unfinished / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
                replaced = output / f"{UNFINISHED}replaced-{target.name}"
                if target.exists():  # the same step of the same run, but maybe damaged since
                    target.rename(replaced)
                os.replace(unfinished, target)
                shutil.rmtree(replaced, ignore_errors=True)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
    if accelerator.is_main_process and config.checkpoints_total_limit:
        for old in checkpoints(output)[: -config.checkpoints_total_limit]:
            _remove(old)
    accelerator.wait_for_everyone()
    return target


def identity(config: TrainConfig, pictures: str, base: str | None) -> dict[str, Any]:
    """What has to be the same for a checkpoint to be continued: everything that has a say in the result.

    The number of processes may change as long as they see the same batch together.

    Args:
        config: with its defaults filled in.
        pictures: the digest of all that is learnt from.
        base: its fingerprint.
    """
    without_a_say = {
        "pretrained_model_name_or_path", "revision", "variant", "instance_data_dir", "name", "concepts_list", "strict",
        "output_dir", "overwrite_output_dir", "train_batch_size", "gradient_accumulation_steps", "class_data_dir",
        "gradient_checkpointing", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
        "validation_steps", "validation_prompts", "validation_guidance_scale", "validation_inference_steps",
        "report_to", "progress_file", "push_to_hub", "hub_model_id", "hub_private", "license",
    }  # fmt: skip
    if config.lr_scheduler in ("constant", "constant_with_warmup"):
        without_a_say.add("max_train_steps")
    if config.validation:  # then they say which steps are scored
        without_a_say.remove("checkpointing_steps")
    return {
        **{key: value for key, value in asdict(config).items() if key not in without_a_say},
        "batch": config.train_batch_size * config.gradient_accumulation_steps * PartialState().num_processes,
        "pictures": pictures,
        "base": base,
    }


def chosen_checkpoint(config: TrainConfig) -> tuple[Path, Progress] | None:
    """The checkpoint that `--resume_from_checkpoint` names; None where it names none, or `latest` finds none."""
    choice, output = config.resume_from_checkpoint, Path(config.output_dir)
    if choice is None or (checkpoint := latest_checkpoint(output) if choice == "latest" else Path(choice)) is None:
        return None
    try:
        values = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        values["scores"] = {int(step): score for step, score in values["scores"].items()}
        return checkpoint, Progress(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--resume_from_checkpoint: {str(checkpoint)!r} is not a checkpoint of this program ({error})."
        ) from error


def check_resumed(config: TrainConfig, wanted: Mapping[str, Any]) -> tuple[Path, Progress] | None:
    """`chosen_checkpoint`, of the run that `wanted` of its `identity` says. Raises ValueError that names what differs,
    or for more steps than this run has."""
    chosen = chosen_checkpoint(config)
    if chosen is None:
        return None
    checkpoint, progress = chosen
    before, now = progress.identity, json.loads(json.dumps(wanted))
    if differing := sorted(key for key in now if before.get(key) != now[key]):
        details = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in differing)
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint} belongs to another run ({details}). {_remedy(before, differing)}, "
            "or start anew with --overwrite_output_dir or another --output_dir."
        )
    if progress.step > config.max_train_steps:
        raise ValueError(
            f"--max_train_steps: {config.max_train_steps}, but {checkpoint} is of step {progress.step}; expected at "
            "least that many, or another checkpoint."
        )
    return checkpoint, progress


def _remedy(before: Mapping[str, Any], differing: Sequence[str]) -> str:
    """How to go on: a precision may differ with the machine, whatever its flag says."""
    precision = before.get("mixed_precision")
    rest = " and the same values of the others" if len(differing) > 1 else ""
    if "mixed_precision" in differing and is_imitated(precision):
        return (
            f"This processor only imitates {precision}, many times slower than float32, so that this run would compute "
            f"in float32; go on with a GPU{' or a processor that has bfloat16' if precision == 'bf16' else ''}{rest}"
        )
    if "mixed_precision" in differing and precision == "no":
        return f"Use --mixed_precision no, in which a processor that only imitates others computes anyway{rest}"
    return "Use the same values"


def resume(config: TrainConfig, fresh: Progress, accelerator: Accelerator) -> Progress:
    """Load the checkpoint that `--resume_from_checkpoint` names; `fresh` when `latest` finds none."""
    resumed = check_resumed(config, fresh.identity)
    if resumed is None:
        if accelerator.is_main_process:
            logger.warning("%s: no checkpoint yet, starting from the beginning.", config.output_dir)
        return fresh
    checkpoint, progress = resumed
    try:
        accelerator.load_state(str(checkpoint))
    except FILE_ERRORS as error:
        raise ValueError(
            f"--resume_from_checkpoint: {str(checkpoint)!r} is damaged ({error}); remove it to go on from the one "
            "before."
        ) from error
    accelerator.step = 0  # it counts batches, of which each step may now have another number
    return progress
