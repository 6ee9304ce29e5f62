"""Words, negatives and times of single regions: what they change, and that everything else stays as it was."""

from __future__ import annotations

import io
import logging
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EMBED_DIM, EMBED_DIM_2, assert_equal_up_to_rounding, make_pipeline
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from multisubject import region_texts
from multisubject.guidance_methods import GUIDANCE_METHODS, AttentionLayer, serves
from multisubject.residual_embeddings import ResidualEmbedding

PROMPT = "a photo of a red dog and a blue ball"
LEFT, RIGHT, WHOLE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
DOG, BALL = {"subject": "red dog", "box": LEFT}, {"subject": "blue ball", "box": RIGHT}
RUN = 500  # roundings that add up in a short run
SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler]


@pytest.fixture(params=["sd1", "xl"])
def pipe(request, tiny_components):
    return make_pipeline(tiny_components[request.param])


def sample(pipe: Any, prompt: Any = PROMPT, **kwargs: Any) -> torch.Tensor:
    """Final latents of a short run."""
    generator = torch.Generator().manual_seed(0)
    kwargs = {"num_inference_steps": 3, "output_type": "latent", "generator": generator} | kwargs
    return pipe(prompt, **kwargs).images


def first_layer(pipe: Any, **kwargs: Any) -> torch.Tensor:
    """What the first layer of cross-attention gives in the first step: unconditional half, then conditional one, each
    `(h, w, dim)`."""
    outputs: list[torch.Tensor] = []
    layer = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        sample(pipe, num_inference_steps=1, **kwargs)
    finally:
        handle.remove()
    side = int(outputs[0].shape[1] ** 0.5)
    return outputs[0].unflatten(1, (side, side))


def spied(pipe: Any, **kwargs: Any) -> list[AttentionLayer]:
    """Layers of cross-attention that a method sees in one step."""
    layers: list[AttentionLayer] = []

    @serves("strength", "background")
    def spy(layer: AttentionLayer) -> None:
        if layer.is_cross:
            layers.append(layer)

    sample(pipe, num_inference_steps=1, guidance_method=spy, **kwargs)
    return layers


# --- words of its own ------------------------------------------------------------------------------------------------


def test_a_region_sees_its_own_words_and_nothing_else_does(pipe):
    own, other = (first_layer(pipe, layout=[DOG, {"prompt": words, "box": RIGHT}]) for words in ("a ball", "a cat"))
    half = own.shape[2] // 2
    assert torch.equal(own[0], other[0]), "the unconditional half"
    assert_equal_up_to_rounding(own[1][:, :half], other[1][:, :half])
    assert (own[1][:, half:] - other[1][:, half:]).abs().max() > 1e-4


def test_own_words_are_encoded_by_themselves_with_their_subjects(pipe):
    plain = pipe.encode_prompt("blue dog", device="cpu", num_images_per_prompt=1)[0]
    widths = {"text_encoder": EMBED_DIM, "text_encoder_2": EMBED_DIM_2}
    deltas = {name: torch.ones(1, width) for name, width in widths.items() if name in pipe.components}
    pipe.subjects["rex"] = ResidualEmbedding("dog", deltas)
    placed = pipe.place({"prompt": PROMPT}, [{"prompt": "blue <rex>", "box": LEFT}, BALL], None, 32, 32)
    held = pipe.encode_with_regions(placed, GUIDANCE_METHODS["multisubject"], prompt=PROMPT)[1]
    words = held["words"]
    expected = pipe.encode_prompt("blue <rex>", device="cpu", num_images_per_prompt=1)[0]
    assert (expected - plain).abs().sum(dim=-1).nonzero().tolist() == [[0, 2]]
    torch.testing.assert_close(words.embeds[0, 0], expected[0, 1:4])  # blue, dog, end of text
    assert words.owners.tolist() == [[0]] and words.token_kinds.tolist() == [[[1, 1, 2]]]


