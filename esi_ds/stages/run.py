"""What the runs of all stages have in common: folder and lock, the states of the manifest, the model's fingerprint."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any, Generic, Literal, TypeVar

from torch.optim import Optimizer
from transformers import PreTrainedModel

from esi_ds import lock
from esi_ds.artifacts import (
    CHECKPOINTS,
    IDENTITY,
    MANIFEST,
    FileContent,
    RunFolder,
    contents_of,
    read_manifest,
    readable,
    result_sizes,
    run_id,
)
from esi_ds.config import Config, Esi, Eval
from esi_ds.config.needs import unread_of_eval
from esi_ds.core.mask import Mask, identity, refuse_problems, unread
from esi_ds.core.units import Parameter
from esi_ds.data.chat import read_template
from esi_ds.data.tokenizer_files import other_patterns
from esi_ds.deepspeed_config import ignored_sections, monitor_settings, resolve_deepspeed
from esi_ds.errors import Interrupted, UserError
from esi_ds.journal import unrecorded
from esi_ds.models import hub
from esi_ds.models.fingerprint import check_mask_weights, fingerprint, tensor_digests, weights_digest
from esi_ds.models.folder import (
    ModelSource,
    checkpoint_folder,
    dequantised,
    files_digest,
    load_model_config,
    rounded_from,
)
from esi_ds.models.meta import meta_parameters
from esi_ds.options import Options
from esi_ds.peers import PeerWatch, own_process
from esi_ds.reading import check_type, json_sha256, reading, share_of
from esi_ds.report.asked import asked_as
from esi_ds.report.contents import Report
from esi_ds.report.html import write_report
from esi_ds.stages.batch_sizes import KEY, BatchSize, GenerationBatch, changed_batch_sizes, generation_setting
from esi_ds.stages.begun import check_same_on_all_ranks
from esi_ds.stages.interrupt import listen
from esi_ds.status import progress_of, say_done
from esi_ds.tracking import Tracker
from esi_ds.versions import versions
from esi_ds.words import counted
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel, load_sharded
from esi_ds.zero.monitor import open_monitors
from esi_ds.zero.settings import check_settings

SOURCES = "source_digests"  # in the manifest
Inputs = TypeVar("Inputs")
AnyReport = TypeVar("AnyReport", bound=Report)


def check_mask_bits(mask: Mask, field: str) -> None:
    """Refuse a damaged mask, unless its bits have been checked already. The ranks share the reading of its bits, and
    all know their digests then, also of a mask that has none in its folder.

    field: the key of the config that names the mask. Raises UserError, on every rank. Collectives: one gather.
    """
    if mask.is_sound:
        return
    problems = mask.problems(runtime.rank(), runtime.world_size())
    gathered = runtime.gather_objects((problems, _seen_by_host(mask), mask.known_digests))
    refuse_problems(mask, [problem for part, _, _ in gathered for problem in part], field)
    if len({seen for _, seen, _ in gathered}) > 1:
        raise UserError(field, str(mask.path), "differs between hosts", "give one shared folder")
    for _, _, digests in gathered:
        mask.known_digests.update(digests)


def _seen_by_host(mask: Mask) -> tuple[str, ...]:
    """What hosts with one mask have in common: its identity. For a mask without digests, whose bits no host reads
    alone, it is the metadata and the bits of the smallest parameter with selected weights."""
    if mask.digests:
        return tuple(identity(mask).values())
    smallest = min((name for name in mask.names if mask.counts[name]), key=mask.numel, default=mask.names[0])
    with suppress(UserError):  # bits that cannot be read are among the problems
        return json_sha256(mask.metadata), mask.digest_of_bits(smallest)
    return ()


def chat_templates(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every ``chat_template`` of a config that is set, text or file, with its field."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from chat_templates(value, f"{prefix}{key}.")
        elif key == "chat_template" and value is not None:
            yield f"{prefix}{key}", value


def check_commits() -> None:
    """Raise UserError, on every rank, where hosts have found other commits of a model on the hub. One gather."""
    gathered = runtime.gather_objects(hub.commits())
    for name, commit in gathered[0].items():
        if others := {commits.get(name, commit) for commits in gathered} - {commit}:
            problem = f"is another commit on other hosts ({', '.join(sorted({commit, *others}))})"
            raise UserError("revision", name, problem, "name one of these commits as its revision")


def check_source(source: Mapping[str, Any]) -> None:
    """Raise UserError, on every rank, where ranks have read other data: each takes its own rows of one list.

    source: paths and hashes. One gather.
    """
    gathered = runtime.gather_objects(dict(source))
    for other in gathered[1:]:
        if keys := sorted(key for key in {*other, *gathered[0]} if other.get(key) != gathered[0].get(key)):
            problem = f"is {other.get(keys[0])} on one host and {gathered[0].get(keys[0])} on another"
            remedy = "give every host the same files; if a data set on the hub has changed in the meantime, start again"
            raise UserError("data", keys[0], problem, remedy)


class StageRun(ABC, Generic[Inputs]):
    """One run of a stage on this rank; ``work`` does it.

    inputs: what the stage has prepared. source: paths and hashes of the data, for the manifest. tracker: open while
    ``work`` runs.
    """

    tracker: Tracker

    @property
    @abstractmethod
    def stage(self) -> str:
        """The stage's name, as in ``launch/<stage>.py``."""

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
        self._fingerprint: str | None = None  # of the model, once it is known
        self.notes: dict[str, Any] = {}  # further facts for the manifest
        self.batch_sizes: dict[str, int] = {}  # that `auto` has chosen, by purpose
        self.source_digests: dict[str, str] = {}  # field of a model or judge → digest of its files
        self.phases: dict[str, float] = {}  # what this start's time went into → seconds

    @classmethod
    def start(
        cls, stage: str, config: Config, options: Options, inputs: Inputs, folder: RunFolder, source: dict[str, Any]
    ) -> None:
        """Run a prepared stage to its end in the job's process group."""
        group = runtime.process_group(config.run.collective_timeout_s, config.run.start_timeout_s)
        with readable(config.run.share), group:
            check_commits()
            check_same_on_all_ranks(config)
            check_source(source)
            deepspeed_config = resolve_deepspeed(config, runtime.world_size(), stage)
            check_settings(deepspeed_config)
            cls(config, options, inputs, folder, deepspeed_config, source).run()

    @cached_property
    def rounded_from(self) -> str | None:
        """As ``models.folder.rounded_from``, of ``model``: page and card say it."""
        return rounded_from(self.config.model)

    @property
    def versions(self) -> dict[str, str]:
        """What the run was computed with, for the page's table; the manifest has it too."""
        return {"versions": ", ".join(f"{name} {version}" for name, version in versions().items())}

    @cached_property
    def _earlier_s(self) -> float:
        """Seconds of the starts before this one: what the manifest says until this one writes it."""
        seconds = read_manifest(self.folder.path).get("wall_time_s")
        return seconds if isinstance(seconds, (int, float)) else 0.0

    @property
    def wall_time_s(self) -> float:
        """Seconds of this start and of those before it. Rank 0 alone, once the run has begun."""
        return self._earlier_s + time.time() - self.started

    @property
    def asked(self) -> dict[str, str]:
        """How the models are asked, for the page's table."""
        return asked_as(self.config.model, self.source_digests.get("model.chat_template"))

    @property
    def judge_sources(self) -> list[ModelSource]:
        """Where the judges come from whose weights the run reads."""
        return []

    @property
    def masks(self) -> dict[str, Mask]:
        """The masks that the run reads, by the key of the config that names them."""
        return {}

    @property
    def sources(self) -> list[ModelSource]:
        """Where the weights that the run reads come from."""
        return [ModelSource.of(self.config.model), *self.judge_sources]

    @abstractmethod
    def work(self) -> None:
        """Everything from the open folder to the written report; must call ``begin`` once the model is loaded."""

    def show(
        self,
        report: AnyReport,
        publish: Callable[[Tracker, AnyReport], None],
        closing_table: Callable[[AnyReport], str],
    ) -> None:
        """Write ``report.json`` and ``report.html``, ``publish`` the report, and log its closing table. Rank 0 only."""
        folder = self.folder.path
        write_report(folder, report)
        publish(self.tracker, report)
        self.tracker.log(closing_table(report))
        self.tracker.log(f"report: {folder / 'report.html'}")

    def run(self) -> None:
        """Do the work under the folder's lock, unless it is done already. Raises Interrupted and UserError."""
        self._check_masks()
        if self._is_finished():
            self._tidy_up()
            return
        taken_over = self._lock()
        try:
            if not self._is_finished():  # another job may have finished while this one waited for its lock
                self._run_locked(taken_over)
        finally:
            if runtime.is_main():
                lock.release(self.folder.path)

    def _check_masks(self) -> None:
        """Read the bits of masks without digests, and refuse any but those that this folder's run began with.

        Raises UserError, on every rank. Collectives: for each such mask that of ``check_mask_bits``, and a broadcast.
        """
        for field, mask in self.masks.items():
            if unread(mask):
                check_mask_bits(mask, field)
                self.source = {**self.source, **identity(mask)}
                runtime.from_main(partial(self.folder.check_same, "data_hashes", self.source, field))

    def _is_finished(self) -> bool:
        """Whether there is nothing left to do; rank 0 says so. Raises UserError, on every rank, where the folder is
        another stage's, results are no longer what they were, or models, judges or templates have changed: the results
        would be taken for theirs.

        Collectives: a broadcast; of a finished run also a gather, and those of ``_check_sources`` and
        ``known_fingerprint``.
        """

        def look() -> dict[str, FileContent] | None:
            self.folder.check_stage(self.stage)
            return self.folder.finished_results()

        results = runtime.from_main(look)
        if results is None:
            return False
        self._check_results(results)
        self._check_sources()
        self.check_models(self.known_fingerprint())
        if runtime.is_main():
            print(f"{self.folder.path} is finished already; nothing to do")
        return True

    def _check_results(self, stored: Mapping[str, FileContent]) -> None:
        """Raise UserError, on every rank, where results of a finished run are no longer what ``stored`` says. The ranks
        share the reading: scores of a large model take terabytes. One gather."""
        problem: UserError | None = None
        try:
            self.folder.check_results(stored, runtime.rank(), runtime.world_size())
        except UserError as error:
            problem = error
        runtime.raise_first(problem)

    def _read_results(self) -> dict[str, FileContent]:
        """The files that this run must hold now that it is done. The ranks share the reading. A broadcast, a gather."""
        path = self.folder.path
        sizes = runtime.from_main(partial(result_sizes, path))
        results = runtime.gather_dict(contents_of(path, share_of(sizes, runtime.rank(), runtime.world_size())))
        return {name: results[name] for name in sizes}

    def _lock(self) -> str | None:
        """Make the folder this job's. Returns a line for the log where the lock was taken over from another job.

        Raises UserError, on every rank, where another job holds it. One broadcast.
        """

        def acquire() -> str | None:
            self.folder.create(self.config.run.share)
            taken_over = lock.acquire(self.folder.path)
            if taken_over is not None:
                with suppress(UserError):  # a status that the dead job left half-written
                    progress = progress_of(self.folder.path)
                    taken_over += f"; it was last seen during {progress}" if progress else ""
            return taken_over

        return runtime.from_main(acquire)

    def _run_locked(self, taken_over: str | None) -> None:
        if runtime.is_main():
            self.folder.open(self.config)
            self.folder.identify()
        self.batch_sizes = runtime.from_main(self._recorded_batch_sizes)
        changed = runtime.from_main(partial(changed_batch_sizes, self.folder.path, self.config))
        runtime.seed_everything(self.config.run.seed)
        tracker = self.tracker = Tracker(
            self.folder.path,
            enabled=runtime.is_main(),
            tensorboard=self.config.run.tensorboard,
            stage=self.stage,
            monitor=open_monitors(monitor_settings(self.config, run_id(self.folder.path) or "")),
        )

        listen(self.options.launcher)  # from here on a signal is noted, and acted on at the next micro-batch
        ranks = runtime.gather_objects(own_process(runtime.rank()))
        with tracker, PeerWatch(runtime.rank(), ranks, self.folder.path):
            tracker.log(
                "rank 0: " + ", ".join(f"{name}: {value}" for name, value in runtime.compute_resources().items())
            )
            for line in ignored_sections(self.config, self.stage):
                tracker.log(line)
            if taken_over:
                tracker.log(taken_over)
            if earlier := read_manifest(self.folder.path).get("remarks"):  # what they are about is not done again
                tracker.remarks.append(str(earlier))
            if restarts := int(os.environ.get("SLURM_RESTART_COUNT", "0")):
                tracker.log(f"Slurm has started this job again ({counted(restarts, 'time')} so far)")
            for name in unrecorded(self.folder.path) if runtime.is_main() else ():
                tracker.log(f"{name}: has no record of its digest, as in earlier versions: it is taken as it is")
            of_models = (*dequantised(self.sources), *other_patterns(self.sources))
            for line in (*unread_of_eval(self.config, self.stage), *of_models, *changed):
                tracker.remark(line)
            self._check_sources()
            for line in hub.kept_commits():
                tracker.log(line)
            kept = self.folder.kept() if runtime.is_main() else {}
            try:
                self.work()
            except BaseException as error:
                if self._fingerprint is not None:  # else the run has not begun, and an older manifest stays
                    with suppress(OSError):  # a full disk: the first error is the one to report
                        self.record("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
                if isinstance(error, Interrupted):
                    in_vain = runtime.is_main() and self.folder.kept() == kept
                    runtime.barrier()  # every rank is here, and a launcher kills all when the first leaves
                    if in_vain:  # slurm/job.sh knows this by its last words
                        raise Interrupted(f"{error}; this start has kept nothing") from error
                raise
            self.record("done")
            if runtime.is_main():
                self._forget_restarts()

    def _tidy_up(self) -> None:
        """Remove what is left of a run that was killed once its manifest said done. Rank 0 does; no collectives."""
        path = self.folder.path
        if not runtime.is_main() or not any((path / name).exists() for name in (CHECKPOINTS, IDENTITY, lock.LOCK)):
            return
        with suppress(UserError, OSError):  # the job that did the run is about to remove it, or others own the folder
            lock.acquire(path)
            try:
                if read_manifest(path).get("exit_state") == "done":
                    self._forget_restarts()
                    say_done(path)
            finally:
                lock.release(path)

    def _forget_restarts(self) -> None:
        """Remove what only a start that goes on with the run would need."""
        shutil.rmtree(self.folder.path / CHECKPOINTS, ignore_errors=True)
        (self.folder.path / IDENTITY).unlink(missing_ok=True)

    def load_model(self, make_optimizer: Callable[[PreTrainedModel], Optimizer] | None = None) -> ShardedModel:
        """``model`` of the config, cut over the ranks; see ``load_sharded``."""
        section = self.config.model
        return load_sharded(
            ModelSource.of(section), section.dtype, self.deepspeed_config, make_optimizer, roles=section.roles
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's wall time on this rank under ``name``, for the manifest; several blocks add up."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - began

    def _recorded_batch_sizes(self) -> dict[str, int]:
        """What the manifest of the interrupted run says. Raises UserError where that is something else."""
        file = self.folder.path / MANIFEST
        with reading("run.output_dir", file, "delete it to go on without it"):
            return check_type(read_manifest(self.folder.path).get(KEY, {}), dict[str, int])

    def batch_size(self, setting: int | Literal["auto"], purpose: str) -> BatchSize:
        """A batch size of the config; what ``auto`` chooses goes into the manifest at once, and a number replaces what
        an earlier start chose. To be used once the run has begun. purpose: its key there."""
        if setting != "auto":
            self.batch_sizes.pop(purpose, None)
        return BatchSize(setting, purpose, self.batch_sizes, lambda: self.record("running"))

    def generation_batch(self, section: Esi | Eval, longest: int, purpose: str = "generation") -> GenerationBatch:
        """``generation_batch_size`` of a section. longest: tokens of the longest prompt."""
        setting = generation_setting(section.generation_batch_size, section.batch_size)
        return GenerationBatch(self.batch_size(setting, purpose), longest)

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint; known once the run has begun."""
        assert self._fingerprint is not None
        return self._fingerprint

    def begin(self, model: ShardedModel) -> None:
        """Refuse a model other than the one this folder's run began with; else the manifest says ``running``.

        Raises UserError. Collectives: one gather and one barrier.
        """
        self.begin_with(self.model_fingerprint(ModelSource.of(self.config.model), model.parameters))

    def known_fingerprint(self) -> str:
        """The model's fingerprint, from its files alone. One gather."""
        source = ModelSource.of(self.config.model)
        section = self.config.model
        parameters = meta_parameters(load_model_config(source), source, section.roles, section.dtype)
        return self.model_fingerprint(source, parameters)

    def check_models(self, fingerprint: str) -> None:
        """Raise UserError where the run in this folder began with other weights than those of ``fingerprint``."""
        self.folder.check_same("model_fingerprint", fingerprint, "model.path")

    def begin_with(self, fingerprint: str) -> None:
        """``begin`` with a known fingerprint. Raises UserError. One barrier."""
        self.check_models(fingerprint)
        self._fingerprint = fingerprint
        runtime.barrier()  # rank 0 must not write the manifest before every rank has read the old one
        if runtime.is_main():
            self.folder.write_config(self.config)
        self.record("running")

    def accept_mask(self, mask: Mask, field: str) -> bool:
        """Whether the mask was made from exactly this model's weights, which the manifest then says.

        Raises UserError naming ``field`` if not, unless ``--allow-fingerprint-mismatch`` is given.
        """
        same = check_mask_weights(mask, self.fingerprint, self.options.allow_fingerprint_mismatch, field)
        self.notes = {"mask_fingerprint": mask.fingerprint, "mask_made_from_these_weights": same}
        self.record("running")
        return same

    def record(self, exit_state: str) -> None:
        """Rank 0 writes ``manifest.json``. exit_state: running, done, interrupted or failed. Collectives: of ``done``
        those of ``_read_results``, of any other none."""
        results = self._read_results() if exit_state == "done" else None
        if runtime.is_main():
            self.folder.write_manifest(
                exit_state=exit_state,
                world_size=runtime.world_size(),
                started=self.started,
                earlier_s=self._earlier_s,
                model_fingerprint=self._fingerprint,
                data=self.source,
                notes={
                    "stage": self.stage,
                    **runtime.compute_resources(),
                    "hub_commits": hub.commits(),
                    "deepspeed": self.deepspeed_config,
                    **({"template_kwargs": values} if (values := self.config.model.template_kwargs) else {}),
                    SOURCES: self.source_digests,
                    **self.notes,
                    **({KEY: self.batch_sizes} if self.batch_sizes else {}),
                    "phases_s": {name: round(seconds, 3) for name, seconds in self.phases.items()},
                    **self.remarks,
                },
                results=results,
            )

    @property
    def remarks(self) -> dict[str, str]:
        """What the manifest and the report say besides; empty where nothing was unusual."""
        return {"remarks": "; ".join(self.tracker.remarks)} if self.tracker.remarks else {}

    def _check_sources(self) -> None:
        """Refuse files of models and judges other than those that this folder's run began with: its results would be
        partly those of another judge or chat template. Weights of the models have fingerprints of their own.

        Raises UserError. Collectives: a broadcast, and for each checkpoint of a judge those of ``_tensor_digests``.
        """
        digests = runtime.from_main(self._files_digests)
        checkpoints = {(judge.path, judge.revision): judge for judge in self.judge_sources}  # two may share one
        weights = {key: weights_digest(self._tensor_digests(judge)) for key, judge in checkpoints.items()}
        for judge in self.judge_sources:
            digests[judge.field] += ":" + weights[judge.path, judge.revision]
        self.folder.check_same(SOURCES, digests)
        self.source_digests = digests

    def _files_digests(self) -> dict[str, str]:
        """Field → digest of what it names, but for weights. Raises UserError."""
        templates = {
            field: hashlib.sha256(read_template(template, field).encode()).hexdigest()
            for field, template in chat_templates(self.config.model_dump())
        }
        return {**templates, **{source.field: files_digest(source.folder()) for source in self.sources}}

    def _tensor_digests(self, source: ModelSource) -> dict[str, str]:
        """Digest of every tensor of a checkpoint; the ranks share the reading. One gather."""
        with self.phase("hashing weights"):
            digests = tensor_digests(checkpoint_folder(source), runtime.rank(), runtime.world_size(), source.field)
            return runtime.gather_dict(digests)

    def model_fingerprint(self, source: ModelSource, parameters: Sequence[Parameter]) -> str:
        """Fingerprint of a model's weights and the shapes of its parameters. One gather."""
        return fingerprint(parameters, self._tensor_digests(source))
