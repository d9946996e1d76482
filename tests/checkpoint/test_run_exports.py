"""What an export writes beside the weights of a run, value by value: Bridge's run_config.yaml and
train_state.pt, the end token, the card. The checkpoint is made without training; what is computed
with exports is in test_export_hf.py and in tests/peers.
"""

import argparse
import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from support.hf_folder import word_tokenizer

from megatron_tst.checkpoint.format import TRACKER, Checkpoint
from megatron_tst.checkpoint.phases import store
from megatron_tst.checkpoint.write import write_checkpoint
from megatron_tst.errors import TSTError
from megatron_tst.export import hf, nemo
from megatron_tst.export.architectures import architecture_of
from megatron_tst.export.calibration import ends_of
from megatron_tst.export.import_hf import items
from megatron_tst.export.safetensors_files import Weight, write_weights
from megatron_tst.schedule import Schedule

VOCAB = 90  # of 96 rows
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --ffn-hidden-size 48 --seq-length 32 --max-position-embeddings 64 "
    "--position-embedding-type rope --rotary-base 50000 --normalization RMSNorm --swiglu "
    "--norm-epsilon 3e-6 --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0.125 --hidden-dropout 0.25 --init-method-std 0.03 --qk-layernorm "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 10 --bf16 --vocab-size 90 "
    "--lr 3e-3 --min-lr 3e-5 --lr-decay-style WSD --lr-wsd-decay-style cosine "
    "--lr-wsd-decay-iters 3 --lr-decay-iters 9 --lr-warmup-iters 2 --weight-decay 0.05 "
    "--adam-beta1 0.8 --adam-beta2 0.97 --adam-eps 1e-7 --clip-grad 0.5 "
    "--use-distributed-optimizer --ckpt-fully-parallel-save --transformer-impl local"
)
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-aux-loss-coeff 0.01 "
    "--moe-z-loss-coeff 0.001 --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall"
)
MOMENT = "optimizer.state.exp_avg.output_layer.weight"


@functools.cache
def parser():
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


class Random:
    """Hugging Face's tensors of any name."""

    def read(self, name, shape):
        draw = torch.Generator().manual_seed(sum(name.encode()))
        return torch.randn(shape, generator=draw).bfloat16()


def run(folder, flags="", consumed=40, **changes):
    """The checkpoint of a run of 10 iterations of 4 samples, 6 of them in bags of 4."""
    args = parser().parse_args(f"{FLAGS} {flags}".split())
    fine = dict(
        consumed_train_samples=consumed,
        consumed_valid_samples=16,
        skipped_train_samples=8,
        tst_bag_size=4,
        tst_iters=6,
        tst_superpose="both",
        tst_loss="mce",
        tst_target_weighting="power-law",
        tst_validation=(10, 4.56789),
        moe_aux_loss_coeff=0.01,  # Megatron takes a list of one apart when it validates
    )
    vars(args).update(fine | changes)
    schedule = Schedule.of(4, 6, 40, 32, 4)
    store(args, schedule, planned=schedule)
    iteration = folder / f"iter_{consumed // 4:07d}"
    iteration.mkdir(parents=True)
    arch = architecture_of(args, 96, "bfloat16")
    moment = torch.ones(96, 32)
    more = [(MOMENT, (96, 32), (0, 0), moment)]
    write_checkpoint(iteration, [*items(Random(), arch, "local"), *more], args, lambda done: None)
    source = Checkpoint(iteration)
    source.common.update(
        iteration=consumed // 4,
        num_floating_point_operations_so_far=1.5e12,
        optimizer={"param_groups": []},
        opt_param_scheduler={"num_steps": consumed},
    )
    return source


@pytest.fixture(scope="module")
def bridged(tmp_path_factory):
    """-> (a run with experts, its checkpoint for Bridge)"""
    folder = tmp_path_factory.mktemp("bridged")
    source = run(folder / "ck", EXPERTS)
    words = word_tokenizer(folder / "words", range(VOCAB), eos_token="w7")
    target = nemo.export(source, folder / "nemo", tokenizer=words, layer_spec="transformer_engine")
    assert target == folder / "nemo" / "iter_0000010"
    return source, target


