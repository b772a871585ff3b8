"""Ports: free for a service, or taken, and by whom."""

import errno
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from services.client.calls import Service
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings
from services.doctor.visit import visit
from shared.settings import ServiceSettings

_found = Findings("ports")

_LISTENING = "0A"  # state in /proc/net/tcp


def check(deployment: Deployment) -> Iterator[Finding]:
    for service in sorted(deployment.services & deployment.settings.keys()):
        settings = deployment.settings[service]
        if settings.port:  # 0 takes a free one
            yield _port(service, settings, deployment)


def _port(service: Service, settings: ServiceSettings, deployment: Deployment) -> Finding:
    host, port, variable = settings.host, settings.port, f"{service.upper()}_PORT"
    where = f"port {port} on {host}"
    error = _why_not_bound(host, port)
    if error is None:
        return _found("ok", f"{where} is free for the {service}")
    if error.errno == errno.EACCES:
        what = f"{where} needs rights that this user does not have"
        return _found("problem", what, f"set {variable} to one above 1023")
    if error.errno != errno.EADDRINUSE:
        what = f"nothing can listen on {host}: {error.strerror or error}"
        return _found("problem", what, f"set {service.upper()}_HOST to an address of this machine, or 0.0.0.0")
    url = deployment.listens_at(service)
    there = deployment.visits[service] if deployment.visits[service].url == url else visit(url, [])
    if there.ours and (there.info is None or there.info.service == service):
        return _found("ok", f"a service of ours answers on {where}")
    holder = f"the {there.info.service} service" if there.info else _holder(port)
    what = f"{where} is taken by {holder}: the {service} cannot listen there"
    another = port + 10 if port + 10 < 2**16 else port - 10
    mend = f"stop it, or choose another port: {variable}={another}"
    return _found("problem", what, mend)


def _why_not_bound(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the services do
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return error
    return None


def _holder(port: int) -> str:
    """The process that listens there, where Linux tells: its own processes everyone may see."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        with suppress(OSError):
            if any(str(link.readlink()) in sockets for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return "another process"


def _inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]
