"""The decision table: who is in which situation, and what is recommended there. Data.

The rows are those of the field guide (what guides of 2024 to 2026 tell 7B and 8B users); where exact sizes or our own
measurements say something else, `reason` says so. The first row that fits counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.advise.situation import Situation

GUIDE = "field guide, recommendations by scenario (2026-11)"
ROOM = 0.25
"""To spare: this share of the memory stays free."""


@dataclass(frozen=True)
class Pick:
    """A target that a scenario recommends.

    Attributes:
        spare: it is taken only if this share of the memory stays free.
    """

    target: str
    spare: float = 0.0


@dataclass(frozen=True)
class When:
    """The conditions of a scenario; all that are set must hold.

    Attributes:
        engines: named by the user; an empty string stands for none.
        uses: likewise.
        kinds: of GPU: `nvidia`, `amd`, `apple`, `intel`, `unknown`, or `none`.
        least_vram, most_vram: GiB, as cards are sold.
        least_arch, below_arch: NVIDIA's compute capability.
        datacenter: whether the GPU is one of A100, H100 and their successors.
    """

    engines: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    least_vram: float | None = None
    most_vram: float | None = None
    least_arch: float | None = None
    below_arch: float | None = None
    datacenter: bool | None = None

    def holds(self, at: Situation) -> bool:
        """Whether a situation fulfils it."""
        return (
            (not self.engines or (at.engine or "") in self.engines)
            and (not self.uses or (at.use or "") in self.uses)
            and (not self.kinds or at.kind in self.kinds)
            and (self.least_vram is None or at.vram_gib >= self.least_vram)
            and (self.most_vram is None or at.vram_gib <= self.most_vram)
            and (self.least_arch is None or at.arch >= self.least_arch)
            and (self.below_arch is None or 0 < at.arch < self.below_arch)
            and (self.datacenter is None or at.datacenter == self.datacenter)
        )


@dataclass(frozen=True)
class Scenario:
    """A row of the table.

    Attributes:
        engine: taken where the user names none.
        picks: in the order in which they are tried.
        billions: least and most weights of models worth taking here; None for any.
        reason: for a first-time user.
    """

    name: str
    title: str
    when: When
    engine: str
    picks: tuple[Pick, ...]
    reason: str
    billions: tuple[float, float] | None = None
    source: str = GUIDE


_SERVERS = ("vllm", "tgi")
_GGUF = ("", "llama.cpp", "ollama", "lm-studio")

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "fine-tuning", "fine-tuning (QLoRA)", When(uses=("finetune",)), "transformers", (Pick("bnb:nf4"),),
        "QLoRA trains small adapters on top of a model in 4 bits; bitsandbytes NF4 is what its tools load.",
    ),
    Scenario(
        "research", "quality research", When(uses=("research",)), "llama.cpp", (Pick("Q8_0"), Pick("BF16")),
        "Q8_0 is practically lossless; the 16-bit model is the reference that everything is measured against.",
    ),
    Scenario(
        "edge", "an edge device", When(uses=("edge",)), "llama.cpp",
        (Pick("Q4_K_M", 0.5), Pick("Q3_K_M"), Pick("Q2_K")),
        "On a small device take a small model at Q3_K_M or Q2_K; where half of the memory stays free anyway, Q4_K_M "
        "loses much less.", (0.0, 4.0),
    ),
    Scenario(
        "exllamav2", "ExLlamaV2", When(engines=("exllamav2",)), "exllamav2",
        (Pick("exl2:5.0bpw", ROOM), Pick("exl2:4.5bpw"), Pick("exl2:4.0bpw")),
        "EXL2 spreads a bit rate of your choice over the layers and decodes fastest for one user on one NVIDIA GPU: "
        "4.0 to 4.5 bits per weight, 5.0 where there is memory to spare.",
    ),
    Scenario(
        "exllamav3", "ExLlamaV3", When(engines=("exllamav3",)), "exllamav3",
        (Pick("exl3:5.0bpw", ROOM), Pick("exl3:4.0bpw"), Pick("exl3:3.0bpw")),
        "EXL3 loses least below 4 bits of all formats with published figures.",
        source="exllamav3 doc plots (2026-08)",
    ),
    Scenario(
        "fastest", "fastest tokens on one NVIDIA GPU", When(uses=("speed",), kinds=("nvidia",), engines=("",)),
        "exllamav2", (Pick("exl2:4.5bpw"), Pick("exl2:4.0bpw")),
        "Guides measure EXL2 at 4.0 to 4.5 bits as the fastest for one user on one NVIDIA GPU: an 8B model at 4 bits "
        "makes 110 to 140 tokens a second on an RTX 4090.",
    ),
    Scenario(
        "onnx", "ONNX Runtime", When(engines=("onnxruntime",)), "onnxruntime", (Pick("onnx:int4"),),
        "ONNX is for programs that already run on ONNX Runtime.",
    ),
    Scenario(
        "bitnet", "BitNet", When(engines=("bitnet.cpp",)), "bitnet.cpp", (Pick("bitnet:i2_s"),),
        "BitNet stores weights of three levels, of models that were trained so; any other model needs 4 bits or so.",
    ),
    Scenario(
        "hqq", "HQQ", When(engines=("hqq",)), "hqq", (Pick("hqq:w4g64"),),
        "HQQ needs no calibration text and quantizes a 70B model in minutes.",
    ),
    Scenario(
        "cloud-fp8", "cloud GPU: H100 and later", When(("", *_SERVERS), ("", "serving", "chat", "code", "reasoning",
        "translation"), ("nvidia",), least_arch=8.9, datacenter=True), "vllm",
        (Pick("ct:fp8"), Pick("ct:w8a8"), Pick("awq:w4g128")),
        "These GPUs multiply 8-bit floats directly: FP8 halves the memory, raises throughput and loses very little.",
    ),
    Scenario(
        "cloud-int8", "cloud GPU: A100", When(("", *_SERVERS), ("", "serving", "chat", "code", "reasoning",
        "translation"), ("nvidia",), least_arch=8.0, datacenter=True), "vllm", (Pick("ct:w8a8"), Pick("awq:w4g128")),
        "An A100 multiplies 8-bit integers directly (FP8 it does not): half the memory, more throughput, little loss.",
    ),
    Scenario(
        "serving", "vLLM or TGI on NVIDIA Ampere or later", When(_SERVERS, kinds=("nvidia",), least_arch=8.0), "vllm",
        (Pick("awq:w4g128"),),
        "AWQ in 4 bits is the usual choice for serving on Ampere and later: fast kernels, and the weights that matter "
        "most are protected.",
    ),
    Scenario(
        "serving-default", "serving on NVIDIA Ampere or later",
        When(("",), ("serving",), ("nvidia",), least_arch=8.0), "vllm", (Pick("awq:w4g128"),),
        "Many users at once want vLLM, which batches them; AWQ in 4 bits is the usual choice on Ampere and later.",
    ),
    Scenario(
        "serving-old", "vLLM or TGI on older NVIDIA GPUs", When(_SERVERS, kinds=("nvidia",), below_arch=8.0), "vllm",
        (Pick("gptq:w4g128"),), "GPTQ in 4 bits has kernels for GPUs before Ampere, where AWQ is slow or missing.",
    ),
    Scenario(
        "serving-old-default", "serving on older NVIDIA GPUs",
        When(("",), ("serving",), ("nvidia",), below_arch=8.0), "vllm", (Pick("gptq:w4g128"),),
        "GPTQ in 4 bits has kernels for GPUs before Ampere, where AWQ is slow or missing.",
    ),
    Scenario(
        "serving-elsewhere", "vLLM or TGI without a known NVIDIA GPU", When(_SERVERS), "vllm",
        (Pick("awq:w4g128"), Pick("gptq:w4g128")),
        "4-bit AWQ and GPTQ are what these servers run in most places.", source="layouts/engines.py (2026-11)",
    ),
    Scenario(
        "transformers", "transformers", When(engines=("transformers",)), "transformers",
        (Pick("bnb:int8", 0.5), Pick("bnb:nf4"), Pick("gptq:w4g128")),
        "bitsandbytes needs no calibration and one package; NF4 is its best 4-bit type.",
        source="field guide, formats and who runs them (2026-11)",
    ),
    Scenario(
        "cpu", "CPU only", When(_GGUF, kinds=("none",)), "llama.cpp", (Pick("Q5_K_M", 0.5), Pick("Q4_K_M")),
        "Without a GPU the speed is that of the memory: take a model of 3 to 7B and let every core work. Q4_K_M, or "
        "Q5_K_M with plenty of RAM.", (0.0, 8.5),
    ),
    Scenario(
        "apple", "Apple Silicon", When(_GGUF, kinds=("apple",)), "llama.cpp", (Pick("Q5_K_M", 0.5), Pick("Q4_K_M")),
        "Apple's GPU shares the RAM with everything else. Q4_K_M is the usual choice; with half of it to spare Q5_K_M.",
    ),
    Scenario(
        "small-gpu", "a GPU of 4 to 6 GB", When(_GGUF, kinds=("nvidia", "amd", "intel", "unknown"), most_vram=6.5),
        "llama.cpp", (Pick("Q4_K_M"), Pick("Q3_K_M"), Pick("IQ3_M"), Pick("Q2_K"), Pick("IQ2_S")),
        "So little memory holds a small model well. For a 7B model Q2_K or IQ2_S are the last resort: better a smaller "
        "model at 4 bits.", (0.0, 4.0),
    ),
    Scenario(
        "beginner", "Ollama or LM Studio", When(("ollama", "lm-studio")), "ollama", (Pick("Q4_K_M"),),
        "Q4_K_M is what these programs take themselves: a quarter of the size, and few notice the loss.",
    ),
    Scenario(
        "amd", "AMD GPU", When(_GGUF, kinds=("amd",)), "llama.cpp", (Pick("Q4_K_M"),),
        "llama.cpp runs well on AMD (ROCm or Vulkan), where most other formats need CUDA. Q4_K_M is the usual choice.",
    ),
    Scenario(
        "large-gpu", "a GPU of 24 GB and more", When(_GGUF, least_vram=22), "llama.cpp",
        (Pick("Q8_0", 0.05), Pick("Q6_K"), Pick("Q5_K_M"), Pick("Q4_K_M")),
        "With so much memory a 7B model can stay at Q8_0 or FP16, and 13 to 70B models fit quantized.",
    ),
    Scenario(
        "roomy-gpu", "plenty of VRAM", When(_GGUF, least_vram=14), "llama.cpp", (Pick("Q5_K_M", ROOM), Pick("Q4_K_M")),
        "Where Q5_K_M leaves a quarter of the memory free, its extra bit costs nothing. EXL2 at 5.0 bits would be the "
        "faster equal.",
    ),
    Scenario(
        "consumer-gpu", "a consumer GPU of 8 to 12 GB", When(_GGUF), "llama.cpp",
        (Pick("Q5_K_M", ROOM), Pick("Q4_K_M")),
        "A model of 4 to 7B at Q4_K_M, or Q5_K_M where there is room, is what guides name for 8 to 12 GB; what fits is "
        "computed here, not guessed.",
    ),
)  # fmt: skip

SMALL_MODEL = Scenario(
    "small-model", "a model under a billion weights, with memory to spare", When(), "llama.cpp", (Pick("Q8_0", 0.5),),
    "So small a model needs little memory at Q8_0, and small models lose more than large ones: at Q4_K_M a model of "
    "135M weights loses 3 to 10 times as much as one of 8B (KL divergence 0.06 to 0.21 against 0.02).",
    source="docs/benchmarks.md; llama.cpp tools/perplexity/README.md",
)  # fmt: skip

TIGHT = Scenario(
    "tight", "VRAM tight, larger model wanted", When(), "llama.cpp", (Pick("Q3_K_M"), Pick("IQ3_M")),
    "At 4 bits the model does not fit, at 3 bits it does. The loss is noticeable, but a larger model at Q3_K_M usually "
    "still knows more than a smaller one.",
)  # fmt: skip

LAST_RESORT = Scenario(
    "last-resort", "the last resort", When(), "llama.cpp", (Pick("IQ3_XXS"), Pick("Q2_K"), Pick("IQ2_S")),
    "Only 2 to 3 bits fit here. That is the last resort: a smaller model at 4 bits is usually better.",
)  # fmt: skip


OTHERS: dict[str, tuple[tuple[str, str], ...]] = {
    "roomy-gpu": (("exl2:5.0bpw", "EXL2 at 5.0 bits in ExLlamaV2 decodes faster for one user"),),
    "last-resort": (
        ("aqlm:1x16g8", "AQLM loses less at 2 bits, in transformers and vLLM, and takes a day to make for 7B"),
        ("quip#:2bit", "QuIP# loses less at 2 bits, in its own engine"),
    ),
}
"""By scenario: what others would take there that is not among its picks, and what speaks for it."""


@dataclass(frozen=True)
class Use:
    """What a model is used for.

    Attributes:
        floor: bits per weight not to go below; 0 for none.
        text: what to calibrate on.
    """

    name: str
    floor: float
    reason: str
    text: str = "text like that which the model will see"
    source: str = "field guide, larger model or more bits (2026-11)"


USES: dict[str, Use] = {
    use.name: use
    for use in (
        Use("chat", 0, "Chat and knowledge tolerate fewer bits than code or maths.", "chats in the model's own format"),
        Use("code", 4, "Code tolerates little loss: one wrong token breaks a program. Stay at 4 bits or more.", "code"),
        Use("reasoning", 4, "Long reasoning adds small errors up. Stay at 4 bits or more.", "worked solutions"),
        Use(
            "translation", 0, "Languages that are rare in the training text suffer first.",
            "text in every language that you translate", "our choice",
        ),
        Use("edge", 0, "On a device the memory decides."),
        Use("serving", 0, "With many users the cache decides: what the weights leave free is room for conversations."),
        Use("finetune", 0, "Training wants weights that its tools load."),
        Use("research", 0, "Research wants the reference."),
        Use("speed", 0, "Every token reads all weights once: fewer bytes are more tokens a second."),
    )
}  # fmt: skip
"""By name as `--use` takes it."""


@dataclass(frozen=True)
class Speed:
    """Something that makes an engine faster.

    Attributes:
        engines: it works in; empty for all.
    """

    name: str
    change: str
    effect: str
    engines: tuple[str, ...] = ()


MEMORY_LEVERS = ("smaller quant", "shorter context", "quantized KV cache", "experts in RAM", "partial offload")
"""In the order in which to pull them; `fewbits memory` says with bytes what each brings."""

SPEED_LEVERS = (
    Speed("flash attention", "llama.cpp: -fa on; Ollama: OLLAMA_FLASH_ATTENTION=1", "long contexts faster and smaller",
          ("llama.cpp", "ollama", "lm-studio")),
    Speed("KV cache quantization", "llama.cpp: -ctk q8_0 -ctv q8_0; vLLM: --kv-cache-dtype fp8",
          "half of the cache to read at each token", ("llama.cpp", "ollama", "lm-studio", "vllm")),
    Speed("speculative decoding", "a small model of the same family guesses ahead (llama.cpp: -md DRAFT.gguf)",
          "more tokens a second for the same output"),
    Speed("continuous batching", "vLLM does it by itself; llama-server: --parallel N",
          "many users at nearly the price of one", ("llama.cpp", "vllm", "tgi")),
    Speed("all layers on the GPU", "llama.cpp: -ngl 99", "a layer in RAM slows every token down",
          ("llama.cpp", "lm-studio")),
)  # fmt: skip
