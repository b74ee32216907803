"""``reads: answer | trace | both``, and a user's own marks, wherever a response is read."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import byte_bpe_tokenizer, random_classifier, sentencepiece_tokenizer
from thinking import thinking_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from esi_ds.config import EvalClassifier, EvalGuard, EvalRubric, EvalWords, EvalYesNo, validate
from esi_ds.config.judges import Reads
from esi_ds.config.needs import require_esi
from esi_ds.data.answers import RecordedAnswer, RecordedAnswers
from esi_ds.data.chat import break_up, encode_prompt, special_strings
from esi_ds.data.prompts import PromptSet, QuestionSet
from esi_ds.data.thoughts import (
    MARKS,
    NO_THOUGHT,
    UNFINISHED,
    final_answer,
    judged_response,
    marks_with,
    parts,
    spans_in_text,
)
from esi_ds.errors import UserError
from esi_ds.eval.classifiers import SequenceJudge
from esi_ds.eval.endpoint import Reply
from esi_ds.eval.fluency import surprises
from esi_ds.eval.refusals import REFUSAL_LISTS, judge_by_words, refusal_list
from esi_ds.eval.rows import AnswerRow, VerdictRow, mark_unfinished
from esi_ds.eval.rubric import judge_by_rubric
from esi_ds.eval.tables import answer_measures
from esi_ds.eval.verdicts import NOTHING_SAID, Verdict, text_to_judge
from esi_ds.judge.alignment import alignment_weights
from esi_ds.judge.classifier import SequenceRule
from esi_ds.judge.families import FAMILIES
from esi_ds.judge.pairs import PairEncoder
from esi_ds.report.tuning import refusal_rows
from esi_ds.stages.esi.prepare import PromptData, PromptInputs, clean_responses, encode_examples, thoughts_note
from esi_ds.stages.evaluate import answering
from esi_ds.stages.evaluate.answering import add_recorded, has_text, thought_notes
from esi_ds.stages.evaluate.judging import judge_all
from esi_ds.stages.evaluate.ledgers import EvalLedgers
from esi_ds.stages.evaluate.prepare import Candidate, EvalInputs, PreparedWords, RecordedModel
from esi_ds.stages.served import answer_row
from esi_ds.stages.tune.work import answer_row as tuned_row

REFUSES, COMPLIES = "I'm sorry, but I can't help with that.", "Sure, here is how: step 1 ..."
OWN = ["[[ponder]]", "[[/ponder]]"]
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"
FORMS = {
    "think": "<think>\n{}\n</think>\n\n{}",
    "opened by the prompt": "{}\n</think>\n\n{}",
    "harmony": HARMONY,
    "bare harmony": "analysis{}assistantfinal{}",
}


@pytest.mark.parametrize("form", FORMS)
def test_each_reader_reads_its_part(form: str) -> None:
    response = FORMS[form].format(COMPLIES, REFUSES)
    assert text_to_judge(response) == text_to_judge(response, "answer") == REFUSES
    assert text_to_judge(response, "trace") == COMPLIES
    assert text_to_judge(response, "both") == f"{COMPLIES}\n\n{REFUSES}"


@pytest.mark.parametrize("reads", ["answer", "trace", "both"])
def test_what_is_not_there_is_not_judged(reads: Reads) -> None:
    for form in ("<think>{}", "<|channel|>analysis<|message|>{}"):
        assert text_to_judge(form.format(COMPLIES), reads) == Verdict.missing(UNFINISHED)
    thoughtless = Verdict.missing(NO_THOUGHT) if reads == "trace" else COMPLIES
    assert text_to_judge(COMPLIES, reads) == text_to_judge(f"<think>\n\n</think>\n\n{COMPLIES}", reads) == thoughtless
    assert text_to_judge(f"<think>{COMPLIES}</think>\n", reads) == (NOTHING_SAID if reads == "answer" else COMPLIES)


def test_several_thoughts_stand_where_they_were() -> None:
    response = "<think>a </think>One. <think>\nb</think>Two. <think> </think>Three."
    for reads, text in (
        ("answer", "One. Two. Three."),
        ("trace", "a\n\nb"),
        ("both", "a\n\nOne. \n\nb\n\nTwo. Three."),
    ):
        read = judged_response(response, parts(response), reads)
        assert read is not None and read.text == text
        characters = spans_in_text([(i, i + 1) for i in range(len(response))], read.pieces)
        for piece in read.pieces:
            inside = characters[piece.start : piece.end]
            shown = "".join(text[start:end] for start, end in inside)
            assert shown == response[piece.start : piece.end]
        outside = [c for i, c in enumerate(characters) if not any(p.start <= i < p.end for p in read.pieces)]
        assert all(start == end for start, end in outside)


def test_words_models_and_rubrics_read_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    response = f"<think>{COMPLIES}</think>{REFUSES}"
    words = REFUSAL_LISTS["xstest"]  # at the beginning
    for reads, unsafe in (("answer", False), ("trace", True), ("both", True)):
        assert judge_by_words([response], words, reads)[0].unsafe is unsafe
    tokenizer = byte_bpe_tokenizer()
    judge = SequenceJudge(
        random_classifier("llama", len(tokenizer)), tokenizer, SequenceRule("{prompt}:{response}", [1])
    )
    for reads, text in (("answer", REFUSES), ("trace", COMPLIES), ("both", f"{COMPLIES}\n\n{REFUSES}")):
        assert judge.encode("Why?", response, reads) == judge.encode("Why?", text) != judge.encode("Why?", "x")
        asked: list[Any] = []
        monkeypatch.setattr("esi_ds.eval.rubric.ask_all", lambda endpoint, texts, *rest, a=asked: a.extend(texts))
        judge_by_rubric([("Why?", response)], SimpleNamespace(), print, reads=reads)  # type: ignore[arg-type]
        assert f">\n{text}\n</reply" in asked[0]


def test_every_judge_of_the_config_may_say_what_it_reads() -> None:
    sections = (
        EvalWords(kind="words", reads="trace"),
        EvalRubric(kind="rubric", model="m", reads="trace"),
        EvalGuard(kind="guard", path="p", reads="trace"),
        EvalYesNo(kind="yes_no", path="p", template="{response}", reads="trace"),
        EvalClassifier(kind="classifier", path="p", template="{response}", reads="trace"),
    )
    assert all(section.reads == "trace" for section in sections)
    assert EvalWords(kind="words").reads == EvalRubric(kind="rubric", model="m").reads == "answer"


class Rows:
    """A ledger without a file, and a tracker that keeps its lines."""

    def __init__(self) -> None:
        self.rows: dict[Any, Any] = {}
        self.lines: list[str] = []
        self.log = self.lines.append

    def add(self, rows: Any) -> None:
        self.rows |= {tuple(row.get(key) for key in ("judge", "model", "set", "index")): row for row in rows}


def own(thought: str, answer: str | None) -> str:
    return f"{OWN[0]}{thought}" if answer is None else f"{OWN[0]}{thought}{OWN[1]}\n{answer}"


def recorded_rows(texts: list[str], marks: list[str] | None = OWN) -> list[AnswerRow]:
    prompts = tuple(f"p{number}" for number in range(len(texts)))
    sets = [QuestionSet(name, kind, PromptSet(prompts, "p", "f", ())) for name, kind in KINDS.items()]
    answers = {(name, n): RecordedAnswer(text, None) for name in KINDS for n, text in enumerate(texts)}
    model, rows = (
        RecordedModel("m", "base", RecordedAnswers("f", "0", answers, 0), "eval.models.0.answers", marks),
        Rows(),
    )
    add_recorded(model, sets, rows, rows)  # type: ignore[arg-type]
    return list(rows.rows.values())


KINDS = {"bad": "harmful", "good": "benign"}
TEXTS = [own(REFUSES, COMPLIES), own(COMPLIES, REFUSES), own(COMPLIES, None), own("no " * 100, COMPLIES)]


def test_a_user_s_marks_are_read_by_judges_and_tables() -> None:
    """From answers of a file to verdicts and measures; rows without them read as before."""
    rows = recorded_rows(TEXTS)
    assert [row["excluded"] for row in rows[:4]] == [None, None, UNFINISHED, None]
    assert all(row["thought_marks"] == OWN for row in rows) and all(row["response"] in TEXTS for row in rows)
    assert [has_text(row) for row in rows[:4]] == [True, True, False, True]
    verdicts = Rows()
    judges = [
        PreparedWords(reads, "f", EvalWords(kind="words", name=reads, reads=reads), refusal_list("xstest", "f"))
        for reads in ("answer", "trace")
    ]
    log = SimpleNamespace(log=lambda line: None)
    judge_all(judges, rows[:4], verdicts, None, {}, log)  # type: ignore[arg-type]
    unsafe = {(row["judge"], row["index"]): row["unsafe"] for row in verdicts.rows.values()}
    assert unsafe == {("answer", 0): True, ("answer", 1): False, ("answer", 3): True} | {
        ("trace", 0): False,
        ("trace", 1): True,
        ("trace", 3): True,
    }
    kept: dict[Any, VerdictRow] = verdicts.rows
    measures = answer_measures(rows, kept, {}, KINDS, ["answer"], REFUSAL_LISTS["xstest"])
    flags = {(row.measure, row.set): row.flags for row in measures}
    assert flags["attack_success", "bad"] == [True, False, None, True]
    assert flags["refused", "good"] == [False, True, None, False]
    assert flags["incoherent", "good"] == [False, False, None, False]
    assert all(row.reasons == {UNFINISHED: 1} for row in measures)
    assert all("thought_marks" not in row for row in recorded_rows(TEXTS, None))


def test_a_user_s_marks_in_what_models_generate_serve_and_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    row: AnswerRow = {"model": "m", "set": "s", "index": 0, "prompt": "p", "response": None, "excluded": None}
    served = [answer_row(row, Reply(text, None), OWN) for text in TEXTS]
    assert [new["excluded"] for new in served] == [None, None, UNFINISHED, None]
    assert served[0]["thought_marks"] == OWN and "thought_marks" not in answer_row(row, Reply("x", None))
    marks = marks_with(OWN)
    tuned = [tuned_row("harmful", 0, "p", REFUSES, text, None, marks) for text in TEXTS]
    assert [new["refused_after"] for new in tuned] == [False, True, None, False]
    (counts,) = refusal_rows([*tuned, tuned_row("harmful", 1, "p", REFUSES, own("x", ""), None, marks)], marks)
    assert (counts["refused_after"], counts["empty_after"], counts["unfinished_after"]) == (1, 1, 1)
    tokenizer = byte_bpe_tokenizer()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).eval()
    values = surprises(model, tokenizer, [("p", COMPLIES), ("p", TEXTS[0])], batch_size=1, marks=marks)
    assert values[0] == values[1] is not None

    rows, remarks = generated_rows(monkeypatch, TEXTS, OWN)
    assert all(row["asked"] == {"max_tokens": 3, "system_prompt": "s"} for row in rows)
    assert [row["excluded"] for row in rows] == [None, None, UNFINISHED, None]
    assert all(row["thought_marks"] == OWN for row in rows) and not remarks


def generated_rows(
    monkeypatch: pytest.MonkeyPatch, texts: list[str], pair: list[str] | None
) -> tuple[list[AnswerRow], list[str]]:
    """The rows of a model that generates these texts, and what is remarked."""

    def generate_all(model: Any, tokenizer: Any, ends: Any, ids: Any, done: Any, *, keep: Any, **named: Any) -> None:
        assert named["marks"] == marks_with(pair)
        keep(dict(enumerate(texts)))

    monkeypatch.setattr(answering, "generate_all", generate_all)
    ids = {("s", number): [1, 2] for number in range(len(texts))}
    config, tokenizer = LlamaConfig(max_position_embeddings=99), byte_bpe_tokenizer()
    candidate = SimpleNamespace(
        max_positions=99, prompt_ids=ids, tokenizer=tokenizer, end_ids={2}, thought_marks=pair, config=config
    )
    rows: list[AnswerRow] = []
    remarks: list[str] = []
    answers = SimpleNamespace(rows={}, key=lambda row: row["index"], add=rows.extend)
    sets = [QuestionSet("s", "harmful", PromptSet(("p",) * len(texts), "p", "f", ()))]
    raw = {"run": {"output_dir": "x"}, "model": {"path": "m", "system_prompt": "s"}}
    settings = validate({**raw, "eval": {"max_new_tokens": 3, "prompts": {"path": "p"}}})
    tracker = SimpleNamespace(remark=remarks.append)
    answering.answer_all(None, "m", candidate, sets, answers, settings, None, tracker)  # type: ignore[arg-type]
    return rows, remarks


DICTATED = (
    f"<reasoning>{COMPLIES}</reasoning>\n{REFUSES}",
    f"Sure. <thinking>{COMPLIES}</thinking>",
    f"1</think>{REFUSES}",
)


@pytest.mark.parametrize("dictated", DICTATED)
@pytest.mark.parametrize("origin", ["recorded", "served", "generated"])
def test_thoughts_that_an_attack_may_have_dictated_are_told_of(
    origin: str, dictated: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What stands within the marks is harmless to judges that read the answer; a model that thinks does so mostly."""

    def remarks(texts: list[str], reads: Reads = "answer", thinks: bool = True) -> list[str]:
        if origin == "recorded":
            rows = recorded_rows(texts, None)
        elif origin == "served":
            blank: AnswerRow = {
                "model": "m",
                "set": "bad",
                "index": 0,
                "prompt": "p",
                "response": None,
                "excluded": None,
            }
            rows = [answer_row({**blank, "index": n}, Reply(text, None)) for n, text in enumerate(texts)]
        else:
            rows = [{**row, "set": "bad"} for row in generated_rows(monkeypatch, texts, None)[0]]
        rows = [row for row in rows if row["set"] == "bad"]
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        ledgers = EvalLedgers.open(folder)
        ledgers.answers.add(rows)
        section = EvalWords(kind="words", name="w", reads=reads)
        judges = [PreparedWords("w", "f", section, refusal_list("xstest", "f"))]
        sets = [QuestionSet("bad", "harmful", PromptSet(("p",) * len(rows), "p", "f", ()))]
        inputs = SimpleNamespace(
            sets=sets,
            section=SimpleNamespace(samples=1),
            harmful_sets={"bad"},
            judges=judges,
            thinks=lambda name: thinks,
        )
        lines: list[str] = []
        tracker = SimpleNamespace(remark=lines.append, log=lambda line: None)
        ledgers.judge(["m"], inputs, None, {}, tracker)  # type: ignore[arg-type]
        return lines

    thought = f"<think>{COMPLIES}</think>{REFUSES}"
    (remark,) = remarks([COMPLIES] * 3 + [dictated])
    assert remark.startswith("1 of the 4 answers of m hold text within the marks of a thought")
    assert "most of them hold none" in remark and "an attack may have dictated the marks" in remark
    assert remarks([thought] * 4) == remarks([thought] * 3 + [dictated]) == remarks([COMPLIES] * 4, thinks=False) == []
    (remark,) = remarks([dictated] * 4, thinks=False)
    assert remark.startswith("all 4 answers of m") and "chat template knows of no thoughts" in remark
    assert remarks([dictated] * 4, "both", thinks=False) == []
    assert remarks([f"<think>\n\n</think>\n\n{REFUSES}"] * 4, thinks=False) == []


