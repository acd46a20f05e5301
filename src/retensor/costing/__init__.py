"""The cost sheet of a model, and several of them side by side.

The folder is not called ``cost``: a module of that name would stand in the way of the function ``retensor.cost``.
"""

from retensor.costing.compare import Comparison, compare
from retensor.costing.picture import plot_comparison
from retensor.costing.price import cost
from retensor.costing.sheet import CostSheet

__all__ = ["Comparison", "CostSheet", "compare", "cost", "plot_comparison"]
