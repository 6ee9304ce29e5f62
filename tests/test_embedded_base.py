"""What the shipped models must do: be small, load with plain diffusers, draw what words say, follow a layout."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL, picture_size

ROOT = Path(__file__).parents[1]
SIZE = picture_size(EMBEDDED_BASE)
BASES = {"sd": EMBEDDED_BASE, "xl": EMBEDDED_BASE_XL}
CONFIGS = {"sd": ROOT / "configs" / "guidance_conf_two.json", "xl": ROOT / "configs" / "guidance_conf_two_xl.json"}


@pytest.fixture(scope="module")
def judge():
    from multisubject.tiny_world.judge import Judge

    return Judge.load()


@pytest.mark.parametrize("kind", BASES)
def test_base_is_small_and_holds_no_pickles(kind):
    files = [file for file in BASES[kind].rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_bases_draw_one_size_with_one_autoencoder():
    assert picture_size(EMBEDDED_BASE_XL) == SIZE
    weights = [(base / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() for base in BASES.values()]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("kind", BASES)
def test_plain_diffusers_draws_what_the_prompt_says(kind, judge):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    pipeline = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}[kind]
    pipe = pipeline.from_pretrained(BASES[kind])
    pipe.set_progress_bar_config(disable=True)
    asked = [("red", "ball"), ("blue", "mug"), ("green", "guitar"), ("yellow", "dog"), ("purple", "person")] * 2
    prompts = [f"a photo of a {colour} plain {category} on the beach" for colour, category in asked]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(asked))]
    pictures = pipe(prompts, num_inference_steps=20, guidance_scale=5.0, generator=generators).images
    found = [max(objects, key=lambda item: item.score, default=None) for objects in judge.detect(pictures)]
    right = [item is not None and item.category == category for item, (_, category) in zip(found, asked, strict=True)]
    coloured = [item is not None and item.verdict.colour == asked[i][0] for i, item in enumerate(found)]
    # Well below the measured shares (docs/embedded_base.md): this guards against a broken model, not a weaker one.
    assert sum(right) >= 7
    assert sum(coloured) >= 6


@pytest.mark.parametrize("kind", BASES)
def test_seed_config_puts_the_right_subject_in_the_right_region(kind, tmp_path, judge):
    from PIL import Image

    from multisubject.generate_images import main
    from multisubject.layout import parse_layout
    from multisubject.tiny_world.subjects import SUBJECTS

    pictures = 12
    main(
        [
            *("--pretrained_model_name", str(BASES[kind]), "--generation_config", str(CONFIGS[kind])),
            *("--output_dir", str(tmp_path), "--num_images", str(pictures)),
            *("--num_inference_steps", "25", "--guidance_scale", "5"),
        ]
    )
    folder = tmp_path / "guitar_person" / "a_photo_of_person_and_guitar_on_the_beach"
    images = [Image.open(file).convert("RGB") for file in sorted(folder.glob("[0-9]*.png"))]
    assert len(images) == pictures
    context = {"255,0,0": ["person", 2.5], "0,0,255": ["guitar", 2.5]}
    regions = parse_layout(str(ROOT / "layouts" / "guitar.png"), height=SIZE, width=SIZE, color_context=context)
    verdicts = {region.subject: judge.classify(images, [region.mask] * pictures) for region in regions}
    for category, other in (("person", "guitar"), ("guitar", "person")):
        seen = [verdict.category for verdict in verdicts[category]]
        assert seen.count(category) > pictures / 2, seen
        assert seen.count(other) == 0, seen
    for category, name in (("person", "petrucci"), ("guitar", "majesty")):
        look = SUBJECTS[name].look
        looks = [(verdict.colour, verdict.second_colour) for verdict in verdicts[category]]
        assert looks.count((look.colour, look.second_colour)) > pictures / 2, looks
        named = [verdict.subject for verdict in verdicts[category]]
        assert named.count(name) > pictures / 4, named  # hat and neck, too


def test_one_object_stays_one_in_a_box_of_another_shape(base_path, judge):
    """Twice as high as wide, for a dog; without the ends of the regions' own prompts most pictures have two of them."""
    from multisubject.pipeline_multisubject import MultiSubjectPipeline

    pipe = MultiSubjectPipeline.from_pretrained(base_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_subject(str(ROOT / "embeddings" / "petrucci.safetensors"), name="petrucci")
    layout = {"red dog": (0.05, 0.2, 0.45, 0.95), "petrucci": (0.55, 0.2, 0.95, 0.95)}
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    pictures = pipe(
        "a photo of <petrucci> and a red dog on the beach", layout=layout, num_images_per_prompt=8,
        num_inference_steps=25, guidance_scale=5.0, generator=generators,
    ).images  # fmt: skip
    dogs = [sum(found.category == "dog" for found in objects) for objects in judge.detect(pictures)]
    assert dogs.count(1) >= 6, dogs


def test_python_of_the_readme_runs_as_it_stands(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    blocks.append(f"assert image.size == ({SIZE}, {SIZE}); image.save({str(tmp_path / 'image.png')!r})\n")
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "kept in float32" not in run.stderr  # what diffusers says where `from_pipe` casts for nothing
    assert (tmp_path / "image.png").is_file()


@pytest.mark.slow
def test_python_of_the_page_on_regions_makes_its_pictures(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "regions.md").read_text(), re.DOTALL)
    (tmp_path / "embeddings").symlink_to(ROOT / "embeddings")
    subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, check=True, capture_output=True)
    shown = {path.name: path for path in (ROOT / "docs" / "images" / "regions").glob("*.png")}
    made = {path.name: path for path in (tmp_path / "output" / "regions").glob("*.png")}
    assert shown.keys() == made.keys() and len(made) == 6
    for name, path in made.items():
        difference = ImageChops.difference(*(Image.open(file).convert("RGB") for file in (path, shown[name])))
        assert np.mean(difference) < 8, name  # processors round in different ways, and the page's have fewer colours


