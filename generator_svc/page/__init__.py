"""The page at `/`: ask in a browser, see the evidence. Plain files beside this module, nothing from elsewhere."""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response

from shared.errors import NotFound

_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing inline, nothing from another host, no framing: a passage that holds markup stays text.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILES = [path for path in Path(__file__).parent.iterdir() if path.suffix in _CONTENT_TYPES]

# Open to everyone, since a browser asks for them before a person can give a key: they hold nothing secret.
PAGE_PATHS = frozenset({"/", *(f"/page/{path.name}" for path in _FILES)})


def mount_page(app: FastAPI) -> None:
    """Serve `index.html` at `/` and the files that it uses at `/page/{name}`; neither is part of the API's schema."""
    files = {path.name: _Asset(path) for path in _FILES}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return files["index.html"].response(request)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound(f"the page has no file {name!r}")
        return files[name].response(request)


class _Asset:
    """A file of the page, read once."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._etag = f'"{hashlib.sha256(self._content).hexdigest()[:16]}"'
        self._headers = {
            "Content-Type": _CONTENT_TYPES[path.suffix],
            "ETag": self._etag,
            # Asked again each time, answered with 304 while unchanged: an update shows at once.
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    def response(self, request: Request) -> Response:
        if self._etag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
