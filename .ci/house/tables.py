"""What moves where. Paths are relative to the repository's root; a module moves whole, `move.py --names` moves single names first."""

# ---------------------------------------------------------------------------------------------------- klfast/ (move.py ROOT)
MOVES = {
    # core: imports nothing of klfast
    "klfast/errors.py": "klfast/core/errors.py",  # klfast/errors.py stays as a public alias, see ALIASES
    "klfast/files.py": "klfast/core/io.py",
    "klfast/temporaries.py": "klfast/core/temporaries.py",
    "klfast/signed_json.py": "klfast/core/signed_json.py",
    "klfast/interrupts.py": "klfast/core/interrupts.py",
    "klfast/progress.py": "klfast/core/progress.py",
    "klfast/tally.py": "klfast/core/window_stats.py",
    "klfast/arguments.py": "klfast/core/arguments.py",
    "klfast/placement.py": "klfast/core/placement.py",
    "klfast/torch_internals.py": "klfast/core/torch_internals.py",
    "klfast/machine.py": "klfast/core/machine.py",  # made by --names
    "klfast/bundled.py": "klfast/core/bundled.py",  # made by --names
    # dispatch
    "klfast/registry.py": "klfast/dispatch/registry.py",
    "klfast/runtime.py": "klfast/dispatch/pins.py",
    "klfast/op_arguments.py": "klfast/dispatch/checks.py",
    # quant
    "klfast/types.py": "klfast/quant/types.py",
    "klfast/packing.py": "klfast/quant/packing.py",  # made by --names
    "klfast/layouts.py": "klfast/quant/layouts.py",
    "klfast/quantization.py": "klfast/quant/rounding.py",
    # reference
    "klfast/reference.py": "klfast/reference/__init__.py",
    "klfast/reference_divergence.py": "klfast/reference/divergence.py",
    "klfast/reference_ssm.py": "klfast/reference/ssm.py",
    # backends
    "klfast/backends/cpu.py": "klfast/backends/cpu/matmul.py",
    "klfast/backends/cpu_products.py": "klfast/backends/cpu/products.py",
    "klfast/backends/cpu_divergence.py": "klfast/backends/cpu/divergence.py",
    "klfast/backends/cpu_ssm.py": "klfast/backends/cpu/ssm.py",
    "klfast/backends/memory.py": "klfast/backends/cpu/memory.py",
    "klfast/backends/triton.py": "klfast/backends/triton/matmul.py",
    "klfast/backends/triton_divergence.py": "klfast/backends/triton/divergence.py",
    "klfast/backends/triton_ssm.py": "klfast/backends/triton/ssm.py",
    # ops
    "klfast/ops.py": "klfast/ops/__init__.py",
    "klfast/ops_attention.py": "klfast/ops/attention.py",
    "klfast/ops_divergence.py": "klfast/ops/divergence.py",
    "klfast/ops_ssm.py": "klfast/ops/ssm.py",
    "klfast/transforms.py": "klfast/ops/transforms.py",
    # nn
    "klfast/nn.py": "klfast/nn/__init__.py",
    "klfast/lazy_weight.py": "klfast/nn/lazy_weight.py",
    "klfast/prepared.py": "klfast/nn/direct_call.py",
    "klfast/models/mamba_step.py": "klfast/nn/mamba_step.py",
    # models
    "klfast/batches.py": "klfast/models/batches.py",
    "klfast/models/layers.py": "klfast/models/linears.py",
    "klfast/models/chain.py": "klfast/models/block_chain.py",
    # acceleration
    "klfast/models/native_ssm.py": "klfast/acceleration/patch.py",
    "klfast/models/native_forwards.py": "klfast/acceleration/forwards.py",
    # sensitivity
    "klfast/sensitivity/engine.py": "klfast/sensitivity/measure.py",
    "klfast/sensitivity/files.py": "klfast/sensitivity/merge.py",
    "klfast/sensitivity/prepared.py": "klfast/sensitivity/measuring_mode.py",
    "klfast/sensitivity/published.py": "klfast/sensitivity/kl_ssm_quant.py",
    # planning
    "klfast/planner/__init__.py": "klfast/planning/__init__.py",
    "klfast/planner/budget.py": "klfast/planning/budget.py",
    "klfast/planner/constraints.py": "klfast/planning/constraints.py",
    "klfast/planner/greedy.py": "klfast/planning/greedy.py",
    "klfast/planner/highs.py": "klfast/planning/highs.py",
    "klfast/planner/milp.py": "klfast/planning/milp.py",
    "klfast/planner/numbers_given.py": "klfast/planning/numbers_given.py",
    "klfast/planner/optimal.py": "klfast/planning/optimal.py",
    "klfast/planner/problem.py": "klfast/planning/problem.py",
    "klfast/planner/uniform.py": "klfast/planning/uniform.py",
    "klfast/plan_file.py": "klfast/planning/plan_file.py",
    # checkpoint
    "klfast/checkpoint.py": "klfast/checkpoint/save_load.py",
    "klfast/checkpoint_format.py": "klfast/checkpoint/folder_format.py",
    "klfast/checkpoint_tensors.py": "klfast/checkpoint/tensors.py",
    "klfast/convert.py": "klfast/checkpoint/apply_plan.py",
    "klfast/transformers_view.py": "klfast/checkpoint/transformers_view.py",
    "klfast/loading.py": "klfast/checkpoint/loading.py",
    "klfast/loading_errors.py": "klfast/checkpoint/loading_errors.py",
    "klfast/sources.py": "klfast/checkpoint/sources.py",
    "klfast/model_config.py": "klfast/checkpoint/model_config.py",
    "klfast/model_folder.py": "klfast/checkpoint/model_folder.py",
    # generation
    "klfast/decode.py": "klfast/generation/loop.py",
    "klfast/stepper.py": "klfast/generation/stepper.py",
    "klfast/generation_settings.py": "klfast/generation/settings.py",
    "klfast/sampling.py": "klfast/generation/sampling.py",
    "klfast/stopping.py": "klfast/generation/stopping.py",
    # beside evaluation.py and demo.py, which stay
    "klfast/data.py": "klfast/text.py",
    # reporting
    "klfast/report.py": "klfast/reporting/tables.py",
    # benchkit
    "klfast/suites.py": "klfast/benchkit/suites.py",  # made by --names
    "klfast/device/timing.py": "klfast/benchkit/clock.py",
    "bench/contest.py": "klfast/benchkit/runner.py",
    "bench/settings.py": "klfast/benchkit/settings.py",
    "bench/weights.py": "klfast/benchkit/weights.py",
    "bench/peers.py": "klfast/benchkit/peers.py",
    "bench/openvino_linear.py": "klfast/benchkit/openvino_linear.py",
    # diagnostics
    "klfast/diagnostics.py": "klfast/diagnostics/overview.py",
    "klfast/selfcheck.py": "klfast/diagnostics/op_checks.py",
    "klfast/device/bench.py": "klfast/diagnostics/device_bench.py",
    "klfast/device/checks.py": "klfast/diagnostics/kernel_checks.py",
    "klfast/device/facts.py": "klfast/benchkit/device_facts.py",  # bench/ and the doctor describe the machine with it
    "klfast/device/report.py": "klfast/diagnostics/device_report.py",
    # cli
    "klfast/cli/session.py": "klfast/cli/runtime.py",
    "klfast/cli/run.py": "klfast/cli/evaluate.py",
    # documents
    "bench/NOTES.md": "docs/KERNEL_NOTES.md",
}
REMOVED = ["klfast/device/__init__.py"]  # a docstring alone; its sentence is in that of klfast/diagnostics
STAYS = {"__init__.py", "__main__.py", "evaluation.py", "demo.py", "errors.py", "text.py", "py.typed"}  # of klfast/ itself
FOLDERS = {"klfast/planner": "klfast/planning", "klfast/device": "klfast/diagnostics"}  # where prose names the folder

