"""The converter and `verify` on checkpoints of a few rows, made without a training run: what every
shard and copy of a tensor becomes, and what is noticed.
"""

import argparse

import pytest
import torch

from megatron_tst.checkpoint import rewrite
from megatron_tst.checkpoint.boundary import convert
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.phases import store
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
    convert(uncut, tmp_path / "other", reinit=("head", "embedding"))
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
