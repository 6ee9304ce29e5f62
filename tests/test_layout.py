import io
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw, ImageFilter

from multisubject.layout import masks_at, parse_layout

RED, BLUE, GREEN, PURPLE, BLACK, WHITE = (
    (255, 0, 0),
    (0, 0, 255),
    (0, 255, 0),
    (128, 0, 128),
    (0, 0, 0),
    (255, 255, 255),
)
CONTEXT = {"255,0,0": ["person", 2.5], "0,0,255": ["guitar", 1.5]}
GRIDS = [(64, 64), (32, 32), (16, 16), (8, 8), (5, 9), (1, 1)]


def parse(layout, height=64, width=64, **kwargs):
    return parse_layout(layout, height=height, width=width, **kwargs)


def masks(regions):
    return np.stack([region.mask for region in regions])


def draw(size=256, background=BLACK, supersampling=1, colors=(RED, BLUE)):
    """A red rectangle and a blue disc that touch."""
    return _drawn(size, background, supersampling, colors).copy()


@cache
def _drawn(size, background, supersampling, colors):
    side = size * supersampling
    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0.1 * side, 0.1 * side, 0.5 * side, 0.7 * side), fill=colors[0])
    pen.ellipse((0.47 * side, 0.3 * side, 0.85 * side, 0.68 * side), fill=colors[1])
    return image


@cache
def covered(size=256, supersampling=4, colors=(RED, BLUE)):
    """The true share of every pixel that each drawn colour covers."""
    array = np.asarray(draw(size, supersampling=supersampling, colors=colors))
    cells = (size, supersampling, size, supersampling)
    return np.stack([(array == color).all(-1).reshape(cells).mean((1, 3)) for color in colors])


# --- Boxes


def test_box_covers_its_fraction_of_a_non_square_picture():
    (region,) = parse({"dog": (0.25, 0.5, 0.75, 1.0)}, height=8, width=16)
    expected = np.zeros((8, 16), np.float32)
    expected[4:, 4:12] = 1
    np.testing.assert_array_equal(region.mask, expected)
    assert region.mask.dtype == np.float32
    assert (region.subject, region.weight, region.occurrence) == ("dog", 2.5, None)


def test_fractional_box_edges_are_soft_and_keep_the_area():
    (region,) = parse({"dog": (0.13, 0.21, 0.58, 0.77)}, height=10, width=10)
    assert region.mask.sum() / 100 == pytest.approx(0.45 * 0.56, abs=1e-6)
    assert region.mask[2, 1] == pytest.approx(0.7 * 0.9, abs=1e-6)


@pytest.mark.parametrize(
    "box", [[0, 0, 1, 1], np.array([0, 0, 1, 1]), torch.tensor([0.0, 0, 1, 1]), (0, 0, 1, 1 + 1e-9)]
)
def test_box_may_be_any_sequence_of_four_numbers(box):
    (region,) = parse({"dog": box})
    assert region.mask.min() == 1


def test_box_smaller_than_a_pixel_keeps_one_full_pixel():
    (region,) = parse({"dog": (0.5, 0.5, 0.5 + 1e-9, 0.5 + 1e-9)})
    assert region.mask.max() == 1
    assert (region.mask > 0).sum() == 1


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.1, 0.1, 1.2, 0.5), r"box is \(0.1, 0.1, 1.2, 0.5\), expected .* fractions .* Clip it"),
        ((-0.1, 0.1, 0.2, 0.5), "fractions of the image, each from 0 to 1. Clip it"),
        ((16, 0, 32, 64), r"pixels of the 64x64 picture, pass \(0.25, 0.0, 0.5, 1.0\)"),
        ((0.5, 0.1, 0.5, 0.5), "empty or inverted: expected xmin < xmax"),
        ((0.1, 0.6, 0.5, 0.5), "empty or inverted: expected ymin < ymax"),
        ((0.1, 0.1, math.nan, 0.5), "not finite"),
        ((0.1, 0.1, math.inf, 0.5), "not finite"),
        ((0.1, 0.1, 0.5), "expected .xmin, ymin, xmax, ymax."),
        ((0.1, 0.1, 0.5, "1"), "expected .xmin, ymin, xmax, ymax."),
        ((True, 0, 1, 1), "expected .xmin, ymin, xmax, ymax."),
        ([(0, 0, 1, 1), (0, 0, 1, 1)], "one dict for each in a list layout"),
    ],
)
def test_bad_box_is_named_with_its_value_and_a_remedy(box, message):
    with pytest.raises(ValueError, match=message) as error:
        parse({"dog": box})
    assert "layout['dog']" in str(error.value)


