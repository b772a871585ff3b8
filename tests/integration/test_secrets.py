"""Keys stay out of every log and every answer, whatever is done with them; seen on a real process."""

import socket

import httpx
import pytest

from tests.tiny_process import Start, start

__all__ = ["start"]
pytestmark = pytest.mark.slow
READER, ADMIN, NAMED, WRONG = "reader-key-7f3a", "admin-key-91bc", "named-key-55de", "wrong-key-0d2e"


def test_no_key_appears_in_a_log_or_in_an_answer(start: Start) -> None:
    service = start(TINY_API_KEY=READER, TINY_ADMIN_KEY=ADMIN, TINY_CLIENT_KEYS=f"web:{NAMED}", TINY_LOG_LEVEL="debug")
    answers = []
    with httpx.Client(base_url=service.url) as http:
        for key in (READER, ADMIN, NAMED, WRONG):
            headers = {"Authorization": f"Bearer {key}"}
            paths = ("/info", "/metrics", "/openapi.json", "/v1/items/1", "/v1/crash", "/nothing")
            answers += [http.get(path, headers=headers) for path in paths]
            answers.append(http.post("/v1/echo", json={"text": 1}, headers=headers))
            answers.append(http.delete("/v1/items/2", headers=headers))
            answers.append(http.get("/v1/items/1", headers={"Authorization": key}))
            answers.append(http.get("/v1/items/1", headers={"Authorization": f"Basic {key}"}))
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as broken:
        broken.sendall(f"GET / HTTP/1.1\r\nAuthorization: Bearer {ADMIN}\r\nno header at all\r\n\r\n".encode())
        said = broken.recv(65536).decode()
    service.process.terminate()
    service.process.wait(timeout=30)
    written = service.log_path.read_text() + said + "".join(f"{answer.headers}{answer.text}" for answer in answers)
    assert '"request_crashed"' in written
    assert "400 Bad Request" in said
    for key in (READER, ADMIN, NAMED, WRONG):
        assert key not in written
