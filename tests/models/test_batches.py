"""Token ids in every supported form; padded rows give the same measurements as their text alone."""

import numpy as np
import pytest
import torch
import transformers
from sweep_models import KL, VOCAB, make, means, naive, tokens
from tiny_models import FAMILIES
from torch.utils.data import DataLoader, TensorDataset

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models import batches

pytestmark = pytest.mark.usefixtures("one_thread")
INT4 = klfast.QuantSpec(4, 32)
LENGTHS = (17, 9, 17, 2, 12, 1, 0)  # the last two predict nothing
TEXTS = [tokens(1, length, seed=i)[0] for i, length in enumerate(LENGTHS)]


def padded(side, texts=TEXTS, pad=VOCAB + 7):
    """Return a batch like a tokenizer's, whose pads are ids that the model does not have."""
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), pad), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def truth(model, name, texts=TEXTS):
    """Return every metric's mean over all predicted tokens, from separate texts and transformers' whole models."""
    parts = [naive(model, text[None], name, INT4) for text in texts if len(text) > 1]
    return {metric: torch.cat([part[metric].flatten() for part in parts]).mean().item() for metric in parts[0]}


@pytest.mark.parametrize(("family", "side"), [*((family, "left") for family in FAMILIES), ("llama", "right")])
def test_a_sweep_ignores_pads(family, side):
    model = make(family)
    name = next(name for name, _ in model.named_modules() if name.endswith(("in_proj", "up_proj")))
    (measured,) = klfast.sweep(model, [padded(side)], INT4, layers=name).measurements.values()
    assert measured.tokens == 16 + 8 + 16 + 1 + 11
    for metric, expected in truth(model, name).items():
        room = {"delta_ce": 5e-6, "sqnr_db": 1.5 if family == "llama" else 0}.get(metric, 0)
        assert measured.mean[metric] == pytest.approx(expected, rel=1e-3, abs=room), metric


@pytest.mark.parametrize(("family", "side"), [*((family, "right") for family in FAMILIES), ("llama", "left")])
@torch.no_grad()
def test_evaluate_ignores_pads(family, side):
    teacher, model = make(family), make(family)
    name = next(name for name, _ in model.named_modules() if name.endswith(("in_proj", "up_proj")))
    klfast.quantize_model(model, klfast.Plan({name: INT4}, "uniform"))
    found = klfast.evaluate(model, [padded(side)], teacher)
    expected = truth(teacher, name)
    nll = torch.cat(
        [
            -teacher(text[None]).logits[0, :-1].double().log_softmax(-1).gather(1, text[1:, None])[:, 0]
            for text in TEXTS
            if len(text) > 1
        ]
    )
    assert found.tokens == 52 == len(nll)
    assert found.teacher_perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert found.nll == pytest.approx(nll.mean().item() + expected["delta_ce"], rel=1e-4)
    for mine, metric in (
        ("kl", KL),
        ("kl_student_teacher", "kl_student_teacher"),
        ("jsd", "jsd"),
        ("top1_agreement", "top1_agree"),
    ):
        assert getattr(found, mine) == pytest.approx(expected[metric], rel=1e-3), metric


def test_the_standard_error_is_computed_from_rows():
    teacher, model = make("llama"), make("llama")
    name = "model.layers.0.mlp.up_proj"
    klfast.quantize_model(model, klfast.Plan({name: INT4}, "uniform"))
    rows = [naive(teacher, text[None], name, INT4)[KL][0] for text in TEXTS if len(text) > 1]
    mean = torch.cat(rows).mean()
    expected = (sum((row.sum() - len(row) * mean) ** 2 for row in rows) * 5 / 4).sqrt().item() / 52
    swept = klfast.sweep(teacher, [padded("left")], INT4, layers=name).measurements[name, INT4]
    assert swept.stderr[KL] == pytest.approx(expected, rel=1e-3)
    assert klfast.evaluate(model, [padded("right")], teacher).kl_stderr == pytest.approx(expected, rel=1e-3)


def forms():
    """Return the same three windows in every supported form."""
    ids = tokens(3, 9)
    ones = torch.ones_like(ids)
    encoding = {"input_ids": ids, "attention_mask": ones}
    yield "tensor", ids
    yield "array", ids.numpy()
    yield "array of int32", ids.numpy().astype(np.int32)
    yield "batches", list(ids.split(2))
    yield "rows", list(ids)
    yield "generator", (row for row in ids)
    yield "lists", ids.tolist()
    yield "a batch of lists", [ids.tolist()]
    yield "a batch of rows", [list(ids)]
    yield "arrays", [ids.numpy()]
    yield "dict", encoding
    yield "dict without a mask", {"input_ids": ids, "labels": ids - 100}
    yield "BatchEncoding", transformers.BatchEncoding(encoding)
    yield (
        "BatchEncoding of lists",
        transformers.BatchEncoding({"input_ids": ids.tolist(), "attention_mask": ones.tolist()}),
    )
    yield "dicts of rows", [{"input_ids": row.tolist(), "attention_mask": [1] * 9} for row in ids]
    yield "boolean masks", [{"input_ids": ids, "attention_mask": ones.bool()}]
    yield "float masks", [{"input_ids": ids, "attention_mask": ones.float()}]
    yield "masks of NumPy", [{"input_ids": ids.numpy(), "attention_mask": ones.numpy().astype(np.float32)}]
    yield "DataLoader", DataLoader(ids, batch_size=2)
    yield "DataLoader of a TensorDataset", DataLoader(TensorDataset(ids), batch_size=2)
    yield (
        "DataLoader of dicts",
        DataLoader(
            [{"input_ids": row, "attention_mask": one} for row, one in zip(ids, ones, strict=True)], batch_size=2
        ),
    )
    yield "padded", [padded("left", list(ids)), padded("right", [ids[0], ids[0][:1]])][:1]


