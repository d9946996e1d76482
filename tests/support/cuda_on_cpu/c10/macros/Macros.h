// torch's own, and the kernels' assertion, which the emulator reports.
#pragma once

#include_next <c10/macros/Macros.h>

#include "emulator.h"

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  ((condition) ? void() : ::cuda_on_cpu::fail("device-side assert: %s", #condition))
