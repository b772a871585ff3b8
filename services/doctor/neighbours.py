"""The services that run: reachable, ready, of one version, with clocks that agree."""

from collections.abc import Iterator

from services.client.calls import Service
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings
from services.doctor.visit import Visit
from shared.version import VERSION

_found = Findings("neighbours")

MOST_SKEW_S = 5.0
_SERVICES: tuple[Service, ...] = ("generator", "retriever")


def check(deployment: Deployment) -> Iterator[Finding]:
    visits = deployment.visits
    if not any(visit.ours for visit in visits.values()) and not (deployment.given_url or deployment.names_retriever):
        yield _found("note", "no service runs", "rag up starts both")
        return
    for service in _SERVICES:
        yield from _service(service, visits[service], deployment)
    yield from _versions([visit for visit in visits.values() if visit.ours])


def _service(service: Service, visit: Visit, deployment: Deployment) -> Iterator[Finding]:
    if not visit.ours:
        yield _absent(service, visit, deployment)
        return
    if visit.info is not None and visit.info.service != service:
        mend = f"correct {'--url' if service == 'generator' else 'GENERATOR_RETRIEVER_URL'}"
        yield _found("problem", f"at {visit.url} the {visit.info.service} answers, not the {service}", mend)
        return
    health = visit.health
    if health is not None and health.status != "ok":
        mend = "see the findings above and below, and the service's log"
        yield _found("problem", f"the {service} at {visit.url} is not ready: {'; '.join(health.reasons)}", mend)
    else:
        yield _found("ok", f"the {service} at {visit.url} is ready")
    if visit.skew_s is not None and abs(visit.skew_s) > MOST_SKEW_S:
        direction = "ahead of" if visit.skew_s > 0 else "behind"
        what = f"the clock of the {service} is {abs(visit.skew_s):.0f} s {direction} this machine's"
        mend = "run NTP on both (timedatectl set-ntp true): logs and traces of the two cannot be joined"
        yield _found("problem", what, mend)


def _absent(service: Service, visit: Visit, deployment: Deployment) -> Finding:
    what = f"the {service} at {visit.url} cannot be reached: {visit.why_not}"
    if service == "retriever":
        mend = "start it (python -m retriever_svc, or rag up for both); is GENERATOR_RETRIEVER_URL right?"
        return _found("problem", what, mend)
    mend = "start it (python -m generator_svc, or rag up for both), or name its address in --url"
    return _found("problem" if deployment.given_url else "note", what, mend)


def _versions(visits: list[Visit]) -> Iterator[Finding]:
    versions = {visit.info.service: visit.info.version for visit in visits if visit.info is not None}
    told = ", ".join(f"{service} {version}" for service, version in versions.items())
    if len(set(versions.values())) > 1:
        mend = "install the same version on both, the retriever first"
        yield _found("problem", f"the services are of two versions: {told}", mend)
    elif versions and set(versions.values()) != {VERSION}:
        yield _found("note", f"{told}; this command is of version {VERSION}")