# Packages whose __init__.py is made, with its docstring.
PACKAGES = {
    "klfast/core": "What every layer may use: errors, files, numbers, the machine. Imports nothing of klfast's other packages.",
    "klfast/dispatch": "Which implementation of an op runs: definitions and kernels by device, pins, checks of every call.",
    "klfast/quant": "Quantization formats: specs, quantized tensors, their layouts, and rounding to them.",
    "klfast/reference": "The truth: each op as one plain-torch function.",
    "klfast/backends/cpu": "Kernels on the CPU: the C++ extension klfast._C and what it is told of tensors.",
    "klfast/backends/triton": "Kernels on CUDA and XPU devices, in Triton but for linear.",
    "klfast/acceleration": "klfast's kernels inside transformers' own models: ``klfast.accelerate``.",
    "klfast/checkpoint": "Models from and to disk: loading by name, quantizing as a plan says, saving and loading quantized ones.",
    "klfast/generation": "Generating text: the loop, cache and positions, settings, draws, ends.",
    "klfast/reporting": "What sweeps and plans say, as tables and plots.",
    "klfast/benchkit": "What the bench suite and ``klfast doctor --device`` share: clock, runner, contenders, weights.",
    "klfast/diagnostics": "What runs on this machine, why not the rest, and whether it is right: ``klfast.explain``, ``klfast.doctor``.",
}

