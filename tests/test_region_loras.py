"""LoRAs of regions on tiny real models: where they act, what they leave alone, and that nothing of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import assert_equal_up_to_rounding, make_components, make_pipeline
from peft import LoHaConfig, LoraConfig

from multisubject.guidance_methods import multisubject
from multisubject.layout import masks_at
from multisubject.prompt_encoder import EMBEDS
from multisubject.region_loras import PLACES, TOKENS, LoraCall, RegionLoras, joined_scales, lora_names, placed_loras

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
SPATIAL = [
    *ATTENTION,
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "conv",
]
PROMPT = "a dog and a ball on the beach"
RUN = 500


def add_lora(model: Any, name: str, targets: list[str], seed: int = 0, **options: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options), name)


def make_pipe(tokenizer: Any, kind: str, names: str = "ab", targets: list[str] = SPATIAL, text: bool = True) -> Any:
    pipe = make_pipeline(make_components(tokenizer, kind))
    for seed, name in enumerate(names):
        add_lora(pipe.unet, name, targets, seed)
        for slot in pipe.encoder_slots if text else ():
            add_lora(getattr(pipe, slot.name), name, ["q_proj", "v_proj", "fc1"], seed)
    switch_on(pipe, *names)
    return pipe


def models(pipe: Any) -> list[Any]:
    return [pipe.unet, *(getattr(pipe, slot.name) for slot in pipe.encoder_slots)]


def switch_on(pipe: Any, *names: str) -> None:
    """Active are these LoRAs alone, in all models that have them; without names, none."""
    for model in models(pipe):
        if hasattr(model, "peft_config"):
            model.enable_adapters() if names else model.disable_adapters()
            if names:
                model.set_adapter([*names])


@pytest.fixture(params=["sd1", "xl"])
def pipe(request, tokenizer):
    return make_pipe(tokenizer, request.param)


def sample(pipe: Any, prompt: Any = PROMPT, **arguments: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 5.0} | arguments
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments)[0]


def regions(*held: Any, boxes: Any = (LEFT, RIGHT)) -> list[dict[str, Any]]:
    return [
        {"subject": subject, "box": box, "lora": lora}
        for subject, box, lora in zip(("dog", "ball"), boxes, held, strict=False)
    ]


# --- where they act --------------------------------------------------------------------------------------------------


def seen(unet: Any, sample: torch.Tensor, call: LoraCall | None, embeds: torch.Tensor, added: Any = None) -> Any:
    """What each layer with LoRAs gives in one call, by its path."""
    found: dict[str, torch.Tensor] = {}
    layers = {path: layer for path, layer in unet.named_modules() if hasattr(layer, "lora_A")}
    hooks = [
        layer.register_forward_hook(lambda _m, args, output, path=path: found.update({path: (args[0], output)}))
        for path, layer in layers.items()
    ]
    names = () if call is None else call.names
    try:
        with placed_loras(unet, names) as switch, torch.no_grad():
            switch.set(call)
            unet(sample, 500, embeds, added_cond_kwargs=added)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def test_each_layer_adds_its_delta_at_the_regions_places_and_tokens(tokenizer):
    """Against peft's own formula, layer by layer, on a picture that is not square, with both halves of the batch."""
    unet = make_pipe(tokenizer, "sd1", text=False).unet
    loras = [[{"a": 0.5}, {"b": -1.0}]]
    masks, tokens = torch.zeros(1, 2, 32, 48), torch.zeros(1, 2, 77, dtype=torch.bool)
    masks[:, 0, :, :24], masks[:, 1, 8:, 24:] = 1, 1
    tokens[:, 0, 2], tokens[:, 1, 5] = True, True
    sizes = [(16, 24), (8, 12), (4, 6)]
    call = RegionLoras(loras, masks, tokens, masks_at).call(sizes, 2, torch.device("cpu"), None)
    generator = torch.Generator().manual_seed(1)
    noise, embeds = torch.randn(2, 4, 16, 24, generator=generator), torch.randn(2, 77, 32, generator=generator)
    found = seen(unet, noise, call, embeds)
    kinds = set()
    for path, (given, output) in found.items():
        layer = unet.get_submodule(path)
        expected = layer.base_layer(given)
        if path.endswith("time_emb_proj"):  # added by place, later
            assert torch.equal(output, expected)
            continue
        is_tokens = "attn2.to_k" in path or "attn2.to_v" in path
        kinds.add((given.ndim, is_tokens))
        for name, region in (("a", 0), ("b", 1)):
            delta = layer.lora_B[name](layer.lora_A[name](given)) * layer.scaling[name] * loras[0][region][name]
            if is_tokens:
                factor = torch.stack([torch.zeros(77), tokens[0, region].float()])[..., None]  # the first half has none
            else:
                rows = (
                    output.shape[-2:] if output.ndim == 4 else next(s for s in sizes if s[0] * s[1] == given.shape[1])
                )
                factor = masks_at(masks[0, region][None], tuple(rows))
                factor = factor[None] if output.ndim == 4 else factor.flatten(1)[..., None]
            expected = expected + delta * factor
        assert_equal_up_to_rounding(output, expected)
    assert kinds == {(4, False), (3, False), (3, True)}


def test_the_time_embedding_acts_by_place(tokenizer):
    """A LoRA of nothing else moves what the first residual block gives in its region, but for what convolutions and the
    norm's groups carry further."""
    unet = make_pipe(tokenizer, "sd1", "a", ["time_emb_proj"], text=False).unet
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., :8] = 1
    call = RegionLoras([[{"a": 1.0}]], masks, torch.zeros(1, 1, 77), masks_at).call(
        [(16, 16), (8, 8), (4, 4)], 1, torch.device("cpu"), None
    )
    given: dict[str, list[torch.Tensor]] = {"with": [], "without": []}
    block = unet.down_blocks[0].resnets[0]
    noise, embeds = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    with torch.no_grad():
        unet.disable_adapters()
        hook = block.norm2.register_forward_pre_hook(lambda _m, args: given["without"].append(args[0]))
        unet(noise, 500, embeds)
        hook.remove()
        unet.enable_adapters()
        hook = block.nonlinearity.register_forward_pre_hook(lambda _m, args: given["with"].append(args[0]))
        with placed_loras(unet, ["a"]) as switch:
            switch.set(call)
            unet(noise, 500, embeds)
        hook.remove()
    # The first activation is of norm1, the second of the time embedding, the third of norm2.
    delta = block.time_emb_proj.lora_B["a"](block.time_emb_proj.lora_A["a"](torch.nn.functional.silu(given["with"][1])))
    delta = delta * block.time_emb_proj.scaling["a"]
    expected = block.norm2(given["without"][0] + delta[:, :, None, None] * masks)
    assert_equal_up_to_rounding(given["with"][2], expected)


def test_regions_that_cover_the_picture_are_the_lora_everywhere(tokenizer):
    """In the UNet: layers of places and, with all tokens, of the prompt."""
    unet = make_pipe(tokenizer, "sd1", "a", text=False).unet
    masks, tokens = torch.ones(1, 1, 16, 16), torch.ones(1, 1, 77, dtype=torch.bool)
    call = RegionLoras([[{"a": 1.0}]], masks, tokens, masks_at).call(
        [(16, 16), (8, 8), (4, 4)], 1, torch.device("cpu"), None
    )
    noise, embeds = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    with torch.no_grad():
        expected = unet(noise, 500, embeds).sample
        with placed_loras(unet, ["a"]) as switch:
            switch.set(call)
            found = unet(noise, 500, embeds).sample
    assert_equal_up_to_rounding(found, expected)


def test_a_region_with_a_lora_is_its_own(pipe):
    """Other LoRAs, other scales, places and owners give other pictures."""
    drawn = [
        sample(pipe, layout=regions(*held))
        for held in ((None, None), ("a", None), (None, "a"), ("b", None), ("a", "b"), ("b", "a"), ({"a": 0.5}, None))
    ]
    for number, one in enumerate(drawn):
        assert one.isfinite().all()
        assert not any(torch.equal(one, other) for other in drawn[number + 1 :])


def test_scale_zero_is_the_base(pipe):
    found = sample(pipe, layout=regions({"a": 0.0}, {"b": 0.0}))
    switch_on(pipe)
    assert_equal_up_to_rounding(found, sample(pipe, layout=regions(None, None)), RUN)


def test_names_act_in_their_regions_alone_and_others_as_they_are_set(tokenizer):
    """Whether the region's LoRA is active or not; one that no region names acts everywhere, with its scale."""
    pipe = make_pipe(tokenizer, "sd1")
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    both = sample(pipe, layout=regions("a", None))
    pipe.set_adapters(["b"], [0.5])
    inactive = sample(pipe, layout=regions("a", None))
    assert_equal_up_to_rounding(inactive, both, RUN)
    assert pipe.get_active_adapters() == ["b"]
    pipe.set_adapters(["a"], [1.0])
    assert not torch.allclose(sample(pipe, layout=regions("a", None)), both, atol=1e-3)


@pytest.mark.parametrize("active", [True, False])
def test_the_calls_scale_counts(tokenizer, active):
    pipe = make_pipe(tokenizer, "sd1")
    pipe.set_adapters(["a"] if active else ["b"], [1.0 if active else 0.0])
    half = sample(pipe, layout=regions("a", None), cross_attention_kwargs={"scale": 0.5})
    assert_equal_up_to_rounding(half, sample(pipe, layout=regions({"a": 0.5}, None)), RUN)
    if active:
        pipe.set_adapters(["a"], [0.5])
        assert_equal_up_to_rounding(half, sample(pipe, layout=regions("a", None)), RUN)


def test_several_loras_of_a_region_add_up(tokenizer):
    """Two halves of one LoRA, as two, are that one."""
    pipe = make_pipe(tokenizer, "sd1", "a")
    for model in models(pipe):
        add_lora(model, "part", SPATIAL if model is pipe.unet else ["q_proj", "v_proj", "fc1"], 0)
    switch_on(pipe, "a")
    expected = sample(pipe, layout=regions("a", None))
    assert_equal_up_to_rounding(sample(pipe, layout=regions({"a": 0.5, "part": 0.5}, None)), expected, RUN)


def test_a_batch_of_layouts_gives_the_pictures_of_each_alone(tokenizer):
    pipe = make_pipe(tokenizer, "sd1")
    prompts, layouts = [PROMPT, "a ball", PROMPT], [regions("a", "b"), None, regions("b", {"a": 0.5})]
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    together = pipe(prompts, layout=layouts, latents=latents, num_inference_steps=2, output_type="latent")[0]
    for number, (prompt, layout) in enumerate(zip(prompts, layouts, strict=True)):
        noise = latents[number : number + 1]
        if layout is None:
            switch_on(pipe)
        alone = pipe(prompt, layout=layout, latents=noise, num_inference_steps=2, output_type="latent")[0]
        if layout is None:
            switch_on(pipe, "a", "b")
        assert_equal_up_to_rounding(together[number], alone[0], RUN)


def test_two_pictures_per_prompt(pipe):
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "layout": regions("a", "b")}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    together = pipe(PROMPT, num_images_per_prompt=2, generator=generators, **arguments)[0]
    for seed in (0, 1):
        alone = pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **arguments)[0]
        assert_equal_up_to_rounding(together[seed], alone[0], RUN)


def test_loras_go_on_after_the_guided_steps(tokenizer):
    pipe = make_pipe(tokenizer, "sd1")
    unguided = sample(pipe, layout=regions("a", "b"), guidance_steps=0, guidance_method="regional_prompts")
    assert unguided.isfinite().all()
    assert not torch.equal(unguided, sample(pipe, layout=regions("a", "b"), guidance_steps=1))
    assert not torch.equal(unguided, sample(pipe, layout=regions("b", "a"), guidance_steps=0))


@pytest.mark.parametrize("method", ["regional_prompts", "attention_couple", "cones2", "multisubject"])
def test_every_kind_of_method_serves_loras(pipe, method):
    one, other = (sample(pipe, layout=regions(*held), guidance_method=method) for held in (("a", "b"), ("b", "a")))
    assert one.isfinite().all() and not torch.equal(one, other)


