"""What the services run on: `make audit` looks for known vulnerabilities, `make sbom` writes the list (CycloneDX).

Both look at what is installed of the runtime dependencies, not at what could be. ``audit`` exits with 0 where no
advisory concerns any of them, 1 where one does, and 2 where the advisories could not be read: then nothing is known,
and that must not look like a pass.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "rag-services"
EXTRAS = frozenset({"retriever", "retriever-gpu", "generator"})
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


def runtime_versions() -> dict[str, str]:
    """The installed runtime dependencies of both services, direct and indirect, with their versions."""
    found: dict[str, str] = {}
    waiting = [(PROJECT, EXTRAS)]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError:  # of the other device: faiss-cpu where faiss-gpu is, and the reverse
            continue
        if name != PROJECT:
            found[name] = installed.version
        waiting += _required(installed, extras)
    return found


def _required(installed: Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    for line in installed.requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


@app.command()
def audit(
    service: Annotated[Literal["pypi", "osv"], typer.Option(help="Whose advisories are read.")] = "pypi",
) -> None:
    """Look each installed runtime dependency up in a list of advisories."""
    versions = runtime_versions()
    # A build such as 2.13.0+cpu has the advisories of the release that it is made of.
    lines = [f"{name}=={Version(version).public}" for name, version in sorted(versions.items())]
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text("\n".join(lines) + "\n")
        ran = subprocess.run(  # noqa: S603  our own interpreter
            [
                *(sys.executable, "-m", "pip_audit", "--requirement", str(pinned), "--no-deps", "--disable-pip"),
                *("--vulnerability-service", service, "--format", "json", "--progress-spinner", "off", "--strict"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        dependencies: list[dict[str, Any]] = json.loads(ran.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (
            ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else f"pip-audit exited with {ran.returncode}"
        )
        print(f"NOT AUDITED: the advisories of {service} cannot be read: {reason}", file=sys.stderr)
        raise typer.Exit(UNKNOWN) from None
    for dependency in dependencies:
        for advisory in dependency["vulns"]:
            mend = ", ".join(advisory["fix_versions"]) or "no release yet"
            print(f"{dependency['name']} {dependency['version']}: {advisory['id']}, mended in {mend}")
    if any(dependency["vulns"] for dependency in dependencies):
        raise typer.Exit(VULNERABLE)
    print(f"{len(dependencies)} runtime dependencies, no known vulnerability")


@app.command()
def sbom(path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("build/sbom.json")) -> None:
    """Write a CycloneDX bill of materials of the installed runtime dependencies, and validate it."""
    document = bill_of_materials()
    text = json.dumps(document, indent=2) + "\n"
    problem = JsonStrictValidator(SchemaVersion.from_version(document["specVersion"])).validate_str(text)
    if problem is not None:
        print(f"the document is not valid CycloneDX: {problem}", file=sys.stderr)
        raise typer.Exit(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(document['components'])} components, CycloneDX {document['specVersion']}, valid")


def bill_of_materials() -> dict[str, Any]:
    """What cyclonedx-py finds in this environment, without the tools of development."""
    ran = subprocess.run(  # noqa: S603  our own interpreter
        [
            *(sys.executable, "-m", "cyclonedx_py", "environment"),
            *("--output-reproducible", "--of", "JSON"),
            sys.executable,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    document: dict[str, Any] = json.loads(ran.stdout)
    wanted = {PROJECT, *runtime_versions()}
    document["components"] = [
        component for component in document["components"] if canonicalize_name(component["name"]) in wanted
    ]
    known = {component["bom-ref"] for component in document["components"]}
    document["dependencies"] = [
        {**entry, "dependsOn": sorted(set(entry.get("dependsOn", [])) & known)}
        for entry in document.get("dependencies", [])
        if entry["ref"] in known
    ]
    return document


if __name__ == "__main__":
    app()
