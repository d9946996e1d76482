"""config.json of a mixture of experts -> the flags of a Megatron run of its shape. No torch.

For the planner: sizes and routing of models that the package does not export or import.
export/hf_config.py reads those that it does, and there each value has to mean the same in Megatron.
Here what changes no size may be left out, and is then named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tst.errors import refuse
from megatron_tst.json_file import entry, shown

_LARGEST = 1 << 31  # of a size
_LAYERS = 1 << 16
_BY_FLAGS = "Plan it by flags: --num-layers, --hidden-size and so on."


@dataclass(frozen=True)
class Kind:
    """How the config.json of a model_type names what a plan needs.

    Args:
        experts, chosen, width: keys of the experts of a layer, of those that a token goes to, and
            of their width.
        shared: key of the number of shared experts, each as wide as the others.
        shared_width: or key of the width of all of them together.
        shared_gate: whether a gate weighs their output.
        first: key of the number of layers at the start that have no experts.
        mtp: key of the number of multi-token prediction layers.
        latent: multi-latent attention.
        qk_norm: whether queries and keys (or latents) are normalised, or the key that says so.
        qkv_bias: whether their products have a bias, or the key that says so.
        biases: every other product has one too.
        sinks: attention has a learned logit that no position belongs to.
        sigmoid: the router's scores; a string: the key that names the function.
        expert_bias: whether the router has a bias for each expert, or the key that says so.
        more: flags that this kind has beside those of its sizes.
    """

    experts: str
    chosen: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    shared: str | None = None
    shared_width: str | None = None
    shared_gate: bool = False
    first: str | None = None
    mtp: str | None = None
    latent: bool = False
    qk_norm: bool | str = False
    qkv_bias: bool | str = False
    biases: bool = False
    sinks: bool = False
    sigmoid: bool | str = False
    expert_bias: bool | str = False
    more: tuple[str, ...] = ()


_DEEPSEEK = dict(
    experts="n_routed_experts",
    shared="n_shared_experts",
    first="first_k_dense_replace",
    mtp="num_nextn_predict_layers",
)
_LOCAL = dict(experts="num_local_experts", width="intermediate_size")
_BAILING = dict(
    experts="num_experts",
    shared="num_shared_experts",
    first="first_k_dense_replace",
    qkv_bias="use_qkv_bias",
)
# Read in transformers' modeling files, or in those beside the released weights.
KINDS: dict[str, Kind] = {
    "deepseek_v2": Kind(**_DEEPSEEK, latent=True, qk_norm=True),
    "deepseek_v3": Kind(
        **_DEEPSEEK, latent=True, qk_norm=True, sigmoid="scoring_func", expert_bias=True
    ),
    "kimi_k2": Kind(
        **_DEEPSEEK, latent=True, qk_norm=True, sigmoid="scoring_func", expert_bias=True
    ),
    "glm4_moe_lite": Kind(**_DEEPSEEK, latent=True, qk_norm=True, sigmoid=True, expert_bias=True),
    "glm4_moe": Kind(
        **_DEEPSEEK,
        qk_norm="use_qk_norm",
        qkv_bias="attention_bias",
        sigmoid=True,
        expert_bias=True,
    ),
    "dots1": Kind(**_DEEPSEEK, qk_norm=True, sigmoid=True, expert_bias=True),
    "mixtral": Kind(**_LOCAL),
    "gpt_oss": Kind(
        **_LOCAL,
        qkv_bias=True,
        biases=True,
        sinks=True,
        more=("--quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0",),
    ),
    "minimax_m2": Kind(
        **_LOCAL,
        shared_width="shared_intermediate_size",
        mtp="num_mtp_modules",
        qk_norm="use_qk_norm",
        sigmoid="scoring_func",
        expert_bias="use_routing_bias",
    ),
    "qwen2_moe": Kind(
        experts="num_experts",
        shared_width="shared_expert_intermediate_size",
        shared_gate=True,
        qkv_bias=True,
    ),
    "olmoe": Kind(experts="num_experts", width="intermediate_size", qk_norm=True),
    "bailing_moe": Kind(**_BAILING),
    "bailing_moe_v2": Kind(
        **_BAILING,
        mtp="num_nextn_predict_layers",
        qk_norm="use_qk_norm",
        sigmoid="score_function",
        expert_bias="moe_router_enable_expert_bias",
    ),
    "ernie4_5_moe": Kind(
        experts="moe_num_experts",
        chosen="moe_k",
        shared="moe_num_shared_experts",
        first="moe_layer_start_index",
        mtp="num_nextn_predict_layers",
        expert_bias=True,
    ),
}
# What an absent key stands for; keys that are not here must be there.
_ABSENT: dict[str, Any] = {
    "attention_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_routing_bias": False,
    "moe_router_enable_expert_bias": False,
    "num_nextn_predict_layers": 0,
    "num_mtp_modules": 0,
    "shared_intermediate_size": 0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
# Kinds whose config class has another default.
_ABSENT_OF = {
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "kimi_k2": {"scoring_func": "sigmoid"},
    "ernie4_5_moe": {"tie_word_embeddings": True},
    "minimax_m2": {"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True},
}
# Experts are normalised among those chosen, whatever the file says, or say nothing of it.
_NORMED = ("mixtral", "gpt_oss", "minimax_m2", "ernie4_5_moe")
# Keys that change what a model computes and no size of it; Megatron's flags for them are not given.
_LEFT_OUT = ("rope_scaling", "sliding_window", "attn_type_list")
# Norms over all heads together: Megatron's are one for every head.
_WIDE_NORMS = ("olmoe", "minimax_m2")


@dataclass(frozen=True)
class Shape:
    """A model's shape as flags.

    Args:
        flags: of a Megatron run, a word each.
        vocabulary: rows of its embedding.
        biases: its products have biases, which is Megatron's default and needs no flag.
        notes: what of the file is not in the flags, a sentence each.
    """

    flags: list[str]
    vocabulary: int
    biases: bool
    notes: list[str]


def read(config: Mapping[str, Any], path: object, others: Iterable[str] = ()) -> Shape:
    """The shape of a model of one of KINDS.

    Args:
        config: what its config.json holds.
        path: of the file, for messages.
        others: kinds that are read elsewhere, for the same.

    Raises:
        TSTError: another model_type, a key that is missing, or a value that is none.
    """
    name = config.get("model_type")
    if name not in (*KINDS,):
        got = name if isinstance(name, str) else shown(name)
        known = ", ".join(sorted({*others, *KINDS}))
        refuse(f"{path}: model_type", f"one of {known}", got, _BY_FLAGS)
    return _Reader(config, path, name).shape()


class _Reader:
    def __init__(self, found, path, name):
        self.found, self.path, self.name, self.kind = found, path, name, KINDS[name]
        self.absent = _ABSENT | _ABSENT_OF.get(name, {})
        self.notes: list[str] = []

    def get(self, key, kinds, **more):
        if key in self.absent:
            more.setdefault("default", self.absent[key])
        return entry(self.found, key, kinds, self.path, **more)

    def size(self, key, least=1, most=_LARGEST):
        return self.get(key, int, least=least, most=most)

    def count(self, key) -> int:
        """0 where it is null."""
        return self.get(key, (int, type(None)), least=0, most=_LAYERS) or 0

    def says(self, value) -> bool:
        """A flag of the kind: said by it, or by the key that it names."""
        return self.get(value, bool) if isinstance(value, str) else value

    def refuse(self, key, expected, got):
        refuse(f"{self.path}: {key}", expected, shown(got), _BY_FLAGS)

    def shape(self) -> Shape:
        kind = self.kind
        act = self.found.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            self.refuse("hidden_act", "silu", act)
        if kind.qkv_bias != "attention_bias" and not kind.biases and self.says("attention_bias"):
            self.refuse("attention_bias", "false", True)
        if self.says("use_bias"):
            self.refuse("use_bias", "false", True)
        layers = self.size("num_hidden_layers", most=_LAYERS)
        words = [
            f"--num-layers {layers} --hidden-size {self.size('hidden_size')}",
            f"--num-attention-heads {self.size('num_attention_heads')}",
            *(self.latent() if kind.latent else self.attention()),
            f"--ffn-hidden-size {self.size('intermediate_size')}",
            *self.experts(layers),
            *self.routing(),
            f"--max-position-embeddings {self.size('max_position_embeddings')}",
            *self.rope(),
            "--normalization RMSNorm",
            f"--norm-epsilon {self.get('rms_norm_eps', float, default=1e-6, least=0, most=1)!r}",
        ]
        words += kind.more or ("--swiglu",)
        if not kind.biases:
            words.append("--disable-bias-linear")
        if not self.says("tie_word_embeddings"):
            words.append("--untie-embeddings-and-output-weights")
        if kind.mtp and (heads := self.count(kind.mtp)):
            words.append(f"--mtp-num-layers {heads}")
        left = [key for key in _LEFT_OUT if self.found.get(key)]
        if left:
            self.notes.append(f"{', '.join(left)} of config.json: no size, and not in the flags")
        return Shape(" ".join(words).split(), self.size("vocab_size"), kind.biases, self.notes)

    def attention(self) -> list[str]:
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        groups = self.get(
            "num_key_value_heads", (int, type(None)), default=None, least=1, most=_LARGEST
        )
        width = self.get("head_dim", (int, type(None)), default=None, least=1, most=_LARGEST)
        if heads % (groups or heads):
            self.refuse("num_key_value_heads", f"a divisor of the {heads} heads", groups)
        if not width and hidden % heads:
            self.refuse("hidden_size", f"a multiple of the {heads} heads", hidden)
        words = [f"--kv-channels {width or hidden // heads}"]
        if groups and groups != heads:
            words.append(f"--group-query-attention --num-query-groups {groups}")
        if self.says(self.kind.qk_norm):
            words.append("--qk-layernorm")
            if self.name in _WIDE_NORMS:
                said = "norms of queries and keys are over all heads; Megatron's are over each"
                self.notes.append(said)
        if self.says(self.kind.qkv_bias) and not self.kind.biases:
            words.append("--add-qkv-bias")
        if self.kind.sinks:
            words.append("--softmax-type learnable")
        return words

    def latent(self) -> list[str]:
        rank = self.get("q_lora_rank", (int, type(None)), least=1, most=_LARGEST)
        words = [
            f"--multi-latent-attention --kv-lora-rank {self.size('kv_lora_rank')}",
            f"--qk-head-dim {self.size('qk_nope_head_dim')}",
            f"--qk-pos-emb-head-dim {self.size('qk_rope_head_dim')}",
            f"--v-head-dim {self.size('v_head_dim')} --kv-channels {self.size('v_head_dim')}",
            "--qk-layernorm",
        ]
        if not any(self.found.get(key) for key in ("rope_scaling", "rope_parameters")):
            words.append("--rope-type rope --no-rope-fusion")  # Megatron fuses YaRN alone
        return words + ([f"--q-lora-rank {rank}"] if rank else [])

    def experts(self, layers: int) -> list[str]:
        kind = self.kind
        count = self.size(kind.experts, most=_LAYERS)
        chosen, width = self.size(kind.chosen), self.size(kind.width)
        if chosen > count:
            self.refuse(kind.chosen, f"at most the {count} experts", chosen)
        words = [f"--num-experts {count} --moe-router-topk {chosen} --moe-ffn-hidden-size {width}"]
        shared = self.count(kind.shared) * width if kind.shared else 0
        if kind.shared_width:
            shared = self.size(kind.shared_width, least=0)
        if shared:
            words.append(f"--moe-shared-expert-intermediate-size {shared}")
            if kind.shared_gate:
                words.append("--moe-shared-expert-gate")
        pattern = self.layers_with_experts(layers)
        if not any(pattern):
            self.refuse("experts", "some layer that has them", "none")
        if not all(pattern):
            words.append(f"--moe-layer-freq {runs(pattern)}")
        return words

    def layers_with_experts(self, layers: int) -> list[int]:
        kinds = self.get("mlp_layer_types", (list, type(None)), default=None)
        if kinds is not None:  # transformers 5
            if len(kinds) != layers or set(map(str, kinds)) - {"dense", "sparse"}:
                self.refuse("mlp_layer_types", f"{layers} of dense and sparse", kinds)
            return [int(kind == "sparse") for kind in kinds]
        if self.name == "qwen2_moe":
            step = self.get("decoder_sparse_step", int, default=1, least=1, most=_LAYERS)
            dense = self.get("mlp_only_layers", (list, type(None)), default=None) or ()
            return [int(i not in dense and (i + 1) % step == 0) for i in range(layers)]
        first = self.count(self.kind.first) if self.kind.first else 0
        step = self.get("moe_layer_freq", int, default=1, least=1, most=_LAYERS)
        if (interval := self.get("moe_layer_interval", int, default=1)) != 1:
            self.refuse("moe_layer_interval", 1, interval)
        last = self.get("moe_layer_end_index", int, default=-1)
        if -1 < last < layers - 1:
            self.refuse("moe_layer_end_index", "-1, or the last layer", last)
        return [int(i >= first and i % step == 0) for i in range(layers)]

    def routing(self) -> list[str]:
        sigmoid = self.kind.sigmoid
        if isinstance(sigmoid, str):
            score = self.get(sigmoid, str)
            if score not in ("sigmoid", "softmax"):
                self.refuse(sigmoid, "sigmoid or softmax", score)
            sigmoid = score == "sigmoid"
        words = ["--moe-router-score-function sigmoid"] if sigmoid else []
        if self.says(self.kind.expert_bias):
            if sigmoid:  # Megatron has it with these scores alone
                words.append("--moe-router-enable-expert-bias")
            else:
                self.notes.append(
                    "the router's expert bias is not in the flags: Megatron has it "
                    "with sigmoid scores alone"
                )
        normed = self.name in _NORMED or self.get("norm_topk_prob", bool, default=False)
        if not sigmoid and not normed:
            words.append("--moe-router-pre-softmax")
        groups, limit = self.count("n_group"), self.count("topk_group")
        if groups > 1:
            words.append(f"--moe-router-num-groups {groups} --moe-router-group-topk {limit}")
        scale = self.get("routed_scaling_factor", (float, type(None)), least=0, most=1e6)
        if scale not in (None, 1.0) and (sigmoid or not normed):
            words.append(f"--moe-router-topk-scaling-factor {scale:g}")
        return words

    def rope(self) -> list[str]:
        rope = self.get("rope_parameters", (dict, type(None)), default=None) or {}
        theta = self.get("rope_theta", (float, type(None)), default=None, least=1, most=1e12)
        theta = theta or entry(rope, "rope_theta", float, self.path, default=10000.0, least=1)
        part = self.get("partial_rotary_factor", (float, type(None)), default=None, least=0, most=1)
        part = part or rope.get("partial_rotary_factor")
        if "rotary_dim" in self.found and not self.kind.latent:
            width = self.found.get("head_dim") or self.size("rotary_dim")
            part = self.size("rotary_dim", most=width) / width
        if rope.get("rope_type", "default") != "default":
            self.notes.append("rope_parameters of config.json: no size, and not in the flags")
        words = [f"--position-embedding-type rope --rotary-base {int(theta)}"]
        return words + ([f"--rotary-percent {part:g}"] if part and not self.kind.latent else [])


def runs(pattern: list[int]) -> str:
    """Layers with experts as Megatron's --moe-layer-freq takes them: ([0]*3+[1]*58)."""
    lengths: list[list[int]] = []
    for value in pattern:
        if lengths and lengths[-1][0] == value:
            lengths[-1][1] += 1
        else:
            lengths.append([value, 1])
    return f"({'+'.join(f'[{value}]*{count}' for value, count in lengths)})"
