// The Python module: fused_dni.backends._cuda, or _cuda_emulated where the same sources run on a CPU.
#include <pybind11/pybind11.h>

#include "binding.hpp"

#if defined(FUSED_DNI_EMULATED)
#include "../host_emulation/machine.hpp"
#define FUSED_DNI_MODULE _cuda_emulated
#else
#include <cuda_runtime_api.h>
#define FUSED_DNI_MODULE _cuda
#endif

namespace fused_dni::cuda {

void bind_linear(pybind11::module_& m);
void bind_lstm(pybind11::module_& m);

}  // namespace fused_dni::cuda

PYBIND11_MODULE(FUSED_DNI_MODULE, m) {
  using namespace fused_dni::cuda;
  m.doc() = "Kernels in CUDA C++; fused_dni/backends/cuda is their face.";
  bind_error(m);
  m.def("spin_bound", &set_spin_bound, pybind11::arg("nanoseconds"),
        "Stop launches from here on whose blocks wait longer than so for each other; 0: never.");
  bind_linear(m);
  bind_lstm(m);
#if defined(FUSED_DNI_EMULATED)
  m.attr("emulated") = true;
  m.def(
      "emulate",
      [](std::uint64_t seed, int resident, bool clusters, bool cluster_launches, bool deferred,
         bool lost_arrival) {
        fused_dni::emulation::Settings& settings = fused_dni::emulation::settings();
        settings.seed = seed;
        settings.resident = resident;
        settings.clusters = clusters;
        settings.cluster_launches = cluster_launches;
        settings.deferred = deferred;
        settings.lost_arrival = lost_arrival;
        fused_dni::emulation::machine.attempts = 0;
        fused_dni::emulation::machine.refused.clear();
      },
      pybind11::kw_only(), pybind11::arg("seed") = 0, pybind11::arg("resident") = 3,
      pybind11::arg("clusters") = true, pybind11::arg("cluster_launches") = true,
      pybind11::arg("deferred") = false, pybind11::arg("lost_arrival") = false,
      "Set the order in which threads run (0: a fixed one), how many blocks do at once, whether "
      "there are clusters and they can be launched, whether launches wait for `synchronize`, and "
      "whether each grid's last block comes to its barriers unseen.");
  m.def(
      "synchronize",
      [] {
        Status status;
        fused_dni::emulation::synchronize(status);
        check(status, "synchronize");
      },
      "Run deferred launches: those of different streams side by side.");
  m.def(
      "attempts", [] { return fused_dni::emulation::machine.attempts.load(); },
      "How many launches were asked for, taken or not, since `emulate`.");
  m.def(
      "additions", [] { return fused_dni::emulation::machine.additions.load(); },
      "The last launch's atomic additions to memory: one a block for each barrier of the grid.");
#else
  m.attr("emulated") = false;
  m.def("limit", &limit_residents, pybind11::kw_only(), pybind11::arg("blocks") = 0,
        pybind11::arg("clusters") = true,
        "Let later launches have no more blocks than so (0: all that fit), and clusters or not: "
        "results are the same on any grid, and tests see to it.");
  m.attr("architectures") = FUSED_DNI_ARCHITECTURES;
  m.attr("toolkit") = version(CUDART_VERSION);
  m.def(
      "driver",
      [] {
        int number = 0;
        cudaDriverGetVersion(&number);
        return version(number);
      },
      "The newest CUDA that the driver is for; 0.0 without one.");
  m.def(
      "use_device",
      [](int device) {
        Status status;
        use_device(device, status);
        check(status, "device " + std::to_string(device));
      },
      pybind11::arg("device"), "Launch on this device from here on, in this thread.");
#endif
}
