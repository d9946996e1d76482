"""Checkpoints of Megatron's torch_dist format as files, read and rewritten without building a
model.
"""
