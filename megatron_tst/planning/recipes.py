"""The paper's runs, and two larger ones, as Megatron's flags: shape, training, TST, layout,
precision. No torch.

The launch scripts (examples/270m.sh and so on), the planner's presets, the benchmarks and the tests
read this file. Each number says where it is from: "paper" is arXiv 2605.06546; "filled in" follows
from the model that the paper names; "ours": nobody says.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from megatron_tst.errors import refuse
from megatron_tst.hardware import GPUS
from megatron_tst.model_size import LLAMA_3_VOCABULARY

# What a launch script's environment may change, by its name there.
VARIABLES = (
    *("GPU", "STEPS", "TST_STEPS", "BAG_SIZE", "BATCH_TOKENS", "LR", "SEQ"),
    *("MICRO_BATCH", "PRECISION", "TP", "PP", "CP", "EP", "LAYOUT"),
)


@dataclass(frozen=True)
class Fit:
    """What a kind of GPU takes; ours, not measured.

    Args:
        micro_batch: samples of a rank at a time.
        precision: one of PRECISIONS.
        gpus: how many of them, where the paper does not say.
        tensor, pipeline: parallel sizes.
        experts: ranks that share the experts; 0: the recipe's.
        layout: --pipeline-model-parallel-layout of this pipeline.
        more: flags of recomputation and the like.
    """

    micro_batch: int
    precision: str
    gpus: int = 8
    tensor: int = 1
    pipeline: int = 1
    experts: int = 0
    layout: str = ""
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A run of the paper, or a larger one.

    Args:
        model: flags of the model but for the sequence length.
        steps: iterations.
        superposed: iterations with bags, or their share of all iterations.
        bag_size: tokens of a bag, s.
        lr: --lr.
        h100, b200: micro-batch and precision on H100 and H200, and on B200.
        batch_tokens: positions of a step, in both phases.
        expert_parallel: ranks that share the experts.
        vocabulary: ids of the model's tokenizer, or rows of its published table.
        rows: what the rows of the table are a multiple of, whatever tensor parallelism is.
        init_std: --init-method-std.
    """

    model: tuple[str, ...]
    steps: int
    superposed: int | Fraction
    bag_size: int
    lr: str
    h100: Fit
    b200: Fit
    batch_tokens: int = 1 << 21  # paper, set-up: 2M "equivalent tokens" a step
    expert_parallel: int = 1
    vocabulary: int = LLAMA_3_VOCABULARY
    rows: int = 128
    init_std: str = "0.02"

    def fit(self, gpu: str) -> Fit:
        """What a kind of GPU takes, one of hardware.GPUS."""
        return self.b200 if gpu == "b200" else self.h100

    def tst_steps(self, steps: int) -> int:
        """Of so many steps, those with bags."""
        if isinstance(self.superposed, int):
            return self.superposed
        return steps * self.superposed.numerator // self.superposed.denominator