def test_bridge_gets_the_optimizer_and_the_schedule_of_the_run(bridged):
    _, folder = bridged
    found = yaml.safe_load((folder / "run_config.yaml").read_text())
    config = "megatron.bridge.training.config"
    assert found["optimizer"] == {
        "_target_": f"{config}.OptimizerConfig",
        "optimizer": "adam",
        "lr": 3e-3,
        "min_lr": 3e-5,
        "weight_decay": 0.05,
        "adam_beta1": 0.8,
        "adam_beta2": 0.97,
        "adam_eps": 1e-7,
        "sgd_momentum": 0.9,
        "clip_grad": 0.5,
        "bf16": True,
        "fp16": False,
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": False,
    }
    assert found["scheduler"] == {
        "_target_": f"{config}.SchedulerConfig",
        "lr_decay_style": "WSD",
        "lr_wsd_decay_style": "cosine",
        "lr_decay_iters": 9,
        "lr_wsd_decay_iters": 3,
        "lr_warmup_iters": 2,
        "lr_warmup_samples": 0,
        "lr_warmup_init": 0.0,
        "weight_decay_incr_style": "constant",
    }
    assert found["checkpoint"] == {
        "_target_": f"{config}.CheckpointConfig",
        "save_optim": True,
        "save_rng": True,
        "fully_parallel_save": True,
    }
    assert found["tokenizer"] == {
        "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(folder / "tokenizer"),
    }


def test_bridge_gets_the_model_of_the_run(bridged):
    _, folder = bridged
    found = yaml.safe_load((folder / "run_config.yaml").read_text())["model"]
    assert found.pop("_target_") == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    assert found == {
        "transformer_layer_spec": {
            "_target_": "megatron.bridge.models.gpt_provider.transformer_engine_layer_spec",
            "_call_": False,
        },
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 3e-6,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": 50000.0,
        "rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "seq_len_interpolation_factor": None,
        "init_method_std": 0.03,
        "hidden_dropout": 0.25,
        "attention_dropout": 0.125,
        "bf16": True,
        "fp16": False,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_layer_freq": 1,
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.001,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "alltoall",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
        "share_embeddings_and_output_weights": False,
        "vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 2,  # 90 = 2 * 45
        "should_pad_vocab": True,
        "seq_length": 64,
    }


def test_bridge_goes_on_where_the_run_stopped(bridged):
    _, folder = bridged
    assert (folder.parent / TRACKER).read_text() == "10"
    want = {
        "step": 10,
        "consumed_train_samples": 40,
        "skipped_train_samples": 8,
        "consumed_valid_samples": 16,
        "floating_point_operations_so_far": 1.5e12,
        "do_train": False,
        "do_valid": False,
        "do_test": False,
    }
    for path in (folder / "train_state.pt", folder.parent / "latest_train_state.pt"):
        state = torch.load(path, weights_only=True)
        assert {name: value.item() for name, value in state.items()} == want
        assert state["step"].dtype == torch.int64
        assert state["floating_point_operations_so_far"].dtype == torch.float64


