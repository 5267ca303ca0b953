// Attention of a block of queries that share a key head, as products of register tiles: keys and values are laid out as
// floats once for all of them, kBlock at a time, and neither they nor the scores leave L2.
#pragma once

#include <cstdint>

#include "attention/weights.h"
#include "gemm/tile.h"

namespace klfast {
namespace {

constexpr int kQueries = 96 / kTileRows * kTileRows;

// A thread's memory, and what it does with it.
class ManyQueries {
  public:
    explicit ManyQueries(const DecodeAttentionArgs& args)
        : a_(args),
          q_(blocks(args.key_dim) * kQueries * kBlock),
          keys_(args.key_dim * kBlock),
          values_(pairs(args.value_dim) * kBlock * kPair),
          scores_(kQueries * kBlock),
          weights_(kQueries * kBlock),
          out_(pairs(args.value_dim) * kQueries * kPair) {}

    // `count` queries of group g, in the order of their keys.
    void attend(std::int64_t b, std::int64_t g, const Query* queries, std::int64_t count) {
        count_ = count, queries_ = queries;
        load_queries(b);
        for (std::int64_t i = 0; i < pairs(a_.value_dim) * kQueries * kPair; i += kLanes)
            store(out_.data + i, set(0.0f));
        for (Softmax& softmax : softmax_) softmax = {};
        const std::int64_t all = queries[count - 1].keys;
        for (std::int64_t first = 0; first < all; first += kBlock) {
            if (first >= a_.sinks && first + kBlock <= queries[0].from) continue;  // nobody sees these
            const std::int64_t keys = smaller(all - first, kBlock);
            load_keys(b, g, first, keys);
            score(first, keys);
            weigh_all(first, keys);
            mix(first, keys);
        }
        store_out(b);
    }

  private:
    static std::int64_t blocks(std::int64_t width) { return (width + kBlock - 1) / kBlock; }
    static std::int64_t pairs(std::int64_t width) { return (width + kPair - 1) / kPair; }

    std::int64_t at(const View& view, std::int64_t b, std::int64_t r) const {
        return b * view.stride[0] + queries_[r].token * view.stride[1] + queries_[r].head * view.stride[2];
    }

    // each(first row, rows, keys that the last of them sees)
    template <class Each>
    void each_tile(Each&& each) const {
        for (std::int64_t r = 0; r < count_; r += kTileRows) {
            const std::int64_t rows = smaller(kTileRows, count_ - r);
            each(r, rows, queries_[r + rows - 1].keys);
        }
    }

    // q_[block][row][kBlock], times the scale.
    void load_queries(std::int64_t b) {
        for (std::int64_t r = 0; r < count_; ++r)
            for (std::int64_t c = 0; c < a_.key_dim; c += kLanes)
                store(q_.data + (c / kBlock * kQueries + r) * kBlock + c % kBlock,
                      load(a_.q.data, at(a_.q, b, r) + c, a_.q.dtype, lanes(a_.key_dim - c)) * set(a_.scale));
    }

    // keys_[pair of vectors of keys][channel][kPair], values_[pair of vectors of channels][key][kPair].
    void load_keys(std::int64_t b, std::int64_t g, std::int64_t first, std::int64_t keys) {
        const auto row = [&](const View& view, std::int64_t s) {
            return b * view.stride[0] + g * view.stride[1] + s * view.stride[2];
        };
        for (std::int64_t s = 0; s < keys; s += kPair)
            load_tile(keys_.data + s * a_.key_dim, kPair, a_.k, row(a_.k, first + s), a_.k.stride[2], 1,
                      smaller(kPair, keys - s), a_.key_dim);
        for (std::int64_t c = 0; c < a_.value_dim; c += kPair)
            load_tile(values_.data + c * kBlock, kPair, a_.v, row(a_.v, first) + c, 1, a_.v.stride[2],
                      smaller(kPair, a_.value_dim - c), keys);
    }

    // scores_[pair of vectors of keys][row][kPair]
    void score(std::int64_t first, std::int64_t keys) {
        for (std::int64_t s = 0; s < keys; s += kPair) {
            float* const sums = scores_.data + s * kQueries;
            each_tile([&](std::int64_t r, std::int64_t rows, std::int64_t seen) {
                if (first + s >= seen) return;
                for (std::int64_t i = 0; i < rows * kPair; i += kLanes) store(sums + r * kPair + i, set(0.0f));
                for (std::int64_t c = 0; c < a_.key_dim; c += kBlock)
                    tile_product(rows, q_.data + (c / kBlock * kQueries + r) * kBlock,
                                 keys_.data + (s * a_.key_dim + c * kPair), smaller(kBlock, a_.key_dim - c),
                                 sums + r * kPair);
            });
        }
    }

    // weights_[row][kBlock]; 0 for keys that a query does not see.
    void weigh_all(std::int64_t first, std::int64_t keys) {
        for (std::int64_t r = 0; r < count_; ++r) {
            float* const to = weights_.data + r * kBlock;
            for (std::int64_t s = 0; s < keys; s += kLanes)
                store(to + s, load(scores_.data + (s / kPair * kQueries + r) * kPair + s % kPair));
            old_[r] = softmax_[r].weigh(queries_[r], a_.sinks, first, keys, round_up(keys, kLanes), to);
        }
    }

    // What came before is added last: a block's terms do not vanish beside a long sum.
    void mix(std::int64_t first, std::int64_t keys) {
        for (std::int64_t c = 0; c < pairs(a_.value_dim); ++c)
            each_tile([&](std::int64_t r, std::int64_t rows, std::int64_t seen) {
                if (first >= seen) return;
                float sums[kTileRows * kPair] = {};
                tile_product(rows, weights_.data + r * kBlock, values_.data + c * kBlock * kPair,
                             smaller(seen - first, keys), sums);
                float* const out = out_.data + (c * kQueries + r) * kPair;
                for (std::int64_t i = 0; i < rows * kPair; i += kLanes)
                    store(out + i, fma(load(out + i), set(old_[r + i / kPair]), load(sums + i)));
            });
    }

    void store_out(std::int64_t b) {
        for (std::int64_t c = 0; c < a_.value_dim; c += kLanes)
            for (std::int64_t r = 0; r < count_; ++r) {
                const Vec sum = load(out_.data + (c / kPair * kQueries + r) * kPair + c % kPair);
                store(a_.out.data, at(a_.out, b, r) + c, a_.out.dtype, lanes(a_.value_dim - c),
                      sum / set(softmax_[r].total));
            }
    }

    const DecodeAttentionArgs& a_;
    const Buffer<float> q_, keys_, values_, scores_, weights_, out_;
    const Query* queries_ = nullptr;
    std::int64_t count_ = 0;
    Softmax softmax_[kQueries];
    float old_[kQueries];
};

}  // namespace
}  // namespace klfast
