// CPU kernels for *training* the bundled models: the selective scan of Mamba (arXiv 2312.00752, eq. 2 and
// algorithm 2) and the depthwise causal convolution before it, each forward and backward.
//
// training_scan.py compiles this file for the machine it runs on and checks it against plain torch. klfast itself has
// its own inference kernels in csrc/; nothing here is part of the package.
//
// Layouts: activations are [batch, length, channels], channels contiguous, so that one vector holds LANES
// neighbouring channels and the loop over the state index n needs no horizontal sum. Activations are float or bf16
// (the type T); everything that accumulates is float.
#include <cstdint>
#include <cstring>
#include <vector>

#ifndef STATE
#error "compile with -DSTATE=<state size>"
#endif

namespace {

constexpr int LANES = 16;  // channels a vector; must divide the channel count
constexpr int CHUNK = 16;  // steps between saved states; 4 buffers of CHUNK x STATE x LANES floats stay in L2

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

struct bf16 { uint16_t bits; };

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec load(const bf16* p) {
    hvec h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}
inline void store(bf16* p, vec v) {  // round to nearest, ties to even
    uvec u = (uvec)v;
    hvec h = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, hvec);
    std::memcpy(p, &h, sizeof h);
}

inline vec splat(float x) { return x - vec{}; }
inline vec clamp(vec x, float low, float high) {
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
}

// exp by 2^k * 2^r, |r| <= 1/2: Taylor polynomial of degree 6 in r ln 2 (relative error below 2e-7).
inline vec exponential(vec x) {
    x = clamp(x, -87.0f, 88.0f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
    vec k = (x * 1.44269504f + magic) - magic;
    vec r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)((__builtin_convertvector(k, ivec) + 127) << 23);
}
inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }
inline float sum(vec v) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

struct Shape { int64_t batch, length, channels, chunks; };

// One step of  h[n] <- exp(delta A[n]) h[n] + delta u B[n].  Writes the decay too when the caller wants it.
inline void advance(vec* h, vec* decay, const vec* A, vec delta, vec u, const float* B) {
    vec x = delta * u;
    for (int n = 0; n < STATE; n++) {
        vec a = exponential(delta * A[n]);
        if (decay) decay[n] = a;
        h[n] = a * h[n] + x * B[n];
    }
}
inline void load_A(vec* A, const float* transposed, int64_t d, int64_t channels) {
    for (int n = 0; n < STATE; n++) A[n] = load(transposed + n * channels + d);
}

// out = (sum_n h[n] C[n] + D u) silu(z). Chunk by chunk, so that rows are read whole while they are in cache.
// saved [batch, chunks, channels / LANES, STATE, LANES] keeps the state before each chunk.
template <typename T>
void scan_forward(Shape s, const T* u, const float* delta, const float* A, const float* B, const float* C, const float* D, const T* z,
                  int64_t z_row, T* out, float* saved, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < s.batch; b++) {
        std::vector<vec> running(s.channels / LANES * STATE);
        for (int64_t c = 0; c < s.chunks; c++) {
            const int64_t start = c * CHUNK, stop = start + CHUNK < s.length ? start + CHUNK : s.length;
            std::memcpy(saved + (b * s.chunks + c) * s.channels * STATE, running.data(), running.size() * sizeof(vec));
            for (int64_t d = 0; d < s.channels; d += LANES) {
                vec h[STATE], a[STATE];
                std::memcpy(h, &running[d / LANES * STATE], sizeof h);
                load_A(a, A, d, s.channels);
                const vec skip = load(D + d);
                for (int64_t t = start; t < stop; t++) {
                    const int64_t row = b * s.length + t, at = row * s.channels + d;
                    const vec ut = load(u + at), zt = load(z + row * z_row + d);
                    advance(h, nullptr, a, load(delta + at), ut, B + row * STATE);
                    vec y = skip * ut;
                    for (int n = 0; n < STATE; n++) y += h[n] * C[row * STATE + n];
                    store(out + at, y * zt * sigmoid(zt));
                }
                std::memcpy(&running[d / LANES * STATE], h, sizeof h);
            }
        }
    }
}

