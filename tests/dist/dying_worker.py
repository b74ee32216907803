"""Run by the test beside it under a launcher, on two ranks. argv: the way in which rank 1 is lost, and a run's folder.

``abort``: from C, as NCCL's watchdog does, while rank 0 waits without an error, as in NCCL's collectives.
``hang``: rank 0 waits for it in the group that DeepSpeed has made for ZeRO-3.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from deepspeed.utils import groups

from esi_ds.cli import leave
from esi_ds.failures import explain
from esi_ds.peers import PeerWatch, own_process
from esi_ds.zero import runtime


def main() -> None:
    way, folder = sys.argv[-2:]
    with runtime.process_group(timeout_s=6):
        import torch

        group = groups._get_data_parallel_group()
        ranks = runtime.gather_objects(own_process(runtime.rank()))
        with PeerWatch(runtime.rank(), ranks, Path(folder)):
            torch.distributed.barrier(group)
            if way == "abort" and runtime.rank() == 1:
                os.abort()
            if way == "abort" or runtime.rank() == 1:
                time.sleep(120)
            try:
                torch.distributed.barrier(group)
            except RuntimeError as error:
                print(f"rank {runtime.rank()} failed: {explain(error, folder)}", file=sys.stderr, flush=True)
                leave(1)
    leave(0)


if __name__ == "__main__":
    main()
