"""`rag up`."""

# ruff: noqa: PLC0415  (imports inside commands: see services.cli)
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.client.calls import Service
    from services.supervisor.child import ServiceSpec


def up(
    host: Annotated[
        str, typer.Option(envvar="GENERATOR_HOST", help="Where the generator and its page listen; 0.0.0.0: everywhere.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="GENERATOR_PORT", min=1, max=65535, help="Its port.")] = 8000,
    retriever_port: Annotated[
        int, typer.Option(envvar="RETRIEVER_PORT", min=1, max=65535, help="Port of the retriever, on 127.0.0.1.")
    ] = 8001,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every request, not only warnings.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log everything as JSON lines.")] = False,
) -> None:
    """Start both services, wait until they are ready, and stay in the foreground.

    A service that crashes is started again. Ctrl-C or SIGTERM finishes the requests in flight and stops both; nothing
    is left behind. Everything else is set by environment variables `GENERATOR_…` and `RETRIEVER_…`, which both
    services inherit.

    **Examples**

    - `rag up`
    - `rag up --host 0.0.0.0 --port 80 --json-logs`
    - `RETRIEVER_DATA_DIR=/var/lib/rag GENERATOR_DTYPE=bfloat16 rag up`
    """
    import asyncio

    from services.supervisor.address import check_free, url_of
    from services.supervisor.pair import Pair
    from services.supervisor.reporter import ConsoleReporter, JsonReporter
    from shared.errors import StartupError

    retriever_host = os.environ.get("RETRIEVER_HOST", "127.0.0.1")
    if port == retriever_port:
        raise StartupError(f"both services cannot listen on port {port}: choose another --port or --retriever-port")
    check_free(host, port, "--port")
    check_free(retriever_host, retriever_port, "--retriever-port")
    logs = {
        "LOG_FORMAT": "json" if json_logs else "console",
        "LOG_LEVEL": "info" if json_logs or verbose else "warning",
    }
    specs = (
        _spec("generator", host, port, {**logs, "RETRIEVER_URL": url_of(retriever_host, retriever_port)}),
        _spec("retriever", retriever_host, retriever_port, logs),
    )

    async def run() -> int:
        return await Pair(specs, JsonReporter() if json_logs else ConsoleReporter()).run()

    raise typer.Exit(asyncio.run(run()))


def _spec(name: "Service", host: str, port: int, settings: dict[str, str]) -> "ServiceSpec":
    """A service at this address; a log level of the environment is left as it is."""
    from services.supervisor.address import url_of
    from services.supervisor.child import ServiceSpec

    prefix = f"{name.upper()}_"
    env = {prefix + setting: value for setting, value in settings.items()}
    env[f"{prefix}LOG_LEVEL"] = os.environ.get(f"{prefix}LOG_LEVEL") or env[f"{prefix}LOG_LEVEL"]
    env |= {f"{prefix}HOST": host, f"{prefix}PORT": str(port)}
    command = (sys.executable, "-m", f"{name}_svc")
    return ServiceSpec(name, command, url_of(host, port), env, _stop_grace_s(prefix))


def _stop_grace_s(prefix: str) -> float:
    """Longer than the service itself waits; a value that it cannot read, the service refuses itself."""
    try:
        return float(os.environ[f"{prefix}DRAIN_TIMEOUT_S"]) + 15
    except (KeyError, ValueError):
        return 45.0
