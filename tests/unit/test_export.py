"""An exported folder: by any number of ranks the same bytes, each rank writes its own part, a rank's failure is told.

The ranks are threads here: what an export asks of a sharded model is a whole one's, cut.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer, shard_bounds
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, ProcessorMixin

from esi_ds.core.stored import DTYPES
from esi_ds.core.units import Parameter, Shard, whole
from esi_ds.data.chat import load_tokenizer
from esi_ds.models.beside_weights import copy_beside_weights
from esi_ds.models.folder import ModelSource
from esi_ds.models.roles import describe
from esi_ds.zero import export, files, runtime
from esi_ds.zero.export import export_model
from esi_ds.zero.files import Entry, FolderFiles, file_header

KINDS = ("llama", "qwen3_moe")
FILE = "model-00001-of-00001.safetensors"


class CutModel:
    """A whole model as ``ShardedModel`` describes it on one rank. gathered: names of what was asked for whole."""

    def __init__(self, module: PreTrainedModel, rank: int, ranks: int):
        self.module, self.rank = module, rank
        self.by_name = dict(module.named_parameters())
        self.parameters = describe(module, {name: tuple(tensor.shape) for name, tensor in self.by_name.items()})
        self.layouts = [whole(parameter) for parameter in self.parameters]
        self.shards = [layout.cut(*shard_bounds(layout.numel, rank, ranks)) for layout in self.layouts]
        self.gathered: list[str] = []

    def release(self) -> None:
        pass

    def buffers(self) -> dict[str, torch.Tensor]:
        stored = self.module.state_dict()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in stored}

    def local_weight(self, shard: Shard) -> torch.Tensor:
        first = shard.runs[0][0] if shard.runs else 0
        return self.by_name[shard.name].detach().flatten()[first : first + shard.numel]

    def whole(self, parameter: Parameter, keeper: int) -> torch.Tensor | None:
        self.gathered.append(parameter.name)
        return self.by_name[parameter.name].detach().clone() if keeper == self.rank else None


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[int], None]], list[BaseException | None]]:
    """Run a function on ranks that are threads; the error of each."""

    def run(ranks: int, function: Callable[[int], None]) -> list[BaseException | None]:
        local, together = threading.local(), threading.Barrier(ranks)
        monkeypatch.setattr(runtime, "rank", lambda: local.rank)
        monkeypatch.setattr(runtime, "world_size", lambda: ranks)
        monkeypatch.setattr(runtime, "barrier", lambda: together.wait(60) and None)

        def be(rank: int) -> BaseException | None:
            local.rank = rank
            try:
                function(rank)
            except Exception as error:
                together.abort()  # as a rank that ends breaks the others' collectives
                return error
            return None

        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(be, range(ranks)))

    return run


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(request.param, tmp_path_factory.mktemp("export") / request.param, byte_bpe_tokenizer())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_are_those_of_safetensors(base: Path, tmp_path: Path, monkeypatch, on_ranks, ranks, dtype) -> None:
    monkeypatch.setattr(export, "FILE_BYTES", 30_000)
    module = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    models = [CutModel(module, rank, ranks) for rank in range(ranks)]
    folder = tmp_path / "model"
    assert not any(on_ranks(ranks, lambda rank: export_model(models[rank], folder, byte_bpe_tokenizer(), "card")))
    tensors = {}
    written = sorted(folder.glob("*.safetensors"))
    assert len(written) > 1
    for file in written:
        tensors |= load_file(file)
        assert file.read_bytes() == save(load_file(file), {"format": "pt"})
    expected = load_file(base / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name].to(dtype)) for name in expected)
    is_fused = [name for name in module.state_dict() if "experts" in name]
    assert all(sorted(model.gathered) == sorted(is_fused) for model in models)  # no other weight is sent


def test_what_a_rank_writes(base: Path, tmp_path: Path, monkeypatch, on_ranks) -> None:
    """The ranks together write every byte of the tensors once."""
    module = AutoModelForCausalLM.from_pretrained(base)
    models = [CutModel(module, rank, 3) for rank in range(3)]
    counts = [0, 0, 0]
    raw_bytes = files.raw_bytes

    def counting(values: torch.Tensor) -> memoryview:
        counts[runtime.rank()] += values.nbytes
        return raw_bytes(values)

    monkeypatch.setattr(export, "raw_bytes", counting)  # what a conversion makes is written with files.raw_bytes
    assert not any(on_ranks(3, lambda rank: export_model(models[rank], tmp_path / "m", byte_bpe_tokenizer(), "card")))
    stored = load_file(base / "model.safetensors")
    own = sum(tensor.nbytes for name, tensor in stored.items() if "experts" not in name)
    assert sum(counts) == own
    assert max(counts) < 0.4 * own


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["write", "write_tensors"])
def test_a_rank_that_cannot_write(base: Path, tmp_path: Path, monkeypatch, on_ranks, rank: int, where: str) -> None:
    """Its error names the file, and the folder never gets its name; what had it before stays."""
    if where == "write_tensors" and base.name == "llama":
        pytest.skip("nothing is converted")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/before").touch()
    module = AutoModelForCausalLM.from_pretrained(base)

    class FullDisk(FolderFiles):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if runtime.rank() == rank:
                setattr(self, where, self.fail)

        def fail(self, *_: object) -> None:
            with files.writing(self.folder / FILE):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run(number: int) -> None:
        export_model(CutModel(module, number, 2), tmp_path / "model", byte_bpe_tokenizer(), "card")

    monkeypatch.setattr(export, "FolderFiles", FullDisk)
    errors = on_ranks(2, run)
    assert isinstance(errors[rank], OSError) and errors[rank].filename.endswith(FILE)
    assert isinstance(errors[1 - rank], threading.BrokenBarrierError)
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["before"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_its_scores(tmp_path: Path, monkeypatch, on_ranks, rank: int) -> None:
    parameter = Parameter("a.weight", (3, 5), 0, "mlp.up", ())
    layout = whole(parameter)
    pwrite = os.pwrite

    def fail(descriptor: int, data: bytes, position: int) -> int:
        if runtime.rank() == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, position)

    def run(number: int) -> None:
        shard = layout.cut(*shard_bounds(15, number, 2))
        files.write_scores(tmp_path / "scores", [parameter], [shard], {"a.weight": torch.ones(shard.numel)}, {})

    monkeypatch.setattr(os, "pwrite", fail)
    errors = on_ranks(2, run)
    assert isinstance(errors[rank], OSError) and errors[rank].filename.endswith(FILE)
    assert isinstance(errors[1 - rank], threading.BrokenBarrierError)
    assert not (tmp_path / "scores").exists()


def test_a_header_is_that_of_safetensors() -> None:
    """Tensors of every dtype, names that are not ASCII."""
    names = ("b.weight", "a.weight", "ü\n☃", "a.bias")
    tensors = {f"{name}.{dtype}": torch.zeros(3, 2).to(DTYPES[dtype]) for dtype in reversed(DTYPES) for name in names}
    order = list(DTYPES)
    entries = [Entry(name, name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: (-order.index(entry.dtype), entry.name))
    header, _ = file_header(entries, {"format": "pt"}, compact=True)
    assert save(tensors, {"format": "pt"}).startswith(header)


@pytest.mark.parametrize("template", ["OLD {{ messages }}", "NEW {{ messages }}"])
def test_a_processors_template_stays_only_beside_the_tokenizers_own(template: str, tmp_path: Path) -> None:
    """transformers, and servers with it, prefer a chat_template.json to the new chat_template.jinja beside it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps({"chat_template": "OLD {{ messages }}"}))
    (tmp_path / "base/chat_template.json").write_text(json.dumps({"chat_template": "IMAGES {{ messages }}"}))
    (tmp_path / "base/preprocessor_config.json").write_text("{}")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/chat_template.jinja").write_text(template)
    copy_beside_weights(tmp_path / "base", tmp_path / "tuned", "model.path", only_missing=True)
    read = ProcessorMixin.get_processor_dict(tmp_path / "tuned")[0]["chat_template"]
    assert read == ("IMAGES {{ messages }}" if template.startswith("OLD") else template)
    assert (tmp_path / "tuned/preprocessor_config.json").is_file()


def test_an_exported_tokenizer_names_the_tokens_that_the_run_used(tmp_path: Path) -> None:
    """The base's tokenizer_config.json was edited, as a fine-tune's is, and the older map beside it was not."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tokenizer = byte_bpe_tokenizer(folder=base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    decoder = {number: token.__getstate__() for number, token in tokenizer.added_tokens_decoder.items()}
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": decoder}))
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|bos|>", "pad_token": "<|bos|>"}))
    (base / "added_tokens.json").write_text(json.dumps({"<|older|>": 339}))
    used = load_tokenizer(ModelSource(str(base)))
    assert used.eos_token == "<|end|>"
    used.save_pretrained(tuned)
    copy_beside_weights(base, tuned, "model.path", only_missing=True)
    exported = AutoTokenizer.from_pretrained(tuned)
    assert exported.special_tokens_map == used.special_tokens_map
    assert exported.added_tokens_decoder == used.added_tokens_decoder
