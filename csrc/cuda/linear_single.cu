// The linear layer's kernels for float32 in single precision.
#include "linear.cuh"

namespace fused_dni::cuda {

LinearKernels linear_single(int shape) { return linear_kernels<Single>(shape); }

}  // namespace fused_dni::cuda
