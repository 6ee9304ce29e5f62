"""The page as a server: whom it answers, what it gives away, what is left when it stops, and its use over HTTP."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client
from PIL import Image

from multisubject.page import server
from multisubject.page.safety import MOST_BYTES, MOST_SENT
from multisubject.pictures import data_url, png_bytes

DOCUMENT = {
    "prompt": "a photo of <petrucci> and <majesty> on the beach",
    "regions": [
        {"subject": "petrucci", "shape": {"box": [0.05, 0.2, 0.45, 0.9]}},
        {"subject": "majesty", "shape": {"box": [0.55, 0.2, 0.95, 0.9]}},
    ],
}
QUICK = {"num_inference_steps": 2, "num_images": 1}


def arguments(*argv):
    return server.parse_arguments(server.DataclassParser(server.PageArguments), argv)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host", "0.0.0.0"], "give --auth FILE"),
        (["--port", "0"], "expected 1 to 65535"),
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--share"], "--share"),
    ],
)
def test_wrong_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments(*argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "anna", "anna:", ":secret"])
def test_a_file_of_users_needs_users_and_passwords(text, tmp_path):
    (tmp_path / "users").write_text(text)
    with pytest.raises(ValueError, match="expected lines USER:PASSWORD"):
        arguments("--auth", str(tmp_path / "users")).users()


def test_a_lora_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        server.find_loras([str(tmp_path)])


def test_strangers_are_asked_for_a_password(tmp_path, free_port):
    (tmp_path / "users").write_text("anna:secret\n")
    options = arguments("--host", "0.0.0.0", "--auth", str(tmp_path / "users"), "--port", str(free_port))
    options.open_browser = False
    with gr.Blocks() as page:
        gr.Textbox()
    server.launch(page, options, options.users())
    try:
        url = f"http://127.0.0.1:{free_port}"
        assert httpx.get(f"{url}/config").status_code == 401
        with httpx.Client() as client:
            assert client.post(f"{url}/login", data={"username": "anna", "password": "wrong"}).status_code == 400
            client.post(f"{url}/login", data={"username": "anna", "password": "secret"})
            assert client.get(f"{url}/config").status_code == 200
            assert client.get(f"{url}/config", headers={"Host": "studio.example"}).status_code == 200
            assert client.get(f"{url}/config", headers={"Origin": "http://evil.example"}).status_code == 403
    finally:
        page.close()


@pytest.mark.slow
def test_nothing_is_left_behind_on_sigterm(tmp_path, free_port):
    command = [sys.executable, "-m", "multisubject.page.server", "--no_open_browser", "--port", str(free_port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "GRADIO_SHARE": "true", "GRADIO_SERVER_NAME": "0.0.0.0"}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        assert f"http://127.0.0.1:{free_port}" in said
        httpx.post(f"http://127.0.0.1:{free_port}/gradio_api/upload", files={"files": ("x.png", b"x")})
        assert list(tmp_path.glob("multisubject-page-*/gradio/*"))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # a group's signal comes twice
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert not list(tmp_path.glob("multisubject-page-*"))


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_foreign_hosts_and_origins_are_refused(headers, page_server):
    before = sum(1 for _ in page_server.work.rglob("*"))
    assert httpx.get(page_server.url, headers=headers).status_code == 403
    sent = httpx.post(
        f"{page_server.url}/gradio_api/upload", headers=headers, files={"files": ("x.png", b"x", "image/png")}
    )
    assert sent.status_code == 403 and sum(1 for _ in page_server.work.rglob("*")) == before


def test_large_uploads_are_refused(page_server):
    sent = httpx.post(
        f"{page_server.url}/gradio_api/upload", files={"files": ("x.png", b"\0" * (MOST_BYTES + 1), "image/png")}
    )
    assert sent.status_code == 413


@pytest.mark.parametrize("path", ["call/check", "run/review", "queue/join"])
def test_large_requests_are_refused(path, page_server):
    server = HTTPConnection(page_server.url.removeprefix("http://"))
    server.putrequest("POST", f"/gradio_api/{path}")
    server.putheader("Content-Length", str(MOST_SENT + 1))
    server.endheaders(b"[]")
    answer = server.getresponse()
    assert answer.status == 413 and f"more than {MOST_SENT:,} bytes" in answer.read().decode()
    server.close()


def test_a_bomb_in_the_editor_is_not_unpacked(page_server):
    data = png_bytes(Image.new("1", (8000, 8000)))
    sent = httpx.post(f"{page_server.url}/gradio_api/upload", files={"files": ("x.png", data, "image/png")})
    file = {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}
    answer = run(page_server, "edited", {"background": file, "layers": [], "composite": None}, None, 0)
    assert answer.status_code == 500


def test_an_output_folder_that_cannot_be_written_is_told_of(page_server, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(page_server.service.studio, "output_dir", tmp_path / "file" / "pictures")
    kind, said = events(page_server, "generate", DOCUMENT, QUICK)[-1]
    assert kind == "error" and "Not a directory" in said["error"]


def test_files_are_not_given_away(page_server):
    made = generate(page_server)
    assert made
    kept = next(page_server.output.rglob("*.png"))
    for path in ("/etc/passwd", str(kept), __file__, "../../../etc/passwd"):
        assert httpx.get(f"{page_server.url}/gradio_api/file={path}").status_code in (400, 403, 404)


def run(page_server, name, *data):
    """What one of the page's own handlers answers to anybody."""
    return httpx.post(f"{page_server.url}/gradio_api/run/{name}", json={"data": data, "session_hash": "test"})


