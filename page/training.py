"""Teaching the page's base new subjects: jobs of the server, each a run of `train_residual.py` in its own process."""

from __future__ import annotations

import atexit
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image

from multisubject.generation.base_model import BaseModel
from multisubject.model_card import sample_path
from multisubject.page.safety import opaque
from multisubject.page.subjects import SubjectLibrary, free_path
from multisubject.pictures import png_bytes, split_alpha
from multisubject.subject_file import write_atomically
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL
from multisubject.training.config import TrainConfig, class_phrase_of
from multisubject.training.pictures import MASK_ENDING

MOST_PICTURES = 30
MOST_STEPS = 4000
MOST_JOBS = 50

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_JOB_FILE, _PROGRESS_FILE, _LOG_FILE = "job.json", "progress.json", "log.txt"
_SECONDS_TO_STOP = 20.0
_LONGEST_SIDE = 1536  # in pixels, more than any base is taught with

State = Literal["waiting", "running", "stopping", "done", "stopped", "failed"]


@dataclass(frozen=True)
class TrainingPicture:
    """A picture to learn from.

    Args:
        image: in `RGB`.
        mask: mode `L`, of the image's size, white where the subject is; None: all of it counts.
    """

    image: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Job:
    """A subject that is being taught, was, or will be.

    Args:
        key: the name of its folder.
        name, class_phrase: the subject's.
        steps: of the optimiser.
        base: that it is taught to.
        state: where it is; a `stopped` or `failed` one can go on.
        message: why it failed.
    """

    key: str
    name: str
    class_phrase: str
    steps: int
    base: str
    state: State = "waiting"
    message: str | None = None

    @property
    def is_active(self) -> bool:
        """Whether it runs or will."""
        return self.state in ("waiting", "running", "stopping")


