"""LoRAs and reference pictures of regions in generation configurations, on the embedded base."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_ip_adapter
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig

from multisubject.generate_images import main
from multisubject.generation.adapters import LORA_FILE, read_ip_adapters, read_lora
from multisubject.generation.arguments import DataclassParser, IPAdapterArguments, parse_arguments
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import ConfigError, read_config
from multisubject.generation.picture_files import read_settings
from multisubject.generation.tasks import load_tasks
from multisubject.pipeline_multisubject import MultiSubjectPipeline
from multisubject.tiny_world import EMBEDDED_BASE

ROOT = Path(__file__).parent.parent
LORAS = ROOT / "embeddings" / "loras"
LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
LAYOUT = [
    {"subject": "person", "box": LEFT, "lora": "petrucci"},
    {"subject": "guitar", "box": RIGHT, "lora": {"solo": 0.5}},
]
ENTRY: dict[str, Any] = {
    "prompt": "a photo of a person and a guitar on the beach",
    "lora_dict": {"petrucci": "loras/petrucci.safetensors", "solo": "loras/majesty", "unused": "loras/no.safetensors"},
    "layout": LAYOUT,
}


@pytest.fixture(scope="module")
def base():
    return BaseModel.read(str(EMBEDDED_BASE))


@pytest.fixture(autouse=True)
def shop(tmp_path, monkeypatch):
    """A user's folder, with LoRAs as a file and as diffusers' folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras" / "majesty").mkdir(parents=True)
    shutil.copy(LORAS / "petrucci.safetensors", tmp_path / "loras")
    shutil.copy(LORAS / "majesty.safetensors", tmp_path / "loras" / "majesty" / LORA_FILE)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "face.png")
    return tmp_path


@pytest.fixture
def check(base, shop):
    """Write an entry as a config and check it: its task and the warnings."""

    def run(ip_adapters: Any = None, **changes: Any) -> Any:
        (shop / "config.json").write_text(json.dumps([ENTRY | changes]), encoding="utf-8")
        (task,), warnings = load_tasks(read_config(shop / "config.json"), base, None, ip_adapters)
        return task, warnings

    return run


@pytest.fixture
def ip_adapter(shop):
    """A random IP-Adapter of the base, with its image encoder beside it: its file."""
    return write_ip_adapter(EMBEDDED_BASE, Path("models"))


def read(*flags: str, base: BaseModel) -> Any:
    """The IP-Adapters of a command line."""
    return read_ip_adapters(parse_arguments(DataclassParser(IPAdapterArguments), flags), base)


def command(*flags: str) -> None:
    arguments = ["--generation_config", "config.json", "--output_dir", "out", "--num_images", "1"]
    main([*arguments, "--num_inference_steps", "2", "--device", "cpu", "--resume", *flags])


def drawn() -> Path:
    (picture,) = Path("out").rglob("0000.png")
    return picture


# --- LoRAs -----------------------------------------------------------------------------------------------------------


def test_loras_of_regions_are_found_and_others_only_warned_of(check):
    task, (warning,) = check()
    assert [*task.loras] == ["petrucci", "solo"]
    assert task.loras["solo"].path == Path("loras/majesty", LORA_FILE).absolute()
    assert "lora_dict['unused']" in warning and warning.endswith("No region uses it.")


def test_a_picture_is_what_the_pipeline_makes_with_these_loras(check, capsys):
    check()
    command()
    pipe = MultiSubjectPipeline.from_pretrained(str(EMBEDDED_BASE))
    for name, file in (("petrucci", "petrucci"), ("solo", "majesty")):
        pipe.load_lora_weights(str(LORAS), weight_name=f"{file}.safetensors", adapter_name=name)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    (expected,) = pipe(ENTRY["prompt"], layout=LAYOUT, num_inference_steps=2, latents=latents).images
    assert Image.open(drawn()).tobytes() == expected.tobytes()
    settings = read_settings(drawn())
    assert {name: lora["source"] for name, lora in settings["loras"].items()} == {
        "petrucci": "loras/petrucci.safetensors",
        "solo": "loras/majesty",
    }
    capsys.readouterr()
    command()
    assert "1 of 1 pictures are there already" in capsys.readouterr().out


