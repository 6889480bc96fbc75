// The linear layer's ops where activations and parameters are of one type.
#include "linear.hpp"

namespace fused_dni::FUSED_DNI_ISA {

void add_linear(Kernels& kernels) {
  kernels.linear_forward[0] = linear_forward<Plain<float>>;
  kernels.linear_forward[1] = linear_forward<Plain<double>>;
  kernels.linear_backward[0] = linear_backward<Plain<float>>;
  kernels.linear_backward[1] = linear_backward<Plain<double>>;
  kernels.linear_update[0] = linear_update<Plain<float>>;
  kernels.linear_update[1] = linear_update<Plain<double>>;
  kernels.linear_step[0] = linear_step<Plain<float>>;
  kernels.linear_step[1] = linear_step<Plain<double>>;
}

}  // namespace fused_dni::FUSED_DNI_ISA
