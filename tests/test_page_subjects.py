"""The tab of subjects in a real browser, on tiny settings."""

from pathlib import Path

import gradio as gr
import pytest
from browser import needs_chromium, visited
from PIL import Image

import multisubject
from multisubject.page.canvas import canvas
from multisubject.page.subjects_tab import CSS, subjects_tab
from multisubject.tiny_world.scenes import World
from multisubject.tiny_world.subjects import get_subject, subject_pictures

EMBEDDINGS = Path(multisubject.__file__).parent / "embeddings"


def paint(page, number):
    """Open a picture in the editor, and draw a line across its middle."""
    page.locator("#strip button:has(img)").nth(number).click()
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(1500)  # its drawing surface grows to its size
    page.locator("#editor").scroll_into_view_if_needed()
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=8)
    page.mouse.up()


@pytest.mark.slow
@needs_chromium
def test_a_subject_is_taught_from_pictures_on_the_page(jobs, browser, free_port, tmp_path):
    jobs.library.read(str(EMBEDDINGS))
    files = []
    for index, picture in enumerate(subject_pictures(get_subject("comet"), World(), count=3)):
        files.append(str(tmp_path / f"{index}.png"))
        picture.resize((320, 256)).save(files[-1])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with gr.Blocks() as blocks:
        document = {"size": [128, 128], "prompt": "", "negative_prompt": "", "regions": [], "underlay": None}
        offers = {"sizes": [], "subjects": jobs.library.listing(), "loras": [], "adapters": 0}
        subjects_tab(jobs.library, jobs, canvas(document, offers))
    _, url, _ = blocks.launch(
        server_name="127.0.0.1", server_port=free_port, share=False, ssr_mode=False, quiet=True,
        prevent_thread_lock=True, css=CSS,
    )  # fmt: skip
    try:
        with visited(browser, url) as page:
            page.set_default_timeout(60_000)
            page.wait_for_selector("#subjects img")
            assert page.locator("#subjects img").count() == 8

            page.locator("#new_pictures input[type=file]").set_input_files([*files, str(tmp_path / "bad.png")])
            page.wait_for_selector("#strip img")
            assert "Left out: bad.png cannot be read" in page.locator("#train_said").inner_text()
            paint(page, 0)
            page.locator("#keep").click()
            page.wait_for_selector("#strip :text('1 · masked')")

            page.locator("#train").click()
            page.wait_for_selector("#train_said [role=alert]")  # without a name
            page.locator("#new_name").locator("input, textarea").fill("balloon")
            page.locator("#new_phrase").locator("input, textarea").fill("ball")
            page.locator("#new_steps input").fill("4")
            paint(page, 1)  # and it is not said that this is to be used
            page.locator("#train").click()
            page.wait_for_selector("#training_progress :text('<balloon> · ball')")
            page.reload()
            page.wait_for_selector("#training_progress :text('is among the subjects')", timeout=120_000)
            page.wait_for_selector("#training_progress svg polyline")
            page.wait_for_selector("#validation img")
            page.wait_for_selector("#subjects :text('balloon · ball')")
            page.wait_for_selector(".chip[data-subject=balloon]")
    finally:
        blocks.close()
    kept = jobs.folder / "balloon" / "pictures"
    assert sorted(path.name for path in kept.glob("*_mask.png")) == ["000_mask.png", "001_mask.png"]
    with Image.open(kept / "000_mask.png") as mask:
        assert mask.size == (320, 256) and 0.01 < sum(mask.convert("L").tobytes()) / 255 / (320 * 256) < 0.5
