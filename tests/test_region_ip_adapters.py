"""Reference pictures of regions, on tiny real UNets with IP-Adapters of random weights, against diffusers' masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_equal_up_to_rounding, make_components, make_pipeline
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH = 12  # of picture embeddings
PROMPT = "a dog and a ball on the beach"
BOXES = {"dog": (0.0, 0.0, 0.5, 1.0), "ball": (0.5, 0.25, 1.0, 1.0)}
RUN = 500


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load_adapters(pipe: Any, count: int = 1) -> None:
    """IP-Adapters of random weights, in the form of the released ones."""
    dim = pipe.unet.config.cross_attention_dim
    names = [name.removesuffix(".processor") for name in pipe.unet.attn_processors if "attn2" in name]
    widths = [pipe.unet.get_submodule(name).inner_dim for name in names]
    state_dicts = [
        {
            "image_proj": {
                "proj.weight": torch.randn(4 * dim, WIDTH, generator=seeded(adapter)),
                "proj.bias": torch.zeros(4 * dim),
                "norm.weight": torch.ones(dim),
                "norm.bias": torch.zeros(dim),
            },
            "ip_adapter": {
                f"{2 * index + 1}.to_{part}_ip.weight": torch.randn(width, dim, generator=seeded(10 * adapter + index))
                for index, width in enumerate(widths)
                for part in "kv"
            },
        }
        for adapter in range(count)
    ]
    pipe.load_ip_adapter(state_dicts, subfolder="", weight_name=[""] * count, image_encoder_folder=None)
    pipe.set_ip_adapter_scale([0.8, 0.5][:count])


def embeddings(seed: int, pictures: int = 1, shape: tuple[int, ...] = (WIDTH,)) -> torch.Tensor:
    """As `ip_adapter_image_embeds` has them: negative ones, then the pictures'."""
    return torch.randn(2, pictures, *shape, generator=seeded(seed))


def sample(pipe: Any, prompt: Any = PROMPT, **arguments: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 5.0} | arguments
    arguments.setdefault("generator", seeded())
    return pipe(prompt, **arguments)[0]


def plain(pipe: Any) -> Any:
    kind = StableDiffusionXLPipeline if "text_encoder_2" in pipe.components else StableDiffusionPipeline
    return make_pipeline(pipe.components, kind)


def regions(**held: Any) -> list[dict[str, Any]]:
    return [{"subject": subject, "box": box, "ip_adapter_image": held.get(subject)} for subject, box in BOXES.items()]


def masks(*subjects: str, height: int = 32, width: int = 32) -> torch.Tensor:
    """As `ip_adapter_masks` wants those of one adapter: `(1, pictures, height, width)`."""
    drawn = torch.zeros(1, len(subjects), height, width)
    for number, subject in enumerate(subjects):
        xmin, ymin, xmax, ymax = BOXES[subject]
        drawn[0, number, int(ymin * height) : int(ymax * height), int(xmin * width) : int(xmax * width)] = 1
    return drawn


@pytest.fixture(params=["sd1", "xl"])
def pipe(request, tokenizer):
    pipe = make_pipeline(make_components(tokenizer, request.param))
    load_adapters(pipe)
    return pipe


# --- as diffusers' masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_regions_pictures_are_diffusers_masked_pictures(pipe, guidance_scale):
    """Number for number, with and without an unconditional half; the layout itself does not guide."""
    dog, ball = embeddings(1), embeddings(2)
    given = torch.cat([dog, ball], dim=1) if guidance_scale > 1 else torch.cat([dog[1:], ball[1:]], dim=1)
    expected = sample(
        plain(pipe),
        ip_adapter_image_embeds=[given],
        cross_attention_kwargs={"ip_adapter_masks": [masks("dog", "ball")]},
        guidance_scale=guidance_scale,
    )
    found = sample(pipe, layout=regions(dog=dog, ball=ball), guidance_steps=0, guidance_scale=guidance_scale)
    assert_equal_up_to_rounding(found, expected, RUN)


def test_a_picture_that_is_not_square(pipe):
    size = {"height": 32, "width": 48}
    expected = sample(
        plain(pipe),
        ip_adapter_image_embeds=[embeddings(1)],
        cross_attention_kwargs={"ip_adapter_masks": [masks("dog", **size)]},
        **size,
    )
    assert_equal_up_to_rounding(
        sample(pipe, layout=regions(dog=embeddings(1)), guidance_steps=0, **size), expected, RUN
    )