def test_inpainting_follows_subjects_and_layout(base_path, judge):
    from diffusers import StableDiffusionInpaintPipeline

    from multisubject.pipeline_multisubject import MultiSubjectPipeline

    pipe = MultiSubjectPipeline.from_pretrained(base_path)
    pipe.load_subject(str(ROOT / "embeddings" / "biscuit.safetensors"), name="biscuit")
    inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe, dtype=pipe.dtype)
    for each in (pipe, inpaint):
        each.set_progress_bar_config(disable=True)
    box = (0.05, 0.3, 0.45, 0.95)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, SIZE // 8, SIZE // 2, SIZE))
    generator = torch.Generator().manual_seed(0)
    layout = {"guitar": (0.55, 0.2, 0.95, 0.9)}
    beach = pipe("a photo of a guitar on the beach", layout=layout, generator=generator).images[0]
    with pipe.guide(inpaint, "a photo of <biscuit> and a guitar on the beach", {"biscuit": box}) as embeds:
        pictures = inpaint(
            **embeds, image=beach, mask_image=mask, strength=1.0, num_images_per_prompt=6,
            num_inference_steps=25, guidance_scale=5.0, generator=generator,
        ).images  # fmt: skip
    dogs = [verdict.category == "dog" for verdict in judge.classify(pictures, [box] * 6)]
    assert sum(dogs) >= 4


def test_both_text_encoders_of_xl_carry_a_subject(judge):
    """Without the residual of either one fewer pictures have the subject's colour."""
    from multisubject.pipeline_multisubject_xl import MultiSubjectXLPipeline

    pipe = MultiSubjectXLPipeline.from_pretrained(EMBEDDED_BASE_XL)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_subject(str(ROOT / "embeddings" / "xl" / "petrucci.safetensors"), name="petrucci")
    whole = pipe.subjects["petrucci"]

    def looks(deltas):
        pipe.subjects["petrucci"] = dataclasses.replace(whole, deltas=deltas)
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        pictures = pipe(
            ["a photo of a <petrucci> on the grass"] * 6,
            num_inference_steps=20, guidance_scale=5.0, generator=generators,
        ).images  # fmt: skip
        found = [max(objects, key=lambda item: item.score, default=None) for objects in judge.detect(pictures)]
        return sum(item is not None and item.verdict.colour == "blue" for item in found)

    nothing = {name: torch.zeros_like(delta) for name, delta in whole.deltas.items()}
    bare, both = looks(nothing), looks(whole.deltas)
    alone = [looks({**nothing, name: delta}) for name, delta in whole.deltas.items()]
    assert both >= 5 and max(alone) <= both - 2 and bare <= 1, (bare, both, alone)
