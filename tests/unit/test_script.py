"""The package's own script, a function at a time (pretrain_gpt.py), the demo's two arms, and the
shims for machines without a GPU. tests/training runs them.
"""

import argparse
import importlib.util
import json
import os
import sys
import types
import warnings

import pytest
import torch

from megatron_tst import cpu, demo, errors, training

# ---- the script


@pytest.fixture(scope="module")
def script():
    """A copy of the script of our own: nothing of Megatron is replaced for it."""
    spec = importlib.util.find_spec("megatron_tst.pretrain_gpt")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare", lambda: None)
        spec.loader.exec_module(module)
    return module


class Machine:
    """In the place of Megatron's rerun state machine: keeps what it is to look at."""

    is_unexpectedly_large = staticmethod(lambda loss, threshold, context: (threshold, context))

    def __init__(self):
        self.asked = []

    def validate_result(self, loss, rejected, message, tolerance, fatal):
        self.asked.append((float(loss), rejected, message, tolerance, fatal))


@pytest.fixture
def machine(script, monkeypatch):
    found = Machine()
    monkeypatch.setattr(script, "get_rerun_state_machine", lambda: found)
    return found


def has(script, monkeypatch, **args):
    monkeypatch.setattr(script, "get_args", lambda: argparse.Namespace(**args))


