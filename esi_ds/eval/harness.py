"""Running lm-eval's tasks; with harness_tasks.py and harness_output.py the part of tasks.py that talks to lm-eval.

lm-eval's public interface only: ``TaskManager``, ``Group``, ``simple_evaluate``, ``HFLM`` and the keys of a task's
definition. These modules are imported only where tasks are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.errors import Interrupted, UserError
from esi_ds.eval.harness_output import results
from esi_ds.eval.harness_quiet import quiet
from esi_ds.eval.harness_tasks import Prepared
from esi_ds.eval.task_result import TaskResult
from esi_ds.ranks import Ranks

SLICE = 16  # batches of documents a rank answers between two looks at whether to stop


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Sequence[Prepared],
    batch_size: int,
    seed: int,
    is_chat: bool,
    system_prompt: str | None,
    ranks: Ranks,
    should_stop: Callable[[], bool],
) -> list[TaskResult]:
    """See ``tasks.run_tasks_on``."""
    found: list[TaskResult] = []
    with quiet(show=ranks.rank == 0):
        lm = SharedLM(model, tokenizer, batch_size, is_chat, ranks, should_stop)
        manager = TaskManager(include_defaults=False)  # else lm-eval indexes all it has, once per call
        for item in prepared:
            lm.begin(item)
            outcome = simple_evaluate(
                model=lm,
                tasks=[item.task],
                task_manager=manager,
                limit=item.config.limit,
                bootstrap_iters=1000,
                apply_chat_template=is_chat,
                system_instruction=system_prompt,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            # lm-eval gives nothing to ranks whose LOCAL_RANK is not 0.
            found += ranks.gather(outcome and results(outcome, item, lm.cut, is_chat))[0]
    return found


class SharedLM(HFLM):
    """lm-eval's own model of transformers, whose requests are divided between the ranks, document by document.

    To lm-eval it is one process: ``rank`` 0 of 1. All requests of a document stay on one rank, where HFLM reads their
    common beginning once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        is_chat: bool,
        ranks: Ranks,
        should_stop: Callable[[], bool],
    ):
        # A chat template writes the special tokens itself. bf16's own softmax has three digits: choices would tie.
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            add_bos_token=False if is_chat else None,
        )
        self.ranks, self.should_stop = ranks, should_stop
        self.item: Prepared | None = None
        self.cut: dict[str, set[int]] = {}

    def begin(self, item: Prepared) -> None:
        """The requests that follow are this task's."""
        self.item, self.cut = item, {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._count_cut(requests, lambda request: (self.max_length + 1, "".join(request.args[:2])))
        return self._share(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._share(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            wanted = self._num_new_tokens(request)
            if wanted >= self.max_length:
                problem = f"generates up to {wanted} tokens, and the model takes {self.max_length} with the prompt"
                raise UserError(self.item.field, self.item.config.name, problem, "leave the task out")
        self._count_cut(requests, lambda request: (self.max_length - self._num_new_tokens(request), request.args[0]))
        return self._share(super().generate_until, requests, disable_tqdm)

    def _num_new_tokens(self, request: Instance) -> int:
        """Under the names that lm-eval takes for it, first come first served."""
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        return int(next((request.args[1][name] for name in names if name in request.args[1]), self.max_gen_toks))

    def _count_cut(self, requests: list[Instance], read: Callable[[Instance], tuple[int, str]]) -> None:
        """Documents of which HFLM will drop the beginning; read: from a request to (tokens that fit, text)."""
        for request in requests:
            limit, text = read(request)
            # Every token is a byte at least.
            if len(text.encode()) > limit and len(self.tok_encode(text)) > limit:
                self.cut.setdefault(request.task_name, set()).add(request.doc_id)

    def _share(self, answer: Callable, requests: list[Instance], disable_tqdm: bool) -> list[Any]:
        """Answers to all requests, on every rank; a slice of documents after the other. One gather a slice."""
        documents: dict[tuple[str, int], int] = {}
        places = [documents.setdefault((request.task_name, request.doc_id), len(documents)) for request in requests]
        stride = SLICE * self.batch_size * self.ranks.size
        placed: dict[int, Any] = {}
        for start in range(0, len(documents), stride):
            mine = [
                number
                for number, place in enumerate(places)
                if start <= place < start + stride and place % self.ranks.size == self.ranks.rank
            ]
            answers, is_told = self._answer_slice(answer, requests, mine, disable_tqdm)
            placed |= answers
            if is_told and start + stride < len(documents):
                raise Interrupted(f"stopped by a signal in task {self.item.config.name}; start again to begin it anew")
        return [placed[number] for number in range(len(requests))]

    def _answer_slice(
        self, answer: Callable, requests: list[Instance], mine: list[int], disable_tqdm: bool
    ) -> tuple[dict[int, Any], bool]:
        """(number of a request → answer, of every rank's ``mine``; whether a rank is told to stop). One gather.

        A rank's failure is every rank's.
        """
        answers, failure = [], None
        try:
            if mine:
                answers = answer([requests[number] for number in mine], disable_tqdm or self.ranks.rank != 0)
        except Exception as error:  # the others wait in the gather: they are told
            failure = error
        problem = failure and f"{type(failure).__name__}: {failure}"
        everyone = self.ranks.gather((mine, answers, problem, self.should_stop()))
        if failure:
            raise failure
        for rank, (_, _, problem, _) in enumerate(everyone):
            if problem:
                raise RuntimeError(f"rank {rank} failed in {self.item.config.name}: {problem}")
        pairs = (pair for numbers, values, _, _ in everyone for pair in zip(numbers, values, strict=True))
        return dict(pairs), any(is_told for *_, is_told in everyone)
