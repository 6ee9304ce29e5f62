"""What the tab of subjects does, over HTTP: subjects come and go, trainings begin and end."""

from __future__ import annotations

import base64
import binascii
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from multisubject.page.safety import MOST_BYTES, read_data_url
from multisubject.page.service import told
from multisubject.page.subjects import SubjectLibrary
from multisubject.page.training import MOST_PICTURES, Job, TrainingJobs, as_training_picture

_ACTIONS = ("stop", "resume", "remove")


class SubjectsService:
    """The operations, each of which checks what it is given as if by a stranger.

    Args:
        library: the subjects.
        jobs: the trainings.
    """

    def __init__(self, library: SubjectLibrary, jobs: TrainingJobs):
        self.library, self.jobs = library, jobs

    def serve(self) -> None:
        """Offer them, inside of a `gr.Blocks`."""
        for call in (self.add_subject, self.remove_subject, self.train, self.trainings, self.change_training):
            gr.api(call, api_name=call.__name__)

    def add_subject(self, file: str, name: str = "", class_phrase: str = "") -> list[str]:
        """Add the subjects of a `.safetensors` file, and answer with their names.

        Args:
            file: its bytes in base64.
            name: what to call the subject, where there is one; which to take of several.
            class_phrase: what it is; default: what the file says.
        """
        with told(ValueError, OSError):
            if not isinstance(file, str) or len(file) > MOST_BYTES * 4 // 3 + 4:
                raise ValueError(f"file: expected base64 of at most {MOST_BYTES:,} bytes.")
            try:
                data = base64.b64decode(file, validate=True)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"file: expected base64 ({error}).") from None
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "sent.safetensors")
                path.write_bytes(data)
                return self.library.add_file(
                    path, name=_text(name, "name"), class_phrase=_text(class_phrase, "class_phrase")
                )

    def remove_subject(self, name: str) -> None:
        """Remove a subject that was added here."""
        with told(ValueError, OSError):
            self.library.remove(name)

    def train(self, name: str, class_phrase: str, pictures: list[dict], steps: int = 0) -> dict:
        """Begin a training, and answer as `trainings` for it.

        Args:
            name: what to call the subject.
            class_phrase: what it is, such as `dog`.
            pictures: each as `{"image": "data:image/png;base64,…"}`, with `"mask"` beside it where only what is white
                there is to be learnt.
            steps: 0: as many as fit the base.
        """
        with told(ValueError, OSError):
            if not isinstance(pictures, list) or not 1 <= len(pictures) <= MOST_PICTURES:
                raise ValueError(f"pictures: expected a list of 1 to {MOST_PICTURES}.")
            read = []
            for number, picture in enumerate(pictures, 1):
                if not isinstance(picture, dict) or "image" not in picture or picture.keys() - {"image", "mask"}:
                    raise ValueError(f'picture {number}: expected {{"image": …}} or {{"image": …, "mask": …}}.')
                mask = picture.get("mask")
                read.append(
                    as_training_picture(
                        read_data_url(picture["image"], f"picture {number}"),
                        None if mask is None else read_data_url(mask, f"the mask of picture {number}"),
                    )
                )
            steps = self.jobs.default_steps if steps == 0 and steps is not False else steps
            phrase = _text(class_phrase, "class_phrase") or ""
            return self._said(self.jobs.start(_text(name, "name") or "", phrase, read, steps))

    def trainings(self) -> list[dict]:
        """All trainings, the newest first: `key`, `name`, `class_phrase`, `state` (`waiting`, `running`, `stopping`,
        `done`, `stopped`, `failed`), `message`, `step`, `steps`, `loss` and `curve`."""
        return [self._said(job) for job in self.jobs.jobs()]

    def change_training(self, key: str, action: str) -> None:
        """`stop` a training with a checkpoint, `resume` it, or `remove` one that is over."""
        with told(ValueError, OSError):
            if action not in _ACTIONS:
                raise ValueError(f"action: {str(action)[:40]!r}; expected one of {', '.join(_ACTIONS)}.")
            if self.jobs.get(key) is None:
                raise ValueError(f"key: there is no training {str(key)[:80]!r}.")
            getattr(self.jobs, action)(key)

    def _said(self, job: Job) -> dict[str, Any]:
        told = self.jobs.progress(job)
        return {
            "key": job.key,
            "name": job.name,
            "class_phrase": job.class_phrase,
            "state": job.state,
            "message": job.message,
            "step": told.get("step", 0),
            "steps": job.steps,
            "loss": told.get("loss"),
            "curve": told.get("curve", []),
        }


def _text(value: Any, what: str) -> str | None:
    if not isinstance(value, str):
        raise ValueError(f"{what}: expected text.")
    return value.strip() or None