# Old public modules that stay importable: klfast.<name> with the public names of its new place.
ALIASES = {"errors": "What klfast raises; the public name of klfast.core.errors."}

# Modules whose new last name says little on its own: `import ... as <old name>`, so that their uses stay as they are.
KEEPS_LOCAL_NAME = {
    "klfast.backends.cpu", "klfast.backends.cpu_divergence", "klfast.backends.cpu_ssm", "klfast.backends.triton",
    "klfast.backends.triton_divergence", "klfast.backends.triton_ssm", "klfast.ops_attention", "klfast.ops_divergence", "klfast.ops_ssm",
    "klfast.reference_divergence", "klfast.reference_ssm", "klfast.files",
}

# Text that no rule above finds: (new path, old, new). One that does not apply is reported.
FIXUPS = [
    ("klfast/backends/triton/matmul.py", 'f"klfast.backends.{module}"', 'f"klfast.backends.triton.{module}"'),
    ("klfast/backends/triton/matmul.py", '_from("triton_divergence", name)', '_from("divergence", name)'),
    ("klfast/backends/triton/matmul.py", '_from("triton_ssm", name)', '_from("ssm", name)'),
    ("tests/test_registry.py", '"cpu_products" in str(error)', '"cpu.products" in str(error)'),
    ("klfast/acceleration/patch.py", "(native_forwards.py)", "(forwards.py)"),
    (
        "klfast/__init__.py",
        "__all__ = sorted(_PUBLIC)\n\n\ndef __getattr__(name: str) -> object:\n",
        '_MODULES = ("errors",)  # public modules that klfast itself does not import\n\n__all__ = sorted(_PUBLIC)\n\n\n'
        'def __getattr__(name: str) -> object:\n    if name in _MODULES:\n        return importlib.import_module(f"klfast.{name}")\n',
    ),
]

