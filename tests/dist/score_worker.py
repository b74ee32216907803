"""Run by test_scores.py under a launcher: one process group scores many models, guards, batch sizes and estimators.

argv: a JSON list of cases {"name", "config" (mapping)}; each case writes <output_dir>/scores and <output_dir>/mask
through the stage itself, without report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from esi_ds.artifacts import RunFolder
from esi_ds.cli import Options
from esi_ds.config import validate
from esi_ds.core.mask import Mask
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.stages import finish
from esi_ds.stages.esi import EsiRun
from esi_ds.stages.prepare import prepare
from esi_ds.zero import runtime


def check_mask_reading(folder: Path, ranks: int) -> None:
    """Every rank reads its own part of the mask and nothing else; together the parts are the mask."""
    mask = Mask.load(folder / "mask")
    for name in mask.names:
        size = -(-mask.numel(name) // ranks)
        low = min(runtime.rank() * size, mask.numel(name))
        high = min(low + size, mask.numel(name))
        assert torch.equal(mask.bits(name, low, high), mask.bits(name)[low:high])


def main() -> None:
    runtime.start()
    finish.write_report = lambda *arguments: None  # pictures are tested elsewhere
    finish.publish = lambda *arguments: None
    for case in json.loads(Path(sys.argv[-1]).read_text()):
        config = validate(case["config"])
        folder = RunFolder(config.run.output_dir)
        EsiRun(config, Options(), prepare(config), folder, resolve_deepspeed(config, runtime.world_size())).run()
        check_mask_reading(folder.path, runtime.world_size())
    runtime.stop()


if __name__ == "__main__":
    main()
