"""Whose requests the page answers, and which pictures it opens."""

import asyncio
import io
from typing import Annotated

import pytest
from fastapi import Body, FastAPI
from PIL import Image
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from multisubject.page.safety import MOST_BYTES, OwnPagesOnly, SmallRequestsOnly, read_data_url, read_picture
from multisubject.pictures import data_url


def ask(hosts=("127.0.0.1", "localhost", "::1"), kind="http", **headers):
    """The status that a request gets."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": "POST", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(OwnPagesOnly(app, hosts)(scope, None, send))
    return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860"])
def test_own_pages_and_no_page_at_all_are_answered(host):
    assert ask(host=host) == 200
    assert ask(host=host, origin=f"http://{host}") == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "", "[", "localhost@evil.example"]
)
def test_a_foreign_host_is_refused(host):
    assert ask(host=host) == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost:7860", "", "http://["]
)
def test_a_foreign_origin_is_refused(origin):
    assert ask(host="127.0.0.1:7860", origin=origin) == 403


def test_two_hosts_and_none_are_refused():
    assert ask() == 403
    app = OwnPagesOnly(None)
    assert app._problem([(b"host", b"localhost"), (b"host", b"localhost")])


def test_a_foreign_websocket_is_closed():
    assert ask(kind="websocket", host="evil.example") == 1008


def test_behind_a_password_any_host_is_answered_but_no_foreign_origin():
    assert ask(hosts=None, host="studio.example") == 200
    assert ask(hosts=None, host="studio.example", origin="https://studio.example") == 200
    assert ask(hosts=None, host="studio.example", origin="https://evil.example") == 403


# --- how large a request may be --------------------------------------------------------------------------------------


@pytest.fixture
def client():
    """An application that reads JSON, behind a limit of 1000 bytes."""
    app = FastAPI(middleware=[Middleware(SmallRequestsOnly, most=1000)])

    @app.post("/gradio_api/call/check")
    @app.post("/gradio_api/upload")
    def check(sent: Annotated[list, Body()]):
        return len(sent)

    return TestClient(app, headers={"content-type": "application/json"})


def chunks(size):
    """A JSON list of so many bytes, piece by piece, whose size nobody knows."""
    yield b"[0"
    for _ in range(size - 3):
        yield b" "
    yield b"]"


@pytest.mark.parametrize("form", [lambda parts: b"".join(parts), iter], ids=["with its size", "in chunks"])
@pytest.mark.parametrize("url", ["/gradio_api/call/check", "/gradio_api/upload"])
def test_a_request_that_is_too_large_is_refused(url, form, client):
    assert client.post(url, content=form(chunks(1000))).json() == 1
    for content_type in ("application/json", "multipart/form-data; boundary=a", "text/plain"):
        answer = client.post(url, content=form(chunks(1001)), headers={"content-type": content_type})
        assert answer.status_code == 413
        assert (
            answer.text == "refused: this request has more than 1,000 bytes, the most. Send smaller or fewer pictures."
        )


def test_a_request_that_is_too_large_is_not_read_to_its_end():
    """Neither one that says its size, nor one that goes on and on."""
    sent, asked = [], []

    async def app(scope, receive, send):
        while (await receive())["type"] == "http.request":
            pass
        await send({"type": "http.response.start", "status": 400, "headers": []})

    async def receive():
        asked.append(100)
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": []}
    asyncio.run(SmallRequestsOnly(app, 1000)(scope, receive, send))
    assert len(asked) == 11 and [message.get("status") for message in sent] == [413, None]
    for size in (b"1001", b"9" * 5000):
        sent.clear()
        asyncio.run(SmallRequestsOnly(app, 1000)(scope | {"headers": [(b"content-length", size)]}, receive, send))
        assert len(asked) == 11 and sent[0]["status"] == 413


# --- pictures --------------------------------------------------------------------------------------------------------


def file_of(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_read_without_their_metadata(kind):
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    picture = read_picture(file_of(Image.new("RGB", (16, 8), "red"), kind, exif=exif), "the picture")
    assert picture.size == (16, 8) and picture.mode == "RGB" and not picture.info and not picture.getexif()


def test_transparency_is_kept():
    assert read_data_url(data_url(Image.new("RGBA", (2, 2))), "the picture").mode == "RGBA"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"hello", "cannot be read"),
        (b"\0" * (MOST_BYTES + 1), "bytes, expected at most"),
        (file_of(Image.new("RGB", (8, 8)), "GIF"), "Expected a PNG, JPEG or WebP picture"),
        (file_of(Image.new("RGB", (8, 8)), "TIFF"), "Expected a PNG, JPEG or WebP picture"),
        (file_of(Image.new("1", (5000, 5000)), "PNG"), "5000 x 5000 pixels, expected at most"),
        (file_of(Image.new("RGB", (64, 64), "red"), "PNG")[:-30], "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "cannot be read"),
    ],
)
def test_what_is_no_picture_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_picture(data, "the picture")
