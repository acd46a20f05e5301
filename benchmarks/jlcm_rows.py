"""What does not depend on trainings: orders, groups, sizes, peers at equal bytes, memory and speed."""

from __future__ import annotations

import copy
import statistics
import tracemalloc
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from benchmarks.jlcm_trainings import layers_of, model_of
from benchmarks.measuring import allocated, power, threads, times, verdict
from torch import nn

from retensor.claims import Claim, Table
from retensor.compression import jlcm
from retensor.compression.jlcm.grouping import equal_bounds
from retensor.compression.jlcm.reorder import row_orders
from retensor.data import accuracy, minilm, sentences

GROUPS, K = 4, 4
MOST = 2_000_000_000
SIZE = 2048
ROUNDS = 15
SENTENCES = 32
FLAT, LINEAR = 1.15, 1.1

Rows = tuple[list[Claim], list[Table]]


@cache
def traced() -> dict[str, tuple[nn.Module, Any, jlcm.Trace]]:
    """Two models, an input of each, and which of their channels can be reordered."""
    model, tokenizer = minilm()
    given = dict(tokenizer(sentences()[:4], padding=True, return_tensors="pt"))
    vit, data, _, _ = model_of(1)
    found = {"all-MiniLM-L6-v2": (model, given), "ViT on digits": (vit, data.x_test[:4])}
    return {name: (net, example, jlcm.trace(net, example)) for name, (net, example) in found.items()}


def orders(progress: Callable[[str], None]) -> Rows:
    """Neurons in the order of their groups: outputs stay."""
    rows = []
    for name, (net, example, trace) in traced().items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the rows of")
            found = jlcm.reorder(net, example, groups=GROUPS, found=trace)
        off = []
        for kind in (torch.float32, torch.float64):
            one, other = (copy.deepcopy(made).to(kind).eval() for made in (net, found.model))
            with torch.no_grad():
                if isinstance(example, dict):
                    before, after = one(**example)[0], other(**example)[0]
                else:
                    before, after = one(example.to(kind)), other(example.to(kind))
            off.append(float((before - after).abs().max() / before.abs().max()))
        rows.append((name, len(layers_of(net)), len(found.permutations), f"{off[0]:.1e}", f"{off[1]:.1e}"))
    held = all(float(row[3]) < 1e-5 and float(row[4]) < 1e-12 for row in rows)
    claim = Claim(
        "Neurons are reordered by groups without any mapping overhead: the function stays.",
        f"{GROUPS} groups; all-MiniLM-L6-v2 and a trained ViT; orders found by disturbing one layer after another",
        "the model as it was",
        "the same function",
        "; ".join(f"{row[0]}: {row[2]} of {row[1]} layers, {row[3]} in float32, {row[4]} in float64" for row in rows),
        verdict(held),
        "Rows that are part of the outputs stay; their groups are labels of 2 bits a row.",
    )
    columns = ("Model", "Layers", "Reordered", "Relative change, float32", "float64")
    return [claim], [Table("Outputs after reordering", columns, rows)]


