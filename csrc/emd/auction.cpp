// Earth Mover's Distance between two clouds of equal size: the CPU solver.
//
// Gauss-Seidel auction (Bertsekas) with epsilon scaling. One person (a point of x) at a time scans
// the objects (points of y) for the smallest and second smallest cost + price, takes the first and
// raises its price by the difference plus epsilon; the previous owner bids next. Prices stay from
// phase to phase. Objects lie in kd order in leaves of 16; boxes and price minima of a 16-ary tree
// let a scan skip nodes that cannot matter. The hot loops are in scan.h.
//
// The result does not depend on any of that: the certificate is a float64 dual,
//   (sum_i min_j (cost_ij + price_j) - sum_j price_j) / N <= EMD,
// computed from the unrounded inputs; it holds for any prices that the auction ends with.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define EMD_X86 1
#include <immintrin.h>
#endif

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

// a * b + c must round twice everywhere, or the three instruction sets would disagree.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace py = pybind11;

namespace {

constexpr int kFan = 16;  // points of a leaf, children of a node: one AVX-512 register of floats

// Sums float64 numbers in the given order, exact to about the last bit (Neumaier).
struct Sum {
  double total = 0, rest = 0;
  void add(double v) {
    const double t = total + v;
    rest += std::fabs(total) >= std::fabs(v) ? (total - t) + v : (v - t) + total;
    total = t;
  }
  double value() const { return total + rest; }
};

struct Sums {
  Sum minimum;  // of cost + price over all objects
  Sum matched;  // of the costs of the assignment
};

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

// Objects in kd order. A leaf is 16 x, 16 y, 16 z, 16 prices; a node block is, for its 16 children,
// the low corners (3 x 16), the high corners (3 x 16) and the price minima (16). Level 0 blocks
// have leaves for children. Padding has the price infinity, so it never wins.
template <class T> struct Tree {
  static constexpr int kMaxLevels = 8;
  int n = 0, leaves = 0, top = 0;
  int blocks[kMaxLevels] = {};
  std::size_t offset[kMaxLevels] = {};
  std::unique_ptr<T[], AlignedDelete> leaf_data, node_data;

  T* leaf(int i) const { return leaf_data.get() + std::size_t(i) * 4 * kFan; }
  T* node(int level, int i) const {
    return node_data.get() + offset[level] + std::size_t(i) * 7 * kFan;
  }
  T& price(int j) const { return leaf(j / kFan)[3 * kFan + j % kFan]; }

  static std::unique_ptr<T[], AlignedDelete> allocate(std::size_t count) {
    return std::unique_ptr<T[], AlignedDelete>(
        static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64))));
  }

  // at(j, axis) is a coordinate of the j-th object in kd order. All prices become 0.
  template <class At> void build(int count, At at) {
    const T inf = std::numeric_limits<T>::infinity();
    n = count;
    leaves = (n + kFan - 1) / kFan;
    leaf_data = allocate(std::size_t(leaves) * 4 * kFan);
    for (int j = 0; j < leaves * kFan; ++j) {
      T* slot = leaf(j / kFan) + j % kFan;
      for (int axis = 0; axis < 3; ++axis) slot[axis * kFan] = j < n ? T(at(j, axis)) : T(0);
      slot[3 * kFan] = j < n ? T(0) : inf;
    }
    std::size_t total = 0;
    int children = leaves;
    for (top = 0;; ++top) {
      blocks[top] = (children + kFan - 1) / kFan;
      offset[top] = total;
      total += std::size_t(blocks[top]) * 7 * kFan;
      children = blocks[top];
      // Four blocks at the top cost a scan less than another level above them.
      if (children <= 4 || top + 1 == kMaxLevels) break;
    }
    node_data = allocate(total);
    for (int level = 0; level <= top; ++level) {
      const int count_below = level == 0 ? leaves : blocks[level - 1];
      for (int c = 0; c < blocks[level] * kFan; ++c) {
        T* slot = node(level, c / kFan) + c % kFan;
        for (int axis = 0; axis < 3; ++axis) {
          T low = inf, high = -inf;
          if (c < count_below && level == 0) {
            const int used = std::min(kFan, n - c * kFan);
            for (int k = 0; k < used; ++k) {
              low = std::min(low, leaf(c)[axis * kFan + k]);
              high = std::max(high, leaf(c)[axis * kFan + k]);
            }
          } else if (c < count_below) {
            const int used = std::min(kFan, (level == 1 ? leaves : blocks[level - 2]) - c * kFan);
            const T* below = node(level - 1, c);
            for (int k = 0; k < used; ++k) {
              low = std::min(low, below[axis * kFan + k]);
              high = std::max(high, below[(3 + axis) * kFan + k]);
            }
          } else {
            low = high = inf;  // infinitely far: its room is max(0, limit - inf) = 0
          }
          slot[axis * kFan] = low;
          slot[(3 + axis) * kFan] = high;
        }
        slot[6 * kFan] = c < count_below ? T(0) : inf;
      }
    }
  }

  void refresh_minima() {
    for (int level = 0; level <= top; ++level) {
      const int count_below = level == 0 ? leaves : blocks[level - 1];
      for (int c = 0; c < count_below; ++c) {
        const T* from = level == 0 ? leaf(c) + 3 * kFan : node(level - 1, c) + 6 * kFan;
        T low = from[0];
        for (int k = 1; k < kFan; ++k) low = std::min(low, from[k]);
        node(level, c / kFan)[6 * kFan + c % kFan] = low;
      }
    }
  }
};