def test_own_words_are_pulled_like_a_subject(pipe):
    """Weight inside, the negative weight outside; and outside they are unseen whatever the method says."""
    maps = spied(pipe, layout=[{**DOG, "weight": 1}, {"prompt": "a blue ball", "box": RIGHT, "weight": 2}])[0].maps
    side = int(maps.masks.shape[2] ** 0.5)
    own = maps.signed_weights[0, 0, :, 77:].unflatten(0, (side, side))
    assert (own[:, side // 2 :] == 2).all() and (own[:, : side // 2] == -1e8).all()
    unseen = maps.unseen[0, 0].unflatten(0, (side, side))
    assert not unseen[..., :77].any() and unseen[:, : side // 2, 77:].all() and not unseen[:, side // 2 :, 77:].any()
    assert maps.owners[0, 77:].tolist() == [1] * 4


def test_a_region_of_a_method_without_pull_hides_its_own_words_all_the_same(pipe):
    """With no weight at all nothing of the method is left, but for who sees what."""
    layout = [{"prompt": "a blue ball", "box": RIGHT}]
    half = first_layer(pipe).shape[2] // 2
    found = first_layer(pipe, layout=layout, guidance_weight=0, guidance_method="cones2", weight_negative=0)
    assert_equal_up_to_rounding(found[1][:, :half], first_layer(pipe)[1][:, :half])
    assert (found[1][:, half:] - first_layer(pipe)[1][:, half:]).abs().max() > 1e-4


def test_the_subject_may_stand_in_the_whole_prompt_or_in_the_regions_own(pipe):
    both = spied(pipe, layout=[{**DOG, "prompt": "a red dog with a hat"}, BALL])[0].maps
    assert both.tokens[0, 0].nonzero().flatten().tolist() == [5, 6, *range(77, 77 + 7)]
    own = spied(pipe, layout=[{"subject": "hat", "box": LEFT, "prompt": "a hat"}, BALL])[0].maps
    assert own.tokens[0, 0].nonzero().flatten().tolist() == [77, 78, 79]
    with pytest.raises(ValueError, match="'cat' is not in the prompt"):
        sample(pipe, layout=[{"subject": "cat", "box": LEFT, "prompt": "a hat"}])


@pytest.mark.parametrize("method", sorted(GUIDANCE_METHODS))
def test_every_method_serves_own_words_negatives_and_times(pipe, method):
    layout = [DOG, {"prompt": "a cat", "negative_prompt": "hat", "box": RIGHT, "begin": 0.3, "end": 0.9}]
    found = sample(pipe, layout=layout, guidance_method=method)
    assert found.isfinite().all()
    assert (found - sample(pipe, layout=[DOG], guidance_method=method)).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["regional_prompts", "attention_couple"])
def test_a_method_of_region_prompts_takes_own_words_for_them(pipe, method):
    phrase = [DOG, BALL]
    same = [{**DOG, "prompt": "a photo of red dog"}, {"prompt": "a photo of blue ball", "box": RIGHT}]
    assert_equal_up_to_rounding(
        sample(pipe, layout=same, guidance_method=method), sample(pipe, layout=phrase, guidance_method=method), RUN
    )


def test_a_region_without_words_has_the_whole_prompt_under_regional_prompts(pipe):
    """Alone it is no region of words at all."""
    layout = [{"negative_prompt": "hat", "box": LEFT}]
    options = {"guidance_method": "regional_prompts", "guidance_scale": 1.0}  # without its negative
    assert_equal_up_to_rounding(sample(pipe, layout=layout, **options), sample(pipe, guidance_scale=1.0), RUN)


def test_own_words_are_mapped(pipe):
    layout = [DOG, {"prompt": "a blue ball", "box": RIGHT}]
    (maps,) = pipe(
        PROMPT, layout=layout, num_inference_steps=2, output_type="latent", output_attention_maps=True
    ).attention_maps
    half = maps["red dog"].shape[-1] // 2
    assert [*maps] == ["red dog", "a blue ball"]
    assert maps["a blue ball"][:, :, :half].max() == 0 < maps["a blue ball"][:, :, half + 1 :].min()


def test_a_text_that_is_too_long_is_told_once(pipe):
    """transformers would say before the error that such a text leads to indexing errors."""
    with transformers_says() as said, pytest.raises(ValueError, match="expected at most 75"):
        sample(pipe, layout=[{"prompt": "hat " * 80, "box": LEFT}])
    assert "longer than the specified maximum" not in said.getvalue()


@contextmanager
def transformers_says():
    logger, said = logging.getLogger("transformers"), io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def test_longer_words_than_an_encoder_reads_are_an_error(pipe):
    words = "hat " * 80
    with pytest.raises(ValueError, match=r"the `prompt` of layout.* has 80 tokens, expected at most 75"):
        sample(pipe, layout=[{"prompt": words, "box": LEFT}])
    with pytest.raises(
        ValueError, match=r"the `negative_prompt` of layout\[\d\] \('red dog'\), .* has 82 tokens, expected"
    ):
        sample(pipe, layout=[{**DOG, "negative_prompt": words}], negative_prompt="hat")


def test_twenty_regions_of_long_words_draw_and_too_many_are_an_error(pipe, monkeypatch):
    words = " ".join(["hat"] * 75)
    layout = [{"prompt": words, "box": (i / 20, 0, (i + 1) / 20, 1)} for i in range(20)]
    assert spied(pipe, layout=layout)[0].key.shape[2] == 77 + 20 * 76
    monkeypatch.setattr(region_texts, "MOST_OWN_TOKENS", 20 * 76 - 1)
    with pytest.raises(
        ValueError, match=r"20 regions with a `prompt` of up to 76 tokens .* add 1520 keys .* most 1519"
    ):
        sample(pipe, layout=layout)


def test_only_a_loaded_subject_can_be_named_in_own_words(pipe):
    with pytest.raises(
        ValueError, match=r"the `prompt` of layout\[\d\] \('a <rex>'\): prompt names the subject '<rex>'"
    ):
        sample(pipe, layout=[{"prompt": "a <rex>", "box": LEFT}])


# --- background ------------------------------------------------------------------------------------------------------


def test_the_backgrounds_words_are_seen_outside_all_regions_alone(pipe):
    with_it, without = ([DOG, *more] for more in ([{"subject": "background", "prompt": "a beach"}], []))
    found, expected = first_layer(pipe, layout=with_it), first_layer(pipe, layout=without)
    half = found.shape[2] // 2
    assert_equal_up_to_rounding(found[1][:, :half], expected[1][:, :half])
    assert (found[1][:, half:] - expected[1][:, half:]).abs().max() > 1e-4
    maps = spied(pipe, layout=with_it)[0].maps
    old = spied(pipe, layout=without)[0].maps
    for name in ("hidden_summary", "summaries", "signed_weights"):
        assert torch.equal(getattr(maps, name)[..., :77], getattr(old, name)), name


# --- negatives -------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_pooled(pipe):
    """XL's pooled embedding acts on the whole picture, and is that of the picture's own words."""
    if "text_encoder_2" not in pipe.components:
        yield
        return
    handle = pipe.unet.add_embedding.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    yield
    handle.remove()


@pytest.mark.usefixtures("without_pooled")
def test_a_negative_for_the_whole_picture_is_the_pictures_own(pipe):
    layout = [{"subject": "red dog", "box": WHOLE}]
    expected = sample(pipe, layout=layout, negative_prompt="snow, hat")
    found = sample(pipe, layout=[{**layout[0], "negative_prompt": "hat"}], negative_prompt="snow")
    assert_equal_up_to_rounding(found, expected, RUN)
    found = sample(pipe, layout=[{**layout[0], "negative_prompt": "hat"}])
    assert_equal_up_to_rounding(found, sample(pipe, layout=layout, negative_prompt="hat"), RUN)


def test_a_negative_changes_its_place_in_the_unconditional_half_and_nothing_else(pipe):
    plain = first_layer(pipe, layout=[DOG, BALL])
    found = first_layer(pipe, layout=[DOG, {**BALL, "negative_prompt": "hat"}])
    half = plain.shape[2] // 2
    assert_equal_up_to_rounding(found[1], plain[1])
    assert_equal_up_to_rounding(found[0][:, :half], plain[0][:, :half])
    assert (found[0][:, half:] - plain[0][:, half:]).abs().amax(dim=-1).min() > 1e-5


def test_without_negatives_the_unconditional_half_is_as_it_was_bit_for_bit(pipe):
    layouts = [DOG, BALL], [{**DOG, "prompt": "a dog", "begin": 0, "end": 0.9, "strength": 2}, BALL]
    before, after = (first_layer(pipe, layout=layout)[0] for layout in layouts)
    assert torch.equal(before, after)


@pytest.mark.usefixtures("without_pooled")
def test_a_negative_ignores_clip_skip_as_diffusers_does(pipe):
    layout = [{"subject": "red dog", "box": WHOLE}]
    expected = sample(pipe, layout=layout, negative_prompt="hat", clip_skip=1)
    found = sample(pipe, layout=[{**layout[0], "negative_prompt": "hat"}], clip_skip=1)
    assert_equal_up_to_rounding(found, expected, RUN)


def test_without_classifier_free_guidance_a_negative_changes_nothing(pipe):
    layouts = [DOG], [{**DOG, "negative_prompt": "hat"}]
    before, after = (sample(pipe, layout=layout, guidance_scale=1.0) for layout in layouts)
    assert torch.equal(before, after)


def test_a_negative_beside_embeddings_is_an_error(pipe):
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, pipe.encode_prompt(PROMPT), strict=False))
    with pytest.raises(ValueError, match=r"`negative_prompt_embeds` came\. Pass `negative_prompt`"):
        sample(pipe, layout=[{**DOG, "negative_prompt": "hat"}], **embeds)
    given = {name: value for name, value in embeds.items() if "negative" not in name}
    if "pooled_prompt_embeds" not in embeds:
        assert sample(pipe, layout=[{**DOG, "prompt": "a dog", "negative_prompt": "hat"}], **given).isfinite().all()