def test_who_thinks() -> None:
    """By the chat template, or because the config names the marks; of models elsewhere nothing is known."""
    tokenizer, knows = byte_bpe_tokenizer(), thinking_tokenizer("qwen3")

    def candidate(name: str, tokenizer: Any, marks: list[str] | None = None) -> Candidate:
        return Candidate(name, None, None, None, tokenizer, frozenset(), {}, (), marks)  # type: ignore[arg-type]

    models = [candidate("base", tokenizer), candidate("qwen", knows), candidate("own", tokenizer, OWN)]
    elsewhere = RecordedModel("file", "base", RecordedAnswers("f", "0", {}, 0), "f")
    inputs = EvalInputs(None, [], [*models, elsewhere], [], [], {})  # type: ignore[arg-type]
    names = ("base", "qwen", "own", "file", "top 0.01, noise 1, seed 0")
    assert [inputs.thinks(name) for name in names] == [False, True, True, True, False]


@pytest.mark.parametrize("dictated", DICTATED)
def test_esi_tells_of_thoughts_that_an_attack_may_have_dictated(dictated: str) -> None:
    tokenizer = byte_bpe_tokenizer()
    responses = [COMPLIES, COMPLIES, dictated, ""]
    judge = SimpleNamespace()
    data = PromptData([], responses, {}, [])
    inputs = PromptInputs(LlamaConfig(), tokenizer, frozenset(), judge, data, ())  # type: ignore[arg-type]
    for marks, words in ((MARKS, "chat template knows of no thoughts"), (marks_with(OWN), "most of them hold none")):
        inputs = replace(inputs, marks=marks)
        cleaned = clean_responses(inputs, [[1]] * 4, responses)[0]
        note = thoughts_note(inputs, cleaned)
        assert note is not None and note.startswith("1 of the 3 responses hold") and words in note
        assert ("model.thought_marks" in note) is (marks == MARKS)  # which would name them
        assert thoughts_note(inputs, cleaned[:2]) is None
        assert thoughts_note(replace(inputs, reads="both"), cleaned) is None


