"""From a document to pictures on disk: those of `generate_images.py`, kept with all that made them."""

import contextlib
import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import multisubject
from multisubject import generate_images
from multisubject.generation import making
from multisubject.generation.base_model import BaseModel
from multisubject.generation.picture_files import read_settings as settings_in
from multisubject.page.as_python import as_python
from multisubject.page.document import read_document
from multisubject.page.entries import as_config, read_settings
from multisubject.page.reading import read_file
from multisubject.page.studio import Cancelled, Picture, Progress, Refused, Studio
from multisubject.pictures import data_url

ROOT = Path(multisubject.__file__).parent
SOURCES = {path.stem: str(path) for path in sorted((ROOT / "embeddings").glob("*.safetensors"))}
LORAS = {path.stem: str(path) for path in sorted((ROOT / "embeddings" / "loras").glob("*.safetensors"))}
LEFT, RIGHT = [0.05, 0.2, 0.45, 0.9], [0.55, 0.2, 0.95, 0.9]
DOCUMENT = {
    "size": [128, 128],
    "prompt": "a photo of <petrucci> and <majesty> on the beach",
    "negative_prompt": "snow",
    "regions": [
        {"id": "a", "subject": "petrucci", "shape": {"box": LEFT}, "negative_prompt": "hat"},
        {"id": "b", "subject": "majesty", "shape": {"ellipse": RIGHT}},
    ],
}


@pytest.fixture(scope="module")
def studio(base_path, tmp_path_factory):
    base = BaseModel.read(base_path)
    return Studio(base, torch.device("cpu"), torch.float32, tmp_path_factory.mktemp("page"), LORAS)


def job(studio, settings=None, sources=SOURCES, **changes):
    asked = read_settings({"num_inference_steps": 3, "num_images": 1} | (settings or {}))
    return studio.check(read_document(DOCUMENT | changes), asked, sources)


def pictures(studio, *args, **changes):
    return [news for news in studio.run(job(studio, *args, **changes), threading.Event()) if isinstance(news, Picture)]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_are_those_of_generate_images_bit_for_bit(studio, tmp_path):
    made = pictures(studio, {"num_images": 2, "seed": 3, "recurrence": 2, "recurrence_steps": 1})
    settings = read_settings({"seed": 3, "recurrence": 2, "recurrence_steps": 1})
    (tmp_path / "page.json").write_text(as_config(read_document(DOCUMENT), settings, SOURCES))
    generate_images.main(
        f"--generation_config {tmp_path / 'page.json'} --output_dir {tmp_path} --num_images 2 --num_inference_steps 3 "
        "--device cpu --save_attention_maps".split()
    )
    commanded = sorted(path for path in tmp_path.rglob("000?.png"))
    assert len(made) == len(commanded) == 2
    for picture, path in zip(made, commanded, strict=True):
        assert np.array_equal(pixels(picture.path), pixels(path))
        assert np.array_equal(pixels(picture.sheet_path), pixels(path.with_name(f"{path.stem}_attention.png")))
        of_page, of_command = settings_in(picture.path), settings_in(path)
        for settings in (of_page, of_command):
            for subject in settings["subjects"].values():
                subject["source"] = Path(subject["source"]).name  # absolute here, relative there
        assert of_page == of_command


@pytest.mark.parametrize("start", ["noise", "picture", "region"])
def test_copied_python_makes_the_picture(start, studio, tmp_path, monkeypatch):
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8))
    underlay = None if start == "noise" else data_url(source)
    settings = {"start": start, "region": "b", "num_inference_steps": 4}
    asked = job(studio, settings, underlay=underlay)
    (made,) = [news for news in studio.run(asked, threading.Event()) if isinstance(news, Picture)]
    monkeypatch.chdir(tmp_path)  # before: paths below the working folder are shortened
    code = as_python(asked.document, asked.settings, SOURCES, studio.base, LORAS)
    source.save("source.png")
    with contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, "page.py", "exec"), {})
    assert np.array_equal(pixels(made.path), pixels("picture.png"))


