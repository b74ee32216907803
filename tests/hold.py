"""A job that stops at a moment its test names, so that the test need not catch the moment while the job runs.

As a script it does what ``launch/STAGE.py`` does, with a hold. Arguments: STAGE MOMENTS, then the launch script's own.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "ESI_DS_TEST_HOLD"


def install(moments: str) -> None:
    """Stop this process with SIGSTOP once at each of the moments. Only rank 0 is stopped, as it alone writes.

    moments: ``metrics.jsonl 3 7``: when a matching file has that many rows; ``*model*``: when a matching folder is
    created. Other ranks wait for it at their next collective.
    """
    from esi_ds import journal, tracking

    pattern, *counts = moments.split()
    waiting = [int(count) for count in counts]
    append, mkdir = tracking.append_jsonl, Path.mkdir

    def append_and_hold(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        append(path, rows)
        if waiting and fnmatch(path.name, pattern) and path.read_bytes().count(b"\n") >= waiting[0]:
            waiting.pop(0)
            os.kill(os.getpid(), signal.SIGSTOP)

    def mkdir_and_hold(path: Path, *arguments: Any, **options: Any) -> None:
        mkdir(path, *arguments, **options)
        if fnmatch(path.name, pattern):
            Path.mkdir = mkdir
            os.kill(os.getpid(), signal.SIGSTOP)

    if waiting:
        tracking.append_jsonl = journal.append_jsonl = append_and_hold
    else:
        Path.mkdir = mkdir_and_hold


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from esi_ds.cli import leave, main

    by_launcher = [word for word in sys.argv[1:] if word.startswith("--local_rank")]  # DeepSpeed's, before all others
    stage, moments, *arguments = sys.argv[1 + len(by_launcher) :]
    install(moments)
    leave(main(stage, [*by_launcher, *arguments]))
