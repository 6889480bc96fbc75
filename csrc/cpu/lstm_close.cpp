// A window's backward together with its two ends: the synthetic gradient that it starts from, and
// the synthesizer's lesson from the gradient that it arrives with. Nothing here multiplies: the
// kernels of the instruction set in use do, and this is the glue between them, so that Python is
// called once.
#include <cmath>
#include <cstring>
#include <memory>

#include "dispatch.hpp"
#include "region.hpp"

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
    const bool injects = boundary_.strength != 0.0;
    const bool teaches = boundary_.rows != nullptr || boundary_.statistics != nullptr;
    // One prediction serves both ends: the rows of the exit come first, then those of the lesson.
    const Index first = injects ? batch_ : 0;
    const Index most = teaches ? batch_ * (boundary_.entrance + (boundary_.ended != nullptr)) : 0;
    std::unique_ptr<T[]> own;
    if (boundary_.rows == nullptr) {
      const Index rank = boundary_.synthesizer.rank;
      own = memory((first + most) * (2 * features_ + rank) + most * features_);
      T* piece = own.get();
      boundary_.rows = piece;
      boundary_.scaled = piece += (first + most) * features_;
      boundary_.reduced = piece += (first + most) * features_;
      boundary_.grad = piece += (first + most) * rank;
    }
    T* rows = static_cast<T*>(boundary_.rows);
    T* scaled = static_cast<T*>(boundary_.scaled);
    for (Index b = 0; b < first; ++b) last().gather(depth_, b, rows, b);
    const Index count = teaches ? gather_lesson(rows + first * features_) : 0;
    if (first + count > 0) predict(first + count);
    std::unique_ptr<T[]> start;  // what the backward starts from: h, then c [L, B, H]
    if (injects) {
      start = memory(batch_ * features_);
      inject(scaled, start.get());
      window_.grad_last_h = start.get();
      window_.grad_last_c = start.get() + depth_ * batch_ * hidden_;
    }
    kernels().lstm_backward[type_](window_);
    if (count > 0) teach(first, count);
    return count;
  }

 private:
  static std::unique_ptr<T[]> memory(Index count) {
    return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
  }
  bool ended(Index row) const { return boundary_.ended != nullptr && boundary_.ended[row]; }

  State<T> last() const {
    return {static_cast<const T*>(boundary_.last_h), static_cast<const T*>(boundary_.last_c),
            batch_ * hidden_, hidden_};
  }
  State<T> entrance() const {
    return {static_cast<const T*>(window_.hidden), static_cast<const T*>(window_.cells),
            (window_.sizes.steps + 1) * batch_ * hidden_, hidden_};
  }

  // The rows that the synthesizer learns from; returns their number.
  Index gather_lesson(T* rows) const {
    Index count = 0;
    for (Index b = 0; boundary_.entrance && b < batch_; ++b)
      if (!entrance().starts(depth_, b)) entrance().gather(depth_, b, rows, count++);
    for (Index b = 0; b < batch_; ++b)
      if (ended(b)) last().gather(depth_, b, rows, count++);
    return count;
  }

  void predict(Index rows) const {
    SynthesizerPredict a{};
    a.synthesizer = boundary_.synthesizer;
    a.rows = rows;
    a.features = features_;
    a.threads = window_.sizes.threads;
    a.h = boundary_.rows;
    a.scaled = boundary_.scaled;
    a.reduced = boundary_.reduced;
    Ops ops;
    ops.add(kernels().synthesizer_predict[type_](a));
    ops.run();
  }

  // Adds the synthetic gradient at the final state to what arrived there.
  void inject(T* scaled, T* start) const {
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

  // The gradients that arrived, for the `count` rows behind the first `skip`, and what they teach.
  void teach(Index skip, Index count) const {
    T* grad = static_cast<T*>(boundary_.grad);
    const State<T> arrived{static_cast<const T*>(window_.grad_h),
                           static_cast<const T*>(window_.grad_c), batch_ * hidden_, hidden_};
    Index filled = 0;
    for (Index b = 0; boundary_.entrance && b < batch_; ++b) {
      if (entrance().starts(depth_, b)) continue;
      arrived.gather(depth_, b, grad, filled);
      clip(grad + filled * features_);
      ++filled;
    }
    for (Index i = filled * features_; i < count * features_; ++i) grad[i] = T(0);
    if (boundary_.statistics == nullptr) return;
    SynthesizerTrain a{};
    a.synthesizer = boundary_.synthesizer;
    a.rows = count;
    a.features = features_;
    a.threads = window_.sizes.threads;
    a.target_scale = boundary_.target_scale;
    a.h = static_cast<const T*>(boundary_.rows) + skip * features_;
    a.scaled = static_cast<const T*>(boundary_.scaled) + skip * features_;
    if (boundary_.reduced != nullptr)
      a.reduced = static_cast<const T*>(boundary_.reduced) + skip * boundary_.synthesizer.rank;
    a.grad_h = grad;
    a.statistics = boundary_.statistics;
    a.update = false;
    for (int i = 0; i < kSlots; ++i) a.gradients[i] = boundary_.gradients[i];
    Ops ops;
    ops.add(kernels().synthesizer_train[type_](a));
    ops.run();
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
