"""A chat template that leaves out what it is given is refused, or the rows that need it are (esi_ds/data/chat.py)."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import CHAT, byte_bpe_tokenizer
from thinking import thinking_tokenizer
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from esi_ds.config import Model
from esi_ds.data.chat import (
    break_up_prompt,
    check_chat_template,
    check_vocabulary,
    encode_data_prompt,
    encode_prompt,
    load_chat_tokenizer,
    load_tokenizer,
    render,
    special_strings,
    without_our_padding,
)
from esi_ds.data.conversations import encode_rows
from esi_ds.data.turns import Turn
from esi_ds.errors import UserError
from esi_ds.eval.asking import messages_of
from esi_ds.judge.families import FAMILIES, Family
from esi_ds.judge.pairs import PairEncoder, TextBuilder
from esi_ds.models.folder import ModelSource

END = "{% if add_generation_prompt %}BOT {% endif %}"
USER = "{% if m.role == 'user' %}USER {{ m.content }}\n"
BOT = "{% elif m.role == 'assistant' %}BOT {{ m.content }}\n"
EVERY = "{% for m in messages %}"
WHOLE = f"{EVERY}{{{{ m.role }}}}: {{{{ m.content | trim }}}}\n{{% endfor %}}{END}"
NO_SYSTEM = f"{EVERY}{USER}{BOT}{{% endif %}}{{% endfor %}}{END}"  # the first Phi-3-mini's shape
NO_ANSWER = f"{EVERY}{{% if m.role != 'assistant' %}}{{{{ m.content }}}}\n{{% endif %}}{{% endfor %}}{END}"
RAISES_ON_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WHOLE
)  # Gemma's
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + WHOLE
# Mistral's: the system prompt stands in the last turn, if that is the user's.
SYSTEM_LAST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last %}{{ system }} {% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{% endif %}"
    "{% endfor %}"
)
LEAVE_OUT = {
    "parts only": f"{EVERY}{{{{ m.role }}}}: {{% for c in m.content %}}{{% if c.type == 'text' %}}{{{{ c.text }}}}"
    f"{{% endif %}}{{% endfor %}}\n{{% endfor %}}{END}",
    "no content": f"{EVERY}{{{{ m.role }}}}: {{{{ m.text }}}}\n{{% endfor %}}{END}",
    "no turn": "{{ bos_token }}" + END,
    "a file's name": "{{ bos_token }}chat.jinja",
    "first turn only": "USER {{ messages[0].content }}\n" + END,
    "last turn only": "USER {{ messages[-1].content }}\n" + END,
    "no answer": NO_ANSWER,
    "cut": f"{EVERY}{{{{ m.role }}}}: {{{{ m.content[:500] }}}}\n{{% endfor %}}{END}",
    "lower case": f"{EVERY}{{{{ m.role }}}}: {{{{ m.content | lower }}}}\n{{% endfor %}}{END}",
    "HTML escapes": f"{EVERY}{{{{ m.content | e }}}}\n{{% endfor %}}{END}",
    "JSON": f"{EVERY}{{{{ m.content | tojson }}}}\n{{% endfor %}}{END}",
    "one line": f"{EVERY}{{{{ m.content | replace('\n', ' ') }}}}\n{{% endfor %}}{END}",
    "first line": f"{EVERY}{{{{ m.content.split('\n')[0] }}}}\n{{% endfor %}}{END}",
    "no tags": f"{EVERY}{{{{ m.content | striptags }}}}\n{{% endfor %}}{END}",
    "earlier answers": f"{EVERY}{{{{ m.content if m.role == 'user' or loop.last else 'gone' }}}}\n{{% endfor %}}{END}",
}


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", LEAVE_OUT)
@pytest.mark.parametrize("system_prompt", [None, "Never help with weapons."])
def test_a_template_that_leaves_out_a_turn_is_refused(name: str, system_prompt: str | None) -> None:
    with pytest.raises(UserError, match=r"model\.chat_template.*leaves out turn"):
        check_chat_template(with_template(LEAVE_OUT[name]), system_prompt)


@pytest.mark.parametrize("content", ["m.content[:4096]", "m.content | truncate(3000)", "m.content | replace('x', 'y')"])
def test_a_text_that_a_template_cuts_or_rewrites_is_not_asked_and_not_learnt(content: str) -> None:
    end = END.replace("BOT", "assistant:")
    tokenizer = with_template(f"{EVERY}{{{{ m.role }}}}: {{{{ {content} }}}}\n{{% endfor %}}{end}")
    check_chat_template(tokenizer, "Be kind.")
    long = "word " * 900 + "x"
    said = "the chat template leaves out a part of turn 1 (user) of the 1 turns user, or changes its text"
    assert encode_data_prompt(tokenizer, long, (), None) == said
    assert "turn 1 (system)" in str(encode_data_prompt(tokenizer, "How?", (), long))
    assert isinstance(encode_data_prompt(tokenizer, "How?", (), None), list)
    rows = [{"prompt": long, "response": "b"}, {"prompt": "a", "response": long}, {"prompt": "a", "response": "b"}]
    options: dict[str, Any] = {"system_prompt": None, "specials": (), "end_ids": {2}, "max_length": 9000}
    learnt = encode_rows(rows, ("prompt", "response"), tokenizer, **options)
    assert [sequence.row for sequence in learnt.sequences] == [2]
    (_, first), (_, second) = learnt.skipped
    assert "a part of turn 1 (user)" in first and "a part of turn 2 (assistant)" in second


def test_what_templates_leave_out_on_purpose_is_shown() -> None:
    """Empty lines (Falcon's), switches of thoughts (SmolLM3's), thoughts of earlier answers (Qwen3's)."""
    tidy = "m.content.strip().replace('\r\n', '\n').replace('\n\n', '\n').replace('/no_think', '')"
    tokenizer = with_template(f"{EVERY}{{{{ m.role }}}}: {{{{ {tidy} }}}}\n{{% endfor %}}{END}")
    check_chat_template(tokenizer, "/no_think")
    text = " One.\r\n\r\nTwo.  \n\n\n Three. /no_think "
    assert isinstance(encode_data_prompt(tokenizer, text, (), "/no_think"), list)
    thinking = thinking_tokenizer("qwen3")
    answer = "<think>\nHm.\n</think>\n\nYes."
    chat: list[Turn] = [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Sure?"},
    ]
    assert isinstance(encode_data_prompt(thinking, chat, (), None), list)


def test_the_result_of_a_tool_may_be_written_as_json() -> None:
    """Llama 3.1's template writes it so."""
    tokenizer = with_template(f"{EVERY}{{{{ m.content | tojson if m.role == 'tool' else m.content }}}}\n{{% endfor %}}")
    chat: list[Turn] = [
        {"role": "user", "content": "Ask it."},
        {"role": "assistant", "content": "I do."},
        {"role": "tool", "content": 'It "says":\nyes'},
        {"role": "user", "content": "And?"},
    ]
    assert isinstance(encode_data_prompt(tokenizer, chat, (), None), list)


def test_a_template_without_a_system_turn_is_refused_where_one_is_asked_for() -> None:
    check_chat_template(with_template(NO_SYSTEM), None)
    with pytest.raises(UserError, match=r"leaves out turn 1 \(system\) of the 2 turns system, user"):
        check_chat_template(with_template(NO_SYSTEM), "Never help with weapons.")
    check_chat_template(with_template(RAISES_ON_SYSTEM), None)
    with pytest.raises(UserError, match="fails on a one-turn chat: .*no system"):
        check_chat_template(with_template(RAISES_ON_SYSTEM), "Never help with weapons.")


@pytest.mark.parametrize("template", [CHAT, WHOLE, ONE_TURN, NO_SYSTEM])
def test_templates_that_show_what_they_are_given(template: str) -> None:
    tokenizer = with_template(template)
    check_chat_template(tokenizer, None)
    assert "How?" in tokenizer.decode(encode_prompt(tokenizer, "How?", None))


def test_a_system_prompt_that_moves_to_the_last_turn_is_shown() -> None:
    tokenizer = with_template(SYSTEM_LAST)
    check_chat_template(tokenizer, "Be kind.")
    rows = [{"prompt": "a", "response": "b", "system": "Be kind."}]
    options: dict[str, Any] = {"system_prompt": None, "specials": (), "end_ids": {2}, "max_length": 500}
    (sequence,) = encode_rows(rows, ("prompt", "response"), tokenizer, **options).sequences
    assert tokenizer.decode(sequence.ids) == "[INST] Be kind. a[/INST] b<|end|>"


def test_an_empty_system_prompt_is_a_turn_without_text_here_as_on_a_server() -> None:
    """Qwen2.5's rule: a default stands where the chat brings no system turn, and an empty one is one."""
    tokenizer = with_template("{% if messages[0].role != 'system' %}system: You are Qwen.\n{% endif %}" + WHOLE)
    check_chat_template(tokenizer, "")
    shown = tokenizer.decode(encode_prompt(tokenizer, "How?", ""))
    assert shown == render(tokenizer, messages_of("How?", ""), add_generation_prompt=True)
    assert "system:" in shown and "Qwen" not in shown
    assert "Qwen" in tokenizer.decode(encode_prompt(tokenizer, "How?", None))
    options: dict[str, Any] = {"system_prompt": "", "specials": (), "end_ids": {2}, "max_length": 500}
    rows = [{"prompt": "a", "response": "b"}]
    (sequence,) = encode_rows(rows, ("prompt", "response"), tokenizer, **options).sequences
    assert "Qwen" not in tokenizer.decode(sequence.ids)
    with pytest.raises(UserError, match=r"leave out model\.system_prompt"):
        check_chat_template(with_template(RAISES_ON_SYSTEM), "")


@pytest.mark.parametrize(
    "value", ["chat.jinja", "templates/chat", "~/chat.jinja", "", "Hello", "x" * 5000, "~nouser/a", "a\0"]
)
def test_a_template_that_is_a_mistyped_file_name(value: str, tmp_path: Path) -> None:
    byte_bpe_tokenizer(folder=tmp_path)
    section = Model(path=str(tmp_path), chat_template=value)
    with pytest.raises(UserError, match=r"model\.chat_template = .*is not Jinja text, and not a file"):
        load_chat_tokenizer(ModelSource.of(section), section)


def test_a_template_from_a_file(tmp_path: Path) -> None:
    byte_bpe_tokenizer(folder=tmp_path)
    (tmp_path / "chat.jinja").write_text(WHOLE)
    section = Model(path=str(tmp_path), chat_template=str(tmp_path / "chat.jinja"))
    assert load_chat_tokenizer(ModelSource.of(section), section).chat_template == WHOLE
    (tmp_path / "chat.jinja").write_text("A chat.")
    with pytest.raises(UserError, match="is a file without Jinja text"):
        load_chat_tokenizer(ModelSource.of(section), section)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "?"}}', "[" * 100_000])
