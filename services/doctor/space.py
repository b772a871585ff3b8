"""Checkpoint and index: whether passages were embedded for the question encoder that searches among them."""

from collections.abc import Iterator

import httpx
from pydantic import ValidationError

from services.doctor.collections import current_manifests
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings
from services.doctor.probe import ProbeFailed, probe
from shared.schemas import CollectionList

_found = Findings("space")

_FINGERPRINT = """
import json, sys
from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity_error()
from generator_svc.checkpoint import load_checkpoint
from shared.errors import StartupError
try:
    print(json.dumps({"encoder": load_checkpoint(sys.argv[1]).encoder}))
except StartupError as error:
    print(json.dumps({"error": error.message}))
"""
_DEFAULT = "default"


def check(deployment: Deployment) -> Iterator[Finding]:
    indexes = _indexes(deployment)
    if not indexes:
        yield _found("skipped", "no collection can be seen from here: nothing to compare the checkpoint with")
        return
    found = _encoder(deployment)
    if isinstance(found, Finding):
        yield found
        return
    foreign = {name: encoder for name, encoder in indexes.items() if encoder != found}
    mend = (
        "serve the collection that was built for this checkpoint (RETRIEVER_DATA_DIR), build it anew with `rag index "
        "build --checkpoint`, or, if the two do share their space, set GENERATOR_INDEX_ENCODER"
    )
    for name, encoder in foreign.items():
        serious = name == _DEFAULT or len(foreign) == len(indexes)
        what = f"wrong index: {name} was made for the encoder {encoder}, the checkpoint searches with {found}"
        yield _found("problem" if serious else "note", what, mend)
    if len(foreign) < len(indexes):
        fitting = ", ".join(name for name in indexes if name not in foreign)
        yield _found("ok", f"{fitting}: made for the checkpoint's encoder {found}")


def _indexes(deployment: Deployment) -> dict[str, str]:
    """The encoder of each collection: of the retriever that runs, else of the data folder."""
    visit = deployment.visits["retriever"]
    if visit.ours:
        try:
            served = CollectionList.model_validate(visit.get("/v1/collections", visit.key).json())
            return {collection.name: collection.encoder for collection in served.collections}
        except (httpx.HTTPError, ValueError, ValidationError):
            return {}
    if deployment.retriever is None or "retriever" not in deployment.services:
        return {}
    return {name: manifest.encoder for name, manifest in current_manifests(deployment.retriever.data_dir).items()}


def _encoder(deployment: Deployment) -> str | Finding:
    """What an index must carry: of the generator that runs, else of the checkpoint, which is loaded for it."""
    visit = deployment.visits["generator"]
    if visit.info is not None and visit.info.model is not None:
        return str(visit.info.model["index_encoder"])
    settings = deployment.generator
    if settings is None or "generator" not in deployment.services:
        return _found("skipped", "no generator runs or is installed here: there is no checkpoint to compare with")
    if settings.index_encoder is not None:
        return settings.index_encoder
    try:
        read = probe(_FINGERPRINT, settings.checkpoint)
    except ProbeFailed as error:
        read = {"error": error.message}
    if "error" in read:
        return _found("problem", f"the checkpoint cannot be loaded: {read['error']}", "see the finding on its files")
    return str(read["encoder"])
