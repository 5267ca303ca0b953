// Programs of the engine; klfast/engine/program.py has checked tensors and shapes, and holds the memory.
#include <pybind11/stl.h>

#include "engine/instructions.h"
#include "engine/program.h"
#include "python/bindings.h"
#include "python/columns_caster.h"
#include "python/view_caster.h"

namespace py = pybind11;

namespace klfast {
namespace {

using engine::Columns, engine::Input, engine::Program;

// Opaque to Python: a list of views would be converted at each token.
struct HeldStates {
    engine::States views;
};

Input input(Address tokens, Address seen, Int sequences, Int length, const HeldStates& states, int n_threads,
            int limit) {
    return {
        .tokens = pointer<const std::int64_t>(tokens),
        .seen = pointer<const std::int64_t>(seen),
        .sequences = sequences,
        .length = length,
        .states = states.views,
        .n_threads = n_threads,
        .limit = static_cast<Tier>(limit),
    };
}

// Counts the tokens of a run: here, so that an interrupt, which Python raises between its own instructions, finds a
// state and its count in step.
void move_on(Address seen, Int sequences, Int length) {
    for (Int i = 0; i < sequences; ++i) pointer<std::int64_t>(seen)[i] += length;
}

Combination combination(const std::string& name) {
    if (name == "add") return Combination::add;
    if (name == "average") return Combination::average;
    if (name == "multiply") return Combination::multiply;
    if (name == "silu_gate") return Combination::silu_gate;
    if (name == "sigmoid_gate") return Combination::sigmoid_gate;
    if (name == "gelu_gate") return Combination::gelu_gate;
    if (name == "gelu_tanh_gate") return Combination::gelu_tanh_gate;
    if (name == "relu_gate") return Combination::relu_gate;
    if (name == "softplus_gate") return Combination::softplus_gate;
    throw std::invalid_argument("no combination " + name);
}

}  // namespace

void bind_engine(py::module_& m) {
    py::class_<HeldStates>(m, "States")
        .def(py::init([](std::vector<View> views) { return HeldStates{std::move(views)}; }), "States(views)");
    py::class_<Program>(m, "Program")
        .def(py::init<>())
        .def("buffer", [](Program& p, Int width, int type,
                          Int rows) { return p.buffers.add(width, static_cast<DType>(type), rows); })
        .def("memory",
             [](Program& p, Columns whole) {
                 return py::memoryview::from_memory(p.buffers[whole].data, p.buffers.bytes(whole.buffer));
             })
        .def_property_readonly("nbytes", [](const Program& p) { return p.buffers.bytes(); })
        .def("embed",
             [](Program& p, std::string name, View table, Int rows, View more, int rounded_to, float scale,
                Columns out) {
                 p.vocabulary = rows;
                 p.add(std::move(name),
                       engine::embed(table, rows, more, static_cast<DType>(rounded_to), scale, out));
             })
        .def("embed_quantized",
             [](Program& p, std::string name, const Projection& tied, View more, int rounded_to, float scale,
                Columns out, std::vector<std::int32_t> corrected, const Projection* correction) {
                 p.vocabulary = tied.quantized()->n;
                 p.add(std::move(name),
                       engine::embed_quantized(tied, more, static_cast<DType>(rounded_to), scale, out,
                                               std::move(corrected),
                                               correction ? std::optional(*correction) : std::nullopt));
             },
             py::arg("name"), py::arg("tied"), py::arg("more"), py::arg("rounded_to"), py::arg("scale"),
             py::arg("out"), py::arg("corrected"), py::arg("correction") = nullptr)
        .def("project", [](Program& p, std::string name, const Projection& layer, Columns in,
                           Columns out) { p.add(std::move(name), engine::project(layer, in, out)); })
        .def("project_last", [](Program& p, std::string name, const Projection& layer, Columns in,
                                Columns out) { p.add(std::move(name), engine::project_last(layer, in, out)); })
        .def("normalise",
             [](Program& p, std::string name, View weight, Int group_size, float eps, float weight_offset,
                bool norm_before_gate, bool sigmoid_gate, Int heads, Columns in, Columns gate, Columns out) {
                 const engine::Norm norm{
                     .weight = weight,
                     .group_size = group_size,
                     .eps = eps,
                     .weight_offset = weight_offset,
                     .norm_before_gate = norm_before_gate,
                     .sigmoid_gate = sigmoid_gate,
                 };
                 p.add(std::move(name), engine::normalise(norm, heads, in, gate, out));
             })
        .def("combine",
             [](Program& p, std::string name, const std::string& how, float factor, Int each, Columns a, Columns b,
                Columns out, Columns narrow) {
                 p.add(std::move(name), engine::combine_two(combination(how), factor, each, a, b, out, narrow));
             })
        .def("combine_row",
             [](Program& p, std::string name, const std::string& how, View row, Columns in, Columns out) {
                 p.add(std::move(name), engine::combine_row(combination(how), row, in, out));
             })
        .def("convolve",
             [](Program& p, std::string name, View weight, View bias, Int channels, Int width, bool silu, int state,
                Columns in, Columns out) {
                 const engine::Convolution layer{
                     .weight = weight,
                     .bias = bias,
                     .channels = channels,
                     .width = width,
                     .silu = silu,
                     .state = state,
                 };
                 p.add(std::move(name), engine::convolve(layer, in, out));
             })
        .def("selective_scan",
             [](Program& program, std::string name, View a, View d, View dt_bias, Int channels, Int states, int state,
                Columns x, Columns dt, Columns b, Columns c, Columns z, Columns out) {
                 const engine::SelectiveScan layer{
                     .a = a,
                     .d = d,
                     .dt_bias = dt_bias,
                     .channels = channels,
                     .states = states,
                     .state = state,
                 };
                 program.add(std::move(name), engine::selective_scan(layer, x, dt, b, c, z, out));
             })
        .def("head_scan",
             [](Program& program, std::string name, View a, View d, View dt_bias, Int heads, Int dim, Int groups,
                Int states, float dt_min, float dt_max, int state, Columns x, Columns dt, Columns b, Columns c,
                Columns z, Columns out) {
                 const engine::HeadScan layer{
                     .a = a,
                     .d = d,
                     .dt_bias = dt_bias,
                     .heads = heads,
                     .dim = dim,
                     .groups = groups,
                     .states = states,
                     .dt_min = dt_min,
                     .dt_max = dt_max,
                     .state = state,
                 };
                 program.add(std::move(name), engine::head_scan(layer, x, dt, b, c, z, out));
             })
        .def("angles",
             [](Program& p, std::string name, View frequencies, Int count, float factor, int rounded_to, Columns out) {
                 p.add(std::move(name),
                       engine::angles(frequencies, count, factor, static_cast<DType>(rounded_to), out));
             })
        .def("rotate", [](Program& p, std::string name, Int heads, Columns angles,
                          Columns x) { p.add(std::move(name), engine::rotate(heads, angles, x)); })
        .def("copy_heads",
             [](Program& p, std::string name, Int heads, Int first, Int to, Int width, bool shared, Columns in,
                Columns out) {
                 const engine::HeadCopy copy{
                     .heads = heads,
                     .first = first,
                     .to = to,
                     .width = width,
                     .shared = shared,
                 };
                 p.add(std::move(name), engine::copy_heads(copy, in, out));
             })
        .def("remember", [](Program& p, std::string name, int state, Int heads,
                            Columns in) { p.add(std::move(name), engine::remember(state, heads, in)); })
        .def("attend",
             [](Program& p, std::string name, Int heads, Int groups, Int key_dim, Int value_dim, Int window, Int sinks,
                float scale, int keys, int values, Columns q, Columns out) {
                 const engine::Attention layer{
                     .heads = heads,
                     .groups = groups,
                     .key_dim = key_dim,
                     .value_dim = value_dim,
                     .window = window,
                     .sinks = sinks,
                     .scale = scale,
                     .keys = keys,
                     .values = values,
                 };
                 p.add(std::move(name), engine::attend(layer, q, out));
             })
        .def("delta_rule",
             [](Program& p, std::string name, Int key_heads, Int heads, Int key_dim, Int value_dim, float scale,
                int state, Columns q, Columns k, Columns v, Columns g, Columns beta, Columns out) {
                 const engine::DeltaRule layer{
                     .key_heads = key_heads,
                     .heads = heads,
                     .key_dim = key_dim,
                     .value_dim = value_dim,
                     .scale = scale,
                     .state = state,
                 };
                 p.add(std::move(name), engine::delta_rule(layer, q, k, v, g, beta, out));
             })
        .def_readonly("vocabulary", &Program::vocabulary)
        .def(
            "first_unknown",
            [](const Program& p, Address tokens, Int count) {
                const auto* const ids = pointer<const std::int64_t>(tokens);
                for (Int i = 0; i < count; ++i)
                    if (ids[i] < 0 || ids[i] >= p.vocabulary) return i;
                return Int{-1};
            },
            "The index of the first token that is not in the vocabulary; -1 without.")
        .def("route",
             [](Program& p, std::string name, View bias, bool sigmoid, bool normalise, float epsilon, float factor,
                Int groups, Int open_groups, int rounded_to, Columns logits, Columns index, Columns weights) {
                 const engine::Routing how{
                     .bias = bias,
                     .sigmoid = sigmoid,
                     .normalise = normalise,
                     .epsilon = epsilon,
                     .factor = factor,
                     .groups = groups,
                     .open_groups = open_groups,
                     .rounded_to = static_cast<DType>(rounded_to),
                 };
                 p.add(std::move(name), engine::route(how, logits, index, weights));
             })
        .def("gather", [](Program& p, std::string name, Int experts, Columns index, Columns in,
                          Columns out) { p.add(std::move(name), engine::gather({index, experts}, in, out)); })
        .def("project_gathered",
             [](Program& p, std::string name, const Projection& stack, Int experts, Columns index, Columns in,
                Columns out, std::vector<Int> slots) {
                 p.add(std::move(name), engine::project_gathered(stack, {index, experts}, in, out, std::move(slots)));
             })
        .def("sum_gathered",
             [](Program& p, std::string name, Int experts, Columns index, Columns weights, Columns in, Columns out) {
                 p.add(std::move(name), engine::sum_gathered({index, experts}, weights, in, out));
             })
        .def("names",
             [](const Program& p) {
                 std::vector<std::string> names;
                 for (const auto& instruction : p.instructions()) names.push_back(instruction.name);
                 return names;
             })
        .def("run",
             [](const Program& p, Address tokens, Address seen, Int sequences, Int length, const HeldStates& states,
                int n_threads, int limit, bool each_token) {
                 const py::gil_scoped_release release;
                 Input given = input(tokens, seen, sequences, length, states, n_threads, limit);
                 given.each_token = each_token;
                 p.run(given);
                 move_on(seen, sequences, length);
             })
        .def(
            "profile",
            [](const Program& p, Address tokens, Address seen, Int sequences, Int length, const HeldStates& states,
               int n_threads, int limit) {
                const py::gil_scoped_release release;
                std::vector<double> seconds =
                    p.profile(input(tokens, seen, sequences, length, states, n_threads, limit));
                move_on(seen, sequences, length);
                return seconds;
            },
            "Runs the program; the seconds of each instruction.");
}

}  // namespace klfast
