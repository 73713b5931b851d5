// Tensor maps of byte matrices, encoded by the driver. Host only.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

namespace qarvd {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, or null if the driver has none.
inline EncodeTiled encoder() {
    static const EncodeTiled function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<EncodeTiled>(found);
    }();
    return function;
}

// A map whose boxes have rows of 64 or 128 bytes, swizzled in that width; what lies outside the matrix reads as zero.
inline bool encode(CUtensorMap* map, const void* pointer, int rank, const cuuint64_t* extent, const cuuint64_t* stride,
                   const cuuint32_t* box) {
    const cuuint32_t step[5] = {1, 1, 1, 1, 1};
    const CUtensorMapSwizzle swizzle = box[0] == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    return encoder()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, const_cast<void*>(pointer), extent, stride, box, step,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace qarvd
