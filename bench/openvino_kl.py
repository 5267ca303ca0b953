"""The KL of exported models in OpenVINO beside klfast's own, on the bundled Hymba.

python -m klfast.bench.openvino_kl --out bench/results/openvino_kl.md
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from klfast.bench.document import RESULTS

import klfast
from klfast.benchkit.openvino_core import core
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.export.openvino.write import MODEL
from klfast.models.matrices import matrices
from klfast.reporting.table import Cell, Table

LENGTH = 256
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
SETTINGS: dict[str, dict[str, str]] = {"exact": EXACT, "OpenVINO's defaults": {}}
HEADINGS = ("weights", "MB", "klfast", *SETTINGS, "largest difference of logits, exact")


def study(windows: int) -> Table:
    """Return KL of full precision, uniform INT4 and a plan of as many bytes, in klfast and in OpenVINO."""
    teacher, tokenizer = klfast.load_model("hymba", dtype="float32"), klfast.load_tokenizer("hymba")
    sizes = {"vocab_size": teacher.config.vocab_size, "length": LENGTH, "windows": windows}
    text = klfast.token_batches("evaluation", tokenizer, **sizes)
    plans = {
        "full precision": None,
        "uniform int4-g64-sym": klfast.Plan(dict.fromkeys(matrices(teacher), "int4-g64-sym"), "uniform"),
        "planned": klfast.Plan.from_json(RESULTS / "hymba_report" / "plan.json"),
    }
    rows: list[tuple[Cell, ...]] = []
    for name, plan in plans.items():
        model = copy.deepcopy(teacher)
        if plan is not None:
            klfast.quantize_model(model, plan)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model" / MODEL
            klfast.export_openvino(model, file.parent)
            size = file.with_suffix(".bin").stat().st_size / 1e6
            figures = _figures(teacher, model, file, text)
        rows.append((name, size, *figures))
        print(*rows[-1], flush=True)
    return Table("Hymba: mean KL from full precision, nats per token", HEADINGS, tuple(rows))


@torch.inference_mode()
def _figures(teacher: torch.nn.Module, model: torch.nn.Module, file: Path, text: list[torch.Tensor]) -> list[float]:
    """Return KL in klfast and with each of the settings, then the largest difference of logits with the first."""
    requests = [core().compile_model(file, "CPU", settings).create_infer_request() for settings in SETTINGS.values()]
    sums, largest = np.zeros(1 + len(requests)), 0.0
    windows = torch.cat(text).split(1)
    for ids in windows:
        truth, own = (each(ids).logits[0] for each in (teacher, model))
        theirs = []
        for request in requests:
            request.reset_state()
            inputs = {"attention_mask": np.ones((1, 1), np.int64), "beam_idx": np.zeros(1, np.int32)}
            theirs.append(torch.from_numpy(request.infer({"input_ids": ids.numpy(), **inputs})["logits"][0].copy()))
        sums += [klfast.logit_divergence(truth, found).kl_teacher_student.mean().item() for found in (own, *theirs)]
        largest = max(largest, (theirs[0] - own).abs().max().item())
    return [*(sums / len(windows)).tolist(), largest]


def main() -> None:
    """Study the bundled Hymba and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24, help=f"evaluation windows of {LENGTH} tokens")
    arguments = parser.parse_args()
    table = study(arguments.windows)
    conditions = (
        f"On {arguments.windows * LENGTH:,} tokens of evaluation text. `python -m klfast.bench.openvino_kl` on "
        f"{cpu_name()}, {torch.get_num_threads()} threads, klfast {klfast.__version__}, torch {torch.__version__}, "
        f"OpenVINO {ov.__version__.split('-')[0]}."
    )
    write_atomic(arguments.out, f"# KL in OpenVINO\n\n{conditions}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
