// Launching on a device: what a launch needs to know beforehand, and what an error means.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "barrier.hpp"
#include "status.hpp"

namespace fused_dni::cuda {
namespace {

// Errors after which the process cannot use the device any more (CUDA Runtime API, cudaError).
bool is_sticky(cudaError_t error) {
  switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure: return true;
    default: return false;
  }
}

std::string capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return "of this device";
  return std::to_string(major) + std::to_string(minor);
}

// Whether it went well; otherwise what to do about it, and the runtime forgets it.
bool settled(cudaError_t error, Status& status) {
  if (error == cudaSuccess) return true;
  status.code = error;
  status.name = cudaGetErrorName(error);
  status.text = cudaGetErrorString(error);
  status.lost = is_sticky(error);
  if (status.lost) {
    status.text +=
        "; a kernel before this one, of this library or another, has failed and left the device "
        "unusable to this process, which has to be started again (CUDA_LAUNCH_BLOCKING=1 or "
        "compute-sanitizer tell which kernel)";
  } else if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    status.text += "; built with CUDA " + version(CUDART_VERSION) +
                   (driver ? ", the driver is for " + version(driver) : ", no driver was found");
  } else if (error == cudaErrorNoKernelImageForDevice) {
    status.text += "; built for compute capabilities " FUSED_DNI_ARCHITECTURES ", not for " +
                   capability() + ": install again with FUSED_DNI_CUDA_ARCHS set to it";
  }
  cudaGetLastError();
  return false;
}

// What occupancy says never changes: kernel, device, threads, shared memory, blocks of a cluster.
using Key = std::tuple<const void*, int, int, int, int>;
std::map<Key, int>& known() {
  static std::map<Key, int> blocks;
  return blocks;
}
std::mutex lock;

std::atomic<int> most_blocks{0};
std::atomic<bool> takes_clusters{true};
int limited(int blocks, int cluster) {
  if (cluster > 1 && !takes_clusters) return 0;
  return most_blocks > 0 ? std::min<int>(blocks, most_blocks / cluster) : blocks;
}

// Lets a kernel's blocks have so much shared memory on the current device. What was allowed once
// stays so: a limit may be raised, or launches that are planned already would fail.
bool allow_shared(const void* kernel, int device, int shared, Status& status) {
  static std::map<std::pair<const void*, int>, int> allowed;
  int& most = allowed[{kernel, device}];
  if (shared <= most) return true;
  if (!settled(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
               status))
    return false;
  most = shared;
  return true;
}

// A cooperative launch, in clusters where there is more than one block to each.
struct Configuration {
  cudaLaunchConfig_t value = {};
  cudaLaunchAttribute attributes[2] = {};

  Configuration(int blocks, int threads, int shared, void* stream, int cluster) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    value.gridDim = dim3(blocks);
    value.blockDim = dim3(threads);
    value.dynamicSmemBytes = shared;
    value.stream = static_cast<cudaStream_t>(stream);
    value.attrs = attributes;
    value.numAttrs = cluster > 1 ? 2 : 1;
  }
  Configuration(const Configuration&) = delete;
};

}  // namespace

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

void use_device(int device, Status& status) { settled(cudaSetDevice(device), status); }

int resident_blocks_of(const void* kernel, int threads, int shared, Status& status) {
  int device = 0;
  if (!settled(cudaGetDevice(&device), status)) return 0;
  const Key key{kernel, device, threads, shared, 1};
  const std::lock_guard guard(lock);
  if (const auto found = known().find(key); found != known().end())
    return limited(found->second, 1);
  int cooperative = 0, processors = 0, each = 0;
  if (!settled(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), status))
    return 0;
  if (!cooperative) {
    status.code = cudaErrorNotSupported;
    status.name = cudaGetErrorName(cudaErrorNotSupported);
    status.text = "this device has no cooperative launch; choose backend 'triton'";
    return 0;
  }
  if (!settled(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
               status) ||
      !allow_shared(kernel, device, shared, status) ||
      !settled(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared),
               status))
    return 0;
  if (each == 0) {
    status.code = cudaErrorLaunchOutOfResources;
    status.name = cudaGetErrorName(cudaErrorLaunchOutOfResources);
    status.text = "a block of " + std::to_string(threads) + " threads with " +
                  std::to_string(shared) + " bytes of shared memory does not fit this device";
    return 0;
  }
  return limited(known()[key] = each * processors, 1);
}

int resident_clusters_of(const void* kernel, int threads, int shared, int cluster) {
  Status ignored;
  int device = 0, supported = 0, clusters = 0;
  if (!settled(cudaGetDevice(&device), ignored)) return 0;
  const Key key{kernel, device, threads, shared, cluster};
  const std::lock_guard guard(lock);
  if (const auto found = known().find(key); found != known().end())
    return limited(found->second, cluster);
  Configuration configuration(cluster, threads, shared, nullptr, cluster);
  if (!settled(cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device), ignored) ||
      !supported ||
      // More than eight blocks are for the devices that have them.
      !settled(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               ignored) ||
      !allow_shared(kernel, device, shared, ignored) ||
      !settled(cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.value), ignored))
    clusters = 0;
  return limited(known()[key] = clusters, cluster);
}

void limit_residents(int blocks, bool clusters) {
  most_blocks = blocks;
  takes_clusters = clusters;
}

void refuse_clusters_of(const void* kernel, int threads, int shared, int cluster) {
  int device = 0;
  Status ignored;
  if (!settled(cudaGetDevice(&device), ignored)) return;
  const std::lock_guard guard(lock);
  known()[Key{kernel, device, threads, shared, cluster}] = 0;
}

std::uint64_t* stall_memory() {
  static std::uint64_t* const memory = [] {
    // A capture may go on: nothing of it waits for this memory.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    Status ignored;
    void* made = nullptr;
    const bool there = settled(
        cudaHostAlloc(&made, sizeof(std::uint64_t), cudaHostAllocMapped | cudaHostAllocPortable),
        ignored);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (there) *static_cast<std::uint64_t*>(made) = 0;
    return there ? static_cast<std::uint64_t*>(made) : nullptr;
  }();
  return memory;
}

void launch_cooperative(const void* kernel, void** arguments, int blocks, int threads, int shared,
                        void* stream, Status& status, int cluster) {
  const Configuration configuration(blocks, threads, shared, stream, cluster);
  settled(cudaLaunchKernelExC(&configuration.value, kernel, arguments), status);
}

}  // namespace fused_dni::cuda
