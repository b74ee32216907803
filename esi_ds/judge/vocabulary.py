"""The vocabulary map A: what a token of the model is worth in the guard's embedding space (docs/method.md §1).

A[v] is the mean of the guard's embeddings of v's text, that is M E with E the guard's embedding table and M a sparse
matrix of means. A itself is never built: A ũ = M (E ũ), which costs one product with E and no copy of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from esi_ds.data.chat import encode_with_spans
from esi_ds.errors import UserError

REPLACEMENT = "\ufffd"  # what decoders show for bytes that are not a whole character
# Text put before a token so that it is decoded and encoded as in the middle of a text. The first anchor that the
# tokenizer does not merge with the token is used.
ANCHORS = ("\n", "a", " ", "0")
ROWS = 8192  # rows of the embedding table converted to float32 at a time


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Each token's text as it appears mid-text; None for special tokens and pieces of a character."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = str(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    decoded = tokenizer.batch_decode(
        [[*anchor, token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False
    )
    texts: list[str | None] = []
    for token, text in enumerate(decoded):
        piece = text[len(before) :] if text.startswith(before) else ""
        texts.append(piece if piece and token not in special and REPLACEMENT not in piece else None)
    return texts


def encode_mid_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text as the tokenizer encodes it after other text."""
    ids_by_index: dict[int, list[int]] = {}
    for anchor in ANCHORS:
        waiting = [index for index in range(len(texts)) if index not in ids_by_index]
        if not waiting:
            break
        encoded = encode_with_spans(tokenizer, [anchor + texts[index] for index in waiting])
        for index, ids, spans in zip(waiting, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if not any(start < len(anchor) < end for start, end in spans):
                kept = [token for token, (start, _) in zip(ids, spans, strict=True) if start >= len(anchor)]
                if kept:
                    ids_by_index[index] = kept
    for index in range(len(texts)):
        if index not in ids_by_index:
            ids_by_index[index] = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
    return [ids_by_index[index] for index in range(len(texts))]


def same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether the two encode every text as the same ids."""
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
    # A text may hold one guard token twice; coalescing adds the two up, since CSR does not allow duplicates.
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, size).coalesce().to_sparse_csr()


class VocabularyMap:
    """Computes A ũ: what every token of the model is worth to the guard.

    model_tokenizer, guard_tokenizer: fast tokenizers. num_logits: V, the width of the model's logits, which may exceed
    the tokenizer's length (padding rows). Raises UserError where the guard can encode no token of the model.
    """

    def __init__(
        self, model_tokenizer: PreTrainedTokenizerBase, guard_tokenizer: PreTrainedTokenizerBase, num_logits: int
    ):
        self.num_logits = num_logits
        self.is_identity = same_vocabulary(model_tokenizer, guard_tokenizer)
        texts = token_texts(model_tokenizer)[:num_logits]
        self.has_text = [text is not None for text in texts] + [False] * (num_logits - len(texts))
        mapped = {} if self.is_identity else {token: text for token, text in enumerate(texts) if text is not None}
        pieces = encode_mid_text(guard_tokenizer, list(mapped.values()))
        kept = [(token, ids) for token, ids in zip(mapped, pieces, strict=True) if ids]
        if not self.is_identity and not kept:
            raise UserError(
                "judge.path",
                guard_tokenizer.name_or_path,
                "cannot encode any token of the model",
                "use a guard whose tokenizer covers the model's language",
            )
        self._tokens = torch.tensor([token for token, _ in kept], dtype=torch.int64)
        self._means = None if self.is_identity else _mean_matrix([ids for _, ids in kept])

    def contract(self, gradient: Tensor, table: Tensor) -> Tensor:
        """c = A ũ: float32 [T, V] for ũ ``gradient`` [T, d] and the guard's ``token_table`` [rows, d].

        Tokens without text get the mean over the mapped ones.
        """
        gradient = gradient.float()
        products = torch.cat([gradient @ rows.float().T for rows in table.split(ROWS)], dim=1)
        if self.is_identity:
            known = products[:, : self.num_logits]
            missing = self.num_logits - known.shape[1]
            return torch.cat([known, known.mean(1, keepdim=True).expand(-1, missing)], dim=1) if missing else known
        assert self._means is not None
        self._means, self._tokens = self._means.to(products.device), self._tokens.to(products.device)
        mapped = torch.sparse.mm(self._means, products[:, : self._means.shape[1]].T.contiguous()).T
        contraction = mapped.mean(1, keepdim=True).repeat(1, self.num_logits)
        contraction[:, self._tokens] = mapped
        return contraction