// Chunks from last to first: recompute the chunk's states from the saved one, then run the adjoint recurrence
// dh[n] <- decay (dh[n] + gy C[n]).  dB and dC collect lane by lane over all channels and are summed once a chunk.
// delta is softplus(step), and dstep the gradient of step.
template <typename T>
void scan_backward(Shape s, const T* u, const float* delta, const float* A, const float* B, const float* C, const float* D, const T* z,
                   int64_t z_row, const float* saved, const T* grad, T* du, float* dstep, float* dA, float* dB, float* dC, float* dD, T* dz,
                   int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < s.batch; b++) {
        std::vector<vec> adjoint(s.channels / LANES * STATE), dA_sum(adjoint.size()), dD_sum(s.channels / LANES);
        std::vector<vec> buffer((4 * CHUNK + 1) * STATE);
        vec* states = buffer.data();  // [CHUNK + 1, STATE]: before each step, and after the last
        vec* decays = states + (CHUNK + 1) * STATE;
        vec* dB_sum = decays + CHUNK * STATE;
        vec* dC_sum = dB_sum + CHUNK * STATE;
        for (int64_t c = s.chunks - 1; c >= 0; c--) {
            const int64_t start = c * CHUNK, steps = start + CHUNK < s.length ? CHUNK : s.length - start;
            std::memset(dB_sum, 0, 2 * CHUNK * STATE * sizeof(vec));
            for (int64_t d = 0; d < s.channels; d += LANES) {
                vec a[STATE];
                load_A(a, A, d, s.channels);
                const vec skip = load(D + d);
                vec *dh = &adjoint[d / LANES * STATE], *da = &dA_sum[d / LANES * STATE];
                std::memcpy(states, saved + ((b * s.chunks + c) * s.channels + d) * STATE, STATE * sizeof(vec));
                for (int64_t i = 0; i < steps; i++) {
                    const int64_t row = b * s.length + start + i, at = row * s.channels + d;
                    vec* h = states + (i + 1) * STATE;
                    std::memcpy(h, h - STATE, STATE * sizeof(vec));
                    advance(h, decays + i * STATE, a, load(delta + at), load(u + at), B + row * STATE);
                }
                for (int64_t i = steps - 1; i >= 0; i--) {
                    const int64_t row = b * s.length + start + i, at = row * s.channels + d;
                    const vec ut = load(u + at), dt = load(delta + at), zt = load(z + row * z_row + d), g = load(grad + at);
                    const vec gate = sigmoid(zt), gy = g * zt * gate, x = dt * ut;
                    const vec *before = states + i * STATE, *after = before + STATE, *decay = decays + i * STATE;
                    vec y = skip * ut, dx = {}, ddt = {};
                    for (int n = 0; n < STATE; n++) {
                        const float Bn = B[row * STATE + n], Cn = C[row * STATE + n];
                        y += after[n] * Cn;
                        dC_sum[i * STATE + n] += gy * after[n];
                        const vec dhn = dh[n] + gy * Cn;
                        dx += dhn * Bn;
                        dB_sum[i * STATE + n] += dhn * x;
                        const vec carried = dhn * decay[n], dlog = carried * before[n];  // dlog: gradient of delta A[n]
                        ddt += dlog * a[n];
                        da[n] += dlog * dt;
                        dh[n] = carried;
                    }
                    store(du + at, dx * dt + gy * skip);
                    store(dstep + at, (ddt + dx * ut) * (1.0f - exponential(-dt)));  // softplus'(s) = 1 - exp(-softplus(s))
                    store(dz + at, g * y * gate * (1.0f + zt * (1.0f - gate)));
                    dD_sum[d / LANES] += gy * ut;
                }
            }
            for (int64_t i = 0; i < steps * STATE; i++) {
                dB[(b * s.length + start) * STATE + i] = sum(dB_sum[i]);
                dC[(b * s.length + start) * STATE + i] = sum(dC_sum[i]);
            }
        }
        for (int64_t d = 0; d < s.channels; d += LANES) {  // [batch, STATE, channels] and [batch, channels]
            for (int n = 0; n < STATE; n++) store(dA + (b * STATE + n) * s.channels + d, dA_sum[d / LANES * STATE + n]);
            store(dD + b * s.channels + d, dD_sum[d / LANES]);
        }
    }
}

