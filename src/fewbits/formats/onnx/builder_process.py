"""Runs onnxruntime-genai's model builder on a model without weights: `python -m ... FOLDER`, in a process of its own.

The builder (onnxruntime_genai 0.18, models/builders/base.py) wants a transformers model in memory and writes all of it
in float32. Here it gets parameters that hold no weights but tell who they are: each row of a matrix is filled with its
number, one vector after the other with random values. Where they turn up in the graph says which weight goes there,
whatever the builder calls it, splits or turns. A process of its own, since the builder prints and puts folders with
names such as `builders` on the path of modules.

In FOLDER lie config.json, the tokenizer's files and generation_config.json. Into FOLDER/built go `graph.onnx`, without
what is a weight, `weights.json`, which tells what goes there, and genai_config.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FIRST = 2.0
"""Rows are numbered downwards from minus this: no cosine or sine is as low."""
OPTIONS = ["fuse_qkv=false", "shared_embeddings=false", "windowed_kv_cache=false"]
LENGTHLESS_ROPE = ("default", "linear", "yarn", "llama3")
"""Rotary embeddings that are the same at every length."""
ROPE_ORDER = ("full_attention", "sliding_attention")
"""In which the builder makes tables for layers of two kinds."""
MOST_ROWS = 1 << 24
"""Whole numbers that float32 tells apart."""


class Probes:
    """The parameters of a model, in place of its weights.

    Attributes:
        starts: first row's number of each matrix, by name; `sizes` their rows.
        vectors: values of each vector, by name.
    """

    def __init__(self) -> None:
        self.starts: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.vectors: dict[str, Any] = {}
        self.rows = 0
        self._random = np.random.default_rng(20260)

    @classmethod
    def put_into(cls, model: Any) -> Probes:
        """Probes as the parameters of a transformers model; a head that is the embeddings gets its own."""
        probes, head = cls(), model.get_output_embeddings()
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, probes.parameter(name, tuple(parameter.shape)))
        if "lm_head.weight" not in probes.starts:
            head.weight = probes.parameter("lm_head.weight", tuple(head.weight.shape))
        if probes.rows + FIRST > MOST_ROWS:
            raise SystemExit(f"its matrices have {probes.rows} rows, more than can be told apart")
        return probes

    def parameter(self, name: str, shape: tuple[int, ...]) -> Any:
        """The parameter of this shape, float32; matrices take no memory."""
        import torch

        if len(shape) == 2:
            first = -(FIRST + self.rows) - torch.arange(shape[0], dtype=torch.float32)
            self.starts[name], self.sizes[name] = self.rows, shape[0]
            self.rows += shape[0]
            values = first[:, None].expand(shape)
        else:
            found = self._random.uniform(0.5, 1.5, shape).astype(np.float32)
            self.vectors[name] = found
            values = torch.from_numpy(found)
        return torch.nn.Parameter(values, requires_grad=False)

    def matrix(self, values: Any) -> dict[str, Any] | None:
        """Which rows of which matrix an initializer is; None if it is none.

        Args:
            values: float32 array of two axes.
        """
        for turned, array in ((False, values), (True, values.T)):
            if not array.size or not np.array_equal(array[:, 0], array[:, -1]) or array[:, 0].max() > -FIRST:
                continue
            numbers = (-array[:, 0] - FIRST).astype(np.int64)
            for name, start in self.starts.items():
                if start <= numbers[0] < start + self.sizes[name]:
                    at = int(numbers[0]) - start
                    stop = at + numbers.size
                    follow = np.array_equal(numbers, np.arange(numbers[0], numbers[0] + numbers.size))
                    if follow and stop <= self.sizes[name]:
                        return {"source": name, "start": at, "stop": stop, "turned": turned}
        return None

    def vector(self, values: Any) -> dict[str, Any] | None:
        """Which vector an initializer is, and what is added to it; None if it is none."""
        for name, probe in self.vectors.items():
            if probe.shape == values.shape:
                for plus in (0.0, 1.0):
                    if np.array_equal(values, probe + np.float32(plus)):
                        return {"source": name, "plus": plus}
        return None


def main(folder: Path) -> None:
    """Build the graph; see the module."""
    import torch
    from onnxruntime_genai.models import builder  # puts the folder of `builders` on the path
    from transformers import AutoConfig, AutoModelForCausalLM

    config, built = AutoConfig.from_pretrained(folder), folder / "built"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    probes = Probes.put_into(model)
    _change(sys.modules["builders.base"].Model, model, probes, built)
    built.mkdir()
    places = ("", str(folder), str(built), "fp32", "cpu", str(folder / "cache"))
    options = builder.parse_extra_options(*places, OPTIONS)
    _flatten_rope(options["hf_details"]["hf_config"])
    builder.create_model(*places, **options)


def _change(base: Any, model: Any, probes: Probes, built: Path) -> None:
    """Put our weights and our way of saving into the builder's base class, and mend what is wrong in it."""
    import onnx_ir
    import torch

    theirs, their_rope = base.make_rotary_embedding_caches_from_scratch, base.make_attention_qk_rope
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = iter(ROPE_ORDER)

    def rotary(self: Any) -> Any:
        """The builder's own tables are wrong for linear and yarn scaling, and in gemma 3 with both."""
        found = rope.get("full_attention", rope)
        if found.get("rope_type") not in LENGTHLESS_ROPE:
            return theirs(self)
        module = type(model.model.rotary_emb)(model.config)
        kind = {"layer_type": next(kinds)} if "full_attention" in rope else {}
        cos, sin = module(torch.zeros(1), torch.arange(self.rope_attrs["cache_length"])[None], **kind)
        return cos[0], sin[0]

    def attention_rope(self: Any, layer_id: int, **kwargs: Any) -> tuple[str, str]:
        """In layers of SmolLM3 without rotary embeddings it would add an operator for them all the same."""
        without = hasattr(self, "no_rope_layers") and not self.no_rope_layers[layer_id]
        return ("", "") if without else their_rope(self, layer_id, **kwargs)

    def save_model(self: Any, out_dir: str) -> None:
        weights: dict[str, Any] = {}
        for name, value in list(self.model.graph.initializers.items()):
            array = value.const_value.numpy()
            found = None
            if array.dtype == np.float32:
                found = probes.matrix(array) if array.ndim == 2 else probes.vector(array)
            if found is not None:
                weights[name] = found
                del self.model.graph.initializers[name]
        self.model.graph.sort()
        (built / "graph.onnx").write_bytes(onnx_ir.to_proto(self.model).SerializeToString())
        told = {"weights": weights, "matrices": probes.sizes, "vectors": list(probes.vectors)}
        (built / "weights.json").write_text(json.dumps(told))

    base.load_weights = lambda self, input_path: model
    # the builder takes any linear with as many outputs as the vocabulary has tokens for the head
    base.has_lm_head = lambda self, module: module is model.get_output_embeddings()
    base.make_rotary_embedding_caches_from_scratch = rotary
    base.make_attention_qk_rope = attention_rope
    base.save_model = save_model


def _flatten_rope(config: Any) -> None:
    """Gemma 3's rotary embeddings under the names that the builder looks for, from before transformers 5."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_theta = rope["full_attention"]["rope_theta"]
        config.rope_parameters = dict(rope["full_attention"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
