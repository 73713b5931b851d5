// Helpers of all launches. Host only.
#pragma once
#include <cuda_runtime.h>

#include <utility>

namespace qarvd {

constexpr int devices_limit = 64;  // of what is cached per device

// Makes a device the current one; the destructor restores the previous one.
class OnDevice {
  public:
    explicit OnDevice(int device) : before_(device), device_(device), error(cudaGetDevice(&before_)) {
        if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
    }
    ~OnDevice() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_, device_;

  public:
    cudaError_t error;
};

// Launches a kernel whose prologue overlaps the end of the kernel before it; every thread calls `await_last_kernel`.
template <typename... Expected, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Expected...), unsigned blocks, unsigned threads, size_t shared_bytes,
                         cudaStream_t stream, Arguments&&... arguments) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
    config.stream = stream, config.attrs = &early, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace qarvd
