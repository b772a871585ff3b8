"""What a schema cannot say: which model is served. Loaded by schemathesis where SCHEMATHESIS_HOOKS names this file."""

import os
from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Most generated requests name the model that is there, so that they get further than a 404."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and not body["model"].endswith("0"):
        return {**body, "model": os.environ["SERVED_MODEL"]}
    return body