# --- Masks


def half(dtype, value=1):
    mask = np.zeros((4, 6), dtype)
    mask[:, 3:] = value
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        half(bool),
        half(np.uint8),
        half(np.uint8, 255),
        half(np.int64, 255),
        half(np.uint16, 65535),
        half(np.float64),
        half(np.float16)[..., None],
        np.repeat(half(np.uint8, 255)[..., None], 3, axis=-1),
        torch.from_numpy(half(np.float32)).to(torch.bfloat16)[None],
        torch.from_numpy(half(bool)),
        torch.from_numpy(half(np.float32)).requires_grad_(),
        Image.fromarray(half(np.uint8, 255)),
        Image.fromarray(half(np.uint8, 255)).convert("1"),
        Image.fromarray(half(np.uint8, 255)).convert("RGB"),
        Image.fromarray(half(np.uint8, 255)).convert("P"),
        Image.fromarray(half(np.uint8, 255)).convert("RGBA"),
        Image.fromarray(np.dstack([np.full((4, 6, 3), 70, np.uint8), half(np.uint8, 255)])),
        Image.fromarray(half(np.uint16, 65535)),
    ],
    ids=lambda mask: f"{type(mask).__name__}-{mask.mode if isinstance(mask, Image.Image) else mask.dtype}",
)
def test_every_kind_of_mask_means_the_same(mask):
    (region,) = parse({"dog": mask}, height=8, width=12)
    np.testing.assert_array_equal(region.mask, half(np.float32).repeat(2, 0).repeat(2, 1))


def test_mask_file_is_read_from_its_path(tmp_path):
    Image.fromarray(half(np.uint8, 255)).save(tmp_path / "dog.png")
    (region,) = parse({"dog": tmp_path / "dog.png"}, height=4, width=6)
    np.testing.assert_array_equal(region.mask, half(np.float32))


def test_mask_file_is_seen_as_viewers_show_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # turned upside down
    Image.fromarray(half(np.uint8, 255)).save(tmp_path / "dog.png", exif=exif)
    (region,) = parse({"dog": tmp_path / "dog.png"}, height=4, width=6)
    np.testing.assert_array_equal(region.mask, half(np.float32)[::-1, ::-1])


def test_soft_mask_keeps_its_values():
    soft = np.linspace(0, 0.6, 24, dtype=np.float32).reshape(4, 6)
    (region,) = parse({"dog": soft}, height=4, width=6)
    np.testing.assert_array_equal(region.mask, soft)


def test_palette_image_with_a_transparent_colour_stands_for_its_transparency(tmp_path):
    image = Image.fromarray(half(np.uint8)).convert("P")
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.save(tmp_path / "dog.png", transparency=0)
    (region,) = parse({"dog": str(tmp_path / "dog.png")}, height=4, width=6)
    np.testing.assert_array_equal(region.mask, half(np.float32))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((4, 4)), ValueError, "mask is empty"),
        (np.full((4, 4), np.nan), ValueError, "not finite"),
        (np.full((4, 4), 1.5), ValueError, "from 1.5 to 1.5, expected .* Rescale"),
        (np.full((4, 4), -1), ValueError, "from -1 to -1"),
        (np.ones((4, 4), complex), TypeError, "dtype complex128"),
        (np.ones((2, 4, 5)), ValueError, r"shape \(2, 4, 5\), expected \(height, width\)"),
        (np.ones((0, 4)), ValueError, r"shape \(0, 4\)"),
        (draw(8), ValueError, "colour image, expected .*color_context"),
        ("missing.png", ValueError, "'missing.png' does not exist"),
        (__file__, ValueError, "not a readable image"),
        (3.0, TypeError, "float, expected a PIL image, a path or an array"),
        (None, ValueError, "exactly one of `box` and `mask`"),
        ({"box": (0, 0, 1, 1)}, TypeError, "For more settings pass a list"),
    ],
)
def test_bad_mask_is_named_with_what_was_expected(mask, error, message):
    with pytest.raises(error, match=message):
        parse({"dog": mask})