# --- begin, end, strength --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_region_guides_between_begin_and_end(pipe, kind):
    """Of five steps: all, the first two, none of the first two; as `guidance_steps` counts them."""
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    timed = [{**DOG, "end": 0.4}, {**BALL, "end": 0.4}]
    expected = sample(pipe, layout=[DOG, BALL], guidance_steps=2, num_inference_steps=5)
    assert torch.equal(sample(pipe, layout=timed, num_inference_steps=5), expected)
    seen: list[int] = []

    def count(layer: AttentionLayer) -> None:
        if layer.is_cross:
            seen.append(sum(bool(of_region.any()) for of_region in layer.maps.inside[0]))

    layout = [{**DOG, "begin": 0.4}, {**BALL, "end": 0.8}]
    sample(pipe, layout=layout, num_inference_steps=5, guidance_method=count)
    calls = 9 if kind is HeunDiscreteScheduler else 5
    layers = len(seen) // calls
    expected = [1, 1, 2, 2, 1]
    if calls == 9:  # two calls for each step but the last
        expected = [1, 1, 1, 1, 2, 2, 2, 2, 1]
    assert seen[::layers] == expected


def test_a_region_that_does_not_guide_at_a_step_is_absent_there(pipe):
    """Its words, its hidden summary, its own embedding, its negative: the step is that of a layout without it."""
    timed = {"prompt": "a cat", "negative_prompt": "hat", "box": RIGHT}
    late = [DOG, {**timed, "begin": 0.5}]
    assert_equal_up_to_rounding(first_layer(pipe, layout=late), first_layer(pipe, layout=[DOG]))
    only = [{**timed, "begin": 0.5}]
    assert_equal_up_to_rounding(first_layer(pipe, layout=only), first_layer(pipe))


