// Runs a CUDA source file on a CPU, one fiber a thread, to find its logic errors without a GPU.
//
//   g++ -x c++ -DCUDA_ON_CPU -Itests/kernels kernel.cu
//
// All threads of a launch live at the same time on one OS thread and switch only where CUDA makes
// them wait: barriers and warp operations. The order in which waiting threads go on is a parameter
// (cuda_on_cpu_order: 0 forward, 1 reversed, other values seed a random order); a kernel whose
// result depends on it has a race. Shared memory is poisoned before each block.
// A launch fails, with a message, on
//   - __syncthreads or a warp operation met at different source lines, or by a part of the block
//     while the rest has exited or waits elsewhere (deadlock);
//   - a lane outside the mask of the warp operation it executes, or a mask that names exited lanes;
//   - a cooperative barrier that a part of the grid does not reach;
//   - an access to memory that is not mapped.
// It shows nothing about memory ordering between barriers that real hardware would reorder, bank
// conflicts, occupancy, registers, or the rounding of fused operations the compiler chooses.

#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define EXPORT __attribute__((visibility("default")))

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch };
using cudaStream_t = void*;
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_on_cpu {

inline int order = 0;
inline std::string message;

struct Block;
struct Fiber {
  dim3 thread, block;
  Block* home = nullptr;
  int lane = 0, warp = 0;
  bool finished = false;
  unsigned operations = 0;  // warp operations so far: chooses the buffer
  void* stack = nullptr;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Waiting {
  std::vector<Fiber*> fibers;
  int line = 0;
};

struct Warp {
  Waiting waiting;
  unsigned mask = 0, arrived = 0, size = 0;
  unsigned finished = 0;
  std::uint64_t values[2][32];
};

struct Block {
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  Waiting barrier;
  int alive = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber*> ready;
  std::size_t head = 0;
  Waiting grid;
  int alive = 0;
  bool cooperative = false, failed = false;
  Fiber* current = nullptr;
  std::function<void()> body;
  std::uint64_t random = 0;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
};

inline Machine* machine = nullptr;
constexpr std::size_t kStack = 256 * 1024;
constexpr std::size_t kShared = 48 * 1024;  // a block's static limit
inline dim3 block_size, grid_size;

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, stores its pointer in *from and takes up `to`.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
__asm__(
    ".text\n.weak cuda_on_cpu_switch\n.hidden cuda_on_cpu_switch\n"
    ".type cuda_on_cpu_switch,@function\ncuda_on_cpu_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size cuda_on_cpu_switch,.-cuda_on_cpu_switch\n");
#endif

inline void to_scheduler() {
  Fiber* self = machine->current;
#if defined(__x86_64__)
  cuda_on_cpu_switch(&self->pointer, machine->scheduler);
#else
  swapcontext(&self->context, &machine->scheduler);
#endif
}

inline void resume(Fiber* fiber) {
  machine->current = fiber;
#if defined(__x86_64__)
  cuda_on_cpu_switch(&machine->scheduler, fiber->pointer);
#else
  swapcontext(&machine->scheduler, &fiber->context);
#endif
  machine->current = nullptr;
}

// Never returns: the launch is given up, and its fibers with it.
[[noreturn]] inline void fail(const std::string& what) {
  const Fiber* self = machine->current;
  message = what + " (block " + std::to_string(self->block.x) + ", thread " +
            std::to_string(self->thread.x) + ")";
  machine->failed = true;
  to_scheduler();
  std::abort();
}

inline void release(Waiting& waiting) {
  for (Fiber* fiber : waiting.fibers) machine->ready.push_back(fiber);
  waiting.fibers.clear();
}

inline void wait(Waiting& waiting, int line, const char* what) {
  if (!waiting.fibers.empty() && waiting.line != line)
    fail(std::string(what) + " at line " + std::to_string(line) + " while others wait at line " +
         std::to_string(waiting.line));
  waiting.line = line;
  waiting.fibers.push_back(machine->current);
}

inline void barrier(int line) {
  Block& block = *machine->current->home;
  wait(block.barrier, line, "__syncthreads");
  if (int(block.barrier.fibers.size()) == block.alive) {
    if (block.alive != int(block_size.x)) fail("__syncthreads after some threads have exited");
    release(block.barrier);
  }
  to_scheduler();
}

inline void grid_barrier(int line) {
  if (!machine->cooperative) fail("grid barrier in a launch that is not cooperative");
  wait(machine->grid, line, "grid barrier");
  if (int(machine->grid.fibers.size()) == machine->alive) {
    if (machine->alive != int(machine->fibers.size()))
      fail("grid barrier after threads have exited");
    release(machine->grid);
  }
  to_scheduler();
}

// Every lane of `mask` brings a value; returns the buffer of all 32 once they are all there.
inline const std::uint64_t* exchange(unsigned mask, std::uint64_t value, int line) {
  Fiber* self = machine->current;
  Warp& warp = self->home->warps[self->warp];
  const unsigned me = 1u << self->lane;
  if (!(mask & me)) fail("warp operation by a lane outside its mask, line " + std::to_string(line));
  if ((mask & warp.size) & warp.finished)
    fail("warp operation that names exited lanes, line " + std::to_string(line));
  if (warp.arrived && warp.mask != mask)
    fail("warp operation with different masks, line " + std::to_string(line));
  warp.mask = mask;
  // Two buffers are enough: a lane can be at most one operation ahead of another.
  std::uint64_t* values = warp.values[self->operations++ & 1];
  values[self->lane] = value;
  wait(warp.waiting, line, "warp operation");
  warp.arrived |= me;
  if (warp.arrived == (mask & warp.size)) {
    warp.arrived = 0;
    release(warp.waiting);
  }
  to_scheduler();
  return values;
}

template <class T> std::uint64_t pack(T value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T> T unpack(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T> T shuffle(unsigned mask, T value, int from, int line) {
  return unpack<T>(exchange(mask, pack(value), line)[from & 31]);
}
template <class T> T shuffle_xor(unsigned mask, T value, int bits, int line) {
  const int lane = machine->current->lane;  // before the switch: `current` changes
  return unpack<T>(exchange(mask, pack(value), line)[(lane ^ bits) & 31]);
}
inline unsigned ballot(unsigned mask, bool value, int line) {
  const std::uint64_t* values = exchange(mask, value, line);
  unsigned bits = 0;
  for (int k = 0; k < 32; ++k)
    if (mask >> k & 1) bits |= unsigned(values[k] & 1) << k;
  return bits;
}

inline void enter() {
  machine->body();
  Fiber* self = machine->current;
  self->finished = true;
  Block& block = *self->home;
  block.warps[self->warp].finished |= 1u << self->lane;
  --block.alive;
  --machine->alive;
  to_scheduler();
  std::abort();
}

inline sigjmp_buf after_crash;

// A wild access in a fiber ends the launch, as it does on a GPU, and not the process.
inline void crashed(int) { siglongjmp(after_crash, 1); }

struct CrashGuard {
  struct sigaction segv, bus;
  stack_t old_stack;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  CrashGuard() {
    stack_t mine{};
    mine.ss_sp = stack.data(), mine.ss_size = stack.size();
    sigaltstack(&mine, &old_stack);
    struct sigaction action {};
    action.sa_handler = crashed;
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
  }
  ~CrashGuard() {
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

inline Fiber* next_ready() {
  Machine& m = *machine;
  const std::size_t left = m.ready.size() - m.head;
  if (left == 0) return nullptr;
  if (order == 1) {  // the last that became ready goes first
    Fiber* fiber = m.ready.back();
    m.ready.pop_back();
    return fiber;
  }
  if (order > 1) {
    m.random = m.random * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(m.ready[m.head], m.ready[m.head + (m.random >> 33) % left]);
  }
  Fiber* fiber = m.ready[m.head++];
  if (m.head > 4096) {
    m.ready.erase(m.ready.begin(), m.ready.begin() + std::ptrdiff_t(m.head));
    m.head = 0;
  }
  return fiber;
}

inline cudaError_t run(dim3 grid, dim3 threads, bool cooperative, std::function<void()> body) {
  if (threads.x == 0 || threads.x > 1024 || grid.x == 0) return cudaErrorInvalidValue;
  message.clear();
  grid_size = grid, block_size = threads;
  // Blocks that need not meet run one after the other, in an order of their own.
  const unsigned together = cooperative ? grid.x : 1;
  for (unsigned start = 0; start < grid.x; start += together) {
    const unsigned first = order == 1 && !cooperative ? grid.x - 1 - start : start;
    Machine now;
    machine = &now;
    now.cooperative = cooperative;
    now.body = body;
    now.random = std::uint64_t(order) * 7919 + first;
    for (unsigned b = 0; b < together; ++b) {
      auto block = std::make_unique<Block>();
      block->shared.assign(kShared + 64, 0xff);
      block->alive = int(threads.x);
      block->warps.resize((threads.x + 31) / 32);
      for (unsigned t = 0; t < threads.x; ++t) {
        auto fiber = std::make_unique<Fiber>();
        fiber->thread.x = t, fiber->block.x = first + b;
        fiber->thread.y = fiber->thread.z = fiber->block.y = fiber->block.z = 0;
        fiber->home = block.get();
        fiber->lane = int(t % 32), fiber->warp = int(t / 32);
        block->warps[t / 32].size |= 1u << (t % 32);
        fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (fiber->stack == MAP_FAILED) return cudaErrorLaunchFailure;
#if defined(__x86_64__)
        // The stack pointer must be 16 k + 8 where a function is entered.
        void** top = reinterpret_cast<void**>(static_cast<char*>(fiber->stack) + kStack) - 2;
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(&enter);
        for (int k = 0; k < 6; ++k) *--top = nullptr;
        fiber->pointer = top;
#else
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack;
        fiber->context.uc_stack.ss_size = kStack;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, &enter, 0);
#endif
        now.ready.push_back(fiber.get());
        now.fibers.push_back(std::move(fiber));
      }
      now.blocks.push_back(std::move(block));
    }
    now.alive = int(now.fibers.size());
    CrashGuard guard;
    if (sigsetjmp(after_crash, 1) == 0) {
      while (Fiber* fiber = next_ready()) {
        resume(fiber);
        if (now.failed) break;
      }
    } else {
      now.failed = true;
      message = "access to memory that is not mapped";
    }
    if (!now.failed && now.alive > 0) {
      now.failed = true;
      message = "deadlock: " + std::to_string(now.alive) + " threads wait";
      for (const auto& block : now.blocks) {
        if (!block->barrier.fibers.empty())
          message += "; " + std::to_string(block->barrier.fibers.size()) + " of a block of " +
                     std::to_string(threads.x) + " at __syncthreads, line " +
                     std::to_string(block->barrier.line);
        for (const auto& warp : block->warps)
          if (!warp.waiting.fibers.empty())
            message += "; " + std::to_string(warp.waiting.fibers.size()) +
                       " lanes at a warp operation, line " + std::to_string(warp.waiting.line);
      }
      if (!now.grid.fibers.empty())
        message += "; " + std::to_string(now.grid.fibers.size()) + " at the grid barrier, line " +
                   std::to_string(now.grid.line);
    }
    for (const auto& fiber : now.fibers) munmap(fiber->stack, kStack);
    machine = nullptr;
    if (now.failed) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline unsigned char* shared_memory(std::size_t bytes) {
  if (bytes > kShared) fail("more than 48 KiB of shared memory");
  unsigned char* raw = machine->current->home->shared.data();
  return raw + (64 - reinterpret_cast<std::uintptr_t>(raw) % 64) % 64;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::machine->current->thread)
#define blockIdx (cuda_on_cpu::machine->current->block)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)
// At most one in a kernel.
#define BLOCK_SHARED(type, name) \
  type& name = *reinterpret_cast<type*>(cuda_on_cpu::shared_memory(sizeof(type)))
#define GRID_SYNC() cuda_on_cpu::grid_barrier(__LINE__)
#define __syncthreads() cuda_on_cpu::barrier(__LINE__)
#define __syncwarp() cuda_on_cpu::exchange(0xffffffffu, 0, __LINE__)
#define __shfl_sync(mask, value, from) cuda_on_cpu::shuffle(mask, value, from, __LINE__)
#define __shfl_xor_sync(mask, value, bits) cuda_on_cpu::shuffle_xor(mask, value, bits, __LINE__)
#define __ballot_sync(mask, value) cuda_on_cpu::ballot(mask, value, __LINE__)
#define LAUNCH(kernel, blocks, threads, stream, problem)                                    \
  ((void)(stream), cuda_on_cpu::run(dim3{unsigned(blocks)}, dim3{unsigned(threads)}, false, \
                                    [=] { kernel(problem); }))

template <class K, class A>
cudaError_t launch_cooperative(K kernel, unsigned blocks, unsigned threads, cudaStream_t,
                               A problem) {
  return cuda_on_cpu::run(dim3{blocks}, dim3{threads}, true, [=] { kernel(problem); });
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __int_as_float(int v) { return cuda_on_cpu::unpack<float>(cuda_on_cpu::pack(v)); }
inline int __float_as_int(float v) { return cuda_on_cpu::unpack<int>(cuda_on_cpu::pack(v)); }
inline double __longlong_as_double(long long v) {
  return cuda_on_cpu::unpack<double>(cuda_on_cpu::pack(v));
}
inline long long __double_as_longlong(double v) {
  return cuda_on_cpu::unpack<long long>(cuda_on_cpu::pack(v));
}
template <class T> T atomicMax(T* at, T value) {
  const T old = *at;
  *at = std::max(old, value);
  return old;
}
template <class T> T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
using std::fabs;
using std::sqrt;

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 1;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t code) {
  if (code == cudaSuccess) return "no error";
  return cuda_on_cpu::message.empty() ? "invalid value" : cuda_on_cpu::message.c_str();
}

extern "C" {
EXPORT void cuda_on_cpu_order(int order) { cuda_on_cpu::order = order; }
}
