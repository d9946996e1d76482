"""The method on tensors: embedding, loss, their kernels, the reference."""
