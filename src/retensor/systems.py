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
)
"""In the order of the table."""
