// The linear layer's kernels for float16.
#include "linear.cuh"

namespace fused_dni::cuda {

LinearKernels linear_half(int shape) { return linear_kernels<Half>(shape); }

}  // namespace fused_dni::cuda
