// A window's backward together with its two ends: the synthetic gradient that it starts from, and
// the synthesizer's lesson from the gradient that it arrives with. Nothing here multiplies: the
// kernels of the instruction set in use do, and this is the glue between them, so that Python is
// called once.
#include <cmath>
#include <cstring>
#include <memory>

#include "dispatch.hpp"

namespace fused_dni {
namespace {

using Index = std::int64_t;

// A state h, c [L, B, H] as rows [B, 2 L H]: h_0, c_0, h_1, c_1, ... Calls body(row of the state,
// place in the row of rows) for each of its 2 L pieces of H elements.
template <class Body>
void for_pieces(Index depth, Index hidden, Index row, Body&& body) {
  const Index features = 2 * depth * hidden;
  for (Index l = 0; l < depth; ++l)
    for (int part = 0; part < 2; ++part) body(l, part, row * features + (2 * l + part) * hidden);
}

template <class T>
struct State {
  const T *h, *c;  // [L, B, H], a layer `layer` elements behind the last
  Index layer, hidden;

  const T* piece(Index l, int part, Index row) const {
    return (part == 0 ? h : c) + l * layer + row * hidden;
  }
  void gather(Index depth, Index row, T* rows, Index to) const {
    for_pieces(depth, hidden, to, [&](Index l, int part, Index at) {
      std::memcpy(rows + at, piece(l, part, row), sizeof(T) * static_cast<std::size_t>(hidden));
    });
  }
  // A row that is exactly zero starts a sequence.
  bool starts(Index depth, Index row) const {
    for (Index l = 0; l < depth; ++l)
      for (int part = 0; part < 2; ++part) {
        const T* values = piece(l, part, row);
        for (Index i = 0; i < hidden; ++i)
          if (values[i] != T(0)) return false;
      }
    return true;
  }
};

template <class T>
class Closing {
 public:
  Closing(const LSTMBackward& window, const LSTMBoundary& boundary, std::size_t type)
      : window_(window),
        boundary_(boundary),
        type_(type),
        depth_(window.depth),
        batch_(window.sizes.batch),
        hidden_(window.sizes.hidden),
        features_(2 * depth_ * hidden_) {}

  Index run() {
    std::unique_ptr<T[]> start;  // what the backward starts from: h, then c [L, B, H]
    if (boundary_.strength != 0.0) {
      start = memory(batch_ * features_);
      inject(start.get());
      window_.grad_last_h = start.get();
      window_.grad_last_c = start.get() + depth_ * batch_ * hidden_;
    }
    kernels().lstm_backward[type_](window_);
    if (boundary_.rows != nullptr) return lesson();
    if (boundary_.statistics == nullptr) return 0;
    const Index most = batch_ * (boundary_.entrance + (boundary_.ended != nullptr));
    const std::unique_ptr<T[]> own = memory(3 * most * features_);
    const std::unique_ptr<T[]> reduced = memory(most * boundary_.synthesizer.rank);
    boundary_.rows = own.get();
    boundary_.grad = own.get() + most * features_;
    boundary_.scaled = own.get() + 2 * most * features_;
    boundary_.reduced = reduced.get();
    return lesson();
  }

 private:
  static std::unique_ptr<T[]> memory(Index count) {
    return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
  }
  bool ended(Index row) const { return boundary_.ended != nullptr && boundary_.ended[row]; }

  void predict(Index rows, const T* h, T* scaled, void* reduced) const {
    SynthesizerPredict a;
    a.synthesizer = boundary_.synthesizer;
    a.rows = rows;
    a.features = features_;
    a.threads = window_.sizes.threads;
    a.h = h;
    a.scaled = scaled;
    a.reduced = reduced;
    kernels().synthesizer_predict[type_](a);
  }

