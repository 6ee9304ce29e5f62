"""Trainings that the page starts: processes of their own, whose progress any tab may ask for."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from multisubject.generation.base_model import BaseModel
from multisubject.page.subjects import SubjectLibrary
from multisubject.pictures import PICTURE_ERRORS, open_picture, png_bytes, split_alpha
from multisubject.subject_file import write_atomically
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL
from multisubject.training.checkpoints import latest_checkpoint
from multisubject.training.config import TrainConfig, class_phrase_of
from multisubject.training.pictures import MASK_ENDING

MOST_PICTURES = 40
"""Of a training."""

MOST_STEPS = 10_000
"""Of a training."""

MOST_JOBS = 20
"""Trainings that are kept, over or not."""

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_JOB_FILE, _PROGRESS_FILE, _LOG_FILE = "job.json", "progress.json", "train.log"
_SHEETS = 8  # validation pictures in the course of a training
_STOP_SECONDS = 30.0  # in which a trainer saves its checkpoint


@dataclass(frozen=True)
class TrainingPicture:
    """One picture of a new subject.

    Args:
        image: the picture.
        mask: mode `L` and of the same size, white where the subject is; None: the whole picture counts.
    """

    image: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class TrainingState:
    """How far a training is.

    Args:
        id: names it to `TrainingJobs`.
        name, class_phrase: of the subject.
        phase: `waiting` (its process starts), `loading`, `encoding`, `training`, `drawing`; or, when it has no process,
            `done`, `stopped` or `failed`.
        step, steps: done, and in all.
        loss: mean of the last 50 steps, None before the first.
        losses: points `(step, mean loss since the point before)`.
        sheet: the newest validation pictures, None before the first.
        error: why it failed.
        can_resume: whether `resume` goes on with it.
    """

    id: str
    name: str
    class_phrase: str
    phase: str
    step: int
    steps: int
    loss: float | None = None
    losses: tuple[tuple[int, float], ...] = ()
    sheet: Path | None = None
    error: str | None = None
    can_resume: bool = False

    @property
    def is_over(self) -> bool:
        """Whether it has no process any more."""
        return self.phase in ("done", "stopped", "failed")


@dataclass
class _Job:
    """A training, as its folder's `job.json` keeps it (what is not private of it)."""

    id: str
    name: str
    class_phrase: str
    steps: int
    seed: int
    is_added: bool = False
    error: str | None = None
    folder: Path = field(default=Path(), repr=False)
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    is_stopping: bool = False

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def save(self) -> None:
        keys = ("id", "name", "class_phrase", "steps", "seed", "is_added", "error")
        write_atomically(self.folder / _JOB_FILE, json.dumps({key: getattr(self, key) for key in keys}).encode())


