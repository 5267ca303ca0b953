"""Train klfast's bundled models: a byte-level BPE tokenizer with Mamba, Mamba-2 or Hymba, from one text file.

    python examples/train_bundled.py --arch mamba  --train train.txt.zst --valid valid.txt.zst --out models/mamba
    python examples/train_bundled.py --arch mamba2 --train train.txt.zst --valid valid.txt.zst --out models/mamba2
    python examples/train_bundled.py --arch hymba  --train train.txt.zst --valid valid.txt.zst --out models/hymba
    python examples/train_bundled.py --evaluate models/mamba --valid valid.txt.zst

Each command writes a folder for AutoModelForCausalLM and AutoTokenizer, with training_log.csv. The models are
transformers' classes (Hymba: klfast's) with their scans replaced during training (training_scan.py); `--evaluate` uses
them unchanged.

The validation text decides nothing: the last step's weights are kept, and the text only fills a column of the log. The
seed fixes the initial weights and the order of the data, so that a machine repeats itself; another machine, or another
number of threads, rounds differently.

Time: about 1.8 s per step of 4096 tokens (Hymba: 3.1 s) on one free core of a server CPU (AMD Zen 4, AVX-512 BF16),
half an hour (Hymba: one) for the default 1000 steps. Two runs at once on two busy cores took 42 and 46 minutes. The
CUDA path is plain torch and has not been run. On Linux the allocator returns large blocks to the system at every step,
which costs up to a fifth of the time; to prevent it, set
MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456.
"""

import argparse
import copy
import csv
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import training_scan
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from klfast.models.hymba import HymbaConfig, HymbaForCausalLM

VOCABULARY = 4096
END, PADDING = "<|endoftext|>", "<|padding|>"  # ids 0 and 1
WINDOW = 1024


# ---------------------------------------------------------------------------------------------------------------------
# Models: a new architecture is one more entry of ARCHITECTURES


@dataclass(frozen=True)
class Architecture:
    """How to make a model.

    Attributes:
        build: returns a model with random weights.
        prepare: makes the model class trainable at a bearable speed.
    """

    build: Callable[[], nn.Module]
    prepare: Callable[[], None]


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "expand": 2,
    "conv_kernel": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": True,
}


def build_mamba():
    """Return a Mamba model."""
    return MambaForCausalLM(MambaConfig(**COMMON, state_size=16, time_step_rank=16))


def build_mamba2():
    """Return a Mamba-2 model."""
    # transformers' default limit of infinity is not JSON; a step of 100 forgets everything at any decay rate in use.
    sizes = {
        "num_heads": 8,
        "head_dim": 64,
        "n_groups": 1,
        "state_size": 64,
        "chunk_size": 64,
        "time_step_limit": [0.0, 100.0],
    }
    return Mamba2ForCausalLM(Mamba2Config(**COMMON, **sizes))


def build_hymba():
    """Return a Hymba model with all features of the released one.

    Memory tokens, windows, global layers, and a group of layers that shares keys and values.
    """
    config = HymbaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_memory_tokens=16,
        sliding_window=128,
        global_attn_idx=[0, 4, 7],
        kv_reuse_group=[[1, 2, 3]],
        use_cache=True,
        max_position_embeddings=4096,
        orig_max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = HymbaForCausalLM(config)
    for layer in model.model.layers:
        # Mamba's initialisation (arXiv 2312.00752, section 3.6): steps between 0.001 and 0.1, by softplus's inverse.
        step = torch.exp(torch.rand(config.d_inner) * math.log(100) + math.log(0.001))
        layer.mamba.dt_proj[0].bias.data.copy_(step + torch.log(-torch.expm1(-step)))
    return model


ARCHITECTURES = {
    "mamba": Architecture(build_mamba, lambda: training_scan.install("mamba")),
    "mamba2": Architecture(build_mamba2, lambda: training_scan.install("mamba2")),
    "hymba": Architecture(build_hymba, lambda: training_scan.install("hymba")),
}


# ---------------------------------------------------------------------------------------------------------------------
# Text and tokens