# --- Lists


def test_list_layout_carries_every_setting():
    first, second = parse(
        [
            {"phrase": " <rex> ", "box": (0, 0, 0.5, 1), "weight": 4},
            {"subject": "dog", "occurrence": 2, "mask": np.ones((4, 4), bool)},
        ]
    )
    assert (first.subject, first.weight, first.occurrence) == ("rex", 4.0, None)
    assert (second.subject, second.weight, second.occurrence) == ("dog", 2.5, 2)


def test_equal_priorities_both_keep_their_claim():
    first, second = parse({"dog": (0, 0, 0.75, 1), "cat": (0.25, 0, 1, 1)})
    assert first.mask[0, 32] == second.mask[0, 32] == 1


def test_higher_priority_takes_the_overlap():
    low, high = parse(
        [
            {"subject": "dog", "box": (0, 0, 1, 1)},
            {"subject": "cat", "box": (0.25, 0.25, 0.75, 0.75), "feather": 0.05, "priority": 1},
        ]
    )
    np.testing.assert_allclose(low.mask, 1 - high.mask, atol=1e-6)


def test_region_that_higher_priorities_cover_is_an_error():
    with pytest.raises(ValueError, match=r"'dog'.* is covered entirely by regions of higher priority: .*'cat'"):
        parse(
            [
                {"subject": "dog", "box": (0.3, 0.3, 0.4, 0.4)},
                {"subject": "cat", "box": (0, 0, 1, 1), "priority": 1},
            ]
        )


def test_feather_softens_the_edge_and_keeps_the_peak():
    hard, soft = parse(
        [
            {"subject": "dog", "box": (0, 0, 0.5, 1)},
            {"subject": "cat", "box": (0, 0, 0.5, 1), "feather": 0.05},
        ]
    )
    assert soft.mask.max() == pytest.approx(1)
    assert 0.4 < soft.mask[32, 31] < 0.6
    assert soft.mask[0, 0] == pytest.approx(1, abs=1e-3), "nothing may leak over the image's border"
    assert soft.mask.sum() == pytest.approx(hard.mask.sum(), rel=0.01)


def test_feather_keeps_a_tiny_region():
    (region,) = parse([{"subject": "dog", "box": (0.5, 0.5, 0.501, 0.501), "feather": 0.1}])
    assert region.mask.max() == pytest.approx(1)


def test_parts_of_one_subject_are_joined():
    first, second = parse(
        [
            {"subject": "dog", "box": (0, 0, 0.25, 1)},
            {"subject": "cat", "box": (0.25, 0, 0.5, 1)},
            {"subject": "Dog", "box": (0.5, 0, 1, 1)},
        ]
    )
    assert first.subject == "dog"
    np.testing.assert_array_equal(first.mask, 1 - second.mask)


