"""The command line, the same for every stage (docs/design.md §4). Help and config errors need no torch."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from esi_ds import launch_environment
from esi_ds.config import load_config
from esi_ds.errors import Interrupted, UserError
from esi_ds.failures import explain, is_full
from esi_ds.options import Options

EXIT_USER, EXIT_INTERRUPTED, EXIT_FAILURE = 2, 75, 1
TURN_S, LONGEST_S = 5.0, 40.0


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def positive_size(text: str) -> float:
    """An argument that is a size."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return size


def planned_ranks(made: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[int | None, int | None]:
    """(ranks, nodes) that a dry run plans for; None where nothing was said. Leaves with 2 where they contradict."""
    given = {
        "--world-size": arguments.world_size,
        "--nodes": arguments.nodes,
        "--gpus-per-node": arguments.gpus_per_node,
        "--gpu-memory-gib": arguments.gpu_memory_gib,
        "--node-memory-gib": arguments.node_memory_gib,
    }
    said = [flag for flag, value in given.items() if value is not None]
    if said and not arguments.dry_run:
        made.error(f"{said[0]} is for --dry-run; a run has the ranks that its launcher starts")
    ranks, nodes, per_node = (given[flag] for flag in ("--world-size", "--nodes", "--gpus-per-node"))
    if nodes is None and per_node is None:
        return ranks, None
    if nodes is None:
        nodes = 1 if ranks is None else max(1, ranks // per_node)
    if per_node is None:
        per_node = 8 if ranks is None else max(1, ranks // nodes)
    if ranks is not None and ranks != nodes * per_node:
        made.error(f"--world-size {ranks} contradicts {nodes} nodes of {per_node} GPUs; give two of the three")
    return nodes * per_node, nodes


def parser(stage: str) -> argparse.ArgumentParser:
    """``--local_rank`` and ``--deepspeed`` are what launchers and habits add; they change nothing."""
    made = argparse.ArgumentParser(prog=f"launch/{stage}.py", allow_abbrev=False)
    made.add_argument("overrides", nargs="*", metavar="key.path=value", help="change one key of the config")
    made.add_argument("--config", required=True, metavar="FILE", help="experiment YAML")
    made.add_argument("--deepspeed_config", metavar="FILE", help="replaces the config's deepspeed")
    made.add_argument("--dry-run", action="store_true", help="print the resolved config and what would run")
    made.add_argument("--world-size", type=positive, metavar="N", help="ranks to plan for in a dry run")
    made.add_argument("--nodes", type=positive, metavar="N", help="nodes to plan for in a dry run")
    made.add_argument("--gpus-per-node", type=positive, metavar="N", help="of each of them; default 8")
    made.add_argument("--gpu-memory-gib", type=positive_size, metavar="G", help="of each GPU; default 80")
    made.add_argument("--node-memory-gib", type=positive_size, metavar="G", help="of each node's host; default 2048")
    made.add_argument("--verbose", action="store_true", help="let every rank speak")
    made.add_argument(
        "--allow-fingerprint-mismatch",
        action="store_true",
        help="accept a mask made from other weights of the same shapes",
    )
    made.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    made.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return made


def leave(code: int) -> NoReturn:
    """End the process now. At the interpreter's own exit, threads of gloo and DeepSpeed are torn down in no order, and
    once in a while one of them aborts a run that has finished (seen as exit code −6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_at_signals(code: int) -> None:
    """For a time without anything to save: SIGTERM and SIGUSR1 end the process with ``code`` at once, until they are
    given other handlers (``stages.interrupt.listen``).

    Python runs handlers between two steps of the main thread: not while that imports torch, or waits in C++ for other
    ranks. So a thread reads the signals' numbers from a pipe, into which Python writes them when they come.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end, args=(reading, code), name="signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # last: before this they end the process without the thread
        signal.signal(number, _heard)


def _heard(*_: object) -> None:
    """The handler of a signal that ``_end`` answers."""


def _end(reading: int, code: int) -> None:
    while signal.getsignal(os.read(reading, 1)[0]) is not _heard:
        pass  # another signal, or one that the stage itself listens to by now
    with suppress(UserError):
        if code == EXIT_INTERRUPTED and launch_environment.read().rank == 0:
            os.write(2, b"interrupted: stopped by a signal before anything was done; start again\n")
    os._exit(code)


def main(stage: str, argv: list[str] | None = None) -> int:
    """Run one stage; returns the process's exit code: 0, 2 (user's mistake), 75 (resumable) or 1 (anything else)."""
    end_at_signals(EXIT_INTERRUPTED)
    made = parser(stage)
    arguments = made.parse_intermixed_args(argv)
    world_size, nodes = planned_ranks(made, arguments)
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
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  rank 0 speaks for all
        if options.dry_run and rank > 0:
            return 0
        from esi_ds.stages import entry

        entry(stage)(config, options)
    except UserError as error:
        if rank > 0:
            _let_others_speak(local_rank, EXIT_USER)
            error = f"{error} (rank {rank} on {socket.gethostname()})"
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER
    except Interrupted as error:
        if rank == 0:
            print(f"interrupted: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if rank > 0 and is_full(error):
            _let_others_speak(local_rank, EXIT_FAILURE)
        problem = explain(error, config.run.output_dir) if config is not None else None
        text = f"\n{traceback.format_exc()}" if problem is None or arguments.verbose else ""
        # A line of its own, also where rank 0's progress bar is in the middle of one.
        print(f"\nrank {rank} failed: {problem or ''}{text}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    return 0


def _let_others_speak(local_rank: int, code: int) -> None:
    """A mistake that all ranks see is told by rank 0, and on other hosts by the first rank; then it ends, and the
    launcher stops this one meanwhile. What only this rank sees (its host lacks a file) is told by it in its turn."""
    end_at_signals(code)  # srun reports the greatest of all ranks' codes: a death by SIGTERM would hide theirs
    time.sleep(min(TURN_S * (1 + local_rank), LONGEST_S))
