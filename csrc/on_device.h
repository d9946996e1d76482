// The kernels of both devices have the same names and arguments: TST_ON_DEVICE(tensor, call) calls
// cuda::call where the tensor is on a GPU, and cpu::call elsewhere.
#pragma once

#if defined(MHCE_WITH_CUDA)
#define TST_ON_DEVICE(tensor, call) ((tensor).is_cuda() ? cuda::call : cpu::call)
#else
#define TST_ON_DEVICE(tensor, call) cpu::call
#endif
