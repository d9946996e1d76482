"""Parameters and FLOPs of every kind of model: those of a real Megatron model, Megatron's own count
and what the makers of released models state.
"""

import copy
import json
import warnings

import pytest
import torch
from support.plans import SMALL, planned, screen_of
from support.published import CONFIGS, STATED

from megatron_tst import model_size
from megatron_tst.checks import dry_run

BASE = (
    "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 72 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 6 --train-iters 10 "
    "--lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 95 "
    "--no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-gelu-fusion "
    "--no-gradient-accumulation-fusion "
    "--make-vocab-size-divisible-by 4 --transformer-impl local --use-cpu-initialization"
)
ROPE = "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --swiglu"
UNTIED = "--untie-embeddings-and-output-weights"
MOE = (
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-token-dispatcher-type "
    "alltoall"
)
SHARED = "--moe-shared-expert-intermediate-size 40"
MLA = (
    "--multi-latent-attention --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 10 --kv-channels 10 --rope-type rope"
)
QUERY = "--q-lora-rank 20 --qk-layernorm"
HYBRID = "--spec support.hybrid_spec hybrid_stack_spec --hybrid-layer-pattern"
MODELS = {
    "llama": f"{ROPE} {UNTIED}",
    "tied": ROPE,
    "groups": f"{ROPE} {UNTIED} --group-query-attention --num-query-groups 2 --kv-channels 12",
    "qk norm": f"{ROPE} --qk-layernorm",
    "qkv bias": f"{ROPE} --add-qkv-bias",
    "gpt-2": "",  # learned positions, LayerNorm, biases
    "gpt-2, experts": MOE,
    "gpt-oss": f"--position-embedding-type rope --normalization RMSNorm {UNTIED} --quick-geglu "
    f"--softmax-type learnable --group-query-attention --num-query-groups 2 {MOE}",
    "experts": f"{ROPE} {UNTIED} {MOE}",
    "shared": f"{ROPE} {UNTIED} {MOE} {SHARED}",
    "shared, gated": f"{ROPE} {MOE} {SHARED} --moe-shared-expert-gate",
    "dense first": f"{ROPE} {MOE} --moe-layer-freq [0]+[1]*2",
    "every second": f"{ROPE} {MOE} --moe-layer-freq 2",
    "dense last": f"{ROPE} {MOE} --moe-layer-freq [1,1,0] --mtp-num-layers 2",
    "mla": f"{ROPE} {UNTIED} {MLA} {QUERY}",
    "mla, no q rank": f"{ROPE} {UNTIED} {MLA} --qk-layernorm",
    "mla, no norms": f"{ROPE} {UNTIED} {MLA} --q-lora-rank 20",
    "mla, biases": f"--position-embedding-type rope --swiglu {MLA} {QUERY}",
    "mtp": f"{ROPE} {UNTIED} --mtp-num-layers 2",
    "mtp, one layer twice": f"{ROPE} {UNTIED} --mtp-num-layers 2 --mtp-use-repeated-layer",
    "deepseek": f"{ROPE} {UNTIED} {MLA} {QUERY} {MOE} {SHARED} --moe-layer-freq [0,1,1] "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --mtp-num-layers 1",
    "hybrid": f"{ROPE} {UNTIED} {HYBRID} *-*-",
    "hybrid, experts": f"{ROPE} {UNTIED} {MOE} {SHARED} {HYBRID} *-*E*E",
    "hybrid, latent": f"{ROPE} {UNTIED} {MLA} --q-lora-rank 20 {MOE} {HYBRID} +-+E-",
    "hybrid, mtp": f"{ROPE} {UNTIED} {MOE} {HYBRID} *-*E/*E/*E",
}


def validated(flags):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dry_run.validate(f"{BASE} {flags}".split(), 1, "h100")


