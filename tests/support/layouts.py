"""The layouts, models and settings that are compared with one process: data only.

A case trains a model in a layout, and the same model with the same settings in one process; all
flags but the layout's own are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

SEQ_LENGTH, VOCAB, PADDED_VOCAB = 16, 512, 768  # with tp4 the last rank's rows are padding alone
SUPERPOSED, ITERATIONS = 3, 6  # of superposition, and in all

BASE = (
    "--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion "
    "--no-gradient-accumulation-fusion "
    "--no-bias-swiglu-fusion --no-bias-dropout-fusion --use-cpu-initialization "
    "--no-create-attention-mask-in-dataloader --num-workers 0 "
    f"--ckpt-format torch_dist --hidden-size 32 --num-attention-heads 4 --seq-length {SEQ_LENGTH} "
    f"--max-position-embeddings {SEQ_LENGTH} "
    "--init-method-std 0.1 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 "
    "--global-batch-size 4 --lr 1e-3 --min-lr 1e-4 "
    # an epsilon above the rounding noise of the gradients: Adam turns the noise of a zero gradient
    # into whole steps otherwise
    "--adam-eps 1e-6 --lr-decay-style linear --tokenizer-type NullTokenizer --log-interval 1 "
    "--eval-interval 3 --eval-iters 1 --split 80,20,0"
)

_UNTIED = "--untie-embeddings-and-output-weights"
_LLAMA = "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
_MOE = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32"
_AUX = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3"
_ALLTOALL = "--moe-token-dispatcher-type alltoall"
_ALLGATHER = "--moe-token-dispatcher-type allgather"
# DeepSeek-V3's parts, each of a size of its own: latent attention, a dense first layer, a shared
# expert, sigmoid scores with a bias, groups, a balancing loss a sequence
_MLA = (
    "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 6 --qk-layernorm"
)
_NO_Q_RANK = _MLA.replace("--q-lora-rank 24 ", "").replace(" --qk-layernorm", "")
_TRUNK = f"--num-layers 3 --moe-layer-freq [0,1,1] {_LLAMA} {_UNTIED}"
_DEEPSEEK_MOE = (
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 16 "
    "--moe-shared-expert-intermediate-size 16 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 1e-2 --moe-router-num-groups 2 --moe-router-group-topk 1 "
    "--moe-router-topk-scaling-factor 2.5 "
    f"--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2 {_ALLTOALL}"
)
_HYBRID = f"{_LLAMA} --spec support.hybrid_spec hybrid_stack_spec --hybrid-layer-pattern"

MODELS = {
    "dense": f"--num-layers 2 {_LLAMA} {_UNTIED}",
    "deep": f"--num-layers 4 {_LLAMA} {_UNTIED}",
    "tied": "--num-layers 2 --position-embedding-type learned_absolute",
    "moe": f"--num-layers 2 {_LLAMA} {_UNTIED} {_MOE} {_AUX} {_ALLTOALL}",
    "deep moe": f"--num-layers 4 {_LLAMA} {_UNTIED} {_MOE} {_AUX} {_ALLTOALL}",
    "moe allgather": f"--num-layers 2 {_LLAMA} {_UNTIED} {_MOE} {_AUX} {_ALLGATHER} "
    f"--moe-shared-expert-intermediate-size 32",
    "moe bias": f"--num-layers 2 {_LLAMA} {_UNTIED} {_MOE} {_ALLTOALL} "
    f"--moe-router-load-balancing-type none "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 1e-2",
    "hybrid": f"{_HYBRID} *-*- {_UNTIED}",
    "hybrid tied": f"{_HYBRID} *-*-",
    "hybrid moe": f"{_HYBRID} *E*E {_UNTIED} {_MOE} {_AUX} {_ALLTOALL}",
    "mtp": f"--num-layers 2 {_LLAMA} {_UNTIED} --mtp-num-layers 2 --mtp-loss-scaling-factor 0.3",
    "mtp moe": f"--num-layers 2 {_LLAMA} {_UNTIED} {_MOE} {_AUX} {_ALLTOALL} --mtp-num-layers 1",
    "deepseek": f"{_TRUNK} {_MLA} {_DEEPSEEK_MOE} --mtp-num-layers 1",
    # and without norms of the latents: Megatron refuses the local one of queries that have no rank
    "deepseek no q rank": f"{_TRUNK} {_NO_Q_RANK} {_DEEPSEEK_MOE} --mtp-num-layers 1",
    "deepseek hybrid": f"{_HYBRID} +-+E+E/+E {_UNTIED} {_MLA} {_DEEPSEEK_MOE}",
    # An epsilon that does not blow up the rounding noise of its first, tiny outputs.
    # --deterministic-mode: torch's rule in the place of flash-linear-attention's kernels
    "gated delta": f"{_HYBRID} G-*- {_UNTIED} --linear-key-head-dim 8 --linear-value-head-dim 6 "
    "--linear-num-key-heads 4 --linear-num-value-heads 8 --norm-epsilon 1e-2 --deterministic-mode",
    "mtp hybrid": f"{_HYBRID} *-*-/*-/*- {_UNTIED} --mtp-loss-scaling-factor 0.3",
}

_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "vpp": "--num-virtual-stages-per-pipeline-rank",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
    "sp": "--sequence-parallel",
    "zero": "--use-distributed-optimizer",
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
    "first": "--decoder-first-pipeline-num-layers",
    "stages": "--pipeline-model-parallel-layout",
    "pattern": "--hybrid-layer-pattern",
    "fsdp": "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
    "--use-distributed-optimizer "
    "--no-gradient-reduce-div-fusion --ckpt-format fsdp_dtensor",
    "ep-overlap": "--overlap-moe-expert-parallel-comm",
}


@dataclass(frozen=True)
class Layout:
    """Parallel sizes by Megatron's abbreviations: Layout("tp2 sp pp2 dp2 zero"); zero is the
    distributed optimizer.

    Uneven pipelines: first2 puts two layers on the first stage, stages:Ett|tmL says what each holds
    (embedding, decoder layers, MTP, loss), and so does pattern:*-*-|*- of a HybridModel.
    """

    name: str

    def size(self, what: str) -> int:
        words = [word for word in self.name.split() if word.rstrip("0123456789") == what]
        return max((int(word[len(what) :]) for word in words), default=1)

    @property
    def world(self) -> int:
        """Processes. Experts are spread over the ranks that the rest needs, and over more of data
        parallelism if those are too few.
        """
        dense = self.size("tp") * self.size("pp") * self.size("cp") * self.size("dp")
        expert_tensor = self.size("etp") if "etp" in self.name else self.size("tp")
        return max(dense, self.size("ep") * expert_tensor * self.size("pp"))

    @property
    def flags(self) -> list[str]:
        flags = ["--make-vocab-size-divisible-by", str(PADDED_VOCAB // self.size("tp"))]
        for word in self.name.split():
            what = word.rstrip("0123456789")
            if ":" in word:
                name, value = word.split(":")
                flags += [_FLAGS[name], value]
            elif what != "dp":
                flags += [*_FLAGS[what].split(), *([word[len(what) :]] if word != what else [])]
        return flags


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Args:
        layout: by name.
        model: one of MODELS.
        options: flags that the run in one process has too.
        s: bag size; 0 is stock Megatron, 1 goes through the superposed code (BAG_OF_ONE).
        precision: fp32 or bf16.
        load: start from the model's checkpoint; else from the seed, which gives the same weights
            where no rank holds part of a tensor.
    """

    layout: str
    model: str = "dense"
    options: str = ""
    s: int = 3
    precision: str = "fp32"
    load: bool = True

    @property
    def id(self) -> str:
        options = self.options.replace("--", "")
        parts = self.layout, self.model, options, f"s{self.s}", self.precision
        return ", ".join(filter(None, parts))


