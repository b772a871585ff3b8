"""Builds the reference: the Python API with pdoc, and the OpenAPI file of each service.

python -m services.docs build/docs
"""

import json
import sys
from pathlib import Path

import pdoc

from generator_svc.app import create_app as create_generator
from generator_svc.settings import GeneratorSettings
from retriever_svc.app import create_app as create_retriever
from retriever_svc.settings import RetrieverSettings


def build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    apps = {
        "retriever": create_retriever(RetrieverSettings()),
        "generator": create_generator(GeneratorSettings()),
    }
    for name, app in apps.items():
        (folder / f"openapi-{name}.json").write_text(json.dumps(app.openapi(), indent=2) + "\n")
    pdoc.pdoc("shared", "retriever_svc", "generator_svc", "services", output_directory=folder)
    print(f"open {folder / 'index.html'}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