def built(args):
    """The model that Megatron builds of its arguments, on layers without Transformer Engine."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    more = dict(
        config=config,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
    )
    if args.hybrid_layer_pattern:
        from support.hybrid_spec import hybrid_stack_spec

        stack = copy.deepcopy(hybrid_stack_spec)
        if args.multi_latent_attention:
            latent = copy.deepcopy(stack.submodules.attention_layer)
            latent.submodules.self_attention = get_gpt_layer_local_spec(
                multi_latent_attention=True, normalization="RMSNorm"
            ).submodules.self_attention
            stack.submodules.mla_layer = latent
        pattern = args.hybrid_layer_pattern
        return HybridModel(hybrid_stack_spec=stack, hybrid_layer_pattern=pattern, **more)
    spec = get_gpt_decoder_block_spec(config, False, normalization=args.normalization)
    if args.multi_latent_attention and args.q_lora_rank is None:
        # the local spec has a norm of the latent of queries all the same
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.q_layernorm = IdentityOp
    mtp = get_gpt_mtp_block_spec(config, spec, False) if args.mtp_num_layers else None
    return GPTModel(transformer_layer_spec=spec, mtp_block_spec=mtp, **more)


@pytest.fixture
def any_attention(monkeypatch):
    """What multi-latent attention is built on, without Transformer Engine: the tests' own, which
    stays in this process no longer than a test.
    """
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from support import cp_attention

    for name in ("__init__", "forward"):
        monkeypatch.setattr(DotProductAttention, name, getattr(DotProductAttention, name))
    cp_attention.install()

    class NormedLinear(ColumnParallelLinear):
        """In the place of Transformer Engine's: a product with a norm of what it takes."""

        def __init__(self, input_size, *rest, **named):
            super().__init__(input_size, *rest, **named)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

    monkeypatch.setattr(
        LocalSpecProvider, "column_parallel_layer_norm_linear", lambda _: NormedLinear
    )


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_that_megatron_builds(megatron, any_attention, name):
    args = validated(MODELS[name])
    model, size = built(args), model_size.size(args)
    count = {"every": 0, "mtp": 0, "embedding": 0, "output": 0, "idle": 0}
    for weight, tensor in model.named_parameters():
        count["every"] += tensor.numel()
        for part, prefix in (("mtp", "mtp."), ("embedding", "embedding."), ("output", "output_")):
            count[part] += tensor.numel() if weight.startswith(prefix) else 0
        if ".experts." in weight and ".local_experts.0." in weight:
            count["idle"] += tensor.numel() * ((args.num_experts or 0) - args.moe_router_topk)
    got = {"every": size.every, "mtp": size.mtp, "embedding": size.embedding}
    got |= {"output": size.output, "idle": size.decoder_idle + size.mtp_idle}
    assert got == {part: count[part] for part in got}
    looked_up = count["embedding"] if count["output"] else 0
    assert size.active == count["every"] - count["idle"] - looked_up
    assert model_size.parameters(args) == (size.every, size.active)
    assert model_size.idle_parameters(args) == count["idle"]


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_megatrons_own_count(name):
    from megatron.training.training import num_floating_point_operations

    args = validated(MODELS[name])
    ours = model_size.flops_of_step(args)
    if args.quick_geglu:  # whose gate Megatron leaves out
        experts = args.num_layers * args.moe_router_topk * args.moe_ffn_hidden_size
        gate = 6 * args.hidden_size * experts * args.global_batch_size * args.seq_length
        ours -= gate
        assert gate > 0
    if args.hybrid_layer_pattern and args.multi_latent_attention:  # which it leaves out
        both = copy.copy(args)
        both.hybrid_layer_pattern = args.hybrid_layer_pattern.replace("+", "")
        assert model_size.flops_of_step(both) < ours
        ours = model_size.flops_of_step(both)
    theirs = num_floating_point_operations(copy.copy(args), args.global_batch_size)
    assert ours == pytest.approx(theirs, rel=1e-12)


RUN = "--seq-length 4096 --train-iters 30000 --global-batch-size 1024 --gpus 64".split()


def planned_of(name, tmp_path, *flags):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[name]))
    return planned("--hf-config", str(file), *RUN, *flags)


@pytest.mark.parametrize("name", STATED)
def test_sizes_are_what_makers_state(tmp_path, name):
    """Each maker counts in a way of its own, which is named; the plan has what it takes. Within
    1 %, or within the digits that are stated.
    """
    model, stated = planned_of(name, tmp_path)["model"], STATED[name]
    total, active = model["parameters"], model["active_parameters"]
    if stated.tables == "none":
        total -= model["embedding"] + model["output"]
        active -= model["output"]
    elif stated.tables == "both":
        active += model["embedding"]
    if stated.mtp:
        total, active = total + model["mtp_parameters"], active + model["mtp_active"]
    for got, text in ((total, stated.total), (active, stated.active)):
        unit = {"B": 1e9, "T": 1e12}[text[-1]]
        value, digit = float(text[:-1]), 10 ** -len(text[:-1].partition(".")[2])
        rounded = abs(got / unit - value) <= digit / 2
        cut = stated.cut and value <= got / unit < value + digit
        assert rounded or cut or got / unit == pytest.approx(value, rel=0.01), (got, text)