def test_an_answer_cut_within_a_thought_that_its_prompt_opened_is_unfinished() -> None:
    """As of a server without a reasoning parser: the other answers tell that the prompt opens a thought."""
    closes, cut = f"{COMPLIES}</think>{REFUSES}", "They ask me to"
    for others, unfinished in (([closes], True), ([COMPLIES], False), ([f"<think>x</think>{COMPLIES}"], False)):
        rows = recorded_rows([cut, *others, cut], None)
        for row in rows:
            if row["index"] == 0:
                row["cut"] = True
        mark_unfinished(rows)
        excluded = {row["index"]: row["excluded"] for row in rows}
        assert excluded == {0: UNFINISHED if unfinished else None, 1: None, 2: None}
    rows = recorded_rows([cut, f"{COMPLIES}{OWN[1]}{REFUSES}"])
    rows[0]["cut"] = True
    rows.append({**rows[0], "model": "another", "excluded": None})
    mark_unfinished(rows)
    assert rows[0]["excluded"] == UNFINISHED and rows[-1]["excluded"] is None


@pytest.mark.parametrize("form", ["<think>{}</think>\n\n", "{}</think>\n", HARMONY.removesuffix("{}")])
def test_an_answer_cut_right_behind_its_thought_is_unfinished(form: str) -> None:
    """As the same reply is where the server gives the thought apart."""
    response = form.format(COMPLIES)
    rows = [{**row, "cut": is_cut} for row in recorded_rows([response], None)[:1] for is_cut in (True, False)]
    blank: AnswerRow = {"model": "m", "set": "s", "index": 0, "prompt": "p", "response": None, "excluded": None}
    rows += [answer_row(blank, Reply(response, None, is_cut=is_cut)) for is_cut in (True, False)]
    mark_unfinished(rows)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "<|assistant|>")
    candidate = SimpleNamespace(tokenizer=tokenizer, thought_marks=None)
    for is_cut in (True, False):
        rows.append(blank.copy())
        answering.fill_row(rows[-1], response, candidate, [1], is_cut)  # type: ignore[arg-type]
    assert [row["excluded"] for row in rows] == [UNFINISHED, None] * 3
    assert text_to_judge(response) == NOTHING_SAID
    empty = {**blank, "response": "", "cut": True}
    mark_unfinished([empty])
    assert empty["excluded"] is None


