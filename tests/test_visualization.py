import numpy as np
import pytest
from PIL import Image

from multisubject.layout import Region, parse_layout, region_names
from multisubject.visualization import (
    READABLE_WIDTH,
    attention_sheet,
    contact_sheet,
    draw_regions,
)


def region(subject, mask, occurrence=None):
    return Region(subject, mask, occurrence=occurrence)


def half(side: str, height: int = 64, width: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), np.float32)
    mask[:, : width // 2] = side == "left"
    mask[:, width // 2 :] = side == "right"
    return mask


def grey(width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def coloured(image: Image.Image) -> np.ndarray:
    """Pixels that are neither grey nor white nor black."""
    array = np.asarray(image).astype(int)
    return array.max(-1) - array.min(-1) > 60


def test_contact_sheet_keeps_reading_order_and_enlarges_tiny_pictures():
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    sheet = contact_sheet(images, columns=2)
    assert sheet.width > 2 * READABLE_WIDTH and sheet.height > 2 * READABLE_WIDTH
    step = READABLE_WIDTH
    assert sheet.getpixel((step // 2, step // 2)) == (255, 0, 0)
    assert sheet.getpixel((step + step // 2, step // 2)) == (0, 128, 0)
    assert sheet.getpixel((step // 2, step + step // 2)) == (0, 0, 255)


def test_contact_sheet_leaves_large_pictures_at_their_size():
    sheet = contact_sheet([grey(512, 384)])
    assert 512 <= sheet.width < 540 and 384 <= sheet.height < 410


def test_captions_take_room_under_each_picture_and_long_ones_are_cut():
    bare = contact_sheet([grey()] * 2, columns=2)
    captioned = contact_sheet([grey()] * 2, columns=2, captions=["seed 0", "a very long caption " * 20])
    assert captioned.height > bare.height and captioned.width == bare.width


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": []}, "at least one image"),
        ({"images": [grey()], "columns": 0}, "columns is 0"),
        ({"images": [grey()], "captions": ["a", "b"]}, "2 entries for 1 images"),
    ],
)
def test_contact_sheet_refuses_what_it_cannot_lay_out(kwargs, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**kwargs)


def test_regions_are_outlined_where_their_masks_are_and_the_picture_is_left_alone():
    picture = grey()
    drawn = draw_regions(picture, [region("person", half("left"))])
    marks = coloured(drawn)
    assert marks[:, : drawn.width // 2].any() and not marks[:, drawn.width // 2 + 1 :].any()
    assert not coloured(picture).any()


def test_a_subject_keeps_its_colour_in_other_pictures():
    alone = draw_regions(grey(), [region("guitar", half("right"))])
    together = draw_regions(grey(), [region("person", half("left")), region("guitar", half("right"))])
    corner = (alone.width - 1, alone.height - 1)
    assert alone.getpixel(corner) == together.getpixel(corner) != (128, 128, 128)


def test_every_one_of_eight_subjects_has_its_own_colour():
    spots = []
    for index in range(8):
        mask = np.zeros((64, 64), np.float32)
        mask[index * 8 : index * 8 + 8] = 1
        spots.append(region(f"subject {index}", mask))
    drawn = draw_regions(grey(), spots)
    row = drawn.height // 8
    assert len({drawn.getpixel((drawn.width - 1, row * index + row // 2)) for index in range(8)}) == 8


def test_an_empty_or_tiny_region_does_not_fail():
    tiny = np.zeros((64, 64), np.float32)
    tiny[63, 63] = 1
    nothing = region("nothing", np.zeros((64, 64), np.float32))
    plain = np.asarray(draw_regions(grey(), []))
    assert np.array_equal(draw_regions(grey(), [nothing]), plain)
    drawn = np.asarray(draw_regions(grey(), [nothing, region("speck", tiny)]))
    assert (drawn[-1, -1] != plain[-1, -1]).any() and np.array_equal(drawn[: len(drawn) // 2], plain[: len(plain) // 2])


def test_equal_subjects_are_told_apart_by_occurrence():
    spots = [region("dog", half("left"), 2), region("dog", half("right"), 1), region("mug", half("left"))]
    assert region_names(spots) == ["dog 2", "dog 1", "mug"]
    assert region_names([region("dog", half("left")), region("dog", half("right"), 1)]) == ["dog 2", "dog 1"]


def test_soft_region_is_outlined_at_half_its_peak():
    hard, soft = (draw_regions(grey(), [region("dog", half("left") * peak)]) for peak in (1, 0.4))
    assert np.array_equal(np.asarray(hard), np.asarray(soft))


def test_attention_sheet_has_a_row_per_subject_and_a_column_per_step():
    maps = {"person": np.random.default_rng(0).random((10, 16, 16)), "guitar": np.ones((10, 16, 16))}
    regions = [region("person", half("left")), region("guitar", half("right"))]
    sheet = attention_sheet(grey(), maps, regions, steps=[0, 4, 9])
    assert 3 * READABLE_WIDTH <= sheet.width < 3.2 * READABLE_WIDTH
    assert 2 * READABLE_WIDTH <= sheet.height < 2.4 * READABLE_WIDTH


def test_attention_sheet_is_hot_where_the_map_is():
    maps = {"person": half("left", 16, 16)[None]}
    sheet = np.asarray(attention_sheet(grey(), maps, steps=1)).astype(int)
    middle = sheet[READABLE_WIDTH // 2]
    assert middle[READABLE_WIDTH // 4].max() > 200 > middle[3 * READABLE_WIDTH // 4].max()


def test_attention_sheet_spreads_the_steps_when_given_a_number():
    maps = {"person": np.ones((50, 8, 8))}
    assert attention_sheet(grey(), maps, steps=6).width > 6 * READABLE_WIDTH
    assert attention_sheet(grey(), {"person": np.ones((2, 8, 8))}, steps=6).width < 3 * READABLE_WIDTH


@pytest.mark.parametrize(
    ("maps", "steps", "message"),
    [
        ({}, 4, "output_attention_maps=True"),
        ({"person": np.ones((8, 8))}, 4, r"shape \(8, 8\)"),
        ({"person": np.ones((5, 8, 8))}, [5], "recorded steps are 0 to 4"),
        ({"person": np.ones((5, 8, 8))}, 0, "at least 1"),
    ],
)
def test_attention_sheet_names_what_is_wrong(maps, steps, message):
    with pytest.raises(ValueError, match=message):
        attention_sheet(grey(), maps, steps=steps)


def test_a_layout_is_drawn_as_the_pipeline_takes_it():
    layout = {"person": (0, 0, 0.5, 1)}
    regions = parse_layout(layout, height=64, width=64)
    assert np.array_equal(np.asarray(draw_regions(grey(), layout)), np.asarray(draw_regions(grey(), regions)))
    maps = {"person": np.ones((2, 8, 8))}
    sheets = [np.asarray(attention_sheet(grey(), maps, given)) for given in (layout, regions, None)]
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])
    with pytest.raises(ValueError, match="box is"):
        draw_regions(grey(), {"person": (0, 0, 2, 1)})
    colours = Image.new("RGB", (8, 8), "white")
    colours.paste((255, 0, 0), (0, 0, 4, 8))
    drawn = draw_regions(grey(), colours, {"255,0,0": ["person", 2.5]})
    assert np.array_equal(np.asarray(drawn), np.asarray(draw_regions(grey(), layout)))


def test_other_things_than_pictures_are_named():
    with pytest.raises(TypeError, match="images is of type Image; expected a list"):
        contact_sheet(grey())
    for draw in (
        lambda: draw_regions(np.zeros((8, 8, 3)), {"person": (0, 0, 1, 1)}),
        lambda: attention_sheet(np.zeros((8, 8, 3)), {"person": np.ones((2, 8, 8))}, {"person": (0, 0, 1, 1)}),
    ):
        with pytest.raises(TypeError, match="an image is a ndarray; expected a PIL image"):
            draw()
    with pytest.raises(TypeError, match=r"attention_maps is a list.*`output.attention_maps\[0\]`"):
        attention_sheet(grey(), [{"person": np.ones((2, 8, 8))}])


def test_pictures_of_other_sizes_than_the_masks_are_fine():
    drawn = draw_regions(grey(96, 64), [region("person", half("left", 512, 768))])
    assert drawn.size == (96 * 3, 64 * 3)
    assert coloured(drawn)[:, : drawn.width // 2].any()
