"""Token superposition in a training loop of one's own: megatron-core, and no megatron.training.

    python examples/own_loop.py DATA VOCABULARY                            one process
    torchrun --nproc-per-node 2 examples/own_loop.py DATA VOCABULARY       tensor parallelism of 2
    MEGATRON_TST_CPU=1 ...                                                 on CPU

DATA is the prefix of an indexed dataset (`megatron-tst corpus` makes one), VOCABULARY the number of
its token ids. Every process reads the same samples, so bags reach each tensor-parallel rank without
a broadcast. The superposed phase is followed by recovery in the same loop: the batch's shape alone
says which phase it is.
"""

import os
import sys

from megatron_tst import cpu

cpu.enable_if_asked()

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from megatron.core.transformer import TransformerConfig

import megatron_tst
from megatron_tst import PhasedDataset, Schedule, TSTConfig

LENGTH, BATCH, ITERATIONS = 32, 8, 40  # positions of a sample, samples of an iteration
KEYS = "tokens", "labels", "loss_mask", "position_ids"
MASKS = "reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask"


def start() -> int:
    """One process group, shared by tensor parallelism alone. -> this process' rank"""
    alone = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    os.environ.update({} if "RANK" in os.environ else alone)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    return torch.distributed.get_rank()


def samples_of(prefix: str, vocabulary: int, number: int, length: int) -> torch.utils.data.Dataset:
    """`number` samples of `length` tokens of the indexed dataset, as Megatron shuffles them."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=NullTokenizer(vocabulary),
        **dict.fromkeys(MASKS, False),
    )
    sizes = [number, None, None]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def gpt(vocabulary: int) -> GPTModel:
    """A small GPT; each tensor-parallel rank holds its part of it."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec()
    return GPTModel(config, spec, vocabulary, LENGTH, position_embedding_type="rope").cuda()


def train(prefix: str, vocabulary: int) -> None:
    """Train through both phases, and say on rank 0 how it goes."""
    rank = start()
    # --- the essential lines
    tst = TSTConfig(bag_size=4, iters=20)
    plan = Schedule.of(4, 20, ITERATIONS * BATCH, LENGTH, BATCH)
    text = samples_of(prefix, vocabulary, plan.long_samples, plan.long_sample_length)
    data = PhasedDataset(text, plan, tst, vocabulary)
    megatron_tst.apply(tst)
    model = gpt(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i, batch in enumerate(torch.utils.data.DataLoader(data, BATCH)):
        tokens, labels, mask, positions = (batch[key].cuda() for key in KEYS)
        losses = model(tokens, positions, None, labels=labels)  # nats, [b, L] in both phases
        # --- end
        loss = (losses * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            phase = plan.phase_at(i * BATCH)
            print(f"{i + 1} | {phase.name} | bag size {phase.bag_size} | loss {loss.item():.6f}")
    done = megatron_tst.status()
    calls = f"{done.superposed_embeddings} embedding and {done.multi_hot_losses} loss calls"
    print(f"rank {rank}: {calls} with bags")


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
    torch.distributed.destroy_process_group()