def test_the_loss_is_the_sum_of_what_counts(script, monkeypatch, machine):
    has(script, monkeypatch, check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    output = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    loss, count, report = script.loss_func(mask, output)
    assert loss == 1 + 4 + 16 + 32 and count == 4 and count.dtype == torch.int
    assert report.keys() == {"lm loss"} and report["lm loss"].tolist() == [53, 4]
    loss.backward()
    assert torch.equal(output.grad, mask) and machine.asked == []


def test_what_is_rejected(script, monkeypatch, machine):
    has(script, monkeypatch, check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=True)
    script.check_loss(torch.tensor(3.0))
    (nan, inf, spiky) = machine.asked
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    assert nan[1](values).tolist() == [True, False, False, False]
    assert inf[1](values).tolist() == [False, True, True, False]
    assert nan[2:] == ("isnan in the local loss", 0.0, True)
    assert inf[2:] == ("isinf in the local loss", 0.0, True)
    # ten times the largest loss so far is run again and trained on if it comes again
    assert spiky[1](values) == (10, "loss") and spiky[2:] == ("spiky loss", 0.0, False)
    assert {asked[0] for asked in machine.asked} == {3.0}


GIVEN = {  # of GPTDatasetConfig -> Megatron's argument
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "split": "split",
    "full_validation": "full_validation",
    "num_dataset_builder_threads": "num_dataset_builder_threads",
    "path_to_cache": "data_cache_path",
    "mmap_bin_files": "mmap_bin_files",
    "reset_position_ids": "reset_position_ids",
    "reset_attention_mask": "reset_attention_mask",
    "eod_mask_loss": "eod_mask_loss",
    "create_attention_mask": "create_attention_mask_in_dataloader",
}


@pytest.mark.parametrize("mock", [False, True])
def test_the_datasets_are_made_as_the_flags_say(script, monkeypatch, mock):
    """Every argument is a value of its own, so that none stands in for another."""
    has(script, monkeypatch, mock_data=mock, **{name: f"<{name}>" for name in GIVEN.values()})
    monkeypatch.setattr(script, "get_blend_and_blend_per_split", lambda args: ("blend", "each"))
    monkeypatch.setattr(script, "build_tokenizer", lambda args: "tokenizer")
    monkeypatch.setattr(script, "GPTDatasetConfig", lambda **given: given)

    def builder(*given):
        return types.SimpleNamespace(build=lambda: given)

    monkeypatch.setattr(script, "BlendedMegatronDatasetBuilder", builder)
    kind, sizes, here, config = script.datasets_provider([1, 2, 3])
    assert kind is (script.MockGPTDataset if mock else script.GPTDataset) and sizes == [1, 2, 3]
    assert config == {ours: f"<{theirs}>" for ours, theirs in GIVEN.items()} | dict(
        blend="blend", blend_per_split="each", tokenizer="tokenizer"
    )
    for ends, mtp, rank, built in (
        (True, False, 0, True),
        (True, False, 1, False),
        (False, True, 0, True),
        (False, False, 0, False),
    ):
        monkeypatch.setattr(script, "is_first_or_last_pipeline_stage", lambda stage, x=ends: x)
        monkeypatch.setattr(script, "stage_has_mtp", lambda stage, x=mtp: x)
        monkeypatch.setattr(script.mpu, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        assert here() == built


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_is_read_on_the_first_tensor_parallel_rank(script, monkeypatch, rank):
    named = dict(
        create_attention_mask_in_dataloader="mask?",
        context_parallel_size=1,
        micro_batch_size=2,
        seq_length=4,
        pipeline_model_parallel_size=1,
    )
    has(script, monkeypatch, **named)
    tp = "get_tensor_model_parallel"
    for name, value in {f"{tp}_rank": rank, f"{tp}_src_rank": 5, f"{tp}_group": "tp"}.items():
        monkeypatch.setattr(script.mpu, name, lambda value=value: value)
    for name, value in {"first": True, "last": False}.items():
        monkeypatch.setattr(script.mpu, f"is_pipeline_{name}_stage", lambda value=value: value)
    monkeypatch.setattr(script.mpu, "get_context_parallel_group", lambda: "cp")
    monkeypatch.setattr(script, "is_first_or_last_pipeline_stage", lambda stage: True)
    monkeypatch.setattr(script, "stage_has_mtp", lambda stage: "mtp?")
    calls = []

    def broadcast(batch, **given):
        calls.append((batch, given))
        return {key: key for key in script.KEYS}

    def part(batch, is_hybrid_cp, cp_group):
        assert (is_hybrid_cp, cp_group) == (False, "cp")
        return {key: f"{value} of this rank" for key, value in batch.items()}

    monkeypatch.setattr(script, "get_batch_on_this_tp_rank", broadcast)
    monkeypatch.setattr(script, "get_batch_on_this_cp_rank", part)
    sample = {key: torch.ones(1) for key in script.KEYS[:-1]} | {"more": torch.ones(1)}
    # the last one is not in the sample: the mask is made by the kernels
    got = script.get_batch(iter([sample]) if rank == 0 else None)
    assert got == [f"{key} of this rank" for key in script.KEYS]
    ((batch, given),) = calls
    if rank == 0:
        assert batch == {key: sample.get(key) for key in script.KEYS}
    else:
        assert batch == {}
    assert given == dict(
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader="mask?",
        broadcast_src_rank=5,
        broadcast_group="tp",
        cp_size=1,
        tp_rank=rank,
        micro_batch_size=2,
        seq_length=4,
        mtp_on_this_rank="mtp?",
        pipeline_model_parallel_size=1,
        is_pipeline_first_stage=True,
        is_pipeline_last_stage=False,
    )
    # a stage between the ends, with and without layers of multi-token prediction
    monkeypatch.setattr(script, "is_first_or_last_pipeline_stage", lambda stage: False)
    assert script.get_batch(iter([sample]) if rank == 0 else None) == got and len(calls) == 2
    monkeypatch.setattr(script, "stage_has_mtp", lambda stage: False)
    assert script.get_batch(None) == [None] * 5


# ---- the demo


def test_the_settings_of_the_demo_by_megatrons_parser(tmp_path):
    from megatron.training.arguments import add_megatron_arguments

    def parsed(*given, **named):
        flags = demo.flags(*given, **named)
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        return vars(parser.parse_args(flags))

    args = parsed(tmp_path / "text", 512, 1000, seed=3)
    want = dict(
        num_layers=3,
        hidden_size=128,
        seq_length=128,
        micro_batch_size=16,
        global_batch_size=16,
        train_iters=1000,
        lr=4e-3,
        min_lr=0.0,
        lr_decay_style="WSD",
        lr_wsd_decay_style="linear",
        lr_wsd_decay_iters=200,  # the last fifth
        lr_warmup_iters=100,
        weight_decay=0.01,
        seed=3,
        data_path=[str(tmp_path / "text")],
        split="95,5,0",
        vocab_size=512,
        eval_interval=100,
        eval_iters=20,
        log_interval=10,
        bf16=False,
        mock_data=False,
        use_cpu_initialization=True,
    )
    assert {name: args[name] for name in want} == want
    args = parsed(None, 512, 60, device="cuda", architecture="qwen3-moe")
    want = dict(
        bf16=True,
        mock_data=True,
        data_path=None,
        lr_warmup_iters=6,
        lr_wsd_decay_iters=12,
        eval_interval=10,
        num_experts=4,
        qk_layernorm=True,
        num_query_groups=2,
    )
    assert {name: args[name] for name in want} == want


class Process:
    """A run that ends when it is told to, or never."""

    def __init__(self, obeys=True, ended=False):
        self.obeys, self.ended, self.calls = obeys, ended, []

    def poll(self):
        return 0 if self.ended else None

    def terminate(self):
        self.calls.append("terminate")
        self.ended = self.obeys

    def kill(self):
        self.calls.append("kill")
        self.ended = True

    def wait(self, timeout=None):
        if not self.ended:
            raise demo.subprocess.TimeoutExpired("run", timeout)


def test_the_demos_arms_differ_by_tst_alone(monkeypatch, tmp_path):
    (tmp_path / "text.json").write_text(json.dumps({"vocab_size": 512}))
    monkeypatch.setattr(demo.corpora, "vocab_size", lambda prefix: 512)
    started, processes = [], [Process(ended=True), Process()]

    def start(arguments, log, device):
        started.append((arguments, log, device))
        return processes[len(started) - 1]

    monkeypatch.setattr(demo, "start", start)
    with demo.side_by_side(tmp_path / "text", tmp_path, 50, 9, "llama", "cuda") as runs:
        assert [process for process, _ in runs.values()] == processes
    (baseline, log, _), (tst, other_log, device) = started
    own = ["--save", str(tmp_path / "checkpoints_baseline")]
    more = ["--tst-bag-size", "2", "--tst-step-ratio", "0.2"]
    assert baseline[-2:] == own
    assert tst == [*baseline[:-2], *more, "--save", str(tmp_path / "checkpoints_tst")]
    assert baseline[:-2] == [
        *demo.flags(tmp_path / "text", 512, 50, 9, "llama", "cuda"),
        *"--save-interval 50 --ckpt-format torch_dist".split(),
    ]
    assert (log.name, other_log.name, device) == ("baseline.log", "tst.log", "cuda")
    assert processes[0].calls == [] and processes[1].calls == ["terminate"]


def test_what_does_not_end_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "GRACE", 0)
    monkeypatch.setattr(demo.corpora, "vocab_size", lambda prefix: 512)
    stubborn, second = Process(obeys=False), Process()
    left = [stubborn, second]
    monkeypatch.setattr(demo, "start", lambda *_: left.pop(0))
    with (
        pytest.raises(KeyboardInterrupt),
        demo.side_by_side(tmp_path / "text", tmp_path),
    ):
        raise KeyboardInterrupt
    assert stubborn.calls == ["terminate", "kill"] and second.calls == ["terminate"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_how_a_run_of_the_demo_is_started(monkeypatch, tmp_path, device):
    seen = []
    monkeypatch.setattr(demo.subprocess, "Popen", lambda line, **more: seen.append((line, more)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    demo.start(["--lr", "1"], tmp_path / "log", device)
    ((line, more),) = seen
    assert line == [sys.executable, "-m", "megatron_tst.pretrain_gpt", "--lr", "1"]
    want = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", OMP_NUM_THREADS="1")
    want |= dict(CUDA_DEVICE_MAX_CONNECTIONS="1", MASTER_PORT="0")
    want["MEGATRON_TST_CPU"] = "1" if device == "cpu" else "0"
    want["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else "3"
    assert (
        want.items() <= more["env"].items()
        and os.environ.items() >= {"CUDA_VISIBLE_DEVICES": "3"}.items()
    )
    assert more["stdout"].name == str(tmp_path / "log")
    assert more["stderr"] == demo.subprocess.STDOUT


# ---- without a GPU


def test_the_answers_for_a_gpu_that_is_not_here_are_taken_back():
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils

    def now():
        cuda = torch.cuda.get_device_capability, torch.cuda.get_device_properties
        return (*cuda, utils._te_version, rope_utils.fused_apply_rotary_pos_emb)

    utils.get_te_version()
    before = now()
    with pytest.raises(KeyboardInterrupt), cpu.assumed_gpu((10, 0), "2.9"):
        assert torch.cuda.get_device_capability() == (10, 0)
        assert torch.cuda.get_device_capability("cuda:1") == (10, 0)
        properties = torch.cuda.get_device_properties(0)
        assert (properties.major, properties.minor) == (10, 0)
        assert str(utils.get_te_version()) == "2.9" and rope_utils.fused_apply_rotary_pos_emb
        raise KeyboardInterrupt
    assert now() == before
    with cpu.assumed_gpu((9, 0)):
        assert now()[2:] == before[2:]  # Transformer Engine as it is here
    assert now() == before


@pytest.mark.skipif(not cpu.enabled(), reason="the shims are for machines without a GPU")
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_are_marked_for_sequence_parallelism(sequence_parallel, kind):
    """Megatron sums the gradients of marked parameters over the tensor-parallel ranks."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from support.models import config

    settings = config(normalization=kind)
    settings.sequence_parallel = sequence_parallel
    norm = WrappedTorchNorm(config=settings, hidden_size=8, eps=1e-3)
    parameters = list(norm.parameters())
    assert len(parameters) == (1 if kind == "RMSNorm" else 2) and norm.eps == 1e-3
    assert all(p.sequence_parallel is sequence_parallel for p in parameters)
    assert settings.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("child", [False, True])
def test_a_process_that_writes_while_training_goes_on_has_copies(monkeypatch, child):
    monkeypatch.setattr(cpu.multiprocessing, "parent_process", lambda: child or None)
    weight = torch.ones(2)
    buckets = [("file", "key", (["bytes"], [("item", weight)]))]
    ((file, key, (data, ((item, tensor),))),) = cpu._preload_tensors(buckets, True)
    weight.zero_()  # the optimizer's next step
    assert (file, key, data, item) == ("file", "key", ["bytes"], "item")
    assert tensor.tolist() == ([1, 1] if child else [0, 0])


@pytest.mark.parametrize("value", ["1", "yes", "TRUE", " on "])
def test_what_asks_for_training_on_cpu(monkeypatch, value):
    monkeypatch.setenv(cpu.SWITCH, value)
    assert cpu.asked_for()


@pytest.mark.parametrize("value", ["", "0", "No", "false", "off"])
def test_what_does_not(monkeypatch, value):
    monkeypatch.setenv(cpu.SWITCH, value)
    assert not cpu.asked_for()
    cpu.enable_if_asked()
    monkeypatch.delenv(cpu.SWITCH)
    assert not cpu.asked_for()


def test_a_switch_that_says_neither_and_a_gpu_that_is_there(monkeypatch, capsys):
    monkeypatch.setenv(cpu.SWITCH, "2")
    for said in ("expected one of 1, yes, true, on", "expected a machine without a GPU, got one"):
        with pytest.raises(SystemExit) as ended:
            cpu.enable_if_asked()
        assert ended.value.code == 2 and said in capsys.readouterr().err
        monkeypatch.setenv(cpu.SWITCH, "1")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


# ---- the one line that a run ends with


WORKER = """Caught TSTError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in <module>
megatron_tst.errors.TSTError: text.bin: expected ids below 512, got 600. Tokenise it again.
"""


@pytest.mark.parametrize(
    "rank, error, line",
    [
        (None, errors.TSTError("a: expected b,\ngot c."), "error: a: expected b, got c."),
        ("0", errors.PatchError("a seam has changed"), "error: a seam has changed"),
        ("3", errors.TSTError("a: expected b"), "error on rank 3: a: expected b"),
        ("0", errors.TSTError(""), "error:"),
        (
            "1",
            errors.TSTError(WORKER),
            "error on rank 1: megatron_tst.errors.TSTError: text.bin: expected ids below 512, got "
            "600. Tokenise it again.",
        ),
    ],
)
def test_a_refusal_is_one_line_on_stderr(monkeypatch, capsys, rank, error, line):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended, errors.one_line_errors():
        raise error
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.rstrip() == f"megatron_tst: {line}" and said.err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("not ours"), RuntimeError("x"), KeyboardInterrupt()])
def test_what_is_no_refusal_goes_through(capsys, error):
    with pytest.raises(type(error)) as caught, errors.one_line_errors():
        raise error
    assert caught.value is error and capsys.readouterr().err == ""


@pytest.mark.parametrize("rank, warned", [(None, True), ("0", True), ("1", False)])
def test_a_warning_comes_once_a_job(monkeypatch, rank, warned):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        errors.warn("the text")
    assert [str(one.message) for one in seen] == ["megatron_tst: the text"] * warned


def test_a_refusal_says_what_and_what_to_do():
    with pytest.raises(errors.TSTError, match="^--x: expected 1, got 2. Give 1.$"):
        errors.refuse("--x", 1, 2, "Give 1.")
    assert errors.optional("json", "x") is json
    with pytest.raises(errors.TSTError, match="^no_such: expected an installed package, got .*"):
        errors.optional("no_such.part", "no-such")