WRONG = [
    None,
    "text",
    [1],
    {"size": [1e9, 1e9], "prompt": "a"},
    {"prompt": {"$ne": 1}},
    {"prompt": "a", "regions": "many"},
    {"prompt": "a", "regions": [{"shape": {"mask": "file:///etc/passwd"}}]},
    {"prompt": "a", "regions": [{"subject": "../../etc/passwd", "shape": {"box": [0, 0, 1, 1]}}]},
    {"prompt": "a", "regions": [{"lora": {"../../x": 1}, "shape": {"box": [0, 0, 1, 1]}}]},
    {"prompt": "a", "underlay": "data:image/png;base64,AAAA"},
    {"prompt": "a <b><img src=x onerror=alert(1)></b>"},
]


@pytest.mark.parametrize("document", WRONG)
def test_wrong_input_is_refused_whoever_sends_it(document, page_server):
    problems = page_server.service.problems(document, {})
    assert problems and all(problem["severity"] == "error" for problem in problems)
    values = [2, 0, 25, None, "multisubject", 0.08, None, -1e8, 1, None, True, "noise", 0.6, None]
    answer = run(page_server, "review", document, *values)
    assert answer.status_code == 200 or not isinstance(document, dict)
    if isinstance(document, dict):
        assert answer.json()["data"][0]["props"]["problems"] == problems
    assert events(page_server, "generate", document, {})[-1][0] == "error"


@pytest.mark.parametrize("given", [{"num_images": 10**6}, {"num_inference_steps": 10**9}, {"seed": -1}, {"x": 1}, 3])
def test_wrong_settings_are_refused_whoever_sends_them(given, page_server):
    assert page_server.service.problems(DOCUMENT, given)[0]["severity"] == "error"


def test_a_file_that_was_not_uploaded_is_not_opened(page_server):
    answer = run(page_server, "open", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, DOCUMENT)
    assert answer.status_code == 500 and "root:" not in answer.text


def test_a_queue_that_is_full_says_so(page_server):
    url, answers = f"{page_server.url}/gradio_api/call/generate", []
    with page_server.service.studio._lock:  # nobody's picture gets ahead
        for _ in range(server.MOST_WAITING + 8):
            answers.append(httpx.post(url, json={"data": [DOCUMENT, QUICK]}))
            time.sleep(0.02)
    full = [answer for answer in answers if answer.status_code == 503]
    assert full and all("Queue is full" in answer.text for answer in full)
    for answer in answers:
        if answer.status_code == 200:
            listen(url, answer.json()["event_id"])


