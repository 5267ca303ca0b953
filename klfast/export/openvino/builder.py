"""``GraphBuilder``: lowers the layers of a model to the nodes of an OpenVINO graph."""

from __future__ import annotations

from klfast.export.openvino.attention import GraphAttention
from klfast.export.openvino.experts import GraphExperts
from klfast.export.openvino.recurrences import GraphRecurrences
from klfast.export.openvino.vectors import GraphVectors


class GraphBuilder(GraphRecurrences, GraphAttention, GraphExperts, GraphVectors):
    """Builds the graph of a model, as ``GraphBase`` says, by the calls with which families lower theirs."""
