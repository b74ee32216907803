"""Runs lm-eval's tasks. With harness_tasks.py and harness_output.py, the part of tasks.py that talks to lm-eval.

Only lm-eval's public interface is used: ``TaskManager``, ``Group``, ``simple_evaluate``, ``HFLM`` and the keys of a
task's definition. These modules are imported only when there are tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any
from unittest.mock import patch

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.core.batch import TokenRows, right_pad
from esi_ds.data.chat import TemplateCheck, TemplateRejection, break_up, check_shown, special_strings
from esi_ds.data.thought_rows import ThoughtTemplate
from esi_ds.data.thoughts import MARKS, Marks, decode_responses, final_answer, mark_ids, opening_in
from esi_ds.errors import Interrupted, UserError
from esi_ds.eval.harness_output import Document, DocumentCounts, document_of, results
from esi_ds.eval.harness_quiet import quiet, undescribed
from esi_ds.eval.harness_tasks import PreparedTask
from esi_ds.eval.task_code import sandboxed
from esi_ds.eval.task_result import TaskResult
from esi_ds.models.decoding import without_defaults
from esi_ds.models.rows import alike_up_to, difference_beside, generation_logits, probe_ids
from esi_ds.ranks import Ranks

AnswerRequests = Callable[[list[Instance], bool], list[Any]]  # requests, whether to hide the bar → answers
SLICE = 16  # batches of documents that a rank answers before it meets the others and checks whether to stop;
SLICE_TOKENS = 16 * 256  # fewer where they would wait for more than this many new tokens of a row


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Sequence[PreparedTask],
    *,
    end_ids: Collection[int],
    batch_size: int,
    seed: int,
    system_prompt: str | None = None,
    ranks: Ranks | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    marks: Marks = MARKS,
) -> list[TaskResult]:
    """Results in the order of ``prepared``, the same on every rank; every rank must call it.

    model: whole, on this rank's device. prepared: what ``prepare_tasks`` returns. end_ids: the tokens that end an
    answer. seed: of the draw of few-shot examples; lm-eval sets the global random states of python, numpy and torch
    to it.
    Where the tokenizer has a chat template, few-shot examples are turns of the chat, and ``system_prompt`` is the
    system's turn.
    ranks: the processes that share the documents; None: this one alone. should_stop: asked between two slices.
    marks: of thoughts. A task is given what stands outside of them, "" of a reply that ends within one.

    Log-likelihoods are summed in float32, whatever the weights' type. Rounding may depend on the number of ranks and
    on the batch size. Performs one gather per slice of a task's requests of one kind. A rank that fails makes every
    rank fail. Raises UserError for a chat template that rejects a turn or leaves it out, and Interrupted if a rank
    should stop; the task then has to start over.
    """
    task_results: list[TaskResult] = []
    is_chat, ranks = tokenizer.chat_template is not None, ranks or Ranks()
    if batch_size > 1 and any(ranks.gather(_depends_on_neighbours(model, tokenizer))):
        batch_size = 1
    with quiet(show=ranks.rank == 0), undescribed(), sandboxed():
        lm = SharedLM(model, tokenizer, end_ids, batch_size, is_chat, system_prompt, ranks, should_stop, marks)
        manager = TaskManager(include_defaults=False)  # otherwise lm-eval indexes all its tasks on every call
        for task in prepared:
            lm.begin(task)
            outcome = simple_evaluate(
                model=lm,
                tasks=[task.task],
                task_manager=manager,
                limit=task.config.limit,
                bootstrap_iters=1000,
                apply_chat_template=is_chat,
                system_instruction=system_prompt,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=task.config.trust_remote_code,
            )
            # lm-eval returns None on ranks whose LOCAL_RANK is not 0.
            task_results += ranks.gather(outcome and results(outcome, task, lm.counts, is_chat))[0]
    return task_results


def _depends_on_neighbours(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a request's answer would change, or might change, with the requests beside it. HFLM pads texts that it
    scores on the right, without a mask, and prompts on the left."""
    if alike_up_to(model.config) is not None:  # HFLM makes the batches: a long request may be in each
        return True
    pad = tokenizer.pad_token_id or 0

    def score(rows: TokenRows) -> list[Tensor]:
        with torch.no_grad():
            logits = model(right_pad(rows, pad, model.device)["input_ids"]).logits
        return [values[: len(row)] for values, row in zip(logits, rows, strict=True)]

    def generate(rows: TokenRows) -> Tensor:
        return generation_logits(model, rows, pad)

    ids = probe_ids(tokenizer)
    return not all(difference_beside(read, ids).is_rounding for read in (score, generate))


