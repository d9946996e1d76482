"""Multi-latent attention without a rank of queries as DeepSeek has it, for the tests: Megatron-Core
0.19 gives linear_q_proj a norm that the model does not have (Megatron-Bridge#5261), or without
Transformer Engine refuses to build it; 0.18 did neither.
"""

from megatron.core.transformer.identity_op import IdentityOp


def install():
    """Let Megatron 0.19 build it as 0.18 does, in this process."""
    try:
        from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
    except ImportError:
        return
    resolve = QKNormConfigResolver.resolve

    def plain(self):
        if self.has_q_lora:
            return resolve(self)
        return self._result(
            linear_q_proj=self.submodules.linear_q_proj,
            linear_q_up_proj=IdentityOp,
            linear_kv_up_proj=self.submodules.linear_kv_up_proj,
            q_layernorm=IdentityOp,
            kv_layernorm=self.submodules.kv_layernorm,
        )

    QKNormConfigResolver.resolve = plain
