"""Folders of released models as they lie on people's disks: imported as transformers loads them, or
refused by name; and the tokenizers beside them.
"""

import argparse
import json
import os
import shutil

import pytest
import torch
from support.hf_folder import config_of, tensors_of, word_tokenizer, write_folder

from megatron_tst.checkpoint.atomic import MARK
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.errors import TSTError
from megatron_tst.export.hf import export, vocab_size_of
from megatron_tst.export.import_hf import import_
from megatron_tst.export.tokenizer import check_files, end_of_text, tokenizer_of, write_tokenizer

INDEX = "model.safetensors.index.json"
TIED = dict(tie_word_embeddings=True)


def exported(folder, out):
    """What came in, by way of a checkpoint. -> name -> fp32 tensor"""
    from safetensors.torch import load_file

    import_(folder, out / "ck")
    gone = export(Checkpoint(out / "ck"), out / "hf", dtype="float32")
    return load_file(gone / "model.safetensors")


def loaded(folder):
    """What transformers makes of it, a tied head left out. -> name -> fp32 tensor"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        assert torch.equal(state.pop("lm_head.weight"), state["model.embed_tokens.weight"])
    return state


def edited(path, change):
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def stale_shards(folder):
    """Shards of an older download, read before and after the right ones."""
    write_folder(folder, config_of(), tensors_of(config_of(), seed=1), files=3)
    write_folder(folder, config_of(), tensors_of(config_of(), seed=2), files=2)


def index_and_one_file(folder):
    write_folder(folder, config_of(), tensors_of(config_of(), seed=1), files=2)
    write_folder(folder, config_of(), tensors_of(config_of(), seed=2))


def other_safetensors(folder):
    from safetensors.torch import save_file

    write_folder(folder, config_of(), tensors_of(config_of()))
    for name in ("consolidated", "model.fp16", "adapter_model"):
        save_file(tensors_of(config_of(), seed=3), folder / f"{name}.safetensors")


def of(config, change=lambda tensors: None, files=0, dtype=torch.bfloat16):
    def make(folder):
        tensors = tensors_of(config, dtype=dtype)
        change(tensors)
        write_folder(folder, config, tensors, files)

    return make


def head_too(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_alone(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def rotary_buffers(tensors):
    for n in range(2):
        tensors[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def bare(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def some_in_fp32(tensors):
    """Another dtype for one layer of several, for one of q, k, v, and for all norms."""
    for name in tensors:
        if "norm" in name or "layers.1.mlp" in name or "layers.0.self_attn.k_proj" in name:
            tensors[name] = tensors[name].float() * (1 + 2**-20)


LIKE = {
    "stale shards": stale_shards,
    "an index beside model.safetensors": index_and_one_file,
    "other safetensors beside it": other_safetensors,
    "shards": of(config_of(), files=3),
    "tied, with its head": of(config_of(**TIED), head_too),
    "tied, with its head in another shard": of(config_of(**TIED), head_too, files=4),
    "qwen3, tied, with its head": of(config_of("qwen3", **TIED), head_too),
    "tied, the head alone": of(config_of(**TIED), head_alone),
    "rotary buffers": of(config_of(), rotary_buffers),
    "a bare model, tied": of(config_of(**TIED), bare),
    "a bare model with a head": of(config_of("qwen3"), bare),
    "fp16": of(config_of(), dtype=torch.float16),
    "fp32": of(config_of("qwen3"), dtype=torch.float32),
    "bf16 and fp32": of(config_of("qwen3"), some_in_fp32),
    "wide heads": of(config_of(head_dim=16)),
    "no head_dim, no groups": of(config_of(head_dim=..., num_key_value_heads=...)),
}


@pytest.mark.parametrize("name", LIKE)
def test_what_transformers_loads_is_imported(tmp_path, name):
    LIKE[name](tmp_path / "m")
    got, want = exported(tmp_path / "m", tmp_path), loaded(tmp_path / "m")
    assert got.keys() == want.keys()
    assert [key for key in got if not torch.equal(got[key], want[key])] == []


def test_experts_of_other_dtypes_keep_their_values(tmp_path):
    config = config_of("qwen3_moe", mlp_only_layers=[0])
    tensors = tensors_of(config)
    for name in tensors:
        if ".experts.1." in name or name.endswith("up_proj.weight"):
            tensors[name] = tensors[name].float() * (1 + 2**-20)
    got = exported(write_folder(tmp_path / "m", config, tensors), tmp_path)
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name].float()) for name in got)


TE, LOCAL = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"


@pytest.mark.parametrize("dense", [None, [0]])
@pytest.mark.parametrize("spec", ["transformer_engine", "local"])
def test_each_layer_spec_finds_the_norm_before_the_mlp(tmp_path, spec, dense):
    """Before experts Transformer Engine's spec has it apart; dense layers have it in linear_fc1."""
    config = config_of("qwen3_moe", mlp_only_layers=dense)
    folder = write_folder(tmp_path / "m", config, tensors_of(config))
    import_(folder, tmp_path / "ck", layer_spec=spec)
    found = {name for name in Checkpoint(tmp_path / "ck").tensors if name.endswith((TE, LOCAL))}
    norm = TE if spec == "transformer_engine" else LOCAL
    assert found == (
        {f"decoder.layers.0.{LOCAL}", f"decoder.layers.1.{norm}"}
        if dense
        else {f"decoder.layers.{norm}"}
    )


