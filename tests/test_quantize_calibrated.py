"""`quantize --calibration`: importances reach the codecs, are told of in the file, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fewbits
from fewbits.calibration import Statistics, TensorStatistics, read_statistics, write_statistics
from fewbits.calibration.run import calibrate
from fewbits.checkpoint import GGUFCheckpoint, open_checkpoint
from fewbits.codecs import codec
from fewbits.errors import FewbitsError
from fewbits.formats.gguf.source import gguf_source
from fewbits.plan import MixtureOptions
from tiny_models import save_tiny

WORDS = ["the", "and", "other", "in", "winter", "banner", "hand", "tin", "θ", "inner"]


def write_text(file: Path, seed: int, words: int = 3000) -> Path:
    file.write_text(" ".join(np.random.default_rng(seed).choice(WORDS, words)) + "\n", "utf-8")
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "mixtral", "mixtral")


@pytest.fixture
def statistics(tmp_path: Path, tiny: Path, text: Path) -> Path:
    calibrate(tiny, text, tmp_path / "s.gguf", chunks=4, output_tensor=True)
    return tmp_path / "s.gguf"


def test_the_file_is_what_the_codec_makes_of_the_importances(tmp_path: Path, tiny: Path, statistics: Path) -> None:
    out = tmp_path / "x.gguf"
    planned = fewbits.plan(tiny, "Q4_0", output=out, calibration=[statistics])
    report = fewbits.quantize(tiny, "Q4_0", out, calibration=[statistics])
    assert planned.file_size == report.size == out.stat().st_size
    known, made = read_statistics(statistics), GGUFCheckpoint(out)
    source = gguf_source(open_checkpoint(tiny))
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight"):
        shape, kind = made.tensors[name].shape, codec(made.tensors[name].dtype)
        weights = source.read[name](0, shape[0]).reshape(shape).astype(np.float32)
        want = kind.encode(weights, known.tensors[name].importance()[0])
        np.testing.assert_array_equal(made.raw(name, 0, want.size), want.ravel())
        if kind.weighted:
            assert (want != kind.encode(weights)).any()


def test_the_file_tells_what_it_was_calibrated_with(tmp_path: Path, tiny: Path, statistics: Path) -> None:
    out = tmp_path / "x.gguf"
    fewbits.quantize(tiny, "Q4_0", out, calibration=[statistics])
    found, known = GGUFCheckpoint(out).metadata, read_statistics(statistics)
    assert found["quantize.imatrix.file"] == "s.gguf"
    dataset = f"text.txt sha256:{known.texts_sha256[0][:16]} tokens:2048"
    assert found["quantize.imatrix.dataset"] == dataset
    assert found["quantize.imatrix.entries_count"] == len(known.tensors) == 15
    assert found["quantize.imatrix.chunks_count"] == 4


def test_a_text_is_run_first_and_its_statistics_are_kept(tmp_path: Path, tiny: Path, text: Path) -> None:
    out = tmp_path / "x.gguf"
    planned = fewbits.plan(tiny, "Q4_0", output=out, calibration=[text], calibration_chunks=4)
    report = fewbits.quantize(tiny, "Q4_0", out, calibration=[text], calibration_chunks=4)
    assert planned.file_size == report.size == out.stat().st_size
    kept = tmp_path / "x.imatrix.gguf"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.gguf", "x.imatrix.gguf"]
    again = tmp_path / "y.gguf"
    fewbits.quantize(tiny, "Q4_0", again, calibration=[kept])
    assert again.read_bytes()[-4096:] == out.read_bytes()[-4096:]
    out.unlink()
    with pytest.raises(FewbitsError, match=r"--calibration .*x\.imatrix\.gguf"):
        fewbits.quantize(tiny, "Q4_0", out, calibration=[text])


def test_what_would_be_refused_is_refused_before_calibrating(tmp_path: Path, tiny: Path, text: Path) -> None:
    with pytest.raises(FewbitsError, match="Unknown"):
        fewbits.quantize(tiny, "Q4_X", tmp_path / "x.gguf", calibration=[text])
    with pytest.raises(FewbitsError, match="do not fit"):
        options = MixtureOptions(no_fallback=True)
        fewbits.quantize(tiny, "Q4_K_M", tmp_path / "x.gguf", mixture=options, calibration=[text])
    assert not list(tmp_path.iterdir())


def test_targets_without_use_for_calibration_say_so(tmp_path: Path, tiny: Path, text: Path) -> None:
    for calibration in (text, [text]):
        report = fewbits.quantize(tiny, "Q8_0", tmp_path / "x.gguf", calibration=calibration, overwrite=True)
    assert any("no use for calibration" in note for note in report.notes)
    assert not any(key.startswith("quantize.") for key in GGUFCheckpoint(tmp_path / "x.gguf").metadata)
    assert not (tmp_path / "x.imatrix.gguf").exists()


def test_statistics_are_told_by_their_first_bytes(tmp_path: Path, tiny: Path, statistics: Path) -> None:
    old = tmp_path / "old.imatrix"
    write_statistics(read_statistics(statistics), old, "dat")
    notes = fewbits.plan(tiny, "Q4_0", calibration=old).notes
    assert notes == fewbits.plan(tiny, "Q4_0", calibration=statistics).notes


def test_every_expert_gets_its_own_importances(tmp_path: Path, experts: Path, text: Path) -> None:
    calibrate(experts, text, tmp_path / "s.gguf", chunks=4)
    out = tmp_path / "x.gguf"
    fewbits.quantize(experts, "Q4_0", out, calibration=[tmp_path / "s.gguf"])
    known, made = read_statistics(tmp_path / "s.gguf"), GGUFCheckpoint(out)
    name = "blk.0.ffn_down_exps.weight"
    shape, importance = made.tensors[name].shape, known.tensors[name].importance()
    weights = gguf_source(open_checkpoint(experts)).read[name](0, shape[0] * shape[1]).reshape(shape)
    kind = codec(made.tensors[name].dtype)
    want = [kind.encode(np.ascontiguousarray(weights[e], np.float32), importance[e]) for e in range(shape[0])]
    np.testing.assert_array_equal(made.raw(name, 0, made.tensors[name].nbytes), np.concatenate(want).ravel())


def test_experts_and_tensors_without_data_are_named(tmp_path: Path, experts: Path, text: Path) -> None:
    made = calibrate(experts, text, chunks=4).statistics
    silent = made.tensors["blk.1.ffn_up_exps.weight"]
    silent.sums[2], silent.counts[2] = 0, 0
    del made.tensors["blk.0.attn_q.weight"]
    write_statistics(made, tmp_path / "s.gguf")
    notes = fewbits.quantize(experts, "Q4_0", tmp_path / "x.gguf", calibration=[tmp_path / "s.gguf"]).notes
    assert any("expert 2 of blk.1.ffn_up_exps.weight" in note for note in notes)
    assert any("blk.0.attn_q.weight" in note and "1 tensors have no statistics" in note for note in notes)


@pytest.mark.parametrize("columns", ["zero", "one", "constant", "huge", "tiny"])
def test_odd_statistics_make_sound_files(tmp_path: Path, tiny: Path, statistics: Path, columns: str) -> None:
    known = read_statistics(statistics)
    for tensor in known.tensors.values():
        if columns == "zero":
            tensor.sums[:] = 0
        elif columns == "one":
            tensor.sums[:, 1:] = 0
        elif columns == "constant":
            tensor.sums[:] = 7
        else:
            tensor.sums[:] *= np.float32(1e30 if columns == "huge" else 1e-30)
    write_statistics(known, tmp_path / "odd.gguf")
    fewbits.quantize(tiny, "Q4_0", tmp_path / "x.gguf", calibration=[tmp_path / "odd.gguf"])
    made, source = GGUFCheckpoint(tmp_path / "x.gguf"), gguf_source(open_checkpoint(tiny))
    for name, info in made.tensors.items():
        decoded = made.read(name)
        assert np.isfinite(decoded).all()
        if len(info.shape) == 2 and columns in ("zero", "constant"):
            weights = source.read[name](0, info.shape[0]).reshape(info.shape)
            assert np.sqrt(((decoded - weights) ** 2).mean()) < 0.12 * weights.std()


def test_statistics_of_another_model_are_refused(tmp_path: Path, tiny: Path, statistics: Path) -> None:
    wrong = Statistics({"blk.0.attn_q.weight": TensorStatistics(np.ones((1, 32), np.float32), np.ones(1, np.float32))})
    write_statistics(wrong, tmp_path / "wrong.gguf")
    with pytest.raises(FewbitsError, match=r"wrong\.gguf.*blk\.0\.attn_q\.weight.*1 x 32"):
        fewbits.quantize(tiny, "Q4_0", tmp_path / "x.gguf", calibration=[tmp_path / "wrong.gguf"])
    other = Statistics({"blk.7.attn_q.weight": wrong.tensors["blk.0.attn_q.weight"]})
    write_statistics(other, tmp_path / "other.gguf")
    with pytest.raises(FewbitsError, match="nothing on any tensor"):
        fewbits.quantize(tiny, "Q4_0", tmp_path / "x.gguf", calibration=[tmp_path / "other.gguf"])
    with pytest.raises(FewbitsError, match="beside the statistics"):
        both = [statistics, write_text(tmp_path / "t.txt", 1)]
        fewbits.quantize(tiny, "Q4_0", tmp_path / "x.gguf", calibration=both, effort="fast")
    with pytest.raises(FewbitsError, match="cannot be read"):
        fewbits.quantize(tiny, "Q4_0", tmp_path / "x.gguf", calibration=[tmp_path / "none.txt"])
    assert not (tmp_path / "x.gguf").exists()


def test_the_calibration_text_measures_nothing(tmp_path: Path, tiny: Path, statistics: Path, text: Path) -> None:
    out = tmp_path / "x.gguf"
    fewbits.quantize(tiny, "Q4_0", out, calibration=[statistics])
    with pytest.raises(FewbitsError, match="was calibrated on"):
        fewbits.measure(out, text, chunks=1, context=64)
    assert fewbits.measure(out, write_text(tmp_path / "t.txt", 1), chunks=1, context=64).n_windows == 1
