// Python bindings of the LSTM's ops. Argument tuples have the order in which they are read here.
#include "binding.hpp"
#include "lstm.hpp"

namespace fused_dni::cuda {
namespace {

constexpr std::int64_t kMostSize = std::int64_t{1} << 24;  // of a dimension
constexpr std::int64_t kMostRows = std::int64_t{1} << 30;  // of steps and batch together

// What the tensors of one call have in common.
struct Reading {
  Reader read;
  LSTMSizes sizes{};
  Type type = kFloat32;  // x's
  bool exact = false;

  explicit Reading(const py::tuple& items) : read(items) {}

  void window() {
    sizes.steps = size("steps");
    sizes.batch = size("batch");
    if (std::int64_t{sizes.steps} * sizes.batch > kMostRows)
      throw py::value_error("steps and batch: got " + std::to_string(sizes.steps) + " and " +
                            std::to_string(sizes.batch) + ", takes a product of up to " +
                            std::to_string(kMostRows));
    sizes.in = size("inputs");
    sizes.size = size("hidden units");
    sizes.layers = static_cast<int>(read.integer("layers", 1, kMostLayers));
    exact = read.flag();
  }
  int size(const char* name) { return static_cast<int>(read.integer(name, 1, kMostSize)); }
  // The tensor whose type is x's.
  const void* first(const char* name, Sizes dimensions) {
    const Tensor x = read.tensor(name, {kFloat32, kBfloat16, kFloat16}, dimensions);
    type = x.type;
    return x.data;
  }
  // Of x's type.
  void* tensor(const char* name, Sizes dimensions, Need need = kRequired) {
    return read.tensor(name, {type}, dimensions, need).data;
  }
  // A gradient has no room in float16.
  void* wide(const char* name, Sizes dimensions, Need need = kRequired) {
    const Type of = type == kFloat16 ? kFloat32 : type;
    return read.tensor(name, {of}, dimensions, need).data;
  }