# ------------------------------------------------------------------------------------------- single names (move.py ROOT --names)
# In the flat layout, before the move: (module, name) -> (module, name). Breaks the circles between the packages to come.
NAMES = {
    ("klfast.ops_divergence", "_head_rows"): ("klfast.backends.operands", "head_rows"),
    ("klfast.ops_divergence", "as_head"): ("klfast.backends.operands", "as_head"),
    ("klfast.ops_divergence", "flat_targets"): ("klfast.backends.operands", "flat_targets"),
    ("klfast.ops_ssm", "_empty_channel_last"): ("klfast.backends.operands", "empty_channel_last"),
    ("klfast.prepared", "FEW_ROWS"): ("klfast.backends.operands", "FEW_ROWS"),
    ("klfast.layouts", "native"): ("klfast.backends.operands", "preferred_layout"),
    ("klfast.reference", "unpack"): ("klfast.packing", "unpack"),
    ("klfast.reference", "pack"): ("klfast.packing", "pack"),
    ("klfast.reference", "dequantize"): ("klfast.packing", "dequantize"),
    ("klfast.types", "Fingerprint"): ("klfast.models.fingerprint", "Fingerprint"),
    ("klfast.models.layers", "fingerprint"): ("klfast.models.fingerprint", "fingerprint"),
    ("klfast.models.layers", "require_match"): ("klfast.models.fingerprint", "require_match"),
    ("klfast.models.layers", "_norm"): ("klfast.models.fingerprint", "_norm"),
    ("klfast.types", "Plan"): ("klfast.plan_file", "Plan"),
    ("klfast.types", "Divergence"): ("klfast.ops_divergence", "Divergence"),
    ("klfast.sources", "ASSETS"): ("klfast.bundled", "ASSETS"),
    ("klfast.sources", "bundled_models"): ("klfast.bundled", "bundled_models"),
    ("klfast.device.facts", "_INSTALL"): ("klfast.machine", "_INSTALL"),
    ("klfast.device.facts", "_DRIVER"): ("klfast.machine", "_DRIVER"),
    ("klfast.device.facts", "require"): ("klfast.machine", "require"),
    ("klfast.cli.bench", "SUITES"): ("klfast.suites", "SUITES"),
    ("klfast.diagnostics", "cpu_name"): ("klfast.machine", "cpu_name"),
    ("klfast.diagnostics", "installed_version"): ("klfast.machine", "installed_version"),
    ("klfast.diagnostics", "extension"): ("klfast.machine", "extension"),
}
# Names that a module only hands on: uses go to their home, the definition stays where it is.
REFERENCES = {
    ("klfast.ops", "register_kernel"): ("klfast.registry", "register_kernel"),
    ("klfast.loading", "ASSETS"): ("klfast.bundled", "ASSETS"),
}
# Public names of klfast.<module> that stay importable there although their home is elsewhere.
REEXPORTS = {"klfast.reference": ("dequantize", "pack", "unpack")}
NEW_MODULES = {
    "klfast.backends.operands": "What every backend and the ops make of an op's arguments: heads, targets, outputs, layouts.",
    "klfast.packing": "Values of a few bits in int32 words, and the float matrix that a quantized tensor stands for.",
    "klfast.models.fingerprint": "What tells one model from another: the structure and norms of its linear layers.",
    "klfast.bundled": "The models and texts that come with klfast.",
    "klfast.suites": "The suites of bench/, by name; imports nothing, so that the command line can name them at once.",
    "klfast.machine": "What this machine is: CPU, packages, the extension, and which devices torch can use.",
}
NAME_FIXUPS = [  # (path, old, new), after the names moved
    (
        "klfast/ops.py", "import register_kernel, same_device, unavailable  # noqa: F401 (register_kernel: for klfast.backends)",
        "import same_device, unavailable",
    ),
    ("klfast/plan_file.py", '"""Plans as JSON: what ``Plan.to_json`` and ``Plan.from_json`` do."""', '"""Plans, and plans as JSON."""'),
    # sizes: the suite's options need them as the command line's do
    ("klfast/arguments.py", '"""Checks of numeric arguments, with one line that says what is wanted."""', '"""Numbers that users give, checked; one line says what is wanted."""'),
    ("klfast/arguments.py", "import math\nfrom collections", "import math\nimport re\nfrom collections"),
    (
        "klfast/arguments.py", "_LARGEST = 2**63 - 1  # what torch can hold\n",
        "_LARGEST = 2**63 - 1  # what torch can hold\n"
        '_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)}, **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}}\n',
    ),
    (
        "klfast/arguments.py", '        raise InvalidInputError(f"{name} must be {wanted}, got {value!r}")\n    return found\n',
        '        raise InvalidInputError(f"{name} must be {wanted}, got {value!r}")\n    return found\n\n\n'
        'def parse_bytes(text: str) -> int:\n'
        '    """Bytes of a size such as "3200000", "3.2MB" (powers of 1000) or "1.5GiB" (of 1024); InvalidInputError for anything else."""\n'
        '    match = re.fullmatch(r"(\\d+(?:\\.\\d+)?)\\s*([A-Za-z]*)", text.strip())\n'
        '    unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)\n'
        '    if unit is None:\n'
        '        raise InvalidInputError(f"{text!r} is not a size (examples: 3200000, 3.2MB, 1.5GiB)")\n'
        '    size = float(match[1]) * _UNITS[unit]\n'
        '    if size > _LARGEST:\n'
        '        raise InvalidInputError("that is more bytes than any model has (examples: 3200000, 3.2MB, 1.5GiB)")\n'
        '    return int(size)\n',
    ),
    (
        "klfast/cli/options.py",
        '_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)}, **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}}\n\n\n'
        'def parse_bytes(text: str) -> int:\n'
        '    """Bytes of a size such as "3200000", "3.2MB" (powers of 1000) or "1.5GiB" (of 1024)."""\n'
        '    match = re.fullmatch(r"(\\d+(?:\\.\\d+)?)\\s*([A-Za-z]*)", text.strip())\n'
        '    unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)\n'
        '    if unit is None:\n'
        '        raise typer.BadParameter(f"{text!r} is not a size (examples: 3200000, 3.2MB, 1.5GiB)")\n'
        '    size = float(match[1]) * _UNITS[unit]\n'
        '    if size >= 2**63:\n'
        '        raise typer.BadParameter("that is more bytes than any model has (examples: 3200000, 3.2MB, 1.5GiB)")\n'
        '    return int(size)\n',
        '\ndef parse_bytes(text: str) -> int:\n'
        '    """As ``klfast.arguments.parse_bytes``; a wrong one is wrong usage."""\n'
        '    try:\n        return _parse_bytes(text)\n'
        '    except InvalidInputError as error:\n        raise typer.BadParameter(str(error)) from None\n',
    ),
    ("klfast/cli/options.py", "from klfast.errors import InvalidInputError\n", "from klfast.arguments import parse_bytes as _parse_bytes\nfrom klfast.errors import InvalidInputError\n"),
    ("klfast/cli/options.py", "import inspect\nimport re\nfrom", "import inspect\nfrom"),
    ("bench/settings.py", "from klfast.cli.options import parse_bytes", "from klfast.arguments import parse_bytes"),
    ("klfast/plan_file.py", "        from klfast import plan_file\n\n        return plan_file.write(", "        return write("),
    ("klfast/plan_file.py", "        from klfast import plan_file\n\n        return plan_file.read(", "        return read("),
]

