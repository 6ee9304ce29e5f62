"""The tab "Subjects": what there is, from a file, from the Hub, and new ones taught from pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, ImageDraw, ImageFont

from multisubject.page.canvas import offering
from multisubject.page.news import said
from multisubject.page.safety import MOST_BYTES, opaque, read_data_url, read_picture
from multisubject.page.subjects import THUMBNAIL_SIZE, SubjectLibrary
from multisubject.page.subjects_service import SubjectsService
from multisubject.page.training import (
    MOST_PICTURES,
    MOST_STEPS,
    TrainingJobs,
    TrainingPicture,
    as_training_picture,
)
from multisubject.page.training_view import progress_html

_SECONDS_BETWEEN_LOOKS = 1.0
_MASK_COLOUR, _MASK_OPACITY = "#ff3b8d", 0.6  # what is painted over stays to be seen

CSS = """
#subjects .grid-wrap { max-height: none; overflow: visible; }
#subjects_said:not(:has(p)), #train_said:not(:has(p)) { display: none; }
#subjects .fixed-height, #strip .fixed-height { min-height: 0; }
#subjects .grid-container { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
#strip .grid-container { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); }
#subjects .thumbnail-lg { aspect-ratio: 4 / 5; }
#subjects .thumbnail-lg > img { position: absolute; inset: 0 0 auto; height: auto; aspect-ratio: 1; }
#subjects .caption-label, #strip .caption-label {
  left: 0; right: 0; bottom: 0; max-width: none; white-space: normal; overflow-wrap: anywhere; text-align: center;
}
#training_progress svg { display: block; width: 100%; max-width: 34rem; }
#training_progress progress { width: 100%; height: 0.6rem; }
#trainings, #editing {
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 0.6rem;
}
"""


def subjects_tab(library: SubjectLibrary, jobs: TrainingJobs, canvas: gr.Component) -> None:
    """Build the tab, inside of a `gr.Blocks`.

    Args:
        library: the subjects.
        jobs: the trainings.
        canvas: its document offers the subjects; it is told of new ones.
    """
    _SubjectsTab(library, jobs).build(canvas)


# Of a gallery whose pictures are chosen by a click.
_TO_CHOOSE_FROM: dict[str, Any] = {
    "show_label": False, "height": "auto", "interactive": False, "allow_preview": False, "format": "png", "buttons": []
}  # fmt: skip


class _SubjectsTab:
    def __init__(self, library: SubjectLibrary, jobs: TrainingJobs):
        self.library, self.jobs = library, jobs

    # --- what it looks like ------------------------------------------------------------------------------------------

    def build(self, canvas: gr.Component) -> None:
        with gr.Tab("Subjects", id="subjects"):
            with gr.Row():
                with gr.Column(scale=2, min_width=340):
                    self._what_there_is()
                with gr.Column(scale=3, min_width=340):
                    self._new_from_pictures()
                    self._trainings()
            self.timer = gr.Timer(_SECONDS_BETWEEN_LOOKS)
            # What this browser shows: a component, for a state's change would not reach the browser from a timer.
            self.names = gr.Textbox(visible="hidden", elem_id="shown_subjects", label="Subjects shown")
            self.shown = gr.State(None)  # of the training that it shows
            SubjectsService(self.library, self.jobs).serve()
        self._wire(canvas)

    def _what_there_is(self) -> None:
        self.chosen_subject = gr.State(None)
        gr.Markdown("### Subjects")
        self.gallery = gr.Gallery(
            label="Subjects",
            elem_id="subjects",
            columns=4,
            object_fit="cover",
            **_TO_CHOOSE_FROM,
        )
        self.remove_subject = gr.Button("Remove", visible=False, size="sm", elem_id="remove_subject")
        self.said = gr.HTML(elem_id="subjects_said")
        with gr.Accordion("Add from a file", open=False, elem_id="from_file"):
            self.file = gr.File(
                label="A subject's file", file_types=[".safetensors", ".pt"], height=150, elem_id="subject_file"
            )
            with gr.Row():
                self.file_name = gr.Textbox(
                    label="Name", placeholder="as in the file", max_length=64, min_width=120, elem_id="file_name"
                )
                self.file_phrase = gr.Textbox(
                    label="What it is",
                    placeholder="as in the file",
                    max_length=200,
                    min_width=120,
                    elem_id="file_phrase",
                )
            self.add_file = gr.Button("Add", elem_id="add_file")
        with gr.Accordion("Add from the Hugging Face Hub", open=False, elem_id="from_hub"):
            self.hub = gr.Textbox(label="Repository", placeholder="user/petrucci", max_length=300, elem_id="hub_id")
            self.hub_name = gr.Textbox(label="Name", placeholder="as there", max_length=64, elem_id="hub_name")
            self.add_hub = gr.Button("Download and add", elem_id="add_hub")

    def _new_from_pictures(self) -> None:
        self.pictures = gr.State([])
        self.chosen = gr.State(None)
        gr.Markdown("### New subject from pictures")
        self.upload = gr.File(
            label=f"Pictures of it (1 to {MOST_PICTURES})",
            file_count="multiple",
            file_types=[".png", ".jpg", ".jpeg", ".webp"],
            height=150,
            elem_id="new_pictures",
        )
        self.hint = gr.Markdown("Click a picture to crop it, or to paint over what is to be learnt.", visible=False)
        self.strip = gr.Gallery(
            label="Pictures to learn from",
            elem_id="strip",
            columns=6,
            object_fit="contain",
            **_TO_CHOOSE_FROM,
            visible=False,
        )
        with gr.Column(visible=False, elem_id="editing") as self.editing:
            gr.Markdown("Paint over the subject, or nothing at all to learn the whole picture. The first tool crops.")
            self.editor = gr.ImageEditor(
                label="Picture to crop and to paint over",
                show_label=False,
                elem_id="editor",
                type="pil",
                sources=[],
                transforms=["crop"],
                layers=False,
                brush=gr.Brush(
                    colors=[(_MASK_COLOUR, _MASK_OPACITY)],
                    default_color=(_MASK_COLOUR, _MASK_OPACITY),
                    color_mode="fixed",
                    default_size="auto",
                ),
                buttons=[],
                height=420,
            )
            with gr.Row():
                self.keep = gr.Button("Use this", variant="primary", elem_id="keep", min_width=120)
                self.drop = gr.Button("Leave this picture out", elem_id="drop", min_width=120)
        with gr.Row():
            self.name = gr.Textbox(label="Name", placeholder="my-dog", max_length=64, min_width=140, elem_id="new_name")
            self.phrase = gr.Textbox(
                label="What it is", placeholder="dog", max_length=200, min_width=140, elem_id="new_phrase"
            )
            self.steps = gr.Number(
                self.jobs.default_steps,
                label="Steps",
                precision=0,
                minimum=1,
                maximum=MOST_STEPS,
                min_width=100,
                elem_id="new_steps",
            )
        self.train = gr.Button("Train", variant="primary", elem_id="train")
        self.train_said = gr.HTML(elem_id="train_said")

    def _trainings(self) -> None:
        with gr.Column(visible=False, elem_id="trainings") as self.training:
            self.job = gr.Dropdown([], label="Training", elem_id="job", filterable=False)
            self.progress = gr.HTML(elem_id="training_progress", padding=True)
            self.sheet = gr.Image(
                label="What it draws so far",
                show_label=False,
                elem_id="validation",
                interactive=False,
                format="png",
                buttons=["fullscreen"],
                visible=False,
            )
            with gr.Row():
                self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel_training", min_width=100)
                self.resume = gr.Button("Go on", elem_id="resume_training", min_width=100)
                self.forget = gr.Button("Remove", elem_id="remove_training", min_width=100)

    # --- what happens ------------------------------------------------------------------------------------------------

    def _wire(self, canvas: gr.Component) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        at_once = {**quiet, "queue": False}
        look: dict[str, Any] = {
            "inputs": [self.job, self.shown, self.names],
            "outputs": [
                self.training,
                self.job,
                self.progress,
                self.sheet,
                self.cancel,
                self.resume,
                self.forget,
                self.shown,
                self.names,
            ],
        }
        self.timer.tick(self.look, **look, **at_once)
        self.job.input(self.look, **look, **at_once)
        self.names.change(self.refresh, None, [self.gallery, canvas], **at_once)

        self.gallery.select(self.choose_subject, None, [self.chosen_subject, self.remove_subject], **at_once)
        self.remove_subject.click(
            self.removed, self.chosen_subject, [self.said, self.names, self.remove_subject], **at_once
        )
        self.add_file.click(
            self.from_file,
            [self.file, self.file_name, self.file_phrase],
            [self.said, self.names, self.file, self.file_name, self.file_phrase],
            **quiet,
        )
        self.add_hub.click(
            self.from_hub,
            [self.hub, self.hub_name],
            [self.said, self.names],
            concurrency_id="hub",
            concurrency_limit=2,
            trigger_mode="once",
            **quiet,
        )
        pictures = [self.pictures, self.strip, self.hint]
        self.upload.upload(
            self.uploaded, [self.upload, self.pictures], [*pictures, self.upload, self.train_said], **quiet
        )
        editing = [self.chosen, self.editing, self.editor]
        self.strip.select(self.choose_picture, self.pictures, editing, **at_once)
        self.keep.click(
            self.edited, [self.editor, self.pictures, self.chosen], [*pictures, *editing, self.train_said], **quiet
        )
        self.drop.click(self.dropped, [self.pictures, self.chosen], [*pictures, *editing], **at_once)
        self.train.click(
            self.begin,
            [self.name, self.phrase, self.pictures, self.steps, self.editor, self.chosen],
            [self.train_said, *pictures, *editing, self.name, self.phrase, self.job],
            trigger_mode="once",
            **quiet,
        )
        for button, act in ((self.cancel, "stop"), (self.resume, "resume"), (self.forget, "remove")):
            button.click(self.act(act), self.job, [self.train_said, self.job], **at_once).then(
                self.look, **look, **at_once
            )

    def refresh(self) -> tuple[Any, Any]:
        """The gallery, and what the canvas has to choose from."""
        subjects = self.library.subjects()
        shown = [(_tile(one.name, one.thumbnail), f"{one.name} · {one.class_phrase}") for one in subjects]
        return gr.Gallery(shown, selected_index=None), offering({"subjects": self.library.listing()})

    def choose_subject(self, event: gr.SelectData) -> tuple[Any, Any]:
        """A subject that was added here can be removed."""
        subjects = self.library.subjects()
        if not isinstance(event.index, int) or not 0 <= event.index < len(subjects):
            return None, gr.Button(visible=False)
        subject = subjects[event.index]
        return subject.name, gr.Button(f"Remove <{subject.name}>", visible=subject.is_own)

    def removed(self, name: Any) -> tuple[Any, Any, Any]:
        """Forget a subject."""
        try:
            self.library.remove(name)
        except ValueError as error:
            return said(error), gr.skip(), gr.skip()
        return said(f"Removed <{name}>."), self._names(), gr.Button(visible=False)

    def from_file(self, path: Any, name: Any, phrase: Any) -> list[Any]:
        """Add a file's subjects."""
        if not isinstance(path, str):
            return [said(ValueError("Choose a file first.")), *[gr.skip()] * 4]
        try:
            added = self.library.add_file(Path(path), name=_text(name), class_phrase=_text(phrase))
        except (ValueError, OSError) as error:
            return [said(error), *[gr.skip()] * 4]
        return [said(_added(added)), self._names(), None, "", ""]

    def from_hub(self, source: Any, name: Any) -> tuple[Any, Any]:
        """Download and add a repository's subjects."""
        if not _text(source):
            return said(ValueError("Fill in the repository, such as user/petrucci.")), gr.skip()
        try:
            added = self.library.add_from_hub(_text(source) or "", name=_text(name))
        except (ValueError, OSError, HfHubHTTPError) as error:
            return said(error), gr.skip()
        return said(_added(added)), self._names()

    def uploaded(self, paths: Any, pictures: list[TrainingPicture]) -> tuple[Any, ...]:
        """More pictures; those that cannot be read are named."""
        pictures, problems = [*pictures], []
        for path in map(Path, paths or ()):
            if len(pictures) == MOST_PICTURES:
                problems.append(f"all beyond {MOST_PICTURES} pictures, the most.")
                break
            try:
                with path.open("rb") as file:
                    picture = read_picture(file.read(MOST_BYTES + 1), path.name)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            pictures.append(as_training_picture(picture))
        return (
            pictures,
            *_strip(pictures),
            None,
            said(ValueError(f"Left out: {' '.join(problems)}")) if problems else "",
        )

    def choose_picture(self, pictures: list[TrainingPicture], event: gr.SelectData) -> tuple[Any, Any, Any]:
        """Open a picture for cropping and painting."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(pictures):
            return None, gr.Column(visible=False), None
        picture = pictures[event.index]
        layers = [_painted(picture.mask)] if picture.mask is not None else []
        shown = {"background": picture.image, "layers": layers, "composite": None}
        return event.index, gr.Column(visible=True), shown

    def edited(self, value: Any, pictures: list[TrainingPicture], index: Any) -> tuple[Any, ...]:
        """Take over what was cropped and painted."""
        if not _is_index(index, pictures):  # a training has begun with it
            return (*[gr.skip()] * 7,)
        try:
            pictures = _with_edited(pictures, value, index)
        except ValueError as error:
            return (*[gr.skip()] * 6, said(error))
        return pictures, *_strip(pictures), None, gr.Column(visible=False), None, ""

    def dropped(self, pictures: list[TrainingPicture], index: Any) -> tuple[Any, ...]:
        """Leave a picture out."""
        if _is_index(index, pictures):
            pictures = [*pictures[:index], *pictures[index + 1 :]]
        return pictures, *_strip(pictures), None, gr.Column(visible=False), None

    def begin(
        self, name: Any, phrase: Any, pictures: list[TrainingPicture], steps: Any, value: Any, index: Any
    ) -> tuple[Any, ...]:
        """Start a training, with what is still in the editor, and clear the form."""
        try:
            pictures = _with_edited(pictures, value, index)
            if isinstance(steps, float) and steps.is_integer():
                steps = int(steps)
            job = self.jobs.start(_text(name) or "", _text(phrase) or "", pictures, steps)
        except (ValueError, OSError) as error:
            return (said(error), *[gr.skip()] * 9)
        news = said(f"Training <{job.name}>. You may close this page meanwhile, or draw on.")
        return news, [], *_strip([]), None, gr.Column(visible=False), None, "", "", self._dropdown(job.key)

    def act(self, what: str) -> Any:
        """What a button under a training calls."""

        def do(key: Any) -> tuple[Any, Any]:
            try:
                getattr(self.jobs, what)(key)
            except (ValueError, OSError) as error:
                return said(error), gr.skip()
            return "", self._dropdown(key)

        return do

    def look(self, key: Any, shown: Any, names: Any) -> tuple[Any, ...]:
        """What is new of the chosen training, and of the subjects."""
        now = self._names()
        now = gr.skip() if now == names else now
        job = self.jobs.get(key) or next(iter(self.jobs.jobs()), None)
        if job is None:
            news = None
            if shown == news:
                return (*[gr.skip()] * 8, now)
            return (gr.Column(visible=False), *[gr.skip()] * 6, news, now)
        told, sheets = self.jobs.progress(job), self.jobs.sheets(job)
        news = [job.key, job.state, told.get("phase"), told.get("time"), len(sheets), len(self.jobs.jobs())]
        if shown == news:
            return (*[gr.skip()] * 8, now)
        same_sheet = isinstance(shown, list) and (shown[0], shown[4]) == (news[0], news[4])
        sheet = gr.skip() if same_sheet else gr.Image(_opened(sheets), visible=bool(sheets))
        return (
            gr.Column(visible=True),
            self._dropdown(job.key),
            progress_html(job, told, sheets),
            sheet,
            gr.Button("Stop at once" if job.state == "stopping" else "Cancel", visible=job.is_active),
            gr.Button(visible=job.state in ("stopped", "failed")),
            gr.Button(visible=not job.is_active),
            news,
            now,
        )

    def _names(self) -> str:
        return " ".join(self.library.sources())

    def _dropdown(self, key: Any) -> Any:
        jobs = self.jobs.jobs()
        chosen = key if any(job.key == key for job in jobs) else jobs[0].key if jobs else None
        return gr.Dropdown([(f"{job.name} · {job.state}", job.key) for job in jobs], value=chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def _tile(name: str, thumbnail: str | None) -> Image.Image:
    """The thumbnail as a square, or the name's first letter."""
    if thumbnail is None:
        tile = Image.new("RGB", (THUMBNAIL_SIZE, THUMBNAIL_SIZE), "#64748b")
        font = ImageFont.load_default(THUMBNAIL_SIZE * 0.6)
        middle = (THUMBNAIL_SIZE / 2, THUMBNAIL_SIZE / 2)
        ImageDraw.Draw(tile).text(middle, name[:1].upper(), "white", font, anchor="mm")
        return tile
    return read_data_url(thumbnail, "the thumbnail")


