"""Each published method against its paper's equation, written out for one sample, one head and one query at a time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from multisubject.benchmarks.layout_guidance import LayoutGuidance
from multisubject.guidance_methods import (
    GUIDANCE_METHODS,
    HIDDEN,
    AttentionLayer,
    GuidanceStep,
    RegionMaps,
    TokenKind,
)

HEADS, QUERIES, DIM, TOKENS = 2, 6, 8, 5
# Two regions over six places, the last place in none; the third place in both.
INSIDE = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
# start, phrase of region 0, phrase of region 1, end, padding
PHRASES = {0: 1, 1: 2}
# In a region's own prompt: start, phrase, end, padding, padding
OWN_PHRASE = 1


def make_layer(is_cross: bool = True, own_prompts: bool = False, progress: float = 0.1) -> AttentionLayer:
    generator = torch.Generator().manual_seed(3)
    keys = (TOKENS * (3 if own_prompts else 1)) if is_cross else QUERIES
    query, key = (torch.randn(1, HEADS, n, DIM, generator=generator) for n in (QUERIES, keys))
    tokens = torch.zeros(1, 2, keys if is_cross else TOKENS, dtype=torch.bool)
    kinds = [TokenKind.START, TokenKind.WORD, TokenKind.WORD, TokenKind.END, TokenKind.PADDING]
    own_kinds = [TokenKind.START, TokenKind.WORD, TokenKind.END, TokenKind.PADDING, TokenKind.PADDING]
    owners = [-1] * TOKENS
    for region, position in PHRASES.items():
        tokens[0, region, position] = True
        if own_prompts and is_cross:
            tokens[0, region, TOKENS * (1 + region) + OWN_PHRASE] = True
            kinds, owners = kinds + own_kinds, owners + [region] * TOKENS
    weights = torch.where(INSIDE[:, :, None], 2.5, -1e8) * torch.ones(1, 1, tokens.shape[2])
    signed = torch.zeros(1, QUERIES, tokens.shape[2])
    for region in PHRASES:
        signed[0] = torch.where(tokens[0, region], weights[region], signed[0])
    end = torch.tensor([key in (3, 4) for key in range(tokens.shape[2])])
    maps = RegionMaps(
        *(INSIDE[None].float(), INSIDE[None], tokens, torch.tensor([kinds]), torch.tensor([owners])),
        signed_weights=signed[:, None],
        inside_weights=(signed * INSIDE.any(dim=0)[:, None])[:, None],
        hidden_summary=HIDDEN * (INSIDE.any(dim=0)[:, None] & end)[None, None],
        summaries=-2.0 * (INSIDE.any(dim=0)[:, None] & end)[None, None],
    )
    step = GuidanceStep(*(torch.tensor(value) for value in (2.0, 0.08 * math.log(5.0), progress, 0.9)))
    return AttentionLayer(query, key, DIM**-0.5, is_cross, maps, step)


def attended(layer: AttentionLayer, method: str) -> torch.Tensor:
    """Probabilities `(heads, queries, keys)` with the method's bias."""
    bias = GUIDANCE_METHODS[method](layer)
    assert bias is not None
    return (layer.query @ layer.key.transpose(-1, -2) * layer.scale + bias)[0].softmax(dim=-1)


def softmax_over(layer: AttentionLayer, head: int, place: int, keys: list[int]) -> torch.Tensor:
    """Attention of one place to some of the keys alone, zero at the others: `(keys,)`."""
    result = torch.zeros(layer.key.shape[2])
    logits = torch.stack([layer.query[0, head, place] @ layer.key[0, head, key] for key in keys]) / math.sqrt(DIM)
    result[keys] = logits.softmax(dim=0)
    return result


def own_keys(place: int) -> list[int]:
    return [TOKENS * (1 + region) + key for region in range(2) if INSIDE[region, place] for key in range(TOKENS)]


def test_regional_prompts_paste_the_attention_of_each_regions_own_prompt():
    """Mix-of-Show: inside a region, cross-attention is that of the region's prompt; elsewhere that of the whole one."""
    layer = make_layer(own_prompts=True)
    probabilities = attended(layer, "regional_prompts")
    for head in range(HEADS):
        for place in range(QUERIES):
            keys = own_keys(place) or list(range(TOKENS))
            torch.testing.assert_close(probabilities[head, place], softmax_over(layer, head, place, keys))


def test_attention_couple_weighs_the_whole_prompt_with_three_tenths():
    layer = make_layer(own_prompts=True)
    probabilities = attended(layer, "attention_couple")
    for head in range(HEADS):
        for place in range(QUERIES):
            logits = layer.query[0, head, place] @ layer.key[0, head].T / math.sqrt(DIM)
            weights = torch.zeros(len(logits))
            weights[:TOKENS] = 0.3 if own_keys(place) else 1.0
            weights[own_keys(place)] = 0.7
            expected = weights * logits.exp()
            torch.testing.assert_close(probabilities[head, place], expected / expected.sum(), atol=1e-4, rtol=1e-3)


def test_bounded_attention_keeps_subjects_apart_and_the_end_of_the_text_in_regions():
    """Bounded Attention, section 4 and its published code: subjects see themselves and the background, which does not
    see the end of the text."""
    probabilities = attended(make_layer(), "bounded_attention")
    for place in range(QUERIES):
        visible = {0, 4} | {PHRASES[region] for region in range(2) if INSIDE[region, place]}
        if INSIDE[:, place].any():
            visible |= {3}
        for key in range(TOKENS):
            assert bool((probabilities[:, place, key] > 0).all()) == (key in visible)

    probabilities = attended(make_layer(is_cross=False), "bounded_attention")
    for place in range(QUERIES):
        for other in range(QUERIES):
            background = not INSIDE[:, place].any() or not INSIDE[:, other].any()
            together = (INSIDE[:, place] & INSIDE[:, other]).any()
            assert bool((probabilities[:, place, other] > 0).all()) == bool(background or together)


@pytest.mark.parametrize("is_cross", [True, False])
def test_dense_diffusion_moves_logits_towards_the_ends_of_their_row(is_cross):
    """Equations 3 to 6: M = lambda R M_pos (1 - S) - lambda (1 - R) M_neg (1 - S), lambda = w (t / T) ** 5."""
    layer = make_layer(is_cross)
    bias = GUIDANCE_METHODS["dense_diffusion"](layer)[0]
    weight = (1.0 if is_cross else 0.3) * 0.9**5
    for head in range(HEADS):
        for place in range(QUERIES):
            products = {
                key: float(layer.query[0, head, place] @ layer.key[0, head, key]) for key in range(layer.key.shape[2])
            }
            regions = [region for region in range(2) if INSIDE[region, place]]
            area = max((float(INSIDE[region].float().mean()) for region in regions), default=1.0)
            for key, product in products.items():
                if is_cross:
                    belongs = any(key == PHRASES[region] for region in regions)
                else:
                    belongs = any(INSIDE[region, key] for region in regions)
                m_pos, m_neg = max(products.values()) - product, product - min(products.values())
                expected = weight * (1 - area) * (m_pos if belongs else -m_neg) / math.sqrt(DIM)
                assert float(bias[head, place, key]) == pytest.approx(expected, abs=1e-5)


def test_dense_diffusion_ends_after_thirty_percent_of_the_steps():
    assert GUIDANCE_METHODS["dense_diffusion"](make_layer(progress=0.2)).any()
    assert not GUIDANCE_METHODS["dense_diffusion"](make_layer(progress=0.3)).any()


