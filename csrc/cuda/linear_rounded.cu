// The linear layer's kernels for float32 as TF32.
#include "linear.cuh"

namespace fused_dni::cuda {

LinearKernels linear_rounded(int shape) { return linear_kernels<Rounded>(shape); }

}  // namespace fused_dni::cuda
