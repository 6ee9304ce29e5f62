"""Reference pictures of regions on the page, with an IP-Adapter of random weights."""

import base64
import contextlib
import io
import shlex
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from browser import drag, needs_chromium, number, run, started, visited
from conftest import serve_page, write_ip_adapter
from PIL import Image
from safetensors.torch import load_file, save_file

from multisubject import generate_images
from multisubject.generation.arguments import IPAdapterArguments
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import ConfigError
from multisubject.generation.picture_files import read_settings as settings_in
from multisubject.page import server
from multisubject.page.as_python import as_python
from multisubject.page.document import read_document
from multisubject.page.entries import read_settings
from multisubject.page.reading import read_file
from multisubject.page.studio import Picture, Refused, Studio
from multisubject.pictures import data_url, png_bytes
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL

ROOT = Path(generate_images.__file__).parent
LEFT, RIGHT = [0.05, 0.2, 0.45, 0.9], [0.55, 0.2, 0.95, 0.9]
RED, BLUE = (data_url(Image.new("RGB", (40, 40), colour)) for colour in ("red", "blue"))
QUICK = {"num_inference_steps": 3, "num_images": 1}


def document(picture=RED, **more):
    return {
        "size": [128, 128],
        "prompt": "a photo of <petrucci> on the beach",
        "regions": [
            {"id": "a", "subject": "petrucci", "shape": {"box": LEFT}},
            {"id": "b", "shape": {"box": RIGHT}, "ip_adapter_image": picture},
        ],
        **more,
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two IP-Adapters of the embedded base, with one image encoder: their files."""
    folder = tmp_path_factory.mktemp("models")
    return [write_ip_adapter(EMBEDDED_BASE, folder, name, seed) for seed, name in enumerate(("plain", "plus"))]


@pytest.fixture(scope="module")
def served(adapters, page_server, tmp_path_factory):
    """The page with the first of them. The other server is started before: uploads go to the one that was last."""
    with serve_page(tmp_path_factory, "--ip_adapter", adapters[0], "--ip_adapter_scale", "0.7") as served:
        yield served


@pytest.fixture(scope="module")
def service(served):
    return served.service


@pytest.fixture(scope="module")
def studio_xl(tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("xl"), BaseModel.read(str(EMBEDDED_BASE_XL))
    adapters = IPAdapterArguments([write_ip_adapter(EMBEDDED_BASE_XL, folder / "models")])
    return Studio(base, torch.device("cpu"), torch.float32, folder, {}, adapters)


def pictures(service, asked, **settings):
    job = service.job(asked, QUICK | settings)
    return job, [news for news in service.studio.run(job, threading.Event()) if isinstance(news, Picture)]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# --- what it makes ---------------------------------------------------------------------------------------------------


def test_pictures_are_those_of_the_copied_command(service, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, (made,) = pictures(service, document(), seed=3)
    code = service.code(document(), QUICK | {"seed": 3})
    (tmp_path / "page.json").write_text(code["config"])
    assert "--ip_adapter_scale 0.7" in code["command"]
    generate_images.main([*shlex.split(code["command"])[1:], "--output_dir", "out", "--device", "cpu"])
    (commanded,) = tmp_path.rglob("0000.png")
    assert np.array_equal(pixels(made.path), pixels(commanded))
    of_page, of_command = settings_in(made.path), settings_in(commanded)
    assert of_page["ip_adapters"] == of_command["ip_adapters"] and of_page["layout"] == of_command["layout"]


@pytest.mark.parametrize("start", ["noise", "picture", "region"])
def test_copied_python_makes_the_picture(start, service, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8))
    asked = document(underlay=None if start == "noise" else data_url(source))
    job, (made,) = pictures(service, asked, start=start, region="b", num_inference_steps=4)
    code = service.code_of(job)["python"]
    assert f"'ip_adapter_image': {{'0': '{RED}'}}" in code
    source.save("source.png")
    with contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, "page.py", "exec"), {})
    assert np.array_equal(pixels(made.path), pixels("picture.png"))
    _, (other,) = pictures(
        service, document(BLUE, underlay=asked["underlay"]), start=start, region="b", num_inference_steps=4
    )
    assert not np.array_equal(pixels(made.path), pixels(other.path))


@pytest.mark.parametrize("start", ["noise", "picture", "region"])
def test_copied_python_of_an_xl_base(start, studio_xl, tmp_path, monkeypatch):
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8))
    asked = document(underlay=None if start == "noise" else data_url(source))
    settings = read_settings(QUICK | {"start": start, "region": "b", "num_inference_steps": 4})
    sources = {"petrucci": str(ROOT / "embeddings" / "xl" / "petrucci.safetensors")}
    job = studio_xl.check(read_document(asked), settings, sources)
    (made,) = [news for news in studio_xl.run(job, threading.Event()) if isinstance(news, Picture)]
    monkeypatch.chdir(tmp_path)
    code = as_python(job.document, settings, sources, studio_xl.base, {}, job.task.ip_adapters)
    source.save("source.png")
    with contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, "page.py", "exec"), {})
    assert np.array_equal(pixels(made.path), pixels("picture.png"))


def test_a_file_that_has_gone_since_is_told(service, adapters):
    file, asked = Path(adapters[0]), (document(), QUICK)
    kept = file.rename(file.with_suffix(".kept"))
    try:
        with pytest.raises(Refused, match=f"{file.name}' does not exist"):
            service.code_of(service.job(*asked))
        with pytest.raises(gr.Error, match=f"{file.name}' does not exist"):
            service.code(*asked)
    finally:
        kept.rename(file)


def test_a_document_without_reference_pictures_is_drawn_as_without_an_ip_adapter(service, page_server):
    pictures(service, document())
    plain = document(None)
    plain["regions"].pop()
    _, (made,) = pictures(service, plain)
    _, (expected,) = pictures(page_server.service, plain)
    assert np.array_equal(pixels(made.path), pixels(expected.path)) and "ip_adapters" not in settings_in(made.path)
    assert "--ip_adapter" not in service.code(plain, QUICK)["command"]


def test_a_picture_brings_its_reference_pictures_back(service):
    _, (made,) = pictures(service, document())
    read, _, notes = read_file(made.path.read_bytes(), ["petrucci"], service.studio.base)
    assert read.regions == read_document(document()).regions and not notes


def test_uploads_are_decoded_and_written_anew():
    """A transparent WebP that says who it shows becomes an opaque PNG that does not."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = "who it was"
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(buffer, "WEBP", lossless=True, exif=exif)
    sent = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    expected = data_url(Image.new("RGB", (8, 8), "white"))
    assert read_document(document(sent)).regions[1]["ip_adapter_image"] == {"0": expected}


def test_several_ip_adapters(adapters, tmp_path):
    """One picture for each; a document that has none for one of them can be drawn, too."""
    base = BaseModel.read(str(EMBEDDED_BASE))
    studio = Studio(base, torch.device("cpu"), torch.float32, tmp_path, {}, IPAdapterArguments(adapters))
    assert studio.adapter_names() == ["plain", "plus"]
    made = []
    for held in ({"0": RED}, {"1": RED}, {"0": RED, "1": BLUE}):
        asked = document(held, prompt="a photo on the beach")
        asked["regions"].pop(0)
        job = studio.check(read_document(asked), read_settings(QUICK), {})
        made += [pixels(news.path) for news in studio.run(job, threading.Event()) if isinstance(news, Picture)]
    assert all(not np.array_equal(one, other) for one, other in ((made[0], made[1]), (made[0], made[2])))


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_a_page_without_ip_adapters_says_so_at_the_region(page_server):
    with pytest.raises(Refused) as refused:
        page_server.service.job(document(), QUICK)
    (problem,) = refused.value.problems
    assert problem.region == "b" and problem.text.startswith("Region 2 ('reference picture'): ip_adapter_image needs")
    asked = document()
    asked["regions"][1]["off"] = True
    assert page_server.service.job(asked, QUICK)


def test_a_picture_for_an_ip_adapter_that_is_not_there_is_told_at_its_region(service):
    with pytest.raises(Refused, match=r"for the IP-Adapters \['1'\], expected some of \['0'\]") as refused:
        service.job(document({"1": RED}), QUICK)
    assert refused.value.problems[0].region == "b"


def test_what_is_no_ip_adapter_of_the_base_stops_the_server(adapters, xl_base_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # a server's own, which is put back
    with pytest.raises(SystemExit, match=r"error: --ip_adapter: 'no.safetensors' does not exist"):
        server.main(["--ip_adapter", "no.safetensors"])
    with pytest.raises(SystemExit):
        server.main(["--ip_adapter_image_encoder", "models"])
    assert "--ip_adapter_image_encoder came without --ip_adapter" in capsys.readouterr().err
    base = BaseModel.read(xl_base_path)
    with pytest.raises(ConfigError, match="this IP-Adapter reads prompt embeddings of width 128"):
        Studio(base, torch.device("cpu"), torch.float32, tmp_path, {}, IPAdapterArguments(adapters))
    weights = load_file(adapters[0])
    layer = next(key for key in weights if key.endswith("to_k_ip.weight"))
    save_file(weights | {layer: weights[layer].repeat(2, 1)}, tmp_path / "other.safetensors")
    encoder = str(Path(adapters[0]).with_name("image_encoder"))
    other = IPAdapterArguments([str(tmp_path / "other.safetensors")], encoder)
    with pytest.raises(ValueError, match=r"--ip_adapter .*other.safetensors: its layers are of another base model"):
        Studio(BaseModel.read(str(EMBEDDED_BASE)), torch.device("cpu"), torch.float32, tmp_path, {}, other)


# --- in a browser ----------------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.slow
def test_a_reference_picture_is_uploaded_drawn_with_and_removed(served):
    with started() as browser, visited(browser, served.url) as page:
        page.uncheck(".snap")
        drag(page, LEFT[:2], LEFT[2:])
        page.get_by_label("Show what this region holds").click()
        with page.expect_file_chooser() as chooser:
            page.get_by_label("Region 1: choose a reference picture").click()
        face = png_bytes(Image.new("RGB", (2000, 1000), "red"))
        chooser.value.set_files({"name": "face.png", "mimeType": "image/png", "buffer": face})
        thumbnail = page.locator(".region img[alt='reference picture']")
        thumbnail.wait_for()
        assert thumbnail.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [512, 256]
        assert page.locator(".region .holds").inner_text() == "reference picture"
        with_picture = drawn(page, served)
        held = settings_in(with_picture)
        assert held["ip_adapters"]["weights"][0]["scale"] == 0.7
        assert held["layout"][0]["ip_adapter_image"]["0"].startswith("data:image/png;base64,")

        page.get_by_label("Region 1: remove the reference picture").click()
        thumbnail.wait_for(state="detached")
        without = drawn(page, served)
        assert "ip_adapters" not in settings_in(without) and not np.array_equal(pixels(with_picture), pixels(without))

        page.locator("#open input[type=file]").set_input_files(str(with_picture))
        page.get_by_text("Opened.").wait_for()
        page.locator(".region .holds").get_by_text("reference picture").wait_for()


def drawn(page, served):
    """Generate one picture in three steps: its file."""
    number(page, "num_images", 1)
    number(page, "steps", 3)
    run(page)
    return max(served.output.rglob("0000.png"), key=lambda path: path.stat().st_mtime_ns)