def _strip(pictures: Sequence[TrainingPicture]) -> tuple[Any, Any]:
    """The pictures so far, what is not learnt darkened; and the line above them."""
    shown = []
    for number, picture in enumerate(pictures, 1):
        image = picture.image
        if picture.mask is not None:
            image = Image.composite(image, Image.blend(image, Image.new("RGB", image.size), 0.75), picture.mask)
        image = image.copy()
        image.thumbnail((256, 256))
        shown.append((image, f"{number} · masked" if picture.mask is not None else str(number)))
    return gr.Gallery(shown, visible=bool(shown), selected_index=None), gr.Markdown(visible=bool(shown))


def _painted(mask: Image.Image) -> Image.Image:
    """A mask as the brush would have drawn it."""
    layer = Image.new("RGBA", mask.size, _MASK_COLOUR)
    layer.putalpha(mask.point(lambda value: round(value * _MASK_OPACITY)))
    return layer


def _with_edited(pictures: list[TrainingPicture], value: Any, index: Any) -> list[TrainingPicture]:
    """The pictures with the one in the editor as it is there; the same if it holds none of them. Raises `ValueError`
    where next to nothing is left of it."""
    if not _is_index(index, pictures) or not isinstance(value, dict) or value.get("background") is None:
        return pictures
    picture = _from_editor(value)
    if min(picture.image.size) < 16:
        raise ValueError("that leaves next to nothing of the picture.")
    return [*pictures[:index], picture, *pictures[index + 1 :]]


def _from_editor(value: dict[str, Any]) -> TrainingPicture:
    """The editor's picture, and what was painted over it as its mask."""
    background = value["background"]
    covered = np.zeros(background.size[::-1], dtype=np.uint8)
    for layer in value.get("layers") or ():
        painted = layer.convert("RGBA").getchannel("A").resize(background.size)
        covered = np.maximum(covered, np.asarray(painted))
    inside = covered > 255 * _MASK_OPACITY / 2
    mask = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)) if inside.any() else None
    return TrainingPicture(opaque(background), mask)


def _opened(sheets: Sequence[Path]) -> Image.Image | None:
    if not sheets:
        return None
    with Image.open(sheets[-1]) as sheet:
        return sheet.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def _added(names: Sequence[str]) -> str:
    return f"Added {', '.join(f'<{name}>' for name in names)}."


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _is_index(index: Any, items: Sequence[Any]) -> bool:
    return isinstance(index, int) and 0 <= index < len(items)
