"""``python -m retriever_svc``: serve the collections of the data folder."""

import sys

from retriever_svc.app import create_app
from retriever_svc.settings import RetrieverSettings
from shared.errors import StartupError
from shared.server import serve
from shared.settings import load_settings


def main() -> int:
    try:
        settings = load_settings(RetrieverSettings)
    except StartupError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201  for the person who started it
        return error.exit_code
    return serve(create_app(settings), settings)


if __name__ == "__main__":
    sys.exit(main())
