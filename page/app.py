"""The page itself: the canvas at the left, pictures at the right, subjects in a tab of their own."""

from __future__ import annotations

import inspect
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from multisubject.page.canvas import canvas, noting, offering, underlaying
from multisubject.page.entries import DEFAULTS, LIMITS, METHODS, MOST_IMAGES, MOST_SEED, MOST_STEPS, STARTS, Settings
from multisubject.page.news import CSS as NEWS_CSS
from multisubject.page.news import said
from multisubject.page.reading import read_file
from multisubject.page.safety import MOST_BYTES
from multisubject.page.service import Service
from multisubject.page.studio import Cancelled, Picture, Progress, Refused
from multisubject.page.subjects_tab import CSS as SUBJECTS_CSS
from multisubject.page.subjects_tab import subjects_tab
from multisubject.page.training import TrainingJobs
from multisubject.pictures import data_url

CSS = (
    """
.gradio-container:not(.dark *) { --block-info-text-color: #52525b; --body-text-color-subdued: #52525b; }
#results .grid-wrap { max-height: 40rem; overflow-y: auto; }
.fine img { image-rendering: pixelated; }
footer { display: none !important; }
"""
    + NEWS_CSS
    + SUBJECTS_CSS
)

# Wherever a file is dropped that the canvas does not take, it goes to the field that opens files.
HEAD = """<script>
for (const kind of ["dragover", "drop"])
  window.addEventListener(kind, (event) => {
    const files = event.dataTransfer?.files, input = document.querySelector("#open input[type=file]");
    if (event.defaultPrevented || !event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    if (kind === "dragover" || !files.length || !input) return;
    const one = new DataTransfer();
    one.items.add(files[0]);
    input.files = one.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
</script>"""

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_AT_ONCE: dict[str, Any] = {**_QUIET, "queue": False}

_COPY = "(text) => { navigator.clipboard?.writeText(text); return text; }"


def build(service: Service, jobs: TrainingJobs, work: Path) -> gr.Blocks:
    """The page.

    Args:
        service: what it does.
        jobs: its trainings.
        work: folder for files that go when the server stops.
    """
    return _Page(service, jobs, work).blocks()