class TrainingJobs:
    """Runs jobs one after the other, whoever looks; they are kept in a folder, so that a new server goes on with them.

    A job's folder holds `pictures/`, `job.json`, `progress.json`, `log.txt` and `run/`, the trainer's output folder.

    Args:
        base: the base model's small files.
        library: what finished subjects are added to.
        folder: where jobs are kept.
        on_cpu: keep the trainer off the accelerator.
        options: the trainer's flags, over those that fit the base.
    """

    def __init__(
        self,
        base: BaseModel,
        library: SubjectLibrary,
        folder: Path,
        *,
        on_cpu: bool = False,
        options: Sequence[str] = (),
    ):
        self.base, self.library, self.folder = base, library, folder
        self._on_cpu, self._options = on_cpu, [*options]
        self._jobs: dict[str, Job] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._queue: queue.Queue[str] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._read_jobs()
        atexit.register(self.close)

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def default_steps(self) -> int:
        """What the trainer takes for this base."""
        return int(yaml.safe_load(self._config().read_text(encoding="utf-8"))["max_train_steps"])

    def jobs(self) -> list[Job]:
        """All jobs, the newest first."""
        with self._lock:
            return [*reversed(self._jobs.values())]

    def get(self, key: str) -> Job | None:
        """The job in that folder."""
        with self._lock:
            return self._jobs.get(key) if isinstance(key, str) else None

    def progress(self, job: Job) -> dict[str, Any]:
        """What the trainer's `--progress_file` says last, `{}` before it says anything."""
        return _read_json(self.folder / job.key / _PROGRESS_FILE)

    def sheets(self, job: Job) -> list[Path]:
        """Validation pictures so far, oldest first."""
        return sorted((self.folder / job.key / "run" / "validation").glob("step-*.png"))

    # --- what can be done --------------------------------------------------------------------------------------------

    def start(self, name: str, class_phrase: str, pictures: Sequence[TrainingPicture], steps: int) -> Job:
        """Begin, or wait for the job before.

        Args:
            name: what to call the subject.
            class_phrase: what it is, such as `person`.
            pictures: 1 to `MOST_PICTURES`.
            steps: 1 to `MOST_STEPS`.

        Raises:
            ValueError: for any other argument, and for a name that is taken.
            OSError: the pictures cannot be written.
        """
        self.library.check_free(name)
        phrase = _class_phrase(class_phrase)
        if not 1 <= len(pictures) <= MOST_PICTURES:
            raise ValueError(f"{len(pictures)} pictures; expected 1 to {MOST_PICTURES} of the subject.")
        if not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"steps: {steps!r}; expected a whole number from 1 to {MOST_STEPS}.")
        files = [item for index, picture in enumerate(pictures) for item in _files(picture, f"{index:03d}").items()]
        with self._lock:  # for which every tab waits: pictures are encoded before
            if any(job.name.casefold() == name.casefold() and job.is_active for job in self._jobs.values()):
                raise ValueError(f"<{name}> is being trained already. Choose another name.")
            if len(self._jobs) >= MOST_JOBS:
                raise ValueError(f"there are {MOST_JOBS} trainings, the most. Remove some.")
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = free_path(self.folder / name)
            job = Job(folder.name, name, phrase, steps, self.base.name)
            try:
                (folder / "pictures").mkdir(parents=True)
                for file, data in files:
                    (folder / "pictures" / file).write_bytes(data)
                self._write(job)
            except OSError:  # a full disk, say: nothing is left of it
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._jobs[job.key] = job
        self._enqueue(job.key)
        return job

    def stop(self, key: str) -> None:
        """Cancel a job; what it has learnt stays as a checkpoint. Doing so again after a while ends it at once.
        Nothing happens to a job that is over."""
        with self._lock:
            job = self._jobs.get(key) if isinstance(key, str) else None
            if job is not None and job.state == "waiting":
                self._put(replace(job, state="stopped"))
            elif job is not None and job.state in ("running", "stopping"):
                self._put(replace(job, state="stopping"))
                self._end_process()

    def resume(self, key: str) -> None:
        """Go on with a job that was cancelled, failed, or was cut off. Raises `ValueError` for one that is not there,
        not over, or finished, and where another subject has its name by now."""
        with self._lock:
            job = self._jobs.get(key) if isinstance(key, str) else None
            if job is None or job.state not in ("stopped", "failed"):
                raise ValueError("this training cannot go on: it is not there, not over, or finished.")
            self.library.check_free(job.name)
            self._put(replace(job, state="waiting", message=None))
        self._enqueue(key)

    def remove(self, key: str) -> None:
        """Forget a job that is over, with its pictures and checkpoints. Raises `ValueError` for another."""
        with self._lock:
            job = self._jobs.get(key) if isinstance(key, str) else None
            if job is None or job.is_active:
                raise ValueError("this training cannot be removed: it is not there, or not over.")
            del self._jobs[key]
            shutil.rmtree(self.folder / job.key, ignore_errors=True)

    def close(self) -> None:
        """Stop the running job, with a checkpoint, and start no other."""
        with self._lock:
            self._closed, process = True, self._process
            self._end_process()
        if process is not None:
            try:
                process.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:  # it would go on without a server
                process.kill()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._queue.put("")
            self._thread.join(_SECONDS_TO_STOP)
        atexit.unregister(self.close)

    # --- how ---------------------------------------------------------------------------------------------------------

    def _read_jobs(self) -> None:
        """Those that an earlier server left; what it was at is `stopped` now."""
        files = sorted(self.folder.glob(f"*/{_JOB_FILE}"), key=lambda file: file.stat().st_mtime)
        for file in files:
            try:
                job = replace(Job(**_read_json(file)), key=file.parent.name)
            except TypeError:
                continue
            if job.base == self.base.name:
                self._jobs[job.key] = replace(job, state="stopped") if job.is_active else job

    def _put(self, job: Job) -> None:
        """Take over what became of a job. This server goes on where it cannot be written; the next one knows less."""
        self._jobs[job.key] = job
        with suppress(OSError):
            self._write(job)

    def _write(self, job: Job) -> None:
        write_atomically(self.folder / job.key / _JOB_FILE, json.dumps(asdict(job)).encode())

    def _enqueue(self, key: str) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="training", daemon=True)
                self._thread.start()
        self._queue.put(key)

    def _work(self) -> None:
        while (key := self._queue.get()) and not self._closed:
            try:
                self._run(key)
            except Exception as error:  # a job must not take the others with it
                self._finish(key, "failed", str(error) or type(error).__name__)

    def _run(self, key: str) -> None:
        with self._lock:
            job = self._jobs.get(key)
            if job is None or job.state != "waiting" or self._closed:
                return
            (self.folder / key / _PROGRESS_FILE).unlink(missing_ok=True)
            with (self.folder / key / _LOG_FILE).open("wb") as log:
                process = subprocess.Popen(
                    self._command(job),
                    env=_environment(self._on_cpu),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            if hasattr(os, "setpriority"):  # the page comes first
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, process.pid, 10)
            self._process = process
            self._put(replace(job, state="running"))
        status = process.wait()
        with self._lock:
            self._process = None
            was_told = self._closed or self._jobs[key].state == "stopping"
        output = self.folder / key / "run" / f"{job.name}.safetensors"
        if status == 0:
            self.library.add_trained(output, _sample(output))
            self._finish(key, "done")
        elif was_told:
            self._finish(key, "stopped")
        else:
            self._finish(key, "failed", self._why(job, status))

    def _finish(self, key: str, state: State, message: str | None = None) -> None:
        with self._lock:
            if key in self._jobs:
                self._put(replace(self._jobs[key], state=state, message=message))

    def _command(self, job: Job) -> list[str]:
        folder = self.folder / job.key
        values = {
            "pretrained_model_name_or_path": self.base.name,
            "resolution": max(self.base.size),
            "instance_data_dir": folder / "pictures",
            "instance_prompt": job.class_phrase,
            "name": job.name,
            "output_dir": folder / "run",
            "max_train_steps": job.steps,
            "checkpointing_steps": max(1, min(100, job.steps // 3)),
            "validation_steps": max(1, job.steps // 3),
            "progress_file": folder / _PROGRESS_FILE,
        }
        command = [sys.executable, "-m", "multisubject.page.trainer", str(os.getpid()), f"--config={self._config()}"]
        command += [f"--{flag}={value}" for flag, value in values.items()]
        return [*command, "--resume_from_checkpoint=latest", *self._options]

    def _config(self) -> Path:
        """The trainer's settings for a base of this kind."""
        if self.base.name in (str(EMBEDDED_BASE), str(EMBEDDED_BASE_XL)):
            return _CONFIGS / "train_tiny_world.yaml"
        return _CONFIGS / ("train_sdxl.yaml" if "text_encoder_2" in self.base.embed_dims else "train_sd21.yaml")

    def _end_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with suppress(OSError):
                self._process.send_signal(signal.SIGTERM)

    def _why(self, job: Job, status: int) -> str:
        said = self.progress(job)
        if said.get("phase") == "failed" and said.get("message"):
            return str(said["message"])[:2000]
        log = (self.folder / job.key / _LOG_FILE).read_text(encoding="utf-8", errors="replace").strip()
        return log.splitlines()[-1][:2000] if log else f"the training ended with status {status}."


def as_training_picture(image: Image.Image, mask: Image.Image | None = None) -> TrainingPicture:
    """A picture that somebody sent, no larger than training needs. What is transparent is outside of its mask.

    Args:
        image: `RGB` or `RGBA`.
        mask: white where the subject is; None: the picture's transparency, if it has any.

    Raises:
        ValueError: the mask has another size.
    """
    rgb, alpha = split_alpha(image)
    mask = alpha if mask is None else opaque(mask).convert("L")
    if mask is not None and mask.size != rgb.size:
        raise ValueError(f"a mask has the size {mask.size}, its picture {rgb.size}; expected the same.")
    scale = min(1.0, _LONGEST_SIDE / max(rgb.size))
    size = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
    rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    return TrainingPicture(rgb, mask.resize(size) if mask is not None and mask.getbbox() else None)


def _files(picture: TrainingPicture, stem: str) -> dict[str, bytes]:
    """A picture and its mask as the trainer reads them: file name -> bytes, without metadata."""
    image = picture.image.convert("RGB")
    image.info = {}
    if picture.mask is None or not picture.mask.getbbox():
        return {f"{stem}.png": png_bytes(image)}
    return {f"{stem}.png": png_bytes(image), f"{stem}{MASK_ENDING}.png": png_bytes(picture.mask.convert("L"))}


def training_threads() -> int:
    """How many threads a training computes with: one processor is left to the page."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count - 1)


def _environment(on_cpu: bool) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": str(training_threads())}
    return {**os.environ, **own, **({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})}


def _class_phrase(text: str) -> str:
    try:
        return class_phrase_of(TrainConfig(instance_prompt=text if isinstance(text, str) else ""))
    except ValueError as error:
        raise ValueError(str(error).replace("--instance_prompt: ", "what it is: ")) from None


def _sample(adapter: Path) -> Image.Image | None:
    """The first of the trainer's sample pictures."""
    try:
        with Image.open(adapter.parent / sample_path(adapter.stem, 0)) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
