"""Run by test_routing.py under a launcher: choices of every model's routers, to <kind>.safetensors and <kind>.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from esi_ds.cli import leave
from esi_ds.models.folder import ModelSource
from esi_ds.zero import runtime
from esi_ds.zero.engine import load_sharded
from esi_ds.zero.routing import drift, frequencies, routing_choices

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def main() -> None:
    folder = Path(sys.argv[-1])
    asked = json.loads((folder / "rows.json").read_text())
    runtime.start()
    for kind in asked["kinds"]:
        model = load_sharded(ModelSource(str(folder / kind)), "fp32", SETTINGS)
        choices = routing_choices(model, asked["rows"], 0, 2)
        again = routing_choices(model, asked["rows"], 0, 1)  # another batch size: the same tokens
        assert (choices is None) == (not runtime.is_main())
        if choices is not None:
            save_file(choices, folder / f"{kind}.safetensors")
            measured = {"frequencies": frequencies(choices, 5), "drift": drift(choices, again)}
            (folder / f"{kind}.json").write_text(json.dumps(measured))
    runtime.stop()
    leave(0)


if __name__ == "__main__":
    main()