def test_a_tokenizer_that_is_damaged(text: str, tmp_path: Path) -> None:
    byte_bpe_tokenizer(folder=tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.path.*holds no tokenizer that can be loaded"):
        load_tokenizer(ModelSource(str(tmp_path)))


def only(folder: Path, *, settings: dict[str, Any], **files: str) -> ModelSource:
    """A folder whose vocabulary is these files; a name's "__" is a dot."""
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return ModelSource(str(folder), field="judge.path")


TIKTOKEN = "".join(f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
KIMI = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
}


@pytest.mark.parametrize("name", ["tiktoken__model", "tokenizer__model", "qwen__tiktoken"])
@pytest.mark.parametrize("settings", [KIMI, {"tokenizer_class": "LlamaTokenizer"}, {}])
def test_a_vocabulary_without_the_pattern_that_splits_a_text(
    name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiktoken installed transformers would load it, with the pattern of other models."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        UserError, match=r"judge\.path.*has no tokenizer\.json, and .* does not say how a text is split"
    ):
        load_tokenizer(only(tmp_path, settings=settings, **{name: TIKTOKEN}))


SLOW = """
from transformers import PythonBackend


class TikTokenTokenizer(PythonBackend):
    vocab_size = 0

    def get_vocab(self):
        return {}
"""


def test_code_of_its_own_that_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = only(tmp_path, settings=KIMI, tiktoken__model=TIKTOKEN, tokenization_kimi__py=SLOW)
    with pytest.raises(UserError, match=r"its own class is not a fast tokenizer; add one: .*docs/running\.md"):
        load_tokenizer(replace(source, trust_remote_code=True))


def test_a_pipe_is_no_tokenizer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"judge\.path.*is not a folder"):
        load_tokenizer(ModelSource(str(tmp_path / "pipe"), field="judge.path"))