def test_a_thought_that_its_prompt_opened_and_that_speaks_of_marks_is_not_the_answer() -> None:
    """Who reads the row later does not know what the prompt opened: the row says it where it matters."""
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "<|assistant|><think>\n")
    candidate = SimpleNamespace(tokenizer=tokenizer, thought_marks=None)
    harmful = "They want <reasoning> tags: plan harm </reasoning> step 1.</think>\n\nI cannot help with that."
    for response, kept in ((harmful, f"<think>{harmful}"), ("I plan.</think>\n\nNo.", "I plan.</think>\n\nNo.")):
        row = {"response": None, "excluded": None}
        answering.fill_row(row, response, candidate, [1])
        assert row == {"response": kept, "excluded": None}
        assert final_answer(row["response"], None) in ("I cannot help with that.", "No.")
    row = {"response": None, "excluded": None}
    answering.fill_row(row, "I plan", candidate, [1])
    assert row["excluded"] == UNFINISHED


def test_answers_that_were_all_cut_without_marks_are_told_of() -> None:
    """A server that opens thoughts in the prompt and cuts every one leaves no sign of it."""
    rows = [{"model": "served", "response": "I plan", "cut": True, "excluded": None} for _ in range(2)]
    (note,) = thought_notes(rows)
    assert "all 2 answers of served were cut" in note and "eval.max_new_tokens" in note
    assert not thought_notes([rows[0], {**rows[1], "cut": False}])