def test_a_times_of_all_steps_changes_nothing(pipe):
    assert torch.equal(
        sample(pipe, layout=[{**DOG, "begin": 0.0, "end": 1.0, "strength": 1}, BALL]), sample(pipe, layout=[DOG, BALL])
    )


def test_strength_is_a_factor_of_the_weight_and_0_is_no_region(pipe):
    stronger = sample(pipe, layout=[{**DOG, "strength": 2}, BALL])
    assert torch.equal(stronger, sample(pipe, layout=[{**DOG, "weight": 5.0}, BALL]))
    assert torch.equal(sample(pipe, layout=[{**DOG, "strength": 0}, BALL]), sample(pipe, layout=[BALL]))
    assert torch.equal(sample(pipe, layout=[{**DOG, "strength": 0}]), sample(pipe))


def test_a_method_that_cannot_serve_a_key_says_so(pipe):
    with pytest.raises(
        ValueError, match=r"layout.* .'red dog'. has `strength`, which guidance_method 'masked' cannot serve"
    ):
        sample(pipe, layout=[{**DOG, "strength": 2}], guidance_method="masked")
    background = {"subject": "background", "prompt": "a beach"}
    with pytest.raises(
        ValueError, match=r"layout\[\d\] \('background'\) is the background, which .* 'bounded_attention' cannot"
    ):
        sample(pipe, layout=[DOG, background], guidance_method="bounded_attention")
    with pytest.raises(ValueError, match=r"'<lambda>' cannot serve. Leave it out, or use one of \['cones2', "):
        sample(pipe, layout=[{**DOG, "strength": 2}], guidance_method=lambda layer: None)


# --- batches, guide, compiled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["multisubject", "cones2", "dense_diffusion"])
def test_each_prompt_of_a_batch_is_as_alone(pipe, method):
    """Also of what a method takes from all of an image's keys, where another image has more."""
    prompts = [PROMPT, "a green cat", "a cup"]
    layouts: list[Any] = [
        [{**DOG, "negative_prompt": "hat", "end": 0.7}, {"prompt": "a long cat with a hat", "box": RIGHT}],
        [{"subject": "background", "prompt": "a beach", "begin": 0.3}, {"subject": "green cat", "box": LEFT}],
        None,
    ]
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    together = sample(pipe, prompts, layout=layouts, latents=noise, guidance_method=method)
    for row, (prompt, layout) in enumerate(zip(prompts, layouts, strict=True)):
        alone = sample(pipe, prompt, layout=layout, latents=noise[row : row + 1], guidance_method=method)
        assert_equal_up_to_rounding(together[row : row + 1], alone, RUN)


