"""What every worker that runs a list of cases does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esi_ds.cli import leave
from esi_ds.zero import runtime


def run_cases(run_case: Callable[[dict[str, Any]], None]) -> None:
    """Run each case of the JSON file named last on the command line, on all ranks; then end the process."""
    runtime.start()
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # see runtime: NaN where a row is masked whole
    for case in json.loads(Path(sys.argv[-1]).read_text()):
        run_case(case)
    runtime.stop()
    leave(0)
