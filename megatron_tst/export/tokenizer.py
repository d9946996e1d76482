"""The tokenizer's files that go with an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_tst.checkpoint.atomic import flushed, write_json
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.errors import TSTError, optional, refuse

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)


def tokenizer_of(source: Checkpoint, given: Path | None) -> tuple[list[Path], int | None]:
    """(files of the tokenizer, number of its ids); ([], None) where the run has none that can be
    found.

    Args:
        source: whose run's own tokenizer is its arguments' tokenizer_model, or lies in its folder
            `hf` (import_hf, nemo).
        given: --tokenizer, a tokenizer.json or a folder with one; None: the run's own.

    Raises:
        TSTError: no tokenizer there, or its ids stand for other tokens than the run's own.
    """
    # the first is empty for a name on the hub or a path of another machine
    own = _files(getattr(source.args, "tokenizer_model", None)) or _files(source.path / "hf")
    files = _files(given) if given else own
    do = "Give the run's tokenizer."
    if given and not files:
        refuse("--tokenizer", "a tokenizer.json or a folder with one", f"{given}: neither", do)
    ours, theirs = _fast(files), _fast(own)
    if ours is None:
        return files, None
    if given and theirs is not None:
        for token, number in theirs.get_vocab().items():
            if ours.token_to_id(token) != number:
                expected = f"the run's own ids, {token!r} = {number}"
                refuse("--tokenizer", expected, ours.token_to_id(token), do)
    return files, ours.get_vocab_size(with_added_tokens=True)


def end_of_text(files: list[Path]) -> int | None:
    """The id that ends a document, where the tokenizer has one."""
    fast = _fast(files)
    if fast is None:
        return None
    settings = {}
    for file in files:
        if file.name == "tokenizer_config.json":
            settings = json.loads(file.read_text())
    name = settings.get("eos_token", "<|endoftext|>")
    return fast.token_to_id(name["content"] if isinstance(name, dict) else name)


def _files(path) -> list[Path]:
    if not path:
        return []
    path = Path(path)
    return [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]


def _fast(files):
    """The tokenizers.Tokenizer of a tokenizer.json among the files, or None."""
    file = next((file for file in files if file.name.endswith("tokenizer.json")), None)
    if file is None:
        return None
    tokenizers = optional("tokenizers", "megatron-tst[hf]")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise TSTError(
            f"--tokenizer: expected a tokenizer.json, got {file}: {error}. Give the run's "
            "tokenizer."
        ) from error


def write_tokenizer(folder: Path, files: list[Path]) -> None:
    """Copy the files into a folder from which transformers.AutoTokenizer makes a tokenizer."""
    for file in files:
        name = "tokenizer.json" if file.name.endswith("tokenizer.json") else file.name
        with open(file, "rb") as source:
            flushed(folder / name, lambda out, source=source: shutil.copyfileobj(source, out))
    if (
        any(file.name.endswith("tokenizer.json") for file in files)
        and not (folder / "tokenizer_config.json").exists()
    ):
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