PER_TOKEN = "--calculate-per-token-loss"
# ranks of data and context parallelism have unequal numbers of labels
MASKED = f"--eod-mask-loss {PER_TOKEN}"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

# with context parallelism Megatron's heads do not equal one process (docs/parallelism.md)
NO_MTP = "--mtp-num-layers 0"
# The average over all micro-batches so far: data parallelism changes what they are
GLOBAL_AUX = "--moe-router-load-balancing-type global_aux_loss"
# fewer tokens go to another expert for a rounding in bf16
FINE_ROUTER = "--moe-router-dtype fp32 --moe-router-bias-update-rate 1e-3"
# of each tensor-parallel rank's tokens
SINKHORN = "--moe-router-load-balancing-type sinkhorn --moe-router-topk 1 --moe-aux-loss-coeff 0"

CASES = [
    # tensor, sequence and context parallelism
    Case("tp2"),
    Case("tp2 sp"),
    Case("tp4 sp"),
    Case("cp2"),
    Case("cp4"),
    Case("tp2 cp2"),
    Case("tp2 sp cp2"),
    Case("tp2", "tied"),
    Case("tp2 sp", "tied"),
    Case("cp2", "tied"),
    # pipelines
    Case("pp2"),
    Case("pp4", "deep"),
    Case("pp2 vpp2", "deep", "--micro-batch-size 1"),
    Case("pp2", "tied"),
    Case("cp2 pp2"),
    Case("tp2 sp pp2"),
    Case("tp2 sp pp2", "tied"),
    # data parallelism and the distributed optimizer; several micro-batches a step
    Case("dp2"),
    Case("dp2 zero", options="--micro-batch-size 1"),
    Case("dp2 zero overlap"),
    Case("dp4 zero", options="--micro-batch-size 1"),
    Case("dp2 fsdp", load=False),
    Case("tp2 sp dp2 zero overlap"),
    Case("pp2 vpp2 dp2 zero overlap", "deep", "--micro-batch-size 1"),
    Case("tp2 sp pp2 dp2 zero overlap"),
    Case("tp2 sp cp2 pp2 zero"),
    # the average over labels
    *(Case(layout, options=PER_TOKEN) for layout in ("tp2 sp", "pp2", "dp2", "cp2")),
    *(Case(layout, options=MASKED) for layout in ("dp2", "cp2", "cp2 dp2", "tp2 sp cp2", "pp2")),
    Case("dp2", options="--eod-mask-loss"),
    Case("ep2", "moe", MASKED),
    # bag sizes, what is superposed, objectives
    Case("tp2 sp", s=2),
    Case("cp2", s=4),
    Case("tp2 sp cp2", s=4),
    Case("pp2", s=4),
    Case("dp2 zero", s=2),
    *(
        Case(layout, options=f"--tst-superpose {what}")
        for what in ("input", "output")
        for layout in ("tp2 sp", "cp2", "pp2")
    ),
    Case("tp2", options="--tst-loss mce-alt"),
    Case("cp2", options="--tst-target-weighting power-law"),
    # experts
    Case("ep2", "moe"),
    Case("ep4", "moe", "--micro-batch-size 1"),
    Case("tp2 sp ep2 etp1", "moe"),
    Case("tp2 sp ep2 etp2", "moe"),
    Case("cp2 ep2", "moe"),
    Case("pp2 ep2", "moe"),
    Case("ep2", "moe allgather"),
    Case("tp2 sp ep2 etp2", "moe allgather"),
    Case("tp2 sp ep2 etp1", "moe bias"),
    Case("dp2 ep2", "moe", PER_TOKEN),
    Case("tp2 sp pp2 ep2 zero overlap", "moe"),
    # HybridModel
    Case("tp2 sp", "hybrid"),
    Case("pp2", "hybrid"),
    Case("cp2", "hybrid"),
    Case("pp2", "hybrid tied"),
    Case("tp2 sp ep2 etp1", "hybrid moe"),
    Case("dp2 zero", "hybrid"),
    # multi-token prediction
    Case("tp2 sp", "mtp"),
    Case("pp2", "mtp"),
    Case("dp2 zero", "mtp"),
    Case("tp2 sp ep2 etp1", "mtp moe"),
    Case("tp2", "mtp hybrid"),
    Case("dp2", "mtp", PER_TOKEN),
    # DeepSeek's parts together
    Case("tp2 sp", "deepseek"),
    Case("pp2 first2", "deepseek"),
    Case("pp2 stages:Et|ttmL", "deepseek"),
    Case("pp2 stages:Et|t|t|mL", "deepseek", "--micro-batch-size 1"),  # two virtual stages a rank
    Case("ep2", "deepseek"),
    Case("ep4", "deepseek", "--micro-batch-size 1"),
    Case("tp2 sp ep2 etp1", "deepseek"),
    Case("tp2 sp ep2 etp2", "deepseek"),
    Case("tp2 sp ep2 etp1", "deepseek no q rank"),
    Case("dp2 zero overlap", "deepseek"),
    Case("cp2", "deepseek", NO_MTP),
    Case("tp2 sp cp2 ep4 etp1 zero", "deepseek", NO_MTP),
    Case("tp2 sp cp2 pp2 first2 ep2 etp2 zero", "deepseek", NO_MTP),
    Case("tp2 sp pp2 first2 ep4 etp1 zero overlap", "deepseek", "--micro-batch-size 1"),
    Case("tp2 sp pp4 stages:Et|t|t|mL ep2 etp1 zero overlap", "deepseek"),
    Case("pp2 stages:Et|t|t|mL ep2 zero overlap", "deepseek", "--micro-batch-size 1"),
    Case("tp2 sp ep2 etp1", "deepseek", GLOBAL_AUX),
    Case("ep2", "moe", SINKHORN),
    Case("ep2", "deepseek", PER_TOKEN),
    Case("ep2", "deepseek", "--moe-shared-expert-overlap"),
    Case(
        "tp2 sp ep2 etp1",
        "deepseek",
        "--recompute-granularity selective --recompute-modules mla_up_proj moe",
    ),
    Case("pp2 first2", "deepseek", precision="bf16"),
    Case("dp2 zero overlap", "deepseek", precision="bf16"),
    Case("ep2 ep-overlap", "deepseek", FINE_ROUTER, precision="bf16"),
    Case("tp2 sp", "deepseek hybrid"),
    Case("tp2 sp ep2 etp1", "deepseek hybrid"),
    Case("pp2 pattern:+-+E|+E/+E ep2", "deepseek hybrid"),
    Case("cp2", "deepseek hybrid", "--hybrid-layer-pattern +-+E+E"),
    # a linear attention
    Case("tp2 sp", "gated delta"),
    Case("pp2", "gated delta"),
    Case("dp2 zero overlap", "gated delta"),
    Case("tp2 sp cp2", "gated delta", s=4),
    # other things that Megatron does to a step
    Case("tp2 sp", options=RECOMPUTE),
    Case("pp2", options="--recompute-granularity selective"),
    Case("tp2 sp", options="--deterministic-mode"),
    Case("tp2 sp", options="--tst-fused-linear-loss"),
    Case("tp2 sp", options="--tst-kernel-in-recovery"),
    Case("tp4 sp", options="--tst-kernel torch"),
    Case("dp2", options="--num-workers 2"),
    # bf16
    *(
        Case(layout, precision="bf16")
        for layout in ("tp2 sp", "pp2", "cp2", "dp2 zero overlap", "tp2 sp pp2 dp2 zero overlap")
    ),
    Case("ep2", "moe", precision="bf16"),
    Case("tp2 sp", "hybrid", precision="bf16"),
    Case("ep2 ep-overlap", "moe", precision="bf16"),
    Case("ep2 ep-overlap", "mtp moe", precision="bf16"),
    Case("pp2 vpp2 ep2 ep-overlap", "deep moe", "--micro-batch-size 1", precision="bf16"),
]