def test_marks_that_never_close_or_never_stand_are_said_once() -> None:
    unclosed = recorded_rows([own(COMPLIES, None)] * 3)
    assert thought_notes(unclosed) == [
        "all 6 answers of m are unfinished: they end within a thought; raise eval.max_new_tokens, or see "
        "model.thought_marks",
        "no answer of m holds [[/ponder]] of model.thought_marks",
    ]
    assert thought_notes(recorded_rows(TEXTS)) == ["2 of the 8 answers of m are unfinished: they end within a thought"]
    (note,) = thought_notes(recorded_rows([COMPLIES]))
    assert note == "no answer of m holds [[ponder]] or [[/ponder]] of model.thought_marks"
    assert thought_notes(recorded_rows([COMPLIES, f"<think>x</think>{COMPLIES}"], None)) == []
    assert OWN[0] not in dict(MARKS)


@pytest.mark.parametrize("reads", ["answer", "trace", "both"])
@pytest.mark.parametrize("form", [*FORMS, "own"])
@pytest.mark.parametrize("through", [False, True])
def test_esi_s_judge_reads_what_an_evaluation_s_reads(form: str, reads: Reads, through: bool) -> None:
    """Thoughts with marks and special-token strings in them; a thought's tokens have a weight only if asked."""
    tokenizer, guard_tokenizer = byte_bpe_tokenizer(), sentencepiece_tokenizer()
    trace, answer = "They ask for <|end|> it,\n\nand so", "  Sure: step 1 <|end|> "
    response = own(trace, answer) if form == "own" else FORMS[form].format(trace, answer)
    marks = marks_with(OWN)
    encoder = PairEncoder(FAMILIES["llama-guard-3"], guard_tokenizer)
    specials = special_strings(tokenizer, guard_tokenizer)
    inputs = PromptInputs(
        LlamaConfig(max_position_embeddings=4096),
        tokenizer,
        frozenset(),
        SimpleNamespace(encoder=encoder),  # type: ignore[arg-type]
        PromptData([], [response], {}, []),
        specials,
        marks=marks,
        reads=reads,
        trace_gradient=through,
    )
    ids = [encode_prompt(tokenizer, "Why?", None)]
    cleaned, num_broken = clean_responses(inputs, ids, [response])
    examples, excluded = encode_examples(inputs, ids, ["Why?"], cleaned, 8)
    if reads == "trace" and not through:  # refused before: no token could have a gradient
        assert excluded and not examples
        return
    (example,) = examples
    judged = text_to_judge(response, reads, marks)
    assert num_broken == (3 if form == "harmony" else 2)  # its own <|end|> is no mark of this tokenizer
    assert example.judged == encoder.encode("Why?", break_up(str(judged), specials)[0])
    assert tokenizer.eos_token_id not in example.response.ids
    weights = alignment_weights(
        example.response.offsets, example.judged.spans, example.judged.shown, [True] * len(example.response.ids)
    ).sum(1)
    weighted = tokenizer.decode([t for t, w in zip(example.response.ids, weights, strict=True) if w > 0])
    assert ("They ask" in weighted) == (through and reads != "answer")
    assert ("Sure" in weighted) == (reads != "trace")
    assert not any(mark in weighted for mark in ("think>", "[[", "final"))
    unmuted = [t for n, t in enumerate(example.response.ids) if n not in example.muted]
    assert ("They ask" in tokenizer.decode(unmuted)) == through and "Sure: step 1" in tokenizer.decode(unmuted)


