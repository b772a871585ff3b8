"""Structured logs: one event a line, as JSON or for people, on standard error; other libraries' too."""

import logging
import os
import sys
from typing import Any, Literal

import structlog
from structlog.typing import Processor

_QUIET = ("httpx", "httpcore", "uvicorn.access")  # a line a request each, which we write ourselves


def configure_logging(level: str, form: Literal["auto", "json", "console"]) -> None:
    """Called once by the process that serves; importing or creating an app changes no logging."""
    terminal = sys.stderr.isatty()
    if form == "auto":
        form = "console" if terminal else "json"
    enrich: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor]
    # Plain tracebacks: the default ones print local variables, and those hold questions and keys.
    if form == "json":
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        colors = terminal and not os.environ.get("NO_COLOR")
        render = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*enrich, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=enrich,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def current_request_id() -> str | None:
    """Of the request that is being answered here, for whom we call on its behalf."""
    bound: dict[str, Any] = structlog.contextvars.get_contextvars()
    return bound.get("request_id")