@pytest.mark.parametrize("method", ["multisubject", "regional_prompts", "cones2"])
def test_masks_by_hand_beside_a_layout_are_the_regions_pictures(pipe, method):
    """While the layout guides, too."""
    dog, ball = embeddings(1), embeddings(2)
    by_hand = sample(
        pipe,
        layout=regions(),
        ip_adapter_image_embeds=[torch.cat([dog, ball], dim=1)],
        cross_attention_kwargs={"ip_adapter_masks": [masks("dog", "ball")]},
        guidance_method=method,
    )
    found = sample(pipe, layout=regions(dog=dog, ball=ball), guidance_method=method)
    assert_equal_up_to_rounding(found, by_hand, RUN)
    assert not torch.allclose(
        found, sample(pipe, layout=regions(dog=ball, ball=dog), guidance_method=method), atol=1e-3
    )


def test_masks_by_hand_without_a_layout_are_diffusers_own(pipe):
    """Bit for bit, also after a guided call; given as a tensor, too, and with a scale for each picture."""
    arguments: dict[str, Any] = {"ip_adapter_image_embeds": [embeddings(3, 2)]}
    arguments["cross_attention_kwargs"] = {"ip_adapter_masks": [masks("dog", "ball")]}
    sample(pipe, layout=regions(dog=embeddings(1)))
    assert torch.equal(sample(pipe, **arguments), sample(plain(pipe), **arguments))
    pipe.set_ip_adapter_scale([[0.3, 0.9]])
    expected = sample(plain(pipe), **arguments)
    assert torch.equal(sample(pipe, **arguments), expected)
    found = sample(pipe, layout=regions(), guidance_method=lambda layer: None, **arguments)
    assert_equal_up_to_rounding(found, expected, RUN)


@pytest.mark.parametrize("pictures", [1, 2])
def test_the_calls_pictures_are_everywhere_beside_a_layout(pipe, pictures):
    arguments: dict[str, Any] = {"ip_adapter_image_embeds": [embeddings(3, pictures)]}
    expected = sample(plain(pipe), **arguments)
    assert_equal_up_to_rounding(
        sample(pipe, layout=regions(), guidance_method=lambda layer: None, **arguments), expected, RUN
    )
    guided = sample(pipe, layout=regions(), **arguments)
    assert guided.isfinite().all() and not torch.allclose(guided, expected, atol=1e-3)


def test_the_calls_picture_and_a_regions_add_up(pipe):
    """Against diffusers' masks, of which one is of ones."""
    both, mask = torch.cat([embeddings(3), embeddings(1)], dim=1), masks("dog", "dog")
    mask[:, 0] = 1
    expected = sample(plain(pipe), ip_adapter_image_embeds=[both], cross_attention_kwargs={"ip_adapter_masks": [mask]})
    found = sample(pipe, layout=regions(dog=embeddings(1)), guidance_steps=0, ip_adapter_image_embeds=[embeddings(3)])
    assert_equal_up_to_rounding(found, expected, RUN)


