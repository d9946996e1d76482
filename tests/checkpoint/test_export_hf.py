"""What transformers makes of an export, against what Megatron says of the model itself; and the way
back.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.close import close
from support.runs import TINY, all_over, in_a_fork
from support.tiers import tiers
from support.trained import EP2, RUNS, TP2, VOCAB, Trained, corpus_below, known

from megatron_tst import cli
from megatron_tst.checkpoint.atomic import MARK
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.errors import TSTError
from megatron_tst.export import nemo  # noqa: F401  before the fork that is killed at work
from megatron_tst.export.hf import export
from megatron_tst.export.import_hf import LOAD, import_

pytestmark = pytest.mark.numeric

ASK = str(Path(__file__).parent / "ask_model.py")


@pytest.fixture(scope="module")
def runs(fork_server, corpus, tmp_path_factory):
    return Trained(fork_server, corpus, tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return corpus_below(tmp_path_factory.mktemp("ids"))


def without_shims(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_TST_CPU"}
    subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).parent / script), *map(str, arguments)],
        check=True,
        env=environment,
    )


FAST = set(RUNS) - {
    "deepseek, tied, no rank of queries, yarn, tp2 ep2",
    "llama, hybrid, tp2",
    "qwen3 moe, hybrid",
    "deepseek, hybrid, ep2",
}


@pytest.fixture(scope="module")
def answers(runs):
    """name -> (Megatron's answers, transformers' answers to the same)"""
    made = {}

    def answered(name):
        if name not in made:
            # one process of transformers for the fast ones, one for the others
            names = [one for one in RUNS if (one in FAST) == (name in FAST)]
            folders = {one: runs(one) for one in names}
            for folder in folders.values():
                given = [str(folder / "ck"), str(folder / "hf"), "--dtype", "float32"]
                assert cli.main(["export-hf", *given]) == 0
            without_shims("ask_transformers.py", *folders.values())
            files = "answers.pt", "transformers.pt"
            for one, folder in folders.items():
                made[one] = [torch.load(folder / file, weights_only=True) for file in files]
        return made[name]

    return answered


@pytest.mark.parametrize("name", tiers(RUNS, FAST))
def test_transformers_says_what_megatron_says(answers, name):
    """Logits, the tokens of the largest ones, and those of multi-token prediction."""
    want, got = answers(name)
    assert got["class"] == RUNS[name][2] and not got["unloaded"]
    assert got["logits"].shape == want["logits"].shape == (5, 12, VOCAB)
    close(got["logits"], want["logits"], 2e-6)  # largest seen 2e-7
    assert torch.equal(got["generated"], want["generated"]) and len(want["generated"].unique()) > 3
    assert (got["mtp"] is None) == (want["mtp"] is None)
    if want["mtp"] is not None:
        close(got["mtp"][0], want["mtp"][0, :, :-1], 2e-6)  # largest seen 2e-7


@pytest.mark.parametrize(
    "name", ["llama, tied, gqa, tp2", "qwen3 moe, tp2 ep2", "deepseek, tp2 ep2"]
)
def test_every_tensor_comes_from_the_checkpoint(runs, tmp_path, name):
    """With all of the checkpoint's weights doubled every exported tensor is."""
    from safetensors.torch import load_file

    from megatron_tst.checkpoint.rewrite import Changes, rewrite

    source = Checkpoint(runs(name) / "ck")
    model = frozenset(key for key in source.tensors if not key.startswith("optimizer."))
    doubled = Changes(
        common=source.common, tensor=lambda name, offset, shard: shard * 2, edited=model
    )
    rewrite(source, tmp_path / "doubled", doubled)
    one = load_file(export(source, tmp_path / "one", dtype="float32") / "model.safetensors")
    two = load_file(
        export(Checkpoint(tmp_path / "doubled"), tmp_path / "two", dtype="float32")
        / "model.safetensors"
    )
    assert one.keys() == two.keys() and all(torch.equal(two[key], 2 * one[key]) for key in one)


def test_shards_and_their_index(runs, tmp_path):
    """Cut into files, the weights are the same; bf16 is the fp32 rounded once."""
    from safetensors.torch import load_file

    folder = runs("llama") / "ck"
    whole = load_file(
        export(Checkpoint(folder), tmp_path / "whole", dtype="float32") / "model.safetensors"
    )
    export(Checkpoint(folder), tmp_path / "cut", shard_bytes=40_000)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(
        path.name for path in (tmp_path / "cut").glob("*.safetensors")
    )
    parts = {
        key: tensor for file in files for key, tensor in load_file(tmp_path / "cut" / file).items()
    }
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[key], whole[key].bfloat16()) for key in whole)
    assert index["metadata"]["total_size"] == sum(
        2 * math.prod(tensor.shape) for tensor in whole.values()
    )


