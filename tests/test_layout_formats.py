import json

import pytest

from multisubject import cli
from multisubject.layout import parse_layout
from multisubject.layout_formats import LAYOUT_FORMATS, layout_from

IDEOGRAM = {
    "high_level_description": "A dog beside a ball.",
    "compositional_deconstruction": {
        "background": "a beach",
        "elements": [
            {"type": "obj", "bbox": [200, 50, 900, 450], "desc": "a red dog"},
            {"type": "obj", "desc": "sand everywhere"},
            {"type": "text", "bbox": [0, 600, 100, 1000], "text": "HELLO", "desc": "white letters"},
        ],
    },
}
OMOST = [
    {"location": "in the center", "offset": "no offset", "area": "a large square area", "description": "a table",
     "distance_to_viewer": 5.0, "tags": "wood"},
    {"location": "on the bottom-left", "offset": "slightly to the upper-right", "area": "a small vertical area",
     "description": "A cat.", "distance_to_viewer": 1.5},
    {"rect": [0, 45, 60, 90], "prefixes": ["A room.", "a lamp."]},
]  # fmt: skip
COCO = {
    "images": [
        {"id": 7, "file_name": "a/beach.jpg", "width": 640, "height": 480},
        {"id": 8, "width": 10, "height": 10},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"image_id": 7, "category_id": 18, "bbox": [64, 48, 320, 240]},
        {"image_id": 7, "category_id": 1, "bbox": [600, 0, 80, 480]},
        {"image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]},
    ],
}


def test_ideogram_boxes_come_with_y_before_x():
    assert layout_from(IDEOGRAM, "ideogram") == [
        {"prompt": "a red dog", "box": (0.05, 0.2, 0.45, 0.9)},
        {"prompt": "white letters", "box": (0.6, 0.0, 1.0, 0.1)},
        {"subject": "background", "prompt": "a beach"},
    ]
    inner = IDEOGRAM["compositional_deconstruction"]
    assert layout_from(inner, "ideogram") == layout_from(IDEOGRAM, "ideogram")
    assert layout_from(inner["elements"], "ideogram") == layout_from(IDEOGRAM, "ideogram")[:2]


def test_omost_words_are_places_in_its_grid_and_the_nearer_one_is_in_front():
    table, cat, lamp = layout_from(OMOST, "omost")
    assert table == {
        "prompt": "a table",
        "box": pytest.approx((10 / 90, 10 / 90, 80 / 90, 80 / 90), abs=1e-5),
        "priority": 0,
    }
    # centre (15 + 10, 75 - 10), 40 wide and 60 high, cut at the lower edge
    assert cat == {"prompt": "A cat", "box": pytest.approx((5 / 90, 35 / 90, 45 / 90, 1.0), abs=1e-5), "priority": 1}
    assert lamp == {"prompt": "a lamp", "box": pytest.approx((60 / 90, 0.0, 1.0, 0.5), abs=1e-5), "priority": 2}


def test_coco_boxes_are_clipped_pixels_of_one_image():
    boxes = [{"prompt": "dog", "box": (0.1, 0.1, 0.6, 0.6)}, {"prompt": "person", "box": (0.9375, 0.0, 1.0, 1.0)}]
    for image in (7, "7", "a/beach.jpg", "beach.jpg"):
        assert layout_from(COCO, "coco", image=image) == boxes
    assert layout_from({**COCO, "images": COCO["images"][:1]}, "coco") == boxes


@pytest.mark.parametrize(
    ("data", "format"), [(IDEOGRAM, "ideogram"), (OMOST, "omost"), ({**COCO, "images": COCO["images"][:1]}, "coco")]
)
def test_every_format_gives_a_layout_that_is_one(data, format):
    layout = json.loads(json.dumps(layout_from(data, format)))
    assert [region.prompt for region in parse_layout(layout, height=64, width=64)] == [
        entry["prompt"] for entry in layout
    ]


def _with(data, **changes):
    return [{**data[0], **changes}]


@pytest.mark.parametrize(
    ("data", "format", "image", "message"),
    [
        ([], "yolo", None, "`format` is 'yolo', expected one of ideogram, omost, coco"),
        (IDEOGRAM, "ideogram", 7, "`image` is 7, which chooses one of COCO's images"),
        ({"elements": []}, "ideogram", None, "has no region with a box in the format 'ideogram'"),
        ({"prompt": "x"}, "ideogram", None, "`data` has no 'elements', only 'prompt'"),
        ("text", "ideogram", None, "of type str, expected a list"),
        ([{"bbox": [0, 0, 1], "desc": "x"}], "ideogram", None, r"\['bbox'\] is \[0, 0, 1\], expected \[ymin, xmin"),
        ([{"bbox": [0, 0, "1", 1], "desc": "x"}], "ideogram", None, r"\['bbox'\]\[2\] is '1', expected a finite"),
        ([{"bbox": [0, 0, 9, 9]}], "ideogram", None, r"`data`\[0\] has no 'desc'"),
        ([{"bbox": [500, 0, 100, 9], "desc": "x"}], "ideogram", None, "500 to 100 down in a picture of 1000 x 1000"),
        (_with(OMOST, location="somewhere"), "omost", None, r"\['location'\] is 'somewhere', expected 'in the center'"),
        (_with(OMOST, offset="slightly to the north"), "omost", None, r"\['offset'\] is 'slightly to the north'"),
        (_with(OMOST, area="a vast area"), "omost", None, r"\['area'\] is 'a vast area', expected such as"),
        (_with(OMOST, description=" "), "omost", None, r"\['description'\] is ' ', expected text"),
        (_with(OMOST, distance_to_viewer=-1), "omost", None, r"distance_to_viewer'\] is -1, expected a finite number"),
        (COCO, "coco", None, "`image` is None, which 2 of the 2 images are"),
        (COCO, "coco", "b.jpg", "`image` is 'b.jpg', which 0 of the 2 images are"),
        ({**COCO, "categories": []}, "coco", 7, r"annotations\[0\]: category_id is 18, expected one of `categories`"),
        ({"images": []}, "coco", None, "`data` has no 'annotations', only 'images'"),
    ],
)  # fmt: skip
def test_what_is_of_no_format_is_named_with_its_place(data, format, image, message):
    with pytest.raises(ValueError, match=message):
        layout_from(data, format, image=image)


def test_the_command_prints_a_layout(tmp_path, capsys):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(COCO))
    assert cli.main(["layout", str(path), "--from", "coco", "--image", "beach.jpg"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"prompt": "dog", "box": [0.1, 0.1, 0.6, 0.6]}
    assert cli.main(["layout", str(path), "--from", "ideogram"]) == 1
    assert capsys.readouterr().err.startswith(f"multisubject layout: {path}: `data` has no 'elements'")
    assert cli.main(["layout", str(path), "--from", "yolo"]) == 1
    assert f"expected one of {', '.join(LAYOUT_FORMATS)}" in capsys.readouterr().err
    path.write_text("{")
    assert cli.main(["layout", str(path), "--from", "coco"]) == 1
    assert f"{path}:1: this is not JSON" in capsys.readouterr().err