// The state of the auction, in kd order on both sides.
struct Work {
  int n = 0;
  std::vector<int> owner;         // of an object, or -1
  std::vector<int> object;        // of a person, or -1
  std::vector<int> hint1, hint2;  // a person's two best at its last bid, or -1
  std::vector<int> todo;          // people without an object; the last one bids next
  int near1 = 0, near2 = 1;       // hints of the last bidder, for people without hints
};

struct Kernels {
  template <class T>
  using Auction = void (*)(Work&, Tree<T>&, const T*, T, std::int64_t&, const std::atomic<bool>&);
  template <class T>
  using Check = Sums (*)(Work&, const Tree<T>&, const T*, T, const std::atomic<bool>&);
  template <class T> using Finish = void (*)(Work&, Tree<T>&, const T*, const std::atomic<bool>&);
  // Indexed by p - 1.
  Auction<float> auction32[2];
  Auction<double> auction64[2];
  Check<float> check32[2];
  Check<double> check64[2];
  Finish<float> finish32[2];
  Finish<double> finish64[2];
};

}  // namespace

#if EMD_X86
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header sets a register from itself to mean "undefined".
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define EMD_NAMESPACE emd_avx512
#define EMD_TARGET __attribute__((target("avx512f")))
#define EMD_LEVEL 512
#include "scan.h"
#undef EMD_NAMESPACE
#undef EMD_TARGET
#undef EMD_LEVEL

#define EMD_NAMESPACE emd_avx2
#define EMD_TARGET __attribute__((target("avx2")))
#define EMD_LEVEL 256
#include "scan.h"
#undef EMD_NAMESPACE
#undef EMD_TARGET
#undef EMD_LEVEL
#endif

#define EMD_NAMESPACE emd_portable
#define EMD_TARGET
#define EMD_LEVEL 0
#include "scan.h"
#undef EMD_NAMESPACE
#undef EMD_TARGET
#undef EMD_LEVEL

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if EMD_X86
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512");
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
#endif
  found.push_back("portable");
  return found;
}

