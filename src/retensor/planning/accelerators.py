"""Public accelerators by name: scratchpad, alignment, off-chip bandwidth and multiply-accumulates a second.

Each figure is from a public document, named in the entry's ``source``; what none of them states is left out: an
alignment of 1, a bandwidth or rate of None. Rates are those of the stated clock with every unit busy. A scratchpad is
what holds feature maps; where weights have a memory of their own, ``note`` says so. The documents:

- Vela 5.2.0, Arm's compiler for Ethos-U, package ethos-u-vela of PyPI. *ethosu/config_files/Arm/vela.ini*: the clock
  and the bandwidth of each system configuration, the SRAM of each memory mode. *ethosu/vela/architecture_features.py*,
  ``accelerator_configs``: multiply-accumulates a cycle and a core; Ethos-U65-512 has two cores.
  *ethosu/vela/tensor.py*, ``AllocationQuantum``: 16 bytes.
- ML Embedded Evaluation Kit of Arm, *docs/sections/appendix.md*, as in alifsemi/alif_ml-embedded-evaluation-kit
  (GitHub, 2d90907): the memory map of Corstone-300, where the SRAM has 2 MiB.
- NVDLA hardware, nvdla/hw (GitHub, 1a65f1f), *spec/defs/nv_small.spec* and *nv_large.spec*: banks x width x depth of
  the convolution buffer, atomic sizes of the array and of memory.
- NVDLA documentation, nvdla/doc (GitHub, 31f5740). *doc/hw/v2/scalability.rst*: data cubes are aligned with the atomic
  size of memory. *doc/primer.rst*, the table of estimates at 1 GHz: 20 and 1 GB/s of SDRAM for 2048 and 64
  multiply-accumulates with buffers of 512 and 128 KB.
- Gemmini generator, ucb-bar/gemmini (GitHub, 8c3f992). *src/main/scala/gemmini/Configs.scala*, ``defaultConfig``: a
  16 x 16 array, 256 KiB of scratchpad, 64 KiB of accumulators. *README.md*, "Scratchpad and Accumulator": rows of 128
  bits. The clock is the user's.
- Sze et al. 2017: Sze, Chen, Yang, Emer, "Efficient processing of deep neural networks: a tutorial and survey",
  Proceedings of the IEEE 105(12), arXiv 1703.09039, on the row stationary dataflow: the 108 KB of Eyeriss's global
  buffer.
- Benchmarking DNN Processors, eyeriss.mit.edu/benchmarking.html, "Processor Specifications": Eyeriss has 168
  multipliers of 16 bits at 200 MHz.
- Edge TPU FAQ of Google Coral, coral.ai/docs/edgetpu/faq: 4 TOPS, of which a multiply-accumulate is taken to be two.
- Coral tutorials, google-coral/tutorials (GitHub, f8b2d90), *retrain_efficientdet_model_maker_tf2.ipynb*: about 8 MB
  of SRAM.
- Coral Accelerator Module datasheet 1.4, "Features": PCIe Gen2 x1. Hardware Secrets, "Everything you need to know
  about the PCI Express", page 3: 500 MB/s for one such lane.
- MAX78000 synthesis tools of Analog Devices, analogdevicesinc/ai8x-synthesis (GitHub, ab4f4c0). *README.md* and
  *docs/AHBAddresses.md*: 16 data memories of 32 KiB in words of 32 bits, 432 KiB of kernels, 64 processors, 50 MHz by
  default. *izer/latency.py*: an output element takes a cycle for each 64 channels, whatever the kernel, and the
  largest has 3 x 3.
- K210 datasheet of Canaan, kendryte/kendryte-doc-datasheet (GitHub, 8220268), *en/003.md*: 2 MiB of SRAM for the neural
  network processor.
- nncase, Canaan's compiler, kendryte/nncase (GitHub, 99431d9), *modules/k210/src/schedule/kpu_buffer_allocator.cpp*: an
  alignment of 64 bytes.
- Sipeed, "MAIX performance and limit for AI models", bbs.sipeed.com/t/topic/691: the K210 is declared to multiply
  0.23e12 times a second at 400 MHz; at 300 MHz it measures 167e9.
- GAP SDK of GreenWaves, GreenWaves-Technologies/gap_sdk (GitHub, a230265). *doc/source/gap8.rst*, "Memory areas", and
  *gap8/rtos/pulp/archi_pulp/include/archi/chips/gap/memory_map.h*: 512 KiB of level 2 memory.
- STM32N6 image classification example of STMicroelectronics, STM32N6-GettingStarted-ImageClassification (GitHub,
  2423082), *Model/my_mpools/stm32n6-app2_STM32N6570-DK.mpool*: four adjoining memories of 448 KiB for the accelerator.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from retensor.files import brief, described
from retensor.planning.plan import Accelerator
from retensor.units import parse_size


@dataclass(frozen=True)
class Preset:
    """An accelerator that public documents describe.

    Attributes
    ----------
    accelerator : Accelerator
    what : str
        Which chip or configuration it is.
    source : str
        Which document says so; this module's docstring has the titles.
    note : str
        What the figures leave out.
    elements : str, optional
        The type of elements that the rate is of, where it is not for any.
    """

    accelerator: Accelerator
    what: str
    source: str
    note: str = ""
    elements: str | None = None


def _preset(
    name: str,
    what: str,
    source: str,
    scratchpad: str,
    alignment: int = 1,
    bandwidth: float | None = None,
    macs_per_second: float | None = None,
    note: str = "",
    elements: str | None = None,
) -> tuple[str, Preset]:
    chip = Accelerator(scratchpad, alignment, name, bandwidth, macs_per_second)
    return name, Preset(chip, what, source, note, elements)


PRESETS: Mapping[str, Preset] = dict(
    [
        *(
            _preset(
                f"ethos-u55-{macs}",
                f"Arm Ethos-U55, {macs} MACs a cycle at 500 MHz, SRAM of Corstone-300",
                "Vela 5.2.0 (Ethos_U55_High_End_Embedded, Shared_Sram); ML Embedded Evaluation Kit",
                "2MiB",
                16,
                0.5e9,
                macs * 500e6,
                "the SRAM is shared with the processor; off-chip is flash that is only read, where feature maps cannot "
                "be spilled",
                "int8",
            )
            for macs in (32, 64, 128, 256)
        ),
        *(
            _preset(
                f"ethos-u65-{macs}",
                f"Arm Ethos-U65, {macs} MACs a cycle at 1 GHz",
                "Vela 5.2.0 (Ethos_U65_High_End, Dedicated_Sram_384KB)",
                "384KiB",
                16,
                3.75e9,
                macs * 1e9,
                elements="int8",
            )
            for macs in (256, 512)
        ),
        _preset(
            "nvdla-small",
            "NVDLA nv_small, 64 MACs a cycle at 1 GHz",
            "NVDLA hardware (nv_small.spec); NVDLA documentation",
            "128KiB",
            8,
            1e9,
            64 * 1e9,
            "the buffer holds weights too; clock and bandwidth are those of NVIDIA's estimates",
            "int8",
        ),
        _preset(
            "nvdla-large",
            "NVDLA nv_large, 2048 MACs a cycle at 1 GHz",
            "NVDLA hardware (nv_large.spec); NVDLA documentation",
            "512KiB",
            32,
            20e9,
            2048 * 1e9,
            "the buffer holds weights too; clock and bandwidth are those of NVIDIA's estimates",
            "int8",
        ),
        _preset(
            "gemmini",
            "Gemmini's default generator configuration, 256 MACs a cycle",
            "Gemmini generator (defaultConfig)",
            "256KiB",
            16,
            note="besides 64 KiB of accumulators; the clock is not stated",
        ),
        _preset(
            "eyeriss",
            "Eyeriss, the chip of 2016, 168 MACs a cycle at 200 MHz, 16 bits",
            "Sze et al. 2017; Benchmarking DNN Processors",
            "108KiB",
            1,
            None,
            168 * 200e6,
            "its elements are fixed-point numbers of two bytes: count with float16",
            "float16",
        ),
        _preset(
            "edge-tpu",
            "Google Coral Edge TPU over PCIe, 4 TOPS",
            "Coral tutorials; Coral Accelerator Module datasheet 1.4; Hardware Secrets; Edge TPU FAQ",
            "8MB",
            1,
            500e6,
            2e12,
            "the SRAM, of about that size, caches weights first; the share of feature maps is not stated; PCIe has "
            "this bandwidth each way",
            "int8",
        ),
        _preset(
            "max78000",
            "Analog Devices MAX78000, 64 processors at 50 MHz",
            "MAX78000 synthesis tools",
            "512KiB",
            4,
            None,
            64 * 9 * 50e6,
            "432 KiB for weights besides; nothing lies off-chip; the rate is that of 3 x 3 kernels",
            "int8",
        ),
        _preset(
            "k210",
            "Canaan Kendryte K210, its neural network processor at 400 MHz",
            "K210 datasheet; nncase; Sipeed",
            "2MiB",
            64,
            None,
            0.23e12,
            "6 MiB of general SRAM besides, on-chip too",
            "int8",
        ),
        _preset(
            "gap8",
            "GreenWaves GAP8, its level 2 memory",
            "GAP SDK",
            "512KiB",
            note="the level 2 memory holds code too; tiles go through 64 KiB of level 1 memory, which are not counted",
        ),
        _preset(
            "stm32n6",
            "STMicroelectronics STM32N6, the memories of its Neural-ART accelerator",
            "STM32N6 image classification example",
            "1792KiB",
            note="the chip has further SRAM, which the processor uses too",
        ),
    ]
)
"""The presets by name, in the order of the table."""


def caveats(chip: Accelerator, dtype: str | None = None) -> list[str]:
    """What to know of figures for an accelerator: a preset's note, and whether elements are of the type of its rate.

    Parameters
    ----------
    chip : Accelerator
        Nothing is said of one that is no preset.
    dtype : str, optional
        The type that elements were counted at; the model's own by default.

    Returns
    -------
    list of str

    Examples
    --------
    >>> caveats(PRESETS["ethos-u65-256"].accelerator, "int8"), caveats(Accelerator(1024))
    ([], [])
    >>> caveats(PRESETS["ethos-u65-256"].accelerator)
    ["the rate of ethos-u65-256 is for int8 elements; count at those by the dtype 'int8'"]
    """
    preset = PRESETS.get(chip.name or "")
    if preset is None or (preset.accelerator.bandwidth, preset.accelerator.macs_per_second) != (
        chip.bandwidth,
        chip.macs_per_second,
    ):
        return []
    told = [f"{chip.name}: {preset.note}"] if preset.note else []
    if preset.elements is not None and dtype != preset.elements:
        kind = preset.elements
        told.append(f"the rate of {chip.name} is for {kind} elements; count at those by the dtype '{kind}'")
    return told


def accelerator_named(given: Accelerator | str | int) -> Accelerator:
    """An accelerator from a preset's name, or from a size.

    Parameters
    ----------
    given : Accelerator, str or int
        One ready made, a name of :data:`PRESETS`, or a scratchpad as :class:`Accelerator` takes it.

    Raises
    ------
    ValueError
        Where the text is neither.

    Examples
    --------
    >>> accelerator_named("ethos-u65-256").macs_per_second
    256000000000.0
    >>> accelerator_named("2MiB")
    Accelerator(scratchpad='2MiB', alignment=1, name=None, bandwidth=None, macs_per_second=None)
    """
    if isinstance(given, Accelerator):
        return given
    if not isinstance(given, str):
        return Accelerator(given)
    if given in PRESETS:
        return PRESETS[given].accelerator
    try:
        parse_size(given, dict.fromkeys(("M_R", "M_P", "M_H"), 2**20))
    except ValueError as error:
        # What starts like a number was meant for a size.
        if given.strip()[:1].isdigit() or "M_" in given:
            raise
        raise ValueError(
            f"no accelerator is named {described(brief(given, 60))}{_suggestion(given)}; "
            f"known are {', '.join(PRESETS)}, or give a size such as 2MiB or M_R"
        ) from error
    return Accelerator(given)


def _suggestion(given: str) -> str:
    near = difflib.get_close_matches(given.lower(), PRESETS, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