def test_own_prompts_keys_are_the_regions(tokenizer):
    """Keys behind the prompt's, or in places of its padding, get their region's LoRA, fillers none."""
    tokens = torch.zeros(1, 2, 4)
    tokens[:, 0, 1] = 1
    loras = RegionLoras([[{"a": 1.0}, {"b": 1.0}]], torch.ones(1, 2, 8, 8), tokens, masks_at)
    own_end = loras.call([(8, 8)], 1, torch.device("cpu"), torch.tensor([[-1, -1, -1, 1]]))
    assert {name: rows.tolist() for name, rows in own_end.tokens.items()} == {"a": [[0, 1, 0, 0]], "b": [[0, 0, 0, 1]]}
    owners = torch.tensor([[-1, -1, -1, -1, 0, 0, 1, 1]])
    call = loras.call([(8, 8)], 2, torch.device("cpu"), owners)
    expected = {"a": [0, 1, 0, 0, 1, 1, 0, 0], "b": [0, 0, 0, 0, 0, 0, 1, 1]}
    for name, factors in expected.items():
        assert call.tokens[name].tolist() == [[0] * 8, factors]
        filled = call.factor(name, TOKENS, torch.zeros(2 * 10, 3), 2.0)
        assert filled.view(2, 10).tolist() == [[0] * 10, [2 * factor for factor in factors] + [0, 0]]


def test_overlapping_regions_with_one_lora_count_once():
    shares = torch.tensor([[[1.0, 0.5, 0.25, 0.0], [1.0, 0.5, 0.0, 0.0]]])
    assert joined_scales([[{"a": 1.0}, {"a": 1.0}]], shares)["a"].tolist() == [[1, 1, 0.25, 0]]
    assert joined_scales([[{"a": -1.0}, {"a": 0.5}]], shares)["a"].tolist() == [[-0.25, -0.25, -0.25, 0]]
    assert lora_names([[{"b": 1.0}, None], [{"a": 1.0, "b": 2.0}]]) == ("b", "a")


def test_words_are_changed_where_the_region_names_them(pipe):
    """In the prompt's embeddings; the negative prompt is the base's."""
    for slot in pipe.encoder_slots:  # in the last layer nothing hears of it any more, but of keys and values
        getattr(pipe, slot.name).delete_adapter(["a", "b"])
        add_lora(getattr(pipe, slot.name), "a", ["fc1", "fc2"])
    size = {"height": 32, "width": 32}
    held = pipe.place({"prompt": PROMPT}, regions("a"), None, **size)
    encoding: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "a dog", "method": None}
    found, _ = pipe.encode_with_regions(held, **encoding)
    for slot in pipe.encoder_slots:
        getattr(pipe, slot.name).disable_adapters()
    base = dict(zip(EMBEDS, pipe.encode_prompt(PROMPT, negative_prompt="a dog"), strict=False))
    assert torch.equal(found["negative_prompt_embeds"], base["negative_prompt_embeds"])
    moved = (found["prompt_embeds"] - base["prompt_embeds"]).abs().amax(dim=-1)[0] > 1e-6
    span = held[0].places[0][0].span
    assert moved[span.start : span.stop].all()
    assert not moved[: span.start].any()


def test_given_embeddings_need_no_text_encoder(pipe):
    whole = dict(zip(EMBEDS, pipe.encode_prompt(PROMPT, negative_prompt="a cat"), strict=False))
    arguments = {"layout": regions("a", "b"), "guidance_method": "cones2", **whole}
    expected = sample(pipe, **arguments)
    for slot in pipe.encoder_slots:
        setattr(pipe, slot.name, None)
    assert torch.equal(sample(pipe, **arguments), expected)


def test_own_prompts_hold_the_lora_whole(tokenizer):
    """A region's own prompt is encoded as with the LoRA everywhere, others' as the base does."""
    pipe = make_pipe(tokenizer, "sd1", "a")
    placed = pipe.place({"prompt": PROMPT}, regions("a", None), None, height=32, width=32)
    found = pipe.encode_with_regions(placed, multisubject, prompt=PROMPT)[1]["prompts"]
    dog = pipe.encode_prompt("a photo of dog", do_classifier_free_guidance=False)[0]
    pipe.text_encoder.disable_adapters()
    ball = pipe.encode_prompt("a photo of ball", do_classifier_free_guidance=False)[0]
    assert_equal_up_to_rounding(found.embeds[0, 0], dog[0])
    assert_equal_up_to_rounding(found.embeds[0, 1], ball[0])