// out = silu(bias + sum_k weight[k] x[t - WIDTH + 1 + k]), zeros before the start. weight is [WIDTH, channels].
constexpr int WIDTH = 4;

template <typename T>
inline vec convolve(const T* x, int64_t x_row, int64_t t, const float* weight, const float* bias, int64_t channels) {
    vec y = load(bias);
    for (int k = 0; k < WIDTH; k++) {
        const int64_t from = t - WIDTH + 1 + k;
        if (from >= 0) y += load(weight + k * channels) * load(x + from * x_row);
    }
    return y;
}

template <typename T>
void conv_forward(Shape s, const T* x, int64_t x_row, const float* weight, const float* bias, T* out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < s.batch; b++) {
        for (int64_t t = 0; t < s.length; t++) {
            for (int64_t d = 0; d < s.channels; d += LANES) {
                const vec y = convolve(x + b * s.length * x_row + d, x_row, t, weight + d, bias + d, s.channels);
                store(out + (b * s.length + t) * s.channels + d, y * sigmoid(y));
            }
        }
    }
}

// From the last step to the first; `ahead` is a ring of the gradients of the pre-activation at t ... t + WIDTH - 1.
template <typename T>
void conv_backward(Shape s, const T* x, int64_t x_row, const float* weight, const float* bias, const T* grad, T* dx, float* dweight,
                   float* dbias, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < s.batch; b++) {
        const int64_t blocks = s.channels / LANES;
        std::vector<vec> ahead(WIDTH * blocks), dw(WIDTH * blocks), db(blocks);
        for (int64_t t = s.length - 1; t >= 0; t--) {
            for (int64_t d = 0; d < s.channels; d += LANES) {
                const T* start = x + b * s.length * x_row + d;
                const int64_t at = (b * s.length + t) * s.channels + d, block = d / LANES;
                const vec y = convolve(start, x_row, t, weight + d, bias + d, s.channels), gate = sigmoid(y);
                const vec g = load(grad + at) * gate * (1.0f + y * (1.0f - gate));
                ahead[t % WIDTH * blocks + block] = g;
                vec total = {};
                for (int k = 0; k < WIDTH; k++) {
                    total += load(weight + (WIDTH - 1 - k) * s.channels + d) * ahead[(t + k) % WIDTH * blocks + block];
                    const int64_t from = t - WIDTH + 1 + k;
                    if (from >= 0) dw[k * blocks + block] += g * load(start + from * x_row);
                }
                db[block] += g;
                store(dx + at, total);
            }
        }
        std::memcpy(dweight + b * WIDTH * s.channels, dw.data(), dw.size() * sizeof(vec));
        std::memcpy(dbias + b * s.channels, db.data(), db.size() * sizeof(vec));
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                   \
    extern "C" void scan_forward_##NAME(Shape s, const T* u, const float* delta, const float* A, const float* B, const float* C,          \
                                        const float* D, const T* z, int64_t z_row, T* out, float* saved, int threads) {                   \
        scan_forward<T>(s, u, delta, A, B, C, D, z, z_row, out, saved, threads);                                                          \
    }                                                                                                                                     \
    extern "C" void scan_backward_##NAME(Shape s, const T* u, const float* delta, const float* A, const float* B, const float* C,         \
                                         const float* D, const T* z, int64_t z_row, const float* saved, const T* grad, T* du,             \
                                         float* dstep, float* dA, float* dB, float* dC, float* dD, T* dz, int threads) {                 \
        scan_backward<T>(s, u, delta, A, B, C, D, z, z_row, saved, grad, du, dstep, dA, dB, dC, dD, dz, threads);                        \
    }                                                                                                                                     \
    extern "C" void conv_forward_##NAME(Shape s, const T* x, int64_t x_row, const float* weight, const float* bias, T* out, int threads) { \
        conv_forward<T>(s, x, x_row, weight, bias, out, threads);                                                                         \
    }                                                                                                                                     \
    extern "C" void conv_backward_##NAME(Shape s, const T* x, int64_t x_row, const float* weight, const float* bias, const T* grad,       \
                                         T* dx, float* dweight, float* dbias, int threads) {                                              \
        conv_backward<T>(s, x, x_row, weight, bias, grad, dx, dweight, dbias, threads);                                                   \
    }
EXPORT(float, float)
EXPORT(bf16, bf16)
