// Constants of kernels.
#pragma once

namespace klfast {

inline constexpr float kLog2e = 0x1.715476p+0f;  // log2(e)

}  // namespace klfast