def test_parts_of_one_subject_with_different_weights_are_an_error():
    entries = [{"subject": "dog", "box": (0, 0, 0.5, 1), "weight": weight} for weight in (1, 2)]
    with pytest.raises(ValueError, match="'dog' has regions of different weights, 1 and 2"):
        parse(entries)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"subject": "dog"}, ValueError, "exactly one of `box` and `mask`"),
        ({"box": (0, 0, 1, 1)}, ValueError, "exactly one of `subject` and `phrase`"),
        ({"subject": "dog", "phrase": "dog", "box": (0, 0, 1, 1)}, ValueError, "exactly one of `subject` and `phrase`"),
        ({"subject": "  ", "box": (0, 0, 1, 1)}, ValueError, "subject is '  '"),
        ({"subject": 3, "box": (0, 0, 1, 1)}, TypeError, "subject is 3"),
        ({"subject": "dog", "bbox": (0, 0, 1, 1)}, ValueError, "key 'bbox'; did you mean 'box'\\?"),
        ({"subject": "dog", "where": (0, 0, 1, 1)}, ValueError, "unknown key 'where'; expected one of subject, "),
        ({"subject": "dog", "box": (0, 0, 1, 1), "weight": math.nan}, ValueError, "weight is nan"),
        ({"subject": "dog", "box": (0, 0, 1, 1), "weight": -1}, ValueError, "weight is -1, expected .* at least 0"),
        ({"subject": "dog", "box": (0, 0, 1, 1), "priority": "high"}, ValueError, "priority is 'high'"),
        ({"subject": "dog", "box": (0, 0, 1, 1), "feather": 0.9}, ValueError, "feather is 0.9, .* from 0 to 0.5"),
        ({"subject": "dog", "box": (0, 0, 1, 1), "occurrence": 0}, ValueError, "occurrence is 0, expected 1"),
        ({"subject": "dog", "box": (0, 0, 1, 1), "occurrence": True}, ValueError, "occurrence is True"),
        ("dog", TypeError, "of type str, expected a dict"),
    ],
)
def test_bad_list_entry_is_named_with_its_place(entry, error, message):
    with pytest.raises(error, match=message) as caught:
        parse([{"subject": "cat", "box": (0, 0, 1, 1)}, entry])
    assert "layout[1]" in str(caught.value)


def test_what_no_region_covers_is_there_once():
    background = {"subject": "background", "prompt": "a beach"}
    with pytest.raises(ValueError, match=r"layout\[0\] \('background'\) and layout\[2\] .* expected one of them"):
        parse([background, {"subject": "cat", "box": (0, 0, 1, 0.5)}, {**background, "prompt": "palms"}])


@pytest.mark.parametrize("layout", [None, {}, []])
def test_no_layout_means_no_regions(layout):
    assert parse(layout) == ()


def test_layout_of_another_type_is_an_error():
    with pytest.raises(TypeError, match="layout is of type int, expected a dict of boxes or masks"):
        parse(3)


@pytest.mark.parametrize("size", [0, -8, 64.0, True])
def test_bad_picture_size_is_an_error(size):
    with pytest.raises(ValueError, match=r"height is .*, expected a positive whole number of pixels"):
        parse({}, height=size)


# --- Colour maps


def test_colour_map_gives_subjects_weights_and_regions_in_order():
    person, guitar = parse(draw(64), color_context=CONTEXT)
    assert (person.subject, person.weight, guitar.subject, guitar.weight) == ("person", 2.5, "guitar", 1.5)
    array = np.asarray(draw(64))
    np.testing.assert_array_equal(person.mask, (array == RED).all(-1))
    np.testing.assert_array_equal(guitar.mask, (array == BLUE).all(-1))