def test_a_redrawn_region_leaves_the_rest_as_it_was(studio):
    source = Image.new("RGB", (128, 128), (10, 200, 30))
    (made,) = pictures(studio, {"start": "region", "region": "a"}, underlay=data_url(source))
    changed = (pixels(made.path) != np.asarray(source)).any(-1)
    assert changed[30:110, 10:54].mean() > 0.9 and not changed[:, 64:].any()


@pytest.mark.parametrize("start", ["noise", "region"])
def test_a_picture_brings_everything_back(start, studio):
    underlay = data_url(Image.new("RGB", (128, 128), "green"))
    strokes = {"strokes": [{"erase": False, "width": 0.3, "points": [[0.2, 0.5], [0.3, 0.6]]}]}
    regions = [DOCUMENT["regions"][0] | {"shape": strokes}, DOCUMENT["regions"][1]]
    settings = {"start": start, "region": "b", "seed": 11, "num_images": 2, "guidance_method": "cones2"}
    made = pictures(studio, settings, regions=regions, underlay=underlay)[1]
    document, read, notes = read_file(made.path.read_bytes(), list(SOURCES), studio.base)
    assert document.regions == read_document(DOCUMENT | {"regions": regions}).regions
    assert read == read_settings(settings | {"seed": 12, "num_images": 1, "num_inference_steps": 3}) and not notes
    shown = pixels(made.path) if start == "noise" else np.asarray(Image.new("RGB", (128, 128), "green"))
    assert np.array_equal(np.asarray(document.underlay), shown)