class TrainingJobs:
    """The trainings of a page, one at a time. Any thread may call it; a training goes on whoever looks at it.

    Each has a folder: its pictures, all that the trainer leaves, and how it was asked for. So one that was stopped, by
    a person or with the server, can be resumed, also by the next server. A training that has ended well puts its
    subject into the library.

    Args:
        folder: for the trainings' folders.
        library: where new subjects go.
        base: the model that they are for.
        device: where to train; None: the best there is.
        extra: flags of the trainer that win over those of the base's configuration, e.g. `{"resolution": 512}`.
    """

    def __init__(
        self,
        folder: Path,
        library: SubjectLibrary,
        base: BaseModel,
        device: str | None = None,
        extra: dict[str, Any] | None = None,
    ):
        self.folder, self.library, self.base = folder.resolve(), library, base
        self.device, self.extra = device, dict(extra or {})
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        for file in sorted(self.folder.glob(f"*/{_JOB_FILE}"), key=lambda file: file.stat().st_mtime):
            with suppress(OSError, ValueError, TypeError):  # of another version, or damaged
                job = _Job(**json.loads(file.read_text(encoding="utf-8")), folder=file.parent)
                self._jobs[job.id] = job

    # --- what people do ----------------------------------------------------------------------------------------------

    def start(
        self, pictures: Sequence[TrainingPicture], name: str, class_phrase: str, steps: int | None = None, seed: int = 0
    ) -> str:
        """Start a training.

        Args:
            pictures: 1 to `MOST_PICTURES`.
            name: what the subject is to be called.
            class_phrase: what it is, in words that the base knows, such as `person`.
            steps: 1 to `MOST_STEPS`; None: as the configuration says.
            seed: of everything random.

        Returns:
            The training's id.

        Raises:
            ValueError: something about these, or another training is running.
        """
        if not 1 <= len(pictures) <= MOST_PICTURES:
            raise ValueError(f"There are {len(pictures)} pictures; expected 1 to {MOST_PICTURES}.")
        self.library.check_new_name(name)
        steps = self.default_steps() if steps is None else steps
        if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"The number of steps is {steps!r}; expected 1 to {MOST_STEPS:,}.")
        try:
            phrase = class_phrase_of(TrainConfig(instance_prompt=class_phrase))
        except ValueError as error:
            raise ValueError(str(error).replace("--instance_prompt", "The class phrase")) from None
        key = secrets.token_hex(8)
        job = _Job(key, name, phrase, steps, seed, folder=self.folder / key)
        with self._lock:
            self._check_idle()
            if len(self._jobs) >= MOST_JOBS:
                raise ValueError(f"There are {MOST_JOBS} trainings; remove those that you need no more.")
            data = job.folder / "pictures"
            data.mkdir(parents=True)
            try:
                for number, picture in enumerate(pictures):
                    _save(picture, data / f"{number:03}.png")
                job.save()
                self._run(job)
            except BaseException:
                shutil.rmtree(job.folder, ignore_errors=True)
                raise
            self._jobs[key] = job
        return key

    def cancel(self, key: str) -> None:
        """Ask a training to stop after its step, with a checkpoint. Raises `ValueError` for one that is not there."""
        with self._lock:
            job = self._find(key)
            if job.process is not None:
                job.is_stopping = True
                job.process.send_signal(signal.SIGTERM)

    def resume(self, key: str) -> None:
        """Go on with one that was stopped or has failed. Raises `ValueError` where one runs, or none is there."""
        with self._lock:
            job = self._find(key)
            self._check_idle()
            if job.is_added:
                raise ValueError(f"The training of <{job.name}> is done.")
            self.library.check_new_name(job.name)
            job.error, job.is_stopping = None, False
            self._run(job)

    def remove(self, key: str) -> None:
        """Forget a training, its pictures and checkpoints; a subject that came of it stays. Raises `ValueError`."""
        with self._lock:
            job = self._find(key)
            if job.process is not None:
                raise ValueError(f"The training of <{job.name}> is running; cancel it first.")
            del self._jobs[key]
            shutil.rmtree(job.folder, ignore_errors=True)

    def close(self) -> None:
        """Stop what runs, with a checkpoint, as the server stops. Takes up to half a minute."""
        with self._lock:
            running = {job.id: job.process for job in self._jobs.values() if job.process is not None}
            threads = [*self._threads]
        for key in running:
            self.cancel(key)
        for thread in threads:
            thread.join(_STOP_SECONDS)
        for process in running.values():
            process.kill()  # where it has not ended by now

    # --- what people see ---------------------------------------------------------------------------------------------

    def states(self) -> list[TrainingState]:
        """All trainings, the oldest first."""
        with self._lock:
            jobs = [*self._jobs.values()]
        return [_state(job) for job in jobs]

    def state(self, key: str) -> TrainingState:
        """One of them. Raises `ValueError` for one that is not there."""
        with self._lock:
            return _state(self._find(key))

    def default_steps(self) -> int:
        """Steps of a training that says nothing else."""
        return int(self.extra.get("max_train_steps", 300 if self._is_embedded() else 600))

    # --- the process -------------------------------------------------------------------------------------------------

    def _find(self, key: str) -> _Job:
        if not isinstance(key, str) or key not in self._jobs:
            raise ValueError("That training is not there any more; reload the page.")
        return self._jobs[key]

    def _check_idle(self) -> None:
        for job in self._jobs.values():
            if job.process is not None:
                raise ValueError(f"The training of <{job.name}> is running; wait for its end, or cancel it.")

    def _is_embedded(self) -> bool:
        return self.base.name in (str(EMBEDDED_BASE), str(EMBEDDED_BASE_XL))

    def _command(self, job: _Job) -> list[str]:
        if self._is_embedded():
            config = "train_tiny_world.yaml"
        else:
            config = "train_sdxl.yaml" if "text_encoder_2" in self.base.embed_dims else "train_sd21.yaml"
        flags: dict[str, Any] = {
            "config": _CONFIGS / config,
            "pretrained_model_name_or_path": self.base.name,
            "resolution": min(self.base.size),
            "instance_data_dir": job.folder / "pictures",
            "instance_prompt": job.class_phrase,
            "name": job.name,
            "output_dir": job.output,
            "seed": job.seed,
            "checkpointing_steps": max(1, job.steps // _SHEETS),
            "validation_steps": max(1, job.steps // _SHEETS),
            "progress_file": job.folder / _PROGRESS_FILE,
            **self.extra,
            "max_train_steps": job.steps,
        }
        if latest_checkpoint(job.output) is not None:
            flags["resume_from_checkpoint"] = "latest"
        elif job.output.exists():
            flags["overwrite_output_dir"] = True
        return [sys.executable, "-m", "multisubject.train_residual", *(f"--{key}={flags[key]}" for key in flags)]

    def _run(self, job: _Job) -> None:
        """Start the process and the thread that waits for it. The caller holds the lock."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() - 1)), "TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        (job.folder / _PROGRESS_FILE).unlink(missing_ok=True)
        with (job.folder / _LOG_FILE).open("wb") as log:
            job.process = subprocess.Popen(
                self._command(job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=job.folder,
                env=environment,
                start_new_session=True,  # a Ctrl+C in the server's terminal is the server's to pass on
            )
        if hasattr(os, "setpriority"):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, job.process.pid, 10)  # pictures come first
        thread = threading.Thread(target=self._wait, args=(job, job.process), name=f"training {job.name}", daemon=True)
        self._threads = [thread, *(other for other in self._threads if other.is_alive())]
        thread.start()

    def _wait(self, job: _Job, process: subprocess.Popen[bytes]) -> None:
        status, added, error = process.wait(), False, None
        if status == 0:
            try:
                sheet = next(iter(sorted(job.output.glob("samples/*.png"))), None)
                picture = None if sheet is None else open_picture(sheet)
                self.library.add_trained(job.output / f"{job.name}.safetensors", job.name, picture)
                added = True
            except (ValueError, *PICTURE_ERRORS) as problem:
                error = str(problem)
        elif not job.is_stopping and status not in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            error = _why(job, status)
        with self._lock:
            job.is_added, job.error, job.process = added, error, None
            if job.folder.exists():
                with suppress(OSError):
                    job.save()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _save(picture: TrainingPicture, file: Path) -> None:
    """As the trainer reads them: a picture without its metadata, and its mask beside it."""
    image, alpha = split_alpha(picture.image)
    mask = alpha if picture.mask is None else picture.mask.convert("L")
    if mask is not None and mask.size != image.size:
        raise ValueError(f"A mask is {mask.size[0]} x {mask.size[1]}, its picture {image.size[0]} x {image.size[1]}.")
    image.info = {}
    file.write_bytes(png_bytes(image))
    if mask is not None and mask.getbbox() is not None:
        file.with_name(f"{file.stem}{MASK_ENDING}.png").write_bytes(png_bytes(mask))


def _read_progress(job: _Job) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        progress = json.loads((job.folder / _PROGRESS_FILE).read_text(encoding="utf-8"))
        if isinstance(progress, dict):
            return progress
    return {}


def _state(job: _Job) -> TrainingState:
    progress = _read_progress(job)
    phase = progress.get("phase", "waiting")
    if job.process is None:
        phase = "done" if job.is_added else "failed" if job.error else "stopped"
    elif phase in ("done", "stopped", "failed"):  # its process is about to end
        phase = "drawing"
    return TrainingState(
        job.id,
        job.name,
        job.class_phrase,
        phase,
        progress.get("step", 0),
        job.steps,
        progress.get("loss"),
        tuple((step, loss) for step, loss in progress.get("losses", ())),
        max(job.output.glob("validation/step-*.png"), default=None),
        job.error,
        can_resume=job.process is None and not job.is_added,
    )


def _why(job: _Job, status: int) -> str:
    """What a trainer said at its end."""
    if error := _read_progress(job).get("error"):
        return str(error)
    with suppress(OSError):
        lines = (job.folder / _LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
        if said:
            return said[-1].removeprefix("error: ")[:1000]
    return f"the trainer ended with status {status}"