def test_several_adapters(tokenizer):
    """A region may hold a picture for each, or for one of them; scale zero switches one off."""
    pipe = make_pipeline(make_components(tokenizer, "sd1"))
    load_adapters(pipe, 2)
    first, second, third = embeddings(1), embeddings(2), embeddings(3)
    expected = sample(
        plain(pipe),
        ip_adapter_image_embeds=[first, torch.cat([second, third], dim=1)],
        cross_attention_kwargs={"ip_adapter_masks": [masks("dog"), masks("dog", "ball")]},
    )
    layout = regions(dog=[first, second], ball={"1": third})
    assert_equal_up_to_rounding(sample(pipe, layout=layout, guidance_steps=0), expected, RUN)
    pipe.set_ip_adapter_scale([0.0, 0.5])
    assert not torch.allclose(sample(pipe, layout=layout, guidance_steps=0), expected, atol=1e-3)
    with pytest.raises(
        ValueError,
        match=r"^layout\[0\] \('dog'\): ip_adapter_image has 1 picture\(s\), expected one for each of the 2",
    ):
        sample(pipe, layout=regions(dog=first))
    with pytest.raises(ValueError, match=r"for the IP-Adapters \['face'\], expected some of \['0', '1'\]"):
        sample(pipe, layout=regions(dog={"face": first}))


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_an_adapter_without_any_picture_does_nothing(kind, tokenizer):
    layout = regions(dog={"0": embeddings(1)})
    one, two = (make_pipeline(make_components(tokenizer, kind)) for _ in range(2))
    load_adapters(one, 1)
    load_adapters(two, 2)
    for guidance_scale in (5.0, 1.0):
        expected = sample(one, layout=layout, guidance_scale=guidance_scale)
        assert torch.equal(sample(two, layout=layout, guidance_scale=guidance_scale), expected)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (
            lambda dim: IPAdapterPlusImageProjection(WIDTH, dim, 16, depth=1, dim_head=8, heads=2, num_queries=3),
            (5, WIDTH),
        ),
        (lambda dim: IPAdapterFullImageProjection(WIDTH, dim), (5, WIDTH)),
        (lambda dim: IPAdapterFaceIDImageProjection(WIDTH, dim, num_tokens=4), (WIDTH,)),
    ],
    ids=["plus", "full face", "face id"],
)
def test_other_kinds_of_adapters(tokenizer, kind, shape):
    """The projections of diffusers' other adapters, which read sequences or faces."""
    pipe = make_pipeline(make_components(tokenizer, "sd1"))
    load_adapters(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([kind(pipe.unet.config.cross_attention_dim)])
    dog, ball = embeddings(1, shape=shape), embeddings(2, shape=shape)
    expected = sample(
        plain(pipe),
        ip_adapter_image_embeds=[torch.cat([dog, ball], dim=1)],
        cross_attention_kwargs={"ip_adapter_masks": [masks("dog", "ball")]},
    )
    assert_equal_up_to_rounding(sample(pipe, layout=regions(dog=dog, ball=ball), guidance_steps=0), expected, RUN)
    (layer,) = pipe.unet.encoder_hid_proj.image_projection_layers
    load_adapters(pipe, 2)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([layer, layer])
    pipe.set_ip_adapter_scale([0.8, 1.0])
    one_is_blank = regions(dog={"0": dog}, ball={"0": ball})
    assert_equal_up_to_rounding(sample(pipe, layout=one_is_blank, guidance_steps=0), expected, RUN)


def test_face_id_plus_is_told(tokenizer):
    pipe = make_pipeline(make_components(tokenizer, "sd1"))
    load_adapters(pipe)
    layer = IPAdapterFaceIDPlusImageProjection(embed_dims=16, output_dims=32, hidden_dims=8, id_embeddings_dim=WIDTH)
    layer.clip_embeds = torch.zeros(1)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([layer])
    with pytest.raises(ValueError, match=r"FaceID-Plus .* Pass its picture to the call"):
        sample(pipe, layout=regions(dog=embeddings(1)))


# --- pictures, batches, pipelines ------------------------------------------------------------------------------------


def with_encoder(pipe: Any, width: int = WIDTH) -> Any:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=width,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CLIPVisionModelWithProjection(config).eval()
    pipe.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessor(size=16, crop_size=16))
    return pipe


def test_pictures_are_encoded_as_diffusers_encodes_them(pipe):
    with_encoder(pipe)
    red, blue = (Image.new("RGB", (20, 16), colour) for colour in ("red", "blue"))
    masked = {"ip_adapter_masks": [masks("dog", "ball")]}
    expected = sample(plain(pipe), ip_adapter_image=[[red, blue]], cross_attention_kwargs=masked)
    held = regions(dog=red, ball=np.asarray(blue))
    found = sample(pipe, layout=held, guidance_steps=0, moves=[0.15])  # no step is guided: it is not looked at
    assert_equal_up_to_rounding(found, expected, RUN)


