"""Damaged checkpoints and indices: one sentence, or the values that were written. Never others, and
never a copy that cannot be read.
"""

import argparse
import collections
import dataclasses
import io
import pickle
import random
import shutil
import types
import warnings
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.runs import TINY, TST, data
from support.tiers import tiers
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_tst import cli
from megatron_tst.checkpoint import description
from megatron_tst.checkpoint import rewrite as rewriting
from megatron_tst.checkpoint.boundary import convert
from megatron_tst.checkpoint.description import check_description
from megatron_tst.checkpoint.format import TRACKER, Checkpoint, mend_tracker
from megatron_tst.checkpoint.rewrite import Changes, rewrite
from megatron_tst.checkpoint.tensors import Tensors
from megatron_tst.checkpoint.trusted import check_archive, load_metadata, load_trusted
from megatron_tst.checkpoint.verify import differences
from megatron_tst.checkpoint.write import write_checkpoint
from megatron_tst.checks.files import check_data_files
from megatron_tst.errors import TSTError

STATE = "optimizer.state."
TP2PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type "
    "alltoall --expert-model-parallel-size 2 --mtp-num-layers 1"
).split()
SOURCES = {
    "dense": (1, []),
    "tp2 pp2": (4, TP2PP2),
    "bf16, distributed optimizer": (2, ["--bf16", "--use-distributed-optimizer"]),
    "experts": (2, EXPERTS),
}
# files -> flips of each in one part of the test
KINDS = {
    ".metadata": 22,
    ".distcp": 18,
    "common.pt": 8,
    "metadata.json": 4,
    TRACKER: 2,
    ".idx": 6,
    ".bin": 2,
}


@pytest.fixture(scope="module")
def saved(fork_server, corpus, tmp_path_factory):
    """name of SOURCES -> a folder of --save with iterations 3 and 6, the last in both formats: the
    common state in an object, and in common.pt.
    """
    made = {}

    def save(name):
        if name not in made:
            (nproc, layout), folder = SOURCES[name], tmp_path_factory.mktemp("saved") / "ck"
            ends = ["--save", folder, "--save-interval", "3", "--exit-interval", "6"]
            run = fork_server.train(*TINY, *TST, *data(corpus), *layout, *ends, nproc=nproc)
            assert run.ok, run.log[-3000:]
            old = rewrite(
                source := Checkpoint(folder),
                folder.parent / "old",
                Changes(common=source.common, legacy=True),
            )
            assert (old / "common.pt").is_file()
            made[name] = folder, folder.parent / "old"
        return made[name]

    return save


def plain(value):
    """What is in a common state, for ==."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.flatten().tolist()
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, dict):
        return [(key, plain(inner)) for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return repr(value)


def objects(checkpoint):
    """Name -> the records of each object but the common state, which the formats keep apart."""
    found = {}
    for item in checkpoint.items:
        if item.name in checkpoint.objects and item is not checkpoint.common_item:
            archive = zipfile.ZipFile(io.BytesIO(checkpoint.read(item)))
            found[item.name] = {entry: archive.read(entry) for entry in archive.namelist()}
    return found


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.unlink()  # it can be a link to the undamaged one
    path.write_bytes(content)


def of_checkpoint(folder, original, target):
    """What comes of a checkpoint: "refused", or a copy with the same values ("harmless"); "told"
    where a warning says that another iteration's stand in for them.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            checkpoint = Checkpoint(folder)
            rewrite(checkpoint, target, Changes(common=checkpoint.common))
        except TSTError as error:
            assert "\n" not in str(error), error
            assert not target.exists()
            return "refused"
    copy = Checkpoint(target)
    if any("iter_0000006 is there too" in str(warning.message) for warning in said):
        assert copy.path.name == "iter_0000003"
        return "told"
    assert not differences(original, copy)
    assert plain(copy.common) == plain(original.common) and objects(copy) == objects(original)
    # and torch's own loader finds every tensor in the copy
    entries = original.tensors.items()
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries}
    dcp.load(state, storage_reader=dcp.FileSystemReader(copy.path), no_dist=True)
    tensors = Tensors(original)
    assert all(torch.equal(tensor, tensors.read(name)) for name, tensor in state.items())
    return "harmless"


