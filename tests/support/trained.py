"""Models trained through both phases, for the exports, and what Megatron itself says of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.runs import ROOT, TINY, TST, data

VOCAB = 500  # padded to 512, or 768 under TP2
GQA = "--group-query-attention --num-query-groups 2 --kv-channels 12 --rotary-base 50000".split()
NORM = ["--qk-layernorm"]
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-token-dispatcher-type "
    "alltoall"
).split()
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
EP2 = ["--expert-model-parallel-size", "2"]
# DeepSeek-V3's parts; the norms of its latents have this epsilon in transformers whatever the rest
LATENTS = (
    "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 6 --qk-layernorm --norm-epsilon 1e-6"
).split()
SIGMOID = (
    "--num-experts 8 --moe-router-topk 4 --moe-ffn-hidden-size 16 "
    "--moe-shared-expert-intermediate-size 32 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2 "
    "--moe-router-topk-scaling-factor 2.5 --moe-router-load-balancing-type seq_aux_loss "
    "--moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall"
).split()
GROUPS = "--moe-router-num-groups 4 --moe-router-group-topk 2".split()
YARN = "--rope-type yarn --rotary-scaling-factor 4 --mscale 0.9 --mscale-all-dim 0.7".split()
HYBRID = "--spec support.hybrid_spec hybrid_stack_spec --hybrid-layer-pattern".split()
HYBRID_QK = "--spec support.hybrid_qk_spec hybrid_stack_spec --hybrid-layer-pattern".split()
TIED = [flag for flag in TINY if flag != "--untie-embeddings-and-output-weights"]
RUNS = {  # name: (processes, flags, class)
    "llama": (1, TINY, "LlamaForCausalLM"),
    "llama, tied, gqa, tp2": (2, [*TIED, *GQA, *TP2], "LlamaForCausalLM"),
    "llama, rope scaling": (
        1,
        [*TINY, "--use-rope-scaling", "--rope-scaling-factor", "4"],
        "LlamaForCausalLM",
    ),
    "qwen3, gqa": (1, [*TINY, *GQA, *NORM], "Qwen3ForCausalLM"),
    "qwen3 moe, tp2 ep2": (
        4,
        [*TINY, *GQA, *NORM, *MOE, *TP2, *EP2],
        "Qwen3MoeForCausalLM",
    ),
    "qwen3 moe, softmax first, a dense layer": (
        1,
        [*TINY, *NORM, *MOE, "--moe-router-pre-softmax", "--moe-layer-freq", "[0,1]"],
        "Qwen3MoeForCausalLM",
    ),
    "deepseek, tp2 ep2": (
        4,
        [
            *[*TINY, *LATENTS, "--q-lora-rank", "24", *SIGMOID, *GROUPS, *TP2, *EP2],
            *["--num-layers", "3", "--moe-layer-freq", "[0,1,1]", "--mtp-num-layers", "1"],
        ],
        "DeepseekV3ForCausalLM",
    ),
    "deepseek, tied, no rank of queries, yarn, tp2 ep2": (
        4,
        [*TIED, *LATENTS, *SIGMOID, *YARN, *TP2, *EP2, "--moe-layer-freq", "[0,1]"],
        "DeepseekV3ForCausalLM",
    ),
    "llama, hybrid, tp2": (2, [*TIED, *GQA, *TP2, *HYBRID, "*-*-"], "LlamaForCausalLM"),
    "qwen3 moe, hybrid": (1, [*TINY, *GQA, *NORM, *MOE, *HYBRID_QK, "*-*E"], "Qwen3MoeForCausalLM"),
    "deepseek, hybrid, ep2": (
        2,
        [
            *[*TINY, *LATENTS, "--q-lora-rank", "24", *SIGMOID, *GROUPS, *EP2],
            *[*HYBRID, "+-+E/+E", "--mtp-num-layers", "1"],
        ],
        "DeepseekV3ForCausalLM",
    ),
}


def corpus_below(folder: Path, first: int = 0, documents: int = 60, name: str = "text") -> Path:
    """A corpus of the ids first .. first + VOCAB - 1. -> its prefix"""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, ids = folder / name, np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(documents):
        document = np.cumsum(ids.integers(0, 4, int(ids.integers(50, 400)))) % VOCAB + first
        builder.add_document(document.astype(np.int32), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def known(corpus: Path) -> list[str]:
    """Flags for such a corpus."""
    return [*data(corpus)[:-1], str(VOCAB)]


class Trained:
    """name of RUNS -> a folder with the checkpoint `ck` and Megatron's answers.pt (ask_model.py),
    trained when first asked for.
    """

    def __init__(self, fork_server, corpus: Path, new_folder):
        self._fork_server, self._corpus, self._new_folder = fork_server, corpus, new_folder
        self._made = {}

    def __call__(self, name: str) -> Path:
        if name not in self._made:
            folder = self._new_folder("trained")
            nproc, flags, _ = RUNS[name]
            flags = [
                *flags,
                *TST,
                *known(self._corpus),
                "--save",
                folder / "ck",
                "--save-interval",
                "5",
                "--lr",
                "1e-2",
            ]
            run = self._fork_server.train(
                folder / "answers.pt",
                *flags,
                script=str(ROOT / "tests/checkpoint/ask_model.py"),
                nproc=nproc,
            )
            assert run.ok, run.log[-3000:]
            self._made[name] = folder
        return self._made[name]