LLAMA_3 = (
    "--untie-embeddings-and-output-weights",  # paper, set-up
    # filled in
    "--swiglu --normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear",
    "--position-embedding-type rope --rotary-base 500000 --attention-dropout 0 --hidden-dropout 0",
)
RECIPES = {
    # The paper's smallest: SmolLM2-135M's shape as a Llama 3. 42B tokens, 105B with TST.
    # Data parallelism alone is ours. Weights and gradients take 2 GB a GPU. The logits are large,
    # 1 GB in bf16 and 2 GB in fp32 a sample, and the micro-batch decides how many there are.
    # 9 heads cannot be cut by a TP of 2, 4 or 8, and 4096 positions need no CP.
    "270m": Recipe(
        model=(
            # filled in: SmolLM2-135M. Plain multi-head attention: with it the model has the 267M
            # parameters of its name, with SmolLM2's 3 groups 254M.
            "--num-layers 30 --hidden-size 576 --ffn-hidden-size 1536",
            "--num-attention-heads 9 --kv-channels 64",
            *LLAMA_3,
        ),
        steps=20000,  # paper, table 1 (also 100000)
        superposed=Fraction(3, 10),  # paper, table 1: r
        bag_size=6,  # paper, table 1: s
        lr="2e-3",  # paper, set-up: swept on the baseline
        h100=Fit(4, "bf16"),
        b200=Fit(8, "mxfp8"),
    ),
    # SmolLM2-360M's shape as a Llama 3. 42B tokens, 105B with TST.
    # Layout as above: weights and gradients take 4 GB a GPU, and 15 heads cannot be cut either.
    "600m": Recipe(
        model=(
            # filled in: SmolLM2-360M. Plain multi-head attention: with it the model has the 600M
            # parameters of its name, with SmolLM2's 5 groups 561M.
            "--num-layers 32 --hidden-size 960 --ffn-hidden-size 2560",
            "--num-attention-heads 15 --kv-channels 64",
            *LLAMA_3,
        ),
        steps=20000,  # paper, table 1
        superposed=Fraction(3, 10),  # paper, table 1: r
        bag_size=6,  # paper, table 1: s
        lr="1e-3",  # paper, set-up: swept on the baseline
        h100=Fit(4, "bf16"),
        b200=Fit(8, "mxfp8"),
    ),
    # SmolLM3-3B's shape as a Llama 3. 42B tokens, 105B with TST.
    # Data parallelism alone is ours. Weights and gradients take 20 GB a GPU, the optimizer 5 GB at
    # 8 GPUs, activations about 20 GB a sample and the logits 5 GB (arithmetic): that fits 80 GB
    # without cutting the model. For more positions: a CP of 2, or a TP of 2 (16 heads in 4 groups:
    # 2 or 4).
    "3b": Recipe(
        model=(
            # filled in: SmolLM3-3B
            "--num-layers 36 --hidden-size 2048 --ffn-hidden-size 11008",
            "--num-attention-heads 16 --kv-channels 128",
            "--group-query-attention --num-query-groups 4",
            *LLAMA_3,
        ),
        steps=20000,  # paper, table 1 (its baselines: also 36000 and 50000)
        superposed=Fraction(3, 10),  # paper, table 1: r
        bag_size=6,  # paper, table 1: s
        lr="2e-4",  # paper, set-up: a recommended value, no sweep
        h100=Fit(1, "bf16"),
        b200=Fit(4, "mxfp8"),
    ),
    # The paper's largest, 64 B200: 49,983 steps of 8M positions, 12,483 of them with bags of 16: 2T
    # tokens. The paper gives no shape but "Qwen3, 10B parameters, 1B active".
    # The layout is ours. Experts lie over the 8 GPUs of a node (8 experts each), so that their
    # all-to-all stays on NVLink; everything else is data parallel. Weights and gradients take 12 GB
    # a GPU, the optimizer 16 GB on one node and 2 GB on eight (arithmetic). Experts are 1024 wide:
    # TP would make their products smaller still. 4096 positions need no CP.
    "moe-10b-a1b": Recipe(
        model=(
            # ours: 10.4B parameters, 1.4B active (1.1B without the input embedding)
            "--num-layers 24 --hidden-size 2048 --ffn-hidden-size 8192",
            "--num-attention-heads 16 --kv-channels 128",
            "--group-query-attention --num-query-groups 4",
            "--num-experts 64 --moe-router-topk 4 --moe-ffn-hidden-size 1024",
            # paper: Qwen3
            "--qk-layernorm --swiglu --normalization RMSNorm --norm-epsilon 1e-6",
            "--disable-bias-linear",
            # ours
            "--untie-embeddings-and-output-weights --position-embedding-type rope",
            "--rotary-base 500000 --attention-dropout 0 --hidden-dropout 0",
            "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3",
            "--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-grouped-gemm",
        ),
        steps=49983,  # paper, table 1 (its baseline: 125000)
        superposed=12483,  # paper, table 1: r = 0.25
        bag_size=16,  # paper, table 1: s
        lr="3e-4",  # paper, set-up: a recommended value, no sweep
        h100=Fit(1, "bf16"),
        b200=Fit(2, "mxfp8"),
        batch_tokens=1 << 23,  # paper, set-up: 8M "equivalent tokens" a step
        expert_parallel=8,
    ),
}
# Of DeepSeek-V3 and of Moonlight, whose code is the same. YaRN is for longer contexts than these
# runs have.
DEEPSEEK = (
    "--multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64",
    "--v-head-dim 128 --kv-channels 128 --qk-layernorm --rope-type rope --no-rope-fusion",
    "--position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear",
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0",
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "--moe-router-bias-update-rate 1e-3 --moe-router-load-balancing-type seq_aux_loss",
    # ours: Megatron's own dispatcher, which needs no other package than Megatron's
    "--moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-grouped-gemm",
)
# Released models' shapes, with TST. The steps are those after which TST has read as much text as
# the released model: a position reads 2.5 tokens on average. s and r are the paper's of its dense
# runs. Nothing of it was trained by us, and the paper has no model of this kind.
LARGE = {
    # Moonlight-16B-A3B (arXiv 2502.16982): 5.7T tokens. Its own run was Muon's. Layout on H100:
    # Megatron-Bridge 0.6's moonlight_16b, TP 2 with sequence parallelism and experts over 8 GPUs,
    # from one node on. On B200 TP is ours to leave out. megatron-core 0.19 normalises what the
    # product of queries takes too (model_size.py), which the released model does not.
    "moe-16b-a3b": Recipe(
        model=(
            # its config.json: 16.0B parameters, 2.6B active
            "--num-layers 27 --hidden-size 2048 --ffn-hidden-size 11264 --num-attention-heads 16",
            "--num-experts 64 --moe-router-topk 6 --moe-ffn-hidden-size 1408",
            "--moe-shared-expert-intermediate-size 2816 --moe-layer-freq ([0]*1+[1]*26)",
            "--moe-router-topk-scaling-factor 2.446 --moe-aux-loss-coeff 1e-3",
            "--norm-epsilon 1e-5 --rotary-base 50000",
            *DEEPSEEK,
        ),
        steps=272000,  # 5.7T tokens
        superposed=Fraction(3, 10),
        bag_size=6,
        lr="4.2e-4",  # its report
        h100=Fit(1, "bf16", gpus=16, tensor=2, experts=8),
        b200=Fit(1, "mxfp8", gpus=16, experts=8),
        batch_tokens=1 << 23,  # Megatron-Bridge's: 2048 samples of 4096
        vocabulary=163840,
    ),
    # DeepSeek-V3 (arXiv 2412.19437): 14.8T tokens. Layouts of Megatron-Bridge 0.6's
    # deepseek_v3 for 1024 H100 and 256 B200. H100: TP 2, PP 8 with 4 virtual stages, experts over
    # 64; the first stage has the embedding and a layer, 30 have two, the last multi-token
    # prediction and the loss. B200: PP 8 with 2 virtual stages, experts over 8. Both are its
    # layouts for speed, with forced balance and a dispatcher of their own (HybridEP), which are not
    # here.
    "moe-671b-a37b": Recipe(
        model=(
            # its config.json: 671B parameters, 37B active; 11.6B more of multi-token prediction
            "--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432",
            "--num-attention-heads 128 --q-lora-rank 1536",
            "--num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048",
            "--moe-shared-expert-intermediate-size 2048 --moe-layer-freq ([0]*3+[1]*58)",
            "--moe-router-num-groups 8 --moe-router-group-topk 4",
            "--moe-router-topk-scaling-factor 2.5 --moe-aux-loss-coeff 1e-4",
            "--mtp-num-layers 1 --mtp-loss-scaling-factor 0.1",  # its report: 0.3, later 0.1
            "--norm-epsilon 1e-6 --rotary-base 10000",
            *DEEPSEEK,
        ),
        steps=88200,  # 14.8T tokens
        superposed=Fraction(3, 10),
        bag_size=6,
        lr="2.2e-4",  # its report
        h100=Fit(
            *(1, "bf16"),
            gpus=1024,
            tensor=2,
            pipeline=8,
            experts=64,
            layout="Et|(tt|)*30mL",
            more=("--recompute-granularity selective --recompute-modules mla_up_proj mlp",),
        ),
        b200=Fit(
            *(1, "mxfp8"),
            gpus=256,
            pipeline=8,
            experts=8,
            layout="Et*4|(tttt|)*14tmL",
            more=("--recompute-granularity selective --recompute-modules mla_up_proj",),
        ),
        batch_tokens=1 << 26,  # Megatron-Bridge's on H100: 16384 samples of 4096
        vocabulary=129280,
        rows=1280,  # 128815 ids come to 129280 rows
        init_std="0.006",  # its report
    ),
}
NAMES = (*RECIPES, *LARGE)
SEQ = 4096  # ours: the sequence length is not given
# Ours: the paper names no precision. Embedding, norms, router, output layer and loss stay bf16 or
# fp32 in all of them. Delayed scaling, Megatron's default recipe, is not offered: it carries state
# over the phase boundary, and Transformer Engine 2.20 refuses to load that from a checkpoint.
PRECISIONS = {
    "bf16": "",
    "fp8": "--fp8-format hybrid --fp8-recipe tensorwise",  # H100, H200, B200
    "fp8-blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",  # the same; widths: whole 128s
    # B200. The weights live in FP8 and are gathered in it, through the gradient buffer.
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather "
    "--reuse-grad-buf-for-mxfp8-param-ag",
}


