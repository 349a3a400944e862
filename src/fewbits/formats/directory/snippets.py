"""How engines load our directories: data for the model card."""

from __future__ import annotations

from fewbits.formats.directory.card import Snippet

_TRANSFORMERS = """\
# pip install {packages}
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="{dtype}", device_map="auto")
inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""
_HQQ = """\
# pip install hqq; transformers 5 cannot load HQQ by itself
import torch
from hqq.core.quantize import HQQLinear
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

tensors = {name: value for file in Path("DIRECTORY").glob("*.safetensors") for name, value in load_file(file).items()}
config = AutoConfig.from_pretrained("DIRECTORY")
del config.quantization_config
model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
for name, module in list(model.named_modules()):
    if f"{name}.W_q" in tensors:
        model.set_submodule(name, HQQLinear(None, None, compute_dtype=torch.float16, device="cpu"))
model.load_state_dict(tensors, strict=False)
"""
_GPTQMODEL = """\
# pip install gptqmodel; transformers gives all layers of a GPTQ checkpoint the same bits
from gptqmodel import GPTQModel

model = GPTQModel.load("DIRECTORY")
print(model.tokenizer.decode(model.generate("The capital of France is")[0]))
"""
_EXLLAMAV2 = """\
# pip install exllamav2; an NVIDIA or AMD card is needed
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.generator import ExLlamaV2DynamicGenerator

config = ExLlamaV2Config("DIRECTORY")
model = ExLlamaV2(config)
cache = ExLlamaV2Cache(model, max_seq_len=4096, lazy=True)
model.load_autosplit(cache)
generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=ExLlamaV2Tokenizer(config))
print(generator.generate(prompt="The capital of France is", max_new_tokens=20))
"""
_EXLLAMAV3 = """\
# pip install exllamav3; an NVIDIA card is needed
from exllamav3 import Cache, Config, Generator, Model, Tokenizer

config = Config.from_directory("DIRECTORY")
model = Model.from_config(config)
cache = Cache(model, max_num_tokens=4096)
model.load()
generator = Generator(model=model, cache=cache, tokenizer=Tokenizer.from_config(config))
print(generator.generate(prompt="The capital of France is", max_new_tokens=20))
"""
_ONNX = """\
# pip install onnxruntime-genai; plain onnxruntime runs model.onnx as well
import onnxruntime_genai as og

model = og.Model("DIRECTORY")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("The capital of France is"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
_OWN = {
    "hqq": Snippet("hqq", _HQQ),
    "exl2": Snippet("exllamav2", _EXLLAMAV2),
    "exl3": Snippet("exllamav3", _EXLLAMAV3),
    "onnx": Snippet("onnxruntime-genai", _ONNX),
}
"""By `quant_method`, of those that a library of their own runs."""
_VLLM = Snippet("vLLM", "vllm serve DIRECTORY", "sh")
_PACKAGES = {
    "gptq": ("transformers accelerate optimum gptqmodel", "float16"),
    "awq": ("transformers accelerate gptqmodel", "float16"),
    "bitsandbytes": ("transformers accelerate bitsandbytes", "auto"),
    "compressed-tensors": ("transformers accelerate compressed-tensors", "bfloat16"),
    "fp8": ("transformers accelerate", "auto"),
    "bitnet": ("transformers accelerate", "auto"),
    "aqlm": ("transformers accelerate aqlm", "float16"),
}
"""By `quant_method`: what transformers needs installed, and the type of the other tensors."""
_SERVED = {"gptq", "gptq-mixed", "awq", "compressed-tensors", "fp8"}
"""What vLLM reads; its list of methods has no bitsandbytes since 0.32."""


def snippets(quant_method: str, vllm: bool = True) -> list[Snippet]:
    """The snippets for a `quantization_config.quant_method`; none for one that is not known.

    Args:
        quant_method: or `gptq-mixed`, where layers have bits of their own.
        vllm: whether vLLM runs this very target: it takes symmetric 4 and 8-bit GPTQ only.
    """
    found = []
    if quant_method in _OWN:
        return [_OWN[quant_method]]
    if quant_method == "gptq-mixed":
        found.append(Snippet("GPTQModel", _GPTQMODEL))
    if quant_method in _PACKAGES:
        packages, dtype = _PACKAGES[quant_method]
        found.append(Snippet("transformers", _TRANSFORMERS.format(packages=packages, dtype=dtype)))
    if vllm and quant_method in _SERVED:
        found.append(_VLLM)
    return found
