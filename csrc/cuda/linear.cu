// Which kernel a linear op is served by.
#include "linear.cuh"

namespace fused_dni::cuda {
namespace {

// Tiles by rule of thumb. While a layer is bounded by latency: all rows in a tile as long as they
// fit, and as few features as a product takes, so that there are tiles for many processors.
LinearKernels kernels_for(const LinearArguments& a) {
  const int shape = a.rows <= 32 ? 1 : a.rows <= 256 ? 0 : 2;
  if (a.type == kBfloat16) return linear_bf16(shape);
  if (a.type == kFloat16) return linear_fp16(shape);
  return a.ieee ? linear_fp32(shape) : linear_tf32(shape);
}

}  // namespace

bool keeps_input(const LinearArguments& a) {
  return a.normalization != kNoNormalization || !from_output(a.activation);
}

std::size_t linear_workspace(const LinearArguments& arguments) {
  LinearArguments a = arguments;
  return kernels_for(a).workspace(a, nullptr);
}

Status linear(const LinearLaunch& launch) { return kernels_for(launch.arguments).launch(launch); }

}  // namespace fused_dni::cuda