def read_text(path):
    """Return the UTF-8 text of a .txt or .txt.zst file."""
    path = Path(path)
    if path.suffix != ".zst":
        return path.read_text(encoding="utf-8")
    try:
        import zstandard
    except ImportError:
        return subprocess.run(["zstd", "-dc", path], check=True, capture_output=True).stdout.decode()
    with zstandard.open(path, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def split_documents(text):
    """Split a text into documents: each very long line (a speech), and the lines between two of them (a book)."""
    documents, lines = [], []
    for line in text.splitlines(keepends=True):
        if len(line) > 2000:
            documents += ["".join(lines), line]
            lines = []
        else:
            lines.append(line)
    documents.append("".join(lines))
    return [d for d in documents if d.strip()]


def train_tokenizer(text):
    """Return a byte-level BPE tokenizer: it encodes every byte string, and decoding restores the text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PADDING],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(split_documents(text), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PADDING, clean_up_tokenization_spaces=False
    )


def encode(tokenizer, documents):
    """Return one long tensor of ids, with an end-of-text token before each document."""
    ids = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids += [tokenizer.eos_token_id, *encoding.ids]
    return torch.tensor(ids)


def batches(ids, size, seed):
    """Yield batches [size, WINDOW + 1] forever; each epoch cuts the text at another offset and shuffles the windows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = torch.randint(WINDOW, (), generator=generator).item()
        starts = torch.arange(offset, len(ids) - WINDOW, WINDOW)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for group in starts[: len(starts) // size * size].split(size):
            yield torch.stack([ids[s : s + WINDOW + 1] for s in group.tolist()])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.inference_mode()
def bits_per_byte(model, tokenizer, text, stride=WINDOW // 2, batch=4):
    """Return the bits that the model needs per UTF-8 byte of the text.

    Every token is scored exactly once, the first one after an end-of-text token. A window holds WINDOW tokens, of which
    the last `stride` are scored (all in the first window), so later tokens have at least WINDOW - stride tokens of
    context.
    """
    ids = encode(tokenizer, [text])
    scored = torch.zeros(len(ids), dtype=torch.bool)
    scored[0] = True  # the end-of-text token itself is given, not predicted
    pad = F.pad(ids, (0, WINDOW))
    starts = range(0, max(len(ids) - 1 - WINDOW + stride, 1), stride)
    nats = 0.0
    for group in [starts[i : i + batch] for i in range(0, len(starts), batch)]:
        windows = torch.stack([pad[s : s + WINDOW + 1] for s in group]).to(model.device)
        logits = model(windows[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")  # [batch, WINDOW]
        losses = losses.double().cpu()
        for start, loss in zip(group, losses, strict=True):
            target = slice(start + 1, min(start + 1 + WINDOW, len(ids)))
            new = ~scored[target]
            nats += loss[: len(new)][new].sum().item()
            scored[target] = True
    if not scored.all():
        raise AssertionError("a token of the text was left out")
    return nats / math.log(2) / len(text.encode())


def evaluate(folder, text):
    """Return a saved model's bits per byte in float32, computed by transformers' own code."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return bits_per_byte(model, tokenizer, text)


# ---------------------------------------------------------------------------------------------------------------------
# Training


PROJECTIONS = {"in_proj", "x_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}


def optimizers(model, rate):
    """Return Muon for the projections and AdamW for the rest, with one rate (Muon is scaled to AdamW's step size)."""
    groups = {"muon": [], "decay": [], "plain": []}
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and PROJECTIONS & set(name.split(".")):
            groups["muon"].append(parameter)
        else:
            groups["decay" if "embed" in name else "plain"].append(parameter)
    adamw = [{"params": groups["decay"], "weight_decay": 0.1}, {"params": groups["plain"], "weight_decay": 0.0}]
    return [
        torch.optim.Muon(groups["muon"], lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, lr=rate, betas=(0.9, 0.98)),
    ]


def schedule(step, steps, warmup):
    """Return the fraction of the peak learning rate: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def mean_loss(model, windows):
    """Return the mean cross-entropy, computed from one sequence's logits at a time to save memory."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    hidden = model.base_model(inputs, use_cache=False)[0]
    head = model.get_output_embeddings()
    losses = [F.cross_entropy(head(h).float(), t, reduction="sum") for h, t in zip(hidden, targets, strict=True)]
    return sum(losses) / targets.numel()


def save(model, tokenizer, out):
    """Save the model in bfloat16, and the tokenizer."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    if hasattr(half.config, "rescale_prenorm_residual"):
        half.config.rescale_prenorm_residual = False  # from_pretrained would divide out_proj again
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(arguments):
    """Train a model and save it with its log."""
    torch.manual_seed(arguments.seed)
    architecture = ARCHITECTURES[arguments.arch]
    architecture.prepare()
    device = torch.device(arguments.device)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    text, valid = read_text(arguments.train), read_text(arguments.valid)
    tokenizer = train_tokenizer(text)
    ids = encode(tokenizer, split_documents(text))
    model = architecture.build().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(ids):,} tokens, {len(text.encode()) / len(ids):.2f} bytes per token")

    optimizer_list = optimizers(model, arguments.rate)
    stream = batches(ids, arguments.batch, arguments.seed)
    autocast = torch.autocast(device.type, torch.bfloat16)
    begin, running = time.monotonic(), []
    with open(out / "training_log.csv", "w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        log.writerow(["step", "tokens", "lr", "train_loss", "valid_bits_per_byte", "seconds"])
        for step in range(arguments.steps):
            fraction = schedule(step, arguments.steps, arguments.warmup)
            for optimizer in optimizer_list:
                for group in optimizer.param_groups:
                    group["lr"] = arguments.rate * fraction
            model.train()
            with autocast:
                loss = mean_loss(model, next(stream).to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizer_list:
                optimizer.step()
                optimizer.zero_grad()
            running.append(loss.item())

            done = step + 1
            measure = done % arguments.valid_every == 0 or done == arguments.steps
            if measure or done % 50 == 0:
                bits = ""
                if measure:  # on disjoint windows, which is cheaper than --evaluate and gives slightly higher values
                    model.eval()
                    with autocast:
                        bits = f"{bits_per_byte(model, tokenizer, valid, stride=WINDOW):.4f}"
                    save(model, tokenizer, out)
                row = [
                    done,
                    done * arguments.batch * WINDOW,
                    f"{arguments.rate * fraction:.3e}",
                    f"{sum(running) / len(running):.4f}",
                    bits,
                ]
                row.append(f"{time.monotonic() - begin:.0f}")
                log.writerow(row)
                file.flush()
                print(*row, flush=True)
                running.clear()


def main():
    """Parse the command line; train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES)
    parser.add_argument("--train", help="text to train on, .txt or .txt.zst")
    parser.add_argument("--valid", required=True, help="text to measure on, .txt or .txt.zst")
    parser.add_argument("--out", help="folder for the model")
    parser.add_argument("--evaluate", metavar="DIR", help="only measure a saved model")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help=f"sequences of {WINDOW} tokens per step")
    parser.add_argument("--rate", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--valid-every", type=int, default=250, help="steps between measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.evaluate:
        print(f"{evaluate(arguments.evaluate, read_text(arguments.valid)):.4f} bits per byte")
    elif arguments.arch and arguments.train and arguments.out:
        train(arguments)
    else:
        parser.error("either --evaluate, or --arch, --train and --out")


if __name__ == "__main__":
    main()
