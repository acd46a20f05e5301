"""ONNX files with their weights as codes, executed by ONNX Runtime against the values of those codes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from retensor.errors import GraphError, RetensorError
from retensor.quantizing import Affine, packed_bytes, quantize_onnx

RANDOM = np.random.default_rng(0)


def model_of(text, opset=17, dtype=np.float32, **weights):
    graph = onnx.parser.parse_graph(text)
    for name, value in weights.items():
        value = RANDOM.standard_normal(value).astype(dtype) if isinstance(value, tuple) else value
        graph.initializer.append(numpy_helper.from_array(value, name))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model, *inputs):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(
        model if isinstance(model, str) else model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {one.name: value for one, value in zip(session.get_inputs(), inputs, strict=True)})


def with_values(model, quantizer, axes):
    """The model with its weights replaced by what their codes stand for."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for tensor in out.graph.initializer:
        if tensor.name in axes:
            array = np.array(numpy_helper.to_array(tensor))
            one = Affine(quantizer.bits, symmetric=quantizer.symmetric, axis=axes[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(one.encode(torch.from_numpy(array)).decode().numpy(), tensor.name))
    return out


NETWORK = """net (float[2, 3, 8, 8] x) => (float[2, 7] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
    c = ConvTranspose(a, t)
    d = GlobalAveragePool(c)
    e = Flatten(d)
    f = Gemm<transB = 1>(e, g, h)
    i = Gemm(f, j)
    y = MatMul(i, k)
}"""
WEIGHTS = {"w": (4, 3, 3, 3), "b": (4,), "t": (4, 5, 2, 2), "g": (6, 5), "h": (6,), "j": (6, 9), "k": (9, 7)}
AXES = {"w": 0, "t": 1, "g": 0, "j": 1, "k": 1}


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("opset", [11, 17, 21])
def test_the_file_computes_what_the_values_of_its_codes_do(bits, symmetric, opset, tmp_path):
    model, quantizer = model_of(NETWORK, opset, **WEIGHTS), Affine(bits, symmetric=symmetric)
    report = quantize_onnx(model, tmp_path / "few.onnx", quantizer)
    x = RANDOM.standard_normal((2, 3, 8, 8)).astype(np.float32)
    (found,), (wanted,) = run(str(tmp_path / "few.onnx"), x), run(with_values(model, quantizer, AXES), x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert [one.shape for one in report] == [WEIGHTS[name] for name in AXES]
    for one, axis in zip(report, AXES.values(), strict=True):
        steps = one.shape[axis]
        zeros = 0 if symmetric else packed_bytes(steps, bits)
        assert one.after == packed_bytes(int(np.prod(one.shape)), bits) + 4 * steps + zeros
        assert one.before == 4 * np.prod(one.shape)
    onnx.checker.check_model(onnx.load(tmp_path / "few.onnx"), full_check=True)


def test_four_bits_take_half_a_byte_in_the_file(tmp_path):
    model = model_of("net (float[1, 512] x) => (float[1, 512] y) { y = MatMul(x, w) }", w=(512, 512))
    (report,) = quantize_onnx(model, tmp_path / "few.onnx", Affine(4))
    assert report.after <= (tmp_path / "few.onnx").stat().st_size < report.after + 1024
    assert 0.05 < report.error < 0.2


def test_one_step_for_a_weight_and_what_is_skipped(tmp_path):
    text = "net (float[1, 4] x) => (float[1, 4] z) { [one] y = MatMul(x, w) \n [two] z = MatMul(y, v) }"
    model = model_of(text, w=(4, 4), v=(4, 4))
    report = quantize_onnx(model, tmp_path / "few.onnx", Affine(8), channels=False, skip=["tw*"])
    assert [one.name for one in report] == ["one"]
    held = {tensor.name for tensor in onnx.load(tmp_path / "few.onnx").graph.initializer}
    assert "v" in held
    assert "w" not in held


def test_weights_that_two_read_constants_and_those_that_are_inputs(tmp_path):
    text = """net (float[1, 4] x, float[4, 4] w) => (float[1, 4] z, float[4, 4] u) {
    y = MatMul(x, w)
    z = Gemm<transB = 1>(y, w)
    c = Constant()
    d = MatMul(w, c)
    u = Relu(d) }"""
    model = model_of(text, w=(4, 4))
    value = numpy_helper.from_array(RANDOM.standard_normal((4, 4)).astype(np.float32))
    next(node for node in model.graph.node if node.op_type == "Constant").attribute.append(
        helper.make_attribute("value", value)
    )
    report = quantize_onnx(model, tmp_path / "few.onnx", Affine(8))
    # The steps of w lie along another axis for each of its readers; d reads it on the left, as it was.
    assert [one.kind for one in report] == ["MatMul", "Gemm", "MatMul"]
    written = onnx.load(tmp_path / "few.onnx")
    assert "w" in {tensor.name for tensor in written.graph.initializer}
    assert not any(node.op_type == "Constant" for node in written.graph.node)
    assert model.graph.node[0].input[1] == "w"
    x = RANDOM.standard_normal((1, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "few.onnx"), providers=["CPUExecutionProvider"])
    assert all(np.isfinite(value).all() for value in session.run(None, {"x": x}))


def test_half_precision_keeps_its_type(tmp_path):
    model = model_of("net (float16[1, 8] x) => (float16[1, 3] y) { y = MatMul(x, w) }", dtype=np.float16, w=(8, 3))
    quantize_onnx(model, tmp_path / "few.onnx", Affine(4))
    x = RANDOM.standard_normal((1, 8)).astype(np.float16)
    (found,) = run(str(tmp_path / "few.onnx"), x)
    assert found.dtype == np.float16
    assert np.isfinite(found).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 8), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_weight_comes_back(tmp_path_factory, rows, columns, bits, symmetric, channels, seed):
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    model = model_of(f"net (float[1, {rows}] x) => (float[1, {columns}] y) {{ y = MatMul(x, w) }}", w=weight)
    path = tmp_path_factory.mktemp("any") / "few.onnx"
    quantizer = Affine(bits, symmetric=symmetric)
    quantize_onnx(model, path, quantizer, channels=channels)
    found = np.concatenate([run(str(path), row[None])[0] for row in np.eye(rows, dtype=np.float32)])
    wanted = Affine(bits, symmetric=symmetric, axis=1 if channels else None).encode(torch.from_numpy(weight)).decode()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6, atol=1e-7)


