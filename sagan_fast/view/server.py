"""Serves the page on loopback. Nothing is written, and nothing outside the run can be read.

Starlette and uvicorn, not Gradio: the page is ours to the last byte. Gradio brings fonts and scripts of other hosts,
analytics, some fifty packages, and writes uploads to the disk.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagan_fast.errors import InputError
from sagan_fast.view import curves, scores
from sagan_fast.view.model import COLUMNS, PER_SEED, Model
from sagan_fast.view.source import View, png

HOSTS = ["127.0.0.1", "localhost"]
"""Names that a request may give this server: a page of another name that points here (DNS rebinding) is refused."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
STATIC = {"style.css": "text/css", "page.js": "text/javascript", "samples.js": "text/javascript",
          "attention.js": "text/javascript", "history.js": "text/javascript"}  # fmt: skip
LARGEST = 20 * 2**20
"""Bytes of an image that is dropped on the page."""
FRAMES = 17


def application(view: View) -> Starlette:
    """Return the ASGI application that shows `view`. The networks run in one thread, one request after the other."""
    worker = ThreadPoolExecutor(1)  # PyTorch starts its own threads for each thread that computes
    reader = ThreadPoolExecutor(1)
    static = {name: (files("sagan_fast.view") / "static" / name).read_bytes() for name in ("index.html", *STATIC)}

    async def computed(function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(worker, functools.partial(function, *args))

    async def read(function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(reader, function)

    def model() -> Model:
        if view.model is None:
            raise InputError(view.missing)
        return view.model

    async def page(request: Request) -> Response:
        return HTMLResponse(static["index.html"])

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404)
        return Response(static[name], media_type=STATIC[name])

    async def picture(request: Request) -> Response:
        path = view.history.picture(request.path_params["name"])
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type="image/png")

    async def about(request: Request) -> Response:
        shown = None if view.model is None else view.model.about()
        return JSONResponse({"name": view.source.resolve().name, "missing": view.missing, "model": shown,
                             "run": view.history.folder is not None})  # fmt: skip

    async def status(request: Request) -> Response:
        return JSONResponse(await read(view.status))

    async def part(request: Request) -> Response:
        parts = {"curves": lambda: curves.charts(view.history.lines()),
                 "scores": lambda: scores.tables(view.history.scores())}  # fmt: skip
        if request.path_params["name"] not in parts:
            raise HTTPException(404)
        return HTMLResponse(await read(parts[request.path_params["name"]]))

    async def samples(request: Request) -> Response:
        query, shown = request.query_params, model()
        facts = shown.about()
        names = facts["classes"]
        first, one = _whole(query, "first", 0, max(len(names) - 1, 0)), query.get("class", "")
        rows: list[int | None] = [None] * facts["rows"]
        if names:
            rows = list(range(first, min(first + facts["rows"], len(names))))
        columns = facts["columns"]
        if one:
            rows = [shown.chosen_class(_whole(query, "class", 0, 10**6))]
            columns = min(PER_SEED, facts["rows"] * COLUMNS if facts["columns"] == COLUMNS else columns, 40)
        elif not names:
            rows = rows[: PER_SEED // columns]
        found = await computed(shown.samples, rows, columns, _whole(query, "seed", 0, 2**32 - 1), _truncation(query))
        return JSONResponse({
            "samples": [{"id": str(chosen), "src": png(image)} for chosen, image in found],
            "columns": facts["columns"],
            "rows": [names[k] for k in rows if k is not None],
        })  # fmt: skip

    async def between(request: Request) -> Response:
        query, shown = request.query_params, model()
        ends = query.get("start", ""), query.get("end", "")
        frames = min(FRAMES, max(5, shown.at_a_time // 2 * 2 + 1))
        images = await computed(shown.between, *ends, frames, _truncation(query))
        return JSONResponse({"frames": [png(image) for image in images]})

    async def attention(request: Request) -> Response:
        query = request.query_params
        at = [_real(query, axis) for axis in "xy"]
        name, layer = query.get("of", ""), query.get("layer")
        label = _whole(query, "class", 0, 10**6)
        result = await computed(
            model().attention, query.get("network", "g"), layer, name, label, _truncation(query), *at
        )
        return JSONResponse(result | {key: png(result[key]) for key in ("picture", "map")})

    async def image(request: Request) -> Response:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > LARGEST:
                raise InputError(f"the file is larger than {LARGEST >> 20} MB: drop a smaller image")
        name, pixels, said = await computed(model().keep, bytes(content))
        return JSONResponse({"of": name, "src": png(pixels), "said": said})

    async def reload(request: Request) -> Response:
        await computed(view.load)
        return JSONResponse({})

    async def bad_input(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status_code=400)

    reads = {"/": page, "/static/{name}": file, "/pictures/{name}": picture, "/api/about": about,
             "/api/status": status, "/parts/{name}": part, "/api/samples": samples, "/api/between": between,
             "/api/attention": attention}  # fmt: skip
    posts = {"/api/image": image, "/api/reload": reload}
    return Starlette(
        routes=[*(Route(path, function) for path, function in reads.items()),
                *(Route(path, function, methods=["POST"]) for path, function in posts.items())],
        middleware=[Middleware(_Guarded), Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)],
        exception_handlers={InputError: bad_input},
    )  # fmt: skip


class _Guarded:
    """Adds HEADERS to every answer, and refuses requests that a page of another origin makes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
        own = f"{request.url.scheme}://{request.headers.get('host', '')}"
        foreign = site not in ("none", "same-origin") and request.url.path != "/"  # a link may lead to the page

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        if foreign or (origin is not None and origin != own):
            refusal = JSONResponse({"error": "only the page itself may ask"}, status_code=403)
            return await refusal(scope, receive, with_headers)
        return await self.app(scope, receive, with_headers)


def _whole(query: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = query.get(name, "0") or "0"
    if not text.isascii() or not text.isdigit() or len(text) > 10 or not low <= int(text) <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {text[:40]!r}")
    return int(text)


def _real(query: Mapping[str, str], name: str) -> float:
    text = query.get(name, "")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} must be a number, got {text[:40]!r}")
    return value


def _truncation(query: Mapping[str, str]) -> float | None:
    if query.get("truncation", "none") == "none":
        return None
    value = _real(query, "truncation")
    if not 0.01 <= value <= 100:
        raise InputError(f"truncation must be none or a number from 0.01 to 100, got {value:g}")
    return value
