"""The page at `/`, to start and read every kind of stream, and the docs at `/docs`.

All files are read at the start: a request's path never reaches the file system.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from ssecore.errors import NotFound
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET
from ssecore.wire import encode_json

__all__ = ["ROUTES"]

#: A second defence, since the page shows data as text only.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
#: Other suffixes are not served.
MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".md": "text/plain; charset=utf-8",  # browsers download text/markdown
    ".svg": "image/svg+xml",
    ".ts": "text/plain; charset=utf-8",  # a module's types
}


class _File(NamedTuple):
    body: bytes
    media_type: str
    etag: str


def _file(body: bytes, media_type: str) -> _File:
    return _File(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _read(path: Path) -> _File:
    return _file(path.read_bytes(), MEDIA_TYPES[path.suffix])


def _with_list(docs: dict[str, _File]) -> dict[str, _File]:
    """Add `pages.json`: names and titles, in reading order."""
    names = sorted(docs, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    titles = {name: docs[name].body.decode().partition("\n")[0].lstrip("# ") for name in names}
    pages = [{"name": name.removesuffix(".md"), "title": title} for name, title in titles.items()]
    return {**docs, "pages.json": _file(encode_json(pages), "application/json")}


_FOLDER: Final = Path(__file__).parent
_PAGE: Final = _read(_FOLDER / "index.html")
_STATIC: Final[Mapping[str, _File]] = {
    path.name: _read(path) for path in (_FOLDER / "static").iterdir() if path.suffix in MEDIA_TYPES
}
_DOCS_PAGE: Final = _read(_FOLDER / "docs.html")
#: First in the list; the others follow by name.
_FIRST: Final = ("quickstart.md", "handlers.md", "runs.md")
_DOCS: Final = _with_list({path.name: _read(path) for path in (_FOLDER.parent.parent / "docs").glob("*.md")})


async def index(request: Request) -> Response:
    return _answer(request, _PAGE)


async def docs(request: Request) -> Response:
    return _answer(request, _DOCS_PAGE)


async def doc(request: Request, name: str) -> Response:
    file = _DOCS.get(name)
    if file is None:
        raise NotFound("there is no such page")
    return _answer(request, file)


async def session(request: Request) -> Response:
    """The caller's name: 401 if a login is required, null if authentication is off."""
    credential = request.credential
    expires = credential.entry.expires if credential is not None else None
    return JSON({"caller": request.caller, "expires": expires}, headers={"cache-control": "no-store"})


async def static(request: Request, name: str) -> Response:
    file = _STATIC.get(name)
    if file is None:
        raise NotFound("there is no such file")
    return _answer(request, file)


def _answer(request: Request, file: _File) -> Response:
    headers = {
        "etag": file.etag,
        # All modules of a page must have one version, and a 304 is cheap.
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
    # Weak comparison (RFC 9110, 13.1.2): a compressing proxy makes tags weak.
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known or "*" in known:
        return Response(status=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)


ROUTES = [
    GET("/", index, open=True),
    GET("/static/{name}", static, open=True),
    GET("/docs", docs, open=True),
    GET("/docs/{name}", doc, open=True),
    GET("/session", session),
]
