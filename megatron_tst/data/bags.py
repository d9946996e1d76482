"""Raw samples -> bag view: tokens, labels, masks and positions as the model takes them.

L latent positions, S bag size (s in the paper). A raw sample has S*L tokens and Megatron's one
extra token, so its last bag has one valid label unless the caller has more tokens. Layout of the
labels: paper, listing 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_tst.ops.names import IGNORE


def bag_labels(next_tokens: torch.Tensor, seq_length: int, bag_size: int) -> torch.Tensor:
    """Next bags from next tokens.

    Example: L = 2 bags of S = 3. Raw tokens 10 .. 15 are followed by 11 .. 16. Position 0 is to
    predict bag 1, which is 13, 14, 15. Of bag 2 only the first token, 16, is known.

    >>> bag_labels(torch.arange(11, 17), seq_length=2, bag_size=3).tolist()
    [[13, 14, 15], [16, -100, -100]]

    Args:
        next_tokens: int64 [..., n], n >= S*L - S + 1; element t is the token that follows raw token
            t, or -100.
        seq_length, bag_size: L and S.

    Returns:
        int64 [..., L, S]: position j holds the tokens of bag j+1, -100 where `next_tokens` has
        none.
    """
    needed = bag_size * seq_length + bag_size - 1
    missing = max(0, needed - next_tokens.shape[-1])
    padded = F.pad(next_tokens[..., :needed], (0, missing), value=IGNORE)
    return padded[..., bag_size - 1 :].reshape(*next_tokens.shape[:-1], seq_length, bag_size)


def bag_view(
    raw: torch.Tensor, seq_length: int, bag_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut raw token ids into bags (paper, section 3 and listing 3).

    Args:
        raw: int64 [b, n], n >= S*L + 1 consecutive token ids; at most S*L + S of them are used.
        seq_length: L.
        bag_size: S.

    >>> tokens, labels = bag_view(torch.arange(10, 17).unsqueeze(0), seq_length=2, bag_size=3)
    >>> tokens.tolist()
    [[[10, 11, 12], [13, 14, 15]]]
    >>> labels.tolist()
    [[[13, 14, 15], [16, -100, -100]]]

    Returns:
        tokens [b, L, S] and labels [b, L, S], int64: position j holds bag j and is to predict bag
        j+1. With n = S*L + 1 the last bag has one label, with n >= S*L + S every bag is full;
        missing labels are -100.

    With S = 1, bags of one token, the last dimension is still there, and the model takes them for
    bags. For recovery on Megatron's own code leave it away:

    >>> tokens, labels = bag_view(torch.arange(10, 14).unsqueeze(0), seq_length=3, bag_size=1)
    >>> tokens.squeeze(-1).tolist(), labels.squeeze(-1).tolist()
    ([[10, 11, 12]], [[11, 12, 13]])

    Raises:
        ValueError: `raw` is not a matrix of integers or too short.
    """
    if bag_size < 1 or seq_length < 1:
        raise ValueError(
            "bag_view: expected seq_length >= 1 and bag_size >= 1, got "
            f"{seq_length} and {bag_size}."
        )
    if raw.dim() != 2 or raw.dtype != torch.int64:
        raise ValueError(
            f"bag_view: expected int64 token ids [b, n], got {raw.dtype} {tuple(raw.shape)}."
        )
    length = bag_size * seq_length
    if raw.shape[1] < length + 1:
        raise ValueError(
            f"bag_view: expected at least bag_size*seq_length + 1 = {length + 1} tokens a row "
            f"(the last one is only a label), got {raw.shape[1]}. Read longer samples or lower "
            "seq_length or bag_size."
        )
    tokens = raw[:, :length].reshape(-1, seq_length, bag_size)
    return tokens, bag_labels(raw[:, 1:], seq_length, bag_size)


def superposed_sample(
    sample: dict, seq_length: int, bag_size: int, superpose: str, weights: torch.Tensor
) -> dict:
    """Megatron's sample -> the same sample with a bag dimension.

    Args:
        sample: what a GPTDataset gives: `tokens`, `labels` int64 [n], `loss_mask` fp32 [n], n = S*L
            (L if superpose is "output").
        superpose: "both", "input" (bags in, the next single token out) or "output" (single tokens
            in, the next S tokens out).
        seq_length, bag_size: L and S.
        weights: fp32 [S], target weights; a place of weight 0 has no label.

    Returns:
        tokens [L, S] or [L], labels [L, S] (masked ones -100) or [L], loss_mask fp32 [L] (1 where a
        label is valid), position_ids int64 [L]; other entries are handed through. A new dict: a
        replayed batch stays as it was.
    """
    tokens, labels, mask = sample["tokens"], sample["labels"], sample["loss_mask"]
    if superpose == "input":
        # the token after bag j is the label of its last raw token; stock loss, stock mask
        labels, mask = labels[bag_size - 1 :: bag_size], mask[bag_size - 1 :: bag_size]
    else:
        next_tokens = labels.masked_fill(mask == 0, IGNORE)
        if superpose == "both":
            labels = bag_labels(next_tokens, seq_length, bag_size)
        else:
            labels = F.pad(next_tokens, (0, bag_size - 1), value=IGNORE).unfold(-1, bag_size, 1)
        labels = labels.masked_fill(weights == 0, IGNORE)
        mask = (labels != IGNORE).any(-1).to(mask.dtype)
    if superpose != "output":
        tokens = tokens.reshape(seq_length, bag_size)
    return {
        **sample,
        "tokens": tokens.contiguous(),
        "labels": labels.contiguous(),
        "loss_mask": mask.contiguous(),
        "position_ids": torch.arange(seq_length),
    }


def raw_slice(sample: dict, piece: int, length: int) -> dict:
    """Piece `piece` of a long sample: its tokens, labels and loss_mask [length]; other entries are
    handed through.
    """
    cut = slice(piece * length, (piece + 1) * length)
    keys = "tokens", "labels", "loss_mask"
    return {**sample, **{key: sample[key][cut].contiguous() for key in keys}}


def ordinary_slice(sample: dict, piece: int, seq_length: int) -> dict:
    """Piece `piece` of a long sample as an ordinary sample of L tokens: tokens, labels, loss_mask
    and position_ids [L].
    """
    return {**raw_slice(sample, piece, seq_length), "position_ids": torch.arange(seq_length)}


def bag_entropy(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Entropy of each bag's target distribution in nats: the floor that the mce cannot pass (log S
    for S distinct labels of equal weight).

    >>> bag_entropy(torch.tensor([[5, 7], [5, 5], [5, -100]]), torch.ones(2)).exp().tolist()
    [2.0, 1.0, 1.0]

    Args:
        labels: int64 [..., S], -100 ignored; duplicates are one outcome.
        weights: fp32 [S].

    Returns:
        fp32 [...]; 0 for a bag without labels.
    """
    mass = weights.to(labels.device) * (labels != IGNORE)
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    same = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    merged = (same * mass.unsqueeze(-2)).sum(-1)
    return -(mass * torch.where(mass > 0, merged, 1.0).log()).sum(-1)
