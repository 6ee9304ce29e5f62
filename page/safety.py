"""What stands between the page and strangers: whose requests are answered, how large they are, and which pictures
are opened."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, UnidentifiedImageError

from multisubject.pictures import PICTURE_ERRORS, is_data_url, split_alpha, upright

MOST_BYTES = 20 * 2**20
"""Of a file or a picture that the browser sends."""

MOST_PIXELS = 2**24
"""Of a picture that the browser sends: 4096 x 4096."""

MOST_SENT = 256 * 2**20
"""Bytes of a request: a training's photos as text in JSON, or an upload, whose fields Gradio keeps in memory."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_PREFIXES = tuple(f"data:image/{kind.lower()};base64," for kind in _FORMATS)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine for itself."""

_Message = Mapping[str, Any]


def read_picture(data: bytes, what: str) -> Image.Image:
    """A picture that a stranger sent, decoded: PNG, JPEG or WebP, upright, `RGB` or `RGBA`, without its metadata.

    Args:
        data: the file's bytes.
        what: what to call it in messages.

    Raises:
        ValueError: it is too large, in another format or damaged.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"{what} has {len(data):,} bytes, expected at most {MOST_BYTES:,}. Save a smaller picture.")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size  # known before a pixel is unpacked
            if width * height > MOST_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, expected at most {MOST_PIXELS:,} in all")
            picture = upright(image)
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{what} cannot be read. Expected a PNG, JPEG or WebP picture.") from None
    except PICTURE_ERRORS as error:
        raise ValueError(f"{what} cannot be read: {error}. Expected a PNG, JPEG or WebP picture.") from None
    picture.info = {}
    return picture


def read_data_url(value: Any, what: str) -> Image.Image:
    """The picture of a text `data:image/png;base64,…`, as `read_picture`."""
    if not is_data_url(value):
        raise ValueError(f"{what} is no picture, expected text that begins with one of {', '.join(_PREFIXES)}.")
    if len(value) > MOST_BYTES * 4 // 3 + 100:
        raise ValueError(f"{what} has {len(value):,} letters, expected at most {MOST_BYTES:,} bytes.")
    try:
        data = base64.b64decode(value.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{what} is no base64: {error}.") from None
    return read_picture(data, what)


def opaque(picture: Image.Image) -> Image.Image:
    """A picture in `RGB`, its transparent parts on white."""
    return split_alpha(picture)[0]


class OwnPagesOnly:
    """Answers requests that were sent to this server under its own name, by its own pages or by no page.

    Another site's script can send requests to a server of this machine, and read its answers if the browser was told
    that the server belongs to that site (DNS rebinding). Such requests carry a foreign `Origin` or `Host`.

    Args:
        app: the ASGI application.
        hosts: names, without ports, under which the server is asked; None: any, behind a password.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: Collection[str] | None = LOOPBACK):
        self.app = app
        self.hosts = None if hosts is None else {host.casefold() for host in hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, or refuse it with status 403."""
        if scope["type"] in ("http", "websocket") and (problem := self._problem(scope["headers"])):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await _refuse(send, 403, problem)
            return
        await self.app(scope, receive, send)

    def _problem(self, headers: Collection[tuple[bytes, bytes]]) -> str | None:
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        host = _hosts_of(f"//{hosts[0]}")[0] if len(hosts) == 1 else None
        if host is None or (self.hosts is not None and host not in self.hosts):
            return "refused: this server is not asked under that name. Start it with --allowed_host to allow one."
        for name, value in headers:
            if name == b"origin" and _hosts_of(value.decode("latin-1"))[1] != hosts[0].casefold():
                return "refused: another site's page sent this request."
        return None


class SmallRequestsOnly:
    """Answers requests of a bounded size: whoever parses JSON or a form holds all of it in memory.

    Args:
        app: the ASGI application.
        most: bytes of a request's body.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], most: int = MOST_SENT):
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, or refuse it with status 413: by the size that it names, else once more has come."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        come, is_answered, is_refused = 0, False, False

        async def refuse() -> None:
            nonlocal is_refused
            is_refused = True
            if not is_answered:
                most = f"{self.most:,} bytes, the most"
                await _refuse(send, 413, f"refused: this request has more than {most}. Send smaller or fewer pictures.")

        async def counted() -> _Message:
            nonlocal come
            if is_refused:
                return {"type": "http.disconnect"}
            message: _Message = await receive()
            come += len(message.get("body", b""))
            if come > self.most:
                await refuse()
                return {"type": "http.disconnect"}
            return message

        async def answer(message: _Message) -> None:
            nonlocal is_answered
            if not is_refused:  # the application has no say any more
                is_answered = True
                await send(message)

        sizes = [value for name, value in scope["headers"] if name == b"content-length" and value.isdigit()]
        if any(len(size) > 20 or int(size) > self.most for size in sizes):  # Python reads no number of 4300 digits
            await refuse()
            return
        await self.app(scope, counted, answer)


async def _refuse(send: Any, status: int, problem: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": problem.encode()})


def _hosts_of(url: str) -> tuple[str | None, str | None]:
    """A URL's host without its port and with it, in small letters, None for what is none."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.netloc.casefold()
    except ValueError:
        return None, None
