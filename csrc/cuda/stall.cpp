// Launches have names here, so that one that waits in vain can say on the device who it is.
#include <iterator>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "barrier.hpp"

namespace fused_dni::cuda {
namespace {

const char* const kPhases[] = {"normalize", "reduce", "gradient", "delta",  "dx",    "weight",
                               "predict",   "back",   "apply",    "inputs", "steps", "step",
                               "layer",     "ends",   "update",   "round"};
static_assert(std::size(kPhases) == static_cast<std::size_t>(Phase::kRound) + 1);

std::uint64_t bound = 0;
std::uint64_t* memory = nullptr;

// Of every kernel and shape that was launched; those of a graph are launched again without asking.
struct Names {
  std::mutex mutex;
  std::unordered_map<std::string, int> index;
  std::vector<std::string> list;
};
Names& names() {
  static Names names;
  return names;
}

}  // namespace

Barrier barrier_of(int* word, const std::string& what) {
  Barrier barrier;
  barrier.word = word;
  barrier.bound = bound;
  if (bound == 0) return barrier;
  barrier.stalled = memory = stall_memory();
  Names& all = names();
  const std::lock_guard guard(all.mutex);
  const auto [found, added] = all.index.try_emplace(what, static_cast<int>(all.list.size()));
  if (added) all.list.push_back(what);
  barrier.launch = found->second;
  return barrier;
}

std::string stalled_text() {
  const std::uint64_t record =
      memory != nullptr ? *static_cast<volatile std::uint64_t*>(memory) : 0;
  if (record == 0) return "";
  Names& all = names();
  const std::lock_guard guard(all.mutex);
  return all.list[record & 0xffffffffu] + " was stopped: block " +
         std::to_string(record >> 32 & 0xffff) + " waited in front of its phase '" +
         kPhases[record >> 48 & 0x7fff] + "' longer than FUSED_DNI_SPIN_BOUND (" +
         std::to_string(bound) +
         " ns) for other blocks. The CUDA context is lost: this process has to be started again";
}

void set_spin_bound(std::uint64_t nanoseconds) { bound = nanoseconds; }

}  // namespace fused_dni::cuda
