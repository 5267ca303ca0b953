"""klfast serve: an OpenAI-compatible server."""

from __future__ import annotations

import gc
import ipaddress
import re
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klfast.cli import options
from klfast.cli.console import emit
from klfast.core.errors import InvalidInputError
from klfast.core.loading_options import LoadingOptions

if TYPE_CHECKING:
    from klfast.serving.service import Service

_OTHER_FILES = 128  # than connections
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^A-Z/?#@\s]+")  # in small letters, as browsers send it


@options.loads_models
def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default MODEL's last part.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="KLFAST_API_KEY", help="Key that clients must send; better in the variable.", show_default=False
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(help="Most tokens of a prompt and its answer; no more than the model has.", min=2)
    ] = 8192,
    queue: Annotated[int, typer.Option(help="Most answers that wait; further requests get status 429.", min=1)] = 256,
    request_bytes: Annotated[
        int, typer.Option(parser=options.parse_bytes, metavar="SIZE", help="Largest body of a request.")
    ] = "1MiB",  # type: ignore[assignment]  # typer parses defaults, too
    prefix_cache: Annotated[
        int,
        typer.Option(
            parser=options.parse_bytes,
            metavar="SIZE",
            help="Memory for the states of earlier texts, from which longer ones go on; 0 for none.",
        ),
    ] = "1GiB",  # type: ignore[assignment]
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help='Let web pages of this origin ("https://example.org", or "*") ask; repeatable.'
        ),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a line for each request on standard error, without texts.")
    ] = False,
    dtype: options.Dtype = "float32",
    gguf: options.Gguf = options.USUAL_GGUF,
    threads: options.Threads = None,
    as_json: options.Json = False,
    *,
    loading: LoadingOptions,
) -> None:
    """Serve a model by OpenAI's HTTP interface until Ctrl-C: /v1/completions, /v1/chat/completions."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise typer.BadParameter("an API key has printable ASCII characters, at least one")
    _check_origins(cors or ())
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InvalidInputError(f"klfast serve needs the package {error.name}: pip install 'klfast[serve]'") from None
    from klfast.checkpoint.by_name import load_model, load_tokenizer
    from klfast.cli import runtime
    from klfast.serving.service import Service

    runtime.prepare(threads)
    listener = _listen(host, port)  # before the model is loaded, which takes long
    tokenizer = load_tokenizer(model, **loading)
    network = load_model(model, dtype, gguf=gguf, **loading)
    if api_key is None and not _is_local(host):
        print("klfast: warning: whoever reaches this address can use the server; set an --api-key", file=sys.stderr)
    name = name or Path(model).name or model
    service = Service(network, tokenizer, name, context=context, waiting=queue, cache_bytes=prefix_cache)
    gc.collect()  # a server would keep garbage for long
    runtime.resume_collections()
    try:
        _run(
            service,
            listener,
            as_json,
            key=api_key,
            most_bytes=request_bytes,
            origins=cors or (),
            logs_requests=log_requests,
        )
    finally:
        service.scheduler.close(finish=False)  # does nothing after an orderly end


def _run(service: Service, listener: socket.socket, as_json: bool, **of_app: Any) -> None:
    """Serve until a signal; ``of_app`` are options of ``make_app``."""
    from klfast.serving.api import make_app
    from klfast.serving.connection import MOST_CONNECTIONS, http_server

    app = make_app(service, **of_app)
    server = http_server(app, most_connections=_allow_connections(MOST_CONNECTIONS))

    def stop(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn has its own while it runs, then raises it again
        signal.signal(number, stop)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    emit({"model": service.name, "url": url}, f"klfast serves {service.name} at {url}", as_json)
    sys.stdout.flush()
    server.run(sockets=[listener])


def _check_origins(origins: Iterable[str]) -> None:
    """Refuse what no browser sends as its page's origin."""
    for origin in origins:
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            raise typer.BadParameter(
                f"--cors takes an origin such as https://example.org:8080, without a path, or *; got {origin!r}"
            )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise InvalidInputError(f"cannot listen on {host}, port {port}: {error}; choose another --port") from None


def _allow_connections(most: int) -> int:
    """Let this process open files for this many connections, or as many as the system allows; return how many."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return most
    wanted = most + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(most + _OTHER_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, min(most, max(soft, wanted) - _OTHER_FILES))


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