def of(name: str) -> Recipe:
    """The recipe of one of NAMES."""
    return RECIPES[name] if name in RECIPES else LARGE[name]


def groups(name: str, given: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Megatron's flags of a recipe: {"model", "training", "tst", "parallel", "precision": [...]}.

    Data, checkpoints and logs are the launch script's.

    Args:
        name: one of NAMES.
        given: VARIABLES that differ from the recipe, as {"STEPS": "100000"}.

    Raises:
        TSTError: an unknown variable, a value that is no whole number where it must be one, a
            precision that the GPU does not have, a sequence that does not divide the batch.
    """
    given, recipe = dict(given or {}), of(name)
    for unknown in given.keys() - set(VARIABLES):
        refuse("the recipe's variables", ", ".join(VARIABLES), unknown, "Leave it out.")

    def whole(variable: str, default: int) -> int:
        text = given.get(variable, str(default))
        if not re.fullmatch(r"0*[1-9][0-9]{0,14}", text):
            refuse(variable, "a whole number above 0", repr(text), "Correct it.")
        return int(text)

    def several(variable: str, default: int) -> str:
        text = given.get(variable, str(default))
        for part in text.split(","):
            if not re.fullmatch(r"[0-9]{1,15}", part):
                do = "Correct it."
                refuse(variable, "a whole number, or several as 8,4", repr(text), do)
        return text

    gpu = given.get("GPU", "h100")
    if gpu not in GPUS:
        refuse("GPU", " or ".join(GPUS), gpu, "MICRO_BATCH and PRECISION suit it to another.")
    fit = recipe.fit(gpu)
    steps, seq = whole("STEPS", recipe.steps), whole("SEQ", SEQ)
    batch_tokens = whole("BATCH_TOKENS", recipe.batch_tokens)
    if batch_tokens % seq:
        refuse("BATCH_TOKENS", f"a multiple of SEQ={seq}", batch_tokens, "Change one of them.")
    tp, pp, cp = whole("TP", fit.tensor), whole("PP", fit.pipeline), whole("CP", 1)
    # a model without experts has none to share, whatever the environment says
    shared = fit.experts or recipe.expert_parallel
    ep = whole("EP", shared) if shared > 1 else 1
    layout = given.get("LAYOUT", fit.layout if pp == fit.pipeline else "")
    if not re.fullmatch(r"[EtmL|,()*0-9]{0,4096}", layout):
        do = "Write it as Megatron's --pipeline-model-parallel-layout."
        refuse("LAYOUT", "stages as Et*3|(tt|)*29mL", repr(layout), do)
    precision = given.get("PRECISION", fit.precision)
    if precision not in PRECISIONS:
        *others, last = PRECISIONS
        refuse("PRECISION", f"{', '.join(others)} or {last}", precision, "Choose one of them.")
    if precision == "mxfp8" and gpu != "b200":
        do = "Hopper has no MXFP8: use PRECISION=fp8."
        refuse("PRECISION=mxfp8", "GPU=b200", f"GPU={gpu}", do)
    tst_steps = several("TST_STEPS", recipe.tst_steps(steps))
    bag_size = several("BAG_SIZE", recipe.bag_size)
    micro_batch, lr = whole("MICRO_BATCH", fit.micro_batch), given.get("LR", recipe.lr)
    if not (re.fullmatch(r"[0-9.]+([eE][+-]?[0-9]+)?", lr) and _above_zero(lr)):
        refuse("LR", "a number above 0, as 2e-4", repr(lr), "Correct it.")
    lines = {
        "model": (
            *recipe.model,
            f"--seq-length {seq} --max-position-embeddings {seq}",
            # ours, but where the recipe says so
            f"--init-method-std {recipe.init_std} --transformer-impl transformer_engine",
        ),
        "training": (
            f"--train-iters {steps} --global-batch-size {batch_tokens // seq}",
            f"--micro-batch-size {micro_batch}",
            f"--lr {lr} --lr-warmup-iters 2000",  # paper, set-up
            f"--lr-decay-style WSD --lr-decay-iters {steps}",  # paper, set-up
            f"--lr-wsd-decay-iters {steps // 10}",  # paper, set-up: the last 10 %
            "--lr-wsd-decay-style linear --min-lr 0",  # ours: the shape is not given
            "--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95",  # paper, set-up
            "--weight-decay 0.1 --adam-eps 1e-8 --clip-grad 1.0 --seed 1234",  # ours: not given
        ),
        "tst": (f"--tst-bag-size {bag_size} --tst-iters {tst_steps}",),
        # ours: the optimizer's state is spread over the data-parallel ranks and its communication
        # overlapped. Llama 3's vocabulary is a multiple of 128; padded to one whatever TP is, the
        # model is the same in every layout.
        "parallel": (
            f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}",
            f"--context-parallel-size {cp} --expert-model-parallel-size {ep}",
            f"--make-vocab-size-divisible-by {recipe.rows // tp}",
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
            "--sequence-parallel" if tp > 1 else "",
            "--expert-tensor-parallel-size 1" if ep > 1 else "",
            f"--pipeline-model-parallel-layout {layout}" if layout else "",
            *fit.more,
        ),
        "precision": ("--bf16", PRECISIONS[precision]),
    }
    return {group: " ".join(flags).split() for group, flags in lines.items()}


def shell(name: str, given: Mapping[str, str] | None = None) -> str:
    """The flags as arrays of a shell, a line each: MODEL=(...), TRAINING, TST, PARALLEL, PRECISION,
    each with _FLAGS at its end; and VOCABULARY, the ids of the models' tokenizer.

    Raises:
        TSTError: groups'.
    """
    arrays = [
        f"{group.upper()}_FLAGS=({shlex.join(flags)})"
        for group, flags in groups(name, given).items()
    ]
    return "\n".join([*arrays, f"VOCABULARY={of(name).vocabulary}"])


def _above_zero(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
