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
    """Show what both services run: versions, device, model, collections, every limit, and whether they are ready.

    **Examples**

    - `rag info`
    - `rag info --json | jq .generator.info.model.name`
    - `rag info --url http://10.0.0.5:8000 --retriever-url http://10.0.0.6:8001`
    """
    from services.cli.render import render_info

    with connect(url, api_key, retriever_url) as client:
        infos = [client.info("generator"), client.info("retriever")]
        health = [client.ready(service.service) for service in infos]
    if as_json:
        addresses = zip(infos, health, (url, retriever_url), strict=True)
        print_json({info.service: {"url": at, "health": ready, "info": info} for info, ready, at in addresses})
        return
    for service, ready, address in zip(infos, health, (url, retriever_url), strict=True):
        render_info(service, address, ready)
