// Kernels on which the instrument itself is tested, most with a defect planted in them:
// `planted CASE [SEED]` prints the launch's status, then what the kernel wrote, a number a line.
// tests/test_host_emulation.py says what is expected.
#define FUSED_DNI_EMULATED
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "../cuda/device.cuh"

namespace fused_dni::cuda {

namespace {

constexpr int kBlocks = 2;
constexpr int kThreads = 64;
constexpr int kOut = 512;

struct Arguments {
  float* out;     // kOut
  int* counters;  // 64, zero
  int plant;      // whether, or which, defect
};

void wait_for_blocks(int* counter) {
  block_barrier();
  if (thread() == 0) {
    atomic_add_acquire_release(counter, 1);
    while (load_acquire(counter) < blocks()) pause();
  }
  block_barrier();
}

int place() { return block() * threads() + thread(); }

// ---- Right, unless a barrier is left out ----------------------------------------------------------

FUSED_DNI_KERNEL(kThreads) turn_block(FUSED_DNI_ARGUMENT Arguments a) {
  SharedArena arena;
  const Shared<float> values = arena.take<float>(kThreads);
  values.store(thread(), 0);
  block_barrier();
  for (int round = 1; round <= 3; ++round) {
    values.store(thread(), values.load(thread()) + static_cast<float>(round * thread()));
    if (!a.plant) block_barrier();
    const float other = values.load((thread() + 37) % kThreads);
    block_barrier();
    values.store(thread(), other);
  }
  a.out[place()] = values.load(thread());
}

FUSED_DNI_KERNEL(kThreads) turn_warp(FUSED_DNI_ARGUMENT Arguments a) {
  SharedArena arena;
  const Shared<float> values = arena.take<float>(kThreads);
  values.store(thread(), 0);
  warp_barrier();
  values.store(thread(), static_cast<float>(thread()));
  if (!a.plant) warp_barrier();
  a.out[place()] = values.load(warp() * 32 + (lane() + 5) % 32);
}

// Rounds in which every thread reads what another block's wrote in the one before; `meet(round)`
// waits for all.
template <class F>
void turns(const Arguments& a, F&& meet) {
  for (int round = 1; round <= 4; ++round) {
    float* to = a.out + round % 2 * kBlocks * kThreads;
    const float* from = a.out + (round + 1) % 2 * kBlocks * kThreads;
    to[place()] = from[kBlocks * kThreads - 1 - place()] + static_cast<float>(round * place());
    if (a.plant)
      block_barrier();
    else
      meet(round);
  }
}

FUSED_DNI_KERNEL(kThreads) turn_grid(FUSED_DNI_ARGUMENT Arguments a) {
  turns(a, [&](int round) { wait_for_blocks(a.counters + round); });
}

FUSED_DNI_KERNEL(kThreads) turn_cluster(FUSED_DNI_ARGUMENT Arguments a) {
  turns(a, [](int) { cluster_barrier(); });
}

// ---- Exchanges ------------------------------------------------------------------------------------

FUSED_DNI_KERNEL(kThreads) exchanges(FUSED_DNI_ARGUMENT Arguments a) {
  float sum = static_cast<float>(place());
  for (int apart = 16; apart > 0; apart /= 2) sum += shuffle_xor(sum, apart);
  const double from = shuffle(static_cast<double>(place()), 3);
  const bool some = block_any(place() == kThreads + 40);
  const bool none = block_any(false);
  a.out[place()] = sum + static_cast<float>(from) / 1024 + (some ? 0.5f : 0) + (none ? 0.25f : 0);
}

// ---- Tensor cores ---------------------------------------------------------------------------------

// Elements of a [16, 16] (b: rows 16 to 23), exact in every format.
float element(int row, int k) {
  return static_cast<float>((row * 29 + k * k * 7 + row * k * 3) % 31 - 15) / 8;
}
std::uint32_t low_word(bf16 low, bf16 high) { return low.bits | std::uint32_t{high.bits} << 16; }
std::uint32_t low_word(fp16 low, fp16 high) { return low.bits | std::uint32_t{high.bits} << 16; }
template <class T>
std::uint32_t pair(int row, int k) {
  return low_word(from_float<T>(element(row, k)), from_float<T>(element(row, k + 1)));
}

FUSED_DNI_KERNEL(32) product(FUSED_DNI_ARGUMENT Arguments a) {
  const int g = lane() / 4, t = lane() % 4;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(g + i / 2 * 8) - 2 * t - i % 2;
  const auto fill = [&](auto pair) {
    const std::uint32_t left[4] = {pair(g, 2 * t), pair(g + 8, 2 * t), pair(g, 2 * t + 8),
                                   pair(g + 8, 2 * t + 8)};
    const std::uint32_t right[2] = {pair(16 + g, 2 * t), pair(16 + g, 2 * t + 8)};
    (a.plant == 0 ? mma_bf16 : mma_fp16)(d, left, right);
  };
  if (a.plant == 0) fill(pair<bf16>);
  if (a.plant == 1) fill(pair<fp16>);
  if (a.plant == 2) {
    for (int k = 0; k < 16; k += 8) {
      const auto bits = [&](int row, int column) { return bits_of(element(row, k + column)); };
      const std::uint32_t left[4] = {bits(g, t), bits(g + 8, t), bits(g, t + 4),
                                     bits(g + 8, t + 4)};
      const std::uint32_t right[2] = {bits(16 + g, t), bits(16 + g, t + 4)};
      mma_tf32(d, left, right);
    }
  }
  for (int i = 0; i < 4; ++i) a.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// out[matrix, lane, 2]: what each lane got of matrices whose elements are their places.
FUSED_DNI_KERNEL(32) matrices(FUSED_DNI_ARGUMENT Arguments a) {
  SharedArena arena;
  const Shared<bf16> staged = arena.take<bf16>(4 * 8 * 16);  // rows of 16, the first 8 used
  for (int i = lane(); i < 4 * 8 * 16; i += 32) staged.store(i, {static_cast<std::uint16_t>(i)});
  warp_barrier();
  std::uint32_t r[4];
  if (a.plant) {
    load_matrices_transposed(r, staged, lane() * 16);
  } else {
    load_matrices(r, staged, lane() * 16);
  }
  for (int m = 0; m < 4; ++m) {
    a.out[(m * 32 + lane()) * 2] = static_cast<float>(r[m] & 0xffffu);
    a.out[(m * 32 + lane()) * 2 + 1] = static_cast<float>(r[m] >> 16);
  }
}

// ---- Not reached by all ---------------------------------------------------------------------------

FUSED_DNI_KERNEL(kThreads) divergent(FUSED_DNI_ARGUMENT Arguments a) {
  const bool last = place() == kBlocks * kThreads - 1;
  if (a.plant == 0 && last) return;
  if (a.plant == 1 && last) wait_for_blocks(a.counters);  // where others wait once
  if (a.plant == 2 && last) warp_barrier();
  if (a.plant == 3 && last) shuffle(1, 0);
  if (a.plant == 3) warp_barrier();
  if (a.plant == 4 && last) block_any(true);
  if (a.plant == 5 && last)
    while (load_acquire(a.counters) == 0) pause();
  if (a.plant == 6 && !last) cluster_barrier();
  block_barrier();
  a.out[place()] = 1;
}

// ---- Memory ---------------------------------------------------------------------------------------

FUSED_DNI_KERNEL(kThreads) memory(FUSED_DNI_ARGUMENT Arguments a) {
  SharedArena arena;
  const Shared<float> values = arena.take<float>(kThreads);
  const Shared<bf16> more = arena.take<bf16>(32);
  values.store(thread(), 1);
  block_barrier();
  if (place() == kThreads + 9) {
    switch (a.plant) {
      case 0: values.store(kThreads, 1); break;
      case 1: a.out[0] = values.load(-1); break;
      case 2: a.out[0] = values.load_words(kThreads - 3).word[0]; break;
      case 3: a.out[0] = to_float(more.load(31)); break;
      case 4: a.out[0] = values.load_words(2).word[0]; break;
      case 5: store_words(a.out + 1, {}); break;
      case 6: arena.take<float>(1024); break;
      case 7: a.out[0] = a.out[kOut + a.counters[0]]; break;
      case 8: a.out[kOut + a.counters[0]] = 1; break;
      case 9: a.out[0] = static_cast<float>(1 << (32 + a.counters[0])); break;
      case 10: a.out[0] = Shared<float>().load(0); break;
    }
  }
  block_barrier();
}

// ---- Numbers --------------------------------------------------------------------------------------

// As bits: a float, the same in bf16, fp16 and tf32, and the first two back as floats.
void convert() {
  std::uint32_t bits = 1;
  for (int i = 0; i < 20000; ++i) {
    bits = bits * 1664525u + 1013904223u;
    std::uint32_t some = bits;
    if (i % 4 == 1) some = (bits & 0x80ffffffu) | 0x38000000u;  // fp16's middle
    if (i % 4 == 2) some = (bits & 0x83ffffffu) | 0x30000000u;  // its subnormals
    if (i % 8 == 3) some &= 0xfffff000u;                        // ties
    if (i < 8) some = std::uint32_t{i % 2 == 0} << 31 | (i < 4 ? 0x7f800000u + i / 2 : 0);
    const float value = float_of(some);
    const bf16 b = from_float<bf16>(value);
    const fp16 h = from_float<fp16>(value);
    std::printf("%u %u %u %u %u %u\n", some, unsigned{b.bits}, unsigned{h.bits},
                bits_of(round_tf32(value)), bits_of(to_float(b)), bits_of(to_float(h)));
  }
}

struct Case {
  const char* name;
  void (*kernel)(Arguments);
  int plant = 0;
  int blocks = kBlocks, threads = kThreads, shared = 1024, cluster = 1;
};
const Case kCases[] = {
    {"turn_block", turn_block},
    {"turn_block_planted", turn_block, 1},
    {"turn_warp", turn_warp},
    {"turn_warp_planted", turn_warp, 1},
    {"turn_grid", turn_grid},
    {"turn_grid_planted", turn_grid, 1},
    {"turn_cluster", turn_cluster, 0, kBlocks, kThreads, 1024, kBlocks},
    {"turn_cluster_planted", turn_cluster, 1, kBlocks, kThreads, 1024, kBlocks},
    {"part_of_a_cluster", divergent, 6, kBlocks, kThreads, 1024, kBlocks},
    {"exchanges", exchanges},
    {"product_bf16", product, 0, 1, 32},
    {"product_fp16", product, 1, 1, 32},
    {"product_tf32", product, 2, 1, 32},
    {"matrices", matrices, 0, 1, 32},
    {"matrices_transposed", matrices, 1, 1, 32},
    {"returned", divergent, 0},
    {"one_barrier_more", divergent, 1},
    {"warp_barrier_alone", divergent, 2},
    {"two_collectives", divergent, 3},
    {"two_votes", divergent, 4},
    {"spins", divergent, 5},
    {"store_out", memory, 0},
    {"load_before", memory, 1},
    {"words_out", memory, 2},
    {"never_written", memory, 3},
    {"misaligned_shared", memory, 4},
    {"misaligned_global", memory, 5},
    {"takes_too_much", memory, 6},
    {"global_read_out", memory, 7},
    {"global_write_out", memory, 8},
    {"undefined_shift", memory, 9},
    {"no_array", memory, 10},
    {"too_many_blocks", exchanges, 0, 4},
    {"part_of_a_warp", exchanges, 0, 2, 48},
    {"too_many_threads", exchanges, 0, 2, 1056},
    {"no_blocks", exchanges, 0, 0},
    {"too_much_shared", exchanges, 0, 2, 64, 232449},
    {"odd_cluster", exchanges, 0, 3, 64, 1024, 2},
};

}  // namespace

}  // namespace fused_dni::cuda

int main(int count, char** words) {
  using namespace fused_dni::cuda;
  const std::string name = count > 1 ? words[1] : "";
  if (name == "convert") return convert(), 0;
  fused_dni::emulation::settings().seed = count > 2 ? std::strtoull(words[2], nullptr, 10) : 0;
  for (const Case& one : kCases) {
    if (name != one.name) continue;
    // The second launch shows that the first, whatever became of it, left the machine whole.
    for (const Case& launched : {one, Case{"turn_block", turn_block}}) {
      const std::unique_ptr<float[]> out(new float[kOut]());
      const std::unique_ptr<int[]> counters(new int[64]());
      Status status;
      launch(launched.kernel, Arguments{out.get(), counters.get(), launched.plant}, launched.blocks,
             launched.threads, launched.shared, nullptr, status, launched.cluster);
      std::printf("%d %s: %s\n", status.code, status.name, status.text.c_str());
      for (int i = 0; i < kOut; ++i) std::printf("%.9g\n", out[i]);
    }
    return 0;
  }
  std::fprintf(stderr, "no case %s\n", name.c_str());
  return 2;
}