def test_a_picture_of_generate_images_comes_back_too(studio, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    generate_images.main(
        f"--generation_config configs/guidance_conf_two.json --output_dir {tmp_path} --num_images 1 "
        "--num_inference_steps 3 --device cpu".split()
    )
    (path,) = tmp_path.rglob("0000.png")
    document, settings, notes = read_file(path.read_bytes(), list(SOURCES), studio.base)
    assert not notes and len(document.regions) == 2 and settings.num_inference_steps == 3
    asked = studio.check(document, settings, SOURCES)
    (made,) = [news for news in studio.run(asked, threading.Event()) if isinstance(news, Picture)]
    assert np.array_equal(pixels(made.path), pixels(path))


def test_a_lora_acts_in_its_region_and_is_gone_afterwards(studio):
    (before,) = pictures(studio)
    regions = [DOCUMENT["regions"][0] | {"lora": {"petrucci": 1.0}}, DOCUMENT["regions"][1]]
    (with_lora,) = pictures(studio, regions=regions)
    (after,) = pictures(studio)
    assert not np.array_equal(pixels(before.path), pixels(with_lora.path))
    assert np.array_equal(pixels(before.path), pixels(after.path))


def test_a_lora_stays_while_it_is_wanted(studio, monkeypatch):
    loaded = []
    monkeypatch.setattr(making, "load_loras", lambda *given, load=making.load_loras: loaded.append(load(*given)))
    regions = [DOCUMENT["regions"][0] | {"lora": {"petrucci": 1.0}}, DOCUMENT["regions"][1]]
    first, second = pictures(studio, {"num_images": 2}, regions=regions)
    (again,) = pictures(studio, {"seed": 1}, regions=regions)
    assert len(loaded) == 1 and np.array_equal(pixels(again.path), pixels(second.path))
    pictures(studio)
    (anew,) = pictures(studio, regions=regions)
    assert len(loaded) == 3 and np.array_equal(pixels(anew.path), pixels(first.path))


def test_news_come_step_by_step_with_previews(studio):
    news = list(studio.run(job(studio, {"num_inference_steps": 6, "num_images": 2}), threading.Event()))
    steps = [item for item in news if isinstance(item, Progress)]
    assert [(item.number, item.step, item.steps) for item in steps][-1] == (2, 6, 6)
    assert any(item.preview is not None and item.preview.size == (128, 128) for item in steps)


def test_cancel_ends_a_picture_after_its_step(studio):
    stop, seen = threading.Event(), []
    with pytest.raises(Cancelled):
        for news in studio.run(job(studio, {"num_inference_steps": 150}), stop):
            seen.append(news)
            stop.set()
    assert len(seen) < 20 and not any(isinstance(news, Picture) for news in seen)
    assert pictures(studio)  # and the model is as before


def test_closing_a_run_frees_the_model(studio):
    run = studio.run(job(studio, {"num_inference_steps": 150}), threading.Event())
    next(run)
    start = time.monotonic()
    run.close()
    assert time.monotonic() - start < 5 and pictures(studio)


def test_two_tabs_get_their_own_pictures(studio):
    alone = {name: pixels(pictures(studio, regions=[], prompt=f"a photo of <{name}>")[0].path) for name in SOURCES}
    found = {}

    def tab(name):
        found[name] = pixels(pictures(studio, regions=[], prompt=f"a photo of <{name}>")[0].path)

    threads = [threading.Thread(target=tab, args=[name]) for name in SOURCES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(np.array_equal(alone[name], found[name]) for name in SOURCES)


@pytest.mark.parametrize(
    ("changes", "settings", "message", "region"),
    [
        ({"prompt": ""}, {}, "Write a prompt", None),
        (
            {"prompt": "a photo of <petruci> and <majesty>"},
            {},
            "'<petruci>' is not among the subjects; did you mean '<petrucci>'?",
            None,
        ),
        ({"regions": [{"id": "x", "subject": "rex", "shape": {"box": LEFT}}]}, {}, "'<rex>' is not among", "x"),
        ({"regions": [{"id": "x", "phrase": "red ball", "shape": {"box": LEFT}}]}, {}, "not in the prompt", "x"),
        ({"regions": [{"id": "x", "subject": "petrucci"}]}, {}, "Region 1 ('petrucci') needs exactly one of", "x"),
        ({"regions": [{"id": "x", "subject": "petrucci", "shape": {"box": LEFT}, "weight": -1}]}, {}, "weight", "x"),
        ({"regions": [{"id": "x", "prompt": "a hat", "shape": {"box": LEFT}, "lora": {"no": 1}}]}, {}, "'no'", "x"),
        ({}, {"guidance_method": "none such"}, "expected one of", None),
        ({}, {"start": "picture"}, "no picture under the regions", None),
        ({}, {"start": "region"}, "Choose the region", None),
    ],
)
def test_what_cannot_be_run_is_said_in_its_place(changes, settings, message, region, studio):
    with pytest.raises(Refused) as refused:
        job(studio, settings, **changes)
    (problem,) = [one for one in refused.value.problems if message in one.text]
    assert problem.region == region and problem.severity == "error"
    assert "page.json" not in problem.text and "residual_dict" not in problem.text


def test_what_could_be_better_is_a_warning_in_its_place(studio):
    small = {"id": "x", "subject": "majesty", "shape": {"box": [0.6, 0.6, 0.7, 0.7]}}
    (warning,) = job(studio, regions=[DOCUMENT["regions"][0], small]).warnings
    assert warning.region == "x" and warning.severity == "warning" and "Enlarge it" in warning.text


def test_sizes_are_those_that_the_network_halves(studio):
    sizes = studio.sizes()
    assert sizes[0] == {"size": [128, 128], "label": "1:1"}
    assert all(side % 32 == 0 for size in sizes for side in size["size"])


def test_an_unused_plain_call_is_the_same(studio):
    """The page's callback and maps change nothing: the pipeline alone makes the same picture."""
    (made,) = pictures(studio)
    asked = job(studio)
    making.load_subjects(studio.pipe, asked.task)
    image = making.draw(studio.pipe, asked.task, asked.args, 0, asked.task.regions()).images[0]
    assert np.array_equal(np.asarray(image), pixels(made.path))
