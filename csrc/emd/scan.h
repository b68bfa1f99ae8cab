// The hot loops of the auction, compiled once per instruction set.
//
// auction.cpp includes this file three times with
//   EMD_NAMESPACE  the namespace that receives the functions (avx512, avx2, portable)
//   EMD_TARGET     the function attribute that switches the instruction set on
//   EMD_LEVEL      512, 256 or 0
// so there is no include guard. All three give the same bits: they do the same IEEE operations in
// the same order (no fused multiply-add), and minima do not depend on the lane width.
//
// Why pruning is exact and not "exact up to rounding": a box's squared distance is computed by the
// same operations as a point's, and each of them (subtract, square, add) is monotone under
// round-to-nearest, so box <= point holds for the rounded numbers as well; the limit for
// both is padded by more than the rounding of the test's own arithmetic.

namespace EMD_NAMESPACE {

#if EMD_LEVEL == 512
template <class T> struct Vec;
template <> struct Vec<float> {
  using V = __m512;
  static constexpr int width = 16;
  EMD_TARGET static inline V load(const float* a) { return _mm512_load_ps(a); }
  EMD_TARGET static inline void store(float* a, V v) { _mm512_store_ps(a, v); }
  EMD_TARGET static inline V all(float a) { return _mm512_set1_ps(a); }
  EMD_TARGET static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
  EMD_TARGET static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  EMD_TARGET static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  EMD_TARGET static inline V max(V a, V b) { return _mm512_max_ps(a, b); }
  EMD_TARGET static inline V min(V a, V b) { return _mm512_min_ps(a, b); }
  EMD_TARGET static inline V root(V a) { return _mm512_sqrt_ps(a); }
  EMD_TARGET static inline unsigned less(V a, V b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
  }
};
template <> struct Vec<double> {
  using V = __m512d;
  static constexpr int width = 8;
  EMD_TARGET static inline V load(const double* a) { return _mm512_load_pd(a); }
  EMD_TARGET static inline void store(double* a, V v) { _mm512_store_pd(a, v); }
  EMD_TARGET static inline V all(double a) { return _mm512_set1_pd(a); }
  EMD_TARGET static inline V add(V a, V b) { return _mm512_add_pd(a, b); }
  EMD_TARGET static inline V sub(V a, V b) { return _mm512_sub_pd(a, b); }
  EMD_TARGET static inline V mul(V a, V b) { return _mm512_mul_pd(a, b); }
  EMD_TARGET static inline V max(V a, V b) { return _mm512_max_pd(a, b); }
  EMD_TARGET static inline V min(V a, V b) { return _mm512_min_pd(a, b); }
  EMD_TARGET static inline V root(V a) { return _mm512_sqrt_pd(a); }
  EMD_TARGET static inline unsigned less(V a, V b) {
    return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ);
  }
};
#elif EMD_LEVEL == 256
template <class T> struct Vec;
template <> struct Vec<float> {
  using V = __m256;
  static constexpr int width = 8;
  EMD_TARGET static inline V load(const float* a) { return _mm256_load_ps(a); }
  EMD_TARGET static inline void store(float* a, V v) { _mm256_store_ps(a, v); }
  EMD_TARGET static inline V all(float a) { return _mm256_set1_ps(a); }
  EMD_TARGET static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
  EMD_TARGET static inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  EMD_TARGET static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  EMD_TARGET static inline V max(V a, V b) { return _mm256_max_ps(a, b); }
  EMD_TARGET static inline V min(V a, V b) { return _mm256_min_ps(a, b); }
  EMD_TARGET static inline V root(V a) { return _mm256_sqrt_ps(a); }
  EMD_TARGET static inline unsigned less(V a, V b) {
    return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
  }
};
template <> struct Vec<double> {
  using V = __m256d;
  static constexpr int width = 4;
  EMD_TARGET static inline V load(const double* a) { return _mm256_load_pd(a); }
  EMD_TARGET static inline void store(double* a, V v) { _mm256_store_pd(a, v); }
  EMD_TARGET static inline V all(double a) { return _mm256_set1_pd(a); }
  EMD_TARGET static inline V add(V a, V b) { return _mm256_add_pd(a, b); }
  EMD_TARGET static inline V sub(V a, V b) { return _mm256_sub_pd(a, b); }
  EMD_TARGET static inline V mul(V a, V b) { return _mm256_mul_pd(a, b); }
  EMD_TARGET static inline V max(V a, V b) { return _mm256_max_pd(a, b); }
  EMD_TARGET static inline V min(V a, V b) { return _mm256_min_pd(a, b); }
  EMD_TARGET static inline V root(V a) { return _mm256_sqrt_pd(a); }
  EMD_TARGET static inline unsigned less(V a, V b) {
    return unsigned(_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_LT_OQ)));
  }
};
#else
template <class T> struct Vec {
  using V = T;
  static constexpr int width = 1;
  static inline V load(const T* a) { return *a; }
  static inline void store(T* a, V v) { *a = v; }
  static inline V all(T a) { return a; }
  static inline V add(V a, V b) { return a + b; }
  static inline V sub(V a, V b) { return a - b; }
  static inline V mul(V a, V b) { return a * b; }
  static inline V max(V a, V b) { return a > b ? a : b; }
  static inline V min(V a, V b) { return a < b ? a : b; }
  static inline V root(V a) { return std::sqrt(a); }
  static inline unsigned less(V a, V b) { return a < b ? 1u : 0u; }
};
#endif

