"""Plans for the tests of `megatron-tst plan`."""

import warnings
from pathlib import Path

from megatron_tst.checks import dry_run
from megatron_tst.cli import plan as verb
from megatron_tst.planning import plan

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --swiglu --vocab-size 50000 "
    "--seq-length 1024 --train-iters 1000 --global-batch-size 64"
).split()
EXPERTS = [*SMALL, *"--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 256".split()]
BESIDE = [
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
    "--disable-bias-linear",
    "--lr",
    "1e-3",
]
HF = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}


def planned(*argv):
    found, _ = plan.examine(list(argv))
    return found


def accepted(argv):
    """Megatron's arguments after its validation and TST's of the flags that a plan prints."""
    found, args = plan.examine(argv)
    own = BESIDE[:-2] if "--lr" in found["flags"] else BESIDE
    if getattr(args, "add_bias_linear", False):
        own = [flag for flag in own if flag != "--disable-bias-linear"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags = [*found["flags"], *own, "--vocab-size", str(args.vocab_size)]
        return dry_run.validate(flags, args.gpus, "b200" if args.gpu == "b200" else "h100"), found


def screen_of(capsys, *argv):
    """-> exit code, what was printed to either stream"""
    code = verb.main(list(argv))
    out, err = capsys.readouterr()
    return code, out + err
