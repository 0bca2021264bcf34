// Runs CUDA kernels on a CPU: with this folder before others on the include path, a .cu file compiles as C++, after
// torch's headers. Its ops are then registered as `ddpo_fast_emulated`, for tensors on the CPU.
//
// Blocks run one after the other, and the threads of a block one at a time, as fibers that change where a thread waits
// for others. What a GPU may do in any order happens here in an order that shows faults: shared memory is NaN before a
// block starts, bytes beyond what a launch asked for must not change, asynchronous copies arrive when they are waited
// for and not before, and threads run forwards or backwards. Threads that wait at different barriers are an error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define CUDA CPU
#define ddpo_fast_csrc ddpo_fast_emulated
#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
constexpr int WARP = 32;
constexpr size_t MOST_SHARED_BYTES = 232448;
constexpr size_t STACK_BYTES = 65536;
constexpr unsigned char UNWRITTEN = 0xff;  // in all bytes of a number of any dtype it is NaN
}  // namespace emulated

namespace ddpo_fast {
__align__(16) unsigned char shared_memory[emulated::MOST_SHARED_BYTES];
}

namespace emulated {

// of the device; by default an H100's
inline int shared_bytes = MOST_SHARED_BYTES, processors = 132;
inline bool backwards = false;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  bool done = false;
  // groups of copies that have not arrived, the last of which is not committed yet
  std::deque<std::vector<Copy>> copies{1};
};

struct Barrier {
  unsigned threads, arrived = 0, passed = 0;
};

struct Warp {
  Barrier barrier{WARP};
  float values[WARP];
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline std::function<void()> kernel;
// whether a thread has ended or passed a barrier since the scheduler last looked
inline bool progress;
inline std::exception_ptr error;

inline void wait(Barrier& barrier) {
  const unsigned before = barrier.passed;
  if (++barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    ++barrier.passed;
    progress = true;
  }
  while (barrier.passed == before) swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void run_thread() {
  try {
    kernel();
  } catch (...) {
    // of a thread's stack, which has no caller
    error = std::current_exception();
  }
  fibers[threadIdx.x].done = progress = true;
}

inline void run_block() {
  const unsigned threads = blockDim.x;
  fibers = std::vector<Fiber>(threads);
  warps = std::vector<Warp>(threads / WARP);
  block = {threads};
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_thread, 0);
  }
  unsigned running = threads;
  while (running) {
    progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = backwards ? threads - 1 - i : i;
      Fiber& fiber = fibers[threadIdx.x];
      if (fiber.done) continue;
      swapcontext(&scheduler, &fiber.context);
      running -= fiber.done;
      if (error) std::rethrow_exception(std::exchange(error, nullptr));
    }
    if (!progress) throw std::runtime_error("the threads of a block wait at different barriers");
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  emulated::Warp& warp = emulated::warps[threadIdx.x / emulated::WARP];
  const unsigned lane = threadIdx.x % emulated::WARP;
  warp.values[lane] = value;
  emulated::wait(warp.barrier);
  const float other = warp.values[lane ^ mask];
  emulated::wait(warp.barrier);
  return other;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  for (const void* address : {static_cast<const void*>(to), from})
    if (reinterpret_cast<uintptr_t>(address) % bytes) throw std::runtime_error("a copy is not aligned");
  emulated::fibers[threadIdx.x].copies.back().push_back({to, from, bytes});
}

inline void __pipeline_commit() { emulated::fibers[threadIdx.x].copies.emplace_back(); }

inline void __pipeline_wait_prior(size_t groups) {
  auto& copies = emulated::fibers[threadIdx.x].copies;
  for (; copies.size() > groups + 1; copies.pop_front())
    for (const emulated::Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulated {
// the dynamic shared memory that kernels may use; 48 KB unless they have asked for more
inline std::map<const void*, size_t> allowed;
}  // namespace emulated

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount ? emulated::processors : emulated::shared_bytes;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulated::shared_bytes) return cudaErrorInvalidValue;
  emulated::allowed[kernel] = bytes;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const auto found = emulated::allowed.find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = found == emulated::allowed.end() ? 49152 : found->second, bytes = config->dynamicSmemBytes;
  if (bytes > allowed || config->blockDim.x % emulated::WARP || config->gridDim.y > 65535) return cudaErrorInvalidValue;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulated::kernel = [&] { kernel(arguments...); };
  unsigned char* const shared = ddpo_fast::shared_memory;
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      std::memset(shared, emulated::UNWRITTEN, emulated::MOST_SHARED_BYTES);
      emulated::run_block();
      for (size_t i = bytes; i < emulated::MOST_SHARED_BYTES; ++i)
        if (shared[i] != emulated::UNWRITTEN) throw std::runtime_error("a block wrote beyond its shared memory");
    }
  return cudaSuccess;
}

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return AOTI_TORCH_SUCCESS; }

// Sets the shared memory of a block in bytes, the multiprocessors, and the order in which threads run.
extern "C" void emulate_device(int shared_bytes, int processors, bool backwards) {
  emulated::shared_bytes = shared_bytes;
  emulated::processors = processors;
  emulated::backwards = backwards;
}