@pytest.mark.parametrize("form", [name for name, _ in forms()])
def test_every_form_is_the_same_text(form):
    found = batches.read(dict(forms())[form], VOCAB)
    assert torch.stack([row for batch in found for row in batch.rows]).equal(tokens(3, 9))
    assert not any(batch.is_ragged for batch in found)


def test_forms_give_the_same_measurements():
    model = make("mamba")
    given = dict(forms())
    layer = "backbone.layers.0.mixer.in_proj"
    expected = means(klfast.sweep(model, given["tensor"], INT4, layers=layer))
    for form in ("lists", "BatchEncoding", "DataLoader of dicts"):
        assert means(klfast.sweep(model, given[form], INT4, layers=layer)) == expected
    whole = klfast.evaluate(model, [given["tensor"]])
    assert klfast.evaluate(model, given["tensor"]) == whole == klfast.evaluate(model, given["BatchEncoding"])
    for form in ("rows", "DataLoader of dicts"):
        assert klfast.evaluate(model, given[form]).nll == pytest.approx(whole.nll, rel=1e-6)


def test_a_large_tensor_is_evaluated_in_parts(monkeypatch):
    from klfast.evaluation import side_by_side

    model, ids, rows = make("mamba"), tokens(6, 9), []
    expected = klfast.evaluate(model, [ids])
    monkeypatch.setattr(side_by_side, "_MOST_TOKENS", 20)
    whole = side_by_side.head_inputs
    monkeypatch.setattr(
        side_by_side, "head_inputs", lambda model, head, ids: rows.append(len(ids)) or whole(model, head, ids)
    )
    found = klfast.evaluate(model, ids)
    assert rows == [2, 2, 2] and found.tokens == expected.tokens and found.nll == pytest.approx(expected.nll, rel=1e-6)


def test_rows_of_one_length_run_together(monkeypatch):
    given = [padded("left"), tokens(2, 9)]
    from klfast.sensitivity import inputs

    found = inputs.micro_batches(given, VOCAB, 40)
    assert [list(ids.shape) for ids in found] == [[1, 2], [3, 9], [1, 12], [2, 17]]
    assert inputs.digest(found) != inputs.digest(
        inputs.micro_batches([{**given[0], "attention_mask": given[0]["attention_mask"].flip(0)}, given[1]], 100, 40)
    )


def test_a_resume_file_belongs_to_one_mask(tmp_path):
    model, ids = make(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"specs": INT4, "layers": "lm_head", "resume": tmp_path / "r.json"}
    klfast.sweep(model, {"input_ids": ids, "attention_mask": mask}, **options)
    klfast.sweep(model, {"input_ids": ids, "attention_mask": mask}, **options)
    with pytest.raises(InvalidInputError, match="other calibration"):
        klfast.sweep(model, ids, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "batches must be token ids, got NoneType"),
        ("text", "batches must be token ids, got str"),
        (5, "batches must be token ids, got int"),
        ([5, 6, 7], "batch 0 must be .* got int"),
        ([[1.5, 2]], "batch 0 must be .* got a list of float and int"),
        ([["a text"]], "batch 0 must be .* got a list of str"),
        ([[10**30, 1]], "batch 0 must be .* got a list of int"),
        ([torch.zeros(2, 8)], r"batch 0 must be .* got torch.float32 \[2, 8\]; give tensors"),
        ([np.zeros((2, 8))], r"batch 0 must be .* got float64 \[2, 8\]"),
        ([np.ones((2, 8), bool)], "batch 0 must be"),
        (
            [(tokens(2, 9), tokens(2, 9))],
            r"batch 0 must be .* got a tuple of torch.int64 \[2, 9\]; give tensors .* dicts with input_ids and",
        ),
        ([{"ids": tokens()}], "batch 0 has no input_ids, only ids"),
        ([{}], "batch 0 has no input_ids, only nothing"),
        (
            [{"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 8)}],
            "attention_mask of batch 0 must hold a zero or a one for each",
        ),
        (
            [{"input_ids": tokens(2, 9), "attention_mask": torch.full((2, 9), 0.5)}],
            "attention_mask of batch 0 must hold a zero or a one",
        ),
        (
            [{"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 1, 9, 9)}],
            r"attention_mask of batch 0 must .* got torch.float32 \[2, 1, 9, 9\]",
        ),
        ([tokens(), {"input_ids": tokens(1, 3), "attention_mask": [[1, 0, 1]]}], "attention_mask of batch 1 has gaps"),
        (
            [{"input_ids": tokens(2, 9), "attention_mask": torch.zeros(2, 9)}],
            "no row has two tokens besides its padding",
        ),
        ([[[]]], "batch 0 must be|windows of 0 tokens"),
        ([[]], "batches is empty"),
        ([torch.empty(1, 0, dtype=torch.int64)], "windows of 0 tokens"),
    ],
)
@pytest.mark.parametrize("measure", [klfast.sweep, klfast.evaluate])
def test_refused(given, message, measure):
    with pytest.raises(InvalidInputError, match=message) as caught:
        measure(make("llama"), given)
    assert "\n" not in str(caught.value)
