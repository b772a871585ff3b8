"""`rag info`."""

# ruff: noqa: PLC0415  (imports inside commands: see services.cli)
from services.cli.options import (
    DEFAULT_RETRIEVER_URL,
    DEFAULT_URL,
    ApiKey,
    AsJson,
    RetrieverUrl,
    Url,
    connect,
    print_json,
)


def info(
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    retriever_url: RetrieverUrl = DEFAULT_RETRIEVER_URL,
    api_key: ApiKey = None,
) -> None:
    """Show what both services run: versions, device, model, collections, every limit, and whether they are ready."""
    from services.cli.render import render_info

    with connect(url, api_key, retriever_url) as client:
        infos = [client.info("generator"), client.info("retriever")]
        if as_json:
            print_json(*infos)
            return
        for service, address in zip(infos, (url, retriever_url), strict=True):
            render_info(service, address, client.ready(service.service))
