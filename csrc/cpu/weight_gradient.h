// out = aᵀ · b, the gradient of a weight: the sum runs over the rows of both operands, so its terms are not adjacent in
// memory. A library transposes one operand and repacks the other before it multiplies; here both are packed straight
// into tiles.
#pragma once
#include "cpu/products.h"

namespace phi_fast::cpu::PHI_ISA {

#if defined(PHI_AMX)
inline constexpr int64_t kHeight = 4 * kPanel;  // columns of a at a time
inline constexpr int64_t kWidth = 16 * kPanel;  // columns of b at a time: the sums fit the second-level cache

/// Computes the output for one thread's columns of a, up to kHeight of them, in its own tiles and sums.
class GradientWorker {
 public:
  static int64_t scratch(int64_t steps) { return kHeight / kTile * steps * kTile * kTile + kHeight * kWidth; }

  GradientWorker(const WeightGradient& a, const uint32_t* b_tiles, float* memory)
      : a_(a), steps_(panels_of(a.rows)), b_tiles_(b_tiles) {
    a_tiles_ = reinterpret_cast<uint32_t*>(memory);
    sums_ = memory + kHeight / kTile * steps_ * kTile * kTile;
  }

  void run(int64_t first) {
    const int64_t height = smaller(kHeight, a_.a_columns - first);
    for (int64_t i = 0; i < height; i += kPanel) {
      uint32_t* const to = a_tiles_ + i / kPanel * panel_words();
      pack_panel<Summed::kRows, Side::kLeft>(a_.a, a_.rows, a_.a_columns, first + i, to);
    }
    for (int64_t column = 0; column < a_.b_columns; column += kWidth) {
      const int64_t width = smaller(kWidth, a_.b_columns - column);
      for (int64_t step = 0; step < steps_; step += kDepth / kPanel) {
        for (int64_t i = 0; i < height; i += kPanel) products(i, column, width, step);
      }
      with_type(a_.out_dtype, [&](auto type) { write(type, first, height, column, width); });
    }
  }

 private:
  /// Tiles that are stored one after the other.
  static TilePair packed(const uint32_t* tiles) { return {tiles, kTile * kTile, 2 * kTile * kTile, 64}; }

  int64_t panel_words() const { return steps_ * 2 * kTile * kTile; }

  /// Adds the products of kDepth rows from `step` on to the sums for a panel of a and the columns of b.
  void products(int64_t i, int64_t column, int64_t width, int64_t step) {
    const int64_t count = smaller(kDepth / kPanel, steps_ - step), offset = step * 2 * kTile * kTile;
    const uint32_t* left = a_tiles_ + i / kPanel * panel_words() + offset;
    for (int64_t j = 0; j < width; j += kPanel) {
      const uint32_t* right = b_tiles_ + (column + j) / kPanel * panel_words() + offset;
      float* const sums = sums_ + i * kWidth + j * kPanel;
      multiply_square(count, packed(left), packed(right), sums, kPanel, step > 0);
    }
  }

  /// Writes the sums to the output. The sums for kPanel columns of a and of b are stored in one piece, (kPanel,
  /// kPanel).
  template <class T>
  void write(T, int64_t first, int64_t height, int64_t column, int64_t width) {
    for (int64_t i = 0; i < height; ++i) {
      const float* from = sums_ + i / kPanel * kPanel * kWidth + i % kPanel * kPanel;
      T* to = a_.out.row<T>(first + i) + column;
      for (int64_t j = 0; j < width; j += kPanel, from += kPanel * kPanel, to += kPanel) {
        for_lanes(smaller(kPanel, width - j), [=](int64_t c, auto lanes) {
          const Vec sum = load(from + c, lanes);
          store(to + c, a_.add ? load(to + c, lanes) + sum : sum, lanes);
        });
      }
    }
  }

  const WeightGradient& a_;
  int64_t steps_;
  const uint32_t* b_tiles_;
  uint32_t* a_tiles_;
  float* sums_;
};

inline void weight_gradient(const WeightGradient& a) {
  const int64_t steps = panels_of(a.rows), panel = steps * 2 * kTile * kTile;
  const int64_t panels = (a.b_columns + kPanel - 1) / kPanel, items = (a.a_columns + kHeight - 1) / kHeight;
  const int threads = threads_for(a.rows * (a.a_columns + a.b_columns), a.threads);
  const Scratch b_memory(panels * panel);
  uint32_t* const b_tiles = reinterpret_cast<uint32_t*>(b_memory.data());
  parallel_items(panels, threads, [&](int64_t item, int) {
    pack_panel<Summed::kRows, Side::kRight>(a.b, a.rows, a.b_columns, item * kPanel, b_tiles + item * panel);
  });
  const int64_t each = GradientWorker::scratch(steps);
  const Scratch memory(each * threads);
  parallel_items(items, threads, [&](int64_t item, int thread) {
    const Tiles tiles;
    GradientWorker(a, b_tiles, memory.data() + thread * each).run(item * kHeight);
  });
}
#endif

}  // namespace phi_fast::cpu::PHI_ISA
