"""A network that reads, from the wheel of RapidOCR: what it still reads with weights in few bits."""

from importlib.metadata import PackageNotFoundError, files

import numpy as np
import onnxruntime
import pytest
from PIL import Image, ImageDraw, ImageFont

import retensor as rt
from retensor.quantizing import Affine, quantize_onnx

LINES = (
    "The quick brown fox",
    "over 13 lazy dogs",
    "retensor 0.1.0",
    "off-chip traffic",
    "Proved optimal",
    "least peak",
)


@pytest.fixture(scope="module")
def recogniser():
    """PP-OCRv4's recogniser of lines, trained by PaddleOCR (Apache 2.0)."""
    try:
        held = files("rapidocr-onnxruntime") or []
    except PackageNotFoundError:
        pytest.skip("rapidocr-onnxruntime is not installed")
    return next(str(one.locate()) for one in held if one.name == "ch_PP-OCRv4_rec_infer.onnx")


def picture(line):
    font = ImageFont.load_default(32)
    image = Image.new("RGB", (int(font.getlength(line)) + 24, 48), "white")
    ImageDraw.Draw(image).text((12, 5), line, fill="black", font=font)
    return ((np.asarray(image, np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None].copy()


def read(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    letters = ["", *session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
    lines = []
    for line in LINES:
        best = session.run(None, {"x": picture(line)})[0][0].argmax(-1)
        kept = [one for i, one in enumerate(best) if one and (i == 0 or best[i - 1] != one)]
        lines.append("".join(letters[one] for one in kept).strip())
    return tuple(lines)


def test_a_real_network_reads_in_six_and_eight_bits_and_no_more_in_four(recogniser, tmp_path):
    assert read(recogniser) == LINES
    for bits in (8, 6):
        report = quantize_onnx(recogniser, tmp_path / f"{bits}.onnx", Affine(bits))
        assert read(tmp_path / f"{bits}.onnx") == LINES
        assert sum(one.after for one in report) < (bits + 0.4) / 32 * sum(one.before for one in report)
    # Rounded to the nearest its thin filters lose too much in 4 bits: this is what methods that learn are for.
    quantize_onnx(recogniser, tmp_path / "4.onnx", Affine(4))
    assert read(tmp_path / "4.onnx") != LINES


def test_its_codes_are_what_the_planner_prices(recogniser, tmp_path):
    quantize_onnx(recogniser, tmp_path / "8.onnx", Affine(8))
    sizes = []
    for path in (recogniser, tmp_path / "8.onnx"):
        graph = rt.graph.load(path, inputs={"x": (1, 3, 48, 320)})
        sizes.append(sum(t.nbytes for t in graph.tensors.values() if t.role == "parameter"))
        assert not any(operator.kind == "DequantizeLinear" for operator in graph.operators)
    assert 0.25 < sizes[1] / sizes[0] < 0.28