  // Adds the synthetic gradient at the final state to what arrived there.
  void inject(T* start) const {
    const State<T> last{static_cast<const T*>(boundary_.last_h),
                        static_cast<const T*>(boundary_.last_c), batch_ * hidden_, hidden_};
    const std::unique_ptr<T[]> rows = memory(2 * batch_ * features_);
    T* scaled = rows.get() + batch_ * features_;
    for (Index b = 0; b < batch_; ++b) last.gather(depth_, b, rows.get(), b);
    const std::unique_ptr<T[]> reduced = memory(batch_ * boundary_.synthesizer.rank);
    predict(batch_, rows.get(), scaled, reduced.get());
    const T kappa = T(boundary_.target_scale);
    double squares = 0.0;
    for (Index b = 0; b < batch_; ++b)
      for (Index i = b * features_; i < (b + 1) * features_; ++i) {
        scaled[i] = ended(b) ? T(0) : scaled[i] / kappa;
        squares += static_cast<double>(scaled[i]) * static_cast<double>(scaled[i]);
      }
    // A norm that is not a number fails the comparison and is let through, to be found out later.
    const double norm = std::sqrt(squares), limit = boundary_.max_norm;
    const T clip = T(limit > 0.0 && norm > limit ? limit / norm : 1.0);
    const T strength = T(boundary_.strength);
    const T* arrived[2] = {static_cast<const T*>(window_.grad_last_h),
                           static_cast<const T*>(window_.grad_last_c)};
    for (Index b = 0; b < batch_; ++b)
      for_pieces(depth_, hidden_, b, [&](Index l, int part, Index at) {
        const Index offset = (l * batch_ + b) * hidden_;
        T* to = start + part * depth_ * batch_ * hidden_ + offset;
        const T* from = arrived[part];
        for (Index i = 0; i < hidden_; ++i) {
          const T synthetic = scaled[at + i] * clip * strength;
          to[i] = from == nullptr ? synthetic : from[offset + i] + synthetic;
        }
      });
  }

  // Scales a row of the target down to its largest norm. One that is not finite becomes NaN.
  void clip(T* row) const {
    if (boundary_.max_target_norm <= 0.0) return;
    double squares = 0.0;
    for (Index i = 0; i < features_; ++i)
      squares += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    const double scale = boundary_.max_target_norm / boundary_.target_scale / std::sqrt(squares);
    if (scale < 1.0)
      for (Index i = 0; i < features_; ++i) row[i] *= static_cast<T>(scale);
  }

  // Collects what the synthesizer learns from, predicts there and, if wanted, takes gradients.
  // Returns the number of rows.
  Index lesson() const {
    T* rows = static_cast<T*>(boundary_.rows);
    T* grad = static_cast<T*>(boundary_.grad);
    Index count = 0;
    if (boundary_.entrance) {
      const Index layer = (window_.sizes.steps + 1) * batch_ * hidden_;
      const State<T> first{static_cast<const T*>(window_.hidden),
                           static_cast<const T*>(window_.cells), layer, hidden_};
      const State<T> arrived{static_cast<const T*>(window_.grad_h),
                             static_cast<const T*>(window_.grad_c), batch_ * hidden_, hidden_};
      for (Index b = 0; b < batch_; ++b) {
        if (first.starts(depth_, b)) continue;
        first.gather(depth_, b, rows, count);
        arrived.gather(depth_, b, grad, count);
        clip(grad + count * features_);
        ++count;
      }
    }
    const State<T> last{static_cast<const T*>(boundary_.last_h),
                        static_cast<const T*>(boundary_.last_c), batch_ * hidden_, hidden_};
    for (Index b = 0; b < batch_; ++b) {
      if (!ended(b)) continue;
      last.gather(depth_, b, rows, count);
      for (Index i = count * features_; i < (count + 1) * features_; ++i) grad[i] = T(0);
      ++count;
    }
    if (count == 0) return 0;
    predict(count, rows, static_cast<T*>(boundary_.scaled), boundary_.reduced);
    if (boundary_.statistics != nullptr) {
      SynthesizerTrain a{};
      a.synthesizer = boundary_.synthesizer;
      a.rows = count;
      a.features = features_;
      a.threads = window_.sizes.threads;
      a.target_scale = boundary_.target_scale;
      a.h = rows;
      a.scaled = boundary_.scaled;
      a.reduced = boundary_.reduced;
      a.grad_h = grad;
      a.statistics = boundary_.statistics;
      a.update = false;
      for (int i = 0; i < kSlots; ++i) a.gradients[i] = boundary_.gradients[i];
      kernels().synthesizer_train[type_](a);
    }
    return count;
  }

  LSTMBackward window_;
  LSTMBoundary boundary_;
  std::size_t type_;
  Index depth_, batch_, hidden_, features_;
};

}  // namespace

std::int64_t lstm_close(std::size_t type, const LSTMBackward& window,
                        const LSTMBoundary& boundary) {
  if (type == 0) return Closing<float>(window, boundary, type).run();
  return Closing<double>(window, boundary, type).run();
}

}  // namespace fused_dni