# ---- what a plan says of such models


def test_a_hybrid_model_of_the_same_layers_is_the_same_model():
    flags = [*SMALL, *"--num-experts 8 --moe-ffn-hidden-size 256".split()]
    flags += ["--pipeline-model-parallel-size", "2"]
    gpt = planned(*flags, "--moe-layer-freq", "[0,1,1,1]")
    hybrid = planned(*flags, "--hybrid-layer-pattern", "*-*E|*E*E")
    for part in ("model", "cost", "text", "loss_memory"):
        assert hybrid[part] == gpt[part]
    assert "--hybrid-layer-pattern *-*E|*E*E" in " ".join(hybrid["flags"])
    assert "--num-layers" not in hybrid["flags"] and "--num-layers" in gpt["flags"]
    text = " ".join(gpt["flags"])
    assert "--moe-layer-freq ([0]*1+[1]*3)" in text


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--hybrid-layer-pattern M*-G", "got --hybrid-layer-pattern with G M. A plan has no"),
        ("--hybrid-layer-pattern *+", "* or + for all attention, got *+"),
        ("--hybrid-layer-pattern *E", "--hybrid-layer-pattern with E: expected --num-experts"),
        ("--hybrid-layer-pattern *-/*/-", "one pattern behind all /, got *-/*/-"),
        ("--experimental-attention-variant gated_delta_net", "got --experimental-attention-var"),
        ("--num-experts 4 --moe-layer-freq [0,1]", "a value for each of the 4 layers, got 2"),
        ("--num-experts 4 --moe-layer-freq [0,2]", "argument --moe-layer-freq: expected n, or 0 "),
        ("--mtp-num-layers -1", "argument --mtp-num-layers: expected a whole number"),
    ],
)
def test_what_has_no_formula_or_makes_no_sense(capsys, flags, expected):
    code, text = screen_of(capsys, *SMALL, *flags.split())
    assert code == 2 and expected in text and len(text.splitlines()) == 1, text


def test_latent_attention_by_its_flag_alone_has_megatrons_sizes():
    """--kv-lora-rank 32 and so on (training/arguments.py)."""
    plain = planned(*SMALL, "--multi-latent-attention")["model"]["parameters"]
    sizes = "--kv-lora-rank 32 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128"
    assert planned(*SMALL, "--multi-latent-attention", *sizes.split())["model"]["parameters"] == (
        plain
    )
    dense = planned(*SMALL)["model"]["parameters"]
    latent = 512 * 8 * 192 + 512 * (32 + 64) + 32 * 8 * 256 + 8 * 128 * 512
    assert plain - dense == 4 * (latent - 4 * 512**2)


def test_each_layer_of_multi_token_prediction_keeps_logits():
    """Its loss comes first and its backward last: the gradient in 16 bit, or Megatron's softmax in
    32.
    """
    without, two = planned(*SMALL), planned(*SMALL, "--mtp-num-layers", "2")
    logits = without["loss_memory"]["logits"]
    assert planned(*SMALL, "--mtp-num-layers", "0")["loss_memory"] == without["loss_memory"]
    for phase, name, kept in (
        ("superposition", "extension", 2),
        ("superposition", "torch", 2),
        ("recovery", "megatron", 4),
        ("recovery", "kernel_in_recovery", 2),
    ):
        more = two["loss_memory"][phase][name] - without["loss_memory"][phase][name]
        assert more == kept * logits, name
    assert two["loss_memory"]["superposition"]["fused"] is None  # refused beside it


def test_the_screen_says_how_it_counts(capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["DeepSeek-V3"]))
    code, text = screen_of(capsys, "--hf-config", str(file), *RUN)
    flat = " ".join(text.split())
    assert code == 0
    assert "671B parameters, 36.6B active, 64 x h100" in flat
    assert "active with the input embedding 37.6B, without the output layer too 35.7B" in flat
    assert "multi-token prediction 11.6B more, 688M active" in flat
    assert "--tst-fused-linear-loss" not in flat
    _, dense = screen_of(capsys, *SMALL)
    assert " active" not in dense


def test_megatrons_memory_of_one_more_head_is_its_softmax(megatron):
    """What autograd keeps of a loss that Megatron has computed: fp32 logits' size, twice that of
    bf16.
    """
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    logits = torch.randn(16, 2, 512, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vocab_parallel_cross_entropy(logits * 1, torch.zeros(16, 2, dtype=torch.int64))
    most = max(kept)
    assert most == 2 * logits.numel() * 2 and sum(kept) - most < most / 10
