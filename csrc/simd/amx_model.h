// A model of the tile registers in plain C++, so that the AMX tier can be tested on a CPU without AMX. It follows the
// operations in the Intel SDM, volume 2, and ends the process on any use that faults there or that leaves the registers
// configured. Included by simd/amx.h only.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace klfast {
namespace {

struct TileModel {
    struct Tile {
        int rows = 0, row_bytes = 0;
        alignas(64) unsigned char data[kTileSide][kTileRowBytes];
    };
    Tile tiles[kTileRegisters];
    bool configured = false;

    ~TileModel() { expect(!configured, "a thread ended with its tiles configured"); }

    static void expect(bool holds, const char* otherwise) {
        if (holds) return;
        std::fprintf(stderr, "klfast: AMX model: %s\n", otherwise);
        std::abort();
    }

    Tile& use(int t) {
        expect(configured, "a tile is used without a configuration");
        expect(t >= 0 && t < kTileRegisters, "there is no such tile");
        expect(tiles[t].rows != 0, "a tile is used that the configuration leaves out");
        return tiles[t];
    }

    // C [m, n], A [m, k], B [k, n], counted in elements of 32 bits.
    void expect_product(int c, int a, int b) {
        expect(c != a && c != b && a != b, "a product's tiles must be three");
        const Tile &to = use(c), &left = use(a), &right = use(b);
        expect(left.rows == to.rows && right.row_bytes == to.row_bytes && right.rows == left.row_bytes / 4,
               "a product's tiles do not fit together");
    }
};

inline TileModel& tile_model() {
    thread_local TileModel model;
    return model;
}

inline void tile_configure(const TileConfig& config) {
    TileModel& model = tile_model();
    TileModel::expect(!model.configured, "tiles are configured that were not released");
    TileModel::expect(reinterpret_cast<std::uintptr_t>(&config) % 64 == 0, "the configuration is not aligned");
    TileModel::expect(config.palette == 1 && config.start_row == 0, "palette 1 and start row 0 are expected");
    for (const std::uint8_t byte : config.reserved) TileModel::expect(byte == 0, "reserved bytes must be zero");
    for (int t = 0; t < 16; ++t) {
        const int rows = config.rows[t], row_bytes = config.row_bytes[t];
        TileModel::expect(rows <= kTileSide && row_bytes <= kTileRowBytes && (rows == 0) == (row_bytes == 0),
                          "a tile has at most 16 rows of 64 bytes");
        TileModel::expect(row_bytes % 4 == 0, "a row holds whole elements of 32 bits");
        TileModel::expect(t < kTileRegisters || rows == 0, "palette 1 has eight tiles");
        if (t >= kTileRegisters) continue;
        model.tiles[t].rows = rows;
        model.tiles[t].row_bytes = row_bytes;
        std::memset(model.tiles[t].data, 0, sizeof model.tiles[t].data);
    }
    model.configured = true;
}

inline void tile_release() { tile_model().configured = false; }

template <int T>
void tile_zero() {
    TileModel::Tile& tile = tile_model().use(T);
    std::memset(tile.data, 0, sizeof tile.data);
}

template <int T>
void tile_load(const void* from, std::ptrdiff_t stride) {
    TileModel::Tile& tile = tile_model().use(T);
    std::memset(tile.data, 0, sizeof tile.data);
    for (int r = 0; r < tile.rows; ++r)
        std::memcpy(tile.data[r], static_cast<const char*>(from) + r * stride, tile.row_bytes);
}

template <int T>
void tile_store(void* to, std::ptrdiff_t stride) {
    const TileModel::Tile& tile = tile_model().use(T);
    for (int r = 0; r < tile.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile.data[r], tile.row_bytes);
}

// Subnormal numbers become zeros of their sign.
inline float flushed(float v) { return __builtin_fabsf(v) < 0x1p-126f ? __builtin_copysignf(0.0f, v) : v; }

inline float upper_half(std::uint32_t bits) { return flushed(__builtin_bit_cast(float, bits & 0xffff0000u)); }
inline float lower_half(std::uint32_t bits) { return upper_half(bits << 16); }

// For each row and column: one chain of FMAs over the pairs' first values and one over their second ones, from 0 each;
// then their sum is added to C.
template <int C, int A, int B>
void tile_dot_bf16() {
    TileModel& model = tile_model();
    model.expect_product(C, A, B);
    TileModel::Tile& c = model.tiles[C];
    const TileModel::Tile &a = model.tiles[A], &b = model.tiles[B];
    for (int m = 0; m < c.rows; ++m) {
        float sum[kTileSide], first[kTileSide] = {}, second[kTileSide] = {};
        std::memcpy(sum, c.data[m], sizeof sum);
        for (int k = 0; k < b.rows; ++k) {
            std::uint32_t pair, column[kTileSide];
            std::memcpy(&pair, a.data[m] + 4 * k, sizeof pair);
            std::memcpy(column, b.data[k], sizeof column);
            for (int n = 0; n < kTileSide; ++n) {
                first[n] = flushed(__builtin_fmaf(lower_half(pair), lower_half(column[n]), first[n]));
                second[n] = flushed(__builtin_fmaf(upper_half(pair), upper_half(column[n]), second[n]));
            }
        }
        for (int n = 0; n < kTileSide; ++n) sum[n] = flushed(flushed(sum[n]) + flushed(first[n] + second[n]));
        std::memcpy(c.data[m], sum, c.row_bytes);
    }
}

template <int C, int A, int B>
void tile_dot_int8() {
    TileModel& model = tile_model();
    model.expect_product(C, A, B);
    TileModel::Tile& c = model.tiles[C];
    const TileModel::Tile &a = model.tiles[A], &b = model.tiles[B];
    for (int m = 0; m < c.rows; ++m) {
        std::uint32_t sum[kTileSide];  // wraps around
        std::memcpy(sum, c.data[m], sizeof sum);
        for (int k = 0; k < b.rows; ++k)
            for (int n = 0; n < kTileSide; ++n)
                for (int i = 0; i < 4; ++i)
                    sum[n] += static_cast<std::uint32_t>(static_cast<std::int8_t>(a.data[m][4 * k + i]) *
                                                         static_cast<std::int8_t>(b.data[k][4 * n + i]));
        std::memcpy(c.data[m], sum, c.row_bytes);
    }
}

}  // namespace
}  // namespace klfast