def test_resume_notices_another_lora_of_the_same_name(check, shop, capsys):
    check()
    command()
    shutil.copy(LORAS / "slash.safetensors", shop / "loras" / "petrucci.safetensors")
    capsys.readouterr()
    command()
    assert "0 of 1 pictures are there already" in capsys.readouterr().out


def test_loras_of_the_entry_before_are_gone(shop):
    entries = [ENTRY, {"prompt": ENTRY["prompt"], "seed": 3}]
    (shop / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    command()
    pipe = MultiSubjectPipeline.from_pretrained(str(EMBEDDED_BASE))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    (expected,) = pipe(ENTRY["prompt"], num_inference_steps=2, latents=latents).images
    found = [picture for picture in Path("out").rglob("0000.png") if read_settings(picture)["seed"] == 3]
    assert Image.open(found[0]).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layout": [{"subject": "person", "box": LEFT, "lora": "petruci"}]},
            r"layout\[0\] \('person'\) has the LoRA 'petruci', .* no file in lora_dict.* did you mean 'petrucci'?",
        ),
        (
            {"lora_dict": {"petrucci": "loras/no.safetensors", "solo": "loras/majesty"}},
            "loras/no.safetensors' does",
        ),
        ({"lora_dict": {"petrucci": "loras", "solo": "loras/majesty"}}, f"loras: there is no {LORA_FILE} there; name"),
        ({"lora_dict": {"petrucci": "face.png", "solo": "loras/majesty"}}, "face.png: expected a .safetensors file"),
        ({"lora_dict": {"a.b": "loras"}}, "expected a dictionary such as .* with names without dots"),
    ],
)
def test_what_is_no_lora_of_the_entry_is_reported_with_its_place(check, changes, message):
    with pytest.raises(ConfigError, match=rf"config.json:1: entry 1, (layout|lora_dict)(?s:.*){message}"):
        check(**changes)