def test_the_files_beside_bridges_weights(bridged):
    source, folder = bridged
    for name in ("tokenizer", "hf"):
        assert (folder / name / "tokenizer.json").is_file()
        settings = json.loads((folder / name / "tokenizer_config.json").read_text())
        assert settings["eos_token"] == "w7"
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (7, VOCAB)
    assert config["model_type"] == "qwen3_moe"
    generation = json.loads((folder / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": None, "eos_token_id": 7}
    assert "library_name: megatron-bridge" in (folder.parent / "README.md").read_text()
    # without TST's arguments; the norm before the experts has the name of the other layer spec
    found = Checkpoint(folder)
    assert [name for name in vars(found.args) if name.startswith("tst_")] == []
    renamed = {
        name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        for name in source.tensors
    }
    assert found.tensors.keys() == renamed != source.tensors.keys()


def test_bridge_gets_the_settings_of_muon(tmp_path):
    flags = "--optimizer muon --muon-momentum 0.9 --muon-tp-mode duplicated --muon-num-ns-steps 4"
    source = run(tmp_path / "ck", flags)
    folder = nemo.export(source, tmp_path / "nemo")
    found = yaml.safe_load((folder / "run_config.yaml").read_text())["optimizer"]
    want = dict(muon_momentum=0.9, muon_tp_mode="duplicated", muon_num_ns_steps=4)
    assert found.items() >= {"optimizer": "muon", "muon_scalar_optimizer": "adam", **want}.items()
    from megatron.core.optimizer import OptimizerConfig

    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    assert found.keys() - {"_target_"} <= known


def test_without_the_optimizer(tmp_path):
    source = run(tmp_path / "ck", EXPERTS)
    folder = nemo.export(source, tmp_path / "nemo", drop_optimizer=True)
    found = yaml.safe_load((folder / "run_config.yaml").read_text())
    assert found["checkpoint"]["save_optim"] is False and "tokenizer" not in found
    assert (folder / "hf").is_dir() and not (folder / "tokenizer").exists()
    new = Checkpoint(folder)
    assert source.tensors.keys() - new.tensors.keys() == {MOMENT}
    assert not {"optimizer", "opt_param_scheduler"} & new.common.keys()
    assert new.args.no_save_optim is True and not source.args.no_save_optim
    # the run's own layer spec
    assert found["model"]["transformer_layer_spec"]["_target_"].endswith(".local_layer_spec")
    assert found["model"]["apply_rope_fusion"] is False


@pytest.mark.parametrize(
    "changes, name",
    [(dict(bf16=True), "bfloat16"), (dict(fp16=True), "float16"), ({}, "float32")],
)
def test_the_dtype_of_the_run(tmp_path, changes, name):
    source = run(tmp_path / "ck", **dict(bf16=False, fp16=False, no_save_optim=True) | changes)
    folder = nemo.export(source, tmp_path / "nemo")
    found = yaml.safe_load((folder / "run_config.yaml").read_text())
    assert found["model"]["params_dtype"]["_target_"] == f"torch.{name}"
    assert found["checkpoint"]["save_optim"] is False
    assert json.loads((folder / "hf" / "config.json").read_text())["torch_dtype"] == name
    assert f"| weights | {name}, untied embeddings |" in (tmp_path / "nemo/README.md").read_text()


# ---- phases


@pytest.mark.parametrize("export", [hf.export, nemo.export])
@pytest.mark.parametrize("consumed", [20, 24, 28])
def test_from_which_checkpoint_on(tmp_path, export, consumed):
    """The boundary's own checkpoint has seen bags alone: recovery begins behind it."""
    source = run(tmp_path / "ck", consumed=consumed)
    if consumed <= 24:
        with pytest.raises(
            TSTError,
            match=f"recovery phase, got one after {consumed} of 24 superposed samples. The model "
            "has learned to predict bags.* Recover first, or add --allow-superposition",
        ):
            export(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        export(source, tmp_path / "out", allow_superposition=True)
    else:
        export(source, tmp_path / "out")


def test_room_for_all_weights_is_asked_for(tmp_path, monkeypatch):
    source, usage = run(tmp_path / "ck"), shutil._ntuple_diskusage
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32 + 2 * 8
    need = 2 * (2 * layer + 2 * VOCAB * 32 + 32)
    need = int(1.01 * need) + (16 << 20)  # and some room for the files beside them
    for free in (need - 1, need):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        if free < need:
            with pytest.raises(TSTError, match="of free space"):
                hf.export(source, tmp_path / "out")
            assert not (tmp_path / "out").exists()
        else:
            hf.export(source, tmp_path / "out")


def test_dense_layers_among_experts_are_warned_of(tmp_path):
    source = run(tmp_path / "ck", f"{EXPERTS} --moe-layer-freq [0,1]")
    with pytest.warns(UserWarning, match="Megatron-Bridge 0.6 resumes this model but exports no"):
        nemo.export(source, tmp_path / "nemo")


def test_a_tensor_that_the_arguments_do_not_describe(tmp_path):
    source = run(tmp_path / "ck")
    source.args.ffn_hidden_size = 64
    message = r"mlp.down_proj.weight: expected shape \(32, 64\), got \(32, 48\). The model is of"
    with pytest.raises(TSTError, match=message):
        hf.export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_tst_has_no_such_phase(tmp_path):
    source = run(tmp_path / "ck", consumed=4)
    source.args.tst_plan = None
    folder = hf.export(source, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "Pre-trained with Megatron-Core. Load it" in card and "bags" not in card


@pytest.mark.parametrize(
    "consumed, rows",
    [
        (
            20,
            [
                "| training | 5 iterations of 4 x 32 positions, learning rate 0.003 |",
                "| superposition | bags of 4: 5 iterations, 2,560 raw tokens |",
                "| recovery | next token: 0 iterations, 0 raw tokens |",
                "| raw tokens in all | 2,560 |",
            ],
        ),
        (
            36,
            [
                "| training | 9 iterations of 4 x 32 positions, learning rate 0.003 |",
                "| superposition | bags of 4: 6 iterations, 3,072 raw tokens |",
                "| recovery | next token: 3 iterations, 384 raw tokens |",
                "| raw tokens in all | 3,456 |",
            ],
        ),
    ],
)
def test_the_card_counts_what_was_read(tmp_path, consumed, rows):
    source = run(tmp_path / "ck", consumed=consumed)
    folder = hf.export(source, tmp_path / "out", dtype="float32", allow_superposition=True)
    card = (folder / "README.md").read_text()
    # by hand: 4 projections of 32 x 32 (of which two halved), 3 of 32 x 48, norms
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32 + 2 * 8
    parameters = 2 * layer + 2 * VOCAB * 32 + 32
    for row in (
        f"| architecture | `Qwen3ForCausalLM`: 2 layers x 32, 4 heads (2 of keys and values) of 8, "
        f"{parameters:,} parameters, vocabulary of 90 |",
        "| weights | float32, untied embeddings |",
        "| objective of superposition | mce, power-law weighting, both superposed |",
        "| validation loss | 4.5679 nats (next token, iteration 10) |",
        *rows,
    ):
        assert row in card, card


# ---- the end token of an export to Hugging Face


@pytest.mark.parametrize("settings", [{}, {"eos_token": "w5"}])
def test_generation_ends_at_the_end_of_a_document(tmp_path, settings):
    """The token is named in the tokenizer's settings, or is a usual one; both files say its id, and
    settings that are made name it.
    """
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<|endoftext|>": VOCAB - 1}
    given = word_tokenizer(tmp_path / "words", words, **settings)
    folder = hf.export(run(tmp_path / "ck"), tmp_path / "hf", tokenizer=given)
    end, number = ("w5", 5) if settings else ("<|endoftext|>", VOCAB - 1)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == number
    made = json.loads((folder / "tokenizer_config.json").read_text())
    assert made["eos_token"] == end
    assert settings or made["tokenizer_class"] == "PreTrainedTokenizerFast"


# ---- files of safetensors


def tensors(**sizes):
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, 3, generator=draw) for name, size in sizes.items()}


def written(folder, made, dtype, limit):
    folder.mkdir()
    weights = [Weight(n, tuple(t.shape), lambda t=t: t) for n, t in made.items()]
    done = []
    write_weights(folder, weights, dtype, limit, done.append)
    assert done == sorted(done) and done[-1] == sum(
        path.stat().st_size for path in folder.glob("*.safetensors")
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_file_is_what_safetensors_writes(tmp_path, dtype):
    from safetensors.torch import save_file

    made = tensors(b=2, a=5, c=1)
    written(tmp_path / "ours", made, dtype, 1 << 20)
    theirs = {name: tensor.to(getattr(torch, dtype)) for name, tensor in made.items()}
    save_file(theirs, tmp_path / "theirs", {"format": "pt"})
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["model.safetensors"]
    ours = tmp_path / "ours" / "model.safetensors"
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    "limit, files",
    [
        (72, ["ab", "c", "de"]),  # 24 + 48 bytes fit exactly; c is larger than a file may be
        (71, ["a", "b", "c", "de"]),
        (10_000, ["abcde"]),
        (1, ["a", "b", "c", "d", "e"]),
    ],
)
def test_which_file_a_tensor_lies_in(tmp_path, limit, files):
    from safetensors.torch import load_file

    made = tensors(a=4, b=8, c=30, d=2, e=3)  # of 3 columns in bf16: 6 bytes a row
    written(tmp_path / "out", made, "bfloat16", limit)
    if len(files) == 1:
        where = {"model.safetensors": files[0]}
    else:
        count = len(files)
        where = {
            f"model-{i + 1:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(files)
        }
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {n: file for file, names in where.items() for n in names}
        assert index["metadata"] == {"total_size": 47 * 3 * 2}
    for file, names in where.items():
        found = load_file(tmp_path / "out" / file)
        assert found.keys() == set(names)
        assert all(torch.equal(found[name], made[name].bfloat16()) for name in names)


# ---- what quantize reads of a dataset


@pytest.fixture
def dataset(tmp_path):
    """Ids 0, 1, 2, ... in documents of 3, 5, 4, 1, 6 and 5 tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, at = tmp_path / "text", 0
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in (3, 5, 4, 1, 6, 5):
        builder.add_document(torch.arange(at, at + length), [length])
        at += length
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_the_ends_of_a_dataset(dataset):
    """Two samples of four tokens and a label from each end; 24 tokens are there."""
    first, last = ends_of(dataset, 2, 4, 24)
    assert first.tolist() == [[*range(5)], [*range(5, 10)]] and first.dtype == np.int64
    assert last.tolist() == [[*range(14, 19)], [*range(19, 24)]] and last.dtype == np.int64
    first, last = ends_of(dataset, 1, 11, 24)  # all of it
    assert np.concatenate([first, last]).ravel().tolist() == [*range(24)]


@pytest.mark.parametrize(
    "samples, length, vocab, message",
    [
        (
            1,
            12,
            24,
            r"expected 26 tokens \(twice 1 samples of 12 and a label\), got 24. Give fewer",
        ),
        (2, 4, 23, "expected ids below the vocabulary of 23, got 23"),
    ],
)
def test_a_dataset_that_does_not_do(dataset, samples, length, vocab, message):
    with pytest.raises(TSTError, match=message):
        ends_of(dataset, samples, length, vocab)


def test_a_dataset_that_is_cut_or_missing(dataset):
    with open(f"{dataset}.bin", "r+b") as file:
        file.truncate(47)
    with pytest.raises(TSTError, match="text.bin: expected 48 bytes, as its index says, got 47"):
        ends_of(dataset, 1, 4, 24)
    with pytest.raises(TSTError, match="--data-path: expected an indexed dataset .*more.bin"):
        ends_of(f"{dataset}more", 1, 4, 24)