// The smallest of 16 numbers.
template <class T> EMD_TARGET static inline T lowest(const T* values) {
  using S = Vec<T>;
  alignas(64) T folded[S::width];
  auto low = S::load(values);
  for (int k = S::width; k < kFan; k += S::width) low = S::min(low, S::load(values + k));
  S::store(folded, low);
  for (int half = S::width / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) folded[k] = std::min(folded[k], folded[k + half]);
  return folded[0];
}

// Result of a scan: the smallest and second smallest cost + price.
// Values that are not below `second` on entry are ignored.
template <class T> struct Best {
  T x, y, z;
  T first, second;
  T limit;      // `second`, padded
  int done[2];  // leaves that were scanned first
  int first_at, second_at;
};

// Both tests below check cost + price < limit without a square root, which would take a third
// of their time: with room = limit - price they ask square < room^2 (p = 2: square < room).
// `limit` is padded by a few float steps and by a tiny number whose square is above 0, so neither
// rounding nor underflow loses a point; if a lane passes, the values are computed and compared
// exactly. Most leaves have no such lane.
template <class T> EMD_TARGET static inline T padded(T limit) {
  const T trace = sizeof(T) == 4 ? T(1e-18) : T(1e-150);
  return limit + (limit * (8 * std::numeric_limits<T>::epsilon()) + trace);
}

// The lanes of a leaf whose value is below `limit`, and these values. `wide` is `limit` padded.
template <class T, int P>
EMD_TARGET static inline unsigned leaf_test(const T* leaf, T x, T y, T z, T limit, T wide, T* out) {
  using S = Vec<T>;
  const auto px = S::all(x), py = S::all(y), pz = S::all(z), top = S::all(wide);
  const auto zero = S::all(T(0));
  unsigned mask = 0;
  for (int k = 0; k < kFan; k += S::width) {
    const auto dx = S::sub(S::load(leaf + k), px);
    const auto dy = S::sub(S::load(leaf + kFan + k), py);
    const auto dz = S::sub(S::load(leaf + 2 * kFan + k), pz);
    const auto square = S::add(S::add(S::mul(dx, dx), S::mul(dy, dy)), S::mul(dz, dz));
    const auto price = S::load(leaf + 3 * kFan + k);
    auto room = S::max(zero, S::sub(top, price));
    if (P == 1) room = S::mul(room, room);
    if (!S::less(square, room)) continue;
    const auto value = S::add(P == 1 ? S::root(square) : square, price);
    mask |= S::less(value, S::all(limit)) << k;
    S::store(out + k, value);
  }
  return mask;
}

// The children of a node that may hold a value below `limit`; the lower bounds of their values.
template <class T, int P>
EMD_TARGET static inline unsigned node_test(const T* node, T x, T y, T z, T limit, T wide, T* out) {
  using S = Vec<T>;
  const auto px = S::all(x), py = S::all(y), pz = S::all(z), top = S::all(wide);
  const auto zero = S::all(T(0));
  unsigned mask = 0;
  for (int k = 0; k < kFan; k += S::width) {
    const auto dx = S::max(zero, S::max(S::sub(S::load(node + k), px),
                                        S::sub(px, S::load(node + 3 * kFan + k))));
    const auto dy = S::max(zero, S::max(S::sub(S::load(node + kFan + k), py),
                                        S::sub(py, S::load(node + 4 * kFan + k))));
    const auto dz = S::max(zero, S::max(S::sub(S::load(node + 2 * kFan + k), pz),
                                        S::sub(pz, S::load(node + 5 * kFan + k))));
    const auto square = S::add(S::add(S::mul(dx, dx), S::mul(dy, dy)), S::mul(dz, dz));
    const auto price = S::load(node + 6 * kFan + k);
    auto room = S::max(zero, S::sub(top, price));
    if (P == 1) room = S::mul(room, room);
    if (!S::less(square, room)) continue;
    const auto bound = S::add(P == 1 ? S::root(square) : square, price);
    mask |= S::less(bound, S::all(limit)) << k;
    S::store(out + k, bound);
  }
  return mask;
}

