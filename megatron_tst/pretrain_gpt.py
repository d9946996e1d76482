"""Pre-train a GPTModel, or with --hybrid-layer-pattern a HybridModel, with TST.

    torchrun ... -m megatron_tst.pretrain_gpt <Megatron's flags> \\
        --tst-bag-size 6 --tst-step-ratio 0.3

A plain Megatron script but for its two marked lines. It needs nothing but the megatron-core 0.19
wheel. Users of a Megatron-LM checkout run its own pretrain_gpt.py through
`python -m megatron_tst.launch` instead. MEGATRON_TST_CPU=1 trains on CPU (cpu.py).
"""

from collections.abc import Callable, Iterator
from functools import partial

from megatron_tst import training  # (TST)

training.prepare()  # (TST) before megatron.training is imported

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, inprocess_restart, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

SPIKE = 10  # a loss of so many times the largest yet is looked at again (--check-for-spiky-loss)
KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def stage_has_mtp(vp_stage: int | None) -> bool:
    """Whether multi-token prediction layers are in this pipeline stage, which then needs the tokens
    too.
    """
    args, layout = get_args(), None
    if args.mtp_num_layers:
        layout = core_transformer_config_from_args(args).pipeline_model_parallel_layout
    return mtp_on_this_rank(layout, args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)


def get_batch(data_iterator: Iterator[dict] | None, vp_stage: int | None = None) -> list:
    """One micro-batch, as this rank needs it.

    Args:
        data_iterator: None but on rank 0 of each tensor-parallel group.
        vp_stage: of a virtual pipeline.

    Returns:
        KEYS in order: tokens and labels int64 [b, L/cp], or [b, L/cp, S] in bags, loss_mask fp32
        and position_ids int64 [b, L/cp]; None for what its pipeline stage has no use for.
    """
    args = get_args()
    mtp = stage_has_mtp(vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not mtp:
        return [None] * len(KEYS)
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {
            key: sample[key].cuda(non_blocking=True) if key in sample else None for key in KEYS
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return [batch[key] for key in KEYS]


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses that count in nats, their number, and both for Megatron's logs.

    Args:
        loss_mask, output: [b, L/cp], 0 where a loss does not count, and the losses.
    """
    mask = loss_mask.view(-1).float()
    loss = (output.view(-1).float() * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    check_loss(loss)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def check_loss(loss: torch.Tensor) -> None:
    """Megatron's checks of this rank's loss: an iteration that fails one is run again, to tell a
    faulty machine from a faulty run.
    """
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejected in (torch.isnan, torch.isinf):
            machine.validate_result(
                loss, rejected, f"{rejected.__name__} in the local loss", tolerance=0.0, fatal=True
            )
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss")
        machine.validate_result(loss, spiky, "spiky loss", tolerance=0.0, fatal=False)


def forward_step(
    data_iterator: Iterator[dict] | None,
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[object, Callable]:
    """One micro-batch through the model. -> its output, and the function that makes a loss of it

    Args:
        return_schedule_plan: with --overlap-moe-expert-parallel-comm: the model's pieces, for the
            schedule to call.
    """
    tokens, labels, loss_mask, position_ids, attention_mask = get_batch(
        data_iterator, get_attr_wrapped_model(model, "vp_stage")
    )
    call = model.build_schedule_plan if return_schedule_plan else model
    output = call(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def datasets_provider(
    train_val_test_num_samples: list[int], vp_stage: int | None = None
) -> list[torch.utils.data.Dataset | None]:
    """Train, validation and test datasets of get_args().seq_length tokens."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )

    def built_here():
        here = is_first_or_last_pipeline_stage(vp_stage) or stage_has_mtp(vp_stage)
        return here and mpu.get_tensor_model_parallel_rank() == 0

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(
        dataset, train_val_test_num_samples, built_here, config
    ).build()


datasets_provider.is_distributed = True


def main() -> None:
    """Read the command line and train."""
    args = parse_and_validate_args()
    model = (
        hybrid_config_from_args(args) if args.hybrid_layer_pattern else gpt_config_from_args(args)
    )
    config = pretrain_cfg_container_from_args(args, model)
    run, store = pretrain, None
    if args.inprocess_restart:
        run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    run(config, datasets_provider, ModelType.encoder_or_decoder, forward_step, store=store)
    torch.distributed.barrier()
    # gloo's threads can abort a process that ends without it, after all is saved
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