def test_mistakes_are_named(tmp_path):
    model = model_of("net (float[1, 4] x) => (float[1, 4] y) { [one] y = MatMul(x, w) }", w=(4, 4))
    out = tmp_path / "few.onnx"
    with pytest.raises(TypeError, match="Affine, not 4"):
        quantize_onnx(model, out, 4)
    with pytest.raises(ValueError, match="follows from each operator"):
        quantize_onnx(model, out, Affine(4, axis=0))
    with pytest.raises(ValueError, match="'two' in skip means no node; names are such as one"):
        quantize_onnx(model, out, skip=["two"])
    with pytest.raises(ValueError, match="no convolution or matrix product"):
        quantize_onnx(model_of("net (float[4] x) => (float[4] y) { y = Relu(x) }"), out)
    with pytest.raises(GraphError, match="cannot read"):
        quantize_onnx(tmp_path / "none.onnx", out)
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(GraphError, match="cannot read"):
        quantize_onnx(tmp_path / "bad.onnx", out)
    weight = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"'one'.*not finite"):
        quantize_onnx(model_of("net (float[1, 4] x) => (float[1, 4] y) { [one] y = MatMul(x, w) }", w=weight), out)
    with pytest.raises(RetensorError, match="cannot write"):
        quantize_onnx(model, tmp_path / "no" / "few.onnx")
    assert not out.exists()
