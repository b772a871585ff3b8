"""``python -m shared.healthcheck http://127.0.0.1:8000/readyz``: the check of a container, where there is no curl.

Prints the answer, which `docker inspect` shows, and exits with 1 unless it is a success. The standard library alone, so
that it starts fast.
"""

import http.client
import sys
from urllib.parse import urlsplit

_TIMEOUT_S = 4.0
_SHOWN_BYTES = 2048


def check(url: str) -> int:
    """Get `url`, without a proxy; the exit code."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", address.path)
        response = connection.getresponse()
        print(response.read(_SHOWN_BYTES).decode(errors="replace"))  # noqa: T201  for `docker inspect`
    except (OSError, http.client.HTTPException) as error:
        print(f"{url} does not answer: {error}")  # noqa: T201
        return 1
    finally:
        connection.close()
    return 0 if response.status == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(check(sys.argv[1]))