# s = 1 through the superposed code against stock Megatron in the same layout, bit for bit
BAGS_OF_ONE = [
    Case("tp2", s=1),
    Case("tp4 sp", s=1),
    Case("cp2", "mtp", s=1),
    Case("pp2", "tied", s=1),
    Case("dp2 zero overlap", s=1),
    Case("tp2 sp ep2 etp2", "moe", s=1),
    Case("tp2 sp", precision="bf16", s=1),
    Case("pp2", "hybrid", s=1),
    Case("cp2", "deepseek", s=1),
    Case("tp2 sp ep2 etp2", "deepseek", s=1),
    Case("pp2 stages:Et|t|t|mL ep2 zero overlap", "deepseek", "--micro-batch-size 1", s=1),
    Case("ep2", "deepseek", GLOBAL_AUX, s=1),
    Case("tp2 sp", "moe", SINKHORN, s=1),
    Case("tp2 sp ep2 etp1", "deepseek hybrid", s=1),
]

# ids of those that are not slow: each kind of parallelism once. Broken on purpose in 103 places,
# these caught what all of CASES did.
FAST = {
    "tp2 sp cp2, dense, s4, fp32",
    "tp4 sp, dense, tst-kernel torch, s3, fp32",
    "tp2 sp pp2, tied, s3, fp32",
    "pp2 vpp2, deep, micro-batch-size 1, s3, fp32",
    "cp2 dp2, dense, eod-mask-loss calculate-per-token-loss, s3, fp32",
    "dp2 zero overlap, dense, s3, bf16",
    "tp2 sp ep2 etp1, mtp moe, s3, fp32",
    "dp2 fsdp, dense, s3, fp32",
    "tp2 sp, dense, tst-fused-linear-loss, s3, fp32",
    "tp2 sp, dense, tst-superpose output, s3, fp32",
    "pp2, dense, tst-superpose input, s3, fp32",
    "ep2 ep-overlap, moe, s3, bf16",
    "cp2, hybrid, s3, fp32",
    "tp2 sp ep2 etp1, deepseek, s3, fp32",
}
FAST_BAGS_OF_ONE = {"cp2, mtp, s1, fp32"}