def of_index(prefix, original):
    """What comes of a dataset: the same documents ("harmless"), or "unseen": other ids of the
    vocabulary in the same places, of which nothing says what they were.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        check_data_files([str(prefix)], 512)
    except TSTError as error:
        assert "\n" not in str(error), error
        return "refused"
    got, want = IndexedDataset(str(prefix)), IndexedDataset(str(original))
    assert np.array_equal(got.sequence_lengths, want.sequence_lengths)
    pairs = [(got[i], want[i]) for i in range(len(want))]
    if all(np.array_equal(*pair) for pair in pairs):
        return "harmless"
    assert sum((a != b).sum() for a, b in pairs) == 1 and max(a.max() for a, _ in pairs) < 512
    return "unseen"


def flipped(source, corpus, tmp_path, kind, flips, seed):
    """Bits of the files of one kind, each flipped alone. -> what came of them"""
    folder, old = source
    of_text, draw, came = kind in (".idx", ".bin"), random.Random(seed), collections.Counter()
    if of_text:
        here, files = corpus.parent, [Path(f"{corpus}{kind}")]
        kept = [Path(f"{corpus}{suffix}") for suffix in (".idx", ".bin")]
    else:
        here = old if kind == "common.pt" else folder
        kept = [path for path in here.rglob("*") if path.is_file()]
        last = [path for path in kept if "iter_0000003" not in path.parts]
        files = sorted(path for path in last if kind in (path.suffix, path.name))
        original = Checkpoint(here)
    for number in range(flips):
        work = tmp_path / f"{kind}{number}"
        for path in kept:
            link = work / "it" / path.relative_to(here)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(path)
        damaged = draw.choice(files)
        bit = draw.randrange(8 * damaged.stat().st_size)
        flip(work / "it" / damaged.relative_to(here), bit)
        try:
            if of_text:
                came[of_index(work / "it" / corpus.name, corpus)] += 1
            else:
                came[of_checkpoint(work / "it", original, work / "out")] += 1
        except Exception as error:
            pytest.fail(f"bit {bit} of {damaged}: {type(error).__name__}: {error}")
        shutil.rmtree(work)
    return came


@pytest.mark.parametrize("name", tiers(SOURCES, {"dense"}))
@pytest.mark.parametrize("part", tiers(range(5), {0}))
def test_flipped_bits(saved, corpus, tmp_path, name, part):
    """1,240 in all: refused, or harmless."""
    for kind, flips in KINDS.items():
        came = flipped(saved(name), corpus, tmp_path, kind, flips, f"{name} {part} {kind}")
        print(name, part, kind, dict(came))
        allowed = {"refused", "harmless"}
        allowed |= {".bin": {"unseen"}, TRACKER: {"told"}}.get(kind, set())
        assert set(came) <= allowed and sum(came.values()) == flips, (kind, came)
        assert came["refused"] or kind in (".bin", TRACKER, "metadata.json"), (kind, came)


@pytest.mark.slow
def test_every_bit_of_an_archive():
    """What passes the checks, torch loads, and it is what was saved."""
    tensor, buffer = torch.arange(12.0).view(3, 4), io.BytesIO()
    torch.save(tensor, buffer)
    seen = collections.Counter()
    for bit in range(8 * len(buffer.getvalue())):
        content = bytearray(buffer.getvalue())
        content[bit // 8] ^= 1 << bit % 8
        file = io.BytesIO(content)
        try:
            check_archive(file)
        except ValueError as error:
            assert "\n" not in str(error)
            seen["refused"] += 1
            continue
        for location in ("meta", "cpu"):
            file.seek(0)
            try:
                got = torch.load(file, map_location=location, weights_only=True)
            except Exception as error:
                # of the two, the one that reads nothing is what Checkpoint.check does
                assert location == "meta", (bit, error)
                seen["torch refuses"] += 1
                break
            assert (got.shape, got.dtype) == (tensor.shape, tensor.dtype), bit
            if location == "cpu":
                assert torch.equal(got, tensor), bit
                seen["harmless"] += 1
    assert sum(seen.values()) == 8 * len(buffer.getvalue()) and seen["refused"] > 5000, seen


def stored(index, **changes):
    def change(metadata):
        (key,) = [k for k in metadata.storage_data if k.fqn == index]
        info = metadata.storage_data[key]
        metadata.storage_data[key] = dataclasses.replace(info, **changes)

    return change


def described(name, **changes):
    def change(metadata):
        entry = metadata.state_dict_metadata[name]
        for key, value in changes.items():
            where = entry.properties if key == "dtype" else entry
            setattr(where, key, value)

    return change


def at(*cuts):
    return [dcp.metadata.ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in cuts]


@pytest.fixture
def small(tmp_path):
    """Two tensors, one of them in two shards, as a checkpoint of its own. -> its folder"""
    table = torch.arange(24.0).view(8, 3)
    items = [
        ("table", (8, 3), (0, 0), table[:4]),
        ("table", (8, 3), (4, 0), table[4:]),
        ("norm", (6,), (0,), torch.ones(6)),
    ]
    folder = tmp_path / "small" / "iter_0000001"
    folder.mkdir(parents=True)
    write_checkpoint(folder, items, argparse.Namespace(seq_length=8), lambda done: None)
    return folder


def describe(folder, change):
    metadata = load_metadata((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def rename(metadata):
    metadata.state_dict_metadata["nomm"] = metadata.state_dict_metadata.pop("norm")


def lose(metadata):
    del metadata.state_dict_metadata["norm"]
    for key in [key for key in metadata.storage_data if key.fqn == "norm"]:
        del metadata.storage_data[key]


COMMON = "common_state/shard_0_1"
DESCRIPTIONS = {
    "more than there are bytes": (
        described("norm", size=torch.Size([1 << 40]), chunks=at(((0,), (1 << 40,)))),
        "bytes for the 4398046511104 of norm",
    ),
    "shape": (described("norm", size=torch.Size([7])), r"a shard \[6\] at \[0\]|for 7"),
    "hole": (described("table", chunks=at(((0, 0), (4, 3)))), "shards of 12 elements for 24"),
    "overlap": (described("table", chunks=at(((0, 0), (4, 3)), ((3, 0), (4, 3)))), "overlap"),
    "outside": (described("table", chunks=at(((0, 0), (4, 3)), ((5, 0), (4, 3)))), "a shard"),
    "another place": (
        described("table", chunks=at(((0, 0), (5, 3)), ((5, 0), (3, 3)))),
        "is described but not stored",
    ),
    "a name": (rename, "nomm at .0. is described but not stored"),
    "no dtype": (described("norm", dtype="float32"), "norm without a shape or dtype"),
    "a lost tensor": (lose, "where byte|bytes, .* of them named"),
    "a place in a file": (stored("norm", offset=1), "norm at byte 1 of"),
    "a length": (stored("norm", length=10), "10 bytes for the 24 of norm"),
    "a file": (stored("norm", relative_path="../norm"), "'../norm' as the file of norm"),
    "a file below": (stored("norm", relative_path="z/a"), "'z/a' as the file of norm"),
    "a file that is none": (stored("norm", relative_path=7), "7 as the file of norm"),
    "an empty object": (stored(COMMON, length=0), f"got 0 bytes for the 0 of {COMMON}"),
    "a negative place": (
        described("table", chunks=at(((-1, 0), (4, 3)), ((4, 0), (4, 3)))),
        r"table: a shard \[4, 3\] at \[-1, 0\] of \[8, 3\]",
    ),
    "a negative shape": (
        described("table", chunks=at(((8, 0), (-4, 3)), ((4, 0), (4, 3)))),
        r"table: a shard \[-4, 3\] at \[8, 0\] of \[8, 3\]",
    ),
    "a shape of fewer dimensions": (
        described("table", chunks=at(((0, 0), (8,)))),
        r"table: a shard \[8\] at \[0, 0\] of \[8, 3\]",
    ),
    "a place of fewer dimensions": (
        described("table", chunks=at(((0,), (8, 3)))),
        r"table: a shard \[8, 3\] at \[0\] of \[8, 3\]",
    ),
    "a place of more dimensions": (
        described("table", chunks=at(((0, 0, 0), (8, 3)))),
        r"table: a shard \[8, 3\] at \[0, 0, 0\] of \[8, 3\]",
    ),
    "a shard of fewer dimensions": (
        described("table", chunks=at(((0,), (8,)))),
        r"table: a shard \[8\] at \[0\] of \[8, 3\]",
    ),
    "a shard of more dimensions": (
        described("table", chunks=at(((0, 0, 0), (8, 3, 1)))),
        r"table: a shard \[8, 3, 1\] at \[0, 0, 0\] of \[8, 3\]",
    ),
    "a shape below zero by one": (
        described("table", chunks=at(((8, 0), (-1, 3)))),
        r"table: a shard \[-1, 3\] at \[8, 0\] of \[8, 3\]",
    ),
    "more than the whole": (
        described("table", chunks=at(((0, 0), (8, 3)), ((4, 0), (4, 3)))),
        "table: shards of 36 elements for 24",
    ),
    "a tensor of no kind": (
        lambda metadata: metadata.state_dict_metadata.update(norm="x"),
        "norm as a str",
    ),
    "a name of no kind": (
        lambda metadata: metadata.state_dict_metadata.update({7: None}),
        "7 as a tensor's name",
    ),
    "a missing file": (stored("norm", relative_path="norm", offset=0), "where byte"),
    "no table of items": (
        lambda metadata: vars(metadata).update(storage_data=None),
        "got no table of tensors and items",
    ),
    "no table of tensors": (
        lambda metadata: vars(metadata).update(state_dict_metadata=None),
        "got no table of tensors and items",
    ),
    "no description": (lambda metadata: vars(metadata).clear(), "got AttributeError|got no table"),
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_a_description_that_does_not_fit_together(small, what):
    change, message = DESCRIPTIONS[what]
    Checkpoint(small).check_all()
    describe(small, change)
    with pytest.raises(TSTError, match=message) as raised:
        Checkpoint(small)
    assert "\n" not in str(raised.value)


def test_shards_that_share_an_element():
    """Against every element by itself: random shards of as many elements as the tensor has."""
    draw, seen = random.Random(0), collections.Counter()
    for _ in range(2000):
        size = [draw.randint(1, 3) for _ in range(draw.choice((1, 2, 2, 3)))]
        times, boxes = np.zeros(size, int), []
        while sum(np.prod(shape) for _, shape in boxes) < np.prod(size):
            place = [draw.randrange(n) for n in size]
            shape = [draw.randint(0 if len(boxes) == 1 else 1, n - o) for o, n in zip(place, size)]
            boxes.append((place, shape))
            times[tuple(slice(o, o + n) for o, n in zip(place, shape))] += 1
        if sum(np.prod(shape) for _, shape in boxes) > np.prod(size):
            continue
        metadata = dcp.metadata
        entry = metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=torch.uint8), torch.Size(size), at(*boxes)
        )
        storage, start = {}, 0
        for place, shape in boxes:
            index = metadata.MetadataIndex("table", torch.Size(place))
            if index in storage:  # one place twice, which the table of items cannot say
                break
            length = int(max(1, np.prod(shape)))
            storage[index] = _StorageInfo("file", start, length)
            start += length
        else:
            whole = metadata.Metadata(
                {"table": entry}, storage_data=dict(draw.sample([*storage.items()], len(storage)))
            )
            overlap = times.max() > 1
            seen[overlap, len(boxes) > 1] += 1
            if overlap:
                with pytest.raises(ValueError, match="^table: shards that overlap$"):
                    check_description(whole)
            else:
                check_description(whole)
    assert min(seen[True, True], seen[False, True], seen[False, False]) > 50, seen


def test_a_cut_that_is_too_fine_to_be_held_against_itself(small, monkeypatch):
    """Then the number of elements must do: here rows 0, 2, 4, 6 and columns 0, 3 are edges."""
    metadata = load_metadata((small / ".metadata").read_bytes())
    storage = metadata.storage_data
    for index in [index for index in storage if index.fqn == "table"]:
        if index.offset[0]:
            moved = dataclasses.replace(index, offset=torch.Size((2, 0)))
            storage[moved] = storage.pop(index)
    described("table", chunks=at(((0, 0), (4, 3)), ((2, 0), (4, 3))))(metadata)
    for most in (description._MOST_CELLS, 9, 8):
        monkeypatch.setattr(description, "_MOST_CELLS", most)
        with pytest.raises(ValueError, match="^table: shards that overlap$"):
            check_description(metadata)
    monkeypatch.setattr(description, "_MOST_CELLS", 7)
    check_description(metadata)


@pytest.mark.parametrize("size", [(), (0,), (4, 0), (3,), (2, 3)])
@pytest.mark.parametrize("shards", [0, 1])
def test_a_tensor_in_one_shard_or_none(size, shards):
    """Without an element it needs no shard; one of no dimension has one element."""
    metadata = dcp.metadata
    entry = metadata.TensorStorageMetadata(
        metadata.TensorProperties(dtype=torch.uint8),
        torch.Size(size),
        at(((0,) * len(size), size))[:shards],
    )
    index = metadata.MetadataIndex("it", torch.Size((0,) * len(size)))
    items = {index: _StorageInfo("file", 0, 400)} if shards else {}
    whole, elements = metadata.Metadata({"it": entry}, storage_data=items), np.prod(size, dtype=int)
    if shards or not elements:
        check_description(whole)
    else:
        with pytest.raises(ValueError, match=f"^it: shards of 0 elements for {elements}$"):
            check_description(whole)


def test_what_is_stored_but_not_described():
    metadata, info = dcp.metadata, _StorageInfo("file", 0, 8)
    it = metadata.MetadataIndex("x")
    part = metadata.MetadataIndex("x", torch.Size((2, 0)))
    for items, first in (
        ([it], "x"),
        ([part], r"x at \[2, 0\]"),
        ([it, part], r"x at \[2, 0\]"),
    ):
        whole = metadata.Metadata({}, storage_data=dict.fromkeys(items, info))
        with pytest.raises(ValueError, match=f"^{first} is stored but not described$"):
            check_description(whole)


def test_a_description_of_another_type():
    for other, kind in (
        ({}, "dict"),
        (None, "NoneType"),
        (dcp.metadata.MetadataIndex("x"), "Meta"),
    ):
        with pytest.raises(ValueError, match=f"^a {kind}.* in place of a description$"):
            check_description(other)


def test_bytes_that_no_item_names(small):
    """A tensor that fell out of the description together with its item."""
    with open(small / "__0_0.distcp", "ab") as file:
        file.write(b"PK")
    with pytest.raises(TSTError, match=r"__0_0.distcp has (\d+) bytes, \d+ of them named"):
        Checkpoint(small)


def test_a_description_that_the_items_contradict(small, tmp_path):
    """Of the same size, so that only the item says it."""
    for number, (change, got) in enumerate(
        (
            (
                described("norm", dtype=torch.int32),
                r"torch.float32 \[6\] where .* torch.int32 \[6\]",
            ),
            (
                described("norm", size=torch.Size([5]), chunks=at(((0,), (5,)))),
                r"\[6\] where .* \[5\]",
            ),
            (
                described("norm", size=torch.Size([7]), chunks=at(((0,), (7,)))),
                r"\[6\] where .* \[7\]",
            ),
            (
                described("norm", dtype=torch.int16),
                r"torch.float32 \[6\] where .* torch.int16 \[6\]",
            ),
        )
    ):
        folder = Path(shutil.copytree(small, tmp_path / str(number) / small.name))
        describe(folder, change)
        found = Checkpoint(folder)
        (item,) = [item for item in found.items if item.name == "norm"]
        for call in (found.check, found.read, found.tensor, lambda i: list(found.blocks(i))):
            with pytest.raises(TSTError, match=f"norm at byte .* as it was written, got .*{got}"):
                call(item)
        with pytest.raises(TSTError, match=got):
            rewrite(found, tmp_path / "out", Changes(common=found.common))
        assert not (tmp_path / "out").exists()


def test_a_number_that_would_take_the_memory():
    """The C unpickler makes room for as many objects as the number of one says."""

    def numbered(number):
        return b"\x80\x02]r" + number.to_bytes(4, "little") + b"."

    assert len(numbered(0)) == 9
    for number in (0, 3, 8, 9):  # no pickle has more objects than bytes
        assert load_metadata(numbered(number)) == []
    for number in (10, 2_000_000_000):
        with pytest.raises(pickle.UnpicklingError, match=f"^an object that is numbered {number}$"):
            load_metadata(numbered(number))


DCP = "torch.distributed.checkpoint."


@pytest.mark.parametrize(
    "name",
    [
        f"{DCP}filesystem.FileSystemWriter",
        f"{DCP}filesystem.os",
        f"{DCP}metadata.os",
        "builtins.eval",
        "torch.load",
        "torch.Tensor",
        # names that another module has
        "builtins.Metadata",
        "types.Metadata",
        "builtins.float32",
        "types.float32",
        "pathlib.Size",
    ],
)
def test_names_that_have_no_place_in_a_description(name):
    module, name = name.rsplit(".", 1)
    pickled = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    pickled += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(pickle.UnpicklingError) as refused:
        load_metadata(pickled)
    assert str(refused.value) == f"{module}.{name} has no place in a checkpoint's metadata"


def test_names_stand_twice_in_what_is_written(small):
    """One pickled string for both would let a changed bit rename a tensor without a trace."""
    pickled = (small / ".metadata").read_bytes()
    assert pickled.count(b"norm") == 2 and pickled.count(b"common_state") == 2
    check_description(load_metadata(pickled))


def test_torch_load_does_not_look_at_the_checksums(tmp_path):
    """Else these checks could go; and common.pt goes through them too."""
    torch.save({"lr": torch.full((4,), 2.5)}, tmp_path / "common.pt")
    at = (tmp_path / "common.pt").read_bytes().index(torch.full((4,), 2.5).numpy().tobytes())
    flip(tmp_path / "common.pt", 8 * at + 20)
    assert torch.load(tmp_path / "common.pt", weights_only=True)["lr"][0] != 2.5
    with pytest.raises(TSTError, match=r"common.pt: expected a readable torch.save, got damage"):
        load_trusted(tmp_path / "common.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"lr": 2.5}, tmp_path / "common.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(TSTError, match="got none of its checksums"):
        load_trusted(tmp_path / "common.pt")


def test_a_record_that_is_marked_as_a_folder(small):
    """One bit; torch.load returns memory that nobody has written."""
    content = bytearray((small / "__0_0.distcp").read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the first archive's directory
    flip(small / "__0_0.distcp", 8 * (entry + 38) + 4)
    checkpoint = Checkpoint(small)
    with pytest.raises(TSTError, match="a record that is marked as a folder"):
        checkpoint.check(checkpoint.items[0])


def written_anew(change):
    """An archive of torch.save, its records written anew by another program.

    Args:
        change: name and content of a record -> those to write.
    """
    saved, new = io.BytesIO(), io.BytesIO()
    torch.save(torch.arange(12.0), saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(new, "w") as target:
        for name in source.namelist():
            target.writestr(*change(name, source.read(name)))
    return new


def test_a_record_in_another_folder():
    """torch's reader would not find it, though its checksum is right."""
    same = written_anew(lambda name, content: (name, content))
    check_archive(same)
    assert same.tell() == 0 and torch.equal(torch.load(same), torch.arange(12.0))
    other = written_anew(lambda name, content: (name.replace("archive/data/", "o/data/"), content))
    with pytest.raises(ValueError, match=r"^damage \(RuntimeError: .* not in a subdirectory.*\)$"):
        check_archive(other)


