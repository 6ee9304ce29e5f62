"""`multisubject-generate` with a base of Stable Diffusion XL: what differs from 1.x and 2.x, and what must not."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EMBED_DIM, EMBED_DIM_2
from PIL import Image

from multisubject.base_models import fingerprint_text_encoder
from multisubject.evaluation.arguments import EvaluateArguments
from multisubject.evaluation.pictures import Notes, read_pictures
from multisubject.generate_images import main
from multisubject.generation import making
from multisubject.generation.arguments import GenerateArguments
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import ConfigError, read_config
from multisubject.generation.picture_files import CONTACT_SHEET, read_settings
from multisubject.generation.tasks import load_tasks
from multisubject.hub_utils import save_subject
from multisubject.residual_embeddings import ResidualEmbedding

FOLDER = Path("rex/a_photo_of_rex_and_a_ball")
ENTRY = {
    "prompt": "a photo of <rex> and a ball",
    "residual_dict": {"rex": "rex.safetensors"},
    "layout": {"rex": [0, 0, 0.5, 1], "ball": [0.5, 0, 1, 1]},
    "negative_prompt": "a mug and <rex>",
}


@pytest.fixture(scope="module")
def base(xl_base_path):
    return BaseModel.read(xl_base_path)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A user's folder, to work in: a subject with a delta for each text encoder, and a configuration."""
    monkeypatch.chdir(tmp_path)
    save_subject(subject(0.1, 0.2), "rex.safetensors")
    Path("config.json").write_text(json.dumps([ENTRY]))
    return tmp_path


def subject(*values, phrase="dog", widths=(EMBED_DIM, EMBED_DIM_2), **metadata):
    """A subject whose deltas hold one number each."""
    encoders = ("text_encoder", "text_encoder_2")
    deltas = {
        encoder: torch.full((1, width), value) for encoder, width, value in zip(encoders, widths, values, strict=False)
    }
    return ResidualEmbedding(phrase, deltas, metadata)


def check(base, **changes):
    """The one task of `ENTRY` with some keys changed."""
    Path("config.json").write_text(json.dumps([ENTRY | changes]))
    (task,), _ = load_tasks(read_config("config.json"), base)
    return task


def command(base, *flags):
    return [
        *("--generation_config", "config.json", "--pretrained_model_name", base.name, "--output_dir", "results"),
        *("--num_inference_steps", "2", "--num_images", "1", "--device", "cpu", *flags),
    ]


def test_a_base_says_what_its_text_encoders_are(base, base_path):
    assert base.architecture.name == "sdxl"
    assert base.embed_dims == {"text_encoder": EMBED_DIM, "text_encoder_2": EMBED_DIM_2}
    assert list(base.tokenizers) == ["text_encoder", "text_encoder_2"] and base.size == (32, 32)
    assert BaseModel.read(base_path).architecture.name == "sd"


@pytest.mark.parametrize("component", ["text_encoder_2", "tokenizer_2"])
def test_another_second_encoder_is_another_base(component, base, tmp_path):
    folder = shutil.copytree(base.name, tmp_path / "base")
    assert BaseModel.read(str(folder)).version == base.version
    config = next((folder / component).glob("*config.json"))
    config.write_text(config.read_text() + "\n")
    assert BaseModel.read(str(folder)).version != base.version


def test_what_is_no_base_of_the_family_is_refused(base, tmp_path):
    def read(name, change):
        folder = Path(shutil.copytree(base.name, tmp_path / name))
        change(folder)
        return BaseModel.read(str(folder))

    def edit(file, **changes):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def as_refiner(folder):
        shutil.rmtree(folder / "text_encoder")
        edit(folder / "unet" / "config.json", cross_attention_dim=EMBED_DIM_2)

    with pytest.raises(ConfigError, match=rf"'.*refiner' cannot be used.* width {EMBED_DIM_2}.*A refiner reads one"):
        read("refiner", as_refiner)
    with pytest.raises(ConfigError, match=rf"of width 99, but the text encoders' have {EMBED_DIM} \+ {EMBED_DIM_2}"):
        read("wide", lambda folder: edit(folder / "unet" / "config.json", cross_attention_dim=99))
    with pytest.raises(ConfigError, match=r"no text_encoder_2/config\.json; expected .*1\.x and 2\.x or .*XL\."):
        read("half", lambda folder: shutil.rmtree(folder / "text_encoder_2"))
    with pytest.raises(ConfigError, match=r"no unet/config\.json; expected .*1\.x and 2\.x or Stable Diffusion XL\."):
        read("flow", lambda folder: (folder / "unet").rename(folder / "transformer"))


@pytest.mark.parametrize("folder", ["xl_base_path", "base_path"])
def test_an_inpainting_base_is_refused(folder, request, tmp_path, shop, capsys):
    inpainting = Path(shutil.copytree(request.getfixturevalue(folder), tmp_path / "inpainting"))
    file = inpainting / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))
    with pytest.raises(
        ConfigError, match=r"'.*inpainting' cannot be used: its UNet reads 9 channels, .* of 4\. .* give"
    ):
        BaseModel.read(str(inpainting))
    with pytest.raises(SystemExit) as exit_info:
        main(["--generation_config", "config.json", "--pretrained_model_name", str(inpainting)])
    assert exit_info.value.code == 2 and "reads 9 channels" in capsys.readouterr().err