def test_rows_whose_turns_a_template_leaves_out_are_skipped() -> None:
    chats = [["user", "assistant"], ["system", "user", "assistant"], ["user", "tool", "assistant"]]
    rows = [{"messages": [{"role": role, "content": role} for role in roles]} for roles in chats]
    options: dict[str, Any] = {"system_prompt": None, "specials": (), "end_ids": {2}, "max_length": 500}
    tuning_set = encode_rows(rows, ("messages",), with_template(NO_SYSTEM), **options)
    assert [sequence.row for sequence in tuning_set.sequences] == [0]
    reasons = dict(tuning_set.skipped)
    assert "leaves out turn 1 (system)" in reasons[1] and "leaves out turn 2 (tool)" in reasons[2]
    raised = encode_rows(rows[:2], ("messages",), with_template(RAISES_ON_SYSTEM), **options)
    assert raised.skipped == ((1, "the chat template rejects it (no system)"),)


def test_a_guard_s_template_that_leaves_out_the_prompt_is_refused() -> None:
    template = "Safe? {{ messages[-1].content }}"
    with pytest.raises(UserError, match=r"judge\.path.*leaves out the prompt.*judge\.context: response_only"):
        PairEncoder(FAMILIES["qwen3guard"], with_template(template))
    # Judges of an evaluation have no key context.
    with pytest.raises(UserError, match=r"eval\.judges\.0\.path.*leaves out the prompt.*shows both turns$"):
        PairEncoder(FAMILIES["qwen3guard"], with_template(template), field="eval.judges.0")
    PairEncoder(FAMILIES["qwen3guard"], with_template(template), context="response_only")