def test_a_record_that_is_marked_as_read_only():
    """The other attributes of MS-DOS say nothing to torch."""
    file = io.BytesIO()
    torch.save(torch.arange(12.0), file)
    content = bytearray(file.getvalue())
    for bit in (0, 1, 2, 5):  # read only, hidden, of the system, to be archived
        content[content.index(b"PK\x01\x02") + 38] |= 1 << bit
    file = io.BytesIO(content)
    check_archive(file)
    assert torch.equal(torch.load(file), torch.arange(12.0))


def test_a_tensor_of_a_gpu_is_read_on_the_cpu():
    def of_a_gpu(name, content):
        was, now = (bytes([len(word)]) + b"\0\0\0" + word for word in (b"cpu", b"cuda:7"))
        assert name != "archive/data.pkl" or was in content
        return name, content.replace(was, now)

    found = load_trusted(written_anew(of_a_gpu), "a name")
    assert found.device.type == "cpu" and torch.equal(found, torch.arange(12.0))


def test_torch_unpickles_nothing_else_either(monkeypatch):
    """Where its list of what a file names were not complete, and whatever the environment says."""
    file = io.BytesIO()
    torch.save([Fraction(1, 2)], file)
    file.seek(0)
    listing = "get_unsafe_globals_in_checkpoint"
    monkeypatch.setattr(torch.serialization, listing, lambda file: [])
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError, match="fractions.Fraction"):
        load_trusted(file, "a name")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": 3}', "got version 3 of it"),
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": 0}', "got version 0 of it"),
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": "1"}', "got version '1' of"),
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": true}', "got version True"),
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": null}', "got version None"),
        ('{"sharded_backend": "torch_dist"}', None),
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "more": 2}', None),
        ('{"sharded_backend": "torch_dhst"}', "got torch_dhst"),
        ('{"sharded_backend": "torch_dhst", "sharded_backend_version": 2}', "got torch_dhst. Save"),
        ('{"sharded_backend": "zarr", "sharded_backend_version": true}', "got zarr. Save"),
        ('{"sharded_backend": 7}', "got 7. Save"),
        ('{"backend": "torch_dist"}', "got KeyError: 'sharded_backend'. Save"),
        ('["torch_dist"]', "got TypeError"),
        ("{", "got JSONDecodeError"),
        ("[" * 100000, "got RecursionError"),
        ("", "got JSONDecodeError"),
    ],
)
def test_metadata_json(small, text, message):
    (small / "metadata.json").write_text(text)
    if message is None:
        assert Checkpoint(small).path == small
        return
    with pytest.raises(TSTError, match=message):
        Checkpoint(small)