# --- over HTTP -------------------------------------------------------------------------------------------------------


def listen(url, event_id):
    """The answers of a call: pairs of their kind and what they hold."""
    text = httpx.get(f"{url}/{event_id}", timeout=120).text
    return [(kind, json.loads(data)) for kind, data in re.findall(r"event: (\w+)\ndata: (.*)", text)]


def events(page_server, name, *data):
    url = f"{page_server.url}/gradio_api/call/{name}"
    return listen(url, httpx.post(url, json={"data": data}).json()["event_id"])


def generate(page_server, document=DOCUMENT, **settings):
    kind, (answer,) = events(page_server, "generate", document, QUICK | settings)[-1]
    assert kind == "complete"
    return answer["pictures"]


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGB"))


def test_plain_http_makes_pictures_and_tells_of_each_step(page_server):
    answers = events(page_server, "generate", DOCUMENT, QUICK | {"num_images": 2, "seed": 4})
    assert answers[0][0] == "generating" and answers[0][1][0] == {"picture": 1, "step": 1, "steps": 2}
    pictures = answers[-1][1][0]["pictures"]
    assert [picture["seed"] for picture in pictures] == [4, 5]
    assert pixels(pictures[0]["image"]).shape == (128, 128, 3) and "attention_maps" in pictures[0]


def test_a_mask_is_sent_as_text(page_server):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (3, 13, 29, 58))
    document = DOCUMENT | {"regions": [{"subject": "petrucci", "shape": {"mask": data_url(mask)}}]}
    assert not np.array_equal(
        pixels(generate(page_server, document)[0]["image"]), pixels(generate(page_server)[0]["image"])
    )


def test_the_client_does_all_that_the_page_does(page_server):
    client = Client(page_server.url, verbose=False)
    assert {"name": "petrucci", "class_phrase": "person"} in client.predict(api_name="/subjects")
    assert client.predict(DOCUMENT, QUICK, api_name="/check") == []
    code = client.predict(DOCUMENT, QUICK, api_name="/code")
    assert json.loads(code["config"])[0]["prompt"] == DOCUMENT["prompt"] and "pipe(" in code["python"]
    (picture,) = client.predict(DOCUMENT, QUICK, api_name="/generate")["pictures"]
    assert np.array_equal(pixels(picture["image"]), pixels(generate(page_server)[0]["image"]))
    with pytest.raises(Exception, match="'<nobody>' is not among the subjects"):
        client.predict({"prompt": "a <nobody>"}, QUICK, api_name="/generate")


def test_a_caller_who_leaves_stops_the_run(page_server):
    client = Client(page_server.url, verbose=False)
    job = client.submit(DOCUMENT, {"num_inference_steps": 150, "num_images": 8}, api_name="/generate")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    start = time.monotonic()
    generate(page_server)
    assert time.monotonic() - start < 20  # eight pictures of 150 steps would take longer


def test_a_saved_picture_opens_again(page_server):
    (picture,) = generate(page_server, seed=9)
    data = base64.b64decode(picture["image"].partition(",")[2])
    sent = httpx.post(f"{page_server.url}/gradio_api/upload", files={"files": ("../../x.png", data, "image/png")})
    (path,) = sent.json()
    assert str(page_server.work) in path
    answer = run(page_server, "open", {"path": path, "meta": {"_type": "gradio.FileData"}})
    document = answer.json()["data"][0]
    assert document["prompt"] == DOCUMENT["prompt"]
    assert [region["subject"] for region in document["regions"]] == ["petrucci", "majesty"]
    assert document["underlay"] == data_url(Image.open(io.BytesIO(data)))


def test_a_picture_without_settings_is_refused_in_words(page_server):
    data = png_bytes(Image.new("RGB", (8, 8)))
    sent = httpx.post(f"{page_server.url}/gradio_api/upload", files={"files": ("x.png", data, "image/png")})
    answer = run(page_server, "open", {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}, {})
    assert "this picture has no settings in it" in answer.json()["data"][-1]
