// Earth Mover's Distance between two clouds of equal size: the CUDA solver.
//
// The auction of auction.cpp, with many bids at a time. A pair is solved by one block of a
// persistent kernel (batches) or by all blocks of a cooperative launch (few pairs); no step returns
// to the host. A round takes `round_size` people from the end of the todo list; a warp, or a team
// of warps if there are fewer bidders than warps, scans the objects for each:
//   32 leaves at a time, a lane computes one leaf's lower bound; leaves that may matter are read
//   by the whole warp, one object per lane. Bids compete by atomicMax on (increment, person), one
//   winner per object; the losers and the evicted are put back in order.
// A round depends on the state alone, never on the number of blocks or warps, on their order of
// completion, or on other pairs. So the result is bit-identical for any batch, also between one
// pair on all blocks and the same pair in a batch. Tests run this file on a CPU, thread by thread,
// in several orders (CUDA_ON_CPU).
//
// float32 first; the float64 kernel then computes the certificate from the unrounded inputs, and
// continues the auction if float32 was too coarse. Any GPU of compute capability 6.0 or later.
//
// Host interface at the end: a C ABI of device pointers. It allocates nothing.

#include <cstddef>
#include <cstdint>

#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#define BLOCK_SHARED(type, name) __shared__ type name
#define GRID_SYNC() cooperative_groups::this_grid().sync()
#define LAUNCH(kernel, blocks, threads, stream, problem) \
  (kernel<<<dim3(blocks), dim3(threads), 0, stream>>>(problem), cudaGetLastError())
#define EXPORT __attribute__((visibility("default")))
template <class K, class A>
static cudaError_t launch_cooperative(K kernel, unsigned blocks, unsigned threads,
                                      cudaStream_t stream, A problem) {
  void* arguments[] = {&problem};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                     dim3(threads), arguments, 0, stream);
}
#endif