// Updates `best` with a leaf's points. With `Both` false only the smallest value is needed, and
// `second` is kept equal to `first`.
template <class T, int P, bool Both>
EMD_TARGET static inline void look(const Tree<T>& tree, int child, Best<T>& best) {
  alignas(64) T value[kFan];
  unsigned hit =
      leaf_test<T, P>(tree.leaf(child), best.x, best.y, best.z, best.second, best.limit, value);
  if (!hit) return;
  while (hit) {
    const int j = __builtin_ctz(hit);
    hit &= hit - 1;
    const T v = value[j];
    if (!(v < best.second)) continue;
    if (!Both) {
      best.first = best.second = v, best.first_at = child * kFan + j;
    } else if (v < best.first) {
      best.second = best.first, best.second_at = best.first_at;
      best.first = v, best.first_at = child * kFan + j;
    } else {
      best.second = v, best.second_at = child * kFan + j;
    }
  }
  best.limit = padded(best.second);
}

// Scans the children of a node that may hold a value below the limit.
template <class T, int P, bool Both>
EMD_TARGET static void visit(const Tree<T>& tree, int level, int block, Best<T>& best) {
  alignas(64) T bound[kFan];
  unsigned mask = node_test<T, P>(tree.node(level, block), best.x, best.y, best.z, best.second,
                                  best.limit, bound);
  while (mask) {
    const int k = __builtin_ctz(mask);
    mask &= mask - 1;
    if (!(bound[k] < best.second)) continue;  // an earlier child may have improved `best`
    const int child = block * kFan + k;
    if (level > 0) {
      visit<T, P, Both>(tree, level - 1, child, best);
      continue;
    }
    if (child != best.done[0] && child != best.done[1]) look<T, P, Both>(tree, child, best);
  }
}

// Scans all objects into `best`. The leaves of two objects that were good before are scanned first:
// they bring the limit down to about its final value, which saves a third of the leaves (10k points
// on surfaces) to two thirds (outliers).
template <class T, int P, bool Both>
EMD_TARGET static inline void scan(const Tree<T>& tree, int from, int also, Best<T>& best) {
  best.limit = padded(best.second);
  best.done[0] = from / kFan;
  best.done[1] = also / kFan;
  look<T, P, Both>(tree, best.done[0], best);
  if (best.done[1] != best.done[0]) look<T, P, Both>(tree, best.done[1], best);
  const int level = tree.top;
  const int blocks = tree.blocks[level];
  for (int block = 0; block < blocks; ++block) visit<T, P, Both>(tree, level, block, best);
}

template <class T, int P>
EMD_TARGET static inline T cost_at(const Tree<T>& tree, int j, T x, T y, T z) {
  const T* leaf = tree.leaf(j / kFan) + j % kFan;
  const T dx = leaf[0] - x, dy = leaf[kFan] - y, dz = leaf[2 * kFan] - z;
  const T square = (dx * dx + dy * dy) + dz * dz;
  return P == 1 ? std::sqrt(square) : square;
}

template <class T, int P>
EMD_TARGET static inline T value_at(const Tree<T>& tree, int j, T x, T y, T z) {
  return cost_at<T, P>(tree, j, x, y, z) + tree.price(j);
}

// Sets a price and updates the minima above it.
template <class T> EMD_TARGET static inline void set_price(Tree<T>& tree, int j, T price) {
  T* prices = tree.leaf(j / kFan) + 3 * kFan;
  T old = prices[j % kFan];
  prices[j % kFan] = price;
  int child = j / kFan;
  for (int level = 0; level <= tree.top; ++level) {
    T* minima = tree.node(level, child / kFan) + 6 * kFan;
    T& slot = minima[child % kFan];
    if (old > slot) return;  // this point did not determine the minimum
    const T low = lowest(prices);
    if (low == slot) return;
    old = slot;
    slot = low;
    prices = minima;
    child /= kFan;
  }
}