# (layout, precision, the test that shows the refusal)
REFUSED = [
    (
        "positions that the layout cannot cut evenly",
        "any",
        "tests/unit/test_config.py::test_what_tst_does_not_work_with",
    ),
    (
        "--hybrid-context-parallel",
        "any",
        "tests/unit/test_config.py::test_what_tst_does_not_work_with",
    ),
    (
        "--tensor-parallel-num-weight-shards above the tensor-parallel size",
        "any",
        "tests/unit/test_config.py::test_what_tst_does_not_work_with",
    ),
    (
        "--tst-fused-linear-loss with fsdp, ep-overlap, --use-torch-fsdp2, --mtp-num-layers, "
        "--use-mup or --defer-embedding-wgrad-compute",
        "any",
        "tests/unit/test_effects.py::test_what_the_fused_linear_loss_does_not_work_with",
    ),
    ("tp with a script whose batches cannot be reached", "any", "tests/training/test_launch.py"),
]

# (layout, precision, why)
NOT_VERIFIED = [
    ("every layout over NCCL", "any", "no GPU yet; examples/slurm/nccl_tests.sbatch"),
    ("every layout", "fp8", "needs Transformer Engine and a GPU"),
    (
        "cp with Transformer Engine's attention",
        "any",
        "the tests bring an attention of their own, cp_attention.py",
    ),
    ("--use-torch-fsdp2; fsdp with more than data parallelism", "any", "not tried"),
    (
        "gated delta nets by the kernels of flash-linear-attention",
        "any",
        "need a GPU; the tests train Megatron's rule for --deterministic-mode",
    ),
    ("Mamba layers; DeepSeek's sparse attention", "any", "need packages of CUDA kernels"),
    ("ep with --moe-token-dispatcher-type flex (DeepEP, HybridEP)", "any", "needs a GPU"),
    (
        "more than 8 processes, a real cluster",
        "any",
        "two nodes were two network namespaces of one machine",
    ),
]