def test_another_format_is_named(small):
    (small.parent / "latest_checkpointed_iteration.txt").write_text("1")
    (small / "metadata.json").unlink()
    with pytest.raises(TSTError, match=r"says so\), got no metadata.json in it. Save with"):
        Checkpoint(small.parent)
    (small / "mp_rank_00").mkdir()
    with pytest.raises(TSTError, match="got one of --ckpt-format torch"):
        Checkpoint(small.parent)


def test_trackers(small):
    folder = small.parent
    second = Path(shutil.copytree(small, folder / "iter_0000002"))
    cut = Path(shutil.copytree(small, folder / "iter_0000010"))
    (cut / "__0_0.distcp").write_bytes(b"PK")
    (folder / "iter_notes").mkdir()
    tracker = folder / TRACKER
    tracker.write_text("\n")
    with pytest.warns(UserWarning, match=r"was empty \(a run killed .* from iteration 2$"):
        assert Checkpoint(folder).path == second
    assert tracker.read_text() == "\n"  # a tool changes nothing in what it reads
    assert mend_tracker(folder) == 2 and tracker.read_text() == "2"
    assert mend_tracker(folder) is None
    with pytest.warns(UserWarning, match="names iter_0000002; iter_0000010 is there too"):
        assert Checkpoint(folder).path == second
    for text, message in (
        ("7", "expected the folder iter_0000007 .* got none. The last whole one is iter_0000002"),
        ("10", "__0_0.distcp has 2 of"),
        ("seven", "expected an iteration, got 'seven'"),
        ("\xb2", "expected an iteration, got"),
        ("../x", "expected an iteration, got '../x'"),
    ):
        tracker.write_text(text, encoding="latin-1")
        with pytest.raises(TSTError, match=message):
            Checkpoint(folder)
    for path in (small, second):
        shutil.rmtree(path)
    tracker.write_text("")
    with pytest.raises(TSTError, match="an empty file beside no whole checkpoint"):
        Checkpoint(folder)
    assert mend_tracker(folder) is None and tracker.read_text() == ""


