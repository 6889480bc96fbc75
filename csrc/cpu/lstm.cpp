// The LSTM over a window.
#include "ops.hpp"

namespace fused_dni::FUSED_DNI_ISA {

void add_lstm(Kernels&) {}

}  // namespace fused_dni::FUSED_DNI_ISA
