// A call of a linear layer that is held: from rows in a torch tensor to a new tensor.
#pragma once

#include <pybind11/pybind11.h>

#include "prepared/linear_layer.h"

namespace klfast {

// layer(x): [..., N] from x [..., K] of `type`; None if x has another last dimension, gaps, or no memory.
pybind11::object multiply(const Projection& layer, pybind11::handle x, DType type, int n_threads, Tier limit);

}  // namespace klfast