  // [T, B, H], [L, B, H].
  void* steps(const char* name, Need need = kRequired) {
    return tensor(name, {sizes.steps, sizes.batch, sizes.size}, need);
  }
  void* state(const char* name, Need need = kRequired) {
    return tensor(name, {sizes.layers, sizes.batch, sizes.size}, need);
  }
  const std::int64_t* lengths() {
    return read.vector<std::int64_t>("lengths", sizes.batch, kOptional);
  }
  int in_of(int k) const { return k == 0 ? sizes.in : sizes.size; }
  float* weight(Reader& of, const char* name, int columns, Need need = kRequired) {
    return of.contiguous<float>(name, {4 * std::int64_t{sizes.size}, columns}, need);
  }
  float* bias(Reader& of, const char* name, Need need = kOptional) {
    return of.vector<float>(name, 4 * std::int64_t{sizes.size}, need);
  }
  // A tuple of one tuple a layer.
  template <class F>
  void each_layer(F&& f) {
    const py::tuple items = read.tuple();
    Reader layers(items);
    for (int k = 0; k < sizes.layers; ++k) {
      const py::tuple item = layers.tuple();
      Reader layer(item);
      f(k, layer);
      layer.finish();
    }
    layers.finish();
  }
  void weights(LSTMWeights* to) {
    each_layer([&](int k, Reader& of) {
      to[k].ih = weight(of, "weight_ih", in_of(k));
      to[k].hh = weight(of, "weight_hh", sizes.size);
      to[k].bias_ih = bias(of, "bias_ih");
      to[k].bias_hh = bias(of, "bias_hh");
    });
  }
  // A mask behind each layer but the last, or none at all.
  bool dropout(const void** to) {
    const py::tuple items = read.tuple();
    Reading masks(items);
    masks.sizes = sizes;
    masks.type = type;
    for (int k = 0; !items.empty() && k + 1 < sizes.layers; ++k) to[k] = masks.steps("dropout");
    masks.read.finish();
    return !items.empty();
  }
  float* carry() { return read.contiguous<float>("carry", {sizes.batch, sizes.size}); }
  void* stream() { return read.pointer(); }
};

std::string name(const char* op, const LSTMSizes& s) {
  return describe(op, {{"x", {s.steps, s.batch, s.in}}, {"h", {s.layers, s.batch, s.size}}});
}

void forward(const py::tuple& items) {
  Reading in(items);
  in.window();
  LSTMForward a{};
  const LSTMSizes& s = a.sizes = in.sizes;
  a.exact = in.exact;
  a.save = in.read.flag();
  a.projected = in.read.flag();
  a.x = in.first("x", {s.steps, s.batch, s.in});
  a.type = in.type;
  a.h = in.state("h");
  a.c = in.state("c");
  in.weights(a.layer);
  a.lengths = in.lengths();
  const bool dropout = in.dropout(a.dropout);
  const std::int64_t kept = a.save ? s.layers : 1;
  a.hidden = in.tensor("hidden", {kept, s.steps + 1, s.batch, s.size});
  a.cells = in.tensor("cells", {s.layers, s.steps + 1, s.batch, s.size}, kOptional);
  a.gates = in.tensor("gates", {kept, s.steps, s.batch, 4 * std::int64_t{s.size}});
  a.last_h = in.state("last_h");
  a.last_c = in.state("last_c");
  a.below = in.steps("below", dropout ? kRequired : kAbsent);
  a.carry = in.carry();
  const std::string what = name("lstm_forward", s);
  a.barrier = in.read.barrier(what);
  a.stream = in.stream();
  in.read.finish();
  run(lstm_forward, a, what);
}

void backward(const py::tuple& items) {
  Reading in(items);
  in.window();
  LSTMBackward a{};
  const LSTMSizes& s = a.sizes = in.sizes;
  a.exact = in.exact;
  a.need_dx = in.read.flag();
  a.need_weights = in.read.flag();
  a.x = in.first("x", {s.steps, s.batch, s.in});
  a.type = in.type;
  in.weights(a.layer);
  a.lengths = in.lengths();
  in.dropout(a.dropout);
  a.grad_output = in.steps("grad_output", kOptional);
  a.grad_h = in.state("grad_h", kOptional);
  a.grad_c = in.state("grad_c", kOptional);
  // A window's hidden and cells; or, of one step, h and c before and c behind it.
  const std::int64_t rows = in.read.integer("steps kept", s.steps, s.steps + 1);
  if (rows == s.steps && (s.steps > 1 || s.layers > 1))
    throw py::value_error("steps kept: takes one more than steps, but of a single step");
  a.apart = rows;
  const Sizes kept = {s.layers, rows, s.batch, s.size};
  a.hidden = in.tensor("hidden", kept);
  a.before = in.tensor("cells", kept);
  a.after = rows == s.steps ? in.tensor("cells behind", kept) : nullptr;
  const std::int64_t state =
      std::int64_t{s.batch} * s.size * kTypes[static_cast<int>(in.type)].size;
  if (!a.after) a.after = static_cast<const char*>(a.before) + state;
  a.gates = in.tensor("gates", {s.layers, s.steps, s.batch, 4 * std::int64_t{s.size}});

  LSTMEnds& ends = a.ends;
  ends.kind = static_cast<int>(in.read.integer("synthesizer's kind", -1, 2));
  const std::int64_t features = 2 * std::int64_t{s.layers} * s.size;
  const Need need = ends.kind < 0 ? kAbsent : kRequired, low = ends.kind == 1 ? kRequired : kAbsent;
  ends.rank = static_cast<int>(in.read.integer("rank", low == kRequired ? 1 : 0, kMostSize));
  ends.h = in.state("final h", need);
  ends.c = in.state("final c", need);
  if (ends.kind == 2)
    ends.weight = in.read.vector<float>("synthesizer's weight", features);
  else
    ends.weight = in.read.contiguous<float>(
        "synthesizer's weight", {features, ends.kind == 1 ? ends.rank : features}, need);
  ends.down = in.read.contiguous<float>("synthesizer's down", {ends.rank, features}, low);
  const Need optional = ends.kind < 0 ? kAbsent : kOptional;
  ends.bias = in.read.vector<float>("synthesizer's bias", features, optional);
  ends.ended = in.read.vector<bool>("ended", s.batch, optional);
  ends.factor = static_cast<float>(in.read.real());
  ends.reduced = in.wide("reduced", {s.batch, ends.rank}, low);
  const Need products = ends.kind == 0 || ends.kind == 1 ? kRequired : kAbsent;
  ends.predicted = in.read.contiguous<float>("predicted", {s.batch, features}, products);

  a.delta = in.wide("delta", {s.layers, s.steps, s.batch, 4 * std::int64_t{s.size}});
  a.d_h = in.state("d_h");
  a.d_c = in.state("d_c");
  a.dx = in.tensor("dx", {s.steps, s.batch, s.in}, a.need_dx ? kRequired : kAbsent);
  a.above = in.wide("above", {s.steps, s.batch, s.size}, s.layers > 1 ? kRequired : kAbsent);
  in.each_layer([&](int k, Reader& of) {
    if (!a.need_weights) return;
    a.gradient[k].ih = in.weight(of, "gradient of weight_ih", in.in_of(k));
    a.gradient[k].hh = in.weight(of, "gradient of weight_hh", s.size);
    a.gradient[k].bias = in.bias(of, "gradient of the biases");
    const bool staged = k == 0 ? a.lengths != nullptr : a.dropout[k - 1] != nullptr;
    a.staged[k] = of.tensor("staged", {in.type}, {s.steps, s.batch, in.in_of(k)},
                            staged ? kRequired : kAbsent)
                      .data;
  });
  a.carry = in.carry();
  const std::string what = name("lstm_backward", s);
  a.barrier = in.read.barrier(what);
  a.stream = in.stream();
  in.read.finish();
  run(lstm_backward, a, what);
}

void update(const py::tuple& items) {
  Reading in(items);
  LSTMUpdate a{};
  a.layers = in.sizes.layers = static_cast<int>(in.read.integer("layers", 1, kMostLayers));
  a.size = in.sizes.size = in.size("hidden units");
  a.exact = in.read.flag();
  a.kind = static_cast<int>(in.read.integer("rule", 0, 2));
  a.nesterov = in.read.flag();
  a.hyper = in.read.vector<double>("hyper", 7);
  const char* const names[4] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
  in.each_layer([&](int k, Reader& of) {
    LSTMUpdateLayer& layer = a.layer[k];
    layer.count = static_cast<int>(of.integer("rows", 0, kMostRows));
    layer.in = static_cast<int>(of.integer("inputs", 1, kMostSize));
    if (k == 0) {
      const Tensor input =
          of.tensor("input", {kFloat32, kBfloat16, kFloat16}, {layer.count, layer.in});
      a.type = input.type;
      layer.input = input.data;
    } else {
      layer.input = of.tensor("input", {a.type}, {layer.count, layer.in}).data;
    }
    layer.hidden = of.tensor("hidden", {a.type}, {layer.count, a.size}).data;
    layer.delta = of.tensor("delta", {a.type}, {layer.count, 4 * std::int64_t{a.size}}).data;
    for (int n = 0; n < 4; ++n) {
      const auto read = [&](const std::string& what, Need need) {
        if (n > 1) return in.bias(of, what.c_str(), need);
        return in.weight(of, what.c_str(), n == 0 ? layer.in : a.size, need);
      };
      Slot& slot = layer.slot[n];
      slot.parameter = read(names[n], kOptional);
      const bool adam = a.kind > 0;
      const Need first = !slot.parameter ? kAbsent : adam ? kRequired : kOptional;
      slot.first = read(std::string(names[n]) + "'s first moment", first);
      const Need second = slot.parameter && adam ? kRequired : kAbsent;
      slot.second = read(std::string(names[n]) + "'s second moment", second);
    }
  });
  a.workspace =
      in.read.contiguous<float>("workspace", {3 * std::int64_t{a.layers} + 1, kMostBlocks});
  const std::string what = describe("lstm_update", {{"input", {a.layer[0].count, a.layer[0].in}},
                                                    {"hidden", {a.layer[0].count, a.size}}});
  a.barrier = in.read.barrier(what);
  a.stream = in.stream();
  in.read.finish();
  run(lstm_update, a, what);
}

// (blocks, 0 for all that are resident, count, blocks of a cluster or 1, barrier, stream)
void barriers(const py::tuple& items) {
  Reader read(items);
  GridBarriers a{};
  a.blocks = static_cast<int>(read.integer("blocks", 0, kMostSize));
  a.count = static_cast<int>(read.integer("count", 0, kMostRows));
  a.cluster = static_cast<int>(read.integer("cluster", 1, 16));
  const std::string what = describe("grid_barriers", {{"count", {a.count}}});
  a.barrier = read.barrier(what);
  a.stream = read.pointer();
  read.finish();
  run(grid_barriers, a, what);
}

}  // namespace

void bind_lstm(py::module_& m) {
  m.attr("lstm_most_layers") = kMostLayers;
  m.attr("lstm_most_blocks") = kMostBlocks;
  m.def("lstm_forward", forward);
  m.def("lstm_backward", backward);
  m.def("lstm_update", update);
  m.def("grid_barriers", barriers,
        "A cooperative launch that waits `count` times for its blocks, or for those of a cluster.");
}

}  // namespace fused_dni::cuda
