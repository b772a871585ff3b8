"""``python -m generator_svc``: answer questions with the checkpoint of the settings."""

import sys

from transformers.utils import logging as transformers_logging

from generator_svc.app import create_app
from generator_svc.settings import GeneratorSettings
from shared.server import serve
from shared.settings import load_settings


def main() -> int:
    # Progress bars and advice to programmers have no place between lines of JSON.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    settings = load_settings(GeneratorSettings)
    return serve(create_app(settings), settings)


if __name__ == "__main__":
    sys.exit(main())