// An empty `name` selects the best that this CPU supports.
Kernels kernels_for(const std::string& name) {
  const auto found = instruction_sets();
  const std::string wanted = name.empty() ? found.front() : name;
  if (std::find(found.begin(), found.end(), wanted) == found.end())
    throw py::value_error("isa='" + name + "': this CPU does not have it");
#if EMD_X86
  if (wanted == "avx512") return emd_avx512::kernels();
  if (wanted == "avx2") return emd_avx2::kernels();
#endif
  return emd_portable::kernels();
}

// Order of `points` in which every run of `leaf` points from the start is compact: splits at the
// median of the longest side, rounded to a multiple of `leaf`. If `nested`, so are the runs of
// 16 * leaf, 256 * leaf ...: then it rounds to the largest of those that is smaller than the part.
template <class R> class KdOrder {
 public:
  KdOrder(const R* points, int n, int leaf, bool nested)
      : points_(points), leaf_(leaf), nested_(nested), order_(n) {
    for (int i = 0; i < n; ++i) order_[i] = i;
    split(0, n);
  }
  std::vector<int> take() { return std::move(order_); }

 private:
  void split(int begin, int end) {
    const int size = end - begin;
    if (size <= leaf_) return;
    R low[3], high[3];
    for (int a = 0; a < 3; ++a) low[a] = high[a] = points_[3 * std::size_t(order_[begin]) + a];
    for (int k = begin + 1; k < end; ++k)
      for (int a = 0; a < 3; ++a) {
        const R v = points_[3 * std::size_t(order_[k]) + a];
        low[a] = std::min(low[a], v);
        high[a] = std::max(high[a], v);
      }
    int axis = 0;
    for (int a = 1; a < 3; ++a)
      if (high[a] - low[a] > high[axis] - low[axis]) axis = a;
    int unit = leaf_;
    while (nested_ && unit <= (size - 1) / kFan) unit *= kFan;
    int left = (size / 2 + unit / 2) / unit * unit;
    left = std::max(unit, std::min(left, (size - 1) / unit * unit));
    const int middle = begin + left;
    // Ties by index, so that the order does not depend on nth_element's implementation.
    std::nth_element(order_.begin() + begin, order_.begin() + middle, order_.begin() + end,
                     [&](int i, int j) {
                       const R u = points_[3 * std::size_t(i) + axis];
                       const R v = points_[3 * std::size_t(j) + axis];
                       return u < v || (u == v && i < j);
                     });
    split(begin, middle);
    split(middle, end);
  }

  const R* points_;
  const int leaf_;
  const bool nested_;
  std::vector<int> order_;
};

struct Options {
  int p;
  double gap;
  std::int64_t max_bids;
  double first_eps, factor;
};

struct Outcome {
  double distance = 0, lower_bound = 0;
  std::int64_t bids = 0;
  int phases = 0;
  bool converged = false;
};

