"""The command `rag`. Its commands import what they need when they run, so that `rag --help` is instant."""

from services.cli.app import main

__all__ = ["main"]