class SharedLM(HFLM):
    """lm-eval's transformers model, with the documents divided between the ranks.

    To lm-eval it is one process: ``rank`` 0 of 1. All requests of a document stay on one rank, where HFLM reads their
    common beginning once. Rows are data: special-token strings in them are broken up, as in every other prompt. Of a
    reply with thoughts the task is given the answer.

    end_ids: the tokens that end an answer. marks: of thoughts. counts: of the task that ``begin`` named.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        batch_size: int,
        is_chat: bool,
        system_prompt: str | None,
        ranks: Ranks,
        should_stop: Callable[[], bool],
        marks: Marks = MARKS,
    ):
        # HFLM ties the head again as the config says, even where the checkpoint has a head of its own beside it.
        with patch.object(model, "tie_weights", lambda: None):
            # A chat template writes the special tokens itself. A softmax in bf16 has three digits: choices would tie.
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype=torch.float32,
                add_bos_token=False if is_chat else None,
            )
        self.end_ids = end_ids
        self.ranks, self.should_stop = ranks, should_stop
        self.is_chat, self.system_prompt, self.specials = is_chat, system_prompt, special_strings(tokenizer)
        self.template_check = TemplateCheck(tokenizer)
        self.marks, self.special_marks = marks, mark_ids(tokenizer, marks)
        self.would_think = is_chat and ThoughtTemplate(tokenizer, marks).before_answer() != ""
        self.counts = DocumentCounts()

    def begin(self, task: PreparedTask) -> None:
        """Attribute the requests that follow to ``task``."""
        self.prepared, self.counts = task, DocumentCounts()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As HFLM's, but without taking out the system's turn (a task's description) where the template rejects it.

        Raises UserError for a template that rejects or leaves out a turn, or a part of its text.
        """
        if self.system_prompt == "" and chat_history[0]["role"] != "system":  # lm-eval writes no empty turn
            chat_history = [{"role": "system", "content": ""}, *chat_history]
        turns = [{**turn, "content": self._broken_up(turn["content"])} for turn in chat_history]
        try:
            self.template_check.check([turn["role"] for turn in turns], add_generation_prompt=add_generation_prompt)
            text = super().apply_chat_template(turns, add_generation_prompt)
            check_shown(turns, text)
        except TemplateRejection as error:
            remedy = "give a model.chat_template that shows every turn, or leave the task out"
            problem = f"{error} (in the chat that ends with {turns[-1]['content'][-60:]!r})"
            raise UserError(f"{self.prepared.field}.name", self.prepared.config.name, problem, remedy) from error
        return text

    def _broken_up(self, text: str) -> str:
        """The text as data, but for the config's system prompt at its beginning."""
        system_prompt = self.system_prompt or ""
        start = len(system_prompt) if text.startswith(system_prompt) else 0
        return text[:start] + break_up(text[start:], self.specials)[0]

    def _as_data(self, request: Instance) -> Instance:
        """The request with its texts broken up; the chat template has written the context's own special tokens."""
        context, *others = request.args
        if not self.is_chat or request.request_type == "loglikelihood_rolling":
            context = self._broken_up(context)
        if request.request_type == "loglikelihood":
            (continuation,) = others
            continuation = break_up(continuation, self.specials)[0]
            if break_up(context + continuation, self.specials)[1] > break_up(context, self.specials)[1]:
                continuation = f" {continuation}"  # a special token across the border
            others = [continuation]
        return dataclasses.replace(request, arguments=(context, *others))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        requests = [self._as_data(request) for request in requests]
        self._count_cut(requests, lambda request: (self.max_length + 1, "".join(request.args[:2])))
        if self.would_think:
            self.counts.without_thought.update(map(document_of, requests))
        return self._share(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        requests = [self._as_data(request) for request in requests]
        return self._share(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        requests = [self._as_data(request) for request in requests]
        for request in requests:
            num_new = self._num_new_tokens(request)
            if num_new >= self.max_length:
                problem = f"generates up to {num_new} tokens, but the model takes {self.max_length} with the prompt"
                raise UserError(self.prepared.field, self.prepared.config.name, problem, "leave the task out")
        self._count_cut(requests, lambda request: (self.max_length - self._num_new_tokens(request), request.args[0]))
        longest = max([1, *map(self._num_new_tokens, requests)])
        num_batches = max(1, min(SLICE, SLICE_TOKENS // longest))
        replies = self._share(super().generate_until, requests, disable_tqdm, num_batches)
        return [self._answer(request, reply) for request, reply in zip(requests, replies, strict=True)]

    def _answer(self, request: Instance, reply: str) -> str:
        """The reply outside of its thoughts; "" for one that ends within a thought, which is counted."""
        answer = final_answer(reply, opening_in(request.args[0], self.marks), self.marks)
        if answer is None:
            self.counts.unfinished.add(document_of(request))
        return answer or ""

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """As HFLM's, but keeps the marks of thoughts that are special tokens."""
        if skip_special_tokens and isinstance(tokens, list) and not self.special_marks.isdisjoint(tokens):
            return decode_responses(self.tokenizer, [tokens], self.marks)[0]
        return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """int64 [rows, tokens] from the settings of the task alone, not the model's defaults.

        What follows an end token is the tokenizer's end token, which no text shows; another one might show.
        """
        tokenizer = self.tokenizer
        with without_defaults(self.model, self.end_ids, tokenizer.pad_token_id):
            generated = super()._model_generate(context, max_length, stop, **settings)
        hidden = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        answers = generated[:, context.shape[1] :]  # a view: changed in place
        has_ended = torch.isin(answers, answers.new_tensor(sorted(self.end_ids))).cumsum(dim=1) > 0
        answers[has_ended] = hidden
        return generated

    def _num_new_tokens(self, request: Instance) -> int:
        """The length limit of a reply, under the first of lm-eval's names for it that the request uses."""
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        return int(next((request.args[1][name] for name in names if name in request.args[1]), self.max_gen_toks))

    def _count_cut(self, requests: list[Instance], read: Callable[[Instance], tuple[int, str]]) -> None:
        """Record documents whose beginning HFLM will drop. read: request → (number of tokens that fit, text)."""
        for request in requests:
            limit, text = read(request)
            # Every token is at least a byte, so a text of few bytes need not be tokenized.
            if len(text.encode()) > limit and len(self.tok_encode(text)) > limit:
                self.counts.cut.add(document_of(request))

    def _share(
        self, answer: AnswerRequests, requests: list[Instance], disable_tqdm: bool, num_batches: int | None = None
    ) -> list[Any]:
        """Answers to all requests, on every rank, one slice of documents after another. One gather per slice.

        num_batches: of documents in a slice; ``SLICE`` without it.
        """
        documents: dict[Document, int] = {}
        numbers = [documents.setdefault(document_of(request), len(documents)) for request in requests]
        stride = (num_batches or SLICE) * self.batch_size * self.ranks.size
        answers: dict[int, Any] = {}
        for start in range(0, len(documents), stride):
            mine = [
                index
                for index, document in enumerate(numbers)
                if start <= document < start + stride and document % self.ranks.size == self.ranks.rank
            ]
            slice_answers, must_stop = self._answer_slice(answer, requests, mine, disable_tqdm)
            answers |= slice_answers
            if must_stop and start + stride < len(documents):
                name = self.prepared.name
                raise Interrupted(f"stopped by a signal in task {name}; start again to run it from its beginning")
        return [answers[index] for index in range(len(requests))]

    def _answer_slice(
        self, answer: AnswerRequests, requests: list[Instance], mine: list[int], disable_tqdm: bool
    ) -> tuple[dict[int, Any], bool]:
        """Answers to every rank's share of a slice, by the request's index, and whether any rank should stop.

        mine: indices of this rank's requests. One gather. If one rank fails, all raise.
        """
        answers: list[Any] = []
        failure: Exception | None = None
        try:
            if mine:
                answers = answer([requests[number] for number in mine], disable_tqdm or self.ranks.rank != 0)
        except Exception as error:  # raised after the gather, in which the others wait
            failure = error
        problem = failure and f"{type(failure).__name__}: {failure}"
        everyone = self.ranks.gather((mine, answers, problem, self.should_stop()))
        if failure:
            raise failure
        for rank, (_, _, problem, _) in enumerate(everyone):
            if problem:
                raise RuntimeError(f"rank {rank} failed in {self.prepared.name}: {problem}")
        pairs = (pair for indices, values, _, _ in everyone for pair in zip(indices, values, strict=True))
        return dict(pairs), any(must_stop for *_, must_stop in everyone)