# ---------------------------------------------------------------------------------------------------------- csrc/ (move.py ROOT --csrc)
_TIERS = ("scalar", "avx2", "avxvnni", "avx512vnni", "avx512bf16", "amx")


def _folder(old: str, new: str, **names: str) -> dict[str, str]:
    """Files of a folder: those named here get another name (`.h` and `.cpp` of it), those of tiers keep theirs."""
    found = {f"csrc/{old}/{tier}.cpp": f"csrc/{new}/{tier}.cpp" for tier in _TIERS}
    for name, to in names.items():
        for suffix in (".h", ".cpp"):
            found[f"csrc/{old}/{name}{suffix}"] = f"csrc/{new}/{to}{suffix}"
    return found


CSRC = {
    # python: all that knows of Python; the rest builds and can be tested without it
    "csrc/module.cpp": "csrc/python/module.cpp",
    "csrc/view_caster.h": "csrc/python/view_caster.h",
    **_folder("step", "python", watch="watch"),
    **{
        f"csrc/{old}/bindings{suffix}": f"csrc/python/bind_{new}{suffix}"
        for old, new in (
            ("dequant_matmul", "dequant_matmul"), ("linear", "linear"), ("attention", "attention"), ("divergence", "divergence"), ("scan", "ssm"), ("step", "prepared"),
        )
        for suffix in (".h", ".cpp")
    },
    # core
    "csrc/dispatch.h": "csrc/core/tiers.h",
    "csrc/dispatch.cpp": "csrc/core/tiers.cpp",
    "csrc/numeric.h": "csrc/core/dtype.h",
    "csrc/parallel.h": "csrc/core/parallel.h",
    "csrc/view.h": "csrc/core/tensor_view.h",
    "csrc/buffer.h": "csrc/core/buffer.h",
    # simd: floats and ints in vectors, tiles
    **_folder(
        "vec", "simd", scalar="floats_scalar", avx2="floats_avx2", avx512="floats_avx512", ints_scalar="ints_scalar", ints_avx2="ints_avx2",
        ints_avx512="ints_avx512", dot_avx2="dot_avx2", dot_avxvnni="dot_avxvnni", math="math", tile="tile_io", tiles_amx="amx", tiles_model="amx_model",
    ),
    # gemm: what the products share
    **_folder(
        "product", "gemm", product="args", common="common", division="partition", segments="segments", fp32="fp32", bf16="bf16", tiles="amx",
        bf16_tiles="amx_bf16",
    ),
    "csrc/scan/gemm.h": "csrc/gemm/small.h",
    # the five families
    **_folder(
        "dequant_matmul", "matmul/quantized", dequant_matmul="dequant_matmul", body="choose", exact="digits", panel="weight_panel",
        quantized_x="int8_activations", few_rows="exact_few_rows", several_rows="exact_several_rows", exact_large="exact_many_rows",
        pairs="exact_bf16_source", few_rows_int8="int8_few_rows", int8="int8_many_rows", int8_tiles="int8_many_rows_amx",
    ),
    **_folder("linear", "matmul/dense", linear="linear", few_rows="few_rows", body="many_rows", bf16_rows="bf16_source"),
    **_folder("attention", "attention", attention="decode_attention", attention_body="body"),
    **_folder("divergence", "divergence", divergence="divergence", state="token_state", sums="vector_loops", parts="parts", power="power"),
    **_folder("conv", "ssm/conv", conv="causal_conv1d", conv_body="body"),
    **_folder("scan", "ssm/scan", scan="scan", selective_scan_body="selective_scan", state_update_body="state_update", chunk_scan_body="chunk_scan"),
    **_folder("norm", "norm", norm="rms_norm", norm_body="body"),
    # prepared: layers made once and called often
    **_folder("step", "prepared", projection="linear_layer", mamba_step="mamba_step"),
}
CSRC_FOLDERS = {
    "csrc/vec": "csrc/simd", "csrc/product": "csrc/gemm", "csrc/dequant_matmul": "csrc/matmul/quantized", "csrc/linear": "csrc/matmul/dense",
    "csrc/conv": "csrc/ssm/conv", "csrc/scan": "csrc/ssm/scan", "csrc/step": "csrc/prepared",
}
CSRC_FIXUPS = [
    (
        "csrc/python/module.cpp", "// The extension module: each folder binds its own kernels (bindings.cpp), GIL released; no arithmetic.",
        "// The extension module: bind_*.cpp bind the kernels of a family each, GIL released; no arithmetic. Nothing outside csrc/python knows of Python.",
    ),
]

