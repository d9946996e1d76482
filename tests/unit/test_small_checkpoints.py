"""The converter and `verify` on checkpoints of a few rows, made without a training run: what every
shard and copy of a tensor becomes, and what is noticed.
"""

import argparse
import dataclasses
import enum
import fractions
import http
import io
import os
import pickle
import shutil
import signal
import sys
import types
import uuid
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_tst.checkpoint import description, format, rewrite, trusted, write
from megatron_tst.checkpoint.boundary import convert, load_flags
from megatron_tst.checkpoint.format import (
    TRACKER,
    Checkpoint,
    Item,
    checkpoint_to_load,
    mend_tracker,
)
from megatron_tst.checkpoint.inspect import describe
from megatron_tst.checkpoint.phases import store, stored
from megatron_tst.checkpoint.tensors import Tensors
from megatron_tst.checkpoint.trusted import load_trusted
from megatron_tst.checkpoint.verify import differences
from megatron_tst.checkpoint.write import write_checkpoint
from megatron_tst.errors import TSTError
from megatron_tst.schedule import Schedule

HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"
MASTER, AVERAGE = "optimizer.state.fp32_param.", "optimizer.state.exp_avg."
ROWS, WIDTH = 24, 40


def written(folder, tensors, shards=1):
    """A checkpoint of a run with TST: each tensor cut into so many shards of its rows."""
    args = argparse.Namespace(
        seq_length=8, global_batch_size=4, init_method_std=0.02, embedding_init_method_std=0.5
    )
    schedule = Schedule((4, 1), (8, 8), seq_length=8, global_batch_size=4)
    store(args, schedule, planned=schedule)
    items = []
    for name, tensor in tensors.items():
        size = len(tensor) // shards
        items += [
            (name, tensor.shape, (row, 0), tensor[row : row + size].clone())
            for row in range(0, len(tensor), size)
        ]
    iteration = folder / "iter_0000002"
    iteration.mkdir(parents=True)
    write_checkpoint(iteration, items, args, lambda done: None)
    return Checkpoint(iteration)


def of_a_bf16_run(folder, shards=1):
    """Weights in bf16, the optimizer's copies and averages in fp32."""
    torch.manual_seed(0)
    tensors = {}
    for name in (HEAD, EMBEDDING, "decoder.weight"):
        master = torch.randn(ROWS, WIDTH)
        tensors |= {name: master.bfloat16(), MASTER + name: master}
        tensors[AVERAGE + name] = torch.randn(ROWS, WIDTH)
    return written(folder, tensors, shards)