@pytest.mark.parametrize("progress", [0.48, 0.5])
def test_multisubject_pulls_by_logits_holds_the_summary_back_inside_regions_and_opens_borders_late(progress):
    layer = make_layer(progress=progress)
    bias = GUIDANCE_METHODS["multisubject"](layer)[0, 0]
    expected = 3 * layer.step.strength * layer.maps.signed_weights[0, 0]
    for place in range(QUERIES):
        if INSIDE[:, place].any():
            expected[place, [3, 4]] = -2
        elif progress >= 0.5:
            expected[place] = 0
    torch.testing.assert_close(bias, expected, rtol=1e-6, atol=0)
    assert GUIDANCE_METHODS["multisubject"](make_layer(is_cross=False)) is None


@pytest.mark.parametrize("method", [name for name, f in GUIDANCE_METHODS.items() if hasattr(f, "same_in_every_layer")])
def test_methods_that_layers_share_look_at_no_queries_and_keys(method):
    layer = make_layer(own_prompts=hasattr(GUIDANCE_METHODS[method], "uses_region_prompts"))
    other = dataclasses.replace(layer, query=torch.randn_like(layer.query), key=torch.randn_like(layer.key))
    assert torch.equal(GUIDANCE_METHODS[method](layer), GUIDANCE_METHODS[method](other))


def test_masked_hides_and_does_not_pull():
    bias = GUIDANCE_METHODS["masked"](make_layer())[0, 0]
    for region, position in PHRASES.items():
        assert (bias[INSIDE[region], position] == 0).all()
        assert (bias[~INSIDE[region], position] == -1e8).all()
    assert (bias[:, [0, 3, 4]] == 0).all()


@pytest.mark.parametrize(
    "method", ["attention_couple", "cones2", "cones2_padding_hidden", "masked", "regional_prompts"]
)
def test_methods_of_cross_attention_leave_self_attention_alone(method):
    assert GUIDANCE_METHODS[method](make_layer(is_cross=False)) is None


# --- layout guidance, of the benchmarks ------------------------------------------------------------------------------


def test_layout_guidance_measures_attention_that_strays():
    """Chen et al. 2023, equation 2: the mean over a region's tokens and all heads of (1 - inside / everywhere) ** 2."""
    layer, guidance = make_layer(), LayoutGuidance()
    guidance._energies = []
    assert guidance(layer) is None
    ((queries, energy),) = guidance._energies
    probabilities = (layer.query @ layer.key.transpose(-1, -2) * layer.scale)[0].softmax(dim=-1)
    expected = []
    for region, token in PHRASES.items():
        of_heads = []
        for head in range(HEADS):
            attention = probabilities[head, :, token]
            of_heads.append((1 - attention[INSIDE[region]].sum() / attention.sum()) ** 2)
        expected.append(sum(of_heads) / HEADS)
    assert queries == QUERIES
    torch.testing.assert_close(energy, (sum(expected) / 2)[None])


def test_layout_guidance_descends_during_its_steps_and_leaves_the_pipeline_as_it_was(sd1_pipe):
    prompt, layout = "a red dog and a mug", {"red dog": (0, 0, 0.5, 1), "mug": (0.5, 0, 1, 1)}
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"layout": layout, "latents": latents, "num_inference_steps": 4, "output_type": "latent"}
    free = sd1_pipe(prompt, **settings).images
    guidance = LayoutGuidance(threshold=0.0, max_iterations=4, guided_share=0.25, scale=1.0)
    calls = []

    def note(*_):
        found = guidance._energies
        coarsest = [energy.detach() for queries, energy in found or () if queries == min(q for q, _ in found)]
        calls.append(float(torch.stack(coarsest).mean()) if coarsest else None)

    hook = sd1_pipe.unet.register_forward_hook(note)
    with guidance.attached(sd1_pipe):
        guided = sd1_pipe(prompt, guidance_method=guidance, **settings).images
    hook.remove()
    assert calls[4:] == [None] * 4  # four steps of descent before the first step, none before the others
    assert calls[0] > calls[1] > calls[2] > calls[3]
    assert (guided - free).abs().max() > 1e-3
    assert torch.equal(sd1_pipe(prompt, **settings).images, free)
