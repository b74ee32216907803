"""What a run was made with: versions of libraries, and the commit of this checkout."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("esi_ds", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of those ``PACKAGES`` that are installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """The checkout's commit; None for an installed package, which may lie inside another repository."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
