"""LoRAs and IP-Adapters of the Hub at a revision, on the page and in what is copied from it."""

import contextlib
import io
import shlex
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_ip_adapter
from PIL import Image
from safetensors.torch import load_file, save

from multisubject import generate_images
from multisubject.generation.adapters import read_ip_adapters
from multisubject.generation.arguments import IPAdapterArguments
from multisubject.generation.base_model import BaseModel
from multisubject.page.as_python import as_python
from multisubject.page.document import read_document
from multisubject.page.entries import as_command, as_config, read_settings
from multisubject.page.studio import Picture, Studio
from multisubject.pictures import data_url
from multisubject.tiny_world import EMBEDDED_BASE

LORA = Path(generate_images.__file__).parent / "embeddings" / "loras" / "petrucci.safetensors"
REVISION = "release/1"
ON_HUB = f"user/adapters/models/ip-adapter.safetensors@{REVISION}"
DOCUMENT = {
    "size": [128, 128],
    "prompt": "a photo of a person on the beach",
    "regions": [
        {"id": "a", "phrase": "person", "shape": {"box": [0.05, 0.2, 0.45, 0.9]}, "lora": {"petrucci": 1.0}},
        {
            "id": "b",
            "shape": {"box": [0.55, 0.2, 0.95, 0.9]},
            "ip_adapter_image": {"0": data_url(Image.new("RGB", (40, 40), "red"))},
        },
    ],
}
SETTINGS = {"num_inference_steps": 2, "num_images": 1}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What the revision holds."""
    folder = tmp_path_factory.mktemp("local")
    write_ip_adapter(EMBEDDED_BASE, folder / "models")
    (folder / "loras").mkdir()
    (folder / "loras" / "petrucci.safetensors").write_bytes(LORA.read_bytes())
    return folder


@pytest.fixture
def adapters(hub, local, tmp_path, monkeypatch):
    """A repository with a LoRA and an IP-Adapter, whose newest version is another one."""
    monkeypatch.chdir(tmp_path)

    def files(folder):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    repo = hub.create("user/adapters", files=files(local))
    repo.refs[REVISION] = repo.refs["main"]
    write_ip_adapter(EMBEDDED_BASE, tmp_path / "newer", seed=1)
    newer = {f"models/{name}": data for name, data in files(tmp_path / "newer").items()}
    lora = save({key: -value for key, value in load_file(LORA).items()})
    repo.commit("main", newer | {"loras/petrucci.safetensors": lora})
    return repo


def pictures_of(studio):
    job = studio.check(read_document(DOCUMENT), read_settings(SETTINGS), {})
    return job, [pixels(news.path) for news in studio.run(job, threading.Event()) if isinstance(news, Picture)]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def studio_with(base, folder, ip_adapters, lora):
    return Studio(base, torch.device("cpu"), torch.float32, folder, {"petrucci": lora}, IPAdapterArguments(ip_adapters))


def test_the_image_encoder_beside_an_ip_adapter_is_of_its_revision(adapters):
    base = BaseModel.read(str(EMBEDDED_BASE))
    found = read_ip_adapters(IPAdapterArguments([ON_HUB]), base)
    assert str(found.image_encoder) == f"user/adapters/models/image_encoder@{REVISION}"
    assert found.version == adapters.refs[REVISION]
    newest = read_ip_adapters(IPAdapterArguments([ON_HUB.partition("@")[0]]), base)
    assert str(newest.image_encoder) == "user/adapters/models/image_encoder"
    assert newest.version == adapters.refs["main"]


def test_what_is_copied_makes_the_picture_of_the_revision(adapters, local, tmp_path):
    """On the page, in Python and with the command: all are the pictures of the same files on this machine."""
    base = BaseModel.read(str(EMBEDDED_BASE))
    of_files = studio_with(
        base,
        tmp_path / "a",
        [str(local / "models" / "ip-adapter.safetensors")],
        str(local / LORA.parent.name / LORA.name),
    )
    _, (expected,) = pictures_of(of_files)
    studio = studio_with(base, tmp_path / "b", [ON_HUB], f"user/adapters/loras/petrucci.safetensors@{REVISION}")
    job, (made,) = pictures_of(studio)
    assert np.array_equal(made, expected)
    asked = (job.document, job.settings)
    code = as_python(*asked, {}, base, studio.loras, job.task.ip_adapters)
    with contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, "page.py", "exec"), {})
    assert np.array_equal(pixels("picture.png"), expected), code
    Path("page.json").write_text(as_config(*asked, {}, studio.loras))
    command = shlex.split(as_command(*asked, base, job.task.ip_adapters))
    generate_images.main([*command[1:], "--output_dir", "out", "--device", "cpu"])
    (commanded,) = Path("out").rglob("0000.png")
    assert np.array_equal(pixels(commanded), expected)


def test_ip_adapters_of_several_revisions_are_copied_with_their_own(adapters, local, tmp_path):
    """One at a revision, the newest, and a file of this machine."""
    newest = ON_HUB.partition("@")[0]
    sources = [ON_HUB, newest, str(local / "models" / "ip-adapter.safetensors")]
    base = BaseModel.read(str(EMBEDDED_BASE))
    encoder = f"user/adapters/models/image_encoder@{REVISION}"
    found = read_ip_adapters(IPAdapterArguments(sources, encoder), base)
    code = as_python(read_document(DOCUMENT), read_settings(SETTINGS), {}, base, {}, found)
    scope: dict = {}
    with contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code.partition("image = ")[0], "page.py", "exec"), scope)
    layers = scope["pipe"].unet.encoder_hid_proj.image_projection_layers
    expected = [load_file(weights.path)["image_proj.proj.weight"] for weights in found.weights]
    assert not torch.equal(expected[0], expected[1])
    assert all(torch.equal(layer.image_embeds.weight, one) for layer, one in zip(layers, expected, strict=True))
