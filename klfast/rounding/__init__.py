"""Second-order rounding: a weight is rounded so that the layer's output changes least, on calibration text.

In the modules that round a matrix it lies transposed, [K, N]: the weights of one input feature are adjacent, since
features are rounded one after another, each in all rows at once. Each of these modules imports only those before it:
grids -> objective -> gptq, descent -> second_order. The others walk through a model: moments, watching -> experts ->
walk.
"""