def sizes(progress: Callable[[str], None]) -> Rows:
    """A Llama of 7 billion parameters by its real shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig()).to(torch.float16)
    weights = sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for label, k, groups, skip in (
        ("k = 4, every linear layer", 4, 4, ()),
        ("k = 4, the head as it is", 4, 4, ("lm_head",)),
        ("k = 8, every linear layer", 8, 4, ()),
        ("k = 16, every linear layer", 16, 4, ()),
    ):
        found = jlcm.uniform(model, k, groups, skip=skip)
        rows.append((label, found.nbytes / 1e9, found.dense_bytes / 1e9, 8 * found.nbytes / weights))
    claim = Claim(
        "Llama 7B is compressed to 2 GB.",
        f"the shapes of Llama 7B ({weights:,} parameters); embeddings, norms and what else has no codebook in float16; "
        f"k = 4, {GROUPS} codebooks a layer, labels of 2 bits a row",
        "float16",
        "2 GB",
        f"{rows[0][1]:.2f} GB, {rows[0][3]:.2f} bits a parameter (float16: {rows[0][2]:.2f} GB)",
        verdict(rows[0][1] <= MOST / 1e9),
        "The size alone: no trained weights of this model can be had here, and no phone.",
    )
    columns = ("Plan", "GB", "GB in float16", "Bits a parameter")
    return [claim], [Table("Llama 7B by its shapes", columns, rows)]


def grouping(progress: Callable[[str], None]) -> Rows:
    """Squared error of the nearest codes: groups by distribution, by scale and by chance, and one codebook."""
    claims, tables = [], []
    for name, (net, _, trace) in traced().items():
        own = {label for label, order in row_orders(net, trace).items() if order.own}
        rows, right, fair, gains, scaled = [], 0, 0, [], 0
        layers = [label for label in layers_of(net) if net.get_submodule(label).weight.shape[0] >= 4 * GROUPS]
        for label in layers:
            weight = net.get_submodule(label).weight.detach()
            error, bits = {}, {}
            for way in ("one", "random", "std", "quantiles"):
                groups = 1 if way == "one" else GROUPS
                labels = jlcm.group_rows(weight, groups, "std" if way == "one" else way)
                coded = jlcm.nearest_codes(weight, K, labels, groups)
                error[way] = float((coded.weight().reshape(weight.shape) - weight).square().mean())
                # Where the order of rows cannot be its own, each row has a label, and that is paid for too.
                bounds = equal_bounds(len(weight), groups) if label in own or groups == 1 else None
                layout = jlcm.Layout(groups, len(weight), bounds)
                bits[way] = 8 * jlcm.Coding(K, layout).nbytes(tuple(weight.shape))
            # What more bits would have bought one codebook, at 6 dB a bit: a quarter of the error for each.
            even = {way: error[way] * 4 ** ((bits[way] - bits["one"]) / weight.numel()) for way in error}
            right += error["quantiles"] < error["random"] < error["one"]
            fair += even["quantiles"] < min(even["random"], even["one"])
            gains.append(1 - error["quantiles"] / error["one"])
            scaled += error["quantiles"] < error["std"]
            change = [f"{error[way] / error['one'] - 1:+.1%}" for way in ("quantiles", "std", "random")]
            rows.append((label, *change, f"{even['quantiles'] / even['one'] - 1:+.1%}"))
        claims.append(
            Claim(
                "(ours) Four codebooks for groups of similar rows beat four for rows by chance, and these beat one.",
                f"{name}, {len(layers)} layers, k = {K}, nearest codes",
                "four groups by chance, one codebook",
                "none",
                f"in this order on {right} of {len(layers)} layers; error {min(gains):.1%} to {max(gains):.1%} below "
                f"one codebook, median {statistics.median(gains):.1%}; best on {fair} where codebooks, bounds and "
                f"labels are paid for; nearer than rows sorted by scale and cut in equal parts on {scaled}",
                verdict(right == fair == len(layers), right > len(layers) / 2),
                ""
                if right == fair == len(layers)
                else "Small layers gain less than the bytes of codebooks and labels are worth.",
            )
        )
        columns = ("Layer", "By distribution", "By scale", "By chance", "By distribution, bytes paid")
        tables.append(Table(f"Squared error against one codebook, k = {K}: {name}", columns, rows))
    return claims, tables


def peers(progress: Callable[[str], None]) -> Rows:
    """MiniLM in 4 bits: nearest codes against torchao's integers."""
    model, tokenizer = minilm()
    given = dict(tokenizer(sentences()[:SENTENCES], padding=True, truncation=True, max_length=48, return_tensors="pt"))
    with torch.no_grad():
        wanted = model(**given)[0]

    def error(made: nn.Module) -> float:
        with torch.no_grad():
            return float((made(**given)[0] - wanted).square().sum() / wanted.square().sum())

    rows = []
    for k in (16, 4):
        made = jlcm.compress(model, given, k=k, groups=GROUPS, iters=0)
        rows.append((f"JLCM, nearest codes, k = {k}, {GROUPS} codebooks", made.bits_per_weight, error(made.model)))
    peers: dict[int, list[tuple[str, float, float]]] = {}
    for bits, size, symmetric in ((4, 32, True), (4, 32, False), (4, 128, True), (4, 128, False), (8, 0, True)):
        integers, paid = in_integers(model, bits, size, symmetric)
        label = f"torchao int{bits}, {f'groups of {size}' if size else 'rows'}, {'' if symmetric else 'a'}symmetric"
        peers.setdefault(size, []).append((label, paid, error(integers)))
        rows.append(peers[size][-1])
    # Of two ways to make integers, the nearer one.
    mine, small, large = rows[0], *(min(peers[size], key=lambda row: row[2]) for size in (32, 128))
    nearer = [mine[2] < theirs[2] and mine[1] <= theirs[1] for theirs in (small, large)]
    claim = Claim(
        "(ours) Sixteen codewords are nearer than 4-bit integers, in no more bytes.",
        f"all-MiniLM-L6-v2, all linear layers, nothing learned; error of the last hidden states on {SENTENCES} "
        "sentences",
        "torchao int4 weight-only, groups of 32 and of 128, symmetric or not, whichever is nearer",
        "none",
        f"{mine[2]:.4f} at {mine[1]:.2f} bits against {small[2]:.4f} at {small[1]:.2f} and {large[2]:.4f} at "
        f"{large[1]:.2f}",
        verdict(all(nearer), any(nearer)),
        "" if nearer[0] else "A scale for every 32 weights follows them more closely, and takes half a bit more.",
    )
    columns = ("Weights", "Bits a weight", "Relative squared error")
    return [claim], [Table("all-MiniLM-L6-v2 in few bits", columns, rows)]