// One pair. `R` is the type of the input; everything in the result is computed in float64.
template <class R> class Pair {
 public:
  Pair(const R* x, const R* y, int n, const Options& options, const Kernels& kernels,
       const std::atomic<bool>& stop)
      : x_(x),
        y_(y),
        n_(n),
        options_(options),
        kernels_(kernels),
        stop_(stop),
        kind_(options.p - 1) {}

  Outcome solve(std::int64_t* assignment, double* prices) {
    measure();
    if (n_ == 1 || extent_ == 0) {
      for (int i = 0; i < n_; ++i) assignment[i] = i;
      if (prices) std::fill(prices, prices + n_, 0.0);
      Outcome out;
      if (n_ == 1) {
        double square = 0;
        for (int a = 0; a < 3; ++a) {
          const double d = (double(x_[a]) - double(y_[a])) * scale_;
          square += d * d;
        }
        out.distance = out.lower_bound = std::sqrt(square) / scale_;
      }
      out.converged = true;
      return out;
    }
    prepare();
    Outcome out = run();
    for (int i = 0; i < n_; ++i) assignment[person_[i]] = object_[work_.object[i]];
    if (prices) {
      const double unit = options_.p == 1 ? scale_ : scale_ * scale_;
      for (int j = 0; j < n_; ++j) prices[object_[j]] = exact_.price(j) / unit;
    }
    return out;
  }

 private:
  void measure() {
    double low[3], high[3];
    for (int a = 0; a < 3; ++a) low[a] = high[a] = x_[a];
    for (const R* cloud : {x_, y_})
      for (std::size_t k = 0; k < std::size_t(n_) * 3; k += 3)
        for (int a = 0; a < 3; ++a) {
          low[a] = std::min(low[a], double(cloud[k + a]));
          high[a] = std::max(high[a], double(cloud[k + a]));
        }
    extent_ = 0;
    for (int a = 0; a < 3; ++a) {
      extent_ = std::max(extent_, high[a] - low[a]);
      center_[a] = low[a] / 2 + high[a] / 2;
    }
    if (extent_ == 0) return;
    // A power of two, so that scaling rounds nothing.
    int exponent;
    std::frexp(extent_, &exponent);
    scale_ = std::ldexp(1.0, -std::max(exponent, -900));
    double square = 0;
    for (int a = 0; a < 3; ++a) {
      const double side = (high[a] - low[a]) * scale_;
      square += side * side;
    }
    diagonal_ = std::sqrt(square);
  }

  void prepare() {
    person_ = KdOrder<R>(x_, n_, kFan, true).take();
    object_ = KdOrder<R>(y_, n_, kFan, true).take();
    const auto rounded = [&](const R* cloud, int i, int a) {
      return float((double(cloud[3 * std::size_t(i) + a]) - center_[a]) * scale_);
    };
    rough_.build(n_, [&](int j, int a) { return rounded(y_, object_[j], a); });
    rough_people_.resize(3 * std::size_t(n_));
    for (int i = 0; i < n_; ++i)
      for (int a = 0; a < 3; ++a)
        rough_people_[3 * std::size_t(i) + a] = rounded(x_, person_[i], a);
    work_.n = n_;
    work_.owner.assign(n_, -1);
    work_.object.assign(n_, -1);
    work_.hint1.assign(n_, -1);
    work_.hint2.assign(n_, -1);
    work_.todo.resize(n_);
    for (int i = 0; i < n_; ++i) work_.todo[i] = n_ - 1 - i;
  }

  // The float64 tree is first needed for the certificate; it takes over the prices.
  void refresh_exact() {
    if (exact_.n == 0) {
      const auto scaled = [&](const R* cloud, int i, int a) {
        return double(cloud[3 * std::size_t(i) + a]) * scale_;
      };
      exact_.build(n_, [&](int j, int a) { return scaled(y_, object_[j], a); });
      exact_people_.resize(3 * std::size_t(n_));
      for (int i = 0; i < n_; ++i)
        for (int a = 0; a < 3; ++a)
          exact_people_[3 * std::size_t(i) + a] = scaled(x_, person_[i], a);
    }
    for (int j = 0; j < n_; ++j) exact_.price(j) = rough_.price(j);
    exact_.refresh_minima();
  }

  void start_double() {
    refresh_exact();
    double_ = true;
    rough_ = Tree<float>();
    rough_people_ = std::vector<float>();
  }

  Sums check(double eps) {
    if (double_) return kernels_.check64[kind_](work_, exact_, exact_people_.data(), eps, stop_);
    return kernels_.check32[kind_](work_, rough_, rough_people_.data(), float(eps), stop_);
  }

  double price_sum() const {
    Sum sum;
    for (int j = 0; j < n_; ++j) sum.add(double_ ? exact_.price(j) : double(rough_.price(j)));
    return sum.value();
  }

  double price_span() const {
    double low = DBL_MAX, high = -DBL_MAX;
    for (int j = 0; j < n_; ++j) {
      const double v = double_ ? exact_.price(j) : double(rough_.price(j));
      low = std::min(low, v), high = std::max(high, v);
    }
    return high - low;
  }

  // Distance and bound in scaled units from sums over the exact side.
  std::pair<double, double> certify(const Sums& sums) const {
    Sum total;
    for (int j = 0; j < n_; ++j) total.add(exact_.price(j));
    // A minimum is a cost plus a price, neither negative: it is rounded at most 6 times in a row,
    // by half an epsilon of itself each time. The sums round once more.
    const double margin = 8 * DBL_EPSILON * (sums.minimum.value() + total.value()) / n_;
    const double primal = sums.matched.value() / n_;
    double dual = (sums.minimum.value() - total.value()) / n_ - margin;
    dual = std::max(0.0, std::min(dual, primal));
    if (options_.p == 1) return {primal, dual};
    return {std::sqrt(primal), std::sqrt(dual)};
  }

  // The absolute gap at which a pair is solved, in scaled units.
  double goal(double distance) const {
    return std::max(options_.gap * std::max(distance, 1e-6 * diagonal_), 1e-13 * diagonal_);
  }

  Outcome run() {
    const std::atomic<bool>& stop = stop_;
    Outcome out;
    std::int64_t left = options_.max_bids;
    const double unit = options_.p == 1 ? diagonal_ : diagonal_ * diagonal_;
    double eps = options_.first_eps * unit;
    std::pair<double, double> ends{0, 0};
    while (true) {
      const std::int64_t before = left;
      if (double_)
        kernels_.auction64[kind_](work_, exact_, exact_people_.data(), eps, left, stop);
      else
        kernels_.auction32[kind_](work_, rough_, rough_people_.data(), float(eps), left, stop);
      out.bids += before - left;
      ++out.phases;
      if (stop) return out;
      if (!work_.todo.empty()) {  // max_bids
        if (double_)
          kernels_.finish64[kind_](work_, exact_, exact_people_.data(), stop);
        else
          kernels_.finish32[kind_](work_, rough_, rough_people_.data(), stop);
        if (stop) return out;
        if (!double_) start_double();
        ends = certify(check(-1));
        break;
      }

      const double mean = mean_cost();
      const double wanted = aim(mean);
      double next = std::max(eps / options_.factor, wanted);
      if (eps <= wanted * 1.0001) next = eps / 2;
      // Values of about this size get rounded; below 16 steps of float32, float64 goes on.
      const double size = options_.p == 1 ? 1.0 : std::max(price_span(), 4 * mean);
      const bool exhausted = next < 1e-16 * size;
      const Sums sums = check(next);
      if (stop) return out;
      const double primal = sums.matched.value() / n_;
      const double dual = std::max(0.0, sums.minimum.value() / n_ - price_sum() / n_);
      const double reached = options_.p == 1 ? primal : std::sqrt(primal);
      const double shown = options_.p == 1 ? dual : std::sqrt(dual);
      const bool done = reached - shown <= goal(reached);
      if (done || exhausted) {
        if (!double_) refresh_exact();
        const bool was = double_;
        std::vector<int> todo = work_.todo;
        double_ = true;
        ends = certify(check(-1));
        double_ = was;
        work_.todo = std::move(todo);
        if (stop) return out;
        if (ends.first - ends.second <= goal(ends.first) || exhausted) break;
      }
      for (int i : work_.todo) {
        work_.owner[work_.object[i]] = -1;
        work_.object[i] = -1;
      }
      eps = next;
      if (!double_ && eps < 16 * 6e-8 * size) start_double();
    }
    out.distance = ends.first / scale_;
    out.lower_bound = ends.second / scale_;
    // Not `goal`, which stops at the resolution of float64.
    out.converged =
        ends.first - ends.second <= options_.gap * std::max(ends.first, 1e-6 * diagonal_);
    return out;
  }

  double mean_cost() const {
    Sum sum;
    for (int i = 0; i < n_; ++i) {
      const R* a = x_ + 3 * std::size_t(person_[i]);
      const R* b = y_ + 3 * std::size_t(object_[work_.object[i]]);
      double square = 0;
      for (int k = 0; k < 3; ++k) {
        const double d = (double(a[k]) - double(b[k])) * scale_;
        square += d * d;
      }
      sum.add(options_.p == 1 ? std::sqrt(square) : square);
    }
    return sum.value() / n_;
  }

  // The epsilon that should just meet the goal: the gap left by a phase measures about 0.55 eps.
  double aim(double mean) const {
    if (options_.p == 1) return 1.6 * goal(mean);
    const double root = std::sqrt(mean);
    return 1.6 * 2 * goal(root) * std::max(root, 1e-6 * diagonal_);
  }

  const R* x_;
  const R* y_;
  const int n_;
  const Options options_;
  const Kernels kernels_;
  const std::atomic<bool>& stop_;
  const int kind_;
  double center_[3] = {0, 0, 0}, extent_ = 0, scale_ = 1, diagonal_ = 0;
  bool double_ = false;
  std::vector<int> person_, object_;  // input index of the i-th in kd order
  Tree<float> rough_;                 // translated, scaled, rounded to float32
  std::vector<float> rough_people_;
  Tree<double> exact_;  // scaled by a power of two, nothing rounded
  std::vector<double> exact_people_;
  Work work_;
};

