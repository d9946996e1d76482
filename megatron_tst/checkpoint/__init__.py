"""Checkpoints of Megatron's torch_dist format, read and rewritten without building a model: format, inspect, boundary, verify."""