def in_integers(model: nn.Module, bits: int, size: int, symmetric: bool) -> tuple[nn.Module, float]:
    """A model whose linear layers are torchao's integers, and bits of a weight: groups of ``size``, or rows for 0."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    made = copy.deepcopy(model)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(size) if size else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
    )  # fmt: skip
    quantize_(made, config)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    groups = sum(weight.numel() // (size or weight.shape[1]) for weight in weights)
    # A scale of 16 bits for each group, and a zero point where it is not symmetric.
    each = 16 if symmetric else 16 + bits
    return made, bits + each * groups / sum(weight.numel() for weight in weights)


def integers_of(seed: int, bits: int, size: int) -> tuple[float, float]:
    """A digits ViT in torchao's integers: test accuracy, and bits of a weight.

    Symmetric ones or not, by the error of the outputs on training pictures.
    """
    model, data, _, other = model_of(seed)
    with torch.no_grad():
        wanted = model(other)
    tried = [in_integers(model, bits, size, symmetric) for symmetric in (True, False)]
    with torch.no_grad():
        made, paid = min(tried, key=lambda one: float((one[0](other) - wanted).square().sum()))
    return 100 * accuracy(made, data.x_test, data.y_test), paid


def cost(progress: Callable[[str], None]) -> Rows:
    """Memory of the learning, and time and traffic of a layer."""
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(512, 512, bias=False)), torch.randn(64, 512)
    memory = []
    for k in (4, 16, 64):
        coded = jlcm.nearest_codes(layer[0].weight, k, torch.zeros(512, dtype=torch.int64), 1)

        def one(k: int = k, coded: jlcm.Coded = coded) -> None:
            learner = jlcm.CodebookLearner(layer[0].weight, coded, jlcm.Rule())
            optimizer = jlcm.LogitOptimizer([learner.logits], 0.1)
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                (x @ learner().T).square().mean().backward()
                optimizer.step()

        one()
        memory.append((k, allocated(one), allocated(one) / (4 * k * 512 * 512)))
    grows = power([k for k, _, _ in memory], [size for _, size, _ in memory])
    claims = [
        Claim(
            "(ours) Learning takes memory in proportion to the logits of the unit that is learned, k for each weight.",
            "a linear layer of 512 x 512, its nearest codes and two steps; by torch's own record",
            "k |W| float32",
            "none",
            "; ".join(f"k = {k}: {ratio:.1f} times" for k, _, ratio in memory) + f"; grows as k^{grows:.2f}",
            verdict(grows < 1.05),
            "Logits, their gradient, its momentum, and what the rule of the gradient works out on its way.",
        )
    ]
    tables = [Table("Memory of two steps", ("k", "Bytes", "Of k |W| float32"), memory)]
    progress("speed")
    rows: list[tuple[str, int, float, float, float]] = []
    resident: list[tuple[str, int, float, float, float]] = []
    with threads(1), torch.no_grad():
        for k in (4, 16):
            net = nn.Sequential(nn.Linear(SIZE, SIZE))
            coded_net = jlcm.compress(net, torch.randn(4, SIZE), k=k, groups=1, iters=0).model
            for batch in (1, 64):
                given = torch.randn(batch, SIZE)
                calls = {
                    "dense": lambda net=net, given=given: net(given),
                    "gather": lambda net=coded_net, given=given: net(given),
                    "sums": lambda net=coded_net, given=given: jlcm.lut_linear(net[0], given),
                }
                found = times(calls, ROUNDS)
                held = {name: held_by(call) for name, call in calls.items()}
                stays = {"dense": 4 * SIZE * SIZE, "gather": coded_net[0].nbytes, "sums": coded_net[0].nbytes}
                resident.append((f"k = {k}", batch, *((stays[name] + held[name]) / 2**20 for name in calls)))
                traffic = 4 * SIZE * SIZE / coded_net[0].nbytes
                rows.append((f"k = {k}", batch, found.ratio("gather", "dense"), found.ratio("sums", "dense"), traffic))
    enough = all(row[4] >= (16 if row[0] == "k = 4" else 8) * 0.99 for row in rows)
    slower = all(row[2] > 1 and row[3] > 1 for row in rows)
    claims.append(
        Claim(
            "(ours) Coded layers read far fewer bytes of weights, and are slower.",
            f"a linear layer of {SIZE} x {SIZE}, one thread, float32 inputs; medians of {ROUNDS} rounds in turn",
            "torch's dense float32 product",
            "none",
            "; ".join(
                f"{k}, batch {batch}: {gather:.1f} times the time where weights are looked up, {sums:.1f} by sums for "
                f"each codeword, {traffic:.0f} times fewer bytes"
                for k, batch, gather, sums, traffic in rows
            ),
            verdict(enough and slower, enough),
            "Looked up, a layer's weights stand in memory while it runs, written once and read again; by sums they "
            f"never do: {resident[0][2]:.1f} MB dense, {resident[0][3]:.1f} looked up, {resident[0][4]:.1f} by sums "
            "(k = 4, batch 1)." + ("" if slower else " Not slower everywhere."),
        )
    )
    tables.append(Table("Time and bytes against dense", ("Codebook", "Batch", "Looked up", "By sums", "Bytes"), rows))
    columns = ("Codebook", "Batch", "Dense", "Looked up", "By sums")
    tables.append(Table("MB of weights and of what a call holds beside them", columns, resident))
    claim, table = _growth()
    return [*claims, claim], [*tables, table]


def held_by(call: Callable[[], Any]) -> int:
    """The most bytes that torch and numpy hold during a call over what they held before."""
    tracemalloc.start()
    try:
        call()
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return allocated(call) + arrays


def _growth() -> tuple[Claim, Table]:
    """Memory of learning by blocks, and its time by codewords and by blocks."""
    torch.manual_seed(0)
    x, rows = torch.randn(64, 128), []

    def net(blocks: int) -> nn.Module:
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)) for _ in range(blocks))
        )

    blocks = (2, 4, 8)
    peaks = [allocated(partial(jlcm.compress, net(count), x, k=64, groups=1, iters=2)) for count in blocks]
    powers: dict[str, float] = {}
    with threads(1):
        for what, settings in (("k", [(k, 2) for k in (8, 32, 128)]), ("blocks", [(8, count) for count in blocks])):
            calls = {
                f"{k}, {count}": partial(jlcm.compress, net(count), x, k=k, groups=1, iters=20) for k, count in settings
            }
            found = times(calls, 3)
            sizes = [k if what == "k" else count for k, count in settings]
            taken = [found[key] for key in calls]
            powers[what] = power(sizes, taken)
            rows.append(
                (
                    f"Time, by {what}", ", ".join(map(str, sizes)), ", ".join(f"{t / taken[0]:.2f}" for t in taken),
                    powers[what],
                )
            )  # fmt: skip
    more = ", ".join(f"{peak / peaks[0]:.2f}" for peak in peaks)
    rows.append(("Memory, by blocks", ", ".join(map(str, blocks)), more, power(blocks, peaks)))
    flat, linear = peaks[-1] < FLAT * peaks[0], all(exponent < LINEAR for exponent in powers.values())
    claim = Claim(
        "(ours) Memory is that of one block at a time; time is no more than linear in codewords and in blocks.",
        "blocks of two linear layers of 128 x 128; k = 64 for memory; 20 steps, nearest codes included, one thread, "
        "for time",
        "2 blocks; 8 codewords",
        "none",
        f"{peaks[-1] / peaks[0]:.2f} times the memory for {blocks[-1] // blocks[0]} times the blocks; time grows as "
        f"k^{powers['k']:.2f} and blocks^{powers['blocks']:.2f}",
        verdict(flat and linear, flat or linear),
        f"Held where memory grows by less than {FLAT - 1:.0%} and both exponents are below {LINEAR:g}; the model "
        "itself and its samples grow with the blocks.",
    )
    return claim, Table("Learning", ("What", "Sizes", "Times the first", "Exponent"), rows)
