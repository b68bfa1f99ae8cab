// The engine's threads, and the scratch of stand-alone functions.
//
// Nothing is shared between callers: two pipelines in one process never wait for each other. A job
// borrows a pool for its length, and as many pools exist as there were callers at the same time; one
// caller gets the same pool every time. So two callers of 8 threads each use 16 cores, and with
// fewer cores the system divides them, as between OpenMP's teams. (With a single pool, the second
// caller had one core of 16 until the first was done.)
//
// Made for cores that are shared: waiting is a bounded spin (about 100 us, more than the serial parts
// between two phases of a network, or the Python between two calls, take) and then a condition
// variable, units are handed out one by one, and a caller never waits for a worker that has not
// started: once all units are taken the job is closed, and a thread that wakes late finds it closed.
// A spinning barrier instead made oneDNN 60 times slower on a machine of two cores when another
// process used the second one.

#include "engine.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#ifdef VITAPACK_X86
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifndef _WIN32
#include <unistd.h>
#endif

namespace vitapack {
namespace {

constexpr int kSpins = 2500;  // of about 40 ns each

void relax() {
#ifdef VITAPACK_X86
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

long process() {
#ifdef _WIN32
  return 0;
#else
  return long(getpid());
#endif
}

class Pool {
 public:
  void run(int threads, std::int64_t units, void (*job)(void*, std::int64_t, int), void* context) {
    grow(threads - 1);
    job_ = job;
    context_ = context;
    units_ = units;
    wanted_ = threads;
    next_.store(0, std::memory_order_relaxed);
    state_.fetch_and(~kClosed, std::memory_order_release);
    {
      std::lock_guard<std::mutex> hold(mutex_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_units(0);
    state_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int i = 0; i < kSpins; ++i) {
      if (state_.load(std::memory_order_acquire) == kClosed) return;
      relax();
    }
    std::unique_lock<std::mutex> hold(mutex_);
    left_.wait(hold, [&] { return state_.load(std::memory_order_acquire) == kClosed; });
  }

 private:
  // The number of workers inside the current job, and whether it is closed to others.
  static constexpr std::uint32_t kClosed = 1u << 31;

  void take_units(int thread) {
    for (;;) {
      const std::int64_t unit = next_.fetch_add(1, std::memory_order_relaxed);
      if (unit >= units_) return;
      job_(context_, unit, thread);
    }
  }

  void grow(int workers) {
    while (int(workers_) < workers) {
      try {
        // Detached: workers sleep until the process ends, and a static destructor that joined
        // them would hang in a forked child, where they do not exist.
        std::thread([this, index = int(workers_) + 1] { work(index); }).detach();
      } catch (const std::system_error&) {
        return;  // fewer threads suffice
      }
      ++workers_;
    }
  }

  void work(int index) {
    std::uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++i) relax();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> hold(mutex_);
        wake_.wait(hold, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
      }
      seen = epoch_.load(std::memory_order_acquire);
      const bool open = !(state_.fetch_add(1, std::memory_order_acq_rel) & kClosed);
      // Inside an open job its fields cannot change: the caller waits for us to leave.
      if (open && index < wanted_) take_units(index);
      if (state_.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1)) {
        std::lock_guard<std::mutex> hold(mutex_);
        left_.notify_all();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<std::uint32_t> state_{kClosed};
  std::atomic<std::int64_t> next_{0};
  std::int64_t units_ = 0;
  int wanted_ = 0;
  int workers_ = 0;
  void (*job_)(void*, std::int64_t, int) = nullptr;
  void* context_ = nullptr;
};

// A place's holder is the process that holds it: in the child of a fork, whose other threads do not
// exist, what they held is free. No lock, which a fork could leave locked for ever.
template <class T> struct Place {
  std::atomic<long> holder{0};
  T kept;

  bool take(long self) {
    long seen = holder.load(std::memory_order_relaxed);
    return seen != self && holder.compare_exchange_strong(seen, self, std::memory_order_acquire);
  }
  void give_back() { holder.store(0, std::memory_order_release); }
};

constexpr int kCallers = 64;

template <class T> Place<T>* take(Place<T> (&places)[kCallers]) {
  const long self = process();
  for (Place<T>& place : places)
    if (place.take(self)) return &place;
  return nullptr;
}

struct Team {
  Pool* pool = nullptr;  // never deleted: its workers are never joined
  long owner = 0;
};

Place<Team> teams[kCallers];
Place<Buffer> buffers[kCallers];

}  // namespace

void parallel_for(int threads, std::int64_t units, void (*job)(void*, std::int64_t, int),
                  void* context) {
  if (std::int64_t(threads) > units) threads = int(units);
  Place<Team>* place = threads > 1 ? take(teams) : nullptr;
  if (!place) {  // one thread, or more callers than places
    for (std::int64_t unit = 0; unit < units; ++unit) job(context, unit, 0);
    return;
  }
  Team& team = place->kept;
  if (team.owner != process()) {  // first use, or the child of a fork, which has no workers
    team.pool = new Pool;
    team.owner = process();
  }
  team.pool->run(threads, units, job, context);
  place->give_back();
}

Scratch::Scratch(std::size_t bytes) {
  Place<Buffer>* place = take(buffers);
  place_ = place;
  Buffer& buffer = place ? place->kept : own_;
  if (buffer.bytes() < bytes) {
    buffer = Buffer();  // first, so that old and new memory never coexist
    buffer = Buffer(bytes);
  }
  data_ = buffer.as<void>();
}

Scratch::~Scratch() {
  if (place_) static_cast<Place<Buffer>*>(place_)->give_back();
}

Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  // 2 MiB alignment lets large buffers use huge pages: the panels of a layer are read in strides.
  const std::size_t align = bytes >= (std::size_t(4) << 20) ? std::size_t(2) << 20 : 64;
  const std::size_t whole = (bytes + align - 1) / align * align;
  data_ = ::operator new(whole, std::align_val_t(align));
#ifdef __linux__
  if (align > 64) madvise(data_, whole, MADV_HUGEPAGE);
#endif
  std::memset(data_, 0, bytes);
}

Buffer::~Buffer() {
  if (!data_) return;
  const std::size_t align = bytes_ >= (std::size_t(4) << 20) ? std::size_t(2) << 20 : 64;
  ::operator delete(data_, std::align_val_t(align));
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace vitapack
