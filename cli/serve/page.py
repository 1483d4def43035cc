"""The page at /: its files, and what its live view shows."""

import asyncio
from functools import cache
from importlib.resources import files

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from cli.serve.errors import ServeError
from cli.serve.service import Service
from cli.terminal.words import limit_name
from offload.run.collect import bandwidth_of, expert_map_of, memory_of
from offload.run.speed import DecodeSpeed
from offload.tiers import TIERS, role_name

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_SHARED = ("page.css", "theme.js")  # with the pages of reports


@cache
def _file(name: str) -> tuple[bytes, str]:
    """A file of the page and its type. Raises ServeError for a name that is none."""
    folder = files("cli").joinpath("html" if name in _SHARED else "serve", "assets")
    kept = {entry.name for entry in folder.iterdir()}
    kind = _TYPES.get(name.rpartition(".")[2])
    if name not in kept or kind is None:
        raise ServeError(404, f"there is no /page/{name}")
    return folder.joinpath(name).read_bytes(), kind


async def page(request: HttpRequest) -> Response:
    """The page, and what it is made of."""
    content, kind = _file(request.path_params.get("name", "page.html"))
    return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


async def live(request: HttpRequest) -> Response:
    """Where every byte is, how experts are used, and what limits the speed now."""
    return JSONResponse(await asyncio.to_thread(_live, request.app.state.service))


def _live(service: Service) -> dict[str, object]:
    session, recent = service.session, list(service.metrics.recent)
    speed = DecodeSpeed.of([recent], bandwidth_of(session))
    experts, memory = expert_map_of(session), memory_of(session)
    hits, misses = (sum(getattr(record, kind) for record in recent) for kind in ("hits", "misses"))
    seconds = sum(record.seconds for record in recent)
    return {
        "model": service.name,
        "tokens_per_s": len(recent) / seconds if seconds else None,
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "limited_by": limit_name(speed.floor_limited_by or session.plan.limited_by),
        "running": min(len(service.slots), service.limits.parallel),
        "waiting": max(0, len(service.slots) - service.limits.parallel),
        "memory": {
            tier: [{"name": role_name(role), "bytes": size} for role, size in memory.of(tier).items() if size]
            for tier in TIERS
        },
        "experts": {"layers": experts.moe_layers, "counts": experts.counts, "tiers": experts.tiers},
    }