@pytest.mark.parametrize("background", [BLACK, WHITE, (128, 128, 128), (250, 247, 252)])
@pytest.mark.parametrize("resample", [Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_antialiased_edges_are_shared_in_proportion(background, resample):
    image = draw(256, background, supersampling=4).resize((256, 256), resample)
    found = masks(parse(image, 256, 256, color_context=CONTEXT))
    assert np.abs(found - covered()).mean() < 1e-3
    assert found.sum((1, 2)) == pytest.approx(covered().sum((1, 2)), rel=5e-3)
    assert found.sum(0).max() <= 1 + 1e-6


@pytest.mark.parametrize("quality", [95, 75, 30])
def test_jpeg_noise_is_tolerated(quality):
    buffer = io.BytesIO()
    draw(256, supersampling=4).resize((256, 256), Image.Resampling.BOX).save(buffer, "JPEG", quality=quality)
    found = parse(Image.open(buffer), 256, 256, color_context=CONTEXT)
    at_16 = masks_at(torch.from_numpy(masks(found)), (16, 16)).numpy()
    expected = masks_at(torch.from_numpy(covered()), (16, 16)).numpy()
    assert np.abs(at_16 - expected).max() < 0.05


@pytest.mark.parametrize(("small", "size"), [(32, (256, 256)), (1024, (64, 96)), (100, (96, 64))])
def test_map_of_another_size_is_stretched_without_loss(small, size):
    found = parse(draw(small), *size, color_context=CONTEXT)
    own = parse(draw(small), small, small, color_context=CONTEXT)
    assert masks(found).mean((1, 2)) == pytest.approx(masks(own).mean((1, 2)), rel=1e-3)


def test_enlarged_and_blurred_map_keeps_its_areas():
    image = (
        draw(64, supersampling=4).resize((64, 64), Image.Resampling.BOX).resize((256, 256), Image.Resampling.BICUBIC)
    )
    found = masks(parse(image.filter(ImageFilter.GaussianBlur(3)), 256, 256, color_context=CONTEXT))
    assert found.mean((1, 2)) == pytest.approx(covered().mean((1, 2)), rel=0.02)


def test_edge_between_two_colours_is_not_taken_for_the_colour_between_them():
    # Purple is drawn far from the edge where red and blue blend into the very same purple.
    image = draw(256, supersampling=4)
    ImageDraw.Draw(image).rectangle((40, 900, 200, 1000), fill=PURPLE)
    image = image.resize((256, 256), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(2))
    *_, mug = parse(image, 256, 256, color_context={**CONTEXT, "128,0,128": "mug"})
    assert mug.mask[100:150].sum() < 1
    assert mug.mask[:200].sum() < 20, "more than the few pixels where three colours meet"
    assert mug.mask.sum() == pytest.approx(40 * 25, rel=0.1)


def test_single_pixel_of_a_colour_map_survives_at_every_resolution():
    image = draw(256)
    image.putpixel((250, 3), GREEN)
    regions = parse(image, 512, 512, color_context={**CONTEXT, "0,255,0": "hat"})
    assert [region.subject for region in regions] == ["person", "guitar", "hat"]
    for grid in GRIDS:
        assert masks_at(torch.from_numpy(masks(regions)), grid)[2].max() == 1


@pytest.mark.parametrize("key", ["255,0,0", " 255, 0, 0 ", (255, 0, 0), "#ff0000"])
@pytest.mark.parametrize("value", ["person", ["person"], ("person", 2.5), {"subject": "<person>", "weight": 2.5}])
def test_colour_context_may_be_written_in_several_ways(key, value):
    (region,) = parse(draw(64, colors=(RED, RED)), color_context={key: value})
    assert (region.subject, region.weight) == ("person", 2.5)


def test_colour_context_dict_tells_two_equal_phrases_apart():
    context = {"255,0,0": {"subject": "dog", "occurrence": 1}, "0,0,255": {"subject": "dog", "occurrence": 2}}
    assert [region.occurrence for region in parse(draw(64), color_context=context)] == [1, 2]


def test_two_colours_of_one_subject_are_joined_without_a_seam():
    image = draw(256, supersampling=4).resize((256, 256), Image.Resampling.BOX)
    (region,) = parse(image, 256, 256, color_context={"255,0,0": "person", "0,0,255": "person"})
    assert np.abs(region.mask - covered().sum(0)).max() < 0.3
    assert region.mask[120, 115:135].min() > 0.99


@pytest.mark.parametrize("form", ["array", "float array", "tensor", "palette", "path", "transparent"])
def test_colour_map_may_be_any_kind_of_image(form, tmp_path):
    image = draw(64)
    array = np.asarray(image)
    image.save(tmp_path / "map.png")
    alpha = np.where(array.any(-1), 255, 0).astype(np.uint8)
    layout = {
        "array": array,
        "float array": array / 255,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "palette": image.convert("P"),
        "path": str(tmp_path / "map.png"),
        "transparent": np.dstack([array + np.expand_dims(255 - alpha, 2) // 3, alpha]),
    }[form]
    np.testing.assert_array_equal(
        masks(parse(layout, color_context=CONTEXT)), masks(parse(image, color_context=CONTEXT))
    )


def test_coloured_background_must_be_declared():
    image = draw(64, background=GREEN)
    with pytest.raises(ValueError, match=r"has the colour '0,255,0' \(58\.42% of it\), which is not listed.*null"):
        parse(image, color_context=CONTEXT)
    found = parse(image, color_context={**CONTEXT, "0,255,0": None})
    np.testing.assert_array_equal(masks(found), masks(parse(draw(64), color_context=CONTEXT)))


def test_map_without_background_is_shared_among_its_colours():
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (32, 0, 64, 64))
    np.testing.assert_array_equal(masks(parse(image, color_context=CONTEXT)).sum(0), 1)


def test_unlisted_colour_on_the_way_between_two_listed_ones_is_named():
    image = draw(256)
    ImageDraw.Draw(image).rectangle((10, 210, 60, 250), fill=(128, 0, 0))
    with pytest.raises(ValueError, match="has the colour '128,0,0'"):
        parse(image, color_context=CONTEXT)


def test_photograph_is_no_colour_map():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="which is not listed"):
        parse(noise, color_context=CONTEXT)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"255,0,0": ["person", 2.5]}, r"has the colour '0,0,255'"),
        ({**CONTEXT, "0,255,0": ["hat", 2.5]}, r"color_context\['0,255,0'\] is not in the colour map"),
        ({}, "layout is an image without a color_context"),
        (None, "layout is an image without a color_context"),
        ({"255,0": ["person", 2.5]}, r"\['255,0'\]: expected a colour such as '255,0,0'"),
        ({"256,0,0": ["person", 2.5]}, "three whole numbers from 0 to 255"),
        ({"reddish": ["person", 2.5]}, "expected a colour such as"),
        ({**CONTEXT, "#f00": "hat"}, r"is the same colour as color_context\['255,0,0'\]"),
        ({"255,0,0": ["person", 2.5, 1]}, r"expected \[subject, weight\]"),
        ({"255,0,0": 2.5}, r"expected \[subject, weight\]"),
        ({**CONTEXT, "255,0,0": ["person", "2.5"]}, r"color_context\['255,0,0'\].*weight is '2.5'"),
        ({"255,0,0": {"subject": "person", "box": 1}}, "unknown key 'box'"),
    ],
)
def test_disagreement_of_map_and_context_is_named(context, message):
    with pytest.raises(ValueError, match=message):
        parse(draw(64), color_context=context)