def test_guide_places_loras_as_the_call_does(pipe):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if "text_encoder_2" in pipe.components else StableDiffusionPipeline
    other = make_pipeline(pipe.components, kind)
    expected = sample(pipe, layout=regions("a", "b"))
    with pipe.guide(other, PROMPT, regions("a", "b")) as embeds:
        found = sample(other, None, **embeds)
    assert_equal_up_to_rounding(found, expected, RUN)


def test_kohyas_format_is_read_as_any_other(tokenizer, tmp_path):
    """By `load_lora_weights`, with an alpha that is not the rank; then in a region."""
    from safetensors.torch import save_file

    pipe = make_pipeline(make_components(tokenizer, "sd1"))
    generator, weights = torch.Generator().manual_seed(0), {}
    prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    weights[f"{prefix}.lora_down.weight"] = torch.randn(2, 32, generator=generator)
    weights[f"{prefix}.lora_up.weight"] = torch.randn(32, 2, generator=generator)
    weights[f"{prefix}.alpha"] = torch.tensor(1.0)
    save_file(weights, tmp_path / "kohya.safetensors")
    bare = sample(pipe, layout=regions(None, None))
    pipe.load_lora_weights(str(tmp_path / "kohya.safetensors"), adapter_name="kohya")
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling["kohya"] == 0.5
    assert not torch.equal(sample(pipe, layout=regions("kohya", None)), bare)


# --- leaving the models as they were ---------------------------------------------------------------------------------


def state(pipe: Any) -> Any:
    return [
        (
            path,
            vars(module).get("forward"),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            [*module.active_adapters] if hasattr(module, "lora_A") else None,
            dict(getattr(module, "scaling", {})),
        )
        for model in models(pipe)
        for path, module in model.named_modules()
    ]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_models_are_as_found(pipe, error):
    pipe.set_adapters(["a", "b"], [0.7, 0.3])
    expected = sample(pipe)
    before = state(pipe)

    def stop(*args: Any) -> dict[str, Any]:
        assert state(pipe) != before
        if error is not None:
            raise error
        return args[-1]

    arguments: dict[str, Any] = {"layout": regions("a", "b"), "callback_on_step_end": stop}
    if error is None:
        sample(pipe, **arguments)
    else:
        with pytest.raises(error):
            sample(pipe, **arguments)
    assert state(pipe) == before
    assert torch.equal(sample(pipe), expected)


def test_contexts_close_in_any_order_and_the_innermost_speaks(tokenizer):
    unet = make_pipe(tokenizer, "sd1", text=False).unet
    noise, embeds = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    with torch.no_grad():
        everywhere = unet(noise, 500, embeds).sample
        one, other = placed_loras(unet, ["a"]), placed_loras(unet, ["a", "b"])
        one.__enter__().set(LoraCall(["a"], 1, {}, _nowhere(["a"])))
        without_a = unet(noise, 500, embeds).sample
        other.__enter__().set(LoraCall(["a", "b"], 1, {}, _nowhere(["a", "b"])))
        without = unet(noise, 500, embeds).sample
        one.__exit__(None, None, None)
        assert torch.equal(unet(noise, 500, embeds).sample, everywhere)  # the outer one has closed
        other.__exit__(None, None, None)
        assert not torch.allclose(without_a, everywhere, atol=1e-3)
        unet.set_adapter(["b"])
        assert_equal_up_to_rounding(without_a, unet(noise, 500, embeds).sample)
        unet.disable_adapters()
        assert_equal_up_to_rounding(without, unet(noise, 500, embeds).sample)
    assert not any("forward" in vars(module) for module in unet.modules())


def _nowhere(names: list[str]) -> dict[int, dict[str, torch.Tensor]]:
    return {size: {name: torch.zeros(1, size) for name in names} for size in (256, 64, 16)}


