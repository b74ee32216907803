"""The command line, the same for every stage (docs/design.md §4). Help and config errors need no torch."""

from __future__ import annotations

import argparse
import difflib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from esi_ds import launch_environment
from esi_ds.config import load_config
from esi_ds.errors import Interrupted, UserError
from esi_ds.failures import explain, is_full
from esi_ds.launch_environment import LaunchEnvironment
from esi_ds.options import STAGES, Options
from esi_ds.terminal import ReaderGone, clean_output, let_go_of_closed_output

EXIT_USER, EXIT_INTERRUPTED, EXIT_FAILURE = 2, 75, 1
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # signals that end a process which has nothing to save
# How long a rank waits before it reports an error that others may have too: per local rank, and at most.
TURN_S, LONGEST_S = 5.0, 40.0


def positive(text: str) -> int:
    """Parse an argument that is a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def positive_size(text: str) -> float:
    """Parse an argument that is a size."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return size


def planned_ranks(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[int | None, int | None]:
    """(ranks, nodes) that a dry run plans for, None if unspecified. Exits with 2 if the options contradict."""
    options = {
        "--world-size": arguments.world_size,
        "--nodes": arguments.nodes,
        "--gpus-per-node": arguments.gpus_per_node,
        "--gpu-memory-gib": arguments.gpu_memory_gib,
        "--node-memory-gib": arguments.node_memory_gib,
    }
    present = [flag for flag, value in options.items() if value is not None]
    if present and not arguments.dry_run:
        parser.error(f"{present[0]} is for --dry-run; a run has the ranks that its launcher starts")
    ranks, nodes, per_node = (options[flag] for flag in ("--world-size", "--nodes", "--gpus-per-node"))
    if nodes is None and per_node is None:
        return ranks, None
    if nodes is None:
        nodes = 1 if ranks is None else max(1, ranks // per_node)
    if per_node is None:
        per_node = 8 if ranks is None else max(1, ranks // nodes)
    if ranks is not None and ranks != nodes * per_node:
        parser.error(f"--world-size {ranks} contradicts {nodes} nodes of {per_node} GPUs; give two of the three")
    return nodes * per_node, nodes


class Parser(argparse.ArgumentParser):
    """Says, where --config is missing, what may have been meant by it; help and errors come from rank 0 alone.

    words: the command line.
    """

    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        if (launch := _launch()).rank > 0:
            _let_others_report(launch.local_rank or 0, EXIT_USER)
            self.exit(EXIT_USER)
        if message.endswith("required: --config"):
            flags = difflib.get_close_matches("--config", [word for word in self.words if word.startswith("-")], n=1)
            files = [word for word in self.words if word.endswith((".yaml", ".yml")) and "=" not in word]
            message += f"; {flags[0]} is not an option" if flags else f"; write --config {files[0]}" if files else ""
        super().error(message)

    def print_help(self, file: Any = None) -> None:
        if _launch().rank == 0:
            super().print_help(file)


def _launch() -> LaunchEnvironment:
    """Which process this is; one alone where the launcher's variables contradict, as ``main`` says after parsing."""
    try:
        return launch_environment.read()
    except UserError:
        return launch_environment.ALONE


def make_parser(stage: str) -> Parser:
    """The stage's parser. ``--local_rank`` and ``--deepspeed``, which launchers and habit add, have no effect."""
    purpose = STAGES.get(stage, f"run {stage}")  # tests have stages of their own
    launcher = f"deepspeed --module esi_ds.launch.{stage} --config FILE"
    parser = Parser(
        prog=f"esi-ds {stage}",
        description=f"{purpose[0].upper()}{purpose[1:]}. If a run was stopped, the same command continues it.",
        epilog=f"For several ranks: {launcher}, or torchrun, srun or mpirun (docs/cluster.md).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change one key of the config (docs/configuration.md)"
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="experiment YAML, or a recipe's name (esi-ds recipes)"
    )
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed config to use instead of the key deepspeed"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, what would run and the bytes per rank; run nothing",
    )
    parser.add_argument("--world-size", type=positive, metavar="N", help="ranks that a dry run plans for")
    parser.add_argument(
        "--nodes",
        type=positive,
        metavar="N",
        help="nodes that a dry run plans for (without it, and without --world-size, one GPU)",
    )
    parser.add_argument("--gpus-per-node", type=positive, metavar="N", help="GPUs per node (8 with --nodes)")
    parser.add_argument("--gpu-memory-gib", type=positive_size, metavar="G", help="memory per GPU (80)")
    parser.add_argument("--node-memory-gib", type=positive_size, metavar="G", help="host memory per node (2048)")
    parser.add_argument("--verbose", action="store_true", help="print the output of every rank")
    parser.add_argument(
        "--allow-fingerprint-mismatch",
        action="store_true",
        help="accept a mask that was made from other weights of the same shapes",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser


def leave(code: int) -> NoReturn:
    """End the process now. A normal exit tears down threads of gloo and DeepSpeed in arbitrary order, and occasionally
    one of them aborts a run that has finished (exit code −6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_at_signals(code: int) -> None:
    """While there is nothing to save: let SIGTERM, SIGUSR1 and Ctrl-C end the process with ``code`` at once.

    This holds until they get other handlers (``stages.interrupt.listen``).

    Python runs handlers between two steps of the main thread, hence not while that imports torch or waits in C++ for
    other ranks. So a thread reads the signals' numbers from a pipe, into which Python writes them on arrival.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end, args=(reading, code), name="signals", daemon=True).start()
    for number in ENDING:  # last: until then the default handlers end the process
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background has no Ctrl-C
            signal.signal(number, _ignore)


def _ignore(*_: object) -> None:
    """The handler of signals that ``_end`` acts on."""


def _end(reading: int, code: int) -> None:
    while signal.getsignal(os.read(reading, 1)[0]) is not _ignore:
        pass  # another signal, or one that the stage handles by now
    with suppress(UserError):
        if code == EXIT_INTERRUPTED and launch_environment.read().rank == 0:
            os.write(2, b"interrupted: stopped by a signal before anything was done; start again\n")
    os._exit(code)


@clean_output()
def main(stage: str, argv: list[str] | None = None) -> int:
    """Run one stage; returns the process's exit code: 0, 2 (user's mistake), 75 (resumable) or 1 (anything else)."""
    if not faulthandler.is_enabled():  # what C++ aborts, NCCL's watchdog for one, leaves its Python stack on stderr
        faulthandler.enable(file=2)
    end_at_signals(EXIT_INTERRUPTED)
    parser = make_parser(stage)
    parser.words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_intermixed_args(argv)
    world_size, nodes = planned_ranks(parser, arguments)
    rank, local_rank, config = 0, 0, None
    try:
        launch = launch_environment.read()
        rank, local_rank = launch.rank, launch.local_rank or 0
        config = load_config(arguments.config, arguments.overrides, arguments.deepspeed_config)
        options = Options(
            dry_run=arguments.dry_run,
            world_size=world_size,
            nodes=nodes,
            gpu_memory_gib=arguments.gpu_memory_gib or Options.gpu_memory_gib,
            node_memory_gib=arguments.node_memory_gib or Options.node_memory_gib,
            verbose=arguments.verbose,
            allow_fingerprint_mismatch=arguments.allow_fingerprint_mismatch,
            launcher=launch_environment.launcher_processes(launch),
        )
        if rank > 0 and not options.verbose:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  only rank 0 prints
        if options.dry_run and rank > 0:
            return 0
        from esi_ds.stages import entry

        try:
            entry(stage)(config, options)
        except SystemExit as ended:  # of a library or a model's own code: the run is not done
            raise RuntimeError(f"something ended the process with exit code {ended.code}") from ended
    except UserError as error:
        if rank > 0:
            _let_others_report(local_rank, EXIT_USER)
        where = f" (rank {rank} on {socket.gethostname()})" if rank > 0 else ""
        print(f"error: {error}{where}", file=sys.stderr, flush=True)
        return EXIT_USER
    except Interrupted as error:
        if rank == 0:
            print(f"interrupted: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:  # a second Ctrl-C
        if rank == 0:
            print("\ninterrupted: what was saved is kept; start again to continue", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        if arguments.dry_run and isinstance(error, ReaderGone):  # `| head`
            raise
        if rank > 0 and is_full(error):
            _let_others_report(local_rank, EXIT_FAILURE)
        problem = explain(error, config.run.output_dir) if config is not None else None
        text = f"\n{traceback.format_exc()}" if problem is None or arguments.verbose else ""
        # On a new line, even if rank 0's progress bar is in the middle of one.
        print(f"\nrank {rank} failed: {problem or ''}{text}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    let_go_of_closed_output()
    return 0


def _let_others_report(local_rank: int, code: int) -> None:
    """Wait before reporting an error that other ranks may have too.

    Rank 0, and on other hosts the first rank, reports it and exits; the launcher then stops this rank during the wait.
    An error of this rank alone (its host lacks a file) is reported after the wait.
    """
    end_at_signals(code)  # srun reports the greatest exit code of all ranks: a death by SIGTERM would hide theirs
    time.sleep(min(TURN_S * (1 + local_rank), LONGEST_S))