def test_color_context_without_a_colour_map_is_an_error():
    with pytest.raises(ValueError, match="color_context came with a layout of type dict"):
        parse({"dog": (0, 0, 1, 1)}, color_context=CONTEXT)


@pytest.mark.parametrize("image", [np.ones((4, 4, 5)), np.ones(4), np.full((4, 4, 3), np.nan), np.full((4, 4, 3), -1)])
def test_array_that_is_no_image_is_an_error(image):
    with pytest.raises(ValueError, match=r"^layout has (shape|values)"):
        parse(image, color_context=CONTEXT)


# --- Resolutions


def test_resolutions_are_area_averages():
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(3, 24, 36, generator=generator)
    expected = torch.nn.functional.avg_pool2d(fine, 4)
    found = masks_at(fine, (6, 9))
    cells = expected.flatten(1).argmax(1)
    expected.flatten(1)[torch.arange(3), cells] = fine.flatten(1).amax(1)
    torch.testing.assert_close(found, expected)


def test_grid_that_does_not_divide_the_picture_keeps_the_area():
    fine = torch.zeros(1, 50, 70)
    fine[:, 10:45, 5:60] = 1
    assert masks_at(fine, (7, 9)).mean() == pytest.approx(fine.mean().item(), rel=1e-5)


def test_no_regions_have_no_maps():
    assert masks_at(torch.zeros(0, 8, 8), (4, 2)).shape == (0, 4, 2)


# --- Whatever the layout: a clear error, or finite masks that keep every region