@pytest.mark.parametrize(
    ("layer", "width", "message"),
    [
        (
            None,
            14,
            f"width 14, expected {WIDTH} for IP-Adapter 1: call `pipe.register_modules.image_encoder=….` with the",
        ),
        (
            ImageProjection(1024, 32),
            WIDTH,
            "expected 1024 .* for one of h94/IP-Adapter .* 'models/image_encoder'; for another one call",
        ),
        (ImageProjection(1280, 32), WIDTH, "expected 1280 .* `image_encoder_folder` 'sdxl_models/image_encoder'"),
        (
            IPAdapterPlusImageProjection(1280, 32, 16, depth=1, dim_head=8, heads=2, num_queries=3),
            WIDTH,
            "of width 16, expected 1280 .* `image_encoder_folder` 'models/image_encoder'",
        ),
        (
            IPAdapterFaceIDImageProjection(512, 32),
            WIDTH,
            "IP-Adapter 1: write a face's embeddings, or load another IP-Adapter.$",
        ),
    ],
)
def test_an_image_encoder_of_another_width_is_told_with_a_fitting_one(tokenizer, layer, width, message):
    pipe = with_encoder(make_pipeline(make_components(tokenizer, "sd1")), width)
    load_adapters(pipe, 2)
    if layer is not None:
        pipe.unet.encoder_hid_proj.image_projection_layers[1] = layer
    layout = regions(dog={"1": Image.new("RGB", (16, 16), "red")})
    with pytest.raises(ValueError, match=rf"^layout\[0\] \('dog'\): ip_adapter_image is a picture, .*{message}"):
        sample(pipe, layout=layout)
    picture = Image.new("RGB", (16, 16), "red")
    if layer is None:
        message = message.replace("IP-Adapter 1", "IP-Adapter 0")
    with pytest.raises(ValueError, match=rf"^`ip_adapter_image` is a picture, .*{message}"):
        sample(pipe, ip_adapter_image=[picture, picture])
    other = embeddings(1, shape=(WIDTH + 1,))
    with pytest.raises(ValueError, match=r"ip_adapter_image has embeddings of width 13, expected \d+ for IP-Adapter 1"):
        sample(pipe, layout=regions(dog={"1": other}))


def test_a_batch_of_layouts_gives_the_pictures_of_each_alone(pipe):
    """One region holds a picture, one prompt has no layout; two pictures each."""
    dog, ball, everywhere = embeddings(1), embeddings(2), embeddings(3)
    prompts, layouts = [PROMPT, "a ball", PROMPT], [regions(dog=dog, ball=ball), None, regions(ball=dog)]
    latents = torch.randn(6, 4, 16, 16, generator=seeded(4))
    pipe.set_ip_adapter_scale(0.4)
    arguments: dict[str, Any] = {"ip_adapter_image_embeds": [everywhere], "num_images_per_prompt": 2}
    together = sample(pipe, prompts, layout=layouts, latents=latents, **arguments)
    for number, (prompt, layout) in enumerate(zip(prompts, layouts, strict=True)):
        rows = slice(2 * number, 2 * number + 2)
        alone = sample(pipe, prompt, layout=layout, latents=latents[rows], **arguments)
        assert_equal_up_to_rounding(together[rows], alone, RUN)


def test_guide_is_the_call(pipe):
    with_encoder(pipe)
    layout = regions(dog=Image.new("RGB", (16, 16), "red"))
    expected = sample(pipe, layout=layout)
    other = plain(pipe)
    with pipe.guide(other, PROMPT, layout) as embeds:
        found = sample(other, None, **embeds)
    assert_equal_up_to_rounding(found, expected, RUN)
    with pipe.guide(other, PROMPT, layout) as embeds:  # beside a picture of the call
        assert sample(other, None, ip_adapter_image_embeds=[embeddings(3)], **embeds).isfinite().all()


def test_attention_maps_and_recorder_go_with_adapters(pipe):
    output = pipe(
        PROMPT, layout=regions(dog=embeddings(1)), num_inference_steps=2, output_attention_maps=True, generator=seeded()
    )
    assert set(output.attention_maps[0]) == {"dog", "ball"}


def test_pictures_go_on_after_the_guided_steps(pipe):
    layout = regions(dog=embeddings(1))
    one, none = (sample(pipe, layout=layout, guidance_steps=steps) for steps in (1, 0))
    assert not torch.equal(one, none)
    assert not torch.equal(none, sample(pipe, layout=regions(dog=embeddings(2)), guidance_steps=0))


