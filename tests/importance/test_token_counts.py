"""How often tokens were looked up: by hand, and as a look-up's second moments against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

from lowrank_pl.core import EmbeddingShape, LinearShape, nearest_kronecker
from lowrank_pl.importance import SecondMoments
from lowrank_pl.importance.batches import Batch
from lowrank_pl.importance.token_counts import TokenCounts, frequencies
from lowrank_pl.surgery import TargetSelector
from tests.importance.reference import classification_loss, single_samples
from tests.importance.test_second_moments import batches
from tests.support.tiny import VOCAB, tiny_config

VOCABULARY = TargetSelector([], embeddings=True)


def test_by_hand() -> None:
    counts = TokenCounts(4, torch.device("cpu"))
    counts.add(torch.tensor([[1], [3], [1]]))
    counts.add(torch.tensor([[3], [1]]))
    assert counts.matrix().tolist() == [0, 3, 0, 2]
    shares = frequencies(counts.matrix(), 5)
    assert shares.tolist() == pytest.approx([1 / 9, 4 / 9, 1 / 9, 3 / 9])


def xlnet() -> nn.Module:
    """Goes through its tokens first, through its samples second."""
    config = XLNetConfig(vocab_size=len(VOCAB), d_model=16, n_layer=1, n_head=2, d_inner=16)
    config.num_labels = 3
    return XLNetForSequenceClassification(config)


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "xlnet":
        return xlnet().eval()
    config = tiny_config(family, 1)
    config.num_labels = 3
    made: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return made.eval()


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2", "xlnet"])
def test_a_look_ups_moments_equal_autograd_one_sample_at_a_time(family: str) -> None:
    model, data = model_of(family), batches(2)
    if family == "xlnet":  # its head looks at the last token, be it padding
        data = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in data]
    layers = VOCABULARY.select(model)
    [(name, layer)] = layers.items()
    found = SecondMoments().measure(model, layers, data, classification_loss(model)).layers[name]
    counts, outputs, samples = torch.zeros(len(VOCAB), dtype=torch.float64), torch.zeros(()), 0
    for sample in (one for batch in data for one in single_samples(batch)):
        seen: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: Tensor) -> None:
            output.retain_grad()
            seen.append(output)  # noqa: B023, used before the next sample

        handle = layer.register_forward_hook(keep)
        classification_loss(model)(sample).sum().backward()
        handle.remove()
        counts += sample["input_ids"].flatten().bincount(minlength=len(VOCAB))
        assert seen[0].grad is not None
        g = seen[0].grad.flatten(0, -2).double()
        outputs, samples = outputs + g.mT @ g, samples + 1
    assert found.inputs is not None
    assert found.outputs is not None
    torch.testing.assert_close(found.inputs.double(), frequencies(counts, float(counts.sum())), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.outputs.double(), outputs / samples, rtol=1e-3, atol=1e-9)


def test_memory_and_sides() -> None:
    shape = EmbeddingShape(384, 30522)
    assert SecondMoments().bytes(shape) == 2 * 8 * (30522 + 384**2)  # were a head tied to it
    assert SecondMoments("none", 64).bytes(shape) == 8 * 384 * 64
    assert SecondMoments().bytes(LinearShape(384, 30522)) == 8 * (30522**2 + 384**2)
    model, data = model_of("bert"), batches(1)
    layers = TargetSelector(embeddings=True).select(model)
    name = next(iter(layers))
    measured = SecondMoments(16, 16).measure(model, layers, data, classification_loss(model)).layers[name]
    assert {part: tuple(tensor.shape) for part, tensor in measured.tensors().items()} == {
        "inputs": (len(VOCAB),),
        "outputs": (2, 16, 16),
    }
    without = SecondMoments("none").measure(model, layers, data, classification_loss(model)).layers[name]
    assert without.inputs is None


class Tied(nn.Module):
    """Looks up, scales, and puts out with the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
        self.head.weight = self.words.weight
        self.scale = 1.5

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.words(tokens) * self.scale)
        return y


def test_a_tied_heads_use_of_the_matrix_counts() -> None:
    torch.manual_seed(0)
    model = Tied()
    batch = {"input_ids": torch.tensor([[1, 2, 0], [3, 3, 1]]), "labels": torch.tensor([[0, 1, 2], [3, 2, 1]])}

    def losses(given: Batch) -> Tensor:
        return F.cross_entropy(model(given["input_ids"]).mT, given["labels"], reduction="none").sum(1)

    found = SecondMoments().measure(model, {"words": model.words}, [batch], losses).layers["words"]
    matrix = model.words.weight.detach()
    h = matrix[batch["input_ids"]] * model.scale
    logits = (h @ matrix.mT).requires_grad_()
    F.cross_entropy(logits.mT, batch["labels"], reduction="none").sum().backward()
    assert logits.grad is not None
    q, h = logits.grad.flatten(0, 1), h.flatten(0, 1)
    g = q @ matrix * model.scale
    shares = frequencies(batch["input_ids"].flatten().bincount(minlength=4), 6)
    inputs, outputs = nearest_kronecker((shares, g.mT @ g / 2), (q.square().sum(0) / 2, h.mT @ h / 6))
    assert found.inputs is not None
    assert found.outputs is not None
    torch.testing.assert_close(found.inputs, inputs.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.outputs, outputs.float(), rtol=1e-4, atol=1e-6)
    one_side = SecondMoments(outputs="none").measure(model, {"words": model.words}, [batch], losses).layers["words"]
    assert one_side.inputs is not None
    torch.testing.assert_close(one_side.inputs, shares.float())