namespace {

constexpr int kThreads = 512;  // 16 warps; at up to 128 registers per thread one block per SM
constexpr int kMaxWarps = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr double kEpsilon64 = 2.220446049250313e-16;

template <class T> struct Limits;
template <> struct Limits<float> {
  static constexpr float epsilon = 1.1920929e-7f, smallest = 1.17549435e-38f;
};
template <> struct Limits<double> {
  static constexpr double epsilon = kEpsilon64, smallest = 2.2250738585072014e-308;
};

// Explicit roundings: the compiler must not fuse a bound differently from a value, or the leaf with
// the best object could be skipped. Each operation is monotone, so bound <= value.
__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float total(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double total(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float root(float a) { return __fsqrt_rn(a); }
__device__ inline double root(double a) { return __dsqrt_rn(a); }
template <class T> __device__ inline T larger(T a, T b) { return a > b ? a : b; }
template <class T> __device__ inline T smaller(T a, T b) { return a < b ? a : b; }
template <class T> __device__ inline T infinite() { return T(1) / T(0); }
template <> __device__ inline float infinite<float>() { return __int_as_float(0x7f800000); }
template <> __device__ inline double infinite<double>() {
  return __longlong_as_double(0x7ff0000000000000ll);
}
__device__ inline float next_up(float a) { return __int_as_float(__float_as_int(a) + 1); }
__device__ inline double next_up(double a) {
  return __longlong_as_double(__double_as_longlong(a) + 1);
}

template <class T> struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Object {
  T x, y, z, price;
};

// State of a pair; written by one thread, read by all after a barrier.
enum State : int { kGoOn, kCoarse, kEstimated, kLimit, kDone };
struct Control {
  double eps, next;  // of this phase and of the one after it
  double primal, dual;
  long long bids;
  int todo, phases, state, converged;
  int width, winners;  // see next_width
};

struct Problem {
  const double *x, *y;     // (pairs, n, 3), scaled by a power of two, in an order of compact runs
  const double* centre;    // (pairs, 3) of the joint bounding box, in the same units
  const double* diagonal;  // (pairs,)
  unsigned char* workspace;
  size_t stride;  // bytes of workspace per pair
  double *distance, *bound, *prices;  // (pairs,), (pairs,), (pairs, n), in scaled units
  int* assignment;                    // (pairs, n)
  long long* bids;
  int *phases, *converged;
  long long max_bids;
  double gap;
  int n, pair;  // `pair` >= 0: all blocks work on that one
};

// Slices a pair's workspace; also computes its length.
struct Layout {
  size_t used = 0;
  __host__ __device__ size_t take(size_t bytes) {
    const size_t at = used;
    used += (bytes + 127) / 128 * 128;
    return at;
  }
};

template <class T> struct View {
  int n, leaves;
  const double *x, *y;
  const double* centre;
  Object<T>* objects;  // leaves * 32; padding has the price infinity
  T* people;           // float32: (n, 3)
  T* box;              // 7 rows of `leaves`: low x y z, high x y z, lowest price
};

struct Lists {
  int *owner, *object, *hint1, *hint2, *todo, *out, *bid_object;
  unsigned long long *key, *bid_key;
  double *bid_price, *minimum, *matched, *excess, *saved;
  Control* control;
};

struct Space {
  View<float> rough;
  View<double> exact;
  Lists lists;
};

__host__ __device__ inline size_t slice(unsigned char* base, int n, Space* space) {
  Layout layout;
  const int leaves = (n + 31) / 32;
  const size_t slots = size_t(leaves) * 32, count = n;
  const size_t control = layout.take(sizeof(Control));
  const size_t rough = layout.take(slots * sizeof(Object<float>));
  const size_t exact = layout.take(slots * sizeof(Object<double>));
  const size_t people = layout.take(count * 3 * sizeof(float));
  const size_t box32 = layout.take(size_t(leaves) * 7 * sizeof(float));
  const size_t box64 = layout.take(size_t(leaves) * 7 * sizeof(double));
  size_t ints[7], longs[2], doubles[5];
  for (int k = 0; k < 7; ++k) ints[k] = layout.take(count * sizeof(int));
  for (int k = 0; k < 2; ++k) longs[k] = layout.take(slots * sizeof(unsigned long long));
  for (int k = 0; k < 5; ++k) doubles[k] = layout.take(count * sizeof(double));
  if (space) {
    space->rough = {n, leaves, nullptr, nullptr, nullptr,
                    reinterpret_cast<Object<float>*>(base + rough),
                    reinterpret_cast<float*>(base + people),
                    reinterpret_cast<float*>(base + box32)};
    space->exact = {n, leaves, nullptr, nullptr, nullptr,
                    reinterpret_cast<Object<double>*>(base + exact), nullptr,
                    reinterpret_cast<double*>(base + box64)};
    int** const int_lists[7] = {&space->lists.owner, &space->lists.object, &space->lists.hint1,
                                &space->lists.hint2, &space->lists.todo, &space->lists.out,
                                &space->lists.bid_object};
    for (int k = 0; k < 7; ++k) *int_lists[k] = reinterpret_cast<int*>(base + ints[k]);
    space->lists.key = reinterpret_cast<unsigned long long*>(base + longs[0]);
    space->lists.bid_key = reinterpret_cast<unsigned long long*>(base + longs[1]);
    double** const double_lists[5] = {&space->lists.bid_price, &space->lists.minimum,
                                      &space->lists.matched, &space->lists.excess,
                                      &space->lists.saved};
    for (int k = 0; k < 5; ++k) *double_lists[k] = reinterpret_cast<double*>(base + doubles[k]);
    space->lists.control = reinterpret_cast<Control*>(base + control);
  }
  return layout.used;
}

// The threads that work on one pair, and how they wait for each other.
struct Group {
  int blocks, block;  // 1, 0 unless the launch is cooperative
  bool cooperative;
  __device__ void sync() const {
    if (cooperative && blocks > 1)
      GRID_SYNC();
    else
      __syncthreads();
  }
  __device__ int warps() const { return blocks * int(blockDim.x / 32); }
  __device__ int warp() const { return block * int(blockDim.x / 32) + int(threadIdx.x / 32); }
  __device__ int threads() const { return blocks * int(blockDim.x); }
  __device__ int thread() const { return block * int(blockDim.x) + int(threadIdx.x); }
  __device__ bool leads() const { return block == 0; }
};

__device__ inline int lane() { return int(threadIdx.x % 32); }

template <class T> struct Best {
  T first, second;
  int first_at, second_at;
  unsigned start;  // where this bidder's order of objects begins
  // Ties for the first are broken by an order of all objects, so the scan order does not matter. It
  // starts at another object for every bidder, or all bidders with equal objects would bid for one.
  __device__ bool sooner(int at) const { return unsigned(at) - start < unsigned(first_at) - start; }
  __device__ bool wants(T value, int at) const {
    return value < second || (value == first && sooner(at));
  }
  __device__ bool may_want(T bound) const { return bound < second || bound <= first; }
  __device__ void take(T value, int at) {
    if (value < first || (value == first && sooner(at))) {
      second = first, second_at = first_at;
      first = value, first_at = at;
    } else if (value < second) {
      second = value, second_at = at;
    }
  }
};

constexpr int kNowhere = 0x7fffffff;

struct Shared {
  double team_first[kMaxWarps], team_second[kMaxWarps];
  int team_first_at[kMaxWarps], team_second_at[kMaxWarps];
  int counts[kMaxWarps];
  double sums[kMaxWarps];
};

template <class T, int P> __device__ inline T cost_of(T dx, T dy, T dz) {
  const T square = fused(dz, dz, fused(dy, dy, product(dx, dx)));
  return P == 1 ? root(square) : square;
}

template <class T> struct Place {
  T x, y, z;
};

__device__ inline Place<float> person(const View<float>& view, int i) {
  const float* at = view.people + 3 * size_t(i);
  return {at[0], at[1], at[2]};
}
__device__ inline Place<double> person(const View<double>& view, int i) {
  const double* at = view.x + 3 * size_t(i);
  return {at[0], at[1], at[2]};
}

template <class T, int P> __device__ inline T cost_at(const View<T>& view, Place<T> at, int j) {
  const Object<T> o = view.objects[j];
  return cost_of<T, P>(o.x - at.x, o.y - at.y, o.z - at.z);
}
template <class T, int P> __device__ inline T value_at(const View<T>& view, Place<T> at, int j) {
  return total(cost_at<T, P>(view, at, j), view.objects[j].price);
}

// One warp scans the leaves rank, rank + team, ...; every lane returns the same Best. Only values
// below `second` on entry, or equal to `first`, are considered. With `Both` false only the first
// matters.
template <class T, int P, bool Both>
__device__ Best<T> scan(const View<T>& view, Place<T> at, Best<T> best, int rank, int team) {
  for (int base = rank; base < view.leaves; base += 32 * team) {
    const int leaf = base + lane() * team;
    T bound = infinite<T>();
    if (leaf < view.leaves) {
      const T* box = view.box + leaf;
      const int row = view.leaves;
      const T dx = larger(T(0), larger(box[0] - at.x, at.x - box[3 * row]));
      const T dy = larger(T(0), larger(box[row] - at.y, at.y - box[4 * row]));
      const T dz = larger(T(0), larger(box[2 * row] - at.z, at.z - box[5 * row]));
      bound = total(cost_of<T, P>(dx, dy, dz), box[6 * row]);
    }
    unsigned mask = __ballot_sync(kAll, best.may_want(bound) && bound < infinite<T>());
    while (mask) {
      const int k = __ffs(int(mask)) - 1;
      mask &= mask - 1;
      if (!best.may_want(__shfl_sync(kAll, bound, k))) continue;  // `second` fell after the ballot
      const int j = (base + k * team) * 32 + lane();
      const T value = value_at<T, P>(view, at, j);
      bool open = value < infinite<T>();
      while (true) {
        const unsigned hits = __ballot_sync(kAll, open && best.wants(value, j));
        if (!hits) break;
        const int h = __ffs(int(hits)) - 1;
        if (h == lane()) open = false;
        best.take(__shfl_sync(kAll, value, h), j - lane() + h);
        if (!Both) best.second = best.first;
      }
    }
  }
  return best;
}

// An upper limit plus a tiny number: the object that determined it is then strictly below it.
template <class T> __device__ inline Best<T> sentinel(T limit) {
  const T padded = limit + (limit * (4 * Limits<T>::epsilon) + Limits<T>::smallest);
  return {padded, padded, kNowhere, kNowhere, 0};
}

template <class T> __device__ void refresh_leaf(const View<T>& view, int leaf) {
  T low = view.objects[leaf * 32 + lane()].price;
  for (int step = 16; step > 0; step /= 2) low = smaller(low, __shfl_xor_sync(kAll, low, step));
  if (lane() == 0) view.box[6 * view.leaves + leaf] = low;
}

// Keeps the non-negative of list[0..count) in order at into[0..); all threads of one block call it.
// `into` may be `list` itself. Returns their number.
__device__ int compact(Shared& shared, const int* list, int count, int* into) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  int kept = 0;
  for (int base = 0; base < count; base += blockDim.x) {
    const int at = base + threadIdx.x;
    const int value = at < count ? list[at] : -1;
    const unsigned mask = __ballot_sync(kAll, value >= 0);
    if (lane() == 0) shared.counts[warp] = __popc(mask);
    __syncthreads();
    int before = kept;
    for (int w = 0; w < warps; ++w) {
      if (w == warp && value >= 0) into[before + __popc(mask & ((1u << lane()) - 1))] = value;
      before += shared.counts[w];
    }
    kept = before;
    __syncthreads();
  }
  return kept;
}

// Sum of list[0..count) in an order that depends on `count` and the block's size alone.
__device__ double block_sum(Shared& shared, const double* list, int count) {
  double sum = 0, rest = 0;
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    const double v = list[k], t = sum + v;  // Neumaier
    rest += fabs(sum) >= fabs(v) ? (sum - t) + v : (v - t) + sum;
    sum = t;
  }
  sum += rest;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  __syncthreads();
  if (lane() == 0) shared.sums[threadIdx.x / 32] = sum;
  __syncthreads();
  double all = 0;
  for (int w = 0; w < int(blockDim.x / 32); ++w) all += shared.sums[w];
  return all;
}

// Number of bidders in the next round. All at once (Jacobi) takes up to 6 times the bids of one at
// a time; a quarter of them keeps the warps of a GPU busy while it matters. If most bidders lose,
// because they all want the same few objects, fewer bidders waste fewer bids.
__device__ inline int next_width(int width, int winners) {
  return 2 * winners < width ? larger(16, width / 2) : smaller(1 << 20, 2 * width);
}
__device__ inline int round_size(int todo, int width) {
  return smaller(todo, smaller(larger(32, todo / 4), width));
}

// Bids until everyone has an object or max_bids is used up (then `todo` stays > 0).
template <class T, int P>
__device__ void auction(const View<T>& view, const Lists& lists, Group all, Shared& shared, T eps,
                        long long max_bids) {
  Control& control = *lists.control;
  Group group = all;
  while (true) {
    const int todo = control.todo;
    const long long left = max_bids - control.bids;
    int bidders = round_size(todo, control.width);
    if (bidders > left) bidders = int(left);
    if (bidders <= 0) break;
    // A phase ends with many rounds of few bidders: one block runs them without the others.
    if (group.blocks > 1 && todo <= 32) {
      if (!group.leads()) break;
      group.blocks = 1;
    }
    int team = 1;
    const int warps_a_block = blockDim.x / 32;
    while (2 * team <= warps_a_block && 2 * team * bidders <= group.warps()) team *= 2;
    const int rank = group.warp() % team;
    const int* people = lists.todo + (todo - bidders);
    // A team has at most one bidder, so all threads pass the barrier below once.
    for (int b = group.warp() / team; team > 1 || b < bidders; b += group.warps() / team) {
      Best<T> best{};
      Place<T> at{};
      int i = 0;
      if (b < bidders) {
        i = people[b];
        at = person(view, i);
        const T u = value_at<T, P>(view, at, lists.hint1[i]);
        const T v = value_at<T, P>(view, at, lists.hint2[i]);
        best = sentinel(larger(u, v));
        best.start = unsigned(i) * 2654435761u % unsigned(view.n);
        best = scan<T, P, true>(view, at, best, rank, team);
      }
      if (team > 1) {
        const int warp = threadIdx.x / 32;
        if (lane() == 0) {
          shared.team_first[warp] = double(best.first);
          shared.team_second[warp] = double(best.second);
          shared.team_first_at[warp] = best.first_at;
          shared.team_second_at[warp] = best.second_at;
        }
        __syncthreads();
        if (b < bidders && rank == 0)
          for (int w = warp + 1; w < warp + team; ++w) {
            if (shared.team_first_at[w] != kNowhere)
              best.take(T(shared.team_first[w]), shared.team_first_at[w]);
            if (shared.team_second_at[w] != kNowhere)
              best.take(T(shared.team_second[w]), shared.team_second_at[w]);
          }
      }
      if (b < bidders && rank == 0 && lane() == 0) {
        const int j = best.first_at;
        const T old = view.objects[j].price;
        const T increment = (best.second - best.first) + eps;
        T price = old + increment;
        if (!(price > old)) price = next_up(old);
        lists.hint1[i] = j;
        lists.hint2[i] = best.second_at;
        lists.bid_object[b] = j;
        lists.bid_price[b] = double(price);
        // Positive floats order like their bits; equal increments go to the lower person.
        const unsigned long long key =
            (static_cast<unsigned long long>(__float_as_int(float(increment))) << 32) |
            (0xffffffffull - unsigned(i));
        lists.bid_key[b] = key;
        atomicMax(&lists.key[j], key);
      }
      if (team > 1) break;
    }
    group.sync();
    for (int b = group.thread(); b < bidders; b += group.threads()) {
      const int i = people[b], j = lists.bid_object[b];
      if (lists.key[j] == lists.bid_key[b]) {
        const int evicted = lists.owner[j];
        lists.owner[j] = i;
        lists.object[i] = j;
        if (evicted >= 0) lists.object[evicted] = -1;
        view.objects[j].price = T(lists.bid_price[b]);
        lists.out[b] = evicted;
        atomicAdd(&control.winners, 1);
        lists.key[j] = 0;  // the losers see 0 or the winner's key, never their own
      } else {
        lists.out[b] = i;
        lists.bid_object[b] = -1;
      }
    }
    group.sync();
    for (int b = group.warp(); b < bidders; b += group.warps())
      if (lists.bid_object[b] >= 0) refresh_leaf(view, lists.bid_object[b] / 32);
    if (group.leads()) {
      const int kept = compact(shared, lists.out, bidders, lists.todo + (todo - bidders));
      if (threadIdx.x == 0) {
        control.todo = todo - bidders + kept;
        control.bids += bidders;
        control.width = next_width(bidders, control.winners);
        control.winners = 0;
      }
    }
    group.sync();
  }
  all.sync();
}

// For every person the smallest cost + price, its own cost, and by how much its own is worse.
template <class T, int P>
__device__ void check(const View<T>& view, const Lists& lists, const Group& group) {
  for (int i = group.warp(); i < view.n; i += group.warps()) {
    const int mine = lists.object[i];
    const Place<T> at = person(view, i);
    const T cost = cost_at<T, P>(view, at, mine);
    const T value = total(cost, view.objects[mine].price);
    const Best<T> best = scan<T, P, false>(view, at, sentinel(value), 0, 1);
    if (lane() == 0) {
      lists.minimum[i] = double(best.first);
      lists.matched[i] = double(cost);
      lists.excess[i] = double(value) - double(best.first);
    }
  }
  group.sync();
}

// After max_bids: everyone without an object gets the best free one. Run by one block.
template <class T, int P>
__device__ void finish(const View<T>& view, const Lists& lists, Shared& shared) {
  Control& control = *lists.control;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  for (int j = threadIdx.x; j < view.n; j += blockDim.x) {
    lists.saved[j] = double(view.objects[j].price);
    if (lists.owner[j] >= 0) view.objects[j].price = infinite<T>();
  }
  __syncthreads();
  for (int leaf = warp; leaf < view.leaves; leaf += warps) refresh_leaf(view, leaf);
  __syncthreads();
  for (int k = control.todo - 1; k >= 0; --k) {
    const int i = lists.todo[k];
    Best<T> best = {infinite<T>(), infinite<T>(), kNowhere, kNowhere, 0};
    best = scan<T, P, false>(view, person(view, i), best, warp, warps);
    if (lane() == 0) {
      shared.team_first[warp] = double(best.first);
      shared.team_first_at[warp] = best.first_at;
    }
    __syncthreads();
    for (int w = 0; w < warps; ++w)
      if (shared.team_first_at[w] != kNowhere)
        best.take(T(shared.team_first[w]), shared.team_first_at[w]);
    const int j = best.first_at;
    __syncthreads();
    if (warp == 0) {
      if (lane() == 0) {
        lists.owner[j] = i;
        lists.object[i] = j;
        view.objects[j].price = infinite<T>();
      }
      __syncwarp();
      refresh_leaf(view, j / 32);
    }
    __syncthreads();
  }
  for (int j = threadIdx.x; j < view.n; j += blockDim.x) view.objects[j].price = T(lists.saved[j]);
  __syncthreads();
  for (int leaf = warp; leaf < view.leaves; leaf += warps) refresh_leaf(view, leaf);
  if (threadIdx.x == 0) control.todo = 0;
  __syncthreads();
}

__device__ inline double as_distance(double cost, int p) {
  return p == 1 ? cost : sqrt(larger(0.0, cost));
}

// The absolute gap at which a pair is solved, in scaled units.
__device__ inline double goal(double gap, double distance, double diagonal) {
  return larger(gap * larger(distance, 1e-6 * diagonal), 1e-13 * diagonal);
}

// Sums up a check and decides; run by one block. Afterwards control.state is the next step; for
// kGoOn, people whose object is worse than their best by more than the next epsilon are in todo.
template <class T, int P>
__device__ void decide(const View<T>& view, const Lists& lists, Shared& shared, double gap,
                       double diagonal) {
  constexpr bool kExact = sizeof(T) == 8;
  Control& control = *lists.control;
  const int n = view.n;
  double low = 1e300, high = -1e300;
  for (int j = threadIdx.x; j < n; j += blockDim.x) {
    const double price = double(view.objects[j].price);
    lists.saved[j] = price;
    low = smaller(low, price);
    high = larger(high, price);
  }
  for (int step = 16; step > 0; step /= 2) {
    low = smaller(low, __shfl_xor_sync(kAll, low, step));
    high = larger(high, __shfl_xor_sync(kAll, high, step));
  }
  if (lane() == 0) {
    shared.team_first[threadIdx.x / 32] = low;
    shared.team_second[threadIdx.x / 32] = high;
  }
  __syncthreads();
  for (int w = 0; w < int(blockDim.x / 32); ++w) {
    low = smaller(low, shared.team_first[w]);
    high = larger(high, shared.team_second[w]);
  }
  const double prices = block_sum(shared, lists.saved, n);
  const double mean = block_sum(shared, lists.matched, n) / n;
  const double minimum = block_sum(shared, lists.minimum, n);
  // A minimum is a cost plus a price, neither negative: it is rounded at most 6 times in a row, by
  // half an epsilon of itself each time. block_sum rounds up to 24 times (5 lanes, 16 warps, ends).
  const double margin = kExact ? 16 * kEpsilon64 * (minimum + prices) / n : 0;
  double dual = (minimum - prices) / n - margin;
  dual = larger(0.0, smaller(dual, mean));
  const double distance = as_distance(mean, P), bound = as_distance(dual, P);
  const bool met = distance - bound <= goal(gap, distance, diagonal);
  // The epsilon that should just meet the goal: the gap left by a phase is about 0.55 epsilon.
  double wanted = 1.6 * goal(gap, distance, diagonal);
  if (P == 2) wanted *= 2 * larger(distance, 1e-6 * diagonal);
  const double eps = control.eps;
  double next = larger(eps / 4, wanted);
  if (eps <= wanted * 1.0001) next = eps / 2;
  // Values of about this size get rounded; below 16 steps of float32, float64 goes on.
  const double size = P == 1 ? 1.0 : larger(high - low, 4 * mean);
  const bool exhausted = next < 1e-16 * size;
  const int before = control.state;
  __syncthreads();
  if (threadIdx.x == 0) {
    control.primal = distance;
    control.dual = bound;
    // Not `goal`, which stops at the resolution of float64.
    control.converged = distance - bound <= gap * larger(distance, 1e-6 * diagonal);
    control.next = next;
    if (kExact)
      control.state = met || before == kLimit || exhausted ? kDone : kGoOn;
    else
      control.state = met || exhausted ? kEstimated : kGoOn;
  }
  __syncthreads();
  if (control.state != kGoOn) return;
  for (int i = threadIdx.x; i < n; i += blockDim.x) lists.out[i] = lists.excess[i] > next ? i : -1;
  __syncthreads();
  const int dropped = compact(shared, lists.out, n, lists.todo);
  __syncthreads();
  for (int k = threadIdx.x; k < dropped; k += blockDim.x) {
    const int i = lists.todo[k];
    lists.owner[lists.object[i]] = -1;
    lists.object[i] = -1;
  }
  if (threadIdx.x == 0) {
    control.todo = dropped;
    control.eps = next;
    if (!kExact && next < 16 * 6e-8 * size) control.state = kCoarse;
  }
  __syncthreads();
}

__device__ inline float coordinate(const View<float>& view, const double* cloud, int i, int axis) {
  return float(cloud[3 * size_t(i) + axis] - view.centre[axis]);
}
__device__ inline double coordinate(const View<double>&, const double* cloud, int i, int axis) {
  return cloud[3 * size_t(i) + axis];
}

// Objects, boxes and prices (from `prices`, or 0).
template <class T>
__device__ void build(const View<T>& view, const Object<float>* prices, Group group) {
  for (int leaf = group.warp(); leaf < view.leaves; leaf += group.warps()) {
    const int j = leaf * 32 + lane();
    const bool real = j < view.n;
    Object<T> object = {0, 0, 0, infinite<T>()};
    T low[3], high[3];
    if (real) {
      object.x = coordinate(view, view.y, j, 0);
      object.y = coordinate(view, view.y, j, 1);
      object.z = coordinate(view, view.y, j, 2);
      object.price = prices ? T(prices[j].price) : T(0);
    }
    const T at[3] = {object.x, object.y, object.z};
    for (int a = 0; a < 3; ++a) {
      low[a] = real ? at[a] : infinite<T>();
      high[a] = real ? at[a] : -infinite<T>();
      for (int step = 16; step > 0; step /= 2) {
        low[a] = smaller(low[a], __shfl_xor_sync(kAll, low[a], step));
        high[a] = larger(high[a], __shfl_xor_sync(kAll, high[a], step));
      }
      if (lane() == 0) {
        view.box[a * view.leaves + leaf] = low[a];
        view.box[(3 + a) * view.leaves + leaf] = high[a];
      }
    }
    view.objects[j] = object;
    __syncwarp();
    refresh_leaf(view, leaf);
  }
}

template <class T> __device__ inline void round_people(const View<T>&, const Group&) {}
template <> __device__ inline void round_people(const View<float>& view, const Group& group) {
  for (int i = group.thread(); i < view.n; i += group.threads())
    for (int a = 0; a < 3; ++a) view.people[3 * size_t(i) + a] = coordinate(view, view.x, i, a);
}

__device__ inline View<float>& pick(Space& space, float) { return space.rough; }
__device__ inline View<double>& pick(Space& space, double) { return space.exact; }

// The float32 kernel starts a pair; the float64 kernel certifies or continues, and writes results.
template <class T, int P> __global__ void __launch_bounds__(kThreads, 1) solve(Problem problem) {
  constexpr bool kExact = sizeof(T) == 8;
  BLOCK_SHARED(Shared, shared);
  const bool cooperative = problem.pair >= 0;
  const size_t pair = cooperative ? problem.pair : blockIdx.x;
  const Group group = {cooperative ? int(gridDim.x) : 1, cooperative ? int(blockIdx.x) : 0,
                       cooperative};
  const int n = problem.n;
  const double diagonal = problem.diagonal[pair];
  Space space;
  slice(problem.workspace + pair * problem.stride, n, &space);
  View<T>& view = pick(space, T());
  view.x = problem.x + pair * n * 3;
  view.y = problem.y + pair * n * 3;
  view.centre = problem.centre + pair * 3;
  const Lists& lists = space.lists;
  Control& control = *lists.control;

  const bool trivial = n == 1 || diagonal == 0;
  if (!kExact && !trivial) {
    build(view, nullptr, group);
    round_people(view, group);
    for (int i = group.thread(); i < n; i += group.threads()) {
      lists.owner[i] = lists.object[i] = -1;
      // Both clouds are in the same kind of order, so the same position is a fair first guess.
      lists.hint1[i] = i;
      lists.hint2[i] = i > 0 ? i - 1 : 1;
      lists.todo[i] = n - 1 - i;
      lists.key[i] = 0;
    }
    if (group.thread() == 0) {
      control = Control{};
      control.todo = n;
      control.width = 32;
      control.eps = 0.05 * (P == 1 ? diagonal : diagonal * diagonal);
      control.state = kGoOn;
    }
    group.sync();
  }
  if (kExact && !trivial) {
    build(view, space.rough.objects, group);
    group.sync();
    if (control.state == kEstimated || control.state == kLimit) {
      check<T, P>(view, lists, group);
      if (group.leads()) decide<T, P>(view, lists, shared, problem.gap, diagonal);
      group.sync();
    } else {
      group.sync();
      if (group.thread() == 0) control.state = kGoOn;
      group.sync();
    }
  }
  while (!trivial && control.state == kGoOn) {
    auction<T, P>(view, lists, group, shared, T(control.eps), problem.max_bids);
    const bool limited = control.todo > 0;
    group.sync();
    if (group.leads()) {
      if (limited) finish<T, P>(view, lists, shared);
      if (threadIdx.x == 0) {
        control.phases += 1;
        if (limited) control.state = kLimit;
      }
    }
    group.sync();
    if (limited && !kExact) break;
    check<T, P>(view, lists, group);
    if (group.leads()) decide<T, P>(view, lists, shared, problem.gap, diagonal);
    group.sync();
  }
  if constexpr (kExact) {
    for (int i = group.thread(); i < n; i += group.threads()) {
      problem.assignment[pair * n + i] = trivial ? i : lists.object[i];
      problem.prices[pair * n + i] = trivial ? 0 : double(view.objects[i].price);
    }
    if (group.thread() != 0) return;
    double distance = control.primal, bound = control.dual;
    if (trivial) {
      const double* x = view.x;
      const double* y = view.y;
      const double cost = cost_of<double, P>(y[0] - x[0], y[1] - x[1], y[2] - x[2]);
      distance = diagonal == 0 ? 0 : as_distance(cost, P);
      bound = distance;
    }
    problem.distance[pair] = distance;
    problem.bound[pair] = bound;
    problem.bids[pair] = trivial ? 0 : control.bids;
    problem.phases[pair] = trivial ? 0 : control.phases;
    problem.converged[pair] = trivial || control.converged;
  }
}

template <class Kernel>
cudaError_t launch(Kernel kernel, Problem problem, int pairs, int blocks, int threads,
                   cudaStream_t stream) {
  if (blocks == 0) {
    problem.pair = -1;
    return LAUNCH(kernel, pairs, threads, stream, problem);
  }
  for (int pair = 0; pair < pairs; ++pair) {
    problem.pair = pair;
    const cudaError_t code = launch_cooperative(kernel, blocks, threads, stream, problem);
    if (code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

// Blocks of a cooperative launch for `pairs`, or 0 if one block per pair fills the GPU as well.
cudaError_t cooperative_blocks(int n, int pairs, int* blocks) {
  int device = 0, multiprocessors = 0, able = 0;
  cudaError_t code = cudaGetDevice(&device);
  if (code == cudaSuccess)
    code = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (code == cudaSuccess)
    code = cudaDeviceGetAttribute(&able, cudaDevAttrCooperativeLaunch, device);
  if (code != cudaSuccess) return code;
  // A round has at most a quarter of the people as bidders, one warp each.
  const int useful = (n / 4 + kThreads / 32 - 1) / (kThreads / 32);
  *blocks = useful < multiprocessors ? useful : multiprocessors;
  // Eight pairs in sequence on all multiprocessors take about as long as in parallel on one
  // each: the tails of the phases are serial either way. Estimated, not timed.
  if (!able || pairs >= 8 || *blocks < 2) *blocks = 0;
  return cudaSuccess;
}

}  // namespace

extern "C" {

// Bytes of workspace for `pairs` pairs of clouds of n points.
EXPORT size_t vitapack_emd_workspace(int n, int pairs) {
  return slice(nullptr, n, nullptr) * size_t(pairs);
}

// Enqueues the work on `stream`; all pointers are device memory as in Problem, of the current
// device. `blocks`: of a cooperative launch, 0 for one block per pair, -1 to choose. `threads`:
// a power of two from 32 to 512, 0 to choose. Returns the cudaError_t of the launches only.
EXPORT int vitapack_emd_solve(const double* x, const double* y, const double* centre,
                              const double* diagonal, int pairs, int n, int p, double gap,
                              long long max_bids, void* workspace, size_t workspace_bytes,
                              double* distance, double* bound, int* assignment, double* prices,
                              long long* bids, int* phases, int* converged, int blocks, int threads,
                              void* stream) {
  if (threads == 0) threads = kThreads;
  // Teams of warps are powers of two, and must not reach into the next block.
  const bool whole_teams = threads >= 32 && threads <= kThreads && (threads & (threads - 1)) == 0;
  if (pairs < 1 || n < 1 || n > (1 << 28) || (p != 1 && p != 2) || !whole_teams ||
      workspace_bytes < vitapack_emd_workspace(n, pairs))
    return cudaErrorInvalidValue;
  Problem problem{};
  problem.x = x, problem.y = y, problem.centre = centre, problem.diagonal = diagonal;
  problem.workspace = static_cast<unsigned char*>(workspace);
  problem.stride = slice(nullptr, n, nullptr);
  problem.distance = distance, problem.bound = bound, problem.prices = prices;
  problem.assignment = assignment, problem.bids = bids, problem.phases = phases;
  problem.converged = converged;
  problem.max_bids = max_bids, problem.gap = gap, problem.n = n;
  if (blocks < 0) {
    const cudaError_t code = cooperative_blocks(n, pairs, &blocks);
    if (code != cudaSuccess) return code;
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaError_t code = p == 1 ? launch(solve<float, 1>, problem, pairs, blocks, threads, on)
                            : launch(solve<float, 2>, problem, pairs, blocks, threads, on);
  if (code != cudaSuccess) return code;
  return p == 1 ? launch(solve<double, 1>, problem, pairs, blocks, threads, on)
                : launch(solve<double, 2>, problem, pairs, blocks, threads, on);
}

EXPORT const char* vitapack_cuda_message(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