class _Page:
    def __init__(self, service: Service, jobs: TrainingJobs, work: Path):
        self.service, self.studio, self.jobs, self.work = service, service.studio, jobs, work
        call = inspect.signature(type(self.studio.pipe).__call__)
        self.own_scale: float = call.parameters["guidance_scale"].default

    # --- what it looks like ------------------------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(
            title="multisubject", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
        ) as page:
            with gr.Tab("Pictures", id="pictures"), gr.Row():
                with gr.Column(scale=3, min_width=340):
                    self.canvas = canvas(self.example(), self.offers())
                with gr.Column(scale=2, min_width=340):
                    self._pictures()
            subjects_tab(self.service.library, self.jobs, self.canvas)
            self.made = gr.State([])
            self._serve()
            self._wire(page)
        return page

    def _pictures(self) -> None:
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="go", scale=2)
            self.stop = gr.Button("Cancel", variant="stop", elem_id="stop", interactive=False, min_width=80)
        self.status = gr.HTML(elem_id="status", value=said("Draw where the subjects stand, then generate."))
        small = min(self.studio.base.size) < 256
        self.gallery = gr.Gallery(
            label="Pictures",
            elem_id="results",
            elem_classes="fine" if small else None,
            columns=2,
            height="auto",
            object_fit="contain",
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
        )
        controls: dict[str, Any] = {}
        with gr.Row():
            controls["num_images"] = gr.Slider(
                1, MOST_IMAGES, DEFAULTS.num_images, step=1, label="Pictures", elem_id="num_images", min_width=200
            )
            controls["num_inference_steps"] = gr.Slider(
                1, MOST_STEPS, DEFAULTS.num_inference_steps, step=1, label="Steps", elem_id="steps", min_width=200
            )
        with gr.Row():
            controls["seed"] = gr.Number(
                DEFAULTS.seed, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, elem_id="seed", min_width=120
            )
            self.new_seed = gr.Checkbox(
                False, label="A new seed each time", elem_id="new_seed", min_width=120, container=True
            )
        controls |= self._start_controls() | self._guidance_controls()
        with gr.Accordion("Attention maps of the chosen picture", open=False):
            self.sheet = gr.Image(
                label="Attention maps of the chosen picture",
                show_label=False,
                elem_id="sheet",
                interactive=False,
                format="png",
                buttons=["download", "fullscreen"],
            )
        with gr.Accordion("Take it along", open=False, elem_id="along"):
            with gr.Row():
                self.as_python = gr.Button("Copy as Python", elem_id="as_python", min_width=120)
                self.as_config = gr.Button("Copy as config", elem_id="as_config", min_width=120)
            self.python = gr.Code(language="python", label="Python", visible=False, elem_id="python", max_lines=20)
            self.config = gr.Code(language="json", label="page.json", visible=False, elem_id="config", max_lines=20)
        # Not in a part that is closed at first, which the browser has no field of before it is opened.
        self.file = gr.File(
            label="Bring back: a picture made here, or its config",
            elem_id="open",
            file_types=[".png", ".json", ".zip"],
            height=165,
        )
        self.controls = controls

    def _start_controls(self) -> dict[str, Any]:
        starts = [(label, key) for key, label in STARTS.items()]
        with gr.Accordion("Start from", open=False, elem_id="start_from"):
            start = gr.Radio(
                starts,
                value=DEFAULTS.start,
                label="Start from",
                show_label=False,
                info="Click a result, and it lies under the regions.",
                elem_id="start",
            )
            strength = gr.Slider(
                *LIMITS["image_strength"],
                DEFAULTS.image_strength,
                step=0.05,
                label="How much may change",
                info="1 keeps nothing of what is there.",
                elem_id="image_strength",
                visible=False,
            )
            # Regions come and go: a value that is no choice any more is let through, and checked like all others.
            region = gr.Dropdown([], label="Region to redraw", elem_id="region", visible=False, allow_custom_value=True)
        start.change(
            lambda name: (gr.Slider(visible=name != "noise"), gr.Dropdown(visible=name == "region")),
            start,
            [strength, region],
            **_AT_ONCE,
        )
        return {"start": start, "image_strength": strength, "region": region}

    def _guidance_controls(self) -> dict[str, Any]:
        def number(name: str, label: str, info: str, value: float | None = None, **options: Any) -> gr.Number:
            low, high = LIMITS[name]
            value = getattr(DEFAULTS, name) if value is None else value
            return gr.Number(
                value, label=label, info=info, minimum=low, maximum=high, min_width=140, elem_id=name, **options
            )

        with gr.Accordion("Method", open=False, elem_id="method"):
            chosen = DEFAULTS.guidance_method
            method = gr.Dropdown(
                list(METHODS), value=chosen, label="Method", info=METHODS[chosen], elem_id="method_name"
            )
            method.change(lambda name: gr.Dropdown(info=METHODS.get(name, "")), method, method, **_AT_ONCE)
            with gr.Row():
                scale = number("guidance_scale", "Guidance scale", "How closely to follow the prompt.", self.own_scale)
                weight = number("guidance_weight", "Pull", "How strongly regions pull their words.", step=0.01)
            with gr.Row():
                steps = number(
                    "guidance_steps",
                    "Guided steps",
                    f"How many of the first steps follow the regions; {MOST_STEPS}: all.",
                    MOST_STEPS,
                    precision=0,
                )
                negative = number(
                    "weight_negative",
                    "Weight outside",
                    "Of a subject's words outside its region; 0 does not hide them.",
                )
            with gr.Row():
                recurrence = number(
                    "recurrence", "Visits", "How often early steps are taken; 2 helps several subjects.", precision=0
                )
                visited = number(
                    "recurrence_steps", "Early steps", "How many of the first steps these are.", 5, precision=0
                )
            moved = gr.Checkbox(
                DEFAULTS.move_objects,
                label="Move objects into their regions",
                info="Where the method does so, early in runs of ten steps or more.",
                elem_id="move_objects",
            )
        return {
            "guidance_method": method,
            "guidance_scale": scale,
            "guidance_weight": weight,
            "guidance_steps": steps,
            "weight_negative": negative,
            "recurrence": recurrence,
            "recurrence_steps": visited,
            "move_objects": moved,
        }

    def settings(self, given: Sequence[Any]) -> dict[str, Any]:
        """The controls' values as settings. A control shows a number where settings may have none."""
        settings = {field.name: value for field, value in zip(fields(Settings), given, strict=True)}
        for field in fields(Settings):
            value = settings[field.name]
            if "int" in str(field.type) and isinstance(value, float) and value.is_integer():
                settings[field.name] = int(value)  # a browser may send 2.0 for 2
        if settings["guidance_scale"] == self.own_scale:
            settings["guidance_scale"] = None
        if settings["guidance_steps"] == MOST_STEPS:
            settings["guidance_steps"] = None
        if settings["recurrence"] == 1:
            settings["recurrence_steps"] = None
        if settings["start"] != "region":
            settings["region"] = None
        return settings

    def controls_of(self, settings: Settings) -> dict[str, Any]:
        """The other way round."""
        values = asdict(settings)
        if settings.guidance_scale is None:
            values["guidance_scale"] = self.own_scale
        if settings.guidance_steps is None:
            values["guidance_steps"] = MOST_STEPS
        if settings.recurrence_steps is None:
            guided = settings.num_inference_steps if settings.guidance_steps is None else settings.guidance_steps
            values["recurrence_steps"] = guided if settings.recurrence > 1 else 5
        return values

    # --- what happens ------------------------------------------------------------------------------------------------

    def _wire(self, page: gr.Blocks) -> None:
        asked = [self.canvas, *(self.controls[field.name] for field in fields(Settings))]
        self.go.click(
            self.generate,
            [*asked, self.new_seed],
            [self.gallery, self.status, self.stop, self.controls["seed"], self.made, self.sheet],
            trigger_mode="once",
            concurrency_limit=4,
            concurrency_id="model",
            **_QUIET,
        )
        self.stop.click(self.cancel, **_AT_ONCE)
        changes = [self.canvas.change, *(self.controls[name].change for name in self.controls if name != "region")]
        gr.on(
            [*changes, page.load],
            self.review,
            asked,
            [self.canvas, self.controls["region"]],
            trigger_mode="always_last",
            **_AT_ONCE,
        )
        self.gallery.select(self.choose, self.made, [self.canvas, self.sheet], **_AT_ONCE)
        copied = gr.Textbox(visible=False)
        for button, name, code, other in (
            (self.as_python, "python", self.python, self.config),
            (self.as_config, "config", self.config, self.python),
        ):
            show = button.click(self.code(name), asked, [code, other, copied, self.status], **_AT_ONCE)
            show.success(None, copied, None, js=_COPY)
        self.file.upload(self.open, [self.file], [*asked, self.file, self.status], api_visibility="private")
        page.load(lambda: offering(self.offers()), None, self.canvas, **_AT_ONCE)

    def _serve(self) -> None:
        """The same over HTTP."""
        gr.api(self.service.generate, api_name="generate", concurrency_limit=4, concurrency_id="model")
        gr.api(self.service.check, api_name="check")
        gr.api(self.service.code, api_name="code")
        gr.api(self.service.subjects, api_name="subjects")

    def example(self) -> dict[str, Any]:
        """What a new tab begins with."""
        names = [subject["name"] for subject in self.service.library.listing()]
        pair = [name for name in ("petrucci", "majesty") if name in names] or names[:2]
        things = " and ".join(f"<{name}>" for name in pair)
        width, height = self.studio.base.size[::-1]
        prompt = f"a photo of {things} on the beach" if things else ""
        return {"size": [width, height], "prompt": prompt, "negative_prompt": "", "regions": [], "underlay": None}

    def offers(self) -> dict[str, Any]:
        """What the canvas has to choose from."""
        return {
            "sizes": self.studio.sizes(),
            "subjects": self.service.library.listing(),
            "loras": list(self.studio.loras),
            "adapters": self.studio.adapter_names(),
        }

    def review(self, document: Any, *given: Any) -> tuple[Any, Any]:
        """Problems of what was drawn, and the regions to choose from."""
        if not isinstance(document, dict):
            return gr.skip(), gr.skip()
        problems = self.service.problems(document, self.settings(given))
        regions = _choices(document)
        chosen = given[[field.name for field in fields(Settings)].index("region")]
        keys = [key for _, key in regions]
        value = chosen if chosen in keys else keys[0] if keys else None
        return noting(problems), gr.Dropdown(regions, value=value)

    def generate(self, request: gr.Request, document: Any, *given: Any) -> Iterator[dict[Any, Any]]:
        """Pictures one by one, with a preview of the one that is being made."""
        settings, new_seed = self.settings(given[:-1]), given[-1]
        if new_seed:
            settings["seed"] = secrets.randbelow(2**31)
            yield {self.controls["seed"]: settings["seed"]}
        pictures, made = list[tuple[Any, str]](), list[dict[str, Any]]()
        try:
            job = self.service.job(document, settings)
            yield {self.gallery: [], self.made: [], self.sheet: None} | self._busy("Starting …")
            start, folder = time.monotonic(), self.work / secrets.token_hex(8)
            folder.mkdir(parents=True)
            for item in self.service.run(job, request.session_hash or ""):
                if isinstance(item, Progress):
                    yield self._progress(item, pictures, job.settings.num_images)
                    continue
                # The gallery offers files of the work folder: those that are kept are not to be asked for by name.
                copy = str(shutil.copy(item.path, folder / f"seed_{item.seed}.png"))
                pictures.append((copy, f"seed {item.seed}"))
                made.append({"path": copy, "sheet": _copied(item, folder)})
                kept = item.path.parent
                yield {self.gallery: [*pictures], self.made: [*made]}
            news = said(f"Done in {time.monotonic() - start:.1f} s, kept in {kept}.")
        except Cancelled:
            news = said("Cancelled.")
        except Refused as refused:
            news = _refused(refused)
        except (ValueError, RuntimeError, OSError) as error:  # what only the model, its scheduler or the disk can tell
            news = said(ValueError(f"Stopped: {error}"))
        shown = {self.gallery: [*pictures], self.sheet: made[0]["sheet"]} if pictures else {}
        yield shown | {self.status: news, self.stop: gr.Button(interactive=False)}

    def _busy(self, text: str, done: float | None = None) -> dict[Any, Any]:
        return {self.status: said(text, done), self.stop: gr.Button(interactive=True)}

    def _progress(self, news: Progress, pictures: list[tuple[Any, str]], count: int) -> dict[Any, Any]:
        if not news.number:
            return self._busy("Waiting for the pictures of others …")
        of = f"Picture {news.number} of {count}, " if count > 1 else ""
        done = (news.number - 1 + news.step / max(news.steps, 1)) / count
        shown = {self.gallery: [*pictures, (news.preview, "…")]} if news.preview else {}
        return self._busy(f"{of}step {news.step} of {news.steps}", done) | shown

    def cancel(self, request: gr.Request) -> None:
        """Stop this tab's run, which says so itself."""
        self.service.cancel(request.session_hash or "")

    def choose(self, made: list[dict[str, Any]], event: gr.SelectData) -> tuple[Any, Any]:
        """The chosen picture lies under the regions, its attention maps are shown."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(made):
            return gr.skip(), gr.skip()
        with Image.open(made[event.index]["path"]) as picture:
            return underlaying(data_url(picture)), made[event.index]["sheet"]

    def code(self, name: str) -> Any:
        """What a Copy button calls."""

        def show(document: Any, *given: Any) -> tuple[Any, ...]:
            try:
                code = self.service.code_of(self.service.job(document, self.settings(given)))
            except Refused as refused:
                return gr.skip(), gr.skip(), "", _refused(refused)
            hint = f" Save it as page.json, then: {code['command']}" if name == "config" else ""
            return gr.Code(code[name], visible=True), gr.Code(visible=False), code[name], said(f"Copied.{hint}")

        return show

    def open(self, path: str | None) -> list[Any]:
        """A dropped file: everything as it was."""
        nothing = [gr.skip()] * (1 + len(fields(Settings)))
        if not path:
            return [*nothing, None, gr.skip()]
        try:
            with open(path, "rb") as file:
                data = file.read(MOST_BYTES + 1)
            read, settings, notes = read_file(data, list(self.service.library.sources()), self.studio.base)
        except (ValueError, TypeError) as error:
            return [*nothing, None, said(ValueError(f"Not opened: {error}"))]
        opened = read.plain()
        values = self.controls_of(settings)
        regions = gr.Dropdown(_choices(opened), value=values.pop("region"))
        return [opened, *values.values(), regions, None, said(" ".join(["Opened.", *notes]))]


def _choices(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Regions with a shape, as `(label, id)`."""
    regions = document.get("regions")
    choices = []
    for number, region in enumerate(regions if isinstance(regions, list) else [], 1):
        if isinstance(region, dict) and isinstance(region.get("id"), str) and region.get("shape"):
            name = region.get("subject") or region.get("phrase") or region.get("prompt") or "region"
            choices.append((f"{number} {str(name)[:40]}", region["id"]))
    return choices


def _copied(picture: Picture, folder: Path) -> str | None:
    if picture.sheet_path is None:
        return None
    return str(shutil.copy(picture.sheet_path, folder / f"seed_{picture.seed}_attention.png"))


def _refused(refused: Refused) -> str:
    return "".join(said(ValueError(problem.text)) for problem in refused.problems)
