"""All checks, one after the other. A check that breaks is a finding, and stops no other."""

from collections.abc import Callable, Iterator
from types import ModuleType

from services.doctor import (
    accelerators,
    checkpoint,
    collections,
    disk,
    keys,
    neighbours,
    ports,
    software,
    space,
    variables,
)
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Report
from shared.version import VERSION

CHECKS: tuple[ModuleType, ...] = (
    software,
    accelerators,
    variables,
    keys,
    ports,
    disk,
    checkpoint,
    collections,
    neighbours,
    space,
)


def examine(deployment: Deployment) -> Report:
    findings = [finding for module in CHECKS for finding in _guarded(_name(module), module.check, deployment)]
    return Report(version=VERSION, findings=findings)


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _guarded(name: str, check: Callable[[Deployment], Iterator[Finding]], deployment: Deployment) -> Iterator[Finding]:
    try:
        yield from check(deployment)
    except Exception as error:  # noqa: BLE001  the others still have something to say
        what = f"the check broke: {type(error).__name__}: {error}"
        yield Finding(check=name, status="problem", what=what, mend="tell us, with the output of `rag doctor --json`")