def whole(checkpoint, name):
    shards = [item for item in checkpoint.items if item.name == name]
    return torch.cat(
        [checkpoint.tensor(s) for s in sorted(shards, key=lambda s: tuple(s.index.offset))]
    )


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_new_values_reach_every_copy_and_every_shard(tmp_path, shards):
    """--reinit of a bf16 run: the optimizer's fp32 copy is the weight before it was rounded (else
    its first step would bring the old one back), and the values are the same however the rows are
    cut.
    """
    source = of_a_bf16_run(tmp_path / "source", shards)
    convert(source, tmp_path / "new", reinit=("head", "embedding"))
    new = Checkpoint(tmp_path / "new")
    for name, std in ((HEAD, 0.02), (EMBEDDING, 0.5)):
        weight, master = whole(new, name), whole(new, MASTER + name)
        assert weight.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(weight, master.bfloat16())
        assert not torch.equal(weight, whole(source, name))
        assert abs(master.std() / std - 1) < 0.1 and abs(master.mean() / std) < 0.1
        assert len(torch.unique(master, dim=0)) == ROWS  # no two rows alike
        assert not whole(new, AVERAGE + name).any()
    assert not torch.equal(whole(new, HEAD) / 0.02, whole(new, EMBEDDING) / 0.5)
    for name in ("decoder.weight", MASTER + "decoder.weight", AVERAGE + "decoder.weight"):
        assert torch.equal(whole(new, name), whole(source, name))
    uncut = of_a_bf16_run(tmp_path / "uncut")
    convert(uncut, tmp_path / "other", reinit=("head", "embedding"), seed=0)
    assert differences(Checkpoint(tmp_path / "other"), new) == {}
    convert(source, tmp_path / "seeded", reinit=("head", "embedding"), seed=1)
    assert HEAD in differences(Checkpoint(tmp_path / "seeded"), new)


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    """A disk that keeps other bytes than it was given: the target does not come to be."""
    source = of_a_bf16_run(tmp_path / "source")
    last = max(source.items, key=lambda item: item.offset if item.name in source.tensors else -1)
    flush = rewrite.flush

    def lossy(file):
        flush(file)
        with open(file.name, "r+b") as other:
            other.seek(last.offset + last.length // 2)
            byte = other.read(1)
            other.seek(-1, 1)
            other.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(rewrite, "flush", lossy)
    with pytest.raises(TSTError, match="as it was written, got other bytes. The disk is faulty."):
        convert(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_new_checkpoint_is_read_back(tmp_path, monkeypatch):
    flush = write.flush

    def lossy(file):
        flush(file)
        flip_last_byte_of(file.name)

    def flip_last_byte_of(name):
        with open(name, "r+b") as other:
            other.seek(-1, os.SEEK_END)
            byte = other.read(1)
            other.seek(-1, os.SEEK_END)
            other.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(write, "flush", lossy)
    with pytest.raises(TSTError, match="__0_0.distcp: expected common_state/shard_0_1 as it was"):
        written(tmp_path / "new", {"a": rows()})


@pytest.fixture
def pair(tmp_path):
    def make(one, other, *, shards=(1, 1)):
        first = written(tmp_path / "one", one, shards[0])
        second = written(tmp_path / "other", other, shards[1])
        return differences(first, second), differences(second, first)

    return make


def rows(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(ROWS, WIDTH).to(dtype)


def test_verify_finds_another_type_of_the_same_values(pair):
    value = rows(torch.bfloat16)
    there, back = pair({"a": value, "b": value}, {"a": value, "b": value.float()})
    size = f"[{ROWS}, {WIDTH}]"
    assert there == {"b": f"torch.bfloat16 {size} and torch.float32 {size}"}
    assert back == {"b": f"torch.float32 {size} and torch.bfloat16 {size}"}


def test_verify_finds_another_shape_of_the_same_values(pair):
    value = rows()
    there, _ = pair({"a": value}, {"a": value.view(WIDTH, ROWS)}, shards=(1, 2))
    assert there == {"a": f"torch.float32 {[ROWS, WIDTH]} and torch.float32 {[WIDTH, ROWS]}"}


def test_verify_finds_what_only_one_of_them_has(pair, tmp_path):
    there, back = pair({"a": rows(), "b": rows()}, {"a": rows(), "c": rows()})
    one, other = (f"only in {tmp_path / name / 'iter_0000002'}" for name in ("one", "other"))
    assert there == back == {"b": one, "c": other}


@pytest.mark.parametrize("shards", [(1, 1), (1, 3), (4, 3), (2, 1)])
def test_verify_finds_one_element(pair, shards):
    value, other = rows(), rows()
    other[-1, -1] += 0.25
    there, back = pair({"a": value, "b": value}, {"a": value, "b": other}, shards=shards)
    assert there == back == {"b": "differs by up to 0.25"}


def test_verify_leaves_the_optimizer_out_where_it_is_told(tmp_path):
    value = rows()
    one = written(tmp_path / "one", {"a": value, AVERAGE + "a": value})
    other = written(tmp_path / "other", {"a": value, AVERAGE + "a": value * 2})
    assert [*differences(one, other)] == [AVERAGE + "a"]
    assert differences(one, other, optimizer=False) == {}
    assert differences(one, written(tmp_path / "third", {"a": value}), optimizer=False) == {}


def of_shards(folder, size, *shards):
    """A checkpoint of one tensor, "a", of these shards: (place, values)."""
    iteration = folder / "iter_0000002"
    iteration.mkdir(parents=True)
    items = [("a", size, place, shard.clone()) for place, shard in shards]
    write_checkpoint(iteration, items, argparse.Namespace(), lambda done: None)
    return Checkpoint(iteration)


def test_verify_of_shards_of_other_sizes(tmp_path):
    """Rows in an uneven cut against columns in one, which no two shards have in common."""

    def cut(name, value, *boxes):
        shards = [((a, c), value[a:b, c:d]) for a, b, c, d in boxes]
        return of_shards(tmp_path / name, value.shape, *shards)

    by_rows = [(5, 6, 0, 40), (6, 24, 0, 40), (0, 5, 0, 40)]
    by_columns = [(0, 24, 9, 40), (0, 24, 0, 7), (0, 24, 7, 9)]
    one, same = cut("one", rows(), *by_rows), cut("same", rows(), *by_columns)
    assert differences(one, same) == differences(same, one) == {}
    for row, column in ((0, 0), (4, 6), (5, 7), (6, 8), (23, 39)):
        value = rows()
        value[row, column] -= 0.5
        other = cut(f"{row} {column}", value, *by_columns)
        for pair in ((one, other), (other, one)):
            assert differences(*pair) == {"a": "differs by up to 0.5"}, (row, column)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "one, other, apart",
    [
        ([0.0, 1.0], [0.0, -1.0], "2"),
        ([1.5, 1.0], [1.0, 1.25], "0.5"),
        ([1.25, 1.0], [1.0, 1.5], "0.5"),
        ([2000.0, 1.0], [765.5, 1.0], "1.23e+03"),
        ([NAN, 1.0], [1.0, 1.0], "inf"),
        ([INF, 1.0], [-INF, 1.0], "inf"),
        ([INF, 1.0], [1.0, 1.0], "inf"),
        ([NAN, 1.0], [NAN, 1.5], "0.5"),
        ([INF, 1.0], [INF, 1.5], "0.5"),
        ([0.0, 1.0], [-0.0, 1.0], "0"),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_verify_says_how_far_apart(tmp_path, one, other, apart, size):
    """In one shard and in two."""
    pair = []
    for name, values in (("one", one), ("other", other)):
        shards = zip([(0,), (1,)], torch.tensor(values).split(size))
        pair.append(of_shards(tmp_path / name, (2,), *shards))
    assert differences(*pair) == {"a": f"differs by up to {apart}"}
    assert differences(*pair[::-1]) == {"a": f"differs by up to {apart}"}


def test_verify_says_how_far_it_is(tmp_path):
    """In bytes of the tensors that both have."""
    one = written(tmp_path / "one", {"b": rows(), "a": rows(), "c": rows()}, shards=2)
    other = written(tmp_path / "other", {"a": rows(), "b": rows() + 1, "d": rows()})
    told = []
    differences(one=one, other=other, progress=lambda *now: told.append(now))
    lengths = [item.length for item in one.items if item.name in "ab"]
    assert told == [(sum(lengths[: i + 1]), sum(lengths)) for i in range(4)]


def test_shards_with_a_hole(tmp_path, monkeypatch):
    """Where a description's shards are too many to be held against each other: rows 2 and 3 are in
    both, 6 and 7 in none.
    """
    value = torch.arange(24.0).view(8, 3)
    monkeypatch.setattr(description, "_MOST_CELLS", 0)
    cut = of_shards(tmp_path / "cut", (8, 3), ((0, 0), value[:4]), ((2, 0), value[2:6]))
    found = Tensors(cut)
    for row, elements in ((3, 6), (7, 0)):
        assert said(lambda: found.read("a", row)) == (
            f"{cut.path}: expected shards that cover a, got {elements} of 3 elements. "
            "Copy it again."
        )
    assert torch.equal(found.read("a", 5), value[5])


# --- what `inspect` says, what a conversion leaves out, resets, renames and refuses

ROUTER, NORM = "decoder.layers.mlp.router.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
EXTRA = "decoder.layers.self_attention._extra_state/shard_0_1"
SECOND = "optimizer.state.exp_avg_sq."


def with_common(source, target, **changes):
    """A copy with other common state, and the arguments that `args` names."""
    args = argparse.Namespace(**vars(source.args) | changes.pop("args", {}))
    common = source.common | {"args": args} | changes
    changes = rewrite.Changes(common=common)
    rewrite.rewrite(source=source, target=target, changes=changes)
    return Checkpoint(target)


def of_a_whole_run(tmp_path):
    """Experts, an optimizer with its scalars, a scheduler, FP8's extra state."""
    torch.manual_seed(0)
    tensors = {EXTRA: torch.zeros(ROWS, 1)}
    for name in (HEAD, EMBEDDING, ROUTER, NORM):
        tensors |= {part + name: torch.randn(ROWS, WIDTH) for part in ("", AVERAGE, SECOND, MASTER)}
    optimizer = {
        "state": {"common_step": torch.tensor(6.0)},
        "param_groups": [{"step": 6, "lr": 0.1}, {"lr": 0.2}],
        "inner": {"state": {"common_step": 5}, "param_groups": [{"step": 4}]},
        "scale": 3,
    }
    more = {"optimizer": optimizer, "opt_param_scheduler": {"num_steps": 24}, "iteration": 2}
    source = written(tmp_path / "written", tensors)
    (item,) = [item for item in source.items if item.name == EXTRA]  # an object, not a tensor
    source.items[source.items.index(item)] = dataclasses.replace(item, index=MetadataIndex(EXTRA))
    source.metadata.state_dict_metadata[EXTRA] = BytesStorageMetadata()
    return with_common(source, tmp_path / "source", **more)


def test_everything_that_inspect_shows(tmp_path):
    tensors = {"b": rows(torch.bfloat16), "a": rows(), AVERAGE + "a": rows()}
    source = written(tmp_path / "written", tensors, shards=2)
    args = {"consumed_train_samples": 4, "tensor_model_parallel_size": 2, "tst_bag_size": 4}
    args |= {"sequence_parallel": False, "expert_tensor_parallel_size": None}
    found = with_common(source, tmp_path / "ck", args=args, iteration=1)
    plan = {"bag_sizes": (4, 1), "samples": (8, 8), "width": 4, "recovery_phases": 1}
    about = describe(found)
    assert about.pop("bytes") == sum(
        path.stat().st_size for path in found.path.glob("*.distcp") if path.stat().st_size
    )
    shapes = {"shape": [ROWS, WIDTH], "shards": 2}
    assert [*about["tensors"]] == ["a", "b", AVERAGE + "a"]
    assert about == {
        "path": str(tmp_path / "ck" / "iter_0000002"),
        "format": "torch_dist, common_state (>= 0.19)",
        "iteration": 1,
        "consumed samples": 4,
        "model": "GPTModel",
        "global batch size": 4,
        "sequence length": 8,
        "phase": "superposition",
        "raw tokens": 4 * 4 * 8,
        "phases": [
            {"phase": "superposition", "bag size": 4, "samples": [0, 8], "raw tokens": 256},
            {"phase": "recovery", "bag size": 1, "samples": [8, 16], "raw tokens": 320},
        ],
        "tst settings": {"bag_size": 4, "plan": plan, "planned": plan},
        "layout when saved": {"tensor_model_parallel_size": 2},
        "optimizer": True,
        "optimizer state": {"exp_avg": ROWS * WIDTH},
        "parameters": 2 * ROWS * WIDTH,
        "tensors": {
            "a": {"dtype": "float32"} | shapes,
            AVERAGE + "a": {"dtype": "float32"} | shapes,
            "b": {"dtype": "bfloat16"} | shapes,
        },
    }
    for samples, phase, tokens in (
        (7, "superposition", 224),
        (8, "boundary: bag size 4 done", 256),
        (9, "recovery", 264),
        (16, "recovery", 320),
    ):
        found.args.consumed_train_samples = samples
        about = describe(found)
        assert (about["phase"], about["raw tokens"]) == (phase, tokens)
        assert about["consumed samples"] == samples
    assert {name for name in about["tst settings"]} == {"bag_size", "plan", "planned"}
    found.args.tst_plan = None
    about = describe(found)
    assert (about["phase"], about["raw tokens"]) == ("no TST", 16 * 8)
    assert "phases" not in about
    bare = argparse.Namespace(consumed_train_samples=3)
    legacy = rewrite.Changes(common={"args": bare}, legacy=True)
    legacy.keep = lambda name: not name.startswith("optimizer.")
    rewrite.rewrite(source, tmp_path / "old", legacy)
    about = describe(Checkpoint(tmp_path / "old"))
    assert about["format"] == "torch_dist, common.pt (<= 0.18)" and not about["optimizer"]
    nothing = "iteration", "global batch size", "sequence length"
    assert [about[name] for name in nothing] == [None] * 3
    assert (about["consumed samples"], about["raw tokens"]) == (3, 0)
    assert about["tst settings"] == about["layout when saved"] == {}
    new = with_common(source, tmp_path / "start", args={"tst_plan": None})
    about = describe(new)  # Megatron counts samples from the first iteration on
    assert (about["consumed samples"], about["raw tokens"]) == (0, 0)


def test_phases_in_arguments():
    """What is stored is plain, and what is read back of an earlier version has the defaults."""
    args = argparse.Namespace(seq_length=8, global_batch_size=4, tst_superpose="both")
    planned = Schedule((8, 4, 1), (8, 4, 4), 8, 4)
    assert stored(args) is None and stored(args, "tst_planned") is None
    store(args, planned.lengthened(8), planned)
    kept = {"bag_sizes": (8, 4, 1, 1), "samples": (8, 4, 4, 8), "width": 8, "recovery_phases": 2}
    assert args.tst_plan == kept and stored(args) == planned.lengthened(8)
    assert stored(args, "tst_planned") == planned
    store(args, planned)
    assert stored(args) == planned and "planned" not in args.tst_plan
    args.tst_plan, args.tst_superpose = {"bag_sizes": [4, 1], "samples": [8, 8]}, "output"
    old = Schedule((4, 1), (8, 8), 8, 4, single_tokens_in=True)
    assert stored(args) == old and old.width == 1
    args.tst_superpose = "input"
    assert stored(args) == Schedule((4, 1), (8, 8), 8, 4)


def test_a_conversion_is_a_plain_run_s_checkpoint(tmp_path):
    source = of_a_whole_run(tmp_path)
    told = []
    new = convert(source=source, target=tmp_path / "new", progress=lambda *now: told.append(now))
    assert new == tmp_path / "new" / "iter_0000002"
    assert (tmp_path / "new" / TRACKER).read_text() == "2"
    kept = sum(item.length for item in source.items if item is not source.common_item)
    assert told[-1] == (kept, kept) and told == sorted(told) and told[0][0] < kept
    new = Checkpoint(new)
    args = {"seq_length": 8, "global_batch_size": 4}
    args |= {"init_method_std": 0.02, "embedding_init_method_std": 0.5}
    assert vars(new.args) == args and new.common_item is not None
    assert {k: v for k, v in new.common.items() if k != "args"} == {
        k: v for k, v in source.common.items() if k != "args"
    }
    assert differences(source, new) == {} and EXTRA in new.objects
    assert stored(source.args) is not None  # which is as it was
    with pytest.raises(TSTError) as refused:
        convert(new, tmp_path / "again")
    assert str(refused.value) == (
        f"{new.path}: expected a checkpoint of a TST run (its arguments hold the phases), got one "
        "without. Stock Megatron loads it as it is."
    )
    with pytest.raises(TSTError, match="add --force"):
        convert(source, tmp_path / "new")
    convert(source, tmp_path / "new", force=True, legacy=True)
    old = Checkpoint(tmp_path / "new")
    assert old.common_item is None and (old.path / "common.pt").is_file()
    assert vars(old.args) == args and differences(source, old) == {}


def test_without_the_optimizer(tmp_path):
    source = of_a_whole_run(tmp_path)
    convert(source, tmp_path / "new", drop_optimizer=True, drop_fp8_state=True)
    new = Checkpoint(tmp_path / "new")
    assert {*new.tensors} == {HEAD, EMBEDDING, ROUTER, NORM}
    assert new.objects == [new.common_item.name]
    assert differences(source, new, optimizer=False) == {}
    assert {*new.common} == {*source.common} - {"optimizer", "opt_param_scheduler"}
    assert new.args.no_save_optim is True and "no_save_optim" not in vars(source.args)
    assert "optimizer" in source.common
    target = tmp_path / "new"
    start = ["--load", str(target), "--ckpt-format", "torch_dist"]
    lax = ["--dist-ckpt-strictness", "log_all"]
    assert load_flags(target=target) == load_flags(target, layer_spec="local") == start
    assert load_flags(target, drop_optimizer=True) == [*start, "--no-load-optim"]
    assert load_flags(target, drop_fp8_state=True) == [*start, *lax]
    assert load_flags(target, layer_spec="transformer_engine") == [*start, *lax]


def test_an_optimizer_as_at_the_start(tmp_path):
    source = of_a_whole_run(tmp_path)
    convert(source, tmp_path / "new", reset_optimizer=True)
    new = Checkpoint(tmp_path / "new")
    averages = {name for name in source.tensors if "exp_avg" in name}
    assert len(averages) == 8 and {*differences(source, new)} == averages
    assert not any(whole(new, name).any() for name in averages)
    assert new.common["optimizer"] == {
        "state": {"common_step": torch.tensor(0.0)},
        "param_groups": [{"step": 0, "lr": 0.1}, {"lr": 0.2}],
        "inner": {"state": {"common_step": 0}, "param_groups": [{"step": 0}]},
        "scale": 3,
    }
    assert source.common["optimizer"]["param_groups"][0]["step"] == 6  # which is as it was
    assert new.common["opt_param_scheduler"] == {"num_steps": 24}


def of_a_muon_run(tmp_path, **states):
    """Muon for the router, Adam for the rest, each with its prefix, as dist_muon saves them."""
    torch.manual_seed(0)
    states = {ROUTER: ["momentum_buffer"]} | states
    tensors = {}
    for name in (HEAD, EMBEDDING, ROUTER, NORM):
        of = f"chained_{0 if name == ROUTER else 1}.optimizer.state"
        kept = ["fp32_param", *states.get(name, ["exp_avg", "exp_avg_sq"])]
        tensors |= {name: torch.randn(ROWS, WIDTH)}
        tensors |= {f"{of}.{state}.{name}": torch.randn(ROWS, WIDTH) for state in kept}
    parts = {
        0: {"optimizer": {"param_groups": [{"lr": 0.1, "momentum": 0.9}]}},
        1: {"optimizer": {"param_groups": [{"step": 6}], "state": {"common_step": 6}}},
    }
    source = written(tmp_path / "written", tensors)
    args = {"optimizer": "muon"}
    return with_common(source, tmp_path / "source", args=args, optimizer=parts)


def test_a_muon_run_s_state(tmp_path):
    """Found under any prefix; its momentum is zeroed with Adam's averages and steps."""
    source = of_a_muon_run(tmp_path)
    about, size = describe(source), ROWS * WIDTH
    assert about["parameters"] == 4 * size and about["optimizer state"] == {
        "exp_avg": 3 * size,
        "exp_avg_sq": 3 * size,
        "fp32_param": 4 * size,
        "momentum_buffer": size,
    }
    convert(source, tmp_path / "reset", reset_optimizer=True)
    reset = Checkpoint(tmp_path / "reset")
    changed = differences(source, reset)
    assert {*changed} == {n for n in source.tensors if "momentum_buffer" in n or "exp_avg" in n}
    assert not any(whole(reset, name).any() for name in changed)
    assert reset.common["optimizer"] == {
        0: {"optimizer": {"param_groups": [{"lr": 0.1, "momentum": 0.9}]}},
        1: {"optimizer": {"param_groups": [{"step": 0}], "state": {"common_step": 0}}},
    }
    assert differences(source, reset, optimizer=False) == {}
    convert(source, tmp_path / "bare", drop_optimizer=True)
    assert {*Checkpoint(tmp_path / "bare").tensors} == {HEAD, EMBEDDING, ROUTER, NORM}
    convert(source, tmp_path / "te", layer_spec="transformer_engine")
    other = NORM.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    assert {*Checkpoint(tmp_path / "te").tensors} == {
        name.replace(NORM, other) for name in source.tensors
    }
    convert(source, tmp_path / "ends", reinit=("embedding", "head"))
    assert {*differences(source, Checkpoint(tmp_path / "ends"))} == {
        name for name in source.tensors if name.endswith((HEAD, EMBEDDING))
    }


def test_state_that_does_not_begin_with_zeros_is_refused(tmp_path):
    source = of_a_muon_run(tmp_path, **{ROUTER: ["momentum_buffer", "GG", "Q"]})
    assert said(lambda: convert(source, tmp_path / "new", reset_optimizer=True)) == (
        "new values: expected optimizer state of exp_avg, exp_avg_sq, moment2_buffer, "
        "momentum_buffer, got GG, Q of --optimizer muon. Use --drop-optimizer: the run then begins "
        "its optimizer anew."
    )
    convert(source, tmp_path / "ends", reinit=("embedding",))  # whose own state is Adam's
    bare = written(tmp_path / "bare", {"a": rows()})
    assert said(lambda: convert(bare, tmp_path / "new", reset_optimizer=True)) == (
        "--reset-optimizer: expected an optimizer's state in the checkpoint, got none. It is of "
        "weights alone: leave the flag out."
    )


def test_one_end_anew(tmp_path):
    """The standard deviation is the run's; without one of its own the embedding has the others'."""
    source = of_a_whole_run(tmp_path)
    source.args.embedding_init_method_std = None
    for end, name in (("head", HEAD), ("embedding", EMBEDDING)):
        convert(source, tmp_path / end, reinit=(end,))
        new = Checkpoint(tmp_path / end)
        parts = {part + name for part in ("", AVERAGE, SECOND, MASTER)}
        assert {*differences(source, new)} == parts
        assert whole(new, name).std().item() == pytest.approx(0.02, rel=0.1)
        assert not whole(new, SECOND + name).any()


def test_the_norm_before_experts_has_the_layer_spec_s_name(tmp_path):
    source = of_a_whole_run(tmp_path)
    other = NORM.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    convert(source, tmp_path / "te", layer_spec="transformer_engine")
    there = Checkpoint(tmp_path / "te")
    moved = {part + NORM: part + other for part in ("", AVERAGE, SECOND, MASTER)}
    assert {*there.tensors} == {moved.get(name, name) for name in source.tensors}
    for old, new in moved.items():
        assert torch.equal(whole(there, new), whole(source, old))
    there.args.tst_plan = source.args.tst_plan
    convert(there, tmp_path / "back", layer_spec="local")
    assert differences(source, Checkpoint(tmp_path / "back")) == {}
    convert(source, tmp_path / "same", layer_spec="local")
    assert differences(source, Checkpoint(tmp_path / "same")) == {}


FLAT = "optimizer.distributed.dp_group_idx_0.param"
BY_PARAMETER = (
    "new values: expected optimizer state by parameter, got the distributed optimizer's flat "
    "buffers. Save with --dist-ckpt-optim-fully-reshardable; for --reinit alone --drop-optimizer "
    "will do."
)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"layer_spec": "te"},
            "--layer-spec: expected local or transformer_engine, got te. "
            "Name the spec of the run that is to load it.",
        ),
        (
            {"reinit": ("embedding", "body")},
            "--reinit: expected embedding, head or embedding,head, got embedding,body. "
            "Name the tables that get new values.",
        ),
        (
            {"reinit": ("embedding", "head")},
            "--reinit head: expected a tensor output_layer.weight, got none. "
            "A tied head is the embedding: name that alone.",
        ),
        (
            {"reset_optimizer": True, "drop_optimizer": True},
            "--reset-optimizer and --drop-optimizer: expected one of the two, got both. "
            "Leave one out.",
        ),
        ({"reinit": ("embedding",)}, BY_PARAMETER),
        ({"reset_optimizer": True}, BY_PARAMETER),
    ],
)
def test_conversions_that_are_refused(tmp_path, options, message):
    source = written(tmp_path / "source", {EMBEDDING: rows(), FLAT: rows()})
    with pytest.raises(TSTError) as refused:
        convert(source, tmp_path / "new", **options)
    assert str(refused.value) == message and not (tmp_path / "new").exists()
    convert(source, tmp_path / "fine", drop_optimizer=True, reinit=("embedding",))
    assert differences(source, Checkpoint(tmp_path / "fine"), optimizer=False).keys() == {EMBEDDING}


