"""Checkpoints of real runs: looked into, handed to stock Megatron, compared; nothing half written,
nothing damaged goes through.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import environment
from support.runs import TINY, TST, all_over, data, in_a_fork
from support.tiers import tiers

from megatron_tst import cli
from megatron_tst.checkpoint import boundary  # noqa: F401  before the fork that is killed at work
from megatron_tst.checkpoint.atomic import MARK
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.verify import differences
from megatron_tst.errors import TSTError

MOE = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64".split()


@pytest.fixture(scope="module")
def dense(fork_server, corpus, tmp_path_factory):
    """Checkpoints at 4, 6 (the boundary) and 8 of a run in one process. -> folder"""
    folder = tmp_path_factory.mktemp("dense")
    run = fork_server.train(
        *TINY, *TST, *data(corpus), "--save", folder / "ck", "--save-interval", "2"
    )
    assert run.ok, run.log[-3000:]
    return folder / "ck"


def at(folder, iteration):
    return folder / f"iter_{iteration:07d}"


def tool(*arguments):
    return cli.main(list(map(str, arguments)))


def shown(capsys, path):
    assert tool("inspect", path, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "iteration, phase, raw",
    [
        (4, "superposition", 4 * 4 * 32 * 4),
        (6, "boundary: bag size 4 done", 3072),
        (8, "recovery", 3328),
    ],
)
def test_inspect(dense, capsys, iteration, phase, raw):
    about = shown(capsys, at(dense, iteration))
    assert (about["iteration"], about["consumed samples"], about["phase"], about["raw tokens"]) == (
        iteration,
        4 * iteration,
        phase,
        raw,
    )
    assert (
        about["tst settings"]["bag_size"] == 4
        and about["optimizer"]
        and about["parameters"] == 53408
    )
    assert about["tensors"]["embedding.word_embeddings.weight"] == {
        "shape": [512, 32],
        "dtype": "float32",
        "shards": 1,
    }
    assert (
        tool("inspect", at(dense, iteration)) == 0
        and f"phase              {phase}" in capsys.readouterr().out
    )


def test_the_folder_of_save_stands_for_its_last_iteration(dense, capsys):
    assert shown(capsys, dense)["iteration"] == 10


def test_boundary_changes_the_arguments_alone(dense, tmp_path, capsys):
    assert tool("boundary", at(dense, 6), tmp_path / "out") == 0
    assert tool("verify", at(dense, 6), tmp_path / "out") == 0
    before, after = Checkpoint(at(dense, 6)), Checkpoint(tmp_path / "out")
    args = dict(vars(before.args))
    gone = {name for name in args if name.startswith("tst_")}
    assert gone and vars(after.args) == {
        name: value for name, value in args.items() if name not in gone
    }
    assert {k: v for k, v in before.common.items() if k not in ("args", "optimizer")}.keys() == {
        k for k in after.common if k not in ("args", "optimizer")
    }
    assert (after.common["iteration"], after.common["opt_param_scheduler"]) == (
        6,
        before.common["opt_param_scheduler"],
    )
    assert {
        item.name: before.read(item)
        for item in before.items
        if item.name in before.objects and "common" not in item.name
    } == {
        item.name: after.read(item)
        for item in after.items
        if item.name in after.objects and "common" not in item.name
    }
    capsys.readouterr()
    assert shown(capsys, tmp_path / "out")["phase"] == "no TST"


def test_dropping_the_optimizer(dense, tmp_path, capsys):
    call = ("boundary", at(dense, 6), tmp_path / "out", "--drop-optimizer", "--drop-fp8-state")
    assert tool(*call, "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["written"] == str(Checkpoint(tmp_path / "out").path)
    assert (about["iteration"], about["raw tokens"], about["model"]) == (6, 3072, "GPTModel")
    load = f"--load {tmp_path / 'out'} --ckpt-format torch_dist --no-load-optim"
    assert " ".join(about["load"]) == f"{load} --dist-ckpt-strictness log_all"
    after = Checkpoint(tmp_path / "out")
    assert (
        not [name for name in after.tensors if name.startswith("optimizer")]
        and "optimizer" not in after.common
    )
    assert (
        tool("verify", at(dense, 6), tmp_path / "out") == 1
        and tool("verify", at(dense, 6), tmp_path / "out", "--weights-only") == 0
    )
    assert sum(f.stat().st_size for f in after.path.iterdir()) < 0.5 * sum(
        f.stat().st_size for f in at(dense, 6).iterdir()
    )


def test_new_embedding_and_head(dense, tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert (
            tool(
                "boundary",
                at(dense, 6),
                tmp_path / name,
                "--reinit",
                "embedding,head",
                "--seed",
                seed,
            )
            == 0
        )
    source, one = Checkpoint(at(dense, 6)), Checkpoint(tmp_path / "one")
    found = differences(source, one)
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    assert set(found) == {
        prefix + end
        for end in ends
        for prefix in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    }
    assert not differences(one, Checkpoint(tmp_path / "same")) and set(
        differences(one, Checkpoint(tmp_path / "other"))
    ) == set(ends)
    for item in one.items:
        if item.name in found:
            new = one.tensor(item)
            if "exp_avg" in item.name:
                assert not new.any()
            else:
                assert (
                    new.std().item() == pytest.approx(source.args.init_method_std, rel=0.05)
                    and abs(new.mean()) < 1e-3
                )


FULLY = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
SAVED = {
    "bf16": (1, ["--bf16"]),
    "distributed optimizer": (2, FULLY),
    "bf16, distributed optimizer": (2, ["--bf16", *FULLY]),
}


@pytest.mark.parametrize("name", tiers(SAVED, {"bf16, distributed optimizer"}))
def test_new_values_reach_the_optimizers_copy(fork_server, corpus, tmp_path, name):
    """Of weights in bf16 the optimizer keeps the fp32 values, rounded to the weights: a run that
    goes on from the new values trains them.
    """
    nproc, flags = SAVED[name]
    flags = [*TINY, *data(corpus), *flags]
    save = ["--tst-exit-at-boundary", "--save", tmp_path / "ck", "--save-interval", "99"]
    run = fork_server.train(*flags, *TST, *save, nproc=nproc)
    assert run.ok, run.log[-3000:]
    assert tool("boundary", tmp_path / "ck", tmp_path / "out", "--reinit", "embedding,head") == 0
    before, after = Checkpoint(tmp_path / "ck"), Checkpoint(tmp_path / "out")
    found = {item.name: after.tensor(item) for item in after.items if item.name in after.tensors}
    for end in ("embedding.word_embeddings.weight", "output_layer.weight"):
        (copy,) = (n for n in found if n.endswith(end) and "exp_avg" not in n and n != end)
        weight, fp32 = found[end], found[copy].reshape(found[end].shape)
        assert weight.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
        assert fp32.dtype == torch.float32 and torch.equal(fp32.to(weight.dtype), weight)
        assert torch.equal(fp32, weight.float()) == ("bf16" not in name)
        assert weight.std().item() == pytest.approx(before.args.init_method_std, rel=0.05)
    go_on = fork_server.train(*flags, "--load", tmp_path / "out", nproc=nproc)
    assert go_on.ok, go_on.log[-3000:]
    assert 6.1 < float(go_on.stock_losses[7]) < 6.4  # log 512: nothing is known of the new values


def test_one_end_has_new_values_as_the_run_drew_them(fork_server, corpus, tmp_path):
    given = [
        "--embedding-init-method-std",
        "0.5",
        "--tst-exit-at-boundary",
        "--save",
        tmp_path / "ck",
        "--save-interval",
        "99",
    ]
    assert fork_server.train(*TINY, *TST, *data(corpus), *given).ok
    ends = {
        "embedding": ("embedding.word_embeddings.weight", 0.5),
        "head": ("output_layer.weight", 0.02),
    }
    for which, (end, std) in ends.items():
        assert tool("boundary", tmp_path / "ck", tmp_path / which, "--reinit", which) == 0
        new = Checkpoint(tmp_path / which)
        found = differences(Checkpoint(tmp_path / "ck"), new)
        assert set(found) == {
            prefix + end
            for prefix in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
        }
        (weight,) = [new.tensor(item) for item in new.items if item.name == end]
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_resetting_the_optimizer_keeps_the_schedule(dense, fork_server, corpus, tmp_path):
    assert tool("boundary", at(dense, 6), tmp_path / "plain") == 0
    assert tool("boundary", at(dense, 6), tmp_path / "out", "--reset-optimizer") == 0
    source, after = Checkpoint(at(dense, 6)), Checkpoint(tmp_path / "out")
    averages = {name for name in source.tensors if name.startswith("optimizer.state.exp_avg")}
    assert averages and set(differences(source, after)) == averages
    assert all(not after.tensor(item).any() for item in after.items if item.name in averages)
    assert after.common["opt_param_scheduler"] == source.common["opt_param_scheduler"]
    assert [int(c.common["optimizer"]["state"]["common_step"]) for c in (source, after)] == [6, 0]
    runs = [
        fork_server.train(*TINY, *data(corpus), "--load", tmp_path / name)
        for name in ("plain", "out")
    ]
    rates, losses = zip(
        *((re.findall(r"learning rate: ([\d.E+-]+)", run.log), run.stock_losses) for run in runs)
    )
    assert (
        len(rates[0]) == 4
        and rates[0] == rates[1]
        and losses[0][7] == losses[1][7]
        and losses[0][10] != losses[1][10]
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (("--reinit", "body"), "--reinit: expected embedding, head or embedding,head, got body"),
        (
            ("--reset-optimizer", "--drop-optimizer"),
            "--reset-optimizer and --drop-optimizer: expected one of the two",
        ),
    ],
)
def test_refusals_of_new_values(dense, tmp_path, capsys, options, message):
    assert tool("boundary", at(dense, 6), tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("format, there", [("0.18", True), ("0.19", False)])
def test_either_format_holds_the_same(dense, tmp_path, format, there):
    assert tool("boundary", at(dense, 6), tmp_path / "out", "--format", format) == 0
    after = Checkpoint(tmp_path / "out")
    assert (after.path / "common.pt").is_file() == there and (
        "common_state/shard_0_1" in after.objects
    ) == (not there)
    assert after.common["iteration"] == 6 and not differences(Checkpoint(at(dense, 6)), after)
    assert (
        tool("boundary", tmp_path / "out", tmp_path / "again") == 2
    )  # it is a stock checkpoint now


def test_names_of_expert_layers(fork_server, corpus, tmp_path, capsys):
    run = fork_server.train(
        *TINY,
        *TST,
        *data(corpus),
        *MOE,
        "--save",
        tmp_path / "ck",
        "--save-interval",
        "6",
        "--exit-interval",
        "6",
    )
    assert run.ok, run.log[-3000:]
    assert (
        tool("boundary", tmp_path / "ck", tmp_path / "te", "--layer-spec", "transformer_engine")
        == 0
    )
    assert "--ckpt-format torch_dist --dist-ckpt-strictness log_all" in capsys.readouterr().out
    names = {side: set(Checkpoint(tmp_path / side).tensors) for side in ("ck", "te")}
    old, new = (
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.pre_mlp_layernorm.weight",
    )
    prefixes = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    assert names["ck"] - names["te"] == {prefix + old for prefix in prefixes} and names[
        "te"
    ] - names["ck"] == {prefix + new for prefix in prefixes}


def test_verify_over_different_cuts(fork_server, corpus, dense, tmp_path, capsys):
    """One step from the same checkpoint, in one process and under TP2: the same but for rounding,
    whichever way the shards lie.
    """
    shutil.copytree(at(dense, 6), tmp_path / "ck" / "iter_0000006")
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("6")
    flags = [
        *TINY,
        *TST,
        *data(corpus),
        "--load",
        tmp_path / "ck",
        "--save-interval",
        "1",
        "--exit-interval",
        "7",
    ]
    for name, nproc, layout in (
        ("one", 1, []),
        ("two", 2, ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "64"]),
    ):
        run = fork_server.train(*flags, *layout, "--save", tmp_path / name, nproc=nproc)
        assert run.ok, run.log[-2000:]
    one, two = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two")
    assert [len(c.tensors["embedding.word_embeddings.weight"].chunks) for c in (one, two)] == [1, 2]
    # of weights that one step of Adam has moved by 1e-3; largest seen 4e-9
    for found in (differences(one, two), differences(two, one)):
        assert all(float(how.removeprefix("differs by up to ")) < 1e-6 for how in found.values()), (
            found
        )
    capsys.readouterr()
    assert tool("verify", at(dense, 6), tmp_path / "two", "--json") == 1
    about = json.loads(capsys.readouterr().out)
    assert about["checkpoints"] == [str(at(dense, 6)), str(two.path)] and not about["same"]
    how = about["differences"]["decoder.layers.mlp.linear_fc1.weight"]
    assert how.startswith("differs by up to")
    assert tool("verify", at(dense, 6), at(dense, 6), "--json", "--weights-only") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["same"] and about["weights_only"] and about["differences"] == {}
    assert tool("verify", at(dense, 6), tmp_path / "two") == 1
    assert "decoder.layers.mlp.linear_fc1.weight: differs by up to" in capsys.readouterr().out


@pytest.fixture
def copied(dense, tmp_path):
    return Path(shutil.copytree(at(dense, 6), tmp_path / "ck" / "iter_0000006"))


def refused(capsys, *arguments):
    assert tool(*arguments) == 2
    text = capsys.readouterr().err.strip()
    assert re.match("megatron-tst (inspect|boundary|verify): error: ", text) and "\n" not in text
    return text


def test_incomplete_and_damaged_sources_are_named(copied, tmp_path, capsys):
    shard = copied / "__0_0.distcp"
    whole = shard.read_bytes()
    os.truncate(shard, 500_000)
    assert "__0_0.distcp has 500000 of 80" in refused(capsys, "boundary", copied, tmp_path / "out")
    shard.unlink()
    assert "__0_0.distcp is missing" in refused(capsys, "inspect", copied)
    item = next(
        i for i in _opened(copied, whole) if i.name == "decoder.layers.mlp.linear_fc2.weight"
    )
    middle = item.offset + item.length // 2
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "decoder.layers.mlp.linear_fc2.weight" in refused(
        capsys, "boundary", copied, tmp_path / "out"
    )
    assert not (tmp_path / "out").exists() and sorted(os.listdir(tmp_path)) == ["ck"]
    (copied / ".metadata").write_bytes((copied / ".metadata").read_bytes()[:1000])
    assert "readable metadata" in refused(capsys, "inspect", copied)
    (copied / "metadata.json").unlink()
    assert "expected a checkpoint folder" in refused(capsys, "inspect", copied)


def _opened(folder, shard):
    (folder / "__0_0.distcp").write_bytes(shard)
    return Checkpoint(folder).items


def test_nothing_is_unpickled_that_could_run(copied, capsys, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (copied / ".metadata").write_bytes(pickle.dumps(Attack()))
    assert "has no place in a checkpoint's metadata" in refused(capsys, "inspect", copied)
    torch.save({"args": Attack(), "iteration": 1}, tmp_path / "common.pt")
    from megatron_tst.checkpoint.trusted import load_trusted

    with pytest.raises(TSTError, match="posix.system"):
        load_trusted(tmp_path / "common.pt")
    assert not (tmp_path / "ran").exists()


def test_targets(dense, copied, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert "add --force to replace it" in refused(capsys, "boundary", copied, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    with pytest.warns(UserWarning, match="did not write there: it is .*out.old-1 now"):
        assert tool("boundary", copied, tmp_path / "out", "--force") == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        MARK,
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    ]
    assert os.listdir(tmp_path / "out.old-1") == ["mine"]
    assert "outside the source" in refused(capsys, "boundary", copied, copied.parent, "--force")
    assert sorted(os.listdir(tmp_path)) == ["ck", "out", "out.old-1"]


def test_too_little_space(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100_000)
    )
    assert "of free space" in refused(capsys, "boundary", copied, tmp_path / "out")


def test_a_source_without_tst(fork_server, corpus, tmp_path, capsys):
    run = fork_server.train(
        *TINY,
        *data(corpus),
        "--save",
        tmp_path / "ck",
        "--save-interval",
        "2",
        "--exit-interval",
        "2",
    )
    assert run.ok
    assert "a checkpoint of a TST run" in refused(
        capsys, "boundary", tmp_path / "ck", tmp_path / "out"
    )
    assert shown(capsys, tmp_path / "ck")["phase"] == "no TST"


def converted(source, target, *killed):
    return in_a_fork(lambda: tool("boundary", source, target), *killed)


def test_killed_at_any_moment(dense, tmp_path):
    """The target is absent or whole, the source as it was; the next try cleans up and succeeds."""
    source, target = at(dense, 6), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    whole = 0
    for killed in all_over(*converted(source, target), times=20):
        shutil.rmtree(target, ignore_errors=True)
        converted(source, target, *killed)
        if target.exists():
            whole += 1
            assert not differences(Checkpoint(source), Checkpoint(target))
    assert whole < 20
    shutil.rmtree(target, ignore_errors=True)
    converted(source, target)
    assert os.listdir(tmp_path) == ["out"] and not differences(
        Checkpoint(source), Checkpoint(target)
    )
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


MEASURED = """
import resource, sys
from megatron_tst import cli
from megatron_tst.checkpoint import boundary
from megatron_tst.checkpoint.format import Checkpoint
Checkpoint(sys.argv[1]).args  # what imports Megatron's argument types
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert cli.main(["boundary", *sys.argv[1:]]) == 0
print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def enlarge(folder, tensors, elements):
    """Add so many fp32 tensors of so many elements to a checkpoint, in a file of their own."""
    from torch.distributed.checkpoint import metadata as dcp

    metadata = Checkpoint(folder).metadata
    info = next(iter(metadata.storage_data.values()))
    zeros, origin = torch.zeros(elements), torch.Size([0])
    with open(folder / "__9_0.distcp", "wb") as file:
        for i in range(tensors):
            name, start = f"decoder.extra.{i}", file.tell()
            torch.save(zeros, file)
            place = dcp.ChunkStorageMetadata(origin, zeros.shape)
            metadata.state_dict_metadata[name] = dcp.TensorStorageMetadata(
                dcp.TensorProperties(torch.float32), zeros.shape, [place]
            )
            metadata.storage_data[dcp.MetadataIndex(name, origin)] = dataclasses.replace(
                info,
                relative_path=file.name.split("/")[-1],
                offset=start,
                length=file.tell() - start,
            )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.slow
def test_memory_is_a_few_blocks_and_not_the_model(copied, tmp_path):
    """A checkpoint of 3 GB (six tensors of half a GB) is converted in less than 100 MiB beyond the
    imports.
    """
    enlarge(copied, 6, 1 << 27)
    assert sum(file.stat().st_size for file in copied.iterdir()) > 3 << 30
    code = [
        sys.executable,
        "-c",
        MEASURED,
        str(copied),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(code, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    used = int(done.stdout.split("MiB")[1])
    shutil.rmtree(tmp_path)  # 6 GB
    assert used < 100, used