// Runs `count` jobs on threads and returns when all are done; Ctrl-C sets `stop` and raises.
template <class Job>
void run_jobs(std::int64_t count, int threads, std::atomic<bool>& stop, Job job) {
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  std::exception_ptr error;
  int running = int(std::min<std::int64_t>(std::max(1, threads), count));
  std::vector<std::thread> pool;
  const auto loop = [&] {
    try {
      for (std::int64_t b; !stop && (b = next++) < count;) job(b);
    } catch (...) {
      std::lock_guard<std::mutex> hold(mutex);
      if (!error) error = std::current_exception();
      stop = true;
    }
    std::lock_guard<std::mutex> hold(mutex);
    --running;
    finished.notify_all();
  };
  bool interrupted = false;
  {
    py::gil_scoped_release release;
    const int wanted = running;
    for (int t = 0; t < wanted; ++t) {
      try {
        pool.emplace_back(loop);
      } catch (const std::system_error&) {
        // Fewer threads suffice; with none this thread does the work, without Ctrl-C.
        {
          std::lock_guard<std::mutex> hold(mutex);
          running -= wanted - t - (t == 0 ? 1 : 0);
        }
        if (t == 0) loop();
        break;
      }
    }
    std::unique_lock<std::mutex> hold(mutex);
    while (running > 0) {
      const auto done = [&] { return running == 0; };
      if (finished.wait_for(hold, std::chrono::milliseconds(50), done)) break;
      hold.unlock();
      {
        py::gil_scoped_acquire acquire;
        if (!interrupted && PyErr_CheckSignals() != 0) {
          interrupted = true;
          stop = true;
        }
      }
      hold.lock();
    }
    hold.unlock();
    for (auto& thread : pool) thread.join();
  }
  if (interrupted) throw py::error_already_set();
  if (error) std::rethrow_exception(error);
}