def test_the_factor_that_megatron_took_is_exported(runs, tmp_path):
    """--rope-scaling-factor 4 in the run, which Megatron trained with 8; see the logits above."""
    with pytest.warns(
        UserWarning,
        match="--rope-scaling-factor 4 in the checkpoint: Megatron 0.18 to 0.20 build their "
        "models with 8",
    ):
        export(Checkpoint(runs("llama, rope scaling") / "ck"), tmp_path / "hf")
    assert (
        json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"]["factor"] == 8.0
    )


def changed(folder, tmp_path, **args):
    """The checkpoint with other arguments, as if another model had been trained."""
    import argparse

    from megatron_tst.checkpoint.rewrite import Changes, rewrite

    source = Checkpoint(folder)
    common = dict(source.common, args=argparse.Namespace(**vars(source.args) | args))
    rewrite(source, tmp_path / "changed", Changes(common=common))
    return Checkpoint(tmp_path / "changed")


@pytest.mark.parametrize(
    "args, message",
    [
        (
            dict(normalization="LayerNorm"),
            "--normalization: expected RMSNorm, got LayerNorm. This model has no counterpart",
        ),
        (dict(add_bias_linear=True), "--add-bias-linear"),
        (
            dict(position_embedding_type="learned_absolute"),
            "--position-embedding-type: expected rope",
        ),
        (dict(multi_latent_attention=True), "--multi-latent-attention"),
        (
            dict(num_experts=4, qk_layernorm=True, moe_shared_expert_intermediate_size=64),
            "--moe-shared-expert-intermediate-size: expected None, got 64",
        ),
        (
            dict(num_experts=4, qk_layernorm=True, moe_router_score_function="sigmoid"),
            "--moe-router-score-function: expected softmax, got sigmoid",
        ),
        (dict(num_experts=4), "--num-experts: expected --qk-layernorm beside it"),
        (
            dict(ffn_hidden_size=128),
            r"mlp.down_proj.weight: expected shape \(32, 128\), got \(32, 64\)",
        ),
        (dict(qk_layernorm=True), "layer 0's self_attention.k_layernorm.weight"),
        (
            dict(consumed_train_samples=24),
            "a checkpoint of the recovery phase, got one after 24 of 24 superposed samples",
        ),
        (dict(vocab_size=600), "at most the embedding's 512 rows, got 600"),
        (
            dict(vocab_size=None),
            "--vocab-size: expected it or --tokenizer, got neither. The embedding has 512 rows",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(runs, tmp_path, args, message):
    source = changed(runs("llama") / "ck", tmp_path, **args)
    with pytest.raises(TSTError, match=message):
        export(source, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]  # nothing half written


@pytest.mark.parametrize(
    "args, given, message",
    [
        (
            dict(consumed_train_samples=24),
            [],
            "a checkpoint of the recovery phase, got one after 24 of 24 superposed samples",
        ),
        (dict(normalization="LayerNorm"), [], "--normalization: expected RMSNorm, got LayerNorm"),
        (
            dict(hybrid_layer_pattern="M*M*"),
            [],
            r"--hybrid-layer-pattern: expected attention and MLP by turns .*, got M\*M\*",
        ),
        (
            dict(),
            ["--tokenizer", "none"],
            "--tokenizer: expected a tokenizer.json, a tokenizer.model or a folder with one",
        ),
        (dict(), ["--vocab-size", "600"], "at most the embedding's 512 rows, got 600"),
        ("missing", [], "__0_0.distcp is missing"),
        ("full", [], "of free space"),
        ("there", [], "a target that is not there yet"),
    ],
)
@pytest.mark.parametrize("verb", ["export-hf", "export-nemo"])
def test_the_tool_says_it_in_one_line_and_leaves_nothing(
    runs, tmp_path, monkeypatch, capsys, verb, args, given, message
):
    target = tmp_path / "out"
    source = changed(runs("llama") / "ck", tmp_path, **(args if isinstance(args, dict) else {}))
    if args == "missing":
        (source.path / "__0_0.distcp").unlink()
    if args == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    if args == "there":
        target.mkdir()
    assert cli.main([verb, str(source.path), str(target), *given]) == 2
    error = capsys.readouterr().err
    assert (
        re.search(f"^megatron-tst {verb}: error: .*{message}", error) and error.count("\n") == 1
    ), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"] + ["out"] * (
        args == "there"
    )


def test_an_existing_target_and_a_full_disk_are_refused(runs, tmp_path, monkeypatch):
    source = Checkpoint(runs("llama") / "ck")
    (tmp_path / "hf").mkdir()
    with pytest.raises(TSTError, match="a target that is not there yet, got an existing one"):
        export(source, tmp_path / "hf")
    export(source, tmp_path / "hf", force=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(TSTError, match="of free space"):
        export(source, tmp_path / "other")


def test_json_says_what_was_written_and_how_to_load_it(runs, tmp_path, capsys):
    source, hf, nemo_, back = runs("llama") / "ck", *(tmp_path / name for name in "abc")

    def said(*argv):
        assert cli.main([*map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    path = str(Checkpoint(source).path)
    assert said("export-hf", source, hf) == {"written": str(hf), "from": path, "dtype": "bfloat16"}
    found = said("export-nemo", source, nemo_)
    assert found["from"] == path and Path(found["written"], "run_config.yaml").exists()
    assert f"from_pretrained('{found['written']}/hf')" in found["to_hugging_face"]
    assert Path(found["written"], "hf").is_dir()
    found = said("import-hf", hf, back, "--layer-spec", "local")
    assert found["load"] == ["--load", str(back), *LOAD]
    width = found["flags"].index("--hidden-size") + 1
    assert found["flags"][width] == str(Checkpoint(source).args.hidden_size)


@pytest.mark.parametrize("verb", tiers(["export-hf", "export-nemo", "import-hf"], {"export-nemo"}))
def test_killed_at_any_moment(runs, models, tmp_path, verb):
    """The target is absent or whole, and the next try cleans up and succeeds."""
    target = tmp_path / "out"
    source = models / "llama" / "hf" if verb == "import-hf" else runs("llama") / "ck"

    def call():
        return cli.main([verb, str(source), str(target)])

    def content():
        return {
            str(path.relative_to(target)): path.read_bytes()
            for path in target.rglob("*")
            if path.is_file()
        }

    touched = in_a_fork(call)
    whole, wholes = content(), 0
    for killed in all_over(*touched, times=20):
        shutil.rmtree(target, ignore_errors=True)
        in_a_fork(call, *killed)
        if target.exists():
            wholes += 1
            assert content() == whole
    assert wholes < 20
    shutil.rmtree(target, ignore_errors=True)
    in_a_fork(call)
    assert os.listdir(tmp_path) == ["out"] and content() == whole


def test_the_tokenizer_goes_with_it_and_must_fit(runs, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    source = Checkpoint(runs("llama") / "ck")
    for ids in (VOCAB, VOCAB - 1):
        Tokenizer(models.WordLevel({f"w{i}": i for i in range(ids)}, unk_token="w0")).save(
            str(tmp_path / f"{ids}.tokenizer.json")
        )
    export(source, tmp_path / "hf", tokenizer=tmp_path / f"{VOCAB}.tokenizer.json")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").convert_tokens_to_ids("w17") == 17
    with pytest.raises(TSTError, match="vocabulary: expected 500, the run's --vocab-size, got 499"):
        export(source, tmp_path / "other", tokenizer=tmp_path / f"{VOCAB - 1}.tokenizer.json")
    with pytest.raises(
        TSTError, match="--tokenizer: expected a tokenizer.json, a tokenizer.model or a folder"
    ):
        export(source, tmp_path / "other", tokenizer=tmp_path / "none")
    other = changed(
        runs("llama") / "ck", tmp_path, tokenizer_model=str(tmp_path / f"{VOCAB}.tokenizer.json")
    )
    Tokenizer(models.WordLevel({f"x{i}": i for i in range(VOCAB)}, unk_token="x0")).save(
        str(tmp_path / "x.tokenizer.json")
    )
    with pytest.raises(
        TSTError, match="--tokenizer: expected the run's own ids, 'w[0-9]+' = [0-9]+, got None"
    ):
        export(other, tmp_path / "other", tokenizer=tmp_path / "x.tokenizer.json")
    (tmp_path / "broken.tokenizer.json").write_text("{")
    with pytest.raises(TSTError, match="broken.tokenizer.json: expected JSON, got Expecting"):
        export(source, tmp_path / "other", tokenizer=tmp_path / "broken.tokenizer.json")


def test_the_card_says_how_it_was_made(runs, tmp_path):
    folder = runs("qwen3 moe, tp2 ep2") / "ck"
    export(Checkpoint(folder), tmp_path / "hf")
    card, config = ((tmp_path / "hf" / name).read_text() for name in ("README.md", "config.json"))
    validation = Checkpoint(folder).args.tst_validation
    for row in (
        "| architecture | `Qwen3MoeForCausalLM`: 2 layers x 32, 4 heads (2 of keys and values) of "
        "12, 4 experts, 2 of them active, ",
        "| superposition | bags of 4: 6 iterations, 3,072 raw tokens |",
        "| recovery | next token: 4 iterations, 512 raw tokens |",
        "| raw tokens in all | 3,584 |",
        f"| validation loss | {validation[1]:.4f} nats (next token, iteration 10) |",
    ):
        assert row in card, card
    assert "lm_eval --model hf" in (tmp_path / "hf" / "evaluate.md").read_text()
    parameters = sum(math.prod(weight) for weight in shapes(tmp_path / "hf" / "model.safetensors"))
    assert f"{parameters:,} parameters" in card and json.loads(config)["eos_token_id"] is None


def test_the_card_of_a_model_with_latents(runs, tmp_path):
    export(Checkpoint(runs("deepseek, tp2 ep2") / "ck"), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    sizes = (
        "| architecture | `DeepseekV3ForCausalLM`: 3 layers x 32, 4 heads of multi-latent "
        "attention (rank 16 of keys and values), 8 experts, 4 of them active, and 2 shared, 1 of "
        "multi-token prediction, "
    )
    assert sizes in card, card
    kinds = dtypes(tmp_path / "hf" / "model.safetensors")
    assert {name for name, kind in kinds.items() if kind != "BF16"} == {
        f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2, 3)
    }


def dtypes(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return {name: weights.get_slice(name).get_dtype() for name in weights.keys()}


def shapes(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return [weights.get_slice(name).get_shape() for name in weights.keys()]


DENSE = "llama", "llama-tied", "qwen3"
MODELS = (
    *DENSE,
    *("qwen3-moe", "qwen3-moe-mixed", "deepseek", "deepseek-tied"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models that transformers has made (make_models.py)."""
    folder = tmp_path_factory.mktemp("models")
    without_shims("make_models.py", folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_give_the_same_bytes(models, tmp_path, name):
    """Every file that came in; with them a card and the evaluation's commands."""
    came = models / name / "hf"
    import_(came, tmp_path / "ck")
    source = Checkpoint(tmp_path / "ck")
    gone = export(source, tmp_path / "hf", dtype="float32")
    assert {path.name for path in gone.iterdir()} == {path.name for path in came.iterdir()} | {
        MARK,
        "README.md",
        "evaluate.md",
        MARK,
    }
    for path in came.iterdir():
        assert (gone / path.name).read_bytes() == path.read_bytes(), path.name
    export(source, tmp_path / "bf16")
    theirs, ours = (
        json.loads((folder / "config.json").read_text()) for folder in (came, tmp_path / "bf16")
    )
    assert ours.pop("dtype") == "bfloat16" and theirs.pop("dtype") == "float32" and ours == theirs


DEEPSEEK_KEYS = (
    *("first_k_dense_replace", "n_group", "topk_group", "n_routed_experts", "n_shared_experts"),
    *("num_experts_per_tok", "routed_scaling_factor", "rope_interleave", "q_lora_rank"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "num_nextn_predict_layers",
)


def test_the_config_that_is_made_says_the_same_model(models, tmp_path):
    """Without the files of the import: transformers reads ours as it reads its own."""
    for name in MODELS:
        import_(models / name / "hf", tmp_path / name / "ck")
        kept = Checkpoint(tmp_path / name / "ck").path / "hf"
        shutil.rmtree(kept)
        export(Checkpoint(tmp_path / name / "ck"), tmp_path / name / "hf", dtype="float32")
        ours, theirs = (
            json.loads((folder / "config.json").read_text())
            for folder in (tmp_path / name / "hf", models / name / "hf")
        )
        for key in (
            "architectures",
            "hidden_size",
            "intermediate_size",
            "num_key_value_heads",
            "rms_norm_eps",
            "tie_word_embeddings",
            "moe_intermediate_size",
            "norm_topk_prob",
            "mlp_only_layers",
            "max_position_embeddings",
            *DEEPSEEK_KEYS,
        ):
            assert ours.get(key) == theirs.get(key), key
        if "deepseek" not in name:  # where transformers takes it from the positions' part
            assert ours["head_dim"] == theirs["head_dim"]
        assert ours.get("num_experts") == theirs.get("num_experts", theirs.get("num_local_experts"))


def test_a_kept_config_of_another_model_is_refused(models, tmp_path):
    import_(models / "qwen3" / "hf", tmp_path / "ck")
    kept = Checkpoint(tmp_path / "ck").path / "hf" / "config.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"rms_norm_eps": 1e-5}))
    with pytest.raises(
        TSTError,
        match="rms_norm_eps in .*config.json: expected 1e-06, got 1e-05. It is of another model",
    ):
        export(Checkpoint(tmp_path / "ck"), tmp_path / "hf")


@pytest.mark.parametrize(
    "name, nproc, layout",
    [
        *((name, 1, []) for name in MODELS if name != "deepseek-tied"),
        pytest.param("deepseek-tied", 1, [], marks=pytest.mark.slow),
        ("qwen3-moe", 4, [*TP2, *EP2]),
        pytest.param("deepseek", 4, [*TP2, *EP2], marks=pytest.mark.slow),
    ],
)
def test_megatron_says_what_transformers_says(
    fork_server, corpus, models, tmp_path, name, nproc, layout
):
    """An import in a real run with the flags that it names, whose one step changes nothing:
    Megatron's logits are transformers'.
    """
    given = " ".join(import_(models / name / "hf", tmp_path / "ck", layer_spec="local")).split()
    own = {flag for flag in given if flag.startswith("--")} | {
        "--seq-length",
        "--lr",
        "--min-lr",
        "--train-iters",
        "--lr-warmup-iters",
        "--lr-wsd-decay-iters",
    }
    own |= {"--untie-embeddings-and-output-weights", "--num-layers"}
    rest, skip = [], False
    for flag in TINY:
        skip = flag in own if flag.startswith("--") else skip
        rest += [] if skip else [flag]
    still = (
        "--seq-length 32 --lr 1e-30 --min-lr 0 --train-iters 1 --lr-warmup-iters 0 "
        "--lr-wsd-decay-iters 1 --eval-iters 0"
    ).split()
    load = ["--load", tmp_path / "ck", *LOAD]
    if "deepseek" in name:  # the step would change it whatever the learning rate
        still += ["--moe-router-bias-update-rate", "0"]
    experts = [] if name in DENSE else ["--moe-token-dispatcher-type", "alltoall"]
    run = fork_server.train(
        tmp_path / "answers.pt",
        *rest,
        *still,
        *given,
        *experts,
        *layout,
        *known(corpus),
        *load,
        script=ASK,
        nproc=nproc,
    )
    assert run.ok, run.log[-3000:]
    got, want = (
        torch.load(folder / "answers.pt", weights_only=True) for folder in (tmp_path, models / name)
    )
    assert torch.equal(got["prompts"], want["prompts"])
    close(got["logits"], want["logits"], 2e-6)  # largest seen 3e-7


def broken(models, tmp_path, name="llama", **config):
    folder = tmp_path / "hf"
    shutil.copytree(models / name / "hf", folder)
    about = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(model_type="gpt2"), "model_type: expected llama or .* or deepseek_v3, got gpt2"),
        (dict(attention_bias=True), "attention_bias: expected false or null, got true"),
        (
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "rope: expected default, linear, or Llama 3.1's",
        ),
        (dict(model_type="qwen3"), "self_attn.q_norm.weight, got none"),
        (
            dict(intermediate_size=96),
            r"gate_proj.weight: expected shape \(96, 32\), got \(80, 32\)",
        ),
        (
            dict(num_hidden_layers=1),
            "expected the tensors of its architecture alone, got model.layers.1",
        ),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(models, tmp_path, config, message):
    with pytest.raises(TSTError, match=message):
        import_(broken(models, tmp_path, **config), tmp_path / "ck")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_damaged_folders_are_refused(models, tmp_path):
    folder = broken(models, tmp_path)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(TSTError, match="a whole safetensors file"):
        import_(folder, tmp_path / "ck")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        TSTError, match="expected model.safetensors or model.safetensors.index.json, got n"
    ):
        import_(folder, tmp_path / "ck")
    (folder / "config.json").write_text("{")
    with pytest.raises(
        TSTError, match="config.json: expected JSON, got Expecting .* Give a folder as it was"
    ):
        import_(folder, tmp_path / "ck")