def test_other_threads_go_their_own_way(tokenizer):
    """While one thread's call is open, another one's on the same UNet has the LoRAs everywhere."""
    from concurrent.futures import ThreadPoolExecutor

    unet = make_pipe(tokenizer, "sd1", text=False).unet
    noise, embeds = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return unet(noise, 500, embeds).sample

    expected = call()
    with placed_loras(unet, ["a"]) as switch, ThreadPoolExecutor(1) as thread:
        switch.set(LoraCall(["a"], 1, {}, _nowhere(["a"])))
        assert torch.equal(thread.submit(call).result(), expected)
        assert not torch.equal(call(), expected)


def test_a_compiled_unet_is_one_graph(tokenizer):
    """Also where it was compiled before, without regions."""
    pipe = make_pipe(tokenizer, "sd1", targets=SPATIAL)
    layouts = [regions("a", "b"), regions({"a": 0.5}, {"b": 2.0})]
    expected = [sample(pipe, layout=layout, num_inference_steps=3) for layout in layouts]
    graphs = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = sample(pipe, num_inference_steps=3)
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    try:
        assert_equal_up_to_rounding(sample(pipe, num_inference_steps=3), plain, RUN)
        count = len(graphs)
        for layout, picture in zip(layouts, expected, strict=True):
            assert_equal_up_to_rounding(sample(pipe, layout=layout, num_inference_steps=3), picture, RUN)
        assert len(graphs) == count + 1  # none anew from step to step
        assert_equal_up_to_rounding(sample(pipe, num_inference_steps=3), plain, RUN)
    finally:
        torch._dynamo.reset()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_lora_that_is_not_loaded_is_told(pipe):
    with pytest.raises(ValueError, match=r"^layout\[0\] .* has the LoRA 'rex', but loaded are \['a', 'b'\].*='rex'"):
        sample(pipe, layout=regions("rex", None))


def test_a_fused_lora_and_one_switched_off_are_told(tokenizer):
    pipe = make_pipe(tokenizer, "sd1", targets=ATTENTION)
    pipe.disable_lora()
    with pytest.raises(ValueError, match=r"'a' of a region is switched off.*enable_lora"):
        sample(pipe, layout=regions("a", None))
    pipe.enable_lora()
    pipe.fuse_lora(adapter_names=["a"])
    with pytest.raises(ValueError, match=r"'a' of a region is fused.*unfuse_lora"):
        sample(pipe, layout=regions("a", None))
    assert sample(pipe, layout=regions("b", None)).isfinite().all()
    pipe.unfuse_lora()
    assert sample(pipe, layout=regions("a", None)).isfinite().all()


def test_adapters_that_do_not_add_are_told(tokenizer):
    pipe = make_pipe(tokenizer, "sd1", "a", targets=ATTENTION, text=False)
    add_lora(pipe.unet, "dora", ["to_q"], use_dora=True)
    pipe.unet.set_adapter(["a"])
    with pytest.raises(ValueError, match=r"'dora' of a region is none that adds .*to_q"):
        sample(pipe, layout=regions("dora", None))
    pipe.unet.set_adapter(["a", "dora"])  # beside a region's it may act everywhere
    assert sample(pipe, layout=regions("a", None)).isfinite().all()

    add_lora(pipe.unet, "time", ["time_embedding.linear_1"])
    with pytest.raises(ValueError, match=r"'time' of a region changes time_embedding\.linear_1"):
        sample(pipe, layout=regions("time", None))

    other = make_pipeline(make_components(tokenizer, "sd1"))
    other.unet.add_adapter(LoHaConfig(r=2, target_modules=["to_q"]), "loha")
    with pytest.raises(ValueError, match="'loha' of a region is of the kind LOHA, expected a LoRA"):
        sample(other, layout=regions("loha", None))


def test_a_batch_that_does_not_fit_is_told():
    loras = RegionLoras([[{"a": 1.0}]] * 2, torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 77), masks_at)
    with pytest.raises(ValueError, match="batch of 3, expected a multiple of 2"):
        loras.call([(8, 8)], 3, torch.device("cpu"), None)
    call = loras.call([(8, 8)], 2, torch.device("cpu"), None)
    with pytest.raises(ValueError, match=r"49 places, expected one of \[64\]"):
        call.factor("a", PLACES, torch.zeros(2, 3, 7, 7))
