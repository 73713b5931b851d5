// Positions in rings of buffers that mbarriers guard.
#pragma once
#include <cstdint>

namespace qarvd {

// A position in a ring of buffers with one pair of barriers each.
template <int size>
struct Ring {
    int index = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance() {
        if (++index == size) {
            index = 0;
            phase ^= 1;
        }
    }
};

}  // namespace qarvd