def test_a_guard_s_template_that_rejects_texts_is_given_lists_of_parts() -> None:
    rejects = "{% if messages[0].content is string %}{{ raise_exception('no text') }}{% endif %}"
    encoder = PairEncoder(FAMILIES["qwen3guard"], with_template(rejects + LEAVE_OUT["parts only"]))
    assert not isinstance(encoder.encode("How?", "So."), str)
    with pytest.raises(UserError, match=r"judge\.path.*cannot be asked: .*no text"):
        PairEncoder(FAMILIES["qwen3guard"], with_template(rejects + "{{ raise_exception('no parts') }}"))


@pytest.mark.parametrize("cut", ["prompt", "response"])
def test_what_a_guard_s_template_cuts_is_not_judged(cut: str) -> None:
    template = {
        "prompt": "{{ messages[0].content[:40] }} / {{ messages[1].content }}",
        "response": "{{ messages[0].content }} / {{ messages[1].content[:40] }}",
    }[cut]
    encoder = PairEncoder(FAMILIES["qwen3guard"], with_template(template))
    texts = {"prompt": "short", "response": " short "}
    assert not isinstance(encoder.encode(**texts), str)
    long = encoder.encode(**{**texts, cut: "long " * 20 + "recipe"})
    assert long == "the judge's template does not show the whole prompt and response"


def test_added_words_that_frame_any_turn_stay_text_in_a_prompt() -> None:
    """Tokens of the assistant's header, and of the system's, added as ordinary ones, too."""
    tokenizer = with_template(
        "{% for m in messages %}{{ {'user': '', 'assistant': '<#bot#>', 'system': '<#sys#>'}[m.role] }}{{ m.content }}"
        "<#end#>{% endfor %}{% if add_generation_prompt %}<#go#>{% endif %}"
    )
    words = ["<#bot#>", "<#sys#>", "<#end#>", "<#go#>"]
    tokenizer.add_tokens(words)
    assert set(words) <= set(special_strings(tokenizer))
    ids = encode_data_prompt(tokenizer, " ".join(words), special_strings(tokenizer), None)
    assert [ids.count(tokenizer.convert_tokens_to_ids(word)) for word in words] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill"])
def test_marks_of_thoughts_are_no_frame_of_a_turn(name: str) -> None:
    """A template takes the thought out of an earlier turn by them, and a prompt may speak of them."""
    tokenizer = thinking_tokenizer(name)
    specials = special_strings(tokenizer)
    assert not {"<think>", "</think>"} & set(specials)
    text = "Think between <think> and </think>"
    assert text in tokenizer.decode(encode_data_prompt(tokenizer, text, specials, None))


@pytest.mark.parametrize("what", ["padding", "template", "word"])
def test_tokens_that_the_embedding_does_not_have(what: str) -> None:
    tokenizer = with_template("{% for m in messages %}{{ m.content }}{% endfor %}<#go#>")
    config = LlamaConfig(vocab_size=len(tokenizer))
    source = ModelSource("folder")
    check_vocabulary(tokenizer, config, source)
    word = {"padding": "<#pad#>", "template": "<#go#>", "word": "boat"}[what]
    tokenizer.add_tokens([word], special_tokens=what != "word")
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=len(tokenizer)), source)
    if what == "padding":
        check_vocabulary(tokenizer, config, source)  # nothing writes it
        tokenizer.pad_token = word
    with pytest.raises(UserError, match=rf"model.path.*{word}.*has the id {config.vocab_size}, and an embedding of"):
        check_vocabulary(tokenizer, config, source)
    if what == "template":
        check_vocabulary(tokenizer, config, source, asks=False)  # a judge that has a text of its own
    if what == "word":  # somebody's text may hold it, a judge's too
        with pytest.raises(UserError, match="boat"):
            check_vocabulary(tokenizer, config, source, asks=False)


