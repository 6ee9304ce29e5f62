"""The page in a real browser, from drawing to pictures and back."""

import base64
import io
import json
import time

import numpy as np
import pytest
from browser import drag, needs_chromium, number, run, visited
from PIL import Image

from multisubject.page.document import read_document
from multisubject.page.entries import read_settings
from multisubject.page.reading import read_file

pytestmark = [needs_chromium, pytest.mark.slow]

LEFT, RIGHT = [0.05, 0.2, 0.45, 0.9], [0.55, 0.2, 0.95, 0.9]


@pytest.fixture
def page(browser, page_server, request):
    options = getattr(request, "param", {})
    with visited(browser, page_server.url, permissions=["clipboard-read", "clipboard-write"], **options) as page:
        yield page


def draw_two(page):
    """The prompt's two subjects in two columns."""
    page.uncheck(".snap")
    drag(page, LEFT[:2], LEFT[2:])
    page.wait_for_function("document.querySelectorAll('.regions > li.region').length === 1")
    drag(page, RIGHT[:2], RIGHT[2:])
    page.wait_for_function("document.querySelectorAll('.regions > li.region').length === 2")


def says(page, text, seconds=60):
    page.locator("#status").get_by_text(text).first.wait_for(timeout=1000 * seconds)


def generate(page, pictures=1, steps=3):
    number(page, "num_images", pictures)
    number(page, "steps", steps)
    run(page)
    page.wait_for_function(f"document.querySelectorAll('#results .thumbnail-item').length === {pictures}")


def newest(page_server, count=1):
    """The pictures that were kept last."""
    folder = max(page_server.output.glob("20*"), key=lambda folder: folder.stat().st_mtime_ns)
    files = sorted(folder.glob("000?.png"))
    assert len(files) == count
    return files


def open_part(page, name):
    page.get_by_role("button", name=name).click()