# --- leaving the UNet as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_processors_weights_and_scales_are_as_found(pipe, error):
    before, scales = dict(pipe.unet.attn_processors), []
    names = set(pipe.unet.state_dict())
    expected = sample(pipe, ip_adapter_image_embeds=[embeddings(3)])

    def stop(*args: Any) -> dict[str, Any]:
        assert set(pipe.unet.state_dict()) == names  # the weights stay part of the UNet
        scales.append([p.scale for p in before.values() if hasattr(p, "scale")])
        if error is not None:
            raise error
        return args[-1]

    arguments: dict[str, Any] = {"layout": regions(dog=embeddings(1)), "callback_on_step_end": stop}
    if error is None:
        sample(pipe, **arguments)
    else:
        with pytest.raises(error):
            sample(pipe, **arguments)
    assert pipe.unet.attn_processors == before
    assert torch.equal(sample(pipe, ip_adapter_image_embeds=[embeddings(3)]), expected)


def test_a_callback_may_set_the_scale(pipe):
    def switch_off(pipe: Any, *args: Any) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.0)
        return args[-1]

    layout = regions(dog=embeddings(1))
    expected = sample(pipe, layout=layout)
    assert not torch.equal(sample(pipe, layout=layout, callback_on_step_end=switch_off), expected)
    assert all(
        processor.scale == [0.0] for processor in pipe.unet.attn_processors.values() if hasattr(processor, "scale")
    )


def test_processors_of_other_kinds_are_served(tokenizer):
    """diffusers' processor for an older torch, in two nested contexts."""
    pipe = make_pipeline(make_components(tokenizer, "sd1"))
    load_adapters(pipe)
    expected = sample(pipe, layout=regions(dog=embeddings(1)))
    for name, own in pipe.unet.attn_processors.items():
        if hasattr(own, "to_k_ip"):
            other = IPAdapterAttnProcessor(own.hidden_size, own.cross_attention_dim, own.num_tokens, own.scale)
            other.load_state_dict(own.state_dict())
            pipe.unet.get_submodule(name.removesuffix(".processor")).set_processor(other)
    other = plain(pipe)
    with pipe.guide(other, PROMPT, regions(dog=embeddings(2))):
        assert_equal_up_to_rounding(sample(pipe, layout=regions(dog=embeddings(1))), expected, RUN)
    kinds = {type(processor).__name__ for processor in pipe.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0", "IPAdapterAttnProcessor"}


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_told(tokenizer):
    pipe = make_pipeline(make_components(tokenizer, "sd1"))
    with pytest.raises(ValueError, match=r"^layout\[1\] \('ball'\): ip_adapter_image needs an IP-Adapter, .*load_ip"):
        sample(pipe, layout=regions(ball=embeddings(1)))
    load_adapters(pipe)
    with pytest.raises(ValueError, match="needs an image encoder, and none is loaded"):
        sample(pipe, layout=regions(dog=Image.new("RGB", (8, 8))))
    with pytest.raises(ValueError, match=r"shape \(2, 12\), expected \(1 or 2, 1, …\)"):
        sample(pipe, layout=regions(dog=torch.zeros(2, WIDTH)))
    for wrong, message in (
        ([masks("dog")], r"ip_adapter_masks\[0\]` is \(1, 1, 32, 32\), expected a tensor \(1, 2, height, width\)"),
        ([masks("dog")] * 2, "has 2 entries, expected one for each of the 1 IP-Adapters"),
        ([Image.new("L", (8, 8))], r"ip_adapter_masks\[0\]` is Image"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(
                pipe,
                layout=regions(dog=embeddings(1)),
                ip_adapter_image_embeds=[embeddings(3, 2)],
                cross_attention_kwargs={"ip_adapter_masks": wrong},
            )
    pipe.set_ip_adapter_scale([[0.3, 0.9]])
    with pytest.raises(ValueError, match=r"scale for each picture of the call, \[0.3, 0.9\]"):
        sample(pipe, layout=regions(dog=embeddings(1)))


def test_soft_masks_are_resampled_as_diffusers_does():
    from multisubject.region_ip_adapters import PictureCall

    soft = torch.rand(1, 2, 32, 48, generator=seeded())
    call = PictureCall([0], [soft], {4 * 6: (4, 6)})
    query = torch.zeros(2, 2, 24, 8)
    for region in (0, 1):
        expected = IPAdapterMaskProcessor.downsample(soft[:, region], 2, 24, 1)
        assert torch.equal(call.mask(0, query)[:, region], expected)