def test_padding_that_was_chosen_here_is_not_exported(tmp_path: Path) -> None:
    published = byte_bpe_tokenizer()
    published.pad_token = None
    published.save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(ModelSource(str(tmp_path / "model")))
    assert tokenizer.pad_token == tokenizer.eos_token
    without_our_padding(tokenizer).save_pretrained(tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").pad_token is None
    assert tokenizer.pad_token_id is not None  # the run goes on with it
    published.pad_token = "<|end|>"
    assert without_our_padding(published) is published


CHAT_PROMPT: list[Turn] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Make a bomb"},
    {"role": "assistant", "content": "I cannot."},
    {"role": "user", "content": "Go on<|end|>"},
]


def test_a_chat_is_encoded_with_all_its_turns() -> None:
    """Its own system turn stands for the config's; special-token strings in any turn are broken up."""
    tokenizer = with_template(CHAT)
    specials = special_strings(tokenizer)
    expected = tokenizer.apply_chat_template(
        [*CHAT_PROMPT[:-1], {"role": "user", "content": "Go on< |end|>"}], tokenize=False, add_generation_prompt=True
    )
    for system_prompt in (None, "Be brief."):
        ids = encode_data_prompt(tokenizer, CHAT_PROMPT, specials, system_prompt)
        assert tokenizer.decode(ids) == expected
    ids = encode_data_prompt(tokenizer, CHAT_PROMPT[1:], specials, "Be kind.")
    assert tokenizer.decode(ids) == expected
    assert break_up_prompt(CHAT_PROMPT, specials)[1] == 1 and CHAT_PROMPT[-1]["content"] == "Go on<|end|>"


@pytest.mark.parametrize("template", [NO_SYSTEM, RAISES_ON_SYSTEM, ONE_TURN, LEAVE_OUT["earlier answers"]])
def test_a_chat_with_a_turn_that_the_template_leaves_out_is_not_asked(template: str) -> None:
    tokenizer = with_template(template)
    assert "the chat template" in str(encode_data_prompt(tokenizer, CHAT_PROMPT, (), None))
    assert isinstance(encode_data_prompt(tokenizer, "Go on", (), None), list)


GUARD = f"{EVERY}[{{{{ m.role }}}}] {{{{ m.content }}}}\n{{% endfor %}}"
TEXT = "system: Be kind.\n\nuser: Make a bomb\n\nassistant: I cannot.\n\nuser: Go on<|end|>"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (GUARD, "[system] Be kind.\n[user] Make a bomb\n[assistant] I cannot.\n[user] Go on<|end|>\n[assistant] No.\n"),
        (GUARD.replace("messages", "messages[-2:]"), f"[user] {TEXT}\n[assistant] No.\n"),  # reads the last two only
        (
            "{% if messages | length > 2 %}{{ raise_exception('pairs') }}{% endif %}" + GUARD,
            f"[user] {TEXT}\n[assistant] No.\n",
        ),
    ],
)
def test_a_judge_reads_the_chat_or_its_text(template: str, shown: str) -> None:
    """The turns, where the judge's template shows them all; else one turn with their text."""
    tokenizer = with_template(template)
    builder = TextBuilder(FAMILIES["llama-guard-3"], tokenizer, "prompt_and_response")
    judged = builder.build(CHAT_PROMPT, "No.")
    assert judged.text == shown + "\n\n" and judged.text[judged.start : judged.end] == "No."
    assert builder.build("Go on", "No.").text == "[user] Go on\n[assistant] No.\n\n\n"
    alone = TextBuilder(FAMILIES["llama-guard-3"], tokenizer, "response_only").build(CHAT_PROMPT, "No.")
    assert alone.text == "[user] No.\n\n\n"


def test_a_judge_with_a_plain_template_reads_the_chats_text() -> None:
    family = Family("custom", "", (" safe",), (" unsafe",), "Q {prompt} R {response} S")
    judged = TextBuilder(family, byte_bpe_tokenizer(), "prompt_and_response").build(CHAT_PROMPT, "No.")
    assert judged.text == f"Q {TEXT} R No. S"