def drop(page, data, name="x.png"):
    """A file is let go somewhere on the page."""
    page.wait_for_selector("#open input[type=file]", state="attached")
    transfer = page.evaluate_handle(
        """([data, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name],
    )
    page.dispatch_event("#status", "drop", {"dataTransfer": transfer})


def test_two_regions_are_drawn_and_obeyed(page, page_server):
    from multisubject.tiny_world.judge import Judge

    draw_two(page)
    start = time.monotonic()
    generate(page, pictures=2, steps=25)
    seconds = time.monotonic() - start
    print(f"from drawing to two pictures of 25 steps: {seconds:.1f} s")
    files = newest(page_server, 2)
    document, settings, _ = read_file(files[0].read_bytes(), ["petrucci", "majesty"], page_server.service.studio.base)
    assert [region["subject"] for region in document.regions] == ["petrucci", "majesty"]
    assert document.regions[0]["shape"]["box"] == pytest.approx(LEFT, abs=0.012)
    assert settings == read_settings({"num_images": 1})
    images = [Image.open(file).convert("RGB") for file in files]
    judge = Judge.load()
    for region, category in zip(document.layout(), ("person", "guitar"), strict=True):
        assert {verdict.category for verdict in judge.classify(images, [tuple(region["box"])] * 2)} == {category}
    assert seconds < 60  # six on two free cores


def test_a_preview_and_progress_are_shown_meanwhile(page):
    number(page, "num_images", 8)
    number(page, "steps", 60)
    page.click("#go")
    page.wait_for_selector("#status progress")
    says(page, "Picture 1 of 8, step")
    page.wait_for_function("document.querySelectorAll('#results .thumbnail-item').length >= 1", timeout=60_000)
    assert page.locator("#stop").is_enabled()
    page.click("#stop")
    says(page, "Cancelled.")
    assert page.locator("#results .thumbnail-item").count() < 8  # and not when all was done
    page.wait_for_function("document.querySelector('#stop').disabled")


def test_a_result_lies_under_the_regions_and_one_of_them_is_redrawn(page, page_server):
    draw_two(page)
    generate(page, steps=8)
    (before,) = newest(page_server)
    open_part(page, "Attention maps")
    page.wait_for_selector("#sheet img")
    page.locator("#results .thumbnail-item").first.click()
    page.wait_for_function("document.querySelector('.stage').outerHTML.includes('data:image/png')")
    open_part(page, "Start from")
    page.get_by_label("Redraw one region of it").check()
    page.wait_for_function("document.querySelector('#region input')?.value === '1 petrucci'")
    page.locator("#region input").click()
    page.get_by_role("option", name="2 majesty").click()
    run(page)
    (after,) = newest(page_server)
    changed = (pixels(before) != pixels(after)).any(-1)
    assert changed[30:110, 74:118].any() and not changed[:, :64].any()


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_dropped_picture_brings_everything_back(page, browser, page_server):
    draw_two(page)
    page.click(".tools [data-tool=brush]")
    page.click(".chip[data-subject=biscuit]")
    drag(page, (0.3, 0.1), (0.7, 0.1))
    page.fill(".prompt", "a photo of <petrucci> and <majesty> and <biscuit>")
    number(page, "seed", 21)
    open_part(page, "Method")
    number(page, "guidance_weight", 0.1)
    generate(page)
    (kept,) = newest(page_server)
    with visited(browser, page_server.url) as fresh:
        drop(fresh, kept.read_bytes())
        says(fresh, "Opened.")
        fresh.wait_for_function("document.querySelectorAll('.regions > li.region').length === 3")
        assert fresh.input_value(".prompt") == "a photo of <petrucci> and <majesty> and <biscuit>"
        assert fresh.locator("#seed input").input_value() == "21"
        run(fresh)
        (again,) = newest(page_server)
    assert again != kept and np.array_equal(pixels(again), pixels(kept))


def test_copies_are_what_the_command_line_and_python_take(page, page_server):
    draw_two(page)
    open_part(page, "Take it along")
    page.click("#as_config")
    says(page, "multisubject-generate --generation_config page.json")
    page.wait_for_function("navigator.clipboard.readText().then((text) => text.startsWith('['))")
    (entry,) = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert [part["subject"] for part in entry["layout"]] == ["petrucci", "majesty"]
    page.click("#as_python")
    page.wait_for_function("navigator.clipboard.readText().then((text) => text.startsWith('import torch'))")
    compile(page.evaluate("navigator.clipboard.readText()"), "page.py", "exec")


def test_what_is_wrong_is_said_in_its_place_before_a_run(page):
    draw_two(page)
    page.fill(".prompt", "a photo of <petrucci> on the beach")
    problem = page.locator(".regions > li.region").filter(has_text="not in the prompt")
    problem.wait_for()
    assert "majesty" in problem.inner_text()
    page.click("#go")
    says(page, "not in the prompt")
    assert page.locator("#results .thumbnail-item").count() == 0
    page.fill(".prompt", "a photo of <petrucci> and <nobody> and <majesty>")
    page.locator(".problems").get_by_text("'<nobody>' is not among the subjects").wait_for()


def test_words_are_text_and_never_markup(page):
    hostile = "<img src=x onerror=window.hit=1><script>window.hit=1</script>"
    config = json.dumps([{"prompt": hostile, "layout": [{"phrase": hostile, "box": LEFT}]}])
    drop(page, config.encode(), "x.json")
    says(page, "Not among the subjects here")
    page.wait_for_function("document.querySelectorAll('.regions > li.region').length === 1")
    assert page.input_value(".prompt") == hostile
    page.click("#go")
    page.locator("#status").get_by_text("onerror").first.wait_for()
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello", "neither a picture nor JSON"),
        (b'[{"prompt": "a <b>", "layout": "/etc/passwd"}]', "which the page does not open"),
        (b'[{"promt": "a"}]', "did you mean"),
    ],
)
def test_a_dropped_file_of_another_kind_is_refused_in_words(data, message, page):
    drop(page, data, "x.json")
    says(page, message)
    assert page.locator(".regions > li.region").count() == 0


def test_two_tabs_do_not_mix_their_pictures(page, browser, page_server):
    with visited(browser, page_server.url) as other:
        for tab, name in ((page, "petrucci"), (other, "majesty")):
            tab.fill(".prompt", f"a photo of <{name}>")
            tab.wait_for_timeout(500)
            number(tab, "num_images", 2)
            number(tab, "steps", 12)
        page.click("#go")
        other.click("#go")
        shown = []
        for tab in (page, other):
            says(tab, "Done in")
            tab.wait_for_function("document.querySelectorAll('#results .thumbnail-item').length === 2")
            shown.append(tab.locator("#results .thumbnail-item img").first.get_attribute("src"))
        prompts = []
        for tab, source in zip((page, other), shown, strict=True):
            data = tab.request.get(source).body()
            prompts.append(read_file(data, ["petrucci", "majesty"], page_server.service.studio.base)[0].prompt)
    assert prompts == ["a photo of <petrucci>", "a photo of <majesty>"]


@pytest.mark.parametrize(
    "page",
    [{"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}],
    indirect=True,
)
def test_a_phone_is_enough(page, page_server):
    page.get_by_role("button", name="two columns").tap()
    page.wait_for_function("document.querySelectorAll('.regions > li.region').length === 2")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    number(page, "num_images", 1)
    number(page, "steps", 3)
    page.locator("#go").tap()
    says(page, "Done in")
    data = Image.open(io.BytesIO(newest(page_server)[0].read_bytes()))
    assert data.size == (128, 128)


def test_documents_of_the_browser_pass_the_check(page, page_server):
    """What the canvas sends is what `read_document` takes, with nothing left to the library's errors."""
    draw_two(page)
    generate(page)
    document, _, _ = read_file(newest(page_server)[0].read_bytes(), [], page_server.service.studio.base)
    assert read_document(document.plain()) == document
