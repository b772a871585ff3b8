"""Python and the packages: what is installed, and what this version needs."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version

from packaging.requirements import Requirement
from packaging.version import Version

from services.client.calls import Service
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings

_found = Findings("software")

_DISTRIBUTION = "rag-services"


def check(deployment: Deployment) -> Iterator[Finding]:
    try:
        about = metadata(_DISTRIBUTION)
    except PackageNotFoundError:
        what = f"{_DISTRIBUTION} runs from a folder that was never installed: what it needs is not known"
        yield _found("skipped", what, "pip install -e .")
        return
    yield _python(str(about["Requires-Python"] or ""))
    needed = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
    for service in sorted(deployment.services):
        yield _packages(service, needed)
    if not deployment.services:
        what = "neither service is installed here: only their addresses are looked at"
        mend = f"to run them here: pip install '{_DISTRIBUTION}[retriever,generator]'"
        yield _found("note", what, mend)


def _python(required: str) -> Finding:
    found = platform.python_version()
    if Version(found) in Requirement(f"python{required}").specifier:
        return _found("ok", f"Python {found}")
    what = f"Python {found}, and {required} is needed"
    return _found("problem", what, "make the virtual environment with a newer one")


def _packages(service: Service, needed: list[Requirement]) -> Finding:
    wrong, right = [], 0
    for requirement in needed:
        if requirement.marker is not None and not _applies(requirement, service):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            right += 1
        else:
            wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
    if not wrong:
        return _found("ok", f"{service}: {right} packages, as required")
    extra = _extra(service)
    mend = f"pip install --upgrade '{_DISTRIBUTION}[{extra}]'"
    return _found("problem", f"{service}: {'; '.join(wrong)}", mend)


def _applies(requirement: Requirement, service: Service) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": _extra(service)})


def _extra(service: Service) -> str:
    """The retriever's GPU extra has another faiss, under another name."""
    if service == "retriever" and _has("faiss-gpu") and not _has("faiss-cpu"):
        return "retriever-gpu"
    return service


def _has(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
