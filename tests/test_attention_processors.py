"""Region attention on real, tiny UNets: what it adds, what it leaves alone, and that it gives the UNet back."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import assert_equal_up_to_rounding
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from multisubject.attention_processors import AttentionRecorder, RegionAttnProcessor
from multisubject.guidance_methods import (
    GUIDANCE_METHODS,
    HIDDEN,
    AttentionLayer,
    TokenKind,
    guides_all_self_attention,
    resolve_guidance_method,
    same_in_every_layer,
    uses_own_summaries,
    uses_own_words,
)
from multisubject.layout import masks_at
from multisubject.region_attention import RegionConditioning, RegionPrompts, region_attention

T = 77
LEFT, RIGHT = 3, 5  # tokens of the two regions


def two_regions(batch: int = 1, size: int = 32) -> RegionConditioning:
    """Left and right half of the picture."""
    masks = torch.zeros(batch, 2, size, size)
    masks[:, 0, :, : size // 2] = 1
    masks[:, 1, :, size // 2 :] = 1
    tokens = torch.zeros(batch, 2, T, dtype=torch.bool)
    tokens[:, 0, LEFT] = tokens[:, 1, RIGHT] = True
    generator = torch.Generator().manual_seed(7)
    own_tokens = torch.zeros(batch, 2, T, dtype=torch.bool)
    own_tokens[:, :, 4] = True
    words = torch.full((batch, 2, T), int(TokenKind.WORD))
    prompts = RegionPrompts(torch.randn(1, 2, T, 32, generator=generator).repeat(batch, 1, 1, 1), own_tokens, words)
    return RegionConditioning(masks, tokens, torch.full((batch, 2), 2.5), words[:, 0].clone(), prompts)


@pytest.fixture
def unet(tiny_components):
    return tiny_components["sd1"]["unet"]


@pytest.fixture
def scheduler(tiny_components):
    scheduler = DDIMScheduler.from_config(tiny_components["sd1"]["scheduler"].config)
    scheduler.set_timesteps(10)
    return scheduler


def inputs(batch: int = 1, size: tuple[int, int] = (16, 16), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, *size, generator=generator), torch.randn(batch, T, 32, generator=generator)


@torch.no_grad()
def call(unet: Any, sample: torch.Tensor, prompt_embeds: torch.Tensor, timestep: Any = 500, **kwargs: Any) -> Any:
    return unet(sample, timestep, encoder_hidden_states=prompt_embeds, **kwargs).sample


def guided(unet: Any, regions: RegionConditioning | None, scheduler: Any, **kwargs: Any) -> Any:
    return region_attention(unet, regions, scheduler=scheduler, resize_masks=masks_at, **kwargs)


def seen_layers(unet: Any, regions: RegionConditioning, scheduler: Any, *args: Any, like: Any = None) -> list:
    """Cross-attention layers that a guidance method sees during one call; one that declares what `like` does."""
    layers: list[AttentionLayer] = []

    def spy(layer: AttentionLayer) -> None:
        if layer.is_cross:
            layers.append(layer)

    vars(spy).update(vars(like) if like else {})
    with guided(unet, regions, scheduler, guidance_method=spy):
        call(unet, *args)
    return layers


# --- the processor ---------------------------------------------------------------------------------------------------


def test_processor_without_regions_is_the_stock_one_bit_for_bit(unet):
    stock = call(unet, *inputs())
    processors = dict(unet.attn_processors)
    unet.set_attn_processor(RegionAttnProcessor())
    try:
        assert torch.equal(call(unet, *inputs()), stock)
    finally:
        unet.set_attn_processor(processors)


def test_method_without_bias_changes_nothing(unet, scheduler):
    stock = call(unet, *inputs())
    with guided(unet, two_regions(), scheduler, guidance_method=lambda layer: None):
        assert_equal_up_to_rounding(call(unet, *inputs()), stock)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_std_without_the_product_equals_std_of_the_product(head_dim, offset):
    """Also where the mean is far larger than the spread."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 4, tokens, head_dim, generator=generator) for tokens in (60, 77))
    key[..., 0] += offset
    query[..., 0] += offset
    products = (query.double() @ key.double().transpose(-1, -2)).flatten(1)
    maps: Any = SimpleNamespace(absent=None)
    layer = AttentionLayer(query, key, 1.0, True, maps, step=None)  # type: ignore[arg-type]
    torch.testing.assert_close(layer.logit_std().flatten(), products.std(dim=1).float(), rtol=1e-5, atol=0)
    maps.absent = torch.zeros(3, 77, dtype=torch.bool)
    maps.absent[1, 70:] = True
    here = (query[1].double() @ key[1, :, :70].double().transpose(-1, -2)).std().float()
    torch.testing.assert_close(layer.logit_std()[1].item(), here.item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", sorted(GUIDANCE_METHODS))
def test_half_precision_stays_finite(unet, scheduler, dtype, method):
    half = copy.deepcopy(unet).to(dtype)
    sample, prompt_embeds = (tensor.to(dtype) for tensor in inputs(2))
    with guided(half, two_regions(), scheduler, guidance_method=method):
        assert call(half, sample, prompt_embeds, 981).isfinite().all()


@pytest.mark.parametrize("method", ["bounded_attention", "cones2", "cones2_padding_hidden", "masked"])
def test_tokens_get_no_attention_outside_their_region(unet, scheduler, method):
    recorder = AttentionRecorder(two_regions().tokens)
    with guided(unet, two_regions(), scheduler, guidance_method=method, recorder=recorder):
        call(unet, *inputs(), 981)
    left, right = recorder.maps()[0, 0]
    assert left[:, 8:].max() == right[:, :8].max() == 0
    assert left[:, :8].min() > 0
    assert right[:, 8:].min() > 0


def test_hidden_padding_gets_no_attention_inside_regions_and_is_cones2_elsewhere(unet, scheduler):
    regions = two_regions()
    regions.masks[:, 1] = 0
    regions.masks[:, 1, :, 24:] = 1  # between column 16 and 24 there is no region
    regions.token_kinds[:, 8] = TokenKind.END
    regions.token_kinds[:, 9:] = TokenKind.PADDING
    biases: dict[str, list[torch.Tensor]] = {}
    for name in ("cones2", "cones2_padding_hidden"):
        method = GUIDANCE_METHODS[name]
        with guided(unet, regions, scheduler, guidance_method="cones2"):
            layers = seen_layers(unet, regions, scheduler, *inputs(), 981)
        biases[name] = [method(layer).unflatten(2, (-1, int(layer.query.shape[2] ** 0.5))) for layer in layers]
    for plain, hidden in zip(*biases.values(), strict=True):
        width = plain.shape[3]
        outside = slice(width // 2, 3 * width // 4)
        assert torch.equal(hidden[..., :8], plain[..., :8])
        assert torch.equal(hidden[:, :, :, outside], plain[:, :, :, outside])
        assert (hidden[:, :, :, : width // 2, 8:] == -1e8).all()
        assert (hidden[:, :, :, 3 * width // 4 :, 8:] == -1e8).all()


def test_cones2_pulls_more_the_noisier_the_step(unet, scheduler):
    def attention_inside(timestep):
        recorder = AttentionRecorder(two_regions().tokens)
        with guided(unet, two_regions(), scheduler, recorder=recorder):
            call(unet, *inputs(), timestep)
        return recorder.maps()[0, 0, 0, :, :8].mean()

    free = AttentionRecorder(two_regions().tokens)
    with guided(unet, None, scheduler, recorder=free):
        call(unet, *inputs(), 500)
    assert attention_inside(981) > attention_inside(500) > free.maps()[0, 0, 0, :, :8].mean()


@pytest.mark.parametrize("method", ["cones2", "multisubject"])
def test_keys_of_the_prompt_are_made_once_for_all_steps(unet, scheduler, monkeypatch, method):
    layers = {
        kind: [module for name, module in unet.named_modules() if name.endswith(f"attn2.{kind}")]
        for kind in ("to_k", "to_v")
    }
    calls: list[nn.Linear] = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])

    def projections(kind: str) -> float:
        return sum(any(called is layer for layer in layers[kind]) for called in calls) / len(layers[kind])

    sample, prompt_embeds = inputs(2)
    with guided(unet, two_regions(), scheduler, guidance_method=method):
        for timestep in (900, 500):
            call(unet, sample, prompt_embeds, timestep)
        assert projections("to_k") == 1
        assert projections("to_v") == 2  # not kept, for the memory
        call(unet, sample, prompt_embeds.clone(), 500)
        assert projections("to_k") == 2


@pytest.mark.parametrize("late", ["hook", "forward"])
def test_projections_that_do_more_than_their_weights_are_not_kept(unet, scheduler, late):
    """Offloading, and adapters that are switched while it runs."""
    layer = next(module for name, module in unet.named_modules() if name.endswith("attn2.to_k"))
    scale, forward = 1.0, layer.forward
    handle = layer.register_forward_hook(lambda module, args, output: output * scale) if late == "hook" else None
    if late == "forward":
        layer.forward = lambda x: forward(x) * scale
    try:
        sample, prompt_embeds = inputs()  # the same tensors, for which keys could be kept
        with guided(unet, two_regions(), scheduler):
            before = call(unet, sample, prompt_embeds)
            scale = 3.0
            assert not torch.equal(call(unet, sample, prompt_embeds), before)
    finally:
        if handle:
            handle.remove()
        else:
            del layer.forward


@pytest.mark.parametrize("method", ["cones2", "multisubject"])
@pytest.mark.parametrize("changed", ["prompt_embeds", "weights"])
def test_prompt_is_projected_again_after_a_change_in_place(unet, scheduler, changed, method):
    unet = copy.deepcopy(unet)
    sample, prompt_embeds = inputs(2)

    def in_one_context(change_at: int) -> torch.Tensor:
        with guided(unet, two_regions(), scheduler, guidance_method=method), torch.no_grad():
            for step in range(2):
                if step == change_at:
                    target = prompt_embeds if changed == "prompt_embeds" else layer.weight
                    target.mul_(2.0)
                output = call(unet, sample, prompt_embeds)
        return output

    layer = next(module for name, module in unet.named_modules() if name.endswith("attn2.to_v"))
    before = in_one_context(change_at=-1)
    after_a_step = in_one_context(change_at=1)
    assert not torch.equal(before, after_a_step)
    assert torch.equal(after_a_step, in_one_context(change_at=-1))


@pytest.mark.parametrize("method", [name for name, f in GUIDANCE_METHODS.items() if hasattr(f, "same_in_every_layer")])
def test_layers_share_the_bias_of_a_method_that_allows_it(unet, scheduler, method):
    asked: list[int] = []

    def layer_by_layer(layer: AttentionLayer) -> torch.Tensor | None:
        return GUIDANCE_METHODS[method](layer)

    def shared(layer: AttentionLayer) -> torch.Tensor | None:
        asked.append(layer.query.shape[2])
        return GUIDANCE_METHODS[method](layer)

    vars(layer_by_layer).update(vars(GUIDANCE_METHODS[method]), same_in_every_layer=False)
    vars(shared).update(vars(GUIDANCE_METHODS[method]))
    found = []
    for function in (layer_by_layer, shared):
        with guided(unet, two_regions(), scheduler, guidance_method=function):
            found.append([call(unet, *inputs(), timestep=timestep) for timestep in (900, 100)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(*found[0])
    assert sorted(asked) == sorted([16, 64, 256] * 4)  # self- and cross-attention, in each of two calls


def test_keys_beside_the_tokens_get_no_attention(unet, scheduler):
    """The processor brings the number of keys to a multiple of 8: no method and no map sees them."""
    recorder = AttentionRecorder(torch.ones(1, 1, T, dtype=torch.bool))
    with guided(unet, two_regions(), scheduler, guidance_method=lambda layer: None, recorder=recorder):
        call(unet, *inputs())
    total = recorder.maps() * T  # a map is the mean over tokens
    torch.testing.assert_close(total, torch.ones_like(total))
    assert {layer.key.shape[2] for layer in seen_layers(unet, two_regions(), scheduler, *inputs())} == {T}


def test_gradients_flow_through_guided_steps(unet, scheduler):
    sample, prompt_embeds = inputs()
    sample.requires_grad_()
    with guided(unet, two_regions(), scheduler, guidance_method="cones2"):
        for timestep in (900, 500):  # the second backward pass must not meet what the first one freed
            unet(sample, timestep, encoder_hidden_states=prompt_embeds).sample.square().sum().backward()
    assert sample.grad is not None and sample.grad.isfinite().all() and sample.grad.any()


@pytest.mark.parametrize("method", ["cones2", "multisubject"])
def test_prompt_embeddings_can_be_optimised_within_one_context(unet, scheduler, method):
    sample, prompt_embeds = inputs()
    prompt_embeds.requires_grad_()
    with guided(unet, two_regions(), scheduler, guidance_method=method):
        call(unet, sample, prompt_embeds)  # without gradients
        for _ in range(2):
            output = unet(sample, 500, encoder_hidden_states=prompt_embeds).sample
            (gradient,) = torch.autograd.grad(output.square().sum(), prompt_embeds)
            assert gradient.any()
            prompt_embeds.data.add_(gradient)


def test_shared_bias_with_a_parameter_goes_through_gradient_checkpointing(unet, scheduler):
    unet = copy.deepcopy(unet).train()
    unet.enable_gradient_checkpointing()
    weight = torch.ones((), requires_grad=True)

    @same_in_every_layer
    def learnt(layer: AttentionLayer) -> torch.Tensor | None:
        return weight * layer.maps.signed_weights.clamp(min=-5) if layer.is_cross else None

    with guided(unet, two_regions(), scheduler, guidance_method=learnt):
        unet(inputs()[0].requires_grad_(), 500, encoder_hidden_states=inputs()[1]).sample.square().sum().backward()
    assert weight.grad is not None and weight.grad.isfinite() and weight.grad != 0


@pytest.mark.parametrize("method", sorted(GUIDANCE_METHODS))
def test_works_under_autocast(unet, scheduler, method):
    with guided(unet, two_regions(), scheduler, guidance_method=method):
        expected = call(unet, *inputs())
        with torch.autocast("cpu", torch.bfloat16):
            found = call(unet, *inputs())
        again = call(unet, *inputs())
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(again, expected)


def test_inference_mode_gives_the_same(unet, scheduler):
    sample, prompt_embeds = inputs(2)
    with guided(unet, two_regions(), scheduler, guidance_method="cones2"):
        expected = [call(unet, sample, prompt_embeds, timestep) for timestep in (900, 500)]
    with guided(unet, two_regions(), scheduler, guidance_method="cones2"), torch.inference_mode():
        found = [call(unet, sample, prompt_embeds.clone(), timestep) for timestep in (900, 500)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_unconditional_half_is_not_guided(unet, scheduler):
    sample, prompt_embeds = inputs(2)
    stock = call(unet, sample, prompt_embeds, 981)
    with guided(unet, two_regions(), scheduler):
        output = call(unet, sample, prompt_embeds, 981)
    assert_equal_up_to_rounding(output[0], stock[0])
    assert (output[1] - stock[1]).abs().max() > 1e-3


def test_self_attention_is_guided_in_both_halves_where_a_method_says_so(unet, scheduler):
    sample, prompt_embeds = inputs(2)
    stock = call(unet, sample, prompt_embeds, 981)

    def isolated(layer: AttentionLayer) -> torch.Tensor | None:
        return None if layer.is_cross else -1e8 * layer.maps.apart()[:, None]

    with guided(unet, two_regions(), scheduler, guidance_method=isolated):
        conditional = call(unet, sample, prompt_embeds, 981)
    with guided(unet, two_regions(), scheduler, guidance_method=guides_all_self_attention(isolated)):
        both = call(unet, sample, prompt_embeds, 981)
    assert_equal_up_to_rounding(conditional[0], stock[0])
    assert (both[0] - stock[0]).abs().max() > 1e-3
    assert_equal_up_to_rounding(both[1], conditional[1])
    with guided(unet, two_regions(), scheduler, guidance_method="bounded_attention"):
        assert_equal_up_to_rounding(call(unet, sample, prompt_embeds, 981)[0], both[0])


@pytest.mark.parametrize("method", ["attention_couple", "regional_prompts"])
def test_region_prompts_reach_the_conditional_half_alone(unet, scheduler, method):
    sample, prompt_embeds = inputs(2)
    stock = call(unet, sample, prompt_embeds, 981)
    with guided(unet, two_regions(), scheduler, guidance_method=method, guidance_steps=5):
        output = call(unet, sample, prompt_embeds, 981)
        after = call(unet, sample, prompt_embeds, scheduler.timesteps[-1])
    assert_equal_up_to_rounding(output[0], stock[0])
    assert (output[1] - stock[1]).abs().max() > 1e-3
    assert torch.equal(after, call(unet, sample, prompt_embeds, scheduler.timesteps[-1]))


def test_own_words_replace_the_prompts_in_guided_conditional_calls(unet, scheduler):
    sample, prompt_embeds = inputs(2)
    regions = two_regions()
    replaced = prompt_embeds.clone()
    replaced[1, LEFT], replaced[1, RIGHT] = regions.prompts.embeds[0, 0, 4], regions.prompts.embeds[0, 1, 4]

    @uses_own_words
    def own_words(layer):
        return None

    last = scheduler.timesteps[-1]
    with guided(unet, regions, scheduler, guidance_method=own_words, guidance_steps=9):
        by_keyword, positional = call(unet, sample, prompt_embeds, 981), unet(sample, 981, prompt_embeds).sample
        after = call(unet, sample, prompt_embeds, last)
    assert_equal_up_to_rounding(by_keyword, call(unet, sample, replaced, 981))
    assert_equal_up_to_rounding(positional, by_keyword)
    assert torch.equal(after, call(unet, sample, prompt_embeds, last))


@uses_own_words
@uses_own_summaries
def own_summaries(layer):
    return layer.maps.summaries if layer.is_cross else None


def with_own_ends(batch: int = 1) -> RegionConditioning:
    """The prompt's last six tokens are its end and padding; the regions' own prompts end at 5 and 6."""
    regions = two_regions(batch)
    regions.token_kinds[:, -6:] = torch.tensor([TokenKind.END, *[TokenKind.PADDING] * 5])
    for region, end in enumerate((5, 6)):
        regions.prompts.token_kinds[:, region, end] = TokenKind.END
    return regions


def test_ends_of_own_prompts_take_the_places_of_padding(unet, scheduler):
    """In guided conditional calls; the prompt's own end stays."""
    sample, prompt_embeds = inputs(2)
    regions = with_own_ends()
    seen: list[torch.Tensor] = []
    with guided(unet, regions, scheduler, guidance_method=own_summaries):
        handle = unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        call(unet, sample, prompt_embeds, 981)
        handle.remove()
    expected = prompt_embeds.clone()
    for region, (word, end) in enumerate(((LEFT, 5), (RIGHT, 6))):
        expected[1, word] = regions.prompts.embeds[0, region, 4]
        expected[1, T - 1 - region] = regions.prompts.embeds[0, region, end]
    assert torch.equal(seen[0], expected)


def test_an_own_end_counts_in_its_region_as_much_as_what_is_hidden_there(unet, scheduler):
    regions = with_own_ends()
    regions.masks[:, 1, 8:] = 0  # an eighth of the picture; the other one has half of it
    for layer in seen_layers(unet, regions, scheduler, *inputs(), like=own_summaries):
        assert layer.maps.owners.tolist() == [[*[-1] * (T - 2), 1, 0]]
        summaries, inside = layer.maps.summaries[0, 0], layer.maps.inside[0]
        for region, weight in ((0, math.log(4)), (1, math.log(4) + 8 * math.log(0.5))):
            own = summaries[:, T - 1 - region]
            assert inside[region].any() and (own[~inside[region]] == HIDDEN).all()
            torch.testing.assert_close(own[inside[region]], torch.full((inside[region].sum(),), weight))
        anywhere = inside.any(dim=0)
        for shared in range(T - 6, T - 2):
            assert (summaries[anywhere, shared] == HIDDEN).all() and not summaries[~anywhere, shared].any()
        assert not summaries[:, : T - 6].any()


@pytest.mark.parametrize("why", ["no padding", "background", "no end", "no pull", "one place", "a method without"])
def test_who_has_no_place_for_an_own_end(unet, scheduler, why):
    regions, method = with_own_ends(), own_summaries
    if why == "no padding":
        regions.token_kinds[:, -5:] = TokenKind.WORD
    elif why == "no pull":
        regions.weights.zero_()
    elif why == "one place":
        regions.masks[:, 1] = regions.masks[:, 0]
    elif why == "background":
        regions = dataclasses.replace(regions, background=torch.ones(1, 2, dtype=torch.bool))
    elif why == "no end":
        regions.prompts.token_kinds.fill_(TokenKind.WORD)
    else:
        method = GUIDANCE_METHODS["cones2"]
    for layer in seen_layers(unet, regions, scheduler, *inputs(), like=method):
        assert (layer.maps.owners == -1).all()


@pytest.mark.parametrize(
    ("rows", "of_other", "has_one"),
    [(20, "all", False), (12, "all", True), (20, "no words", True), (20, "no pull", True), (20, "words", False)],
)
def test_a_region_that_holds_most_of_another_sees_no_end_of_its_own(unet, scheduler, rows, of_other, has_one):
    """It is of what it says alone, and would leave no room for the other; unless that says nothing or does not pull."""
    regions = with_own_ends()
    if of_other in ("no words", "words"):
        regions.tokens[:, 1] = False
        regions.prompts.token_kinds[:, 1] = TokenKind.PADDING
    if of_other == "no pull":
        regions.weights[:, 1] = 0
    if of_other == "words":
        own = torch.ones(1, 1, 3, dtype=torch.bool)
        kinds = torch.full((1, 1, 3), int(TokenKind.WORD))
        words = RegionPrompts(torch.zeros(1, 1, 3, 32), own, kinds, torch.tensor([[1]]))
        regions = dataclasses.replace(regions, words=words)
    regions.masks.zero_()
    regions.masks[:, 0, :rows] = 1
    regions.masks[:, 1, 4:28, 8:16] = 1  # of 24 rows
    for layer in seen_layers(unet, regions, scheduler, *inputs(), like=own_summaries):
        other = 1 if of_other == "all" else -1
        assert layer.maps.owners[0, T - 2 : T].tolist() == [other, 0 if has_one else -1]


def test_an_absent_region_keeps_its_own_end_to_itself(unet, scheduler):
    """Before it begins nothing sees it."""
    regions = dataclasses.replace(with_own_ends(), times=(((0.0, 1.0), (0.5, 1.0)),))
    for layer in seen_layers(unet, regions, scheduler, *inputs(), like=own_summaries):
        assert layer.maps.owners.tolist() == [[*[-1] * (T - 2), 1, 0]]
        assert (layer.maps.summaries[0, 0, :, T - 2] == HIDDEN).all()


def test_sample_is_the_same_alone_and_in_a_batch(unet, scheduler):
    sample, prompt_embeds = inputs(3)
    sample[1] *= 3  # the strength is per sample: another sample's spread must not matter
    with guided(unet, two_regions(3), scheduler):
        together = call(unet, sample, prompt_embeds, 981)
    for row in range(3):
        with guided(unet, two_regions(), scheduler):
            alone = call(unet, sample[row : row + 1], prompt_embeds[row : row + 1], 981)
        assert_equal_up_to_rounding(together[row : row + 1], alone)


@pytest.mark.parametrize("size", [(16, 16), (9, 13), (5, 24)])
def test_every_region_has_a_cell_at_every_resolution(unet, scheduler, size):
    regions = two_regions()
    regions.masks[:, 0] = 0
    regions.masks[:, 0, 30, 1] = 1  # one pixel of the layout
    layers = seen_layers(unet, regions, scheduler, *inputs(size=size))
    assert {layer.query.shape[2] for layer in layers} == {
        math.ceil(size[0] / n) * math.ceil(size[1] / n) for n in (1, 2, 4)
    }
    for layer in layers:
        weights = layer.maps.signed_weights[0, 0]
        assert (weights[:, LEFT] > 0).sum() == 1
        assert (weights[:, RIGHT] > 0).any()
        assert not weights[:, [t for t in range(T) if t not in (LEFT, RIGHT)]].any()


@pytest.mark.parametrize(("narrowed", "expected"), [(0.6, HIDDEN), (0.7, -2.0)])
def test_summary_is_hidden_unless_little_is_left_outside_the_regions(unet, scheduler, narrowed, expected):
    """Of two pictures one leaves more than a third outside its regions, or less; the other always does."""
    regions = two_regions(batch=2)
    regions.token_kinds[:, -2:] = TokenKind.PADDING
    regions.masks[0, ..., round(32 * narrowed) :, :] = 0
    regions.masks[1, ..., 8:, :] = 0
    for layer in seen_layers(unet, regions, scheduler, *inputs(2)):
        inside = layer.maps.inside.any(dim=1)
        for picture, bias in ((0, expected), (1, HIDDEN)):
            held_back = layer.maps.summaries[picture, 0]
            assert inside[picture].any()
            assert (held_back[inside[picture]][:, -2:] == bias).all()
            assert not held_back[~inside[picture]].any()
            assert not held_back[:, :-2].any()


def test_what_regions_leave_is_measured_on_the_picture(unet, scheduler):
    """Not at a resolution where two interleaved regions each cover half of every cell."""
    regions = two_regions()
    regions.token_kinds[:, -2:] = TokenKind.PADDING
    regions.masks.zero_()
    regions.masks[:, 0, ..., ::2] = 1
    regions.masks[:, 1, ..., 1::2] = 1
    for layer in seen_layers(unet, regions, scheduler, *inputs(2)):
        assert layer.maps.summaries.unique().tolist() == [-2, 0]


def test_frames_of_earlier_calls_fit_no_other_call(unet, scheduler):
    """Calls with and without an unconditional half, in two precisions, are what they are in a context of their own."""
    unet = copy.deepcopy(unet)
    sample, prompt_embeds = inputs(2)
    calls = [(sample, prompt_embeds), (sample[:1], prompt_embeds[:1])]
    calls += [(sample.double(), prompt_embeds.double()), (sample + 1, prompt_embeds)]
    alone = []
    for arguments in calls:
        unet.to(arguments[0].dtype)
        with guided(unet, two_regions(), scheduler, guidance_method="multisubject"):
            alone.append(call(unet, *arguments))
    with guided(unet, two_regions(), scheduler, guidance_method="multisubject"):
        for arguments, expected in zip(calls, alone, strict=True):
            unet.to(arguments[0].dtype)
            assert torch.equal(call(unet, *arguments), expected)


def test_soft_mask_pulls_softly(unet, scheduler):
    regions = two_regions()
    regions.masks[:, 0, :16] *= 0.7
    weights = seen_layers(unet, regions, scheduler, *inputs())[0].maps.signed_weights[0, 0, :, LEFT].view(16, 16)
    torch.testing.assert_close(weights[:8, :8], torch.full((8, 8), 2.5 * 0.7))
    torch.testing.assert_close(weights[8:, :8], torch.full((8, 8), 2.5))
    assert (weights[:, 8:] == -1e8).all()


def test_token_of_two_regions_belongs_to_both(unet, scheduler):
    regions = two_regions()
    regions.tokens[:, 1] = regions.tokens[:, 0]
    for layer in seen_layers(unet, regions, scheduler, *inputs()):
        assert (layer.maps.signed_weights[..., LEFT] == 2.5).all()


def test_attention_mask_of_the_pipeline_is_kept(unet, scheduler):
    sample, prompt_embeds = inputs()
    mask = torch.ones(1, T)
    mask[:, 40:] = 0
    stock = call(unet, sample, prompt_embeds, encoder_attention_mask=mask)
    with guided(unet, two_regions(), scheduler, guidance_weight=0.0):
        output = call(unet, sample, prompt_embeds, encoder_attention_mask=mask)
    assert_equal_up_to_rounding(output, stock)


# --- the recorder ----------------------------------------------------------------------------------------------------


def test_recorder_averages_probabilities_over_heads_layers_and_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(1, 1, 5, dtype=torch.bool)
    tokens[0, 0, 1:3] = True
    recorder = AttentionRecorder(tokens)
    recorder.start_call()
    fine, coarse = torch.randn(1, 2, 16, 5, generator=generator), torch.randn(1, 2, 4, 5, generator=generator)
    recorder.add(fine, (4, 4))
    recorder.add(fine * 2, (4, 4))
    recorder.add(coarse, (2, 2))

    def probability(logits, size):
        return logits.softmax(-1)[..., 1:3].mean(dim=(1, 3)).view(1, 1, *size)

    resized = torch.nn.functional.interpolate(probability(coarse, (2, 2)), (4, 4), mode="nearest-exact")
    expected = (probability(fine, (4, 4)) + probability(fine * 2, (4, 4)) + resized) / 3
    torch.testing.assert_close(recorder.maps()[0], expected)


def test_recording_does_not_change_the_output(unet, scheduler):
    with guided(unet, two_regions(), scheduler):
        expected = call(unet, *inputs())
    with guided(unet, two_regions(), scheduler, recorder=AttentionRecorder(two_regions().tokens)):
        assert torch.equal(call(unet, *inputs()), expected)


def test_recorded_maps_are_finite_where_only_the_product_of_queries_and_keys_overflows(unet, scheduler):
    half = copy.deepcopy(unet).half()
    with torch.no_grad():
        for name, module in half.named_modules():
            if name.endswith(("attn2.to_q", "attn2.to_k")):
                module.weight *= 250
    recorder = AttentionRecorder(two_regions().tokens)
    sample, prompt_embeds = inputs()
    with guided(half, two_regions(), scheduler, recorder=recorder):
        assert call(half, sample.half(), prompt_embeds.half()).isfinite().all()
    assert recorder.maps().isfinite().all()


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, LMSDiscreteScheduler])
def test_noise_level_is_the_schedulers_at_fractional_timesteps(unet, scheduler, scheduler_class):
    scheduler = scheduler_class.from_config(scheduler.config, timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.frac().any()
    layers: list[AttentionLayer] = []
    with guided(unet, two_regions(), scheduler, guidance_method=layers.append):
        for index, timestep in enumerate(scheduler.timesteps):
            call(unet, *inputs(), timestep)
            step, sigma = layers[-1].step, float(scheduler.sigmas[index])
            assert float(step.sigma) == pytest.approx(sigma, rel=1e-5)
            assert float(step.strength) == pytest.approx(0.08 * math.log(1 + sigma**2), rel=1e-5)
            assert float(step.progress) == pytest.approx(index / 7)
        call(unet, *inputs(), scheduler.timesteps[2])  # again, without new timesteps
        assert float(layers[-1].step.progress) == pytest.approx(2 / 7)


@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_noise_level_is_that_of_edms_schedulers(unet, scheduler_class):
    """Whose timesteps are no training steps."""
    scheduler = scheduler_class()
    scheduler.set_timesteps(5)
    steps = []
    sample, prompt_embeds = inputs()
    with guided(unet, two_regions(), scheduler, guidance_method=lambda layer: steps.append(layer.step)):
        for index, timestep in enumerate(scheduler.timesteps):
            output = call(unet, scheduler.scale_model_input(sample, timestep), prompt_embeds, timestep)
            assert steps[-1].sigma == scheduler.sigmas[index]
            assert float(steps[-1].progress) == pytest.approx(index / 5)
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]


def test_zero_terminal_snr_is_finite(unet, scheduler):
    scheduler = DDIMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
    scheduler.set_timesteps(5)
    with guided(unet, two_regions(), scheduler):
        assert call(unet, *inputs(), 999).isfinite().all()


@pytest.mark.parametrize(
    "scheduler_class",
    [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler],
)
def test_guidance_steps_count_the_schedulers_steps(unet, scheduler, scheduler_class):
    """Not the UNet calls, of which Heun makes two per step."""
    scheduler = scheduler_class.from_config(scheduler.config)
    scheduler.set_timesteps(6)
    guided_calls = []
    sample, prompt_embeds = inputs()
    with guided(unet, two_regions(), scheduler, guidance_steps=2, guidance_method=lambda layer: calls.append(1)):
        for timestep in scheduler.timesteps:
            calls: list[int] = []
            output = call(unet, scheduler.scale_model_input(sample, timestep), prompt_embeds, timestep)
            guided_calls.append(bool(calls))
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    # Heun evaluates each step twice, PNDM its second one.
    expected = {HeunDiscreteScheduler: 4, PNDMScheduler: 3}.get(scheduler_class, 2)
    assert guided_calls == [True] * expected + [False] * (len(scheduler.timesteps) - expected)


def test_as_many_guidance_steps_as_there_are_guide_all_calls(unet):
    scheduler = PNDMScheduler(skip_prk_steps=False)  # whose first steps are four calls each, some at the same time
    scheduler.set_timesteps(8)
    calls = []
    with guided(unet, two_regions(), scheduler, guidance_steps=8, guidance_method=lambda layer: calls.append(1)):
        for timestep in scheduler.timesteps:
            before = len(calls)
            call(unet, *inputs(), timestep)
            assert len(calls) > before


def test_guidance_steps_count_from_where_image_to_image_begins(unet, scheduler):
    with guided(unet, two_regions(), scheduler, guidance_steps=2):
        outputs = [call(unet, *inputs(), timestep) for timestep in scheduler.timesteps[5:]]
    stock = [call(unet, *inputs(), timestep) for timestep in scheduler.timesteps[5:]]
    same = [torch.equal(one, other) for one, other in zip(outputs, stock, strict=True)]
    assert same == [False, False, True, True, True]


def test_guidance_steps_count_anew_for_a_second_run_in_the_same_context(unet, scheduler):
    with guided(unet, two_regions(), scheduler, guidance_steps=1):
        for timestep in scheduler.timesteps:
            call(unet, *inputs(), timestep)
        first, second = (call(unet, *inputs(), timestep) for timestep in scheduler.timesteps[4:6])
    assert not torch.equal(first, call(unet, *inputs(), scheduler.timesteps[4]))
    assert torch.equal(second, call(unet, *inputs(), scheduler.timesteps[5]))


def test_steps_after_the_guided_ones_are_stock_bit_for_bit(unet, scheduler):
    first, last = scheduler.timesteps[[0, -1]]
    with guided(unet, two_regions(), scheduler, guidance_steps=9):
        call(unet, *inputs(), first)
        output = call(unet, *inputs(), last)
    assert torch.equal(output, call(unet, *inputs(), last))


def one_block_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )


@pytest.mark.parametrize("method", sorted(GUIDANCE_METHODS))
def test_compiled_unet_is_one_graph_and_does_not_recompile_from_step_to_step(scheduler, method):
    counter = 0

    def backend(graph, example_inputs):
        nonlocal counter
        counter += 1
        return graph.forward

    compiled = torch.compile(one_block_unet(), backend=backend, fullgraph=True)
    try:
        with guided(compiled, two_regions(), scheduler, guidance_method=method):
            call(compiled, *inputs(), scheduler.timesteps[0])
            after_first = counter
            for timestep in scheduler.timesteps[1:]:
                call(compiled, *inputs(), timestep)
        assert counter == after_first == 1
    finally:
        torch._dynamo.reset()


# --- leaving the UNet as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_processors_restored_after_error_and_interrupt(unet, scheduler, error):
    before, stock = dict(unet.attn_processors), call(unet, *inputs())
    with pytest.raises(error), guided(unet, two_regions(), scheduler):
        assert all(isinstance(processor, RegionAttnProcessor) for processor in unet.attn_processors.values())
        raise error
    assert unet.attn_processors == before
    assert not unet._forward_pre_hooks
    assert torch.equal(call(unet, *inputs()), stock)


def test_nested_context_replaces_the_outer_one_and_hands_back(unet, scheduler):
    stock = call(unet, *inputs())
    with guided(unet, two_regions(), scheduler):
        outer = call(unet, *inputs())
    mirrored = two_regions()
    mirrored.masks.copy_(mirrored.masks.flip(-1))
    with guided(unet, mirrored, scheduler):
        inner = call(unet, *inputs())
    assert not torch.equal(inner, outer)

    with guided(unet, two_regions(), scheduler):
        with guided(unet, mirrored, scheduler):
            assert torch.equal(call(unet, *inputs()), inner)
        with guided(unet, None, scheduler):
            assert torch.equal(call(unet, *inputs()), stock)
            call(unet, *inputs(5))  # another batch size is no concern of the outer context
        assert torch.equal(call(unet, *inputs()), outer)
    assert torch.equal(call(unet, *inputs()), stock)


def test_other_processors_of_plain_attention_are_replaced_and_restored(unet, scheduler):
    before = dict(unet.attn_processors)
    with guided(unet, two_regions(), scheduler):
        expected = call(unet, *inputs())
    try:
        unet.set_attn_processor(AttnProcessor())
        with guided(unet, two_regions(), scheduler):
            assert_equal_up_to_rounding(call(unet, *inputs()), expected)
        assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor}
    finally:
        unet.set_attn_processor(before)


def test_lora_keeps_working(unet, scheduler):
    from peft import LoraConfig

    with guided(unet, two_regions(), scheduler):
        without = call(unet, *inputs())
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    with guided(adapted, two_regions(), scheduler):
        with_lora = call(adapted, *inputs())
        scaled_off = call(adapted, *inputs(), cross_attention_kwargs={"scale": 0.0})
    adapted.fuse_lora()
    with guided(adapted, two_regions(), scheduler):
        fused = call(adapted, *inputs())

    assert (with_lora - without).abs().max() > 1e-3
    assert_equal_up_to_rounding(with_lora, fused, roundings=1000)  # fused weights are rounded themselves
    assert_equal_up_to_rounding(scaled_off, without)


# --- errors ----------------------------------------------------------------------------------------------------------


class SomebodysProcessor(AttnProcessor2_0):
    pass


def test_processors_that_would_be_lost_raise(unet, scheduler):
    before = dict(unet.attn_processors)
    unet.set_attn_processor(SomebodysProcessor())
    try:
        with pytest.raises(ValueError, match="set_default_attn_processor"), guided(unet, two_regions(), scheduler):
            pass
        with guided(unet, None, scheduler):  # nothing to guide, nothing to lose
            call(unet, *inputs())
        assert {type(p) for p in unet.attn_processors.values()} == {SomebodysProcessor}
    finally:
        unet.set_attn_processor(before)


def test_batch_that_does_not_fit_the_regions_raises(unet, scheduler):
    with guided(unet, two_regions(2), scheduler), pytest.raises(ValueError, match=r"batch of 3, expected 2 .* or 4"):
        call(unet, *inputs(3))


def test_method_that_misses_its_region_prompts_raises(unet, scheduler):
    regions = dataclasses.replace(two_regions(), prompts=None)
    with (
        pytest.raises(ValueError, match="'regional_prompts' uses the regions' own prompts"),
        guided(unet, regions, scheduler, guidance_method="regional_prompts"),
    ):
        pass


def test_a_method_that_returns_a_number_is_told(unet, scheduler):
    with (
        guided(unet, two_regions(), scheduler, guidance_method=lambda layer: 0.0),
        pytest.raises(TypeError, match="guidance method returned a float, expected a tensor or None"),
    ):
        call(unet, *inputs())


def test_bias_of_the_wrong_shape_raises(unet, scheduler):
    with (
        guided(unet, two_regions(), scheduler, guidance_method=lambda layer: torch.zeros(1, 1, 2, 3)),
        pytest.raises(ValueError, match=r"\(1, 1, 2, 3\), expected"),
    ):
        call(unet, *inputs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_negative": 1.0}, "`weight_negative` is 1.0"),
        ({"weight_negative": -math.inf}, "`weight_negative` is -inf"),
        ({"weight_negative": math.nan}, "`weight_negative` is nan"),
        ({"guidance_weight": math.nan}, "`guidance_weight` is nan"),
        ({"guidance_steps": -1}, "`guidance_steps` is -1"),
        ({"guidance_method": "cones3"}, r"'cones3', expected one of \['attention_couple', .*'regional_prompts'\]"),
    ],
)
def test_bad_arguments_are_named(unet, scheduler, arguments, message):
    with pytest.raises(ValueError, match=message), guided(unet, two_regions(), scheduler, **arguments):
        pass


def test_scheduler_without_noise_levels_raises(unet):
    with pytest.raises(ValueError, match="alphas_cumprod"), guided(unet, two_regions(), object()):
        pass


def test_methods_are_found_by_name_or_given_as_functions():
    assert resolve_guidance_method("cones2") is GUIDANCE_METHODS["cones2"]
    assert resolve_guidance_method(len) is len
