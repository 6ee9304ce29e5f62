"""What the page does, apart from how it looks: called by its widgets, and over HTTP as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import gradio as gr

from multisubject.page.as_python import as_python
from multisubject.page.document import Document, read_document
from multisubject.page.entries import Settings, as_command, as_config, read_settings
from multisubject.page.studio import Job, Picture, Problem, Progress, Refused, Studio
from multisubject.page.subjects import SubjectLibrary
from multisubject.pictures import png_url


@contextmanager
def told(*errors: type[Exception]) -> Iterator[None]:
    """These become one whose words Gradio passes on."""
    try:
        yield
    except errors as error:
        raise gr.Error(str(error), print_exception=False) from None


class Service:
    """The operations of the page.

    Args:
        studio: the base model.
        library: the subjects.
    """

    def __init__(self, studio: Studio, library: SubjectLibrary):
        self.studio, self.library = studio, library
        self._stops: dict[str, set[threading.Event]] = {}
        self._lock = threading.Lock()

    def read(self, document: Any, settings: Any) -> tuple[Document, Settings]:
        """Both checked. Raises `ValueError`."""
        if isinstance(document, dict) and "size" not in document:
            document = {**document, "size": [*self.studio.base.size[::-1]]}
        return read_document(document), read_settings(settings)

    def job(self, document: Any, settings: Any) -> Job:
        """A run that can be started. Raises `Refused`."""
        try:
            read = self.read(document, settings)
        except ValueError as error:
            text = str(error)
            raise Refused([Problem(f"{text[:1].upper()}{text[1:]}")]) from None
        return self.studio.check(*read, self.library.sources())

    def problems(self, document: Any, settings: Any) -> list[dict[str, Any]]:
        """What is wrong, and what could be better, as the canvas takes it."""
        try:
            problems = self.job(document, settings).warnings
        except Refused as refused:
            problems = refused.problems
        return [asdict(problem) for problem in problems]

    def run(self, job: Job, session: str) -> Iterator[Progress | Picture]:
        """As `Studio.run`; `cancel` of the same session stops it."""
        stop = threading.Event()
        with self._lock:
            self._stops.setdefault(session, set()).add(stop)
        try:
            yield from self.studio.run(job, stop)
        finally:
            stop.set()
            with self._lock:
                self._stops[session].discard(stop)
                if not self._stops[session]:
                    del self._stops[session]

    def cancel(self, session: str) -> bool:
        """Stop the runs of a session; whether there was one."""
        with self._lock:
            stops = [*self._stops.get(session, ())]
        for stop in stops:
            stop.set()
        return bool(stops)

    def code_of(self, job: Job) -> dict[str, str]:
        """As `code`. Raises `Refused` where a file that is loaded has gone."""
        asked, sources, base = (job.document, job.settings), self.library.sources(), self.studio.base
        try:
            python = as_python(*asked, sources, base, self.studio.loras, job.task.ip_adapters)
        except (ValueError, OSError) as error:
            raise Refused([Problem(str(error))]) from None
        return {
            "python": python,
            "config": as_config(*asked, sources, self.studio.loras),
            "command": as_command(*asked, base, job.task.ip_adapters),
        }

    # --- over HTTP ---------------------------------------------------------------------------------------------------

    def generate(self, document: dict, settings: dict) -> Iterator[dict]:
        """Make pictures; each answer but the last is news of a step, and the last one has the pictures.

        Args:
            document: `prompt`, `regions` and so on, see docs/page.md.
            settings: `num_images`, `seed`, `num_inference_steps` and so on.
        """
        with told(Refused):
            job = self.job(document, settings)
        pictures: list[dict[str, Any]] = []
        with told(ValueError, RuntimeError, OSError):  # what only the model, its scheduler or the disk can tell
            for news in self.run(job, session=f"call {id(pictures)}"):
                if isinstance(news, Picture):
                    pictures.append({"seed": news.seed, "image": png_url(news.path.read_bytes())})
                    if news.sheet_path:
                        pictures[-1]["attention_maps"] = png_url(news.sheet_path.read_bytes())
                else:
                    yield {"picture": news.number, "step": news.step, "steps": news.steps}
        yield {"pictures": pictures}

    def check(self, document: dict, settings: dict) -> list[dict]:
        """What `generate` would refuse or warn of, without making anything."""
        return self.problems(document, settings)

    def code(self, document: dict, settings: dict) -> dict:
        """The document as lines of Python, as a generation config, and the command for the latter."""
        with told(Refused):
            return self.code_of(self.job(document, settings))

    def subjects(self) -> list[dict]:
        """The subjects that documents may name."""
        return [{key: said[key] for key in ("name", "class_phrase")} for said in self.library.listing()]
