"""Ask an OpenAI-compatible server and write a file of its answers: ``eval.models[].answers``, ``data.responses``.

Each answer is written as it arrives. If it is started again, the command asks only for what the file lacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from typing_extensions import NotRequired, TypedDict

from esi_ds.artifacts import append_jsonl, jsonl, parse_jsonl, write_text_atomic
from esi_ds.config import Prompts
from esi_ds.config.checks import check_extra, check_numbers
from esi_ds.config.section import MAX_TIMEOUT_S
from esi_ds.data.benchmarks import source_of
from esi_ds.data.prompts import PromptSet, load_section
from esi_ds.data.rows import looks_like_file
from esi_ds.data.turns import Prompt
from esi_ds.errors import UserError, ends_with_message
from esi_ds.eval.asking import PENALTIES_OFF, ask_prompts, asked_of, check_served
from esi_ds.eval.endpoint import ONCE_IT_WORKS, Endpoint, Patience, Reply
from esi_ds.models import hub
from esi_ds.reading import check_regular, check_type, parse_json, reading
from esi_ds.terminal import clean_output, help_text
from esi_ds.words import counted

OUTPUT = "--output"


class PromptToAsk(TypedDict):
    """What identifies a row: the rows of equal questions would be the same."""

    prompt: Prompt
    goal: NotRequired[str]  # what an attack is after; with --goal or --behaviors
    sample: NotRequired[int]  # which of the prompt's answers, from 0; with --samples above 1


class AskedRow(PromptToAsk):
    """A line of the file. asked: what besides the prompt decides the answer; rows of one file agree in it."""

    response: str | None  # None where the endpoint refused the prompt, or replied without a text
    excluded: str | None  # why there is no response; None if there is one
    cut: bool  # whether the response ends at the longest length
    asked: dict[str, Any]  # model, max_tokens, system_prompt and, if there are any, seed and extra keys of the request


def questions_of(prompts: PromptSet, samples: int) -> list[PromptToAsk]:
    """The questions of a set: each prompt as often as it is to be answered, equal ones once."""
    questions: dict[str, PromptToAsk] = {}
    for index, prompt in enumerate(prompts.prompts):
        for sample in range(samples):
            question: PromptToAsk = {"prompt": prompt}
            if prompts.goals:
                question["goal"] = prompts.goals[index]
            if samples > 1:
                question["sample"] = sample
            questions.setdefault(_key(question), question)
    return list(questions.values())


def _key(question: PromptToAsk) -> str:
    return json.dumps([question["prompt"], question.get("goal"), question.get("sample", 0)])


def _seed_of(seed: int, question: PromptToAsk) -> int:
    """The seed that the server is sent with a question: 31 bits, so that samples differ and orders do not matter."""
    return int.from_bytes(hashlib.sha256(f"{seed} {_key(question)}".encode()).digest()[:4], "big") >> 1


def ask(
    endpoint: Endpoint,
    questions: list[PromptToAsk],
    output: Path,
    system_prompt: str | None = None,
    seed: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Fill ``output`` with an answer to every question.

    seed: of sampled answers; None: the server's own. Raises UserError where the file answers other questions, another
    model is served, or questions remain without an answer, which another start asks again. What was answered by then is
    kept.
    """
    with _only_one(output):
        _ask(endpoint, questions, output, system_prompt, seed, say)


@contextmanager
def _only_one(output: Path) -> Iterator[None]:
    """Raises UserError where another process fills the file: each would replace the answers of the other. A file system
    without locks cannot say so."""
    with reading(OUTPUT, output, "give a file in a folder that you may write to", "cannot be written"):
        lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                OUTPUT, str(output), "is being filled by another process", "wait for it, or give a new file"
            ) from None
        except OSError as error:  # filelock has another way for ENOSYS alone
            if error.errno not in hub.WITHOUT_LOCKS:
                raise
    try:
        yield
    finally:
        lock.release()