def as_kohya(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same LoRA under kohya's names."""
    renamed = {}
    for key, value in weights.items():
        layer, part = re.fullmatch(r"unet\.(.*)\.lora\.(down|up)\.weight", key).groups()
        renamed[f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight"] = value
    return renamed


@pytest.mark.parametrize("form", [dict, as_kohya])
def test_a_lora_of_another_base_is_refused_before_the_model_loads(base, xl_base_path, form):
    save_file(form(load_file(LORAS / "petrucci.safetensors")), "petrucci.safetensors")
    path = Path("petrucci.safetensors").absolute()
    assert read_lora("petrucci.safetensors", Path("config.json"), base).path == path
    other = BaseModel.read(xl_base_path)
    with pytest.raises(ValueError, match=rf"this LoRA reads .* of width 128, expected .* {xl_base_path}"):
        read_lora("petrucci.safetensors", Path("config.json"), other)


def test_a_file_without_loras_is_refused(base):
    save_file({"dog": torch.zeros(1, 128)}, "subject.safetensors")
    with pytest.raises(ValueError, match=r"subject.safetensors: this file holds no LoRA"):
        read_lora("subject.safetensors", Path("config.json"), base)
    Path("cut.safetensors").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"cut.safetensors: this is no .safetensors file, or a damaged one"):
        read_lora("cut.safetensors", Path("config.json"), base)


def test_a_lora_of_other_layers_is_one_line_before_the_first_picture(check):
    """Of a base that reads prompts of the same width, but has other layers."""
    weights = load_file(LORAS / "petrucci.safetensors")
    save_file({key: value.repeat(1, 2) if "attn1.to_q.lora.down" in key else value for key, value in weights.items()},
              "loras/petrucci.safetensors")  # fmt: skip
    check()
    with pytest.raises(SystemExit) as caught:
        command()
    assert "LoRA 'petrucci'" in str(caught.value) and "its layers are of another base model" in str(caught.value)
    assert "\n" not in str(caught.value) and not [*Path("out").rglob("*.png")]


def test_what_cannot_act_in_a_region_is_refused(base):
    renamed = as_kohya(load_file(LORAS / "petrucci.safetensors"))
    key = next(key for key in renamed if key.endswith("lora_up.weight"))
    save_file(renamed | {key.replace("lora_up.weight", "dora_scale"): torch.ones(48, 1)}, "dora.safetensors")
    with pytest.raises(ValueError, match=r"dora.safetensors: this LoRA is none that adds .* \(DoRA\)"):
        read_lora("dora.safetensors", Path("config.json"), base)


def test_loading_loras_says_nothing(check, capfd):
    check(lora_dict={name: source for name, source in ENTRY["lora_dict"].items() if name != "unused"})
    command()
    assert not [line for line in capfd.readouterr().err.splitlines() if "LoRA" in line or "peft" in line]


# --- reference pictures ----------------------------------------------------------------------------------------------

WITH_PICTURE = {"layout": [{"ip_adapter_image": "face.png", "box": LEFT}], "prompt": "a photo on the beach"}


def test_pictures_of_regions_need_an_ip_adapter(check):
    with pytest.raises(
        ConfigError, match=r"1, layout: layout\[0\] \(.*\): ip_adapter_image needs .* pass --ip_adapter"
    ):
        check(**WITH_PICTURE)


def test_a_picture_is_what_the_pipeline_makes_with_the_ip_adapter(check, ip_adapter, shop):
    """In one run with an entry that has no pictures, which is drawn as without an IP-Adapter."""
    entries = [{"prompt": ENTRY["prompt"], "seed": seed} for seed in (3, 4)]
    entries.insert(1, {**WITH_PICTURE, "seed": 5})
    (shop / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    command("--ip_adapter", ip_adapter, "--ip_adapter_scale", "0.7")
    pipe = MultiSubjectPipeline.from_pretrained(str(EMBEDDED_BASE))

    def expected(seed: int, prompt: str, layout: Any = None) -> bytes:
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        return pipe(prompt, layout=layout, num_inference_steps=2, latents=latents).images[0].tobytes()

    found = {read_settings(path)["seed"]: path for path in Path("out").rglob("0000.png")}
    for seed in (3, 4):
        assert Image.open(found[seed]).tobytes() == expected(seed, ENTRY["prompt"])
        assert "ip_adapter" not in read_settings(found[seed])
    plain = expected(5, WITH_PICTURE["prompt"])
    pipe.load_ip_adapter("models", subfolder="", weight_name="ip-adapter.safetensors")
    pipe.set_ip_adapter_scale(0.7)
    assert Image.open(found[5]).tobytes() == expected(5, WITH_PICTURE["prompt"], WITH_PICTURE["layout"]) != plain
    (settings,) = read_settings(found[5])["ip_adapters"]["weights"]
    assert (settings["source"], settings["scale"]) == (ip_adapter, 0.7)


def test_each_of_several_ip_adapters_has_its_pictures(check, ip_adapter, base, shop):
    """And its scale; one that a region has no picture for does nothing."""
    other = write_ip_adapter(EMBEDDED_BASE, Path("models"), "other", seed=1)
    Image.new("RGB", (8, 8), "blue").save("blue.png")
    layouts = [
        [
            {"ip_adapter_image": ["face.png", "blue.png"], "box": LEFT},
            {"ip_adapter_image": {"1": "face.png"}, "box": RIGHT},
        ],
        [{"ip_adapter_image": {"1": "blue.png"}, "box": LEFT}],
    ]
    entries = [{**WITH_PICTURE, "layout": layout, "seed": seed} for seed, layout in enumerate(layouts)]
    (shop / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    command("--ip_adapter", ip_adapter, other, "--ip_adapter_scale", "0.7", "0.4")
    pipe = MultiSubjectPipeline.from_pretrained(str(EMBEDDED_BASE))

    def expected(seed: int, layout: Any) -> bytes:
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        return pipe(WITH_PICTURE["prompt"], layout=layout, num_inference_steps=2, latents=latents).images[0].tobytes()

    found = {read_settings(path)["seed"]: Image.open(path).tobytes() for path in Path("out").rglob("0000.png")}
    files = ["ip-adapter.safetensors", "other.safetensors"]
    pipe.load_ip_adapter(["models"] * 2, subfolder=[""] * 2, weight_name=files)
    pipe.set_ip_adapter_scale([0.7, 0.4])
    assert found[0] == expected(0, layouts[0])
    pipe.unload_ip_adapter()
    pipe.load_ip_adapter("models", subfolder="", weight_name="other.safetensors")
    pipe.set_ip_adapter_scale(0.4)
    assert found[1] == expected(1, [{"ip_adapter_image": "blue.png", "box": LEFT}])


def test_resume_notices_another_picture_scale_or_image_encoder(check, ip_adapter, shop, capsys, base):
    check(read("--ip_adapter", ip_adapter, base=base), **WITH_PICTURE)

    def there(*flags: str) -> str:
        capsys.readouterr()
        command("--ip_adapter", ip_adapter, *flags)
        return capsys.readouterr().out

    assert "0 of 1" in there() and "1 of 1" in there()
    Image.new("RGB", (8, 8), "blue").save(shop / "face.png")
    assert "0 of 1" in there() and "1 of 1" in there()
    assert "0 of 1" in there("--ip_adapter_scale", "0.5") and "0 of 1" in there()
    config = shop / "models" / "image_encoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert "0 of 1" in there()


def test_paths_in_a_color_context_are_those_of_the_config(check, ip_adapter, base, shop, monkeypatch):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(shop / "map.png")
    adapters = read("--ip_adapter", ip_adapter, base=base)
    monkeypatch.chdir("/")
    colors = {"255,0,0": {"ip_adapter_image": "face.png"}}
    task, _ = check(adapters, prompt="a photo on the beach", layout="map.png", color_context=colors, lora_dict={})
    assert task.regions()[0].ip_adapter_image.getpixel((0, 0)) == (255, 0, 0) and task.ip_adapters is adapters


def test_an_ip_adapter_of_another_base_or_none_is_refused(ip_adapter, xl_base_path, base):
    with pytest.raises(ValueError, match=r"this IP-Adapter reads prompt embeddings of width 128, expected"):
        read("--ip_adapter", ip_adapter, base=BaseModel.read(xl_base_path))
    with pytest.raises(ValueError, match=r"petrucci.safetensors: this file holds no IP-Adapter"):
        read("--ip_adapter", "loras/petrucci.safetensors", base=base)
    with pytest.raises(ValueError, match=r"models: expected a .safetensors file, or on the Hub"):
        read("--ip_adapter", "models", base=base)
    with pytest.raises(ValueError, match=r"loras: this is no image encoder; it has no config.json"):
        read("--ip_adapter", ip_adapter, "--ip_adapter_image_encoder", "loras", base=base)
    with pytest.raises(ValueError, match=r"'./no' does not exist"):
        read("--ip_adapter", ip_adapter, "--ip_adapter_image_encoder", "./no", base=base)
    other = write_ip_adapter(EMBEDDED_BASE, Path("others"))
    with pytest.raises(ValueError, match=r"^--ip_adapter: .* encoders models/image_encoder, others/image_encoder, exp"):
        read("--ip_adapter", ip_adapter, other, base=base)
    both = read("--ip_adapter", ip_adapter, other, "--ip_adapter_image_encoder", "models/image_encoder", base=base)
    assert len(both.weights) == 2 and both.scales == (1.0, 1.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"of width 24, expected 16 for this .* the one that the adapter was made for"),
        ({"proj.weight": (8, 1024)}, r"of width 24, expected 1024 .*, such as h94/IP-Adapter/models/image_encoder"),
        (
            {"proj.weight": (8, 1280)},
            r"of width 24, expected 1280 .* as h94/IP-Adapter/sdxl_models/image_encoder",
        ),
        ({"proj_in.weight": (8, 1280)}, r"of width 32, expected 1280 .*, such as h94/IP-Adapter/models/image_encoder"),
        ({"proj.0.weight": (1280, 1280), "proj.3.weight": (8, 1280)}, r"32, expected 1280 .* h94/IP-Adapter/models/im"),
        ({"proj.0.weight": (1024, 512)}, r"of width 32, expected 512 .* \(FaceID\) reads embeddings of faces"),
    ],
)
def test_an_image_encoder_of_another_width_is_told_with_a_fitting_one(ip_adapter, base, weights, message):
    """Before the model loads."""
    CLIPVisionConfig(hidden_size=32, num_attention_heads=2, projection_dim=24).save_pretrained("wide")
    if weights:
        held = {key: value for key, value in load_file(ip_adapter).items() if not key.startswith("image_proj.")}
        save_file(held | {f"image_proj.{key}": torch.zeros(*shape) for key, shape in weights.items()}, ip_adapter)
    flags = ("--ip_adapter", ip_adapter, "--ip_adapter_image_encoder", "wide")
    where = f"^--ip_adapter: {ip_adapter}: the image encoder wide gives embeddings "
    with pytest.raises(ConfigError, match=rf"{where}.*{message}"):
        read(*flags, base=base)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        '"a"',
        "{}",
        "{",
        '{"model_type": "clip_text_model", "projection_dim": 16}',
        '{"model_type": "clip_vision_model", "hidden_size": 16}',
        '{"model_type": "clip_vision_model", "projection_dim": null}',
        '{"model_type": "clip_vision_model", "projection_dim": "x"}',
        '{"model_type": "clip_vision_model", "projection_dim": [16]}',
        '{"model_type": "clip", "vision_config": {"projection_dim": [3]}}',
    ],
)
def test_what_is_no_image_encoder_is_told_in_one_line(ip_adapter, base, config):
    Path("wide").mkdir(exist_ok=True)
    Path("wide", "config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"wide: this is no CLIP image encoder; .* number as projection_dim.$"):
        read("--ip_adapter", ip_adapter, "--ip_adapter_image_encoder", "wide", base=base)


@pytest.mark.parametrize(("vision", "width"), [({}, 512), (None, 512), ({"projection_dim": 24}, 24)])
def test_the_image_encoder_of_a_whole_clip_is_read(ip_adapter, base, vision, width):
    Path("wide").mkdir(exist_ok=True)
    Path("wide", "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    with pytest.raises(ConfigError, match=rf"gives embeddings of width {width}, expected 16"):
        read("--ip_adapter", ip_adapter, "--ip_adapter_image_encoder", "wide", base=base)


def test_an_ip_adapter_that_is_not_there_or_not_used_is_told(check, ip_adapter, capsys):
    check(layout=LAYOUT[:1])
    with pytest.raises(SystemExit):
        command("--ip_adapter", "no.safetensors")
    assert "--ip_adapter: 'no.safetensors' does not exist" in capsys.readouterr().err
    command("--ip_adapter", ip_adapter)
    assert "warning: --ip_adapter: no region of the config has an `ip_adapter_image`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("--ip_adapter_image_encoder", "models/image_encoder")
    assert "--ip_adapter_image_encoder came without --ip_adapter" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("--ip_adapter", ip_adapter, "--ip_adapter_scale", "1", "0.5")
    assert "--ip_adapter_scale is 1.0 0.5; expected one number, or one for each of 1 IP-A" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ({"1": "face.png"}, r"is for the IP-Adapters \['1'\], expected some of \['0'\], by their numbers"),
        (["face.png"] * 2, r"has 2 picture\(s\), expected one for each of the 1 IP-Adapters"),
        ({"0": ["face.png"]}, "has 1 pictures for one IP-Adapter, expected one"),
    ],
)
def test_pictures_that_no_ip_adapter_takes_are_told_before_the_model_loads(check, ip_adapter, base, picture, message):
    layout = [LAYOUT[0], {"subject": "guitar", "box": RIGHT, "ip_adapter_image": picture}]
    with pytest.raises(ConfigError, match=rf"layout: layout\[1\] \('guitar'\): ip_adapter_image {message}"):
        check(read("--ip_adapter", ip_adapter, base=base), layout=layout)