def test_a_disk_that_writes_something_else(small, tmp_path, monkeypatch):
    """What was written is read back before anything is put in place."""
    flush = rewriting.flush

    def spoil(file):
        flush(file)
        with open(file.name, "r+b") as again:
            again.seek(-200, 2)
            byte = again.read(1)
            again.seek(-200, 2)
            again.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(rewriting, "flush", spoil)
    source = Checkpoint(small)
    with pytest.raises(TSTError, match="as it was written, got other bytes. The disk is faulty"):
        rewrite(source, tmp_path / "out", Changes(common=source.common))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_verify_sees_dtypes_and_what_only_one_has(small, tmp_path):
    """The values are the same."""
    table = torch.arange(24.0).view(8, 3)
    there = {
        "dtype": [("table", table.bfloat16()), ("norm", torch.ones(6))],
        "more": [("table", table), ("norm", torch.ones(6)), ("bias", torch.zeros(6))],
        "fewer": [("table", table)],
    }
    found = {}
    for name, tensors in there.items():
        folder = tmp_path / name / "iter_0000001"
        folder.mkdir(parents=True)
        items = [(key, tuple(t.shape), (0,) * t.ndim, t) for key, t in tensors]
        write_checkpoint(folder, items, argparse.Namespace(), lambda done: None)
        one, other = Checkpoint(small), Checkpoint(folder)
        found[name] = differences(one, other)
        assert found[name].keys() == differences(other, one).keys()
    assert found == {
        "dtype": {"table": "torch.float32 [8, 3] and torch.bfloat16 [8, 3]"},
        "more": {"bias": f"only in {tmp_path / 'more' / 'iter_0000001'}"},
        "fewer": {"norm": f"only in {small}"},
    }


