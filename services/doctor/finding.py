"""What a check has to say."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

Status = Literal["ok", "note", "problem", "skipped"]
"""`note`: worth knowing, nothing to mend. `skipped`: could not be looked at here, and why."""


class Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    status: Status
    what: str
    mend: str | None = None


class Findings:
    """Makes the findings of one check."""

    def __init__(self, check: str) -> None:
        self.check = check

    def __call__(self, status: Status, what: str, mend: str | None = None) -> Finding:
        return Finding(check=self.check, status=status, what=what, mend=mend)


class Report(BaseModel):
    """`rag doctor --json`."""

    model_config = ConfigDict(frozen=True)

    version: str
    findings: list[Finding]

    @computed_field  # type: ignore[prop-decorator]  # pydantic's documented way
    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "problem"]
