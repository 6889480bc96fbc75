// The linear layer's kernels for bfloat16.
#include "linear.cuh"

namespace fused_dni::cuda {

LinearKernels linear_brain(int shape) { return linear_kernels<Brain>(shape); }

}  // namespace fused_dni::cuda
