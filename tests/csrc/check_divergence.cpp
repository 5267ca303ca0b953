// logit_divergence against log-softmaxes in double, metric by metric.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "divergence/divergence.h"

namespace klfast::test {
namespace {

constexpr Int kMetrics = 8, kTokens = 5;

std::vector<double> log_softmax(const Tensor& logits, Int token, Int vocab) {
    std::vector<double> row(vocab);
    double total = 0;
    for (Int i = 0; i < vocab; ++i) total += std::exp(row[i] = logits[token * vocab + i]);
    for (double& value : row) value -= std::log(total);
    return row;
}

std::vector<double> metrics(const Tensor& teacher, const Tensor& student, Int token, Int vocab, Int target) {
    const std::vector<double> p = log_softmax(teacher, token, vocab), q = log_softmax(student, token, vocab);
    double kl_pq = 0, kl_qp = 0, jsd = 0, difference = 0, signal = 0;
    for (Int i = 0; i < vocab; ++i) {
        const double a = teacher[token * vocab + i], b = student[token * vocab + i];
        const double middle = std::log((std::exp(p[i]) + std::exp(q[i])) / 2);
        kl_pq += std::exp(p[i]) * (p[i] - q[i]), kl_qp += std::exp(q[i]) * (q[i] - p[i]);
        jsd += (std::exp(p[i]) * (p[i] - middle) + std::exp(q[i]) * (q[i] - middle)) / 2;
        difference += (a - b) * (a - b), signal += a * a;
    }
    const auto top = [](const std::vector<double>& row) {
        return std::max_element(row.begin(), row.end()) - row.begin();
    };
    const double vocabulary = static_cast<double>(vocab);
    return {
        kl_pq,
        kl_qp,
        jsd,
        difference / vocabulary,
        10 * std::log10(signal / difference),
        -p[target],
        -q[target],
        top(p) == top(q) ? 1.0 : 0.0,
    };
}

}  // namespace

void check_divergence() {
    for (const DType dtype : kTypes)
        for (const Int vocab : {7, 131, 5001})
            for (const double distance : {0.05, 0.7, 4.0}) {
                Tensor teacher = Tensor::random(dtype, {kTokens, vocab}, 2.0), student(dtype, {kTokens, vocab});
                for (Int i = 0; i < kTokens * vocab; ++i) student.set(i, teacher[i] + distance * random_normal());
                std::vector<Int> targets(kTokens);
                for (Int& target : targets) target = random_int(0, vocab);
                const auto matrix = [&](Tensor& logits) {
                    return divergence::Matrix{
                        .data = logits.data(), .dtype = dtype, .row_stride = vocab, .column_stride = 1};
                };
                for_tiers("logit_divergence", [&](Tier tier) {
                    Tensor out(DType::f32, {kMetrics, kTokens});
                    divergence::Fault fault[kTokens];
                    const divergence::BlockArgs args{
                        .teacher = matrix(teacher),
                        .student = matrix(student),
                        .tokens = kTokens,
                        .columns = vocab,
                        .first_column = 0,
                        .targets = targets.data(),
                        .states = nullptr,
                        .n_threads = kThreads,
                    };
                    divergence::logit_divergence(args, static_cast<float*>(out.data()), fault, tier);
                    std::vector<double> truth[kMetrics];
                    for (Int token = 0; token < kTokens; ++token)
                        for (Int i = 0; const double value : metrics(teacher, student, token, vocab, targets[token]))
                            truth[i++].push_back(value);
                    for (Int i = 0; i < kMetrics; ++i) {
                        Tensor found(DType::f32, {kTokens});
                        for (Int token = 0; token < kTokens; ++token)
                            found.set(token, fault[token] ? NAN : out[i * kTokens + token]);
                        compare("logit_divergence", tier, found, truth[i]);
                    }
                });
            }
}

}  // namespace klfast::test
