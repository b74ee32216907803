"""Answers of a model behind an OpenAI-compatible endpoint (vLLM, SGLang, a hosted one), greedy by default."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from esi_ds.data.turns import Prompt, Turn, with_system
from esi_ds.errors import UserError
from esi_ds.eval.endpoint import Endpoint, Patience, Reply, ask_all, served_models
from esi_ds.eval.rubric import broken_up

# What a hosted model's name may end with in its replies: the release that the alias stands for (gpt-4o-2024-08-06).
RELEASE = re.compile(r"-\d{4}(-?\d\d-?\d\d)?")


# Owners of models at servers that take what a request leaves out from the model's generation_config.json. A penalty on
# repetition (Qwen2.5's 1.05) changes most greedy answers.
TAKES_DEFAULTS = ("vllm", "sglang")
PENALTIES_OFF = "penalties that its server would take from the model's own defaults are switched off"
NO_PENALTIES = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


def check_served(endpoint: Endpoint, field: str, url_field: str | None = None) -> Endpoint:
    """The endpoint as it is to be asked: without the penalties of a model's own defaults, but for those of its extra.

    Raises UserError if the endpoint cannot be reached, or if the models that it lists lack this one and ``replies_as``
    is not given: gateways may list what is behind their own names. The error names ``field``, or ``url_field``, if
    given, for an endpoint that cannot be reached.
    """
    try:
        names = served_models(endpoint)
    except OSError as error:
        raise UserError(
            url_field or field, endpoint.url, f"cannot be reached ({error})", "start the server, or correct the URL"
        ) from error
    if names is not None and endpoint.model not in names and not endpoint.replies_as:
        shown = ", ".join([*names][:5]) + (" ..." if len(names) > 5 else "")
        problem = f"is not a model that {endpoint.url} serves: {shown}"
        remedy = "name one of them; if a gateway has a name of its own for one of them, give that one as replies_as"
        raise UserError(field, endpoint.model, problem, remedy)
    return _without_penalties(endpoint, names)


def without_penalties(endpoint: Endpoint) -> Endpoint:
    """As ``check_served``, without its checks: an endpoint whose models cannot be listed stays as it is."""
    try:
        return _without_penalties(endpoint, served_models(endpoint))
    except OSError:
        return endpoint


def _without_penalties(endpoint: Endpoint, owners: Mapping[str, str] | None) -> Endpoint:
    """owners: of the models that the endpoint lists."""
    if owners is None or owners.get(endpoint.model) not in TAKES_DEFAULTS:
        return endpoint
    return replace(endpoint, extra={**NO_PENALTIES, **endpoint.extra})


def is_same_model(asked: str, replied: str) -> bool:
    """Whether the name in a reply is that of the model asked, or of a dated release of it."""
    return replied == asked or (replied.startswith(asked) and RELEASE.fullmatch(replied[len(asked) :]) is not None)


def asked_of(endpoint: Endpoint, system_prompt: str | None, seed: int | None = None) -> dict[str, Any]:
    """What besides the prompt decides an answer, as rows record it. seed: of sampled answers, which have their own."""
    return {
        "model": endpoint.model,
        **({"replies_as": endpoint.replies_as} if endpoint.replies_as else {}),
        "max_tokens": endpoint.max_tokens,
        "system_prompt": system_prompt,
        **({"seed": seed} if seed is not None else {}),
        **({"extra": dict(endpoint.extra)} if endpoint.extra else {}),
    }


def messages_of(prompt: Prompt, system_prompt: str | None) -> list[Turn]:
    """The turns to send. A system turn of the prompt stands in place of ``system_prompt``.

    Turn marks inside a text are broken up: the server's tokenizer would end the turn at them.
    """
    turns = with_system(prompt, system_prompt)
    return [{"role": turn["role"], "content": broken_up(turn["content"])} for turn in turns]


def ask_prompts(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    system_prompt: str | None,
    on_reply: Callable[[int, Reply], None],
    patience: Patience,
    field: str,
    seeds: Sequence[int] | None,
) -> list[Reply]:
    """A reply to each prompt, in order; ``on_reply``, ``patience`` and ``seeds`` as in ``endpoint.ask_all``.

    Raises UserError naming ``field`` as soon as another model replies than the one named; no reply of it is passed on.
    """
    name = endpoint.replies_as or endpoint.model
    others: list[str] = []
    may_stop = patience.should_stop

    def take(index: int, reply: Reply) -> None:
        if reply.model is not None and not is_same_model(name, reply.model):
            others.append(reply.model)
        elif not others:
            on_reply(index, reply)

    patience.should_stop = lambda: bool(others) or may_stop()
    try:
        questions = [messages_of(prompt, system_prompt) for prompt in prompts]
        replies = ask_all(replace(endpoint, keeps_cut=True), questions, take, patience, seeds)
    finally:
        patience.should_stop = may_stop
    if others:
        key = "--replies-as" if field == "--model" else f"{field.removesuffix('model')}replies_as"
        problem = f"is not the model that replied at {endpoint.url}, which calls itself {others[0]}"
        remedy = f"name the model that is served there; if a gateway has a name of its own for this one, set {key}"
        raise UserError(field, endpoint.model, problem, remedy)
    return replies
