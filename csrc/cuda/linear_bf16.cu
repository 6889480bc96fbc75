// The linear layer's kernels for bfloat16.
#include "linear.cuh"

namespace fused_dni::cuda {

LinearKernels linear_bf16(int shape) { return linear_kernels<InBf16>(shape); }

}  // namespace fused_dni::cuda