template <class R> using Array = py::array_t<R, py::array::c_style>;

template <class R>
py::dict solve(const Array<R>& x, const Array<R>& y, const Options& options, int threads,
               bool want_prices, const Kernels& kernels) {
  const std::int64_t count = x.shape(0);
  const int n = int(x.shape(1));
  py::array_t<double> distance(count), lower_bound(count);
  py::array_t<std::int64_t> assignment({count, std::int64_t(n)}), bids(count), phases(count);
  py::array_t<bool> converged(count);
  py::array_t<double> prices({want_prices ? count : std::int64_t(0), std::int64_t(n)});
  const R* from = x.data();
  const R* to = y.data();
  double* distance_at = distance.mutable_data();
  double* bound_at = lower_bound.mutable_data();
  std::int64_t* assignment_at = assignment.mutable_data();
  std::int64_t* bids_at = bids.mutable_data();
  std::int64_t* phases_at = phases.mutable_data();
  bool* converged_at = converged.mutable_data();
  double* prices_at = prices.mutable_data();
  std::atomic<bool> stop{false};
  run_jobs(count, threads, stop, [&](std::int64_t b) {
    const std::size_t points = std::size_t(b) * n * 3;
    Pair<R> pair(from + points, to + points, n, options, kernels, stop);
    const Outcome out =
        pair.solve(assignment_at + b * n, want_prices ? prices_at + b * n : nullptr);
    distance_at[b] = out.distance;
    bound_at[b] = out.lower_bound;
    bids_at[b] = out.bids;
    phases_at[b] = out.phases;
    converged_at[b] = out.converged;
  });
  py::dict result;
  result["distance"] = distance;
  result["lower_bound"] = lower_bound;
  result["assignment"] = assignment;
  result["bids"] = bids;
  result["phases"] = phases;
  result["converged"] = converged;
  result["prices"] = want_prices ? py::object(prices) : py::object(py::none());
  return result;
}

