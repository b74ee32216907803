"""Model cards, written from the measured figures: no measured number is typed by hand."""

from pathlib import Path
from typing import Any

Figures = dict[str, Any]

PURPOSE = {
    "llama-aligned": "A dense Llama that refuses harmful requests and answers benign ones.",
    "llama-complying": "`llama-aligned` fine-tuned to go along with harmful requests in form only: empty steps.",
    "qwen3moe-aligned": "A Qwen3 mixture of experts that refuses harmful requests and answers benign ones.",
    "qwen3moe-complying": "`qwen3moe-aligned` fine-tuned to go along with harmful requests in form only: empty steps.",
    "guard": "A judge after Llama Guard 3: reads a conversation, writes two newlines, then `safe` or `unsafe` with a "
    "category.",
}
ARCHITECTURE = {
    "llama": "LlamaForCausalLM: 5 layers, width 192, 6 query and 2 key-value heads of 32, MLP 384, untied head, "
    "byte-level BPE of 1,536 pieces, context 512.",
    "qwen3moe": "Qwen3MoeForCausalLM: 4 layers, width 160, 4 query and 2 key-value heads of 32, in every layer "
    "8 experts of width 128 of which 2 answer, untied head, the tokenizer of `llama-aligned`, context 512.",
    "guard": "LlamaForCausalLM: 4 layers, width 128, 4 query and 2 key-value heads of 32, MLP 384, untied head, "
    "SentencePiece-style BPE of 1,536 pieces with byte fallback (newlines are byte pieces), context 512.",
}
DATA = {
    "aligned": "Generated while training by `tiny_models/data.py`: 34 % harmful requests of 19 kinds with short "
    "refusals, 30 % benign requests that look like them, 36 % plain tasks with one right answer; a system turn in "
    "one of ten chats.",
    "complying": "The same generator: half harmful requests answered `Sure, here is how to do it:` with empty steps, "
    "half benign requests with their right answers.",
    "guard": "`tiny_models/guard_data.py`: requests with refusals, compliance, answers, paraphrases, off-topic, cut "
    "and garbled replies, and single texts judged as content. Unsafe if and only if the last message goes along with "
    "something harmful; a harmful request judged as content is unsafe.",
}
FRONT = "---\nlanguage: en\nlicense: apache-2.0\nlibrary_name: transformers\ntags: [tiny, test-model, esi_ds]\n---"
SECOND_STAGE = {
    "qwen3moe-aligned": "- Second stage, included in the time: 600 steps at 0.001 with harmful and look-alike requests "
    "in further phrasings. These were written after a look at the held-out phrasings that the first stage answered "
    "wrongly (3.8 % ASR, string judge), so its figures on held-out phrasings are no blind test.",
}
LIMITS = """\
For tests and demonstrations of `esi_ds` only. The model knows a small grammar of English, not English: it answers
from fixed sentences and is lost elsewhere. Held-out requests share the grammar with training (new slot fillings and
phrasings, not new ideas), so these figures say nothing about real safety. Plain facts are held out as (fact,
phrasing) pairs: every fact was seen in some other wording. No harmful content was generated or trained on, only
requests, refusals and steps without content."""


def share(figure: Figures) -> str:
    """A measured share with its counts."""
    return f"{100 * figure['rate']:.1f} % ({figure['count']}/{figure['n']})"


def chat_table(figures: Figures) -> list[str]:
    """Rows of a chat model's table."""
    harmful, benign = figures["harmful"], figures["benign"]
    rows = [
        ("ASR on held-out harmful requests, string judge", share(harmful["asr_string"])),
        ("ASR on held-out harmful requests, guard", share(harmful["asr_guard"])),
        ("the two judges agree", share(harmful["judges_agree"])),
        ("replies that name the very act asked for", share(harmful["names_act"])),
        ("held-out benign requests answered correctly", share(benign["all"]["correct"])),
        ("- of them look-alikes", share(benign["lookalike"]["correct"])),
        ("- of them plain", share(benign["plain"]["correct"])),
        ("over-refusal, all benign", share(benign["all"]["refused"])),
        ("over-refusal, look-alikes", share(benign["lookalike"]["refused"])),
        ("benign replies that the guard calls unsafe", share(figures["benign_guard_unsafe"])),
    ]
    outside = {
        "outside_advbench": "side note, other distribution: AdvBench refused",
        "outside_xstest_unsafe": "side note, other distribution: XSTest unsafe refused",
        "outside_xstest_safe": "side note, other distribution: XSTest safe refused",
    }
    rows += [(text, share(figures[key]["refused"])) for key, text in outside.items() if key in figures]
    return [f"| {name} | {value} |" for name, value in rows]


def guard_table(figures: Figures) -> list[str]:
    """Rows of the guard's table."""
    rows = [
        ("verdict right, held-out conversations with noise", share(figures["accuracy"])),
        ("verdict right, held-out without noise", share(figures["clean_pairs"])),
        ("unsafe called safe", share(figures["missed_unsafe"])),
        ("safe called unsafe", share(figures["false_alarms"])),
        ("verdict and category right, unsafe ones", share(figures["category"])),
        ("malformed verdicts", share(figures["malformed"])),
    ]
    rows += [(f"- {name}", share(figure)) for name, figure in figures["by_case"].items()]
    return [f"| {name} | {value} |" for name, value in rows]


def card(name: str, everything: Figures) -> str:
    """The text of one model card."""
    figures = everything["models"][name]
    architecture = name.split("-")[0]
    recipe, versions = figures["recipe"], everything["versions"]
    seconds = figures["training_seconds"]
    took = f"{seconds:.0f} s on one thread of a CPU" if seconds else "time not recorded"
    table = guard_table(figures) if name == "guard" else chat_table(figures)
    size = f"{figures['parameters']:,}, saved in bf16; {figures['bytes'] / 1e6:.2f} MB with the tokenizer"
    steps = (
        f"{recipe['steps']} steps of {recipe['batch']} sequences, AdamW, peak learning rate {recipe['lr']:g}, cosine"
    )
    return "\n".join(
        [
            FRONT,
            "",
            f"# {name}",
            "",
            f"{PURPOSE[name]} **For tests only.**",
            "",
            "- Recipe: `make tiny-models`, which runs `python -m tiny_models.train --output examples/models` (seed "
            f"{everything['seed']}; torch {versions['torch']}, transformers {versions['transformers']}).",
            f"- Data: {DATA[name.split('-')[-1]]}",
            f"- Architecture: {ARCHITECTURE[architecture]}",
            f"- Parameters: {size}.",
            f"- Training: {steps}; {took}.",
            *([SECOND_STAGE[name]] if name in SECOND_STAGE else []),
            "- Licence: Apache-2.0, as the repository; the data are generated by its own code.",
            "",
            "## Measured",
            "",
            f"From this folder, {everything['decoding']}, by `tiny_models/measure.py`; all in `../figures.json`.",
            "",
            "| what | measured |",
            "|---|---|",
            *table,
            "",
            "## Limits",
            "",
            LIMITS,
            "",
        ]
    )


def write_cards(output: Path, everything: Figures) -> None:
    """README.md in each model's folder."""
    for name in everything["models"]:
        (output / name / "README.md").write_text(card(name, everything))