def test_a_subject_is_compared_with_every_text_encoder(base, base_path, shop):
    check(base)
    first, second = f"width {EMBED_DIM} for text_encoder", f"width {EMBED_DIM_2} for text_encoder_2"
    save_subject(subject(0.1, 0.2, widths=(EMBED_DIM, 7)), "rex.safetensors")
    with pytest.raises(ConfigError, match=f"{first} and .* width 7 for .*'dog' takes .*{first} and .*{second}"):
        check(base)
    save_subject(subject(0.1), "rex.safetensors")  # of Stable Diffusion 1.x or 2.x
    with pytest.raises(ConfigError, match=f"has 1 token.s. of {first}, but the phrase .*{second} in {base.name}"):
        check(base)
    small = BaseModel.read(base_path)
    save_subject(subject(0.1, 0.2), "rex.safetensors")
    with pytest.raises(ConfigError, match=rf"{second}, but .* width {small.embed_dims['text_encoder']} for"):
        check(small)


def test_a_learned_token_of_one_tokenizer_is_known(base, tmp_path, shop):
    folder = shutil.copytree(base.name, tmp_path / "base")
    tokenizer = BaseModel.read(str(folder)).tokenizers["text_encoder_2"]
    tokenizer.add_tokens("<cat>")
    tokenizer.save_pretrained(folder / "tokenizer_2")
    learned = BaseModel.read(str(folder))
    check(learned, prompt="a photo of <rex> and a ball and <cat>", negative_prompt="<cat>")
    with pytest.raises(ConfigError, match="<cow>"):
        check(learned, prompt="a photo of <rex> and a ball and <cow>")


@pytest.mark.parametrize(("folder", "scale"), [("xl_base_path", 5.0), ("base_path", 7.5)])
def test_the_guidance_scale_is_the_architectures_own(folder, scale, request, shop):
    base = BaseModel.read(request.getfixturevalue(folder))
    delta = subject(*(0.1, 0.2)[: len(base.embed_dims)], widths=base.embed_dims.values())
    save_subject(delta, "rex.safetensors")
    arguments = GenerateArguments("config.json")
    settings = making.task_settings(check(base), arguments, torch.float32, base)
    assert settings["guidance_scale"] == scale
    # A subject of one text encoder has the checksum of its tensor, as pictures of earlier versions say it.
    values = b"".join(values.numpy().tobytes() for values in delta.deltas.values())
    assert settings["subjects"]["rex"]["sha256"] == hashlib.sha256(values).hexdigest()
    arguments.guidance_scale = 3.0
    assert making.task_settings(check(base), arguments, torch.float32, base)["guidance_scale"] == 3.0


def test_a_run_makes_what_the_pipeline_makes_and_resume_notices_either_delta(base, shop, capsys, xl_pipe):
    main(command(base, "--save_attention_maps"))
    folder = shop / "results" / FOLDER
    assert {"0000.png", "0000_attention.png", CONTACT_SHEET} == {path.name for path in folder.iterdir()}
    xl_pipe.load_subject("rex.safetensors")
    noise = torch.Generator().manual_seed(0)
    image = xl_pipe(
        ENTRY["prompt"],
        negative_prompt=ENTRY["negative_prompt"],
        layout=ENTRY["layout"],
        num_inference_steps=2,
        generator=noise,
    ).images[0]
    # Not the same weights in memory, and sums of theirs: the last bit of a pixel may differ.
    difference = np.asarray(image).astype(int) - np.asarray(Image.open(folder / "0000.png")).astype(int)
    assert abs(difference).max() <= 1
    assert read_settings(folder / "0000.png")["guidance_scale"] == 5.0

    # `multisubject-evaluate` reads from it what it was to show, as from a picture of any other base.
    (picture,) = read_pictures(EvaluateArguments(["results"], detector="unused"), (), Notes())
    assert picture.prompt == "a photo of dog and a ball"
    assert [(target.name, target.phrase, target.region is not None) for target in picture.targets] == [
        ("rex", "dog", True),
        ("ball", "ball", True),
    ]

    there = []
    for values in ((0.1, 0.2), (0.1, 0.3), (0.2, 0.3)):
        save_subject(subject(*values), "rex.safetensors")
        main(command(base, "--resume"))
        there.append(capsys.readouterr().out.partition(" pictures are there already")[0].rpartition("\n")[2])
    assert there == ["1 of 1", "0 of 1", "0 of 1"]


def test_a_subject_of_another_second_encoder_is_found_before_the_first_picture(base, shop, xl_pipe):
    stranger = fingerprint_text_encoder(xl_pipe.text_encoder)
    save_subject(subject(0.1, 0.2, text_encoder_2_fingerprint=stranger), "rex.safetensors")
    with pytest.raises(SystemExit, match=r"subject 'rex' of the prompt .* another text_encoder_2"):
        main(command(base))
    assert not list((shop / "results").rglob("*.png"))
