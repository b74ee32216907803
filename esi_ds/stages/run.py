"""What every stage's run has in common: the folder, the manifest's states, the model's fingerprint."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from torch.optim import Optimizer
from transformers import PreTrainedModel

from esi_ds import lock
from esi_ds.artifacts import RunFolder
from esi_ds.config import Config
from esi_ds.core.mask import Mask, metadata_sha256
from esi_ds.core.units import Parameter
from esi_ds.deepspeed_config import monitor_settings, resolve_deepspeed
from esi_ds.errors import Interrupted, UserError
from esi_ds.models.fingerprint import fingerprint, tensor_digests
from esi_ds.models.folder import ModelSource, checkpoint_folder
from esi_ds.options import Options
from esi_ds.stages.interrupt import listen
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel, load_sharded
from esi_ds.zero.monitor import open_monitors

CHECKPOINTS = "checkpoint"
Inputs = TypeVar("Inputs")


def check_mask_bits(mask: Mask, field: str) -> None:
    """Refuse a damaged mask. Every bit is read once, by one of the ranks. Two gathers."""
    problems = runtime.gather_objects(mask.problems(runtime.rank(), runtime.world_size()))
    found = [problem for part in problems for problem in part]
    if found:
        raise UserError(field, str(mask.path), f"is damaged ({found[0]})", "make the mask again")
    if len(set(runtime.gather_objects(metadata_sha256(mask)))) > 1:
        raise UserError(field, str(mask.path), "is another one on other hosts", "give one shared folder")


class StageRun(ABC, Generic[Inputs]):
    """One run of a stage on this rank; ``work`` does it.

    inputs: what the stage has prepared. source: paths and hashes of the data, for the manifest. tracker: open while
    ``work`` runs.
    """

    tracker: Tracker

    @property
    @abstractmethod
    def stage(self) -> str:
        """As in ``launch/<stage>.py``."""

    def __init__(
        self,
        config: Config,
        options: Options,
        inputs: Inputs,
        folder: RunFolder,
        deepspeed_config: dict[str, Any],
        source: dict[str, Any],
    ):
        self.config, self.options, self.inputs, self.folder = config, options, inputs, folder
        self.deepspeed_config, self.source = deepspeed_config, source
        self.started = time.time()
        self.fingerprint: str | None = None
        self.notes: dict[str, Any] = {}  # further facts for the manifest

    @classmethod
    def start(
        cls, stage: str, config: Config, options: Options, inputs: Inputs, folder: RunFolder, source: dict[str, Any]
    ) -> None:
        """Run a prepared stage to its end in the job's process group."""
        with runtime.process_group(config.run.collective_timeout_s, config.run.start_timeout_s):
            deepspeed_config = resolve_deepspeed(config, runtime.world_size(), stage)
            cls(config, options, inputs, folder, deepspeed_config, source).run()

    @abstractmethod
    def work(self) -> None:
        """Everything between an open folder and a finished run; must call ``begin`` once the model is loaded."""

    def run(self) -> None:
        if self._is_finished():
            return
        taken_over = self._lock()
        try:
            if not self._is_finished():  # another job may have ended while its lock was looked at
                self._run_locked(taken_over)
        finally:
            if runtime.is_main():
                lock.release(self.folder.path)

    def _is_finished(self) -> bool:
        """Whether there is nothing to do, which rank 0 then says. One broadcast."""
        finished = runtime.broadcast_object(self.folder.is_finished() if runtime.is_main() else None)
        if finished and runtime.is_main():
            print(f"{self.folder.path} is finished already; nothing to do")
        return finished

    def _lock(self) -> str | None:
        """The folder is this job's; what rank 0 is to say of it. Raises UserError on every rank. One broadcast."""
        found = None
        if runtime.is_main():
            try:
                self.folder.path.mkdir(parents=True, exist_ok=True)
                found = lock.acquire(self.folder.path)
            except UserError as error:
                found = error
        found = runtime.broadcast_object(found)
        if isinstance(found, UserError):
            raise found
        return found

    def _run_locked(self, taken_over: str | None) -> None:
        if runtime.is_main():
            self.folder.open(self.config)
        runtime.seed_everything(self.config.run.seed)
        tracker = self.tracker = Tracker(
            self.folder.path,
            enabled=runtime.is_main(),
            tensorboard=self.config.run.tensorboard,
            stage=self.stage,
            monitor=open_monitors(monitor_settings(self.config)),
        )

        listen(self.options.launcher)  # from here on a signal is noted, and the next boundary sees it
        with tracker:
            if taken_over:
                tracker.log(taken_over)
            if restarts := int(os.environ.get("SLURM_RESTART_COUNT", "0")):
                tracker.log(f"Slurm has started this job again, {restarts} times by now")
            try:
                self.work()
            except BaseException as error:
                if self.fingerprint is not None:  # else the run has not begun, and an older manifest stays
                    with suppress(OSError):  # a full disk: the first error is the one to tell
                        self.record("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
                if isinstance(error, Interrupted):  # every rank is here, and a launcher kills all when the first leaves
                    runtime.barrier()
                raise
            self.record("done")
            if runtime.is_main():
                shutil.rmtree(self.folder.path / CHECKPOINTS, ignore_errors=True)

    def load_model(self, make_optimizer: Callable[[PreTrainedModel], Optimizer] | None = None) -> ShardedModel:
        """``model`` of the config, cut over the ranks; see ``load_sharded``."""
        section = self.config.model
        return load_sharded(
            ModelSource.of(section), section.dtype, self.deepspeed_config, make_optimizer, roles=section.roles
        )

    def begin(self, model: ShardedModel) -> None:
        """Refuse to continue this folder's run with another model than it began with. Two collectives."""
        self.begin_with(self.model_fingerprint(ModelSource.of(self.config.model), model.parameters))

    def begin_with(self, found: str) -> None:
        """``begin`` where the fingerprint is known. One collective."""
        self.folder.check_same("model_fingerprint", found, "model.path")
        self.fingerprint = found
        runtime.barrier()  # nobody writes the manifest before everybody has read the old one
        self.record("running")

    def record(self, exit_state: str) -> None:
        """``manifest.json``; rank 0 writes it."""
        if runtime.is_main():
            self.folder.write_manifest(
                exit_state=exit_state,
                world_size=runtime.world_size(),
                started=self.started,
                model_fingerprint=self.fingerprint,
                data=self.source,
                notes=self.notes,
            )

    def model_fingerprint(self, source: ModelSource, parameters: Sequence[Parameter]) -> str:
        """The ranks share the reading of the files. One gather of names and digests."""
        folder = checkpoint_folder(source)
        digests: dict[str, str] = {}
        for part in runtime.gather_objects(tensor_digests(folder, runtime.rank(), runtime.world_size())):
            digests.update(part)
        return fingerprint(parameters, digests)
