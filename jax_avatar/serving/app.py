"""HTTP application: the page, WebSocket, WebRTC offers, health and metrics."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.staticfiles import StaticFiles

from jax_avatar.serving.access import is_cross_origin, is_valid_token
from jax_avatar.serving.links.websocket import serve_socket
from jax_avatar.serving.server_state import ServerState

try:
    from jax_avatar.serving.links.webrtc import serve_offer
except ModuleNotFoundError:  # the extra "webrtc" is not installed
    serve_offer = None

__all__ = ["drain", "make_app"]

_STATIC = Path(__file__).parent / "static"
_POLICY = (
    "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:; "
    "connect-src 'self' ws: wss:; frame-ancestors 'none'"
)
_BODY_S = 30.0  # for the body of a request
_log = logging.getLogger(__name__)
_router = APIRouter()


def make_app(state: ServerState) -> FastAPI:
    """Application that compiles the model when it starts, and answers meanwhile."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(_open(state))
        yield
        opening.cancel()
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        state.pool.close()

    app = FastAPI(title="Avatar", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.avatar = state
    app.middleware("http")(_add_headers)
    app.include_router(_router)
    app.mount("/", StaticFiles(directory=_STATIC, html=True), name="page")
    return app


async def _add_headers(request: Request, call_next: Any) -> Response:
    response = await call_next(request)
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


@_router.get("/healthz")
async def _healthz() -> PlainTextResponse:
    return PlainTextResponse("ok")


@_router.get("/readyz")
async def _readyz(request: Request) -> JSONResponse:
    state = request.app.state.avatar
    is_ready = state.pool.is_ready and not state.is_draining
    content = {
        "ready": is_ready, "draining": state.is_draining, "free": state.pool.free,
        "framing": state.view.framing,
    }  # fmt: skip
    return JSONResponse(content, 200 if is_ready else 503)


@_router.get("/metrics")
async def _metrics(request: Request) -> Response:
    state, header = request.app.state.avatar, request.headers.get("authorization", "")
    if not is_valid_token(state, header.removeprefix("Bearer ")):
        return PlainTextResponse("the token is missing or wrong", 401)
    sessions = ((c.protocol, c.live) for c in state.connections)
    state.metrics.set_levels(sessions, state.pool.count)
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@_router.websocket("/v1/avatar")
async def _avatar(socket: WebSocket) -> None:
    if is_cross_origin(socket.headers):
        await socket.close(1008, "foreign origin")
        return
    await serve_socket(socket, socket.app.state.avatar)


@_router.post("/v1/rtc")
async def _rtc(request: Request) -> JSONResponse:
    state = request.app.state.avatar
    if is_cross_origin(request.headers):
        return _refusal(403, "foreign", "a page of another site must not use this server.")
    if serve_offer is None:
        return _refusal(501, "no_webrtc", 'WebRTC needs: pip install ".[webrtc]"')
    body, most = bytearray(), state.limits.message_bytes
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    return _refusal(413, "too_large", f"at most {most} bytes.")
    except TimeoutError:
        return _refusal(408, "too_slow", f"the offer took over {_BODY_S:.0f} s.")
    status, content = await serve_offer(body.decode(errors="replace"), state)
    return JSONResponse(content, status)


def _refusal(status: int, code: str, message: str) -> JSONResponse:
    content = {"type": "error", "code": code, "message": message, "fatal": True}
    return JSONResponse(content, status)


async def _open(state: ServerState) -> None:
    """Compiles and warms up the pool, beside the first requests."""
    try:
        if not state.pool.is_ready:
            await asyncio.to_thread(state.pool.open)
    except ValueError as error:
        _log.error("the model could not be started; /readyz stays 503: %s", error)
        return
    except Exception:
        _log.exception("the model could not be started; /readyz stays 503")
        raise
    budget = state.pool.budget
    state.metrics.set_parts(budget.parts)
    _log.warning(
        "ready: %d sessions (speed allows %d, memory %d); %.2f s of video take %.2f s",
        state.pool.count, budget.by_speed, budget.by_memory, budget.video_s, budget.block_s,
    )  # fmt: skip


async def drain(state: ServerState, seconds: float) -> None:
    """Admits no more sessions; returns when none is left, or after so many seconds."""
    state.is_draining = True
    await asyncio.gather(*(c.warn_of_drain(seconds) for c in state.connections))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while state.connections:
                await asyncio.sleep(0.1)
