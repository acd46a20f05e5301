"""What the library holds: every system, its wing, its paper, and where the measured claims about it are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One system of the library.

    Attributes
    ----------
    name : str
    wing : str
        The folder it lies in.
    module : str
        Where its public names are.
    does : str
        In a few words, what it does to a model.
    authors, arxiv : str
        The paper.
    claims : tuple of str
        Slugs of ``benchmarks/claim_<slug>.py``.
    """

    name: str
    wing: str
    module: str
    does: str
    authors: str
    arxiv: str
    claims: tuple[str, ...]


SYSTEMS = (
    System(
        "COSMA",
        "planning",
        "retensor.planning",
        "order, addresses and evictions of least off-chip traffic, proved",
        "Li, Gupta, Malik 2023",
        "2311.18246",
        ("cosma", "searched", "large", "packing", "peak", "cost"),
    ),
    System(
        "PELA",
        "compression",
        "retensor.compression.pela",
        "linear layers of low rank, repaired by their teacher",
        "Guo, Wang, Kankanhalli 2024",
        "2310.10700",
        ("pela",),
    ),
    System(
        "A-priori convolutions",
        "compression",
        "retensor.compression.apriori",
        "convolutions as one-way filters, before training",
        "Boukraichi, Akkari, Casenave, Ryckelynck 2023",
        "2304.04964",
        ("apriori_conv",),
    ),
    System(
        "Weight Compander",
        "compression",
        "retensor.compression.weight_compander",
        "weights as a bounded function of latent ones, which regularises",
        "Cakaj, Mehnert, Yang 2023",
        "2306.16993",
        ("weight_compander",),
    ),
    System(
        "Experts Weights Averaging",
        "compression",
        "retensor.compression.ewa",
        "feed-forward layers trained as averaged experts, folded into one",
        "Huang, Ye, Huang, Li, Chen, He, Ouyang 2023",
        "2308.06093",
        ("ewa",),
    ),
    System(
        "Neural Metamorphosis",
        "compression",
        "retensor.compression.neumeta",
        "one function that makes weights of any width",
        "Yang, Wang 2024",
        "2410.11878",
        ("neumeta",),
    ),
    System(
        "FlexRound",
        "compression",
        "retensor.compression.flexround",
        "weights in few bits, rounded after a learned division",
        "Lee, Kim, Kwon, Lee 2023",
        "2306.00317",
        ("flexround",),
    ),
    System(
        "APHQ-ViT",
        "compression",
        "retensor.compression.aphq",
        "vision transformers with weights and activations in few bits",
        "Wu, Zhang, Chen, Guo, Huang, Wang 2025",
        "2504.02508",
        ("aphq_vit",),
    ),
    System(
        "JLCM",
        "compression",
        "retensor.compression.jlcm",
        "weights as indices into codebooks, learned together",
        "Yvinec, Dapogny, Bailly 2024",
        "2309.17361",
        ("jlcm",),
    ),
    System(
        "FP4 training",
        "compression",
        "retensor.compression.fp4",
        "training with 4-bit operands: formats, full gradients, overhead, sweeps",
        "Hu, Luschi, Balança 2025",
        "2509.17791",
        ("fp4",),
    ),
    System(
        "ShiftAddViT",
        "compression",
        "retensor.compression.shiftadd",
        "attention of additions, layers of shifts, and routed mixtures of both",
        "You, Shi, Guo, Lin 2023",
        "2306.06446",
        ("shiftaddvit",),
    ),
)
"""In the order of the table."""
