// The linear layer's kernels for float32 as TF32.
#include "linear.cuh"

namespace fused_dni::cuda {

LinearKernels linear_tf32(int shape) { return linear_kernels<InTf32>(shape); }

}  // namespace fused_dni::cuda
