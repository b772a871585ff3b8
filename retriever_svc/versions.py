"""Versions of the libraries that decide what a search returns: for manifests and ``/info``."""

import platform

import faiss
import lance
import numpy as np
import pyarrow as pa


def library_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "faiss": faiss.__version__,
        "lance": lance.__version__,
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
    }