def test_the_first_table_that_is_not_there_is_named(tmp_path):
    source = written(tmp_path / "source", {"a": rows()})
    for reinit, name in ((("head", "embedding"), HEAD), (("embedding", "head"), EMBEDDING)):
        assert said(lambda: convert(source, tmp_path / "new", reinit=reinit)) == (
            f"--reinit {reinit[0]}: expected a tensor {name}, got none. "
            "A tied head is the embedding: name that alone."
        )


@pytest.mark.parametrize("new", [torch.float64, (WIDTH, ROWS), (ROWS // 2, 2 * WIDTH)])
def test_an_edited_shard_is_of_the_same_kind(tmp_path, new):
    source = written(tmp_path / "source", {"a": rows()})

    def edit(name, place, shard):
        assert (name, place) == ("a", (0, 0))
        return shard.to(new) if isinstance(new, torch.dtype) else shard.reshape(new)

    changes = rewrite.Changes(source.common, tensor=edit, edited=frozenset("a"))
    with pytest.raises(AssertionError):
        rewrite.rewrite(source, tmp_path / "new", changes)
    assert not (tmp_path / "new").exists()


def test_flattened_tensors_keep_their_descriptions(tmp_path):
    """Megatron's own table of them follows names and what is left out."""
    source = of_a_whole_run(tmp_path)
    source.metadata.mcore_data = {NORM: "shape of it", AVERAGE + NORM: "too", HEAD: "the head's"}
    source.metadata.planner_data = {"of": "the run that saved it"}
    options = {"drop_optimizer": True, "layer_spec": "transformer_engine"}
    new = Checkpoint(convert(source, tmp_path / "new", **options))
    name = "decoder.layers.pre_mlp_layernorm.weight"
    assert new.metadata.mcore_data == {name: "shape of it", HEAD: "the head's"}
    assert new.metadata.planner_data is None


def test_a_copy_of_several_files(tmp_path):
    """Each item stays in the file that it was in, wherever the description begins."""
    source = written(tmp_path / "source", {"a": rows(), "b": rows(seed=1), "c": rows(seed=2)})
    first, second = source.path / "__0_0.distcp", source.path / "__1_0.distcp"
    (start,) = (item.offset for item in source.items if item.name == "c")
    second.write_bytes(first.read_bytes()[start:])
    os.truncate(first, start)
    storage = {}
    for index, info in reversed(source.metadata.storage_data.items()):
        if info.offset >= start:
            info = dataclasses.replace(info, relative_path=second.name, offset=info.offset - start)
        storage[index] = info
    source.metadata.storage_data = storage
    (source.path / ".metadata").write_bytes(pickle.dumps(source.metadata))
    source = Checkpoint(source.path)
    assert source.items[0] is source.common_item and source.items[0].offset > 0
    rewrite.rewrite(source, tmp_path / "new", rewrite.Changes(common=source.common))
    new = Checkpoint(tmp_path / "new")
    files = {"a": first.name, "b": first.name, "c": second.name}
    files["common_state/shard_0_1"] = "__common_0.distcp"
    assert {item.name: item.file for item in new.items} == files
    assert differences(source, new) == {} and new.common == source.common


def test_further_files_of_a_copy(small, tmp_path):
    """They are there before the target is, which is not replaced unasked."""
    source, target = Checkpoint(small), tmp_path / "new"

    def more(folder):
        assert not target.exists()
        (folder / "note.txt").write_text("of it")

    rewrite.rewrite(source, target, rewrite.Changes(common=source.common, more=more))
    assert (target / small.name / "note.txt").read_text() == "of it"
    with pytest.raises(TSTError, match="add --force"):
        rewrite.rewrite(source, target, rewrite.Changes(common=source.common))
    assert (target / small.name / "note.txt").read_text() == "of it"


def test_a_released_checkpoint_stays_one(tmp_path):
    """What Megatron's own converters write has a name in place of an iteration."""
    source = written(tmp_path / "source", {"a": rows()})
    source = Checkpoint(source.path.rename(tmp_path / "source" / "release"))
    assert convert(source, tmp_path / "new") == tmp_path / "new" / "release"
    assert (tmp_path / "new" / TRACKER).read_text() == "release"
    assert differences(source, Checkpoint(tmp_path / "new")) == {}


def test_every_checksum_of_what_is_read_back(small):
    found = Checkpoint(small)
    sums = {item.index: zlib.crc32(found.read(item)) for item in found.items}
    rewrite.read_back(small, sums)
    for item in found.items:
        for change in (-1, 1):
            other = sums | {item.index: sums[item.index] + change}
            assert said(lambda: rewrite.read_back(small, other)) == (
                f"{small}/__0_0.distcp: expected {item.name} as it was written, got other bytes. "
                "The disk is faulty."
            )


# --- tensors out of shards


def test_tensors_in_any_cut(tmp_path):
    """Layers in one tensor or one by one, cut along any dimension; a part of it alone is read."""
    value = torch.arange(4 * 6 * 5.0).view(4, 6, 5)
    args = argparse.Namespace()
    boxes = [(a, b) for a in (slice(0, 1), slice(1, 4)) for b in (slice(0, 2), slice(2, 6))]
    items = [
        ("decoder.layers.w", value.shape, (a.start, b.start, 0), value[a, b]) for a, b in boxes
    ]
    items.append(("decoder.layers.7.w", (6, 5), (0, 0), value[0]))
    items.append(("decoder.layers.v", (4, 6, 5), (0, 0, 0), value + 1))
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    write_checkpoint(folder, items, args, lambda done: None)
    checkpoint = Checkpoint(folder)
    found = Tensors(checkpoint)
    assert "decoder.layers.w" in found and "decoder.layers" not in found
    assert "common_state/shard_0_1" not in found
    assert found.shape("decoder.layers.w") == (4, 6, 5)
    assert type(found.shape("decoder.layers.w")) is tuple
    assert torch.equal(found.read("decoder.layers.w"), value)
    for layer in range(4):
        assert torch.equal(found.read("decoder.layers.w", layer), value[layer])
        assert torch.equal(found.of_layer(layer, "none", "w"), value[layer])
        assert torch.equal(found.of_layer(layer, "v", "w"), value[layer] + 1)
        for row in range(6):
            assert torch.equal(found.read("decoder.layers.w", layer, row), value[layer, row])
            assert torch.equal(found.of_layer(layer, "w", at=(row,)), value[layer, row])
    assert torch.equal(found.of_layer(7, "w"), value[0])
    assert torch.equal(found.of_layer(7, "w", at=(3,)), value[0, 3])
    kind = "The model is of another kind than its arguments say."
    for call, message in (
        (lambda: found.read("x"), f"{folder}: expected a tensor x, got none. {kind}"),
        (lambda: found.of_layer(1, "x"), f"{folder}: expected layer 1's x, got none. {kind}"),
        (
            lambda: found.of_layer(1, "x", "y"),
            f"{folder}: expected layer 1's x or y, got none. {kind}",
        ),
        (
            lambda: found.read("decoder.layers.w", 4),
            f"{folder}: expected shards that cover decoder.layers.w, got 0 of 30 elements. "
            "Copy it again.",
        ),
    ):
        with pytest.raises(TSTError) as refused:
            call()
        assert str(refused.value) == message


def test_what_a_new_checkpoint_says_of_itself(tmp_path):
    """One of weights alone, written without a model."""
    folder, told = tmp_path / "iter_0000000", []
    folder.mkdir()
    args = argparse.Namespace(seq_length=8)
    value = rows()
    pieces = [("a", value.shape, (0, 0), value[:, :3]), ("a", value.shape, (0, 3), value[:, 3:])]
    write_checkpoint(folder, pieces, args, told.append)
    found = Checkpoint(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "metadata.json",
    ]
    about = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    assert (folder / "metadata.json").read_text() == about
    assert found.common == {
        "args": args,
        "iteration": 0,
        "checkpoint_version": 3.0,
        "content_metadata": {"singleton_local_shards": False},
    }
    first, second, common = sorted(found.items, key=lambda item: item.offset)
    assert told == [second.offset, common.offset] and common is found.common_item
    assert first.length < 4 * value.numel()  # a shard alone, not the tensor that it is a view of
    assert torch.equal(Tensors(found).read("a"), value)
    assert found.check_all() == (3, sum(item.length for item in found.items))
    seen = []
    found.check_all(share=1, of=2, progress=lambda *now: seen.append(now))
    assert len(seen) == 1 and seen[-1][0] == seen[-1][1]
    assert found.folders == [folder] and found.objects == ["common_state/shard_0_1"]
    (tmp_path / TRACKER).write_text("0")
    assert found.folders == [folder, tmp_path]
    assert checkpoint_to_load(tmp_path).path == folder
    assert checkpoint_to_load(folder).path == folder
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert checkpoint_to_load(tmp_path) is None and checkpoint_to_load(folder) is None
    (folder / "metadata.json").write_text('{"sharded_backend": "dzarr"}')
    with pytest.raises(TSTError, match="got dzarr. Save with --ckpt-format torch_dist."):
        checkpoint_to_load(folder)
    (folder / "metadata.json").unlink()
    assert checkpoint_to_load(tmp_path) is None and checkpoint_to_load(folder) is None


# --- what a checkpoint's files are


def said(call):
    with pytest.raises(TSTError) as refused:
        call()
    return str(refused.value)


@pytest.fixture
def small(tmp_path):
    """Two tensors in a file, the common state behind them. -> the iteration's folder"""
    return written(tmp_path / "small", {"a": rows(), "b": rows(seed=1)}).path


def test_files_that_are_not_as_long_as_they_should_be(small, tmp_path):
    new = Path(shutil.copytree(small, tmp_path / "new" / small.name))
    rewrite.rewrite(Checkpoint(small), tmp_path / "old", rewrite.Changes({}, legacy=True))
    old, size = tmp_path / "old" / small.name, (new / "__0_0.distcp").stat().st_size
    start, do = f"{new}: expected every file as its metadata name it, got", "Copy it again or use "
    do += "another iteration."
    with open(new / "__0_0.distcp", "ab") as file:
        file.write(b".")
    assert said(lambda: Checkpoint(new)) == (
        f"{start} __0_0.distcp has {size + 1} bytes, {size} of them named. {do}"
    )
    os.truncate(new / "__0_0.distcp", size - 1)
    assert said(lambda: Checkpoint(new)) == (
        f"{start} __0_0.distcp has {size - 1} of {size} bytes. {do}"
    )
    (new / "__0_0.distcp").unlink()
    assert said(lambda: Checkpoint(new)) == f"{start} __0_0.distcp is missing. {do}"
    (old / "__0_0.distcp").unlink()
    (old / "common.pt").unlink()
    assert said(lambda: Checkpoint(old)) == (
        f"{old}: expected every file as its metadata name it, got "
        f"__0_0.distcp is missing; common.pt is missing. {do}"
    )
    (new / ".metadata").unlink()
    incomplete = "It is incomplete: copy it again or use another iteration."
    no_file = f"{new}/.metadata: expected readable metadata, got no file. {incomplete}"
    assert said(lambda: Checkpoint(new)) == no_file
    os.mkfifo(new / ".metadata")
    assert said(lambda: Checkpoint(new)) == no_file
    assert said(lambda: Checkpoint(tmp_path)) == (
        f"{tmp_path}: expected a checkpoint folder, or one with {TRACKER}, got neither. "
        "Give the folder of --save or one iter_... in it."
    )


def test_items_that_are_compressed(small):
    metadata = Checkpoint(small).metadata
    for index, info in metadata.storage_data.items():
        if index.fqn != "a":
            info.transform_descriptors = ["zstd"]
    (small / ".metadata").write_bytes(pickle.dumps(metadata))
    assert said(lambda: Checkpoint(small)) == (
        f"{small}: expected plain items, got compressed ones (b). Save it without compression."
    )


@pytest.mark.parametrize("legacy, name", [(True, "common.pt"), (False, "common_state/shard_0_1")])
def test_a_common_state_that_is_none(small, tmp_path, legacy, name):
    def common(what, to):
        rewrite.rewrite(Checkpoint(small), tmp_path / to, rewrite.Changes(what, legacy=legacy))
        return Checkpoint(tmp_path / to)

    other = "It was not written by megatron.training."
    found = common([1, 2], "list")
    assert said(lambda: found.common) == (
        f"{found.path / name}: expected Megatron's common state, got list. {other}"
    )
    found = common({"iteration": 3}, "no arguments")
    assert said(lambda: found.args) == (
        f"{found.path}: expected Megatron's arguments in it, got NoneType. {other}"
    )
    assert common({"args": argparse.Namespace(a=1)}, "whole").args == argparse.Namespace(a=1)


def test_an_item_that_is_no_tensor(small):
    found = Checkpoint(small)
    (item,) = [item for item in found.items if item.name == "a"]
    (common,) = [item for item in found.items if item is found.common_item]
    found.items = [dataclasses.replace(common, index=item.index)]
    assert said(lambda: found.check(found.items[0])) == (
        f"{small}/{common.file}: expected a at byte {common.offset} as it was written, got a list. "
        "Copy it again or use another iteration."
    )


def test_a_window_is_a_file_of_its_own(tmp_path, small, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    item = Item(MetadataIndex("a"), str(tmp_path / "file"), 10, 20)
    found = Checkpoint(small)
    with found.window(item) as window:
        assert window.readable() and window.seekable() and window.tell() == 0
        assert window.read(5) == bytes(range(10, 15)) and window.tell() == 5
        assert window.seek(2, os.SEEK_CUR) == 7 and window.read(1) == bytes([17])
        assert window.seek(-3, os.SEEK_END) == 17 == window.tell()
        assert window.read() == bytes([27, 28, 29]) and window.read() == b""
        assert window.seek(25) == 25 and window.read(9) == b""
        assert window.seek(0) == 0 and window.read(50) == bytes(range(10, 30))
        file = window._file
    assert window.closed and file.closed
    monkeypatch.setattr(format, "_BLOCK", 8)
    blocks = [*found.blocks(item, check=False)]
    assert [len(block) for block in blocks] == [8, 8, 4]
    assert b"".join(blocks) == bytes(range(10, 30))


def test_trackers_that_name_what_is_there(small):
    folder = small.parent
    tracker = folder / TRACKER
    small.rename(folder / "release")
    tracker.write_text(" release\n")
    assert Checkpoint(folder).path == folder / "release"
    (folder / "release").rename(folder / "iter_0000012")
    do = "The last whole one is iter_0000012."
    names_it = f"that {TRACKER} names, got none."
    assert said(lambda: Checkpoint(folder)) == (
        f"{folder}: expected the folder release {names_it} {do}"
    )
    tracker.write_text("00012")
    assert Checkpoint(folder).path == folder / "iter_0000012" and mend_tracker(folder) is None
    assert tracker.read_text() == "00012"
    (folder / "iter_0000012" / "__0_0.distcp").unlink()
    tracker.write_text("3")
    assert said(lambda: Checkpoint(folder)) == (
        f"{folder}: expected the folder iter_0000003 {names_it} No other one is whole."
    )
    tracker.write_text("x" * 50)
    assert said(lambda: Checkpoint(folder)) == (
        f"{tracker}: expected an iteration, got '{'x' * 40}'. Write the iteration to take into it."
    )
    tracker.write_bytes(b"")
    assert said(lambda: Checkpoint(folder)) == (
        f"{tracker}: expected an iteration, got an empty file beside no whole checkpoint. "
        "Nothing can be read: use another folder."
    )
    tracker.unlink()
    assert mend_tracker(folder) is None and not tracker.exists()
    assert checkpoint_to_load(folder) is None and checkpoint_to_load(str(folder / "no")) is None


def warned(call, recwarn):
    """-> what it returns, and the warnings as texts"""
    recwarn.clear()
    found = call()
    return found, [str(warning.message).removeprefix("megatron_tst: ") for warning in recwarn]


def test_which_iteration_stands_for_a_folder(small, recwarn):
    """The one that the tracker names, with a word about a newer one; where it is empty, the newest
    that is whole.
    """
    folder = small.parent
    tracker = folder / TRACKER
    newer = Path(shutil.copytree(small, folder / "iter_0000010"))
    release = Path(shutil.copytree(small, folder / "release"))
    for other in ("iter_", "iter_x", "iter_12x", "xiter_0000012", "iter_0000011x"):
        (folder / other).mkdir()
    said_of_newer = f"{tracker} names iter_0000002; iter_0000010 is there too"
    for text, path, words in (
        ("2", small, [said_of_newer]),
        ("10", newer, []),
        ("release", release, []),
    ):
        tracker.write_text(text)
        assert warned(lambda: format.iteration_folder(folder), recwarn) == (path, words)
        assert mend_tracker(folder) is None and tracker.read_text() == text
        assert checkpoint_to_load(folder).path == path
    tracker.write_text("")
    assert warned(lambda: format.iteration_folder(folder), recwarn) == (
        newer,
        [
            f"{folder}: {TRACKER} was empty (a run killed while it wrote it); going on from "
            "iteration 10"
        ],
    )
    (newer / "__0_0.distcp").unlink()
    assert warned(lambda: Checkpoint(folder).path, recwarn)[0] == small
    assert mend_tracker(str(folder)) == 2 and tracker.read_text() == "2"
    assert [path.name for path in folder.glob(f"{TRACKER}*")] == [TRACKER]
    assert format.iteration_folder(release) == release
    (folder / "iter_9999999").mkdir()
    later = Path(shutil.copytree(small, folder / "iter_10000000"))
    tracker.write_text("9999999")
    assert warned(lambda: format.iteration_folder(folder), recwarn)[1] == [
        f"{tracker} names iter_9999999; iter_10000000 is there too"
    ]
    tracker.write_text("")
    assert warned(lambda: format.iteration_folder(folder), recwarn)[0] == later
    for path in (newer, release, later, folder / "iter_9999999"):
        shutil.rmtree(path)
    tracker.write_text("2")
    assert warned(lambda: format.iteration_folder(folder), recwarn) == (small, [])


def test_checkpoints_that_a_run_may_go_on_from(small, tmp_path):
    """Other formats are Megatron's business; what is none of its formats is refused."""
    folder = small.parent
    for backend, loads in (
        ("torch_dist", True),
        ("zarr", False),
        ("torch_dcp", False),
        ("fsdp_dtensor", False),
    ):
        (small / "metadata.json").write_text(f'{{"sharded_backend": "{backend}"}}')
        (folder / TRACKER).write_text("2")
        for path in (small, folder, str(folder)):
            found = checkpoint_to_load(path)
            assert (found.path if found else None) == (small if loads else None)
        (folder / TRACKER).unlink()
        assert checkpoint_to_load(folder) is None
    (folder / TRACKER).write_text("3")
    assert "got none. " in said(lambda: checkpoint_to_load(folder))


def test_a_metadata_json_that_cannot_be_read(small):
    (small.parent / TRACKER).write_text("2")
    (small / "metadata.json").unlink()
    (small / "metadata.json").mkdir()
    do = "Save with --ckpt-format torch_dist."
    assert said(lambda: Checkpoint(small.parent)) == (
        f"{small}: expected a torch_dist checkpoint (metadata.json says so), got IsADirectoryError:"
        f" [Errno 21] Is a directory: '{small}/metadata.json'. {do}"
    )


def test_a_list_of_common_states(small, tmp_path):
    """One object is stored as a list of one; a list of none or of two is none."""
    for what in ([], [{"args": 1}, {"args": 2}]):
        target = tmp_path / str(len(what))
        rewrite.rewrite(Checkpoint(small), target, rewrite.Changes({}))
        found, buffer = Checkpoint(target), io.BytesIO()
        torch.save(what, buffer)
        (item,) = [item for item in found.items if item is found.common_item]
        with open(found.path / item.file, "r+b") as file:
            file.seek(item.offset)
            file.write(buffer.getvalue())
        changed = dataclasses.replace(item, length=len(buffer.getvalue()))
        found.items[found.items.index(item)] = changed
        assert said(lambda: found.common) == (
            f"{found.path}/{item.name}: expected Megatron's common state, got list. It was not "
            "written by megatron.training."
        )


def on_a_gpu(tensor):
    """torch.save of it, as it would be if it lay on a GPU."""
    buffer, moved = io.BytesIO(), io.BytesIO()
    torch.save(tensor, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(moved, "w") as new:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith("/data.pkl"):
                assert content.count(b"X\x03\0\0\0cpu") == 1
                content = content.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
            new.writestr(entry.filename, content)
    return moved.getvalue()


def with_item(found, name, content):
    """A checkpoint whose item has other bytes, in a file of their own. -> the item"""
    (item,) = [item for item in found.items if item.name == name]
    (found.path / "other").write_bytes(content)
    item = dataclasses.replace(item, file="other", offset=0, length=len(content))
    found.items = [item]
    return item


def test_a_shard_that_was_saved_from_a_gpu(small):
    """It is checked and read on a machine that has none."""
    found = Checkpoint(small)
    content = on_a_gpu(rows())
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(io.BytesIO(content), weights_only=True)
    item = with_item(found, "a", content)
    found.check(item)
    shard = found.tensor(item)
    assert shard.device.type == "cpu" and torch.equal(shard, rows())


class Runs:
    """Unpickled by whoever trusts it, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_an_item_that_would_run_something(small, tmp_path):
    """As a tensor's, or as an object's that is read as a tensor."""
    found, buffer = Checkpoint(small), io.BytesIO()
    torch.save(Runs(str(tmp_path / "run")), buffer)
    item = with_item(found, "a", buffer.getvalue())
    assert said(lambda: found.check(item)).startswith(
        f"{small}/other: expected a at byte 0 as it was written, got UnpicklingError: Weights only"
    )
    common = dataclasses.replace(item, index=MetadataIndex("none"))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        found.tensor(common)
    assert not (tmp_path / "run").exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert (tmp_path / "run").exists()  # so it would have


def test_the_shares_of_two_ranks(tmp_path):
    """Every item is read once, and neither rank reads much more than the other."""
    sizes = [40, 1, 38, 2, 36, 3, 34, 4]
    tensors = {f"t{number}": torch.zeros(size * 1000, 1) for number, size in enumerate(sizes)}
    found = written(tmp_path / "found", tensors)
    shares = []
    for rank in range(2):
        told = []
        shares.append(found.check_all(share=rank, of=2, progress=lambda *now: told.append(now)))
        assert told[-1] == (shares[-1][1],) * 2 and len(told) == shares[-1][0]
        assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert [items for items, _ in shares] == [5, 4]
    assert sum(size for _, size in shares) == sum(item.length for item in found.items)
    one, other = (size for _, size in shares)
    assert abs(one - other) <= max(item.length for item in found.items) / 4
    assert found.check_all() == (9, one + other)
    with pytest.raises(TypeError):
        found.check_all(0, 2)  # which is which is said


def test_what_cannot_be_changed(small):
    """An item is a fact about a file, and can be a key."""
    item, same = (Checkpoint(small).items[0] for _ in range(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        item.offset = 7
    assert {item: 1} == {same: 1}


# --- what is unpickled


@pytest.fixture
def nothing_allowed():
    """Not what Megatron's modules tell torch to unpickle when they are imported."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


def test_types_that_arguments_may_hold(tmp_path, nothing_allowed):
    from megatron.core.transformer.enums import AttnBackend

    args = argparse.Namespace(
        attention_backend=AttnBackend.flash,
        exit_signal=signal.SIGTERM,
        params_dtype=torch.bfloat16,
        betas=(0.9, 0.95),
    )
    torch.save({"args": args}, tmp_path / "common.pt")
    assert load_trusted(tmp_path / "common.pt") == {"args": args}
    with open(tmp_path / "common.pt", "rb") as file:
        assert load_trusted(file, "a name") == {"args": args}
    run = "It is not unpickled, since that could run anything."
    kinds = "expected tensors, plain values and Megatron's argument types"
    for value, full in (
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (http.HTTPStatus.OK, "http.HTTPStatus"),
        (uuid.SafeUUID.safe, "uuid.SafeUUID"),
        (Schedule((1,), (1,), 1, 1), "megatron_tst.schedule.Schedule"),
        (TransformerConfig, "megatron.core.transformer.transformer_config.TransformerConfig"),
        (parallel_state.is_initialized, "megatron.core.parallel_state.is_initialized"),
    ):
        torch.save([value], tmp_path / "other.pt")
        assert said(lambda: load_trusted(tmp_path / "other.pt")) == (
            f"{tmp_path}/other.pt: {kinds}, got {full}. {run}"
        )
        with open(tmp_path / "other.pt", "rb") as file:
            assert said(lambda: load_trusted(file, "a name")).startswith(f"a name: {kinds}")
    for text in (b"text", b""):
        (tmp_path / "text.pt").write_bytes(text)
        for file in (tmp_path / "text.pt", io.BytesIO(text)):
            assert said(lambda: load_trusted(file, "a name")) == (
                "a name: expected a readable torch.save, got damage (BadZipFile: File is not a zip "
                "file). The checkpoint is damaged."
            )
    assert said(lambda: load_trusted(tmp_path / "none.pt")) == (
        f"{tmp_path}/none.pt: expected a readable torch.save, got FileNotFoundError: [Errno 2] No "
        f"such file or directory: '{tmp_path}/none.pt'. The checkpoint is damaged."
    )


def test_warnings_of_a_type_s_module_are_not_the_user_s(tmp_path, monkeypatch, nothing_allowed):
    """Megatron warns of libraries that only a training run needs."""
    from megatron.core.transformer.enums import AttnBackend

    load = trusted.importlib.import_module

    def loud(name):
        warnings.warn(f"{name} without a GPU's libraries", stacklevel=1)
        return load(name)

    torch.save([AttnBackend.flash], tmp_path / "file.pt")
    torch.serialization.clear_safe_globals()
    monkeypatch.setattr(trusted, "importlib", types.SimpleNamespace(import_module=loud))
    with warnings.catch_warnings(action="error"):
        assert load_trusted(tmp_path / "file.pt") == [AttnBackend.flash]


def test_a_type_of_another_megatron(tmp_path):
    module = types.ModuleType("megatron.not_there")
    module.Kind = enum.Enum("Kind", {"ONE": 1}, module="megatron.not_there")
    sys.modules["megatron.not_there"] = module
    try:
        torch.save([module.Kind.ONE], tmp_path / "file.pt")
    finally:
        del sys.modules["megatron.not_there"]
    assert said(lambda: load_trusted(tmp_path / "file.pt")) == (
        "megatron.not_there.Kind: expected a type of the Megatron that is installed, got "
        "ModuleNotFoundError: No module named 'megatron.not_there'. Use the Megatron that wrote "
        "it, or mend this one: `megatron-tst doctor`."
    )