def test_verify_compares_bits(tmp_path):
    """Two checkpoints with the same NaN are the same, and a zero with a sign is another one."""
    folders = []
    for i, value in enumerate((0.0, -0.0, 1.0)):
        folders.append(tmp_path / str(i) / "iter_0000001")
        folders[-1].mkdir(parents=True)
        items = [("norm", (2,), (0,), torch.tensor([float("nan"), value]))]
        write_checkpoint(folders[-1], items, argparse.Namespace(), lambda done: None)
    zero, signed, one = map(Checkpoint, folders)
    assert differences(zero, zero) == {}
    assert differences(zero, signed) == {"norm": "differs by up to 0"}
    assert differences(zero, one) == {"norm": "differs by up to 1"}


def test_verify_reads_what_is_no_tensor(small, tmp_path):
    """Random-number states and the common state: damaged, they are no part of "the same"."""
    shutil.copytree(small, tmp_path / "copy")
    copy = Checkpoint(tmp_path / "copy")
    (item,) = (item for item in copy.items if item.name in copy.objects)
    with open(copy.path / item.file, "r+b") as file:
        file.seek(item.offset + item.length // 2)
        file.write(bytes(64))
    for pair in ((copy, Checkpoint(small)), (Checkpoint(small), copy)):
        with pytest.raises(TSTError, match="as it was written"):
            differences(*pair)


def test_new_rows_of_every_shard(tmp_path):
    """Tensor-parallel shards get rows of their own, those of the uncut table, and the optimizer's
    fp32 copy gets them unrounded.
    """
    plan = {"bag_sizes": (4, 1), "samples": (8, 8), "width": 4, "recovery_phases": 1}
    args = argparse.Namespace(
        seq_length=8, global_batch_size=4, tst_plan=plan, init_method_std=0.5, tst_bag_size=4
    )
    ends = "embedding.word_embeddings.weight", "output_layer.weight"
    new = {}
    for cuts in (1, 2, 4):
        items, rows = [], 64 // cuts
        for end in ends:
            for start in range(0, 64, rows):
                shard, place = torch.ones(rows, 16), (start, 0)
                items.append((end, (64, 16), place, shard.bfloat16()))
                for part in ("fp32_param.", "exp_avg.", "exp_avg_sq."):
                    items.append((f"{STATE}{part}{end}", (64, 16), place, shard))
        folder = tmp_path / str(cuts) / "iter_0000002"
        folder.mkdir(parents=True)
        write_checkpoint(folder, items, args, lambda done: None)
        convert(Checkpoint(folder), target := tmp_path / f"new{cuts}", reinit=("embedding", "head"))
        new[cuts] = target = Checkpoint(target)
        assert len(target.items) == cuts * 8 + 1
        for end in ends:
            read = Tensors(target).read
            weight, fp32 = read(end), read(f"{STATE}fp32_param.{end}")
            assert weight.dtype == torch.bfloat16 and torch.equal(fp32.bfloat16(), weight)
            assert not torch.equal(fp32, weight.float())
            assert len(fp32.unique(dim=0)) == 64  # no row twice
            assert fp32.std().item() == pytest.approx(0.5, rel=0.1)
            assert not read(f"{STATE}exp_avg.{end}").any()
            assert not read(f"{STATE}exp_avg_sq.{end}").any()
    assert not differences(new[1], new[2]) and not differences(new[1], new[4])


def test_inspect_reads_everything_when_asked(small, capsys, tmp_path):
    assert cli.main(["inspect", str(small), "--check"]) == 0
    assert "checked            4 items, " in capsys.readouterr().out
    content = (small / "__0_0.distcp").read_bytes()
    at = content.index(torch.ones(6).numpy().tobytes())
    flip(small / "__0_0.distcp", 8 * at)
    assert cli.main(["inspect", str(small)]) == 0 and capsys.readouterr().out
    assert cli.main(["inspect", str(small), "--check"]) == 2
    assert "expected norm at byte" in capsys.readouterr().err


def test_a_training_start_that_reads_its_checkpoint_through(saved, fork_server, corpus, tmp_path):
    """A changed bit of a weight is refused, which torch.load alone would not see."""
    folder = Path(shutil.copytree(saved("dense")[0], tmp_path / "ck"))
    flags = [*TINY, *TST, *data(corpus), "--load", folder, "--exit-interval", "7"]
    run = fork_server.train(*flags, "--tst-verify-load", nproc=2)
    assert run.ok, run.log[-3000:]
    assert f"--tst-verify-load: {folder}/iter_0000006: rank 0's share (1 of 2), 31 items" in run.log
    found = Checkpoint(folder)
    (item,) = [item for item in found.items if item.name == "output_layer.weight"]
    flip(found.path / item.file, 8 * (item.offset + item.length // 2))
    run = fork_server.train(*flags, "--tst-verify-load")
    assert run.codes == [2] and "expected output_layer.weight at byte" in run.error
    (found.path / "__0_0.distcp").unlink()
    run = fork_server.train(*flags)
    assert run.codes == [2] and "__0_0.distcp is missing" in run.error


def test_the_share_of_each_rank(saved):
    """Together they read every item once."""
    checkpoint = Checkpoint(saved("dense")[0])
    shares = [checkpoint.check_all(share=rank, of=3) for rank in range(3)]
    assert sum(items for items, _ in shares) == len(checkpoint.items)
    assert sum(size for _, size in shares) == sum(item.length for item in checkpoint.items)


def test_the_flag_without_a_checkpoint_yet(tmp_path, capsys):
    """The first start of several with the same flags."""
    from megatron_tst.loop.resume import verify_load

    verify_load(types.SimpleNamespace(load=str(tmp_path), rank=0, world_size=1))
    assert f"no torch_dist checkpoint in {tmp_path} yet" in capsys.readouterr().out