numbers = st.one_of(
    st.floats(0, 1), st.floats(-0.5, 1.5), st.sampled_from([0.0, 1.0, 0.5, math.nan, math.inf, 1e-12, 64.0, -1e-9])
)
good_boxes = st.builds(
    lambda x, y, w, h: (x, y, x + max((1 - x) * w, 1e-6), y + max((1 - y) * h, 1e-6)),
    *[st.floats(0, 0.999)] * 2,
    *[st.floats(0, 1)] * 2,
)
arrays = hnp.arrays(
    st.sampled_from([np.bool_, np.uint8, np.float32, np.float64]),
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
)
single_pixels = st.tuples(st.integers(1, 90), st.integers(1, 90), st.integers(0), st.integers(0)).map(
    lambda p: np.arange(p[0] * p[1]).reshape(p[0], p[1]) == (p[2] * p[1] + p[3]) % (p[0] * p[1])
)
entries = st.fixed_dictionaries(
    {"subject": st.sampled_from(["dog", "cat", "red ball", "<rex>"])},
    optional={
        "box": st.one_of(good_boxes, good_boxes, st.tuples(*[numbers] * 4)),
        "mask": st.one_of(arrays, single_pixels),
        "priority": st.sampled_from([0, 1, 2.5, -3]),
        "feather": st.one_of(st.just(0.0), st.floats(0, 0.5)),
        "occurrence": st.integers(1, 8),
    },
)
good_entries = st.fixed_dictionaries(
    {"box": good_boxes, "occurrence": st.integers(1, 8)}, optional={"feather": st.floats(0, 0.5)}
).map(lambda entry: {"subject": "dog", **entry})


def check_regions(regions, height, width):
    stack = torch.from_numpy(masks(regions)).float()
    assert stack.shape == (len(regions), height, width)
    for grid in [(height, width), *GRIDS]:
        at_grid = masks_at(stack, grid)
        assert at_grid.isfinite().all() and at_grid.min() >= 0 and at_grid.max() <= 1
        peaks, expected = at_grid.flatten(1).amax(1), stack.flatten(1).amax(1)
        assert (peaks >= expected - 1e-6).all() and (expected >= 1 / 255 - 1e-6).all(), "a region vanished"


@settings(deadline=None, max_examples=80)
@given(st.lists(entries, min_size=1, max_size=8), st.integers(1, 48), st.integers(1, 48))
def test_any_list_layout_is_a_clear_error_or_keeps_every_region(layout, height, width):
    try:
        regions = parse(layout, height, width)
    except ValueError as error:
        assert len(str(error)) > 30
        return
    check_regions(regions, height, width)


@settings(deadline=None, max_examples=40)
@given(st.lists(good_entries, min_size=1, max_size=8), st.integers(1, 48), st.integers(1, 48))
def test_every_sound_layout_is_accepted(layout, height, width):
    regions = parse(layout, height, width)
    assert {region.occurrence for region in regions} == {entry["occurrence"] for entry in layout}
    check_regions(regions, height, width)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([RED, BLUE, GREEN, PURPLE, WHITE]), min_size=1, max_size=5, unique=True),
    st.data(),
    st.sampled_from([8, 33, 64]),
)
def test_any_drawn_rectangles_come_back(colors, data, size):
    image = Image.new("RGB", (size, size), BLACK)
    for color in colors:
        x, y = data.draw(st.tuples(*[st.integers(0, size - 3)] * 2))
        w, h = data.draw(st.tuples(*[st.integers(2, size)] * 2))
        ImageDraw.Draw(image).rectangle((x, y, x + w, y + h), fill=color)
    array = np.asarray(image)
    context = {color: [f"subject {index}", 2.5] for index, color in enumerate(colors)}
    truth = [(array == color).all(-1) for color in colors]
    try:
        found = masks(parse(image, size, size, color_context=context))
    except ValueError as error:
        # A later rectangle may cover an earlier one, or leave so little of it that it looks like an edge.
        assert "is not in the colour map" in str(error)
        assert min(mask.sum() for mask in truth) <= 2 * size
        return
    wrong = np.abs(found - np.stack(truth)).sum((1, 2))
    assert (wrong <= 2 * size).all()
    check_regions(parse(image, size, size, color_context=context), size, size)
