"""Whole models with random weights, plain transformers against klfast.accelerate: prefill and decode.

    python bench/forward.py [--models mamba-130m] [--dtypes bfloat16] [--threads 2] [--repeats 5] [--output bench/results/forward.csv]

Plain and accelerated runs alternate, one to three, so that both see the same machine; figures are medians of wall time,
"ratio_of_minima" is that of the fastest runs. "gemm" is the time of the accelerated model's linear layers alone on inputs
of the same shape, "scan" that of its state-space op, "rest" what is left of the accelerated forward. Each run first
checks, in float32, that both forwards give the same logits. Prints one line of JSON a model and appends it to the CSV.
"""

import argparse
import csv
import json
import platform
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import klfast
from klfast import runtime

MODELS = {
    "mamba-130m": lambda: MambaForCausalLM(MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16)),
    "mamba2-130m": lambda: Mamba2ForCausalLM(
        Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64, state_size=128, n_groups=1)
    ),
}
BATCH, LENGTH, DECODED, FAST_RUNS = 2, 512, 16, 3


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def linears_alone(model):
    """A run of every linear layer on inputs of the forward's shape."""
    calls = [(m, torch.randn(BATCH, LENGTH, m.in_features, dtype=m.weight.dtype)) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return lambda: [m(x) is None for m, x in calls]


def scan_seconds(run):
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    return sum(e.self_cpu_time_total for e in record.key_averages() if e.key in ("klfast::selective_scan", "klfast::mamba_chunk_scan")) / 1e6


@torch.inference_mode()
def check(model, prompt):
    """In float32: layer by layer random weights blow a rounding up, and after 24 of them two bf16 runs have little in common."""
    expected = model(prompt, use_cache=False).logits
    found = klfast.accelerate(model)(prompt, use_cache=False).logits
    difference = ((found - expected).norm() / expected.norm()).item()
    if difference > 2e-3:
        raise SystemExit(f"accelerated logits differ from plain ones by {difference:.1e}: no figure for a wrong result")


@torch.inference_mode()
def measure(name, dtype, repeats):
    torch.manual_seed(0)
    prompt = torch.randint(0, 50280, (BATCH, LENGTH))
    model = MODELS[name]().eval()
    check(model, prompt[:, :64])
    model.to(dtype)
    forward = lambda: model(prompt, use_cache=False)  # noqa: E731
    start = model(prompt[:1, :8], use_cache=True).cache_params

    def decode():
        for i in range(DECODED):
            model(prompt[:1, i : i + 1], cache_params=start, use_cache=True)

    gemm = linears_alone(model)
    decode(), gemm()
    times = {key: [] for key in ("plain", "fast", "plain_decode", "fast_decode", "gemm", "scan")}
    for _ in range(repeats):
        klfast.unaccelerate(model)
        times["plain"].append(timed(forward))
        times["plain_decode"].append(timed(decode))
        klfast.accelerate(model)
        for _ in range(FAST_RUNS):
            times["fast"].append(timed(forward))
            times["fast_decode"].append(timed(decode))
            times["gemm"].append(timed(gemm))
        times["scan"].append(scan_seconds(forward))
    plain, fast, plain_decode, fast_decode, gemm_s, scan_s = (statistics.median(t) for t in times.values())
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": f"{BATCH}x{LENGTH}",
        "plain_s": round(plain, 4),
        "accelerated_s": round(fast, 4),
        "ratio": round(plain / fast, 2),
        "ratio_of_minima": round(min(times["plain"]) / min(times["fast"]), 2),
        "tok_s": round(BATCH * LENGTH / fast),
        "gemm_s": round(gemm_s, 4),
        "scan_s": round(scan_s, 4),
        "rest_s": round(fast - gemm_s - scan_s, 4),
        "plain_decode_tok_s": round(DECODED / plain_decode, 1),
        "accelerated_decode_tok_s": round(DECODED / fast_decode, 1),
    }


def machine():
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "tier": runtime.available_tiers()[-1],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "klfast": klfast.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    for name in args.models:
        for dtype in args.dtypes:
            row = measure(name, getattr(torch, dtype), args.repeats) | machine()
            print(json.dumps(row), flush=True)
            if args.output:
                fresh = not args.output.exists()
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with args.output.open("a", newline="") as file:
                    writer = csv.DictWriter(file, row)
                    if fresh:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()
