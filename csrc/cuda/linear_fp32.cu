// The linear layer's kernels for float32 in single precision.
#include "linear.cuh"

namespace fused_dni::cuda {

LinearKernels linear_fp32(int shape) { return linear_kernels<InFp32>(shape); }

}  // namespace fused_dni::cuda
