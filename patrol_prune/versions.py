"""Of packages, as installed."""

from __future__ import annotations

from importlib import metadata


def version_of(package: str) -> str:
    """Its version; "not installed" of one that is imported from a bare checkout, say."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