# -------------------------------------------------------------------------------------------------------- tests/ (move.py ROOT --tests)
def _tests(folder: str, *names: str, **renamed: str) -> dict[str, str]:
    same = {f"tests/test_{name}.py": f"tests/{folder}/test_{name}.py" for name in names}
    return same | {f"tests/test_{old}.py": f"tests/{folder}/test_{new}.py" for old, new in renamed.items()}


_HELPERS = (
    "families", "guarded_memory", "hybrid_families", "hymba_models", "op_calls", "other_families", "other_process", "sweep_models", "tiny_folder",
    "tokenizer_kinds", "triton_aot", "triton_launches", "writing_model",
)
TESTS = {
    **{f"tests/{name}.py": f"tests/support/{name}.py" for name in _HELPERS},
    **_tests("core", "signed_json", "progress", "torch_internals", files="io", tally="window_stats"),
    **_tests("dispatch", "registry", op_arguments="checks"),
    **_tests("quant", "layouts", "storable", quantization="rounding"),
    # others take cases from these, so they keep their names
    **_tests("ops", "attention", "dequant_matmul", "divergence", "divergence_range", "extremes", "gradients", "infinities", "linear", "ssm_ops"),
    **_tests("backends/cpu", "memory"),
    # not in a folder called triton: beside others on sys.path it would be found, as a namespace package, where Triton is not installed
    **_tests("backends", "triton", "triton_aot", "triton_ptx", "xpu_workers"),
    "tests/verify_xpu.py": "tests/backends/verify_xpu.py",
    **_tests("nn", "lazy_weight", "mamba_step", qlinear="quant_linear", prepared="direct_call", prepared_threads="direct_call_threads"),
    **_tests("models", "batches", "selection", layers="linears", chain="block_chain"),
    **_tests("models/hymba", "hymba", "hymba_config", "hymba_offload", "hymba_padding", "hymba_pipeline"),
    **_tests("acceleration", "accelerate", "accelerated_models"),
    **_tests("sensitivity", "merge", "results", "sweep", "sweep_effects", "sweep_input", "sweep_interrupt", "sweep_resume", published="kl_ssm_quant"),
    **_tests("planning", "plan_file", "planner", "planner_numbers", "planner_patterns"),
    **_tests(
        "checkpoint", "checkpoint", "checkpoint_damage", "checkpoint_families", "checkpoint_tied", "hub", "loading", "model_folder", "quantized_models",
        convert="apply_plan",
    ),
    **_tests("generation", "generate", "generate_options"),
    **_tests("reporting", report="tables"),
    **_tests("benchkit", "bench"),
    **_tests("diagnostics", "diagnostics", "doctor_device"),
    **_tests("cli", "cli", "cli_generate", "cli_plan", "cli_sweep", "quantize_command", "text_stream"),
    **_tests(".", "evaluation", "demo", data="text"),
    **_tests("project", "assets", "ci", "setup", "training_scan"),  # not "packaging": transformers imports a package of that name
}
TESTS = {old: new.replace("/./", "/") for old, new in TESTS.items()}
TEST_FOLDERS = {"tests/device": "tests/backends/device", "tests/xpu": "tests/backends/xpu"}  # whole
TEST_STAYS = {"tests/conftest.py"}
PYTHONPATH = ["tests/support", "tests/ops"]  # helpers; tests whose cases run on devices as well
TEST_FIXUPS = [
    ("tests/conftest.py", 'else ["device"]', 'else ["backends/device"]'),
    ("tests/backends/test_triton.py", 'str(HERE / "device")', 'str(HERE / "backends" / "device")'),
    (
        "tests/checkpoint/test_checkpoint.py", 'os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}',
        'os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}',
    ),
    ("tests/checkpoint/test_checkpoint.py", "cwd=Path(__file__).parents[1]", "cwd=Path(__file__).parent"),
    ("Makefile", "PYTHONPATH=.:tests ", "PYTHONPATH=.:tests/support:tests/ops "),
    (
        ".ci/run", "    test_{accelerate,chain,checkpoint,convert,evaluation,generate,layers,loading,ssm_ops}.py test_hymba*.py test_sweep*.py",
        "    acceleration/test_accelerate.py checkpoint/test_{apply_plan,checkpoint,loading}.py generation/test_generate.py \\\n"
        "    models/test_{block_chain,linears}.py models/hymba ops/test_ssm_ops.py sensitivity/test_sweep*.py test_evaluation.py",
    ),
]