def _ask(
    endpoint: Endpoint,
    questions: list[PromptToAsk],
    output: Path,
    system_prompt: str | None,
    seed: int | None,
    say: Callable[[str], None],
) -> None:
    asked = asked_of(endpoint, system_prompt, seed)
    rows = {_key(row): row for row in _rows_on_disk(output, asked)}
    wanted = {_key(question): question for question in questions}
    if any(key not in rows for key in wanted):
        asked_for, endpoint = endpoint, check_served(endpoint, "--model", "--base-url")
        if endpoint != asked_for:
            say(f"{endpoint.model}: {PENALTIES_OFF}")
    # Where it has replied before, what it refuses now is the question's fault, even if all that are left are so.
    patience = Patience(was_alive=any(row["response"] is not None for row in rows.values()))
    last = ""

    def keep(index: int, reply: Reply) -> None:
        nonlocal last
        if not reply.is_alive:
            last = (reply.problem or "") if reply.num_requests else last
            return
        key = waiting[index]
        rows[key] = {
            **wanted[key],
            "response": reply.text and reply.text.encode("utf-8", "replace").decode(),  # half surrogate pairs
            "excluded": None if reply.text is not None else reply.problem,
            "cut": reply.is_cut,
            "asked": asked,
        }
        append_jsonl(output, [rows[key]])

    for _ in range(2):  # once more what it did not reply to, now that the others are answered
        waiting = [key for key in wanted if key not in rows]
        prompts = [wanted[key]["prompt"] for key in waiting]
        seeds = None if seed is None else [_seed_of(seed, wanted[key]) for key in waiting]
        ask_prompts(endpoint, prompts, system_prompt, keep, patience, "--model", seeds)
    kept = [rows[key] for key in wanted if key in rows]
    others = [row for key, row in rows.items() if key not in wanted]
    write_text_atomic(output, jsonl([*kept, *others]))  # in the order of the prompts, whenever each reply came
    num_cut, num_refused = sum(row["cut"] for row in kept), sum(row["response"] is None for row in kept)
    say(f"{output}: {len(kept)} of {counted(len(wanted), 'answer')}; {num_cut} cut at {endpoint.max_tokens} tokens, "
        f"{num_refused} without a response")  # fmt: skip
    if len(kept) < len(wanted):
        problem = f"has no answer to {counted(len(wanted) - len(kept), 'question')} (the last: {last})"
        raise UserError(OUTPUT, str(output), problem, f"start again {ONCE_IT_WORKS}: they will be asked again")


def _rows_on_disk(output: Path, asked: dict[str, Any]) -> list[AskedRow]:
    """The rows of an earlier start, without one that a kill cut short. Raises UserError for other rows."""
    if not output.exists():
        return []
    with reading(OUTPUT, output, "give a new file"):
        check_regular(output)
        data = output.read_bytes()
        whole, _, last = data.rpartition(b"\n")
        answers = parse_jsonl(whole)
        begun = last.strip(b"\0")  # by a kill; zeros are of a power cut
        if len(answers) < sum(bool(line.strip()) for line in whole.split(b"\n")) or begun[:1] not in (b"", b"{"):
            raise ValueError("it has lines that are not answers")
        rows = check_type([*answers, *parse_jsonl(last)], list[AskedRow])
    for row in rows:
        if row["asked"] != asked:
            problem = f"holds answers made with {json.dumps(row['asked'])}, not with {json.dumps(asked)}"
            raise UserError(OUTPUT, str(output), problem, "give a new file")
    if jsonl(rows).encode() != data:
        write_text_atomic(output, jsonl(rows))
    return rows


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog="esi-ds ask", description=help_text(__doc__))
    parser.add_argument(
        "--base-url", required=True, help="an OpenAI-compatible server, such as http://localhost:8000/v1"
    )
    parser.add_argument("--model", required=True, help="the model's name on the server")
    parser.add_argument("--replies-as", help="its name in the server's replies, if a gateway replies with another one")
    parser.add_argument("--prompts", required=True, help="a file, a hub id or a built-in set, as in data.prompts")
    parser.add_argument("--name", help="configuration of a hub data set (its default)")
    parser.add_argument("--split", help="split of a hub data set (train)")
    parser.add_argument("--column", default="auto", help="column that holds the prompts (auto)")
    parser.add_argument("--goal", help="column that holds the goals of attacks, as eval.prompts.goal")
    parser.add_argument("--behaviors", help="the CSV of HarmBench's behaviours, for a JSON of its test cases")
    parser.add_argument("--limit", type=int, help="how many prompts to take, from the start (all)")
    parser.add_argument("--system-prompt", help="system turn before every prompt, as model.system_prompt")
    parser.add_argument("--key-variable", help="environment variable with the key (default: none sent)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer, in tokens (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy (0)")
    parser.add_argument("--samples", type=int, default=1, help="answers per prompt, as eval.samples (1)")
    parser.add_argument("--seed", type=int, help="gives each sampled answer a seed of its own (none is sent)")
    parser.add_argument("--extra", default="{}", help="more keys of the request, as JSON: '{\"top_p\": 0.9}'")
    parser.add_argument("--concurrency", type=int, default=8, help="prompts asked at a time (8)")
    parser.add_argument("--request-timeout", type=float, default=60.0, help="seconds for one attempt (60)")
    parser.add_argument("--item-timeout", type=float, default=300.0, help="seconds for one prompt (300)")
    parser.add_argument("--max-attempts", type=int, default=5, help="attempts per prompt (5)")
    parser.add_argument(
        OUTPUT, type=Path, required=True, help="JSONL to write; prompts already answered in it are skipped"
    )
    return parser