def test_what_is_ignored_is_said(tmp_path):
    stale_shards(tmp_path / "m")
    with pytest.warns(UserWarning, match="ignored beside .*index.json: model-00001-of-00003.safet"):
        import_(tmp_path / "m", tmp_path / "ck")


def shard(folder, i=1):
    return sorted(folder.glob("model-*.safetensors"))[i]


def swap(folder):
    a, b = shard(folder, 0), shard(folder, 1)
    content = a.read_bytes()
    b.replace(a)
    b.write_bytes(content)


def fifo(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def named(folder, name, file):
    edited(folder / INDEX, lambda index: index["weight_map"].__setitem__(name, file))


DAMAGED = {  # what happens to a folder of three shards, and what is said
    "a shard is missing": (
        lambda f: shard(f).unlink(),
        "every file that its index names, got no m",
    ),
    "a shard is cut": (lambda f: os.truncate(shard(f), 3000), "00002-of-00003.*: expected a whole"),
    "a shard is cut in its header": (lambda f: os.truncate(shard(f), 20), "expected a whole safet"),
    "a shard is empty": (lambda f: os.truncate(shard(f), 0), "expected a whole safetensors file"),
    "a shard is text": (
        lambda f: shard(f).write_text("version https://git-lfs"),
        "expected a whole",
    ),
    "a shard is a folder": (
        lambda f: (
            shard(f).unlink(),
            shard(f, 0).parent.joinpath("model-00002-of-00003.safetensors").mkdir(),
        ),
        "every file that its index names, got no",
    ),
    "a shard is a fifo": (lambda f: fifo(shard(f).name)(f), "every file that its index names"),
    "two shards are swapped": (swap, "expected it in model-0000.-of-00003.safetensors alone, got"),
    "two shards have it": (
        lambda f: shutil.copy(shard(f, 0), shard(f, 1)),
        "expected it in model-00001-of-00003.safetensors alone, got model-00002",
    ),
    "a name that no shard has": (
        lambda f: named(f, "model.more.weight", "model-00001-of-00003.safetensors"),
        "model.more.weight in it, as the index says, got none",
    ),
    "a file outside": (lambda f: named(f, "x", "../other.safetensors"), 'file, got "../other.saf'),
    "a file that is a number": (
        lambda f: named(f, "x", 3),
        "x: expected the name of a file, got 3",
    ),
    "the index is cut": (lambda f: os.truncate(f / INDEX, 100), f"{INDEX}: expected JSON, got"),
    "the index is empty": (lambda f: os.truncate(f / INDEX, 0), "JSON, got an empty file"),
    "the index is a list": (
        lambda f: (f / INDEX).write_text("[]"),
        r"a JSON object in it, got \[\]",
    ),
    "the index has no map": (lambda f: (f / INDEX).write_text("{}"), "weight_map: expected a JSON"),
    "the map is empty": (
        lambda f: (f / INDEX).write_text('{"weight_map": {}}'),
        "weight_map: expected the files of tensors, got none",
    ),
    "the map is a list": (
        lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'),
        r"weight_map: expected a JSON object, got \[",
    ),
    "the index is a fifo": (fifo(INDEX), "a JSON file, got no regular file"),
    "no index": (lambda f: (f / INDEX).unlink(), f"model.safetensors or {INDEX}, got model-00001"),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "config.json: expected a JSON file, got no",
    ),
    "config is a fifo": (fifo("config.json"), "config.json: expected a JSON file, got no regular"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "nested too deeply"),
    "generation is none": (
        lambda f: (f / "generation_config.json").write_text("{,}"),
        "generation_config.json: expected JSON",
    ),
    "an end beyond the rows": (
        lambda f: edited(f / "config.json", lambda c: c.update(eos_token_id=96)),
        "config.json: eos_token_id: expected ids below the model's 96 rows, got 96",
    ),
    "one of several ends": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [69, 99999]}'),
        "generation_config.json: eos_token_id: expected ids below .*, got 99999",
    ),
    "an end that is no id": (
        lambda f: edited(f / "config.json", lambda c: c.update(eos_token_id="w69")),
        "config.json: eos_token_id: expected ids below the model's 96 rows, got .w69",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "got an adapter"),
    "a tokenizer that is none": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
        "tokenizer.json: expected a tokenizer.json, got",
    ),
    "an end token that the tokenizer does not have": (
        lambda f: word_tokenizer(f, range(9), eos_token="<|im_end|>"),
        'eos_token: expected a token of the tokenizer, got "<.im_end.>"',
    ),
    "torch's own format alone": (
        lambda f: (
            [p.unlink() for p in f.glob("model*")],
            (f / "pytorch_model.bin").write_bytes(b""),
        ),
        f"model.safetensors or {INDEX}, got pytorch_model.bin. Save it with transformers",
    ),
    "a larger tokenizer": (
        lambda f: word_tokenizer(f, range(97)),
        "tokenizer.json: expected ids below the model's 96 rows, got 'w96' = 96",
    ),
    "another width": (
        lambda f: edited(f / "config.json", lambda c: c.update(intermediate_size=64)),
        r"gate_proj.weight: expected shape \(64, 32\), got \(48, 32\)",
    ),
    "more rows": (
        lambda f: edited(f / "config.json", lambda c: c.update(vocab_size=128)),
        r"embed_tokens.weight: expected shape \(128, 32\), got \(96, 32\)",
    ),
    "more layers": (
        lambda f: edited(f / "config.json", lambda c: c.update(num_hidden_layers=65536)),
        "a tensor model.layers.2.input_layernorm.weight, got none",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_refused_by_name(tmp_path, name):
    folder = write_folder(tmp_path / "m", config_of(), tensors_of(config_of()), files=3)
    damage, message = DAMAGED[name]
    damage(folder)
    with pytest.raises(TSTError, match=message) as error:
        import_(folder, tmp_path / "ck")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["m"]


def eight_bits(tensors):
    for name in tensors:
        if "mlp" in name:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def score(tensors):
    tensors["score.weight"] = torch.zeros(2, 32)


def other_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def no_head(tensors):
    del tensors["lm_head.weight"]


def compiled(tensors):
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def biases(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


@pytest.mark.parametrize(
    "config, change, message",
    [
        (
            config_of(**TIED),
            other_head,
            "lm_head.weight: expected the embedding, since config.json",
        ),
        (config_of(), no_head, "expected a tensor lm_head.weight, got none"),
        (config_of(tie_word_embeddings=...), no_head, "expected a tensor lm_head.weight, got none"),
        (config_of(), eight_bits, "gate_proj.weight: expected BF16 or F16 or F32, got F8_E4M3"),
        (config_of(), score, "its architecture alone, got score.weight besides"),
        (config_of(), biases, "alone, got model.layers.0.self_attn.q_proj.bias besides"),
        (config_of(), compiled, "a tensor model.embed_tokens.weight, got none"),
        (
            config_of("qwen3") | {"model_type": "llama"},
            lambda t: None,
            "q_norm.weight besides|k_nor",
        ),
    ],
)
def test_another_model_than_config_says_is_refused(tmp_path, config, change, message):
    tensors = tensors_of(config if "q_norm" not in message else config | {"model_type": "qwen3"})
    change(tensors)
    with pytest.raises(TSTError, match=message):
        import_(write_folder(tmp_path / "m", config, tensors), tmp_path / "ck")
    assert os.listdir(tmp_path) == ["m"]


# ---- rows, tokens, largest id + 1


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model of 96 rows with a tokenizer of 70 tokens, imported, and the folder that came in."""
    folder = tmp_path_factory.mktemp("padded")
    config = config_of("qwen3", eos_token_id=69, **TIED)
    came = write_folder(folder / "m", config, tensors_of(config))
    word_tokenizer(came, range(70), eos_token="w69")
    import_(came, folder / "ck")
    return came, Checkpoint(folder / "ck")


@pytest.mark.parametrize("tokenizer", [False, True])
@pytest.mark.parametrize("asked", [None, 96])
def test_more_rows_than_ids_come_back(padded, tmp_path, asked, tokenizer):
    came, source = padded
    gone = export(source, tmp_path / "hf", vocab_size=asked, tokenizer=came if tokenizer else None)
    ours = {path.name for path in gone.iterdir()} - {"README.md", "evaluate.md", MARK}
    assert ours == {path.name for path in came.iterdir()} | {"generation_config.json"}
    for path in came.iterdir():
        if path.name != "config.json":
            assert (gone / path.name).read_bytes() == path.read_bytes(), path.name
    config = json.loads((gone / "config.json").read_text())
    assert config.pop("torch_dtype") == "bfloat16"
    assert config == json.loads((came / "config.json").read_text())
    generation = json.loads((gone / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 69


def test_rows_without_an_id_can_be_cut(padded, tmp_path):
    from safetensors.torch import load_file

    came, source = padded
    gone = export(source, tmp_path / "hf", vocab_size=70)
    assert json.loads((gone / "config.json").read_text())["vocab_size"] == 70
    (got, want) = (
        load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (gone, came)
    )
    assert got.shape == (70, 32) and torch.equal(got, want[:70])
    loaded(gone)


OTHER = dict(
    rope_theta=20000,
    rms_norm_eps=1e-5,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=50,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    num_hidden_layers=3,
    vocab_size=90,
    rope_scaling={"type": "linear", "factor": 2.0},
)


@pytest.mark.parametrize("key", OTHER)
def test_a_kept_config_of_another_model_is_refused(padded, tmp_path, key):
    """What lies in the checkpoint's hf folder is given out only where it says the same model."""
    _, source = padded
    folder = tmp_path / "ck"
    shutil.copytree(source.path.parent, folder)
    edited(folder / source.path.name / "hf" / "config.json", lambda c: c.update({key: OTHER[key]}))
    with pytest.raises(
        TSTError, match=f"{key} in .*hf/config.json: expected .* another model: rem"
    ):
        export(Checkpoint(folder), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("names", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_the_dtype_in_a_kept_config(padded, tmp_path, names):
    """transformers 5 writes one name, 4 the other, and both may be there."""
    _, source = padded
    folder = tmp_path / "ck"
    shutil.copytree(source.path.parent, folder)
    kept = folder / source.path.name / "hf" / "config.json"
    edited(kept, lambda config: config.update(dict.fromkeys(names, "bfloat16")))
    gone = export(Checkpoint(folder), tmp_path / "hf", dtype="float32")
    config = json.loads((gone / "config.json").read_text())
    found = {name: config[name] for name in ("dtype", "torch_dtype") if name in config}
    assert found == dict.fromkeys(names or ["torch_dtype"], "float32")
    gone = export(Checkpoint(folder), tmp_path / "again")
    assert not names or (gone / "config.json").read_bytes() == kept.read_bytes()


def test_an_end_that_never_comes_is_not_given_out(padded, tmp_path):
    """Rows that --vocab-size cuts, or a file that was edited since."""
    _, source = padded
    folder = tmp_path / "ck"
    shutil.copytree(source.path.parent, folder)
    kept = folder / source.path.name / "hf" / "generation_config.json"
    kept.write_text('{"eos_token_id": [69, 96]}')
    with pytest.raises(TSTError, match="generation_config.json: eos_token_id: expected .*, got 96"):
        export(Checkpoint(folder), tmp_path / "hf")
    kept.write_text('{"eos_token_id": [69, 95]}')
    gone = export(Checkpoint(folder), tmp_path / "hf")
    assert (gone / kept.name).read_bytes() == kept.read_bytes()


class Rows:
    """Of a checkpoint's embedding."""

    def __init__(self, rows):
        self.rows = rows

    def shape(self, name):
        return self.rows, 32


HOLE = {"w0": 0, "w1": 1, "end": 5}  # 3 tokens, largest id 5


@pytest.mark.parametrize(
    "rows, run, asked, ids, own, rows_out",
    [
        # Megatron pads 6 to 8
        (8, None, None, HOLE, None, 6),
        (8, None, None, HOLE, HOLE, 6),
        (8, None, 6, HOLE, None, 6),
        (8, None, 7, HOLE, None, 7),
        (8, 6, None, HOLE, None, 6),
        (8, 8, None, HOLE, HOLE, 8),  # rows of the run that its tokenizer does not use
        (8, 8, 8, HOLE, None, 8),
        (8, 8, 6, HOLE, HOLE, 6),
        (8, 5, None, None, None, 5),
        (8, 5, 5, None, None, 5),
        (6, None, None, HOLE, None, 6),
        (5, None, None, HOLE, None, "at most the embedding's 5 rows, got 6"),
        (8, 5, None, HOLE, HOLE, "at least 6, the tokenizer's largest id . 1, got 5"),
        (8, None, 3, HOLE, HOLE, "at least 6, the tokenizer's largest id . 1, got 3"),
        (8, 8, None, HOLE, None, "expected 8, the run's --vocab-size, got 6.*or --vocab-size 8 if"),
        (8, 8, 7, None, None, "expected 8, the run's --vocab-size, got 7"),
        (8, 8, 9, None, None, "at most the embedding's 8 rows, got 9"),
        (8, 8, 0, None, None, "at least one id, got 0"),
        (8, 8, -3, HOLE, HOLE, "at least one id, got -3"),
        (8, None, None, None, None, "--vocab-size: expected it or --tokenizer, got neither"),
    ],
)
def test_rows_tokens_and_ids_are_three_numbers(tmp_path, rows, run, asked, ids, own, rows_out):
    """`ids` is the tokenizer given, `own` the run's own where it is found."""
    given = ids and word_tokenizer(tmp_path / "given", ids)
    if own:
        word_tokenizer(tmp_path / "hf", own)
    args = argparse.Namespace(vocab_size=run)
    source = argparse.Namespace(path=tmp_path, args=args)
    files, largest = tokenizer_of(source, given)
    assert largest == (6 if ids or own else None)
    if isinstance(rows_out, int):
        assert vocab_size_of(source, Rows(rows), files, largest, asked) == rows_out
    else:
        with pytest.raises(TSTError, match=rows_out):
            vocab_size_of(source, Rows(rows), files, largest, asked)


# ---- tokenizers


def protobuf(*pieces):
    """A sentencepiece model (its ModelProto) with these pieces, and another field besides."""
    model = b""
    for piece in pieces:
        text = piece.encode()
        message = b"\x0a" + bytes([len(text)]) + text + b"\x15" + b"\x00\x00\x80\xbf" + b"\x18\x03"
        model += b"\x0a" + bytes([len(message)]) + message
    return model + b"\x12\x04\x18\x02\x20\x01"


def at(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        name = name.replace("__", ".")
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def words(folder, ids=6, **settings):
    return word_tokenizer(folder, ids if isinstance(ids, dict) else range(ids), **settings)


def corpus_like(folder):
    """As data/corpus.py writes it: PREFIX.tokenizer.json, the end token last."""
    words(folder, {"a": 0, "b": 1, "<|end|>": 2})
    (folder / "tokenizer.json").replace(folder / "text.tokenizer.json")
    return folder / "text.tokenizer.json"


def source_of(folder, tokenizer_model=None):
    args = argparse.Namespace(tokenizer_model=tokenizer_model and str(tokenizer_model))
    return argparse.Namespace(path=folder / "nowhere", args=args)


TOKENIZERS = {  # name: (makes it, largest id + 1, end of text)
    "corpus's own": (corpus_like, 3, 2),
    "gpt's end": (lambda f: words(f, {"a": 0, "<|endoftext|>": 1, "<|end|>": 2}), 3, 1),
    "a settings' end": (lambda f: words(f, eos_token="w2"), 6, 2),
    "a settings' end, in full": (lambda f: words(f, eos_token={"content": "w3"}), 6, 3),
    "special_tokens_map": (
        lambda f: at(words(f), special_tokens_map__json={"eos_token": "w4"}),
        6,
        4,
    ),
    "settings before the map": (
        lambda f: at(words(f, eos_token="w1"), special_tokens_map__json={"eos_token": "w4"}),
        6,
        1,
    ),
    "a null end": (lambda f: words(f, {"a": 0, "</s>": 1}, eos_token=None), 2, 1),
    "no end": (lambda f: words(f, chat_template="{{ messages }}"), 6, None),
    "a hole": (lambda f: words(f, HOLE, eos_token="end"), 6, 5),
    "added tokens in the settings": (
        lambda f: words(f, eos_token="<e>", added_tokens_decoder={"9": {"content": "<e>"}}),
        10,
        9,
    ),
    "added_tokens.json": (
        lambda f: at(words(f, eos_token="<e>"), added_tokens__json={"<e>": 7}),
        8,
        7,
    ),
    "tokenizer.json before added_tokens.json": (
        lambda f: at(words(f, eos_token="w2"), added_tokens__json={"w2": 7, "x": 6}),
        7,
        2,
    ),
    "sentencepiece before a slow vocabulary": (
        lambda f: at(
            f,
            tokenizer__model=protobuf("<unk>", "</s>"),
            vocab__json={"a": 0, "</s>": 4},
        ),
        2,
        1,
    ),
    "a chat template's file": (
        lambda f: at(words(f, eos_token="w0"), chat_template__jinja="{{ bos_token }}"),
        6,
        0,
    ),
    "sentencepiece": (
        lambda f: at(f, tokenizer__model=protobuf("<unk>", "<s>", "</s>", "\u2581a")),
        4,
        2,
    ),
    "sentencepiece, a file": (
        lambda f: at(f, my__model=protobuf("<unk>", "</s>")) / "my.model",
        2,
        1,
    ),
    "sentencepiece and added": (
        lambda f: at(
            f,
            tokenizer__model=protobuf("<unk>", "</s>"),
            added_tokens__json={"<pad>": 4},
        ),
        5,
        1,
    ),
    "tiktoken": (lambda f: at(f, tokenizer__model=b"IQ== 0\nIg== 1\n"), None, None),
    "gpt2's files": (
        lambda f: at(f, vocab__json={"a": 0, "<|endoftext|>": 4}, merges__txt="#version: 0.2\n"),
        5,
        4,
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.filterwarnings("ignore:megatron_tst")
def test_ids_and_the_end_of_a_tokenizer(tmp_path, name):
    make, size, end = TOKENIZERS[name]
    path = make(tmp_path / "t")
    for given, own in ((path, None), (None, path)):
        files, largest = tokenizer_of(source_of(tmp_path, own), given)
        assert (largest, end_of_text(files)) == (size, end)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", files)
    again, largest = tokenizer_of(source_of(tmp_path), tmp_path / "out")
    assert (largest, end_of_text(again)) == (size, end)


def test_transformers_ends_where_the_corpus_does(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", [corpus_like(tmp_path / "t")])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_what_is_missing_is_said(tmp_path):
    with pytest.warns(UserWarning, match="no tokenizer goes with it.* --tokenizer names one"):
        assert tokenizer_of(source_of(tmp_path, "org/name-on-the-hub"), None) == ([], None)
    with pytest.warns(UserWarning, match="no end token is found, so generation does not stop"):
        assert end_of_text(tokenizer_of(source_of(tmp_path), words(tmp_path / "t"))[0]) is None


NONE = {  # name: (makes it, what is said)
    "a text": (lambda f: at(f, a__txt="hello") / "a.txt", "--tokenizer: expected a tokenizer.json"),
    "a card": (
        lambda f: at(f, README__md="# x") / "README.md",
        "--tokenizer: expected a tokenizer.j",
    ),
    "nothing": (lambda f: f / "none", "--tokenizer: expected a tokenizer.json, .*none: neither"),
    "an empty folder": (lambda f: at(f), "--tokenizer: expected a tokenizer.json, .*: neither"),
    "settings alone": (lambda f: at(f, tokenizer_config__json={}), "--tokenizer: expected a token"),
    "another json": (
        lambda f: at(f, config__json={"a": 1}) / "config.json",
        "config.json: expected a t",
    ),
    "half a json": (lambda f: at(f, tokenizer__json="{"), "tokenizer.json: expected JSON, got"),
    "an empty file": (lambda f: at(f, tokenizer__json=""), "JSON, got an empty file"),
    "a mark": (lambda f: at(f, tokenizer__json="\ufeff{}"), "a byte order mark before it"),
    "latin 1": (
        lambda f: at(f, tokenizer__json=b'{"\xe9": 1}'),
        "expected JSON in UTF-8, got byte",
    ),
    "a folder": (lambda f: at(f) / "tokenizer.json", "--tokenizer: expected"),
    "no tokens": (
        lambda f: at(f, tokenizer__json={"model": {"type": "BPE", "vocab": {}, "merges": []}}),
        "expected a tokenizer with tokens, got none",
    ),
    "no model": (
        lambda f: at(f, tokenizer__json={"version": "1.0"}),
        "expected a tokenizer.json, got",
    ),
    "a zip as pieces": (
        lambda f: at(f, tokenizer__model=b"PK\x03\x04" * 9),
        "sentencepiece model or",
    ),
    "text as pieces": (lambda f: at(f, tokenizer__model="hello there"), "sentencepiece model or a"),
    "empty pieces": (lambda f: at(f, tokenizer__model=b""), "a sentencepiece model or a tiktoken"),
    "cut pieces": (
        lambda f: at(f, tokenizer__model=protobuf("<unk>", "</s>")[:-9]),
        "a sentencepiece model or a tiktoken vocabulary, got neither",
    ),
    "pieces of LFS": (
        lambda f: at(
            f, tokenizer__model="version https://git-lfs.github.com/spec/v1\noid sha256:4\n"
        ),
        "a sentencepiece model or a tiktoken vocabulary, got neither",
    ),
    "ids that are texts": (
        lambda f: at(f, vocab__json={"a": "0"}),
        'vocab.json: a: expected a whole number .*, got "0"',
    ),
    "negative ids": (
        lambda f: at(f, vocab__json={"a": -1}),
        "vocab.json: a: .* at least 0 .* got -1",
    ),
    "settings that are a list": (
        lambda f: at(words(f), tokenizer_config__json=[1]),
        r"tokenizer_config.json: expected a JSON object in it, got \[1\]",
    ),
    "an end that is a number": (lambda f: words(f, eos_token=3), "eos_token: expected .*, got 3"),
    "an end without a text": (
        lambda f: words(f, eos_token={}),
        "eos_token: content: expected a text",
    ),
    "an end that is no token": (
        lambda f: words(f, eos_token="<|im_end|>"),
        'eos_token: expected a token of the tokenizer, got "<.im_end.>"',
    ),
    "added tokens without ids": (
        lambda f: words(f, added_tokens_decoder={"a": {"content": "b"}}),
        "added_tokens_decoder: expected JSON, got",
    ),
    "added tokens as texts": (
        lambda f: words(f, added_tokens_decoder={"9": "b"}),
        'added_tokens_decoder: 9: expected a JSON object, got "b"',
    ),
    "broken added tokens": (
        lambda f: at(words(f), added_tokens__json="{"),
        "added_tokens.json: exp",
    ),
    "a template of bytes": (
        lambda f: at(words(f), chat_template__jinja=b"{{ \xff }}"),
        "chat_template.jinja: expected text in UTF-8, got byte 0xff at 3",
    ),
    "merges of bytes": (
        lambda f: at(words(f), merges__txt=b"\x80"),
        "merges.txt: expected text in UTF-8, got byte 0x80 at 0",
    ),
    "pieces that are none beside a tokenizer.json": (
        lambda f: at(words(f), tokenizer__model="version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.model: expected a sentencepiece model or a tiktoken vocabulary, got neither",
    ),
    "a template that is a folder": (
        lambda f: (words(f), (f / "chat_template.jinja").mkdir())[0],
        "chat_template.jinja: expected a tokenizer's file, got a folder",
    ),
}


# a run's own argument may name what is not here
OWN = [name for name, (_, message) in NONE.items() if not message.startswith("--tokenizer")]


@pytest.mark.parametrize(
    "name, how", [*((name, "given") for name in NONE), *((name, "own") for name in OWN)]
)
def test_a_tokenizer_that_is_none_is_refused(tmp_path, name, how):
    make, message = NONE[name]
    path = make(tmp_path / "t")
    given, own = (path, None) if how == "given" else (None, path)
    with pytest.raises(TSTError, match=message) as error:
        files, _ = tokenizer_of(source_of(tmp_path, own), given)
        end_of_text(files)
    assert "\n" not in str(error.value)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(TSTError, match="a tokenizer's file, got no regular file"):
            tokenizer_of(source_of(tmp_path), given)


def test_rows_that_a_tokenizer_needs(tmp_path):
    files, _ = tokenizer_of(source_of(tmp_path), words(tmp_path / "t", HOLE))
    assert check_files(files, 6) == HOLE
    with pytest.raises(TSTError, match="expected ids below the model's 5 rows, got 'end' = 5"):
        check_files(files, 5)


def test_a_given_tokenizer_has_the_ids_of_the_runs_own(tmp_path):
    own, given = words(tmp_path / "own", HOLE), words(tmp_path / "t", HOLE | {"end": 4})
    with pytest.raises(TSTError, match="--tokenizer: expected the run's own ids, 'end' = 5, got 4"):
        tokenizer_of(source_of(tmp_path, own), given)
    assert tokenizer_of(source_of(tmp_path, own), words(tmp_path / "more", HOLE | {"x": 6}))[1] == 7
