// The linear layer's kernels for float16.
#include "linear.cuh"

namespace fused_dni::cuda {

LinearKernels linear_fp16(int shape) { return linear_kernels<InFp16>(shape); }

}  // namespace fused_dni::cuda