// One phase: bids until everyone has an object, or `bids_left` runs out, or `stop` is set.
template <class T, int P>
EMD_TARGET static void auction(Work& work, Tree<T>& tree, const T* people, T eps,
                               std::int64_t& bids_left, const std::atomic<bool>& stop) {
  const T inf = std::numeric_limits<T>::infinity();
  const T slack = 4 * std::numeric_limits<T>::epsilon();
  auto& todo = work.todo;
  unsigned tick = 0;
  int near1 = work.near1, near2 = work.near2;
  while (!todo.empty()) {
    if (bids_left <= 0) break;
    if ((++tick & 255u) == 0 && stop.load(std::memory_order_relaxed)) break;
    const int i = todo.back();
    todo.pop_back();
    Best<T> best;
    best.x = people[3 * i], best.y = people[3 * i + 1], best.z = people[3 * i + 2];
    if (work.hint1[i] >= 0) near1 = work.hint1[i], near2 = work.hint2[i];
    // The larger of two objects' values bounds the second best from above; a tiny number
    // is added so that the scan, which takes only strictly smaller values, finds those two again.
    const T a = value_at<T, P>(tree, near1, best.x, best.y, best.z);
    const T b = value_at<T, P>(tree, near2, best.x, best.y, best.z);
    const T limit = a > b ? a : b;
    best.first = best.second = limit + (limit * slack + std::numeric_limits<T>::min());
    best.first_at = best.second_at = -1;
    scan<T, P, true>(tree, near1, near2, best);
    const int j = best.first_at;
    near1 = work.hint1[i] = best.first_at;
    near2 = work.hint2[i] = best.second_at;
    const T old = tree.price(j);
    T price = old + ((best.second - best.first) + eps);
    if (!(price > old)) price = std::nextafter(old, inf);
    set_price(tree, j, price);
    const int evicted = work.owner[j];
    work.owner[j] = i;
    work.object[i] = j;
    if (evicted >= 0) {
      work.object[evicted] = -1;
      todo.push_back(evicted);
    }
    --bids_left;
  }
  work.near1 = near1, work.near2 = near2;
}

// For every person the minimum of cost + price: sums of the minima and of the matched costs.
// With `eps >= 0`, people whose object is worse than their best by more than eps go to `todo`;
// they keep their object until the caller decides to go on.
template <class T, int P>
EMD_TARGET static Sums check(Work& work, const Tree<T>& tree, const T* people, T eps,
                             const std::atomic<bool>& stop) {
  const T slack = 4 * std::numeric_limits<T>::epsilon();
  Sums sums;
  for (int i = 0; i < work.n; ++i) {
    if ((i & 255) == 0 && stop.load(std::memory_order_relaxed)) break;
    Best<T> best;
    best.x = people[3 * i], best.y = people[3 * i + 1], best.z = people[3 * i + 2];
    const int mine = work.object[i];
    const T value = value_at<T, P>(tree, mine, best.x, best.y, best.z);
    best.first = best.second = value + (value * slack + std::numeric_limits<T>::min());
    best.first_at = best.second_at = -1;
    scan<T, P, false>(tree, mine, mine, best);
    sums.minimum.add(double(best.first));
    sums.matched.add(double(cost_at<T, P>(tree, mine, best.x, best.y, best.z)));
    if (eps >= 0 && value > best.first + eps) work.todo.push_back(i);
  }
  return sums;
}

// Assigns the nearest free object (in cost + price) to everyone without one. A leftover object may
// be far away, so this is only used when max_bids is reached.
template <class T, int P>
EMD_TARGET static void finish(Work& work, Tree<T>& tree, const T* people,
                              const std::atomic<bool>& stop) {
  const T inf = std::numeric_limits<T>::infinity();
  std::vector<T> saved(work.n);
  for (int j = 0; j < work.n; ++j) {
    T& price = tree.price(j);
    saved[j] = price;
    if (work.owner[j] >= 0) price = inf;
  }
  tree.refresh_minima();
  while (!work.todo.empty() && !stop.load(std::memory_order_relaxed)) {
    const int i = work.todo.back();
    work.todo.pop_back();
    Best<T> best;
    best.x = people[3 * i], best.y = people[3 * i + 1], best.z = people[3 * i + 2];
    best.first = best.second = inf;
    best.first_at = best.second_at = -1;
    scan<T, P, false>(tree, 0, 0, best);
    work.object[i] = best.first_at;
    work.owner[best.first_at] = i;
    set_price(tree, best.first_at, inf);
  }
  for (int j = 0; j < work.n; ++j) tree.price(j) = saved[j];
  tree.refresh_minima();
}

// The functions of this instruction set, for the table in auction.cpp.
inline Kernels kernels() {
  return {{auction<float, 1>, auction<float, 2>},   {auction<double, 1>, auction<double, 2>},
          {check<float, 1>, check<float, 2>},       {check<double, 1>, check<double, 2>},
          {finish<float, 1>, finish<float, 2>},     {finish<double, 1>, finish<double, 2>}};
}

}  // namespace EMD_NAMESPACE
