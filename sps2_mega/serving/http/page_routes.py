"""The page at `/`: files of the folder `page`, unchanged, that use `/status` and `/v1` only.

They are served without an API key, since they reveal nothing; the page asks
its reader for the key if one is needed.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

# Path -> file and media type.
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/event_stream.js": ("event_stream.js", "text/javascript"),
}
PAGE_PATHS = frozenset(_FILES)
_HEADERS = {
    # A browser with an older page could send requests that a newer server does not know.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src "
        "data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


router = APIRouter()


def _serve(path: str, name: str, media_type: str) -> None:
    content = files("sps2_mega.serving.http").joinpath("page", name).read_bytes()

    async def page_file() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=_HEADERS)

    router.add_api_route(path, page_file, include_in_schema=False)


for _path, (_name, _media_type) in _FILES.items():
    _serve(_path, _name, _media_type)