def endpoint_of(arguments: argparse.Namespace) -> Endpoint:
    """The endpoint that the arguments name. Raises UserError."""
    limits: dict[str, Any] = {"extra": _extra_of(arguments), "replies_as": arguments.replies_as}
    for name in ("samples", "max_tokens", "concurrency", "request_timeout", "item_timeout", "max_attempts"):
        limits[name] = value = getattr(arguments, name)
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')}", value, "is not above 0", "give a larger number")
        if name.endswith("timeout") and not value <= MAX_TIMEOUT_S:
            remedy = f"give at most {MAX_TIMEOUT_S:,} seconds"
            raise UserError(f"--{name.replace('_', '-')}", value, "is too long", remedy)
    del limits["samples"]
    fields = "--base-url", "--key-variable"
    return Endpoint.at(arguments.model, arguments.base_url, arguments.key_variable, fields, **limits)


def _extra_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keys of the request's body beside those that every request has. Raises UserError."""
    with reading("--extra", arguments.extra, "give a JSON object, such as '{\"top_p\": 0.9}'", "is not one"):
        extra: dict[str, Any] = check_type(parse_json(arguments.extra), dict[str, Any])
    check_numbers(extra, "--extra")
    check_extra(extra, "--extra")
    temperature = arguments.temperature
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError("--temperature", temperature, "is not a number of 0 or more", "give one")
    if temperature and "temperature" in extra:
        raise UserError("--extra.temperature", extra["temperature"], "is set by --temperature", "give one of the two")
    if arguments.samples > 1 and not temperature and extra.get("temperature", 0) == 0:
        problem = "of greedy answers would all be the same"
        raise UserError("--samples", arguments.samples, problem, "give a --temperature above 0")
    if "seed" in extra and (arguments.seed is not None or (arguments.samples > 1 and extra["seed"] is not None)):
        raise UserError("--extra.seed", extra["seed"], "would be the seed of every answer", "give --seed instead")
    return {**extra, "temperature": temperature} if temperature else extra


def _prompts_of(arguments: argparse.Namespace) -> PromptSet:
    """The prompts that the arguments name. Raises UserError, which names an option, not a key of a config."""
    try:
        keys = ("name", "split", "column", "limit", "goal", "behaviors")
        section = Prompts(path=arguments.prompts, **{key: getattr(arguments, key) for key in keys})
        return load_section(section, "--prompts")
    except UserError as error:
        option = error.field.replace("--prompts.", "--").replace("--path", "--prompts")
        raise UserError(option, error.value, error.problem, error.remedy) from error


@clean_output()
@ends_with_message
def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    arguments = make_parser().parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError("--limit", arguments.limit, "is not above 0", "give a larger number, or leave it out")
    for option, path in (("--prompts", arguments.prompts), ("--behaviors", arguments.behaviors)):
        if (
            path is not None
            and looks_like_file(path)
            and arguments.output.resolve() == Path(path).expanduser().resolve()
        ):
            raise UserError(OUTPUT, str(arguments.output), f"is the file of {option}", "give a new file")
    endpoint = endpoint_of(arguments)
    if not looks_like_file(source := source_of(arguments.prompts)):
        hub.check_exists(source, "dataset", "--prompts")
    prompts = _prompts_of(arguments)
    print(f"{counted(len(prompts.prompts), 'prompt')}, {len(prompts.skipped)} skipped{prompts.note}")
    questions = questions_of(prompts, arguments.samples)
    ask(endpoint, questions, arguments.output, arguments.system_prompt, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
