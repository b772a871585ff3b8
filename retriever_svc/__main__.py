"""``python -m retriever_svc``: serve the collections of the data folder."""

import sys

from retriever_svc.app import create_app
from retriever_svc.settings import RetrieverSettings
from shared.server import run

if __name__ == "__main__":
    sys.exit(run(RetrieverSettings, create_app))