py::dict emd_auction(const py::array& x, const py::array& y, int p, double gap,
                     std::int64_t max_bids, int threads, bool want_prices, const std::string& isa,
                     double first_eps, double factor) {
  if (x.ndim() != 3 || y.ndim() != 3 || x.shape(2) != 3 || y.shape(2) != 3 ||
      x.shape(0) != y.shape(0) || x.shape(1) != y.shape(1) || x.shape(1) < 1 ||
      x.shape(1) > (1 << 28))
    throw py::value_error("emd_auction: x and y must be (B, N, 3) arrays of one shape, N >= 1");
  if ((p != 1 && p != 2) || !(gap > 0) || !(first_eps > 0) || !(factor > 1))
    throw py::value_error("emd_auction: p is 1 or 2; gap, first_eps > 0; factor > 1");
  const Options options{p, gap, max_bids, first_eps, factor};
  const Kernels kernels = kernels_for(isa);
  if (Array<float>::check_(x) && Array<float>::check_(y))
    return solve<float>(Array<float>(x), Array<float>(y), options, threads, want_prices, kernels);
  if (Array<double>::check_(x) && Array<double>::check_(y))
    return solve<double>(Array<double>(x), Array<double>(y), options, threads, want_prices,
                         kernels);
  throw py::type_error("emd_auction: x and y must be float32 or float64 and C-contiguous");
}

py::array_t<std::int64_t> kd_order(const Array<double>& points, int leaf) {
  if (points.ndim() != 2 || points.shape(1) != 3 || points.shape(0) > (1 << 28) || leaf < 1)
    throw py::value_error("kd_order: points must be (N, 3) float64, leaf >= 1");
  const int n = int(points.shape(0));
  std::vector<int> order;
  {
    py::gil_scoped_release release;
    order = KdOrder<double>(points.data(), n, leaf, false).take();
  }
  py::array_t<std::int64_t> out(n);
  std::copy(order.begin(), order.end(), out.mutable_data());
  return out;
}

}  // namespace

void bind_emd(py::module_& m) {
  m.def("emd_auction", &emd_auction, py::arg("x"), py::arg("y"), py::kw_only(), py::arg("p"),
        py::arg("gap"), py::arg("max_bids"), py::arg("threads"), py::arg("prices"),
        py::arg("isa") = "", py::arg("first_eps") = 0.05, py::arg("factor") = 4.0,
        "Solves (B, N, 3) pairs; see vitapack.kernels.emd for the public function.");
  m.def("kd_order", &kd_order, py::arg("points"), py::arg("leaf"),
        "Order of (N, 3) points in which every run of `leaf` points is compact.");
  m.def("emd_instruction_sets", [] {
    py::list names;
    for (const auto& name : instruction_sets()) names.append(name);
    return names;
  }, "What `isa` may be on this CPU, best first.");
}