@pytest.mark.parametrize(
    ("judge", "esi", "words"),
    [
        ({"reads": "trace"}, {}, r"judge\.reads = .*trace.*leaves no token with a gradient.*esi\.trace_gradient: true"),
        ({}, {"trace_gradient": True}, r"esi\.trace_gradient = .*changes nothing.*judge\.reads: both"),
        ({"reads": "both"}, {"trace_gradient": True}, None),
        ({}, {"trace_gradient": True, "estimator": "score_function"}, None),
    ],
)
def test_what_no_gradient_reaches_is_refused(judge: dict[str, Any], esi: dict[str, Any], words: str | None) -> None:
    raw = {"run": {"output_dir": "x"}, "model": {"path": "a"}, "data": {"prompts": {"path": "p"}}}
    config = validate({**raw, "judge": {"path": "g", **judge}, "esi": esi})
    with pytest.raises(UserError, match=words) if words else nullcontext():
        require_esi(config)


def test_an_unfinished_response_with_scores_of_its_own_takes_part_only_if_asked() -> None:
    tokenizer = byte_bpe_tokenizer()
    config, data = LlamaConfig(max_position_embeddings=4096), PromptData([], ["<think>so"], {}, [], [1.0])
    inputs = PromptInputs(config, tokenizer, frozenset(), None, data, special_strings(tokenizer))
    ids = [encode_prompt(tokenizer, "Why?", None)]
    for through in (False, True):
        asked = replace(inputs, trace_gradient=through)
        examples, excluded = encode_examples(asked, ids, ["Why?"], clean_responses(asked, ids, ["<think>so"])[0], 8)
        assert (len(examples), excluded) == ((1, {}) if through else (0, {0: UNFINISHED}))