def test_several_pictures_per_prompt(pipe):
    layout = [{**DOG, "negative_prompt": "hat", "begin": 0.4}, {"prompt": "a cat", "box": RIGHT}]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    both = sample(pipe, layout=layout, latents=noise, num_images_per_prompt=2)
    assert_equal_up_to_rounding(both[1:], sample(pipe, layout=layout, latents=noise[1:]), RUN)


def test_other_pipelines_follow_words_negatives_and_times(pipe):
    kind = StableDiffusionXLImg2ImgPipeline if "text_encoder_2" in pipe.components else StableDiffusionImg2ImgPipeline
    other = make_pipeline(pipe.components, kind)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    options = {"image": image, "strength": 0.6, "num_inference_steps": 5, "output_type": "latent"}

    def drawn(layout: Any) -> torch.Tensor:
        with pipe.guide(other, PROMPT, layout) as embeds:
            return other(**embeds, **options, generator=torch.Generator().manual_seed(0)).images

    held = {"prompt": "a cat", "negative_prompt": "hat", "box": RIGHT}
    plain, with_it = drawn([DOG]), drawn([DOG, held])
    assert (with_it - plain).abs().max() > 1e-4
    for times, differs in (({"end": 0.3}, True), ({"begin": 0.9}, False)):  # of three steps that are taken
        assert ((drawn([DOG, {**held, **times}]) - plain).abs().max() > 1e-4) == differs
    assert not any("Region" in type(processor).__name__ for processor in pipe.unet.attn_processors.values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_processors_are_as_found_after_an_exception(pipe, error):
    before = dict(pipe.unet.attn_processors)

    def fail(*args: Any) -> Any:
        raise error

    layout = [{"prompt": "a cat", "negative_prompt": "hat", "box": RIGHT, "begin": 0.1}]
    with pytest.raises(error):
        sample(pipe, layout=layout, callback_on_step_end=fail)
    assert pipe.unet.attn_processors == before and not pipe.unet._forward_pre_hooks


def test_a_compiled_unet_stays_one_graph_with_words_negatives_and_times(pipe):
    graphs = 0

    def backend(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    layout = [{**DOG, "end": 0.6}, {"prompt": "a cat", "negative_prompt": "hat", "box": RIGHT}]
    expected = sample(pipe, layout=layout, num_inference_steps=4)
    unet = pipe.unet
    try:
        pipe.unet = torch.compile(unet, backend=backend, fullgraph=True)
        assert_equal_up_to_rounding(sample(pipe, layout=layout, num_inference_steps=4), expected, RUN)
        assert graphs == 1
    finally:
        pipe.unet = unet
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "method", ["multisubject", "cones2_padding_hidden", "cones2", "dense_diffusion", "bounded_attention"]
)
def test_a_region_without_words_leaves_the_prompt_alone(pipe, method):
    """Its negative is the call's own where it covers the picture, whatever the method hides in regions of subjects."""
    if "text_encoder_2" in pipe.components:
        pytest.skip("XL's pooled embedding stays the picture's")

    found = sample(pipe, layout=[{"box": WHOLE, "negative_prompt": "red hat"}], guidance_method=method)
    assert_equal_up_to_rounding(found, sample(pipe, negative_prompt="red hat", guidance_method=method), RUN)


@pytest.mark.parametrize("method", ["multisubject", "regional_prompts"])
def test_long_words_are_refused_by_every_method(pipe, method):
    with pytest.raises(ValueError, match="tokens, expected at most"):
        pipe(PROMPT, layout=[{"box": LEFT, "prompt": "a red dog " * 60}], guidance_method=method)


def test_times_of_a_region_without_words_are_refused(pipe):
    with pytest.raises(ValueError, match=r"has `begin`, but no words that it could guide"):
        pipe(PROMPT, layout=[{"box": LEFT, "lora": "x", "begin": 0.5}])


def test_regions_without_a_subject_beside_a_list_of_prompts_are_not_taken_for_layouts(pipe):
    layout = [{"box": LEFT, "prompt": "a dog"}, {"subject": "background", "prompt": "a ball"}]
    with pytest.raises(ValueError, match="`layout` is a list of regions, expected a layout for each of the 2 prompts"):
        pipe([PROMPT, PROMPT], layout=layout)
