"""`rag up`."""

# ruff: noqa: PLC0415  (imports inside commands: see services.cli)
import os
import sys
from typing import Annotated

import typer


def up(
    host: Annotated[
        str, typer.Option(envvar="GENERATOR_HOST", help="Where the generator and its page listen; 0.0.0.0: everywhere.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="GENERATOR_PORT", min=1, max=65535, help="Its port.")] = 8000,
    retriever_port: Annotated[
        int, typer.Option(envvar="RETRIEVER_PORT", min=1, max=65535, help="Port of the retriever, on 127.0.0.1.")
    ] = 8001,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log JSON lines, for a log collector.")] = False,
) -> None:
    """Start both services, wait until they are ready, and stay in the foreground.

    A service that crashes is started again. Ctrl-C or SIGTERM finishes the requests in flight and stops both; nothing
    is left behind. Everything else is set by environment variables `GENERATOR_…` and `RETRIEVER_…`, which both
    services inherit.

    **Examples**

    - `rag up`
    - `rag up --host 0.0.0.0 --port 80 --json-logs`
    - `GENERATOR_CHECKPOINT=facebook/rag-token-nq rag up`
    """
    import asyncio

    from services.supervisor.address import check_free, url_of
    from services.supervisor.child import ServiceSpec
    from services.supervisor.pair import Pair
    from services.supervisor.reporter import ConsoleReporter, JsonReporter
    from shared.errors import StartupError

    retriever_host = os.environ.get("RETRIEVER_HOST", "127.0.0.1")
    if port == retriever_port:
        raise StartupError(f"both services cannot listen on port {port}: choose another --port or --retriever-port")
    check_free(host, port, "--port")
    check_free(retriever_host, retriever_port, "--retriever-port")
    retriever_url = url_of(retriever_host, retriever_port)
    log_format = "json" if json_logs else "console"
    generator = ServiceSpec(
        "generator",
        (sys.executable, "-m", "generator_svc"),
        url_of(host, port),
        {
            "GENERATOR_HOST": host,
            "GENERATOR_PORT": str(port),
            "GENERATOR_RETRIEVER_URL": retriever_url,
            "GENERATOR_LOG_FORMAT": log_format,
        },
        _stop_grace_s("GENERATOR"),
    )
    retriever = ServiceSpec(
        "retriever",
        (sys.executable, "-m", "retriever_svc"),
        retriever_url,
        {
            "RETRIEVER_HOST": retriever_host,
            "RETRIEVER_PORT": str(retriever_port),
            "RETRIEVER_LOG_FORMAT": log_format,
        },
        _stop_grace_s("RETRIEVER"),
    )

    async def run() -> int:
        return await Pair((generator, retriever), JsonReporter() if json_logs else ConsoleReporter()).run()

    raise typer.Exit(asyncio.run(run()))


def _stop_grace_s(prefix: str) -> float:
    """Longer than the service itself waits; a value that it cannot read, the service refuses itself."""
    try:
        return float(os.environ[f"{prefix}_DRAIN_TIMEOUT_S"]) + 15
    except (KeyError, ValueError):
        return 45.0
