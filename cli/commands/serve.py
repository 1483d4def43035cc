"""``coldstream serve``: the model behind the dialects that clients speak, until it is interrupted."""

import os
from dataclasses import replace
from typing import Annotated

import typer

from cli.options.output import takes_console
from cli.options.run import Model, takes_run_and_prompt_options
from cli.options.sampling import AskedSampling, takes_sampling
from cli.options.typed import typed_name
from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from offload.records import RunOptions

KEY_VARIABLE = "COLDSTREAM_API_KEY"
Host = Annotated[
    str,
    typer.Option(
        "--host", parser=typed_name, metavar="ADDRESS", help="Where to listen; beyond this machine with a key."
    ),
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N", help="0: any that is free.")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key", metavar="KEY", help=f"A key that clients must give; may be given again (${KEY_VARIABLE})."
    ),
]
Unprotected = Annotated[
    bool, typer.Option("--unprotected", help="Listen beyond this machine without a key: whoever reaches it may ask.")
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host", parser=typed_name, metavar="NAME", help="A name of this server, of a proxy for example."
    ),
]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", parser=typed_name, metavar="URL", help="A site whose pages may ask, http://… ."),
]
Name = Annotated[
    str | None,
    typer.Option("--name", parser=typed_name, metavar="TEXT", help="What clients call the model (its folder)."),
]
Parallel = Annotated[
    int | None, typer.Option("--parallel", min=1, metavar="N", help="Answers at once, at most (16; beside a GPU 1).")
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", min=1, max=31_536_000, metavar="SECONDS", help="What a request may take, and wait."),
]
NoImages = Annotated[bool, typer.Option("--no-images", help="Take no images, and keep no memory free for them.")]
ImagesFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--images-from",
        parser=typed_name,
        metavar="HOST|FOLDER/",
        help="Fetch images that a request names by their address there; '*': anywhere public.",
    ),
]
Queue = Annotated[int, typer.Option("--queue", min=0, metavar="N", help="Answers that may wait; the next is told 429.")]


@takes_console
@takes_run_and_prompt_options
@takes_sampling
def serve(
    model: Model,
    sampling: AskedSampling,
    run: RunOptions,
    console: Console,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    api_key: ApiKey = None,
    unprotected: Unprotected = False,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    name: Name = None,
    queue: Queue = 32,
    parallel: Parallel = None,
    timeout: Timeout = 3600.0,
    no_images: NoImages = False,
    images_from: ImagesFrom = None,
) -> None:
    """Serve MODEL to clients that speak OpenAI's, Anthropic's or llama.cpp's dialect, and to a browser.

    Ctrl-C lets answers under way finish, a second one ends them. Sampling options are what a request that says
    nothing gets.
    """
    from cli.serve.guard import Access
    from cli.serve.server import address, bind, serve_app
    from cli.steps.open_model import find_model, open_session
    from quant.errors import UsageError

    keys = [*(api_key or ()), *filter(None, [os.environ.get(KEY_VARIABLE)])]
    if not all(key.isascii() and key.isprintable() and key.strip() == key != "" for key in keys):
        raise UsageError("--api-key is no key: expected printable ASCII without spaces around it")
    if not (keys or unprotected or _loopback(host)):
        raise UsageError(
            f"--host {host} lets other machines ask, and no --api-key is given: give one, or say --unprotected too"
        )
    path = find_model(model)
    sampling.of(path, max_tokens=1)  # a broken generation_config.json is said before the model is loaded
    bound = bind(host, port)
    with seldom_collecting():
        from cli.serve.app import make_app
        from cli.serve.service import Limits, Service
        from offload.vision.image_url import ImageSources
        from quant.kernels.stack import MAX_ROWS

    run = replace(run, images=not no_images, sequences=min(parallel or 1, MAX_ROWS))
    with bound, open_session(path, run, console) as session:
        settings, told = sampling.of(path, max_tokens=session.context)
        console.step(f"{told or 'sampling: greedy'}, where a request says nothing")
        limits = Limits(session.runner.limit_rows(parallel), queue, seconds=timeout)
        service = Service(session, name or path.resolve().name, settings, limits, ImageSources(images_from or ()))
        room = session.plan.kv_sequences * session.context
        console.step(
            f"{limits.parallel} answers at once, {queue} more may wait; one may have {session.context:,} tokens with "
            f"its prompt, and those under way share {room:,}{'' if service.vision else '; no images'}"
        )
        app = make_app(service, Access(keys, [host, *(allow_host or ())], allow_origin or ()))
        serve_app(app, bound, console, f"coldstream: {service.name} listens at {address(bound)}")
        console.result({"command": "serve", "model": service.name, **service.metrics.totals()})


def _loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
