"""``python -m generator_svc``: answer questions with the checkpoint of the settings."""

import sys

from transformers.utils import logging as transformers_logging

from generator_svc.app import create_app
from generator_svc.settings import GeneratorSettings
from shared.server import run


def main() -> int:
    # Progress bars and advice to programmers have no place between lines of JSON.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return run(GeneratorSettings, create_app)


if __name__ == "__main__":
    sys.exit(main())
