"""Checkpoints to and from Hugging Face, to NeMo (Megatron-Bridge), and quantised (ModelOpt)."""
