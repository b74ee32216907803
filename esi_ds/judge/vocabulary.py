"""The vocabulary map A: what a token of the model is worth in the guard's embedding space (docs/method.md §1).

A[v] is the mean of the guard's embeddings of v's text, that is M E with E the guard's embedding table and M a sparse
matrix of means. A itself is never built: A ũ = M (E ũ), which costs one product with E and no copy of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from esi_ds.errors import UserError

REPLACEMENT = "\ufffd"  # what decoders show for bytes that are no whole character
# Text in front of a token, so that it is decoded and encoded as in the middle of a text. The first one that does not
# melt into the token is used.
ANCHORS = ("\n", "a", " ", "0")
ROWS = 8192  # rows of the embedding table turned into float32 at a time


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Each token's text as it appears mid-text; None for special tokens and pieces that are no whole characters."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    decoded = tokenizer.batch_decode(
        [[*anchor, token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False
    )
    texts: list[str | None] = []
    for token, text in enumerate(decoded):
        own = text[len(before) :] if text.startswith(before) else ""
        texts.append(own if own and token not in special and REPLACEMENT not in own else None)
    return texts


def encode_mid_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text as the tokenizer encodes it behind other text."""
    found: dict[int, list[int]] = {}
    for anchor in ANCHORS:
        waiting = [index for index in range(len(texts)) if index not in found]
        if not waiting:
            break
        encoded = tokenizer(
            [anchor + texts[index] for index in waiting], add_special_tokens=False, return_offsets_mapping=True
        )
        for index, ids, spans in zip(waiting, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if not any(start < len(anchor) < end for start, end in spans):
                kept = [token for token, (start, _) in zip(ids, spans, strict=True) if start >= len(anchor)]
                if kept:
                    found[index] = kept
    for index in range(len(texts)):
        if index not in found:
            found[index] = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
    return [found[index] for index in range(len(texts))]


def same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether the two cut every text into the same ids."""
    if first.get_vocab() != second.get_vocab():
        return False
    parts = ("model", "normalizer", "pre_tokenizer", "decoder")
    return all(_component(first, part) == _component(second, part) for part in parts)


def _component(tokenizer: PreTrainedTokenizerBase, part: str) -> bytes | str:
    component = getattr(tokenizer.backend_tokenizer, part)
    return repr(component) if component is None else component.__getstate__()


def _mean_matrix(pieces: list[list[int]]) -> Tensor:
    """Sparse CSR [len(pieces), largest id + 1], float32: row i is the mean over ``pieces[i]``."""
    lengths = torch.tensor([len(ids) for ids in pieces])
    rows = torch.arange(len(pieces)).repeat_interleave(lengths)
    columns = torch.tensor([piece for ids in pieces for piece in ids])
    values = (1.0 / lengths.float()).repeat_interleave(lengths)
    size = (len(pieces), int(columns.max()) + 1)
    # A text may hold one guard token twice: coalescing adds the two up, which CSR by itself does not allow.
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, size).coalesce().to_sparse_csr()


class VocabularyMap:
    """A ũ for every token of the model, V = the width of the model's logits.

    model_tokenizer, guard_tokenizer: fast tokenizers. num_logits: V, may exceed the tokenizer's length (padding rows).
    """

    def __init__(
        self, model_tokenizer: PreTrainedTokenizerBase, guard_tokenizer: PreTrainedTokenizerBase, num_logits: int
    ):
        self.num_logits = num_logits
        self.is_identity = same_vocabulary(model_tokenizer, guard_tokenizer)
        texts = token_texts(model_tokenizer)[:num_logits]
        self.has_text = [text is not None for text in texts] + [False] * (num_logits - len(texts))
        mapped = [] if self.is_identity else [token for token, own in enumerate(self.has_text) if own]
        pieces = encode_mid_text(guard_tokenizer, [texts[token] for token in mapped])
        kept = [(token, ids) for token, ids in zip(mapped, pieces, strict=True) if ids]
        if not self.is_identity and not kept:
            raise UserError(
                "judge.path",
                guard_tokenizer.name_or_path,
                "cannot write any token of the model",
                "use a guard whose tokenizer covers the model's language",
            )
        self._tokens = torch.tensor([token for token, _ in kept], dtype=torch.int64)
        self._means = None if self.is_identity else _mean_matrix([ids for _, ids in kept])

    def contract(self, gradient: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        """c = A ũ: float32 [T, V] for ũ ``gradient`` [T, d] and the guard's embedding ``table`` [rows, d].

        Tokens without text of their own get the mean over the mapped ones. ``scale``: what the guard multiplies its
        embeddings by.
        """
        gradient = gradient.float()
        products = torch.cat([gradient @ rows.float().T for rows in table.split(ROWS)], dim=1) * scale
        if self.is_identity:
            known = products[:, : self.num_logits]
            missing = self.num_logits - known.shape[1]
            return torch.cat([known, known.mean(1, keepdim=True).expand(-1, missing)], dim=1) if missing else known
        self._means, self._tokens = self._means.to(products.device), self._tokens.to(products.device)
        mapped = torch.sparse.mm(self._means, products[:, : self._means.shape[1]].T.contiguous()).T
        contraction = mapped.mean(1, keepdim=True).repeat(1, self.num_logits)
        contraction[:, self._tokens] = mapped
        return contraction
