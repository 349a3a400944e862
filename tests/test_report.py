"""The page: whole, self-contained, escaped, small; its drawings; the words."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.measure.metrics import Comparison, Estimate, KLSummary
from fewbits.measure.report import RulerUsed
from fewbits.report import ComparisonReport, render
from fewbits.report.heatmap import decades_of, maps, type_shades
from fewbits.report.labels import Box, placed, width
from fewbits.report.numbers import (
    bytes_text,
    deviation_text,
    kl_text,
    percent_text,
    rate_text,
    seconds_text,
    significant,
)
from fewbits.report.plots import SIZES, Cost, distribution, pareto
from fewbits.report.ranking import Ranking, frontier, summary, undecided
from fewbits.report.scales import linear, logarithmic
from fewbits.report.schema import (
    STATISTICS,
    Bucket,
    Candidate,
    FileUsed,
    Footprint,
    MemoryLine,
    MemoryUsed,
    ReferenceUsed,
    SensitivityUsed,
    Speed,
    TensorRow,
    TextMeasured,
    Timing,
    WorstToken,
)

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&]]>"
TYPES = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "IQ4_XS": 4.25, "Q3_K": 3.4375, "IQ2_XS": 2.3125}
ROLES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def about(value: float, spread: float = 0.1) -> Estimate:
    half = abs(value) * spread
    return Estimate(value=value, low=value - half, high=value + half, stderr=half / 2, stderr_naive=half / 3)


def comparison(kl: float) -> Comparison:
    return Comparison(
        kl=KLSummary(mean=about(kl), median=0.6 * kl, p90=2.5 * kl, p99=8 * kl, p999=20 * kl, max=50 * kl),
        reference_perplexity=about(12.0),
        perplexity_ratio=about(1 + kl, 0.01),
        same_top=about(max(0.1, 1 - kl), 0.01),
        rms_delta_p=about(kl**0.5 / 4),
    )


def candidate(label: str, size: int, kl: float, layers: int = 4, seed: int = 0, **changes: object) -> Candidate:
    rng = np.random.default_rng(seed)
    kind = sorted(TYPES)[seed % len(TYPES)]
    rows = [(None, "embed_tokens"), *((layer, role) for layer in range(layers) for role in ROLES), (None, "lm_head")]
    values: dict[str, object] = {
        "label": label,
        "path": f"/models/{label}.gguf",
        "files": [FileUsed(name=f"{label}.gguf", size=size, sha256="0" * 64)],
        "family": "K-quants",
        "format": "GGUF",
        "target": None,
        "size": size,
        "bits_per_weight": 4.5,
        "block_bits_per_weight": 4.4,
        "perplexity": about(12 * (1 + kl)),
        "perplexity_difference": about(12 * kl),
        "comparison": comparison(kl),
        "within_noise": False,
        "by_confidence": [Bucket(label=f"{i}", n_scored=100, kl=kl / (i + 1), same_top=0.9) for i in range(6)],
        "by_text": [],
        "window_kl": (kl * rng.uniform(0.8, 1.2, 20)).tolist(),
        "histogram": [0, *rng.integers(0, 500, 37).tolist(), 3],
        "worst": [
            WorstToken(
                kl=3.0, before="word " * 30, actual=" x", p_actual=0.2, q_actual=0.0001, expected=" a", p_expected=0.9,
                given="\n", q_given=0.4, text="wiki.txt",
            )
        ] * 10,
        "tensors": [
            TensorRow(role=role, layer=layer, type=kind, bits=TYPES[kind], n_weights=10**6, error=float(error))
            for (layer, role), error in zip(rows, rng.uniform(1e-5, 0.1, len(rows)), strict=True)
        ],
        "memory": MemoryUsed(
            total=size + 10**9, device="GPU", parts={"weights": size}, engine="llama.cpp", context=8192, certain=True,
            notes=[],
        ),
        "quantize_seconds": 12.5,
        "measure_seconds": 30.0,
        "engines": ["llama.cpp b7000+ (CPU)"],
        "calibrated_on": [],
        "warnings": [],
    }  # fmt: skip
    return Candidate.model_validate(values | changes)


def report(candidates: list[Candidate], **changes: object) -> ComparisonReport:
    values: dict[str, object] = {
        "tool_version": "0.1.0",
        "date": "2026-11-21T12:00:00+00:00",
        "command": "fewbits compare reference a.gguf",
        "engine": "torch",
        "engine_version": "torch 2",
        "kv": None,
        "reference": ReferenceUsed(
            path="/models/reference", name="Reference-8B", architecture="LlamaForCausalLM", fingerprint="f" * 64,
            n_weights=8 * 10**9, size=16 * 10**9, stored_as="BF16",
        ),
        "convention": RulerUsed(
            name="llama.cpp", context=512, scored_per_window=255, bos_per_window=True,
            description="windows of 512 tokens",
        ),
        "texts": [TextMeasured(path="/texts/wiki.txt", name="wiki.txt", sha256="1" * 64, n_windows=20)],
        "n_windows": 20,
        "n_scored": 5100,
        "reference_perplexity": about(12.0),
        "noise_floor": comparison(1e-4),
        "candidates": candidates,
        "memory_line": MemoryLine(label="RTX 3060", size=8 * 10**9),
        "memory_context": 8192,
        "histogram_edges": [float(f"{10 ** (e / 5):.4g}") for e in range(-30, 8)],
        "overlap": [],
        "summary": summary("Reference-8B", candidates, 5100, True, MemoryLine(label="RTX 3060", size=8 * 10**9)),
        "seconds": {"score": 100.0},
        "warnings": [],
    }  # fmt: skip
    return ComparisonReport.model_validate(values | changes)


LEVELS = [
    ("Q8_0", 8.5, 0.001), ("Q6_K", 6.6, 0.005), ("Q5_K_M", 5.7, 0.011), ("Q5_K_S", 5.6, 0.0113), ("Q4_K_M", 4.9, 0.028),
    ("Q4_K_S", 4.6, 0.04), ("IQ4_XS", 4.4, 0.036), ("Q3_K_L", 4.3, 0.073), ("Q3_K_M", 4.0, 0.09), ("IQ3_M", 3.8, 0.1),
    ("Q2_K", 3.2, 0.4), ("IQ2_XS", 2.6, 0.55),
]  # fmt: skip


def twelve(layers: int = 4) -> list[Candidate]:
    return [candidate(name, int(bits * 1e9), kl, layers, seed) for seed, (name, bits, kl) in enumerate(LEVELS)]


def weighed(one: Candidate, seed: int = 0) -> Candidate:
    """A candidate with an expected loss of each matrix."""
    losses = 10.0 ** -np.random.default_rng(seed).uniform(2, 7, len(one.tensors))
    rows = [row.model_copy(update={"loss": float(loss)}) for row, loss in zip(one.tensors, losses, strict=True)]
    return one.model_copy(update={"tensors": rows})


def tried(one: Candidate, resident: int | None = 8 * 10**8, words: str = "llama-cpp-python 0.3.36") -> Candidate:
    """A candidate that has been run."""
    prompt = Timing(n_tokens=512, runs=5, median=1234.5, low=1200.0, high=1250.0)
    generation = Timing(n_tokens=64, runs=5, median=41.23, low=39.9, high=42.0)
    speed = Speed(engine=words, processor=words, threads=4, context=8192, prompt=prompt, generation=generation)
    footprint = Footprint(
        engine=words, context=8192, kv="f16", reserved={"weights": 7 * 10**8, "kv_cache": 2 * 10**8}, rearranged=10**7,
        resident=resident, mapped=None if resident is None else 7 * 10**8, predicted={"weights": 9 * 10**8 + 9 * 10**6},
        deviation=0.01, deviation_resident=None if resident is None else 0.136,
    )  # fmt: skip
    return one.model_copy(update={"speed": speed, "footprint": footprint})


class Tags(HTMLParser):
    """What is in a page: tags with their attributes, and open elements at the end."""

    VOID = ("meta", "br", "input", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()


# the page


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    page = render(report(twelve()))
    found = Tags(page)
    assert not found.open and page.startswith("<!doctype html>")
    names = {tag for tag, _ in found.tags}
    assert {"title", "h1", "table", "th", "svg", "figure", "mark"} <= names
    assert not names & {"link", "img", "iframe", "object", "embed", "base"}
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert not {"src", "href", "action", "srcset"} & set(attributes), tag
    assert "http" not in page and "@import" not in page and "url(" not in page
    for label, _, _ in LEVELS:
        assert label in page
    assert page.count("<h1>") == 1 and 'lang="en"' in page and "prefers-color-scheme: dark" in page
    for tag, attributes in found.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")


def test_a_page_of_twelve_large_models_is_small() -> None:
    page = render(report(twelve(layers=80)))
    assert len(page.encode()) < 3_000_000


def test_whatever_comes_from_models_and_texts_is_escaped() -> None:
    bad = candidate(HOSTILE, 10**9, 0.02)
    worst = bad.worst[0].model_copy(
        update={"before": HOSTILE, "actual": HOSTILE, "expected": HOSTILE, "given": HOSTILE, "text": HOSTILE}
    )
    rows = [row.model_copy(update={"role": HOSTILE, "type": HOSTILE}) for row in bad.tensors]
    told = {"engines": [HOSTILE], "warnings": [HOSTILE]}
    bad = bad.model_copy(update={"worst": [worst], "tensors": rows, "family": HOSTILE, "format": HOSTILE, **told})
    text = TextMeasured(path=HOSTILE, name=HOSTILE, sha256=HOSTILE, n_windows=1)
    made = report(
        [bad, candidate("Q4_K_M", 2 * 10**9, 0.01)], texts=[text, text], command=HOSTILE, warnings=[HOSTILE],
        overlap=[HOSTILE], summary=[HOSTILE] * 3, memory_line=MemoryLine(label=HOSTILE, size=3 * 10**9),
        reference=ReferenceUsed(
            path=HOSTILE, name=HOSTILE, architecture=HOSTILE, fingerprint=HOSTILE, n_weights=1, size=1,
            stored_as=HOSTILE,
        ),
    )  # fmt: skip
    page = render(made)
    assert "<img" not in page and page.count("</script>") == 2 and not Tags(page).open
    assert "&lt;/script&gt;&lt;img src=x" in page


@pytest.mark.parametrize("count", [1, 2])
def test_few_candidates_and_nothing_optional(count: int) -> None:
    bare = [
        candidate(
            name, size, kl, memory=None, quantize_seconds=None, block_bits_per_weight=None, engines=[], tensors=[]
        )
        for name, size, kl in [("same", 10**9, 0.0), ("other", 2 * 10**9, 1e-12)][:count]
    ]
    words = summary("Reference-8B", bare, 5100, False, None)
    page = render(report(bare, noise_floor=None, memory_line=None, memory_context=None, summary=words))
    assert not Tags(page).open and "noise floor" not in page and not re.search(r"\bnan\b", page, re.I)


def test_speed_memory_and_losses_are_told_where_they_are_known() -> None:
    full = weighed(tried(candidate("Q4_K_M", 10**9, 0.02)))
    bare = candidate("gptq:w4g128", 2 * 10**9, 0.01, format="gptq", family="GPTQ")
    used = SensitivityUsed(path="/stats.imatrix.gguf", sha256="5" * 64, datasets=["calibration.txt"])
    made = report([full, bare], sensitivity=used)
    page = render(made)
    assert not Tags(page).open
    assert "1,234" in page and "(1,200 to 1,250)" in page and "41.2" in page and "(39.9 to 42.0)" in page
    assert "+1.0 %" in page and "+13.6 %" in page and "weights 700 MB, kv cache 200 MB" in page and "pp512" in page
    assert "medians of 5 runs" in page and "–: not measured" in page
    assert page.count("<td>–</td><td>–</td><td>–</td><td>–</td><td>–</td><td>–</td>") == 1  # the directory's
    assert page.count("what that is expected to cost</h3>") == 1 and "5" * 64 in page
    headers, rows = made.table()
    at = headers.index("prompt tok/s")
    assert headers[at:] == [
        "prompt tok/s", "generation tok/s", "CPU predicted MB", "reserved MB", "peak resident MB"
    ]  # fmt: skip
    assert [row[at:] for row in rows] == [[""] * 5, ["1,234", "41.2", "909.0", "900.0", "800.0"]]
    again = ComparisonReport.model_validate_json(made.model_dump_json())
    assert again == made and again.candidates[0].expected_loss == pytest.approx(sum(t.loss or 0 for t in full.tensors))
    unknown = render(report([tried(full, resident=None, words=HOSTILE)]))
    assert not Tags(unknown).open and "<img" not in unknown


def test_a_report_from_before_there_was_speed_is_read() -> None:
    made = report(twelve())
    old = json.loads(made.model_dump_json())
    del old["sensitivity"]
    for one in old["candidates"]:
        del one["speed"], one["footprint"]
        for row in one["tensors"]:
            del row["loss"]
    assert ComparisonReport.model_validate(old) == made
    page = render(made)
    assert "On the machine that made this page" not in page and "is expected to cost" not in page


# drawings


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_drawings_are_well_formed_and_inside_their_frame(size: object, statistic: object) -> None:
    made = report(twelve())
    line = ("RTX 3060", 8e9)
    cost = Cost("File size", [float(c.size) for c in made.candidates], line)
    for drawing in (pareto(made, cost, statistic, size), distribution(made, size)):  # type: ignore[arg-type]
        root = ElementTree.fromstring(str(drawing))
        wide, high = (float(n) for n in root.attrib["viewBox"].split()[2:])
        for text in root.iter("text"):
            if "x" in text.attrib:
                extent = width(text.text or "", 12)
                start = {"start": 0.0, "middle": -extent / 2, "end": -extent}[text.attrib["text-anchor"]]
                x, y = float(text.attrib["x"]) + start, float(text.attrib["y"])
                assert x > -6 and x + extent < wide + 8 and 0 < y < high, text.text
        for place in re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)\" d=", str(drawing)):
            assert 0 < float(place[0]) < wide and 0 < float(place[1]) < high


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(20, 680), st.floats(20, 380)), min_size=1, max_size=8))
def test_names_do_not_lie_on_each_other(places: list[tuple[float, float]]) -> None:
    frame, size = Box(0, 0, 700, 400), 12.0
    names = [(x, y, f"IQ{i}_XXS") for i, (x, y) in enumerate(places)]
    boxes = []
    for label in placed(names, frame, size):
        wide = width(label.text, size)
        left = {"start": label.x, "end": label.x - wide, "middle": label.x - wide / 2}[label.anchor]
        boxes.append(Box(left, label.y - 0.8 * size, left + wide, label.y + 0.2 * size))
        assert boxes[-1].left >= -3 and boxes[-1].right <= 703
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert one.overlap(other) < 0.25 * size * wide


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=20), st.integers(3, 9))
def test_axes_hold_their_values(values: list[float], wanted: int) -> None:
    for axis in (linear(values, 50, 700), logarithmic(values, 400, 20)):
        ticks = axis.ticks(wanted)
        assert ticks == sorted(ticks) and len(ticks) <= 2 * wanted + 2
        assert all(axis.low <= 1.001 * tick and tick <= 1.001 * axis.high for tick in ticks)
        low, high = sorted((axis.start, axis.stop))
        for value in values:
            assert low <= axis.at(value) <= high


def test_maps_have_a_cell_for_every_matrix() -> None:
    one = weighed(candidate("Q4_K_M", 10**9, 0.1, layers=5))
    found = maps(one, type_shades([one]), decades_of([one], "error") or (-6, 0), decades_of([one], "loss"))
    for drawing in (found.types_map, found.error_map, found.loss_map):
        paths = [path.attrib["d"] for path in ElementTree.fromstring(str(drawing)).iter("path")]
        assert sum(path.count("M") for path in paths) == len(one.tensors)
    assert sum(len(row) for _, row in found.cells) == len(one.tensors)
    shares = [float(share.removesuffix(" %")) for _, _, _, share, _, _ in found.roles]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    shades = type_shades(twelve())
    ordered = sorted(shades, key=lambda name: -TYPES[name])
    assert [shades[name] for name in ordered] == sorted(set(shades.values()))


# words and numbers


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    best = frontier([(float(x), float(y)) for x, y in points])
    assert best
    for i, (x, y) in enumerate(points):
        better = [(u, v) for u, v in points if u <= x and v <= y and (u, v) != (x, y)]
        assert (i in best) <= (not better)
        assert better or any(points[j] == (x, y) for j in best)


def test_the_summary_says_what_is_so() -> None:
    rows = twelve()
    rows[0].within_noise = True
    line = MemoryLine(label="RTX 3060", size=int(5.2e9))
    words = " ".join(summary("Reference-8B", rows, 5100, True, line))
    assert "12 quantizations were compared with Reference-8B over 5,100" in words
    assert "Q8_0 (8.500 GB) cannot be told from the original" in words
    assert "Q4_K_S (take IQ4_XS)" in words
    fitting = [c for c in rows if c.memory is not None and c.memory.total <= line.size]
    least = min(fitting, key=lambda c: c.kl("mean"))
    assert f"{len(fitting)} of 12 fit; of these {least.label} loses least" in words
    none = " ".join(summary("R", rows, 1, False, MemoryLine(label="tiny card", size=1)))
    assert "None of them fits into tiny card" in none


def test_pairs_tell_more_than_intervals() -> None:
    """Windows differ much more than candidates do: in pairs the small difference shows."""
    rng = np.random.default_rng(0)
    windows = rng.uniform(0.01, 0.1, 24)
    one = candidate("one", 100, 0.05, window_kl=windows.tolist())
    other = candidate("other", 100, 0.05, window_kl=(windows * 1.02 + rng.normal(0, 1e-4, 24)).tolist())
    noise = candidate("noise", 100, 0.05, window_kl=(windows + rng.normal(0, 0.01, 24)).tolist())
    assert not undecided(one, other) and undecided(one, noise)
    assert [{a.label, b.label} for a, b in Ranking.of([one, other, noise]).ties] == [
        {"one", "noise"},
        {"other", "noise"},
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (significant(0.012345), "0.0123"), (significant(123.4), "123"), (significant(0), "0"), (kl_text(-1e-12), "0"),
        (kl_text(0.00012345), "0.00012"), (kl_text(2.345), "2.35"), (bytes_text(144_811_392), "145 MB"),
        (bytes_text(4_920_000_000), "4.920 GB"), (bytes_text(12), "12 bytes"), (percent_text(0.9512), "95.1 %"),
        (percent_text(0.99567), "99.57 %"), (percent_text(1.0), "100.0 %"), (percent_text(0.0001), "<0.1 %"),
        (seconds_text(5.234), "5.2 s"), (seconds_text(75), "75 s"), (seconds_text(600), "10 min"),
        (seconds_text(36000), "10.0 h"), (rate_text(1234.5), "1,234"), (rate_text(41.23), "41.2"),
        (rate_text(3.0), "3.00"), (deviation_text(-0.0001), "0.0 %"), (deviation_text(0.1241), "+12.4 %"),
        (deviation_text(-0.037), "-3.7 %"),
    ],
)  # fmt: skip
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected
