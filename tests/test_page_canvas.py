"""The canvas of the page in a real browser, alone: a bare Gradio app holds it, and no model is loaded.

Needs Debian's `chromium` and the packages of the extra `page`; without them the tests are skipped.
"""

from __future__ import annotations

import base64
import io
import socket
import time

import pytest
from browser import drag, needs_chromium, visited
from PIL import Image, ImageDraw

from multisubject.visualization import _colours

gr = pytest.importorskip("gradio", reason="the extra `page` is not installed")
pytestmark = [needs_chromium, pytest.mark.slow]

SUBJECTS = [
    {"name": name, "class_phrase": phrase, "thumbnail": None}
    for name, phrase in (("petrucci", "person"), ("majesty", "guitar"), ("biscuit", "dog"))
]
DOCUMENT = {
    "size": [128, 128],
    "prompt": "a photo of <petrucci> and <majesty> on the beach",
    "negative_prompt": "",
    "regions": [],
    "underlay": None,
}
OFFERS = {
    "sizes": [{"size": [128, 128], "label": "1:1"}, {"size": [192, 128], "label": "3:2"}],
    "subjects": SUBJECTS,
    "loras": ["hat"],
    "adapters": ["plus"],
}


class Server:
    """The bare app: it keeps what the canvas sent, and answers with problems that a test set."""

    def __init__(self):
        from multisubject.page.canvas import canvas

        self.sent: list[dict] = []
        self.problems: list[dict] = []
        self.loaded: dict | None = None
        with gr.Blocks() as blocks:
            component = canvas(DOCUMENT, OFFERS)
            load = gr.Button("load", elem_id="load")
            component.change(self._review, component, component, show_progress="hidden", trigger_mode="always_last")
            load.click(lambda: self.loaded, None, component, show_progress="hidden")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        blocks.launch(
            server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True
        )
        self.blocks, self.url = blocks, f"http://127.0.0.1:{port}"

    def _review(self, document):
        from multisubject.page.canvas import noting

        self.sent.append(document)
        return noting(self.problems)

    def document(self, wanted, seconds=10.0):
        """The newest document, once `wanted(document)` holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.sent and wanted(self.sent[-1]):
                return self.sent[-1]
            time.sleep(0.05)
        raise AssertionError(f"the canvas sent {self.sent[-1]['regions'] if self.sent else None}")


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.blocks.close()


@pytest.fixture
def page(server, browser, request):
    server.sent.clear()
    server.problems, server.loaded = [], None
    with visited(browser, server.url, **getattr(request, "param", {})) as made:
        yield made


def boxes(document):
    return [region["shape"].get("box") for region in document["regions"]]


def near(values):
    return pytest.approx(values, abs=0.012)


def test_boxes_are_drawn_moved_resized_and_undone(page, server):
    page.uncheck(".snap")
    drag(page, (0.1, 0.2), (0.4, 0.8))  # without picking: the prompt's first subject
    drawn = server.document(lambda d: len(d["regions"]) == 1)
    assert drawn["regions"][0]["subject"] == "petrucci" and boxes(drawn) == [near([0.1, 0.2, 0.4, 0.8])]
    page.click(".chip[data-subject=biscuit]")
    drag(page, (0.2, 0.3), (0.9, 0.9))  # over the first one: a picked subject is always drawn
    drawn = server.document(lambda d: len(d["regions"]) == 2)
    assert [region["subject"] for region in drawn["regions"]] == ["petrucci", "biscuit"]
    drag(page, (0.6, 0.6), (0.5, 0.5))
    moved = server.document(lambda d: boxes(d)[-1] == near([0.1, 0.2, 0.8, 0.8]))
    assert boxes(moved)[0] == near([0.1, 0.2, 0.4, 0.8])
    drag(page, (0.8, 0.8), (0.7, 0.9))  # its lower right grip
    server.document(lambda d: boxes(d)[-1] == near([0.1, 0.2, 0.7, 0.9]))
    drag(page, (0.4, 0.2), (0.4, 0.3))  # its upper edge
    server.document(lambda d: boxes(d)[-1] == near([0.1, 0.3, 0.7, 0.9]))
    for _ in range(3):
        page.click("[data-do=undo]")
    server.document(lambda d: boxes(d)[-1] == near([0.2, 0.3, 0.9, 0.9]))
    page.click("[data-do=undo]")
    server.document(lambda d: len(d["regions"]) == 1)
    for _ in range(4):
        page.click("[data-do=redo]")
    server.document(lambda d: len(d["regions"]) == 2 and boxes(d)[-1] == near([0.1, 0.3, 0.7, 0.9]))
    assert page.locator("[data-do=redo]").is_disabled()


def test_a_press_without_a_drag_makes_no_region(page, server):
    drag(page, (0.5, 0.5), (0.501, 0.501))
    page.wait_for_timeout(300)
    assert page.locator(".layer").count() == 0 and page.locator("[data-do=undo]").is_disabled()


def test_keys_do_everything(page, server):
    chip = page.locator(".chip[data-subject=majesty]")
    chip.focus()
    page.keyboard.press("Enter")
    server.document(lambda d: [r["subject"] for r in d["regions"]] == ["majesty"])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    server.document(lambda d: boxes(d) == [near([0.31, 0.31, 0.71, 0.71])])
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Control+ArrowUp")
    server.document(lambda d: boxes(d) == [near([0.31, 0.26, 0.70, 0.66])])
    page.keyboard.press("Control+d")
    server.document(lambda d: len(d["regions"]) == 2)
    first = server.sent[-1]["regions"][0]["id"]
    page.keyboard.press("[")
    server.document(lambda d: d["regions"][1]["id"] == first)
    page.keyboard.press("Delete")
    server.document(lambda d: [r["id"] for r in d["regions"]] == [first])
    page.keyboard.press("Control+z")
    server.document(lambda d: len(d["regions"]) == 2)
    page.keyboard.press("Control+Shift+z")
    server.document(lambda d: len(d["regions"]) == 1)


def test_edges_catch_on_others(page, server):
    drag(page, (0.1, 0.1), (0.4, 0.6))
    server.document(lambda d: len(d["regions"]) == 1)
    page.click(".chip[data-subject=majesty]")
    drag(page, (0.45, 0.3), (0.9, 0.605))
    drawn = server.document(lambda d: len(d["regions"]) == 2)
    assert boxes(drawn)[1][3] == boxes(drawn)[0][3]


def test_ellipse_brush_and_eraser(page, server):
    page.click("[data-tool=ellipse]")
    drag(page, (0.1, 0.1), (0.5, 0.5))
    drawn = server.document(lambda d: len(d["regions"]) == 1)
    assert drawn["regions"][0]["shape"]["ellipse"] == near([0.1, 0.1, 0.5, 0.5])
    page.click(".chip[data-subject=biscuit]")
    page.click("[data-tool=brush]")
    drag(page, (0.6, 0.7), (0.9, 0.7))
    drag(page, (0.6, 0.8), (0.9, 0.8))
    drawn = server.document(lambda d: len(d["regions"]) == 2 and len(d["regions"][1]["shape"].get("strokes", [])) == 2)
    assert drawn["regions"][1]["subject"] == "biscuit"
    page.click("[data-tool=eraser]")
    drag(page, (0.75, 0.6), (0.75, 0.9))
    drawn = server.document(lambda d: len(d["regions"][1]["shape"]["strokes"]) == 3)
    assert [stroke["erase"] for stroke in drawn["regions"][1]["shape"]["strokes"]] == [False, False, True]
    page.click("[data-tool=box]")
    drag(page, (0.65, 0.7), (0.65, 0.6))  # a painted region moves as a whole
    drawn = server.document(lambda d: d["regions"][1]["shape"]["strokes"][0]["points"][0] == near([0.6, 0.6]))
    drag(page, (0.95, 0.75), (0.8, 0.65))  # and its grips resize it, with what was rubbed out
    drawn = server.document(lambda d: d["regions"][1]["shape"]["strokes"][0]["points"][-1][0] < 0.8)
    assert drawn["regions"][1]["shape"]["strokes"][0]["points"][0] == near([0.581, 0.575])
    page.click("[data-tool=eraser]")
    drag(page, (0.25, 0.3), (0.35, 0.3))  # the chosen region is still the painted one: the ellipse stays
    drawn = server.document(lambda d: len(d["regions"][1]["shape"]["strokes"]) == 4)
    assert "ellipse" in drawn["regions"][0]["shape"]


def mask_of(url):
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L")


def upload(page, kind, picture, form="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, form)
    with page.expect_file_chooser() as chooser:
        page.click(f"[data-file={kind}]")
    chooser.value.set_files({"name": "../x.png", "mimeType": f"image/{form.lower()}", "buffer": buffer.getvalue()})


def test_a_box_that_is_rubbed_out_becomes_a_mask(page, server):
    drag(page, (0.2, 0.2), (0.8, 0.8))
    server.document(lambda d: len(d["regions"]) == 1)
    page.click("[data-tool=eraser]")
    drag(page, (0.3, 0.5), (0.7, 0.5))
    drawn = server.document(lambda d: "mask" in d["regions"][0]["shape"])
    mask = mask_of(drawn["regions"][0]["shape"]["mask"])
    at = [mask.getpixel((int(x * mask.width), int(y * mask.height))) for x, y in ((0.5, 0.5), (0.3, 0.3), (0.1, 0.1))]
    assert at == [0, 255, 0]
    page.click("[data-tool=box]")
    drag(page, (0.4, 0.3), (0.3, 0.2))
    drawn = server.document(lambda d: mask_of(d["regions"][0]["shape"]["mask"]).getpixel((mask.width // 8, 90)) == 255)
    assert mask_of(drawn["regions"][0]["shape"]["mask"]).getpixel((int(0.4 * mask.width), int(0.4 * mask.height))) == 0


def test_masks_and_colour_maps_are_uploaded(page, server):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    upload(page, "mask", mask)
    drawn = server.document(lambda d: len(d["regions"]) == 1)
    shape = mask_of(drawn["regions"][0]["shape"]["mask"])
    assert drawn["regions"][0]["subject"] == "petrucci" and (shape.getpixel((10, 30)), shape.getpixel((50, 30))) == (
        0,
        255,
    )
    page.click("[data-do=clear]")
    colours = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(colours)
    draw.rectangle((0, 0, 20, 63), fill="red")
    draw.rectangle((40, 0, 63, 63), fill="blue")
    for form in ("PNG", "JPEG"):  # blended edges and noise are no regions
        upload(page, "map", colours, form)
        drawn = server.document(lambda d: len(d["regions"]) == 2)
        masks = [mask_of(region["shape"]["mask"]) for region in drawn["regions"]]
        assert sorted(mask.getpixel((10, 30)) for mask in masks) == [0, 255]
        assert sum(sum(mask.point(bool).getdata()) for mask in masks) == pytest.approx((21 + 24) * 64, rel=0.03)
        page.click("[data-do=clear]")
        server.document(lambda d: not d["regions"])


def test_what_is_no_picture_is_told(page, server):
    with page.expect_file_chooser() as chooser:
        page.click("[data-file=underlay]")
    chooser.value.set_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.get_by_text("That file is no picture").wait_for()


def test_the_list_is_one_with_the_canvas(page, server):
    page.click("[data-start='two columns']")
    drawn = server.document(lambda d: len(d["regions"]) == 2)
    assert [region["subject"] for region in drawn["regions"]] == ["petrucci", "majesty"]
    assert page.locator(".region select").first.input_value() == "majesty"  # the front one first
    page.locator(".region").nth(1).locator(".grab").click()
    assert page.locator(".layer.chosen").get_attribute("data-id") == drawn["regions"][0]["id"]
    drag(page, (0.75, 0.5), (0.75, 0.55))
    assert page.locator(".region.chosen").get_attribute("data-id") == drawn["regions"][1]["id"]
    first = page.locator(".region").last
    first.get_by_label("Bring forward").click()
    server.document(lambda d: [region["subject"] for region in d["regions"]] == ["majesty", "petrucci"])
    grabs = [page.locator(".grab").nth(index).bounding_box() for index in (0, 1)]
    page.mouse.move(grabs[0]["x"] + 9, grabs[0]["y"] + 9)
    page.mouse.down()
    page.mouse.move(grabs[1]["x"] + 9, grabs[1]["y"] + 60, steps=5)  # below the other one
    page.mouse.up()
    server.document(lambda d: [region["subject"] for region in d["regions"]] == ["petrucci", "majesty"])
    page.keyboard.press("ArrowUp")  # the handle that was dragged has the focus
    server.document(lambda d: [region["subject"] for region in d["regions"]] == ["majesty", "petrucci"])
    front = page.locator(".region").first
    front.locator(".switch").click()
    server.document(lambda d: d["regions"][1]["off"])
    front.get_by_label("Show what this region holds").click()
    front.get_by_label("Region 2: Weight").fill("4")
    front.get_by_label("Region 2: Begin").fill("0.1")
    front.get_by_label("Region 2: Words of its own").fill("a red <petrucci>")
    front.get_by_label("Region 2: Not here").fill("hat")
    front.get_by_label("Region 2: LoRA 1", exact=True).select_option("hat")
    front.get_by_label("Region 2: scale of LoRA 1").fill("0.7")
    held = server.document(lambda d: d["regions"][1]["lora"] == {"hat": 0.7})["regions"][1]
    assert (held["weight"], held["begin"], held["end"]) == (4, 0.1, None)
    assert (held["prompt"], held["negative_prompt"]) == ("a red <petrucci>", "hat")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    with page.expect_file_chooser() as chooser:
        front.get_by_label("Region 2: choose a reference picture").click()
    chooser.value.set_files({"name": "x.png", "mimeType": "image/png", "buffer": picture.getvalue()})
    server.document(lambda d: "0" in (d["regions"][1]["ip_adapter_image"] or {}))
    page.locator(".region select").nth(0).select_option("words of the prompt")
    front.get_by_label("Region 2: words of the prompt").fill("red ball")
    held = server.document(lambda d: d["regions"][1]["phrase"] == "red ball")["regions"][1]
    assert held["subject"] is None
    page.locator(".region select").nth(0).select_option("all that no other region covers")
    server.document(lambda d: d["regions"][1]["phrase"] == "background" and d["regions"][1]["shape"] is None)
    assert page.locator("[data-do=rest]").is_hidden()
    for _ in range(2):
        page.click("[data-do=undo]")
    server.document(lambda d: d["regions"][1]["phrase"] == "")  # what was typed is undone too, a field at a time


def test_words_are_placed_too(page, server):
    page.locator(".chips input").fill("red ball")
    drag(page, (0.5, 0.5), (0.9, 0.9))
    drawn = server.document(lambda d: len(d["regions"]) == 1)
    assert (drawn["regions"][0]["subject"], drawn["regions"][0]["phrase"]) == (None, "red ball")
    page.keyboard.press("Control+d")
    server.document(lambda d: len(d["regions"]) == 2)
    assert page.locator(".label").all_inner_texts() == ["red ball", "red ball"]  # parts of one region
    page.get_by_label("Show what this region holds").first.click()
    page.get_by_label("Region 2: Which one").fill("2")
    assert page.locator(".label").all_inner_texts() == ["red ball 1", "red ball 2"]  # as on sheets
    page.click("[data-do=rest]")
    page.keyboard.type("palm trees")
    drawn = server.document(lambda d: d["regions"][0]["prompt"] == "palm trees")
    assert (drawn["regions"][0]["phrase"], drawn["regions"][0]["shape"]) == ("background", None)


def test_prompt_chips_problems_and_typing(page, server):
    page.get_by_label("Put <biscuit> into the prompt").click()
    server.document(lambda d: d["prompt"] == "a photo of <petrucci> and <majesty> and <biscuit> on the beach")
    drag(page, (0.1, 0.1), (0.5, 0.9))
    region = server.document(lambda d: d["regions"])["regions"][0]
    assert page.locator(".marks mark").all_inner_texts() == ["<petrucci>", "<majesty>", "<biscuit>"]
    assert page.locator(".marks .chosen").inner_text() == "<petrucci>"
    assert (
        page.evaluate("['.marks', '.prompt'].map((one) => document.querySelector(one).getBoundingClientRect().width)")
        == [page.locator(".paper").bounding_box()["width"]] * 2
    )
    server.problems = [
        {"region": region["id"], "text": "<img src=x onerror=alert(1)> is small", "severity": "warning"},
        {"region": None, "text": "Write a prompt.", "severity": "error"},
        {
            "region": None,
            "text": f"{'What is wrong. ' * 5}Words. {'What else there is to say. ' * 5}",
            "severity": "error",
        },
    ]
    area = page.locator("textarea.prompt")
    area.click()
    area.press("Control+a")
    area.press_sequentially("a photo of a dog", delay=30)
    page.get_by_text("Write a prompt.").wait_for()
    server.document(lambda d: d["prompt"] == "a photo of a dog")
    assert "What else" not in page.locator(".whole").inner_text()
    page.locator(".whole summary").click()
    assert "What else there is" in page.locator(".whole").inner_text()
    area.focus()
    assert area.input_value() == "a photo of a dog" and page.evaluate("document.activeElement.className") == "prompt"
    assert page.locator(".region .problem").inner_text().startswith("<img src=x onerror=alert(1)> is small")
    page.get_by_role("button", name="Name it").or_(page.locator(".region .problem button")).first.click()
    server.document(lambda d: "<petrucci>" in d["prompt"])


def test_a_loaded_document_replaces_what_is_there(page, server):
    drag(page, (0.1, 0.1), (0.5, 0.9))
    server.document(lambda d: len(d["regions"]) == 1)
    server.loaded = {
        **DOCUMENT,
        "prompt": "a red ball",
        "size": [192, 128],
        "regions": [{"id": "a", "phrase": "red ball", "shape": {"ellipse": [0.2, 0.2, 0.6, 0.6]}}],
    }
    page.click("#load")
    page.wait_for_selector(".layer.ellipse")
    server.document(lambda d: d["prompt"] == "a red ball")  # and is looked at
    assert page.locator("textarea.prompt").input_value() == "a red ball"
    stage = page.locator(".stage").bounding_box()
    assert stage["width"] / stage["height"] == pytest.approx(1.5, rel=0.02)
    page.click("[data-do=undo]")
    server.document(lambda d: d["regions"][0].get("subject") == "petrucci")


def test_colours_are_those_of_the_sheets(page, server):
    for subject in ("petrucci", "majesty", "biscuit"):
        page.locator(f".chip[data-subject={subject}]").focus()
        page.keyboard.press("Enter")
    server.document(lambda d: len(d["regions"]) == 3)
    expected = _colours(["petrucci", "majesty", "biscuit"])
    shown = page.evaluate("[...document.querySelectorAll('.layer')].map((e) => getComputedStyle(e).borderTopColor)")
    assert shown == [f"rgb({r}, {g}, {b})" for r, g, b in expected.values()]


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_touch_draws_on_a_phone(page, server):
    stage = page.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    touch = page.context.new_cdp_session(page)

    def send(kind, x=None, y=None):
        points = [] if x is None else [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", 0.1, 0.2)
    for part in range(1, 6):
        send("touchMove", 0.1 + 0.06 * part, 0.2 + 0.12 * part)
    send("touchEnd")
    assert boxes(server.document(lambda d: d["regions"])) == [near([0.1, 0.2, 0.4, 0.8])]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
